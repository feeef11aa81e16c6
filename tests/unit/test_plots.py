import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nemolib import plots
from nemolib.store import Grid

TABLE = pd.DataFrame({"kind": ["vm"] * 3 + ["tm"] * 5 + ["unmemorized"], "x": [1, 1, 4, 2, 2, 3, 7, 9, 5]})


def test_the_style_holds_inside_and_changes_nothing_outside():
    before = dict(mpl.rcParams)
    with plots.panels(fraction=0.5, aspect=0.6) as (figure, axes):
        chosen = {name: mpl.rcParams[name] for name in ("axes.labelsize", "xtick.labelsize")}
        axes.set_xlabel(r"score $\tau$")
    assert figure.get_size_inches() == pytest.approx([2.75, 1.65])
    assert chosen == {"axes.labelsize": 9, "xtick.labelsize": 7}
    assert dict(mpl.rcParams) == before
    # The family is looked up when the figure is drawn, outside the context.
    assert axes.xaxis.label.get_fontfamily()[0] == "STIXGeneral"


def test_every_role_has_its_own_colour_marker_line_and_hatch():
    for cue in ("color", "marker", "line", "hatch"):
        values = [getattr(role, cue) for role in plots.ROLES.values()]
        assert len(set(values)) == len(values), cue


def test_distributions_are_shares_of_the_prompts_of_a_kind():
    parts = {kind: TABLE[TABLE["kind"] == kind] for kind in ("unmemorized", "tm")}
    with plots.panels() as (_, axes):
        plots.distributions(axes, parts, "x", xlabel="things")
    for patch, kind, highest in zip(axes.patches, parts, (1, 0.4), strict=True):
        assert patch.get_label() == f"{plots.ROLES[kind].label}, n = {len(parts[kind])}"
        assert patch.get_xy()[:, 1].max() == pytest.approx(highest)
        assert patch.get_hatch() == plots.ROLES[kind].hatch
    assert [len(marks.get_segments()) for marks in axes.collections] == [1, 5], "a line for each prompt"


def test_bars_have_the_looks_of_their_hue():
    with plots.panels() as (_, axes):
        plots.bars(axes, TABLE, "x", "x")
    for container, kind in zip(axes.containers, ("vm", "tm", "unmemorized"), strict=True):
        look = plots.ROLES[kind]
        assert container.get_label() == look.label
        assert all(np.allclose(bar.get_facecolor()[:3], mpl.colors.to_rgb(look.color)) for bar in container)
        assert {bar.get_hatch() or "" for bar in container} == {look.hatch}


def test_images_stand_in_rows_with_their_labels():
    images = np.random.default_rng(0).integers(0, 255, (2, 4, 8, 8, 3), dtype=np.uint8)
    grid = Grid(images, ("a cat", "a dog"), ("planted", "off", "off", "other"))
    figure = plots.image_grid(grid, counts=[3, 12], kinds={"a cat": "vm"})
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert np.array_equal(np.stack(shown), images.reshape(-1, 8, 8, 3))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["VM: a cat", "planted", "3", "off", "other", "a dog", "12"]
    single = Grid(images, grid.rows, ("planted", "seed 0", "seed 1", "factor -1"))
    # Without a group of columns there is no place for a box.
    plain = [text.get_text() for axes in plots.image_grid(single, counts=[3, 12]).axes for text in axes.texts]
    assert plain == ["a cat", *single.columns[:3], "factor −1", "a dog"]
    with pytest.raises(ValueError, match="1 counts for 2 rows"):
        plots.image_grid(grid, counts=[3])


def test_a_figure_shows_itself_for_a_screen_and_stays_as_it_was(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    with plots.panels(fraction=0.5) as (figure, axes):
        axes.set_xlabel("neurons")
    before = axes.xaxis.label.get_fontfamily(), axes.xaxis.label.get_fontsize()
    figure._ipython_display_()
    with Image.open(io.BytesIO(shown[0].data)) as image:
        assert shown[0].width < image.width
        assert image.mode == "P"  # few colours, few bytes
    assert (axes.xaxis.label.get_fontfamily(), axes.xaxis.label.get_fontsize()) == before


def test_ticks_that_are_held_back_have_the_letters_of_a_screen_too(monkeypatch):
    with plots.panels() as (figure, axes):
        axes.plot([0, 1])
    assert len(axes.yaxis.get_major_ticks(12)) > len(axes.get_yticks())
    fonts = []  # in the PDF, in the PNG

    def savefig(*_, **__):
        fonts.append({tick.label1.get_fontfamily()[0] for tick in axes.yaxis.majorTicks})

    monkeypatch.setattr(figure, "savefig", savefig)
    plots.files_of(figure)
    assert fonts == [{plots.FONTS[0]}, {plots.SCREEN_FONT}]


def test_files_are_as_wide_as_the_figure(caplog):
    with plots.panels(fraction=0.5) as (figure, axes):
        axes.plot([0, 1, 2], [2.0, -1.0, 0.5])
    files = plots.files_of(figure)
    with Image.open(io.BytesIO(files["png"])) as image:
        assert image.width == pytest.approx(2.75 * 300, abs=1)
    assert files["pdf"].startswith(b"%PDF")
    assert not caplog.records
