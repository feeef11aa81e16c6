"""Prompt embedding adjustment (Wen et al., ICLR 2024): the embedding moves until the text does not force the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nemolib import seeding
from nemolib.batching import batches, check_prompts
from nemolib.defaults import default_settings
from nemolib.first_step import timestep_of
from nemolib.mitigation.base import Mitigation
from nemolib.pipeline import embed
from nemolib.settings import WenSettings
from nemolib.workers import map_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_SAMPLES = 64
"""Samples in one UNet pass where norms are only measured."""


@dataclass(frozen=True, slots=True, eq=False)
class Adjustment:
    """The adjusted embedding of a prompt.

    Attributes:
        embedding: Embedding [token, feature].
        norms: Mean norm before each step; the last is the first that is not above the target, if the target was
            reached.
    """

    embedding: Tensor
    norms: tuple[float, ...]


@dataclass(frozen=True)
class EmbeddingAdjustment(Mitigation):
    """The prompt embedding is adjusted before the image is made, by gradient descent on the first denoising step.

    What is minimized is the norm of eps(x_T, prompt) - eps(x_T, empty prompt), averaged over a few initial latents: the
    score that tells memorized prompts from others. The embedding of the begin token stays, and an embedding whose norm
    is not above the target stays altogether.

    Source: Wen et al. (ICLR 2024); their code, local_sd_pipeline.py, function aug_prompt.
    Deviates: latents of a seed of its own, not those of the images that follow, so that the embedding depends on the
        prompt alone; the norm is averaged over latents, where the code takes one norm over all of them (larger by the
        square root of their number); AdamW's weight decay, as in the code, but not for the begin token, which the code
        lets shrink by 0.05 % per step.

    Attributes:
        settings: Target and course of the descent.

    Raises:
        ValueError: The settings have no target.
    """

    source: ClassVar[str] = "Wen et al. (ICLR 2024)"

    settings: WenSettings = WenSettings()

    def __post_init__(self) -> None:
        """Reject settings without a target."""
        if self.settings.target is None:
            raise ValueError(
                "WenSettings.target is None, which leaves it to a rule; use EmbeddingAdjustment.by_rule with "
                "unmemorized prompts, or give a target"
            )

    @classmethod
    def by_rule(
        cls,
        pipe: StableDiffusionPipeline,
        prompts: Sequence[str],
        *,
        settings: WenSettings | None = None,
        progress: bool = True,
    ) -> EmbeddingAdjustment:
        """Return the adjustment for a model; where the settings have no target, `wen_target` sets it.

        Args:
            pipe: A StableDiffusionPipeline.
            prompts: Unmemorized prompts; used only if the settings have no target.
            settings: Target and course of the descent; None means those of the pipeline's profile, else the paper's.
            progress: Whether to show a progress bar.
        """
        settings = settings or default_settings(pipe).mitigation.wen
        if settings.target is None:
            settings = replace(settings, target=wen_target(pipe, prompts, settings=settings, progress=progress))
        return cls(settings)

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        return "prompt embedding adjustment"

    def identity(self, prompt: str) -> list[Any]:
        """Return the settings that have a part in the embedding."""
        return ["prompt embedding adjustment", asdict(self.settings) | {"multiplier": None}]

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a model that does not predict the noise, or that has no gradients."""
        super().check(pipe)
        timestep_of(pipe.scheduler, steps=self.settings.steps, index=self.settings.step)
        if any(parameter.is_inference() for parameter in pipe.unet.parameters()):
            raise ValueError("the UNet was loaded in torch.inference_mode and has no gradients; load it outside")

    def adjust(self, pipe: StableDiffusionPipeline, prompt: str) -> Adjustment:
        """Return the adjusted embedding of a prompt; works inside ``torch.no_grad`` and ``torch.inference_mode`` too.

        The model is not changed, and its parameters get no gradients.

        Args:
            pipe: A StableDiffusionPipeline.
            prompt: The prompt.

        Raises:
            ValueError: The pipeline cannot be handled, or the norm is not a finite number.
        """
        self.check(pipe)
        with torch.inference_mode(False), torch.enable_grad():
            return self._descend(GuidanceNorm.of(pipe, self.settings), embed(pipe, [prompt])[0])

    def _descend(self, norm_of: GuidanceNorm, embedding: Tensor) -> Adjustment:
        begin, free = embedding[:1].float(), embedding[1:].float().clone().requires_grad_()
        optimizer = torch.optim.AdamW([free], lr=self.settings.learning_rate)
        norms: list[float] = []
        for _ in range(self.settings.iterations):
            norm = norm_of(torch.cat([begin, free])[None]).mean()
            norms.append(norm.item())
            if not math.isfinite(norms[-1]):
                raise ValueError(f"the norm of the guidance is {norms[-1]} in step {len(norms)}; use dtype float32")
            if norms[-1] <= self.settings.target:
                break
            (free.grad,) = torch.autograd.grad(norm, [free])
            optimizer.step()
        return Adjustment(torch.cat([begin, free]).detach().to(embedding.dtype), tuple(norms))

    @contextmanager
    def _prepared(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> Iterator[dict[str, Any]]:
        adjusted = {prompt: self.adjust(pipe, prompt).embedding for prompt in dict.fromkeys(prompts)}
        yield {"prompt_embeds": torch.stack([adjusted[prompt] for prompt in prompts])}


@dataclass(frozen=True, slots=True, eq=False)
class GuidanceNorm:
    """How far text moves the noise prediction of one denoising step, as a function of the embedding.

    Attributes:
        unet: The UNet.
        timestep: Timestep of the denoising step.
        latents: Initial latents [seed, channel, height, width].
        empty: Noise prediction for the empty prompt, same shape, float32.
    """

    unet: nn.Module
    timestep: int
    latents: Tensor
    empty: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, pipe: StableDiffusionPipeline, settings: WenSettings) -> GuidanceNorm:
        """Return the norm for a pipeline."""
        config = pipe.unet.config
        side = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
        latents = seeding.latents((config.in_channels, *side), samples=settings.latents, seed=settings.seed)
        latents = latents.to(pipe.unet.device, pipe.unet.dtype)
        timestep = timestep_of(pipe.scheduler, steps=settings.steps, index=settings.step)
        return cls(pipe.unet, timestep, latents, _noise(pipe.unet, timestep, latents, embed(pipe, [""])))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return the norm for each prompt and latent; it can be differentiated.

        Args:
            embeddings: Prompt embeddings [prompt, token, feature].

        Returns:
            Norms [prompt, seed], float32, at least 0.
        """
        text = _noise(self.unet, self.timestep, self.latents, embeddings)
        difference = text.unflatten(0, (len(embeddings), -1)) - self.empty
        return difference.flatten(2).norm(dim=2)


@torch.no_grad()
def embedding_norms(
    pipe: StableDiffusionPipeline,
    embeddings: Tensor,
    *,
    settings: WenSettings | None = None,
    batch_size: int = _SAMPLES,
) -> np.ndarray:
    """Return the mean norm that the adjustment lowers, for each prompt embedding.

    Source: Wen et al. (ICLR 2024).

    Args:
        pipe: A StableDiffusionPipeline.
        embeddings: Prompt embeddings [prompt, token, feature].
        settings: Latents and denoising step; None means those of the pipeline's profile, else the paper's.
        batch_size: Samples in one UNet pass.

    Returns:
        Norms [prompt], float64, at least 0.
    """
    settings = settings or default_settings(pipe).mitigation.wen
    norm_of = GuidanceNorm.of(pipe, settings)
    parts = batches(embeddings, max(1, batch_size // settings.latents))
    return torch.cat([norm_of(part).double().mean(dim=1).cpu() for part in parts]).numpy()


def wen_target(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    settings: WenSettings | None = None,
    progress: bool = True,
) -> float:
    """Return the target of the adjustment by rule: mean + multiplier standard deviations over unmemorized prompts.

    This is the paper's rule for the memorization threshold, applied to Wen's score: a prompt is adjusted if the text
    forces the image more than for unmemorized prompts, and until it does not. The authors chose their targets by the
    trade-off between similarity and alignment that they saw.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: Unmemorized prompts, at least 2; none of those that are reported on.
        settings: Latents, denoising step and multiplier; None means those of the pipeline's profile, else the paper's.
        progress: Whether to show a progress bar.

    Returns:
        The target, at least 0, in the unit of the noise prediction's norm, to three decimals: rounding errors of
        another machine hardly ever give another target.

    Raises:
        ValueError: There are fewer than two prompts, or one is empty.
        FailedPrompts: Prompts raised.
    """
    prompts, settings = check_prompts(prompts), settings or default_settings(pipe).mitigation.wen
    if len(prompts) < 2:
        raise ValueError("one prompt was given; a standard deviation needs at least 2")
    found = map_prompts(
        _target_norms,
        [tuple(batch) for batch in batches(prompts, max(1, _SAMPLES // settings.latents))],
        pipe=pipe,
        common={"settings": settings},
        label="target norm",
        ordered=True,
        progress=progress,
    )
    values = np.concatenate([norms for _, norms in found])
    return max(0.0, round(float(values.mean() + settings.multiplier * values.std(ddof=1)), 3))


def _target_norms(pipe: StableDiffusionPipeline, *, settings: WenSettings) -> Callable[[Sequence[str]], np.ndarray]:
    """Return what computes the norm of each prompt of a batch."""
    return lambda batch: embedding_norms(pipe, embed(pipe, batch), settings=settings)


def _noise(unet: nn.Module, timestep: int, latents: Tensor, embeddings: Tensor) -> Tensor:
    """Return the noise predictions of all latents for each embedding, [prompt * seed, ...], float32."""
    text = embeddings.to(latents.dtype).repeat_interleave(len(latents), dim=0)
    return unet(latents.repeat(len(embeddings), 1, 1, 1), timestep, text, return_dict=False)[0].float()
