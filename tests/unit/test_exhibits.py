import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nemolib import exhibits, index, paths, tables
from nemolib.exhibits import EXHIBITS, VERDICTS, Exhibit, MissingResultError, Reading


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")


def draw_line(sources):
    figure = Figure()
    figure.subplots().plot(sources["numbers"]["x"])
    return figure


FIGURE = Exhibit(
    "figure_x",
    "Fig. 99",
    "a line",
    "03_localize_neurons",
    "A caption with <signs> & such.",
    draw_line,
    lambda sources: Reading(f"it ends at {sources['numbers']['x'].iloc[-1]}", "at 4", "differs", "one more"),
    tables=("numbers",),
)
TABLE = Exhibit(
    "table_x",
    "",
    "the numbers",
    "03_localize_neurons",
    "As they are.",
    lambda sources: sources["numbers"],
    lambda sources: Reading("three"),
    tables=("numbers",),
    grids=("pictures",),
)


@pytest.fixture
def sources():
    tables.save_table(pd.DataFrame({"x": [1, 3, 5]}), "numbers", profile="tiny")
    tables.save_grid(np.zeros((1, 1, 2, 2), np.uint8), "pictures", rows=["a"], columns=["b"], profile="tiny")


@pytest.fixture
def rendered(sources):
    return exhibits.render_all("tiny", [FIGURE, TABLE])


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_figure_and_a_table_are_written(rendered):
    assert set(rendered[0].files) == {"pdf", "png", "json"}
    assert set(rendered[1].files) == {"csv", "md", "tex", "json"}
    sidecar = json.loads(rendered[0].files["json"].read_text())
    assert sidecar["notebook"] == "03_localize_neurons"
    assert set(sidecar["inputs"]) == {"numbers"}
    assert sidecar["seeds"] == {"detection": 1, "generation": 2}
    assert rendered[0].reading.ours == "it ends at 5"


def test_rendering_again_changes_no_byte(rendered):
    index.write_index(rendered, "tiny")
    before = digests(paths.figures_dir("tiny"))
    index.write_index(exhibits.render_all("tiny", [FIGURE, TABLE]), "tiny")
    assert digests(paths.figures_dir("tiny")) == before
    assert len(before) == 9


def test_another_table_gives_another_sidecar(rendered):
    before = rendered[0].files["json"].read_text()
    tables.save_table(pd.DataFrame({"x": [1, 3, 6]}), "numbers", profile="tiny")
    assert exhibits.render(FIGURE, "tiny").files["json"].read_text() != before


def test_an_absent_table_names_the_notebook_to_run():
    with pytest.raises(MissingResultError, match=r"Fig. 99: a line: there is no table 'numbers' of profile 'tiny'; run "
                       r"notebook 03_localize_neurons: make build/tiny/03_localize_neurons.ipynb PROFILE=tiny"):  # fmt: skip
        exhibits.render(FIGURE, "tiny")


def test_an_absent_grid_names_the_notebook_to_run(sources):
    tables.grid_path("pictures", profile="tiny").unlink()
    with pytest.raises(MissingResultError, match=r"The numbers: there is no image grid 'pictures' of profile 'tiny'"):
        exhibits.render(TABLE, "tiny")


def test_comparison_table(rendered):
    table = exhibits.comparison_table(rendered)
    assert table["exhibit"].tolist() == ["Fig. 99", "The numbers"]
    assert table["verdict"].tolist() == ["differs", "beside"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.anchors, self.text = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.anchors |= {value for name, value in attrs if name == "id"}

    def handle_data(self, data):
        self.text += data


def test_links_of_the_html_page_exist(rendered):
    path = index.write_index(rendered, "tiny")["html"]
    text = path.read_text(encoding="utf-8")
    links = index.links(text)
    outside = [link for link in links if not link.startswith("#")]
    assert len(outside) == 1 + 3 + 4
    assert all((path.parent / link).is_file() for link in outside)
    assert {link[1:] for link in links if link.startswith("#")} == Page(text).anchors == {"figure_x", "table_x"}


def test_links_of_the_markdown_page_exist(rendered):
    path = index.write_index(rendered, "tiny")["md"]
    links = re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    assert len(links) == 1 + 3 + 4
    assert all((path.parent / link).is_file() for link in links)


@pytest.mark.parametrize("suffix", ["html", "md"])
def test_the_page_says_what_is_known(rendered, suffix):
    text = index.write_index(rendered, "tiny")[suffix].read_text(encoding="utf-8")
    shown = Page(text).text if suffix == "html" else text
    for part in ("Fig. 99: a line", "A caption with <signs> & such.", "it ends at 5", "at 4", "differs from the paper",
                 "one more", "notebooks/03_localize_neurons.ipynb", "make figures PROFILE=tiny"):  # fmt: skip
        assert part in shown, part
    assert "2 figures and tables" in shown


def test_a_page_without_exhibits_or_with_one_name_twice(rendered):
    with pytest.raises(ValueError, match="there are no exhibits"):
        index.write_index([], "tiny")
    with pytest.raises(ValueError, match="two exhibits have the name 'figure_x'"):
        index.write_index([rendered[0], rendered[0]], "tiny")


def test_a_page_does_not_link_to_what_is_missing(rendered):
    rendered[0].files["png"].unlink()
    with pytest.raises(FileNotFoundError, match=r"Fig. 99: a line: .*figure_x.png is missing"):
        index.write_index(rendered, "tiny")


def test_the_list_can_be_shown_on_one_page():
    index.check_exhibits(EXHIBITS)
    for exhibit in EXHIBITS:
        assert exhibit.tables or exhibit.grids
        assert exhibit.caption.endswith(".")
        assert re.fullmatch(r"0[1-5]_\w+", exhibit.notebook)
    assert set(VERDICTS) == {"agrees", "differs", "beside"}
