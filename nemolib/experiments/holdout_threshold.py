"""Notebook 01: what similarity of seeds and which activations are normal, and the memorization threshold made from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nemolib import paper, plots
from nemolib.exhibits import Claim, exhibit
from nemolib.first_step import pairs_measure
from nemolib.holdout import memorization_threshold
from nemolib.settings import PAPER, RELEASED, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nemolib.run import Run

NOTEBOOK = "01_holdout_threshold"

RESAMPLES = 1000
"""How often the holdout prompts are drawn anew for the interval of the threshold."""


def pair_table(run: Run) -> pd.DataFrame:
    """Return the similarity of every pair of seeds: columns prompt (from 0), first and second (seeds), similarity."""
    scores = run.holdout_scores()
    pairs = pd.MultiIndex.from_arrays(np.triu_indices(run.profile.detection.samples, k=1), names=["first", "second"])
    table = pd.DataFrame(scores, columns=pairs).rename_axis("prompt")
    return table.stack(["first", "second"]).rename("similarity").reset_index()


def thresholds(run: Run) -> pd.DataFrame:
    """Return the four thresholds of Table 4, and how far another holdout set would have moved the default one.

    Source: Sec. 4, Table 4.

    Returns:
        Columns setting, multiplier (of the standard deviation), paper, ours; and, the same in every row, low and high
        (95 % of the values of mean + 1 sd when the prompts are drawn anew, with replacement) and tau (the threshold that
        the profile uses).
    """
    scores, protocol = run.holdout_scores(), run.profile.protocol
    chosen = np.random.default_rng(0).integers(len(scores), size=(RESAMPLES, len(scores)))
    others = [memorization_threshold(scores[rows], protocol=protocol) for rows in chosen]
    low, high = np.quantile(others, [0.025, 0.975])
    table = paper.table("thresholds")
    ours = [run.threshold_at(multiplier) for multiplier in table["multiplier"]]
    return table.assign(ours=ours, low=low, high=high, tau=run.threshold)


def switches(guidance: float) -> list[tuple[str, str, str, Protocol, float]]:
    """Return protocol `released` as it is, with each switch of the threshold turned alone, and with all: `paper`.

    The order of the guidance means nothing where the guidance is 0, so it is turned at the larger of two scales.

    Args:
        guidance: Guidance scale of the detection. It is compared with 7 where it is 0, else with 0.

    Returns:
        For each its name, the question of notebook 01 (such as "Q1", or empty), what changes in words, protocol, guidance.
    """
    other = 7.0 if guidance == 0 else 0.0
    strong = max(guidance, other)
    return [
        ("none", "", "protocol released", RELEASED, guidance),
        ("timestep", "Q1", "first timestep", replace(RELEASED, timestep_index=0), guidance),
        ("pairs", "Q4", "largest pairs, not all", replace(RELEASED, threshold_pairs="max"), guidance),
        ("similarity", "", "SSIM, not MS-SSIM", replace(RELEASED, similarity="ssim"), guidance),
        ("all", "", "all: protocol paper", PAPER, guidance),
        ("guidance", "Q3", f"guidance {other:g}, not {guidance:g}", RELEASED, other),
        ("order", "Q2", f"guidance {strong:g}, usual order", replace(RELEASED, swap_guidance=False), strong),
    ]


def switch_table(run: Run) -> pd.DataFrame:
    """Return what each difference between the paper's text and the authors' code does to the memorization threshold.

    Returns:
        A row for each of `switches`: columns switch, question, change, mean and sd (of what the threshold is taken over),
        threshold (mean + 1 sd), gate (share of the holdout prompts whose largest pair is above it) and difference (of the
        threshold from that of the first row).
    """
    turned, rows = switches(run.profile.detection.guidance), []
    measures = [pairs_measure(protocol, guidance) for *_, protocol, guidance in turned]
    found = np.array(run.observe(run.prompts("threshold")["caption"].tolist(), measures)).swapaxes(0, 1)
    for (*names, protocol, _), scores in zip(turned, found, strict=True):
        largest = scores.max(axis=1)
        values = scores.ravel() if protocol.threshold_pairs == "all" else largest
        tau = memorization_threshold(scores, protocol=protocol)
        rows.append((*names, values.mean(), values.std(ddof=1), tau, (largest > tau).mean()))
    table = pd.DataFrame(rows, columns=["switch", "question", "change", "mean", "sd", "threshold", "gate"])
    return table.assign(difference=table["threshold"] - table["threshold"].iloc[0])


def read_thresholds(thresholds: pd.DataFrame) -> Iterator[Claim]:
    """Yield the threshold beside the paper's."""
    ours, row = thresholds.set_index("multiplier")["ours"], thresholds.iloc[0]
    others = f"95 % of other holdout sets: {row['low']:.2f} to {row['high']:.2f}"
    found = f"{ours[1]:.3f} = {ours[0]:.3f} + {ours[1] - ours[0]:.3f}; {others}"
    theirs = "{} = {} + {}".format(*map(paper.reported, ("threshold", "threshold.mean", "threshold.sd")))
    yield Claim(
        "mean + 1 sd", found, theirs, rule="another model with smaller latents: its similarities have another scale"
    )


@exhibit("Table 4 (thresholds)", "four memorization thresholds",
    "Mean of the holdout scores plus a multiple of their standard deviation.", read=read_thresholds)  # fmt: skip
def table_4_thresholds(thresholds: pd.DataFrame) -> pd.DataFrame:
    return thresholds[["setting", "paper", "ours"]].round(3)


@exhibit("", "similarity of the seeds of holdout prompts",
    "Similarity of two seeds of a holdout prompt: all pairs (filled) and the largest pair of each prompt (outlined). Lines: "
    "the four thresholds.")  # fmt: skip
def holdout_distribution(holdout_pairs: pd.DataFrame, thresholds: pd.DataFrame) -> Figure:
    pairs, largest = holdout_pairs["similarity"], holdout_pairs.groupby("prompt")["similarity"].max()
    edges, look = np.linspace(pairs.min(), pairs.max(), 61), plots.ROLES["holdout"]
    filled = {"facecolor": (look.color, 0.35), "edgecolor": look.color, "hatch": look.hatch, "label": "all pairs"}
    outlined = {"histtype": "step", "color": "#E69F00", "label": "largest pair"}
    with plots.panels(fraction=0.7) as (figure, axes):
        axes.hist(pairs, edges, weights=np.full(len(pairs), 1 / len(pairs)), histtype="stepfilled", **filled)
        axes.hist(largest, edges[::2], weights=np.full(len(largest), 1 / len(largest)), **outlined)
        for line, row in zip(((0, (1, 2)), "--", "-", "-."), thresholds.itertuples(), strict=True):
            axes.axvline(row.ours, color="black", linestyle=line, linewidth=1, label=row.setting)
        axes.set(xlabel="similarity of two seeds of a holdout prompt", ylabel="share")
        axes.yaxis.set_major_formatter(plots.PercentFormatter(1.0, decimals=0))
        plots.legend_above(axes, columns=3)
    return figure


@exhibit("", "what each difference between paper and code does to the threshold",
    "Mean of the values that the threshold is taken over (point) and the threshold (bar, one standard deviation above). "
    "Dashed: protocol released.")  # fmt: skip
def protocol_switches(protocol_switches: pd.DataFrame) -> Figure:
    table, places = protocol_switches, np.arange(len(protocol_switches))[::-1]
    with plots.panels(aspect=0.4) as (figure, axes):
        axes.axvline(table["threshold"].iloc[0], color=plots.GREY, linestyle="--", linewidth=plots.LINE)
        axes.hlines(places, table["mean"], table["threshold"], color="black")
        axes.plot(table["mean"], places, linestyle="", marker="o", color=plots.GREY, label="mean")
        axes.plot(table["threshold"], places, linestyle="", marker="|", markersize=9, color="black", label="threshold")
        axes.set_yticks(places, table["change"])
        axes.set_xlabel("similarity of two seeds of holdout prompts")
        plots.legend_above(axes)
    return figure


@exhibit("", "thresholds by protocol switch",
    "Gate: share of holdout prompts whose largest pair is above the threshold. Questions are those of notebook 01.")  # fmt: skip
def protocol_switches_table(protocol_switches: pd.DataFrame) -> pd.DataFrame:
    columns = ["question", "change", "mean", "sd", "threshold", "difference", "gate"]
    return protocol_switches[columns].fillna({"question": ""}).round(3)
