"""All exhibits, drawn and read from the tables that a longer run of the tiny world left in the repository."""

import hashlib
import importlib
import inspect
import math
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nemolib import exhibits, paper, paths
from nemolib.exhibits import Claim, ClaimError, NotEnough, check, must
from nemolib.experiments import published_run
from nemolib.settings import load_profile
from nemolib.store import PLANTED, WITH_AND_WITHOUT, Grid, read_table

KEPT = Path(__file__).parents[1] / "data" / "kept_tables"

ALL = [item for item in exhibits.exhibits() if not item.notebook.startswith("beyond/")]
"""Those of methods after NeMo are drawn and read by their own tests, from small made tables."""

MODULES = ("memorization_score", "localize_neurons", "overview", "deactivate_neurons", "ablations",
           "side_effects", "published_run")  # fmt: skip


def turns():
    """Return for each claim two changes of a source: with one it holds, with the other not; each module's tests list its own."""
    for module in MODULES:
        yield from importlib.import_module(f"tests.unit.test_{module}").TURNS


@cache
def kept(name):
    """Return a table of the longer run, or what stands for those that are not kept: large tables and images."""
    path = KEPT / f"{name}.csv"
    if path.is_file():
        return read_table(path)
    if name == "holdout_pairs":
        values = np.random.default_rng(0).uniform(0.2, 0.5, 40 * 45)
        return pd.DataFrame({"prompt": np.repeat(np.arange(40), 45), "similarity": values})
    if name == "unet_blocks":
        columns = ["part", "block", "depth", "layer", "neurons", "features"]
        return pd.DataFrame(
            [("down", "down_blocks.0", 0, 1, 32, 16), ("up", "up_blocks.0", 0, 0, 0, 0)], columns=columns
        )
    if name.startswith("published_"):
        return published_run.tables(FakeRun())[name]
    captions = kept("deactivation")["prompt"].tolist()[:2]
    if name in ("noise_differences", "samples"):
        captions = [
            kept("overview")["prompt"].iloc[0],
            kept("scores").query("kind == 'unmemorized'")["caption"].iloc[0],
        ]
    images = np.random.default_rng(0).integers(0, 255, (2, 5, 8, 8, 3), dtype=np.uint8)
    return Grid(images, tuple(captions), (PLANTED, *[WITH_AND_WITHOUT[0]] * 2, *[WITH_AND_WITHOUT[1]] * 2))


def sources(item):
    functions = [item.draw, *([item.read] if item.read else [])]
    return sorted({name for function in functions for name in inspect.signature(function).parameters})


@pytest.fixture(scope="module", params=ALL, ids=lambda item: item.name)
def item(request):
    return request.param


def test_it_is_drawn_and_says_what_it_shows(item):
    drawn = exhibits.render(item, None, load=kept, write=False)
    assert drawn.content is not None, drawn.reason
    if isinstance(drawn.content, Figure):
        assert drawn.content.get_figwidth() <= 5.5 + 1e-9
        # An empty figure has no artists.
        assert any(axes.has_data() or axes.texts for axes in drawn.content.axes)
    else:
        assert len(drawn.content)
        assert not drawn.content.columns.duplicated().any()
    assert all(isinstance(claim, Claim) and claim.text for claim in drawn.claims)
    assert item.caption.endswith(".")
    assert item.notebook.startswith(tuple("0123456789"))


def test_each_source_cut_to_nothing_leaves_it_out_with_a_reason(item):
    for name in sources(item):

        def cut(asked, name=name):
            value = kept(asked)
            if asked != name:
                return value
            return value.iloc[:0] if isinstance(value, pd.DataFrame) else Grid(value.images[:0], (), value.columns)

        drawn = exhibits.render(item, None, load=cut, write=False)
        assert drawn.content is None, name
        assert name in drawn.reason


def test_the_papers_exhibits_come_first_in_its_order_and_none_is_missing():
    names = [item.name for item in ALL]
    assert names[: len(paper.PLACES)] == list(paper.PLACES)
    assert max(Counter(names).values()) == 1
    places = paper.table("figures").set_index("label")["exhibits"].str.split().explode()
    labels = {item.name: item.label for item in ALL}
    assert all(label.rstrip("ab") in labels[name] or "-" in labels[name] for label, name in places.items())


def decided():
    """Return the exhibit and the text of each claim that is decided by numbers."""
    return {
        (item.name, claim.text)
        for item in ALL
        for claim in exhibits.claims(item, kept)
        if claim.holds is not None and not item.name.startswith("published")
    }


def test_each_claim_of_the_paper_counts_once():
    page = [exhibits.Rendered(item, None, exhibits.claims(item, kept)) for item in ALL]
    said = [claim for item in page for claim in item.said if item.exhibit.notebook != "06_figures"]
    assert all(claim.n for claim in said if claim.paper and claim.holds is not None)
    table = exhibits.claim_table(page)
    assert not table["claim"].duplicated().any()
    assert not table["rule"].eq("").any()
    assert set(table["verdict"]) <= {"holds", "does not hold", "not decided"}
    assert exhibits.summary(table).startswith(f"{table['verdict'].eq('holds').sum()} of {len(table)} claims")


def test_every_claim_has_a_change_that_turns_it():
    assert decided() <= {(name, text) for name, *_, text in turns()}


@pytest.mark.parametrize("turn", list(turns()), ids=lambda turn: f"{turn[0]}: {turn[-1]}"[:60])
def test_a_change_turns_a_claim(turn):
    name, source, *changes, text = turn
    (item,) = [item for item in ALL if item.name == name]
    holds = []
    for change in changes if len(changes) == 2 else (lambda table: table, *changes):
        said = exhibits.claims(item, lambda asked: change(kept(asked).copy()) if asked == source else kept(asked))  # noqa: B023
        found = {claim.text: claim.holds for claim in said}
        assert text in found, list(found)
        holds.append(found[text])
    assert holds == [True, False] or (len(changes) == 1 and holds == [False, True])


# What an exhibit is


class FakeRun:
    """What exhibits need of a run."""

    def __init__(self, **tables):
        self.profile, self.tables = load_profile("tiny"), tables
        self.device = "cpu"

    def load(self, name):
        if name not in self.tables:
            raise FileNotFoundError(f"there is no table or image grid {name!r}")
        return self.tables[name]


NOTEBOOK = "03_localize_neurons"


def read_numbers(numbers):
    last = numbers["x"].iloc[-1]
    yield Claim("it ends at 4", str(last), "4", bool(last == 4), "equal", n=f"{len(numbers)} number")
    yield must("it rises", last - numbers["x"].iloc[0], at_least=0)


@pytest.fixture
def own(monkeypatch):
    """Return two exhibits of our own, the only ones that are known."""
    monkeypatch.setattr(exhibits, "_EXHIBITS", {})
    monkeypatch.setattr(exhibits, "import_module", lambda name: None)
    monkeypatch.setattr(exhibits, "code_hash", lambda module: "code")

    @exhibits.exhibit("Fig. 99", "a line", "A caption with <signs> & such.", read=read_numbers)
    def line(numbers):
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot(numbers["x"])
        return figure

    @exhibits.exhibit("", "the numbers")
    def show_numbers(numbers):
        """As they are."""
        if len(numbers) < 2:
            raise NotEnough("table 'numbers' has 1 of the 2 rows needed")
        return numbers.assign(text="a|b ± 50 % & _x")

    return FakeRun(numbers=pd.DataFrame({"x": [1, 3, 5]}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    return tmp_path / "tiny"


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_files_are_written_and_again_the_same(own, folder):
    exhibits.write_page(exhibits.render_all(own), own)
    first = digests(folder)
    assert {name.partition(".")[0] for name in first} == {"line", "numbers", "index", "claims"}
    assert {path.suffix for path in folder.iterdir()} == {".pdf", ".png", ".json", ".csv", ".md", ".tex"}
    assert "a\\|b ± 50 % & _x" in (folder / "numbers.md").read_text()
    assert r"a|b $\pm$ 50 \% \& \_x" in (folder / "numbers.tex").read_text()
    exhibits.write_page(exhibits.render_all(own), own)
    assert digests(folder) == first
    own.tables["numbers"] = pd.DataFrame({"x": [1, 3, 6]})
    exhibits.render_all(own)
    assert digests(folder)["line.json"] != first["line.json"]


def test_the_page_has_caption_claims_verdict_and_what_is_missing(own, folder):
    own.tables["numbers"] = pd.DataFrame({"x": [7]})
    files = exhibits.write_page(exhibits.render_all(own), own)
    text = files["md"].read_text()
    for words in ("## Fig. 99: a line", "paper: 4", "does not hold", "0 of 1 claims of the paper hold here", NOTEBOOK):
        assert words in text
    assert (folder / "claims.csv").read_text() == (
        "claim,verdict,paper,ours,n,interval,rule\nit ends at 4,does not hold,Fig. 99: 4,7,1 number,,equal\n"
    )
    assert "| it ends at 4 | does not hold | Fig. 99: 4 |" in (folder / "claims.md").read_text()
    assert "| The numbers | table 'numbers' has 1 of the 2 rows needed |" in text
    assert "![Fig. 99: a line](line.png)\n\nA caption with <signs> & such." in text
    with pytest.raises(ValueError, match="no exhibit was drawn"):
        exhibits.write_page([], own)


def test_claims_of_a_notebook_are_one_table_and_those_that_must_hold_do(own):
    table = check(own, "test_exhibits", extra=[must("small", 3e-7, at_most=1e-5)])
    assert table["claim"].tolist() == ["small", "it ends at 4", "it rises"]
    assert table["verdict"].tolist() == ["holds", "does not hold", "holds"]
    assert table["ours"].tolist() == ["3e-07", "5", "4"]
    own.tables["numbers"] = pd.DataFrame({"x": [5, 4]})
    with pytest.raises(ClaimError, match="it rises: -1, must be >= 0"):
        check(own, "test_exhibits")
    with pytest.raises(ValueError, match="no claims of nothing"):
        check(own)


@pytest.mark.parametrize(
    ("arguments", "verdict", "rule"),
    [
        ({"value": 0.99, "at_least": 0.98}, "holds", "must be >= 0.98"),
        ({"value": 0.97, "at_least": 0.98, "reason": "so"}, "does not hold", "must be >= 0.98; so"),
        ({"value": 0.4, "at_least": 0, "at_most": 1}, "holds", "must be >= 0 and <= 1"),
        ({"value": True}, "holds", "must be 1"),
        ({"value": False}, "does not hold", "must be 1"),
        ({"value": math.nan, "at_least": 0}, "does not hold", "must be >= 0"),
        ({"value": 3e-7, "equals": 0}, "does not hold", "must be 0"),
    ],
)  # fmt: skip
def test_what_must_hold(arguments, verdict, rule):
    claim = must("text", **arguments)
    assert (claim.verdict, claim.rule) == (verdict, rule)


def test_what_is_shown_in_a_notebook(own, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda item, raw=False: shown.append(getattr(item, "data", item)))
    for name in ("line", "numbers"):
        exhibits.show(own, name)
    exhibits.show(FakeRun(), "line")
    figure, said, table, plain, missing = shown
    assert isinstance(figure, Figure)
    assert said.splitlines()[::2] == ["**Fig. 99: a line.** A caption with <signs> & such.",
        "- it ends at 4: 5; paper: 4; n = 3 number; **does not hold** (equal)", f"*Drawn by `line` in `{__name__.replace('.', '/')}.py`.*"]  # fmt: skip
    assert "a|b ± 50 % &amp; _x" in table["text/html"]
    assert plain == f"**The numbers.** As they are.\n\n*Drawn by `show_numbers` in `{__name__.replace('.', '/')}.py`.*"
    assert missing == "*Fig. 99: a line* is not shown: there is no table or image grid 'numbers'."
    with pytest.raises(KeyError, match="unknown exhibit 'lines'; known: line, numbers"):
        exhibits.show(own, "lines")


@pytest.mark.parametrize(("value", "verdict"), [(0.5, "holds"), (0.6, "does not hold"), (np.nan, "not decided")])
def test_an_effect_is_decided_by_its_size(value, verdict):
    claim = exhibits.effect("a claim", value, "share", at_most=0.5, ours="1 of 2", paper="all", n="2 prompts")
    assert (claim.verdict, claim.rule) == (verdict, "share: at most 0.5")
    assert claim.ours == ("1 of 2" if np.isnan(value) else f"{value:.2f} (1 of 2)")
    assert exhibits.effect("a claim", value, "share", at_least=0.7, ours="", paper="", n="2").holds is not True


def test_tables_are_shown_as_people_read_them(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda item, raw: shown.append(item))
    exhibits.as_table(pd.DataFrame({"a": [0.12345, np.nan], "b": ["<x>", "y"], "c": [1, 2]}), b="text", a="number")
    assert shown[0]["text/plain"].split() == ["text", "number", "<x>", "0.123", "y"]
    assert "&lt;x&gt;" in shown[0]["text/html"]
    assert "nan" not in shown[0]["text/html"].lower()


def test_numbers_as_text():
    assert exhibits.median_mad([0.826, 0.83, 0.99, np.nan]) == "0.83 ± 0.00"
    assert exhibits.median_mad([1, 2, 4, 10], digits=1) == "3.0 ± 1.5"
    assert exhibits.median_mad([np.nan]) == ""
