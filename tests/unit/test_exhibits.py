import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nemolib import exhibits, index, paper, paths, tables
from nemolib.exhibits import EXHIBITS, NOT_MADE, VERDICTS, CannotDrawError, Exhibit, MissingResultError, Reading, base
from nemolib.profiles import load_profile


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
    inside = {link[1:] for link in links if link.startswith("#")}
    assert inside == Page(text).anchors
    assert inside - {"what-is-not-here-and-why"} == {"figure_x", "table_x", "what-agrees-what-differs-why"}


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
        assert exhibit.tables or exhibit.grids or exhibit.published
        assert exhibit.caption.endswith(".")
        assert re.fullmatch(r"0[1-5]_\w+", exhibit.notebook) or exhibit.published
        assert {name for name, _ in exhibit.elsewhere} <= {*exhibit.tables, *exhibit.grids}
    assert set(VERDICTS) == {"agrees", "differs", "beside"}


def test_every_figure_and_table_of_the_paper_is_shown_or_named_as_not_made():
    numbers = {f"Figure {number}" for number in range(1, 21)} | {f"Table {number}" for number in range(1, 5)}
    assert {re.sub(r"[ab]$", "", name) for name in paper.FIGURES_AND_TABLES} == numbers
    shown = [name for exhibit in EXHIBITS for name in exhibit.shows]
    assert len(set(shown)) == len(shown), "two exhibits say that they show the same"
    assert not set(shown) & set(NOT_MADE)
    assert set(shown) | set(NOT_MADE) == set(paper.FIGURES_AND_TABLES)
    assert all(NOT_MADE.values())


def test_the_list_is_in_the_papers_order():
    order = list(paper.FIGURES_AND_TABLES)
    places = [order.index(name) for exhibit in EXHIBITS for name in exhibit.shows[:1]]
    assert places == sorted(places)
    names = [exhibit.name for exhibit in EXHIBITS]
    for exhibit in EXHIBITS:
        if exhibit.published:
            assert names.index(exhibit.name) == names.index(exhibit.name.removeprefix("published_")) + 1


@pytest.mark.parametrize(
    ("label", "names"),
    [
        ("Figure 5a", ("Figure 5a",)),
        ("Figures 16-18", ("Figure 16", "Figure 17", "Figure 18")),
        ("Tables 1, 3 and 4", ("Table 1", "Table 3", "Table 4")),
        ("Table 4 (thresholds)", ()),
        ("Figures 10-12 (as a table)", ()),
        ("Sec. 4, Table 4", ()),
        ("", ()),
    ],
)
def test_a_label_names_what_an_exhibit_shows(label, names):
    assert base.named(label) == names


NEED = base.rows("numbers", at_least=4)


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        (base.rows("numbers"), ""),
        (NEED, "table 'numbers' has 3 of the 4 rows needed"),
        (base.rows("numbers", kind="tm"), "table 'numbers' has no rows with kind 'tm'"),
        (base.values("numbers", "x", "y"), ""),
        (base.values("numbers", "x", "y", at_least=2), "table 'numbers' has 1 of the 2 values of y needed"),
        (base.values("numbers", "y", kind="ladder"), "table 'numbers' has no values of y with kind 'ladder'"),
        (base.positive("numbers", "x", kind="vm"), ""),
        (base.positive("numbers", "z"), "table 'numbers' has no z above 0"),
    ],
)
def test_what_a_table_must_hold(need, reason):
    table = pd.DataFrame({"x": [1, 3, 5], "y": [np.nan, 2.0, np.nan], "z": 0, "kind": ["vm", "vm", "ladder"]})
    assert need({"numbers": table}) == reason


def test_what_cannot_be_drawn_is_skipped_with_the_reason(sources):
    greedy = replace(FIGURE, name="greedy", label="Figure 9", needs=(NEED,))
    with pytest.raises(CannotDrawError, match="Figure 9: a line: table 'numbers' has 3 of the 4 rows needed"):
        exhibits.render(greedy, "tiny")
    page = exhibits.render_all("tiny", [greedy, TABLE])
    assert isinstance(page[1], exhibits.Rendered)
    assert page[0] == exhibits.NotDrawn(greedy, "table 'numbers' has 3 of the 4 rows needed", computed=True)
    assert exhibits.comparison_table(page)["exhibit"].tolist() == ["The numbers"]
    first = exhibits.missing_table(page).iloc[0]
    assert first.tolist() == ["Figure 9", "a line", "table 'numbers' has 3 of the 4 rows needed"]
    for path in index.write_index(page, "tiny").values():
        text = path.read_text(encoding="utf-8")
        assert "1 figures and tables" in text
        assert "has 3 of the 4 rows needed" in text
        assert "greedy" not in text


def test_a_table_without_rows_gives_a_reason_before_anything_looks_into_it(sources):
    tables.save_table(pd.DataFrame({"y": []}), "numbers", profile="tiny")
    item = exhibits.render_or_say_why(replace(FIGURE, needs=(lambda s: s["numbers"]["x"],)), "tiny")
    assert item.reason == "table 'numbers' has no rows"


def test_a_grid_without_images_gives_a_reason(sources):
    tables.save_grid(np.zeros((0, 1, 2, 2), np.uint8), "pictures", rows=[], columns=["b"], profile="tiny")
    assert exhibits.render_or_say_why(TABLE, "tiny").reason == "image grid 'pictures' has no image"


def test_what_was_not_computed_is_an_error_but_beside_a_published_run():
    with pytest.raises(MissingResultError):
        exhibits.render_all("tiny", [FIGURE])
    profile = replace(load_profile("tiny"), published_run="results.csv")
    item = exhibits.render_all(profile, [FIGURE])[0]
    assert not item.computed
    assert item.reason.startswith("there is no table 'numbers' of profile 'tiny'; run notebook 03_localize_neurons")


def test_a_source_of_another_notebook_is_named_with_it():
    exhibit = replace(FIGURE, elsewhere=(("numbers", "02_memorization_score"),))
    with pytest.raises(MissingResultError, match="run notebook 02_memorization_score: make build/tiny/02_memor"):
        exhibits.render(exhibit, "tiny")


def test_a_page_says_what_agrees_in_one_table(rendered):
    pages = index.write_index(rendered, "tiny")
    text = pages["md"].read_text(encoding="utf-8")
    table = text[text.index(index.COMPARISON) :]
    assert "| Fig. 99 | it ends at 5 | at 4 | differs | one more |" in table
    assert "| The numbers | three |  | no value to compare |  |" in table
    assert Page(pages["html"].read_text(encoding="utf-8")).text.count("it ends at 5") == 2


def test_a_page_needs_something_that_was_drawn(sources):
    page = exhibits.render_all("tiny", [replace(FIGURE, needs=(NEED,))])
    with pytest.raises(ValueError, match="there are no exhibits"):
        index.write_index(page, "tiny")
