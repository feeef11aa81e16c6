"""Images of prompts, with and without deactivated neurons or another mitigation, from the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from nemolib.batching import check_prompts, progress_bar, shrinking
from nemolib.layers import finite, scale_neurons, value_layers
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
    neurons: NeuronSet | Sequence[NeuronSet] | None = None,
    factor: float = 0.0,
    mitigation: Mitigation | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Return images of prompts, with the pipeline's own scheduler.

    Sample ``i`` of every prompt starts from the same latents, which depend on the seed and on ``i`` alone. So images
    with and without deactivated neurons, or another mitigation, can be compared one by one, whatever the batch.

    Source: App. B.3.
    Deviates: the authors' code draws the latents of a prompt from one generator for the whole batch.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: The prompts, at least one.
        settings: Seed, samples, steps, guidance and batch size; None means those of the profile that the pipeline was
            loaded from, else those of the paper. The batch is smaller where memory is too small for it.
        neurons: Neurons that are scaled: one set for all prompts, or one per prompt; None changes nothing.
        factor: What their values are multiplied by; 0 deactivates.
        mitigation: A mitigation of `nemolib.mitigation`, in place of neurons; None changes nothing.
        progress: Whether to show a progress bar.

    Returns:
        Images [prompt, seed, height, width, 3], uint8.

    Raises:
        ValueError: There are no prompts, one is empty, a neuron set does not fit or is missing, the mitigation cannot
            handle the pipeline, or both neurons and a mitigation are given.
    """
    if neurons is not None and mitigation is not None:
        raise ValueError(f"both neurons and a mitigation ({mitigation.name}) are given; give one of them")
    prompts, settings = check_prompts(prompts), settings or settings_of(pipe).generation
    sets = [neurons] * len(prompts) if neurons is None or isinstance(neurons, NeuronSet) else list(neurons)
    if len(sets) != len(prompts):
        raise ValueError(f"{len(sets)} neuron sets were given for {len(prompts)} prompts; give one, or one per prompt")
    jobs = [(*pair, sample) for pair in zip(prompts, sets, strict=True) for sample in range(settings.samples)]
    size = settings.batch_size
    if size > settings.samples:
        # Whole prompts, so that what a mitigation computes for a prompt is computed once.
        size -= size % settings.samples

    def draw(batch: Sequence[tuple[str, NeuronSet | None, int]]) -> np.ndarray:
        chosen, scaled, samples = map(list, zip(*batch, strict=True))
        if mitigation is not None:
            prepared = mitigation.applied(pipe, chosen)
        else:
            prepared = nullcontext() if neurons is None else scale_neurons(pipe.unet, scaled, factor=factor)
        with prepared as inputs:
            made = pipe(
                **(inputs or {"prompt": chosen}),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=sample_generators(settings.seed, samples),
                output_type="np",
                height=settings.side,
                width=settings.side,
            )
        finite(made.images, "image", chosen)
        return (made.images * 255).round().clip(0, 255).astype(np.uint8)

    images, before = [], getattr(pipe, "_progress_bar_config", {})
    # The pipeline's own progress bar, one per batch, is hidden.
    pipe.set_progress_bar_config(**(before | {"disable": True}))
    try:
        with progress_bar(len(jobs), "images", unit="image", enabled=progress) as bar:
            for batch, made in shrinking(draw, jobs, size=size, owner=pipe.unet, use="generation"):
                images.append(made)
                bar.update(len(batch))
    finally:
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
            chosen: dict[str, Any] = {"mitigation": alike}
            if isinstance(alike, float):
                chosen = {"neurons": list(map(DeactivatedNeurons.neurons_of, items, captions)), "factor": alike}
            images.extend(generate(pipe, captions, settings=settings, progress=False, **chosen))
        return images

    return draw
