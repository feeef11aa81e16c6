"""Figures of notebook 04: what every mitigation of Table 1 does, and what deactivation does to unmemorized prompts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemolib.theme import TEXT_WIDTH, neurips, role

METRICS = {
    "sscd_orig": r"SSCD$_{Orig}$",
    "sscd_gen": r"SSCD$_{Gen}$",
    "d_sscd": r"D$_{SSCD}$",
    "a_clip": r"A$_{CLIP}$",
}
"""Metrics of Table 1 as they are written in figures."""

SHORT = {
    "all neurons active": "untouched",
    "prompt embedding adjustment (Wen)": "Wen",
    "random neurons": "random",
    "attention scaling (Ren)": "Ren",
    "1 random token (Somepalli)": "1 token",
    "4 random tokens (Somepalli)": "4 tokens",
    "10 random tokens (Somepalli)": "10 tokens",
    "NeMo, initial selection": "initial",
}
"""Settings of Table 1 where there is little room."""

KINDS = ("vm", "tm")
"""Kinds of prompts that are drawn, in this order."""

ROW = 0.3
"""Height of a setting in inches."""


def figure_table_1(table: pd.DataFrame) -> Figure:
    """Return Table 1 as a figure: a panel for each metric, a row for each setting, VM and TM.

    Filled: ours, median over prompts with its 95 % bootstrap interval. Hollow: the paper's median, where it has one.

    Source: Table 1.

    Args:
        table: One row per setting and kind: columns setting, kind, and for each metric of `METRICS` the columns
            ``<metric>``, ``<metric>_low``, ``<metric>_high`` and ``<metric>_paper`` (missing where the paper has none).

    Raises:
        ValueError: The table has no VM or TM rows.

    Taught in: 04
    """
    kinds = [kind for kind in KINDS if kind in set(table["kind"])]
    if not kinds:
        raise ValueError(f"the table has the kinds {sorted(set(table['kind']))}; needed: one of {', '.join(KINDS)}")
    settings = list(dict.fromkeys(table["setting"]))
    height = ROW * len(settings) + 0.9
    with mpl.rc_context(neurips(aspect=height / TEXT_WIDTH)):
        figure = Figure()
        panels = figure.subplots(1, len(METRICS), sharey=True)
        for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
            for shift, kind in zip(_shifts(len(kinds)), kinds, strict=True):
                _draw_metric(axes, table[table["kind"] == kind].set_index("setting"), settings, metric, kind, shift)
            axes.set_title(title)
            axes.set_xlim(*_limits(table, metric))
            axes.grid(axis="x", alpha=0.4)
        panels[0].set_yticks(range(len(settings)), ["\n".join(textwrap.wrap(name, 24)) for name in settings])
        panels[0].set_ylim(len(settings) - 0.5, -0.5)
        handles, labels = panels[0].get_legend_handles_labels()
        chosen = dict(zip(labels, handles, strict=True))
        figure.legend(chosen.values(), chosen.keys(), loc="outside lower center", ncols=len(chosen))
    return figure


def figure_unharmed(table: pd.DataFrame) -> Figure:
    """Return how unmemorized prompts fare when memorization neurons are deactivated.

    A point is a prompt: left the alignment of its images with the prompt, right the similarity of its images to each
    other, with all neurons active (horizontal) and without (vertical). On the dotted line nothing changes. A metric that
    no prompt has, such as the similarity of two images if there is one per prompt, has no panel.

    Args:
        table: One row per prompt: a_clip and d_sscd, each with ``_before``, ``_one`` and ``_all``
            (`nemolib.experiments_mitigation.unmemorized_table`).

    Raises:
        ValueError: There are no prompts, or no values.

    Taught in: 04
    """
    drawn = [name for name in ("a_clip", "d_sscd") if table[f"{name}_before"].notna().any()]
    if not drawn:
        raise ValueError("there are no unmemorized prompts to draw")
    look, off = role("unmemorized"), role("deactivated")
    markers = {
        "one": {"marker": look.marker, "color": look.color, "label": "without the neurons of one memorized prompt"},
        "all": {"marker": off.marker, "color": off.color, "label": "without those of all memorized prompts"},
    }
    with mpl.rc_context(neurips(0.8, aspect=0.6)):
        figure = Figure()
        for axes, metric in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
            columns = table[[f"{metric}_before", *(f"{metric}_{name}" for name in markers)]]
            low, high = float(columns.min().min()), float(columns.max().max())
            margin = 0.05 * (high - low) or 0.05
            axes.axline((low, low), slope=1, color="black", linestyle=":", linewidth=0.8)
            for name, style in markers.items():
                axes.plot(table[f"{metric}_before"], table[f"{metric}_{name}"], linestyle="", markersize=3, **style)
            axes.set_xlim(low - margin, high + margin)
            axes.set_ylim(low - margin, high + margin)
            axes.set_aspect("equal")
            axes.set_title(METRICS[metric])
            axes.set_xlabel("all neurons active")
        figure.axes[0].set_ylabel("neurons deactivated")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


def short_names(settings: Sequence[str]) -> tuple[str, ...]:
    """Return the names of settings where there is little room, as above an image."""
    return tuple(SHORT.get(name, name) for name in settings)


def _draw_metric(axes: Axes, rows: pd.DataFrame, settings: list[str], metric: str, kind: str, shift: float) -> None:
    look = role(kind)
    places = [place + shift for place, name in enumerate(settings) if name in rows.index]
    chosen = rows.loc[[name for name in settings if name in rows.index]]
    axes.hlines(places, chosen[f"{metric}_low"], chosen[f"{metric}_high"], color=look.color, linewidth=1)
    axes.plot(chosen[metric], places, look.marker, color=look.color, markersize=3.5, label=f"{look.label}, ours")
    axes.plot(
        chosen[f"{metric}_paper"], places, look.marker, color=look.color, markersize=3.5, markerfacecolor="white",
        markeredgewidth=0.8, label=f"{look.label}, paper",
    )  # fmt: skip


def _shifts(number: int) -> list[float]:
    """Return where the kinds stand around the middle of a row."""
    return [0.0] if number == 1 else [-0.16, 0.16]


def _limits(table: pd.DataFrame, metric: str) -> tuple[float, float]:
    """Return a range that holds 0 and all values, up to the next tenth, with a margin; rounding errors do not count."""
    values = pd.concat([table[f"{metric}{suffix}"] for suffix in ("", "_low", "_high", "_paper")]).dropna()
    low, high = min(0.0, float(values.min())), float(values.max())
    return low - 0.04, math.ceil(round(10 * high, 3)) / 10 + 0.05
