"""Which part of an image is memorized: maps over the latent, and how well they agree with a mask that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nemolib.batching import shrinking
from nemolib.beyond.denoising import Denoising, Text, attention_seen, end_attention, end_layers, mean_attention, text_of
from nemolib.first_step import initial_latents
from nemolib.mitigation import Mitigation

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

MAPS = ("guidance difference", "bright ending", "curvature difference")
"""The maps of `region_maps`."""


@torch.inference_mode(False)
def region_maps(
    pipe: StableDiffusionPipeline,
    prompt: str,
    *,
    indices: Sequence[int] = (0, 49),
    maps: Sequence[str] = MAPS,
    samples: int = 4,
    seed: int = 1,
    steps: int = 50,
    guidance: float = 7.5,
    probes: int = 16,
) -> dict[str, Tensor]:
    """Return maps of the memorized region at several steps of one guided trajectory.

    Source: the squared difference that the prompt makes (Wen et al.'s norm before its sum over the latent; the score
        proxy of Kim & Lee, ICML 2026, arXiv 2605.26756); the attention of the end token (Chen et al., Bright Ending,
        ICLR 2025, arXiv 2410.21665); the difference of curvatures (Kim & Lee). Codes: Gwangho99/mem-curv-diff, no
        licence, chenchen-usyd/BE-PRSS, MIT; written from the formulas.
    Deviates: each at any step; published are the last one for attention and curvature, and for both of Kim & Lee's.

    Args:
        pipe: A StableDiffusionPipeline.
        prompt: The prompt.
        indices: Positions in the schedule, 0 being the first step.
        maps: Which of `MAPS`.
        samples: Initial latents; seed is theirs, steps and guidance those of the trajectory.
        probes: Random vectors of the curvature (Hutchinson's estimate).

    Returns:
        Name -> maps [index, seed, height, width], float32, on the CPU, at least 0.

    Raises:
        ValueError: A map is unknown, or an index is outside the schedule.
    """
    unknown = set(maps) - set(MAPS)
    if unknown or not maps:
        raise ValueError(f"unknown maps {sorted(unknown)}; known: {', '.join(MAPS)}")
    if not len(indices) or min(indices) < 0 or max(indices) >= steps:
        raise ValueError(f"indices {list(indices)}; give at least one, from 0 to {steps - 1}")
    model, text = Denoising(pipe, steps=steps, guidance=guidance), text_of(pipe, prompt)
    latents = initial_latents(pipe, samples=samples, seed=seed)
    calculate = {
        MAPS[0]: lambda step, seen: step.difference.square().sum(dim=1),
        MAPS[1]: lambda step, seen: mean_attention(seen, step.latents),
        MAPS[2]: lambda step, seen: curvature_map(model, step.latents, step.timestep, text, probes=probes, seed=seed),
    }

    def along(batch: Tensor) -> list[list[Tensor]]:
        found: list[list[Tensor]] = [[] for _ in maps]
        with attention_seen(pipe, end_layers(pipe.unet), end_attention(text)) as seen:
            for step in model.trajectory(batch, text.embedding, until=max(indices) + 1):
                if step.index in indices:
                    for kept, name in zip(found, maps, strict=True):
                        kept.append(calculate[name](step, seen).cpu())
        return [torch.stack(kept) for kept in found]

    parts = [made for _, made in shrinking(along, latents, size=samples, owner=pipe.unet, use="region maps")]
    order = [sorted(set(indices)).index(index) for index in indices]
    return {name: torch.cat(each, dim=1)[order] for name, each in zip(maps, zip(*parts, strict=True), strict=True)}


def mapping(pipe: StableDiffusionPipeline, **settings: Any) -> Callable[[Sequence[Any]], list[np.ndarray]]:
    """Return what gives the maps [map, index, seed, height, width] of prompts: a task (`nemolib.run.Run.compute`).

    Its items are prompts, each with what is done to the model (None: nothing); settings are those of `region_maps`.
    """

    def found(prompt: str, mitigation: Mitigation | None) -> np.ndarray:
        with mitigation.applied(pipe, [prompt]) if mitigation else nullcontext():
            return torch.stack([*region_maps(pipe, prompt, **settings).values()]).numpy()

    return lambda batch: [found(*item) for item in batch]


def curvature_map(
    model: Denoising, latents: Tensor, timestep: int, text: Text, *, probes: int = 16, seed: int = 0
) -> Tensor:
    """Return where the prompt makes the density more curved: relu of sum over channels of diag(d difference / d x).

    The diagonal is estimated by Hutchinson's method, mean over probes v of v * (J^T v), v of random signs.

    Source: Kim & Lee, diag(-H_c) - diag(-H_0), last step, 16 probes; the factor 1 / sigma is left out as in their code.

    Args:
        model: The model.
        latents: Latents x_t [seed, channel, height, width].
        timestep: Their timestep.
        text: The prompt.
        probes: Number of random vectors, which all seeds share; at least 1.
        seed: Their seed.

    Returns:
        Maps [seed, height, width], float32.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        free = latents.detach().clone().requires_grad_()
        difference = model.difference(free, timestep, text.embedding, derivative=True)
        model.evaluations += 2 * 2 * (probes - 1) * len(latents)  # the backward passes after the first
        diagonal = torch.zeros_like(free)
        for number in range(probes):
            signs = torch.randint(0, 2, latents.shape[1:], generator=generator).to(latents) * 2 - 1
            last = number == probes - 1
            diagonal += signs * torch.autograd.grad((difference * signs).sum(), free, retain_graph=not last)[0]
    return (diagonal.detach() / probes).sum(dim=1).relu()


# Agreement with known masks


def on_grid(masks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return masks [image, height, width] on a coarser grid: where at least half of a cell is inside, bool."""
    pixels = torch.as_tensor(masks, dtype=torch.float32)[:, None]
    return (nn.functional.adaptive_avg_pool2d(pixels, shape)[:, 0] >= 0.5).numpy()


def pixel_auroc(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return how often a pixel inside the mask is brighter than one outside, for each image; 0.5 by chance.

    Source: the usual pixel AUROC; per image, so that maps need no common scale.

    Args:
        maps: Maps [image, height, width].
        masks: Masks of the same shape, bool.

    Raises:
        ValueError: Shapes differ, or a mask has no pixel inside or none outside.
    """
    from nemolib.metrics import auroc

    maps, masks = _checked(maps, masks)
    return np.array([auroc(image[mask], image[~mask]) for image, mask in zip(maps, masks, strict=True)])


def best_iou(maps: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    """Return the best mean intersection over union of one threshold for all images, and that threshold in [0, 1].

    Source: Kim & Lee: log(1 + map), scaled to [0, 1] over all maps, 101 thresholds. The best is chosen on what it is
        judged by; the lowest threshold takes all pixels, which is their trivial baseline.

    Args:
        maps: Maps [image, height, width], at least 0.
        masks: Masks of the same shape, bool.

    Raises:
        ValueError: Shapes differ, or a mask has no pixel inside.
    """
    maps, masks = _checked(np.log1p(maps), masks)
    scaled = (maps - maps.min()) / max(np.ptp(maps), np.finfo(np.float64).tiny)
    levels, pixels = np.linspace(0, 1, 101), (1, 2)
    chosen = [scaled >= level for level in levels]
    union = [((each & masks).sum(axis=pixels) / (each | masks).sum(axis=pixels)).mean() for each in chosen]
    best = int(np.argmax(union))
    return float(union[best]), float(levels[best])


def _checked(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    maps, masks = np.asarray(maps, dtype=np.float64), np.asarray(masks, dtype=bool)
    if maps.shape != masks.shape or maps.ndim != 3:
        raise ValueError(f"maps of shape {maps.shape}, masks of {masks.shape}; expected twice [image, height, width]")
    empty = np.flatnonzero(~masks.any(axis=(1, 2)))
    if len(empty):
        raise ValueError(f"mask {empty[0]} has no pixel inside")
    return maps, masks
