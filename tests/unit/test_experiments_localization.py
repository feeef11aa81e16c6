import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from nemolib import experiments, paths
from nemolib import experiments_localization as search
from nemolib.checks import ClaimError, check_table
from nemolib.encoders import CopyDescriptor
from nemolib.first_step import first_step
from nemolib.localization import localize
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed, load_pipeline
from nemolib.profiles import Encoders, profile_from_mapping
from nemolib.similarity import memorization_score, similarity
from nemolib.store import StoreError
from tests.random_world import amplify, write_prompts

CAPTIONS = {
    "vm": ["red fox card", "red owl card"],
    "tm": ["blue cat case"],
    "unmemorized": ["a tree", "the sea", "my dog"],
    "holdout": [f"{first} {second}" for first in "abcdef" for second in "uvwxyz"],
}


def write_world(folder):
    """Write prompt tables and planted images, and return the keys of a profile that point to them."""
    kinds = {caption: kind for kind in ("vm", "tm") for caption in CAPTIONS[kind]}
    prompts = write_prompts(folder, kinds, unmemorized=CAPTIONS["unmemorized"], holdout=CAPTIONS["holdout"])
    torch.manual_seed(0)
    CopyDescriptor((4, 4, 4), 8).save(folder / "descriptor")
    return {"prompts": prompts}


@pytest.fixture(scope="module")
def profile(tmp_path_factory, random_model_folder):
    folder = tmp_path_factory.mktemp("world")
    values = {
        "name": "random",
        "model": str(random_model_folder),
        "device": "cpu",
        "holdout_size": 36,
        "threshold_prompts": 2,
        "detection": {"samples": 3},
        "similarity": {"kernel_size": 3, "sigma": 0.5},
        "thresholds": {"value": -0.5},
        "search": {"theta_start": 3.0, "theta_step": 1.0, "k_step": 2},
        "generation": {"samples": 2, "steps": 2, "batch_size": 4},
        "encoders": {"copy": {"kind": "descriptor", "path": str(folder / "descriptor")}},
    }
    return profile_from_mapping(values | write_world(folder))


@pytest.fixture(scope="module")
def pipe(profile):
    return amplify(load_pipeline(profile))


@pytest.fixture(scope="module")
def found(pipe, profile, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", tmp_path_factory.mktemp("build"))
        yield search.localizations(pipe, profile, unmemorized=2, progress=False)


@pytest.fixture(scope="module")
def change(pipe, profile, found):
    return search.deactivation(pipe, profile, found, progress=False)


def test_searched_prompts(profile):
    table = search.searched_prompts(profile, unmemorized=1)
    assert table["caption"].tolist() == [*CAPTIONS["vm"], *CAPTIONS["tm"], "a tree"]
    assert len(search.searched_prompts(profile)) == 6
    with pytest.raises(ValueError, match="unmemorized is -1"):
        search.searched_prompts(profile, unmemorized=-1)


def test_localizations_are_those_of_localize(pipe, profile, found):
    assert found["kind"].tolist() == ["vm", "vm", "tm", "unmemorized", "unmemorized"]
    single = localize(pipe, "red owl card", experiments.statistics(pipe, profile, progress=False), threshold=-0.5)
    assert NeuronSet.from_json(found.loc[1, "neurons"]) == single.neurons
    assert found["memorized"].all()
    assert not [name for name in search.without_seconds(found) if name.startswith("seconds")]


def test_finished_prompts_come_from_the_store(pipe, profile, found, monkeypatch):
    from nemolib import localization

    monkeypatch.setattr(localization, "localize", None)
    again = search.localizations(pipe, profile, unmemorized=2, progress=False)
    pd.testing.assert_frame_equal(again, found)


def test_deactivation_compares_images_and_scores(pipe, profile, found, change):
    assert change["prompt"].tolist() == found["prompt"].tolist()[:3]
    assert change["score_before"].tolist() == found["unblocked_score"].tolist()[:3]
    step, neurons = first_step(pipe), NeuronSet.from_json(found.loc[0, "neurons"])
    maps = step(embed(pipe, ["red fox card"]), neurons=neurons)
    expected = memorization_score(maps, settings=profile.similarity, protocol=profile.protocol)
    assert change.loc[0, "score_after"] == pytest.approx(expected, abs=1e-6)
    for name in ("copy_before", "copy_after", "same_seed", "seeds_before", "seeds_after"):
        assert change[name].between(-1.0001, 1.0001).all(), name


def test_copy_similarity_by_hand(pipe, profile, found, change):
    from nemolib.prompts import select

    before, after = search.with_and_without(pipe, profile, found.iloc[:1], progress=False)
    describe = CopyDescriptor.load(profile.encoders.copy.path).describe
    planted = describe(experiments.planted_images(profile, select(profile, "vm").head(1)))[0]
    copies = [float(feature @ planted) for feature in describe(after[0])]
    assert change.loc[0, "copy_after"] == pytest.approx(np.mean(copies), abs=1e-5)
    pairs = [float(one @ other) for one, other in zip(describe(before[0]), describe(after[0]), strict=True)]
    assert change.loc[0, "same_seed"] == pytest.approx(np.mean(pairs), abs=1e-5)
    one, other = describe(after[0])
    assert change.loc[0, "seeds_after"] == pytest.approx(float(one @ other), abs=1e-5)


def test_a_prompt_without_neurons_keeps_its_images(pipe, profile, found):
    row = found.iloc[:1].assign(neurons=NeuronSet.empty(7).to_json())
    before, after = search.with_and_without(pipe, profile, row, progress=False)
    assert np.array_equal(before, after)


def test_a_profile_without_descriptor(pipe, profile, found):
    with pytest.raises(ValueError, match="profile 'random' has encoders.copy = None"):
        search.deactivation(pipe, dataclasses.replace(profile, encoders=Encoders()), found, progress=False)


def test_the_course_of_a_search(pipe, profile, found):
    single = localize(pipe, "red fox card", experiments.statistics(pipe, profile, progress=False), threshold=-0.5,
                      protocol=dataclasses.replace(nemolib_protocol(profile), double_entries=False))  # fmt: skip
    steps = search.search_steps(single.steps, threshold=-0.5)
    assert steps["neurons"].tolist() == [len(step.neurons) for step in single.steps]
    assert (steps["threshold"] == -0.5).all()
    assert steps["score"].iloc[-1] == single.initial_score
    tests = search.search_tests(single.initial.layers, single.tests)
    assert tests["left"].iloc[-1] == len(single.neurons)
    assert tests["test"].tolist() == list(range(1, len(single.tests) + 1))
    assert (tests["left"].diff().dropna() <= 0).all()
    assert tests["layer"].between(1, 7).all()


def nemolib_protocol(profile):
    from nemolib.protocols import load_protocol

    return load_protocol(profile.protocol)


def test_double_entries_count_once():
    from nemolib.refinement import RefinementTest

    tests = [RefinementTest(0, 5, 0.1, True), RefinementTest(0, 5, 0.9, False), RefinementTest(0, 6, 0.1, True)]
    assert search.search_tests([[5, 6, 5]], tests)["left"].tolist() == [2, 2, 1]


def test_a_group_takes_all_its_neurons():
    from nemolib.refinement import RefinementTest

    tests = [
        RefinementTest(1, None, 0.9, False, group=((1, 7), (0, 5))),
        RefinementTest(1, None, 0.1, True, group=((1, 7), (0, 6))),
    ]
    table = search.search_tests([[5, 6, 6], [7]], tests)
    assert table["left"].tolist() == [3, 1]
    assert table["neuron"].isna().all()


def test_z_scores_of_found_neurons(pipe, profile, found):
    from nemolib.holdout import z_scores
    from nemolib.value_layers import value_activations

    statistics = experiments.statistics(pipe, profile, progress=False)
    table = search.neuron_z_scores(pipe, statistics, found)
    assert len(table) == found["neuron_count"].sum()
    row = table.iloc[0]
    z = z_scores(statistics, value_activations(pipe.unet, embed(pipe, [row["prompt"]])))
    assert row["z"] == pytest.approx(float(z[row["layer"]][0, row["neuron"]]))


def test_blocked_score_is_that_of_the_search(pipe, profile, found):
    score = search.blocked_score(pipe, profile, "red fox card", threshold=-0.5)
    neurons = NeuronSet.from_json(found.loc[0, "neurons"])
    assert score(neurons) == pytest.approx(found.loc[0, "refined_score"], abs=1e-5)
    step, embedding = first_step(pipe), embed(pipe, ["red fox card"])
    values = similarity(step(embedding), step(embedding, neurons=neurons), settings=profile.similarity)
    assert score(neurons) == pytest.approx(float(values.max()), abs=1e-5)
    with pytest.raises(ValueError, match="no seed is above the threshold 1.000"):
        search.blocked_score(pipe, profile, "red fox card", threshold=1.0)


def rows(*prompts):
    """Return localizations: (kind, caption, neurons of the first of two layers, initial number)."""
    return pd.DataFrame(
        [
            {
                "kind": kind,
                "prompt": caption,
                "memorized": bool(neurons) or kind != "unmemorized",
                "reached": bool(neurons),
                "initial_score": 0.3,
                "refined_score": 0.35,
                "initial_count": initial,
                "neuron_count": len(neurons),
                "initial": NeuronSet((tuple(range(100)), ())).to_json(),
                "neurons": NeuronSet((neurons, ())).to_json(),
                **{f"evaluations_A{i}": 10 * i for i in range(1, 5)},
                **{f"seconds_A{i}": 0.5 * i for i in range(1, 5)},
            }
            for kind, caption, neurons, initial in prompts
        ]
    )


@pytest.fixture
def table():
    return rows(
        ("vm", "red fox card", (1, 2), 10),
        ("vm", "red owl card", (2,), 20),
        ("tm", "blue cat case", (2, 3, 4, 5, 6, 7), 60),
        ("tm", "blue dog case", tuple(range(50)), 80),
        ("unmemorized", "a tree", (), 0),
        ("unmemorized", "the sea", (9,), 7),
        ("unmemorized", "the sky", (), 0),
    )


def test_counts(table):
    counts = search.counts_table(table).set_index("kind")
    assert counts.loc["vm", ["prompts", "searched", "reached", "without_neurons"]].tolist() == [2, 2, 2, 0]
    assert counts.loc["vm", ["initial", "neurons"]].tolist() == ["15.0 ± 5.0", "1.5 ± 0.5"]
    assert counts.loc["unmemorized", "neurons"] == "1.0 ± 0.0"
    assert counts.loc["unmemorized", "without_neurons"] == 2
    assert counts["single"].tolist() == [0.5, 0, pytest.approx(1 / 3)]
    assert counts["at_most_5"].tolist() == [1, 0, pytest.approx(1 / 3)]
    assert counts["at_least_50"].tolist() == [0, 0.5, 0]


def test_counts_of_unmemorized_prompts_without_any_neuron(table):
    counts = search.counts_table(table[table["neuron_count"] == 0]).set_index("kind")
    assert counts.loc["unmemorized", ["without_neurons", "neurons"]].tolist() == [2, ""]


def test_cost(table):
    table.loc[0, "evaluations_A4"] = 80
    cost = search.cost_table(table).set_index(["kind", "algorithm"])
    assert cost.loc[("vm", "A4"), "evaluations"] == 60
    assert cost.loc[("vm", "total"), "evaluations"] == 120
    assert cost.loc[("tm", "total"), "seconds"] == pytest.approx(5.0)
    with pytest.raises(ValueError, match="no column seconds_A1"):
        search.cost_table(search.without_seconds(table))


def test_shared_neurons(table):
    shared = search.shared_neurons(table)
    first = shared.iloc[0]
    assert first[["layer", "neuron", "prompts"]].tolist() == [1, 2, 4]
    assert first["words"] == "red (2), card (2), blue (2), case (2)"
    assert first["captions"] == "red fox card; red owl card; blue cat case; blue dog case"
    assert 9 not in shared.loc[shared["prompts"] > 2, "neuron"].tolist()
    assert search.shared_neurons(table, minimum=5).empty


def test_overlap_of_pairs(table):
    overlap = search.neuron_overlap(table).set_index(["first", "second"])
    assert len(overlap) == 6
    assert overlap.loc[("red fox card", "red owl card")].tolist() == [2, 1, 0.5]
    assert overlap.loc[("red fox card", "blue cat case")].tolist() == [0, 1, 1 / 7]


@pytest.fixture
def changed(table):
    part = table[table["kind"].isin(["vm", "tm"])].reset_index(drop=True)
    values = {
        "score_before": [0.9, 0.8, 0.7, 0.6],
        "score_after": [0.2, 0.5, 0.3, 0.65],
        "copy_before": [0.9, 0.9, 0.5, 0.5],
        "copy_after": [0.1, 0.2, 0.4, 0.6],
        "seeds_before": 0.9,
        "seeds_after": 0.2,
        "same_seed": 0.3,
    }
    return part[["kind", "prompt", "neuron_count", "reached"]].assign(**values)


def test_change_by_kind(changed):
    shown = search.change_table(changed).set_index("kind")
    assert shown.loc["vm", ["score_before", "score_after", "copy_after"]].tolist() == [
        "0.85 ± 0.05", "0.35 ± 0.15", "0.15 ± 0.05",
    ]  # fmt: skip
    assert shown["prompts"].tolist() == [2, 2]


def test_prompts_that_stay_memorized(changed):
    assert search.stay_memorized(changed)["prompt"].tolist() == ["blue dog case", "blue cat case"]
    assert search.stay_memorized(changed, share=0.9)["prompt"].tolist() == ["blue dog case"]
    assert len(search.stay_memorized(changed, share=0.0)) == 4


def test_examples_are_spread(changed):
    assert search.example_prompts(changed, number=3, kind="vm") == ["red owl card", "red fox card"]
    many = pd.concat([changed.iloc[:1]] * 9, ignore_index=True)
    many = many.assign(prompt=[f"p{i}" for i in range(9)], copy_after=np.linspace(0.9, 0.1, 9))
    assert search.example_prompts(many, number=3, kind="vm") == ["p2", "p4", "p6"]
    assert search.example_prompts(changed, number=2, kind="ladder") == []


def test_claims_hold_and_stand_beside_the_paper(table, changed):
    shown = check_table(search.claims(table, changed, threshold=0.4))
    assert (shown["result"] == "holds").sum() == 3
    assert shown["result"].str.startswith("not checked").sum() == 2
    neurons = shown[shown["claim"] == "VM: neurons per prompt, median"].iloc[0]
    assert neurons[["paper", "ours"]].tolist() == ["4 ± 3", "1.5"]
    share = shown[shown["claim"].str.startswith("unmemorized")].iloc[0]
    assert share["ours"] == "0.667"


def test_the_median_score_must_fall_where_there_are_prompts_enough(table, changed):
    many = pd.concat([changed] * 3)
    assert all(row.holds for row in search.claims(table, many, threshold=0.4))
    rising = many.assign(score_after=1.0)
    with pytest.raises(ClaimError, match="VM: the median score falls without the neurons"):
        check_table(search.claims(table, rising, threshold=0.4))
    few = changed.assign(score_after=1.0)
    shown = check_table(search.claims(table, few, threshold=0.4)).set_index("claim")
    result = shown.loc["VM: the median score falls without the neurons", "result"]
    assert result == "not checked: 2 VM prompts, 5 needed"


def test_half_precision_may_miss_the_threshold_by_its_rounding(table, changed):
    rounded, name = table.assign(refined_score=0.41), "refinement never ends above the threshold it was given"
    failed = {
        limit: [row.claim for row in search.claims(rounded, changed, threshold=0.4, rounding=limit) if not row.holds]
        for limit in (1e-4, 0.06)
    }
    assert failed == {1e-4: [name], 0.06: []}


def test_without_a_searched_prompt_the_refinement_is_not_checked(table, changed):
    nothing = table.assign(memorized=False, neuron_count=0)
    shown = check_table(search.claims(nothing, changed, threshold=0.4)).set_index("claim")
    result = shown.loc["refinement never ends above the threshold it was given", "result"]
    assert result == "not checked: no searched prompts, 1 needed"


def test_one_image_per_prompt_has_no_diversity(table, changed):
    single = changed.assign(seeds_before=np.nan, seeds_after=np.nan)
    assert search.change_table(single)["seeds_before"].tolist() == ["", ""]
    text = search.findings(table, single, search.neuron_overlap(table), threshold=0.4, neurons=576)
    assert "with one image per prompt the similarity of its images is not known" in text
    assert "nan" not in text


def test_overlap_without_a_pair_has_types(table):
    nothing = search.neuron_overlap(table.head(0))
    assert nothing.query("common_words >= 2").nlargest(1, "shared").empty


def test_z_scores_of_a_prompt_as_a_table():
    table = search.prompt_z_scores([torch.tensor([0.5, -2.0]), torch.tensor([4.0])])
    assert table.columns.tolist() == ["layer", "neuron", "z"]
    assert table.to_numpy().tolist() == [[1, 0, 0.5], [1, 1, -2.0], [2, 0, 4.0]]


def test_a_set_outside_its_initial_selection_is_a_failed_claim(table, changed):
    broken = table.assign(initial=NeuronSet(((1,), ())).to_json())
    failed = [row.claim for row in search.claims(broken, changed, threshold=0.4) if not row.holds]
    assert failed == ["every refined set lies within its initial selection"]


def test_a_score_above_its_threshold_is_a_failed_claim(table, changed):
    broken = table.assign(refined_score=0.45)
    failed = [row.claim for row in search.claims(broken, changed, threshold=0.4) if not row.holds]
    assert failed == ["refinement never ends above the threshold it was given"]


def test_findings_have_the_numbers(table, changed):
    text = search.findings(table, changed, search.neuron_overlap(table), threshold=0.4, neurons=576)
    for part in ("1.5 ± 0.5 of 576 neurons (paper: 4 ± 3 of 5,760)", "1 of 2 prompts have a single one",
                 "from 0.85 to 0.35 (threshold 0.40)", "from 0.90 to 0.15", "**2 of 4** prompts keep", "For **2 of 4** prompts", "from 0.90 to 0.20",
                 "2 of 3 prompts have no neurons"):  # fmt: skip
        assert part in text, part


def test_plain_model(profile, random_model_folder, tmp_path):
    chosen = dataclasses.replace(profile, model=str(tmp_path / "model"))
    nothing = search.plain_model(chosen)
    assert nothing.empty
    assert nothing.columns.tolist() == ["model", "kind", "quantity", "value"]
    (tmp_path / "plain_model.csv").write_text("model,kind,quantity,value\nplain,vm,density,0.5\n")
    assert search.plain_model(chosen)["value"].tolist() == [0.5]
    (tmp_path / "plain_model.csv").write_text("model,kind\nplain,vm\n")
    with pytest.raises(StoreError, match="column 'quantity' is missing"):
        search.plain_model(chosen)
