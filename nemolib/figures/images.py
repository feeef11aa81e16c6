"""Figures made of images: prompts with and without their memorization neurons, and plain grids."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemolib.tables import Grid
from nemolib.theme import LABEL_SIZE, TEXT_WIDTH, TICK_SIZE, neurips

WITH, WITHOUT = "all neurons active", "neurons deactivated"
"""Names of the two halves of `figure_3`."""

SINGLE = ("all neurons active", "this neuron deactivated")
"""Their names where a single neuron is deactivated."""

GAP = 0.35
"""Space between the two halves of `figure_3`, in widths of an image."""

MARGIN = 0.03
"""Space around an image, in widths of an image."""

LABELS = 1.1
"""Space for the labels of rows, in inches."""

SCREEN = 120
"""Dots per inch in a notebook: images take much more room in it than lines. Files are written with 300."""

CHARACTERS = 22
"""Characters of a row label before it goes on in the next line."""

LINE = 1.6 * TICK_SIZE / 72
"""Height of a line of a row label, in inches."""


def figure_3(grid: Grid, counts: Sequence[int], *, names: tuple[str, str] = (WITH, WITHOUT)) -> Figure:
    """Return Fig. 3: for each prompt images with all neurons active, and the same seeds with its neurons deactivated.

    A row is a prompt. The box in the middle says how many neurons were deactivated.

    Source: Fig. 3.

    Args:
        grid: Images [prompt, image, height, width, 3], uint8: the first half of the columns with all neurons active,
            the second half with deactivated neurons, same seeds in the same order. Row labels are the captions.
        counts: Number of deactivated neurons of each prompt.
        names: What the two halves are called.

    Raises:
        ValueError: There is not one count per prompt, or the number of columns is odd.

    Taught in: 03
    """
    rows, columns = grid.images.shape[:2]
    if len(counts) != rows:
        raise ValueError(f"{len(counts)} counts for {rows} prompts; give one per prompt")
    if columns % 2:
        raise ValueError(f"{columns} images per prompt; expected as many without as with deactivated neurons")
    seeds = columns // 2
    width = (TEXT_WIDTH - LABELS) / (columns + GAP)
    with mpl.rc_context(_settings()):
        figure, axes = _canvas(grid, width=width, left=LABELS, gap_after=seeds, top=0.25)
        for row, count in enumerate(counts):
            axes[row, seeds].annotate(
                str(count), (-GAP / 2, 0.5), xycoords="axes fraction", ha="center", va="center", fontsize=TICK_SIZE,
                bbox={"boxstyle": "square,pad=0.25", "facecolor": "white", "edgecolor": "black", "linewidth": 0.6},
            )  # fmt: skip
        for first, name in zip((0, seeds), names, strict=True):
            axes[0, first].annotate(
                name, (seeds / 2, 1.06), xycoords="axes fraction", ha="center", va="bottom", fontsize=LABEL_SIZE
            )
    return figure


def image_grid(grid: Grid, *, fraction: float = 1.0, cmap: str | None = None) -> Figure:
    """Return images in rows and columns with their labels.

    Args:
        grid: Images [row, column, height, width] in [0, 1] or [row, column, height, width, 3], uint8 or in [0, 1].
        fraction: Width as a share of the text width.
        cmap: Colour map of images without colour; None means the theme's.

    Taught in: 03
    """
    left = LABELS if any(grid.rows) else 0.0
    width = (TEXT_WIDTH * fraction - left) / len(grid.columns)
    top = 0.2 if any(grid.columns) else 0.0
    with mpl.rc_context(_settings(fraction)):
        figure, axes = _canvas(
            grid, width=width, left=left, gap_after=len(grid.columns), top=top, fraction=fraction, cmap=cmap
        )
        for column, label in enumerate(grid.columns):
            axes[0, column].annotate(
                label, (0.5, 1.06), xycoords="axes fraction", ha="center", va="bottom", fontsize=TICK_SIZE
            )
    return figure


def _settings(fraction: float = 1.0) -> dict[str, Any]:
    return neurips(fraction) | {"figure.constrained_layout.use": False, "figure.dpi": SCREEN}


def _canvas(
    grid: Grid, *, width: float, left: float, gap_after: int, top: float, fraction: float = 1.0, cmap: str | None = None
) -> tuple[Figure, np.ndarray]:
    """Return a figure with the images of a grid and its axes [row, column].

    ``width`` (of an image), ``left`` and ``top`` (for labels) are in inches.
    """
    rows, columns, high, wide = grid.images.shape[:4]
    tall = width * high / wide
    labels = [textwrap.wrap(label, CHARACTERS) for label in grid.rows]
    # Rows are as far apart as their labels need, where images are smaller than two lines of text.
    pitch = max(tall, LINE * max(map(len, labels), default=0))
    size = TEXT_WIDTH * fraction, rows * pitch + top
    figure = Figure(figsize=size)
    axes = np.empty((rows, columns), dtype=object)
    for row, column in np.ndindex(rows, columns):
        shift = column + (GAP if column >= gap_after else 0)
        bottom = (rows - 1 - row) * pitch + (pitch - tall) / 2 + MARGIN * tall
        corner = ((left + (shift + MARGIN) * width) / size[0], bottom / size[1])
        extent = ((1 - 2 * MARGIN) * width / size[0], (1 - 2 * MARGIN) * tall / size[1])
        axes[row, column] = figure.add_axes((*corner, *extent))
        _image(axes[row, column], grid.images[row, column], cmap=cmap)
    for row, lines in enumerate(labels):
        axes[row, 0].annotate(
            "\n".join(lines), (-0.08, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize=TICK_SIZE
        )
    return figure, axes


def _image(axes: Axes, image: np.ndarray, *, cmap: str | None = None) -> None:
    limits = {} if image.ndim == 3 else {"vmin": 0, "vmax": 1, "cmap": cmap}
    axes.imshow(image, **limits)
    axes.set_axis_off()
