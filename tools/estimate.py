"""What an experiment costs before it is run: UNet sample-evaluations by stage, and hours at a measured speed.

``make estimate PROFILE=sd14`` measures how many sample-evaluations a second the UNet makes on this machine and prints
the table. A sample-evaluation is one latent through the UNet once; nothing else in the experiment takes time worth
counting, but for the decoding of images.

The length of a search depends on the prompt. The table takes the paper's medians of the neurons that are found, and
all seeds and steps where fewer may do: an order of magnitude, rather too high than too low. Exercises, and figures of a
few prompts, are not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from accelerate.utils import find_executable_batch_size
from torch.utils.benchmark import Timer

from nemolib import paper, paths
from nemolib.layers import STABLE_DIFFUSION_WIDTHS
from nemolib.pipeline import is_hub_id, load_pipeline
from nemolib.prompts import select
from nemolib.selection import schedule
from nemolib.settings import Profile, load_profile

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PAPER = {"vm": 112, "tm": 388, "unmemorized": 500, "holdout": 50_000, "threshold": 50_000, "quality": 10_000}
"""How many prompts of each kind the paper has."""

BACKWARD = 3
"""Sample-evaluations that a pass with gradients counts for: forward, and about twice as much backward."""

OBSERVED = 2
"""Sample-evaluations of one seed for all protocols and scores: two timesteps. The empty prompt is computed once for all."""

ABLATED_SEARCHES = 6
"""Searches of an ablated prompt besides its own: three thresholds, no top-k, and guidance in detection for two."""

ABLATED_IMAGES = 16
"""Image sets of Table 4, Fig. 14 and 15 besides all neurons active and the default: five searches, no refinement, seven
factors, and three pairs of thresholds."""

BLOCKED_SETS = 9
"""Neuron sets of Fig. 5a, 8 and Table 3: four numbers of frequent neurons, and of random others, the most of them twice."""

BLOCKED_SEEDS = 3
"""Latents of Table 3."""

SWITCHED_LAYERS = 16 + 16 + 16
"""Layers that Fig. 16 to 20 switch off in Stable Diffusion: values, keys, and convolutions of the down blocks."""

LAYER_SAMPLES = 2
"""Images of each of them."""

NATIVE_SIDE = 512
"""Side in pixels of the images of Stable Diffusion v1, and what one sample-evaluation stands for."""


GPU_REPORT = paths.ROOT / "benchmarks" / "gpu.json"
"""What `tools.check_gpu` measured on a card."""


def detection_evaluations(profile: Profile) -> int:
    """Return the UNet sample-evaluations of the noise differences of one prompt: one a seed, two with guidance."""
    return profile.detection.samples * (1 if profile.detection.guidance == 0 else 2)


def image_evaluations(profile: Profile, samples: int | None = None) -> float:
    """Return the UNet sample-evaluations of some images of one prompt (None: the profile's): two a step with guidance.

    Those of a smaller image count for as much less as its area is smaller.
    """
    settings = profile.generation
    area = ((settings.side or NATIVE_SIDE) / NATIVE_SIDE) ** 2
    return (samples or settings.samples) * settings.steps * (1 if settings.guidance <= 1 else 2) * area


def refinement_tests(initial: float, refined: float, *, method: str) -> float:
    """Return how many neuron sets the refinement of one prompt evaluates, at most.

    Args:
        initial: Neurons of the initial selection.
        refined: Neurons that stay.
        method: ``sequential``: one test for each neuron. ``fast``: binary splitting finds each neuron that stays among
            about initial / refined others, and never takes a tenth more than ``sequential``, and 8, as
            `nemolib.refinement` promises.
    """
    layers, stay = len(STABLE_DIFFUSION_WIDTHS), max(refined, 1.0)  # each layer is tested as a whole first
    one_by_one = layers + initial
    if method == "sequential":
        return one_by_one
    halvings = math.log2(max(initial / stay, 1.0)) + 1.5
    return min(layers + stay * halvings + 1, 1.1 * one_by_one + 8)


def search_evaluations(profile: Profile, kind: str) -> float:
    """Return the UNet sample-evaluations of the search for a prompt, ``vm`` or ``tm`` (Alg. 1-4), all seeds and steps."""
    steps = len(schedule(profile.search, evaluate_limits=profile.protocol.evaluate_limits))
    initial, refined = (paper.reported(name).value for name in (f"neurons.{kind}.initial", f"neurons.{kind}"))
    tests = refinement_tests(initial, refined, method=profile.search.method)
    return detection_evaluations(profile) * (1 + steps + tests)


def stages(profile: Profile, counts: Mapping[str, int] = PAPER) -> pd.DataFrame:
    """Return the parts of the experiment, in the order of the notebooks.

    Args:
        profile: A profile.
        counts: How many prompts there are of each kind, as in `PAPER`.

    Returns:
        Columns stage, prompts, each (UNet sample-evaluations of one prompt), evaluations (of all of them).
    """
    extent, mitigation, samples = profile.extent, profile.mitigation, profile.detection.samples

    def taken(name: str, kind: str) -> int:
        limit = getattr(extent, name)
        return counts[kind] if limit is None else min(limit, counts[kind])

    one, image = detection_evaluations(profile), image_evaluations(profile)
    search = {kind: search_evaluations(profile, kind) for kind in ("vm", "tm")}
    memorized, drawn, quality = counts["vm"] + counts["tm"], taken("drawn", "unmemorized"), taken("quality", "quality")
    mitigated, ablated = (sum(taken(name, kind) for kind in search) for name in ("mitigated", "ablated"))
    ablated_search = sum(taken("ablated", kind) * search[kind] for kind in search) / max(ablated, 1)
    # Most unmemorized prompts fail the gate; the others are searched about as long as a TM prompt.
    suspected = 1 - paper.reported("unmemorized.without_neurons").value / 500
    adjusted = image + mitigation.wen.latents * (1 + BACKWARD * mitigation.wen.iterations)
    quality_image = image_evaluations(profile, extent.quality_samples)
    layer_image = image_evaluations(profile, min(LAYER_SAMPLES, profile.generation.samples))
    blocked = 1 + BLOCKED_SETS
    rows = [
        ("memorization threshold, all protocols", counts["threshold"], OBSERVED * samples),
        ("activation statistics (text encoder only)", counts["holdout"], 0),
        ("memorization scores, all protocols", memorized + counts["unmemorized"], OBSERVED * samples),
        ("localization, VM", counts["vm"], search["vm"]),
        ("localization, TM", counts["tm"], search["tm"]),
        ("localization, unmemorized", taken("searched", "unmemorized"), one + suspected * search["tm"]),
        ("images, all neurons active", memorized + drawn, image),
        ("images and scores, memorization neurons deactivated", memorized, image + one),
        ("images, initial selection and random neurons", mitigated, (1 + mitigation.random.repeats) * image),
        ("images, prompt embedding adjustment", mitigated, adjusted),
        ("images, attention scaling", mitigated, image),
        ("images, random tokens", mitigated, len(mitigation.somepalli.numbers) * image),
        ("images, unmemorized prompts without neurons", drawn, 2 * image),
        ("ablations, localization", ablated, ABLATED_SEARCHES * ablated_search),
        ("ablations, images", ablated, ABLATED_IMAGES * image),
        ("image quality", quality, blocked * quality_image),
        ("outputs of blocks", min(taken("blocks", "quality"), quality), blocked * min(BLOCKED_SEEDS, samples)),
        ("layers switched off", taken("layers", "vm"), (1 + SWITCHED_LAYERS) * layer_image),
    ]
    table = pd.DataFrame(rows, columns=["stage", "prompts", "each"])
    return table.assign(evaluations=table["prompts"] * table["each"])


def cost_table(parts: pd.DataFrame, per_second: float) -> str:
    """Return what an experiment costs as Markdown: a row for each part of `stages`, and one for their sum.

    Args:
        parts: What `stages` returned.
        per_second: UNet sample-evaluations a second.

    Raises:
        ValueError: The speed is not above 0.
    """
    if not 0 < per_second < math.inf:
        raise ValueError(f"per_second is {per_second!r}; it must be a number of evaluations a second above 0")
    table = parts.copy()
    table.loc[len(table)] = ["sum", None, None, table["evaluations"].sum()]
    hours = (table["evaluations"] / per_second / 3600).map(lambda value: f"{value:,.{1 if value >= 1 else 2}f}")
    numbers = table.columns[1:]
    table[numbers] = table[numbers].map(lambda value: "" if pd.isna(value) else f"{value:,.0f}")
    aligned = ("left", "right", "right", "right", "right")
    return str(table.assign(hours=hours).to_markdown(index=False, colalign=aligned, disable_numparse=True))


def counts_of(profile: Profile) -> dict[str, int]:
    """Return how many prompts of each kind a profile has; the paper's numbers for tables that are not there yet.

    Raises:
        PromptTableError: A table that is there cannot be used.
    """
    given = {"holdout": profile.holdout_size, "threshold": profile.threshold_prompts}
    found = PAPER | {kind: number for kind, number in given.items() if number}
    for kind in ("vm", "tm", "unmemorized", "holdout", "threshold"):
        with suppress(FileNotFoundError):
            found[kind] = len(select(profile, kind))
    return found | ({} if profile.prompts.quality else {"quality": found["unmemorized"]})


def measured_speed(profile: Profile, *, seconds: float = 10.0) -> float:
    """Return how many UNet sample-evaluations a second this machine makes with a profile's pipeline.

    Args:
        profile: A profile; a pipeline of random weights of the same shapes stands for a hub model.
        seconds: How long to measure, at least; one pass in any case, after one that warms up.
    """
    pipe = load_pipeline(replace(profile, model="random:sd14") if is_hub_id(profile.model) else profile)
    # On a CPU a pass of all seeds takes minutes, and no seed is faster than another. Memory may be too small for all.
    samples = 1 if pipe.device.type == "cpu" else profile.detection.samples
    return find_executable_batch_size(lambda size: unet_speed(pipe, size, seconds=seconds), samples)()


def speed_of_a_card(profile: Profile) -> tuple[float, str] | None:
    """Return the speed that `tools.check_gpu` measured, and on which card; None where a profile asks for none, or there is one."""
    if profile.device not in ("auto", "cuda") or torch.cuda.is_available() or not GPU_REPORT.is_file():
        return None
    report = json.loads(GPU_REPORT.read_text(encoding="utf-8"))
    speeds = {row["latents"]: row["value"] for row in report["rows"] if row["latents"]}
    return speeds[max(size for size in speeds if size <= profile.detection.samples)], f"measured on {report['card']}"


@torch.no_grad()
def unet_speed(pipe: StableDiffusionPipeline, size: int, *, seconds: float) -> float:
    """Return how many UNet sample-evaluations a second a pipeline makes with batches of ``size`` latents."""
    config, like = pipe.unet.config, {"device": pipe.device, "dtype": pipe.unet.dtype}
    latents = torch.ones((size, config.in_channels, config.sample_size, config.sample_size), **like)
    texts = torch.ones((size, pipe.tokenizer.model_max_length, config.cross_attention_dim), **like)
    names = {"unet": pipe.unet, "latents": latents, "texts": texts}
    timer = Timer("unet(latents, 961, texts)", globals=names, num_threads=torch.get_num_threads())
    return size / timer.blocked_autorange(min_run_time=seconds).median


def main(argv: Sequence[str] | None = None) -> int:
    """Print the cost table of a profile from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.estimate", description=__doc__)
    parser.add_argument("--profile", default=os.environ.get("PROFILE") or "sd14", help="default: $PROFILE, else sd14")
    parser.add_argument("--per-second", type=float, help="UNet sample-evaluations a second; default: measured here")
    arguments = parser.parse_args(argv)
    try:
        profile = load_profile(arguments.profile)
        parts = stages(profile, counts_of(profile))
        given = None if arguments.per_second is None else (arguments.per_second, "given")
        speed, origin = given or speed_of_a_card(profile) or (measured_speed(profile), "measured here")
        text = cost_table(parts, speed)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"Profile {profile.name}, {speed:.3g} UNet sample-evaluations a second ({origin}):\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
