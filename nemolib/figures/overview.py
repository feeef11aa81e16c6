"""Fig. 1: the method in one figure, drawn from the run of one memorized prompt."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemolib.theme import LABEL_SIZE, LINE, TEXT_WIDTH, TICK_SIZE, neurips, role

HEIGHT = 3.25
"""Height of the figure, in inches."""

SHOWN = 4
"""Noise differences that are shown of each prompt, at most."""

AFTER = 3
"""Images that are shown with the neurons deactivated, at most."""

NAMED = 2
"""Up to so many memorization neurons of a layer are written out."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One prompt's way through the method.

    Attributes:
        prompt: Its caption.
        other: The caption of an unmemorized prompt.
        images: Images of the two prompts [2, height, width, 3], uint8: the memorized one first.
        differences: Noise differences of both as colours, [2, seed, height, width, 3].
        scores: Memorization scores of both.
        threshold: Memorization threshold.
        neurons: All neurons of the value layers: columns layer (from 1), neuron, z, initial and refined (bool).
        theta: Threshold of the z-score at which the initial selection ended; None: it had no step.
        before: Images with all neurons active, [seed, height, width, 3], uint8.
        after: Images of the same seeds with the memorization neurons deactivated.
    """

    prompt: str
    other: str
    images: np.ndarray
    differences: np.ndarray
    scores: tuple[float, float]
    threshold: float
    neurons: pd.DataFrame
    theta: float | None
    before: np.ndarray
    after: np.ndarray


def figure_1(run: Run) -> Figure:
    """Return Fig. 1: detection, out-of-distribution activations, refinement, and images without the neurons.

    Source: Fig. 1 (its parts, in a layout of our own).

    Args:
        run: What the method did with one prompt.

    Raises:
        ValueError: There is no neuron, no seed, or not as many images after as before.

    Taught in: 03
    """
    if run.neurons.empty or not run.differences.shape[1]:
        raise ValueError("the run has no neurons or no noise differences; run notebooks 02 and 03")
    if len(run.before) != len(run.after) or not len(run.before):
        raise ValueError(
            f"{len(run.before)} images with and {len(run.after)} without the neurons; the seeds must be the same"
        )
    with mpl.rc_context(neurips(aspect=HEIGHT / TEXT_WIDTH) | {"figure.constrained_layout.use": False}):
        figure = Figure()
        _draw_detection(figure, run)
        _draw_activations(_axes(figure, 0.40, 0.42, 1.66, 0.95), run)
        _draw_refinement(_axes(figure, 2.62, 0.42, 0.86, 0.95), run)
        _draw_images(figure, run)
        for x, y, width in ((1.30, 1.70, 1.00), (3.32, 1.70, 0.72)):
            _arrow(figure, (x, y), (x + width, y))
    return figure


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Return axes at a place in inches."""
    return figure.add_axes((left / TEXT_WIDTH, bottom / HEIGHT, width / TEXT_WIDTH, height / HEIGHT))


def _text(figure: Figure, x: float, y: float, text: str, **style: object) -> None:
    """Write at a place in inches."""
    figure.text(x / TEXT_WIDTH, y / HEIGHT, text, **({"fontsize": TICK_SIZE, "ha": "left", "va": "bottom"} | style))


def _title(figure: Figure, x: float, y: float, letter: str, text: str) -> None:
    _text(figure, x, y, letter, fontsize=LABEL_SIZE - 1, fontweight="bold")
    _text(figure, x + 0.13, y, text, fontsize=LABEL_SIZE - 1)


def _arrow(figure: Figure, start: tuple[float, float], end: tuple[float, float]) -> None:
    size = np.array([TEXT_WIDTH, HEIGHT])
    figure.add_artist(
        mpl.patches.FancyArrowPatch(
            np.divide(start, size), np.divide(end, size), transform=figure.transFigure, arrowstyle="-|>",
            mutation_scale=9, linewidth=1.5 * LINE, color="0.3", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def _picture(figure: Figure, image: np.ndarray, left: float, bottom: float, side: float, color: str = "none") -> None:
    axes = _axes(figure, left, bottom, side, side * image.shape[0] / image.shape[1])
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=color != "none", color=color, linewidth=2 * LINE)


def _draw_detection(figure: Figure, run: Run) -> None:
    """Draw the upper half: an image and the noise differences of both prompts."""
    names = (("vm", "memorized", run.prompt), ("unmemorized", "unmemorized", run.other))
    seeds = min(SHOWN, run.differences.shape[1])
    _title(figure, 0.05, 3.05, "a", "Noise differences of the first denoising step: do seeds agree?")
    for place, (kind, word, caption) in enumerate(names):
        left, color = 0.05 + place * 2.78, role(kind).color
        quoted = f"“{caption}”"
        _text(figure, left, 2.86, textwrap.shorten(f"{word}: {quoted}", 52, placeholder=" …”"), color=color)
        _picture(figure, run.images[place], left, 2.03, 0.78, color)
        side = 0.40
        for seed in range(seeds):
            _picture(figure, run.differences[place, seed], left + 0.90 + seed * (side + 0.03), 2.41, side)
        sign = ">" if run.scores[place] > run.threshold else r"\leq"
        verdict = rf"most similar pair ${run.scores[place]:.2f} {sign} \tau = {run.threshold:.2f}$"
        _text(
            figure, left + 0.90, 2.34, f"noise differences of {seeds} seed{'s' * (seeds != 1)}", va="top", color="0.35"
        )
        _text(figure, left + 0.90, 2.19, verdict, va="top", color=color)


def _places(neurons: pd.DataFrame) -> tuple[np.ndarray, list[float]]:
    """Return the place of each neuron on one axis, all layers equally wide, and the middle of each layer."""
    width = neurons.groupby("layer")["neuron"].transform("max") + 1
    layers = sorted(neurons["layer"].unique())
    rank = neurons["layer"].map({layer: number for number, layer in enumerate(layers)})
    return (rank + (neurons["neuron"] + 0.5) / width).to_numpy(dtype=float), [
        number + 0.5 for number in range(len(layers))
    ]


def _draw_activations(axes: Axes, run: Run) -> None:
    """Draw the z-score of every neuron, layer by layer, and which of them are candidates."""
    places, middles = _places(run.neurons)
    size, chosen = run.neurons["z"].abs().to_numpy(), run.neurons["initial"].to_numpy(dtype=bool)
    color = role("vm").color
    axes.vlines(places[~chosen], 0, size[~chosen], color="0.7", linewidth=LINE)
    axes.vlines(places[chosen], 0, size[chosen], color=color, linewidth=1.5 * LINE)
    axes.plot(places[chosen], size[chosen], "o", color=color, markersize=2.5, markeredgewidth=0)
    if run.theta is not None:
        axes.axhline(run.theta, color="black", linestyle=":", linewidth=1.5 * LINE)
        axes.annotate(
            rf"dotted: $\theta = {run.theta:g}$", (1, 1), xycoords="axes fraction", ha="right", va="bottom",
            fontsize=TICK_SIZE - 1, color="0.35",
        )  # fmt: skip
    for edge in range(1, len(middles)):
        axes.axvline(edge, color="0.9", linewidth=LINE, zorder=0)
    # A threshold far above all neurons, as random weights have it, would leave nothing to see.
    largest = float(np.nanmax(size)) or 1.0
    top = max(largest, run.theta) if run.theta is not None and run.theta <= 2 * largest else largest
    axes.set(xlim=(0, len(middles)), ylim=(0, 1.18 * top))
    axes.set_xticks(middles, [str(layer) for layer in sorted(run.neurons["layer"].unique())])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("value layer", labelpad=1, fontsize=TICK_SIZE)
    axes.set_ylabel(r"$|z|$ of a neuron", labelpad=1, fontsize=TICK_SIZE)
    _title(axes.figure, 0.05, 1.64, "b", "Initial selection")
    _text(axes.figure, 0.18, 1.49, f"{int(chosen.sum())} of {len(chosen)} neurons, unusual or most active", color=color)


def _draw_refinement(axes: Axes, run: Run) -> None:
    """Draw the candidates of each layer, and which of them stay."""
    table = run.neurons[run.neurons["initial"]]
    places, _ = _places(run.neurons)
    across = pd.Series(places % 1, index=run.neurons.index)[table.index]
    kept = table["refined"].to_numpy(dtype=bool)
    color, layers = role("vm").color, sorted(run.neurons["layer"].unique())
    axes.hlines(layers, 0, 1, color="0.85", linewidth=LINE, zorder=0)
    axes.plot(
        across[~kept],
        table["layer"][~kept],
        "o",
        color="white",
        markeredgecolor="0.5",
        markersize=3,
        markeredgewidth=LINE,
    )
    axes.plot(across[kept], table["layer"][kept], "o", color=color, markersize=4.5, markeredgewidth=0)
    axes.set(xlim=(-0.04, 1.04), ylim=(max(layers) + 0.6, min(layers) - 0.6), xticks=[], yticks=layers)
    axes.tick_params(axis="y", length=0, pad=1)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("neurons of each layer", labelpad=3, fontsize=TICK_SIZE)
    for layer, part in table[kept].groupby("layer"):
        names = ", ".join(f"#{neuron}" for neuron in part["neuron"]) if len(part) <= NAMED else f"{len(part)} neurons"
        axes.annotate(
            names, (1.06, layer), xycoords=("axes fraction", "data"), va="center", fontsize=TICK_SIZE - 1, color=color
        )
    _title(axes.figure, 2.44, 1.64, "c", "Refinement")
    number = int(kept.sum())
    _text(axes.figure, 2.57, 1.49, f"{len(table)} → {number} neuron{'s' * (number != 1)}", color=color)


def _draw_images(figure: Figure, run: Run) -> None:
    """Draw images of the same seeds with all neurons active and with the neurons deactivated."""
    seeds = min(AFTER, len(run.before))
    left, side = 4.18, min(0.44, 1.30 / seeds - 0.03)
    number = int(run.neurons["refined"].sum())
    _title(figure, left, 1.64, "d", "Deactivation")
    rows = (
        (run.before, 0.96, "all neurons active"),
        (run.after, 0.96 - side - 0.2, f"{number} neuron{'s' * (number != 1)} off, same seeds"),
    )
    for images, bottom, words in rows:
        for seed in range(seeds):
            _picture(figure, images[seed], left + seed * (side + 0.03), bottom, side)
        _text(figure, left, bottom + side + 0.03, words, color="0.35")
