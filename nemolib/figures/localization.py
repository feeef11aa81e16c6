"""Figures of notebook 03: how many neurons, in which layers, how the search goes, what deactivation does."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemolib.neurons import NeuronSet
from nemolib.theme import LABEL_SIZE, TICK_SIZE, neurips, role

MEMORIZED = ("vm", "tm")
"""Kinds of prompts that are drawn, in this order."""


def figure_4a(table: pd.DataFrame, *, bins: int = 12) -> Figure:
    """Return Fig. 4a: a histogram of the number of memorization neurons per prompt, VM and TM.

    Source: Fig. 4a.

    Args:
        table: One row per prompt with the columns kind and neuron_count (see
            `nemolib.experiments_localization.localizations`).
        bins: Number of bars of each kind.

    Raises:
        ValueError: The table has no VM or TM prompts.

    Taught in: 03
    """
    with mpl.rc_context(neurips(0.5, aspect=0.75)):
        figure = Figure()
        axes = figure.subplots()
        _histogram(axes, table, "neuron_count", bins=bins, medians=True)
        axes.set_xlabel("memorization neurons per prompt")
        axes.set_ylabel("prompts")
        _legend_above(axes)
    return figure


def figure_4b(table: pd.DataFrame) -> Figure:
    """Return Fig. 4b: the mean number of memorization neurons per prompt in each value layer, VM and TM.

    Source: Fig. 4b. Layers are numbered from 1, as in the paper.

    Args:
        table: One row per prompt with the columns kind and neurons (JSON of a neuron set).

    Raises:
        ValueError: The table has no VM or TM prompts.

    Taught in: 03
    """
    means = layer_means(table)
    with mpl.rc_context(neurips(0.5, aspect=0.75)):
        figure = Figure()
        axes = figure.subplots()
        _grouped_bars(axes, {kind: row.to_numpy() for kind, row in means.iterrows()}, list(means.columns))
        axes.set_xlabel("value layer")
        axes.set_ylabel("neurons per prompt (mean)")
        _legend_above(axes)
    return figure


def figure_7(table: pd.DataFrame, *, bins: int = 12) -> Figure:
    """Return Fig. 7: histograms of the number of neurons after the initial selection and after refinement.

    Source: Fig. 7.

    Args:
        table: One row per prompt with the columns kind, initial_count and neuron_count.
        bins: Number of bars of each kind.

    Raises:
        ValueError: The table has no VM or TM prompts.

    Taught in: 03
    """
    with mpl.rc_context(neurips(aspect=0.4)):
        figure = Figure()
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (column, title) in zip(
            panels, (("initial_count", "initial selection"), ("neuron_count", "after refinement")), strict=True
        ):
            _histogram(axes, table, column, bins=bins, medians=True)
            axes.set_title(title)
            axes.set_xlabel("neurons per prompt")
        panels[0].set_ylabel("prompts")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def figure_search(steps: pd.DataFrame, tests: pd.DataFrame) -> Figure:
    """Return the course of one search: the score and the number of deactivated neurons, step by step.

    Left the initial selection (Alg. 3) over its thresholds theta, right the refinement (Alg. 4) test by test.

    Args:
        steps: Columns theta, neurons, score, threshold (`nemolib.experiments_localization.search_steps`).
        tests: Columns test, layer, neuron, score, removed, left (`nemolib.experiments_localization.search_tests`).

    Raises:
        ValueError: There are no steps.

    Taught in: 03
    """
    if steps.empty:
        raise ValueError("the search has no steps; choose a prompt that passes the gate")
    threshold = float(steps["threshold"].iloc[0])
    with mpl.rc_context(neurips(aspect=0.5)):
        figure = Figure()
        panels = figure.subplots(2, 2, sharex="col", gridspec_kw={"width_ratios": (1, 2)})
        _draw_steps(panels[:, 0], steps)
        _draw_tests(panels[:, 1], tests)
        # Where the initial selection did not reach the threshold, its own score takes the threshold's place.
        for axes, line in zip(panels[0], (threshold, max(threshold, steps["score"].iloc[-1])), strict=True):
            axes.axhline(line, color="black", linestyle=":", linewidth=0.8)
            axes.set_ylim(0, 1.05)
        panels[0, 0].annotate(
            r"threshold $\tau$", (0.03, threshold), xycoords=("axes fraction", "data"), ha="left", va="bottom",
            fontsize=TICK_SIZE,
        )  # fmt: skip
        panels[0, 0].set_ylabel("score")
        panels[1, 0].set_ylabel("neurons off")
        figure.legend(*panels[0, 1].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


def figure_scores(table: pd.DataFrame, *, threshold: float | None = None) -> Figure:
    """Return scores and copy similarity of each prompt before and after its neurons are deactivated.

    Each point is a prompt; below the diagonal it is less memorized after than before.

    Args:
        table: Columns kind, score_before, score_after, copy_before, copy_after
            (`nemolib.experiments_localization.deactivation`).
        threshold: Memorization threshold, drawn in the panel of the score; None draws none.

    Raises:
        ValueError: The table has no VM or TM prompts.

    Taught in: 03
    """
    panels = (("score", "memorization score"), ("copy", "similarity to the planted image"))
    with mpl.rc_context(neurips(aspect=0.5)):
        figure = Figure()
        for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
            _before_after(axes, table, f"{name}_before", f"{name}_after")
            axes.set_title(title)
        if threshold is not None:
            figure.axes[0].axhline(threshold, color="black", linestyle="--", linewidth=0.8)
        figure.axes[0].legend(loc="upper left")
    return figure


def figure_neuron_z(table: pd.DataFrame, *, theta: float = 1.0, layers: int = 7) -> Figure:
    """Return the z-scores of the memorization neurons, by value layer.

    Neurons within the band at 0 were chosen for their large activation alone.

    Args:
        table: One row per neuron of a prompt with the columns kind, layer (from 0) and z
            (`nemolib.experiments_localization.neuron_z_scores`).
        theta: Smallest threshold of the search, drawn as a band.
        layers: Number of value layers.

    Raises:
        ValueError: The table has no VM or TM prompts.

    Taught in: 03
    """
    with mpl.rc_context(neurips(0.6, aspect=0.65)):
        figure = Figure()
        axes = figure.subplots()
        for place, (kind, rows) in zip((-0.18, 0.18), _by_kind(table), strict=False):
            look = role(kind)
            spread = np.resize(np.linspace(-0.12, 0.12, 7), len(rows))
            axes.plot(
                rows["layer"].to_numpy() + 1 + place + spread, rows["z"].to_numpy(), look.marker, color=look.color,
                markersize=2, alpha=0.7, markeredgewidth=0, label=look.label,
            )  # fmt: skip
        axes.axhspan(-theta, theta, color="0.9", zorder=0)
        axes.set_xticks(range(1, layers + 1))
        axes.set_xlim(0.5, layers + 0.5)
        axes.set_xlabel("value layer")
        axes.set_ylabel("z-score of the neuron")
        _legend_above(axes)
    return figure


MODELS = {"sparse": ("sparse values (shipped)", "0.2", ""), "plain": ("plain training", "0.7", "////")}
"""Label, colour and hatch of the two models of `figure_plain`."""

PLAIN_QUANTITIES = {
    "density": "density of\nvalues",
    "largest_z": "largest |z|\nof a layer",
    "initial_count": "neurons,\ninitial",
    "neuron_count": "neurons,\nrefined",
    "reached_share": "searches that\nreached $\\tau$",
    "copy_similarity": "copy similarity,\nneurons active",
    "copy_similarity_deactivated": "copy similarity,\nneurons off",
}
"""Quantities of `figure_plain` in the order of its panels, and their titles."""


def figure_plain(table: pd.DataFrame) -> Figure:
    """Return the model trained with sparse values beside the one trained plainly: where is memorization?

    Args:
        table: Columns model (sparse or plain), kind, quantity, value; several values of a quantity are shown by their
            median.

    Raises:
        ValueError: The table has none of the quantities that are drawn.

    Taught in: 03
    """
    names = [name for name in PLAIN_QUANTITIES if name in set(table["quantity"])]
    if not names:
        raise ValueError(
            f"no quantity to draw; known: {', '.join(PLAIN_QUANTITIES)}; got {sorted(set(table['quantity']))}"
        )
    values = table.groupby(["quantity", "kind", "model"], dropna=False, sort=False)["value"].median()
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with mpl.rc_context(neurips(aspect=0.3 * rows)):
        figure = Figure()
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panels, names, strict=False):
            _draw_models(axes, values[name].unstack("model"))
            axes.set_title(PLAIN_QUANTITIES[name], fontsize=TICK_SIZE)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        spare = panels[len(names)] if len(panels) > len(names) else None
        if spare is None:
            figure.legend(handles, labels, loc="outside lower center", ncols=2)
        else:
            spare.legend(handles, labels, loc="center")
    return figure


def layer_means(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean number of neurons per prompt by kind (rows) and value layer from 1 (columns).

    Raises:
        ValueError: The table has no VM or TM prompts.
    """
    counts = {
        kind: np.array([NeuronSet.from_json(text).counts for text in rows["neurons"]]) for kind, rows in _by_kind(table)
    }
    means = {kind: found.mean(axis=0) for kind, found in counts.items()}
    layers = len(next(iter(means.values())))
    return pd.DataFrame(means.values(), index=list(means), columns=range(1, layers + 1))


def _by_kind(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the memorized kinds that a table has, with their rows."""
    found = [(kind, table[table["kind"] == kind]) for kind in MEMORIZED]
    found = [(kind, rows) for kind, rows in found if len(rows)]
    if not found:
        raise ValueError(
            f"the table has no prompts of kind {' or '.join(MEMORIZED)}; its kinds: {sorted(set(table['kind']))}"
        )
    return found


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, columnspacing=1, handlelength=1.5)


def _histogram(axes: Axes, table: pd.DataFrame, column: str, *, bins: int, medians: bool) -> None:
    groups = {kind: rows[column].to_numpy(dtype=float) for kind, rows in _by_kind(table)}
    edges = count_edges(np.concatenate(list(groups.values())), bins)
    for place, (kind, values) in enumerate(groups.items()):
        look = role(kind)
        heights = np.histogram(values, edges)[0]
        width = np.diff(edges) / (len(groups) + 0.2)
        axes.bar(
            edges[:-1] + (place + 0.1) * width, heights, width, align="edge", color=look.color, edgecolor="white",
            hatch=look.hatch, label=f"{look.label}, {len(values)}",
        )  # fmt: skip
        if medians:
            axes.axvline(np.median(values), color=look.color, linestyle=look.line)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def count_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Return at most ``bins`` bins for counts: whole numbers wide, from 0 (which is a bin's first value) on."""
    width = max(1, int(np.ceil((values.max() + 1) / bins)))
    return np.arange(0, values.max() + 1 + width, width) - 0.5 * (width == 1)


def _grouped_bars(axes: Axes, groups: dict[str, np.ndarray], ticks: Sequence[int]) -> None:
    width = 0.8 / len(groups)
    for place, (kind, heights) in enumerate(groups.items()):
        look = role(kind)
        offset = (place - (len(groups) - 1) / 2) * width
        axes.bar(
            np.asarray(ticks) + offset, heights, width, color=look.color, edgecolor="white", hatch=look.hatch,
            label=look.label,
        )  # fmt: skip
    axes.set_xticks(list(ticks))


def _draw_steps(panels: Sequence[Axes], steps: pd.DataFrame) -> None:
    for axes, column, marker in zip(panels, ("score", "neurons"), ("o", "s"), strict=True):
        axes.plot(steps["theta"], steps[column], color="black", marker=marker)
    panels[0].invert_xaxis()
    panels[1].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2.5, 5, 10]))
    panels[1].yaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_title("initial selection")
    panels[1].set_ylim(bottom=0)
    panels[1].set_xlabel(r"threshold $\theta$ of the z-score")


def _draw_tests(panels: Sequence[Axes], tests: pd.DataFrame) -> None:
    removed, place = tests["removed"].to_numpy(dtype=bool), tests["test"].to_numpy()
    look = role("deactivated")
    for chosen, marker, color, label in (
        (removed, "o", "0.6", "not needed: reactivated"),
        (~removed, look.marker, role("vm").color, "needed: stays off"),
    ):
        panels[0].plot(
            place[chosen], tests["score"].to_numpy()[chosen], marker, color=color, label=label, markersize=2.5
        )
    panels[1].step(place, tests["left"], where="post", color="black")
    panels[0].set_title("refinement")
    for axis in (panels[1].xaxis, panels[1].yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    panels[1].set_ylim(bottom=0)
    panels[1].set_xlabel("test (layers first, then neurons)")


def _before_after(axes: Axes, table: pd.DataFrame, before: str, after: str) -> None:
    for kind, rows in _by_kind(table):
        look = role(kind)
        axes.plot(rows[before], rows[after], look.marker, color=look.color, markeredgewidth=0, label=look.label)
    values = table.loc[table["kind"].isin(MEMORIZED), [before, after]].to_numpy(dtype=float)
    low = min(0.0, float(np.nanmin(values)) - 0.05)
    axes.plot([low, 1], [low, 1], color="0.6", linestyle=":", linewidth=0.8)
    axes.set(xlim=(low, 1.02), ylim=(low, 1.02), aspect="equal")
    axes.set_xlabel("all neurons active")
    axes.set_ylabel("its neurons deactivated")


def _draw_models(axes: Axes, values: pd.DataFrame) -> None:
    kinds = [kind for kind in ("vm", "tm", "unmemorized") if kind in values.index]
    kinds += [kind for kind in values.index if kind not in kinds]
    models = [model for model in MODELS if model in values.columns]
    for place, model in enumerate(models):
        label, color, hatch = MODELS[model]
        offset = (place - (len(models) - 1) / 2) * 0.4
        axes.bar(
            np.arange(len(kinds)) + offset, values.loc[kinds, model], 0.4, color=color, hatch=hatch, edgecolor="white",
            label=label,
        )  # fmt: skip
    names = {"vm": "VM", "tm": "TM", "unmemorized": "unmem."}
    axes.set_xticks(range(len(kinds)), [names.get(kind, "" if pd.isna(kind) else str(kind)) for kind in kinds])
    axes.tick_params(axis="x", length=0, labelsize=LABEL_SIZE - 2)
