"""A published run: reading its table, and what its exhibits say."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from nemolib.exhibits import NotEnough
from nemolib.experiments import published_run as published
from nemolib.experiments.published_run import PublishedRunError, localizations
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
    none = localizations(SimpleNamespace(profile=load_profile("tiny")))
    assert none.empty
    assert list(none) == list(table)


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


def test_numbers_are_those_of_the_run(read):
    table = read(*ROWS)
    said = {claim.text: claim for claim in published.read_4a(table)}
    assert said["prompts of the run"].ours == "VM 2, TM 1; 1 not in the prompt table, left out"
    neurons = said["neurons per prompt"]
    assert (neurons.ours, neurons.holds) == ("VM 2.0 ± 1.0, TM 4.0 ± 0.0", False)
    assert "VM 0.5 times the paper's, TM 0.19 times the paper's" in neurons.rule
    assert {claim.ours for claim in published.read_7(table)} >= {"VM 3.5 ± 0.5, TM 6.0 ± 0.0"}
    assert published.OTHER in next(claim.rule for claim in published.read_4b(table) if claim.holds is not None)
    steps = published.published_figure_4a(table).axes[0].lines[::2]
    assert sorted(line.get_label().rpartition(" ")[2] for line in steps) == ["1", "2"]
    shown = published.published_shared_neurons(table)
    assert shown.drop(columns="words").to_numpy().tolist() == [[1, 25, 2, "100%"]]
    shared = next(published.read_shared(table))
    assert (shared.ours, shared.holds) == ("100%", False)


def test_every_figure_says_what_it_is(read):
    table = read(*ROWS)
    for draw in (published.published_figure_4a, published.published_figure_4b, published.published_figure_7):
        assert draw(table).get_suptitle() == published.MARK
        with pytest.raises(NotEnough, match="table 'published_run' has no rows with kind 'tm'"):
            draw(table[table["kind"] == "vm"])


def counts(**medians):
    """Return the change that gives all prompts of a kind the same numbers of neurons."""
    return lambda table: table.assign(**dict.fromkeys(("initial_count", "neuron_count"), table["kind"].map(medians)))


def in_layer(layer):
    return lambda table: table.assign(neurons=NeuronSet.of([(layer, 1)], layers=7).to_json())


def with_the_papers_neurons(table):
    """Give a sixth of the VM prompts neuron 25 of value layer 1, and all others none."""
    place = (table["kind"] == "vm").cumsum() % 6
    sets = [NeuronSet(((25,) if one == 0 else (), *[()] * 6)).to_json() for one in place]
    return table.assign(neurons=sets)


TURNS = [
    ("published_figure_4a", "published_run", counts(vm=4, tm=21), "VM prompts have fewer neurons than TM prompts"),
    ("published_figure_4b", "published_run", in_layer(0), in_layer(5), "neurons of VM prompts lie in the first layers"),
    ("published_figure_7", "published_run", counts(vm=26, tm=674), "neurons, initial selection"),
    (
        "published_shared_neurons",
        "published_run",
        with_the_papers_neurons,
        "VM prompts that have neuron 25 or 221 of value layer 1",
    ),
]
