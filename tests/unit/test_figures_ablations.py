import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from nemolib import paper
from nemolib.experiments_ablations import LADDER_COLUMNS
from nemolib.figures import ablations as figures
from nemolib.figures.mitigation import METRICS
from nemolib.theme import ROLE_COLORS, TEXT_WIDTH

LEVELS = {-1.0: "mean - 1 sd", 0.0: "mean", 1.0: "mean + 1 sd"}


@pytest.fixture
def scaled():
    """Return the paper's numbers of Table 4 in a shuffled order, ours 0.1 above; one is missing."""
    table = paper.table_4()
    table = table[table["setting"].str.startswith(("factor", "default"))]
    table = table.assign(factor=table["setting"].str.split().str[-1].replace("(0.428)", "0").astype(float))
    for metric in figures.SCALED:
        table[f"{metric}_paper"] = table[metric]
        table[metric] += 0.1
        table[f"{metric}_low"], table[f"{metric}_high"] = table[metric] - 0.05, table[metric] + 0.02
    table.loc[table["factor"] == -1, "a_clip_paper"] = np.nan
    return table.sample(frac=1, random_state=0)


@pytest.fixture
def pairs():
    table = paper.threshold_maps().replace({"initial": LEVELS, "refinement": LEVELS})
    for name in ("initial_neurons", "neurons", "sscd_gen", "sscd_orig"):
        table[f"{name}_paper"] = table[name]
        table[name] = table[name] / 2
    table.loc[0, "neurons_paper"] = np.nan
    return table


@pytest.fixture
def ladder():
    rows = [
        ("a", 1, 9, 0, True, 0.1, 0.1, 0.2, 0.2),
        ("b", 1, 9, 2, True, 0.3, 0.1, 0.4, 0.1),
        ("c", 8, 9, 5, True, 0.7, 0.3, 0.9, 0.2),
    ]
    return pd.DataFrame(rows, columns=list(LADDER_COLUMNS))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def cells(axes):
    return {tuple(map(int, text.get_position()[::-1])): text.get_text() for text in axes.texts if text.get_text()}


def test_table_4_has_a_panel_for_each_metric_and_a_row_for_each_setting():
    table = paper.table_4()
    for metric in METRICS:
        table[f"{metric}_low"] = table[f"{metric}_high"] = table[f"{metric}_paper"] = table[metric]
    figure = figures.figure_table_4(table)
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    assert [axes.get_title() for axes in figure.axes] == list(METRICS.values())
    assert len(figure.axes[0].get_yticks()) == 14


@pytest.mark.parametrize(
    ("kind", "label", "line", "marker"), [("vm", "verbatim (VM)", "-", "o"), ("tm", "template (TM)", "--", "s")]
)
def test_factors_go_from_minus_one_to_one(scaled, kind, label, line, marker):
    part = scaled[scaled["kind"] == kind].sort_values("factor")
    figure = figures.figure_5b(scaled)
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    for axes, metric in zip(figure.axes, figures.SCALED, strict=True):
        drawn = {item.get_label(): item for item in axes.lines}
        ours, theirs = drawn[f"{label}, ours"], drawn[f"{label}, paper"]
        assert ours.get_xdata().tolist() == theirs.get_xdata().tolist() == part["factor"].tolist()
        assert ours.get_ydata().tolist() == part[metric].tolist()
        np.testing.assert_array_equal(theirs.get_ydata(), part[f"{metric}_paper"])
        assert (ours.get_linestyle(), ours.get_marker(), theirs.get_linestyle()) == (line, marker, "None")
        assert to_hex(ours.get_color()) == ROLE_COLORS[kind].lower()
        assert to_hex(theirs.get_markerfacecolor()) == "#ffffff"
        assert axes.get_title() == METRICS[metric]


def test_the_band_is_the_interval(scaled):
    axes = figures.figure_5b(scaled[scaled["kind"] == "tm"]).axes[0]
    part = scaled[scaled["kind"] == "tm"]
    ends = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert ends.min() == pytest.approx(part["sscd_orig_low"].min())
    assert ends.max() == pytest.approx(part["sscd_orig_high"].max())


def test_figure_5b_names_what_is_drawn(scaled):
    figure = figures.figure_5b(scaled)
    assert legend(figure) == [
        "verbatim (VM), ours", "verbatim (VM), paper", "template (TM), ours", "template (TM), paper",
    ]  # fmt: skip
    assert figure.axes[1].get_xlabel() == "factor (1: all neurons active, 0: deactivated)"
    assert legend(figures.figure_5b(scaled[scaled["kind"] == "tm"])) == ["template (TM), ours", "template (TM), paper"]


def test_figure_14_has_initial_neurons_and_the_upper_triangle(pairs):
    figure = figures.figure_14(pairs)
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    verbatim, template = figure.axes
    assert cells(verbatim) == {
        (0, 0): "114\n(228)", (0, 1): "5.25", (0, 2): "4\n(8)", (0, 3): "2.5\n(5)",
        (1, 0): "25.75\n(51.5)", (1, 2): "3\n(6)", (1, 3): "2\n(4)",
        (2, 0): "13.25\n(26.5)", (2, 3): "2\n(4)",
    }  # fmt: skip
    assert cells(template)[2, 0] == "337.25\n(674.5)"
    assert [axes.get_title() for axes in figure.axes] == ["verbatim (VM): neurons", "template (TM): neurons"]
    assert [text.get_text() for text in verbatim.get_xticklabels()] == [
        "not\nrefined",
        "mean\n- 1 sd",
        "mean",
        "mean\n+ 1 sd",
    ]
    assert [text.get_text() for text in verbatim.get_yticklabels()] == ["mean\n- 1 sd", "mean", "mean\n+ 1 sd"]
    assert (verbatim.get_xlabel(), verbatim.get_ylabel()) == ("refinement threshold", "initial threshold")


def test_colours_of_figure_14_are_the_numbers(pairs):
    image = figures.figure_14(pairs).axes[0].images[0]
    values = image.get_array()
    assert values.mask.tolist() == [[False] * 4, [False, True, False, False], [False, True, True, False]]
    assert values[0, 0] == 114
    assert image.norm(values[0, 0]) == 1 > image.norm(values[0, 2]) > image.norm(values[0, 3])


def test_no_neurons_are_drawn_as_the_fewest(pairs):
    figure = figures.figure_14(pairs.assign(neurons=0.0))
    assert cells(figure.axes[0])[2, 3] == "0\n(4)"
    assert figure.axes[0].images[0].get_array()[2, 3] == 1


def test_figure_15_has_a_row_for_each_metric(pairs):
    figure = figures.figure_15(pairs)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{kind}: {metric}" for metric in figures.MAPS.values() for kind in ("verbatim (VM)", "template (TM)")
    ]
    assert cells(figure.axes[2])[0, 2] == "0.04\n(0.09)"
    assert cells(figure.axes[1])[2, 2] == "0.03\n(0.058)"
    assert all((axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (0, 1) for axes in figure.axes)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["", "", ""]


def test_numbers_can_be_read_on_their_colours(pairs):
    axes = figures.figure_15(pairs.assign(sscd_gen=np.linspace(0, 1, len(pairs)))).axes[0]
    image = axes.images[0]
    for text in axes.texts:
        column, row = map(int, text.get_position())
        red, green, blue, _ = image.cmap(image.norm(image.get_array()[row, column]))
        light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert abs(light - (0 if text.get_color() == "black" else 1)) > 0.4


@pytest.mark.parametrize("draw", [figures.figure_14, figures.figure_15])
def test_a_single_pair_and_kind(pairs, draw):
    figure = draw(pairs[(pairs["kind"] == "tm") & (pairs["initial"] == "mean + 1 sd")])
    figure.draw_without_rendering()
    assert all(axes.get_title().startswith("template") for axes in figure.axes)


@pytest.mark.parametrize("draw", [figures.figure_5b, figures.figure_14, figures.figure_15])
def test_no_memorized_prompts(scaled, pairs, draw):
    table = scaled if draw is figures.figure_5b else pairs
    with pytest.raises(ValueError, match=r"the table has the kinds \['ladder'\]; needed: one of vm, tm"):
        draw(table.assign(kind="ladder"))


def test_the_ladder_is_drawn_before_and_after(ladder):
    figure = figures.figure_ladder(ladder, threshold=0.4)
    neurons, score, copy = figure.axes
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    assert [line.get_ydata().tolist() for line in neurons.lines] == [[0, 2, 5], [1, 5]]
    points, medians, points_after, medians_after, limit = score.lines
    assert medians.get_xdata().tolist() == medians_after.get_xdata().tolist() == [1, 8]
    assert medians.get_ydata().tolist() == pytest.approx([0.2, 0.7])
    assert points_after.get_ydata().tolist() == [0.1, 0.1, 0.3]
    assert limit.get_ydata()[0] == 0.4
    assert [line.get_ydata().tolist() for line in copy.lines[2:]] == [[0.2, 0.1, 0.2], pytest.approx([0.15, 0.2])]
    assert (to_hex(points.get_color()), points.get_marker()) == (ROLE_COLORS["ladder"].lower(), "D")
    assert (to_hex(points_after.get_color()), points_after.get_marker()) == (ROLE_COLORS["deactivated"].lower(), "v")
    assert medians.get_linestyle() != medians_after.get_linestyle()
    assert legend(figure) == [figures.BEFORE, figures.AFTER, "memorization threshold"]


def test_copies_are_on_a_logarithmic_axis(ladder):
    for axes in figures.figure_ladder(ladder).axes:
        assert axes.get_xscale() == "log"
        assert axes.get_xticks().tolist() == [1, 8]
    assert len(figures.figure_ladder(ladder).axes[1].lines) == 4


def test_a_profile_without_a_ladder_says_so(ladder):
    figure = figures.figure_ladder(ladder.iloc[:0])
    assert not figure.axes
    assert [text.get_text() for text in figure.texts] == ["no duplication ladder in this profile"]
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
