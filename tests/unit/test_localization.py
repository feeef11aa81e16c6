import copy
import dataclasses
import json

import pandas as pd
import pytest
import torch

from nemolib import localization
from nemolib.hooks import deactivate
from nemolib.localization import Localization, localization_table, localize, localize_many
from nemolib.neurons import NeuronSet
from nemolib.settings import DetectionSettings, SearchSettings, SimilaritySettings
from nemolib.store import Store
from nemolib.value_layers import value_layers
from tests.random_pipeline import WIDTHS

SETTINGS = {
    "detection": DetectionSettings(samples=3),
    "similarity": SimilaritySettings(kernel_size=3, sigma=0.5),
    "search": SearchSettings(theta_start=3.0, theta_step=1.0, k_step=2),
    "gate": -0.9,
}
PROMPTS = ["zzz", "b q", "hello"]


@pytest.fixture(scope="module")
def found(random_pipe, statistics):
    return localize(random_pipe, "zzz", statistics, threshold=0.95, **SETTINGS)


def test_a_search_ends_with_neurons_of_its_initial_selection(found):
    assert found.memorized
    assert found.seeds == (0, 1, 2)
    assert found.neurons
    assert found.neurons - found.initial == NeuronSet.empty(7)
    assert found.reached == (found.initial_score <= 0.95)
    assert found.refined_score <= max(0.95, found.initial_score)
    found.neurons.check(WIDTHS)


def test_cost_by_algorithm(random_pipe, statistics):
    found = localize(random_pipe, "zzz", statistics, threshold=0.95, **(SETTINGS | {"search": sequential()}))
    # Three samples for the differences; then three for each neuron set that was new.
    assert found.evaluations["A1"] == 3
    assert found.evaluations["A2"] == 0
    assert found.evaluations["A3"] == 3 * len({step.neurons for step in found.steps if step.neurons})
    assert 0 < found.evaluations["A4"] <= 3 * len(found.tests)
    assert all(seconds > 0 for seconds in found.seconds.values())


def sequential():
    return dataclasses.replace(SETTINGS["search"], method="sequential")


@pytest.mark.parametrize("threshold", [0.9, 0.95, 0.99, -0.99])
@pytest.mark.parametrize("protocol", ["released", "paper"])
def test_both_methods_start_from_the_same_selection(random_pipe, statistics, threshold, protocol):
    settings = {"threshold": threshold, "protocol": protocol} | SETTINGS
    fast = localize(random_pipe, "b q", statistics, **settings)
    slow = localize(random_pipe, "b q", statistics, **(settings | {"search": sequential()}))
    assert fast.initial == slow.initial
    assert (fast.theta, fast.k, fast.reached, fast.seeds) == (slow.theta, slow.k, slow.reached, slow.seeds)
    assert fast.initial_score == pytest.approx(slow.initial_score, abs=1e-5)
    assert [step.neurons for step in fast.steps] == [step.neurons for step in slow.steps]
    assert fast.steps[-1].score == fast.initial_score
    assert all(step.score > threshold for step in fast.steps[:-1])
    assert fast.neurons - fast.initial == NeuronSet.empty(7)
    target = threshold if fast.reached else fast.initial_score
    assert fast.refined_score < target or fast.neurons == fast.initial
    assert fast.evaluations["A3"] <= slow.evaluations["A3"]


def test_the_method_can_be_named_alone(random_pipe, statistics):
    settings = {name: value for name, value in SETTINGS.items() if name != "search"} | {"threshold": 0.95}
    named = localize(random_pipe, "zzz", statistics, search="sequential", **settings)
    assert named.tests == localize(
        random_pipe, "zzz", statistics, search=SearchSettings(method="sequential"), **settings
    ).tests  # fmt: skip
    assert not any(test.group for test in named.tests)
    with pytest.raises(ValueError, match="SearchSettings.method is 'quick'; it must be 'fast' or 'sequential'"):
        localize(random_pipe, "zzz", statistics, search="quick", **settings)
    with pytest.raises(ValueError, match="SearchSettings.method is 'quick'"):
        localize_many(random_pipe, ["zzz"], statistics, search="quick", **settings)


def test_scores_can_be_recomputed(random_pipe, statistics, found):
    from nemolib.first_step import noise_differences
    from nemolib.similarity import memorization_score, similarity

    shared = {"settings": SETTINGS["detection"]}
    plain = noise_differences(random_pipe, "zzz", **shared)
    blocked = noise_differences(random_pipe, "zzz", neurons=found.neurons, **shared)
    score = float(similarity(plain, blocked, settings=SETTINGS["similarity"]).max())
    assert found.refined_score == pytest.approx(score, abs=1e-5)
    assert found.unblocked_score == memorization_score(plain, settings=SETTINGS["similarity"])


def test_guidance_doubles_the_cost(random_pipe, statistics):
    settings = SETTINGS | {"detection": DetectionSettings(samples=2, guidance=7.0)}
    assert localize(random_pipe, "zzz", statistics, threshold=0.95, **settings).evaluations["A1"] == 4


def test_a_prompt_that_is_not_memorized_has_no_neurons(random_pipe, statistics):
    found = localize(random_pipe, "zzz", statistics, threshold=0.95, **(SETTINGS | {"gate": None}))
    assert not found.memorized
    assert not found.reached
    assert found.seeds == ()
    assert found.neurons == found.initial == NeuronSet.empty(7)
    assert found.initial_score is None
    assert found.refined_score is None
    assert found.evaluations == {"A1": 3, "A2": 0, "A3": 0, "A4": 0}


def test_only_seeds_beyond_the_gate_take_part(random_pipe, statistics):
    from nemolib.first_step import noise_differences
    from nemolib.similarity import max_pairwise, pairwise

    maps = noise_differences(random_pipe, "zzz", settings=SETTINGS["detection"], protocol="paper")
    best = max_pairwise(pairwise(maps, settings=SETTINGS["similarity"], protocol="paper"))
    gate = float(best.min())
    found = localize(random_pipe, "zzz", statistics, threshold=0.95, protocol="paper", **(SETTINGS | {"gate": gate}))
    assert found.seeds == tuple((best > gate).nonzero().flatten().tolist())
    assert len(found.seeds) == 2
    assert found.evaluations["A3"] % 2 == 0


def test_the_paper_protocol_tries_the_smallest_theta(random_pipe, statistics):
    settings = SETTINGS | {"detection": DetectionSettings(samples=2)}
    last = [
        localize(random_pipe, "zzz", statistics, threshold=-0.99, protocol=name, **settings).theta
        for name in ("released", "paper")
    ]
    assert last == [2.0, 1.0]


def test_many_neuron_sets_score_in_one_batch_as_alone(random_pipe, found):
    from nemolib.evaluations import Evaluations
    from nemolib.first_step import first_step
    from nemolib.pipeline import embed
    from nemolib.protocols import RELEASED

    step, embedding = first_step(random_pipe, settings=SETTINGS["detection"]), embed(random_pipe, ["zzz"])

    def score(evaluations=None):
        return localization.BlockedScore(
            step,
            embedding,
            seeds=[0, 1, 2],
            unblocked=step(embedding),
            similarity=SETTINGS["similarity"],
            protocol=RELEASED,
            evaluations=evaluations,
        )

    sets = [found.neurons, found.initial, NeuronSet.empty(7), found.initial]
    evaluations = Evaluations()
    together = score(evaluations)
    values = together.many(sets)
    assert evaluations.total == 2 * 3
    alone = score()
    assert values == pytest.approx([alone(item) for item in sets], abs=1e-5)
    assert values[1] == values[3]
    assert values[2] == pytest.approx(1.0, abs=1e-5)
    together.many(sets)
    assert evaluations.total == 2 * 3


@pytest.mark.parametrize("function", [localize, localize_many])
@pytest.mark.parametrize("threshold", [-1.0, 1.01, 42.8, float("nan")])
def test_thresholds_are_similarities(random_pipe, statistics, function, threshold):
    prompts = "zzz" if function is localize else PROMPTS
    with pytest.raises(ValueError, match=r"threshold is .*; a similarity is in \(-1, 1\]"):
        function(random_pipe, prompts, statistics, threshold=threshold)
    with pytest.raises(ValueError, match=r"gate is .*; a similarity is in \(-1, 1\]"):
        function(random_pipe, prompts, statistics, threshold=1.0, gate=threshold)


@pytest.mark.parametrize("function", [localize, localize_many])
def test_statistics_of_another_model(random_pipe, statistics, function):
    pipe = copy.copy(random_pipe)
    pipe.unet = copy.deepcopy(random_pipe.unet)
    with torch.no_grad():
        value_layers(pipe.unet)[0].module.weight.mul_(2)
    prompts = "zzz" if function is localize else PROMPTS
    with pytest.raises(ValueError, match="statistics of another model"):
        function(pipe, prompts, statistics, threshold=0.5)


def test_prompts_that_cannot_be_used(random_pipe, statistics):
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        localize_many(random_pipe, [], statistics, threshold=0.5)
    with pytest.raises(ValueError, match="prompt 0 is ''"):
        localize(random_pipe, "", statistics, threshold=0.5)


def test_a_record_gives_the_localization_back(found):
    record = json.loads(json.dumps(found.to_record()))
    assert Localization.from_record(record) == dataclasses.replace(found, steps=(), tests=())


def run(pipe, statistics, prompts=PROMPTS, **settings):
    return localize_many(pipe, prompts, statistics, threshold=0.95, progress=False, **(SETTINGS | settings))


@pytest.fixture(scope="module")
def table(random_pipe, statistics):
    return run(random_pipe, statistics)


def test_table(table, found):
    assert table["prompt"].tolist() == PROMPTS
    row = table.iloc[0]
    assert NeuronSet.from_json(row["neurons"]) == found.neurons
    assert NeuronSet.from_json(row["initial"]) == found.initial
    assert (row["neuron_count"], row["initial_count"]) == (len(found.neurons), len(found.initial))
    assert row["refined_score"] == found.refined_score
    assert (row["theta"], row["k"], row["seeds"]) == (found.theta, found.k, 3)
    assert row["evaluations_A4"] == found.evaluations["A4"]
    assert not [name for name in table if name.startswith("seconds")]


def test_table_with_seconds_and_without_neurons(random_pipe, statistics):
    found = localize(random_pipe, "zzz", statistics, threshold=0.95, detection=SETTINGS["detection"], gate=0.99,
                     similarity=SETTINGS["similarity"])  # fmt: skip
    row = localization_table([found], seconds=True).iloc[0]
    assert row["seconds_A1"] > 0 == row["seconds_A4"]
    assert pd.isna(row["theta"])
    assert pd.isna(row["k"])
    assert row["neuron_count"] == 0


def test_a_finished_prompt_is_never_computed_again(random_pipe, statistics, table, tmp_path, monkeypatch):
    path = tmp_path / "store.jsonl"
    run(random_pipe, statistics, PROMPTS[:2], store=Store(path))
    computed = []
    original = localization.localize

    def counted(pipe, prompt, *args, **settings):
        computed.append(prompt)
        return original(pipe, prompt, *args, **settings)

    monkeypatch.setattr(localization, "localize", counted)
    resumed = run(random_pipe, statistics, store=Store(path))
    assert computed == PROMPTS[2:]
    assert resumed.to_csv() == table.to_csv()
    run(random_pipe, statistics, store=Store(path), detection=DetectionSettings(samples=2))
    assert computed == PROMPTS[2:] + PROMPTS


def test_another_model_has_its_own_records(random_pipe, statistics, tmp_path, monkeypatch):
    store = Store(tmp_path / "store.jsonl")
    run(random_pipe, statistics, PROMPTS[:1], store=store)
    pipe = copy.copy(random_pipe)
    pipe.unet = copy.deepcopy(random_pipe.unet)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)
    run(pipe, statistics, PROMPTS[:1], store=store)
    assert len(store) == 2


def test_a_store_is_refused_while_neurons_are_deactivated(random_pipe, statistics, found, tmp_path):
    with (
        deactivate(random_pipe, found.neurons),
        pytest.raises(ValueError, match="a store is used while value layers have hooks"),
    ):
        run(random_pipe, statistics, store=Store(tmp_path / "store.jsonl"))
