"""Images of prompts, with and without deactivated neurons or another mitigation, from the same seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from nemolib.batching import check_prompts, fitting_size, progress_bar, shrinking
from nemolib.defaults import default_settings
from nemolib.hooks import scale_neurons
from nemolib.neurons import NeuronSet
from nemolib.seeding import sample_generators
from nemolib.settings import GenerationSettings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from nemolib.mitigation import Mitigation


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
    prompts, settings = check_prompts(prompts), settings or default_settings(pipe).generation
    sets = _sets(neurons, len(prompts))
    jobs = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(settings.samples)]
    size = fitting_size(pipe.unet, settings.batch_size, passes=1 if settings.guidance <= 1 else 2)
    if size > settings.samples:
        # Whole prompts, so that what a mitigation computes for a prompt is computed once.
        size -= size % settings.samples
    images = []

    def draw(batch: Sequence[tuple[int, int]]) -> np.ndarray:
        chosen = None if sets is None else [sets[prompt] for prompt, _ in batch]
        with _inputs(pipe, [prompts[prompt] for prompt, _ in batch], chosen, factor, mitigation) as inputs:
            return _images(pipe, inputs, [sample for _, sample in batch], settings)

    with _silent(pipe), progress_bar(len(jobs), "images", unit="image", enabled=progress) as bar:
        for batch, made in shrinking(draw, jobs, size=size, owner=pipe.unet, use="generation"):
            images.append(made)
            bar.update(len(batch))
    stacked = np.concatenate(images)
    return stacked.reshape(len(prompts), settings.samples, *stacked.shape[1:])


@contextmanager
def _inputs(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    sets: list[NeuronSet] | None,
    factor: float,
    mitigation: Mitigation | None,
) -> Iterator[dict[str, Any]]:
    """Prepare the pipeline for a batch inside the context, and give what it is called with."""
    if mitigation is not None:
        with mitigation.applied(pipe, prompts) as inputs:
            yield inputs
    elif sets is not None:
        with scale_neurons(pipe.unet, sets, factor=factor):
            yield {"prompt": prompts}
    else:
        yield {"prompt": prompts}


def _images(
    pipe: StableDiffusionPipeline, inputs: dict[str, Any], samples: list[int], settings: GenerationSettings
) -> np.ndarray:
    """Return one image per sample, [image, height, width, 3], uint8."""
    output = pipe(
        **inputs,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=sample_generators(settings.seed, samples),
        output_type="np",
        height=settings.side,
        width=settings.side,
    )
    return (output.images * 255).round().clip(0, 255).astype(np.uint8)


def _sets(neurons: NeuronSet | Sequence[NeuronSet] | None, prompts: int) -> list[NeuronSet] | None:
    """Return one neuron set per prompt."""
    if neurons is None:
        return None
    sets = [neurons] * prompts if isinstance(neurons, NeuronSet) else list(neurons)
    if len(sets) != prompts:
        raise ValueError(f"{len(sets)} neuron sets were given for {prompts} prompts; give one, or one per prompt")
    return sets


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar, one per batch, inside the context."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**(before | {"disable": True}))
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
