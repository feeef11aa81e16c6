"""Notebook 05, sections 1 to 4: the ablations of Table 4, and neurons along the duplication ladder.

Searches of one prompt with several thresholds share what they evaluate (`nemolib.localization.varying`), and images of
equal neuron sets are made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from nemolib import paper, plots
from nemolib.exhibits import Claim, exhibit, must, of_kinds
from nemolib.experiments import deactivate_neurons as deactivate
from nemolib.experiments.deactivate_neurons import LEFT, METRICS, NONE, Rule, listed, share
from nemolib.experiments.localize_neurons import deactivation, localizations, search_claims
from nemolib.localization import Localization, Variant, by_prompt, localization_table, varying
from nemolib.mitigation import DeactivatedNeurons, Mitigation
from nemolib.plots import ROLES
from nemolib.prompts import MEMORIZED

if TYPE_CHECKING:
    from nemolib.run import Run

NOTEBOOK = "05_ablations"

GUIDANCE, NO_REFINEMENT, NO_TOP_K = "guidance in detection", "no refinement", "no top-k"
"""Settings of Table 4 that are neither thresholds nor scaling factors."""

FACTORS = (0.75, 0.5, 0.25, -0.25, -0.5, -0.75, -1.0)
"""Scaling factors of Table 4 besides that of the default, 0, and that of the untouched model, 1."""

PAPER_LEVELS = {-1.0: "threshold 0.288", 0.0: "threshold 0.358", 1.0: "default (0.428)", 2.0: "threshold 0.498"}
"""What the paper's Table 4 calls the thresholds, by multiplier of the standard deviation."""

LADDER = ("neuron_count", "score_before", "score_after", "copy_before", "copy_after")
"""Quantities of the duplication ladder."""


# Searches (Table 4)


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
        prompts: Rows of prompt tables.
        levels: What `threshold_levels` returned.

    Returns:
        One row per setting and prompt: columns setting, kind, initial_threshold, refinement_threshold, gate, then those
        of `nemolib.localization.localization_table`. Evaluations are those that were not shared with other settings.
    """
    profile, captions, guidance = run.profile, prompts["caption"].tolist(), float(run.profile.generation.guidance)
    own, guided = run.threshold, run.threshold_at(guidance=guidance)
    # Seconds differ from run to run, and what is known has a part in the key.
    known = [replace(item, seconds={}) for item in run.search(captions)]
    alone, detection = [Variant(GUIDANCE, guided, guided)], replace(profile.detection, guidance=guidance)
    searches = (own, variants_of(levels), known, profile.detection), (guided, alone, [None] * len(known), detection)
    common = {name: getattr(profile, name) for name in ("similarity", "search", "protocol")}
    common |= {"statistics": run.statistics}
    found = [(Variant(default_setting(levels), own, own), own, known)]
    for gate, variants, given, detection in searches:
        items, common = list(zip(captions, given, strict=True)), common | {"gate": gate, "detection": detection}
        rows = run.compute(varying, items, label="searches", together=run.searches, variants=variants, **common)
        found += [(item, gate, [Localization.from_record(row[item.name]) for row in rows]) for item in variants]
    parts = []
    for item, gate, searched in found:
        limits = {"initial_threshold": item.initial, "refinement_threshold": item.refinement, "gate": gate}
        known = pd.DataFrame({"setting": item.name, "kind": prompts["kind"].to_numpy(), **limits})
        parts.append(known.join(localization_table(searched)))
    return pd.concat(parts, ignore_index=True)


def fair(run: Run, found: pd.DataFrame, levels: pd.DataFrame) -> Iterator[Claim]:
    """Yield what must hold for any model if the searches are right.

    Args:
        run: The run.
        found: What `ablated` returned.
        levels: What `threshold_levels` returned.
    """
    yield from search_claims(run, found, found["refinement_threshold"])
    growing = found[found["setting"].isin(setting_names(levels).values())]
    growing = growing.sort_values("initial_threshold", kind="stable")
    more = growing.groupby("prompt")["initial_count"].diff().max()
    why = "it ends earlier in the same schedule, whose selections only grow"
    yield must("a higher threshold never gives a larger initial selection", more, at_most=0, reason=why)


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


def ablation_medians(values: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Return Table 4: median, median absolute deviation and interval over prompts, with the paper's medians beside.

    Source: Table 4.

    Args:
        values: The metrics of `ablation_settings`.
        levels: What `threshold_levels` returned.

    Returns:
        One row per setting and kind, columns as of `nemolib.experiments.deactivate_neurons.medians`; the first setting
        is the untouched model.
    """
    cells = [setting for setting, low, high in threshold_pairs(levels) if low != high]
    return deactivate.medians(values[~values["setting"].isin(cells)], reported=reported(levels))


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
        table: What `ablation_medians` returned.
        levels: What `threshold_levels` returned.

    Returns:
        Rows of Table 4 in the order of the factor, with the columns kind, factor, prompts, then each metric as there;
        factor 1 is the untouched model, 0 the default.
    """
    factors = {NONE: 1.0, default_setting(levels): 0.0} | {f"factor {factor:g}": factor for factor in FACTORS}
    chosen = table[table["setting"].isin(factors)]
    chosen = chosen.assign(factor=chosen["setting"].map(factors))
    chosen = chosen.sort_values(["kind", "factor"], ascending=[False, True], kind="stable")
    columns = [name for name in chosen if name.startswith(METRICS)]
    return chosen[["kind", "factor", "prompts", *columns]].reset_index(drop=True)


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
    names, by = ["initial_neurons", "neurons", "sscd_gen", "sscd_orig"], ["setting", "kind"]
    counts = {"initial_neurons": ("initial_count", "median"), "neurons": ("neuron_count", "median")}
    searched = found.groupby(by).agg(prompts=("prompt", "size"), reached=("reached", "sum"), **counts)
    cells = searched.join(values.groupby(by)[["sscd_gen", "sscd_orig"]].median()).reset_index()
    pairs = pd.DataFrame(threshold_pairs(levels), columns=["setting", "initial", "refinement"])
    table = pd.concat([pairs.merge(cells[cells["kind"] == kind], on="setting") for kind in MEMORIZED])
    limits, theirs = levels.set_index("level"), paper.table("threshold_maps")
    for name in ("initial", "refinement"):
        table[f"{name}_threshold"] = table[name].map(limits["threshold"])
        theirs[name] = theirs[name].map(dict(zip(levels["multiplier"], levels["level"], strict=True)))
    table = table.merge(theirs, on=["kind", "initial", "refinement"], how="left", suffixes=("", "_paper"))
    first = ["kind", "initial", "refinement", "initial_threshold", "refinement_threshold", "prompts", "reached"]
    return table[[*first, *names, *(f"{name}_paper" for name in names)]]


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


# What the paper's tables and figures say, and ours


def rules(levels: pd.DataFrame) -> list[Rule]:
    """Return what the paper's Table 4 says of thresholds and of the parts of the method, with our names of the settings."""
    own = default_setting(levels)
    names = zip(setting_names(levels).values(), levels["multiplier"], strict=True)
    thresholds = [name for name, multiplier in names if multiplier in PAPER_LEVELS]
    return [
        Rule("a higher threshold gives fewer neurons", "neurons", (thresholds[0], thresholds[-1]),
             lambda low, high: share(high, low), "number at the highest threshold, divided by that at the lowest",
             {"at_most": 0.75}, MEMORIZED),
        Rule("every threshold removes copies of VM prompts", "sscd_orig", (NONE, *thresholds),
             lambda none, *rest: share(max(rest), none), f"{LEFT} at any threshold", {"at_most": 0.5}),
        Rule("guidance in detection gives fewer neurons", "neurons", (own, GUIDANCE),
             lambda default, guided: share(guided, default), "number divided by that of the default", {"at_most": 0.9}, MEMORIZED),
        Rule("refinement leaves less than half of the neurons", "neurons", (NO_REFINEMENT, own),
             lambda initial, default: share(default, initial), "share of the initial selection that stays", {"at_most": 0.5},
             MEMORIZED),
        Rule("refinement does not bring copies back", "sscd_orig", (NONE, own, NO_REFINEMENT),
             lambda none, default, initial: share(default - initial, none - initial),
             "what comes back, as a share of what the initial selection removes", {"at_most": 0.1}),
        Rule("without top-k there are more neurons", "neurons", (own, NO_TOP_K), lambda default, without: share(without, default),
             "number divided by that of the default", {"at_least": 1.25}, MEMORIZED),
        Rule("without top-k images change less", "sscd_gen", (own, NO_TOP_K), lambda default, without: without - default,
             "SSCD_Gen above that of the default", {"at_least": 0.05}, MEMORIZED),
    ]  # fmt: skip


def read_table_4(table_4: pd.DataFrame, ablation_levels: pd.DataFrame) -> Iterator[Claim]:
    """Yield what the paper's Table 4 says, and whether ours says the same."""
    return deactivate.read_rules(table_4, rules(ablation_levels))


def factor_rules(levels: pd.DataFrame) -> list[Rule]:
    """Return what the paper's Fig. 5b says; its numbers are those of its Table 4."""
    negative = [f"factor {factor:g}" for factor in FACTORS if factor < 0]
    return [
        Rule("half of the activation is enough for a copy", "sscd_orig", (NONE, "factor 0.5", "factor 0.75"),
             lambda none, *rest: share(min(rest), none), f"{LEFT} with 0.75 and 0.5 of it", {"at_least": 0.5}),
        Rule("a quarter of it is not", "sscd_orig", (NONE, "factor 0.25"), lambda none, quarter: share(quarter, none), LEFT,
             {"at_most": 0.5}),
        Rule("negative factors do what 0 does", "sscd_orig", (NONE, *negative, default_setting(levels)),
             lambda none, *rest: share(max(abs(value - rest[-1]) for value in rest), none - rest[-1]),
             "largest distance to factor 0, the default, as a share of what that removes", {"at_most": 0.1}),
    ]  # fmt: skip


def read_5b(table_4: pd.DataFrame, ablation_levels: pd.DataFrame) -> Iterator[Claim]:
    """Yield where the copy breaks when neurons are scaled."""
    return deactivate.read_rules(table_4, factor_rules(ablation_levels))


def read_14(threshold_map: pd.DataFrame) -> Iterator[Claim]:
    """Yield how many candidates each threshold selects; whether a higher one leaves fewer neurons is Table 4's."""
    for kind, part in threshold_map.drop_duplicates(["kind", "initial"]).groupby("kind", sort=False):
        rows = part.sort_values("initial_threshold")
        reached = "it came down to the lowest for {} of {} prompts".format(*rows.iloc[0][["reached", "prompts"]])
        ours, theirs = f"{listed(rows['initial_neurons'])} ({reached})", listed(rows["initial_neurons_paper"])
        yield Claim(f"{kind.upper()}: neurons of the initial selection, thresholds from low to high", ours, theirs)


def read_15(threshold_map: pd.DataFrame, table_4: pd.DataFrame) -> Iterator[Claim]:
    """Yield how similar images of VM prompts are with any pair of thresholds; whether copies go is Table 4's."""
    untouched = of_kinds(table_4, "table_4", "vm")["vm"].set_index("setting").loc[NONE, "sscd_orig"]
    ends = threshold_map[threshold_map["kind"] == "vm"][["sscd_orig", "sscd_orig_paper"]].agg(["min", "max"])
    ours, theirs = (" to ".join(listed([end]) for end in ends[name]) for name in ends)
    yield Claim(f"VM, SSCD_Orig of all pairs (all neurons active: {listed([untouched])})", ours, theirs)


def read_ladder(neuron_ladder: pd.DataFrame) -> Iterator[Claim]:
    """Yield what more copies in training do; the paper has no ladder."""
    medians = neuron_ladder.groupby("copies")[list(LADDER)].median()
    change = {name: f"{listed([column.iloc[0]])} to {listed([column.iloc[-1]])}" for name, column in medians.items()}
    rank = neuron_ladder[["copies", "neuron_count"]].corr(method="spearman").loc["copies", "neuron_count"]
    ours = (f"{change['neuron_count']} neurons (rank correlation {listed([rank])}), memorization score {change['score_before']}, "
            f"copy similarity {change['copy_before']}, without the neurons {change['copy_after']}")  # fmt: skip
    yield Claim(f"from {medians.index[0]:g} to {medians.index[-1]:g} copies in training, medians", ours)
    none = neuron_ladder.loc[neuron_ladder["neuron_count"] == 0, "copies"]
    up_to = f", up to {none.max():g} copies" if len(none) else ""
    yield Claim("prompts of the duplication ladder without neurons", f"{len(none)} of {len(neuron_ladder)}{up_to}")


# Figures and tables


@exhibit("Table 4", "what each part of the method contributes", read=read_table_4)
def table_4(table_4: pd.DataFrame) -> pd.DataFrame:
    """Median ± median absolute deviation over prompts, in brackets the paper's, columns as in Table 1.

    Thresholds: that of the initial selection and of the refinement; the same seeds take part in all of them. No
    refinement: the initial selection alone. No top-k: without the most active neurons of each layer. Factors scale
    the neurons of the default. The paper's guidance is 7, ours that of the generation.
    """
    return deactivate.shown_table(table_4)


@exhibit("", "Table 4 as a figure", deactivate.AS_FIGURE)
def table_4_figure(table_4: pd.DataFrame) -> plots.Figure:
    return deactivate.settings_figure(table_4)


@exhibit("Figure 5b", "similarity and alignment against the scaling factor", read=read_5b)
def figure_5b(scaling: pd.DataFrame) -> plots.Figure:
    """Filled: ours, median over prompts, the band is its 95 % bootstrap interval. Hollow: the paper's Table 4."""
    with plots.panels(1, 3, aspect=0.42, legend=2) as (figure, axes):
        for place, metric in zip(axes, ("sscd_orig", "sscd_gen", "a_clip"), strict=True):
            for kind, rows in scaling.groupby("kind", sort=False):
                plots.along(place, rows, "factor", metric, ROLES[kind])
            place.set(title=plots.METRICS[metric], xticks=[-1, -0.5, 0, 0.5, 1])
            place.grid(axis="y", alpha=0.4)
        axes[1].set_xlabel("factor (1: all neurons active, 0: deactivated)")
    return figure


@exhibit("Figure 14", "neurons for each pair of thresholds", read=read_14)
def figure_14(threshold_map: pd.DataFrame) -> plots.Figure:
    """Medians over prompts.

    First column: the initial selection; the others: what refinement leaves of it. In brackets the paper's.
    """
    return _maps(threshold_map, ["neurons"], "{:g}", LogNorm(1, max(10, threshold_map["initial_neurons"].max())))


@exhibit("Figure 15", "similarity for each pair of thresholds", read=read_15)
def figure_15(threshold_map: pd.DataFrame) -> plots.Figure:
    """Medians over prompts of SSCD_Gen (to the untouched model's image of the same seed) and SSCD_Orig (to the planted image).

    In brackets the paper's, with another descriptor.
    """
    metrics = ["sscd_gen", "sscd_orig"]
    return _maps(threshold_map, metrics, "{:.2f}", Normalize(0, max(0.2, threshold_map[metrics].max(axis=None))))


def _maps(table: pd.DataFrame, columns: list[str], pattern: str, norm: Normalize) -> plots.Figure:
    """Return a panel for each column and kind, all of one scale; left of those of neurons the initial selection."""
    parts = list(table.groupby("kind", sort=False))
    size = {"aspect": 0.14 + 0.31 * len(columns), "sharex": True, "sharey": True, "squeeze": False}
    with plots.panels(len(columns), len(parts), **size) as (figure, axes):
        for row, column in zip(axes, columns, strict=True):
            initial = "initial_neurons" if column == "neurons" else ""
            for place, (kind, rows) in zip(row, parts, strict=True):
                ours, theirs = (_square(rows, column, initial=initial, end=end) for end in ("", "_paper"))
                _draw_map(place, ours, theirs, pattern, norm)
                name = plots.METRICS.get(column, "neurons")
                place.set_title(f"{ROLES[kind].label}: {name}, n = {rows['prompts'].max()}")
        bar = figure.colorbar(axes.flat[0].collections[0], ax=axes, aspect=25, pad=0.02)
        bar.set_label("neurons (log scale)" if columns == ["neurons"] else "similarity")
    return figure


def _square(rows: pd.DataFrame, column: str, *, initial: str, end: str) -> pd.DataFrame:
    """Return a column by both thresholds, missing where there is no pair; before it a column of the initial selection."""
    levels = list(dict.fromkeys(rows["initial"]))
    wide = rows.pivot(index="initial", columns="refinement", values=f"{column}{end}")
    wide = wide.reindex(index=levels, columns=levels)
    if initial:
        wide.insert(0, "not refined", rows.drop_duplicates("initial").set_index("initial")[f"{initial}{end}"])
    short = {name: plots.minus(name.replace("mean ", "mean\n").replace("not ", "not\n")) for name in [*levels, *wide]}
    return wide.rename(index=short, columns=short)


def _draw_map(axes: Axes, ours: pd.DataFrame, theirs: pd.DataFrame, pattern: str, norm: Normalize) -> None:
    """Draw ours in colours and as text, below it the paper's in brackets if it is known; thresholds are named once."""
    texts = ours.map(pattern.format) + theirs.map(lambda value: "" if np.isnan(value) else f"\n({value:g})")
    # No neurons have no logarithm: they are drawn as the fewest.
    plots.heat_map(axes, ours.clip(lower=norm.vmin), texts, norm=norm)
    axes.tick_params(labelsize=plots.TICK_SIZE - 0.5)
    place = axes.get_subplotspec()
    axes.set_xlabel("refinement threshold" if place.is_last_row() else "")
    axes.set_ylabel("initial threshold" if place.is_first_col() else "")


@exhibit("", "neurons, score and copies against copies in training", read=read_ladder)
def show_neuron_ladder(neuron_ladder: pd.DataFrame, ablation_levels: pd.DataFrame) -> plots.Figure:
    """Points: prompts; lines: medians of the rungs.

    A prompt below the threshold is not searched and has no neurons.
    """
    looks = ("ladder", "all neurons active"), ("deactivated", "neurons of the prompt deactivated")
    titles = {"neurons": LADDER[:1], "memorization score": LADDER[1:3], "copy similarity": LADDER[3:]}
    with plots.panels(1, 3, aspect=0.42, legend=3) as (figure, axes):
        for place, (title, names) in zip(axes, titles.items(), strict=True):
            for name, (look, label) in zip(names, looks, strict=False):
                plots.rungs(place, neuron_ladder, name, look=ROLES[look], label=label)
            place.set_title(title)
        axes[0].set_ylim(bottom=0)
        axes[0].yaxis.set_major_locator(MaxNLocator(5, integer=True))
        (limit,) = ablation_levels.loc[ablation_levels["default"], "threshold"]
        plots.threshold(axes[1], limit, horizontal=True)
        axes[1].set_xlabel(f"copies in training (regular caption = 1), n = {len(neuron_ladder)} prompts")
    return figure
