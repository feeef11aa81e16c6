"""Figures of notebook 05, second half: image quality against blocked neurons, and layers switched off one by one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nemolib.experiments_blocking import FREQUENT, OTHER, QUALITY, UNTOUCHED
from nemolib.theme import TICK_SIZE, neurips, role

LABELS = {
    FREQUENT: "most frequent memorization neurons",
    OTHER: "random other neurons",
    UNTOUCHED: "all neurons active",
}
"""Settings as legends call them."""

NAMES = {"sscd_orig": r"SSCD$_{Orig}$", "a_clip": r"A$_{CLIP}$"}
"""Metrics as they are written in figures."""

TITLES = {"value": "value layers set to zero", "key": "key layers set to zero"}
"""Parts as titles call them."""

SHIFT = 1.06
"""Factor by which random neurons stand beside the frequent ones, so that their intervals can be told apart."""


def figure_5a(summary: pd.DataFrame) -> Figure:
    """Return Fig. 5a: FID and KID of unmemorized prompts against the number of blocked neurons.

    Source: Fig. 5a.

    Args:
        summary: Columns metric, setting, asked, neurons, mean, sd, reason
            (`nemolib.experiments_blocking.quality_summary`).

    Raises:
        ValueError: A metric is missing.

    Taught in: 05
    """
    return _quality(summary, ("fid", "kid"))


def figure_8(summary: pd.DataFrame) -> Figure:
    """Return Fig. 8: FID, CLIP-FID and KID of unmemorized prompts against the number of blocked neurons.

    Source: Fig. 8.

    Args:
        summary: As for `figure_5a`.

    Raises:
        ValueError: A metric is missing.

    Taught in: 05
    """
    return _quality(summary, tuple(QUALITY))


def figure_16(effects: pd.DataFrame) -> Figure:
    """Return Fig. 16: similarity to the planted image with each value and each key layer set to zero, one at a time.

    Small points are prompts (median over seeds), large ones their median.

    Source: Fig. 16.

    Args:
        effects: Columns part, layer, block, sscd_orig (`nemolib.experiments_blocking.layer_effects`).

    Raises:
        ValueError: There are no value or no key layers.

    Taught in: 05
    """
    return _value_and_key(effects, "sscd_orig")


def figure_17(effects: pd.DataFrame) -> Figure:
    """Return Fig. 17: alignment of image and prompt with each value and each key layer set to zero, one at a time.

    Source: Fig. 17.

    Args:
        effects: As for `figure_16`, with the column a_clip.

    Raises:
        ValueError: There are no value or no key layers.

    Taught in: 05
    """
    return _value_and_key(effects, "a_clip")


def figure_convolutions(effects: pd.DataFrame) -> Figure:
    """Return similarity and alignment with half of the channels of each convolution of the down blocks blocked.

    Source: Fig. 20, which shows images alone.

    Args:
        effects: Columns part, layer, block, sscd_orig, a_clip (`nemolib.experiments_blocking.layer_effects`).

    Raises:
        ValueError: There are no convolutions.

    Taught in: 05
    """
    with mpl.rc_context(neurips(aspect=0.42)):
        figure = Figure()
        for axes, metric in zip(figure.subplots(1, 2), NAMES, strict=True):
            _draw_layers(axes, effects, "convolution", metric)
            axes.set_xlabel("convolution of the down blocks")
            axes.set_ylabel(NAMES[metric])
        _legend(figure)
    return figure


def _quality(summary: pd.DataFrame, chosen: Sequence[str]) -> Figure:
    """Return a panel for each metric."""
    missing = [name for name in chosen if name not in set(summary["metric"])]
    if missing:
        raise ValueError(f"the table has no {missing[0]}; its metrics: {sorted(set(summary['metric']))}")
    with mpl.rc_context(neurips(aspect=0.45 if len(chosen) == 2 else 0.38)):
        figure = Figure()
        panels = figure.subplots(1, len(chosen))
        for axes, name in zip(panels, chosen, strict=True):
            rows = summary[summary["metric"] == name]
            if rows["mean"].isna().all():
                _say(axes, str(rows["reason"].iloc[0]))
            else:
                _draw_quality(axes, rows)
                axes.set_xlabel("blocked neurons")
            axes.set_title(QUALITY[name])
        if panels[0].get_legend_handles_labels()[0]:
            _legend(figure)
    return figure


def _draw_quality(axes: Axes, rows: pd.DataFrame) -> None:
    base = rows[rows["setting"] == UNTOUCHED].iloc[0]
    axes.axhline(base["mean"], color="black", linestyle=":", label=LABELS[UNTOUCHED])
    if not pd.isna(base["sd"]):
        axes.axhspan(base["mean"] - base["sd"], base["mean"] + base["sd"], color="0.9", zorder=0)
    look = role("deactivated")
    styles = {
        FREQUENT: {"color": look.color, "marker": look.marker, "linestyle": "-"},
        OTHER: {"color": "0.4", "marker": "o", "linestyle": "--", "markerfacecolor": "white"},
    }
    for setting, style in styles.items():
        part = rows[rows["setting"] == setting].sort_values("asked")
        if part.empty:
            continue
        shift = SHIFT if setting == OTHER else 1.0
        # A point that was measured once has no interval.
        axes.errorbar(
            part["neurons"] * shift, part["mean"], part["sd"].fillna(0), capsize=2, label=LABELS[setting], **style
        )
    asked = sorted({int(count) for count in rows["asked"] if count > 0})
    if asked:
        axes.set_xscale("log")
        axes.set_xticks(asked, [str(count) for count in asked])
        axes.xaxis.set_minor_locator(NullLocator())


def _value_and_key(effects: pd.DataFrame, metric: str) -> Figure:
    with mpl.rc_context(neurips(aspect=0.42)):
        figure = Figure()
        panels = figure.subplots(1, len(TITLES), sharey=True)
        for axes, (part, title) in zip(panels, TITLES.items(), strict=True):
            _draw_layers(axes, effects, part, metric)
            axes.set_title(title, pad=14)
            axes.set_xlabel("cross-attention layer")
        panels[0].set_ylabel(NAMES[metric])
        _legend(figure)
    return figure


def _draw_layers(axes: Axes, effects: pd.DataFrame, part: str, metric: str) -> None:
    rows = effects[effects["part"] == part]
    if effects.empty:
        _say(axes, "not computed: there are no memorized prompts")
        return
    if rows.empty:
        raise ValueError(f"the table has no layers of part {part!r}; its parts: {sorted(set(effects['part']))}")
    numbers = sorted(set(rows["layer"]))
    if rows[metric].isna().all():
        _say(axes, "not known: no prompt has a training image")
        return
    look = role("vm")
    medians = rows.groupby("layer")[metric].median()
    base = effects.loc[effects["part"] == UNTOUCHED, metric].median()
    axes.axhline(base, color="black", linestyle=":", label="untouched model, median")
    axes.plot(
        rows["layer"], rows[metric], look.marker, color=look.color, markersize=2, alpha=0.5, markeredgewidth=0,
        label="a prompt, layer switched off",
    )  # fmt: skip
    axes.plot(medians.index, medians, "D-", color="black", markersize=3.5, linewidth=0.6, label="median over prompts")
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.set_xticks(numbers if len(numbers) <= 10 else numbers[:: 1 + len(numbers) // 10])
    _mark_blocks(axes, rows)


def _mark_blocks(axes: Axes, rows: pd.DataFrame) -> None:
    """Shade every other block of the UNet, and write its name above."""
    blocks = rows.groupby("block", sort=False)["layer"].agg(["min", "max"]).sort_values("min")
    if len(blocks) < 2:
        return
    for place, (block, ends) in enumerate(blocks.iterrows()):
        left, right = ends["min"] - 0.5, ends["max"] + 0.5
        if place % 2:
            axes.axvspan(left, right, color="0.93", zorder=0)
        axes.annotate(
            block, ((left + right) / 2, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom",
            fontsize=TICK_SIZE,
        )  # fmt: skip


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _say(axes: Axes, text: str) -> None:
    """Write in place of data why there are none."""
    axes.set_axis_off()
    axes.annotate(
        "\n".join(textwrap.wrap(text, 34)), (0.5, 0.5), xycoords="axes fraction", ha="center", va="center",
        fontsize=TICK_SIZE,
    )  # fmt: skip
