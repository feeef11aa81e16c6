"""Notebook 04: settings of Table 1, what they do by hand, the table and its claims, unmemorized prompts."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from nemolib import metrics, paper
from nemolib.encoders import load_encoder
from nemolib.experiments import deactivate_neurons as deactivate
from nemolib.experiments.deactivate_neurons import BASELINES, INITIAL, METRICS, NEMO, NONE, ONE_TOKEN, RANDOM, REN, WEN
from nemolib.layers import value_activations
from nemolib.mitigation import DeactivatedNeurons, EmbeddingAdjustment, wen_target
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.run import Run

VM, TM, CLEAN = ["red fox card", "red owl card"], ["blue cat case"], ["a tree", "the sea"]

NEURONS = {VM[0]: [(0, 1), (6, 3)], VM[1]: [(0, 1)], TM[0]: [(0, 1), (2, 4), (2, 5)], CLEAN[0]: [], CLEAN[1]: [(1, 0)]}
"""Neuron (0, 1) belongs to all memorized prompts, and one of them has no other."""


def neurons_of(prompt, *, more=()):
    return NeuronSet.of([*NEURONS[prompt], *more], layers=7)


@pytest.fixture(scope="module")
def run(random_run):
    return random_run(
        dict.fromkeys(VM, "vm") | dict.fromkeys(TM, "tm"),
        unmemorized=CLEAN,
        sides={VM[0]: 48},
        threshold_prompts=3,
        generation={"samples": 2, "steps": 2, "batch_size": 16},
        mitigation={"wen": {"target": None, "steps": 2, "iterations": 2, "latents": 1}, "random": {"repeats": 2}},
    )


@pytest.fixture(scope="module")
def found():
    more = [(5, 0), (5, 1)]
    rows = [
        (kind, prompt, neurons_of(prompt).to_json(), neurons_of(prompt, more=more).to_json())
        for kind, prompts in (("vm", VM), ("tm", TM), ("unmemorized", CLEAN))
        for prompt in prompts
    ]
    return pd.DataFrame(rows, columns=["kind", "prompt", "neurons", "initial"])


@pytest.fixture(scope="module")
def settings(run, found):
    return deactivate.settings(run, found)


@pytest.fixture(scope="module")
def values(run, found, settings):
    return deactivate.measured(run, found, settings)


# Settings, and what they do


def test_settings_are_those_of_the_paper_and_ours(settings):
    assert list(settings) == [*dict.fromkeys(paper.table("table_1")["setting"]), INITIAL]
    assert {NONE, NEMO, RANDOM, *BASELINES} < set(settings)
    assert [len(repeats) for repeats in settings.values()] == [1, 1, 2, 1, 1, 1, 1, 1, 1]
    memorized = (*VM, *TM)
    assert settings[NEMO][0].neurons == {prompt: neurons_of(prompt) for prompt in memorized}
    first, second = settings[RANDOM]
    assert first.neurons != second.neurons
    for draw in (first, second):
        assert all(draw.neurons[prompt].counts == neurons_of(prompt).counts for prompt in memorized)


def test_the_target_of_wen_follows_from_the_threshold_prompts_where_it_is_not_given(run, settings):
    wen, captions = run.profile.mitigation.wen, run.prompts("threshold")["caption"].tolist()
    assert len(captions) == 3
    expected = wen_target(run.pipe, captions, settings=wen)
    assert settings[WEN][0].settings == replace(wen, target=expected)
    given = replace(wen, target=1.25)
    profile = replace(run.profile, mitigation=replace(run.profile.mitigation, wen=given))
    assert deactivate.adjustment(Run(profile, run.pipe)) == EmbeddingAdjustment(given)


def test_each_setting_repeat_and_prompt_has_a_row(values):
    assert values["prompt"].tolist() == [*VM, *TM] * 10
    counts = values.groupby(["setting", "repeat"], sort=False)["neurons"].apply(list)
    assert [counts[RANDOM, 0], counts[RANDOM, 1], counts[NEMO, 0], counts[INITIAL, 0]] == [[2, 1, 3]] * 3 + [[4, 3, 5]]
    assert all(counts[name, 0] == [0, 0, 0] for name in (NONE, WEN, REN, ONE_TOKEN))
    untouched = values["setting"] == NONE
    assert values.loc[untouched, "sscd_gen"].to_numpy() == pytest.approx(1, abs=1e-6)
    assert (values.loc[~untouched].groupby("setting")["sscd_gen"].min() < 1 - 1e-5).all()


def test_one_bar_counts_all_settings(run, found, settings, capsys):
    loud = Run(run.profile, run.pipe, store=run.store)
    deactivate.measured(loud, found, {name: settings[name] for name in (NONE, RANDOM)})
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert set(re.findall(r"(\w+): +\d+%", shown)) == {"settings"}


def test_change_and_alignment_of_a_prompt_by_hand(run, values):
    made = run.images(TM, DeactivatedNeurons(neurons_of(TM[0])))[0]
    after, before = (run.encoder("copy").describe(images).numpy() for images in (made, run.images(TM)[0]))
    clip = load_encoder(run.profile, "alignment")
    aligned = (clip.describe(made) @ clip.describe_texts(TM)[0]).numpy()
    row = values[(values["setting"] == NEMO) & (values["prompt"] == TM[0])].iloc[0]
    expected = [np.median((after * before).sum(axis=1)), np.median(aligned)]
    assert row[["sscd_gen", "a_clip"]].tolist() == pytest.approx(expected, abs=1e-5)


# Table 1 and its claims


def rows(setting, sscd_orig, *, kind="vm", **columns):
    values = pd.DataFrame({"sscd_orig": sscd_orig}).assign(setting=setting, repeat=0, kind=kind, neurons=0)
    values["prompt"] = [f"{kind} {number}" for number in range(len(values))]
    return values.assign(
        **{"sscd_orig_max": values["sscd_orig"], "sscd_gen": 1.0, "d_sscd": 0.5, "a_clip": 0.3} | columns
    )


def test_a_prompt_counts_with_its_mean_over_repeats_and_the_papers_numbers_stand_beside():
    first = rows(RANDOM, [0.6, 0.7, 0.9], neurons=[1, 4, 9], sscd_orig_max=[0.8, 0.6, 0.9])
    second = rows(RANDOM, [0.8, 0.9, 1.0], neurons=[1, 4, 9], sscd_orig_max=[0.5, 0.6, 0.9], repeat=1)
    others = [rows(NONE, [0.2, 0.4], kind="tm"), rows(NONE, [0.9, 0.8]), rows(INITIAL, [0.1, np.nan], d_sscd=np.nan)]
    table = deactivate.medians(pd.concat([*others, first, second], ignore_index=True))
    assert list(zip(table["setting"], table["kind"], strict=True)) == [
        (NONE, "vm"), (NONE, "tm"), (INITIAL, "vm"), (RANDOM, "vm")]  # fmt: skip
    row, initial = table.iloc[3], table.iloc[2]
    assert row[["sscd_orig", "sscd_orig_mad", "neurons", "memorized"]].tolist() == pytest.approx([0.8, 0.1, 4, 1 / 3])
    low, high = metrics.bootstrap_interval([0.7, 0.8, 0.95])
    assert row[["sscd_orig_low", "sscd_orig_high"]].tolist() == pytest.approx([low, high])
    assert row[["neurons_paper", "neurons_paper_mad", "sscd_orig_paper"]].tolist() == [4, 3, 0.8]
    assert (initial["sscd_orig"], initial["prompts"]) == (0.1, 2)
    assert initial.filter(like="_paper").isna().all()
    shown = deactivate.shown_table(table)
    assert shown["copies"].tolist() == ["100%", "0%", "0%", "33%"]
    assert shown["setting"].tolist()[:2] == [f"{NONE}: VM", f"{NONE}: TM"]
    assert shown["D_SSCD"].tolist() == [f"0.50 ± 0.00 [{paper}]" if paper else "" for paper in
                                        ("0.99 ± 0.01", "0.17 ± 0.06", "", "0.99 ± 0.01")]  # fmt: skip
    assert shown["neurons"].tolist()[2:] == ["0.0 ± 0.0", "4.0 ± 3.0 [4.0 ± 3.0]"]


def put(value, column, kind="vm", **where):
    """Return a change of a table: a value in a column of the rows of a kind with these values."""

    def change(table):
        rows = (table["kind"] == kind) & np.logical_and.reduce([table[name] == value for name, value in where.items()])
        return table.assign(**{column: table[column].mask(rows, value)})

    return change


def as_ours(reported):
    """Return a table of the paper's numbers as if they were ours."""
    numbers = reported[["neurons", *METRICS]]
    beside = [numbers.add_suffix(f"_{end}") for end in ("paper", "low", "high")]
    return pd.concat([reported.assign(prompts=9), *beside], axis=1)


PAPERS = as_ours(paper.table("table_1"))


def assert_all_hold(claims):
    """Assert that rules hold in the paper's table and name the numbers that they compare."""
    for claim in claims:
        assert claim.holds, claim.text
        assert re.findall(r"[-.\d]+(?=[,;)])", claim.ours.split(" (", 1)[1]) == re.findall(r"[-.\d]+", claim.paper)


def turn(exhibit, source, change, text, papers):
    """Return a turn (`tests.unit.test_exhibits.turns`) of a claim that holds in the paper's table."""
    return exhibit, source, lambda table: papers, lambda table: change(papers), text


def test_every_rule_holds_in_the_papers_table_and_names_its_numbers():
    said = list(deactivate.read_table_1(PAPERS))
    assert_all_hold(said)
    assert said[1].ours == "0.04 (VM untouched 0.83, random 0.8, NeMo 0.09)"
    assert (said[1].n, said[1].interval) == ("VM 9", "VM random, 0.8 to 0.8")
    assert said[1].rule == "what random neurons remove, as a share of what NeMo removes: at most 0.1"


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        (put(0.12, "sscd_orig", setting=NEMO), False),
        (lambda table: table[table["setting"] != REN], None),
        (put(np.nan, "sscd_orig", setting=NONE), None),
    ],
)
def test_nemo_is_measured_against_the_best_baseline_if_all_numbers_are_known(change, holds):
    (claim,) = [claim for claim in deactivate.read_table_1(change(PAPERS)) if "the best of" in claim.text]
    assert claim.holds is holds


def test_where_nothing_is_copied_or_removed_nothing_is_decided():
    more = put(0.9, "sscd_orig", setting=NEMO)(PAPERS)
    assert [claim.holds for claim in deactivate.read_table_1(more)][:2] == [False, None]
    none = put(-0.1, "sscd_orig", setting=NONE)(PAPERS)
    assert [claim.holds for claim in deactivate.read_table_1(none)][:4] == [None] * 4


def test_a_fair_comparison_passes_and_each_unfair_one_fails(values, settings):
    def failed(values=values, settings=settings):
        return [place for place, claim in enumerate(deactivate.fair(values, settings)) if not claim.holds]

    assert failed() == []
    assert failed(values.assign(neurons=values["neurons"].where(values["setting"] != RANDOM, 3))) == [0]
    assert failed(settings=settings | {RANDOM: [settings[RANDOM][0], settings[NEMO][0]]}) == [1]
    assert failed(values.assign(neurons=values["neurons"].where(values["setting"] != INITIAL, 0))) == [2]


# Single neurons, and prompts that stay


def test_a_shared_neuron_against_all_of_the_prompt(run, found, values):
    table = deactivate.single_neurons(run, found)
    assert table[["layer", "neuron", "prompt"]].to_numpy().tolist() == [[1, 1, prompt] for prompt in (*VM, *TM)]
    own = table.set_index("prompt")
    assert own["copy_before"].tolist() == values.loc[values["setting"] == NONE, "sscd_orig"].tolist()
    assert own.loc[VM[1], "copy_single"] == pytest.approx(own.loc[VM[1], "copy_all"], abs=1e-6)
    assert own.loc[TM[0], "copy_single"] != own.loc[TM[0], "copy_all"]
    (claim,) = deactivate.read_10(table)
    assert claim.n == "1 neurons, 3 prompts"
    # Prompts that share several neurons count no more than others.
    often = pd.concat([table, *[table.head(1).assign(neuron=neuron) for neuron in range(2, 6)]])
    assert next(deactivate.read_10(often)).interval == claim.interval
    grids = deactivate.single_neuron_grids(run, found)
    single = run.images([*VM, *TM], DeactivatedNeurons(NeuronSet.of([(0, 1)], layers=7)))
    assert np.array_equal(grids["figure_10"].images[:, 3:], single)
    assert grids["figure_11"] is grids["figure_12"] is deactivate.NO_IMAGES


def test_without_a_shared_neuron_or_a_prompt_that_stays_there_is_nothing(run, found):
    alone = found[found["prompt"] == VM[0]]
    assert deactivate.single_neurons(run, alone).empty
    assert set(deactivate.single_neuron_grids(run, alone).values()) == {deactivate.NO_IMAGES}
    assert deactivate.staying(run, found, []) is deactivate.NO_IMAGES


def test_planted_images_stand_first_in_the_size_of_the_others(run, settings):
    each = deactivate.one_of_each(run, VM, {name: settings[name] for name in (NONE, RANDOM)})
    assert each.columns == ("planted", NONE, RANDOM)
    assert np.array_equal(each.images[:, 0], run.planted_images(run.rows(VM), size=(64, 64)))
    assert np.array_equal(each.images[:, 2], run.images(VM, settings[RANDOM][0])[:, 0])


# Unmemorized prompts


def test_unmemorized_prompts_lose_one_set_in_turn_and_all(run, found):
    first = NeuronSet.of([], layers=7).to_json()
    found = pd.concat([found.head(1).assign(neurons=first), found], ignore_index=True)
    table = deactivate.unmemorized_images(run, CLEAN, found)
    assert table["neurons_one"].tolist() == [2, 1]
    assert (table["neurons_all"] == 4).all()
    assert table["sscd_gen_before"].to_numpy() == pytest.approx(1, abs=1e-6)
    chosen = DeactivatedNeurons({CLEAN[0]: neurons_of(VM[0]), CLEAN[1]: neurons_of(VM[1])})
    expected = run.measure(pd.DataFrame({"caption": CLEAN}), chosen, columns=["a_clip", "d_sscd", "sscd_gen"])
    assert table[["a_clip_one", "d_sscd_one", "sscd_gen_one"]].to_numpy().tolist() == expected.to_numpy().tolist()
    with pytest.raises(ValueError, match="no memorized prompt has neurons"):
        deactivate.unmemorized_images(run, CLEAN, found[found["kind"] == "unmemorized"])


def test_the_text_that_a_set_carries(run):
    table = deactivate.text_carried(run, CLEAN, NeuronSet.of([(0, 1), (0, 2), (3, 0)], layers=7))
    assert table["neurons"].tolist() == [2, 0, 0, 1, 0, 0, 0]
    first = value_activations(run.pipe.unet, embed(run.pipe, CLEAN))[0].sum(dim=0).numpy()
    assert table["share"].iloc[:2].tolist() == pytest.approx([(first[1] + first[2]) / first.sum(), 0], rel=1e-5)
    largest, busiest = sorted(first, reverse=True), int(table["busiest"].iloc[0])
    assert sum(largest[: busiest - 1]) < 0.95 * first.sum() <= sum(largest[:busiest])


TURNS = [
    *(
        turn("table_1", "table_1", put(value, column, setting=setting), rule.text, PAPERS)
        for rule, (value, column, setting) in zip(deactivate.RULES, [
            (0.8, "sscd_orig", NEMO), (0.4, "sscd_orig", RANDOM), (0.3, "sscd_orig", NEMO), (0.1, "sscd_orig", ONE_TOKEN),
            (0.9, "d_sscd", NEMO), (0.1, "a_clip", NEMO),
        ], strict=True)
    ),
    ("figure_10", "single_neurons", lambda table: table.assign(copy_before=0.9, copy_single=0.1),
     lambda table: table.assign(copy_before=0.9, copy_single=0.8), "one neuron that prompts share is responsible for all of them"),
    ("unmemorized_unharmed", "unmemorized_images", lambda table: table.assign(a_clip_before=0.3, a_clip_one=0.3),
     lambda table: table.assign(a_clip_before=0.3, a_clip_one=0.1), "A_CLIP of unmemorized prompts"),
]  # fmt: skip
