import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from nemolib.figures import localization as figures
from nemolib.theme import ROLE_COLORS, TEXT_WIDTH


def neurons(*counts):
    return json.dumps({"layers": [list(range(count)) for count in counts]})


@pytest.fixture
def table():
    return pd.DataFrame(
        [
            ("vm", 10, 1, neurons(1, 0, 0)),
            ("vm", 20, 3, neurons(2, 1, 0)),
            ("vm", 40, 5, neurons(0, 3, 2)),
            ("tm", 80, 16, neurons(8, 4, 4)),
            ("unmemorized", 0, 0, neurons(0, 0, 0)),
        ],
        columns=["kind", "initial_count", "neuron_count", "neurons"],
    )


def bars(axes, color):
    return [bar for bar in axes.patches if to_hex(bar.get_facecolor()) == color.lower()]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_figure_4a_counts_prompts(table):
    figure = figures.figure_4a(table)
    (axes,) = figure.axes
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH / 2)
    assert axes.get_xlabel() == "memorization neurons per prompt"
    assert sum(bar.get_height() for bar in bars(axes, ROLE_COLORS["vm"])) == 3
    assert sum(bar.get_height() for bar in bars(axes, ROLE_COLORS["tm"])) == 1
    assert [line.get_xdata()[0] for line in axes.lines] == [3, 16]
    assert legend(axes) == ["verbatim (VM), 3", "template (TM), 1"]


def test_figure_4a_has_a_second_cue(table):
    (axes,) = figures.figure_4a(table).axes
    hatches = {bar.get_hatch() for bar in axes.patches}
    assert len(hatches) == 2
    assert len({line.get_linestyle() for line in axes.lines}) == 2


@pytest.mark.parametrize(
    ("values", "bins", "edges"),
    [([0, 2], 12, [-0.5, 0.5, 1.5, 2.5]), ([0, 24], 5, [0, 5, 10, 15, 20, 25]), ([0], 3, [-0.5, 0.5])],
)
def test_bins_of_counts(values, bins, edges):
    assert figures.count_edges(np.array(values, dtype=float), bins).tolist() == edges


@pytest.mark.parametrize("largest", [0, 1, 5, 11, 12, 13, 100, 999])
def test_every_count_is_in_a_bin(largest):
    edges = figures.count_edges(np.array([0.0, largest]), 12)
    assert edges[0] <= 0
    assert edges[-1] > largest
    assert len(edges) <= 13


def test_layer_means(table):
    means = figures.layer_means(table)
    assert means.loc["vm"].tolist() == pytest.approx([1, 4 / 3, 2 / 3])
    assert means.loc["tm"].tolist() == [8, 4, 4]
    assert means.columns.tolist() == [1, 2, 3]


def test_figure_4b_draws_the_means(table):
    figure = figures.figure_4b(table)
    (axes,) = figure.axes
    means = figures.layer_means(table)
    for kind in ("vm", "tm"):
        assert [bar.get_height() for bar in bars(axes, ROLE_COLORS[kind])] == pytest.approx(means.loc[kind].tolist())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("value layer", "neurons per prompt (mean)")
    assert axes.get_xticks().tolist() == [1, 2, 3]


def test_figure_7_has_both_stages(table):
    figure = figures.figure_7(table)
    initial, refined = figure.axes
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    assert [axes.get_title() for axes in (initial, refined)] == ["initial selection", "after refinement"]
    assert [line.get_xdata()[0] for line in initial.lines] == [20, 80]
    assert [line.get_xdata()[0] for line in refined.lines] == [3, 16]
    assert sum(bar.get_height() for bar in initial.patches) == sum(bar.get_height() for bar in refined.patches) == 4


@pytest.mark.parametrize("draw", [figures.figure_4a, figures.figure_4b, figures.figure_7])
def test_no_memorized_prompts(draw, table):
    with pytest.raises(ValueError, match=r"no prompts of kind vm or tm; its kinds: \['unmemorized'\]"):
        draw(table[table["kind"] == "unmemorized"])


@pytest.fixture
def steps():
    columns = {"theta": [5.0, 4.75, 4.5], "k": [0, 1, 2], "neurons": [1, 9, 18], "score": [0.9, 0.6, 0.3]}
    return pd.DataFrame(columns | {"threshold": 0.4})


@pytest.fixture
def tests():
    return pd.DataFrame(
        {
            "test": [1, 2, 3],
            "layer": [7, 6, 6],
            "neuron": [None, None, 5],
            "score": [0.35, 0.8, 0.39],
            "removed": [True, False, True],
            "left": [12, 12, 11],
        }
    )


def test_figure_search_follows_the_search(steps, tests):
    figure = figures.figure_search(steps, tests)
    score, refined, count, left = figure.axes
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    assert score.lines[0].get_xydata().tolist() == steps[["theta", "score"]].to_numpy().tolist()
    assert count.lines[0].get_ydata().tolist() == [1, 9, 18]
    assert left.lines[0].get_ydata().tolist() == [12, 12, 11]
    removed, kept = refined.lines[:2]
    assert removed.get_ydata().tolist() == [0.35, 0.39]
    assert kept.get_ydata().tolist() == [0.8]
    assert [axes.lines[-1].get_ydata() for axes in (score, refined)] == [[0.4, 0.4]] * 2
    assert score.xaxis_inverted()


def test_a_search_without_steps(steps, tests):
    with pytest.raises(ValueError, match="the search has no steps"):
        figures.figure_search(steps.iloc[:0], tests)


def test_figure_scores_pairs_before_and_after():
    table = pd.DataFrame(
        {
            "kind": ["vm", "tm"],
            "score_before": [0.8, 0.7],
            "score_after": [0.3, 0.5],
            "copy_before": [0.9, 0.1],
            "copy_after": [0.2, -0.1],
        }
    )
    score, copy = figures.figure_scores(table, threshold=0.45).axes
    assert score.lines[-1].get_ydata() == [0.45, 0.45]
    assert [line.get_xydata().tolist() for line in score.lines[:2]] == [[[0.8, 0.3]], [[0.7, 0.5]]]
    assert [line.get_xydata().tolist() for line in copy.lines[:2]] == [[[0.9, 0.2]], [[0.1, -0.1]]]
    assert copy.get_xlim()[0] < -0.1
    assert len({line.get_marker() for line in score.lines[:2]}) == 2


def test_figure_neuron_z_draws_every_neuron():
    table = pd.DataFrame({"kind": ["vm", "vm", "tm"], "layer": [0, 6, 2], "z": [5.0, -3.0, 0.5]})
    figure = figures.figure_neuron_z(table)
    (axes,) = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[5.0, -3.0], [0.5]]
    assert [np.round(line.get_xdata()).tolist() for line in axes.lines] == [[1, 7], [3]]
    assert axes.get_ylabel() == "z-score of the neuron"
    assert axes.get_xticks().tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_figure_plain_draws_medians_of_both_models():
    table = pd.DataFrame(
        [
            ("sparse", "vm", "largest_z", 8.0),
            ("sparse", "vm", "largest_z", 6.0),
            ("plain", "vm", "largest_z", 4.0),
            ("sparse", "vm", "neuron_count", 5),
            ("plain", "vm", "neuron_count", 50),
            ("plain", "vm", "not drawn", 1),
        ],
        columns=["model", "kind", "quantity", "value"],
    )
    figure = figures.figure_plain(table)
    largest, count = figure.axes
    assert [bar.get_height() for bar in largest.patches] == [7, 4]
    assert [bar.get_height() for bar in count.patches] == [5, 50]
    assert largest.patches[0].get_hatch() != largest.patches[1].get_hatch()


def test_figure_plain_without_known_quantities():
    table = pd.DataFrame([("plain", "vm", "speed", 1.0)], columns=["model", "kind", "quantity", "value"])
    with pytest.raises(ValueError, match=r"no quantity to draw; known: density, .*; got \['speed'\]"):
        figures.figure_plain(table)
