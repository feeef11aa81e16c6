import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from nemolib import seeding
from nemolib.evaluations import Evaluations
from nemolib.first_step import FirstStep, first_step, noise_differences, normalize, timestep_of
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.protocols import RELEASED
from nemolib.settings import DetectionSettings

SETTINGS = DetectionSettings(samples=3)
GUIDED = DetectionSettings(samples=3, guidance=7.0)
NEURONS = NeuronSet(((0, 1), (), (2,), (), (), (5,), ()))


@pytest.fixture
def passes(random_pipe):
    """Return a list of (batch size, timestep) that grows with every UNet pass."""
    seen = []

    def record(module, args, kwargs):
        seen.append((len(args[0]), int(args[1])))

    handle = random_pipe.unet.register_forward_pre_hook(record, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize(("protocol", "timestep"), [("released", 961), ("paper", 981)])
def test_one_pass_at_the_timestep_of_the_protocol(random_pipe, passes, protocol, timestep):
    evaluations = Evaluations()
    differences = noise_differences(
        random_pipe, "a", settings=SETTINGS, protocol=protocol, evaluations=evaluations
    )  # fmt: skip
    assert passes == [(3, timestep)]
    assert evaluations.total == 3
    assert differences.shape == (3, 4, 16, 16)


def test_guidance_costs_two_evaluations_per_sample(random_pipe, passes):
    evaluations = Evaluations()
    step = first_step(random_pipe, settings=GUIDED)
    step(embed(random_pipe, ["a"]), seeds=[2], evaluations=evaluations)
    assert passes == [(2, 961)]
    assert evaluations.total == 2 == step.cost


def test_raw_differences_are_noise_minus_latents(random_pipe):
    step = first_step(random_pipe, settings=SETTINGS)
    embedding = embed(random_pipe, ["a"])
    with torch.no_grad():
        noise = random_pipe.unet(step.latents, 961, embedding.expand(3, -1, -1)).sample
    torch.testing.assert_close(step.raw(embedding), noise - step.latents)
    torch.testing.assert_close(step(embedding), normalize(noise - step.latents))
    assert torch.equal(step.latents, seeding.latents((4, 16, 16), samples=3, seed=1))


@pytest.mark.parametrize(("protocol", "swapped"), [("released", True), ("paper", False)])
def test_order_of_the_guidance_halves(random_pipe, protocol, swapped):
    step = first_step(random_pipe, settings=GUIDED, protocol=protocol)
    plain = dataclasses.replace(step, guidance=0.0)
    text, empty = (plain.raw(embed(random_pipe, [prompt])) + plain.latents for prompt in ("a", ""))
    noise = text + 7 * (empty - text) if swapped else empty + 7 * (text - empty)
    expected = noise - step.latents
    torch.testing.assert_close(step.raw(embed(random_pipe, ["a"])), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [SETTINGS, GUIDED])
def test_a_part_of_the_seeds_gives_the_same_numbers(random_pipe, settings):
    step = first_step(random_pipe, settings=settings)
    embedding = embed(random_pipe, ["a"])
    torch.testing.assert_close(step(embedding, seeds=[2, 0]), step(embedding)[[2, 0]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [SETTINGS, GUIDED])
def test_several_neuron_sets_in_one_batch(random_pipe, passes, settings):
    step, embedding = first_step(random_pipe, settings=settings), embed(random_pipe, ["a"])
    sets = [NEURONS, NeuronSet.empty(7), NeuronSet.full((8, 8, 16, 16, 16, 16, 16))]
    evaluations = Evaluations()
    together = step.many(embedding, neurons=sets, seeds=[0, 2], evaluations=evaluations)
    assert together.shape == (3, 2, 4, 16, 16)
    assert len(passes) == 1
    assert evaluations.total == 3 * 2 * step.cost
    for maps, neurons in zip(together, sets, strict=True):
        torch.testing.assert_close(maps, step(embedding, neurons=neurons, seeds=[0, 2]), atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-4


def test_normalization_is_per_sample_and_channel():
    differences = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    before = differences.clone()
    maps = normalize(differences)
    assert torch.equal(differences, before)
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


def test_a_model_that_does_not_predict_the_noise():
    with pytest.raises(ValueError, match="the model predicts 'v_prediction'"):
        timestep_of(DDIMScheduler(prediction_type="v_prediction"), steps=50, index=0)


def test_half_precision_models_return_float32(random_pipe):
    import copy

    unet = copy.deepcopy(random_pipe.unet).to(torch.bfloat16)
    step = FirstStep(unet, 961, seeding.latents((4, 16, 16), samples=2, seed=1))
    differences = step(embed(random_pipe, ["a"]))
    assert differences.dtype == torch.float32
    full = first_step(random_pipe, settings=SETTINGS)(embed(random_pipe, ["a"]), seeds=[0, 1])
    assert (differences - full).abs().max() < 0.1


@pytest.mark.parametrize(
    ("seeds", "message"), [([], "no seeds were given"), ([0, 3], "latents are 0 to 2"), ([-1], "latents are 0 to 2")]
)
def test_impossible_seeds(random_pipe, seeds, message):
    with pytest.raises(ValueError, match=message):
        noise_differences(random_pipe, "a", settings=SETTINGS, seeds=seeds)


def test_impossible_first_step(random_pipe):
    latents = seeding.latents((4, 16, 16), samples=2, seed=1)
    with pytest.raises(ValueError, match="needs the embedding of the empty prompt"):
        FirstStep(random_pipe.unet, 961, latents, guidance=7.0)
    with pytest.raises(ValueError, match=r"expected \[seed, channel, height, width\]"):
        FirstStep(random_pipe.unet, 961, latents[0])
    with pytest.raises(ValueError, match="expected that of one prompt"):
        FirstStep(random_pipe.unet, 961, latents)(embed(random_pipe, ["a", "b"]))


def test_own_latents_and_own_protocol(random_pipe):
    latents = seeding.latents((4, 16, 16), samples=2, seed=99)
    protocol = dataclasses.replace(RELEASED, timestep_index=0)
    step = first_step(random_pipe, settings=SETTINGS, protocol=protocol, latents=latents)
    assert torch.equal(step.latents, latents)
    assert step.timestep == 981
