"""The first denoising step (Alg. 1 of the paper): what a UNet predicts for a prompt, and what is measured of it.

For a memorized prompt the first step already points from any initial latent x_T to the same image, so that the
differences eps - x_T of different seeds resemble each other. And text moves the prediction further than it does for
other prompts (Wen et al., ICLR 2024).

Where nothing is given, settings and protocol are those of the profile that the pipeline was loaded from, else those of
the paper and `released`. What needs a prediction takes it from a `FirstStep`, which gives the noise whatever the model
predicts, and guidance from `_guided`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nemolib import seeding
from nemolib.batching import Lockstep, batches, shrinking
from nemolib.layers import (
    Layer,
    check_neurons_act,
    collect_outputs,
    cross_attention_layers,
    finite,
    naming,
    placement,
    scale_neurons,
    widths,
)
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.settings import (
    RELEASED,
    DetectionSettings,
    Protocol,
    SimilaritySettings,
    WenSettings,
    protocol_of,
    settings_of,
)
from nemolib.similarity import memorization_score, pair_similarities
from nemolib.similarity import similarity as alike

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ALGORITHMS = ("A1", "A2", "A3", "A4")
"""Noise differences, out-of-distribution neurons, initial selection, refinement (Alg. 1-4 of the paper)."""

NORMS = ("guidance norms",)
"""The measure of `observing` that is the norm of what text changes in the first step, per seed (Wen et al.)."""

WEN_GUIDANCE = 7.5
"""Guidance scale with which the images of Wen et al. are denoised."""


class Evaluations:
    """UNet sample-evaluations and seconds by algorithm.

    A UNet sample-evaluation is one latent through the UNet once; with classifier-free guidance a sample costs two. It is
    the unit that compares searches on different machines. What is counted outside `stage` goes to the first algorithm.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.samples: dict[str, int] = dict.fromkeys(ALGORITHMS, 0)
        self.seconds: dict[str, float] = dict.fromkeys(ALGORITHMS, 0.0)
        self._stage = ALGORITHMS[0]

    def add(self, samples: int) -> None:
        """Count UNet sample-evaluations."""
        self.samples[self._stage] += samples

    def take(self) -> dict[str, dict[str, Any]]:
        """Return evaluations and seconds by algorithm, and begin anew."""
        taken = {"evaluations": self.samples, "seconds": self.seconds}
        self.samples, self.seconds = dict.fromkeys(ALGORITHMS, 0), dict.fromkeys(ALGORITHMS, 0.0)
        return taken

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count and time what happens inside for one of `ALGORITHMS`."""
        self._stage, start = name, self._clock()
        try:
            yield
        finally:
            self.seconds[name] += self._clock() - start
            self._stage = ALGORITHMS[0]


class Sample(NamedTuple):
    """One latent on its way through the UNet.

    Attributes:
        embedding: Embedding of its prompt, [1, token, feature].
        seed: Index of the latent.
        neurons: Neurons that are deactivated for it.
    """

    embedding: Tensor
    seed: int
    neurons: NeuronSet | None = None


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
        swap_guidance: Whether the halves of the guidance change places (see `nemolib.settings.Protocol`).
        mix: How the noise is made from the model's output (`noise_mix`).
        lockstep: What computes `differences` for several searches at once; None: they are computed when asked for.
    """

    unet: nn.Module
    timestep: int
    latents: Tensor
    guidance: float = 0.0
    unconditional: Tensor | None = None
    swap_guidance: bool = False
    mix: tuple[float, float] = (1.0, 0.0)
    lockstep: Lockstep | None = None

    def __post_init__(self) -> None:
        """Reject guidance without what it needs."""
        if self.guidance != 0 and self.unconditional is None:
            raise ValueError(f"guidance {self.guidance:g} needs the embedding of the empty prompt (unconditional)")

    @property
    def cost(self) -> int:
        """UNet sample-evaluations of one sample: 1, or 2 with classifier-free guidance."""
        return 1 if self.guidance == 0 else 2

    @property
    def clock(self) -> Callable[[], float]:
        """What tells the seconds of a search: those of others that it waited for are not among them."""
        return time.perf_counter if self.lockstep is None else self.lockstep.clock

    def raw(self, embedding: Tensor, *, neurons: NeuronSet | None = None, seeds: Sequence[int] | None = None) -> Tensor:
        """Return the noise differences eps - x_T as they are, in one UNet pass.

        Source: Alg. 1; authors' code, utils/activation_detection.py.
        Deviates: the authors' code runs the UNet for the timestep before as well and throws the result away.

        Args:
            embedding: Embedding of the prompt, [1, token, feature].
            neurons: Neurons that are deactivated.
            seeds: Indices of the latents to use; None means all.

        Returns:
            Noise differences [seed, channel, height, width], float32.

        Raises:
            ValueError: The embedding is not that of one prompt, there are no seeds, or a neuron does not exist.
            IndexError: A seed does not exist.
        """
        seeds = range(len(self.latents)) if seeds is None else seeds
        return self.differences([Sample(embedding, seed, neurons) for seed in seeds])

    def __call__(
        self, embedding: Tensor, *, neurons: NeuronSet | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Return the noise differences, min-max normalized per sample and channel: `normalize` of `raw`."""
        return normalize(self.raw(embedding, neurons=neurons, seeds=seeds))

    def differences(self, samples: Sequence[Sample]) -> Tensor:
        """Return the noise differences of any samples as they are, [sample, channel, height, width]; see `raw`."""
        if not samples:
            raise ValueError("no neuron sets or no seeds were given; give at least one of each")
        for sample in samples:
            if sample.embedding.ndim != 3 or len(sample.embedding) != 1:
                shape = tuple(sample.embedding.shape)
                raise ValueError(f"embedding of shape {shape}; expected that of one prompt, [1, ...]")
        return self.predict(samples) if self.lockstep is None else self.lockstep.ask(samples)

    @torch.no_grad()
    def predict(self, samples: Sequence[Sample], *, size: int | None = None) -> Tensor:
        """Return `differences` in batches of at most a size; None: in one batch, if memory allows."""
        none = NeuronSet.empty(len(widths(self.unet)))

        def differences(batch: Sequence[Sample]) -> Tensor:
            latents, embeddings = self.latents[[item.seed for item in batch]], [item.embedding for item in batch]
            sets = [item.neurons or none for item in batch]
            with scale_neurons(self.unet, sets) if any(sets) else nullcontext():
                return self._noise(latents, torch.cat(embeddings)) - latents

        found = shrinking(differences, samples, size=size or len(samples), owner=self.unet, use="detection")
        return torch.cat([part for _, part in found])

    def _noise(self, latents: Tensor, embeddings: Tensor) -> Tensor:
        """Return the predicted noise of latents with guidance, each for its embedding; see `noise`."""
        if self.guidance == 0:
            return self.noise(latents, embeddings)
        empty = self.unconditional.to(embeddings).expand_as(embeddings)
        both = self.noise(latents.repeat(2, 1, 1, 1), torch.cat([empty, embeddings]))
        return _guided(*both.chunk(2), self.guidance, swapped=self.swap_guidance)

    def noise(self, latents: Tensor, embeddings: Tensor) -> Tensor:
        """Return the noise predicted for latents, each with its embedding or all with one, without guidance.

        Returns:
            Noise [sample, channel, height, width], float32; it can be differentiated by the embeddings.
        """
        device, dtype = placement(self.unet)
        samples, text = latents.to(device, dtype), embeddings.to(device, dtype).expand(len(latents), -1, -1)
        found = finite(self.unet(samples, self.timestep, text, return_dict=False)[0], "predicted noise").float()
        return found if self.mix == (1.0, 0.0) else self.mix[0] * found + self.mix[1] * samples.float()


def first_step(
    pipe: StableDiffusionPipeline, *, settings: DetectionSettings | None = None, protocol: str | Protocol | None = None
) -> FirstStep:
    """Return the first denoising step of a pipeline.

    Source: Alg. 1, App. B.3.

    Args:
        pipe: A StableDiffusionPipeline. Its scheduler is read, never changed.
        settings: Seed, samples, steps and guidance.
        protocol: `released` or `paper`, or a protocol of your own.

    Raises:
        ValueError: What the model predicts is not known.
    """
    settings, protocol = settings or settings_of(pipe).detection, protocol_of(pipe, protocol)
    timestep = timestep_of(pipe.scheduler, steps=settings.steps, index=protocol.timestep_index)
    return FirstStep(
        unet=pipe.unet,
        timestep=timestep,
        latents=initial_latents(pipe, samples=settings.samples, seed=settings.seed),
        guidance=settings.guidance,
        unconditional=None if settings.guidance == 0 else embed(pipe, [""]),
        swap_guidance=protocol.swap_guidance,
        mix=noise_mix(pipe.scheduler, timestep),
    )


def initial_latents(pipe: StableDiffusionPipeline, *, samples: int, seed: int) -> Tensor:
    """Return initial latents of a pipeline's size, [seed, channel, height, width], float32, on the UNet's device."""
    config = pipe.unet.config
    side = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
    device, _ = placement(pipe.unet)
    return seeding.latents((config.in_channels, *side), samples=samples, seed=seed).to(device)


def timestep_of(scheduler: Any, *, steps: int, index: int) -> int:
    """Return a timestep of the DDIM schedule with the settings of a scheduler, which is not changed.

    Args:
        scheduler: A scheduler of diffusers, of any kind.
        steps: Number of denoising steps.
        index: Position in the schedule; 0 is the first step.

    Returns:
        The timestep, such as 961 for index 1 of 50 steps of Stable Diffusion.

    Raises:
        ValueError: The index is outside the schedule.
    """
    if not 0 <= index < steps:
        raise ValueError(f"timestep index {index} is outside a schedule of {steps} steps")
    return int(ddim(scheduler, steps).timesteps[index])


def noise_mix(scheduler: Any, timestep: int) -> tuple[float, float]:
    """Return what a model's output and its latents are multiplied by, so that their sum is the noise.

    Source: Salimans and Ho (ICLR 2022), App. D: latents are signal x + scale eps, and v is signal eps - scale x.

    Raises:
        ValueError: What the model predicts is not known.
    """
    share = float(ddim(scheduler, 1).alphas_cumprod[timestep])
    signal, scale = share**0.5, (1 - share) ** 0.5
    known = {"epsilon": (1.0, 0.0), "v_prediction": (signal, scale), "sample": (-signal / scale, 1 / scale)}
    prediction = getattr(scheduler.config, "prediction_type", "epsilon")
    if prediction not in known:
        raise ValueError(f"the model predicts {prediction!r}; known: {', '.join(known)}")
    return known[prediction]


def noise_differences(
    pipe: StableDiffusionPipeline,
    prompt: str,
    *,
    settings: DetectionSettings | None = None,
    protocol: str | Protocol | None = None,
) -> Tensor:
    """Return the normalized noise differences of a prompt (Alg. 1). For many prompts, make `first_step` once instead.

    Source: Sec. 3.1, Alg. 1.

    Args:
        pipe: A StableDiffusionPipeline.
        prompt: The prompt.
        settings: Seed, samples, steps and guidance.
        protocol: `released` or `paper`, or a protocol of your own.

    Returns:
        Noise differences [seed, channel, height, width], float32, in [0, 1].

    Raises:
        ValueError: What the model predicts is not known.
        NotFiniteError: A prediction is not finite.
    """
    with naming(prompt):
        return first_step(pipe, settings=settings, protocol=protocol)(embed(pipe, [prompt]))


def normalize(differences: Tensor) -> Tensor:
    """Return noise differences [..., height, width] scaled to [0, 1], each sample and channel; a constant map becomes 0.

    Source: Alg. 1; per channel as in the authors' code.
    """
    low = differences.amin(dim=(-2, -1), keepdim=True)
    spread = differences.amax(dim=(-2, -1), keepdim=True) - low
    return (differences - low) / torch.where(spread > 0, spread, 1)


def pairs_measure(protocol: Protocol, guidance: float) -> tuple[Any, ...]:
    """Return the measure of `observing` that is the similarity of every pair of seeds.

    It is plain data, and holds of the protocol only what has a part in it: measures of two protocols may be equal.
    """
    swapped = protocol.swap_guidance and guidance != 0
    return ("pairs", protocol.timestep_index, protocol.similarity, swapped, float(guidance))


def observing(
    pipe: StableDiffusionPipeline, *, detection: DetectionSettings, similarity: SimilaritySettings
) -> Callable[[Sequence[tuple[str, tuple[Any, ...]]]], list[list[float]]]:
    """Return what gives the values of measures of the first step: a task (`nemolib.run.Run.compute`).

    Its items are pairs of a caption and a measure, `pairs_measure` or `NORMS`. In a batch each prompt is predicted once
    per timestep, whatever is measured of it; the empty prompt, which does not depend on it, once for all batches. So
    guidance is made from two passes, where `FirstStep` takes one for both halves: the same up to rounding.

    Source: Alg. 1; authors' code, 2_compute_pairwise_ssim.py; Wen et al. (ICLR 2024).
    """

    @functools.cache
    def step(index: int) -> FirstStep:
        plain = replace(detection, guidance=0.0)
        return first_step(pipe, settings=plain, protocol=replace(RELEASED, timestep_index=index))

    def differences(caption: str, index: int) -> Tensor:
        with naming(caption):
            return step(index).raw(embed(pipe, [caption]))

    empty = functools.cache(functools.partial(differences, ""))

    def observe(batch: Sequence[tuple[str, tuple[Any, ...]]]) -> list[list[float]]:
        predicted = functools.cache(differences)
        return [measured(functools.partial(predicted, caption), measure) for caption, measure in batch]

    def measured(text: Callable[[int], Tensor], measure: tuple[Any, ...]) -> list[float]:
        if measure == NORMS:
            return _norms(text(0) - empty(0)).tolist()
        _, index, kind, swapped, guidance = measure
        found = text(index) if guidance == 0 else _guided(empty(index), text(index), guidance, swapped=swapped)
        pairs = pair_similarities(normalize(found), settings=similarity, protocol=replace(RELEASED, similarity=kind))
        return pairs.cpu().double().tolist()

    return observe


def scoring(
    pipe: StableDiffusionPipeline, *, detection: DetectionSettings, similarity: SimilaritySettings, protocol: Protocol
) -> Callable[[Sequence[tuple[str, NeuronSet, float, tuple[int, ...]]]], list[list[float]]]:
    """Return what gives scores of prompts whose neurons are scaled: a task (`nemolib.run.Run.compute`).

    Its items are (caption, neurons, factor, seeds), its results the memorization score and, of the seeds that a search kept,
    the score that it asks: the largest similarity of the noise differences with and without. No seeds: the first alone.
    """
    check_neurons_act(pipe.unet)
    step, how = first_step(pipe, settings=detection, protocol=protocol), {"settings": similarity, "protocol": protocol}
    untouched = functools.lru_cache(lambda caption: step(embed(pipe, [caption])))

    def scores(caption: str, neurons: NeuronSet, factor: float, seeds: tuple[int, ...]) -> list[float]:
        with naming(caption), scale_neurons(pipe.unet, neurons, factor=factor):
            changed = step(embed(pipe, [caption]))
        found = [memorization_score(changed, **how)]
        if kept := list(seeds):
            found.append(float(alike(changed[kept], untouched(caption)[kept], **how).max()))
        return found

    return lambda batch: [scores(*item) for item in batch]


def comparing_outputs(
    pipe: StableDiffusionPipeline, *, sets: list[NeuronSet], detection: DetectionSettings, protocol: Protocol
) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """Return what gives the cosines [set, place, seed] of the outputs with and without each neuron set: a task.

    Args:
        pipe: A StableDiffusionPipeline.
        sets: Neurons that are blocked.
        detection: Seed, samples and steps; outputs are compared without guidance.
        protocol: The protocol.
    """
    plain = replace(detection, guidance=0.0)
    step, places = first_step(pipe, settings=plain, protocol=protocol), compared_places(pipe.unet)
    nothing = NeuronSet.empty(len(widths(pipe.unet)))
    together = max(1, settings_of(pipe).generation.batch_size // detection.samples)

    def outputs(embedding: Tensor, chosen: Sequence[NeuronSet]) -> Iterator[Tensor]:
        """Return for each place the outputs [neuron set, seed, value], in double precision."""
        samples = [Sample(embedding, seed, item) for item in chosen for seed in range(len(step.latents))]
        with collect_outputs(step.unet, [name for _, _, name in places]) as found:
            step.differences(samples)
        joined = [torch.cat(found[name]) for _, _, name in places]
        if any(len(output) != len(samples) for output in joined):
            # A pass that ran out of memory left outputs as well; from now on batches are smaller.
            return outputs(embedding, chosen)
        return (output.unflatten(0, (len(chosen), -1)).flatten(2).cpu().double() for output in joined)

    def cosines(prompt: str) -> np.ndarray:
        embedding, found = embed(pipe, [prompt]), []
        before = list(outputs(embedding, [nothing]))
        for batch in batches(sets, together):
            pairs = zip(outputs(embedding, batch), before, strict=True)
            found.append(torch.stack([torch.cosine_similarity(*pair, dim=-1) for pair in pairs], dim=1))
        return torch.cat(found).numpy()

    return lambda batch: [cosines(prompt) for prompt in batch]


def compared_places(unet: nn.Module) -> list[tuple[str, Layer, str]]:
    """Return what is compared: output, value layer of the block, address of the module."""
    layers = cross_attention_layers(unet, "value")
    # "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": the block is "down_blocks.0.attentions.0".
    whole = [("block", layer, layer.name.partition(".transformer_blocks.")[0]) for layer in layers]
    return whole + [("cross-attention", layer, layer.name.removesuffix(".to_v")) for layer in layers]


@torch.no_grad()
def guidance_norms(
    pipe: StableDiffusionPipeline, prompt: str, *, steps: int = 1, settings: DetectionSettings | None = None
) -> np.ndarray:
    """Return how far text moves the noise prediction in the first denoising steps; Wen's score is the mean of these.

    Source: Wen et al. (ICLR 2024): the norm of eps(x_t, prompt) - eps(x_t, empty prompt), mean over steps and seeds.

    Args:
        pipe: A StableDiffusionPipeline.
        prompt: The prompt.
        steps: How many denoising steps are looked at.
        settings: Seed, samples and steps of the schedule.

    Returns:
        Norms [step, seed], float64, at least 0.
    """
    settings = settings or settings_of(pipe).detection
    scheduler, embeddings = ddim(pipe.scheduler, settings.steps), embed(pipe, ["", prompt])
    latents, norms = initial_latents(pipe, samples=settings.samples, seed=settings.seed), []

    def predict(batch: Tensor) -> Tensor:
        both = step.noise(batch.repeat(2, 1, 1, 1), embeddings.repeat_interleave(len(batch), dim=0))
        return both.unflatten(0, (2, -1))

    for timestep in scheduler.timesteps[:steps].tolist():
        step = FirstStep(pipe.unet, timestep, latents, mix=noise_mix(pipe.scheduler, timestep))
        with naming(prompt):
            found = list(shrinking(predict, latents, size=len(latents), owner=pipe.unet, use="guidance norms"))
        empty, text = torch.cat([part for _, part in found], dim=1)
        norms.append(_norms(text - empty).numpy())
        latents = scheduler.step(_guided(empty, text, WEN_GUIDANCE), timestep, latents).prev_sample
    return np.stack(norms)


def guidance_norm(pipe: StableDiffusionPipeline, settings: WenSettings) -> Callable[..., Tensor]:
    """Return how far text moves the noise prediction of one denoising step, as a function of a prompt's embedding.

    The function can be differentiated, so that an embedding can be moved until the norm is small.

    Source: Wen et al. (ICLR 2024); their code, local_sd_pipeline.py, function aug_prompt.

    Args:
        pipe: A StableDiffusionPipeline.
        settings: Number and seed of the initial latents, and which denoising step of which schedule.

    Returns:
        Embedding [1, token, feature], and indices of latents if not all are meant -> norms [seed], float32, at least 0.
    """
    timestep = timestep_of(pipe.scheduler, steps=settings.steps, index=settings.step)
    latents = initial_latents(pipe, samples=settings.latents, seed=settings.seed)
    step = FirstStep(pipe.unet, timestep, latents, mix=noise_mix(pipe.scheduler, timestep))
    with torch.no_grad():
        predict = functools.partial(step.noise, embeddings=embed(pipe, [""]))
        found = shrinking(predict, latents, size=len(latents), owner=pipe.unet, use="guidance norms")
        empty = torch.cat([part for _, part in found])

    def norms(embedding: Tensor, seeds: Any = slice(None)) -> Tensor:
        return (step.noise(latents[seeds], embedding) - empty[seeds]).flatten(1).norm(dim=1)

    return norms


def _guided(empty: Tensor, text: Tensor, guidance: float, *, swapped: bool = False) -> Tensor:
    """Return a prediction with classifier-free guidance; ``swapped``: with its halves in each other's place."""
    base, other = (text, empty) if swapped else (empty, text)
    return base + guidance * (other - base)


def _norms(differences: Tensor) -> Tensor:
    """Return the norm of each seed's difference, [seed], float64, on the CPU."""
    return differences.flatten(1).cpu().double().norm(dim=1)


def ddim(scheduler: Any, steps: int) -> Any:
    """Return a DDIM scheduler with the settings of a scheduler; its steps take the noise, and leave latents beyond 1."""
    from diffusers import DDIMScheduler

    # Latents are no pixels; where a scheduler says nothing of clipping, DDIM's own default is to clip.
    schedule = DDIMScheduler.from_config(scheduler.config, prediction_type="epsilon", clip_sample=False)
    schedule.set_timesteps(steps)
    return schedule
