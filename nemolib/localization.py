"""Memorization neurons of a prompt, of many prompts: Alg. 1 to 4 in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from nemolib.batching import check_prompts
from nemolib.blocked_score import BlockedScore
from nemolib.defaults import default_protocol, default_settings
from nemolib.evaluations import ALGORITHMS, Evaluations
from nemolib.first_step import FirstStep, first_step
from nemolib.group_testing import refine_by_leading_seeds
from nemolib.holdout import ActivationStatistics, z_scores
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.protocols import Protocol, load_protocol
from nemolib.provenance import content_hash, science_hash
from nemolib.refinement import Refinement, RefinementTest, refine_sequential
from nemolib.selection import InitialSelection, SelectionStep, initial_selection
from nemolib.settings import DetectionSettings, SearchSettings, SimilaritySettings, search_settings
from nemolib.similarity import max_pairwise, pairwise
from nemolib.value_layers import value_activations, value_layers
from nemolib.workers import map_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from nemolib.store import Store


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
        names = [item.name for item in fields(self) if item.name not in ("steps", "tests")]
        record = {name: getattr(self, name) for name in names}
        return record | {"seeds": list(self.seeds), "initial": self.initial.layers, "neurons": self.neurons.layers}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Localization:
        """Return the localization of a store's record."""
        sets = {name: NeuronSet(record[name]) for name in ("initial", "neurons")}
        return cls(**(record | sets | {"seeds": tuple(record["seeds"])}))


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
        ValueError: A threshold is outside (-1, 1]; the prompt is empty; the statistics are those of another model.
    """
    check_prompts([prompt])
    check_threshold(threshold, gate)
    statistics.check(pipe.unet)
    defaults, protocol = default_settings(pipe), default_protocol(pipe, protocol)
    return localize_embedding(
        first_step(pipe, settings=detection, protocol=protocol),
        embed(pipe, [prompt]),
        statistics,
        threshold=threshold,
        gate=gate,
        similarity=similarity or defaults.similarity,
        search=search_settings(search, defaults.search),
        protocol=protocol,
        prompt=prompt,
    )


def localize_embedding(
    step: FirstStep,
    embedding: Tensor,
    statistics: ActivationStatistics,
    *,
    threshold: float,
    gate: float | None = None,
    similarity: SimilaritySettings | None = None,
    search: SearchSettings | str | None = None,
    protocol: str | Protocol = "released",
    prompt: str = "",
) -> Localization:
    """Return the memorization neurons of a prompt embedding; see `localize`.

    Args:
        step: The first denoising step of the model.
        embedding: Embedding of the prompt, [1, token, feature].
        statistics: Activation statistics of this model.
        threshold: Memorization threshold, in (-1, 1].
        gate: Similarity that a seed must exceed; None means the threshold.
        similarity: Window and exponents; None means those of the paper.
        search: Course of the search, or its method; None as above.
        protocol: The protocol; the one that the step was made with.
        prompt: The prompt's text, for the result only.
    """
    check_threshold(threshold, gate)
    search = PromptSearch(
        step,
        embedding,
        statistics,
        gate=threshold if gate is None else gate,
        similarity=similarity,
        search=search,
        protocol=protocol,
        prompt=prompt,
    )
    if not search.seeds:
        return search.not_memorized()
    initial = search.select(threshold)
    return search.found(initial, search.refine(initial, threshold))


class PromptSearch:
    """Alg. 1 to 4 for one prompt. Several searches of it, with other thresholds, share what they evaluate.

    Args:
        step: The first denoising step of the model.
        embedding: Embedding of the prompt, [1, token, feature].
        statistics: Activation statistics of this model.
        gate: Similarity that a seed must exceed with another seed to take part.
        similarity: Window and exponents; None means those of the paper.
        search: Course of the search, or its method; None as above.
        protocol: The protocol; the one that the step was made with.
        prompt: The prompt's text, for the result only.

    Attributes:
        seeds: The seeds that take part; without any the prompt is not memorized, and there is nothing to search.
        evaluations: UNet sample-evaluations and seconds so far.
    """

    def __init__(
        self,
        step: FirstStep,
        embedding: Tensor,
        statistics: ActivationStatistics,
        *,
        gate: float,
        similarity: SimilaritySettings | None = None,
        search: SearchSettings | str | None = None,
        protocol: str | Protocol = "released",
        prompt: str = "",
    ) -> None:
        self.evaluations = Evaluations()
        self._settings = search_settings(search, SearchSettings())
        self._protocol, self._layers = load_protocol(protocol), len(statistics.mean)
        similarity = similarity or SimilaritySettings()
        with self.evaluations.stage("A1"):
            unblocked = step(embedding, evaluations=self.evaluations)
            best = max_pairwise(pairwise(unblocked, settings=similarity, protocol=self._protocol))
            self.seeds = tuple((best > gate).nonzero().flatten().tolist())
        self._common = {"prompt": prompt, "seeds": self.seeds, "unblocked_score": float(best.max())}
        if not self.seeds:
            return
        with self.evaluations.stage("A2"):
            self._activations = tuple(layer[0].cpu() for layer in value_activations(step.unet, embedding))
            self._z = z_scores(statistics, self._activations)
        self._score = BlockedScore(
            step,
            embedding,
            seeds=self.seeds,
            unblocked=unblocked[list(self.seeds)],
            similarity=similarity,
            protocol=self._protocol,
            evaluations=self.evaluations,
        )

    def select(self, threshold: float, *, top_k: bool = True) -> InitialSelection:
        """Return the initial selection (Alg. 3).

        Args:
            threshold: Threshold that ends it.
            top_k: Whether the most active neurons of each layer are taken too.
        """
        with self.evaluations.stage("A3"):
            return initial_selection(
                self._z,
                self._activations,
                self._score,
                quick=partial(self._score.screen, limit=threshold) if self._fast else None,
                threshold=threshold,
                search=self._settings if top_k else replace(self._settings, k_start=0, k_step=0),
                protocol=self._protocol,
            )

    def refine(self, initial: InitialSelection, threshold: float) -> Refinement:
        """Return what refinement leaves of an initial selection (Alg. 4).

        Args:
            initial: The initial selection.
            threshold: Threshold, at least that of the initial selection. If the initial selection did not reach its own,
                the score that it ended with must be undercut instead, if that is higher.
        """
        refine = refine_by_leading_seeds if self._fast else refine_sequential
        with self.evaluations.stage("A4"):
            entries = initial.candidates.entries(double=self._protocol.double_entries)
            target = threshold if initial.reached else max(threshold, initial.score)
            return refine(entries, self._score, threshold=target)

    def found(self, initial: InitialSelection, refined: Refinement) -> Localization:
        """Return the localization that a selection and a refinement make, with all costs so far."""
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
            **self.costs(),
        )

    def not_memorized(self) -> Localization:
        """Return the localization of a prompt without seeds that take part, with all costs so far."""
        nothing = NeuronSet.empty(self._layers)
        return Localization(memorized=False, initial=nothing, neurons=nothing, **self._common, **self.costs())

    def costs(self) -> dict[str, dict[str, Any]]:
        """Return a copy of the evaluations and seconds so far, by algorithm."""
        return {"evaluations": dict(self.evaluations.samples), "seconds": dict(self.evaluations.seconds)}

    def costs_since(self, before: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the evaluations and seconds since an earlier state, which `costs` returned then."""
        return {
            kind: {name: value - before[kind][name] for name, value in values.items()}
            for kind, values in self.costs().items()
        }

    @property
    def _fast(self) -> bool:
        return self._settings.method == "fast"


def localize_many(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    statistics: ActivationStatistics,
    *,
    threshold: float,
    seconds: bool = False,
    **settings: Any,
) -> pd.DataFrame:
    """Return the memorization neurons of many prompts as a table, one row per prompt; see `localize_each`.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: The prompts, at least one.
        statistics: Activation statistics of this model.
        threshold: Memorization threshold tau, in (-1, 1].
        seconds: Whether the table has columns for the time of each algorithm. They differ from run to run.
        settings: All others of `localize_each`: gate, detection, similarity, search, protocol, store, progress.

    Returns:
        The table of `localization_table`, in the order of the prompts.

    Raises:
        ValueError: As `localize_each`.
        FailedPrompts: As `localize_each`.
    """
    found = localize_each(pipe, prompts, statistics, threshold=threshold, **settings)
    return localization_table(found, seconds=seconds)


def localize_each(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    statistics: ActivationStatistics,
    *,
    threshold: float,
    gate: float | None = None,
    detection: DetectionSettings | None = None,
    similarity: SimilaritySettings | None = None,
    search: SearchSettings | str | None = None,
    protocol: str | Protocol | None = None,
    store: Store | None = None,
    progress: bool = True,
) -> list[Localization]:
    """Return the memorization neurons of many prompts, in their order; see `localize`.

    With a store, a prompt that is finished is never computed again: a run that was killed continues, and ends with the
    results of an uninterrupted one. A record is used only for the same model, prompt, statistics, settings and code.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: The prompts, at least one.
        statistics: Activation statistics of this model.
        threshold: Memorization threshold tau, in (-1, 1].
        gate: Similarity that a seed must exceed; None means the threshold.
        detection: Seed, samples, steps and guidance of the noise differences.
        similarity: Window and exponents of the similarity.
        search: Course of the search; ``"fast"`` or ``"sequential"`` change its method alone.
        protocol: `released` or `paper`, or a protocol of your own.
        store: Where finished prompts are kept; None keeps nothing.
        progress: Whether to show a progress bar.

    Returns:
        The localizations, as a store keeps them: without steps and tests.

    Raises:
        ValueError: A threshold is outside (-1, 1]; there are no prompts, or one is empty; the statistics are those of
            another model; a store is used while neurons are deactivated.
        FailedPrompts: Prompts raised; all others are finished, and those in a store are kept.
    """
    prompts = check_prompts(prompts)
    check_threshold(threshold, gate)
    statistics.check(pipe.unet)
    defaults = default_settings(pipe)
    settings = {
        "threshold": float(threshold),
        "gate": None if gate is None else float(gate),
        "detection": detection or defaults.detection,
        "similarity": similarity or defaults.similarity,
        "search": search_settings(search, defaults.search),
        "protocol": default_protocol(pipe, protocol),
    }
    base = "" if store is None else _run_hash(pipe, statistics, settings)
    keys = {prompt: content_hash([base, prompt]) for prompt in prompts}
    records = {} if store is None else {prompt: store.get(key) for prompt, key in keys.items() if key in store}
    computed = map_prompts(
        _localizing,
        [(prompt,) for prompt in keys if prompt not in records],
        pipe=pipe,
        common={"statistics": statistics, "settings": settings},
        label="localization",
        finished=len(records),
        progress=progress,
    )
    for (prompt,), record in computed:
        records[prompt] = record if store is None else store.put(keys[prompt], record)
    return [Localization.from_record(records[prompt]) for prompt in prompts]


def _localizing(
    pipe: StableDiffusionPipeline, *, statistics: ActivationStatistics, settings: dict[str, Any]
) -> Callable[[tuple[str]], dict[str, Any]]:
    """Return what computes the record of a prompt."""
    return lambda batch: localize(pipe, batch[0], statistics, **settings).to_record()


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
    rows = [_row(item, seconds=seconds) for item in localizations]
    table = pd.DataFrame(rows)
    floats = ["unblocked_score", "initial_score", "refined_score", "theta"]
    return table.astype(dict.fromkeys(floats, "float64") | {"k": "Int64"})


def check_threshold(threshold: float, gate: float | None = None) -> None:
    """Check that thresholds are similarities.

    Raises:
        ValueError: One of them is outside (-1, 1].
    """
    for name, value in (("threshold", threshold), ("gate", gate)):
        if value is not None and not -1 < value <= 1:
            raise ValueError(f"{name} is {value}; a similarity is in (-1, 1]")


def _row(item: Localization, *, seconds: bool) -> dict[str, Any]:
    row = {
        "prompt": item.prompt,
        "memorized": item.memorized,
        "seeds": len(item.seeds),
        "unblocked_score": item.unblocked_score,
        "initial_score": item.initial_score,
        "refined_score": item.refined_score,
        "theta": item.theta,
        "k": item.k,
        "reached": item.reached,
        "initial_count": len(item.initial),
        "neuron_count": len(item.neurons),
        "initial": item.initial.to_json(),
        "neurons": item.neurons.to_json(),
    }
    row |= {f"evaluations_{name}": item.evaluations[name] for name in ALGORITHMS}
    return row | ({f"seconds_{name}": item.seconds[name] for name in ALGORITHMS} if seconds else {})


def _run_hash(pipe: StableDiffusionPipeline, statistics: ActivationStatistics, settings: dict[str, Any]) -> str:
    """Return a hash of everything but the prompt that determines a localization."""
    if any(layer.module._forward_hooks for layer in value_layers(pipe.unet)):
        raise ValueError("a store is used while value layers have hooks; leave the context that deactivates neurons")
    model = {
        "unet": dict(pipe.unet.state_dict()),
        "text_encoder": dict(pipe.text_encoder.state_dict()),
        "vocabulary": dict(pipe.tokenizer.get_vocab()),
        "scheduler": {name: repr(value) for name, value in pipe.scheduler.config.items() if name[0] != "_"},
    }
    code = [science_hash("localization"), torch.__version__.partition("+")[0]]
    return content_hash([model, list(statistics.mean), list(statistics.std), settings, code])
