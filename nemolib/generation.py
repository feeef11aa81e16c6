"""Images of prompts, with and without deactivated neurons, from the same seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from nemolib.batching import batches, check_prompts, progress_bar
from nemolib.defaults import default_settings
from nemolib.hooks import scale_neurons
from nemolib.neurons import NeuronSet
from nemolib.seeding import sample_generators
from nemolib.settings import GenerationSettings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def generate(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    settings: GenerationSettings | None = None,
    neurons: NeuronSet | Sequence[NeuronSet] | None = None,
    factor: float = 0.0,
    progress: bool = True,
) -> np.ndarray:
    """Return images of prompts, with the pipeline's own scheduler.

    Sample ``i`` of every prompt starts from the same latents, which depend on the seed and on ``i`` alone. So images
    with and without deactivated neurons can be compared one by one, whatever the batch.

    Source: App. B.3.
    Deviates: the authors' code draws the latents of a prompt from one generator for the whole batch.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: The prompts, at least one.
        settings: Seed, samples, steps, guidance and batch size; None means those of the profile that the pipeline was
            loaded from, else those of the paper.
        neurons: Neurons that are scaled: one set for all prompts, or one per prompt; None changes nothing.
        factor: What their values are multiplied by; 0 deactivates.
        progress: Whether to show a progress bar.

    Returns:
        Images [prompt, seed, height, width, 3], uint8.

    Raises:
        ValueError: There are no prompts, one is empty, or a neuron set does not fit or is missing.
    """
    prompts, settings = check_prompts(prompts), settings or default_settings(pipe).generation
    sets = _sets(neurons, len(prompts))
    jobs = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(settings.samples)]
    images = []
    with _silent(pipe), progress_bar(len(jobs), "images", unit="image", enabled=progress) as bar:
        for batch in batches(jobs, settings.batch_size):
            scaled = nullcontext() if sets is None else scale_neurons(
                pipe.unet, [sets[prompt] for prompt, _ in batch], factor=factor
            )  # fmt: skip
            with scaled:
                images.append(_images(pipe, [prompts[i] for i, _ in batch], [i for _, i in batch], settings))
            bar.update(len(batch))
    stacked = np.concatenate(images)
    return stacked.reshape(len(prompts), settings.samples, *stacked.shape[1:])


def _images(
    pipe: StableDiffusionPipeline, prompts: list[str], samples: list[int], settings: GenerationSettings
) -> np.ndarray:
    """Return one image per prompt, [image, height, width, 3], uint8."""
    output = pipe(
        prompts,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=sample_generators(settings.seed, samples),
        output_type="np",
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
