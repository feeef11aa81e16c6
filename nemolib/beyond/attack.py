"""Is it gone? An embedding is looked for that brings a memorized image back from a repaired model.

with nemolib.deactivate(pipe, neurons):
    attack = dori(pipe, image, start=None, steps=(10, 50))
    images = images_of(pipe, attack.embeddings[-1])
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nemolib.beyond.denoising import Denoising, signal_and_noise
from nemolib.generation import generate
from nemolib.layers import finite, placement, scale_neurons
from nemolib.mitigation import Mitigation
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.settings import GenerationSettings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True, slots=True, eq=False)
class Attack:
    """What an attack found.

    Attributes:
        embeddings: The embedding after each number of steps that was asked for, [number, token, feature], float32.
        losses: The loss before each step.
        evaluations: UNet sample-evaluations, a pass with its derivative counting as three.
    """

    embeddings: Tensor
    losses: tuple[float, ...]
    evaluations: int


@torch.inference_mode(False)
@torch.enable_grad()
def dori(
    pipe: StableDiffusionPipeline,
    image: np.ndarray,
    *,
    start: str | None = None,
    steps: Sequence[int] = (50,),
    learning_rate: float = 0.1,
    batch: int = 8,
    seed: int = 0,
) -> Attack:
    """Return embeddings with which a model denoises towards an image: the diffusion loss is lowered over the embedding.

    The model is taken as it is: pruned, or inside a context in which neurons are deactivated. What comes back says
    something only beside the same attack on images that were never trained, or trained once. In float16 small gradients
    vanish: take float32 or bfloat16.

    Source: Kowalczuk et al., "Finding Dori" (ICML 2026, arXiv 2507.16880): Adam, learning rate 0.1, 50 steps, batch 8,
        all tokens free, timesteps and noise drawn anew in each step. Their code was not at hand; written from the
        paper's formula.
    Deviates: none known; random numbers are drawn on the CPU from a seed.

    Args:
        pipe: A StableDiffusionPipeline; its weights get no gradients.
        image: The image [height, width, 3], uint8.
        start: The prompt whose embedding is the start, ``""`` for the empty one; None: standard normal noise.
        steps: After how many steps the embedding is kept, each at least 0.
        learning_rate: Step size of Adam.
        batch: Noisy latents in each step.
        seed: Seed of noise, timesteps and the start from noise.

    Raises:
        ValueError: The image is none, or no number of steps is given or one is negative.
        NotFiniteError: An embedding is not finite.
    """
    if not len(steps) or min(steps) < 0:
        raise ValueError(f"steps are {list(steps)}; give at least one number, none below 0")
    model, generator = Denoising(pipe), torch.Generator().manual_seed(seed)
    latent, device = latent_of(pipe, image), placement(pipe.unet)[0]
    free = embed(pipe, [start or ""]).float()
    if start is None:
        free = torch.randn(free.shape, generator=generator).to(device)
    free = free.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=learning_rate)
    found, losses = {0: free.detach().clone()}, []
    for number in range(1, max(steps) + 1):
        timesteps = torch.randint(len(model.scheduler.alphas_cumprod), (batch,), generator=generator)
        noise = torch.randn((batch, *latent.shape[1:]), generator=generator).to(device)
        signal, sigma = signal_and_noise(model.scheduler, timesteps, latent)
        noisy = signal * latent + sigma * noise
        loss = (model.noise(noisy, timesteps.to(device), free, derivative=True) - noise).square().mean()
        (free.grad,) = torch.autograd.grad(loss, [free])
        optimizer.step()
        losses.append(loss.item())
        found[number] = free.detach().clone()
    kept = finite(torch.cat([found[number] for number in steps]), "embedding of an attack")
    return Attack(kept, tuple(losses), model.evaluations)


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


class GivenEmbedding(Mitigation):
    """An embedding that takes the place of the prompt's, so that images are made from the same seeds as all others.

    Args:
        embedding: The embedding [token, feature].
    """

    name = "given embedding"

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding

    def _inputs(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
        return {"prompt_embeds": self.embedding.to(pipe.unet.dtype).expand(len(prompts), -1, -1)}


def images_of(
    pipe: StableDiffusionPipeline, embedding: Tensor, *, settings: GenerationSettings | None = None
) -> np.ndarray:
    """Return images of an embedding [token, feature]: [seed, height, width, 3], uint8; settings as in `generate`."""
    given = GivenEmbedding(embedding.to(placement(pipe.unet)[0]))
    return generate(pipe, ["given"], settings=settings, mitigation=given, progress=False)[0]


def attacking(
    pipe: StableDiffusionPipeline,
    *,
    steps: Sequence[int],
    settings: GenerationSettings,
    learning_rate: float = 0.1,
    batch: int = 8,
) -> Any:
    """Return what attacks images: a task (`nemolib.run.Run.compute`).

    Its items are (caption, image, start, neurons, seed): ``start`` as in `dori`, ``neurons`` those that are deactivated
    while the attack is made and its images, or None. A result is images [number of steps, seed, height, width, 3].
    """

    def attack(items: Sequence[tuple[str, np.ndarray, str | None, NeuronSet | None, int]]) -> list[np.ndarray]:
        return [np.stack(made(*item[1:])) for item in items]

    def made(image: np.ndarray, start: str | None, neurons: NeuronSet | None, seed: int) -> list[np.ndarray]:
        course = {"steps": steps, "learning_rate": learning_rate, "batch": batch}
        with scale_neurons(pipe.unet, neurons) if neurons else nullcontext():
            found = dori(pipe, image, start=start, seed=seed, **course)
            return [images_of(pipe, embedding, settings=settings) for embedding in found.embeddings]

    return attack


def overlap(first: NeuronSet, second: NeuronSet) -> tuple[float, ...]:
    """Return intersection over union of two neuron sets in each layer; NaN where both have none.

    Source: Kowalczuk et al., whose overlap of 1 in layers 2, 6 and 7 is that of two empty sets.
    """
    both, either = (first & second).counts, (first | second).counts
    return tuple(common / all_ if all_ else float("nan") for common, all_ in zip(both, either, strict=True))
