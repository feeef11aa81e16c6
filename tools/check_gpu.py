"""Does this GPU do it? ``make check-gpu``: some minutes on one card, without a download.

The profile ``sd14-dryrun`` stands for Stable Diffusion v1-4: random weights of its shapes, here in half precision and with
the paper's ten seeds. It tells what is fast enough and fits. That results are those of a CPU is checked with the tiny
world, whose weights mean something. The report is printed and written to ``benchmarks/gpu.json``; ``make estimate`` takes
the speed from there where there is no card.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

from nemolib import paths, workers
from nemolib.beyond.attack import dori
from nemolib.beyond.detectors import Sharpness
from nemolib.beyond.guidance import SearchedNoise
from nemolib.beyond.prune import prune, restore
from nemolib.beyond.regions import region_maps
from nemolib.first_step import first_step
from nemolib.generation import generate
from nemolib.holdout import activation_statistics
from nemolib.layers import widths
from nemolib.localization import Localization
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.provenance import versions
from nemolib.run import Run
from nemolib.settings import Profile, load_profile
from nemolib.store import Store
from tools.estimate import GPU_REPORT, unet_speed

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

SPARE = 2**30
"""Memory in bytes that is left to this process beside the model, when it shall run out."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is done: on a card some minutes.

    Attributes:
        latents: Batches whose speed is measured.
        seconds: How long each is measured, at least.
        texts: Texts of the activation statistics.
        prompts: Prompts that are searched, and that two workers share.
        images: Images that are generated.
        crowd: Latents that do not fit into `SPARE` at once.
        compared: Prompts of each kind that are compared on both devices.
    """

    latents: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    seconds: float = 2.0
    texts: int = 5000
    prompts: int = 2
    images: int = 10
    crowd: int = 256
    compared: int = 3


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far results of a card may be from those of a CPU; stated before a card was at hand.

    Attributes:
        differences: Largest deviation of a normalized noise difference, which is in [0, 1]; median over maps.
        scores: Largest deviation of a memorization score.
        neurons: Smallest share of the neurons of both sets that are in both, of all prompts together.
        images: Mean deviation of a pixel, of 255.
    """

    differences: float
    scores: float
    neurons: float
    images: float


TOLERANCES = {"float32": Tolerance(0.01, 0.005, 0.8, 0.5), "float16": Tolerance(0.05, 0.01, 0.5, 1.0)}
"""On a CPU in half precision they are 0.013, 0.002, 0.71 and 0.06: a search may turn at any test that is decided narrowly."""


class Row(NamedTuple):
    """What was measured, its value, its unit or bound, whether it is as it should be, and in batches of how many latents."""

    what: str
    value: float
    unit: str = "s"
    good: bool = True
    latents: int | None = None


def full_size(device: str, dtype: str = "float16") -> Profile:
    """Return the profile that stands for Stable Diffusion: random weights, real shapes, ten seeds, images of 50 steps."""
    dry, real = load_profile("sd14-dryrun"), load_profile("sd14")
    images = replace(real.generation, samples=1)
    return replace(dry, device=device, dtype=dtype, detection=real.detection, generation=images)


def speeds(pipe: StableDiffusionPipeline, sizes: Sizes) -> Iterator[Row]:
    """Yield UNet evaluations a second for batches of latents."""
    for size in sizes.latents:
        speed = unet_speed(pipe, size, seconds=sizes.seconds)
        yield Row(f"evaluations a second, {size} latents", speed, "1/s", latents=size)


def experiment(run: Run, sizes: Sizes) -> Iterator[Row]:
    """Yield what the parts of the experiment take: statistics, a bounded search, images."""
    texts = [f"a photo of number {number}" for number in range(sizes.texts)]
    with _clock() as seconds:
        statistics = activation_statistics(run.pipe, texts, progress=False)
    yield Row(f"activation statistics of {sizes.texts} texts", seconds())

    def search(run: Run) -> list[Localization]:
        return run.search(texts[: sizes.prompts], statistics=statistics, threshold=run.threshold)

    with _clock() as seconds:
        found = search(run)
    used = sum(sum(item.evaluations.values()) for item in found)
    good = all(item.memorized for item in found)
    yield Row(f"search of {sizes.prompts} prompts", seconds(), f"s, {used} evaluations", good)
    with _clock() as seconds:
        images = run.images(texts[: sizes.images])
    yield Row(f"{sizes.images} images of {images.shape[2]} pixels", seconds())
    with _clock() as seconds:
        there = _on_two_workers(run, search)
    alike = [item.neurons for item in found] == [item.neurons for item in there]
    yield Row("the same search by two processes, with their start", seconds(), good=alike)


def _on_two_workers(run: Run, work: Callable[[Run], Any]) -> Any:
    """Return what two processes on this machine compute, with a store of their own."""
    with patch.dict(os.environ, {workers.VARIABLE: "local:2"}), TemporaryDirectory() as folder:
        return work(Run(run.profile, run.pipe, store=Store(Path(folder)), progress=False))


def beyond(run: Run) -> Iterator[Row]:
    """Yield what a method of each notebook on what came after NeMo takes, and whether it gives what it should."""
    pipe, caption, settings = run.pipe, "a photo", replace(run.profile.generation, samples=1, steps=2)
    neurons, common = NeuronSet.of([(0, 1)], layers=len(widths(pipe.unet))), {"settings": settings, "progress": False}

    def pruned() -> bool:
        off = generate(pipe, [caption], mitigation=DeactivatedNeurons(neurons), **common)
        taken = prune(pipe, neurons)
        found = generate(pipe, [caption], **common)
        restore(pipe, taken)
        return np.array_equal(found, off)

    def attacked() -> bool:
        image = generate(pipe, [caption], **common)[0, 0]
        return np.isfinite(dori(pipe, [image], steps=(2,), batch=1).losses).all()

    def detected() -> bool:
        return np.isfinite(Sharpness(samples=1).score(pipe, caption).score)

    def mapped() -> bool:
        found = region_maps(pipe, caption, steps=2, indices=(0, 1), samples=1, probes=1)
        return all((each.amax(dim=(2, 3)) > 0).all() and each.isfinite().all() for each in found.values())

    def searched() -> bool:
        search = SearchedNoise(target=1e-6, iterations=1)
        return not np.array_equal(*(generate(pipe, [caption], mitigation=item, **common) for item in (None, search)))

    works = {"pruned neurons": pruned, "an attack of 2 steps": attacked, "a detector by derivatives": detected}
    for name, work in (works | {"maps of 2 steps": mapped, "searched noise": searched}).items():
        with _clock() as seconds:
            good = bool(work())
        yield Row(name, seconds(), good=good)


def halving(pipe: StableDiffusionPipeline, sizes: Sizes, limit: Callable[[torch.device], Any]) -> Iterator[Row]:
    """Yield whether a batch that does not fit is halved, and whether the result is that of small batches."""
    step = first_step(pipe, settings=replace(load_profile("sd14").detection, samples=sizes.crowd))
    embedding, some = embed(pipe, ["a photo"]), range(4)
    small = step.raw(embedding, seeds=some)
    with limit(pipe.device), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = step.raw(embedding)
    halved = [str(item.message) for item in caught if "out of memory" in str(item.message)]
    yield Row(
        f"batches halved for {sizes.crowd} latents in {SPARE / 2**30:.0f} GiB", len(halved), "times", bool(halved)
    )
    off = float((whole[: len(some)] - small).abs().max() / small.std())
    yield Row("deviation of what was halved", off, "standard deviations, at most 0.05", off <= 0.05)


@contextmanager
def limited(device: torch.device) -> Iterator[None]:
    """Leave this process `SPARE` beside what it holds on a card, inside the context."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + SPARE) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def agreement(world: Profile, device: str, sizes: Sizes, tolerances: dict[str, Tolerance]) -> Iterator[Row]:
    """Yield how far what a card finds in a world is from what a CPU finds, for each floating-point type."""
    with TemporaryDirectory() as folder:

        def run(device: str, dtype: str) -> Run:
            store = Store(Path(folder) / f"{device}-{dtype}")
            return Run(replace(world, device=device, dtype=dtype), store=store, progress=False)

        reference = run("cpu", "float32")
        threshold = reference.threshold
        here = _facts(reference, threshold, sizes)
        for dtype, allowed in tolerances.items():
            there = _facts(run(device, dtype), threshold, sizes)
            for name, (value, fits) in _deviations(here, there, allowed).items():
                yield Row(f"tiny world, {dtype}: {name}", value, f"bound {getattr(allowed, name)}", fits)


def _facts(run: Run, threshold: float, sizes: Sizes) -> dict[str, Any]:
    kinds = run.prompts("vm", "tm").groupby("kind", sort=False)
    captions = kinds.head(sizes.compared)["caption"].tolist()
    step, found = first_step(run.pipe), run.search(captions, threshold=threshold)
    return {
        "differences": np.stack([step(embed(run.pipe, [caption])).cpu().numpy() for caption in captions]),
        "scores": np.array([item.unblocked_score for item in found]),
        "neurons": {(n, layer, neuron) for n, item in enumerate(found) for layer, neuron in item.neurons},
        "images": run.images(captions).astype(float),
    }


def _deviations(here: dict[str, Any], there: dict[str, Any], allowed: Tolerance) -> dict[str, tuple[float, bool]]:
    maps = np.abs(here["differences"] - there["differences"]).max(axis=(-2, -1))
    both, any_of = here["neurons"] & there["neurons"], here["neurons"] | there["neurons"]
    found = {
        "differences": float(np.median(maps)),
        "scores": float(np.abs(here["scores"] - there["scores"]).max()),
        "images": float(np.abs(here["images"] - there["images"]).mean()),
    }
    within = {name: (value, value <= getattr(allowed, name)) for name, value in found.items()}
    share = len(both) / max(len(any_of), 1)
    return within | {"neurons": (share, share >= allowed.neurons)}


@contextmanager
def _clock() -> Iterator[Callable[[], float]]:
    """Yield what tells the seconds inside the context; work of a card is waited for."""
    started, ended = time.perf_counter(), []
    yield lambda: ended[0] - started
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ended.append(time.perf_counter())


def report(parts: Sequence[tuple[str, Callable[[], Iterator[Row]]]]) -> pd.DataFrame:
    """Return a row for each measurement; a part that raises is a row too, and the others go on."""
    rows: list[Row] = []
    for name, part in parts:
        try:
            for row in part():
                rows.append(row)
                print(
                    f"  {row.what}: {row.value:.4g} {row.unit}{'' if row.good else '  NOT AS IT SHOULD BE'}", flush=True
                )
        except Exception as error:
            rows.append(Row(name, float("nan"), f"{type(error).__name__}: {error}", good=False))
            print(f"  {name}: FAILED ({rows[-1].unit})", flush=True)
    return pd.DataFrame(rows, columns=Row._fields)


def write_report(found: pd.DataFrame, *, seconds: float) -> bool:
    """Keep the rows of `report` with the card's name in `GPU_REPORT`; return whether all is as it should be."""
    card, good = torch.cuda.get_device_properties(0), bool(found["good"].all())
    rows = json.loads(found.to_json(orient="records", double_precision=6))
    content = {"card": card.name, "memory": card.total_memory, "versions": versions(), "seconds": seconds, "good": good}
    paths.write_atomic(GPU_REPORT, json.dumps(content | {"rows": rows}, indent=1) + "\n")
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """Check the card of this machine; return 0 if all is as it should be, 1 if not, 2 without a card."""
    argparse.ArgumentParser(prog="python -m tools.check_gpu", description=__doc__).parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("this machine has no CUDA device that PyTorch can use: there is nothing to check\n")
        return 2
    sizes = Sizes()
    with TemporaryDirectory() as folder, _clock() as seconds:
        run = Run(full_size("cuda"), store=Store(Path(folder)), progress=False)
        found = report(
            [
                ("speed", lambda: speeds(run.pipe, sizes)),
                ("experiment", lambda: experiment(run, sizes)),
                ("beyond", lambda: beyond(run)),
                ("halving", lambda: halving(run.pipe, sizes, limited)),
                ("agreement", lambda: agreement(load_profile("tiny"), "cuda", sizes, TOLERANCES)),
            ]
        )
    good = write_report(found, seconds=round(seconds(), 1))
    sys.stdout.write(f"{'all is as it should be' if good else 'NOT all is as it should be'}; kept in {GPU_REPORT}\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
