"""The value layers of a UNet: where the paper looks for memorization neurons.

Stable Diffusion has 16 cross-attention blocks. The value projections of the seven in the down blocks and the middle
block are searched, in the order in which an image passes them.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NAME = re.compile(r"^(down_blocks\.\d+|mid_block)\.attentions\.\d+\..*attn2\.to_v$")

STABLE_DIFFUSION_WIDTHS = (320, 320, 640, 640, 1280, 1280, 1280)
"""Neurons of the value layers of Stable Diffusion v1."""

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[ValueLayer, ...]] = weakref.WeakKeyDictionary()
"""The value layers of the models that were asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class ValueLayer:
    """One value layer.

    Attributes:
        index: Position among the value layers, from 0 (the paper counts from 1).
        name: Address of the module in the UNet.
        width: Number of neurons.
        module: The linear layer itself.
    """

    index: int
    name: str
    width: int
    module: nn.Module


def value_layers(unet: nn.Module) -> tuple[ValueLayer, ...]:
    """Return the cross-attention value layers of the down blocks, then of the middle block.

    Source: App. C.8; authors' code, utils/activation_detection.py.

    Args:
        unet: A conditional UNet of diffusers.

    Raises:
        ValueError: The model has no such layer.
    """
    known = _KNOWN.get(unet)
    # Going through all modules takes as long as a twentieth of a small UNet's pass.
    if known is not None and all(_module(unet, layer.name) is layer.module for layer in known):
        return known
    named = [(name, module) for name, module in unet.named_modules() if _NAME.match(name)]
    named.sort(key=lambda item: item[0].startswith("mid_block"))
    if not named:
        raise ValueError(
            f"{type(unet).__name__} has no cross-attention value layers in its down and middle blocks "
            "(modules '...attn2.to_v'); a text-conditional UNet such as Stable Diffusion's is needed"
        )
    found = tuple(ValueLayer(i, name, _width(module), module) for i, (name, module) in enumerate(named))
    _KNOWN[unet] = found
    return found


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
    return tuple(_activations(layer.module, embeddings) for layer in value_layers(unet))


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


def _module(unet: nn.Module, name: str) -> nn.Module | None:
    """Return the module of a name, None if there is none any more."""
    try:
        return unet.get_submodule(name)
    except AttributeError:
        return None


def _width(module: nn.Module) -> int:
    return int(module.out_features)


def _activations(module: nn.Module, embeddings: Tensor) -> Tensor:
    weight = module.weight
    values = module(embeddings.to(weight.device, weight.dtype))
    return values.float().abs().mean(dim=1)
