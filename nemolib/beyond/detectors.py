"""Detectors of memorized prompts behind one interface: a prompt in, a score out that is high for memorized ones.

    found = Sharpness(samples=4).score(pipe, "a caption")     # found.score, found.evaluations
    limit = quantile_threshold(scores_of_unmemorized_prompts)

No absolute threshold of the literature is used: each is a norm over as many numbers as Stable Diffusion's latent has,
and belongs to that model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemolib.batching import shrinking
from nemolib.beyond import denoising
from nemolib.beyond.denoising import Denoising, Text, attention_seen, norms, signal_and_noise, text_of
from nemolib.first_step import initial_latents, normalize
from nemolib.layers import attention_layers, finite
from nemolib.settings import RELEASED, AtLeastTwo, Count, NotNegative, Protocol, SimilaritySettings, Whole, validated
from nemolib.similarity import memorization_score

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class Detection(NamedTuple):
    """What a detector says of a prompt.

    Attributes:
        score: High for memorized prompts.
        evaluations: UNet sample-evaluations that it cost; a pass with a derivative counts as three.
    """

    score: float
    evaluations: int


@validated
class Detector:
    """Something that scores prompts; a frozen dataclass of its settings.

    Attributes:
        samples: Initial latents per prompt.
        seed: Their seed.
        steps: Denoising steps of the schedule.
        guidance: Classifier-free guidance scale of the images that are denoised on the way.
        name: What it is called in tables.
        source: Where it comes from.
        least: The fewest latents that it needs.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    least: ClassVar[int] = 1

    samples: Count = 4
    seed: Whole = 1
    steps: AtLeastTwo = 50
    guidance: NotNegative = 7.5

    def score(self, pipe: StableDiffusionPipeline, prompt: str) -> Detection:
        """Return what the detector says of a prompt; raises as `scores`."""
        return self.scores(pipe, [prompt])[0][-1]

    @torch.inference_mode(False)
    @torch.no_grad()
    def scores(self, pipe: StableDiffusionPipeline, prompts: Sequence[str], known: Any = None) -> list[list[Detection]]:
        """Return what the detector says of each prompt with the first of its latents (the least it needs), with one more, ...

        Args:
            pipe: A StableDiffusionPipeline.
            prompts: The prompts, which share UNet passes.
            known: A dict of what detectors measured of these prompts; those that look at the same sampling compute it
                once, and each counts it as its own.

        Raises:
            ValueError: What the model predicts is not known, or a setting does not fit it.
            NotFiniteError: What is measured is not finite.
        """
        # Detectors that measure alike, with the same settings, say different things of one measurement.
        known, key = {} if known is None else known, (type(self)._values, astuple(self))
        if key not in known:
            known[key] = self._measured(pipe, prompts)
        (found, cost), numbers = known[key], range(self.least, self.samples + 1)
        return [[Detection(self._combined(*(part[:n] for part in each)), n * cost) for n in numbers] for each in found]

    def _measured(self, pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> tuple[list[Any], int]:
        """Return what is measured of each prompt, each [seed, ...], and the UNet evaluations of one latent."""
        model = Denoising(pipe, steps=self.steps, guidance=self.guidance)
        texts = {each: text_of(pipe, each) for each in prompts}
        latents = initial_latents(pipe, samples=self.samples, seed=self.seed)

        def measured(batch: Sequence[tuple[str, int]]) -> list[Tensor]:
            of, seeds = map(list, zip(*batch, strict=True))
            seen = [texts[prompt] for prompt in of]
            text = Text(torch.cat([each.embedding for each in seen]), torch.tensor([each.end for each in seen]))
            values = self._values(model, latents[seeds], text)
            return [finite(part.detach().float().cpu(), self.name, of) for part in values]

        pairs = [(prompt, seed) for prompt in prompts for seed in range(self.samples)]
        found = [made for _, made in shrinking(measured, pairs, size=len(pairs), owner=pipe.unet, use=self.name)]
        parts = [torch.cat(each).split(self.samples) for each in zip(*found, strict=True)]
        return list(zip(*parts, strict=True)), model.evaluations // len(pairs)

    def _values(self, model: Denoising, latents: Tensor, text: Text) -> tuple[Tensor, ...]:
        """Return what is measured of each seed, each [seed, ...]."""
        raise NotImplementedError

    def _combined(self, values: Tensor) -> float:
        return float(values.double().mean())


def detecting(pipe: StableDiffusionPipeline, *, detectors: Sequence[Detector]) -> Callable[[Sequence[str]], list]:
    """Return what gives `Detector.scores` of each detector for each caption: a task (`nemolib.run.Run.compute`)."""

    def detect(captions: Sequence[str]) -> list[tuple[list[Detection], ...]]:
        known: dict = {}
        return list(zip(*(detector.scores(pipe, captions, known=known) for detector in detectors), strict=True))

    return detect


def quantile_threshold(unmemorized: Sequence[float], *, quantile: float = 0.99) -> float:
    """Return a threshold from scores of unmemorized prompts: at most a share of 1 - quantile of them is above it.

    Raises:
        ValueError: The quantile is outside (0, 1), or there are so few prompts that none would be above.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}; it must be between 0 and 1")
    needed = int(np.ceil(round(1 / (1 - quantile), 9)))
    if len(unmemorized) < needed:
        raise ValueError(f"{len(unmemorized)} unmemorized prompts; a quantile of {quantile:g} needs at least {needed}")
    return float(np.quantile(unmemorized, quantile, method="higher"))


@validated
class NoiseSimilarity(Detector):
    """The largest similarity of the noise differences of two seeds in the first step.

    Source: Hintersdorf et al. (NeurIPS 2024), Sec. 3.1; see `nemolib.memorization_score`.

    Attributes:
        protocol: Which timestep of the schedule, and similarity on one scale or on several.
        similarity: Window and exponents.
    """

    least = 2
    name = "noise similarity"
    source: ClassVar[str] = "Hintersdorf et al. (NeurIPS 2024)"

    samples: AtLeastTwo = 10
    protocol: Protocol = RELEASED
    similarity: SimilaritySettings = SimilaritySettings()

    def _values(self, model: Denoising, latents: Tensor, text: Text) -> tuple[Tensor]:
        return (model.noise(latents, model.timesteps[self.protocol.timestep_index], text.embedding) - latents,)

    def _combined(self, values: Tensor) -> float:
        return memorization_score(normalize(values), settings=self.similarity, protocol=self.protocol)


@validated
class GuidanceNorm(Detector):
    """How far the prompt moves the predicted noise, mean over the first steps.

    Source: Wen et al. (ICLR 2024); YuxinWenRick/diffusion_memorization, no licence; written from the formula. Published
        are 1, 10 and 50 steps.

    Attributes:
        first: How many steps are looked at.
    """

    name = "guidance norm"
    source: ClassVar[str] = "Wen et al. (ICLR 2024)"

    first: Count = 1

    def _values(self, model: Denoising, latents: Tensor, text: Text) -> tuple[Tensor]:
        steps = model.trajectory(latents, text.embedding, until=self.first)
        return (torch.stack([norms(step.difference) for step in steps]).mean(dim=0),)


@validated
class Sharpness(Detector):
    """How strongly the curvature that the prompt adds acts on its own score: ||H s||, s = score difference at x_T.

    H s is the derivative of the score difference in the direction of its own value, one forward-mode derivative.

    Source: Jeon et al. (ICML 2025, arXiv 2412.04140); Dongjae0324/sharpness_memorization_diffusion, no licence; written
        from the formula.
    Deviates: the norm and not its square, as in their code; the same order of prompts for one seed.
    """

    name = "sharpness"
    source: ClassVar[str] = "Jeon et al. (ICML 2025)"

    def _values(self, model: Denoising, latents: Tensor, text: Text) -> tuple[Tensor]:
        timestep = model.timesteps[0]
        _, sigma = signal_and_noise(model.scheduler, timestep, latents)

        def score(x: Tensor) -> Tensor:
            return -model.difference(x, timestep, text.embedding) / sigma

        # Fast attention has no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            direction = score(latents)
            _, product = torch.func.jvp(score, (latents,), (direction,))
        model.evaluations += 2 * len(latents) * (denoising.DERIVATIVE - 1)
        return (norms(product),)


@validated
class Anisotropy(Detector):
    """The guidance norm in the first step, and how far the prompt moves pure noise along its own prediction late on.

    The late timestep is given the same pure noise, which the model never saw there: that is meant so.

    Source: Asthana & Belagiannis (ICLR 2026, arXiv 2601.20642); rohanasthana/memorization-anisotropy, MIT. Weights
        (1, 2) for Stable Diffusion 1.4 from their code; late timestep ``timesteps[-3]``.
    Deviates: for a model that predicts the velocity both parts are those of the noise; their code takes the norm of the
        score difference and the cosine of the raw outputs.

    Attributes:
        weights: Of the norm, and of the cosine (over channels, mean over the latent).
    """

    name = "anisotropy"
    source: ClassVar[str] = "Asthana & Belagiannis (ICLR 2026)"

    steps: Annotated[int, Field(strict=True, ge=3)] = 50
    weights: tuple[float, float] = (1.0, 2.0)

    def _values(self, model: Denoising, latents: Tensor, text: Text) -> tuple[Tensor]:
        norm = norms(model.difference(latents, model.timesteps[0], text.embedding))
        empty, with_text = model.pair(latents, model.timesteps[-3], text.embedding)
        cosine = torch.nn.functional.cosine_similarity(empty, with_text - empty, dim=1).flatten(1).mean(dim=1)
        return (self.weights[0] * norm + self.weights[1] * cosine,)


def entropy(probabilities: Tensor) -> Tensor:
    """Return -sum p log p over the last axis."""
    return torch.special.entr(probabilities).sum(dim=-1)


def _with_prompt(weights: Tensor) -> Tensor:
    """Return the half with the prompt, mean over heads, [seed, position, token]."""
    return weights.chunk(2)[1].mean(dim=1)


@validated
class Sampled(Detector):
    """A detector that looks at a whole sampling; all of these can look at the same one."""

    def _values(self, model: Denoising, latents: Tensor, text: Text) -> tuple[Tensor, ...]:
        """Return what the prompt changes, the bright ending, and entropies over all and over the summary tokens.

        Axes: [seed, step, channel, height, width]; [seed, height, width]; twice [seed, step].
        """
        names, end, steps = attention_layers(model.unet), text.end[:, None, None].to(latents.device), []
        with attention_seen(model.pipe, names, _with_prompt) as seen:
            for step in model.trajectory(latents, text.embedding):
                tokens = torch.stack([maps.mean(dim=1) for maps in seen.values()]).mean(dim=0)
                of_summary = torch.arange(tokens.shape[1], device=tokens.device) >= end[..., 0]
                steps.append((step.difference.cpu(), entropy(tokens), entropy(tokens * of_summary)))
        last = {name: seen[name].take_along_dim(end, dim=2)[..., 0] for name in denoising.end_layers(model.unet)}
        differences, total, summary = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
        return differences, denoising.mean_attention(last, latents), total, summary


@validated
class BrightEnding(Sampled):
    """The mean attention of the end token in the last step of sampling.

    Source: Chen et al. (ICLR 2025, arXiv 2410.21665); as a detector in Kim & Lee (ICML 2026). chenchen-usyd/BE-PRSS, MIT.
    """

    name = "bright ending"
    source: ClassVar[str] = "Chen et al. (ICLR 2025)"

    def _combined(self, differences: Tensor, ending: Tensor, total: Tensor, summary: Tensor) -> float:
        return float(ending.double().mean())


@validated
class LocalNorm(Sampled):
    """The guidance norm inside the bright ending, divided by its mean, mean over all steps.

    Source: Chen et al. (ICLR 2025), LD; chenchen-usyd/BE-PRSS, MIT.
    Deviates: their code samples twice from one seed, for the ending and for the norms; once gives the same numbers.
    """

    name = "local guidance norm"
    source: ClassVar[str] = "Chen et al. (ICLR 2025)"

    def _combined(self, differences: Tensor, ending: Tensor, total: Tensor, summary: Tensor) -> float:
        inside = (differences * ending[:, None, None]).flatten(2).norm(dim=2).mean(dim=1)
        return float((inside / ending.flatten(1).mean(dim=1)).double().mean())


@validated
class LateEntropy(Sampled):
    """Entropy of the attention to tokens in the last fifth of the steps, and how that of the summary tokens changed.

    Summary tokens are the end token and the padding.

    Source: Ren et al. (ECCV 2024), detector D; renjie3/MemAttn, MIT.
    Deviates: the change counts by its absolute value, as in the paper; their code keeps the sign. Low-resolution models
        may have fewer than the 16 layers of Stable Diffusion, over all of which the mean is taken.
    """

    name = "late attention entropy"
    source: ClassVar[str] = "Ren et al. (ECCV 2024)"

    samples: Count = 1

    def _combined(self, differences: Tensor, ending: Tensor, total: Tensor, summary: Tensor) -> float:
        late = max(1, self.steps // 5)
        change = summary[:, -late:].mean(dim=1) - summary[:, 0]
        return float((total[:, -late:].mean(dim=1) + change.abs()).double().mean())


@validated
class EarlyEntropy(Detector):
    """Entropy of the attention to tokens in one layer at the first step.

    Source: Ren et al. (ECCV 2024), detector E; renjie3/MemAttn, MIT.

    Attributes:
        layer: Position among the cross-attention layers in the order in which an image passes them; the fourth (3).
    """

    name = "early attention entropy"
    source: ClassVar[str] = "Ren et al. (ECCV 2024)"

    samples: Count = 1
    layer: Whole = 3

    def _values(self, model: Denoising, latents: Tensor, text: Text) -> tuple[Tensor]:
        names = attention_layers(model.unet)
        if self.layer >= len(names):
            raise ValueError(f"layer is {self.layer}; the UNet has {len(names)} cross-attention layers")
        with attention_seen(model.pipe, (names[self.layer],), _with_prompt) as seen:
            model.pair(latents, model.timesteps[0], text.embedding)
        return (entropy(seen[names[self.layer]].mean(dim=1)),)


@validated
class PredictionChange(Detector):
    """How much the prediction with the prompt changes from one step to the next: the squared norm, DSM.

    Source: anonymous (ICML 2026), randomnameforicml/icml-2026, MIT: DSM_01 and DSM_12. It costs nothing where images
        are made anyway.

    Attributes:
        index: The earlier of the two steps.
    """

    name = "prediction change"
    source: ClassVar[str] = "anonymous (ICML 2026), DSM"

    index: Whole = 0

    def _values(self, model: Denoising, latents: Tensor, text: Text) -> tuple[Tensor]:
        *_, before, after = model.trajectory(latents, text.embedding, until=self.index + 2)
        return (norms(after.text - before.text).square(),)


@validated
class EnergyGradient(Detector):
    """How differently the energies ||eps||^2 / 2 with and without the prompt change with x_T: the squared norm.

    Source: anonymous (ICML 2026), randomnameforicml/icml-2026, MIT: Metric 2.
    """

    name = "energy gradient"
    source: ClassVar[str] = "anonymous (ICML 2026), Metric 2"

    def _values(self, model: Denoising, latents: Tensor, text: Text) -> tuple[Tensor]:
        with torch.enable_grad():
            free = latents.clone().requires_grad_()
            empty, with_text = model.pair(free, model.timesteps[0], text.embedding, derivative=True)
            (gradient,) = torch.autograd.grad((with_text.square() - empty.square()).sum() / 2, free)
        return (norms(gradient).square(),)


DETECTORS: tuple[type[Detector], ...] = (
    NoiseSimilarity, GuidanceNorm, Sharpness, Anisotropy, BrightEnding, LocalNorm, LateEntropy, EarlyEntropy,
    PredictionChange, EnergyGradient,
)  # fmt: skip
"""All detectors."""
