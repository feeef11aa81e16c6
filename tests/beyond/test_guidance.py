import math

import numpy as np
import pytest
import torch

from nemolib import generate
from nemolib.beyond import guidance
from nemolib.beyond.denoising import Denoising
from nemolib.pipeline import embed
from nemolib.settings import GenerationSettings
from tests.beyond import by_hand

PROMPTS = ["a b", "c"]
MITIGATIONS = [
    guidance.StaticTransition(),
    guidance.StaticTransition(until=650, before=-2.0),
    guidance.DynamicTransition(),
    guidance.Attenuation(),
    guidance.Guard(),
    guidance.AdjustedNoise(),
    guidance.SearchedNoise(target=1e-3, learning_rate=0.2, iterations=3),
]


@pytest.fixture(params=["epsilon", "v_prediction"])
def pipe(request):
    return by_hand.small_pipeline(request.param)


def made(pipe, mitigation, **options):
    with mitigation.applied(pipe, PROMPTS) as inputs:
        return by_hand.made(pipe, num_inference_steps=5, **(inputs | options))


def expected(pipe, rule, x=None):
    """Return the latents of each prompt, sampled by hand with a rule."""
    pairs = zip((by_hand.start(pipe) if x is None else x).split(1), PROMPTS, strict=True)
    return torch.cat([list(by_hand.sampled(pipe, one, prompt, 5, rule))[-1][1] for one, prompt in pairs])


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("mitigation", MITIGATIONS, ids=lambda mitigation: mitigation.name)
def test_images_change_do_not_depend_on_the_batch_and_nothing_stays(mitigation):
    pipe = by_hand.small_pipeline()
    before, options = by_hand.traces(pipe), {"settings": GenerationSettings(samples=1, steps=5, guidance=3.0)}
    plain, together, alone = (
        generate(pipe, prompts, mitigation=item, progress=False, **options).astype(int)
        for prompts, item in ((PROMPTS, None), (PROMPTS, mitigation), (PROMPTS[1:], mitigation))
    )
    assert abs(together[1] - alone[0]).max() <= 1
    assert abs(together - plain).max() > 1
    with pytest.raises(ZeroDivisionError):
        made(pipe, mitigation, callback_on_step_end=lambda *_: 1 / 0)
    assert by_hand.traces(pipe) == before


def test_rules_against_sampling_by_hand(pipe):
    wanted = expected(pipe, by_hand.follow)
    with guidance.guided(pipe, lambda now: now.guided(now.guidance)):
        close(by_hand.made(pipe, num_inference_steps=5), wanted)
    opposite = lambda i, timestep, x, empty, text: empty + (-2 if timestep > 650 else 3) * (text - empty)  # noqa: E731
    close(made(pipe, guidance.StaticTransition(until=650, before=-2.0)), expected(pipe, opposite))


@pytest.mark.parametrize("solver", ["own", "dpm++"])
def test_rules_follow_the_schedule_of_a_multistep_solver_too(solver):
    pipe, seen = by_hand.small_pipeline(), []
    settings = GenerationSettings(samples=1, steps=6, guidance=3.0, solver=solver)
    plain = generate(pipe, PROMPTS, settings=settings, progress=False).astype(int)

    def same(now):
        seen.append((now.index, now.steps, now.timestep))
        return now.guided(now.guidance)

    with guidance.guided(pipe, same):
        assert abs(generate(pipe, PROMPTS, settings=settings, progress=False) - plain).max() <= 1
    assert [(index, steps) for index, steps, _ in seen] == [(index, 6) for index in range(6)]
    timesteps = [timestep for *_, timestep in seen]
    # Leaving the prompt out until a timestep is leaving it out in the steps before.
    late = [timestep for timestep in timesteps if timestep <= 500]
    assert 0 < len(late) < 6
    with guidance.guided(pipe, lambda now: now.guided(now.guidance if now.index >= 6 - len(late) else 0.0)):
        wanted = generate(pipe, PROMPTS, settings=settings, progress=False).astype(int)
    found = generate(pipe, PROMPTS, settings=settings, mitigation=guidance.StaticTransition(500), progress=False)
    assert abs(found - wanted).max() <= 1
    assert abs(wanted - plain).max() > 1


def test_dynamic_transition_switches_each_image_at_its_own_first_minimum():
    pipe, sizes = by_hand.small_pipeline(side=4), [[5, 1, 1], [4, 2, 2], [3, 3, 3], [3.5, 2, 4], [2, 4, 5], [3, 4, 6]]
    pipe._guidance_scale, used = 3.0, []
    pipe.scheduler.set_timesteps(6)
    with guidance.DynamicTransition(before=-1.0).applied(pipe, ["a"] * 3):
        for timestep, changes in 2 * list(zip(pipe.scheduler.timesteps, sizes, strict=True)):  # two calls
            output = torch.zeros(6, 4, 4, 4)
            output[3:] = torch.tensor(changes).view(3, 1, 1, 1)
            pipe.unet.forward = lambda *_, output=output, **__: (output,)
            half = pipe.unet(output, timestep, encoder_hidden_states=embed(pipe, ["a"] * 6))[0][3:]
            used.append(3 * half[:, 0, 0, 0].numpy() / changes)
    np.testing.assert_allclose(
        np.array(used).T, [2 * each for each in ([-1] * 3 + [3] * 3, [-1] * 4 + [3] * 2, [-1] * 6)], rtol=1e-5
    )


def test_attenuation_of_three_tokens():
    logits = torch.tensor([[[[1.0, 4, -1], [9, 0, 2]], [[8, -3, -5], [7, -4, -6]]]])
    wanted = logits.clone()
    for head, (second, third) in enumerate([(4, 2), (-3, -5)]):  # the largest over positions
        mean, deviation = (second + third) / 2, abs(second - third) / math.sqrt(2)
        for token, value in ((1, second), (2, third)):
            if (value - mean) / deviation > 0.5:
                wanted[0, head, :, token] *= 0.3
    assert torch.equal(guidance.attenuated(logits, alpha=0.3, threshold=0.5), wanted)
    assert (wanted != logits).any()
    assert torch.equal(
        guidance.attenuated(logits, alpha=0.3, threshold=0.8), logits
    )  # of two tokens none is so far off


def test_attenuation_leaves_the_half_without_the_prompt_alone(pipe):
    model, x, embedding = Denoising(pipe), by_hand.start(pipe), embed(pipe, PROMPTS)
    empty, text = model.pair(x, 961, embedding)
    with guidance.Attenuation(alpha=0.0, threshold=-5.0).applied(pipe, PROMPTS):
        pipe._guidance_scale = 3.0  # as in a call with guidance, then in one without
        without, changed = model.pair(x, 961, embedding)
        pipe._guidance_scale = 1.0
        torch.testing.assert_close(model.noise(x, 961, embedding), changed)
    torch.testing.assert_close(without, empty)
    assert not torch.allclose(changed, text, rtol=1e-3)


def test_guard_against_sampling_by_hand(pipe):
    def rule(index, timestep, x, empty, text):
        with guidance.Attenuation(alpha=0.1, threshold=0.0).applied(pipe, ["a b"]):
            attracting = by_hand.noise(pipe, x, timestep, embed(pipe, ["a b"]))
        return empty + 3 * (attracting - empty) - 0.5 * math.cos(math.pi / 2 * index / 5) * (text - empty)

    found = made(pipe, guidance.Guard(alpha=0.1, threshold=0.0, repulsion=0.5))[:1]
    pipe._guidance_scale = 1.0  # no call with guidance
    close(found, list(by_hand.sampled(pipe, by_hand.start(pipe)[:1], "a b", 5, rule))[-1][1])


def test_noise_is_adjusted_by_its_formula(pipe):
    moved = []
    for x, prompt in zip(by_hand.start(pipe).split(1), PROMPTS, strict=True):
        for _ in range(2):
            here = by_hand.difference(pipe, x, 801, prompt)
            away = 50 * 32 / 128 * here / here.norm()  # the norms of latents are 128 in Stable Diffusion, 32 here
            x = x - 0.7 * (by_hand.difference(pipe, x + away, 801, prompt) - here)
        moved.append(x)
    late = lambda i, timestep, x, empty, text: empty if timestep > 500 else empty + 3 * (text - empty)  # noqa: E731
    close(made(pipe, guidance.AdjustedNoise(until=500)), expected(pipe, late, torch.cat(moved)))


def test_noise_is_searched_until_the_norm_is_small(pipe):
    def norms(x):
        pairs = zip(x.split(1), PROMPTS, strict=True)
        return np.array([float(by_hand.difference(pipe, one, 801, prompt).norm()) for one, prompt in pairs])

    x = by_hand.start(pipe)
    target = float(norms(x).mean())  # between the two
    search = guidance.SearchedNoise(target=target, learning_rate=0.05, iterations=50)
    with torch.inference_mode(), search.applied(pipe, PROMPTS):
        pipe.scheduler.set_timesteps(5)
        found = pipe.prepare_latents(2, 4, 64, 64, torch.float32, "cpu", None, latents=x)
    assert (norms(found) <= target).all()
    assert ((found == x).all(dim=(1, 2, 3)).numpy() == (norms(x) <= target)).all()


def test_without_guidance_there_is_nothing_to_rewrite():
    with pytest.raises(ValueError, match="guidance scale is 1; a guidance rule needs one above 1"):
        made(by_hand.small_pipeline(), guidance.StaticTransition(), guidance_scale=1.0)
