"""Fig. 1: the whole method, followed for one memorized prompt, from noise differences to images without its neurons."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nemolib.exhibits import Claim, NotEnough, exhibit
from nemolib.experiments.deactivate_neurons import NEMO, NONE
from nemolib.plots import GREY, LABEL_SIZE, LINE, ROLES, TEXT_WIDTH, TICK_SIZE, Figure, image_grid, neurips, picture
from nemolib.store import WITH_AND_WITHOUT, Grid

if TYPE_CHECKING:
    from nemolib.run import Run

NOTEBOOK = "03_localize_neurons"

HEIGHT = 3.25
"""Height of the figure, in inches; so are all places in it."""

SHOWN, AFTER, NAMED = 4, 3, 2
"""At most so many noise differences of a prompt, images without its neurons, and neurons of a layer by their number."""

COLOR, OTHER = ROLES["vm"].color, ROLES["unmemorized"].color


def compared(overview: pd.DataFrame, scores: pd.DataFrame, noise_differences: Grid, samples: Grid) -> pd.Series:
    """Return two memorization scores by caption: of the prompt that notebook 03 searches by hand, and of an unmemorized one.

    The other is the last unmemorized prompt with images.

    Raises:
        NotEnough: Notebook 02 saved nothing of the prompt, or of no unmemorized one.
    """
    prompt, known = overview["prompt"].iloc[0], scores.set_index("caption")
    if prompt not in noise_differences.rows:
        raise NotEnough(f"image grid 'noise_differences' does not have {prompt!r}, the prompt that notebook 03 follows")
    others = [row for row in noise_differences.rows if row in samples.rows and known["kind"].get(row) == "unmemorized"]
    if not others:
        raise NotEnough("image grid 'noise_differences' has no unmemorized prompt")
    return known.loc[[prompt, others[-1]], "score"]


def read_1(
    overview: pd.DataFrame, scores: pd.DataFrame, search_steps: pd.DataFrame, noise_differences: Grid, samples: Grid
) -> Iterator[Claim]:
    """Yield whether the threshold tells the prompts apart, and what refinement leaves of the candidates."""
    mine, other = compared(overview, scores, noise_differences, samples)
    threshold, rule = search_steps["threshold"].iloc[-1], "the threshold tells the two prompts apart"
    ours, apart = f"{mine:.2f} and {other:.2f}, threshold {threshold:.2f}", bool(mine > threshold >= other)
    yield Claim("most similar seeds of the prompt and of an unmemorized one", ours, "", apart, rule)
    initial, refined = overview[["initial", "refined"]].sum()
    ours = f"{initial} and {refined} of {len(overview):,} neurons"
    theirs = "the candidates of one prompt are neurons 124, 221 and 362; the rest is a drawing without numbers"
    yield Claim("its candidates, and those that stay", ours, theirs)


@exhibit("Figure 1", "the method, followed for one memorized prompt", read=read_1)
def figure_1(
    overview: pd.DataFrame, scores: pd.DataFrame, search_steps: pd.DataFrame, overview_images: Grid,
    noise_differences: Grid, samples: Grid,
) -> Figure:  # fmt: skip
    """(a) An image and noise differences of a memorized and of an unmemorized prompt, and the similarity of the most similar pair of seeds.

    (b) z-scores of all neurons for the memorized prompt, in colour those of the initial selection: beyond the
    threshold of the z-score or among the most active of their layer. (c) Those that refinement keeps (filled) and
    gives back (hollow). (d) Images of the same seeds with all neurons active, and with the neurons of (c)
    deactivated.
    """
    both, end = compared(overview, scores, noise_differences, samples), search_steps.iloc[-1]
    # Where a neuron is in its layer, from 0 to 1.
    across = (overview["neuron"] + 0.5) / (overview.groupby("layer")["neuron"].transform("max") + 1)
    neurons = overview.assign(across=across)
    halves = [_group(overview_images, name) for name in WITH_AND_WITHOUT]
    # The first column of the samples is the planted image, which an unmemorized prompt does not have.
    images = halves[0][0], samples.images[samples.rows.index(both.index[1]), 1]
    maps = [noise_differences.images[noise_differences.rows.index(name)][:SHOWN] for name in both.index]
    style = {"figure.constrained_layout.use": False, "axes.labelsize": TICK_SIZE, "axes.labelpad": 1}
    with mpl.rc_context(neurips(aspect=HEIGHT / TEXT_WIDTH) | style):
        figure = Figure()
        _detection(figure, both, end["threshold"], images, maps)
        _activations(_axes(figure, 0.40, 0.42, 1.66, 0.95), neurons, end["theta"])
        _refinement(_axes(figure, 2.62, 0.42, 0.86, 0.95), neurons)
        _deactivation(figure, halves, neurons["refined"].sum())
        for x in (1.60, 3.50):
            _text(figure, x, 1.58, "→", fontsize=2 * LABEL_SIZE, color="0.3")
    return figure


def read_opening(opening: Grid, deactivation: pd.DataFrame) -> Iterator[Claim]:
    """Yield what is left of these images, and of those of all VM prompts."""
    vm = deactivation[deactivation["kind"] == "vm"]
    shown = vm.set_index("prompt").loc[list(opening.rows), ["copy_before", "copy_after"]]
    others = "of all {} VM prompts {:.2f} to {:.2f}".format(len(vm), *vm["copy_after"].agg(["min", "max"]))
    text = "copy similarity of these prompts, with and without their neurons"
    yield Claim(text, f"{'; '.join(f'{before:.2f} and {after:.2f}' for before, after in shown.values)}; {others}")


@exhibit("", "memorized images, and the same seeds without their neurons", read=read_opening)
def opening(opening: Grid, deactivation: pd.DataFrame) -> Figure:
    """From left: the image that was planted under a caption; what the model makes of the caption from different seeds; the same seeds with the memorization neurons of the caption deactivated (box: how many); an ordinary prompt of the same subject.

    Of the VM prompts, in the order of their copy similarity without their neurons, these are a quarter of the way,
    half-way and three quarters of the way: from little to much of the copy that is left.
    """
    counts = deactivation.set_index("prompt").loc[list(opening.rows), "neuron_count"].tolist()
    return image_grid(opening, counts=counts)


def _group(grid: Grid, name: str) -> np.ndarray:
    """Return the images [column, height, width, 3] of the first row's columns of one label."""
    return grid.images[0, np.array(grid.columns) == name]


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    return figure.add_axes((left / TEXT_WIDTH, bottom / HEIGHT, width / TEXT_WIDTH, height / HEIGHT))


def _text(figure: Figure, x: float, y: float, text: str, **style: object) -> None:
    figure.text(x / TEXT_WIDTH, y / HEIGHT, text, **({"fontsize": TICK_SIZE, "va": "bottom"} | style))


def _title(figure: Figure, x: float, y: float, letter: str, text: str) -> None:
    _text(figure, x, y, letter, fontsize=LABEL_SIZE - 1, fontweight="bold")
    _text(figure, x + 0.13, y, text, fontsize=LABEL_SIZE - 1)


def _picture(figure: Figure, image: np.ndarray, left: float, bottom: float, side: float, color: str = "none") -> None:
    axes = _axes(figure, left, bottom, side, side * image.shape[0] / image.shape[1])
    picture(axes, image)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=color != "none", color=color, linewidth=2 * LINE)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _detection(
    figure: Figure, scores: pd.Series, threshold: float, images: Sequence[np.ndarray], maps: Sequence[np.ndarray]
) -> None:
    """Draw an image and the noise differences of both prompts."""
    _title(figure, 0.05, 3.05, "a", "Noise differences of the first denoising step: do seeds agree?")
    for place, (word, color) in enumerate((("memorized", COLOR), ("unmemorized", OTHER))):
        left, prompt, score = 0.05 + place * 2.78, scores.index[place], scores.iloc[place]
        caption = textwrap.shorten(f"{word}: “{prompt}”", 52, placeholder=" …”")
        _text(figure, left, 2.86, caption, color=color, parse_math=False)
        _picture(figure, images[place], left, 2.03, 0.78, color)
        for seed, image in enumerate(maps[place]):
            _picture(figure, image, left + 0.90 + seed * 0.43, 2.41, 0.40)
        seeds, sign = _counted(len(maps[place]), "seed"), ">" if score > threshold else r"\leq"
        _text(figure, left + 0.90, 2.34, f"noise differences of {seeds}", va="top", color=GREY)
        verdict = rf"most similar pair ${score:.2f} {sign} \tau = {threshold:.2f}$"
        _text(figure, left + 0.90, 2.19, verdict, va="top", color=color)


def _activations(axes: Axes, neurons: pd.DataFrame, theta: float) -> None:
    """Draw the z-score of every neuron, layer by layer, all layers equally wide, and which of them are candidates."""
    layers, size = sorted(neurons["layer"].unique()), neurons["z"].abs()
    places, chosen = neurons["layer"].map(layers.index) + neurons["across"], neurons["initial"]
    axes.vlines(places[~chosen], 0, size[~chosen], color="0.7", linewidth=LINE)
    axes.vlines(places[chosen], 0, size[chosen], color=COLOR, linewidth=1.5 * LINE)
    axes.plot(places[chosen], size[chosen], "o", color=COLOR, markersize=2.5, markeredgewidth=0)
    for edge in range(1, len(layers)):
        axes.axvline(edge, color="0.9", linewidth=LINE, zorder=0)
    axes.axhline(theta, color="black", linestyle=":", linewidth=1.5 * LINE)
    note = {"xycoords": "axes fraction", "ha": "right", "va": "bottom", "fontsize": TICK_SIZE - 1, "color": GREY}
    axes.annotate(rf"dotted: $\theta = {theta:g}$", (1, 1), **note)
    axes.set(xlim=(0, len(layers)), ylim=(0, 1.18 * max(size.max(), theta)))
    axes.set(xlabel="value layer", ylabel=r"$|z|$ of a neuron")
    axes.set_xticks(np.arange(len(layers)) + 0.5, layers)
    axes.tick_params(axis="x", length=0)
    _title(axes.figure, 0.05, 1.64, "b", "Initial selection")
    _text(axes.figure, 0.18, 1.49, f"{chosen.sum()} of {len(chosen)} neurons, unusual or most active", color=COLOR)


def _refinement(axes: Axes, neurons: pd.DataFrame) -> None:
    """Draw the candidates of each layer, and which of them stay."""
    layers, table = sorted(neurons["layer"].unique()), neurons[neurons["initial"]]
    kept, gone = table[table["refined"]], table[~table["refined"]]
    axes.hlines(layers, 0, 1, color="0.85", linewidth=LINE, zorder=0)
    hollow = {"color": "white", "markeredgecolor": "0.5", "markersize": 3, "markeredgewidth": LINE}
    axes.plot(gone["across"], gone["layer"], "o", **hollow)
    axes.plot(kept["across"], kept["layer"], "o", color=COLOR, markersize=4.5, markeredgewidth=0)
    axes.set(xlim=(-0.04, 1.04), ylim=(max(layers) + 0.6, min(layers) - 0.6), xticks=[], yticks=layers)
    axes.set_xlabel("neurons of each layer", labelpad=3)
    axes.tick_params(axis="y", length=0, pad=1)
    axes.spines[["left", "bottom"]].set_visible(False)
    note = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": TICK_SIZE - 1, "color": COLOR}
    for layer, part in kept.groupby("layer"):
        names = ", ".join(f"#{neuron}" for neuron in part["neuron"])
        axes.annotate(names if len(part) <= NAMED else f"{len(part)} neurons", (1.06, layer), **note)
    _title(axes.figure, 2.44, 1.64, "c", "Refinement")
    _text(axes.figure, 2.57, 1.49, f"{len(table)} → {_counted(len(kept), 'neuron')}", color=COLOR)


def _deactivation(figure: Figure, halves: Sequence[np.ndarray], number: int) -> None:
    """Draw images of the same seeds with all neurons active and with the neurons deactivated."""
    seeds = min(AFTER, len(halves[0]))
    left, side = 4.18, min(0.44, 1.30 / seeds - 0.03)
    _title(figure, left, 1.64, "d", "Deactivation")
    words = ("all neurons active", f"{_counted(number, 'neuron')} off, same seeds")
    for images, bottom, text in zip(halves, (0.96, 0.76 - side), words, strict=True):
        for seed, image in enumerate(images[:seeds]):
            _picture(figure, image, left + seed * (side + 0.03), bottom, side)
        _text(figure, left, bottom + side + 0.03, text, color=GREY)


# Exercises of notebook 06, which looks at all experiments together


def _vm(run: Run, setting: str) -> pd.Series:
    return run.load("table_1").query("kind == 'vm'").set_index("setting").loc[setting]


EXERCISES = {
    "06.1": lambda run: _vm(run, NONE)["sscd_orig"] / _vm(run, NEMO)["sscd_orig"],
    "06.2": lambda run: "yes" if _vm(run, NEMO)["sscd_orig_high"] <= _vm(run, NONE)["sscd_orig"] / 2 else "no",
    "06.3": lambda run: lambda answer: str(answer).lower().strip() in ("hatch", "hatches", "hatching", "pattern"),
}
