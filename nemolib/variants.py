"""Searches of one prompt with several thresholds, which share what they evaluate.

The noise differences of a prompt do not depend on the thresholds; a lower one only goes further through the same steps of
the initial selection; and refinements that start alike test the same sets. So each neuron set is evaluated once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from nemolib.blocked_score import BlockedScore
from nemolib.evaluations import ALGORITHMS, Evaluations
from nemolib.first_step import FirstStep
from nemolib.group_testing import refine_by_leading_seeds
from nemolib.holdout import ActivationStatistics, z_scores
from nemolib.localization import Localization
from nemolib.neurons import NeuronSet
from nemolib.protocols import Protocol, load_protocol
from nemolib.refinement import refine_sequential
from nemolib.selection import InitialSelection, initial_selection
from nemolib.settings import SearchSettings, SimilaritySettings, search_settings
from nemolib.similarity import max_pairwise, pairwise
from nemolib.value_layers import value_activations


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
            raise ValueError(
                f"variant {self.name!r}: the refinement threshold {self.refinement:.3f} is below that of the initial "
                f"selection, {self.initial:.3f}; what was selected would never be below it"
            )


def localize_variants(
    step: FirstStep,
    embedding: Tensor,
    statistics: ActivationStatistics,
    variants: Sequence[Variant],
    *,
    gate: float,
    similarity: SimilaritySettings | None = None,
    search: SearchSettings | str | None = None,
    protocol: str | Protocol = "released",
    prompt: str = "",
) -> dict[str, Localization]:
    """Return the memorization neurons of a prompt for each of several thresholds (Alg. 1 to 4).

    All variants have one gate, so the same seeds take part. Where the initial selection does not reach its threshold,
    the refinement must undercut the score that it ended with, if that is above the refinement threshold.

    Source: Table 4, Fig. 14, 15. The gate, too, is an argument of its own in the authors' code
        (3_detect_memorized_neurons.py).

    Args:
        step: The first denoising step of the model.
        embedding: Embedding of the prompt, [1, token, feature].
        statistics: Activation statistics of this model.
        variants: The variants, each with a name of its own.
        gate: Similarity that a seed must exceed with another seed to take part.
        similarity: Window and exponents; None means those of the paper.
        search: Course of the search, or its method; None as above.
        protocol: The protocol; the one that the step was made with.
        prompt: The prompt's text, for the result only.

    Returns:
        For each variant what a search of its own finds. Evaluations and seconds are those that were not shared with a
        variant of a higher threshold: their sum is what all of them cost.

    Raises:
        ValueError: Two variants have one name.
    """
    if len({variant.name for variant in variants}) < len(variants):
        raise ValueError(f"variants have the names {[variant.name for variant in variants]}; each needs its own")
    similarity, protocol = similarity or SimilaritySettings(), load_protocol(protocol)
    search, evaluations = search_settings(search, SearchSettings()), Evaluations()
    with evaluations.stage("A1"):
        unblocked = step(embedding, evaluations=evaluations)
        best = max_pairwise(pairwise(unblocked, settings=similarity, protocol=protocol))
        seeds = tuple((best > gate).nonzero().flatten().tolist())
    common = {"prompt": prompt, "seeds": seeds, "unblocked_score": float(best.max())}
    if not seeds:
        nothing = NeuronSet.empty(len(statistics.mean))
        none = Localization(memorized=False, initial=nothing, neurons=nothing, **common)
        costs = [_spent(evaluations, {}), *[_spent(Evaluations(), {})] * len(variants)]
        return {variant.name: replace(none, **cost) for variant, cost in zip(variants, costs, strict=False)}
    score = BlockedScore(
        step,
        embedding,
        seeds=seeds,
        unblocked=unblocked[list(seeds)],
        similarity=similarity,
        protocol=protocol,
        evaluations=evaluations,
    )
    with evaluations.stage("A2"):
        activations = tuple(layer[0].cpu() for layer in value_activations(step.unet, embedding))
        z = z_scores(statistics, activations)

    def select(variant: Variant) -> InitialSelection:
        limited = search if variant.top_k else replace(search, k_start=0, k_step=0)
        quick = partial(score.screen, limit=variant.initial) if search.method == "fast" else None
        common = {"threshold": variant.initial, "search": limited, "protocol": protocol}
        return initial_selection(z, activations, score, quick=quick, **common)

    refine = refine_by_leading_seeds if search.method == "fast" else refine_sequential
    found, selections, before = {}, {}, {}
    for variant in sorted(variants, key=lambda item: (-item.initial, item.refinement)):
        start = (variant.initial, variant.top_k)
        with evaluations.stage("A3"):
            selections[start] = initial = selections.get(start) or select(variant)
        with evaluations.stage("A4"):
            target = variant.refinement if initial.reached else max(variant.refinement, initial.score)
            refined = refine(initial.candidates.entries(double=protocol.double_entries), score, threshold=target)
        found[variant.name] = Localization(
            memorized=True,
            initial=initial.neurons,
            neurons=refined.neurons,
            initial_score=initial.score,
            refined_score=refined.score,
            theta=initial.steps[-1].theta,
            k=initial.steps[-1].k,
            reached=initial.reached,
            steps=initial.steps,
            tests=refined.tests,
            **common,
            **_spent(evaluations, before),
        )
        before = {"evaluations": dict(evaluations.samples), "seconds": dict(evaluations.seconds)}
    return {variant.name: found[variant.name] for variant in variants}


def _spent(evaluations: Evaluations, before: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return evaluations and seconds of each algorithm since an earlier state; an empty one means the start."""
    now = {"evaluations": evaluations.samples, "seconds": evaluations.seconds}
    return {
        kind: {name: values[name] - before.get(kind, {}).get(name, 0) for name in ALGORITHMS}
        for kind, values in now.items()
    }
