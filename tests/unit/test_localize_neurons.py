"""Notebook 03: localizations and their tables, what deactivation does, claims that must hold."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from nemolib import localization
from nemolib.exhibits import NotEnough
from nemolib.experiments import localize_neurons as search
from nemolib.first_step import first_step
from nemolib.holdout import z_scores
from nemolib.layers import value_activations
from nemolib.localization import localize
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.similarity import memorization_score
from nemolib.store import PLANTED, WITH_AND_WITHOUT

VM, TM, CLEAN = ["red fox card", "red owl card"], ["blue cat case"], ["a tree", "the sea", "my dog"]


@pytest.fixture(scope="module")
def run(random_run):
    return random_run(
        dict.fromkeys(VM, "vm") | dict.fromkeys(TM, "tm"),
        unmemorized=CLEAN,
        holdout=[f"{a} {b}" for a in "abcdef" for b in "uvwxyz"],
        extent={"searched": 2},
        thresholds={"value": -0.5},
        search={"theta_start": 3.0, "theta_step": 1.0, "k_step": 2},
        detection={"samples": 3},
    )


@pytest.fixture(scope="module")
def found(run):
    return search.localizations(run)


@pytest.fixture(scope="module")
def change(run, found):
    return search.deactivation(run, found)


def localize_one(run, prompt, **settings):
    given = {name: getattr(run.profile, name) for name in ("detection", "similarity", "search", "protocol")}
    return localize(run.pipe, prompt, run.statistics, threshold=-0.5, **(given | settings))


# One prompt


def test_the_course_of_a_search(run):
    sequential = replace(run.profile.search, method="sequential")
    single = localize_one(run, VM[0], search=sequential, protocol=replace(run.profile.protocol, double_entries=False))
    steps, tests = search.search_steps(single.steps, -0.5), search.search_tests(single.initial, single.tests)
    assert steps["neurons"].tolist() == [len(step.neurons) for step in single.steps]
    assert steps["score"].iloc[-1] == single.initial_score
    assert tests["left"].iloc[-1] == len(single.neurons)
    assert tests["test"].tolist() == list(range(1, len(single.tests) + 1))
    assert (tests["left"].diff().dropna() <= 0).all()
    assert len(single.neurons) < len(single.initial)
    z = [torch.full((width,), 0.5) for width in run.statistics.widths]
    table = search.prompt_neurons(z, single.initial, single.neurons)
    assert len(table) == sum(run.statistics.widths)
    for column, chosen in (("initial", single.initial), ("refined", single.neurons)):
        pairs = table.loc[table[column], ["layer", "neuron"]].itertuples(index=False, name=None)
        assert NeuronSet.of([(layer - 1, neuron) for layer, neuron in pairs], layers=7) == chosen


# All prompts


def test_localizations_are_those_of_localize(run, found):
    assert found["kind"].tolist() == ["vm", "vm", "tm", "unmemorized", "unmemorized"]
    assert localization.by_prompt(found)[VM[1]] == localize_one(run, VM[1]).neurons
    z = search.neuron_z_scores(run, found)
    assert len(z) == found["neuron_count"].sum()
    values = z_scores(run.statistics, value_activations(run.pipe.unet, embed(run.pipe, [z["prompt"][0]])))
    assert z["z"][0] == pytest.approx(float(values[z["layer"][0] - 1][0, z["neuron"][0]]))
    assert all(claim.holds for claim in search.search_claims(run, found))


def rows(*prompts):
    """Return localizations: (kind, caption, neurons of the first of two layers, initial number)."""
    table = pd.DataFrame(prompts, columns=["kind", "prompt", "layers", "initial_count"])
    table["neurons"] = [NeuronSet((neurons, ())).to_json() for neurons in table["layers"]]
    table["neuron_count"], table["initial"] = table["layers"].map(len), NeuronSet((tuple(range(100)), ())).to_json()
    table["reached"], table["memorized"] = table["neuron_count"] > 0, table["neuron_count"] > 0
    table = table.assign(**{f"evaluations_A{i}": 10 * i for i in range(1, 5)}, initial_score=0.3, refined_score=0.35)
    return table.assign(**{f"seconds_A{i}": 0.5 * i for i in range(1, 5)}).drop(columns="layers")


@pytest.fixture
def table():
    clean = [("unmemorized", "a tree", (), 0), ("unmemorized", "the sea", (9,), 7), ("unmemorized", "the sky", (), 0)]
    vm = [("vm", "red fox card", (1, 2), 10), ("vm", "red owl card", (2,), 20)]
    tm = [("tm", "blue cat case", (2, 3, 4, 5, 6, 7), 60), ("tm", "blue dog case", tuple(range(50)), 80)]
    return rows(*vm, *tm, *clean)


def test_counts(table):
    counts = search.counts_table(table).set_index("kind")
    assert counts.loc["vm", ["prompts", "reached", "without_neurons"]].tolist() == [2, 2, 0]
    assert counts.loc["vm", ["initial", "neurons"]].tolist() == ["15.0 ± 5.0", "1.5 ± 0.5"]
    assert counts.loc["unmemorized", ["without_neurons", "neurons"]].tolist() == [2, "1.0 ± 0.0"]
    none = search.counts_table(table[table["neuron_count"] == 0]).set_index("kind")
    assert none.loc["unmemorized", "neurons"] == ""
    assert search.layer_means(table).to_numpy().tolist() == [[1.5, 0], [28, 0]]
    with pytest.raises(NotEnough, match="has no rows with kind 'tm'"):
        search.figure_4b(table.assign(neuron_count=table["neuron_count"].where(table["kind"] == "vm", 0)))


def test_one_prompt_of_each_kind_is_enough(table):
    (claim,) = search.read_4b(table.drop_duplicates("kind"))
    assert claim.interval == "VM 1.00 to 1.00"
    costs = list(search.read_table_2(search.cost_table(table.drop_duplicates("kind")), table.drop_duplicates("kind")))
    assert costs[0].interval == "of the UNet evaluations VM 0.40 to 0.40, TM 0.40 to 0.40"


def test_shares_of_prompts_with_at_most_so_many_neurons(table):
    figure = search.figure_7(table)
    steps = figure.axes[1].lines[::2]
    assert [sorted(set(line.get_xdata()) - {-np.inf}) for line in steps] == [[1, 2], [6, 50]]
    assert [line.get_label() for line in steps] == ["verbatim (VM), n = 2", "template (TM), n = 2"]
    assert [line.get_xdata()[0] for line in figure.axes[1].lines[1::2]] == [1.5, 28]


def test_tables_have_the_papers_numbers_in_the_same_cell(table):
    shown = search.neuron_counts(search.counts_table(table)).set_index("kind")
    assert shown.loc["VM", "after refinement (paper)"] == "1.5 ± 0.5 (4 ± 3)"
    assert shown.loc["unmemorized", "initial selection (paper)"] == "7.0 ± 0.0 (not reported)"
    cost = search.table_2(search.cost_table(table))
    assert cost["TM: seconds (paper)"].iloc[-1] == "5.00 (45.90)"
    assert cost["VM: UNet evaluations"].tolist() == ["10", "20", "30", "40", "100"]


def test_cost(table):
    table.loc[0, "evaluations_A4"] = 80
    cost = search.cost_table(table).set_index(["kind", "algorithm"])
    assert cost.loc[("vm", ["A4", "total"]), "evaluations"].tolist() == [60, 120]
    assert cost.loc[("tm", "total"), ["seconds", "seconds_paper"]].tolist() == [5.0, 45.9]


def test_shared_neurons(table):
    first = localization.shared_neurons(table).iloc[0]
    assert first[["layer", "neuron", "prompts"]].tolist() == [1, 2, 4]
    assert first["captions"] == "red fox card; red owl card; blue cat case; blue dog case"
    overlap = search.neuron_overlap(table).set_index(["first", "second"])
    assert len(overlap) == 6
    assert overlap.loc[("red fox card", "red owl card")].tolist() == [2, 1, 0.5]
    assert overlap.loc[("red fox card", "blue cat case")].tolist() == [0, 1, 1 / 7]
    assert search.neuron_overlap(table.head(0)).nlargest(1, "shared").empty


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        ({"initial": NeuronSet(((1,), ())).to_json()}, "every refined set lies within its initial selection"),
        ({"refined_score": 0.45}, "refinement never ends above the threshold it was given"),
        ({"memorized": False}, "prompts that fail the gate have no neurons"),
    ],
)
def test_what_must_hold_of_any_search(table, broken, failed):
    class Half:
        threshold, pipe = 0.4, type("Pipe", (), {"unet": torch.nn.Linear(1, 1)})

    Half.pipe.unet.dtype = torch.float32
    claims = list(search.search_claims(Half, table.assign(**broken)))
    assert [claim.text for claim in claims if claim.holds is False] == [failed]
    # A type of few digits may miss the threshold by its rounding.
    Half.pipe.unet.dtype = torch.bfloat16
    assert all(claim.holds for claim in search.search_claims(Half, table.assign(refined_score=0.41)))


# Without its neurons


def test_scores_and_images_without_the_neurons_by_hand(run, found, change):
    assert change["prompt"].tolist() == [*VM, *TM]
    assert change["score_before"].tolist() == found["unblocked_score"].tolist()[:3]
    own = localization.by_prompt(found)
    step = first_step(run.pipe, settings=run.profile.detection, protocol=run.profile.protocol)
    settings = {"settings": run.profile.similarity, "protocol": run.profile.protocol}
    expected = memorization_score(step(embed(run.pipe, VM[:1]), neurons=own[VM[0]]), **settings)
    assert change.loc[0, "score_after"] == pytest.approx(expected, abs=1e-6)
    grid = run.with_and_without(VM[:1], DeactivatedNeurons(own))
    assert grid.columns == (PLANTED, *[WITH_AND_WITHOUT[0]] * 2, *[WITH_AND_WITHOUT[1]] * 2)
    assert np.array_equal(grid.images[0, 1:3], run.images(VM[:1])[0])
    assert np.array_equal(grid.images[0, 3:], run.images(VM[:1], DeactivatedNeurons(own))[0])
    for when, mitigation in (("before", None), ("after", DeactivatedNeurons(own))):
        measured = run.measure(run.rows(change["prompt"]), mitigation, columns=("sscd_orig", "sscd_gen", "d_sscd"))
        assert change[f"copy_{when}"].tolist() == measured["sscd_orig"].tolist()
        assert change[f"seeds_{when}"].tolist() == measured["d_sscd"].tolist()
    assert change["same_seed"].tolist() == measured["sscd_gen"].tolist()
    nothing = run.with_and_without(VM[:1], DeactivatedNeurons(NeuronSet.empty(7)))
    assert np.array_equal(*np.split(nothing.images[0, 1:], 2))


@pytest.fixture
def changed(table):
    values = {"score_before": [0.9, 0.8, 0.7, 0.6], "score_after": [0.2, 0.5, 0.3, 0.65], "copy_before": [0.9, 0.9, 0.5, 0.5],
              "copy_after": [0.1, 0.2, 0.4, 0.6], "seeds_before": 0.9, "seeds_after": 0.2, "same_seed": 0.3}  # fmt: skip
    return table.head(4)[["kind", "prompt", "neuron_count", "reached"]].assign(**values)


def test_prompts_that_stay_memorized_and_examples(changed):
    assert search.stay_memorized(changed)["prompt"].tolist() == ["blue dog case", "blue cat case"]
    assert search.stay_memorized(changed, share=0.9)["prompt"].tolist() == ["blue dog case"]
    assert search.example_prompts(changed, "vm", 3) == ["red owl card", "red fox card"]
    many = pd.concat([changed.iloc[:1]] * 9, ignore_index=True)
    many = many.assign(prompt=[f"p{i}" for i in range(9)], copy_after=np.linspace(0.9, 0.1, 9))
    assert search.example_prompts(many, "vm", 3) == ["p2", "p4", "p6"]
    assert search.example_prompts(changed, "ladder", 2) == []


@pytest.mark.parametrize(
    ("copies", "typical"),
    [([0.1, 0.5, 0.2, 0.4, 0.3], ["p2", "p4", "p3"]), ([0.1, 0.4, 0.2], ["p0", "p2"]), ([np.nan] * 2, ["p0"])],
)
def test_the_prompts_that_stand_for_all(copies, typical):
    table = pd.DataFrame({"kind": "vm", "prompt": [f"p{i}" for i in range(len(copies))], "copy_after": copies})
    other = pd.DataFrame({"kind": "tm", "prompt": ["t"], "copy_after": [0.2]})
    assert search.typical_prompts(pd.concat([other, table])) == typical


def counts(vm, tm):
    return lambda table: table.assign(neuron_count=np.where(table["kind"] == "vm", vm, tm))


def in_layer(layer):
    return lambda table: table.assign(neurons=NeuronSet.of([(layer, 1)], layers=7).to_json())


def overlaps(family):
    return lambda table: table.assign(overlap=np.where(table["common_words"] >= 2, family, 0.1))


TURNS = [
    ("neuron_counts", "neuron_counts", lambda table: table.assign(without_neurons=table["prompts"]),
     lambda table: table.assign(without_neurons=1), "most unmemorized prompts have no neurons"),
    ("figure_4a", "localization", counts(2, 9), counts(9, 9), "VM prompts have fewer neurons than TM prompts"),
    ("figure_4a", "localization", counts(5, 9), counts(6, 9), "a few neurons are enough for a VM prompt"),
    ("figure_4b", "localization", in_layer(1), in_layer(2), "neurons of VM prompts lie in the first layers"),
    ("table_2", "search_cost", lambda table: table.assign(seconds=1.0),
     lambda table: table.assign(seconds=1.0 + 9.0 * (table["algorithm"] == "total")), "refinement takes most of the time"),
    ("shared_neurons", "neuron_overlap", overlaps(0.2), overlaps(0.1), "similar captions share neurons"),
    ("scores_before_after", "deactivation", lambda table: table.assign(score_after=-1.0),
     lambda table: table.assign(score_after=1.0), "memorization score (medians)"),
]  # fmt: skip
