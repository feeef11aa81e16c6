"""What the neuron search costs: the release's procedure, our sequential search and the fast one, in one run.

    python benchmarks/search.py                 # ten VM and ten TM prompts
    python benchmarks/search.py --prompts 0     # all of them

The tiny world is searched, and a published run of Stable Diffusion v1-4 (``data/sd14/results.csv.gz``) is replayed.

Costs are UNet sample-evaluations (one latent through the UNet once) and seconds. The sequential and the fast search take
all prompts together: their seconds are a prompt's share. Medians are printed, and ratios are
written to ``build/benchmarks/search.json``: ``release_over_fast`` and ``sequential_over_fast`` are medians over prompts
of ratios of UNet sample-evaluations for the whole search (Alg. 1 to 4), ``size_ratio`` that of the number of neurons
found, fast over sequential, ``seconds_release_over_fast`` that of seconds (a replay takes none).

The replay takes recorded searches (the candidates and the neurons that refinement left of each prompt) and a monotone
model of the score: below the threshold if and only if all refined neurons are deactivated. How many sets a search
evaluates then follows exactly. How many *seeds* the fast search evaluates for a set is not recorded; the replay takes
what the tiny world needed in the same run (a mean); ``fast_all_seeds`` is what it would cost if it evaluated all ten.

The file ``search.json`` beside this one has the ratios of a run with ten VM and ten TM prompts and the replay; docs/reproducibility.md
shows them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import nemolib
from nemolib import paths
from nemolib.batching import in_order
from nemolib.experiments.published_run import PROMPTS, RESULTS
from nemolib.first_step import FirstStep, first_step
from nemolib.holdout import ActivationStatistics, z_scores
from nemolib.layers import collect_activations
from nemolib.localization import searching
from nemolib.neurons import NeuronSet
from nemolib.paths import write_atomic
from nemolib.pipeline import embed
from nemolib.prompts import MEMORIZED, load_prompts
from nemolib.refinement import Refinement, refine_fast, refine_sequential
from nemolib.run import Run
from nemolib.selection import Score, out_of_distribution, schedule
from nemolib.settings import Profile
from nemolib.similarity import max_pairwise, pairwise, similarity

OUTPUT = paths.BUILD / "benchmarks" / "search.json"
SAMPLES = 10
"""Seeds per prompt of the release."""

SEARCHES = ("release", "sequential", "fast")

WORLDS = {"tiny": "tiny world", "replay": "replay of recorded searches, SD v1-4"}
"""What is searched, as ``search.json`` and the tables name it."""


@dataclass(frozen=True)
class Cost:
    """What a search cost and found."""

    samples: int
    seconds: float
    initial: int
    neurons: NeuronSet


class ReleasedScore:
    """The score of neuron sets as the release computes it; counts UNet sample-evaluations, and the sets."""

    def __init__(self, step: FirstStep, embedding: Tensor, world: Profile, gate: float) -> None:
        self.samples = self.sets = 0
        self._step, self._embedding = step, embedding
        self._compared = {"settings": world.similarity, "protocol": world.protocol}
        self._unblocked = self.differences()
        best = max_pairwise(pairwise(self._unblocked, **self._compared))
        self.seeds = (best > gate).nonzero().flatten().tolist()

    def __call__(self, neurons: NeuronSet) -> float:
        """Return the largest similarity over the seeds that passed the gate; the others are computed and dropped."""
        self.sets += 1
        maps = self.differences(neurons)
        return similarity(self._unblocked[self.seeds], maps[self.seeds], **self._compared).max().item()

    def activations(self) -> tuple[Tensor, ...]:
        """Return the activations [neuron] of each layer, read in a UNet pass of one sample."""
        with collect_activations(self._step.unet) as collected:
            self._pass(None, [0])
        return tuple(outputs[0][-1].float().abs().mean(dim=0) for outputs in collected)

    def differences(self, neurons: NeuronSet | None = None) -> Tensor:
        """Return the noise differences of all seeds; the release runs the timestep before as well."""
        seeds = list(range(len(self._step.latents)))
        self._pass(neurons, seeds)
        return self._pass(neurons, seeds)

    def _pass(self, neurons: NeuronSet | None, seeds: list[int]) -> Tensor:
        self.samples += self._step.cost * len(seeds)
        return self._step(self._embedding, neurons=neurons, seeds=seeds)


def release(
    step: FirstStep,
    embedding: Tensor,
    statistics: ActivationStatistics,
    world: Profile,
    threshold: float,
    *,
    gate: float,
) -> Cost:
    """Return the cost of the release's procedure for a prompt.

    Cost-faithful: each noise difference takes two UNet passes, of which the first is thrown away; each theta step reads
    the activations in a UNet pass of one sample; all seeds are computed, and those that failed the gate dropped
    afterwards; nothing is remembered; the unblocked noise differences and those of the initial selection are computed
    again before the refinement, and those of the refined set after it; a candidate with two entries is tested twice.
    The timestep is that of the profile's protocol in both passes, so that the neurons can be compared.

    Source: authors' code, 3_detect_memorized_neurons.py, utils/activation_detection.py.

    Args:
        step: The first denoising step.
        embedding: Embedding of the prompt, [1, token, feature].
        statistics: Activation statistics.
        world: The profile.
        threshold: Memorization threshold.
        gate: Similarity that a seed must exceed.
    """
    start = time.perf_counter()
    score = ReleasedScore(step, embedding, world, gate)
    if not score.seeds:
        return Cost(score.samples, time.perf_counter() - start, 0, NeuronSet.empty(len(statistics.mean)))
    for theta, k in schedule(world.search, evaluate_limits=world.protocol.evaluate_limits):
        activations = score.activations()
        candidates = out_of_distribution(z_scores(statistics, activations), activations, theta=theta, top_k=k)
        value = score(candidates.neurons)
        if value <= threshold:
            break
    score.differences()
    before = score.sets
    found = refine_sequential(candidates.entries(double=True), score, threshold=max(value, threshold))
    # A test of one entry of two leaves the set as it is, so that we ask nothing; and the refined set comes last.
    for _ in range(1 + len(found.tests) - (score.sets - before) + 1):
        score(found.neurons)
    return Cost(score.samples, time.perf_counter() - start, len(candidates.neurons), found.neurons)


def compare(run: Run, prompts: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the costs of the three searches for each prompt, and how many seeds the fast one evaluates.

    Args:
        run: The run of the profile.
        prompts: Columns kind and caption.

    Returns:
        One row per prompt: kind, prompt, initial (candidates), and for release, sequential and fast the UNet
        sample-evaluations, seconds and number of neurons. Then means over prompts of the number of seeds: ``failing``,
        per step of Alg. 3 that fails; by kind, per test of Alg. 4 (repeated rounds included), the set that is found,
        which is evaluated for all seeds at last, set aside.
    """
    threshold, pipe, step = run.threshold, run.pipe, first_step(run.pipe)
    captions, searched = prompts["caption"].tolist(), {}
    for name in SEARCHES[1:]:
        search = searching(pipe, statistics=run.statistics, threshold=threshold, search=name)
        searched[name] = in_order(search(captions))
    rows, seeds = [], {"failing": [], "vm": [], "tm": []}
    for place, (kind, prompt) in enumerate(zip(prompts["kind"], captions, strict=True)):
        costs = {}
        for name in SEARCHES[1:]:
            found = searched[name][place]
            spent = [sum(values.values()) for values in (found.evaluations, found.seconds)]
            costs[name] = Cost(*spent, len(found.initial), found.neurons)
        embedding = embed(pipe, [prompt])
        costs["release"] = release(step, embedding, run.statistics, run.profile, threshold, gate=threshold)
        row = {"kind": kind, "prompt": prompt, "initial": costs["release"].initial}
        for name, cost in costs.items():
            columns = {"samples": cost.samples, "seconds": cost.seconds, "neurons": len(cost.neurons)}
            row |= {f"{name}_{column}": value for column, value in columns.items()}
        rows.append(row)
        if found.tests:
            last = len(found.seeds) - 1
            seeds[kind].append((found.evaluations["A4"] / step.cost - last) / len(found.tests))
            failing = len({item.neurons for item in found.steps[:-1] if item.neurons})
            spent = found.evaluations["A3"] / step.cost - len(found.seeds)
            seeds["failing"] += [spent / failing] if failing else []
        print(f"  {prompt}: " + " / ".join(str(row[f"{name}_samples"]) for name in SEARCHES), flush=True)
    return pd.DataFrame(rows), {name: float(np.mean(values)) if values else math.nan for name, values in seeds.items()}


def recorded_searches(path: Path, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Return the searches of a table of results of the authors' code, those of the captions whose kind is given.

    Returns:
        Columns kind, entries (candidates by layer, double ones included) and refined (neurons by layer).
    """
    table = pd.read_csv(path, sep=";")
    columns = {"entries": "Initial Neurons", "refined": "Refined Neurons"}
    searches = pd.DataFrame({key: table[name].map(json.loads) for key, name in columns.items()})
    return searches.assign(kind=table["Caption"].map(kinds)).dropna()


def replay(recorded: pd.DataFrame, seeds: Mapping[str, float]) -> pd.DataFrame:
    """Return the costs of recorded searches under a monotone model of the score.

    The model falls a little whenever a neuron that is not needed is reactivated, as the score of a real model does, so
    that the clean-up of the fast search takes place and is counted.

    Args:
        recorded: What `recorded_searches` returned.
        seeds: Seeds per failing step and per test, from `compare`.

    Returns:
        One row per prompt: kind, candidates, sets of the sequential and the fast refinement, UNet sample-evaluations of
        the three searches, those of the fast one with all seeds for every set, and neurons of both.
    """
    seeds = {name: SAMPLES if math.isnan(value) else value for name, value in seeds.items()}
    return pd.DataFrame([_replayed(item.kind, item.entries, item.refined, seeds) for item in recorded.itertuples()])


def _replayed(
    kind: str, entries: list[list[int]], refined: list[list[int]], seeds: Mapping[str, float]
) -> dict[str, Any]:
    required, total = set(NeuronSet(refined)), len(NeuronSet(entries))

    def score(neurons: NeuronSet) -> float:
        return 0.4 + 0.09 * len(neurons) / max(1, total) if required <= set(neurons) else 1.0

    slow, sequential = _counted(refine_sequential, entries, score)
    found, fast = _counted(refine_fast, entries, score)
    # Alg. 3 adds the same number of most active neurons in each layer: at most as many as the shortest list has.
    steps = min(map(len, entries)) + 1
    kept = {layer for layer, _ in required}
    tests = sum(map(bool, entries)) + sum(len(entries[layer]) for layer in kept)
    return {
        "kind": kind,
        "candidates": total,
        "sequential_sets": sequential,
        "fast_sets": fast,
        "release_samples": 2 * SAMPLES + steps * (2 * SAMPLES + 1) + 2 * SAMPLES * (3 + tests),
        "sequential_samples": SAMPLES * (1 + steps + sequential),
        "fast_samples": 3 * SAMPLES - 1 + (steps - 1) * seeds["failing"] + fast * seeds[kind],
        "fast_all_seeds": SAMPLES * (1 + steps + fast),
        "sequential_neurons": len(slow.neurons),
        "fast_neurons": len(found.neurons),
    }


def _counted(
    refine: Callable[..., Refinement], entries: Sequence[Sequence[int]], score: Score
) -> tuple[Refinement, int]:
    """Return a refinement and the number of different sets that it evaluated, all candidates not counted."""
    ask = cache(score)
    found = refine(entries, ask, threshold=0.5, initial_score=score(NeuronSet(entries)))
    return found, ask.cache_info().currsize


def ratios(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return the numbers of ``search.json`` by kind: medians over prompts."""
    found = {}
    for kind, part in table.groupby("kind", sort=False):
        searched = part[part["sequential_neurons"] > 0]
        found[kind] = {
            "release_over_fast": (part["release_samples"] / part["fast_samples"]).median(),
            "sequential_over_fast": (part["sequential_samples"] / part["fast_samples"]).median(),
            "size_ratio": (searched["fast_neurons"] / searched["sequential_neurons"]).median(),
        }
        if "release_seconds" in part:
            found[kind]["seconds_release_over_fast"] = (part["release_seconds"] / part["fast_seconds"]).median()
        found[kind] = {name: round(float(value), 4) for name, value in found[kind].items()}
    return found


def ratio_table(result: dict[str, Any]) -> str:
    """Return the ratios of ``search.json`` as a table in Markdown, as in docs/reproducibility.md."""
    quantities = {
        "release_over_fast": "evaluations, release / fast",
        "sequential_over_fast": "evaluations, sequential / fast",
        "size_ratio": "neurons found, fast / sequential",
        "seconds_release_over_fast": "seconds, release / fast",
    }
    rows = [
        {"": f"{WORLDS[world]}: {text}"} | {kind.upper(): f"{found[kind][name]:.1f}" for kind in MEMORIZED}
        for world, found in result.items()
        for name, text in quantities.items()
        if name in found[MEMORIZED[0]]
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True, colalign=("left", "right", "right"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print tables, and write ``build/benchmarks/search.json``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=10, help="prompts per kind; 0 means all")
    options = parser.parse_args(arguments)
    run = nemolib.open_run("tiny", progress=False)
    known = run.prompts(*MEMORIZED)
    chosen = known.groupby("kind", sort=False).head(options.prompts or len(known))
    with torch.inference_mode():
        print("UNet sample-evaluations: " + " / ".join(SEARCHES), flush=True)
        table, seeds = compare(run, chosen)
    print("seeds, per failing step of Alg. 3 and per test of Alg. 4: ", seeds)
    kinds = load_prompts(PROMPTS).set_index("caption")["kind"]
    tables = {"tiny": table, "replay": replay(recorded_searches(RESULTS, kinds), seeds)}
    for world, table in tables.items():
        medians = table.groupby("kind", sort=False).median(numeric_only=True).T.round(2)
        print(f"\n{WORLDS[world]}, medians over prompts\n{medians.to_string()}")
    result = {world: ratios(table) for world, table in tables.items()}
    print(f"\nMedians over prompts\n{ratio_table(result)}")
    write_atomic(OUTPUT, json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {OUTPUT}")


if __name__ == "__main__":
    main()
