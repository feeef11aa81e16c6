"""Notebook 01: what similarity of seeds and which activations are normal, and the memorization threshold made from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from nemolib import paper, plots
from nemolib.exhibits import Claim, exhibit
from nemolib.first_step import noise_differences, pairs_measure
from nemolib.holdout import memorization_threshold
from nemolib.layers import cross_attention_layers
from nemolib.settings import PAPER, RELEASED, Protocol
from nemolib.similarity import memorization_score
from nemolib.store import Grid

if TYPE_CHECKING:
    from nemolib.run import Run

NOTEBOOK = "01_holdout_threshold"

EXERCISES = {
    "01.1": lambda run: memorization_score(
        noise_differences(run.pipe, run.prompts("threshold")["caption"].iloc[0], protocol="paper"),
        settings=run.profile.similarity, protocol="paper"),
    "01.2": lambda run: [_largest(run, among=seeds).mean() for seeds in (2, 3, 5, run.profile.detection.samples)],
    "01.3": lambda run: [NormalDist().cdf(-1), (_largest(run) > run.threshold).mean()],
    "01.4": lambda run: lambda answer: 1.7 < answer < 2.35,  # the root of 4, and the chance of 200 draws
}  # fmt: skip


def _largest(run: Run, among: int | None = None) -> np.ndarray:
    """Return the largest similarity of two of the first seeds (None: of all) for each threshold prompt."""
    second = np.triu_indices(run.profile.detection.samples, k=1)[1]
    return run.holdout_scores()[:, second < (among or len(second) + 1)].max(axis=1)


# What memorization looks like


def seed_correlation(images: np.ndarray) -> float:
    """Return how alike images [seed, height, width, 3] are: the mean correlation of the pixels of two; NaN for one image."""
    among = np.atleast_2d(np.corrcoef(images.reshape(len(images), -1)))[np.triu_indices(len(images), k=1)]
    return float(among.mean()) if among.size else float("nan")


@exhibit("", "a memorized and an ordinary prompt")
def first_look(first_look: Grid) -> plots.Figure:
    """Above: the planted image that training showed many times with this caption, then what the model makes of the caption from different seeds.

    Below: the same for a caption that training never showed; it has no planted image.
    """
    names = zip(("memorized", "ordinary"), first_look.rows, strict=True)
    return plots.image_grid(replace(first_look, rows=tuple(f"{name}: {caption}" for name, caption in names)))


# The UNet and its value layers


def unet_blocks(run: Run) -> pd.DataFrame:
    """Return the blocks of the UNet and their cross-attention, in the order in which an image passes.

    Returns:
        A row for each value layer, and for each block without one: columns part (down, mid or up), block (its address),
        depth (its place in its half of the U, from 0), layer (from 1, as in the paper; 0: none), neurons (outputs of the
        value layer) and features (its inputs).
    """
    layers, rows = cross_attention_layers(run.pipe.unet, "value"), []
    down, up = len(run.pipe.unet.down_blocks), len(run.pipe.unet.up_blocks)
    depths = {f"down_blocks.{i}": i for i in range(down)} | {"mid_block": down}
    for block, depth in (depths | {f"up_blocks.{i}": up - 1 - i for i in range(up)}).items():
        inside = [layer for layer in layers if layer.name.startswith(f"{block}.")]
        found = [(layer.number, layer.width, layer.module.in_features) for layer in inside] or [(0, 0, 0)]
        rows += [(block.split("_")[0], block, depth, *values) for values in found]
    return pd.DataFrame(rows, columns=["part", "block", "depth", "layer", "neurons", "features"])


PARTS = {
    "image $h$": (1, 8.3), "text $c$\n(a row: a token)": (1, 0.5), "$W_Q$": (4, 8.3), "$W_K$": (4, 5.5), "$W_V$": (4, 2.5),
    "softmax$(q k^T)$": (8.2, 6.9), "values $v$": (8.2, 0.5), "a neuron": (8, 4.3), "output": (12, 4.7),
}  # fmt: skip
"""What a block of cross-attention is made of, and where it is drawn."""

ARROWS = (
    ((1.9, 8.3), (3.3, 8.3)), ((2, 3), (3.3, 5.2)), ((2, 2.5), (3.3, 2.5)), ((4.7, 2.5), (6.7, 2.5)),
    ((4.7, 8.3), (6.5, 7.4)), ((4.7, 5.5), (6.5, 6.4)), ((9.8, 6.5), (11.2, 5.2)), ((9.7, 2.9), (11.2, 4.2)),
)  # fmt: skip


@exhibit("", "the UNet with its value layers, and one block of cross-attention")
def unet_drawing(unet_blocks: pd.DataFrame) -> plots.Figure:
    """Left: the blocks that an image passes, from left to right.

    A circle is a block of cross-attention with its value layer: orange and numbered where the paper looks for
    neurons; above, the neurons of each layer. Right: one of them. $W_V$ makes of the embedding of a token its
    value, a row of $v$. A neuron is one output of $W_V$, a column of $v$ (orange).
    """
    color, thin = plots.ROLES["vm"].color, {"edgecolor": "black", "linewidth": plots.LINE}
    middle = {"ha": "center", "va": "center", "fontsize": plots.TICK_SIZE}
    with plots.panels(1, 2, aspect=0.36, width_ratios=(1.1, 1)) as (figure, (net, block)):
        for place, (_, rows) in enumerate(unet_blocks.groupby("block", sort=False)):
            high = 1 - 0.14 * rows["depth"].iloc[0]
            net.add_patch(Rectangle((place - 0.42, -high), 0.84, 2 * high, facecolor="0.92", **thin))
            for row, y in zip(rows.itertuples(), np.linspace(high, -high, len(rows) + 2)[1:-1], strict=True):
                fill, text = ("white", "  ") if row.part == "up" else (color, f"{row.layer}")
                if row.layer:
                    net.text(place, y, text, **middle, bbox={"facecolor": fill, "boxstyle": "circle,pad=0.25"} | thin)
            if row.layer:
                net.text(place, high + 0.1, f"{row.neurons}", **middle)
        parts = unet_blocks.drop_duplicates("block", ignore_index=True).groupby("part")
        for part, rows in parts:
            net.text(rows.index.to_numpy().mean(), -1.2, part, **middle)
        net.set(xlim=(-0.6, place + 0.6), ylim=(-1.3, 1.2), title="UNet")
        for text, spot in PARTS.items():
            block.text(*spot, text, **middle)
        for start, end in ARROWS:
            block.annotate("", end, start, arrowprops={"arrowstyle": "->", "linewidth": plots.LINE})
        for left, columns, marked in ((0.2, 4, []), (6.9, 6, [2])):
            cells = np.isin(np.arange(columns), marked) * np.ones((5, 1))
            grid = left + 0.45 * np.arange(columns + 1), 1.3 + 0.5 * np.arange(6)
            block.pcolormesh(*grid, cells, cmap=ListedColormap(["white", color]), vmin=0, vmax=1, **thin)
        block.set(xlim=(-0.5, 13.2), ylim=(0, 9), title="cross-attention")
        for axes in (net, block):
            axes.set_axis_off()
    return figure


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
    chosen = np.random.default_rng(0).integers(len(scores), size=(1000, len(scores)))
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
    # Table 4 (notebook 05) has a threshold with the guidance of the images: the same UNet passes give it.
    measures.append(pairs_measure(run.profile.protocol, run.profile.generation.guidance))
    *found, _ = np.array(run.observe(run.prompts("threshold")["caption"], measures)).swapaxes(0, 1)
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
    rule = "another model with smaller latents: its similarities have another scale"
    yield Claim("mean + 1 sd", found, theirs, rule=rule)


@exhibit("Table 4 (thresholds)", "four memorization thresholds", read=read_thresholds)
def table_4_thresholds(thresholds: pd.DataFrame) -> pd.DataFrame:
    """Mean of the holdout scores plus a multiple of their standard deviation."""
    return thresholds[["setting", "paper", "ours"]].round(3)


@exhibit("", "similarity of the seeds of holdout prompts")
def holdout_distribution(holdout_pairs: pd.DataFrame, thresholds: pd.DataFrame) -> plots.Figure:
    """Similarity of two seeds of a holdout prompt: all pairs (filled) and the largest pair of each prompt (outlined).

    Lines: the four thresholds.
    """
    pairs, largest = holdout_pairs["similarity"], holdout_pairs.groupby("prompt")["similarity"].max()
    edges = np.linspace(pairs.min(), pairs.max(), 61)
    filled = plots.ROLES["holdout"].filled(f"all pairs, n = {len(pairs):,}")
    outlined = {"histtype": "step", "color": "#E69F00", "label": f"largest of a prompt, n = {len(largest):,}"}
    with plots.panels(fraction=0.7, legend=3) as (figure, axes):
        axes.hist(pairs, edges, weights=np.full(len(pairs), 1 / len(pairs)), **filled)
        axes.hist(largest, edges[::2], weights=np.full(len(largest), 1 / len(largest)), **outlined)
        for line, row in zip(((0, (1, 2)), "--", "-", "-."), thresholds.itertuples(), strict=True):
            axes.axvline(row.ours, color="black", linestyle=line, linewidth=1, label=row.setting.replace("-", "−"))
        axes.set(xlabel="similarity of two seeds of a holdout prompt", ylabel="share (of pairs, of prompts)")
        axes.yaxis.set_major_formatter(plots.PercentFormatter(1.0, decimals=0))
    return figure


@exhibit("", "thresholds by protocol switch")
def protocol_switches_table(protocol_switches: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and threshold (mean + 1 sd) of the values that the threshold is taken over; gate: share of the holdout prompts whose largest pair is above it."""
    columns = ["question", "change", "mean", "sd", "threshold", "difference", "gate"]
    return protocol_switches[columns].fillna({"question": ""}).round(3)
