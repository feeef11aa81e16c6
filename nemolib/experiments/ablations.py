"""Notebook 05, sections 1 to 4: the ablations of Table 4, and neurons along the duplication ladder.

Searches of one prompt with several thresholds share what they evaluate (`nemolib.localization.varying`), and images of
equal neuron sets are made once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemolib import paper, plots
from nemolib.exhibits import Claim, exhibit, must, of_kinds, rounding
from nemolib.experiments.deactivate_neurons import METRICS, NAMES, NONE, shown_table, table_1
from nemolib.experiments.localize_neurons import deactivation, localizations
from nemolib.localization import Localization, Variant, by_prompt, localization_table, neuron_sets, varying
from nemolib.mitigation import DeactivatedNeurons, Mitigation
from nemolib.plots import ROLES
from nemolib.prompts import MEMORIZED
from nemolib.store import Grid

if TYPE_CHECKING:
    from nemolib.run import Run

NOTEBOOK = "05_ablations"

GUIDANCE, NO_REFINEMENT, NO_TOP_K = "guidance in detection", "no refinement", "no top-k"
"""Settings of Table 4 that are neither thresholds nor scaling factors."""

FACTORS = (0.75, 0.5, 0.25, -0.25, -0.5, -0.75, -1.0)
"""Scaling factors of Table 4 besides that of the default, 0, and that of the untouched model, 1."""

PAPER_LEVELS = {-1.0: "threshold 0.288", 0.0: "threshold 0.358", 1.0: "default (0.428)", 2.0: "threshold 0.498"}
"""What the paper's Table 4 calls the thresholds, by multiplier of the standard deviation."""

LIMITS = ("setting", "kind", "initial_threshold", "refinement_threshold", "gate")
"""Columns of `ablated` before those of a localization."""

LADDER = ("neuron_count", "score_before", "score_after", "copy_before", "copy_after")
"""Quantities of the duplication ladder."""


# Searches (Table 4)


def compared_prompts(run: Run) -> pd.DataFrame:
    """Return the prompts on which the ablations are made: the first VM and TM prompts, as many as the extent says."""
    parts = [run.prompts(kind).head(run.profile.extent.ablated) for kind in MEMORIZED]
    return pd.concat(parts, ignore_index=True)


def threshold_levels(run: Run) -> pd.DataFrame:
    """Return the memorization thresholds of Table 4 and the profile's own, the lowest first.

    Source: Table 4.

    Returns:
        Columns level (name), multiplier (of the standard deviation), threshold, default (whether it is the profile's). A
        threshold that the profile gives is named by its value, such as ``tau = 0.4``; the others are computed from the
        threshold prompts.
    """
    own, given, rows = float(run.profile.thresholds.multiplier), run.profile.thresholds.value, []
    for multiplier in sorted({own, *paper.table("thresholds")["multiplier"]}):
        is_own = multiplier == own
        sign = "mean" if multiplier == 0 else f"mean {'-' if multiplier < 0 else '+'} {abs(multiplier):g} sd"
        name = sign if given is None or not is_own else f"tau = {given:g}"
        rows.append((name, multiplier, run.threshold if is_own else run.threshold_at(multiplier), is_own))
    table = pd.DataFrame(rows, columns=["level", "multiplier", "threshold", "default"])
    return table.sort_values("threshold", kind="stable", ignore_index=True)


def setting_names(levels: pd.DataFrame) -> dict[str, str]:
    """Return what Table 4 calls each threshold: ``default (...)`` if it is the profile's."""
    names = zip(levels["level"], levels["default"], strict=True)
    return {level: f"default ({level})" if default else f"threshold {level}" for level, default in names}


def default_setting(levels: pd.DataFrame) -> str:
    """Return what Table 4 calls the profile's own threshold."""
    (level,) = levels.loc[levels["default"], "level"]
    return setting_names(levels)[level]


def threshold_pairs(levels: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Return the cells of Fig. 14 and 15, up to the profile's own threshold.

    Returns:
        Setting, level of the initial selection, level of the refinement, which is not lower.
    """
    names, highest = setting_names(levels), int(levels.index[levels["default"]][0])
    return [
        (names[low] if low == high else f"initial {low}, refinement {high}", low, high)
        for low, high in combinations_with_replacement(levels["level"].iloc[: highest + 1], 2)
    ]


def variants_of(levels: pd.DataFrame) -> list[Variant]:
    """Return the searches of Table 4 and of Fig. 14 and 15, but for the default, which notebook 03 made."""
    values = levels.set_index("level")["threshold"].astype(float).to_dict()
    pairs = {setting: (low, high) for setting, low, high in threshold_pairs(levels)}
    pairs |= {setting: (level, level) for level, setting in setting_names(levels).items()}
    own = values[pairs.pop(default_setting(levels))[0]]
    found = [Variant(setting, values[low], values[high]) for setting, (low, high) in pairs.items()]
    return [*found, Variant(NO_TOP_K, own, own, top_k=False)]


def ablated(run: Run, prompts: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Return the memorization neurons of prompts for every search of Table 4 and of Fig. 14 and 15.

    The default is that of notebook 03. All other thresholds are searched together, with its gate: the same seeds take
    part in all of them, and what would repeat the default is not searched. With the guidance of the generation in
    detection, threshold and gate are computed anew from holdout scores with this guidance.

    Source: Table 4, Fig. 14, 15.

    Args:
        run: The run.
        prompts: Rows of prompt tables (`compared_prompts`).
        levels: What `threshold_levels` returned.

    Returns:
        One row per setting and prompt: columns setting, kind, initial_threshold, refinement_threshold, gate, then those
        of `nemolib.localization.localization_table`. Evaluations are those that were not shared with other settings.
    """
    profile, captions, guidance = run.profile, prompts["caption"].tolist(), float(run.profile.generation.guidance)
    own, guided = run.threshold, run.threshold_at(guidance=guidance)
    # Seconds differ from run to run, and what is known has a part in the key.
    known = [replace(item, seconds={}).to_record() for item in run.search(captions)]
    with_guidance = (
        [Variant(GUIDANCE, guided, guided)],
        [None] * len(known),
        replace(profile.detection, guidance=guidance),
    )
    common = {name: getattr(profile, name) for name in ("similarity", "search", "protocol")}
    found = [(Variant(default_setting(levels), own, own), own, known)]
    for gate, (variants, given, detection) in (
        (own, (variants_of(levels), known, profile.detection)),
        (guided, with_guidance),
    ):
        common |= {"statistics": run.statistics, "variants": variants, "gate": gate, "detection": detection}
        rows = run.compute(varying, list(zip(captions, given, strict=True)), label="searches", **common)
        found += [(item, gate, [row[item.name] for row in rows]) for item in variants]
    parts = []
    for item, gate, records in found:
        limits = {"initial_threshold": item.initial, "refinement_threshold": item.refinement, "gate": gate}
        table = localization_table([Localization.from_record(record) for record in records])
        parts.append(table.assign(setting=item.name, kind=prompts["kind"].to_numpy(), **limits))
    table = pd.concat(parts, ignore_index=True)
    return table[[*LIMITS, *(column for column in table if column not in LIMITS)]]


def fair(run: Run, found: pd.DataFrame, values: pd.DataFrame, levels: pd.DataFrame) -> Iterator[Claim]:
    """Yield what must hold for any model if the ablations are fair ones.

    Args:
        run: The run.
        found: What `ablated` returned.
        values: The metrics of `ablation_settings`.
        levels: What `threshold_levels` returned.
    """
    searched = found[found["memorized"]]
    pairs = zip(neuron_sets(searched), neuron_sets(searched, "initial"), strict=True)
    excess = searched["refined_score"] - searched[["refinement_threshold", "initial_score"]].max(axis=1)
    growing = found[found["setting"].isin(setting_names(levels).values())]
    growing = growing.sort_values("initial_threshold", kind="stable")
    scaled = values[values["setting"].str.startswith("factor ") | (values["setting"] == default_setting(levels))]
    prompts, fewest = found["prompt"].nunique(), values.groupby("setting")["prompt"].nunique().min()
    yield must("every setting has every prompt", fewest, equals=prompts)
    yield must("every refined set of the ablations lies within its initial selection", all(not kept - initial for kept, initial in pairs))  # fmt: skip
    yield must(
        "a higher threshold never gives a larger initial selection",
        growing.groupby("prompt")["initial_count"].diff().max(),
        at_most=0,
        reason="it ends earlier in the same schedule, whose selections only grow",
    )
    yield must(
        "refinement never ends above the threshold of its setting",
        excess.max() if len(excess) else 0.0,
        at_most=rounding(run.pipe.unet.dtype),
        reason="a score that is evaluated twice may differ in the last digits",
    )
    yield must("all factors scale the same neurons", scaled.groupby("prompt")["neurons"].nunique().max(), equals=1)


# Images (Table 4, Fig. 5b)


def ablation_settings(found: pd.DataFrame, levels: pd.DataFrame) -> dict[str, list[Mitigation | None]]:
    """Return every setting of Table 4 in the paper's order, then the cells of Fig. 14 and 15 that it does not have.

    Args:
        found: What `ablated` returned.
        levels: What `threshold_levels` returned.

    Returns:
        For each setting a list of one mitigation, as `nemolib.experiments.deactivate_neurons.measured` takes it; None is
        the untouched model. A factor scales the neurons of the default.
    """
    own = default_setting(levels)
    sets = {setting: DeactivatedNeurons(by_prompt(part)) for setting, part in found.groupby("setting", sort=False)}
    order = [own, GUIDANCE, *setting_names(levels).values()]
    settings: dict[str, Mitigation | None] = {NONE: None} | {name: sets[name] for name in order}
    settings[NO_REFINEMENT] = DeactivatedNeurons(by_prompt(found[found["setting"] == own], "initial"))
    settings[NO_TOP_K] = sets[NO_TOP_K]
    settings |= {f"factor {factor:g}": DeactivatedNeurons(sets[own].neurons, factor) for factor in FACTORS}
    return {name: [item] for name, item in (settings | sets).items()}


def table_4(values: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Return Table 4: median, median absolute deviation and interval over prompts, with the paper's medians beside.

    Source: Table 4.

    Args:
        values: The metrics of `ablation_settings`.
        levels: What `threshold_levels` returned.

    Returns:
        One row per setting and kind, columns as of `nemolib.experiments.deactivate_neurons.table_1`; the first setting is
        the untouched model.
    """
    cells = [setting for setting, low, high in threshold_pairs(levels) if low != high]
    return table_1(values[~values["setting"].isin(cells)], reported=reported(levels))


def reported(levels: pd.DataFrame) -> pd.DataFrame:
    """Return the paper's Table 4 with our names of the settings, and the untouched model of its Table 1."""
    names, settings = {"guidance 7 in detection": GUIDANCE}, setting_names(levels)
    for level, multiplier in zip(levels["level"], levels["multiplier"], strict=True):
        names |= {PAPER_LEVELS[multiplier]: settings[level]} if multiplier in PAPER_LEVELS else {}
    untouched = paper.table("table_1").query("setting == @NONE")
    return pd.concat([untouched, paper.table("table_4").replace({"setting": names})], ignore_index=True)


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
    factors = {NONE: 1.0, default_setting(levels): 0.0} | {f"factor {factor:g}": factor for factor in FACTORS}
    chosen = table[table["setting"].isin(factors)]
    chosen = chosen.assign(factor=chosen["setting"].map(factors)).sort_values(["kind", "factor"], kind="stable")
    columns = [name for name in chosen if name.startswith(METRICS)]
    return chosen[["kind", "factor", "prompts", *columns]].reset_index(drop=True)


def scaling_grid(run: Run, found: pd.DataFrame) -> Grid:
    """Return images of the first prompt of a table, a row for each factor by which its neurons are scaled."""
    (prompt, neurons), *_ = by_prompt(found).items()
    factors = (1.0, 0.5, 0.25, 0.0, -1.0)
    made = [run.images([prompt], DeactivatedNeurons(neurons, factor) if factor != 1 else None)[0] for factor in factors]
    seeds = tuple(f"seed {number}" for number in range(len(made[0])))
    return Grid(np.stack(made), tuple(f"factor {factor:g}" for factor in factors), seeds)


# Two thresholds (Fig. 14, 15)


def threshold_map(found: pd.DataFrame, values: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Return Fig. 14 and 15 as a table: each pair of thresholds of initial selection and refinement.

    Source: Fig. 14, 15.

    Args:
        found: What `ablated` returned.
        values: The metrics of `ablation_settings`.
        levels: What `threshold_levels` returned.

    Returns:
        One row per kind and pair: columns kind, initial, refinement (names of the thresholds), initial_threshold,
        refinement_threshold, prompts, reached (number of prompts whose initial selection came to its threshold), then
        medians over prompts: initial_neurons, neurons (after refinement), sscd_gen, sscd_orig, and the same with the
        suffix ``_paper`` (missing where the paper has no such pair).
    """
    reported, limits = (
        paper.table("threshold_maps").set_index(["kind", "initial", "refinement"]),
        levels.set_index("level"),
    )
    names, rows = ("initial_neurons", "neurons", "sscd_gen", "sscd_orig"), []
    for kind in [kind for kind in MEMORIZED if kind in set(found["kind"])]:
        for setting, low, high in threshold_pairs(levels):
            searched, seen = (
                table[(table["kind"] == kind) & (table["setting"] == setting)] for table in (found, values)
            )
            counts = searched[["initial_count", "neuron_count"]].median(), seen[["sscd_gen", "sscd_orig"]].median()
            initial, refinement = limits.loc[low], limits.loc[high]
            place = (kind, initial["multiplier"], refinement["multiplier"])
            theirs = reported.loc[place, list(names)] if place in reported.index else [np.nan] * len(names)
            thresholds = (initial["threshold"], refinement["threshold"])
            searches = (len(searched), int(searched["reached"].sum()))
            rows.append((kind, low, high, *thresholds, *searches, *pd.concat(counts), *theirs))
    first = ["kind", "initial", "refinement", "initial_threshold", "refinement_threshold", "prompts", "reached"]
    return pd.DataFrame(rows, columns=[*first, *names, *(f"{name}_paper" for name in names)])


# The duplication ladder


def neuron_ladder(run: Run, per_rung: int) -> pd.DataFrame:
    """Return neurons, memorization score and copy similarity of prompts of the duplication ladder.

    Args:
        run: The run.
        per_rung: How many prompts of each number of copies, from the top.

    Returns:
        One row per prompt, columns caption, copies, initial_count, neuron_count, reached, score_before, score_after,
        copy_before, copy_after: score and copy similarity (median over seeds) with all neurons active and with those of
        the prompt deactivated; no rows if the profile has no ladder. A prompt that fails the gate has no neurons.
    """
    columns = ["caption", "copies", "initial_count", LADDER[0], "reached", *LADDER[1:]]
    prompts = run.prompts("ladder").sort_values("copies", kind="stable").groupby("copies", sort=False).head(per_rung)
    if prompts.empty:
        return pd.DataFrame(columns=columns)
    prompts = prompts.reset_index(drop=True)
    found = localizations(run, prompts)
    change = deactivation(run, found, kinds=("ladder",))
    return change.assign(**prompts[["caption", "copies"]], initial_count=found["initial_count"])[columns]


def ladder_medians(table: pd.DataFrame) -> pd.DataFrame:
    """Return the medians of each rung: columns copies, prompts, and those of `neuron_ladder` that are numbers."""
    names = ["initial_count", *LADDER]
    # A table without rows has no types.
    grouped = table.astype(dict.fromkeys(names, float)).groupby("copies")
    return pd.concat([grouped.size().rename("prompts"), grouped[names].median()], axis=1).reset_index()


def ladder_rank(table: pd.DataFrame) -> float:
    """Return Spearman's rank correlation of copies and neurons; missing where either is the same for all prompts."""
    ranks = table[["copies", "neuron_count"]].astype(float).rank()
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(ranks["copies"].corr(ranks["neuron_count"]))


# What the paper's tables and figures say, and ours

DEFAULT, THRESHOLDS, NEGATIVE = "default", "thresholds", "negative factors"
"""What stands in `RULES` for settings that other thresholds and factors call otherwise."""

RULES: tuple[tuple[str, Sequence[str], str, Sequence[str], Callable[..., bool], str], ...] = (
    ("a higher threshold gives fewer neurons", MEMORIZED, "neurons", [THRESHOLDS], lambda *counts: _falls(counts),
     "never more from one threshold to the next, and fewer at the end (the thresholds, the lowest first)"),
    ("every threshold removes copies", ["vm"], "sscd_orig", [NONE, THRESHOLDS], lambda none, *rest: max(rest) < none / 2,
     "less than half stays at every threshold (untouched, the thresholds)"),
    ("guidance in detection gives no more neurons", MEMORIZED, "neurons", [GUIDANCE, DEFAULT], operator.le,
     "not more than the default (guidance, default)"),
    ("refinement leaves less than half of the neurons", MEMORIZED, "neurons", [DEFAULT, NO_REFINEMENT],
     lambda default, initial: default < initial / 2,
     "default below half of the initial selection (default, no refinement)"),
    ("refinement does not bring copies back", ["vm"], "sscd_orig", [NONE, DEFAULT, NO_REFINEMENT],
     lambda none, default, initial: default - initial <= 0.1 * (none - initial),
     "the default lies above the initial selection by at most a tenth of what that removes (untouched, default, no refinement)"),
    ("without top-k there are more neurons", MEMORIZED, "neurons", [NO_TOP_K, DEFAULT], operator.gt,
     "more than the default (no top-k, default)"),
    ("without top-k images change less", MEMORIZED, "sscd_gen", [NO_TOP_K, DEFAULT], operator.gt,
     "above the default (no top-k, default)"),
    ("half of the activation is enough for a copy", ["vm"], "sscd_orig", [NONE, "factor 0.75", "factor 0.5"],
     lambda none, *rest: min(rest) > none / 2,
     "more than half stays at factor 0.75 and at 0.5 (untouched, 0.75, 0.5)"),
    ("a quarter of it is not", ["vm"], "sscd_orig", [NONE, "factor 0.25"], lambda none, quarter: quarter < none / 2,
     "less than half stays at factor 0.25 (untouched, 0.25)"),
    ("negative factors do what 0 does", ["vm"], "sscd_orig", [NONE, DEFAULT, NEGATIVE],
     lambda none, zero, *rest: max(abs(value - zero) for value in rest) <= 0.1 * (none - zero),
     "no negative factor is further from factor 0 than a tenth of what that removes (untouched, 0, the negative factors)"),
)  # fmt: skip
"""Claims of the paper's Table 4, in which they hold: kinds of prompts, column, the settings whose numbers are compared,
the rule, and the rule in words."""


def read_table_4_claims(table_4: pd.DataFrame, ablation_levels: pd.DataFrame) -> Iterator[Claim]:
    """Yield what the paper's Table 4 says, and whether ours says the same: `RULES`."""
    names = setting_names(ablation_levels)
    known = zip(names.values(), ablation_levels["multiplier"], strict=True)
    stand_for = {
        DEFAULT: [default_setting(ablation_levels)],
        THRESHOLDS: [name for name, multiplier in known if multiplier in PAPER_LEVELS],
        NEGATIVE: [f"factor {factor:g}" for factor in FACTORS if factor < 0],
    }
    for kind, part in table_4.groupby("kind", sort=False):
        for text, kinds, column, settings, holds, rule in RULES:
            if kind in kinds:
                chosen = [name for item in settings for name in stand_for.get(item, [item])]
                rows = part.set_index("setting").reindex(chosen)
                ours, theirs = rows[column], rows[f"{column}_paper"]
                held, rule = _if_known(holds(*ours), ours), f"{NAMES[column]}: {rule}"
                yield Claim(f"{kind.upper()}: {text}", _listed(ours), _listed(theirs), held, rule)


def table_4_claims(table: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Return `read_table_4_claims` as a table: columns claim, kind, rule, paper, ours, verdict.

    A claim that does not hold here is no error: it is a result about another model. Paper and ours are the numbers that
    the rule compares; where one of ours is missing nothing is compared.
    """
    said = [(*claim.text.split(": ", 1), claim) for claim in read_table_4_claims(table, levels)]
    rows = [(text, kind.lower(), claim.rule, claim.paper, claim.ours, claim.verdict) for kind, text, claim in said]
    return pd.DataFrame(rows, columns=["claim", "kind", "rule", "paper", "ours", "verdict"])


def read_table_4(table_4: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether every setting that switches neurons off removes copies of VM prompts."""
    rows = of_kinds(table_4, "table_4", "vm")["vm"].set_index("setting")[["sscd_orig", "sscd_orig_paper"]]
    positive = [f"factor {factor:g}" for factor in FACTORS if factor > 0]
    none, off = rows.loc[NONE], rows.drop(index=[NONE, *positive], errors="ignore")
    ours, theirs = (_listed([none[name], off[name].max()]) for name in rows)
    yield Claim(
        "VM, SSCD_Orig: all neurons active, and the largest of all searches and negative factors",
        ours,
        theirs,
        _if_known((off["sscd_orig"] < none["sscd_orig"] / 2).all(), [_half(none["sscd_orig"]), *off["sscd_orig"]]),
        "less than half stays with every search and every factor below 0; another descriptor, so not on one scale",
    )


def read_5b(scaling: pd.DataFrame) -> Iterator[Claim]:
    """Yield where the copy breaks when neurons are scaled."""
    vm = of_kinds(scaling, "scaling", "vm")["vm"].set_index("factor")
    chosen, off = vm.reindex([1, 0.5, 0, -1]), vm.loc[vm.index < 0, "sscd_orig"]
    whole, half, none, opposite = chosen["sscd_orig"]
    yield Claim(
        "VM, SSCD_Orig at the factors 1, 0.5, 0, -1",
        _listed(chosen["sscd_orig"]),
        _listed(chosen["sscd_orig_paper"]),
        _if_known(max(none, *off) < whole / 2 < half, [_half(whole), half, none, *off]),
        "more than half stays at 0.5, less than half at 0 and every negative factor; the paper's numbers are its Table 4's",
    )


def read_14(threshold_map: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether higher thresholds give fewer neurons, before and after refinement."""
    equal = threshold_map[threshold_map["initial"] == threshold_map["refinement"]].sort_values("initial_threshold")
    for kind, rows in equal.groupby("kind", sort=False):
        counts, lowest = [rows["initial_neurons"], rows["neurons"]], rows.iloc[0]
        yield Claim(
            f"{kind.upper()}: neurons, initial and refined, both thresholds from low to high",
            "; ".join(map(_listed, counts)),
            "; ".join(_listed(rows[f"{name}_paper"]) for name in ("initial_neurons", "neurons")),
            _if_known(all(map(_falls, counts)), pd.concat(counts)) if len(rows) > 1 else None,
            "both medians never rise from one threshold to the next, and end lower than they began; the initial selection "
            f"came to the lowest for {lowest['reached']} of {lowest['prompts']} prompts, for the others refinement starts "
            "from the score where it ended",
        )


def read_15(threshold_map: pd.DataFrame, table_4: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether every pair of thresholds removes copies of VM prompts."""
    untouched = of_kinds(table_4, "table_4", "vm")["vm"].set_index("setting").loc[NONE, "sscd_orig"]
    ends = threshold_map[threshold_map["kind"] == "vm"][["sscd_orig", "sscd_orig_paper"]].agg(["min", "max"])
    yield Claim(
        "VM, SSCD_Orig of all pairs, lowest and highest",
        _listed(ends["sscd_orig"]),
        _listed(ends["sscd_orig_paper"]),
        _if_known(ends.loc["max", "sscd_orig"] < untouched / 2, [_half(untouched), *ends["sscd_orig"]]),
        f"every pair removes more than half of the copy similarity (all neurons active: {_listed([untouched])})",
    )


def read_ladder(neuron_ladder: pd.DataFrame) -> Iterator[Claim]:
    """Yield what more copies in training do; the paper has no ladder."""
    medians, none = ladder_medians(neuron_ladder), neuron_ladder.loc[neuron_ladder["neuron_count"] == 0, "copies"]
    low, high = medians.iloc[0], medians.iloc[-1]
    change = {name: f"{_listed([low[name]])} to {_listed([high[name]])}" for name in LADDER}
    yield Claim(
        f"from {low['copies']:g} to {high['copies']:g} copies in training, medians",
        f"{change['neuron_count']} neurons (rank correlation {_listed([ladder_rank(neuron_ladder)])}), memorization score "
        f"{change['score_before']}, copy similarity {change['copy_before']}, without the neurons {change['copy_after']}",
    )
    up_to = f", up to {none.max():g} copies" if len(none) else ""
    yield Claim("prompts of the duplication ladder without neurons", f"{len(none)} of {len(neuron_ladder)}{up_to}")


def _falls(values: Sequence[float]) -> bool:
    """Return whether values never rise and end lower than they began."""
    values = list(values)
    return values == sorted(values, reverse=True) and values[-1] < values[0]


def _if_known(holds: bool, numbers: Sequence[float]) -> bool | None:
    """Return whether a rule holds; None where one of the numbers that it compares is missing."""
    return None if np.isnan(np.asarray(numbers, dtype=float)).any() else bool(holds)


def _half(similarity: float) -> float:
    """Return half of a copy similarity; missing where there is none that could fall."""
    return similarity / 2 if similarity > 0 else np.nan


def _listed(numbers: Sequence[float]) -> str:
    """Return numbers of neurons or similarities as text."""
    return ", ".join("–" if np.isnan(number) else f"{round(number, 2):g}" for number in numbers)


# Figures and tables


@exhibit(
    "Table 4", "what each part of the method contributes",
    "Median ± median absolute deviation over prompts, columns as in Table 1. Thresholds: that of the initial selection and of "
    "the refinement; the same seeds take part in all of them. No refinement: the initial selection alone. No top-k: without the "
    "most active neurons of each layer. Factors scale the neurons of the default. The paper's guidance is 7, ours that of the generation.",
    read=read_table_4,
)  # fmt: skip
def show_table_4(table_4: pd.DataFrame) -> pd.DataFrame:
    return shown_table(table_4)


@exhibit(
    "", "Table 4 as a figure",
    "Filled: ours, median over prompts with its 95 % bootstrap interval. Hollow: the paper's median, of another model.",
    read=read_table_4,
)  # fmt: skip
def table_4_figure(table_4: pd.DataFrame) -> Figure:
    height = 0.3 * table_4["setting"].nunique() + 0.9
    with plots.panels(1, len(METRICS), aspect=height / plots.TEXT_WIDTH, sharey=True) as (figure, axes):
        plots.intervals(figure, axes, table_4)
    return figure


@exhibit(
    "", "what the paper's Table 4 says",
    "Each rule holds in the paper's table. Numbers are those that the rule compares, in its order.",
    read=read_table_4_claims,
)  # fmt: skip
def show_table_4_claims(table_4_claims: pd.DataFrame) -> pd.DataFrame:
    return table_4_claims


@exhibit(
    "Figure 5b", "similarity and alignment against the scaling factor",
    "Filled: ours, median over prompts, the band is its 95 % bootstrap interval. Hollow: the paper's Table 4.",
    read=read_5b,
)  # fmt: skip
def figure_5b(scaling: pd.DataFrame) -> Figure:
    with plots.panels(1, 3, aspect=0.42) as (figure, axes):
        for place, metric in zip(axes, ("sscd_orig", "sscd_gen", "a_clip"), strict=True):
            for kind, rows in plots.of_kinds(scaling, MEMORIZED).items():
                plots.along(place, rows, "factor", metric, ROLES[kind])
            place.set(title=plots.METRICS[metric], xticks=[-1, -0.5, 0, 0.5, 1])
            place.grid(axis="y", alpha=0.4)
        axes[1].set_xlabel("factor (1: all neurons active, 0: deactivated)")
        plots.legend_below(figure)
    return figure


@exhibit(
    "Figure 14", "neurons for each pair of thresholds",
    "Medians over prompts. Left of the white line the initial selection, right what refinement leaves of it. In brackets the paper's.",
    read=read_14,
)  # fmt: skip
def figure_14(threshold_map: pd.DataFrame) -> Figure:
    parts = plots.of_kinds(threshold_map, MEMORIZED)
    with plots.panels(1, len(parts), aspect=0.45, sharey=True, squeeze=False) as (figure, axes):
        for place, (kind, rows) in zip(axes[0], parts.items(), strict=True):
            ours, theirs = (_square(rows, f"neurons{end}", initial=f"initial_neurons{end}") for end in ("", "_paper"))
            _draw_map(place, ours, theirs, "{:g}", LogNorm(1, max(10, ours.max(axis=None))))
            place.axvline(1, color="white", linewidth=2)
            place.set_title(f"{ROLES[kind].label}: neurons")
    return figure


@exhibit(
    "Figure 15", "similarity for each pair of thresholds",
    "Medians over prompts of SSCD_Gen (to the untouched model's image of the same seed) and SSCD_Orig (to the planted image). In "
    "brackets the paper's, with another descriptor.",
    read=read_15,
)  # fmt: skip
def figure_15(threshold_map: pd.DataFrame) -> Figure:
    parts = plots.of_kinds(threshold_map, MEMORIZED)
    with plots.panels(2, len(parts), aspect=0.72, sharex=True, sharey=True, squeeze=False) as (figure, axes):
        for row, metric in zip(axes, ("sscd_gen", "sscd_orig"), strict=True):
            for place, (kind, rows) in zip(row, parts.items(), strict=True):
                ours, theirs = (_square(rows, f"{metric}{end}") for end in ("", "_paper"))
                _draw_map(place, ours, theirs, "{:.2f}", Normalize(0, 1))
                place.set_title(f"{ROLES[kind].label}: {plots.METRICS[metric]}")
    return figure


def _square(rows: pd.DataFrame, column: str, *, initial: str = "") -> pd.DataFrame:
    """Return a column by both thresholds, missing where there is no pair; before it a column of the initial selection."""
    levels = list(dict.fromkeys(rows["initial"]))
    wide = rows.pivot(index="initial", columns="refinement", values=column).reindex(index=levels, columns=levels)
    if initial:
        wide.insert(0, "not refined", rows.drop_duplicates("initial").set_index("initial")[initial])
    short = {name: name.replace("mean ", "mean\n").replace("not ", "not\n") for name in [*levels, *wide]}
    return wide.rename(index=short, columns=short)


def _draw_map(axes: Axes, ours: pd.DataFrame, theirs: pd.DataFrame, pattern: str, norm: Normalize) -> None:
    """Draw ours in colours and as text, below it the paper's in brackets if it is known; thresholds are named once."""
    texts = ours.map(pattern.format) + theirs.map(lambda value: "" if np.isnan(value) else f"\n({value:g})")
    # No neurons have no logarithm: they are drawn as the fewest.
    plots.heat_map(axes, ours.clip(lower=norm.vmin), texts, norm=norm)
    place = axes.get_subplotspec()
    axes.set_xlabel("refinement threshold" if place.is_last_row() else "")
    axes.set_ylabel("initial threshold" if place.is_first_col() else "")


@exhibit(
    "", "neurons, score and copies against copies in training",
    "Points: prompts; lines: medians of the rungs. A prompt below the threshold is not searched and has no neurons.",
    read=read_ladder,
)  # fmt: skip
def show_neuron_ladder(neuron_ladder: pd.DataFrame, ablation_levels: pd.DataFrame) -> Figure:
    looks = ("ladder", "all neurons active"), ("deactivated", "neurons of the prompt deactivated")
    titles = {"neurons": LADDER[:1], "memorization score": LADDER[1:3], "copy similarity": LADDER[3:]}
    with plots.panels(1, 3, aspect=0.42) as (figure, axes):
        for place, (title, names) in zip(axes, titles.items(), strict=True):
            for name, (look, label) in zip(names, looks, strict=False):
                plots.rungs(place, neuron_ladder, name, look=ROLES[look], label=label)
            place.set_title(title)
        axes[0].set_ylim(bottom=0)
        axes[0].yaxis.set_major_locator(MaxNLocator(5, integer=True))
        (limit,) = ablation_levels.loc[ablation_levels["default"], "threshold"]
        plots.threshold(axes[1], limit, horizontal=True)
        axes[1].set_xlabel("copies in training (regular caption = 1)")
        plots.legend_below(figure)
    return figure
