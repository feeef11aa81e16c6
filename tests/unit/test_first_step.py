import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from nemolib import seeding
from nemolib.beyond.triggers import search_triggers
from nemolib.first_step import (
    NORMS,
    FirstStep,
    Sample,
    comparing_outputs,
    first_step,
    guidance_norm,
    guidance_norms,
    noise_differences,
    normalize,
    observing,
    pairs_measure,
    timestep_of,
)
from nemolib.holdout import activation_statistics
from nemolib.mitigation import target_norms
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.settings import PAPER, RELEASED, DetectionSettings, SimilaritySettings, WenSettings
from nemolib.similarity import pair_similarities
from tests.random_pipeline import WIDTHS

SETTINGS = DetectionSettings(samples=3)
GUIDED = DetectionSettings(samples=3, guidance=7.0)
SIMILARITY = SimilaritySettings(kernel_size=3, sigma=0.5)
NEURONS = NeuronSet(((0, 1), (), (2,), (), (), (5,), ()))


@pytest.fixture
def passes(random_pipe):
    """Return a list of (batch size, timestep) that grows with every UNet pass."""
    seen = []
    with random_pipe.unet.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), int(args[1])))):
        yield seen


# Noise differences


@pytest.mark.parametrize(("protocol", "timestep"), [("released", 961), ("paper", 981)])
@pytest.mark.parametrize(("settings", "cost"), [(SETTINGS, 1), (GUIDED, 2)])
def test_one_pass_at_the_timestep_of_the_protocol(random_pipe, passes, protocol, timestep, settings, cost):
    differences = noise_differences(random_pipe, "a", settings=settings, protocol=protocol)
    assert differences.shape == (3, 4, 16, 16)
    step = first_step(random_pipe, settings=settings, protocol=protocol)
    step(embed(random_pipe, ["a"]), seeds=[2])
    assert passes == [(3 * cost, timestep), (cost, timestep)]
    assert step.cost == cost


@pytest.mark.parametrize(("protocol", "swapped"), [("released", True), ("paper", False)])
def test_order_of_the_guidance_halves(random_pipe, protocol, swapped):
    step = first_step(random_pipe, settings=GUIDED, protocol=protocol)
    plain = replace(step, guidance=0.0)
    text, empty = (plain.raw(embed(random_pipe, [prompt])) + plain.latents for prompt in ("a", ""))
    noise = text + 7 * (empty - text) if swapped else empty + 7 * (text - empty)
    expected = noise - step.latents
    torch.testing.assert_close(step.raw(embed(random_pipe, ["a"])), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [SETTINGS, GUIDED])
def test_some_seeds_and_several_neuron_sets_in_one_batch(random_pipe, passes, settings):
    step, embedding = first_step(random_pipe, settings=settings), embed(random_pipe, ["a"])
    sets = [NEURONS, NeuronSet.empty(7), NeuronSet(tuple(map(range, WIDTHS)))]
    others = embed(random_pipe, ["b c", "zzz"]).split(1)
    pairs = [(text, neurons) for text in (embedding, *others) for neurons in sets]
    together = step.differences([Sample(text, seed, neurons) for text, neurons in pairs for seed in (2, 0)])
    assert [samples for samples, _ in passes] == [len(pairs) * 2 * step.cost]
    together = together.unflatten(0, (len(pairs), 2))
    for maps, (text, neurons) in zip(together, pairs, strict=True):
        torch.testing.assert_close(maps, step.raw(text, neurons=neurons, seeds=[2, 0]), atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-4


def test_normalization_is_per_sample_and_channel():
    differences = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    maps = normalize(differences)
    assert (maps.amin((-2, -1)) == 0).all()
    assert (maps.amax((-2, -1)) == 1).all()
    torch.testing.assert_close(maps, normalize(3 * differences + 2), atol=1e-5, rtol=0)
    assert (normalize(torch.ones(1, 1, 2, 2)) == 0).all()


def test_the_scheduler_of_the_pipeline_is_left_alone(random_pipe):
    random_pipe.scheduler.set_timesteps(7)
    before = random_pipe.scheduler.timesteps.clone()
    first_step(random_pipe, settings=SETTINGS)
    assert torch.equal(random_pipe.scheduler.timesteps, before)


def test_timesteps_are_those_of_ddim_for_any_scheduler():
    config = {"steps_offset": 1, "beta_schedule": "scaled_linear"}
    for kind in (DDIMScheduler, PNDMScheduler):
        assert timestep_of(kind(**config), steps=50, index=1) == 961
    with pytest.raises(ValueError, match="timestep index 50 is outside a schedule of 50 steps"):
        timestep_of(DDIMScheduler(), steps=50, index=50)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_models_that_predict_something_else(random_pipe, kind):
    """A model that says the same in other words, by diffusers' own formulas, has the same noise differences and norms."""
    pipe, expected = copy.copy(random_pipe), random_pipe.scheduler
    pipe.unet = copy.deepcopy(random_pipe.unet)
    pipe.scheduler = DDIMScheduler.from_config(expected.config, prediction_type=kind)

    def other_words(module, args, output):
        expected.set_timesteps(50)
        clean = expected.step(output[0], int(args[1]), args[0]).pred_original_sample
        times = torch.tensor([int(args[1])])
        return (expected.get_velocity(clean, output[0], times) if kind == "v_prediction" else clean,)

    pipe.unet.register_forward_hook(other_words)
    for settings in (SETTINGS, GUIDED):
        found, plain = (noise_differences(item, "a", settings=settings) for item in (pipe, random_pipe))
        torch.testing.assert_close(found, plain, atol=1e-3, rtol=0)
    norms = (guidance_norms(item, "red fox", steps=3, settings=SETTINGS) for item in (pipe, random_pipe))
    np.testing.assert_allclose(*norms, rtol=1e-2)
    wen = WenSettings(latents=2, step=0)
    found, plain = (guidance_norm(item, wen)(embed(random_pipe, ["red fox"])) for item in (pipe, random_pipe))
    torch.testing.assert_close(found, plain, atol=0, rtol=1e-2)


def test_a_model_that_predicts_something_unknown(random_pipe):
    pipe = copy.copy(random_pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="the model predicts 'flow'; known: epsilon, v_prediction, sample"):
        first_step(pipe)


def test_impossible_first_steps(random_pipe):
    latents, text = seeding.latents((4, 16, 16), samples=3, seed=1), embed(random_pipe, ["a", "b"])
    with pytest.raises(ValueError, match="needs the embedding of the empty prompt"):
        FirstStep(random_pipe.unet, 961, latents, guidance=7.0)
    step = FirstStep(random_pipe.unet, 961, latents)
    with pytest.raises(ValueError, match="expected that of one prompt"):
        step(text)
    with pytest.raises(ValueError, match="no neuron sets or no seeds"):
        step(text[:1], seeds=[])


# Measures of the first step


@pytest.fixture
def observe(random_pipe):
    return observing(random_pipe, detection=replace(SETTINGS, guidance=0.0), similarity=SIMILARITY)


@pytest.mark.parametrize("protocol", [RELEASED, PAPER])
@pytest.mark.parametrize("settings", [SETTINGS, GUIDED])
def test_pairs_are_those_of_the_noise_differences(random_pipe, observe, protocol, settings):
    differences = noise_differences(random_pipe, "red fox", settings=settings, protocol=protocol)
    direct = pair_similarities(differences, settings=SIMILARITY, protocol=protocol)
    found = observe([("red fox", pairs_measure(protocol, settings.guidance))])[0]
    assert found == pytest.approx(direct.tolist(), abs=1e-4)


def test_every_prediction_is_made_once(observe, passes):
    measures = [NORMS] + [
        pairs_measure(protocol, guidance) for protocol in (RELEASED, PAPER) for guidance in (0.0, 7.0)
    ]
    together = observe([("red fox", measure) for measure in measures])
    assert sorted(passes) == [(3, 961)] * 2 + [(3, 981)] * 2  # timesteps, prompt and empty prompt
    observe([("red owl", measures[-1])])
    assert len(passes) == 5
    assert together == [observe([("red fox", measure)])[0] for measure in measures]


def test_measures_of_protocols_that_measure_the_same_are_equal():
    assert pairs_measure(RELEASED, 0) == pairs_measure(replace(RELEASED, swap_guidance=False, name="other"), 0.0)
    assert pairs_measure(RELEASED, 7) != pairs_measure(replace(RELEASED, swap_guidance=False), 7)
    assert len({pairs_measure(protocol, 0) for protocol in (RELEASED, PAPER)} | {NORMS}) == 3


def test_wens_score_of_the_first_steps(random_pipe, observe, passes):
    norms = guidance_norms(random_pipe, "red fox", steps=3, settings=SETTINGS)
    assert norms.shape == (3, 3)
    assert (norms >= 0).all()
    assert [samples for samples, _ in passes] == [6, 6, 6]
    assert norms[0] == pytest.approx(observe([("red fox", NORMS)])[0], rel=1e-3)
    step = first_step(random_pipe, settings=SETTINGS, protocol="paper")
    by_hand = (step.raw(embed(random_pipe, ["red fox"])) - step.raw(embed(random_pipe, [""]))).flatten(1).norm(dim=1)
    assert norms[0] == pytest.approx(by_hand.numpy(), rel=1e-3)
    assert not np.allclose(norms[0], norms[1])


def test_the_norm_as_a_function_of_embeddings_has_gradients(random_pipe):
    norm_of = guidance_norm(random_pipe, WenSettings(latents=3, seed=1, steps=50, step=0))
    text = embed(random_pipe, ["red fox"]).clone().requires_grad_()
    norms, expected = norm_of(text), guidance_norms(random_pipe, "red fox", settings=SETTINGS)[0]
    assert norms.detach().numpy() == pytest.approx(expected, rel=1e-3)
    assert norm_of(embed(random_pipe, [""])).max() < 1e-4
    (gradient,) = torch.autograd.grad(norms.mean(), [text])
    assert gradient.abs().max() > 0


def test_double_precision_is_left_to_the_cpu(random_pipe, observe, monkeypatch):
    """Some devices, such as Apple's, have none: what comes from the model is brought to the CPU first."""
    to_cpu, doubled = torch.Tensor.cpu, torch.Tensor.double

    def cpu(tensor):
        found = to_cpu(tensor)
        found.arrived = True
        return found

    def double(tensor):
        assert getattr(tensor, "arrived", False)
        return doubled(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "double", double)
    observe([("red fox", pairs_measure(PAPER, 0.0)), ("red fox", NORMS)])
    guidance_norms(random_pipe, "red fox", settings=SETTINGS)
    none = NeuronSet.empty(len(WIDTHS))
    comparing_outputs(random_pipe, sets=[none], detection=SETTINGS, protocol=PAPER)(["red fox"])
    activation_statistics(random_pipe, ["red fox", "blue dog"], progress=False)
    target_norms(random_pipe, settings=WenSettings(latents=2))(["red fox"])
    search_triggers(random_pipe, ["red"], length=1, iterations=1)
