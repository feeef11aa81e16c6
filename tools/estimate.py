"""What an experiment costs before it is run: UNet sample-evaluations by stage, and hours at a measured speed.

``make estimate PROFILE=sd14`` measures how many sample-evaluations a second the UNet makes on this machine and prints
the table. A sample-evaluation is one latent through the UNet once (`nemolib.evaluations`); nothing else in the
experiment takes time worth counting, but for the decoding of images.

The length of a search depends on the prompt. The table takes the paper's medians of the neurons that are found, and
all seeds and steps where fewer may do: an order of magnitude, rather too high than too low. Exercises, and figures of a
few prompts, are not in it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch

from nemolib import paper
from nemolib.batching import fitting_size
from nemolib.pipeline import PipelineError, is_hub_id, load_pipeline
from nemolib.profiles import Profile, ProfileError, load_profile
from nemolib.prompts import PromptTableError, select
from nemolib.protocols import load_protocol
from nemolib.selection import schedule
from nemolib.value_layers import STABLE_DIFFUSION_WIDTHS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

BACKWARD = 3
"""Sample-evaluations that a pass with gradients counts for: forward, and about twice as much backward."""

OBSERVED = 2
"""Sample-evaluations of one seed for all protocols and scores: two timesteps. The empty prompt is computed once for all."""

ABLATED_SEARCHES = 6
"""Searches of an ablated prompt besides its own: three thresholds, no top-k, and guidance in detection for two."""

ABLATED_IMAGES = 16
"""Image sets of Table 4, Fig. 14 and 15 besides all neurons active and the default: five searches, no refinement, seven
factors, and three pairs of thresholds."""

BLOCKED_SETS = 12
"""Neuron sets of Fig. 5a, 8 and Table 3: four numbers of frequent neurons, and of random others in two draws."""

BLOCKED_SEEDS = 3
"""Latents of Table 3."""

SWITCHED_LAYERS = 16 + 16 + 16
"""Layers that Fig. 16 to 20 switch off in Stable Diffusion: values, keys, and convolutions of the down blocks."""

LAYER_SAMPLES = 2
"""Images of each of them."""

NATIVE_SIDE = 512
"""Side in pixels of the images of Stable Diffusion v1, and what one sample-evaluation stands for."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many prompts there are of each kind; the defaults are the paper's."""

    vm: int = 112
    tm: int = 388
    unmemorized: int = 500
    holdout: int = 50_000
    threshold: int = 50_000
    quality: int = 10_000

    @property
    def memorized(self) -> int:
        """Number of memorized prompts."""
        return self.vm + self.tm


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the experiment.

    Attributes:
        name: What is done.
        prompts: For how many prompts.
        evaluations: UNet sample-evaluations for one of them.
    """

    name: str
    prompts: int
    evaluations: float

    @property
    def total(self) -> float:
        """UNet sample-evaluations of all prompts."""
        return self.prompts * self.evaluations


def detection_evaluations(profile: Profile) -> int:
    """Return the UNet sample-evaluations of the noise differences of one prompt: one a seed, two with guidance."""
    return profile.detection.samples * (1 if profile.detection.guidance == 0 else 2)


def image_evaluations(profile: Profile, *, samples: int | None = None) -> float:
    """Return the UNet sample-evaluations of the images of one prompt: two a step with guidance.

    Those of a smaller image count for as much less as its area is smaller.

    Args:
        profile: A profile.
        samples: Images of the prompt; None: the profile's.
    """
    settings = profile.generation
    area = ((settings.side or NATIVE_SIDE) / NATIVE_SIDE) ** 2
    return (samples or settings.samples) * settings.steps * (1 if settings.guidance <= 1 else 2) * area


def refinement_tests(initial: float, refined: float, *, layers: int, method: str) -> float:
    """Return how many neuron sets the refinement of one prompt evaluates, at most.

    Args:
        initial: Neurons of the initial selection.
        refined: Neurons that stay.
        layers: Value layers, each tested as a whole first.
        method: ``sequential``: one test for each neuron. ``fast``: binary splitting finds each neuron that stays among
            about initial / refined others, and never takes a tenth more than ``sequential``, and 8, as
            `nemolib.group_testing` promises.

    Raises:
        ValueError: Another method.
    """
    one_by_one = layers + initial
    if method == "sequential":
        return one_by_one
    if method != "fast":
        raise ValueError(f"method is {method!r}; it must be 'fast' or 'sequential'")
    stay = max(refined, 1.0)
    halvings = math.log2(max(initial / stay, 1.0)) + 1.5
    return min(layers + stay * halvings + 1, 1.1 * one_by_one + 8)


def search_evaluations(profile: Profile, kind: str, *, method: str | None = None) -> float:
    """Return the UNet sample-evaluations of the whole search for one prompt (Alg. 1 to 4), with all seeds and steps.

    Args:
        profile: A profile.
        kind: ``vm`` or ``tm``.
        method: ``fast`` or ``sequential``; None: the profile's.
    """
    one = detection_evaluations(profile)
    steps = len(schedule(profile.search, evaluate_limits=load_protocol(profile.protocol).evaluate_limits))
    initial, refined = (paper.reported(name).value for name in (f"neurons.{kind}.initial", f"neurons.{kind}"))
    layers = len(STABLE_DIFFUSION_WIDTHS)
    tests = refinement_tests(initial, refined, layers=layers, method=method or profile.search.method)
    return one * (1 + steps + tests)


def stages(profile: Profile | str, counts: Counts | None = None) -> list[Stage]:
    """Return the parts of the experiment, in the order of the notebooks.

    Args:
        profile: A profile or its name.
        counts: How many prompts there are; None: the paper's.
    """
    profile, counts = load_profile(profile), counts or Counts()
    extent, wen, repeats = profile.extent, profile.mitigation.wen, profile.mitigation.random.repeats
    one, image = detection_evaluations(profile), image_evaluations(profile)
    search = {kind: search_evaluations(profile, kind) for kind in ("vm", "tm")}
    tested = counts.memorized + counts.unmemorized
    searched, drawn = (_at_most(limit, counts.unmemorized) for limit in (extent.searched, extent.drawn))
    quality, layers = _at_most(extent.quality, counts.quality), _at_most(extent.layers, counts.vm)
    blocks = _at_most(extent.blocks, quality)
    mitigated = sum(_at_most(extent.mitigated, number) for number in (counts.vm, counts.tm))
    vm, tm = (_at_most(extent.ablated, number) for number in (counts.vm, counts.tm))
    ablated, ablated_search = vm + tm, (vm * search["vm"] + tm * search["tm"]) / max(vm + tm, 1)
    # Most unmemorized prompts fail the gate; the others are searched about as long as a TM prompt.
    suspected = 1 - paper.reported("unmemorized.without_neurons").value / 500
    samples = extent.quality_samples or profile.generation.samples
    tokens = len(profile.mitigation.somepalli.numbers)
    adjusted = image + wen.latents * (1 + BACKWARD * wen.iterations)
    layer_image = image_evaluations(profile, samples=min(LAYER_SAMPLES, profile.generation.samples))
    return [
        Stage("memorization threshold, all protocols", counts.threshold, OBSERVED * profile.detection.samples),
        Stage("activation statistics (text encoder only)", counts.holdout, 0),
        Stage("memorization scores, all protocols", tested, OBSERVED * profile.detection.samples),
        Stage("localization, VM", counts.vm, search["vm"]),
        Stage("localization, TM", counts.tm, search["tm"]),
        Stage("localization, unmemorized", searched, one + suspected * search["tm"]),
        Stage("images, all neurons active", counts.memorized + drawn, image),
        Stage("images and scores, memorization neurons deactivated", counts.memorized, image + one),
        Stage("images, initial selection and random neurons", mitigated, (1 + repeats) * image),
        Stage("images, prompt embedding adjustment", mitigated, adjusted),
        Stage("images, attention scaling", mitigated, image),
        Stage("images, random tokens", mitigated, tokens * image),
        Stage("images, unmemorized prompts without neurons", drawn, 2 * image),
        Stage("ablations, localization", ablated, ABLATED_SEARCHES * ablated_search),
        Stage("ablations, images", ablated, ABLATED_IMAGES * image),
        Stage("image quality", quality, (1 + BLOCKED_SETS) * image_evaluations(profile, samples=samples)),
        Stage("outputs of blocks", blocks, (1 + BLOCKED_SETS) * min(BLOCKED_SEEDS, profile.detection.samples)),
        Stage("layers switched off", layers, (1 + SWITCHED_LAYERS) * layer_image),
    ]


def _at_most(limit: int | None, available: int) -> int:
    return available if limit is None else min(limit, available)


def cost_table(parts: Sequence[Stage], *, per_second: float | None = None) -> pd.DataFrame:
    """Return what an experiment costs, a row for each part and one for their sum.

    Args:
        parts: What `stages` returned.
        per_second: UNet sample-evaluations a second; None: the table has no hours.

    Returns:
        Columns stage, prompts, each (evaluations of one prompt), evaluations, and hours.

    Raises:
        ValueError: The speed is not above 0.
    """
    if per_second is not None and not 0 < per_second < math.inf:
        raise ValueError(f"per_second is {per_second!r}; it must be a number of evaluations a second above 0")
    rows = [(part.name, part.prompts, part.evaluations, part.total) for part in parts]
    table = pd.DataFrame(rows, columns=["stage", "prompts", "each", "evaluations"])
    table.loc[len(table)] = ["sum", None, None, table["evaluations"].sum()]
    return table if per_second is None else table.assign(hours=table["evaluations"] / per_second / 3600)


def shown(table: pd.DataFrame) -> str:
    """Return a cost table as Markdown."""

    def number(value: float, digits: int = 0) -> str:
        return "" if pd.isna(value) else f"{value:,.{digits}f}"

    texts = {name: table[name].map(number) for name in ("prompts", "each", "evaluations")}
    if "hours" in table:
        texts["hours"] = table["hours"].map(lambda value: number(value, 1 if value >= 1 else 2))
    aligned = ("left", *("right" for _ in texts))
    return str(table[["stage"]].assign(**texts).to_markdown(index=False, colalign=aligned, disable_numparse=True))


def counts_of(profile: Profile | str) -> Counts:
    """Return how many prompts a profile has; the paper's numbers for tables that are not there yet.

    Args:
        profile: A profile or its name.

    Raises:
        PromptTableError: A table that is there cannot be used.
    """
    profile, known = load_profile(profile), Counts()
    found = {}
    for kind in ("vm", "tm", "unmemorized", "holdout", "threshold"):
        wanted = {"holdout": profile.holdout_size, "threshold": profile.threshold_prompts}.get(kind)
        try:
            found[kind] = len(select(profile, kind))
        except FileNotFoundError:
            found[kind] = wanted or getattr(known, kind)
    return Counts(**found, quality=known.quality if profile.prompts.quality else found["unmemorized"])


@torch.no_grad()
def evaluations_per_second(
    pipe: StableDiffusionPipeline,
    *,
    samples: int,
    seconds: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return how many UNet sample-evaluations a second this machine makes.

    Args:
        pipe: A StableDiffusionPipeline.
        samples: Latents of one pass; fewer where memory is too small for so many.
        seconds: How long to measure, at least; two passes in any case, after one that warms up.
        clock: Returns seconds.
    """
    unet, size = pipe.unet, fitting_size(pipe.unet, samples)
    parameter = next(unet.parameters())
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    like = {"device": parameter.device, "dtype": parameter.dtype}
    latents = torch.randn((size, unet.config.in_channels, height, width), generator=torch.Generator().manual_seed(0))
    texts = torch.zeros((size, pipe.tokenizer.model_max_length, unet.config.cross_attention_dim), **like)
    latents = latents.to(**like)

    def run() -> None:
        unet(latents, 961, texts, return_dict=False)
        if parameter.device.type == "cuda":
            torch.cuda.synchronize(parameter.device)
        elif parameter.device.type == "mps":
            torch.mps.synchronize()

    run()
    start, passes = clock(), 0
    while passes < 2 or clock() - start < seconds:
        run()
        passes += 1
    return passes * size / (clock() - start)


def measured_pipeline(profile: Profile) -> StableDiffusionPipeline:
    """Return a pipeline to measure with: the profile's, or random weights of the same shapes in place of a hub model."""
    return load_pipeline(replace(profile, model="random:sd14") if is_hub_id(profile.model) else profile)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the cost table of a profile from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nemolib.estimate", description=__doc__)
    parser.add_argument("--profile", default=os.environ.get("PROFILE") or "sd14", help="default: $PROFILE, else sd14")
    parser.add_argument("--per-second", type=float, help="UNet sample-evaluations a second; default: measured here")
    parser.add_argument("--paper", action="store_true", help="as many prompts as in the paper, whatever the profile")
    arguments = parser.parse_args(argv)
    try:
        profile = load_profile(arguments.profile)
        counts = Counts() if arguments.paper else counts_of(profile)
        speed = _measure(profile) if arguments.per_second is None else arguments.per_second
        text = shown(cost_table(stages(profile, counts), per_second=speed))
    except (ProfileError, PromptTableError, PipelineError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    origin = "measured here" if arguments.per_second is None else "given"
    sys.stdout.write(f"Profile {profile.name}, {speed:.3g} UNet sample-evaluations a second ({origin}):\n\n{text}\n")
    return 0


def _measure(profile: Profile) -> float:
    pipe = measured_pipeline(profile)
    # On a CPU a pass of all seeds takes minutes, and no seed is faster than another.
    samples = 1 if pipe.device.type == "cpu" else profile.detection.samples
    return evaluations_per_second(pipe, samples=samples)


if __name__ == "__main__":
    sys.exit(main())
