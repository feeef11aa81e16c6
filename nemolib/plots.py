"""How figures look, and the few plots that they are made of: the NeurIPS style, fixed colours and second cues.

    with panels(1, 2, aspect=0.4) as (figure, axes):
        before_after(axes[0], table, "score")

Everything that tells kinds apart has a second cue besides its colour: a marker, a line style or a hatch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter
from tueplots import figsizes, fontsizes

from nemolib.store import Grid

# It wonders about the date of the font that comes with matplotlib.
logging.getLogger("fontTools.ttLib.tables._h_e_a_d").setLevel(logging.ERROR)

TEXT_WIDTH = figsizes.neurips2024()["figure.figsize"][0]
"""Width of the text in the NeurIPS style, in inches."""

LABEL_SIZE, TICK_SIZE = (fontsizes.neurips2024()[f"{name}"] for name in ("axes.labelsize", "xtick.labelsize"))
"""Sizes of labels and of ticks and legends, in points."""

LINE = 0.6
"""Width of axes and ticks, in points; all other widths are multiples of it."""

GREY = "0.35"

FONTS = ["STIXGeneral", "DejaVu Serif"]
"""A Times-like font that comes with matplotlib, so that a figure has the same bytes on every machine; for print."""

SCREEN_FONT, SCREEN_SCALE, SCREEN_DPI, SCREEN_IMAGES_DPI = "DejaVu Sans", 0.86, 220, 132
"""What takes its place on a screen, with letters that are larger at the same size; and pixels in an inch, without and with images."""

FILE_DPI, IMAGES_DPI = 300, 180
"""Pixels in an inch of files, and where they hold images: two or three for each pixel of those of the tiny world."""


class Figure(mpl.figure.Figure):
    """A figure that shows itself in a notebook as it is made for a screen: twice the pixels, without serifs."""

    def _ipython_display_(self) -> None:
        from IPython.display import Image, display

        png = _png(self, SCREEN_IMAGES_DPI) if _images(self) else _few_colours(_png(self, SCREEN_DPI))
        display(Image(png, format="png", width=round(130 * self.get_figwidth())))


def _images(figure: mpl.figure.Figure) -> bool:
    return any(axes.images for axes in figure.axes)


def minus(text: str) -> str:
    """Return a text with true minus signs."""
    return re.sub(r"(^|[\s(\[])-(?=[\s\d])", "\\1−", text)


@dataclass(frozen=True, slots=True)
class Role:
    """How one kind of prompt or condition looks: a colour of Okabe and Ito or grey, marker, line style and hatch."""

    label: str
    color: str
    marker: str
    line: Any
    hatch: str

    @property
    def short(self) -> str:
        """The label where there is little room: what stands in brackets, if anything does."""
        return self.label.partition("(")[2].rstrip(")") or self.label

    def line_style(self, **changes: Any) -> dict[str, Any]:
        """Return what `Axes.plot` takes, with a label."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.line, "label": self.label} | changes

    def filled(self, label: str) -> dict[str, Any]:
        """Return what `Axes.hist` takes for an area, with a label."""
        colors = {"facecolor": (self.color, 0.35), "edgecolor": self.color}
        return {"histtype": "stepfilled", "hatch": self.hatch, "label": label} | colors

    def beside_paper(self, rows: pd.DataFrame, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what `Axes.plot` takes for ours, filled, with the number of prompts, and for the paper's, hollow, no line."""
        number = f", n = {rows['prompts'].max()}"
        ours = self.line_style(markersize=3.5, label=f"{self.label}, ours{number}", **changes)
        hollow = {"linestyle": "", "markerfacecolor": "white", "markeredgewidth": 0.8, "label": f"{self.label}, paper"}
        return ours, ours | hollow


ROLES: dict[str, Role] = {
    "vm": Role("verbatim (VM)", "#D55E00", "o", "-", ""),
    "tm": Role("template (TM)", "#0072B2", "s", "--", "////"),
    "unmemorized": Role("unmemorized", "#009E73", "^", ":", "...."),
    "ladder": Role("duplication ladder", "#CC79A7", "D", "-.", "xxxx"),
    "deactivated": Role("neurons deactivated", "#56B4E9", "v", (0, (1, 1)), "----"),
    "holdout": Role("holdout", "#7F7F7F", "x", (0, (4, 1, 1, 1)), "\\\\\\\\"),
}
"""The look of each role, the same in every figure."""

METRICS = {
    "sscd_orig": r"SSCD$_{Orig}$",
    "sscd_gen": r"SSCD$_{Gen}$",
    "d_sscd": r"D$_{SSCD}$",
    "a_clip": r"A$_{CLIP}$",
}
"""Metrics of Table 1 as they are written in figures."""


def neurips(fraction: float = 1.0, *, aspect: float = 0.618) -> dict[str, Any]:
    """Return matplotlib's settings for a figure of the NeurIPS style, to be used in ``matplotlib.rc_context``.

    Args:
        fraction: Width as a share of the text width, in (0, 1].
        aspect: Height divided by width.
    """
    size = figsizes.neurips2024(rel_width=fraction, ncols=1, height_to_width_ratio=aspect, pad_inches=0.0)
    # The family itself and not "serif": that name would be looked up when the figure is drawn, outside the context.
    fonts = {"font.family": FONTS, "mathtext.fontset": "cm", "text.usetex": False}
    lines = {"lines.linewidth": 2 * LINE, "lines.markersize": 5 * LINE}
    lines |= dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width", "patch.linewidth"), LINE)
    lines |= dict.fromkeys(("xtick.minor.width", "ytick.minor.width", "hatch.linewidth", "grid.linewidth"), LINE / 2)
    plain = dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False)
    plain |= {"figure.dpi": 150}
    return size | fontsizes.neurips2024() | fonts | lines | plain


@contextlib.contextmanager
def panels(
    rows: int = 1, columns: int = 1, *, fraction: float = 1.0, aspect: float = 0.618, legend: int = 0, **grid: Any
) -> Iterator[tuple[Figure, Any]]:
    """Give a figure in the house style and its axes: one, or an array of them; inside the context the style holds.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        fraction: Width as a share of the text width.
        aspect: Height divided by width.
        legend: Columns of the legend, above a single panel and below several (an array); 0: none.
        grid: What `Figure.subplots` takes, such as ``sharey=True``.
    """
    with mpl.rc_context(neurips(fraction, aspect=aspect)):
        figure = Figure()
        axes = figure.subplots(rows, columns, **grid)
        yield figure, axes
        if legend:
            legend_above(axes, columns=legend) if isinstance(axes, Axes) else legend_below(figure, columns=legend)
        # The first layout of axes of equal aspect cuts titles; the next one, when the figure is written, has room for them.
        figure.draw_without_rendering()


# Distributions


def distributions(axes: Axes, parts: Mapping[str, pd.DataFrame], column: str, *, xlabel: str, bins: Any = 24) -> None:
    """Draw shares of the prompts of each kind over a column, overlapping, with a short line below for each prompt."""
    edges = np.histogram_bin_edges(pd.concat(parts.values())[column], bins=bins)
    for level, (kind, part) in enumerate(parts.items()):
        look, weights = ROLES[kind], np.full(len(part), 1 / len(part))
        axes.hist(part[column], edges, weights=weights, **look.filled(f"{look.label}, n = {len(part)}"))
        top, rug = -0.03 * (level + 1), {"color": look.color, "linewidth": 0.5, "clip_on": False}
        axes.vlines(part[column], top - 0.025, top, transform=axes.get_xaxis_transform(), **rug)
    axes.tick_params(axis="x", length=2, pad=2 + 3.6 * len(parts))
    axes.set(xlabel=xlabel, ylabel="share of a kind")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def threshold(axes: Axes, value: float, *, horizontal: bool = False) -> None:
    """Draw the memorization threshold."""
    draw = axes.axhline if horizontal else axes.axvline
    draw(value, color="black", linestyle="--", linewidth=0.9, label=rf"$\tau_\mathrm{{mem}}$ = {value:.3f}")


# Values by category, before and after, along a quantity


def points(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw a column as points over the categories of another, kinds side by side."""
    parts, order = list(table.groupby("kind", sort=False)), sorted(table[x].unique())
    for place, (kind, part) in zip(np.linspace(-0.18, 0.18, len(parts)), parts, strict=True):
        look = ROLES[kind]
        spread = np.resize(np.linspace(-0.12, 0.12, 7), len(part))
        across = part[x].map(order.index) + place + spread
        style = {"linestyle": "", "markersize": 2, "alpha": 0.7, "markeredgewidth": 0}
        axes.plot(across, part[y], **look.line_style(label=f"{look.label}, n = {len(part)}", **style))
    axes.set_xticks(range(len(order)), [str(value) for value in order])


def bars(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw means of a column as bars over the categories of another, one for each kind; lines: 95 % bootstrap intervals."""
    looks = {name: look for name, look in ROLES.items() if name in set(table["kind"])}
    style = {"hue_order": list(looks), "palette": {name: look.color for name, look in looks.items()}, "saturation": 1}
    style |= {"edgecolor": "white", "err_kws": {"linewidth": 2 * LINE, "color": "black"}}
    sns.barplot(table, x=x, y=y, hue="kind", errorbar=("ci", 95), seed=0, legend=False, ax=axes, **style)
    for drawn, look in zip(axes.containers, looks.values(), strict=True):
        drawn.set_label(look.label)
        mpl.artist.setp(drawn, hatch=look.hatch)


def before_after(axes: Axes, table: pd.DataFrame, name: str) -> None:
    """Draw each prompt as a point: ``<name>_before`` across, ``<name>_after`` up; on the dotted line nothing changes."""
    columns = [f"{name}_before", f"{name}_after"]
    for kind, part in table.groupby("kind", sort=False):
        look = ROLES[kind].line_style(linestyle="", markeredgewidth=0)
        axes.plot(part[columns[0]], part[columns[1]], **look | {"label": f"{look['label']}, n = {len(part)}"})
    low = min(0.0, float(np.nanmin(table[columns])) - 0.05)
    axes.plot([low, 1], [low, 1], color="0.6", linestyle=":", linewidth=0.8)
    axes.set(xlim=(low, 1.02), ylim=(low, 1.02), aspect="equal")
    axes.locator_params(nbins=5)
    axes.set(xlabel="all neurons active", ylabel="its neurons deactivated")


def along(axes: Axes, rows: pd.DataFrame, x: str, y: str, look: Role) -> None:
    """Draw ours along a quantity as a line with its interval (columns ``y``_low, ``y``_high), and the paper's hollow."""
    axes.fill_between(rows[x], rows[f"{y}_low"], rows[f"{y}_high"], color=look.color, alpha=0.15, linewidth=0)
    for name, style in zip((y, f"{y}_paper"), look.beside_paper(rows), strict=True):
        axes.plot(rows[x], rows[name], **style)


def rungs(axes: Axes, table: pd.DataFrame, column: str, *, look: Role, label: str) -> None:
    """Draw a column over the number of copies in training: prompts as points, medians of the rungs as a line."""
    medians = table.groupby("copies")[column].median()
    axes.plot(table["copies"], table[column], **look.line_style(linestyle="", alpha=0.5, markersize=3, label="_"))
    axes.plot(medians.index, medians, **look.line_style(markersize=3.5, label=label))
    axes.set_xscale("log", base=2)
    axes.set_xticks(medians.index, [f"{copies:g}" for copies in medians.index])
    axes.set_xticks([], minor=True)


def intervals(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """Draw a table of settings: a panel for each of `METRICS`, a row for each setting, kinds one above the other.

    Filled: ours with its interval (columns ``<metric>``, ``<metric>_low``, ``<metric>_high``). Hollow: the paper's
    (``<metric>_paper``).
    """
    parts, names = list(table.groupby("kind", sort=False)), list(dict.fromkeys(table["setting"]))
    for place, (panel, metric) in enumerate(zip(axes, METRICS, strict=True)):
        for shift, (kind, part) in zip(np.linspace(-0.16, 0.16, len(parts)), parts, strict=True):
            look = ROLES[kind]
            rows = part["setting"].map(names.index) + shift
            panel.hlines(rows, part[f"{metric}_low"], part[f"{metric}_high"], color=look.color, linewidth=1)
            for name, style in zip((metric, f"{metric}_paper"), look.beside_paper(part, linestyle=""), strict=True):
                panel.plot(part[name], rows, **style)
        panel.set(title=METRICS[metric], xticks=[0, 0.5, 1])
        panel.grid(axis="x", alpha=0.4)
        if place == 0:
            panel.set_yticks(range(len(names)), ["\n".join(textwrap.wrap(minus(name), 24)) for name in names])
            panel.set_ylim(len(names) - 0.5, -0.5)


def heat_map(axes: Axes, values: pd.DataFrame, texts: pd.DataFrame, *, norm: Normalize | LogNorm) -> None:
    """Draw a table in colours with a text in each cell; missing cells stay white."""
    style = {"annot_kws": {"size": TICK_SIZE}, "linewidths": 0.8, "cbar": False}
    sns.heatmap(values, annot=texts, fmt="", norm=norm, cmap="viridis", ax=axes, **style)
    axes.tick_params(length=0, rotation=0)
    axes.set(xlabel="", ylabel="")


def say(axes: Axes, text: str) -> None:
    """Write in place of data why there are none."""
    axes.set_axis_off()
    axes.annotate("\n".join(textwrap.wrap(text, 34)), (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", fontsize=TICK_SIZE)  # fmt: skip


def legend_above(axes: Axes, *, columns: int = 2) -> None:
    """Put the legend of a panel above it."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, columnspacing=1, handlelength=1.5, borderaxespad=0.2
    )


def legend_below(figure: Figure, *, columns: int | None = None) -> None:
    """Put one legend for all panels below them, each label once."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns or len(named))


# Images

GAP, MARGIN, LABELS, HEADING = 0.35, 0.03, 1.1, 0.13
"""Room between groups of columns and around an image (shares of an image), for row labels and a line of a heading (inches)."""

LINE_HEIGHT = 1.6 * TICK_SIZE / 72
"""Height of a line of a row label, in inches."""

SMOOTH = 32
"""Images of at least so many pixels are enlarged by a smooth filter (Lanczos); of smaller ones the pixels are the data."""


def image_grid(
    grid: Grid, *, fraction: float = 1.0, counts: Sequence[int] = (), kinds: Mapping[str, str] | None = None
) -> Figure:
    """Return images in rows and columns, with their labels; columns of one label are a group with one heading.

    Args:
        grid: Images [row, column, height, width] in [0, 1] or [row, column, height, width, 3], uint8 or in [0, 1].
        fraction: Width as a share of the text width.
        counts: Numbers in boxes before the last group of several columns, one for each row; left out where no group has
            several.
        kinds: Kind (vm, tm, ...) of the prompts that are row labels, where it is known.

    Raises:
        ValueError: There is not one count for each row.
    """
    rows, columns, high, wide = grid.images.shape[:4]
    # A number stays beside its "%" where a label is broken into lines.
    groups = [(label.replace(" %", "\N{NO-BREAK SPACE}%"), len(list(part))) for label, part in groupby(grid.columns)]
    large = [place for place, (_, size) in enumerate(groups) if size > 1]
    if counts and len(counts) != rows:
        raise ValueError(f"{len(counts)} counts for {rows} rows; give one per row")
    labels = [f"{ROLES[kinds[row]].short}: {row}" if kinds is not None and row in kinds else row for row in grid.rows]
    wrapped = [textwrap.wrap(minus(label), 20) for label in labels]
    left, gap = LABELS if any(grid.rows) else 0.0, GAP * bool(large)
    width = (TEXT_WIDTH * fraction - left) / (columns + gap * (len(groups) - 1))
    # A letter is about 0.05 inches wide.
    heads = [
        "\n".join(textwrap.wrap(minus(label), max(8, int(size * width / 0.055)), break_long_words=False))
        for label, size in groups
    ]
    top = HEADING * max(head.count("\n") + 1 for head in heads) + 0.04 if any(heads) else 0.0
    # Rows are as far apart as their labels need, where images are smaller than two lines of text.
    tall = width * high / wide
    pitch = max(tall, LINE_HEIGHT * max(map(len, wrapped), default=0))
    size = TEXT_WIDTH * fraction, rows * pitch + top
    style = neurips(fraction) | {"figure.constrained_layout.use": False, "figure.figsize": size}
    box = {"boxstyle": "square,pad=0.25", "facecolor": "white", "edgecolor": "black", "linewidth": 0.6}
    group_of = np.repeat(np.arange(len(groups)), [number for _, number in groups])
    with mpl.rc_context(style):
        figure = Figure()
        for row, column in np.ndindex(rows, columns):
            group = group_of[column]
            bottom = (rows - 1 - row) * pitch + (pitch - tall) / 2 + MARGIN * tall
            corner = ((left + (column + gap * group + MARGIN) * width) / size[0], bottom / size[1])
            extent = ((1 - 2 * MARGIN) * width / size[0], (1 - 2 * MARGIN) * tall / size[1])
            axes = figure.add_axes((*corner, *extent))
            picture(axes, grid.images[row, column])
            axes.set_axis_off()
            first = column == 0 or group != group_of[column - 1]
            if column == 0:
                _label(axes, "\n".join(wrapped[row]), (-0.08, 0.5), ha="right", va="center")
            if first and counts and group == max(large, default=None):
                _label(axes, str(counts[row]), (-gap / 2, 0.5), ha="center", va="center", bbox=box)
            if first and row == 0:
                _label(axes, heads[group], (groups[group][1] / 2, 1.06), ha="center", va="bottom")
    return figure


def picture(axes: Axes, image: np.ndarray) -> None:
    """Draw an image, enlarged by a smooth filter unless it is so small that its pixels are the data (`SMOOTH`)."""
    axes.imshow(image, vmin=0, vmax=1, interpolation="lanczos" if min(image.shape[:2]) >= SMOOTH else "nearest")


def _label(axes: Axes, text: str, place: tuple[float, float], **style: Any) -> None:
    """Write a text as it stands: a caption with two dollar signs holds no formula."""
    axes.annotate(text, place, xycoords="axes fraction", parse_math=False, **{"fontsize": TICK_SIZE} | style)


# Files


def files_of(figure: mpl.figure.Figure) -> dict[str, bytes]:
    """Return a figure as PDF, for print, and as PNG, for a screen; the same figure gives the same bytes."""
    buffer, dpi = io.BytesIO(), IMAGES_DPI if _images(figure) else FILE_DPI
    with mpl.rc_context({"pdf.fonttype": 42, "savefig.bbox": None}):
        figure.savefig(buffer, format="pdf", dpi=dpi, metadata={"CreationDate": None})
    return {"pdf": buffer.getvalue(), "png": _png(figure, dpi)}


def _png(figure: mpl.figure.Figure, dpi: float) -> bytes:
    """Return a figure as PNG with the letters of a screen."""
    # Also ticks that matplotlib holds back: with larger letters an axis may show one more.
    ticks = [tick.label1 for place in figure.axes for axis in (place.xaxis, place.yaxis) for tick in axis.majorTicks]
    texts, buffer = list(dict.fromkeys([*figure.findobj(Text), *ticks])), io.BytesIO()
    before = [(text.get_fontfamily(), text.get_fontsize(), text.get_math_fontfamily()) for text in texts]
    with mpl.rc_context({"savefig.bbox": None}):
        for text, (_, size, _) in zip(texts, before, strict=True):
            text.set(fontfamily=SCREEN_FONT, fontsize=SCREEN_SCALE * size, math_fontfamily="dejavusans")
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        for text, (family, size, math) in zip(texts, before, strict=True):
            text.set(fontfamily=family, fontsize=size, math_fontfamily=math)
    return buffer.getvalue()


def _few_colours(png: bytes) -> bytes:
    """Return a PNG with at most 256 colours: enough for lines and bars, in less than half of the bytes."""
    buffer = io.BytesIO()
    PIL.Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(buffer, "png", optimize=True)
    return buffer.getvalue()
