import json

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nemolib import paths, theme


def drawn():
    with mpl.rc_context(theme.neurips(0.5)):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0, 1, 2], [2.0, -1.0, 0.5])
        axes.set_xlabel(r"score $\tau$")
    return figure


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_the_width_is_a_share_of_the_text(fraction):
    with mpl.rc_context(theme.neurips(fraction, aspect=0.5)):
        figure = Figure()
    assert figure.get_figwidth() == pytest.approx(5.5 * fraction)
    assert figure.get_figheight() == pytest.approx(5.5 * fraction * 0.5)


def test_settings_are_known_to_matplotlib_and_change_nothing_outside():
    before = dict(mpl.rcParams)
    with mpl.rc_context(theme.neurips()):
        assert mpl.rcParams["axes.labelsize"] == 9
        assert mpl.rcParams["xtick.labelsize"] == 7
        assert mpl.rcParams["pdf.fonttype"] == 42
        assert not mpl.rcParams["text.usetex"]
    assert dict(mpl.rcParams) == before


def test_the_font_stays_when_the_figure_is_drawn_outside_the_context():
    (axes,) = drawn().axes
    assert axes.xaxis.label.get_fontfamily()[0] == "STIXGeneral"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"fraction": 0}, "fraction is 0"), ({"fraction": 1.5}, "fraction is 1.5"), ({"aspect": -1}, "aspect is -1")],
)
def test_impossible_sizes(settings, message):
    with pytest.raises(ValueError, match=message):
        theme.neurips(**settings)


def test_every_role_has_its_own_colour_marker_line_and_hatch():
    for cue in ("color", "marker", "line", "hatch"):
        values = [getattr(role, cue) for role in theme.ROLES.values()]
        assert len(set(values)) == len(values), cue


def test_unknown_role():
    assert theme.role("vm").color == theme.ROLE_COLORS["vm"]
    with pytest.raises(KeyError, match="unknown role 'mv'; known roles: vm, tm"):
        theme.role("mv")


def save(folder, **changes):
    arguments = {"profile": "tiny", "notebook": "01", "inputs": {"table": pd.DataFrame({"a": [1.5]})}} | changes
    return theme.save_figure(drawn(), folder / "figure_x", **arguments)


def test_saving_writes_pdf_png_and_what_it_was_made_from(tmp_path):
    files = save(tmp_path, seeds={"detection": 1}, notes={"prompts": 3})
    assert {path.name for path in files.values()} == {"figure_x.pdf", "figure_x.png", "figure_x.json"}
    sidecar = json.loads(files["json"].read_text())
    assert sidecar["seeds"] == {"detection": 1}
    assert sidecar["prompts"] == 3
    assert set(sidecar["inputs"]) == {"table"}
    with mpl.cbook.get_sample_data(str(files["png"])) as file:
        assert mpl.image.imread(file).shape[1] == pytest.approx(2.75 * 300, abs=1)


def test_saving_again_gives_the_same_bytes(tmp_path):
    first = {name: path.read_bytes() for name, path in save(tmp_path / "a").items()}
    assert {name: path.read_bytes() for name, path in save(tmp_path / "b").items()} == first


def test_other_inputs_give_another_sidecar(tmp_path):
    first = save(tmp_path / "a")["json"].read_text()
    other = save(tmp_path / "b", inputs={"table": pd.DataFrame({"a": [1.6]})})["json"].read_text()
    assert other != first
    assert save(tmp_path / "c", inputs={"pairs": np.zeros(3)})["json"].read_text() != first


def test_a_name_goes_to_the_figures_of_the_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    files = theme.save_figure(drawn(), "figure_y", profile="tiny", notebook="01")
    assert files["pdf"] == tmp_path / "tiny" / "figure_y.pdf"


def test_saving_says_nothing(tmp_path, caplog):
    save(tmp_path)
    assert not caplog.records


def test_a_figure_for_the_screen_is_small_and_the_same_again():
    import io

    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(2, 1))
    figure.subplots().imshow(np.random.default_rng(0).random((32, 32, 3)))
    small = theme.screen_png(figure)
    assert small == theme.screen_png(figure)
    with Image.open(io.BytesIO(small)) as image:
        assert image.size == (2 * theme.SCREEN, theme.SCREEN)
        assert image.mode == "P"
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=theme.SCREEN)
    assert len(small) < 0.6 * len(full.getvalue())
