import copy
import json
from dataclasses import replace

import pytest
import torch

from nemolib.first_step import guidance_norms, noise_differences
from nemolib.generation import generate
from nemolib.holdout import activation_statistics, holdout_scores
from nemolib.layers import NotFiniteError, deactivate, value_layers
from nemolib.localization import Localization, Variant, localization_table, localize, localizing, varying
from nemolib.mitigation import EmbeddingAdjustment
from nemolib.neurons import NeuronSet
from nemolib.settings import (
    PAPER,
    DetectionSettings,
    GenerationSettings,
    SearchSettings,
    SimilaritySettings,
    WenSettings,
)
from nemolib.similarity import max_pairwise, memorization_score, pairwise, similarity

SIMILARITY = SimilaritySettings(kernel_size=3, sigma=0.5)
SEARCH = SearchSettings(theta_start=3.0, theta_step=1.0, k_step=2)
SEQUENTIAL = replace(SEARCH, method="sequential")
DETECTION = DetectionSettings(samples=3)
VALUE = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight")
SETTINGS = {"detection": DETECTION, "similarity": SIMILARITY, "search": SEARCH, "gate": -0.9, "threshold": 0.95}


@pytest.fixture(scope="module")
def search(random_pipe, statistics):
    """Return a function that searches a prompt with `SETTINGS` or others."""
    return lambda prompt="zzz", **others: localize(random_pipe, prompt, statistics, **(SETTINGS | others))


@pytest.fixture(scope="module")
def found(search):
    return search()


@pytest.mark.parametrize(("guidance", "cost"), [(0.0, 1), (7.0, 2)])
def test_cost_by_algorithm(random_pipe, search, found, guidance, cost):
    counted = []
    with random_pipe.unet.register_forward_pre_hook(lambda module, args: counted.append(len(args[0]))):
        found = search(search=SEQUENTIAL, detection=replace(DETECTION, guidance=guidance))
    assert sum(found.evaluations.values()) == sum(counted)
    # Three samples for the differences; then three for each neuron set that was new.
    assert found.evaluations["A1"] == 3 * cost
    assert found.evaluations["A2"] == 0
    assert found.evaluations["A3"] == 3 * cost * len({step.neurons for step in found.steps if step.neurons})
    assert 0 < found.evaluations["A4"] <= 3 * cost * len(found.tests)
    assert all(seconds > 0 for seconds in found.seconds.values())


@pytest.mark.parametrize("threshold", [0.9, 0.95, 0.99, -0.99])
@pytest.mark.parametrize("protocol", ["released", "paper"])
def test_both_methods_start_from_the_same_selection(search, threshold, protocol):
    fast, slow = (search("b q", threshold=threshold, protocol=protocol, search=item) for item in (SEARCH, SEQUENTIAL))
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


def test_scores_can_be_recomputed(random_pipe, found):
    plain = noise_differences(random_pipe, "zzz", settings=DETECTION)
    with deactivate(random_pipe, found.neurons):
        blocked = noise_differences(random_pipe, "zzz", settings=DETECTION)
    assert found.refined_score == pytest.approx(float(similarity(plain, blocked, settings=SIMILARITY).max()), abs=1e-5)
    assert found.unblocked_score == memorization_score(plain, settings=SIMILARITY)


def test_a_prompt_that_is_not_memorized_has_no_neurons(search):
    found = search(gate=None)
    assert not found.memorized
    assert not found.reached
    assert found.seeds == ()
    assert found.neurons == found.initial == NeuronSet.empty(7)
    assert found.initial_score is None
    assert found.refined_score is None
    assert found.evaluations == {"A1": 3, "A2": 0, "A3": 0, "A4": 0}


def test_only_seeds_beyond_the_gate_take_part(random_pipe, search):
    maps = noise_differences(random_pipe, "zzz", settings=DETECTION, protocol="paper")
    best = max_pairwise(pairwise(maps, settings=SIMILARITY, protocol="paper"))
    found = search(gate=float(best.min()), protocol="paper")
    assert found.seeds == tuple((best > best.min()).nonzero().flatten().tolist())
    assert found.evaluations["A3"] % 2 == 0


@pytest.mark.parametrize("threshold", [-1.0, 1.01, 42.8, float("nan")])
def test_thresholds_are_similarities(search, threshold):
    with pytest.raises(ValueError, match=r"threshold is .*; a similarity is in \(-1, 1\]"):
        search(threshold=threshold)
    with pytest.raises(ValueError, match=r"gate is .*; a similarity is in \(-1, 1\]"):
        search(gate=threshold)


def test_what_cannot_be_searched(random_pipe, statistics, search):
    with pytest.raises(ValueError, match="prompt 0 is ''"):
        search("")
    pipe = copy.copy(random_pipe)
    pipe.unet = copy.deepcopy(random_pipe.unet)
    with torch.no_grad():
        value_layers(pipe.unet)[0].module.weight.mul_(2)
    with pytest.raises(ValueError, match="statistics of another model"):
        localize(pipe, "zzz", statistics, threshold=0.5)


def not_finite(pipe, part, name):
    """Return the pipeline with one weight that is not a number."""
    pipe = copy.copy(pipe)
    setattr(pipe, part, copy.deepcopy(getattr(pipe, part)))
    with torch.no_grad():
        getattr(pipe, part).get_parameter(name).view(-1)[0] = torch.nan
    return pipe


@pytest.mark.parametrize("part", [("unet", "conv_out.weight"), ("text_encoder", "final_layer_norm.weight")])
@pytest.mark.parametrize(
    "function",
    [
        lambda pipe, statistics: localize(pipe, "zzz", statistics, **SETTINGS),
        lambda pipe, _: noise_differences(pipe, "zzz", settings=DETECTION),
        lambda pipe, _: holdout_scores(pipe, ["zzz", "a"], similarity=SIMILARITY, progress=False),
        lambda pipe, _: guidance_norms(pipe, "zzz", settings=DETECTION),
        lambda pipe, _: EmbeddingAdjustment(WenSettings(target=0.0, latents=2)).adjust(pipe, "zzz"),
        lambda pipe, _: generate(pipe, ["zzz"], settings=GenerationSettings(samples=1, steps=1), progress=False),
    ],
)
def test_what_is_not_finite_is_an_error_that_names_the_prompt(random_pipe, statistics, part, function):
    with pytest.raises(NotFiniteError, match=r"'zzz'.*not all numbers are finite in (torch.)?float32; .*load it with"):
        function(not_finite(random_pipe, *part), statistics)


def test_nor_are_statistics_made_of_what_is_not_finite(random_pipe):
    for part, words in (
        (("text_encoder", "final_layer_norm.weight"), "text embedding of prompt 'a'"),
        (VALUE, "values of"),
    ):
        with pytest.raises(NotFiniteError, match=words):
            activation_statistics(not_finite(random_pipe, *part), ["a", "b"], progress=False)


def test_defaults_of_the_session_change_nothing(search, found):
    try:
        torch.set_default_dtype(torch.float64)
        again = search()
    finally:
        torch.set_default_dtype(torch.float32)
    assert replace(again, seconds={}) == replace(found, seconds={})


def test_a_record_gives_the_localization_back(found):
    kept = replace(found, steps=(), tests=())
    assert Localization.from_record(json.loads(json.dumps(found.to_record()))) == kept


def test_prompts_that_are_searched_together_find_what_each_finds_alone(random_pipe, statistics, search):
    """Also if one of them is not memorized, and if one fails."""
    prompts, passes = ["zzz", "b q", "red fox card", "blue cat case"], []
    alone = [search(prompt) for prompt in prompts]
    task = localizing(random_pipe, statistics=statistics, **SETTINGS)
    with random_pipe.unet.register_forward_pre_hook(lambda module, args: passes.append(len(args[0]))):
        searched = dict(task([*prompts, 7]))
    assert isinstance(searched.pop(4), ValueError)
    assert len(passes) < sum(passes) / 3
    for place, own in enumerate(alone):
        found = Localization.from_record(searched[place])
        for name in ("prompt", "memorized", "seeds", "initial", "neurons", "theta", "k", "reached", "evaluations"):
            assert getattr(found, name) == getattr(own, name), name
        for name in ("unblocked_score", "initial_score", "refined_score", "lowest_score"):
            assert getattr(found, name) == pytest.approx(getattr(own, name), abs=1e-5)
    assert sum(passes) == sum(sum(own.evaluations.values()) for own in alone)


def test_table(search, found):
    nothing = search(gate=0.99)
    table = localization_table([found, nothing], seconds=True)
    row, last = table.iloc[0], table.iloc[1]
    assert list(table)[:5] == ["prompt", "memorized", "seeds", "unblocked_score", "initial_score"]
    assert (row["neurons"], row["initial"]) == (found.neurons.to_json(), found.initial.to_json())
    assert (row["neuron_count"], row["initial_count"]) == (len(found.neurons), len(found.initial))
    scores = [getattr(found, name) for name in ("refined_score", "theta", "k")]
    assert row[["refined_score", "theta", "k", "seeds"]].tolist() == [*scores, 3]
    assert row["evaluations_A4"] == found.evaluations["A4"]
    assert last["seconds_A1"] > 0 == last["seconds_A4"] == last["neuron_count"]
    assert last[["theta", "k"]].isna().all()
    assert not [name for name in localization_table([found]) if name.startswith("seconds")]


# Searches that share what they evaluate

HIGH, LOW, UNREACHED = 0.997, 0.993, 0.5
VARIANTS = (
    Variant("low", LOW, LOW),
    Variant("both", LOW, HIGH),
    Variant("unreached", UNREACHED, UNREACHED),
    Variant("high", HIGH, HIGH),
    Variant("no top-k", HIGH, HIGH, top_k=False),
)
RED = "red fox card"


@pytest.fixture(scope="module")
def vary(random_pipe, statistics):
    """Return a function that searches variants of a prompt, and returns a localization for each."""

    def varied(*variants, prompt=RED, known=None, gate=-0.9, search=SEARCH):
        settings = {"detection": DETECTION, "similarity": SIMILARITY, "search": search, "protocol": PAPER, "gate": gate}
        task = varying(random_pipe, statistics=statistics, variants=variants or VARIANTS, **settings)
        return {name: Localization.from_record(item) for name, item in next(task([(prompt, known)]))[1].items()}

    return varied


@pytest.fixture(scope="module")
def shared(vary):
    return vary()


def cost(localization):
    return sum(localization.evaluations.values())


@pytest.mark.parametrize(
    ("prompt", "method"), [(RED, SEARCH), ("blue cat case", SEARCH), ("blue cat case", SEQUENTIAL)]
)
def test_a_variant_is_what_a_search_of_its_own_finds(search, vary, prompt, method):
    found = vary(prompt=prompt, search=method)
    assert list(found) == [variant.name for variant in VARIANTS]
    for variant in VARIANTS:
        if variant.initial != variant.refinement:
            continue
        settings = method if variant.top_k else replace(method, k_step=0)
        own = search(prompt, threshold=variant.initial, search=settings, protocol="paper")
        for name in ("prompt", "seeds", "initial", "neurons", "reached", "theta", "k", "memorized", "unblocked_score"):
            assert getattr(found[variant.name], name) == getattr(own, name), (variant, name)
        assert found[variant.name].refined_score == pytest.approx(own.refined_score, abs=1e-6)
    assert [found[name].reached for name in ("low", "high", "unreached")] == [True, True, False]


def test_what_is_shared_is_not_evaluated_again(vary, shared):
    alone = {variant.name: vary(variant)[variant.name] for variant in VARIANTS[:4]}
    assert all(alone[name].neurons == shared[name].neurons for name in alone)
    assert sum(map(cost, shared.values())) < sum(map(cost, alone.values()))
    # The highest threshold is searched first.
    assert [item.evaluations["A1"] for item in shared.values()] == [0, 0, 0, 3, 0]
    assert shared["both"].evaluations["A3"] == 0
    # A higher refinement threshold starts from the same neurons.
    assert shared["both"].initial == shared["low"].initial
    assert shared["both"].refined_score < HIGH
    assert len(shared["both"].neurons) <= len(shared["low"].neurons)
    assert shared["low"].refined_score < LOW


def test_a_closed_gate_leaves_nothing_to_search(vary):
    found = vary(gate=0.99)
    assert not any(item.memorized or item.neurons or item.initial for item in found.values())
    assert list(map(cost, found.values())) == [3, 0, 0, 0, 0]
    again = vary(gate=0.99, known=found["low"])
    assert not any(item.memorized for item in again.values())
    assert list(map(cost, again.values())) == [0] * 5


@pytest.mark.parametrize("method", [SEARCH, SEQUENTIAL])
def test_a_search_that_is_known_is_not_repeated(vary, method):
    known = vary(VARIANTS[2], search=method)["unreached"]
    assert not known.reached
    # A threshold between that of the default and all scores is not reached either.
    other = Variant("other", (UNREACHED + known.lowest_score) / 2, known.initial_score)
    alone = vary(other, search=method)["other"]
    free = vary(other, known=known, search=method)["other"]
    assert cost(alone) > 0
    assert cost(free) == sum(free.seconds.values()) == 0
    for name in ("memorized", "seeds", "initial", "neurons", "initial_score", "theta", "k", "reached"):
        assert getattr(free, name) == getattr(alone, name)
    assert free.refined_score == alone.refined_score or method == SEARCH


def test_a_search_that_would_go_another_way_is_made(shared):
    known = shared["unreached"]
    within = (UNREACHED + known.lowest_score) / 2
    assert Variant("a", within, within).repeats(known)
    assert not Variant("a", within, within, top_k=False).repeats(known)
    assert not Variant("a", known.lowest_score, known.lowest_score).repeats(known)
    assert not Variant("a", within, known.initial_score + 1e-6).repeats(known)
    assert not Variant("a", within, within).repeats(replace(known, reached=True))
    # Without seeds there is nothing to search, whatever the thresholds.
    assert Variant("a", 0.999, 0.999, top_k=False).repeats(replace(known, memorized=False))


def test_impossible_variants_are_refused(vary):
    with pytest.raises(ValueError, match=r"'a': the refinement threshold 0\.200 is below .* 0\.300"):
        Variant("a", 0.3, 0.2)
    with pytest.raises(ValueError, match=r"names \['a', 'a'\]"):
        vary(Variant("a", 0.1, 0.1), Variant("a", 0.2, 0.2))
