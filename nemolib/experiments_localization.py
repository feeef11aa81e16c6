"""Notebook 03 in functions: the search for all prompts of a profile, and what deactivating their neurons does.

What takes long is kept in ``build/<profile>/store``; see `nemolib.experiments`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nemolib import metrics, paper, paths
from nemolib.checks import Row, claim, comparison, lacking
from nemolib.encoders import copy_encoder
from nemolib.evaluations import ALGORITHMS
from nemolib.experiments import image_features, images, model_hash, open_store, planted_features, statistics, threshold
from nemolib.first_step import first_step
from nemolib.holdout import ActivationStatistics, z_scores
from nemolib.localization import BlockedScore, Localization, localization_table, localize_each
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.profiles import Profile, load_profile
from nemolib.prompts import MEMORIZED, select
from nemolib.protocols import load_protocol
from nemolib.provenance import content_hash, science_hash
from nemolib.refinement import RefinementTest
from nemolib.selection import SelectionStep
from nemolib.settings import DetectionSettings, SimilaritySettings
from nemolib.similarity import max_pairwise, memorization_score, pairwise
from nemolib.tables import format_median_mad
from nemolib.value_layers import value_activations
from nemolib.workers import map_prompts

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

KINDS = ("vm", "tm", "unmemorized")
"""Kinds of prompts that are searched."""

PLAIN_COLUMNS = ("model", "kind", "quantity", "value")
"""Columns of the table about the model that was trained without sparse values."""


def searched_prompts(profile: Profile | str, *, unmemorized: int | None = None) -> pd.DataFrame:
    """Return the prompts that are searched: vm, tm, and the first unmemorized ones.

    Args:
        profile: A profile or its name.
        unmemorized: How many unmemorized prompts; None means all of the profile.

    Returns:
        Rows of the prompt tables (see `nemolib.prompts.load_prompts`).

    Raises:
        ValueError: The number is negative.
    """
    if unmemorized is not None and unmemorized < 0:
        raise ValueError(f"unmemorized is {unmemorized}; give a number of prompts, or None for all")
    parts = [select(profile, kind) for kind in KINDS]
    parts[-1] = parts[-1].head(len(parts[-1]) if unmemorized is None else unmemorized)
    return pd.concat(parts, ignore_index=True)


def localizations(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    *,
    unmemorized: int | None = None,
    prompts: pd.DataFrame | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Return the memorization neurons of all searched prompts; finished prompts come from the store.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        unmemorized: How many unmemorized prompts are searched; None means all.
        prompts: Rows of the prompt tables to search instead, at least one; None means those of `searched_prompts`.
        progress: Whether to show progress bars.

    Returns:
        Column kind, then those of `nemolib.localization.localization_table` with the seconds of each algorithm.
    """
    if prompts is None:
        prompts = searched_prompts(profile, unmemorized=unmemorized)
    table = localization_table(searches(pipe, profile, prompts["caption"].tolist(), progress=progress), seconds=True)
    return pd.concat([prompts[["kind"]].reset_index(drop=True), table], axis=1)


def searches(
    pipe: StableDiffusionPipeline, profile: Profile | str, captions: Sequence[str], *, progress: bool = True
) -> list[Localization]:
    """Return what the search of the profile finds for prompts; finished prompts come from the store.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        captions: The prompts, at least one.
        progress: Whether to show progress bars.
    """
    profile = load_profile(profile)
    return localize_each(
        pipe,
        captions,
        statistics(pipe, profile, progress=False),
        threshold=threshold(pipe, profile, progress=False),
        store=open_store(profile, "localization"),
        progress=progress,
    )


def without_seconds(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of localizations without what differs from run to run."""
    return table[[name for name in table if not name.startswith("seconds_")]]


def neuron_sets(table: pd.DataFrame, column: str = "neurons") -> list[NeuronSet]:
    """Return the neuron set of each row of a table of localizations."""
    return [NeuronSet.from_json(text) for text in table[column]]


def search_steps(steps: Sequence[SelectionStep], *, threshold: float) -> pd.DataFrame:
    """Return the steps of an initial selection as a table: columns theta, k, neurons (number), score, threshold."""
    rows = [(step.theta, step.k, len(step.neurons), step.score, threshold) for step in steps]
    return pd.DataFrame(rows, columns=["theta", "k", "neurons", "score", "threshold"])


def search_tests(entries: Sequence[Sequence[int]], tests: Sequence[RefinementTest]) -> pd.DataFrame:
    """Return the tests of a refinement as a table.

    Args:
        entries: For each layer the candidates that it started from.
        tests: Its tests in order.

    Returns:
        Columns test (from 1), layer (from 1, as in the paper), neuron (missing where a whole layer or a group was
        tested), score (with it reactivated), removed (it is not needed) and left (neurons that stay deactivated after
        the test).
    """
    left = [list(layer) for layer in entries]
    rows = []
    for number, test in enumerate(tests, start=1):
        if test.removed and test.group:
            # A group takes all entries of its neurons, a test of one neuron a single one.
            gone = set(test.group)
            left = [[neuron for neuron in layer if (i, neuron) not in gone] for i, layer in enumerate(left)]
        elif test.removed and test.neuron is None:
            left[test.layer] = []
        elif test.removed:
            left[test.layer].remove(test.neuron)
        rows.append((number, test.layer + 1, test.neuron, test.score, test.removed, sum(map(len, map(set, left)))))
    table = pd.DataFrame(rows, columns=["test", "layer", "neuron", "score", "removed", "left"])
    return table.astype({"neuron": "Int64"})


def deactivation(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    table: pd.DataFrame,
    *,
    kinds: Sequence[str] = MEMORIZED,
    progress: bool = True,
) -> pd.DataFrame:
    """Return what deactivating its neurons does to each memorized prompt.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        table: Localizations (`localizations`).
        kinds: Kinds of prompts; each prompt has a planted image, or there is nothing to compare with.
        progress: Whether to show progress bars.

    Returns:
        One row per prompt of these kinds, columns kind, prompt, neuron_count, reached, score_before and score_after (the
        memorization score: largest similarity of two seeds), copy_before and copy_after (median over images of the
        similarity to the planted image, cosine of copy-detection features, SSCD_orig), same_seed (median similarity of
        images with and without, SSCD_Gen), seeds_before and seeds_after (median similarity of two images of the prompt,
        D_SSCD).

    Raises:
        ProfileError: The profile has no encoder for copy detection.
    """
    profile = load_profile(profile)
    chosen = table[table["kind"].isin(kinds)].reset_index(drop=True)
    before, after = with_and_without(pipe, profile, chosen, progress=progress)
    similar = _copy_similarity(profile, chosen, before, after, device=pipe.device)
    scores = _scores_after(pipe, profile, chosen["prompt"].tolist(), neuron_sets(chosen), progress=progress)
    kept = chosen[["kind", "prompt", "neuron_count", "reached"]]
    return kept.assign(score_before=chosen["unblocked_score"], score_after=scores, **similar)


def with_and_without(
    pipe: StableDiffusionPipeline, profile: Profile | str, table: pd.DataFrame, *, progress: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return images of prompts with all neurons active, and of the same seeds with each prompt's neurons deactivated.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        table: Localizations.
        progress: Whether to show progress bars.

    Returns:
        Twice images [prompt, seed, height, width, 3], uint8. A prompt without neurons has the same images twice.
    """
    prompts = table["prompt"].tolist()
    before = images(pipe, profile, prompts, progress=progress)
    after = images(pipe, profile, prompts, neurons=neuron_sets(table), progress=progress)
    return before, after


def neuron_z_scores(
    pipe: StableDiffusionPipeline, statistics: ActivationStatistics, table: pd.DataFrame, *, column: str = "neurons"
) -> pd.DataFrame:
    """Return the z-score of each neuron that was found for a prompt.

    Args:
        pipe: The pipeline.
        statistics: Activation statistics of its model.
        table: Localizations.
        column: ``neurons`` (refined) or ``initial``.

    Returns:
        One row per prompt and neuron, columns kind, prompt, layer and neuron (from 0), z.
    """
    rows = []
    for kind, prompt, neurons in zip(table["kind"], table["prompt"], neuron_sets(table, column), strict=True):
        if neurons:
            activations = value_activations(pipe.unet, embed(pipe, [prompt]))
            z = z_scores(statistics, [values.cpu() for values in activations])
            rows += [(kind, prompt, layer, neuron, float(z[layer][0, neuron])) for layer, neuron in neurons]
    return pd.DataFrame(rows, columns=["kind", "prompt", "layer", "neuron", "z"])


def prompt_z_scores(z: Sequence[torch.Tensor]) -> pd.DataFrame:
    """Return the z-scores of all neurons for one prompt as a table.

    Args:
        z: For each layer the z-scores [neuron].

    Returns:
        One row per neuron, columns layer (from 1, as in the paper), neuron (from 0), z.
    """
    parts = [
        pd.DataFrame({"layer": layer, "neuron": range(len(values)), "z": values.double().cpu().numpy()})
        for layer, values in enumerate(z, start=1)
    ]
    return pd.concat(parts, ignore_index=True)


def shared_neurons(table: pd.DataFrame, *, minimum: int = 2) -> pd.DataFrame:
    """Return the neurons that several memorized prompts share, those of most prompts first.

    Args:
        table: Localizations.
        minimum: Smallest number of prompts.

    Returns:
        Columns layer (from 1, as in the paper), neuron, prompts (number), words (those of at least two and of half of
        the captions, with their number) and captions (separated by semicolons).
    """
    owners: dict[tuple[int, int], list[str]] = {}
    memorized = table[table["kind"].isin(MEMORIZED)]
    for prompt, neurons in zip(memorized["prompt"], neuron_sets(memorized), strict=True):
        for pair in neurons:
            owners.setdefault(pair, []).append(prompt)
    rows = [
        (layer + 1, neuron, len(captions), _common_words(captions), "; ".join(captions))
        for (layer, neuron), captions in sorted(owners.items(), key=lambda item: (-len(item[1]), item[0]))
        if len(captions) >= minimum
    ]
    return pd.DataFrame(rows, columns=["layer", "neuron", "prompts", "words", "captions"])


def neuron_overlap(table: pd.DataFrame) -> pd.DataFrame:
    """Return how far the neuron sets of two memorized prompts overlap, for every pair of prompts with neurons.

    Args:
        table: Localizations.

    Returns:
        Columns first, second (captions), common_words (number of words that both captions have), shared (neurons in
        both sets) and overlap (Jaccard index: shared neurons as a share of the neurons in either set).
    """
    chosen = table[table["kind"].isin(MEMORIZED) & (table["neuron_count"] > 0)]
    pairs = combinations(zip(chosen["prompt"], neuron_sets(chosen), strict=True), 2)
    rows = [
        (
            one,
            other,
            len(set(one.split()) & set(other.split())),
            len(mine & theirs),
            len(mine & theirs) / len(mine | theirs),
        )
        for (one, mine), (other, theirs) in pairs
    ]
    table = pd.DataFrame(rows, columns=["first", "second", "common_words", "shared", "overlap"])
    # Without a pair of prompts the columns would have no type.
    return table.astype({"common_words": "int64", "shared": "int64", "overlap": "float64"})


def counts_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return how many neurons the search found, by kind of prompt.

    Args:
        table: Localizations.

    Returns:
        One row per kind, columns kind, prompts, searched (a seed passed the gate), reached (the initial selection
        brought the score to the threshold), without_neurons, initial and neurons (median and median absolute deviation,
        over prompts with neurons for the unmemorized, as in the paper), single (exactly one neuron), at_most_5,
        at_least_50 (shares of all prompts).
    """
    rows = []
    for kind in [name for name in KINDS if name in set(table["kind"])]:
        part = table[table["kind"] == kind]
        counts = part["neuron_count"]
        counted = part[counts > 0] if kind == "unmemorized" else part
        rows.append(
            {
                "kind": kind,
                "prompts": len(part),
                "searched": int(part["memorized"].sum()),
                "reached": int(part["reached"].sum()),
                "without_neurons": int((counts == 0).sum()),
                "initial": format_median_mad(counted["initial_count"], digits=1) if len(counted) else "",
                "neurons": format_median_mad(counted["neuron_count"], digits=1) if len(counted) else "",
                "single": float((counts == 1).mean()),
                "at_most_5": float(((counts >= 1) & (counts <= 5)).mean()),
                "at_least_50": float((counts >= 50).mean()),
            }
        )
    return pd.DataFrame(rows)


def cost_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return what the search cost by algorithm, for memorized prompts that were searched.

    Source: Table 2 (its numbers are means of seconds, as far as its sums say; here too).

    Args:
        table: Localizations with seconds.

    Returns:
        One row per kind and algorithm (A1 to A4, total), columns kind, algorithm, prompts, seconds (mean), evaluations
        (mean number of UNet sample-evaluations).

    Raises:
        ValueError: The table has no seconds.
    """
    if "seconds_A1" not in table:
        raise ValueError("the table has no column seconds_A1; make it with localize_many(..., seconds=True)")
    rows = []
    for kind in _kinds(table):
        part = table[(table["kind"] == kind) & table["memorized"]]
        for name in (*ALGORITHMS, "total"):
            chosen = ALGORITHMS if name == "total" else (name,)
            seconds = part[[f"seconds_{item}" for item in chosen]].sum(axis=1).mean()
            evaluations = part[[f"evaluations_{item}" for item in chosen]].sum(axis=1).mean()
            rows.append((kind, name, len(part), seconds, evaluations))
    return pd.DataFrame(rows, columns=["kind", "algorithm", "prompts", "seconds", "evaluations"])


def change_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return scores and copy similarity before and after deactivation, median and MAD by kind.

    Args:
        table: What `deactivation` returned.

    Returns:
        One row per kind, columns kind, prompts, and each quantity as text; empty where no prompt has it.
    """
    names = ("score", "copy", "seeds")
    rows = []
    for kind in _kinds(table):
        part = table[table["kind"] == kind]
        texts = {
            f"{name}_{when}": _median_mad_text(part[f"{name}_{when}"]) for name in names for when in ("before", "after")
        }
        rows.append({"kind": kind, "prompts": len(part)} | texts | {"same_seed": _median_mad_text(part["same_seed"])})
    return pd.DataFrame(rows)


def stay_memorized(table: pd.DataFrame, *, share: float = 0.5) -> pd.DataFrame:
    """Return the prompts that keep more than a share of their similarity to the planted image, the most similar first.

    Source: Fig. 9 (highly memorized prompts); the paper shows images and no criterion.

    Args:
        table: What `deactivation` returned.
        share: Share of the copy similarity that is kept without the neurons.
    """
    keeps = table["copy_after"] > share * table["copy_before"]
    return table[keeps].sort_values("copy_after", ascending=False, ignore_index=True)


def plain_model(profile: Profile | str) -> pd.DataFrame:
    """Return what is known of the model that was trained without sparse values, beside the shipped one.

    Args:
        profile: A profile or its name; the table lies beside its model: ``plain_model.csv``, written by `make train`.

    Returns:
        Columns model (sparse or plain), kind, quantity, value; without rows if the profile's model has no such table.

    Raises:
        StoreError: A column is missing.
    """
    from nemolib.store import read_table

    path = paths.resolve(load_profile(profile).model).parent / "plain_model.csv"
    if not path.is_file():
        return pd.DataFrame(columns=list(PLAIN_COLUMNS))
    return read_table(path, columns=PLAIN_COLUMNS)


def example_prompts(table: pd.DataFrame, *, number: int, kind: str) -> list[str]:
    """Return examples of a kind, spread evenly over how far copy similarity drops: neither the best nor the worst alone.

    Args:
        table: What `deactivation` returned.
        number: How many prompts.
        kind: ``vm`` or ``tm``.
    """
    part = table[(table["kind"] == kind) & (table["neuron_count"] > 0)]
    drop = (part["copy_before"] - part["copy_after"]).sort_values(kind="stable")
    places = np.linspace(0, len(drop) - 1, min(number, len(drop)) + 2)[1:-1].round().astype(int)
    return part.loc[drop.index[np.unique(places)], "prompt"].tolist()


def blocked_score(
    pipe: StableDiffusionPipeline, profile: Profile | str, prompt: str, *, threshold: float
) -> BlockedScore:
    """Return the score that the search asks of neuron sets, for one prompt; see `nemolib.localization.BlockedScore`.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        prompt: The prompt.
        threshold: Memorization threshold; seeds below it take no part.

    Raises:
        ValueError: No seed is above the threshold.
    """
    profile = load_profile(profile)
    step, embedding = first_step(pipe, settings=profile.detection, protocol=profile.protocol), embed(pipe, [prompt])
    unblocked = step(embedding)
    best = max_pairwise(pairwise(unblocked, settings=profile.similarity, protocol=profile.protocol))
    seeds = (best > threshold).nonzero().flatten().tolist()
    if not seeds:
        raise ValueError(f"prompt {prompt!r}: no seed is above the threshold {threshold:.3f}, so nothing is searched")
    return BlockedScore(
        step,
        embedding,
        seeds=seeds,
        unblocked=unblocked[seeds],
        similarity=profile.similarity,
        protocol=load_protocol(profile.protocol),
    )


def claims(table: pd.DataFrame, change: pd.DataFrame, *, threshold: float, rounding: float = 1e-4) -> list[Row]:
    """Return what must hold for any search, and our numbers beside the paper's.

    Args:
        table: Localizations.
        change: What `deactivation` returned.
        threshold: Memorization threshold.
        rounding: How far two evaluations of one score may differ (`nemolib.checks.rounding`).
    """
    searched = table[table["memorized"]]
    inside = all(
        not kept - initial
        for kept, initial in zip(neuron_sets(searched), neuron_sets(searched, "initial"), strict=True)
    )
    excess = (searched["refined_score"] - searched["initial_score"].clip(lower=threshold)).max()
    outside = int(table.loc[~table["memorized"], "neuron_count"].sum())
    world = "another model, another number of neurons per layer"
    rows = [
        claim("every refined set lies within its initial selection", inside),
        claim(
            "refinement never ends above the threshold it was given",
            excess,
            at_most=rounding,
            reason="a score that is evaluated twice may differ in the last digits",
            missing=lacking(len(searched), "searched prompt", needed=1),
        ),
        claim("prompts that fail the gate have no neurons", outside, equals=0),
    ]
    for kind in _kinds(change):
        part, counts = change[change["kind"] == kind], table.loc[table["kind"] == kind, "neuron_count"]
        rows += [
            claim(
                f"{kind.upper()}: the median score falls without the neurons",
                float(part["score_after"].median() - part["score_before"].median()),
                at_most=0,
                reason="what the search is for",
                missing=lacking(len(part), f"{kind.upper()} prompt", needed=5),
            ),
            comparison(
                f"{kind.upper()}: neurons per prompt, median",
                counts.median(),
                paper=paper.reported(f"neurons.{kind}"),
                reason=world,
            ),
            comparison(
                f"{kind.upper()}: similarity to the planted image without its neurons, median",
                part["copy_after"].median(),
                paper=_table_1("NeMo", kind, "sscd_orig"),
                reason="another descriptor: not the same scale",
            ),
        ]
    return rows + _unmemorized_rows(table)


def findings(
    table: pd.DataFrame, change: pd.DataFrame, overlap: pd.DataFrame, *, threshold: float, neurons: int
) -> str:
    """Return what was found, in sentences with their numbers (Markdown).

    Args:
        table: Localizations.
        change: What `deactivation` returned.
        overlap: What `neuron_overlap` returned.
        threshold: Memorization threshold.
        neurons: Number of neurons that were searched.
    """
    lines = []
    for kind in _kinds(change):
        part, counts = change[change["kind"] == kind], table.loc[table["kind"] == kind, "neuron_count"]
        lines.append(
            f"- **{kind.upper()}**: {format_median_mad(counts, digits=1)} of {neurons} neurons "
            f"(paper: {paper.reported(f'neurons.{kind}')} of 5,760); {int((counts == 1).sum())} of {len(counts)} prompts "
            f"have a single one; the search reached the threshold for {int(part['reached'].sum())} of {len(part)}. "
            f"Without them the median memorization score goes from {part['score_before'].median():.2f} to "
            f"{part['score_after'].median():.2f} (threshold {threshold:.2f}), the median similarity to the planted image "
            f"from {part['copy_before'].median():.2f} to {part['copy_after'].median():.2f} (paper, SSCD: "
            f"{_table_1('all neurons active', kind, 'sscd_orig')} to {_table_1('NeMo', kind, 'sscd_orig')})."
        )
    diverse = (
        "with one image per prompt the similarity of its images is not known"
        if change["seeds_before"].isna().all()
        else "the median similarity of two images of a prompt goes from "
        f"{change['seeds_before'].median():.2f} to {change['seeds_after'].median():.2f}"
    )
    lines += [
        f"- **{len(stay_memorized(change))} of {len(change)}** prompts keep more than half of their similarity to the planted "
        "image.",
        f"- For **{int((change['score_after'] > threshold).sum())} of {len(change)}** prompts the memorization score stays above "
        f"the threshold. It says whether seeds agree, not on what: {diverse}.",
    ]
    clean = table[table["kind"] == "unmemorized"]
    if len(clean):
        without = int((clean["neuron_count"] == 0).sum())
        lines.append(f"- **Unmemorized**: {without} of {len(clean)} prompts have no neurons (paper: 442 of 500).")
    family = overlap["common_words"] >= 2
    if family.any() and not family.all():
        lines.append(
            f"- **Families** of captions share {overlap.loc[family, 'overlap'].mean():.0%} of their neurons, other pairs "
            f"{overlap.loc[~family, 'overlap'].mean():.0%} (means over pairs)."
        )
    return "\n".join(lines)


def _unmemorized_rows(table: pd.DataFrame) -> list[Row]:
    clean = table[table["kind"] == "unmemorized"]
    if clean.empty:
        return []
    share = float((clean["neuron_count"] == 0).mean())
    text = "unmemorized: share of prompts without neurons"
    return [comparison(text, share, paper="0.884 (442 of 500)", reason="depends on where the threshold lies")]


def _median_mad_text(values: pd.Series) -> str:
    """Return median and median absolute deviation of what is not missing, as text; nothing if all is."""
    known = values.dropna()
    return format_median_mad(known) if len(known) else ""


def _kinds(table: pd.DataFrame) -> list[str]:
    """Return the memorized kinds that a table has, vm first."""
    return [kind for kind in MEMORIZED if kind in set(table["kind"])]


def _table_1(setting: str, kind: str, metric: str) -> str:
    """Return a median of the paper's Table 1 with its median absolute deviation, as text."""
    table = paper.table_1()
    row = table[(table["setting"] == setting) & (table["kind"] == kind)].iloc[0]
    return f"{row[metric]:g} ± {row[f'{metric}_mad']:g}"


def _scores_after(
    pipe: StableDiffusionPipeline,
    profile: Profile,
    prompts: Sequence[str],
    sets: Sequence[NeuronSet],
    *,
    progress: bool,
) -> list[float]:
    """Return the memorization scores of prompts whose neurons are deactivated; they are kept in the store."""
    settings = [profile.detection, profile.similarity, profile.protocol]
    base = [model_hash(pipe), settings, science_hash("first_step", "similarity")]
    keys = [content_hash([base, prompt, neurons]) for prompt, neurons in zip(prompts, sets, strict=True)]
    store = open_store(profile, "deactivation")
    jobs = {key: (prompt, neurons, key) for key, prompt, neurons in zip(keys, prompts, sets, strict=True)}
    found = map_prompts(
        _scoring,
        [(job,) for key, job in jobs.items() if key not in store],
        pipe=pipe,
        common={"settings": profile.detection, "similarity": profile.similarity, "protocol": profile.protocol},
        label="scores with deactivated neurons",
        progress=progress,
    )
    for ((_, _, key),), score in found:
        store.put(key, score)
    return [store.get(key) for key in keys]


def _scoring(
    pipe: StableDiffusionPipeline, *, settings: DetectionSettings, similarity: SimilaritySettings, protocol: str
) -> Callable[[tuple[tuple[str, NeuronSet, str]]], float]:
    """Return what computes the memorization score of a prompt whose neurons are deactivated."""
    step = first_step(pipe, settings=settings, protocol=protocol)

    def score(batch: tuple[tuple[str, NeuronSet, str]]) -> float:
        prompt, neurons, _ = batch[0]
        differences = step(embed(pipe, [prompt]), neurons=neurons)
        return memorization_score(differences, settings=similarity, protocol=protocol)

    return score


def _copy_similarity(
    profile: Profile, table: pd.DataFrame, before: np.ndarray, after: np.ndarray, *, device: torch.device
) -> dict[str, np.ndarray]:
    """Return the columns of `deactivation` that compare images."""
    encoder = copy_encoder(profile, device=device)
    known = pd.concat([select(profile, kind) for kind in table["kind"].unique()])
    rows = known.set_index("caption").loc[table["prompt"]].reset_index()
    planted = planted_features(encoder, profile, rows)
    features = {name: image_features(encoder, profile, item) for name, item in (("before", before), ("after", after))}
    similar = {
        **{f"copy_{name}": metrics.sscd_orig(item, planted) for name, item in features.items()},
        "same_seed": metrics.sscd_gen(features["after"], features["before"]),
        **{f"seeds_{name}": metrics.d_sscd(item) for name, item in features.items()},
    }
    return {name: metrics.over_seeds(values) for name, values in similar.items()}


def _common_words(captions: Sequence[str]) -> str:
    """Return the words of at least half of the captions, the most frequent first, such as ``"card (3), edition (3)"``."""
    counted = Counter(word for caption in captions for word in dict.fromkeys(caption.split()))
    repeated = [(word, number) for word, number in counted.most_common() if number > 1 and 2 * number >= len(captions)]
    return ", ".join(f"{word} ({number})" for word, number in repeated)
