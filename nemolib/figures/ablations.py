"""Figures of notebook 05, first half: Table 4, scaling factors, heat maps of thresholds, the duplication ladder."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from nemolib.figures.images import image_grid
from nemolib.figures.mitigation import KINDS, METRICS, figure_table_1
from nemolib.tables import Grid
from nemolib.theme import TICK_SIZE, neurips, role

SCALED = ("sscd_orig", "sscd_gen", "a_clip")
"""Metrics of the figure of scaling factors."""

MAPS = {"sscd_gen": METRICS["sscd_gen"], "sscd_orig": METRICS["sscd_orig"]}
"""Metrics of Fig. 15, in its order."""

BEFORE, AFTER = "all neurons active", "neurons of the prompt deactivated"
"""What legends call the two states of a prompt."""


def figure_table_4(table: pd.DataFrame) -> Figure:
    """Return Table 4 as a figure: a panel for each metric, a row for each setting, VM and TM.

    Filled: ours, median over prompts with its 95 % bootstrap interval. Hollow: the paper's median.

    Source: Table 4.

    Args:
        table: What `nemolib.experiments_ablations.table_4` returned.

    Raises:
        ValueError: The table has no VM or TM rows.

    Taught in: 05
    """
    return figure_table_1(table)


def figure_5b(table: pd.DataFrame) -> Figure:
    """Return Fig. 5b: similarity against the factor that scales the neurons, and the alignment with the prompt.

    Filled, with a line: ours, median over prompts with its 95 % bootstrap interval as a band. Hollow: the paper's, from
    its Table 4.

    Source: Fig. 5b, Table 4.

    Args:
        table: One row per kind and factor: columns kind, factor, and for each metric of `SCALED` the columns
            ``<metric>``, ``<metric>_low``, ``<metric>_high`` and ``<metric>_paper``
            (`nemolib.experiments_ablations.scaling_table`).

    Raises:
        ValueError: The table has no VM or TM rows.

    Taught in: 05
    """
    kinds = _kinds(table)
    with mpl.rc_context(neurips(aspect=0.42)):
        figure = Figure()
        panels = figure.subplots(1, len(SCALED))
        for axes, metric in zip(panels, SCALED, strict=True):
            for kind in kinds:
                _draw_factors(axes, table[table["kind"] == kind].sort_values("factor"), metric, kind)
            axes.set_title(METRICS[metric])
            axes.set_xticks([-1, -0.5, 0, 0.5, 1])
            axes.grid(axis="y", alpha=0.4)
        panels[1].set_xlabel("factor (1: all neurons active, 0: deactivated)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(kinds))
    return figure


def scaled_images(grid: Grid) -> Figure:
    """Return images of one prompt whose neurons are scaled: a row for each factor, a column for each seed.

    Args:
        grid: What `nemolib.experiments_ablations.scaling_grid` returned.

    Taught in: 05
    """
    return image_grid(grid, fraction=min(1.0, 0.15 * (1 + len(grid.columns))))


def figure_14(table: pd.DataFrame) -> Figure:
    """Return Fig. 14: the number of neurons for each pair of thresholds, as a heat map with numbers.

    The first column is the initial selection, the others what is left of it after refinement. In brackets: the paper's.

    Source: Fig. 14.

    Args:
        table: One row per kind and pair: columns kind, initial, refinement (names of the thresholds, the lowest first),
            initial_neurons, neurons, and both with the suffix ``_paper``
            (`nemolib.experiments_ablations.threshold_map`).

    Raises:
        ValueError: The table has no VM or TM rows.

    Taught in: 05
    """
    kinds = _kinds(table)
    with mpl.rc_context(neurips(aspect=0.45)):
        figure = Figure()
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            part = table[table["kind"] == kind]
            ours, theirs = (
                _with_initial(_matrix(part, f"neurons{end}"), part, f"initial_neurons{end}") for end in ("", "_paper")
            )
            norm = LogNorm(1, max(10.0, float(np.nanmax(np.maximum(ours, 1)))))
            _heat_map(axes, np.maximum(ours, 1), norm, texts=_texts(ours, theirs, "{:g}"))
            levels = list(dict.fromkeys(part["initial"]))
            _name_axes(axes, levels, ["not refined", *levels], label=axes is panels[0])
            axes.axvline(0.5, color="white", linewidth=2)
            axes.set_title(f"{role(kind).label}: neurons")
    return figure


def figure_15(table: pd.DataFrame) -> Figure:
    """Return Fig. 15: SSCD_Gen and SSCD_Orig for each pair of thresholds, as heat maps with numbers.

    All cells have the colours of 0 to 1, so that panels can be compared. In brackets: the paper's.

    Source: Fig. 15.

    Args:
        table: As for `figure_14`, with the columns sscd_gen and sscd_orig.

    Raises:
        ValueError: The table has no VM or TM rows.

    Taught in: 05
    """
    kinds = _kinds(table)
    with mpl.rc_context(neurips(aspect=0.36 * len(MAPS))):
        figure = Figure()
        panels = figure.subplots(len(MAPS), len(kinds), squeeze=False)
        for row, (metric, title) in zip(panels, MAPS.items(), strict=True):
            for axes, kind in zip(row, kinds, strict=True):
                part = table[table["kind"] == kind]
                ours, theirs = (_matrix(part, f"{metric}{end}") for end in ("", "_paper"))
                _heat_map(axes, ours, Normalize(0, 1), texts=_texts(ours, theirs, "{:.2f}"))
                levels = list(dict.fromkeys(part["initial"]))
                _name_axes(axes, levels, levels, label=axes is row[0], below=row is panels[-1])
                axes.set_title(f"{role(kind).label}: {title}")
    return figure


def figure_ladder(table: pd.DataFrame, *, threshold: float | None = None) -> Figure:
    """Return how neurons, memorization score and copy similarity depend on the number of copies in training.

    Points are prompts, lines join the medians of the rungs.

    Args:
        table: One row per prompt: columns copies, neuron_count, score_before, score_after, copy_before, copy_after
            (`nemolib.experiments_ablations.ladder_table`). Without rows the figure says so.
        threshold: Memorization threshold, drawn in the panel of the score; None draws none.

    Taught in: 05
    """
    names = {"neuron_count": "neurons", "score": "memorization score", "copy": "copy similarity"}
    with mpl.rc_context(neurips(aspect=0.42)):
        figure = Figure()
        if table.empty:
            figure.text(0.5, 0.5, "no duplication ladder in this profile", ha="center", va="center")
            return figure
        panels = figure.subplots(1, 3)
        for axes, (name, label) in zip(panels, names.items(), strict=True):
            if name == "neuron_count":
                _draw_rungs(axes, table, name, "ladder", BEFORE)
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            else:
                _draw_rungs(axes, table, f"{name}_before", "ladder", BEFORE)
                _draw_rungs(axes, table, f"{name}_after", "deactivated", AFTER)
            axes.set_title(label)
            _copies_axis(axes, sorted(table["copies"].unique()))
        if threshold is not None:
            panels[1].axhline(threshold, color="black", linestyle="--", linewidth=0.9, label="memorization threshold")
        panels[1].set_xlabel("copies in training (regular caption = 1)")
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _kinds(table: pd.DataFrame) -> list[str]:
    """Return the kinds that are drawn; raise if there are none."""
    kinds = [kind for kind in KINDS if kind in set(table["kind"])]
    if not kinds:
        raise ValueError(f"the table has the kinds {sorted(set(table['kind']))}; needed: one of {', '.join(KINDS)}")
    return kinds


def _draw_factors(axes: Axes, rows: pd.DataFrame, metric: str, kind: str) -> None:
    look = role(kind)
    axes.fill_between(
        rows["factor"], rows[f"{metric}_low"], rows[f"{metric}_high"], color=look.color, alpha=0.15, linewidth=0
    )
    axes.plot(
        rows["factor"], rows[metric], linestyle=look.line, marker=look.marker, color=look.color, markersize=3.5,
        label=f"{look.label}, ours",
    )  # fmt: skip
    axes.plot(
        rows["factor"], rows[f"{metric}_paper"], linestyle="", marker=look.marker, color=look.color, markersize=3.5,
        markerfacecolor="white", markeredgewidth=0.8, label=f"{look.label}, paper",
    )  # fmt: skip


def _matrix(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Return a column as an array [initial threshold, refinement threshold], missing where there is no pair."""
    levels = list(dict.fromkeys(rows["initial"]))
    wide = rows.pivot(index="initial", columns="refinement", values=column)
    return wide.reindex(index=levels, columns=levels).to_numpy(dtype=float)


def _with_initial(matrix: np.ndarray, rows: pd.DataFrame, column: str) -> np.ndarray:
    """Return a matrix with the neurons of the initial selection as the first column."""
    first = rows.drop_duplicates("initial")[column].to_numpy(dtype=float)
    return np.column_stack([first, matrix])


def _texts(ours: np.ndarray, theirs: np.ndarray, pattern: str) -> list[list[str]]:
    """Return what is written into each cell: ours, and below it the paper's in brackets if it is known."""
    written = []
    for row, other in zip(ours, theirs, strict=True):
        cells = zip(row, other, strict=True)
        written.append(
            [
                "" if np.isnan(value) else pattern.format(value) + ("" if np.isnan(known) else f"\n({known:g})")
                for value, known in cells
            ]
        )
    return written


def _heat_map(axes: Axes, values: np.ndarray, norm: Normalize, *, texts: Sequence[Sequence[str]]) -> None:
    """Draw a matrix in colours, with a text in each cell; missing cells stay white."""
    image = axes.imshow(np.ma.masked_invalid(values), norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            # Dark text on the light end of the colour map, light text on its dark end.
            color = "black" if image.norm(value) > 0.6 else "white"
            axes.text(column, row, texts[row][column], ha="center", va="center", color=color, fontsize=TICK_SIZE)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def _name_axes(
    axes: Axes, rows: Sequence[str], columns: Sequence[str], *, label: bool = True, below: bool = True
) -> None:
    """Name the thresholds; the rows once for a row of panels, the columns once for a column of them."""
    axes.set_xticks(range(len(columns)), [_short(name) for name in columns] if below else [])
    axes.set_yticks(range(len(rows)), [_short(name) for name in rows] if label else [])
    if below:
        axes.set_xlabel("refinement threshold")
    if label:
        axes.set_ylabel("initial threshold")


def _short(level: str) -> str:
    """Return the name of a threshold in two lines, such as ``mean`` above ``+ 1 sd``."""
    return level.replace("mean ", "mean\n").replace("not refined", "not\nrefined")


def _draw_rungs(axes: Axes, table: pd.DataFrame, column: str, name: str, label: str) -> None:
    look, medians = role(name), table.groupby("copies")[column].median()
    axes.plot(
        table["copies"], table[column], linestyle="", marker=look.marker, color=look.color, alpha=0.5, markersize=3
    )
    axes.plot(
        medians.index, medians, linestyle=look.line, marker=look.marker, color=look.color, markersize=3.5, label=label
    )


def _copies_axis(axes: Axes, rungs: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(rungs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
