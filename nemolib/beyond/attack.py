"""Is it gone? An embedding is looked for that brings a memorized image back from a repaired model.

with nemolib.deactivate(pipe, neurons):
    found = dori(pipe, [image], steps=(10, 50)).embeddings[-1, 0]
    with standing_for(pipe, {"found": found}):
        images = nemolib.generate(pipe, ["found"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nemolib.batching import accumulated_gradient
from nemolib.beyond.denoising import Denoising, signal_and_noise
from nemolib.generation import drawing
from nemolib.layers import finite, scale_neurons, widths
from nemolib.localization import localizing
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.workers import Results

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True, slots=True, eq=False)
class Attack:
    """What attacks found.

    Attributes:
        embeddings: The embedding of each image after each number of steps that was asked for, [number, image, token,
            feature], float32.
        losses: The loss of each image before each step, [step, image].
        evaluations: UNet sample-evaluations, a pass with its derivative counting as three.
    """

    embeddings: Tensor
    losses: np.ndarray
    evaluations: int


@torch.inference_mode(False)
@torch.enable_grad()
def dori(
    pipe: StableDiffusionPipeline,
    images: Sequence[np.ndarray],
    *,
    starts: Sequence[str | None] = (),
    steps: Sequence[int] = (50,),
    learning_rate: float = 0.1,
    batch: int = 8,
    seeds: Sequence[int] = (),
) -> Attack:
    """Return embeddings with which a model denoises towards images: the diffusion loss is lowered over the embedding.

    The model is taken as it is: pruned, or inside a context in which neurons are deactivated (`nemolib.layers.scale_neurons`
    takes a set for each image). What comes back says something only beside the same attack on images that were never
    trained, or trained once. Images share UNet passes, and nothing else; where memory runs out, a pass has fewer noisy
    latents of each.

    Source: Kowalczuk et al., "Finding Dori" (ICML 2026, arXiv 2507.16880): Adam, learning rate 0.1, 50 steps, batch 8,
        all tokens free, timesteps and noise drawn anew in each step. Their code was not at hand; written from the
        paper's formula.
    Deviates: none known; random numbers are drawn on the CPU from seeds.

    Args:
        pipe: A StableDiffusionPipeline; its weights get no gradients.
        images: Images [height, width, 3] of one size, uint8.
        starts: For each the prompt whose embedding is the start, ``""`` for the empty one, None for standard normal
            noise; without any, noise for all.
        steps: After how many steps the embeddings are kept, each at least 0.
        learning_rate: Step size of Adam.
        batch: Noisy latents of each image in each step.
        seeds: For each image the seed of noise, timesteps and the start from noise; without any, 0 for all.

    Raises:
        ValueError: An image is none, starts or seeds are not as many as images, or no number of steps is given or one
            is negative.
        NotFiniteError: An embedding is not finite.
    """
    if not len(steps) or min(steps) < 0:
        raise ValueError(f"steps are {list(steps)}; give at least one number, none below 0")
    starts, seeds = starts or [None] * len(images), seeds or [0] * len(images)
    if not len(images) == len(starts) == len(seeds):
        raise ValueError(f"{len(images)} images, {len(starts)} starts, {len(seeds)} seeds; give as many of each")
    model, draws = Denoising(pipe), [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.cat([latent_of(pipe, image) for image in images]).repeat_interleave(batch, 0)
    free = embed(pipe, [start or "" for start in starts]).float().clone()
    for row in (row for row, start in enumerate(starts) if start is None):
        free[row] = torch.randn(free[row].shape, generator=draws[row])
    optimizer = torch.optim.Adam([free.requires_grad_()], lr=learning_rate)

    def squares(part: Sequence[int]) -> Tensor:
        # Those of every image, in the order of the images, as neurons that are deactivated have it.
        rows = [first + draw for first in range(0, len(latents), batch) for draw in part]
        text = free.repeat_interleave(len(part), 0)
        predicted = model.noise(noisy[rows], timesteps[rows], text, derivative=True)
        return (predicted - noise[rows]).square().view(len(images), -1)

    found, losses, last = {0: free.detach().clone()}, [], len(model.scheduler.alphas_cumprod)
    for number in range(1, max(steps) + 1):
        timesteps = torch.cat([torch.randint(last, (batch,), generator=draw) for draw in draws]).to(latents.device)
        noise = torch.cat([torch.randn((batch, *latents.shape[1:]), generator=draw) for draw in draws]).to(latents)
        signal, sigma = signal_and_noise(model.scheduler, timesteps, latents)
        noisy = signal * latents + sigma * noise
        # Adam does not see the scale, and gradients of the sum are not too small for float16.
        parts, free.grad = accumulated_gradient(squares, range(batch), free, owner=pipe.unet, use="attack")
        optimizer.step()
        losses.append(torch.cat(parts, dim=1).mean(dim=1).tolist())
        if number in steps:
            found[number] = free.detach().clone()
    kept = torch.stack([found[number] for number in steps])
    return Attack(finite(kept, "embedding of an attack"), np.array(losses), model.evaluations)


@torch.no_grad()
def latent_of(pipe: StableDiffusionPipeline, image: np.ndarray) -> Tensor:
    """Return the latent of an image, [1, channel, height, width], float32; that of an AutoencoderKL is its mode.

    Raises:
        ValueError: The image is not [height, width, 3], uint8.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image of shape {list(image.shape)}, {image.dtype}; expected [height, width, 3], uint8")
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1
    encoded = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype))
    latent = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latent.float() * pipe.vae.config.scaling_factor


@contextmanager
def standing_for(pipe: StableDiffusionPipeline, embeddings: Mapping[str, Tensor]) -> Iterator[None]:
    """Let prompts stand for embeddings [token, feature] inside the context, for images, scores and searches alike.

    What the pipeline computes inside is not what it makes of its prompts: `Run.compute` refuses to keep it.
    """
    encode, outer = pipe.encode_prompt, vars(pipe).get("encode_prompt")

    def given(prompt: Any, *more: Any, **named: Any) -> tuple[Tensor, ...]:
        text, *others = encode(prompt, *more, **named)
        for row, name in enumerate([prompt] if isinstance(prompt, str) else prompt or ()):
            if name in embeddings:
                text[row] = embeddings[name].to(text)
        return text, *others

    pipe.encode_prompt = given
    try:
        yield
    finally:
        del pipe.encode_prompt
        if outer is not None:
            pipe.encode_prompt = outer


def attacking(
    pipe: StableDiffusionPipeline, **settings: Any
) -> Callable[[Sequence[tuple[Any, ...]]], list[np.ndarray]]:
    """Return what attacks images: a task (`nemolib.run.Run.compute`); settings as of `dori`.

    Its items are (caption, image, start, neurons, seed): ``start`` as in `dori`, ``neurons`` those that are deactivated,
    or None. A result is [number of steps, token, feature].
    """

    def attack(items: Sequence[tuple[str, np.ndarray, str | None, NeuronSet | None, int]]) -> list[np.ndarray]:
        _, images, starts, neurons, seeds = zip(*items, strict=True)
        sets = [own or NeuronSet.empty(len(widths(pipe.unet))) for own in neurons]
        with scale_neurons(pipe.unet, sets, guided=lambda: False):
            found = dori(pipe, images, starts=starts, seeds=seeds, **settings).embeddings
        return list(found.cpu().numpy().swapaxes(0, 1))

    return attack


def drawing_found(pipe: StableDiffusionPipeline, **settings: Any) -> Callable[..., Results]:
    """Return what makes the images of embeddings, a task: items (caption, embedding, mitigation or None); see `drawing`."""
    return partial(_standing, pipe, drawing(pipe, **settings))


def localizing_found(pipe: StableDiffusionPipeline, **settings: Any) -> Callable[..., Results]:
    """Return what finds the neurons of embeddings, a task: items (caption, embedding); see `localizing`."""
    return partial(_standing, pipe, localizing(pipe, **settings))


def _standing(pipe: StableDiffusionPipeline, work: Callable[..., Results], items: Sequence[tuple[Any, ...]]) -> Results:
    """Return what work on captions gives for the embeddings [token, feature] that stand behind them in the items."""
    found = {f"embedding {number}": torch.as_tensor(item[1]) for number, item in enumerate(items)}
    with standing_for(pipe, found):
        results = work([(name, *item[2:]) if item[2:] else name for name, item in zip(found, items, strict=True)])
        # All of it is done before the pipeline is given back.
        return results if isinstance(results, Sequence) else iter(list(results))


def overlap(first: NeuronSet, second: NeuronSet) -> tuple[float, ...]:
    """Return intersection over union of two neuron sets in each layer; NaN where both have none.

    Source: Kowalczuk et al., whose overlap of 1 in layers 2, 6 and 7 is that of two empty sets.
    """
    both, either = (first & second).counts, (first | second).counts
    return tuple(common / all_ if all_ else float("nan") for common, all_ in zip(both, either, strict=True))
