"""Memorization neurons of a prompt: Alg. 1 to 4 in a row, for one threshold or for several that share what they evaluate.

The noise differences of a prompt do not depend on the thresholds; a lower one only goes further through the same steps of
the initial selection; and refinements that start alike test the same sets. So each neuron set is evaluated once for all.
Where a search is known already, the variants that would repeat it are not searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
from torch import Tensor

from nemolib.batching import Lockstep, check_prompts, in_order
from nemolib.blocked_score import BlockedScore
from nemolib.first_step import ALGORITHMS, Evaluations, FirstStep, first_step
from nemolib.holdout import ActivationStatistics, z_scores
from nemolib.layers import check_neurons_act, naming, value_activations
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.prompts import MEMORIZED
from nemolib.refinement import RefinementTest, refine_by_leading_seeds, refine_sequential
from nemolib.selection import InitialSelection, SelectionStep, initial_selection
from nemolib.settings import (
    DetectionSettings,
    Protocol,
    SearchSettings,
    SimilaritySettings,
    protocol_of,
    search_settings,
    settings_of,
)
from nemolib.similarity import max_pairwise, pairwise

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Localization:
    """The memorization neurons of a prompt, and what finding them took.

    Attributes:
        prompt: The prompt.
        memorized: Whether a seed passed the gate; if none did, there was nothing to search and the sets are empty.
        seeds: Indices of the seeds that passed.
        initial: Neurons of the initial selection.
        neurons: Neurons that refinement left: the memorization neurons.
        unblocked_score: Memorization score, the largest similarity of two seeds with all neurons active.
        initial_score: Score with the initial selection deactivated: the largest similarity, over seeds, of the noise
            differences with and without. None if nothing was searched.
        refined_score: The same with the refined neurons deactivated.
        theta: Threshold of the z-score at which the initial selection ended; None as above.
        k: Number of neurons per layer taken for their activation alone; None as above.
        reached: Whether the initial selection brought its score to the threshold; False as above.
        evaluations: UNet sample-evaluations of each algorithm, A1 to A4.
        seconds: Time of each algorithm.
        lowest_score: Smallest score of a step of the initial selection, as far as it was evaluated; None as above.
        steps: Steps of the initial selection (not kept in a store).
        tests: Tests of the refinement (not kept in a store).
    """

    prompt: str
    memorized: bool
    seeds: tuple[int, ...]
    initial: NeuronSet
    neurons: NeuronSet
    unblocked_score: float
    initial_score: float | None = None
    refined_score: float | None = None
    theta: float | None = None
    k: int | None = None
    reached: bool = False
    evaluations: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    lowest_score: float | None = None
    steps: tuple[SelectionStep, ...] = field(default=(), repr=False)
    tests: tuple[RefinementTest, ...] = field(default=(), repr=False)

    def to_record(self) -> dict[str, Any]:
        """Return what a store keeps, as plain values; the inverse of `from_record`."""
        record = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("steps", "tests")}
        return record | {"seeds": list(self.seeds), "initial": self.initial.layers, "neurons": self.neurons.layers}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Localization:
        """Return the localization of a store's record."""
        sets = {name: NeuronSet(record[name]) for name in ("initial", "neurons")}
        return cls(**(record | sets | {"seeds": tuple(record["seeds"])}))


@dataclass(frozen=True, slots=True)
class Variant:
    """What may differ between searches of one prompt.

    Attributes:
        name: Its name.
        initial: Threshold that ends the initial selection (Alg. 3).
        refinement: Threshold of the refinement (Alg. 4), at least that of the initial selection.
        top_k: Whether the initial selection takes the most active neurons of each layer too.
    """

    name: str
    initial: float
    refinement: float
    top_k: bool = True

    def __post_init__(self) -> None:
        """Reject thresholds between which nothing can be refined."""
        if not self.refinement >= self.initial:
            limits = (
                f"the refinement threshold {self.refinement:.3f} is below that of the selection, {self.initial:.3f}"
            )
            raise ValueError(f"variant {self.name!r}: {limits}; what was selected would never be below it")

    def repeats(self, known: Localization) -> bool:
        """Return whether a search with the same gate and settings that is known would be this one, step by step.

        So it is if nothing was searched, since no seed passed the gate. And if the initial selection tried all steps
        without reaching its threshold, nor that of this variant: then both refinements must undercut the score that it
        ended with.
        """
        if not known.memorized:
            return True
        tried_all = self.top_k and not known.reached and known.lowest_score > self.initial
        return tried_all and known.initial_score >= self.refinement


class Search:
    """Alg. 1 to 4 for one prompt; searches of it with other thresholds share what they evaluate.

    Source: Sec. 3.3; for several thresholds Table 4, Fig. 14, 15. The gate, too, is an argument of its own in the
        authors' code (3_detect_memorized_neurons.py).

    Args:
        step: The first denoising step of the model.
        embedding: Embedding of the prompt, [1, token, feature].
        statistics: Activation statistics of this model.
        gate: Similarity that a seed must exceed with another seed to take part.
        similarity: Window and exponents.
        search: Course of the search.
        protocol: The protocol that the step was made with.
        prompt: The prompt's text, for the result only.

    Attributes:
        seeds: The seeds that take part; without any the prompt is not memorized, and there is nothing to search.
        score: What the search asks of neuron sets, where there are seeds.
    """

    def __init__(
        self,
        step: FirstStep,
        embedding: Tensor,
        statistics: ActivationStatistics,
        *,
        gate: float,
        similarity: SimilaritySettings,
        search: SearchSettings,
        protocol: Protocol,
        prompt: str = "",
    ) -> None:
        self._settings, self._protocol, self._layers = search, protocol, len(statistics.mean)
        self._spent, self._fast = Evaluations(step.clock), search.method == "fast"
        with self._spent.stage("A1"):
            unblocked = step(embedding)
            self._spent.add(step.cost * len(unblocked))
            best = max_pairwise(pairwise(unblocked, settings=similarity, protocol=protocol))
            self.seeds = tuple((best > gate).nonzero().flatten().tolist())
        self._common = {"prompt": prompt, "seeds": self.seeds, "unblocked_score": float(best.max())}
        if not self.seeds:
            return
        with self._spent.stage("A2"):
            self._activations = tuple(layer[0].cpu() for layer in value_activations(step.unet, embedding))
            self._z = z_scores(statistics, self._activations)
        kept = {"seeds": self.seeds, "unblocked": unblocked[list(self.seeds)], "evaluations": self._spent}
        self.score = BlockedScore(step, embedding, **kept, similarity=similarity, protocol=protocol)
        self._select = cache(self._selected)

    def localize(self, variant: Variant) -> Localization:
        """Return what a search finds that does the same as one of its own.

        Where the initial selection does not reach its threshold, the refinement must undercut the score that it ended
        with, if that is above the refinement threshold. Evaluations and seconds are those that no search before had.
        """
        if not self.seeds:
            nothing = NeuronSet.empty(self._layers)
            found = {"memorized": False, "initial": nothing, "neurons": nothing}
            return Localization(**found, **self._common, **self._spent.take())
        with self._spent.stage("A3"):
            initial = self._select(variant.initial, variant.top_k)
        with self._spent.stage("A4"):
            target = variant.refinement if initial.reached else max(variant.refinement, initial.score)
            entries = initial.candidates.entries(double=self._protocol.double_entries)
            refine = refine_by_leading_seeds if self._fast else refine_sequential
            refined = refine(entries, self.score, threshold=target)
        return Localization(
            memorized=True,
            initial=initial.neurons,
            neurons=refined.neurons,
            initial_score=initial.score,
            refined_score=refined.score,
            theta=initial.steps[-1].theta,
            k=initial.steps[-1].k,
            reached=initial.reached,
            lowest_score=min(step.score for step in initial.steps),
            steps=initial.steps,
            tests=refined.tests,
            **self._common,
            **self._spent.take(),
        )

    def _selected(self, threshold: float, top_k: bool) -> InitialSelection:
        quick = partial(self.score.screen, limit=threshold) if self._fast else None
        search = self._settings if top_k else replace(self._settings, k_start=0, k_step=0)
        how = {"threshold": threshold, "quick": quick, "search": search, "protocol": self._protocol}
        return initial_selection(self._z, self._activations, self.score, **how)


def localize(
    pipe: StableDiffusionPipeline,
    prompt: str,
    statistics: ActivationStatistics,
    *,
    threshold: float,
    gate: float | None = None,
    detection: DetectionSettings | None = None,
    similarity: SimilaritySettings | None = None,
    search: SearchSettings | str | None = None,
    protocol: str | Protocol | None = None,
) -> Localization:
    """Return the memorization neurons of a prompt (Alg. 1 to 4).

    Settings that are not given are those of the profile that the pipeline was loaded from, else those of the paper.

    Source: Sec. 3.3, App. B.3.

    Args:
        pipe: A StableDiffusionPipeline.
        prompt: The prompt.
        statistics: Activation statistics of this model over holdout prompts.
        threshold: Memorization threshold tau, in (-1, 1].
        gate: Similarity that a seed must exceed with another seed to take part; None means the threshold.
        detection: Seed, samples, steps and guidance of the noise differences.
        similarity: Window and exponents of the similarity.
        search: Course of the search; ``"fast"`` or ``"sequential"`` change its method alone.
        protocol: `released` or `paper`, or a protocol of your own.

    Returns:
        The localization.

    Raises:
        ValueError: A threshold is outside (-1, 1]; the prompt is empty; the statistics are those of another model; or
            neurons do not act.
        NotFiniteError: What the model gives for the prompt is not finite.
    """
    check_prompts([prompt])
    given = {"detection": detection, "similarity": similarity, "search": search, "protocol": protocol}
    (found,) = in_order(searching(pipe, statistics=statistics, threshold=threshold, gate=gate, **given)([prompt]))
    return found


def localizing(
    pipe: StableDiffusionPipeline, **settings: Any
) -> Callable[[Sequence[str]], Iterator[tuple[int, dict[str, Any] | Exception]]]:
    """Return what computes the records of prompts: a task (`nemolib.run.Run.compute`); settings as of `searching`."""
    search = searching(pipe, **settings)
    return lambda batch: (
        (place, found if isinstance(found, Exception) else found.to_record()) for place, found in search(batch)
    )


def searching(
    pipe: StableDiffusionPipeline,
    *,
    statistics: ActivationStatistics,
    threshold: float,
    gate: float | None = None,
    detection: DetectionSettings | None = None,
    similarity: SimilaritySettings | None = None,
    search: SearchSettings | str | None = None,
    protocol: str | Protocol | None = None,
) -> Callable[[Sequence[str]], Iterator[tuple[int, Localization | Exception]]]:
    """Return what searches prompts together, and yields place and localization, or what was raised, as they come.

    Arguments and errors are those of `localize`.
    """
    check_threshold(threshold, gate)
    statistics.check(pipe.unet)
    defaults, protocol = settings_of(pipe), protocol_of(pipe, protocol)
    settings = {"gate": threshold if gate is None else gate, "similarity": similarity or defaults.similarity}
    settings |= {"search": search_settings(search, defaults.search), "protocol": protocol}

    def localized(step: FirstStep, prompt: str) -> Localization:
        with naming(prompt):
            check_neurons_act(pipe.unet)
            found = Search(step, embed(pipe, [prompt]), statistics, prompt=prompt, **settings)
            return found.localize(Variant("", threshold, threshold))

    step = first_step(pipe, settings=detection, protocol=protocol)
    return lambda prompts: _together(pipe, step, localized, [(prompt,) for prompt in prompts])


def _together(
    pipe: StableDiffusionPipeline, step: FirstStep, search: Callable[..., T], items: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, T | Exception]]:
    """Yield place and result of a search for each item, as they come; what they ask of the UNet shares its passes.

    As many take part as images are generated at once: most ask for one latent at a time.
    """
    size = max(settings_of(pipe).generation.batch_size, len(step.latents))
    lockstep = Lockstep(partial(step.predict, size=size), size)
    return lockstep.run([partial(search, replace(step, lockstep=lockstep), *item) for item in items])


def varying(
    pipe: StableDiffusionPipeline,
    *,
    statistics: ActivationStatistics,
    variants: Sequence[Variant],
    detection: DetectionSettings,
    protocol: Protocol,
    **settings: Any,
) -> Callable[[Sequence[tuple[str, Localization | None]]], Iterator[tuple[int, dict[str, Any] | Exception]]]:
    """Return what computes the records of prompts by name of a variant: a task (`nemolib.run.Run.compute`).

    Its items are pairs of a caption and a search of it that is known, with the same gate and settings, or None. What that
    one found, variants that would repeat it find at no cost.

    Args:
        pipe: A StableDiffusionPipeline.
        statistics: Activation statistics of this model.
        variants: The variants, each with a name of its own.
        detection: Seed, samples, steps and guidance of the noise differences.
        protocol: The protocol.
        settings: Others of `Search`: gate, similarity, search.

    Raises:
        ValueError: Two variants have one name.
    """
    if len({variant.name for variant in variants}) < len(variants):
        raise ValueError(f"variants have the names {[variant.name for variant in variants]}; each needs its own")
    step = first_step(pipe, settings=detection, protocol=protocol)

    def vary(step: FirstStep, caption: str, known: Localization | None) -> dict[str, dict[str, Any]]:
        repeated = [item.name for item in variants if known is not None and item.repeats(known)]
        found = {name: replace(known, **Evaluations().take()) for name in repeated}
        searched = [item for item in variants if item.name not in found]
        if searched:
            embedding = embed(pipe, [caption])
            run = Search(step, embedding, statistics, protocol=protocol, prompt=caption, **settings)
            if run.seeds:
                # The order that shares most; without seeds the first variant bears all costs.
                searched.sort(key=lambda item: (-item.initial, item.refinement))
            found |= {item.name: run.localize(item) for item in searched}
        return {variant.name: found[variant.name].to_record() for variant in variants}

    return lambda batch: _together(pipe, step, vary, batch)


def localization_table(localizations: Sequence[Localization], *, seconds: bool = False) -> pd.DataFrame:
    """Return localizations as a table, one row each.

    Args:
        localizations: What `localize` returned.
        seconds: Whether to add the time of each algorithm.

    Returns:
        Columns prompt, memorized, seeds (number kept), unblocked_score, initial_score, refined_score, theta, k,
        reached, initial_count, neuron_count, initial and neurons (JSON, see `nemolib.neurons.NeuronSet.from_json`),
        evaluations_A1 to evaluations_A4, and seconds_A1 to seconds_A4 if asked for.
    """
    floats = ["unblocked_score", "initial_score", "refined_score", "theta"]
    costs = ("evaluations", "seconds") if seconds else ("evaluations",)
    rows = [
        {name: getattr(item, name) for name in ("prompt", "memorized", *floats, "k", "reached")}
        | {"seeds": len(item.seeds), "initial_count": len(item.initial), "neuron_count": len(item.neurons)}
        | {"initial": item.initial.to_json(), "neurons": item.neurons.to_json()}
        | {f"{cost}_{name}": getattr(item, cost)[name] for cost in costs for name in ALGORITHMS}
        for item in localizations
    ]
    table = pd.DataFrame(rows).astype(dict.fromkeys(floats, "float64") | {"k": "Int64"})
    table.insert(2, "seeds", table.pop("seeds"))
    return table


def memorized(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of VM and TM prompts."""
    return table[table["kind"].isin(MEMORIZED)]


def neuron_sets(table: pd.DataFrame, column: str = "neurons") -> list[NeuronSet]:
    """Return the neuron set of each row of a table of localizations: column ``neurons`` or ``initial``."""
    return [NeuronSet.from_json(text) for text in table[column]]


def by_prompt(table: pd.DataFrame, column: str = "neurons") -> dict[str, NeuronSet]:
    """Return the neuron set of each prompt of a table of localizations."""
    return dict(zip(table["prompt"], neuron_sets(table, column), strict=True))


def shared_neurons(found: pd.DataFrame) -> pd.DataFrame:
    """Return the neurons that at least two memorized prompts share, those of most prompts first.

    Returns:
        Columns layer (from 1, as in the paper), neuron, prompts (number) and captions (separated by semicolons).
    """
    pairs = [(*pair, prompt) for prompt, neurons in by_prompt(memorized(found)).items() for pair in neurons]
    captions = pd.DataFrame(pairs, columns=["layer", "neuron", "prompt"]).groupby(["layer", "neuron"])["prompt"]
    shared = captions.agg(prompts="size", captions="; ".join).reset_index().query("prompts > 1")
    shared = shared.sort_values("prompts", ascending=False, kind="stable", ignore_index=True)
    return shared.assign(layer=shared["layer"] + 1)


def check_threshold(threshold: float, gate: float | None = None) -> None:
    """Check that thresholds are similarities.

    Raises:
        ValueError: One of them is outside (-1, 1].
    """
    for name, value in (("threshold", threshold), ("gate", gate)):
        if value is not None and not -1 < value <= 1:
            raise ValueError(f"{name} is {value}; a similarity is in (-1, 1]")
