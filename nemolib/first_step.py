"""Noise differences of the first denoising step (Alg. 1 of the paper).

For a memorized prompt the first step already points from any initial latent x_T to the same image, so that the
differences eps - x_T of different seeds resemble each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nemolib import seeding
from nemolib.batching import fitting_size, shrinking
from nemolib.defaults import default_protocol, default_settings
from nemolib.evaluations import Evaluations
from nemolib.hooks import scale_neurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.protocols import Protocol
from nemolib.settings import DetectionSettings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True, slots=True, eq=False)
class FirstStep:
    """The first denoising step of a model: everything that Alg. 1 needs but the prompt.

    Make it once with `first_step` and use it for many prompts.

    Attributes:
        unet: The UNet.
        timestep: The timestep that conditions the UNet.
        latents: Initial latents x_T, [seed, channel, height, width], float32, on the UNet's device.
        guidance: Classifier-free guidance scale; 0 means the text-conditional prediction alone.
        unconditional: Embedding of the empty prompt [1, token, feature]; needed where the guidance is not 0.
        swap_guidance: Whether the halves of the guidance change places (see `nemolib.protocols.Protocol`).
    """

    unet: nn.Module
    timestep: int
    latents: Tensor
    guidance: float = 0.0
    unconditional: Tensor | None = None
    swap_guidance: bool = False

    def __post_init__(self) -> None:
        """Reject what would fail in the first pass."""
        if self.latents.ndim != 4:
            raise ValueError(f"latents of shape {tuple(self.latents.shape)}; expected [seed, channel, height, width]")
        if self.guidance != 0 and self.unconditional is None:
            raise ValueError(f"guidance {self.guidance:g} needs the embedding of the empty prompt (unconditional)")

    @property
    def cost(self) -> int:
        """UNet sample-evaluations of one sample: 1, or 2 with classifier-free guidance."""
        return 1 if self.guidance == 0 else 2

    @torch.no_grad()
    def raw(
        self,
        embedding: Tensor,
        *,
        neurons: NeuronSet | None = None,
        seeds: Sequence[int] | None = None,
        evaluations: Evaluations | None = None,
    ) -> Tensor:
        """Return the noise differences eps - x_T as they are, in one UNet pass.

        Source: Alg. 1; authors' code, utils/activation_detection.py.
        Deviates: the authors' code runs the UNet for the timestep before as well and throws the result away.

        Args:
            embedding: Embedding of the prompt, [1, token, feature].
            neurons: Neurons that are deactivated.
            seeds: Indices of the latents to use; None means all.
            evaluations: Counts the UNet sample-evaluations.

        Returns:
            Noise differences [seed, channel, height, width], float32.

        Raises:
            ValueError: The embedding is not that of one prompt, there are no seeds, or a neuron does not exist.
        """
        sets = None if neurons is None else [neurons]
        return self._passes(embedding, sets, seeds, evaluations)[0]

    def __call__(
        self,
        embedding: Tensor,
        *,
        neurons: NeuronSet | None = None,
        seeds: Sequence[int] | None = None,
        evaluations: Evaluations | None = None,
    ) -> Tensor:
        """Return the noise differences, min-max normalized per sample and channel; see `raw`.

        Returns:
            Noise differences [seed, channel, height, width], float32, in [0, 1].
        """
        return normalize(self.raw(embedding, neurons=neurons, seeds=seeds, evaluations=evaluations))

    def many(
        self,
        embedding: Tensor,
        *,
        neurons: Sequence[NeuronSet],
        seeds: Sequence[int] | None = None,
        evaluations: Evaluations | None = None,
    ) -> Tensor:
        """Return the normalized noise differences of several neuron sets, evaluated in one batch.

        Args:
            embedding: Embedding of the prompt, [1, token, feature].
            neurons: The neuron sets, at least one.
            seeds: Indices of the latents to use; None means all.
            evaluations: Counts the UNet sample-evaluations.

        Returns:
            Noise differences [neuron set, seed, channel, height, width], float32, in [0, 1].
        """
        return normalize(self._passes(embedding, list(neurons), seeds, evaluations))

    @torch.no_grad()
    def _passes(
        self,
        embedding: Tensor,
        sets: list[NeuronSet] | None,
        seeds: Sequence[int] | None,
        evaluations: Evaluations | None,
    ) -> Tensor:
        latents = self._latents(seeds)
        if embedding.ndim != 3 or embedding.shape[0] != 1:
            raise ValueError(f"embedding of shape {tuple(embedding.shape)}; expected that of one prompt, [1, ...]")
        if sets is not None and not sets:
            raise ValueError("no neuron set was given; give at least one")
        jobs = [(item, row) for item in (sets or [None]) for row in range(len(latents))]

        def differences(batch: Sequence[tuple[NeuronSet | None, int]]) -> Tensor:
            chosen = latents[[row for _, row in batch]]
            scaled = nullcontext() if sets is None else scale_neurons(self.unet, [item for item, _ in batch])
            with scaled:
                return self._noise(chosen, embedding) - chosen

        size = fitting_size(self.unet, len(jobs), passes=self.cost)
        parts = [part for _, part in shrinking(differences, jobs, size=size, owner=self.unet, use="detection")]
        if evaluations is not None:
            evaluations.add(self.cost * len(jobs))
        return torch.cat(parts).unflatten(0, (-1, len(latents)))

    def _latents(self, seeds: Sequence[int] | None) -> Tensor:
        if seeds is None:
            return self.latents
        if not len(seeds):
            raise ValueError("no seeds were given; give indices of latents, or None for all")
        if min(seeds) < 0 or max(seeds) >= len(self.latents):
            raise ValueError(f"seeds {list(seeds)} do not all exist; latents are 0 to {len(self.latents) - 1}")
        return self.latents[list(seeds)]

    def _noise(self, latents: Tensor, embedding: Tensor) -> Tensor:
        """Return the predicted noise of latents, [sample, channel, height, width], float32."""
        embedding = self._expand(embedding, len(latents))
        if self.guidance == 0:
            return self._unet(latents, embedding)
        empty = self._expand(self.unconditional, len(latents))
        base, text = self._unet(torch.cat([latents, latents]), torch.cat([empty, embedding])).chunk(2)
        if self.swap_guidance:
            base, text = text, base
        return base + self.guidance * (text - base)

    def _unet(self, latents: Tensor, embeddings: Tensor) -> Tensor:
        dtype = next(self.unet.parameters()).dtype
        return self.unet(latents.to(dtype), self.timestep, embeddings.to(dtype), return_dict=False)[0].float()

    def _expand(self, embedding: Tensor | None, samples: int) -> Tensor:
        return embedding.to(self.latents.device).expand(samples, -1, -1)


def first_step(
    pipe: StableDiffusionPipeline,
    *,
    settings: DetectionSettings | None = None,
    protocol: str | Protocol | None = None,
    latents: Tensor | None = None,
) -> FirstStep:
    """Return the first denoising step of a pipeline.

    Source: Alg. 1, App. B.3.

    Args:
        pipe: A StableDiffusionPipeline. Its scheduler is read, never changed.
        settings: Seed, samples, steps and guidance; None means those of the profile that the pipeline was loaded
            from, else those of the paper.
        protocol: `released` or `paper`, or a protocol of your own; None as above.
        latents: Initial latents [seed, channel, height, width]; None draws them from the seed.

    Raises:
        ValueError: The model does not predict the noise.
    """
    settings, protocol = settings or default_settings(pipe).detection, default_protocol(pipe, protocol)
    config = pipe.unet.config
    side = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
    if latents is None:
        latents = seeding.latents((config.in_channels, *side), samples=settings.samples, seed=settings.seed)
    return FirstStep(
        unet=pipe.unet,
        timestep=timestep_of(pipe.scheduler, steps=settings.steps, index=protocol.timestep_index),
        latents=latents.to(pipe.unet.device, torch.float32),
        guidance=settings.guidance,
        unconditional=None if settings.guidance == 0 else embed(pipe, [""]),
        swap_guidance=protocol.swap_guidance,
    )


def timestep_of(scheduler: Any, *, steps: int, index: int) -> int:
    """Return a timestep of the DDIM schedule with the settings of a scheduler, which is not changed.

    Args:
        scheduler: A scheduler of diffusers, of any kind.
        steps: Number of denoising steps.
        index: Position in the schedule; 0 is the first step.

    Returns:
        The timestep, such as 961 for index 1 of 50 steps of Stable Diffusion.

    Raises:
        ValueError: The model does not predict the noise, or the index is outside the schedule.
    """
    from diffusers import DDIMScheduler

    prediction = getattr(scheduler.config, "prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ValueError(f"the model predicts {prediction!r}; noise differences need a model that predicts 'epsilon'")
    if not 0 <= index < steps:
        raise ValueError(f"timestep index {index} is outside a schedule of {steps} steps")
    schedule = DDIMScheduler.from_config(scheduler.config)
    schedule.set_timesteps(steps)
    return int(schedule.timesteps[index])


def noise_differences(
    pipe: StableDiffusionPipeline,
    prompt: str,
    *,
    settings: DetectionSettings | None = None,
    protocol: str | Protocol | None = None,
    neurons: NeuronSet | None = None,
    seeds: Sequence[int] | None = None,
    latents: Tensor | None = None,
    evaluations: Evaluations | None = None,
) -> Tensor:
    """Return the normalized noise differences of a prompt (Alg. 1).

    For many prompts, make `first_step` once instead.

    Source: Sec. 3.1, Alg. 1.

    Args:
        pipe: A StableDiffusionPipeline.
        prompt: The prompt.
        settings: Seed, samples, steps and guidance; None means those of the pipeline's profile, else the paper's.
        protocol: `released` or `paper`, or a protocol of your own; None as above.
        neurons: Neurons that are deactivated.
        seeds: Indices of the latents to use; None means all.
        latents: Initial latents [seed, channel, height, width]; None draws them from the seed.
        evaluations: Counts the UNet sample-evaluations.

    Returns:
        Noise differences [seed, channel, height, width], float32, in [0, 1].

    Raises:
        ValueError: A neuron or a seed does not exist, or the model does not predict the noise.
    """
    step = first_step(pipe, settings=settings, protocol=protocol, latents=latents)
    return step(embed(pipe, [prompt]), neurons=neurons, seeds=seeds, evaluations=evaluations)


def normalize(differences: Tensor) -> Tensor:
    """Return noise differences scaled to [0, 1], separately for each sample and channel; a constant map becomes 0.

    Source: Alg. 1; per channel as in the authors' code.

    Args:
        differences: Noise differences [..., height, width].

    Returns:
        A new tensor of the same shape, in [0, 1].
    """
    low = differences.amin(dim=(-2, -1), keepdim=True)
    spread = differences.amax(dim=(-2, -1), keepdim=True) - low
    return (differences - low) / torch.where(spread > 0, spread, 1)
