import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from nemolib import paper
from nemolib.figures import mitigation as figures
from nemolib.theme import ROLE_COLORS, TEXT_WIDTH

INITIAL = "NeMo, initial selection"


@pytest.fixture
def table():
    """Return the paper's numbers, ours 0.1 below, and a setting that the paper does not have."""
    table = paper.table_1()
    ours_alone = table[table["setting"] == "NeMo"].assign(setting=INITIAL)
    table = pd.concat([table, ours_alone], ignore_index=True)
    for metric in figures.METRICS:
        table[f"{metric}_paper"] = table[metric].where(table["setting"] != INITIAL)
        table[metric] -= 0.1
        table[f"{metric}_low"], table[f"{metric}_high"] = table[metric] - 0.05, table[metric] + 0.02
    return table


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_metric_has_a_panel(table):
    figure = figures.figure_table_1(table)
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    assert [axes.get_title() for axes in figure.axes] == list(figures.METRICS.values())
    assert legend(figure) == [
        "verbatim (VM), ours", "verbatim (VM), paper", "template (TM), ours", "template (TM), paper",
    ]  # fmt: skip
    taller = figures.figure_table_1(pd.concat([table, table.head(1).assign(setting="another")]))
    assert taller.get_figheight() == pytest.approx(figure.get_figheight() + figures.ROW)


def test_every_setting_has_a_row_from_the_top(table):
    first, *others = figures.figure_table_1(table).axes
    names = [label.get_text().replace("\n", " ") for label in first.get_yticklabels()]
    assert names == list(dict.fromkeys(table["setting"]))
    assert max(len(part) for label in first.get_yticklabels() for part in label.get_text().split("\n")) <= 24
    assert first.get_ylim() == (8.5, -0.5)
    assert all(axes.get_ylim() == first.get_ylim() for axes in others)


@pytest.mark.parametrize(("kind", "label", "shift"), [("vm", "verbatim (VM)", -0.16), ("tm", "template (TM)", 0.16)])
def test_points_are_ours_and_the_papers(table, kind, label, shift):
    part = table[table["kind"] == kind]
    for axes, metric in zip(figures.figure_table_1(table).axes, figures.METRICS, strict=True):
        ours, theirs = lines(axes)[f"{label}, ours"], lines(axes)[f"{label}, paper"]
        assert ours.get_xdata().tolist() == part[metric].tolist()
        np.testing.assert_array_equal(theirs.get_xdata(), part[f"{metric}_paper"])
        assert np.isnan(theirs.get_xdata()).tolist() == [False] * 8 + [True]
        for line in (ours, theirs):
            assert list(line.get_ydata()) == pytest.approx(np.arange(9) + shift)
            assert to_hex(line.get_color()) == ROLE_COLORS[kind].lower()
            assert line.get_linestyle() == "None"


def test_the_papers_markers_are_hollow_and_kinds_have_their_own(table):
    for axes in figures.figure_table_1(table).axes:
        found = lines(axes)
        for label, line in found.items():
            face = to_hex(line.get_markerfacecolor())
            assert face == ("#ffffff" if label.endswith("paper") else to_hex(line.get_color())), label
        assert [line.get_marker() for line in found.values()] == ["o", "o", "s", "s"]


def test_intervals_are_drawn(table):
    axes = figures.figure_table_1(table).axes[2]
    verbatim, template = axes.collections
    for drawn, kind, shift in ((verbatim, "vm", -0.16), (template, "tm", 0.16)):
        part = table[table["kind"] == kind]
        ends = np.array(drawn.get_segments())
        np.testing.assert_allclose(ends[:, :, 0], part[["d_sscd_low", "d_sscd_high"]])
        np.testing.assert_allclose(ends[:, :, 1], np.repeat(np.arange(9) + shift, 2).reshape(9, 2))


def test_one_kind_stands_in_the_middle(table):
    figure = figures.figure_table_1(table[table["kind"] == "tm"])
    assert legend(figure) == ["template (TM), ours", "template (TM), paper"]
    assert list(figure.axes[0].lines[0].get_ydata()) == list(range(9))


def test_a_setting_that_a_kind_lacks_leaves_its_place_free(table):
    lacking = table[(table["setting"] != "random neurons") | (table["kind"] != "tm")]
    found = lines(figures.figure_table_1(lacking).axes[0])
    assert len(found["verbatim (VM), ours"].get_xdata()) == 9
    assert list(found["template (TM), ours"].get_ydata()) == pytest.approx(np.array([0, 1, 3, 4, 5, 6, 7, 8]) + 0.16)


def test_every_value_is_within_the_panel(table):
    table.loc[0, "sscd_orig_low"] = -0.37
    table.loc[1, "sscd_orig_paper"] = 1.31
    first, second = figures.figure_table_1(table).axes[:2]
    assert first.get_xlim() == pytest.approx((-0.41, 1.45))
    assert second.get_xlim() == pytest.approx((-0.14, 1.05))  # values from -0.1 to 1


def test_rounding_errors_do_not_widen_a_panel(table):
    table.loc[0, "sscd_gen_high"] = 1 + 1e-7
    assert figures.figure_table_1(table).axes[1].get_xlim()[1] == pytest.approx(1.05)


def test_no_memorized_prompts(table):
    with pytest.raises(ValueError, match=r"the table has the kinds \['ladder'\]; needed: one of vm, tm"):
        figures.figure_table_1(table.assign(kind="ladder"))


@pytest.fixture
def unmemorized():
    return pd.DataFrame(
        {
            "a_clip_before": [0.2, 0.3],
            "a_clip_one": [0.2, 0.25],
            "a_clip_all": [0.25, 0.1],
            "d_sscd_before": [0.5, 0.5],
            "d_sscd_one": [0.5, 0.5],
            "d_sscd_all": [0.5, 0.5],
        }
    )


def test_figure_unharmed_compares_before_and_after(unmemorized):
    figure = figures.figure_unharmed(unmemorized)
    left, right = figure.axes
    assert figure.get_figwidth() == pytest.approx(0.8 * TEXT_WIDTH)
    for axes, metric in ((left, "a_clip"), (right, "d_sscd")):
        line, *both = axes.lines
        assert (line.get_slope(), line.get_linestyle()) == (1, ":")
        for points, name, kind, marker in zip(both, ("one", "all"), ("unmemorized", "deactivated"), "^v", strict=True):
            assert points.get_xdata().tolist() == unmemorized[f"{metric}_before"].tolist()
            assert points.get_ydata().tolist() == unmemorized[f"{metric}_{name}"].tolist()
            assert (to_hex(points.get_color()), points.get_marker()) == (ROLE_COLORS[kind].lower(), marker)
        assert axes.get_title() == figures.METRICS[metric]
        assert axes.get_xlabel() == "all neurons active"
        assert axes.get_xlim() == axes.get_ylim()
    assert (left.get_ylabel(), right.get_ylabel()) == ("neurons deactivated", "")
    assert left.get_xlim() == pytest.approx((0.09, 0.31))
    assert right.get_xlim() == pytest.approx((0.45, 0.55))


def test_no_unmemorized_prompts(unmemorized):
    with pytest.raises(ValueError, match="no unmemorized prompts"):
        figures.figure_unharmed(unmemorized.iloc[:0])


def test_a_metric_that_no_prompt_has_has_no_panel(unmemorized):
    missing = unmemorized.assign(**{f"d_sscd_{name}": float("nan") for name in ("before", "one", "all")})
    assert len(figures.figure_unharmed(unmemorized).axes) == 2
    (axes,) = figures.figure_unharmed(missing).axes
    assert axes.get_title() == r"A$_{CLIP}$"


def test_short_names_fit_above_an_image():
    settings = list(dict.fromkeys(paper.table_1()["setting"]))
    short = figures.short_names(["planted", *settings, INITIAL])
    assert short == (
        "planted", "untouched", "Wen", "random", "Ren", "1 token", "4 tokens", "10 tokens", "NeMo", "initial",
    )  # fmt: skip
