"""Figures of notebooks 01 and 02: threshold, noise differences, scores, z-scores, detection, the duplication ladder."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from nemolib.figures.images import image_grid
from nemolib.tables import Grid
from nemolib.theme import ROLES, Role, neurips, role

KINDS = ("unmemorized", "tm", "vm")
"""Kinds of prompts that are compared, in the order in which they are drawn."""

GREY = "0.35"

SCORES = {
    "score_paper": ("SSIM (paper)", "#000000", "-"),
    "score_released": ("MS-SSIM (released)", "#CC79A7", "-."),
    "mean_pair": ("mean of all pairs", "#E69F00", (0, (4, 1, 1, 1))),
    "wen": ("Wen et al., one step", "#56B4E9", "--"),
}
"""Label, colour and line of the scores that are compared as detectors."""


def figure_2a(table: pd.DataFrame, *, threshold: float | None = None, bins: int = 24) -> Figure:
    """Return Fig. 2a: how the memorization scores of unmemorized, TM and VM prompts are distributed.

    Bars are shares of the prompts of a kind; a short line below the axis marks every single prompt.

    Source: Fig. 2a.

    Args:
        table: Columns kind and score; other kinds are left out.
        threshold: Memorization threshold, drawn as a line; None draws none.
        bins: Number of bars of each kind.

    Raises:
        ValueError: There are no prompts of these kinds.

    Taught in: 02
    """
    chosen = _of_kinds(table, KINDS, "score")
    edges = np.linspace(chosen["score"].min(), chosen["score"].max(), bins + 1)
    with mpl.rc_context(neurips(0.6)):
        figure = Figure()
        axes = figure.subplots()
        for level, kind in enumerate(KINDS):
            values = chosen.loc[chosen["kind"] == kind, "score"].to_numpy()
            if len(values):
                _histogram(axes, values, edges, role(kind))
                _rug(axes, values, role(kind), level=level)
        _threshold(axes, threshold)
        axes.set_xlabel("memorization score (similarity of two seeds)")
        axes.set_ylabel("prompts of a kind")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(bottom=0)
        _legend_above(axes, ncols=2)
    return figure


def figure_2b(table: pd.DataFrame, *, layer: int = 1, kinds: Sequence[str] = ("unmemorized", "vm")) -> Figure:
    """Return Fig. 2b: the largest absolute z-score of every neuron of a value layer, memorized and unmemorized prompts.

    Source: Fig. 2b.

    Args:
        table: Columns kind, layer (from 1), neuron and largest_z (see `nemolib.experiments.z_by_neuron`).
        layer: The value layer, counted from 1 as in the paper.
        kinds: The kinds of prompts.

    Raises:
        ValueError: There is no such layer or no such kind.

    Taught in: 02
    """
    chosen = _of_kinds(table[table["layer"] == layer], kinds, "largest_z")
    with mpl.rc_context(neurips(0.6)):
        figure = Figure()
        axes = figure.subplots()
        for kind in kinds:
            rows, look = chosen[chosen["kind"] == kind].sort_values("neuron"), role(kind)
            axes.vlines(rows["neuron"], 0, rows["largest_z"], color=look.color, linewidth=0.4, alpha=0.5)
            axes.plot(
                rows["neuron"], rows["largest_z"], linestyle="", marker=look.marker, color=look.color, label=look.label
            )
        axes.set_xlabel(f"neuron of value layer {layer}")
        axes.set_ylabel(r"largest $|z|$ (standard deviations)")
        axes.set_ylim(bottom=0)
        _legend_above(axes, ncols=len(kinds))
    return figure


def figure_6(table: pd.DataFrame, *, cut: float = 0.7, bins: int = 24) -> Figure:
    """Return Fig. 6: the largest copy similarity of generated and planted images, VM and TM prompts.

    Source: Fig. 6, App. C.1 (a prompt counts as VM above 0.7, measured by SSCD).

    Args:
        table: Columns kind and copy_max (see `nemolib.experiments.copies`).
        cut: The paper's cut between TM and VM, drawn as a line.
        bins: Number of bars of each kind.

    Raises:
        ValueError: There are no VM or TM prompts.

    Taught in: 02
    """
    chosen = _of_kinds(table, ("tm", "vm"), "copy_max")
    edges = np.linspace(min(0.0, chosen["copy_max"].min()), 1, bins + 1)
    with mpl.rc_context(neurips(0.6)):
        figure = Figure()
        axes = figure.subplots()
        for level, kind in enumerate(("tm", "vm")):
            values = chosen.loc[chosen["kind"] == kind, "copy_max"].to_numpy()
            if len(values):
                _histogram(axes, values, edges, role(kind))
                _rug(axes, values, role(kind), level=level)
        axes.axvline(cut, color="black", linestyle="--", linewidth=1, label=f"cut at {cut:g}")
        axes.set_xlabel("copy similarity (largest of the seeds)")
        axes.set_ylabel("prompts of a kind")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _legend_above(axes, ncols=2)
    return figure


def figure_13(grid: Grid, *, fraction: float = 1.0) -> Figure:
    """Return Fig. 13: noise differences as images, a row for each prompt and a column for each seed.

    Source: Fig. 13. Three of the channels stand for red, green and blue.

    Args:
        grid: Noise differences [prompt, seed, height, width, 3] in [0, 1] (see `noise_colours`).
        fraction: Width as a share of the text width.

    Taught in: 02
    """
    return image_grid(grid, fraction=fraction)


def noise_colours(differences: np.ndarray) -> np.ndarray:
    """Return normalized noise differences as colours: the first three channels stand for red, green and blue.

    Args:
        differences: Noise differences [..., channel, height, width] in [0, 1], at least three channels.

    Returns:
        Array [..., height, width, 3], uint8.

    Raises:
        ValueError: There are fewer than three channels, or values are outside [0, 1].
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim < 3 or differences.shape[-3] < 3:
        raise ValueError(f"noise differences of shape {differences.shape}; expected [..., channel, height, width]")
    if differences.min() < 0 or differences.max() > 1:
        raise ValueError(
            f"noise differences between {differences.min():.3g} and {differences.max():.3g}; normalize them to [0, 1]"
        )
    colours = np.moveaxis(differences[..., :3, :, :], -3, -1)
    return (colours * 255).round().astype(np.uint8)


def holdout_distribution(pairs: np.ndarray, thresholds: pd.DataFrame, *, bins: int = 60) -> Figure:
    """Return how the pair similarities of holdout prompts are distributed, with the thresholds of Table 4 as lines.

    Filled: all pairs; outlined: the largest pair of each prompt.

    Source: Sec. 3.1, Table 4.

    Args:
        pairs: Similarity [prompt, pair].
        thresholds: Columns setting and ours.
        bins: Number of bars.

    Taught in: 01
    """
    pairs = np.asarray(pairs, dtype=np.float64)
    edges = np.linspace(pairs.min(), pairs.max(), bins + 1)
    with mpl.rc_context(neurips(0.7)):
        figure = Figure()
        axes = figure.subplots()
        _histogram(axes, pairs.ravel(), edges, ROLES["holdout"], label="all pairs")
        largest = pairs.max(axis=1)
        shares = np.full(len(largest), 1 / len(largest))
        axes.hist(largest, bins=edges[::2], weights=shares, histtype="step", color="#E69F00", label="largest pair")
        for style, (_, row) in zip(((0, (1, 2)), "--", "-", "-."), thresholds.iterrows(), strict=False):
            axes.axvline(row["ours"], color="black", linestyle=style, linewidth=1, label=row["setting"])
        axes.set_xlabel("similarity of two seeds of a holdout prompt")
        axes.set_ylabel("share")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _legend_above(axes, ncols=3)
    return figure


def protocol_switches(table: pd.DataFrame) -> Figure:
    """Return what each difference between the paper's text and the authors' code does to the threshold.

    A point is the mean of the values that the threshold is taken over, the bar goes to mean + 1 standard deviation,
    the threshold; the dashed line is the threshold without a change.

    Args:
        table: Columns switch, change, mean, threshold (see `nemolib.experiments.switch_table`).

    Taught in: 01
    """
    places = np.arange(len(table))[::-1]
    with mpl.rc_context(neurips(1.0, aspect=0.4)):
        figure = Figure()
        axes = figure.subplots()
        axes.axvline(table["threshold"].iloc[0], color=GREY, linestyle="--", linewidth=0.6)
        axes.hlines(places, table["mean"], table["threshold"], color="black")
        axes.plot(table["mean"], places, linestyle="", marker="o", color=GREY, label="mean")
        axes.plot(table["threshold"], places, linestyle="", marker="|", markersize=9, color="black", label="threshold")
        axes.set_yticks(places, table["change"])
        axes.set_xlabel("similarity of two seeds of holdout prompts")
        _legend_above(axes, ncols=2)
    return figure


def z_by_layer(table: pd.DataFrame, *, kinds: Sequence[str] = KINDS) -> Figure:
    """Return the largest absolute z-score of a prompt in each value layer: medians, and bars of the quartiles.

    Source: Sec. 3.2 (Fig. 2b shows value layer 1 alone).

    Args:
        table: Columns kind, layer (from 1) and largest_z (see `nemolib.experiments.z_by_prompt`).
        kinds: The kinds of prompts.

    Raises:
        ValueError: There is no prompt of these kinds.

    Taught in: 02
    """
    chosen = _of_kinds(table, kinds, "largest_z")
    with mpl.rc_context(neurips(0.6)):
        figure = Figure()
        axes = figure.subplots()
        for place, kind in enumerate(kinds):
            grouped = chosen[chosen["kind"] == kind].groupby("layer")["largest_z"]
            middle, look = grouped.median(), role(kind)
            ends = np.stack([middle - grouped.quantile(0.25), grouped.quantile(0.75) - middle])
            # Beside each other, so that bars of one layer do not hide each other.
            shifted = middle.index + (place - (len(kinds) - 1) / 2) * 0.15
            axes.errorbar(
                shifted, middle, yerr=ends, color=look.color, marker=look.marker, linestyle=look.line, label=look.label
            )
        axes.set_xticks(sorted(chosen["layer"].unique()))
        axes.set_xlabel("value layer")
        axes.set_ylabel(r"largest $|z|$ (standard deviations)")
        axes.set_ylim(bottom=0)
        _legend_above(axes, ncols=2)
    return figure


def detection_roc(table: pd.DataFrame, columns: Sequence[str], *, kinds: Sequence[str] = ("vm", "tm")) -> Figure:
    """Return ROC curves of scores as detectors of memorized prompts, with false positives on a logarithmic axis.

    Source: App. B.4. The line at 1 % is where TPR@1%FPR is read.

    Args:
        table: Columns kind and one per score.
        columns: Names of the scores, of `SCORES`.
        kinds: Kinds of prompts that count as memorized.

    Raises:
        ValueError: There is no prompt of a kind.

    Taught in: 02
    """
    from sklearn.metrics import roc_curve

    chosen = _of_kinds(table, (*kinds, "unmemorized"), columns[0])
    memorized = chosen["kind"].isin(kinds)
    smallest = 1 / (2 * max(1, int((~memorized).sum())))
    with mpl.rc_context(neurips(0.5, aspect=0.9)):
        figure = Figure()
        axes = figure.subplots()
        axes.axvline(0.01, color=GREY, linewidth=0.6, linestyle="--")
        for column in columns:
            label, color, line = SCORES[column]
            false, true, _ = roc_curve(memorized, chosen[column])
            axes.step(
                np.maximum(false, smallest), true, where="post", color=color, linestyle=line, label=label, alpha=0.9
            )
        axes.set_xscale("log")
        axes.set_xlim(smallest, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("false positive rate (log scale)")
        axes.set_ylabel("true positive rate")
        axes.legend(loc="lower right")
    return figure


def duplication_ladder(table: pd.DataFrame, *, threshold: float | None = None) -> Figure:
    """Return how memorization grows with the number of copies in training: copy similarity and memorization score.

    Points are prompts, the line joins the medians of the rungs.

    Args:
        table: Columns copies, copy_similarity and score, one row per prompt of the ladder.
        threshold: Memorization threshold, drawn in the panel of the score; None draws none.

    Raises:
        ValueError: The table is empty.

    Taught in: 02
    """
    if table.empty:
        raise ValueError("the ladder has no prompts")
    panels = {"copy_similarity": "copy similarity", "score": "memorization score"}
    with mpl.rc_context(neurips(1.0, aspect=0.38)):
        figure = Figure()
        for axes, (column, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            _ladder(axes, table, column)
            axes.set_ylabel(label)
            if column == "score":
                _threshold(axes, threshold, horizontal=True)
            _legend_above(axes, ncols=3)
    return figure


def _ladder(axes: Axes, table: pd.DataFrame, column: str) -> None:
    look, medians = role("ladder"), table.groupby("copies")[column].median()
    axes.plot(
        table["copies"], table[column], linestyle="", marker=look.marker, color=look.color, alpha=0.6, label="prompt"
    )
    axes.plot(medians.index, medians, linestyle=look.line, color=look.color, label="median of a rung")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(medians.index)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("copies in training (regular caption = 1)")


def _legend_above(axes: Axes, *, ncols: int) -> None:
    """Place the legend above the axes, where it hides no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, borderaxespad=0.2)


def _of_kinds(table: pd.DataFrame, kinds: Sequence[str], column: str) -> pd.DataFrame:
    """Return the rows of these kinds; raise if there is none, or if a value is missing."""
    chosen = table[table["kind"].isin(kinds)]
    if chosen.empty:
        raise ValueError(f"the table has no prompts of the kinds {', '.join(kinds)}; it has {set(table['kind'])}")
    if chosen[column].isna().any():
        raise ValueError(f"column {column!r} lacks a value in {int(chosen[column].isna().sum())} rows")
    return chosen


def _histogram(axes: Axes, values: np.ndarray, edges: np.ndarray, look: Role, *, label: str | None = None) -> None:
    """Draw the shares of values between edges as bars with the colour and hatch of a role."""
    axes.hist(
        values,
        bins=edges,
        weights=np.full(len(values), 1 / len(values)),
        histtype="stepfilled",
        facecolor=(*mpl.colors.to_rgb(look.color), 0.35),
        edgecolor=look.color,
        hatch=look.hatch,
        label=label or f"{look.label}, n = {len(values)}",
    )


def _rug(axes: Axes, values: np.ndarray, look: Role, *, level: int) -> None:
    """Mark each value by a short line below the axis, one row for each kind."""
    low = -0.03 * (level + 1)
    axes.vlines(
        values, low - 0.025, low, color=look.color, linewidth=0.5, transform=axes.get_xaxis_transform(), clip_on=False
    )
    axes.tick_params(axis="x", length=2, pad=8)


def _threshold(axes: Axes, threshold: float | None, *, horizontal: bool = False) -> None:
    """Draw the memorization threshold, if there is one."""
    if threshold is not None:
        draw = axes.axhline if horizontal else axes.axvline
        draw(threshold, color="black", linestyle="--", linewidth=0.9, label=rf"$\tau_\mathrm{{mem}}$ = {threshold:.3f}")
