"""A published run: reading its table, and what its exhibits say."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from matplotlib.figure import Figure

from nemolib import exhibits
from nemolib.exhibits import NotEnough
from nemolib.experiments import localize_neurons
from nemolib.experiments import published_run as published
from nemolib.experiments.published_run import PublishedRunError, localizations
from nemolib.localization import neuron_sets
from nemolib.neurons import NeuronSet
from nemolib.settings import load_profile

HEADER = "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons"

ROWS = (
    '"the ""fox""; podcast";http://a/1;[[25, 7, 25], [3], []];0.25;[[25], [], []]',
    "the owl podcast;;[[25, 221], [3], [4]];0.25;[[25, 221], [3], []]",
    "a phone case;;[[25, 30], [3], [4, 5, 6]];0.25;[[], [3], [4, 5, 6]]",
    "an unknown caption;;[[9], [], []];0.25;[[9], [], []]",
)

PROMPTS = ';Caption;URL;type\n0;"the ""fox""; podcast";http://a/1;VM\n1;the owl podcast;;VM\n2;a phone case;;TM\n3;never;;VM\n'


@pytest.fixture
def read(tmp_path):
    def written(*rows, header=HEADER, prompts=PROMPTS):
        (tmp_path / "run.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        (tmp_path / "prompts.csv").write_text(prompts, encoding="utf-8")
        base = load_profile("sd14")
        tables = replace(base.prompts, memorized=str(tmp_path / "prompts.csv"))
        profile = replace(base, prompts=tables, published_run=str(tmp_path / "run.csv"))
        return localizations(SimpleNamespace(profile=profile))

    return written


def test_a_run_becomes_a_table_of_localizations(read):
    table = read(*ROWS)
    assert table["kind"].tolist()[:3] == ["vm", "vm", "tm"]
    assert table["kind"].isna().tolist() == [False, False, False, True]
    assert table["prompt"][0] == 'the "fox"; podcast'
    # A neuron that is listed twice counts once.
    assert table["initial_count"].tolist() == [3, 4, 6, 1]
    assert table["neuron_count"].tolist() == [1, 3, 4, 1]
    assert NeuronSet.from_json(table["neurons"][2]) == NeuronSet(((), (3,), (4, 5, 6)))
    shipped = localizations(SimpleNamespace(profile=load_profile("tiny")))
    assert list(shipped) == list(table)
    assert shipped["kind"].value_counts().to_dict() == {"tm": 159, "vm": 92}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a;b;[[1], [2;0.1;[[1], []]", r"'Initial Neurons' is '\[\[1\], \[2'; expected neurons by layer"),
        ("a;b;__import__('os');0.1;[[1], []]", "column 'Initial Neurons' is .* expected neurons by layer"),
        ("a;b;[[1]];0.1;[[-1]]", "column 'Refined Neurons' is .* expected neurons by layer"),
        ("a;b;[[1.5]];0.1;[[1]]", "column 'Initial Neurons' is .* expected neurons by layer"),
        ("a;b;[[1]];0.1;[[2]]", "column 'Refined Neurons' is not within the initial neurons"),
        ("a;b;[[1], []];0.1;[[1]]", "column 'Refined Neurons' is not within the initial neurons"),
        ("a;b;[[1]];0.1;[[1]]", "none of its 1 captions is in the prompt table"),
    ],
)
def test_a_row_that_cannot_be_used(read, row, message):
    with pytest.raises(PublishedRunError, match=message):
        read(row)


def test_a_file_that_cannot_be_used(read, tmp_path):
    with pytest.raises(PublishedRunError, match=r"not found: \['Refined Neurons'\]; expected columns Caption"):
        read(header=HEADER.rpartition(";")[0])
    with pytest.raises(PublishedRunError, match="none of its 0 captions"):
        read()
    (tmp_path / "latin.csv").write_bytes(b"Caption\xff")
    with pytest.raises(PublishedRunError, match="'utf-8' codec can't decode"):
        list(published._rows(tmp_path / "latin.csv"))
    with pytest.raises(FileNotFoundError):
        list(published._rows(tmp_path / "none.csv"))


@pytest.fixture(scope="module")
def tables():
    return published.tables(SimpleNamespace(profile=load_profile("tiny")))


ALL = {item.name: item for item in exhibits.exhibits() if item.notebook == published.NOTEBOOK}


def said(tables, name, **changed):
    """Return the claims of an exhibit by their text."""
    return {claim.text: claim for claim in exhibits.claims(ALL[name], (tables | changed).__getitem__)}


def test_the_exhibits_of_other_notebooks_draw_what_was_published(tables):
    assert set(ALL) == {f"published_{name}" for name in
                        ("figure_4a", "figure_4b", "figure_6", "figure_7", "shared_neurons", "statistics")}  # fmt: skip
    for name, item in ALL.items():
        drawn = exhibits.render(item, None, load=tables.__getitem__, write=False)
        assert drawn.content is not None, drawn.reason
        assert "Not computed here" in item.caption
        if isinstance(drawn.content, Figure):
            assert drawn.content.get_suptitle().endswith("not computed here")
        for claim in drawn.claims:
            assert claim.ours.endswith(("(published run)", "(released table)"))
        function = name.removeprefix("published_")
        assert item.place.startswith(f"`{function}` in `nemolib/experiments/")
    assert localize_neurons.figure_4a.__name__ == "figure_4a", "the exhibit of notebook 03 is as it was"


def test_the_figures_show_the_tables(tables):
    split = ALL["published_figure_6"].draw(published_copies=tables["published_copies"])
    assert [text.get_text() for text in split.axes[0].get_legend().get_texts()][:2] == ["template (TM), n = 375", "verbatim (VM), n = 112"]  # fmt: skip
    normal = tables["published_statistics"]
    assert normal.groupby("layer").size().tolist() == [320, 320, 640, 640, 1280, 1280, 1280]
    panels = ALL["published_statistics"].draw(published_statistics=normal).axes
    for place, column in zip(panels, ("mean", "std"), strict=True):
        assert place.lines[0].get_ydata().tolist() == normal[column].tolist()
        marked = normal.set_index(["layer", "neuron"]).loc[[(1, 25), (1, 221), (3, 507), (3, 517)], column]
        assert place.lines[1].get_ydata().tolist() == marked.tolist()
        assert [text.get_text() for text in place.texts] == ["#25", "#221", "#507", "#517"]


def test_what_was_published_is_compared_with_the_paper(tables):
    found = tables["published_localization"]
    near = {text: claim for text, claim in said(tables, "published_figure_4a").items() if text.startswith("as many")}
    assert [claim.holds for claim in near.values()] == [False, False]
    counts = {"neuron_count": {"vm": 4, "tm": 30}, "initial_count": {"vm": 20, "tm": 900}}
    as_many = found.assign(**{name: found["kind"].map(numbers) for name, numbers in counts.items()})
    changed = said(tables, "published_figure_4a", published_localization=as_many)
    assert all(changed[text].holds for text in near)
    ours = changed["as many neurons as in the paper (after refinement)"].ours
    assert ours == "VM 1 times, TM 1.4 times (published run)"
    few = found.assign(kind=found["kind"].where(found.index > 2))
    unknown = said(tables, "published_figure_4a", published_localization=few)
    assert unknown["prompts left out, since they are not in the prompt table"].ours == "3 (published run)"


def test_the_cut_between_the_kinds(tables):
    copies, text = tables["published_copies"], "VM if the largest SSCD is above 0.7, else TM"
    claim = said(tables, "published_figure_6")[text]
    assert (claim.ours, claim.holds) == ("487 of 487 prompts; 13 more have no SSCD (released table)", True)
    high = copies.assign(copy_max=copies["copy_max"].where(copies["kind"] == "vm", 0.9))
    claim = said(tables, "published_figure_6", published_copies=high)[text]
    assert (claim.ours, claim.holds) == ("112 of 500 prompts; 0 more have no SSCD (released table)", False)


def test_neurons_that_prompts_share(tables):
    found, normal = tables["published_localization"], tables["published_statistics"]
    shown = published.shared_neurons(published_localization=found, published_statistics=normal)
    assert shown[["value layer", "neuron"]].to_numpy().tolist()[:4] == [[1, 25], [1, 221], [3, 507], [3, 517]]
    for row in shown.itertuples(index=False):
        has = [(row[0] - 1, row.neuron) in neurons for neurons in neuron_sets(found)]
        assert [row[3], row[4]] == [(found.loc[has, "kind"] == kind).sum() for kind in ("vm", "tm")]
        assert row.captions.startswith(found.loc[has, "prompt"].iloc[0][:60])
    assert shown["activation"][3] == "2.92 (rank 5 in its layer)"
    text = "VM prompts that have neuron 25 or 221 of value layer 1"
    assert said(tables, "published_shared_neurons")[text].holds is False
    sixth = [NeuronSet(((25,) if place % 6 == 0 else (3,), *[()] * 6)).to_json() for place in range(92)]
    few = pd.concat([found[found["kind"] == "vm"].assign(neurons=sixth), found[found["kind"] == "tm"]])
    claims = said(tables, "published_shared_neurons", published_localization=few)
    assert (claims[text].ours, claims[text].holds) == ("17% (published run)", True)
    assert claims["VM prompts with a single neuron, which is one of the two"].ours == "16 of 92 (published run)"
    with pytest.raises(NotEnough, match="'published_localization' has no rows with kind 'tm'"):
        published.shared_neurons(published_localization=found[found["kind"] == "vm"], published_statistics=normal)


TURNS = []
"""Claims of published numbers are not in the table of claims."""
