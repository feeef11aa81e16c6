"""Searches of one prompt with several thresholds, which share what they evaluate.

The noise differences of a prompt do not depend on the thresholds; a lower one only goes further through the same steps of
the initial selection; and refinements that start alike test the same sets. So each neuron set is evaluated once for all.
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
    run = PromptSearch(
        step, embedding, statistics, gate=gate, similarity=similarity, search=search, protocol=protocol, prompt=prompt
    )
    if not run.seeds:
        # The first variant bears what the noise differences cost.
        nothing, free = run.not_memorized(), run.costs_since(run.costs())
        return {item.name: replace(nothing, **(free if place else {})) for place, item in enumerate(variants)}
    found, selections, before = {}, {}, None
    for variant in sorted(variants, key=lambda item: (-item.initial, item.refinement)):
        start = (variant.initial, variant.top_k)
        if start not in selections:
            selections[start] = run.select(variant.initial, top_k=variant.top_k)
        initial = selections[start]
        complete = run.found(initial, run.refine(initial, variant.refinement))
        found[variant.name] = complete if before is None else replace(complete, **run.costs_since(before))
        before = run.costs()
    return {variant.name: found[variant.name] for variant in variants}
