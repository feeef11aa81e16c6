"""Notebook 03: the search for the memorization neurons of all prompts, and what deactivating them does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nemolib.first_step import first_step
from nemolib.localization import localization_table
from nemolib.mitigation import DeactivatedNeurons, Mitigation
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.prompts import MEMORIZED
from nemolib.settings import DetectionSettings, Protocol, SimilaritySettings
from nemolib.similarity import memorization_score
from nemolib.store import Grid

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from nemolib.run import Run

NOTEBOOK = "03_localize_neurons"


def searched_prompts(run: Run) -> pd.DataFrame:
    """Return the prompts that are searched: VM, TM, and as many unmemorized ones as the profile's extent says."""
    clean = run.prompts("unmemorized").head(run.profile.extent.searched)
    return pd.concat([run.prompts(*MEMORIZED), clean], ignore_index=True)


def localizations(run: Run, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the memorization neurons of prompts, one row each.

    Args:
        run: The run.
        rows: Rows of prompt tables, at least one; None: those of `searched_prompts`.

    Returns:
        Column kind, then those of `nemolib.localization.localization_table` with the seconds of each algorithm.
    """
    rows = searched_prompts(run) if rows is None else rows
    table = localization_table(run.search(rows["caption"].tolist()), seconds=True)
    return pd.concat([rows[["kind"]].reset_index(drop=True), table], axis=1)


def without_seconds(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of localizations without what differs from run to run."""
    return table[[name for name in table if not name.startswith("seconds_")]]


def neuron_sets(table: pd.DataFrame, column: str = "neurons") -> list[NeuronSet]:
    """Return the neuron set of each row of a table of localizations: column ``neurons`` or ``initial``."""
    return [NeuronSet.from_json(text) for text in table[column]]


def by_prompt(table: pd.DataFrame, column: str = "neurons") -> dict[str, NeuronSet]:
    """Return the neuron set of each prompt of a table of localizations."""
    return dict(zip(table["prompt"], neuron_sets(table, column), strict=True))


def memorized(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of VM and TM prompts."""
    return table[table["kind"].isin(MEMORIZED)]


def shared_neurons(table: pd.DataFrame) -> pd.DataFrame:
    """Return the neurons that at least two memorized prompts share, those of most prompts first.

    Returns:
        Columns layer (from 1, as in the paper), neuron, prompts (number), words (those of at least two and of half of
        the captions, with their number) and captions (separated by semicolons).
    """
    owners: dict[tuple[int, int], list[str]] = {}
    for prompt, neurons in by_prompt(memorized(table)).items():
        for pair in neurons:
            owners.setdefault(pair, []).append(prompt)
    rows = [
        (layer + 1, neuron, len(captions), _common_words(captions), "; ".join(captions))
        for (layer, neuron), captions in sorted(owners.items(), key=lambda item: (-len(item[1]), item[0]))
        if len(captions) > 1
    ]
    return pd.DataFrame(rows, columns=["layer", "neuron", "prompts", "words", "captions"])


def _common_words(captions: Sequence[str]) -> str:
    """Return the words of at least half of the captions, the most frequent first, such as ``"card (3), edition (3)"``."""
    counted = Counter(word for caption in captions for word in dict.fromkeys(caption.split()))
    repeated = [(word, number) for word, number in counted.most_common() if number > 1 and 2 * number >= len(captions)]
    return ", ".join(f"{word} ({number})" for word, number in repeated)


def deactivation(run: Run, table: pd.DataFrame, kinds: Sequence[str] = MEMORIZED) -> pd.DataFrame:
    """Return what deactivating its neurons does to each prompt.

    Args:
        run: The run.
        table: Localizations.
        kinds: Kinds of prompts; each has a planted image, or there is nothing to compare with.

    Returns:
        One row per prompt of these kinds, columns kind, prompt, neuron_count, reached, score_before and score_after (the
        memorization score: largest similarity of two seeds), copy_before and copy_after (median over images of the
        similarity to the planted image, cosine of copy-detection features, SSCD_orig), same_seed (median similarity of
        images with and without, SSCD_gen), seeds_before and seeds_after (median similarity of two images of the prompt,
        D_SSCD).

    Raises:
        ProfileError: The profile has no encoder for copy detection.
    """
    chosen = table[table["kind"].isin(kinds)].reset_index(drop=True)
    rows, own = run.prompts(*kinds).set_index("caption").loc[chosen["prompt"]].reset_index(), by_prompt(chosen)
    profile = run.profile
    scores = run.compute(
        scoring,
        list(own.items()),
        label="scores with deactivated neurons",
        detection=profile.detection,
        similarity=profile.similarity,
        protocol=profile.protocol,
    )
    before = run.measure(rows, columns=("sscd_orig", "d_sscd"))
    after = run.measure(rows, DeactivatedNeurons(own), columns=("sscd_orig", "sscd_gen", "d_sscd"))
    return chosen[["kind", "prompt", "neuron_count", "reached"]].assign(
        score_before=chosen["unblocked_score"],
        score_after=scores,
        copy_before=before["sscd_orig"],
        copy_after=after["sscd_orig"],
        same_seed=after["sscd_gen"],
        seeds_before=before["d_sscd"],
        seeds_after=after["d_sscd"],
    )


def scoring(
    pipe: StableDiffusionPipeline, *, detection: DetectionSettings, similarity: SimilaritySettings, protocol: Protocol
) -> Callable[[Sequence[tuple[str, NeuronSet]]], list[float]]:
    """Return what gives the memorization scores of prompts, each with neurons deactivated: a task."""
    step = first_step(pipe, settings=detection, protocol=protocol)

    def score(batch: Sequence[tuple[str, NeuronSet]]) -> list[float]:
        found = [step(embed(pipe, [prompt]), neurons=neurons) for prompt, neurons in batch]
        return [memorization_score(maps, settings=similarity, protocol=protocol) for maps in found]

    return score


def stay_memorized(change: pd.DataFrame, share: float = 0.5) -> pd.DataFrame:
    """Return the prompts that keep more than a share of their similarity to the planted image, the most similar first.

    Source: Fig. 9 (highly memorized prompts); the paper shows images and no criterion.
    """
    keeps = change["copy_after"] > share * change["copy_before"]
    return change[keeps].sort_values("copy_after", ascending=False, ignore_index=True)


def example_prompts(change: pd.DataFrame, kind: str, number: int) -> list[str]:
    """Return examples of a kind, spread evenly over how far copy similarity drops: neither the best nor the worst alone."""
    part = change[(change["kind"] == kind) & (change["neuron_count"] > 0)]
    drop = (part["copy_before"] - part["copy_after"]).sort_values(kind="stable")
    places = np.linspace(0, len(drop) - 1, min(number, len(drop)) + 2)[1:-1].round().astype(int)
    return part.loc[drop.index[np.unique(places)], "prompt"].tolist()


def with_and_without(run: Run, prompts: Sequence[str], mitigation: Mitigation) -> Grid:
    """Return images of prompts with all neurons active, and beside them those of the same seeds with a mitigation."""
    halves = [run.images(prompts, item) for item in (None, mitigation)]
    seeds = [f"seed {number}" for number in range(halves[0].shape[1])]
    return Grid(np.concatenate(halves, axis=1), tuple(prompts), tuple(2 * seeds))
