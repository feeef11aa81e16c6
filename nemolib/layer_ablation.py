"""Whole layers switched off: key and value layers of cross-attention set to zero, channels of convolutions blocked.

The paper asks where in the UNet memorization sits before it looks for neurons (App. C.8, C.9). Its interventions are
mitigations here, so that `nemolib.generate` and the store of images work with them:

    with ZeroedLayers(("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",)).applied(pipe, [prompt]) as inputs:
        image = pipe(**inputs).images[0]

Layers are numbered from 1 in the order in which an image passes them: down blocks, middle block, up blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nemolib.mitigation import Mitigation
from nemolib.provenance import science_hash
from nemolib.seeding import stream

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Part = Literal["value", "key", "convolution"]

BLOCKS = ("down", "mid", "up")
"""Parts of a UNet, in the order in which an image passes them."""

_ENDINGS = {"value": ".attn2.to_v", "key": ".attn2.to_k"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that is switched off.

    Attributes:
        part: ``value`` or ``key`` (of cross-attention), or ``convolution``.
        number: Position among the layers of its part, from 1.
        block: ``down``, ``mid`` or ``up``.
        name: Address of the module in the UNet.
    """

    part: Part
    number: int
    block: str
    name: str


def cross_attention_layers(unet: nn.Module, part: Literal["value", "key"]) -> tuple[Layer, ...]:
    """Return the value or the key layers of all cross-attention blocks, those of the up blocks among them.

    Source: App. C.8. Stable Diffusion v1 has 6 in the down blocks, 1 in the middle block and 9 in the up blocks.

    Args:
        unet: A conditional UNet of diffusers.
        part: ``value`` or ``key``.

    Raises:
        ValueError: The part is unknown, or the model has no cross-attention.
    """
    if part not in _ENDINGS:
        raise ValueError(f"unknown part {part!r}; known: {', '.join(_ENDINGS)}")
    names = [name for name, _ in unet.named_modules() if name.endswith(_ENDINGS[part])]
    if not names:
        raise ValueError(f"{type(unet).__name__} has no {part} layers of cross-attention (modules '*{_ENDINGS[part]}')")
    return _numbered(part, names)


def down_convolutions(unet: nn.Module) -> tuple[Layer, ...]:
    """Return the convolutions of the residual blocks of the down blocks: 16 in Stable Diffusion v1.

    Source: App. C.9, Fig. 20.

    Args:
        unet: A UNet of diffusers.

    Raises:
        ValueError: The model has none.
    """
    names = [
        name
        for name, module in unet.named_modules()
        if name.startswith("down_blocks.") and ".resnets." in name and name.endswith((".conv1", ".conv2"))
        if isinstance(module, nn.Conv2d)
    ]
    if not names:
        raise ValueError(f"{type(unet).__name__} has no convolutions in residual blocks of its down blocks")
    return _numbered("convolution", names)


def spread(layers: Sequence[Layer], most: int) -> tuple[Layer, ...]:
    """Return at most so many of the layers, evenly spread from the first to the last.

    Raises:
        ValueError: The number is below 1.
    """
    if most < 1:
        raise ValueError(f"at most {most} layers are asked for; it must be at least 1")
    if len(layers) <= most:
        return tuple(layers)
    if most == 1:
        return (layers[0],)
    return tuple(layers[round(place * (len(layers) - 1) / (most - 1))] for place in range(most))


@contextmanager
def zero_layers(unet: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Set the outputs of layers to zero in every UNet pass inside the context.

    Args:
        unet: A UNet.
        names: Addresses of the layers.

    Raises:
        ValueError: A layer does not exist.
    """
    modules = [_module(unet, name) for name in names]
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(_zero))
        yield


@contextmanager
def block_channels(unet: nn.Module, name: str, channels: Sequence[int]) -> Iterator[None]:
    """Set output channels of a convolution to zero in every UNet pass inside the context.

    Args:
        unet: A UNet.
        name: Address of the convolution.
        channels: The channels.

    Raises:
        ValueError: There is no such convolution, or it does not have a channel.
    """
    module = _convolution(unet, name)
    wrong = [channel for channel in channels if not 0 <= channel < module.out_channels]
    if wrong:
        raise ValueError(f"{name} has no channel {wrong[0]}; allowed are 0 to {module.out_channels - 1}")
    scales = torch.ones(1, module.out_channels, 1, 1)
    scales[:, list(channels)] = 0
    with module.register_forward_hook(lambda module, args, output: output * scales.to(output)):
        yield


@contextmanager
def collect_outputs(unet: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs of modules in every UNet pass inside the context.

    Args:
        unet: A UNet.
        names: Addresses of the modules.

    Yields:
        Address -> a list that grows by one tensor [sample, ...] per pass.

    Raises:
        ValueError: A module does not exist.
    """
    modules = {name: _module(unet, name) for name in names}
    collected: dict[str, list[Tensor]] = {name: [] for name in modules}
    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(_collector(collected[name])))
        yield collected


@dataclass(frozen=True)
class ZeroedLayers(Mitigation):
    """Key or value layers of cross-attention whose outputs are zero, with and without guidance.

    With values of zero nothing of the text passes the layer; with keys of zero every token gets the same attention.

    Source: App. C.8, Fig. 16 to 19.

    Attributes:
        layers: Addresses of the layers in the UNet.
    """

    source: ClassVar[str] = "Hintersdorf et al. (NeurIPS 2024), App. C.8"

    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        """Keep the addresses as a tuple, each once, in one order."""
        if isinstance(self.layers, str):
            raise TypeError(f"one address was given ({self.layers!r}); give a tuple of addresses")
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        return f"{len(self.layers)} zeroed layer{'' if len(self.layers) == 1 else 's'}"

    def identity(self, prompt: str) -> list[Any]:
        """Return the layers; nothing if there are none."""
        return ["zeroed layers", self.layers, _code()] if self.layers else []

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a pipeline whose cross-attention does not have these layers."""
        super().check(pipe)
        known = {layer.name for part in _ENDINGS for layer in cross_attention_layers(pipe.unet, part)}
        for name in self.layers:
            if name not in known:
                raise ValueError(f"{name!r} is no key or value layer of cross-attention, such as {min(known)!r}")

    @contextmanager
    def _prepared(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> Iterator[dict[str, Any]]:
        with zero_layers(pipe.unet, self.layers):
            yield {"prompt": prompts}


@dataclass(frozen=True)
class BlockedChannels(Mitigation):
    """A convolution of which a random share of the output channels is zero.

    Source: App. C.9, Fig. 20 (half of the neurons of a layer).

    Attributes:
        layer: Address of the convolution in the UNet.
        share: Share of its channels, in [0, 1].
        seed: Seed of the draw; each layer has random numbers of its own, and a larger share holds a smaller one.

    Raises:
        ValueError: The share is outside [0, 1].
    """

    source: ClassVar[str] = "Hintersdorf et al. (NeurIPS 2024), App. C.9"

    layer: str
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject a share that is none."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; a share of the channels is in [0, 1]")

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        return f"{self.share:.0%} of the channels blocked"

    def channels(self, width: int) -> tuple[int, ...]:
        """Return the blocked channels of a layer of that many, in order."""
        order = stream(self.seed, "channels", self.layer).permutation(width)
        return tuple(sorted(order[: round(self.share * width)].tolist()))

    def identity(self, prompt: str) -> list[Any]:
        """Return layer, share and seed; nothing if no channel is blocked."""
        return ["blocked channels", self.layer, float(self.share), self.seed, _code()] if self.share else []

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a pipeline without this convolution."""
        super().check(pipe)
        _convolution(pipe.unet, self.layer)

    @contextmanager
    def _prepared(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> Iterator[dict[str, Any]]:
        width = _convolution(pipe.unet, self.layer).out_channels
        with block_channels(pipe.unet, self.layer, self.channels(width)):
            yield {"prompt": prompts}


def switched_off(layer: Layer, *, share: float = 0.5, seed: int = 0) -> Mitigation:
    """Return the paper's intervention on a layer: values or keys of zero, or a share of the channels of a convolution.

    Args:
        layer: The layer.
        share: Share of the channels that are blocked; for convolutions only.
        seed: Seed of their draw.
    """
    if layer.part == "convolution":
        return BlockedChannels(layer.name, share, seed)
    return ZeroedLayers((layer.name,))


@functools.cache
def _code() -> str:
    """Return what images depend on besides the settings: this module's code, which `nemolib.generation` does not import."""
    return science_hash("layer_ablation")


def _numbered(part: Part, names: Sequence[str]) -> tuple[Layer, ...]:
    """Return layers in the order in which an image passes them; a UNet lists its middle block last."""
    placed = sorted(((_block(name), name) for name in names), key=lambda item: BLOCKS.index(item[0]))
    return tuple(Layer(part, number, block, name) for number, (block, name) in enumerate(placed, start=1))


def _block(name: str) -> str:
    return name.partition("_")[0]


def _module(unet: nn.Module, name: str) -> nn.Module:
    try:
        return unet.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(unet).__name__} has no module {name!r}") from None


def _convolution(unet: nn.Module, name: str) -> nn.Conv2d:
    module = _module(unet, name)
    if not isinstance(module, nn.Conv2d):
        raise ValueError(f"{name!r} is a {type(module).__name__}; channels are those of a Conv2d")
    return module


def _zero(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _collector(outputs: list[Tensor]) -> Any:
    def collect(module: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        outputs.append(first.detach().clone())

    return collect
