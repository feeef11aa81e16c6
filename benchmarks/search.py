"""What the neuron search costs: the release's procedure, our sequential search and the fast one, in one run.

    python benchmarks/search.py                                      # the tiny world, ten VM and ten TM prompts
    python benchmarks/search.py --prompts 0                          # all of them
    python benchmarks/search.py --replay RESULTS --prompt-table TABLE  # and a published run of Stable Diffusion v1-4

Costs are UNet sample-evaluations (one latent through the UNet once) and seconds. Tables are printed, and all numbers
are written to ``build/benchmarks/search.json``. There, ``release_over_fast`` and ``sequential_over_fast`` are medians
over prompts of ratios of UNet sample-evaluations for the whole search (Alg. 1 to 4), ``size_ratio`` that of the number
of neurons found, fast over sequential.

The replay takes recorded searches (the candidates and the neurons that refinement left of each prompt) and a monotone
model of the score: below the threshold if and only if all refined neurons are deactivated. How many sets a search
evaluates then follows exactly. How many *seeds* the fast search evaluates for a set is not recorded; the replay takes
what the tiny world needed in the same run (a mean), and shows beside it the ratio if it evaluated all ten.

The file ``search.json`` beside this one has the ratios of a run with all prompts and the replay; the README shows them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import nemolib
from nemolib import experiments, paths
from nemolib.files import write_atomic
from nemolib.first_step import FirstStep, first_step
from nemolib.group_testing import refine_by_leading_seeds, refine_fast
from nemolib.holdout import ActivationStatistics, z_scores
from nemolib.hooks import collect_activations
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.profiles import Profile
from nemolib.prompts import MEMORIZED, load_prompts, select
from nemolib.protocols import Protocol, load_protocol
from nemolib.published_runs import load_published_run
from nemolib.refinement import Refinement, refine_sequential
from nemolib.reuse import BlockReuse
from nemolib.selection import out_of_distribution, schedule
from nemolib.similarity import max_pairwise, pairwise, similarity
from nemolib.value_layers import value_activations, widths

OUTPUT = paths.BUILD / "benchmarks" / "search.json"
SAMPLES = 10
"""Seeds per prompt of the release."""


@dataclass(frozen=True)
class Savings:
    """What the release's procedure does without; all off is the procedure as written.

    Attributes:
        one_pass: One UNet pass per noise difference; the release runs the timestep before as well.
        text_activations: Activations from the text embedding; the release runs the UNet at each theta step.
        kept_seeds: Only seeds that passed the gate; the release computes all and drops the others.
        known_sets: No set twice, such as the same candidates at two theta steps, or a neuron with two entries.
        groups: Candidates tested in groups (`nemolib.group_testing.refine_fast`).
        leading_seeds: A set is rejected on the seeds that lead its score, one candidate at a time.
        reuse: Blocks before the first changed value layer computed once.
        batch: Candidate sets in one batch, on the bet that all but the last pass.
    """

    one_pass: bool = False
    text_activations: bool = False
    kept_seeds: bool = False
    known_sets: bool = False
    groups: bool = False
    leading_seeds: bool = False
    reuse: bool = False
    batch: int = 1


ALONE = {
    "one pass": Savings(one_pass=True),
    "activations from the text": Savings(text_activations=True),
    "kept seeds": Savings(kept_seeds=True),
    "no set twice": Savings(known_sets=True),
    "group testing": Savings(groups=True),
    "leading seeds": Savings(leading_seeds=True),
    "block reuse": Savings(reuse=True),
    "four sets in a batch": Savings(batch=4),
}
"""Each of the savings by itself."""


@dataclass(frozen=True)
class Cost:
    """What a search cost and found."""

    samples: int
    seconds: float
    initial: int
    neurons: NeuronSet


class ReleasedScore:
    """The score of neuron sets as the release computes it; counts UNet sample-evaluations."""

    def __init__(self, step: FirstStep, embedding: Tensor, savings: Savings, world: Profile, gate: float) -> None:
        self.samples = 0
        self._step, self._embedding, self._savings = step, embedding, savings
        self._similarity, self._protocol = world.similarity, load_protocol(world.protocol)
        self._all = range(len(step.latents))
        self._reuse: dict[tuple[int, ...], BlockReuse] = {}
        self._known: dict[tuple[NeuronSet, int], float] = {}
        unblocked = self._differences(None, self._all)
        best = max_pairwise(pairwise(unblocked, settings=self._similarity, protocol=self._protocol))
        self.seeds = (best > gate).nonzero().flatten().tolist()
        self._unblocked = unblocked

    def __call__(self, neurons: NeuronSet) -> float:
        """Return the largest similarity over the kept seeds."""
        values = self._similarities(neurons, range(len(self.seeds)))
        self._known |= {(neurons, place): value for place, value in enumerate(values)}
        return max(values)

    def of_seeds(self, neurons: NeuronSet, places: Sequence[int], *, limit: float = 1.0) -> float:
        """Return the largest similarity of some kept seeds, those that are not known evaluated."""
        known = [self._known[neurons, place] for place in places if (neurons, place) in self._known]
        if known and max(known) > limit:
            return max(known)
        missing = [place for place in places if (neurons, place) not in self._known]
        self._known |= zip([(neurons, p) for p in missing], self._similarities(neurons, missing), strict=True)
        return max(self._known[neurons, place] for place in places)

    def screen(self, neurons: NeuronSet, *, limit: float) -> float:
        """Return the largest similarity over the kept seeds, or only one that is above a limit."""
        return self.of_seeds(neurons, range(len(self.seeds)), limit=limit)

    def ranking(self, neurons: NeuronSet) -> list[int]:
        """Return the places of the seeds for which a set was evaluated, the most similar first."""
        known = [place for place in range(len(self.seeds)) if (neurons, place) in self._known]
        return sorted(known, key=lambda place: -self._known[neurons, place])

    def unblocked(self) -> None:
        """Compute the noise differences with all neurons active again, as the release does before refining."""
        self._differences(None, self._all)

    def activations(self) -> tuple[Tensor, ...]:
        """Return the activations [neuron] of each layer."""
        if self._savings.text_activations:
            return tuple(layer[0] for layer in value_activations(self._step.unet, self._embedding))
        with collect_activations(self._step.unet) as collected:
            self._pass(None, [0])
        return tuple(outputs[0][-1].float().abs().mean(dim=0) for outputs in collected)

    def batch(self, sets: Sequence[NeuronSet]) -> list[float]:
        """Return the scores of several sets, evaluated together."""
        passes = 1 if self._savings.one_pass else 2
        for _ in range(passes):
            maps = self._step.many(self._embedding, neurons=list(sets))
            self.samples += self._step.cost * len(sets) * len(self._all)
        return [max(self._compare(item, range(len(self.seeds)))) for item in maps]

    def _similarities(self, neurons: NeuronSet, places: Sequence[int]) -> list[float]:
        if not places:
            return []
        if self._savings.leading_seeds or self._savings.kept_seeds:
            maps = self._differences(neurons, [self.seeds[place] for place in places])
            chosen = self._unblocked[[self.seeds[place] for place in places]]
            return similarity(chosen, maps, settings=self._similarity, protocol=self._protocol).tolist()
        return self._compare(self._differences(neurons, self._all), places)

    def _compare(self, maps: Tensor, places: Sequence[int]) -> list[float]:
        chosen = [self.seeds[place] for place in places]
        return similarity(
            self._unblocked[chosen], maps[chosen], settings=self._similarity, protocol=self._protocol
        ).tolist()

    def _differences(self, neurons: NeuronSet | None, seeds: Sequence[int]) -> Tensor:
        if not self._savings.one_pass:
            self._pass(neurons, seeds)
        return self._pass(neurons, seeds)

    def _pass(self, neurons: NeuronSet | None, seeds: Sequence[int]) -> Tensor:
        self.samples += self._step.cost * len(seeds)
        with self._reused(neurons, seeds):
            return self._step(self._embedding, neurons=neurons, seeds=list(seeds))

    def _reused(self, neurons: NeuronSet | None, seeds: Sequence[int]) -> Any:
        if not self._savings.reuse or neurons is None:
            return nullcontext()
        return self._reuse.setdefault(tuple(seeds), BlockReuse(self._step.unet)).passing(neurons)


def release(
    step: FirstStep,
    embedding: Tensor,
    statistics: ActivationStatistics,
    world: Profile,
    threshold: float,
    savings: Savings | None = None,
    *,
    gate: float | None = None,
) -> Cost:
    """Return the cost of the release's procedure for a prompt, with some savings.

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
        savings: What it does without; None is the procedure as written.
        gate: Similarity that a seed must exceed; None means the threshold.
    """
    savings, protocol = savings or Savings(), load_protocol(world.protocol)
    start = time.perf_counter()
    score = ReleasedScore(step, embedding, savings, world, threshold if gate is None else gate)
    if not score.seeds:
        nothing = NeuronSet.empty(len(statistics.mean))
        return Cost(score.samples, time.perf_counter() - start, 0, nothing)
    ask = _remembered(score) if savings.known_sets else score
    candidates, value = _select(score, ask, statistics, world, threshold, protocol)
    target = threshold if value <= threshold else value
    score.unblocked()
    refined = _refine(candidates.entries(double=True), score, ask, target, savings)
    ask(refined.neurons)
    return Cost(score.samples, time.perf_counter() - start, len(candidates.neurons), refined.neurons)


def _select(
    score: ReleasedScore,
    ask: Callable[[NeuronSet], float],
    statistics: ActivationStatistics,
    world: Profile,
    threshold: float,
    protocol: Protocol,
) -> tuple[Any, float]:
    """Return candidates and score of the initial selection; activations are read at every step."""
    for theta, k in schedule(world.search, evaluate_limits=protocol.evaluate_limits):
        activations = score.activations()
        candidates = out_of_distribution(z_scores(statistics, activations), activations, theta=theta, top_k=k)
        value = ask(candidates.neurons)
        if value <= threshold:
            break
    return candidates, value


def _refine(
    entries: Sequence[Sequence[int]],
    score: ReleasedScore,
    ask: Callable[[NeuronSet], float],
    target: float,
    savings: Savings,
) -> Refinement:
    """Return the refinement, in the way that the savings ask for."""
    if savings.groups:
        return refine_fast(entries, ask, threshold=target)
    if savings.leading_seeds:
        return refine_by_leading_seeds(entries, score, threshold=target, refine=refine_sequential)
    if savings.batch > 1:
        return _refine_in_batches(entries, score, target, savings.batch)
    return _refine_plainly(entries, ask, target)


def _refine_plainly(entries: Sequence[Sequence[int]], ask: Callable[[NeuronSet], float], target: float) -> Refinement:
    """Return the refinement of the release: like ours, but a neuron's first entry of two is evaluated as well."""
    blocked = [list(layer) for layer in entries]
    value = ask(NeuronSet(blocked))
    order = range(len(blocked) - 1, -1, -1)
    trials = [(layer, None) for layer in order if blocked[layer]]
    for number, (layer, neuron) in enumerate(trials):
        if neuron is None:
            rest: list[int] = []
        else:
            rest = list(blocked[layer])
            rest.remove(neuron)
        trial = [*blocked[:layer], rest, *blocked[layer + 1 :]]
        found = ask(NeuronSet(trial))
        if found < target:
            blocked, value = trial, found
        if neuron is None and number == len(trials) - 1:
            trials += [(item, other) for item in order for other in blocked[item]]
    return Refinement(NeuronSet(blocked), value, ())


def _refine_in_batches(entries: Sequence[Sequence[int]], score: ReleasedScore, target: float, size: int) -> Refinement:
    """Return the sequential refinement, several tests in one batch: each set takes for granted that those before pass.

    After the first test that fails the others of the batch are void.
    """
    blocked = NeuronSet(entries)
    value = score(blocked)
    layers = [layer for layer in reversed(range(len(entries))) if entries[layer]]
    waiting = [NeuronSet.of([(i, n) for n in blocked.layers[i]], layers=len(entries)) for i in layers]
    tested_layers = False
    while waiting:
        batch, trials = waiting[:size], []
        for drop in batch:
            trials.append((trials[-1] if trials else blocked) - drop)
        for trial, found in zip(trials, score.batch(trials), strict=True):
            waiting.pop(0)
            if not found < target:
                break
            blocked, value = trial, found
        if not waiting and not tested_layers:
            tested_layers = True
            # A neuron with two entries is tested at its last.
            ordered = {i: [*dict.fromkeys(reversed(entries[i]))][::-1] for i in layers}
            pairs = [(i, n) for i in layers for n in ordered[i] if (i, n) in blocked]
            waiting = [NeuronSet.of([pair], layers=len(entries)) for pair in pairs]
    return Refinement(blocked, value, ())


def _remembered(score: Callable[[NeuronSet], float]) -> Callable[[NeuronSet], float]:
    known: dict[NeuronSet, float] = {}

    def ask(neurons: NeuronSet) -> float:
        if neurons not in known:
            known[neurons] = score(neurons)
        return known[neurons]

    return ask


def compare(pipe: Any, world: Profile, *, prompts: int) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the costs of the three searches for each prompt, and how many seeds the fast one evaluates.

    Args:
        pipe: The pipeline of the profile.
        world: The profile.
        prompts: Prompts per kind; 0 means all.

    Returns:
        One row per prompt: kind, prompt, initial (candidates), and for release, sequential and fast the UNet
        sample-evaluations, seconds and number of neurons. Then means over prompts of the number of seeds: ``failing``,
        per step of Alg. 3 that fails; by kind, per test of Alg. 4 (repeated rounds included), the set that is found,
        which is evaluated for all seeds at last, set aside.
    """
    statistics = experiments.statistics(pipe, world, progress=False)
    threshold = experiments.threshold(pipe, world, progress=False)
    step = first_step(pipe, settings=world.detection, protocol=world.protocol)
    rows, seeds = [], {"failing": [], "vm": [], "tm": []}
    for kind in MEMORIZED:
        for prompt in select(world, kind)["caption"].head(prompts or None):
            row: dict[str, Any] = {"kind": kind, "prompt": prompt}
            for name in ("sequential", "fast"):
                start = time.perf_counter()
                found = nemolib.localize(pipe, prompt, statistics, threshold=threshold, search=name)
                cost = Cost(
                    sum(found.evaluations.values()), time.perf_counter() - start, len(found.initial), found.neurons
                )
                row |= _columns(name, cost)
                row |= {f"{name}_{part}": found.evaluations[part] for part in ("A3", "A4")}
            cost = release(step, embed(pipe, [prompt]), statistics, world, threshold)
            row |= _columns("release", cost) | {"initial": cost.initial}
            rows.append(row)
            if found.tests:
                last = len(found.seeds) - 1
                seeds[kind].append((found.evaluations["A4"] / step.cost - last) / len(found.tests))
                failing = len({item.neurons for item in found.steps[:-1] if item.neurons})
                spent = found.evaluations["A3"] / step.cost - len(found.seeds)
                seeds["failing"] += [spent / failing] if failing else []
            print(f"  {prompt}: {row['release_samples']} / {row['sequential_samples']} / {row['fast_samples']}")
    return pd.DataFrame(rows), {name: float(np.mean(values)) if values else math.nan for name, values in seeds.items()}


def _columns(name: str, cost: Cost) -> dict[str, Any]:
    return {f"{name}_samples": cost.samples, f"{name}_seconds": cost.seconds, f"{name}_neurons": len(cost.neurons)}


def savings_alone(pipe: Any, world: Profile, *, prompts: int) -> pd.DataFrame:
    """Return what each of the savings brings by itself: medians over prompts of ratios to the release's procedure."""
    statistics = experiments.statistics(pipe, world, progress=False)
    threshold = experiments.threshold(pipe, world, progress=False)
    step = first_step(pipe, settings=world.detection, protocol=world.protocol)
    rows = []
    for kind in MEMORIZED:
        for prompt in select(world, kind)["caption"].head(prompts):
            embedding = embed(pipe, [prompt])
            base = release(step, embedding, statistics, world, threshold)
            for name, savings in ALONE.items():
                cost = release(step, embedding, statistics, world, threshold, savings)
                rows.append((kind, name, base.samples / cost.samples, base.seconds / cost.seconds))
    table = pd.DataFrame(rows, columns=["kind", "saving", "evaluations", "seconds"])
    return table.groupby(["kind", "saving"], sort=False).median().unstack("kind")


def batch_sizes(pipe: Any, world: Profile) -> pd.DataFrame:
    """Return the seconds of a UNet pass by its number of samples: what larger batches can bring on this machine."""
    step, embedding = first_step(pipe, settings=world.detection, protocol=world.protocol), embed(pipe, ["a tree"])
    rows = []
    for sets in (1, 2, 4, 8):
        for seeds in (1, SAMPLES):
            neurons = [NeuronSet.of([(0, i)], layers=len(widths(pipe.unet))) for i in range(sets)]
            times = []
            for _ in range(6):
                start = time.perf_counter()
                step.many(embedding, neurons=neurons, seeds=list(range(seeds)))
                times.append(time.perf_counter() - start)
            rows.append((sets * seeds, 1000 * min(times[1:]), 1000 * min(times[1:]) / (sets * seeds)))
    table = pd.DataFrame(rows, columns=["samples", "ms", "ms_per_sample"])
    return table.groupby("samples", as_index=False).min()


def replay(run: pd.DataFrame, kinds: dict[str, str], seeds: dict[str, float]) -> pd.DataFrame:
    """Return the costs of recorded searches under a monotone model of the score.

    The model falls a little whenever a neuron that is not needed is reactivated, as the score of a real model does, so
    that the clean-up of the fast search takes place and is counted.

    Args:
        run: A published run (`nemolib.published_runs.load_published_run`).
        kinds: Caption -> vm or tm.
        seeds: Seeds per failing step and per test, from `compare`.

    Returns:
        One row per prompt of a known kind: kind, candidates, needed, bound (information bound k log2(n/k)), sets of the
        sequential and the fast refinement, UNet sample-evaluations of the three searches, those of the fast one with
        all seeds for every set, and neurons of both.
    """
    rows = []
    for item in run.itertuples():
        kind = kinds.get(item.caption)
        if kind not in MEMORIZED:
            continue
        required = set(item.refined)
        total = len(item.initial)

        def score(neurons: NeuronSet, required: set = required, total: int = total) -> float:
            return 0.4 + 0.09 * len(neurons) / max(1, total) if required <= set(neurons) else 1.0

        slow, sequential = _counted(refine_sequential, item.entries, score)
        found, fast = _counted(refine_fast, item.entries, score)
        # Alg. 3 adds the same number of most active neurons in each layer: at most as many as the shortest list has.
        steps = min(map(len, item.entries)) + 1
        kept = {layer for layer, _ in required}
        tests = sum(map(bool, item.entries)) + sum(len(item.entries[layer]) for layer in kept)
        per_test = seeds[kind] if not math.isnan(seeds[kind]) else SAMPLES
        failing = seeds["failing"] if not math.isnan(seeds["failing"]) else SAMPLES
        rows.append(
            {
                "kind": kind,
                "candidates": total,
                "needed": len(required),
                "bound": len(required) * math.log2(total / len(required)) if required else 0.0,
                "sequential_sets": sequential,
                "fast_sets": fast,
                "release_samples": 2 * SAMPLES + steps * (2 * SAMPLES + 1) + 2 * SAMPLES * (3 + tests),
                "sequential_samples": SAMPLES * (1 + steps + sequential),
                "fast_samples": SAMPLES + SAMPLES + (steps - 1) * failing + fast * per_test + SAMPLES - 1,
                "fast_all_seeds": SAMPLES * (1 + steps + fast),
                "sequential_neurons": len(slow.neurons),
                "fast_neurons": len(found.neurons),
            }
        )
    return pd.DataFrame(rows)


def _counted(
    refine: Callable[..., Refinement], entries: Sequence[Sequence[int]], score: Callable[[NeuronSet], float]
) -> tuple[Refinement, int]:
    """Return a refinement and the number of different sets that it evaluated, all candidates not counted."""
    start, asked = NeuronSet(entries), set()

    def ask(neurons: NeuronSet) -> float:
        asked.add(neurons)
        return score(neurons)

    found = refine(entries, ask, threshold=0.5, initial_score=score(start))
    return found, len(asked)


def ratios(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return the three numbers of ``search.json`` by kind: medians over prompts."""
    found = {}
    for kind, part in table.groupby("kind", sort=False):
        searched = part[part["sequential_neurons"] > 0]
        found[kind] = {
            "release_over_fast": (part["release_samples"] / part["fast_samples"]).median(),
            "sequential_over_fast": (part["sequential_samples"] / part["fast_samples"]).median(),
            "size_ratio": (searched["fast_neurons"] / searched["sequential_neurons"]).median(),
        }
        found[kind] = {name: round(float(value), 4) for name, value in found[kind].items()}
    return found


def summary(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return medians by kind, and ratios of totals."""
    grouped = table.groupby("kind", sort=False)
    medians = grouped[list(columns)].median()
    totals = grouped[["release_samples", "sequential_samples", "fast_samples"]].sum()
    medians["release / fast (totals)"] = totals["release_samples"] / totals["fast_samples"]
    medians["sequential / fast (totals)"] = totals["sequential_samples"] / totals["fast_samples"]
    medians.insert(0, "prompts", grouped.size())
    return medians.T


def ratio_table(result: dict[str, Any]) -> str:
    """Return the ratios of ``search.json`` as a table in Markdown, as in the README."""
    worlds = {"tiny": "tiny world", "replay": "replay of recorded searches, SD v1-4"}
    quantities = {
        "release_over_fast": "evaluations, release / fast",
        "sequential_over_fast": "evaluations, sequential / fast",
        "size_ratio": "neurons found, fast / sequential",
    }
    rows = [
        {"": f"{worlds[world]}: {text}"} | {kind.upper(): f"{result[world][kind][name]:.1f}" for kind in MEMORIZED}
        for world in worlds
        if world in result
        for name, text in quantities.items()
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True, colalign=("left", "right", "right"))


def _show(title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}\n{table.round(2).to_string()}")


def _plain(table: pd.DataFrame) -> Any:
    return json.loads(table.to_json(orient="split", double_precision=4))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print tables, and write ``build/benchmarks/search.json``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--prompts", type=int, default=10, help="prompts per kind; 0 means all")
    parser.add_argument("--savings-prompts", type=int, default=2, help="prompts per kind for each of the savings alone")
    parser.add_argument("--replay", type=Path, help="results of a run of the authors' code (CSV)")
    parser.add_argument("--prompt-table", type=Path, help="memorized prompts of the authors' release, with column type")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if options.prompts < 0 or options.savings_prompts < 0:
        parser.error("numbers of prompts must be at least 0")
    if options.replay and not options.prompt_table:
        parser.error("--replay needs --prompt-table, which says which prompts are VM and which TM")
    # Read first, so that a wrong file is noticed before the long part.
    run = load_published_run(options.replay) if options.replay else None
    kinds = load_prompts(options.prompt_table).set_index("caption")["kind"].to_dict() if options.replay else {}

    world = nemolib.load_profile(options.profile)
    pipe = nemolib.load_pipeline(world)
    print("UNet sample-evaluations: release / sequential / fast", flush=True)
    with torch.inference_mode():
        table, seeds = compare(pipe, world, prompts=options.prompts)
    names = ("release", "sequential", "fast")
    columns = [f"{name}_{what}" for what in ("samples", "seconds", "neurons") for name in names]
    for what in ("samples", "seconds"):
        for name in names[:2]:
            table[f"{name} / fast, {what}"] = table[f"{name}_{what}"] / table[f"fast_{what}"]
            columns.append(f"{name} / fast, {what}")
    shown = summary(table, ["initial", *columns])
    _show("Tiny world, medians over prompts", shown)
    print(
        "seeds: per failing step of Alg. 3, per test of Alg. 4: "
        + ", ".join(f"{name} {value:.2f}" for name, value in seeds.items())
    )
    result: dict[str, Any] = {"tiny": ratios(table)}
    details: dict[str, Any] = {"tiny": _plain(table), "tiny_summary": _plain(shown), "seeds": seeds}
    batches = batch_sizes(pipe, world)
    _show("A UNet pass by its number of samples", batches)
    details["batches"] = _plain(batches)
    if options.savings_prompts:
        alone = savings_alone(pipe, world, prompts=options.savings_prompts)
        _show("Each saving alone: release / release with it, medians", alone)
        details["alone"] = {
            f"{quantity}_{kind}": values.round(4).to_dict() for (quantity, kind), values in alone.items()
        }
    if run is None:
        print("\nno replay: give the results of a run of the authors' code with --replay and --prompt-table")
    else:
        table = replay(run, kinds, seeds)
        table = table.assign(
            **{
                "release / fast": table["release_samples"] / table["fast_samples"],
                "release / fast, all seeds": table["release_samples"] / table["fast_all_seeds"],
                "sequential / fast, sets": table["sequential_sets"] / table["fast_sets"],
            }
        )
        shown = summary(table, [name for name in table if name not in ("kind", "prompt")])
        _show("Replay of recorded searches, medians over prompts", shown)
        result["replay"] = ratios(table)
        details |= {"replay": _plain(table), "replay_summary": _plain(shown)}
    print(f"\nMedians over prompts\n{ratio_table(result)}")
    write_atomic(options.output, json.dumps(result | {"details": details}, indent=2) + "\n")
    print(f"\nwritten: {options.output}")


if __name__ == "__main__":
    main()
