import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from nemolib.experiments_blocking import FREQUENT, OTHER, QUALITY, UNTOUCHED
from nemolib.figures import blocking as figures
from nemolib.theme import ROLE_COLORS, TEXT_WIDTH


@pytest.fixture
def summary():
    rows = []
    for place, metric in enumerate(QUALITY):
        level = 10.0 ** (1 - place)
        rows.append((metric, UNTOUCHED, 0, 0.0, level, level / 10, ""))
        for asked in (3, 30):
            rows.append((metric, FREQUENT, asked, float(asked), level * asked, level / 5, ""))
            rows.append((metric, OTHER, asked, asked - 0.5, level, level / 4, ""))
    return pd.DataFrame(rows, columns=["metric", "setting", "asked", "neurons", "mean", "sd", "reason"])


@pytest.fixture
def effects():
    numbers = [(UNTOUCHED, 0, np.nan)]
    blocks = ["down"] * 6 + ["mid"] + ["up"] * 9
    numbers += [(part, layer, block) for part in ("value", "key") for layer, block in enumerate(blocks, start=1)]
    numbers += [("convolution", layer, "down") for layer in range(1, 5)]
    rows = [
        (part, layer, block, prompt, 0.8 - 0.01 * layer - 0.1 * (prompt == "b"), 0.3 + 0.001 * layer)
        for part, layer, block in numbers
        for prompt in "abc"
    ]
    return pd.DataFrame(rows, columns=["part", "layer", "block", "prompt", "sscd_orig", "a_clip"])


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(axes):
    return [text.get_text().replace("\n", " ") for text in axes.texts]


# Image quality


@pytest.mark.parametrize(
    ("draw", "titles"), [(figures.figure_5a, ["FID", "KID"]), (figures.figure_8, list(QUALITY.values()))]
)
def test_every_metric_has_a_panel(summary, draw, titles):
    figure = draw(summary)
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    assert [axes.get_title() for axes in figure.axes] == titles
    assert {axes.get_xlabel() for axes in figure.axes} == {"blocked neurons"}
    assert legend(figure) == ["all neurons active", "most frequent memorization neurons", "random other neurons"]
    figure.draw_without_rendering()


def test_points_and_intervals_are_those_of_the_table(summary):
    for axes, metric in zip(figures.figure_8(summary).axes, QUALITY, strict=True):
        rows = summary[summary["metric"] == metric]
        drawn = dict(zip((FREQUENT, OTHER), axes.containers, strict=True))
        for setting, shift in ((FREQUENT, 1), (OTHER, figures.SHIFT)):
            part = rows[rows["setting"] == setting]
            line, _, (bars,) = drawn[setting].lines
            assert line.get_ydata().tolist() == part["mean"].tolist()
            assert line.get_xdata() == pytest.approx(part["neurons"] * shift)
            ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
            expected = [[mean - sd, mean + sd] for mean, sd in zip(part["mean"], part["sd"], strict=True)]
            assert np.ravel(ends) == pytest.approx(np.ravel(expected))
        base = rows[rows["setting"] == UNTOUCHED].iloc[0]
        assert set(axes.lines[0].get_ydata()) == {base["mean"]}


def test_settings_have_a_second_cue(summary):
    frequent, other = (container.lines[0] for container in figures.figure_5a(summary).axes[0].containers)
    assert to_hex(frequent.get_color()) == ROLE_COLORS["deactivated"].lower()
    assert frequent.get_marker() != other.get_marker()
    assert frequent.get_linestyle() != other.get_linestyle()
    assert to_hex(other.get_markerfacecolor()) == "#ffffff"


def test_ticks_are_the_numbers_asked_for(summary):
    axes = figures.figure_5a(summary).axes[0]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "30"]


def test_without_neurons_there_is_the_line_of_the_untouched_model(summary):
    figure = figures.figure_5a(summary[summary["setting"] == UNTOUCHED])
    figure.draw_without_rendering()
    assert legend(figure) == ["all neurons active"]


def test_without_values_the_reason_is_written(summary):
    figure = figures.figure_8(summary.assign(mean=np.nan, sd=np.nan, reason="not computed: one image"))
    figure.draw_without_rendering()
    assert [texts(axes) for axes in figure.axes] == [["not computed: one image"]] * 3
    assert not figure.legends


def test_a_value_that_was_measured_once_is_drawn(summary):
    figure = figures.figure_5a(summary.assign(sd=np.nan))
    figure.draw_without_rendering()
    assert len(figure.axes[0].containers) == 2


def test_a_missing_metric_is_named(summary):
    with pytest.raises(ValueError, match=r"the table has no kid; its metrics: \['fid'\]"):
        figures.figure_5a(summary[summary["metric"] == "fid"])


# Layers


@pytest.mark.parametrize(
    ("draw", "metric", "label"),
    [(figures.figure_16, "sscd_orig", r"SSCD$_{Orig}$"), (figures.figure_17, "a_clip", r"A$_{CLIP}$")],
)
def test_value_and_key_layers_stand_side_by_side(effects, draw, metric, label):
    figure = draw(effects)
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    assert [axes.get_title() for axes in figure.axes] == ["value layers set to zero", "key layers set to zero"]
    assert figure.axes[0].get_ylabel() == label
    assert legend(figure) == ["untouched model, median", "a prompt, layer switched off", "median over prompts"]
    for axes, part in zip(figure.axes, ("value", "key"), strict=True):
        base, prompts, medians = axes.lines
        rows = effects[effects["part"] == part]
        assert prompts.get_ydata().tolist() == rows[metric].tolist()
        assert medians.get_xdata().tolist() == list(range(1, 17))
        assert medians.get_ydata() == pytest.approx(rows.groupby("layer")[metric].median().to_numpy())
        assert base.get_ydata()[0] == effects.loc[effects["part"] == UNTOUCHED, metric].median()
        assert to_hex(prompts.get_color()) == ROLE_COLORS["vm"].lower()
        assert prompts.get_marker() != medians.get_marker()
    figure.draw_without_rendering()


def test_blocks_are_named_where_there_are_several(effects):
    figure = figures.figure_16(effects)
    assert [texts(axes) for axes in figure.axes] == [["down", "mid", "up"]] * 2
    down, mid, up = figure.axes[0].texts
    assert (down.xy[0], mid.xy[0], up.xy[0]) == (3.5, 7.0, 12.0)
    assert [texts(axes) for axes in figures.figure_convolutions(effects).axes] == [[], []]


def test_convolutions_have_both_metrics(effects):
    figure = figures.figure_convolutions(effects)
    assert [axes.get_ylabel() for axes in figure.axes] == list(figures.NAMES.values())
    for axes, metric in zip(figure.axes, figures.NAMES, strict=True):
        rows = effects[effects["part"] == "convolution"]
        assert axes.lines[1].get_ydata().tolist() == rows[metric].tolist()
        assert [int(tick) for tick in axes.get_xticks()] == [1, 2, 3, 4]


def test_without_training_images_that_is_written(effects):
    figure = figures.figure_convolutions(effects.assign(sscd_orig=np.nan))
    figure.draw_without_rendering()
    assert texts(figure.axes[0]) == ["not known: no prompt has a training image"]
    assert len(figure.axes[1].lines) == 3


def test_without_prompts_that_is_written(effects):
    figure = figures.figure_16(effects.iloc[:0])
    figure.draw_without_rendering()
    assert [texts(axes) for axes in figure.axes] == [["not computed: there are no memorized prompts"]] * 2


def test_a_missing_part_is_named(effects):
    with pytest.raises(ValueError, match="the table has no layers of part 'key'"):
        figures.figure_16(effects[effects["part"] != "key"])
