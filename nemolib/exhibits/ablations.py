"""Exhibits of notebook 05, first half: Table 4, scaling factors, heat maps of thresholds, the duplication ladder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nemolib import experiments_ablations as science
from nemolib.exhibits.base import Exhibit, Reading, Sources, Verdict, of_kinds
from nemolib.experiments_ablations import GUIDANCE, NO_REFINEMENT, NO_TOP_K
from nemolib.experiments_mitigation import NONE, shown_table
from nemolib.figures import ablations

NOTEBOOK = "05_ablations"


def _verdict(holds: bool, numbers: Sequence[float]) -> Verdict:
    """Return whether a rule holds; nothing is compared where one of our numbers is missing."""
    if not len(numbers) or np.isnan(numbers).any():
        return "beside"
    return "agrees" if holds else "differs"


def _number(value: float, pattern: str = "{:.2f}") -> str:
    return "–" if np.isnan(value) else pattern.format(value)


def _half(similarity: float) -> float:
    """Return half of a copy similarity; missing where there is none that could fall."""
    return similarity / 2 if similarity > 0 else np.nan


def _vm(table: pd.DataFrame, index: str) -> pd.DataFrame:
    """Return the VM rows of a table by a column."""
    return table[table["kind"] == "vm"].set_index(index)


def _read_table_4(sources: Sources) -> Reading:
    rows, own = _vm(sources["table_4"], "setting"), science.default_setting(sources["ablation_levels"])
    off = [
        name for name in rows.index if name != NONE and (not name.startswith("factor ") or name.startswith("factor -"))
    ]
    texts = []
    for end in ("", "_paper"):
        cells = {NONE: NONE, "default": own, NO_REFINEMENT: NO_REFINEMENT, NO_TOP_K: NO_TOP_K, GUIDANCE: GUIDANCE}
        parts = [
            f"{name} {_number(rows.loc[row, f'neurons{end}'], '{:g}')} and {_number(rows.loc[row, f'sscd_orig{end}'])}"
            for name, row in cells.items()
        ]
        texts.append(f"VM, neurons and SSCD_Orig: {', '.join(parts)}")
    limit, others = _half(rows.loc[NONE, "sscd_orig"]), rows.loc[off, "sscd_orig"]
    return Reading(
        *texts,
        _verdict(bool((others < limit).all()), [limit, *others]),
        "agrees if every search and every factor below 0 removes more than half of the copy similarity of VM prompts; another "
        "descriptor, so not on one scale",
    )


def _read_claims(sources: Sources) -> Reading:
    claims = sources["table_4_claims"]
    held, failed = (claims["verdict"] == "holds").sum(), claims[claims["verdict"] == "does not hold"]
    names = [f"{claim} ({kind.upper()})" for claim, kind in zip(failed["claim"], failed["kind"], strict=True)]
    missing = [np.nan] * int((claims["verdict"] == "no value").sum())
    return Reading(
        f"{held} of {len(claims)} hold" + (f"; not: {', '.join(names)}" if names else ""),
        "all hold in the paper's Table 4",
        "differs" if names else _verdict(True, [1.0, *missing]),
        "the rules are in the table; the reasons are in notebook 05",
    )


def _read_5b(sources: Sources) -> Reading:
    rows = _vm(sources["scaling"], "factor")
    chosen = [1.0, 0.5, 0.0, -1.0]
    texts = [
        "VM, SSCD_Orig: "
        + ", ".join(f"{_number(rows[f'sscd_orig{end}'].get(factor, np.nan))} at {factor:g}" for factor in chosen)
        for end in ("", "_paper")
    ]
    whole, scaled, none = (float(rows["sscd_orig"].get(factor, np.nan)) for factor in (1.0, 0.5, 0.0))
    negative, limit = rows.loc[rows.index < 0, "sscd_orig"], _half(whole)
    holds = scaled > limit > none and bool((negative < limit).all())
    return Reading(
        *texts,
        _verdict(holds, [limit, scaled, none, *negative]),
        "agrees if more than half of the copy similarity stays at 0.5, and less than half at 0 and at every negative factor; the "
        "paper's numbers are those of its Table 4",
    )


def _diagonal(table: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of equal thresholds, the lowest first."""
    return table[table["initial"] == table["refinement"]].sort_values("initial_threshold", kind="stable")


def _read_14(sources: Sources) -> Reading:
    texts, falls, numbers = [[], []], [], []
    for kind, rows in _diagonal(sources["threshold_map"]).groupby("kind", sort=False):
        for text, end in zip(texts, ("", "_paper"), strict=True):
            counts = [
                ", ".join(_number(value, "{:g}") for value in rows[f"{name}{end}"])
                for name in ("initial_neurons", "neurons")
            ]
            text.append(f"{kind.upper()} {counts[0]} initial, {counts[1]} refined")
        for name in ("initial_neurons", "neurons"):
            values = rows[name].tolist()
            falls.append(values == sorted(values, reverse=True) and values[-1] < values[0])
            numbers += values
    missing = [] if len(sources["threshold_map"]["initial"].unique()) > 1 else [np.nan]
    lowest = sources["threshold_map"].query("initial_threshold == initial_threshold.min() and initial == refinement")
    return Reading(
        *("both thresholds from low to high: " + "; ".join(text) for text in texts),
        _verdict(all(falls), [*numbers, *missing]),
        "agrees if both medians never rise from one threshold to the next, and end lower than they began, for both kinds. The initial "
        f"selection came to the lowest threshold for {lowest['reached'].sum()} of {lowest['prompts'].sum()} prompts; for the others "
        "refinement starts from the score where it ended",
    )


def _read_15(sources: Sources) -> Reading:
    rows = sources["threshold_map"]
    rows = rows[rows["kind"] == "vm"]
    untouched = float(_vm(sources["table_4"], "setting").loc[NONE, "sscd_orig"])
    ours, theirs = ((rows[f"sscd_orig{end}"].min(), rows[f"sscd_orig{end}"].max()) for end in ("", "_paper"))
    return Reading(
        *(f"VM, SSCD_Orig of all pairs: {_number(low)} to {_number(high)}" for low, high in (ours, theirs)),
        _verdict(ours[1] < _half(untouched), [_half(untouched), *ours]),
        "agrees if every pair of thresholds removes more than half of the copy similarity of VM prompts "
        f"(all neurons active: {_number(untouched)})",
    )


def _read_ladder(sources: Sources) -> Reading:
    table = sources["neuron_ladder"]
    if table.empty:
        return Reading("this profile has no duplication ladder")
    medians, ranks = science.ladder_medians(table), science.ladder_ranks(table)
    first, last = medians.iloc[0], medians.iloc[-1]
    return Reading(
        f"from {first['copies']:g} to {last['copies']:g} copies: {first['neuron_count']:g} to {last['neuron_count']:g} neurons, copy "
        f"similarity {_number(first['copy_before'])} to {_number(last['copy_before'])}, with the neurons deactivated "
        f"{_number(first['copy_after'])} to {_number(last['copy_after'])}; rank correlation of copies and neurons "
        f"{_number(ranks['neuron_count'])}"
    )


TABLE_4 = Exhibit(
    "table_4", "Table 4", "what each part of the method contributes", NOTEBOOK,
    "Median ± median absolute deviation over prompts, columns as in Table 1. Thresholds: that of the initial selection and of "
    "the refinement; the same seeds take part in all of them. No refinement: the initial selection alone. No top-k: without the "
    "most active neurons of each layer. Factors scale the neurons of the default. The paper's guidance is 7, ours that of the generation.",
    lambda s: shown_table(s["table_4"]), _read_table_4, tables=("table_4", "ablation_levels"), needs=of_kinds("table_4", "vm"),
)  # fmt: skip

TABLE_4_FIGURE = Exhibit(
    "table_4_figure", "", "Table 4 as a figure", NOTEBOOK,
    "Filled: ours, median over prompts with its 95 % bootstrap interval. Hollow: the paper's median, of another model.",
    lambda s: ablations.figure_table_4(s["table_4"]), _read_table_4, tables=("table_4", "ablation_levels"), needs=of_kinds("table_4", "vm"),
)  # fmt: skip

CLAIMS = Exhibit(
    "table_4_claims", "", "what the paper's Table 4 says", NOTEBOOK,
    "Each rule holds in the paper's table. Numbers are those that the rule compares, in its order.",
    lambda s: s["table_4_claims"], _read_claims, tables=("table_4_claims",),
)  # fmt: skip

FIGURE_5B = Exhibit(
    "figure_5b", "Figure 5b", "similarity and alignment against the scaling factor", NOTEBOOK,
    "Filled: ours, median over prompts, the band is its 95 % bootstrap interval. Hollow: the paper's Table 4.",
    lambda s: ablations.figure_5b(s["scaling"]), _read_5b, tables=("scaling",), needs=of_kinds("scaling", "vm"),
)  # fmt: skip

FIGURE_14 = Exhibit(
    "figure_14", "Figure 14", "neurons for each pair of thresholds", NOTEBOOK,
    "Medians over prompts. Left of the white line the initial selection, right what refinement leaves of it. In brackets the paper's.",
    lambda s: ablations.figure_14(s["threshold_map"]), _read_14, tables=("threshold_map",),
)  # fmt: skip

FIGURE_15 = Exhibit(
    "figure_15", "Figure 15", "similarity for each pair of thresholds", NOTEBOOK,
    "Medians over prompts of SSCD_Gen (to the untouched model's image of the same seed) and SSCD_Orig (to the planted image). In "
    "brackets the paper's, with another descriptor.",
    lambda s: ablations.figure_15(s["threshold_map"]), _read_15, tables=("threshold_map", "table_4"), needs=of_kinds("table_4", "vm"),
)  # fmt: skip

LADDER = Exhibit(
    "neuron_ladder", "", "neurons, score and copies against copies in training", NOTEBOOK,
    "Points: prompts; lines: medians of the rungs. A prompt below the threshold is not searched and has no neurons.",
    lambda s: ablations.figure_ladder(
        s["neuron_ladder"], threshold=float(s["ablation_levels"].query("default")["threshold"].iloc[0])
    ),
    _read_ladder, tables=("neuron_ladder", "ablation_levels"),
)  # fmt: skip
