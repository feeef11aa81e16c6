"""Searches of one prompt with several thresholds, which share what they evaluate.

The noise differences of a prompt do not depend on the thresholds; a lower one only goes further through the same steps of
the initial selection; and refinements that start alike test the same sets. So each neuron set is evaluated once for all.
Where a search is known already, the variants that would repeat it are not searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nemolib.first_step import FirstStep
from nemolib.holdout import ActivationStatistics
from nemolib.localization import Localization, PromptSearch
from nemolib.protocols import Protocol
from nemolib.settings import SearchSettings, SimilaritySettings


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
    known: Localization | None = None,
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
        known: What a search of this prompt with the same gate and settings found. A variant that would repeat it
            (`repeats`) costs nothing.

    Returns:
        For each variant what a search of its own finds. Evaluations and seconds are those that were not shared with the
        known search or a variant of a higher threshold: their sum is what all of them cost.

    Raises:
        ValueError: Two variants have one name.
    """
    if len({variant.name for variant in variants}) < len(variants):
        raise ValueError(f"variants have the names {[variant.name for variant in variants]}; each needs its own")
    found = {item.name: _free(known) for item in variants if known is not None and repeats(item, known)}
    searched = [item for item in variants if item.name not in found]
    if searched:
        run = PromptSearch(
            step,
            embedding,
            statistics,
            gate=gate,
            similarity=similarity,
            search=search,
            protocol=protocol,
            prompt=prompt,
        )
        found |= _search(run, searched)
    return {variant.name: found[variant.name] for variant in variants}


def repeats(variant: Variant, known: Localization) -> bool:
    """Return whether the search of a variant would be the one that is known, step by step.

    So it is if nothing was searched, since no seed passed the gate. And if the initial selection tried all steps without
    reaching its threshold, nor that of the variant: then both refinements must undercut the score that it ended with.

    Args:
        variant: The variant.
        known: A localization with the same gate and settings.
    """
    if not known.memorized:
        return True
    tried_all = variant.top_k and not known.reached and known.lowest_score > variant.initial
    return tried_all and known.initial_score >= variant.refinement


def _search(run: PromptSearch, variants: Sequence[Variant]) -> dict[str, Localization]:
    """Return what each variant finds in a search that they share."""
    if not run.seeds:
        # The first variant bears what the noise differences cost.
        nothing = run.not_memorized()
        return {item.name: _free(nothing) if place else nothing for place, item in enumerate(variants)}
    found, selections, before = {}, {}, None
    for variant in sorted(variants, key=lambda item: (-item.initial, item.refinement)):
        start = (variant.initial, variant.top_k)
        if start not in selections:
            selections[start] = run.select(variant.initial, top_k=variant.top_k)
        initial = selections[start]
        complete = run.found(initial, run.refine(initial, variant.refinement))
        found[variant.name] = complete if before is None else replace(complete, **run.costs_since(before))
        before = run.costs()
    return found


def _free(localization: Localization) -> Localization:
    """Return a localization that cost nothing, since another one has paid."""
    evaluations, seconds = (dict.fromkeys(costs, 0) for costs in (localization.evaluations, localization.seconds))
    return replace(localization, evaluations=evaluations, seconds=seconds)
