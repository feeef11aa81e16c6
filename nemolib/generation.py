"""Images of prompts, with and without deactivated neurons or another mitigation, from the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import compress, groupby
from typing import TYPE_CHECKING

import numpy as np
from diffusers import DPMSolverMultistepScheduler

from nemolib.batching import check_prompts, progress_bar, shrinking
from nemolib.layers import finite, value_layers
from nemolib.mitigation import DeactivatedNeurons, Mitigation
from nemolib.neurons import NeuronSet
from nemolib.seeding import sample_generators
from nemolib.settings import GenerationSettings, settings_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def generate(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    settings: GenerationSettings | None = None,
    mitigation: Mitigation | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Return images of prompts.

    Sample ``i`` of every prompt starts from the same latents, which depend on the seed and on ``i`` alone. So images
    with and without deactivated neurons (`nemolib.DeactivatedNeurons`), or another mitigation, can be compared one by one,
    whatever the batch.

    Source: App. B.3.
    Deviates: the authors' code draws the latents of a prompt from one generator for the whole batch.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: The prompts, at least one.
        settings: Seed, samples, steps, solver, guidance and batch size; None means those of the profile that the pipeline was
            loaded from, else those of the paper. The batch is smaller where memory is too small for it.
        mitigation: A mitigation of `nemolib.mitigation`; None changes nothing.
        progress: Whether to show a progress bar.

    Returns:
        Images [prompt, seed, height, width, 3], uint8.

    Raises:
        ValueError: There are no prompts, one is empty, or the mitigation cannot handle the pipeline.
    """
    prompts, settings = check_prompts(prompts), settings or settings_of(pipe).generation
    jobs = [(prompt, sample) for prompt in prompts for sample in range(settings.samples)]
    size = settings.batch_size
    if size > settings.samples:
        # Whole prompts, so that what a mitigation computes for a prompt is computed once.
        size -= size % settings.samples

    def draw(batch: Sequence[tuple[str, int]]) -> np.ndarray:
        chosen, samples = map(list, zip(*batch, strict=True))
        with nullcontext({"prompt": chosen}) if mitigation is None else mitigation.applied(pipe, chosen) as inputs:
            made = pipe(
                **inputs,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=sample_generators(settings.seed, samples),
                output_type="np",
                height=settings.side,
                width=settings.side,
            )
        finite(made.images, "image", chosen)
        blackened = list(compress(chosen, getattr(made, "nsfw_content_detected", None) or ()))
        if blackened:
            remedy = "no copy would be found in it; set pipe.safety_checker = None"
            raise ValueError(f"the safety checker blackened an image of prompt {blackened[0]!r}: {remedy}")
        return (made.images * 255).round().clip(0, 255).astype(np.uint8)

    images, before, own = [], getattr(pipe, "_progress_bar_config", {}), pipe.scheduler
    # The pipeline's own progress bar, one per batch, is hidden.
    pipe.set_progress_bar_config(**(before | {"disable": True}))
    try:
        if settings.solver == "dpm++":
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config, use_karras_sigmas=True)
        with progress_bar(len(jobs), "images", unit="image", enabled=progress) as bar:
            for batch, made in shrinking(draw, jobs, size=size, owner=pipe.unet, use="generation"):
                images.append(made)
                bar.update(len(batch))
    finally:
        pipe.scheduler = own
        pipe.set_progress_bar_config(**before)
    return np.concatenate(images).reshape(len(prompts), settings.samples, *images[0].shape[1:])


def drawing(
    pipe: StableDiffusionPipeline, *, settings: GenerationSettings
) -> Callable[[Sequence[tuple[str, Mitigation | None]]], list[np.ndarray]]:
    """Return what makes the images [seed, height, width, 3], uint8, of each caption of a batch with its mitigation.

    Captions with equal mitigations are drawn together; so are those that differ in the neurons alone, or have none.
    """
    none = NeuronSet.empty(len(value_layers(pipe.unet)))

    def draw(batch: Sequence[tuple[str, Mitigation | None]]) -> list[np.ndarray]:
        # An untouched prompt is one without neurons, drawn with the others whatever their factor.
        factor = next((item.factor for _, item in batch if isinstance(item, DeactivatedNeurons)), 0.0)
        acting = [(caption, item or DeactivatedNeurons(none, factor)) for caption, item in batch]
        images: list[np.ndarray] = []
        for alike, part in groupby(
            acting, key=lambda pair: pair[1].factor if isinstance(pair[1], DeactivatedNeurons) else pair[1]
        ):
            captions, items = zip(*part, strict=True)
            if isinstance(alike, float):
                neurons = map(DeactivatedNeurons.neurons_of, items, captions)
                alike = DeactivatedNeurons(dict(zip(captions, neurons, strict=True)), alike)
            images.extend(generate(pipe, captions, settings=settings, mitigation=alike, progress=False))
        return images

    return draw
