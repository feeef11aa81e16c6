"""Layers of a UNet: those in which the paper looks for memorization neurons, and what is read and changed in them.

Stable Diffusion has 16 cross-attention blocks. The value layers of the seven in the down blocks and the middle block are
searched, in the order in which an image passes them.

All contexts remove exactly the hooks that they added, whatever happens inside: an exception or an interrupted notebook
cell leaves the model as it was.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nemolib.neurons import NeuronSet

STABLE_DIFFUSION_WIDTHS = (320, 320, 640, 640, 1280, 1280, 1280)
"""Neurons of the value layers of Stable Diffusion v1."""

BLOCKS = ("down", "mid", "up")
"""Parts of a UNet, in the order in which an image passes them; a UNet itself lists its middle block last."""

Part = Literal["value", "key", "convolution"]

_ADDRESSES = {
    "value": r"(down|mid|up)_.*\.attn2\.to_v",
    "key": r"(down|mid|up)_.*\.attn2\.to_k",
    "convolution": r"(down)_blocks\..*\.resnets\..*\.conv[12]",
}
"""The addresses of the layers of each part, as regular expressions; the group is the block."""

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Layer, ...]] = weakref.WeakKeyDictionary()
"""The value layers of the models that were asked for."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, as the ablations of App. C.8 and C.9 number them.

    Attributes:
        part: ``value`` or ``key`` (of cross-attention), or ``convolution``.
        number: Position among the layers of its part, from 1, in the order in which an image passes them.
        block: ``down``, ``mid`` or ``up``.
        name: Address of the module in the UNet.
        module: The module itself.
    """

    part: Part
    number: int
    block: str
    name: str
    module: nn.Module

    @property
    def index(self) -> int:
        """Position from 0, as in a neuron set."""
        return self.number - 1

    @property
    def width(self) -> int:
        """Number of neurons of a value or key layer."""
        return int(self.module.out_features)


def value_layers(unet: nn.Module) -> tuple[Layer, ...]:
    """Return the cross-attention value layers of the down blocks, then of the middle block.

    Source: App. C.8; authors' code, utils/activation_detection.py.

    Raises:
        ValueError: The model has no such layer.
    """
    known = _KNOWN.get(unet)
    # Going through all modules takes as long as a twentieth of a small UNet's pass.
    if known is not None and all(_submodule(unet, layer.name) is layer.module for layer in known):
        return known
    layers = cross_attention_layers(unet, "value")
    _KNOWN[unet] = tuple(layer for layer in layers if layer.block != "up")
    return _KNOWN[unet]


def widths(unet: nn.Module) -> tuple[int, ...]:
    """Return the number of neurons of each value layer."""
    return tuple(layer.width for layer in value_layers(unet))


@torch.no_grad()
def value_activations(unet: nn.Module, embeddings: Tensor) -> tuple[Tensor, ...]:
    """Return each neuron's activation for prompts: the mean over tokens of its absolute value.

    The values of cross-attention depend on the text alone, so that no denoising step is needed: the prompt embeddings
    go straight through the value layers.

    Source: Sec. 3.2, Alg. 2.
    Deviates: the authors' code runs a denoising step and reads the same numbers on the way.

    Args:
        unet: A conditional UNet of diffusers.
        embeddings: Prompt embeddings [prompt, token, feature].

    Returns:
        For each layer the activations [prompt, neuron], float32, at least 0.

    Raises:
        ValueError: The embeddings do not have three axes, or the UNet transforms them before its value layers.
    """
    if embeddings.ndim != 3:
        raise ValueError(f"embeddings of shape {tuple(embeddings.shape)}; expected [prompt, token, feature]")
    if getattr(unet, "encoder_hid_proj", None) is not None:
        raise ValueError("this UNet projects the text before its value layers, which is not supported")
    modules = [layer.module for layer in value_layers(unet)]
    values = (module(embeddings.to(module.weight.device, module.weight.dtype)) for module in modules)
    return tuple(layer.float().abs().mean(dim=1) for layer in values)


def value_layer_hash(unet: nn.Module) -> str:
    """Return a hash of the weights of the value layers, which says whether two models share them.

    Weights are rounded to half precision first, so that a model has one hash in float32 and in float16.
    """
    digest = hashlib.sha256()
    for layer in value_layers(unet):
        digest.update(f"{layer.name}:{layer.width}".encode())
        weight = layer.module.weight.detach().to("cpu", torch.float16).contiguous()
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def cross_attention_layers(unet: nn.Module, part: Literal["value", "key"]) -> tuple[Layer, ...]:
    """Return the value or the key layers of all cross-attention blocks, those of the up blocks among them.

    Source: App. C.8. Stable Diffusion v1 has 6 in the down blocks, 1 in the middle block and 9 in the up blocks.

    Raises:
        ValueError: The model has no cross-attention in its down and middle blocks.
    """
    found = _layers(unet, part)
    if not any(layer.block != "up" for layer in found):
        raise ValueError(
            f"{type(unet).__name__} has no cross-attention {part} layers in its down and middle blocks "
            f"(modules '...attn2.to_{part[0]}'); a text-conditional UNet such as Stable Diffusion's is needed"
        )
    return found


def down_convolutions(unet: nn.Module) -> tuple[Layer, ...]:
    """Return the convolutions of the residual blocks of the down blocks: 16 in Stable Diffusion v1.

    Source: App. C.9, Fig. 20.
    """
    return _layers(unet, "convolution")


def spread(layers: Sequence[Layer], most: int) -> tuple[Layer, ...]:
    """Return at most so many of the layers, one at least, evenly spread from the first to the last."""
    if len(layers) <= most:
        return tuple(layers)
    return tuple(layers[round(place * (len(layers) - 1) / max(1, most - 1))] for place in range(most))


@contextmanager
def collect_outputs(unet: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs of modules in every UNet pass inside the context.

    Yields:
        Address -> a list that grows by one tensor [sample, ...] per pass.

    Raises:
        AttributeError: A module does not exist.
    """
    collected: dict[str, list[Tensor]] = {name: [] for name in names}
    with _hooks(unet, {name: _collector(outputs) for name, outputs in collected.items()}):
        yield collected


@contextmanager
def collect_activations(unet: nn.Module) -> Iterator[tuple[list[Tensor], ...]]:
    """Collect the outputs of the value layers of every UNet pass inside the context.

    Yields:
        For each layer a list that grows by one tensor [batch, token, neuron] per pass. With classifier-free guidance
        the batch holds the unconditional half first.

    Raises:
        ValueError: The model has no value layers.
    """
    with collect_outputs(unet, [layer.name for layer in value_layers(unet)]) as collected:
        yield tuple(collected.values())


@contextmanager
def scale_outputs(unet: nn.Module, scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the outputs of modules in every UNet pass inside the context.

    Source: Sec. 3.3 (neurons), App. C.8 (whole layers), App. C.9 (channels of convolutions).
    Deviates: makes a new tensor where the authors' code changes the layer's output in place.

    Args:
        unet: A UNet.
        scales: Address of a module -> what its output is multiplied by: as many axes, of the same length or of length
            1. Where it has several samples, a batch that is a multiple of them repeats them, so that the unconditional
            and the conditional half of classifier-free guidance are treated alike.

    Raises:
        AttributeError: A module does not exist.
        ValueError: (in a pass) The batch is no multiple of the samples.
    """
    device = next(unet.parameters()).device
    with _hooks(unet, {name: _scaler(scale.to(device)) for name, scale in scales.items()}):
        yield


@contextmanager
def scale_neurons(unet: nn.Module, neurons: NeuronSet | Sequence[NeuronSet], *, factor: float = 0.0) -> Iterator[None]:
    """Multiply the values of neurons by a factor in every UNet pass inside the context; 0 deactivates them.

    With a list of neuron sets, sample ``i`` of a batch gets set ``i``; see `scale_outputs` for larger batches.

    Source: Sec. 3.3; authors' code, hooks/block_indices.py.

    Args:
        unet: A conditional UNet of diffusers.
        neurons: One neuron set for all samples, or one per sample.
        factor: What their values are multiplied by.

    Raises:
        ValueError: A set does not fit the model, none is given, or (in a pass) the batch is no multiple of the list.
    """
    sets = [neurons] if isinstance(neurons, NeuronSet) else list(neurons)
    if not sets:
        raise ValueError("no neuron set was given; give one, or one per sample")
    if not all(isinstance(item, NeuronSet) for item in sets):
        raise TypeError(f"expected a NeuronSet or a list of them, got {type(neurons).__name__} {neurons!r}")
    for item in dict.fromkeys(sets):
        item.check(widths(unet))
    used = [layer for layer in value_layers(unet) if any(item.layers[layer.index] for item in sets)]
    with scale_outputs(unet, {layer.name: _neuron_scales(layer, sets, factor) for layer in used}):
        yield


@contextmanager
def deactivate(pipe: Any, neurons: NeuronSet, *, factor: float = 0.0) -> Iterator[Any]:
    """Deactivate neurons of a pipeline inside the context.

    Source: Sec. 3.3.

    Args:
        pipe: A StableDiffusionPipeline.
        neurons: The neurons.
        factor: What their values are multiplied by; 0 deactivates, 1 changes nothing.

    Yields:
        The pipeline.

    Raises:
        ValueError: The set does not fit the model.
    """
    with scale_neurons(pipe.unet, neurons, factor=factor):
        yield pipe


def _layers(unet: nn.Module, part: Part) -> tuple[Layer, ...]:
    """Return the layers of a part in the order in which an image passes them."""
    matches = [(re.fullmatch(_ADDRESSES[part], name), module) for name, module in unet.named_modules()]
    placed = [(block, *pair) for block in BLOCKS for pair in matches if pair[0] and pair[0][1] == block]
    return tuple(
        Layer(part, number, block, match[0], module) for number, (block, match, module) in enumerate(placed, 1)
    )


def _submodule(unet: nn.Module, name: str) -> nn.Module | None:
    """Return the module of an address, None if there is none (any more)."""
    try:
        return unet.get_submodule(name)
    except AttributeError:
        return None


@contextmanager
def _hooks(unet: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Call functions after the modules of these addresses inside the context."""
    with ExitStack() as handles:
        for name, function in functions.items():
            handles.enter_context(unet.get_submodule(name).register_forward_hook(function))
        yield


def _collector(outputs: list[Tensor]) -> Callable[..., None]:
    def collect(module: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        outputs.append(first.detach().clone())

    return collect


def _scaler(scales: Tensor) -> Callable[..., Tensor]:
    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        batch, samples = output.shape[0], scales.shape[0]
        if batch % samples:
            raise ValueError(f"{samples} neuron sets were given for a batch of {batch}; give one, or one per sample")
        return output * scales.to(output).repeat(batch // samples, *[1] * (scales.ndim - 1))

    return scale


def _neuron_scales(layer: Layer, sets: Sequence[NeuronSet], factor: float) -> Tensor:
    """Return what the values of a layer are multiplied by, [sample, 1, neuron]."""
    scales = torch.ones(len(sets), 1, layer.width)
    for row, neurons in zip(scales, sets, strict=True):
        row[0, list(neurons.layers[layer.index])] = factor
    return scales
