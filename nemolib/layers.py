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
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from nemolib.neurons import NeuronSet
from nemolib.seeding import latents

STABLE_DIFFUSION_WIDTHS = (320, 320, 640, 640, 1280, 1280, 1280)
"""Neurons of the value layers of Stable Diffusion v1."""

BLOCKS = ("down", "mid", "up")
"""Parts of a UNet, in the order in which an image passes them; a UNet itself lists its middle block last."""

Part = Literal["value", "key", "convolution"]

Guided = Callable[[], bool]
"""Tells in a UNet pass whether its batch has two halves, for classifier-free guidance."""

_ADDRESSES = {
    "value": r"(down|mid|up)_.*\.attn2\.to_v",
    "key": r"(down|mid|up)_.*\.attn2\.to_k",
    "convolution": r"(down)_blocks\..*\.resnets\..*\.conv[12]",
}
"""The addresses of the layers of each part, as regular expressions; the group is the block."""

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Layer, ...]] = weakref.WeakKeyDictionary()
"""The value layers of the models that were asked for."""

_ACTING: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()
"""The kinds of attention of the models whose neurons were found to act."""


class NotFiniteError(ValueError):
    """Numbers that left a model are not finite, so that nothing follows from them."""


def finite(values: Any, quantity: str, prompts: Sequence[str] = ()) -> Any:
    """Return numbers that left a model as they are.

    Args:
        values: A tensor or an array.
        quantity: What they are called.
        prompts: What each item of the first axis belongs to.

    Raises:
        NotFiniteError: One of them is not a number, or infinite: no score may be made of it, and no threshold.
    """
    good = values.isfinite() if isinstance(values, Tensor) else torch.from_numpy(np.isfinite(values))
    if not good.all():
        item = int(good.reshape(len(good), -1).all(dim=1).int().argmin())
        of = f" of prompt {prompts[item]!r}" if prompts else ""
        raise NotFiniteError(
            f"{quantity}{of}: not all numbers are finite in {values.dtype}; where a model overflows in half precision, load "
            "it with dtype float32 or bfloat16; where a weight is not finite, load the model again"
        )
    return values


@contextmanager
def naming(prompt: str) -> Iterator[None]:
    """Let a NotFiniteError that is raised inside name the prompt."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"prompt {prompt!r}: {error}") from error


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
    if known is not None and all(submodule(unet, layer.name) is layer.module for layer in known):
        return known
    _KNOWN[unet] = tuple(layer for layer in cross_attention_layers(unet, "value") if layer.block != "up")
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
        NotFiniteError: A value is not finite.
    """
    if embeddings.ndim != 3:
        raise ValueError(f"embeddings of shape {tuple(embeddings.shape)}; expected [prompt, token, feature]")
    if getattr(unet, "encoder_hid_proj", None) is not None:
        raise ValueError("this UNet projects the text before its value layers, which is not supported")
    embeddings = embeddings.to(*placement(unet))
    values = (finite(layer.module(embeddings), f"values of {layer.name}") for layer in value_layers(unet))
    return tuple(value.float().abs().mean(dim=1) for value in values)


def value_layer_hash(unet: nn.Module) -> str:
    """Return a hash of the weights of the value layers, which says whether two models share them.

    Weights are rounded to half precision first, so that a model has one hash in float32 and in float16.
    """
    digest = hashlib.sha256()
    for layer in value_layers(unet):
        digest.update(f"{layer.name}:{layer.width}".encode())
        with align_module_device(layer.module):
            weight = layer.module.weight
            # Of a layer in int8 it is a method.
            weight = weight().dequantize() if callable(weight) else weight.detach()
            digest.update(weight.to("cpu", torch.float16).contiguous().numpy().tobytes())
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
            + ("; it is wrapped: use its .module" if hasattr(unet, "module") else "")
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

    def collect(name: str, module: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        collected[name].append(first.detach().clone())

    with _hooks(unet, {name: partial(collect, name) for name in names}):
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
def scale_outputs(unet: nn.Module, scales: Mapping[str, Tensor], *, guided: Guided | None = None) -> Iterator[None]:
    """Multiply the outputs of modules in every UNet pass inside the context.

    Source: Sec. 3.3 (neurons), App. C.8 (whole layers), App. C.9 (channels of convolutions).
    Deviates: makes a new tensor where the authors' code changes the layer's output in place.

    Args:
        unet: A UNet.
        scales: Address of a module -> what its output is multiplied by: as many axes, of the same length or of length
            1. Where it has several samples, a batch that is a multiple of them repeats them (`sample_of_each`), so that
            the unconditional and the conditional half of classifier-free guidance are treated alike.
        guided: As in `sample_of_each`.

    Raises:
        AttributeError: A module does not exist.
        ValueError: (in a pass) The batch is no multiple of the samples.
    """
    device, _ = placement(unet)

    def scale(factors: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        chosen = factors.to(output)
        if len(factors) > 1:
            chosen = chosen[sample_of_each(len(output), len(factors), guided).to(output.device)]
        return output * chosen

    with _hooks(unet, {name: partial(scale, factors.to(device)) for name, factors in scales.items()}):
        yield


def sample_of_each(batch: int, samples: int, guided: Guided | None = None) -> Tensor:
    """Return which of some prepared samples each row of a batch belongs to, [row].

    Args:
        batch: Number of rows, a multiple of the samples. Pipelines put the unconditional half before the conditional
            one, and in each of them the images of a prompt one after the other (``num_images_per_prompt``).
        samples: Number of samples.
        guided: Tells whether there are two halves, as `guidance_of` does of a call of a pipeline; None: each sample has
            one image, so that a larger batch has so many parts.

    Raises:
        ValueError: The batch is no multiple of the samples.
    """
    parts = batch // samples if guided is None else 1 + guided()
    if not parts or batch % (parts * samples):
        raise ValueError(
            f"{samples} samples were prepared, but the batch has {batch}; give one for all, or one per prompt"
        )
    return torch.arange(samples, device="cpu").repeat_interleave(batch // (parts * samples)).repeat(parts)


def guidance_of(pipe: Any) -> Guided:
    """Return what tells whether the call that a pipeline is in makes both halves of classifier-free guidance."""
    return lambda: bool(getattr(pipe, "do_classifier_free_guidance", False))


@contextmanager
def scale_neurons(
    unet: nn.Module, neurons: NeuronSet | Sequence[NeuronSet], *, factor: float = 0.0, guided: Guided | None = None
) -> Iterator[None]:
    """Multiply the values of neurons by a factor in every UNet pass inside the context; 0 deactivates them.

    With a list of neuron sets, sample ``i`` of a batch gets set ``i``; see `scale_outputs` for larger batches.

    Source: Sec. 3.3; authors' code, hooks/block_activations.py.

    Args:
        unet: A conditional UNet of diffusers.
        neurons: One neuron set for all samples, or one per sample.
        factor: What their values are multiplied by.
        guided: As in `sample_of_each`.

    Raises:
        TypeError: No set is given, or something else.
        ValueError: A set does not fit the model, or (in a pass) the batch is no multiple of the list.
    """
    sets = [neurons] if isinstance(neurons, NeuronSet) else list(neurons)
    if not sets or not all(isinstance(item, NeuronSet) for item in sets):
        raise TypeError(f"expected a NeuronSet or a list of at least one, got {type(neurons).__name__} {neurons!r}")
    for item in dict.fromkeys(sets):
        item.check(widths(unet))
    scales = {}
    for layer in value_layers(unet):
        chosen = [list(item.layers[layer.index]) for item in sets]
        if any(chosen):
            scales[layer.name] = torch.ones(len(sets), 1, layer.width, dtype=torch.float32, device="cpu")
            for sample, neurons in enumerate(chosen):
                scales[layer.name][sample, 0, neurons] = factor
    with scale_outputs(unet, scales, guided=guided):
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
        ValueError: The set does not fit the model, or its neurons do not act (`check_neurons_act`).
    """
    check_neurons_act(pipe.unet)
    with scale_neurons(pipe.unet, neurons, factor=factor):
        yield pipe


class OpenAttention:
    """An attention processor of diffusers for cross-attention, whose logits can be changed and probabilities seen.

    Args:
        change: Gives the logits [sample, head, position, token] that are used in place of those it is given.
        see: Is given the probabilities, same axes.
    """

    def __init__(
        self, *, change: Callable[[Tensor], Tensor] | None = None, see: Callable[[Tensor], None] | None = None
    ) -> None:
        self._change, self._see = change, see

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Tensor:
        """Return the output of an attention layer, [sample, position, channel]; arguments as diffusers gives them.

        Raises:
            ValueError: There are no text features, or there is a mask of another origin.
        """
        if encoder_hidden_states is None or attention_mask is not None:
            raise ValueError("cross-attention needs text features here, and cannot take a mask of another origin")
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        logits = query.float() @ key.float().mT * attn.scale
        weights = (self._change(logits) if self._change else logits).softmax(dim=-1)
        if self._see:
            self._see(weights)
        output = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        for part in attn.to_out:
            output = part(output)
        return output


def attention_layers(unet: nn.Module, blocks: Sequence[str] = BLOCKS) -> tuple[str, ...]:
    """Return the addresses of the cross-attention layers in these blocks, in the order in which an image passes them.

    Raises:
        ValueError: The model has no cross-attention in its down and middle blocks.
    """
    found = cross_attention_layers(unet, "value")
    return tuple(layer.name.removesuffix(".to_v") for layer in found if layer.block in blocks)


@contextmanager
def processors(unet: nn.Module, chosen: Mapping[str, OpenAttention]) -> Iterator[None]:
    """Give attention layers (address -> processor) other processors inside the context."""
    with ExitStack() as before:
        # Compiled code knows of no other processor.
        before.enter_context(torch.compiler.set_stance("force_eager"))
        for name, processor in chosen.items():
            layer = unet.get_submodule(name)
            before.callback(layer.set_processor, layer.processor)
            layer.set_processor(processor)
        yield


@torch.no_grad()
def check_neurons_act(unet: nn.Module) -> None:
    """Check that a UNet without the neurons of a value layer gives something else, for each of these layers.

    Hooks may be there and not act, such as where attention takes the weights of a layer and does not call it. So one
    small pass is made, and none for a model whose attention was tested before and is the same.

    Raises:
        ValueError: The neurons of a layer do not act.
        NotFiniteError: What the UNet gives is not finite.
    """
    layers = value_layers(unet)
    attention = [repr(type(unet.get_submodule(layer.name.rpartition(".")[0]).processor)) for layer in layers]
    if _ACTING.get(unet) == attention:
        return
    none = NeuronSet.empty(len(layers))
    alone = [NeuronSet.of([(i, n) for n in range(width)], layers=len(layers)) for i, width in enumerate(widths(unet))]
    # The first and the last sample are equal: what they differ by is rounding.
    sets = [none, *alone, none]
    shapes = (unet.config.in_channels, *[2 ** len(unet.down_blocks)] * 2), (1, 8, layers[0].module.in_features)
    drawn = (latents(shape, samples=1, seed=0).to(*placement(unet)) for shape in shapes)
    noise, text = (item.repeat(len(sets), 1, 1, 1) for item in drawn)
    with scale_neurons(unet, sets):
        outputs = finite(unet(noise, 500, text[:, 0], return_dict=False)[0], "predicted noise").float()
    changes = (outputs - outputs[0]).flatten(1).abs().amax(dim=1).tolist()
    idle = [layer.name for layer, change in zip(layers, changes[1:], strict=False) if not change > 10 * changes[-1]]
    if idle:
        raise ValueError(
            f"neurons of {idle[0]} ({len(idle)} of {len(layers)} value layers) do not act: without them the UNet gives "
            f"the same; where projections are fused, call pipe.unfuse_qkv_projections(); its attention is {attention[0]}"
        )
    _ACTING[unet] = attention


def placement(unet: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and the type in which a model takes its input; one whose weights are offloaded moves it itself."""
    weight = next(unet.parameters())
    # Weights of one byte are cast layer by layer to what diffusers calls the model's type.
    dtype = weight.dtype if weight.dtype.itemsize > 1 else unet.dtype
    return torch.device("cpu") if weight.is_meta else weight.device, dtype


def _layers(unet: nn.Module, part: Part) -> tuple[Layer, ...]:
    """Return the layers of a part in the order in which an image passes them."""
    # A compiled model wraps the original one, and has another name for its modules.
    named = getattr(unet, "_orig_mod", unet).named_modules()
    found = [(match[1], name, module) for name, module in named if (match := re.fullmatch(_ADDRESSES[part], name))]
    found.sort(key=lambda item: BLOCKS.index(item[0]))
    return tuple(Layer(part, number, *item) for number, item in enumerate(found, 1))


def submodule(unet: nn.Module, name: str) -> nn.Module | None:
    """Return the module of an address, None if there is none (any more)."""
    try:
        return unet.get_submodule(name)
    except AttributeError:
        return None


@contextmanager
def _hooks(unet: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Call functions after the modules of these addresses inside the context; compiled code, which may not, is left out."""
    with ExitStack() as handles:
        handles.enter_context(torch.compiler.set_stance("force_eager"))
        for name, function in functions.items():
            handles.enter_context(unet.get_submodule(name).register_forward_hook(function))
        yield
