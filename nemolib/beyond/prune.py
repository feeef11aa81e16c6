"""Take memorization neurons out of a model for good, and hand the repaired model on.

    taken = prune(pipe, neurons)
    pipe.save_pretrained("repaired", safe_serialization=True)    # a folder that diffusers loads without nemolib
    restore(pipe, taken)
    write_patch(pipe, neurons, "neurons.safetensors")             # or the changed rows alone, a few kilobytes

Who has the original model applies the patch with `apply_patch`, or without nemolib with ``examples/apply_patch.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nemolib.batching import check_prompts
from nemolib.beyond.denoising import Denoising
from nemolib.first_step import initial_latents
from nemolib.layers import value_layer_hash, value_layers, widths
from nemolib.neurons import NeuronSet
from nemolib.paths import write_atomic
from nemolib.pipeline import embed

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Weights = dict[str, tuple[Tensor, Tensor]]
"""Name of a parameter of the UNet -> an index into it, and the values there."""

_ENDING = ".ff.net.2"
"""Address of the second linear layer of a feed-forward block."""


def prune(pipe: StableDiffusionPipeline, neurons: NeuronSet, *, factor: float = 0.0) -> Weights:
    """Scale the rows of the value layers (and their biases) that compute neurons; return what `restore` needs.

    The model then makes the images that it makes with the neurons deactivated, to the last bit in float32 if the factor
    is 0 or another power of two; with others up to the rounding of one product.

    Source: Hintersdorf et al. (NeurIPS 2024), Sec. 3.3, who deactivate neurons by hooks; no code prunes them.

    Args:
        pipe: A StableDiffusionPipeline, which is changed.
        neurons: The neurons.
        factor: What their rows are multiplied by; 0 removes them.

    Raises:
        ValueError: The set does not fit the model.
    """
    return _write(pipe.unet, _rows(pipe.unet, neurons, factor))


def restore(pipe: StableDiffusionPipeline, taken: Weights) -> None:
    """Put back the weights that `prune`, `apply_patch` or `prune_weights` took; the last one taken comes first."""
    _write(pipe.unet, taken)


def write_patch(pipe: StableDiffusionPipeline, neurons: NeuronSet, path: str | Path) -> None:
    """Write what `prune` with factor 0 changes as a patch: a safetensors file with the changed rows alone; the model stays as it is.

    Its metadata say the hash of the value layers that it fits (`value_layer_hash`, the same in float32 and float16),
    their addresses in order, the names of the parameters that it changes, and the neuron set.

    Raises:
        ValueError: The set does not fit the model, or is empty.
    """
    rows = _rows(pipe.unet, neurons, 0.0)
    if not rows:
        raise ValueError("the neuron set is empty; there is nothing to write a patch of")
    tensors = {name: values.cpu().contiguous() for name, (_, values) in rows.items()}
    tensors |= {f"{name}:rows": index.cpu() for name, (index, _) in rows.items()}
    metadata = {
        "fits": value_layer_hash(pipe.unet),
        "layers": json.dumps([layer.name for layer in value_layers(pipe.unet)]),
        "parameters": json.dumps(list(rows)),
        "neurons": neurons.to_json(),
    }
    write_atomic(path, save(tensors, metadata=metadata))


def apply_patch(pipe: StableDiffusionPipeline, path: str | Path) -> Weights:
    """Apply a patch to the model that it was made for; return what `restore` needs.

    Raises:
        ValueError: The file is no patch, or belongs to a model with other value layers, or is applied already.
    """
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if not {"fits", "parameters"} <= set(about):
            raise ValueError(f"{path} is no patch; expected a file of nemolib.beyond.prune.write_patch")
        present = value_layer_hash(pipe.unet)
        if about["fits"] != present:
            raise ValueError(
                f"{path} was made for value layers with hash {about['fits'][:12]}, this model's is {present[:12]}: it is "
                "another model, or the patch is applied already"
            )
        names = json.loads(about["parameters"])
        return _write(pipe.unet, {name: (file.get_tensor(f"{name}:rows"), file.get_tensor(name)) for name in names})


def _rows(unet: nn.Module, neurons: NeuronSet, factor: float) -> Weights:
    """Return the scaled rows of neurons, of every weight and bias of their layers."""
    neurons.check(widths(unet))
    rows: Weights = {}
    for layer in value_layers(unet):
        index = torch.tensor(neurons.layers[layer.index], dtype=torch.long)
        if len(index):
            for name, parameter in layer.module.named_parameters():
                rows[f"{layer.name}.{name}"] = (index, parameter.detach()[index] * factor)
    return rows


@torch.no_grad()
def _write(unet: nn.Module, weights: Weights) -> Weights:
    """Write values into parameters; return what was there."""
    before: Weights = {}
    for name, (index, values) in weights.items():
        parameter = unet.get_parameter(name)
        if parameter.is_meta:
            raise ValueError(f"{name} is offloaded and cannot be changed; prune first, then offload the pipeline")
        index = index.to(parameter.device)
        before[name] = (index, parameter[index].clone())
        parameter[index] = values.to(parameter)
    return before


# Weights of the feed-forward blocks, for comparison


def measuring_inputs(
    pipe: StableDiffusionPipeline,
    *,
    first: int = 10,
    steps: int = 50,
    guidance: float = 7.5,
    samples: int = 1,
    seed: int = 0,
) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """Return what sees the inputs of the feed-forward weights for captions: a task (`nemolib.run.Run.compute`).

    It gives for each caption the squared norms of all inputs, [step, input], one layer after the other. Each input row,
    of a position of a sample with or without the prompt, is divided by its own norm first.

    Args:
        pipe: A StableDiffusionPipeline; it is read, never changed.
        first: How many denoising steps are looked at.
        steps: Denoising steps of the schedule; guidance, initial latents per prompt and their seed are those of it.

    Raises:
        ValueError: The model has no such layers.
    """
    model, layers = Denoising(pipe, steps=steps, guidance=guidance), list(_feed_forward(pipe.unet).values())
    latents, seen = initial_latents(pipe, samples=samples, seed=seed), {}

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # [half and caption and sample, position, input] -> [caption, input]
        rows = nn.functional.normalize(args[0].detach().float(), dim=-1).square().sum(dim=1)
        seen[module] = rows.unflatten(0, (2, -1, samples)).sum(dim=(0, 2))

    def measure(captions: Sequence[str]) -> list[np.ndarray]:
        embeddings = embed(pipe, check_prompts(captions)).repeat_interleave(samples, dim=0)
        with ExitStack() as handles:
            for layer in layers:
                handles.enter_context(layer.register_forward_pre_hook(keep))
            walk = model.trajectory(latents.repeat(len(captions), 1, 1, 1), embeddings, until=first)
            found = [torch.cat([seen[layer] for layer in layers], dim=1).cpu() for _ in walk]
        return list(torch.stack(found, dim=1).numpy())

    return measure


def wanda_masks(
    unet: nn.Module, memorized: Sequence[np.ndarray], base: Sequence[np.ndarray], *, sparsity: float = 0.01
) -> dict[str, Tensor]:
    """Return which feed-forward weights serve memorized prompts: name of a weight -> mask [output, input], bool.

    A weight is chosen if in one of the first steps its score, |weight| times the norm of its input, is among the
    largest of its row for the memorized prompts, and above its score for the base prompts.

    Source: Chavhan et al. (arXiv 2406.18566), Wanda (Sun et al., ICLR 2024), layers ``ff.net.2``, ``skill_ratio`` 0.01
        (here: sparsity), union over the first 10 of 50 steps. Code: ruchikachavhan/concept-prune, wanda/, no licence;
        written from the formulas.
    Deviates: a row loses at least one weight, where int(sparsity x inputs) would be none.

    Args:
        unet: The UNet.
        memorized: What `measuring_inputs` saw for prompts that the weights are chosen for, all together.
        base: The same for prompts that they must matter less for, such as unmemorized ones; equally many, since norms
            are sums.
        sparsity: Share of each row that is looked at in each step, in (0, 1].

    Raises:
        ValueError: The share is outside (0, 1], the lists differ in length, or the model has no such layers.
    """
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; it must be in (0, 1]")
    if len(memorized) != len(base):
        raise ValueError(f"{len(memorized)} memorized and {len(base)} base prompts; give equally many")
    weights = {name: module.weight.detach().abs().float() for name, module in _feed_forward(unet).items()}
    sizes = [weight.shape[1] for weight in weights.values()]
    needed, common = (torch.tensor(np.sum(part, axis=0)).sqrt().split(sizes, dim=1) for part in (memorized, base))
    masks = {}
    for (name, weight), mine, theirs in zip(weights.items(), needed, common, strict=True):
        most = max(1, int(sparsity * weight.shape[1]))
        masks[name] = mask = torch.zeros_like(weight, dtype=torch.bool)
        for high, low in zip(mine.to(weight), theirs.to(weight), strict=True):
            top = torch.zeros_like(mask).scatter_(1, (weight * high).topk(most, dim=1).indices, True)
            mask |= top & (weight * high > weight * low)
    return masks


def prune_weights(pipe: StableDiffusionPipeline, masks: dict[str, Tensor]) -> Weights:
    """Set the weights of masks to zero; return what `restore` needs."""
    return _write(pipe.unet, {name: (mask, torch.zeros(int(mask.sum()))) for name, mask in masks.items()})


def _feed_forward(unet: nn.Module) -> dict[str, nn.Module]:
    """Return name of a weight -> the second linear layer of a feed-forward block that has it."""
    found = {f"{name}.weight": module for name, module in unet.named_modules() if name.endswith(_ENDING)}
    if not found:
        raise ValueError(f"{type(unet).__name__} has no feed-forward blocks (modules '*{_ENDING}')")
    return found
