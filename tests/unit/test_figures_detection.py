from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from nemolib.detection import protocol_switches
from nemolib.figures import detection as figures
from nemolib.paper import thresholds
from nemolib.protocols import RELEASED
from nemolib.tables import Grid
from nemolib.theme import ROLE_COLORS, TEXT_WIDTH, role


@pytest.fixture
def scores():
    kinds = ["vm"] * 3 + ["tm"] * 2 + ["unmemorized"] * 4 + ["ladder"]
    values = [0.9, 0.8, 0.85, 0.6, 0.7, 0.3, 0.35, 0.32, 0.65, 0.99]
    return pd.DataFrame(
        {
            "kind": kinds,
            "score": values,
            "score_paper": values,
            "wen": values[::-1],
            "copy_max": np.linspace(0.2, 1, 10),
        }
    )


def patches(axes, color):
    return [patch for patch in axes.patches if to_hex(patch.get_edgecolor()) == color.lower()]


def histogram(patch):
    """Return edges and heights of a filled step histogram."""
    outline = patch.get_xy()
    return np.unique(outline[:, 0]), outline


def legend(figure):
    return [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]


def rugs(axes):
    return {
        to_hex(lines.get_color()[0]): sorted(float(segment[0][0]) for segment in lines.get_segments())
        for lines in axes.collections
    }


def width(figure):
    return figure.get_figwidth() / TEXT_WIDTH


def test_figure_2a_shows_every_prompt(scores):
    figure = figures.figure_2a(scores, threshold=0.5)
    (axes,) = figure.axes
    assert width(figure) == pytest.approx(0.6)
    assert axes.get_xlabel() == "memorization score (similarity of two seeds)"
    assert axes.get_ylabel() == "prompts of a kind"
    for kind in ("vm", "tm", "unmemorized"):
        values = scores.loc[scores["kind"] == kind, "score"]
        assert rugs(axes)[ROLE_COLORS[kind].lower()] == pytest.approx(sorted(values))
    assert [line.get_xdata()[0] for line in axes.lines] == [0.5]
    assert legend(figure) == [
        "unmemorized, n = 4",
        "template (TM), n = 2",
        "verbatim (VM), n = 3",
        r"$\tau_\mathrm{mem}$ = 0.500",
    ]


def test_figure_2a_bars_are_shares_of_a_kind(scores):
    (axes,) = figures.figure_2a(scores, bins=4).axes
    edges = np.linspace(0.3, 0.9, 5)
    for kind in ("vm", "tm", "unmemorized"):
        values = scores.loc[scores["kind"] == kind, "score"]
        expected = np.histogram(values, edges)[0] / len(values)
        (patch,) = patches(axes, ROLE_COLORS[kind])
        found, outline = histogram(patch)
        assert found == pytest.approx(edges)
        heights = [
            outline[np.isclose(outline[:, 0], low) | np.isclose(outline[:, 0], high), 1]
            for low, high in pairwise(edges)
        ]
        for height, share in zip(heights, expected, strict=True):
            assert np.isclose(height, share).any()
        assert (patch.get_hatch() or "") == role(kind).hatch
    assert not axes.lines, "a threshold was drawn that was not given"


def test_figure_2a_needs_prompts_and_values(scores):
    with pytest.raises(ValueError, match="no prompts of the kinds unmemorized, tm, vm; it has {'ladder'}"):
        figures.figure_2a(scores[scores["kind"] == "ladder"])
    with pytest.raises(ValueError, match="column 'score' lacks a value in 1 rows"):
        figures.figure_2a(scores.assign(score=scores["score"].where(scores["score"] < 0.9)).iloc[:9])


@pytest.fixture
def z():
    rows = [(kind, layer, neuron, 10 * layer + neuron + (kind == "vm")) for kind in ("vm", "unmemorized", "tm")
            for layer in (1, 2) for neuron in (2, 0, 1)]  # fmt: skip
    return pd.DataFrame(rows, columns=["kind", "layer", "neuron", "largest_z"]).assign(caption="x")


def test_figure_2b_shows_one_layer(z):
    figure = figures.figure_2b(z, layer=2)
    (axes,) = figure.axes
    assert width(figure) == pytest.approx(0.6)
    assert axes.get_xlabel() == "neuron of value layer 2"
    assert axes.get_ylabel() == r"largest $|z|$ (standard deviations)"
    found = {to_hex(line.get_color()): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert found == {
        ROLE_COLORS["unmemorized"].lower(): [(0, 20), (1, 21), (2, 22)],
        ROLE_COLORS["vm"].lower(): [(0, 21), (1, 22), (2, 23)],
    }
    assert len({line.get_marker() for line in axes.lines}) == 2
    assert axes.get_ylim()[0] == 0
    with pytest.raises(ValueError, match="no prompts of the kinds"):
        figures.figure_2b(z, layer=9)


def test_figure_6_draws_the_cut(scores):
    figure = figures.figure_6(scores, cut=0.6)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "copy similarity (largest of the seeds)"
    assert rugs(axes)[ROLE_COLORS["vm"].lower()] == pytest.approx(sorted(scores["copy_max"][:3]))
    assert [line.get_xdata()[0] for line in axes.lines] == [0.6]
    assert legend(figure) == ["template (TM), n = 2", "verbatim (VM), n = 3", "cut at 0.6"]


def test_figure_13_shows_the_differences():
    differences = np.random.default_rng(0).random((2, 3, 4, 5, 5))
    colours = figures.noise_colours(differences)
    figure = figures.figure_13(Grid(colours, ("a", "b"), ("seed 0", "seed 1", "seed 2")))
    assert width(figure) == pytest.approx(1)
    shown = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert len(shown) == 6
    assert np.array_equal(shown[4], colours[1, 1])


def test_noise_colours():
    differences = np.zeros((1, 4, 2, 2))
    differences[0, 1, 0, 1] = 1
    differences[0, 3] = 0.5
    colours = figures.noise_colours(differences)
    assert colours.shape == (1, 2, 2, 3)
    assert colours[0, 0, 1].tolist() == [0, 255, 0]
    assert colours.sum() == 255
    with pytest.raises(ValueError, match="between 0 and 2; normalize"):
        figures.noise_colours(differences * 2)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2, 2\)"):
        figures.noise_colours(differences[:, :2])


def test_holdout_distribution_draws_both_ways_and_the_thresholds():
    pairs = np.array([[0.11, 0.22, 0.33], [0.22, 0.22, 0.51]])
    table = thresholds().assign(ours=[0.2, 0.3, 0.4, 0.5])
    figure = figures.holdout_distribution(pairs, table, bins=4)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "similarity of two seeds of a holdout prompt"
    assert [line.get_xdata()[0] for line in axes.lines] == [0.2, 0.3, 0.4, 0.5]
    assert len({line.get_linestyle() for line in axes.lines}) >= 3
    assert legend(figure) == ["all pairs", "largest pair", "mean - 1 sd", "mean", "mean + 1 sd", "mean + 2 sd"]
    all_pairs, largest = (patch.get_xy()[:, 1].max() for patch in axes.patches)
    assert all_pairs == pytest.approx(3 / 6)
    assert largest == pytest.approx(1)


def test_protocol_switches_keep_the_order_of_the_table():
    changes = [switch.change for switch in protocol_switches(RELEASED, 0.0)]
    table = pd.DataFrame({"change": changes, "mean": np.linspace(0.1, 0.2, 7), "threshold": np.linspace(0.3, 0.5, 7)})
    figure = figures.protocol_switches(table)
    (axes,) = figure.axes
    assert width(figure) == pytest.approx(1)
    ticks = dict(zip(axes.get_yticks(), (text.get_text() for text in axes.get_yticklabels()), strict=True))
    assert [ticks[place] for place in sorted(ticks, reverse=True)] == changes
    dashed, mean, threshold = axes.lines
    assert dashed.get_xdata()[0] == 0.3
    for line, column in ((mean, "mean"), (threshold, "threshold")):
        shown = {ticks[y]: x for x, y in zip(*line.get_data(), strict=True)}
        assert [shown[change] for change in changes] == table[column].tolist()


def test_z_by_layer_draws_medians_and_quartiles():
    rows = [
        (kind, layer, value * layer)
        for kind in ("vm", "tm", "unmemorized")
        for layer in (1, 2)
        for value in (1, 2, 4, 9)
    ]
    figure = figures.z_by_layer(pd.DataFrame(rows, columns=["kind", "layer", "largest_z"]))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "value layer"
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert len(lines) == 3
    for line in lines:
        assert list(line.get_ydata()) == [3, 6]
    bars = axes.collections[0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [(1.75, 5.25), (3.5, 10.5)]
    assert list(axes.get_xticks()) == [1, 2]
    assert legend(figure) == ["unmemorized", "template (TM)", "verbatim (VM)"]


def test_detection_roc(scores):
    figure = figures.detection_roc(scores, ["score_paper", "wen"])
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("false positive rate (log scale)", "true positive rate")
    assert axes.get_xscale() == "log"
    one_percent, paper, _ = axes.lines
    assert one_percent.get_xdata()[0] == 0.01
    # One unmemorized prompt of four scores above one memorized prompt of five.
    points = set(zip(np.round(paper.get_xdata(), 3), np.round(paper.get_ydata(), 3), strict=True))
    assert (0.125, 0.8) in points
    assert (0.25, 1.0) in points
    assert legend(figure) == ["SSIM (paper)", "Wen et al., one step"]
    with pytest.raises(ValueError, match="no prompts"):
        figures.detection_roc(scores[scores["kind"] == "ladder"], ["score_paper"])


def test_duplication_ladder():
    table = pd.DataFrame(
        {"copies": [1, 1, 4, 4], "copy_similarity": [0.1, 0.3, 0.5, 0.9], "score": [0.3, 0.3, 0.6, 0.8]}
    )
    figure = figures.duplication_ladder(table, threshold=0.4)
    assert width(figure) == pytest.approx(1)
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("copy similarity", "memorization score")
    for axes, column in ((left, "copy_similarity"), (right, "score")):
        points, medians = axes.lines[:2]
        assert list(points.get_ydata()) == table[column].tolist()
        assert list(medians.get_data()[0]) == [1, 4]
        assert list(medians.get_data()[1]) == pytest.approx(table.groupby("copies")[column].median().tolist())
        assert axes.get_xlabel() == "copies in training (regular caption = 1)"
    assert len(left.lines) == 2
    assert right.lines[2].get_ydata()[0] == 0.4
    with pytest.raises(ValueError, match="no prompts"):
        figures.duplication_ladder(table.iloc[:0])
