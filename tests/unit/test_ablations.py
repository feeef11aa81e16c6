"""Ablations of Table 4: settings, what is compared, and claims about the paper's own numbers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from nemolib import paper
from nemolib.experiments import ablations
from nemolib.experiments.ablations import FACTORS, GUIDANCE, NO_REFINEMENT, NO_TOP_K
from nemolib.experiments.deactivate_neurons import NONE, measured
from nemolib.localization import by_prompt
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.run import Run
from tests.unit.test_deactivate_neurons import as_ours, assert_all_hold, put, turn

VM, TM = ["a tree", "the sea"], ["old map", "red owl card"]
LADDER = {"my dog": 4, "my cat": 4, "my hat": 1, "my cup": 1}
OWN, LOW, MEAN, HIGH = "default (mean + 1 sd)", *(f"threshold mean{end}" for end in (" - 1 sd", "", " + 2 sd"))
CELLS = ["initial mean - 1 sd, refinement mean", "initial mean - 1 sd, refinement mean + 1 sd",
         "initial mean, refinement mean + 1 sd"]  # fmt: skip

LEVELS = pd.DataFrame(
    {"level": ["mean - 1 sd", "mean", "mean + 1 sd", "mean + 2 sd"], "multiplier": [-1.0, 0.0, 1.0, 2.0]}
).assign(threshold=[0.288, 0.358, 0.428, 0.498], default=[False, False, True, False])


PAPERS = as_ours(ablations.reported(LEVELS))

RULES_TURN = {
    "a higher threshold gives fewer neurons": (HIGH, 9), "every threshold removes copies of VM prompts": (HIGH, 0.8),
    "guidance in detection gives fewer neurons": (GUIDANCE, 4), "a quarter of it is not": ("factor 0.25", 0.5),
    "refinement leaves less than half of the neurons": (NO_REFINEMENT, 7), "negative factors do what 0 does": (OWN, 0.2),
    "refinement does not bring copies back": (OWN, 0.2), "without top-k there are more neurons": (NO_TOP_K, 4),
    "without top-k images change less": (NO_TOP_K, 0.1), "half of the activation is enough for a copy": ("factor 0.5", 0.1),
}  # fmt: skip
"""For each rule a setting, and the value of VM prompts that turns it in the paper's table."""

TURNS = [
    turn(name, "table_4", put(value, rule.column, setting=setting), rule.text, PAPERS)
    for name, rules in (("table_4", ablations.rules(LEVELS)), ("figure_5b", ablations.factor_rules(LEVELS)))
    for rule in rules
    for setting, value in [RULES_TURN[rule.text]]
]


@pytest.fixture(scope="module")
def run(random_run):
    """Return a run of a world in which the memorized prompts score above mean + 1 sd of the holdout prompts."""
    return random_run(
        dict.fromkeys(VM, "vm") | dict.fromkeys(TM, "tm") | dict.fromkeys(LADDER, "ladder"),
        holdout=[f"{first} {second}" for first in "cdef" for second in "uvyz"],
        copies=LADDER,
        search={"theta_start": 12.0, "theta_step": 1.0, "theta_min": 11.0, "k_start": 1, "k_step": 1},
        generation={"samples": 2, "steps": 2, "guidance": 3.0, "batch_size": 16},
        detection={"samples": 3},
        threshold_prompts=6,
        protocol="paper",
    )


@pytest.fixture(scope="module")
def levels(run):
    return ablations.threshold_levels(run)


@pytest.fixture(scope="module")
def found(run, levels):
    return ablations.ablated(run, run.prompts("vm", "tm", most=run.profile.extent.ablated), levels)


@pytest.fixture(scope="module")
def values(run, found, levels):
    return measured(run, found[found["setting"] == OWN], ablations.ablation_settings(found, levels))


def test_a_threshold_that_the_profile_gives_is_named_by_its_value(run):
    given = Run(replace(run.profile, thresholds=replace(run.profile.thresholds, value=0.9)), run.pipe, progress=False)
    own = ablations.threshold_levels(given).query("default").iloc[0]
    assert own.to_dict() == {"level": "tau = 0.9", "multiplier": 1.0, "threshold": 0.9, "default": True}


def test_every_search_has_every_prompt_with_one_gate_and_is_kept(run, found, levels):
    order = [OWN, LOW, *CELLS[:2], MEAN, CELLS[2], HIGH, NO_TOP_K, GUIDANCE]
    assert found.groupby("setting", sort=False)["prompt"].agg(list).to_dict() == dict.fromkeys(order, [*VM, *TM])
    gates = found.groupby("setting")["gate"].unique()
    assert all(gates[name].tolist() == [run.threshold] for name in order[:-1])
    assert gates[GUIDANCE][0] == run.threshold_at(guidance=3.0) != run.threshold
    default = run.search([*VM, *TM])
    assert found.iloc[:4]["neurons"].tolist() == [item.neurons.to_json() for item in default]
    results = sorted(run.store.folder.rglob("*.json"))
    pd.testing.assert_frame_equal(
        ablations.ablated(run, run.prompts("vm", "tm", most=run.profile.extent.ablated), levels), found
    )
    assert sorted(run.store.folder.rglob("*.json")) == results


def test_settings_are_those_of_the_paper_then_the_cells(found, levels):
    settings, default = ablations.ablation_settings(found, levels), found[found["setting"] == OWN]
    scaled = [f"factor {factor:g}" for factor in FACTORS]
    assert list(settings) == [NONE, OWN, GUIDANCE, LOW, MEAN, HIGH, NO_REFINEMENT, NO_TOP_K, *scaled, *CELLS]
    assert settings[NO_REFINEMENT] == [DeactivatedNeurons(by_prompt(default, "initial"))]
    assert settings["factor -1"] == [DeactivatedNeurons(by_prompt(default), -1.0)]


def test_the_tables_have_the_papers_rows_beside(found, values, levels):
    table, theirs = ablations.ablation_medians(values, levels), paper.table("table_4").set_index(["setting", "kind"])
    ours = table.set_index(["setting", "kind"])
    for name, reported in ((OWN, "default (0.428)"), (LOW, "threshold 0.288"), ("factor -1", "factor -1")):
        assert ours.loc[(name, "tm"), "neurons_paper"] == theirs.loc[(reported, "tm"), "neurons"]
    assert not set(CELLS) & set(table["setting"])
    scaled = ablations.scaling_table(table, levels).query("kind == 'vm'")
    assert scaled["factor"].tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]
    assert scaled["sscd_orig"].iloc[[4, 8]].tolist() == ours.loc[[(OWN, "vm"), (NONE, "vm")], "sscd_orig"].tolist()
    cells, maps = ablations.threshold_map(found, values, levels), paper.table("threshold_maps")
    assert cells["sscd_gen_paper"].tolist() == maps["sscd_gen"].tolist()
    seen = values[(values["kind"] == "vm") & (values["setting"] == CELLS[2])]
    assert cells.loc[4, "sscd_orig"] == seen["sscd_orig"].median()


def test_right_searches_and_what_is_not_right(run, found, levels):
    assert all(claim.holds and claim.must for claim in ablations.fair(run, found, levels))
    rows = (found["setting"] == HIGH) & (found["prompt"] == VM[0])
    others = NeuronSet.of([(0, layer) for layer in range(8)], layers=7).to_json()
    for place, column, value in ((0, "neurons", others), (1, "refined_score", 1.5), (3, "initial_count", 10_000)):
        changed = found.assign(**{column: found[column].mask(rows, value)})
        holds = [claim.holds for claim in ablations.fair(run, changed, levels)]
        assert holds == [number != place for number in range(4)]


def test_every_claim_holds_in_the_papers_table_and_none_without_numbers():
    assert_all_hold([*ablations.read_table_4(PAPERS, LEVELS), *ablations.read_5b(PAPERS, LEVELS)])
    assert next(ablations.read_table_4(PAPERS, LEVELS)).paper == "VM 10.5, 3; TM 32, 7"
    missing = put(np.nan, "sscd_orig", setting="factor 0.25")(PAPERS)
    assert [claim.holds for claim in ablations.read_5b(missing, LEVELS)] == [True, None, True]


def test_thresholds_are_named_below_the_last_row_and_left_of_the_first_column():
    table = paper.table("threshold_maps").replace({name: {-1: "mean - 1 sd", 0: "mean", 1: "mean + 1 sd"} for name in ("initial", "refinement")})  # fmt: skip
    names = ["initial_neurons", "neurons", "sscd_gen", "sscd_orig"]
    figure = ablations.figure_15(table.join(table[names].add_suffix("_paper")).assign(prompts=5))
    figure.draw_without_rendering()
    labels = [[text.get_text() for text in axes.get_xticklabels() if text.get_visible()] for axes in figure.axes[:4]]
    below = ["mean\n− 1 sd", "mean", "mean\n+ 1 sd"]
    assert [axes.get_xlabel() for axes in figure.axes[:4]] == ["", "", "refinement threshold", "refinement threshold"]
    assert labels[2:] == [below, below]
    assert [axes.get_ylabel() for axes in figure.axes[:4]] == ["initial threshold", ""] * 2


def test_the_ladder_goes_up_and_may_be_missing(run):
    ladder = ablations.neuron_ladder(run, per_rung=1)
    assert ladder[["caption", "copies"]].to_numpy().tolist() == [["my hat", 1], ["my dog", 4]]
    assert (
        ladder.loc[ladder["neuron_count"] == 0, "copy_before"] == ladder.loc[ladder["neuron_count"] == 0, "copy_after"]
    ).all()
    limits = replace(run.profile.limits, ladder=0)
    none = ablations.neuron_ladder(Run(replace(run.profile, limits=limits), run.pipe, progress=False), per_rung=1)
    assert none.empty
    assert none.columns.tolist() == ladder.columns.tolist()
    numbers = pd.DataFrame({"copies": [1, 1, 8, 8], "neuron_count": [0, 2, 3, 5]}).assign(
        **{name: 1.0 for name in ladder if name not in ("copies", "neuron_count")}
    )
    medians, without = ablations.read_ladder(numbers)
    assert medians.ours.startswith("1 to 4 neurons (rank correlation 0.89), memorization score 1 to 1")
    assert without.ours == "1 of 4, up to 1 copies"
    assert "rank correlation –" in next(ablations.read_ladder(numbers.assign(neuron_count=1))).ours
