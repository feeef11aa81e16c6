"""Notebook 01: what similarity of seeds and which activations are normal, and the memorization threshold made from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import seaborn as sns

from nemolib import paper, plots
from nemolib.exhibits import Claim, exhibit, must, too_few
from nemolib.first_step import pairs_measure
from nemolib.holdout import memorization_threshold
from nemolib.layers import value_layers
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


def layer_table(run: Run) -> pd.DataFrame:
    """Return the value layers with their activation statistics.

    Source: Sec. 3.2.

    Returns:
        Columns layer (from 1, as in the paper), block, neurons, mean and sd (averaged over the neurons), sd_low and
        sd_high (smallest and largest of a neuron).
    """
    rows = []
    for layer, mean, sd in zip(value_layers(run.pipe.unet), run.statistics.mean, run.statistics.std, strict=True):
        numbers = (float(value) for value in (mean.mean(), sd.mean(), sd.min(), sd.max()))
        rows.append((layer.index + 1, layer.name.partition(".transformer_blocks")[0], layer.width, *numbers))
    return pd.DataFrame(rows, columns=["layer", "block", "neurons", "mean", "sd", "sd_low", "sd_high"])


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


def gate_table(run: Run, guidances: Sequence[float]) -> pd.DataFrame:
    """Return the share of holdout prompts that pass the gate if threshold and detection use different guidance.

    The gate is open if the largest pair of seeds is above the threshold; protocol `released`.

    Returns:
        A row for each guidance of the detection, a column for each guidance of the threshold.
    """
    found = {guidance: run.holdout_scores(protocol=RELEASED, guidance=guidance) for guidance in sorted(guidances)}
    limits = [memorization_threshold(scores, protocol=RELEASED) for scores in found.values()]
    shares = [[(scores.max(axis=1) > limit).mean() for limit in limits] for scores in found.values()]
    return pd.DataFrame(shares, index=pd.Index(found, name="detection"), columns=pd.Index(found, name="threshold"))


def read_thresholds(thresholds: pd.DataFrame, holdout_pairs: pd.DataFrame) -> Iterator[Claim]:
    """Yield the threshold beside the paper's, and whether it leaves the search room on both sides."""
    ours, row = thresholds.set_index("multiplier")["ours"], thresholds.iloc[0]
    few = too_few(holdout_pairs["prompt"].nunique(), "holdout prompt", needed=10)
    others = f"95 % of other holdout sets: {row['low']:.2f} to {row['high']:.2f}"
    found = f"{ours[1]:.3f} = {ours[0]:.3f} + {ours[1] - ours[0]:.3f}; {others}"
    theirs = "{} = {} + {}".format(*map(paper.reported, ("threshold", "threshold.mean", "threshold.sd")))
    rule = "; ".join(filter(None, ["another model with smaller latents: its similarities have another scale", few]))
    yield Claim("mean + 1 sd", found, theirs, rule=rule)
    room = "the search needs room on both sides"
    yield must("a threshold between similarities", ours[1], at_least=0.05, at_most=0.95, reason=room, missing=few)


@exhibit(
    "Table 4 (thresholds)", "four memorization thresholds",
    "Mean of the holdout scores plus a multiple of their standard deviation.", read=read_thresholds,
)  # fmt: skip
def table_4_thresholds(thresholds: pd.DataFrame) -> pd.DataFrame:
    return thresholds[["setting", "paper", "ours"]].round(3)


def read_holdout(holdout_pairs: pd.DataFrame) -> Iterator[Claim]:
    """Yield mean and standard deviation of the similarities."""
    pairs, largest = holdout_pairs["similarity"], holdout_pairs.groupby("prompt")["similarity"].max()
    ours = ", ".join(f"{values.mean():.3f} ± {values.std():.3f}" for values in (pairs, largest))
    theirs = f"{paper.reported('threshold.mean')} ± {paper.reported('threshold.sd')}"
    what = f"{len(pairs)} pairs, the largest pairs of {len(largest)} prompts (mean ± standard deviation)"
    yield Claim(what, ours, theirs)


@exhibit(
    "", "similarity of the seeds of holdout prompts",
    "Similarity of two seeds of a holdout prompt: all pairs (filled) and the largest pair of each prompt (outlined). Lines: the four "
    "thresholds.",
    read=read_holdout,
)  # fmt: skip
def holdout_distribution(holdout_pairs: pd.DataFrame, thresholds: pd.DataFrame) -> Figure:
    pairs, largest = holdout_pairs["similarity"], holdout_pairs.groupby("prompt")["similarity"].max()
    edges, look = np.linspace(pairs.min(), pairs.max(), 61), plots.ROLES["holdout"]
    with plots.panels(fraction=0.7) as (figure, axes):
        shares = {"stat": "proportion", "element": "step", "color": look.color, "alpha": 0.35, "hatch": look.hatch}
        sns.histplot(pairs, bins=edges, label="all pairs", ax=axes, **shares)
        share = np.full(len(largest), 1 / len(largest))
        axes.hist(largest, edges[::2], weights=share, histtype="step", color="#E69F00", label="largest pair")
        for line, row in zip(((0, (1, 2)), "--", "-", "-."), thresholds.itertuples(), strict=True):
            axes.axvline(row.ours, color="black", linestyle=line, linewidth=1, label=row.setting)
        axes.set(xlabel="similarity of two seeds of a holdout prompt", ylabel="share")
        axes.yaxis.set_major_formatter(plots.PercentFormatter(1.0, decimals=0))
        plots.legend_above(axes, columns=3)
    return figure


def read_switches(protocol_switches: pd.DataFrame) -> Iterator[Claim]:
    """Yield what moves the threshold most."""
    rows = protocol_switches.set_index("switch")
    single = rows.loc[["timestep", "pairs", "similarity"], "difference"]
    most = single.abs().idxmax()
    tau = rows["threshold"]
    ours = f"{tau['none']:.3f}, {tau['all']:.3f}, {rows['change'][most]} ({single[most]:+.3f})"
    theirs = "text and code differ; what each difference does is not reported"
    yield Claim("threshold of `released`, of `paper`, and the largest single change", ours, theirs)
    raised = rows["mean"]["pairs"] - rows["mean"]["none"]
    yield must("largest pairs raise the mean", raised, at_least=0, reason="a largest value is at least the mean")


@exhibit(
    "", "what each difference between paper and code does to the threshold",
    "Mean of the values that the threshold is taken over (point) and the threshold (bar, one standard deviation above). Dashed: protocol "
    "released.",
    read=read_switches,
)  # fmt: skip
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


@exhibit(
    "", "thresholds by protocol switch",
    "Gate: share of holdout prompts whose largest pair is above the threshold. Questions are those of notebook 01.",
)  # fmt: skip
def protocol_switches_table(protocol_switches: pd.DataFrame) -> pd.DataFrame:
    columns = ["question", "change", "mean", "sd", "threshold", "difference", "gate"]
    return protocol_switches[columns].fillna({"question": ""}).round(3)
