"""Notebook 05 in functions, first half: the ablations of Table 4, and the duplication ladder.

What takes long is kept in ``build/<profile>/store``; see `nemolib.experiments`. Searches with several thresholds share what
they evaluate (`nemolib.variants`); images of equal neuron sets are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nemolib import experiments_localization as search
from nemolib import experiments_mitigation as mitigation
from nemolib import paper
from nemolib.checks import Row, claim, comparison
from nemolib.experiments import holdout_scores, images, model_hash, open_store, statistics, threshold
from nemolib.experiments_localization import neuron_sets
from nemolib.experiments_mitigation import METRICS, NONE
from nemolib.first_step import first_step
from nemolib.holdout import ActivationStatistics, memorization_threshold
from nemolib.localization import Localization, localization_table
from nemolib.mitigation import DeactivatedNeurons, Mitigation
from nemolib.pipeline import embed
from nemolib.profiles import Profile, load_profile
from nemolib.prompts import MEMORIZED, select
from nemolib.provenance import content_hash, science_hash
from nemolib.settings import DetectionSettings
from nemolib.tables import Grid
from nemolib.variants import Variant, localize_variants
from nemolib.workers import map_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

GUIDANCE, NO_REFINEMENT, NO_TOP_K = "guidance in detection", "no refinement", "no top-k"
"""Settings of Table 4 that are neither thresholds nor scaling factors."""

FACTORS = (0.75, 0.5, 0.25, -0.25, -0.5, -0.75, -1.0)
"""Scaling factors of Table 4; its default is 0."""

LADDER_COLUMNS = (
    "caption", "copies", "initial_count", "neuron_count", "reached", "score_before", "score_after", "copy_before",
    "copy_after",
)  # fmt: skip
"""Columns of `ladder_table`."""


def compared_prompts(profile: Profile | str, number: int | None = None) -> pd.DataFrame:
    """Return the prompts on which the ablations are made: the first VM and the first TM prompts.

    Args:
        profile: A profile or its name.
        number: How many of each kind, at least 1; None means all.

    Returns:
        Rows of the prompt tables (see `nemolib.prompts.load_prompts`).

    Raises:
        ValueError: The number is below 1.
    """
    if number is not None and number < 1:
        raise ValueError(f"number is {number}; at least one prompt of each kind is needed")
    return pd.concat([select(profile, kind)[:number] for kind in MEMORIZED], ignore_index=True)


def threshold_levels(pipe: StableDiffusionPipeline, profile: Profile | str, *, progress: bool = True) -> pd.DataFrame:
    """Return the memorization thresholds of Table 4 and the profile's own, the lowest first.

    Source: Table 4.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        progress: Whether to show a progress bar.

    Returns:
        Columns level (name), multiplier (of the standard deviation), threshold, default (whether it is the profile's). A
        threshold that the profile gives is named by its value, such as ``tau = 0.4``; the others are computed from the
        threshold prompts.
    """
    profile = load_profile(profile)
    own, given = float(profile.thresholds.multiplier), profile.thresholds.value
    rows = []
    for multiplier in sorted({own, *paper.thresholds()["multiplier"]}):
        chosen = None if multiplier == own else multiplier
        value = threshold(pipe, profile, multiplier=chosen, progress=progress)
        name = f"tau = {given:g}" if given is not None and chosen is None else level_name(multiplier)
        rows.append((name, multiplier, value, multiplier == own))
    table = pd.DataFrame(rows, columns=["level", "multiplier", "threshold", "default"])
    return table.sort_values("threshold", kind="stable", ignore_index=True)


def level_name(multiplier: float) -> str:
    """Return what a threshold is called, such as ``mean + 1 sd``."""
    return "mean" if multiplier == 0 else f"mean {'-' if multiplier < 0 else '+'} {abs(multiplier):g} sd"


def guided_threshold(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    *,
    guidance: float | None = None,
    prompts: int | None = None,
    progress: bool = True,
) -> float:
    """Return the memorization threshold of a detection with classifier-free guidance, by the profile's own rule.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        guidance: Guidance scale; None means that of the generation.
        prompts: How many threshold prompts, from the top; None means all.
        progress: Whether to show a progress bar.
    """
    profile = load_profile(profile)
    scale = profile.generation.guidance if guidance is None else guidance
    scores = holdout_scores(pipe, profile, guidance=scale, limit=prompts, progress=progress)
    return memorization_threshold(scores, multiplier=profile.thresholds.multiplier, protocol=profile.protocol)


def setting_name(level: str, *, levels: pd.DataFrame) -> str:
    """Return what Table 4 calls a threshold: ``default (...)`` if it is the profile's."""
    (default,) = levels.loc[levels["level"] == level, "default"]
    return f"default ({level})" if default else f"threshold {level}"


def default_setting(levels: pd.DataFrame) -> str:
    """Return what Table 4 calls the profile's own threshold."""
    (level,) = levels.loc[levels["default"], "level"]
    return setting_name(level, levels=levels)


def threshold_pairs(levels: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Return the cells of Fig. 14 and 15: thresholds of initial selection and of refinement, up to the profile's own.

    Args:
        levels: What `threshold_levels` returned.

    Returns:
        Setting, level of the initial selection, level of the refinement, which is not lower.
    """
    highest = int(levels.index[levels["default"]][0])
    names = levels["level"].iloc[: highest + 1]
    return [
        (setting_name(low, levels=levels) if low == high else f"initial {low}, refinement {high}", low, high)
        for low, high in combinations_with_replacement(names, 2)
    ]


def variants_of(levels: pd.DataFrame) -> list[Variant]:
    """Return the searches of Table 4 and of Fig. 14 and 15, but for the default, which notebook 03 made.

    Args:
        levels: What `threshold_levels` returned.
    """
    values = levels.set_index("level")["threshold"]
    pairs = {name: (low, high) for name, low, high in threshold_pairs(levels)}
    pairs |= {setting_name(level, levels=levels): (level, level) for level in levels["level"]}
    own = pairs.pop(default_setting(levels))[0]
    found = [Variant(name, float(values[low]), float(values[high])) for name, (low, high) in pairs.items()]
    return [*found, Variant(NO_TOP_K, float(values[own]), float(values[own]), top_k=False)]


def ablated(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    prompts: pd.DataFrame,
    levels: pd.DataFrame,
    *,
    guidance: float | None = None,
    guided: float | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Return the memorization neurons of prompts for every search of Table 4 and of Fig. 14 and 15.

    The default is that of notebook 03, from the store if it is there. All other thresholds are searched together, with
    the gate of the default: the same seeds take part in all of them, and what would repeat the default is not searched.
    With guidance in detection the gate is the guided threshold. Finished prompts come from the store.

    Source: Table 4, Fig. 14, 15.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        prompts: Rows of the prompt tables (`compared_prompts`).
        levels: What `threshold_levels` returned.
        guidance: Guidance scale of the row with guidance in detection; None means that of the generation.
        guided: Threshold with this guidance (`guided_threshold`); None computes it from all threshold prompts.
        progress: Whether to show progress bars.

    Returns:
        One row per setting and prompt: columns setting, kind, initial_threshold, refinement_threshold, gate, then those
        of `nemolib.localization.localization_table`. Evaluations are those that were not shared with other settings.
    """
    profile = load_profile(profile)
    own, name = float(levels.loc[levels["default"], "threshold"].iloc[0]), default_setting(levels)
    scale = profile.generation.guidance if guidance is None else guidance
    if guided is None:
        guided = guided_threshold(pipe, profile, guidance=scale, progress=progress)
    known = search.searches(pipe, profile, prompts["caption"].tolist(), progress=progress)
    default = localization_table(known).assign(
        setting=name, kind=prompts["kind"].to_numpy(), initial_threshold=own, refinement_threshold=own, gate=own
    )
    with_guidance = replace(profile.detection, guidance=float(scale))
    parts = [
        default,
        _variant_table(pipe, profile, prompts, variants_of(levels), gate=own, known=known, progress=progress),
        _variant_table(
            pipe,
            profile,
            prompts,
            [Variant(GUIDANCE, guided, guided)],
            gate=guided,
            detection=with_guidance,
            progress=progress,
        ),
    ]
    first = ["setting", "kind", "initial_threshold", "refinement_threshold", "gate"]
    table = pd.concat(parts, ignore_index=True)
    return table[[*first, *(column for column in table if column not in first)]]


def ablation_settings(
    found: pd.DataFrame, levels: pd.DataFrame, *, factors: Sequence[float] = FACTORS
) -> dict[str, list[Mitigation | None]]:
    """Return every setting of Table 4 in the paper's order, then the cells of Fig. 14 and 15 that it does not have.

    Args:
        found: What `ablated` returned.
        levels: What `threshold_levels` returned.
        factors: Scaling factors besides 0 and 1.

    Returns:
        For each setting a list of one mitigation, as `nemolib.experiments_mitigation.measured` takes it; None is the
        untouched model. A factor scales the neurons of the default.
    """
    own = default_setting(levels)
    sets = {setting: DeactivatedNeurons(_by_prompt(part)) for setting, part in found.groupby("setting", sort=False)}
    thresholds = [setting_name(level, levels=levels) for level in levels["level"]]
    settings: dict[str, Mitigation | None] = {
        NONE: None,
        own: sets[own],
        GUIDANCE: sets[GUIDANCE],
        **{name: sets[name] for name in thresholds if name != own},
        NO_REFINEMENT: DeactivatedNeurons(_by_prompt(found[found["setting"] == own], "initial")),
        NO_TOP_K: sets[NO_TOP_K],
        **{f"factor {factor:g}": DeactivatedNeurons(sets[own].neurons, float(factor)) for factor in factors},
    }
    return {
        name: [item] for name, item in (settings | {name: sets[name] for name in sets if name not in settings}).items()
    }


def table_4(values: pd.DataFrame, levels: pd.DataFrame, *, resamples: int = 2000) -> pd.DataFrame:
    """Return Table 4: median, median absolute deviation and interval over prompts, with the paper's medians beside.

    Source: Table 4.

    Args:
        values: What `nemolib.experiments_mitigation.measured` returned for `ablation_settings`.
        levels: What `threshold_levels` returned.
        resamples: Resamples of the bootstrap interval.

    Returns:
        One row per setting and kind, columns as of `nemolib.experiments_mitigation.table_1`; the first setting is the
        untouched model.
    """
    cells = {name for name, low, high in threshold_pairs(levels) if low != high}
    chosen = values[~values["setting"].isin(cells)]
    return mitigation.table_1(chosen, reported=_reported(levels), resamples=resamples)


def scaling_table(table: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Return similarity and alignment against the scaling factor, from -1 to 1.

    Source: Fig. 5b, Table 4.

    Args:
        table: What `table_4` returned.
        levels: What `threshold_levels` returned.

    Returns:
        Rows of Table 4 in the order of the factor, with the columns kind, factor, prompts, then each metric as there;
        factor 1 is the untouched model, 0 the default.
    """
    factors = {NONE: 1.0, default_setting(levels): 0.0}
    factors |= {name: float(name.split()[1]) for name in table["setting"] if name.startswith("factor ")}
    chosen = table[table["setting"].isin(factors)]
    chosen = chosen.assign(factor=chosen["setting"].map(factors)).sort_values(["kind", "factor"], kind="stable")
    columns = [name for name in chosen if name.startswith(METRICS)]
    return chosen[["kind", "factor", "prompts", *columns]].reset_index(drop=True)


def scaling_grid(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    found: pd.DataFrame,
    *,
    factors: Sequence[float] = (1.0, 0.5, 0.25, 0.0, -1.0),
    progress: bool = False,
) -> Grid:
    """Return images of one prompt whose neurons are scaled, all of the same seeds.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        found: Localizations; the first one is shown.
        factors: Scaling factors; 1 is the untouched model.
        progress: Whether to show progress bars.

    Returns:
        A row for each factor, a column for each seed.
    """
    prompt, neurons = found["prompt"].iloc[0], neuron_sets(found.head(1))[0]
    made = []
    for factor in factors:
        chosen = {} if factor == 1 else {"neurons": neurons, "factor": factor}
        made.append(images(pipe, profile, [prompt], progress=progress, **chosen)[0])
    seeds = tuple(f"seed {number}" for number in range(len(made[0])))
    return Grid(np.stack(made), tuple(f"factor {factor:g}" for factor in factors), seeds)


def threshold_map(found: pd.DataFrame, values: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Return Fig. 14 and 15 as a table: each pair of thresholds of initial selection and refinement.

    Source: Fig. 14, 15.

    Args:
        found: What `ablated` returned.
        values: What `nemolib.experiments_mitigation.measured` returned for `ablation_settings`.
        levels: What `threshold_levels` returned.

    Returns:
        One row per kind and pair: columns kind, initial, refinement (names of the thresholds), initial_threshold,
        refinement_threshold, prompts, reached (number of prompts whose initial selection came to its threshold), then
        medians over prompts: initial_neurons, neurons (after refinement), sscd_gen,
        sscd_orig, and the same with the suffix ``_paper`` (missing where the paper has no such pair).
    """
    names = ["initial_neurons", "neurons", "sscd_gen", "sscd_orig"]
    reported = paper.threshold_maps().set_index(["kind", "initial", "refinement"])
    limits = levels.set_index("level")
    rows = []
    for kind in [kind for kind in MEMORIZED if kind in set(found["kind"])]:
        for setting, low, high in threshold_pairs(levels):
            searched = found[(found["kind"] == kind) & (found["setting"] == setting)]
            seen = values[(values["kind"] == kind) & (values["setting"] == setting)]
            medians = (searched["initial_count"], searched["neuron_count"], seen["sscd_gen"], seen["sscd_orig"])
            place = (kind, *limits.loc[[low, high], "multiplier"])
            theirs = reported.loc[place] if place in reported.index else {}
            row = {"kind": kind, "initial": low, "refinement": high}
            row |= {"initial_threshold": limits.loc[low, "threshold"]}
            row |= {"refinement_threshold": limits.loc[high, "threshold"]}
            row |= {"prompts": len(searched), "reached": int(searched["reached"].sum())}
            row |= {name: float(column.median()) for name, column in zip(names, medians, strict=True)}
            rows.append(row | {f"{name}_paper": float(theirs.get(name, np.nan)) for name in names})
    first = ["kind", "initial", "refinement", "initial_threshold", "refinement_threshold", "prompts", "reached"]
    return pd.DataFrame(rows)[[*first, *names, *(f"{name}_paper" for name in names)]]


def ladder_table(
    pipe: StableDiffusionPipeline, profile: Profile | str, *, per_rung: int | None = None, progress: bool = True
) -> pd.DataFrame:
    """Return neurons, memorization score and copy similarity of the prompts of the duplication ladder.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        per_rung: How many prompts of each number of copies, from the top; None means all.
        progress: Whether to show progress bars.

    Returns:
        One row per prompt, `LADDER_COLUMNS`: score and copy similarity (median over seeds) with all neurons active and
        with those of the prompt deactivated; no rows if the profile has no ladder. A prompt that fails the gate has no
        neurons.
    """
    profile = load_profile(profile)
    prompts = select(profile, "ladder").sort_values("copies", kind="stable")
    if per_rung is not None:
        prompts = prompts.groupby("copies", sort=False).head(per_rung)
    if prompts.empty:
        return pd.DataFrame(columns=list(LADDER_COLUMNS))
    found = search.localizations(pipe, profile, prompts=prompts, progress=progress)
    change = search.deactivation(pipe, profile, found, kinds=("ladder",), progress=progress)
    columns = {"caption": prompts["caption"].tolist(), "copies": prompts["copies"].tolist()}
    return change.assign(**columns, initial_count=found["initial_count"])[list(LADDER_COLUMNS)]


def ladder_medians(table: pd.DataFrame) -> pd.DataFrame:
    """Return the medians of each rung: columns copies, prompts, and those of `ladder_table` that are numbers.

    Args:
        table: What `ladder_table` returned.
    """
    names = [name for name in LADDER_COLUMNS if name not in ("caption", "copies", "reached")]
    # A table without rows has no types.
    grouped = table.astype(dict.fromkeys(names, float)).groupby("copies")
    return pd.concat([grouped.size().rename("prompts"), grouped[names].median()], axis=1).reset_index()


def ladder_ranks(table: pd.DataFrame) -> pd.Series:
    """Return the rank correlation of each quantity of the ladder with the number of copies (Spearman).

    Args:
        table: What `ladder_table` returned.

    Returns:
        Values in [-1, 1] for neuron_count, score_before, score_after, copy_before, copy_after; missing where a quantity is
        the same for all prompts, or there are none.
    """
    names = ["neuron_count", "score_before", "score_after", "copy_before", "copy_after"]
    ranks = table[["copies", *names]].astype(float).rank()
    with np.errstate(invalid="ignore", divide="ignore"):
        return ranks[names].corrwith(ranks["copies"])


def ablation_claims(table: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Return what the paper's Table 4 says, and whether ours says the same.

    Each rule was fixed from the paper's table, in which it holds. A claim that does not hold here is no error: it is a
    result about another model.

    Args:
        table: What `table_4` returned.
        levels: What `threshold_levels` returned.

    Returns:
        Columns claim, kind, rule, paper and ours (the numbers that the rule compares), verdict (``holds``, ``does not
        hold``, or ``no value`` where a number is missing).
    """
    order = [name for name, multiplier in _thresholds(levels).items() if multiplier in _PAPER_LEVELS]
    rows = []
    for kind in [kind for kind in MEMORIZED if kind in set(table["kind"])]:
        ours, theirs = (_cells(table, kind, suffix) for suffix in ("", "_paper"))
        for text, kinds, rule, numbers, holds in _CLAIMS:
            if kind not in kinds:
                continue
            found, reported = (numbers(_Cells(part, default_setting(levels), order)) for part in (ours, theirs))
            verdict = "holds" if holds(*found) else "does not hold"
            verdict = "no value" if np.isnan(found).any() else verdict
            rows.append((text, kind, rule, _shown(reported), _shown(found), verdict))
    return pd.DataFrame(rows, columns=["claim", "kind", "rule", "paper", "ours", "verdict"])


def checks_of(
    found: pd.DataFrame, values: pd.DataFrame, table: pd.DataFrame, levels: pd.DataFrame, *, rounding: float = 1e-4
) -> list[Row]:
    """Return what must hold for any model if the ablations are fair ones, and our numbers beside the paper's.

    Args:
        found: What `ablated` returned.
        values: What `nemolib.experiments_mitigation.measured` returned.
        table: What `table_4` returned.
        levels: What `threshold_levels` returned.
        rounding: How far a score that is evaluated twice may differ (`nemolib.checks.rounding`).
    """
    searched = found[found["memorized"]]
    pairs = zip(neuron_sets(searched), neuron_sets(searched, "initial"), strict=True)
    excess = searched["refined_score"] - searched[["refinement_threshold", "initial_score"]].max(axis=1)
    growing = found[found["setting"].isin(_thresholds(levels))].sort_values("initial_threshold", kind="stable")
    rise = growing.groupby("prompt")["initial_count"].diff().max()
    own = default_setting(levels)
    scaled = values[values["setting"].str.startswith("factor ") | (values["setting"] == own)]
    prompts = int(found["prompt"].nunique())
    rows = [
        claim(
            "every setting has every prompt", int(values.groupby("setting")["prompt"].nunique().min()), equals=prompts
        ),
        claim(
            "every refined set lies within its initial selection", all(not kept - initial for kept, initial in pairs)
        ),
        claim(
            "a higher threshold never gives a larger initial selection",
            0.0 if np.isnan(rise) else float(rise),
            at_most=0,
            reason="it ends earlier in the same schedule, whose selections only grow",
        ),
        claim(
            "refinement never ends above the threshold it was given",
            float(excess.max()) if len(excess) else 0.0,
            at_most=rounding,
            reason="a score that is evaluated twice may differ in the last digits",
        ),
        claim(
            "all factors scale the same neurons",
            int(scaled.groupby("prompt")["neurons"].nunique().max()),
            equals=1,
        ),
    ]
    reason = "another model, another number of neurons per layer"
    for _, row in table[table["setting"] == own].iterrows():
        text, reported = f"{row['kind'].upper()}: neurons per prompt, median", paper.reported(f"neurons.{row['kind']}")
        rows.append(comparison(text, row["neurons"], paper=reported, reason=reason))
    return rows


def findings(table: pd.DataFrame, claims: pd.DataFrame, ladder: pd.DataFrame, levels: pd.DataFrame) -> str:
    """Return what was found, in sentences with their numbers (Markdown).

    Args:
        table: What `table_4` returned.
        claims: What `ablation_claims` returned.
        ladder: What `ladder_table` returned.
        levels: What `threshold_levels` returned.
    """
    own, lines = default_setting(levels), []
    order = list(_thresholds(levels))
    for kind in dict.fromkeys(table["kind"]):
        rows = table[table["kind"] == kind].set_index("setting")
        orig, counts = rows["sscd_orig"], rows["neurons"]
        scaled = {name.split()[1]: orig[name] for name in rows.index if name.startswith("factor ")}
        lines += [
            f"- **{kind.upper()}, thresholds** from {levels['level'].iloc[0]} to {levels['level'].iloc[-1]}: {', '.join(f'{counts[name]:g}' for name in order)} neurons (median), copy "
            f"similarity {', '.join(_number(orig[name]) for name in order)} (all neurons active: {_number(orig[NONE])}). With guidance in "
            f"detection {counts[GUIDANCE]:g} neurons and {_number(orig[GUIDANCE])}.",
            f"- **{kind.upper()}, parts of the search**: without refinement {counts[NO_REFINEMENT]:g} neurons in place of "
            f"{counts[own]:g} and a copy similarity of {_number(orig[NO_REFINEMENT])} in place of {_number(orig[own])}; without the most "
            f"active neurons of each layer {counts[NO_TOP_K]:g} neurons and {_number(orig[NO_TOP_K])}.",
        ]
        if scaled:
            shown = ", ".join(f"{_number(value)} at {name}" for name, value in scaled.items())
            lines.append(f"- **{kind.upper()}, scaling** in place of deactivating: copy similarity {shown}.")
    for kind, part in claims.groupby("kind", sort=False):
        failed = part.loc[part["verdict"] == "does not hold", "claim"].tolist()
        lines.append(
            f"- **Claims of the paper's Table 4, {kind.upper()}**: {int((part['verdict'] == 'holds').sum())} of {len(part)} hold"
            + (f"; not: {'; '.join(failed)}." if failed else ".")
        )
    return "\n".join([*lines, _ladder_finding(ladder)])


def _ladder_finding(table: pd.DataFrame) -> str:
    if table.empty:
        return "- **Duplication ladder**: this profile has none."
    medians, ranks = ladder_medians(table), ladder_ranks(table)
    first, last = medians.iloc[0], medians.iloc[-1]
    without = table.loc[table["neuron_count"] == 0, "copies"]
    return (
        f"- **Duplication ladder**, {first['copies']:g} to {last['copies']:g} copies: {first['neuron_count']:g} to "
        f"{last['neuron_count']:g} neurons, memorization score {first['score_before']:.2f} to {last['score_before']:.2f}, copy "
        f"similarity {_number(first['copy_before'])} to {_number(last['copy_before'])}, without the neurons "
        f"{_number(first['copy_after'])} to {_number(last['copy_after'])} (medians of the lowest and the highest rung); rank correlation "
        f"of copies and neurons {_number(ranks['neuron_count'])}. {len(without)} of {len(table)} prompts have no neurons"
        + (f", up to {without.max():g} copies." if len(without) else ".")
    )


def _variant_table(
    pipe: StableDiffusionPipeline,
    profile: Profile,
    prompts: pd.DataFrame,
    variants: Sequence[Variant],
    *,
    gate: float,
    detection: DetectionSettings | None = None,
    known: Sequence[Localization] | None = None,
    progress: bool,
) -> pd.DataFrame:
    """Return the localizations of every variant and prompt; they are kept in the store.

    Known searches, one for each prompt, have this gate and detection: variants that would repeat them are not searched.
    """
    normal = statistics(pipe, profile, progress=False)
    settings = {
        "variants": list(variants),
        "gate": gate,
        "detection": detection or profile.detection,
        "similarity": profile.similarity,
        "search": profile.search,
        "protocol": profile.protocol,
    }
    base = content_hash([model_hash(pipe), list(normal.mean), list(normal.std), settings, science_hash("variants")])
    keys = {prompt: content_hash([base, prompt]) for prompt in prompts["caption"]}
    store = open_store(profile, "ablations")
    shared = dict(zip(keys, known or [None] * len(keys), strict=True))
    computed = map_prompts(
        _varying,
        [((prompt, shared[prompt]),) for prompt, key in keys.items() if key not in store],
        pipe=pipe,
        common={"statistics": normal, "settings": settings},
        label="searches",
        progress=progress,
    )
    for ((prompt, _),), records in computed:
        store.put(keys[prompt], records)
    parts = []
    for variant in variants:
        records = [store.get(key)[variant.name] for key in keys.values()]
        limits = {"initial_threshold": variant.initial, "refinement_threshold": variant.refinement, "gate": gate}
        table = localization_table([Localization.from_record(record) for record in records])
        parts.append(table.assign(setting=variant.name, kind=prompts["kind"].to_numpy(), **limits))
    return pd.concat(parts, ignore_index=True)


def _varying(
    pipe: StableDiffusionPipeline, *, statistics: ActivationStatistics, settings: Mapping[str, Any]
) -> Callable[[tuple[tuple[str, Localization | None]]], dict[str, Any]]:
    """Return what computes the records of a prompt, by variant."""
    chosen = dict(settings)
    step = first_step(pipe, settings=chosen.pop("detection"), protocol=chosen["protocol"])
    variants = chosen.pop("variants")

    def localize_all(batch: tuple[tuple[str, Localization | None]]) -> dict[str, Any]:
        ((prompt, known),) = batch
        embedding = embed(pipe, [prompt])
        found = localize_variants(step, embedding, statistics, variants, prompt=prompt, known=known, **chosen)
        return {name: item.to_record() for name, item in found.items()}

    return localize_all


def _by_prompt(table: pd.DataFrame, column: str = "neurons") -> dict[str, Any]:
    """Return the neuron set of each prompt of one setting."""
    return dict(zip(table["prompt"], neuron_sets(table, column), strict=True))


def _thresholds(levels: pd.DataFrame) -> dict[str, float]:
    """Return the multiplier of each threshold by its setting, the lowest first."""
    names = [setting_name(level, levels=levels) for level in levels["level"]]
    return dict(zip(names, levels["multiplier"], strict=True))


_PAPER_LEVELS = {-1.0: "threshold 0.288", 0.0: "threshold 0.358", 1.0: "default (0.428)", 2.0: "threshold 0.498"}
"""What the paper's Table 4 calls the thresholds, by multiplier of the standard deviation."""


def _reported(levels: pd.DataFrame) -> pd.DataFrame:
    """Return the paper's Table 4 with our names of the settings, and the untouched model of its Table 1."""
    known = {name: multiplier for name, multiplier in _thresholds(levels).items() if multiplier in _PAPER_LEVELS}
    names = {_PAPER_LEVELS[multiplier]: name for name, multiplier in known.items()}
    renamed = paper.table_4().replace({"setting": names | {"guidance 7 in detection": GUIDANCE}})
    untouched = paper.table_1()
    return pd.concat([untouched[untouched["setting"] == NONE], renamed], ignore_index=True)


def _cells(table: pd.DataFrame, kind: str, suffix: str) -> pd.DataFrame:
    """Return neurons and metrics of a kind by setting: ours, or with suffix ``_paper`` the paper's."""
    rows, names = table[table["kind"] == kind].set_index("setting"), ("neurons", *METRICS)
    return rows[[f"{name}{suffix}" for name in names]].set_axis(names, axis=1)


class _Cells:
    """What a rule of `_CLAIMS` reads.

    Args:
        rows: Neurons and metrics by setting.
        default: Setting of the default.
        thresholds: Settings of the thresholds that the paper has, the lowest first.
    """

    def __init__(self, rows: pd.DataFrame, default: str, thresholds: Sequence[str]) -> None:
        self._rows, self.default, self.thresholds = rows, default, list(thresholds)

    def __call__(self, setting: str, column: str = "sscd_orig") -> float:
        """Return a cell; missing if there is no such setting."""
        return float(self._rows[column].get(setting, np.nan))

    def of_thresholds(self, column: str) -> list[float]:
        """Return a column along the thresholds."""
        return [self(setting, column) for setting in self.thresholds]

    def negative(self) -> list[float]:
        """Return the copy similarities of the negative factors; one that is missing if there are none."""
        names = [name for name in self._rows.index if name.startswith("factor -")]
        return [self(name) for name in names] or [np.nan]


def _falls(*values: float) -> bool:
    """Return whether values never rise and end lower than they began."""
    return all(later <= earlier for earlier, later in zip(values, values[1:], strict=False)) and values[-1] < values[0]


def _shown(numbers: Sequence[float]) -> str:
    """Return numbers of neurons or similarities as text."""
    return ", ".join("–" if np.isnan(number) else f"{round(number, 2):g}" for number in numbers)


def _number(value: float) -> str:
    """Return a similarity as text."""
    return "–" if np.isnan(value) else f"{value:.2f}"


_CLAIMS = (
    (
        "a higher threshold gives fewer neurons",
        MEMORIZED,
        "neurons: never more from one threshold to the next, and fewer at the end (the thresholds, the lowest first)",
        lambda c: c.of_thresholds("neurons"),
        _falls,
    ),
    (
        "every threshold removes copies",
        ("vm",),
        "SSCD_Orig: less than half stays at every threshold (untouched, the thresholds)",
        lambda c: [c(NONE), *c.of_thresholds("sscd_orig")],
        lambda none, *others: max(others) < none / 2,
    ),
    (
        "guidance in detection gives no more neurons",
        MEMORIZED,
        "neurons: not more than the default (guidance, default)",
        lambda c: [c(GUIDANCE, "neurons"), c(c.default, "neurons")],
        lambda guided, default: guided <= default,
    ),
    (
        "refinement leaves less than half of the neurons",
        MEMORIZED,
        "neurons: default below half of the initial selection (default, no refinement)",
        lambda c: [c(c.default, "neurons"), c(NO_REFINEMENT, "neurons")],
        lambda default, initial: default < initial / 2,
    ),
    (
        "refinement does not bring copies back",
        ("vm",),
        "SSCD_Orig: the default lies above the initial selection by at most a tenth of what that removes (untouched, default, "
        "no refinement)",
        lambda c: [c(NONE), c(c.default), c(NO_REFINEMENT)],
        lambda none, default, initial: default - initial <= 0.1 * (none - initial),
    ),
    (
        "without top-k there are more neurons",
        MEMORIZED,
        "neurons: more than the default (no top-k, default)",
        lambda c: [c(NO_TOP_K, "neurons"), c(c.default, "neurons")],
        lambda without, default: without > default,
    ),
    (
        "without top-k images change less",
        MEMORIZED,
        "SSCD_Gen: above the default (no top-k, default)",
        lambda c: [c(NO_TOP_K, "sscd_gen"), c(c.default, "sscd_gen")],
        lambda without, default: without > default,
    ),
    (
        "half of the activation is enough for a copy",
        ("vm",),
        "SSCD_Orig: more than half stays at factor 0.75 and at 0.5 (untouched, 0.75, 0.5)",
        lambda c: [c(NONE), c("factor 0.75"), c("factor 0.5")],
        lambda none, *others: min(others) > none / 2,
    ),
    (
        "a quarter of it is not",
        ("vm",),
        "SSCD_Orig: less than half stays at factor 0.25 (untouched, 0.25)",
        lambda c: [c(NONE), c("factor 0.25")],
        lambda none, quarter: quarter < none / 2,
    ),
    (
        "negative factors do what 0 does",
        ("vm",),
        "SSCD_Orig: no negative factor is further from factor 0 than a tenth of what that removes (untouched, 0, the negative "
        "factors)",
        lambda c: [c(NONE), c(c.default), *c.negative()],
        lambda none, zero, *others: max(abs(value - zero) for value in others) <= 0.1 * (none - zero),
    ),
)
"""Claim, kinds of prompts that it is about, rule in words, the numbers that it compares, and the rule."""
