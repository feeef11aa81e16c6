import math

import numpy as np
import pytest
import torch

from nemolib import generate
from nemolib.beyond.denoising import Denoising
from nemolib.beyond.guidance import (
    AdjustedNoise,
    Attenuation,
    DynamicTransition,
    Guard,
    SearchedNoise,
    StaticTransition,
    attenuated,
    guided,
)
from nemolib.pipeline import embed
from nemolib.settings import GenerationSettings
from tests.beyond import by_hand

PROMPTS, STEPS, SCALE = ["a b", "c"], 5, 3.0
MITIGATIONS = [
    StaticTransition(),
    StaticTransition(until=650, before=-2.0),
    DynamicTransition(),
    Attenuation(),
    Guard(),
    AdjustedNoise(),
    SearchedNoise(target=1e-3, learning_rate=0.2, iterations=3),
]
EACH = pytest.mark.parametrize("mitigation", MITIGATIONS, ids=lambda mitigation: mitigation.name)
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])


def latents(pipe, mitigation, prompts=PROMPTS, **options):
    x = by_hand.start(pipe, len(prompts))
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent", "latents": x} | options
    with mitigation.applied(pipe, prompts) as inputs:
        return pipe(**inputs, **options).images


def expected(pipe, rule, x=None):
    """Return the latents of each prompt, sampled by hand with a rule."""
    starts = by_hand.start(pipe) if x is None else x
    return torch.cat(
        [
            [*by_hand.sampled(pipe, one, prompt, STEPS, rule)][-1][1]
            for one, prompt in zip(starts.split(1), PROMPTS, strict=True)
        ]
    )


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


@EACH
def test_images_change_do_not_depend_on_the_batch_and_nothing_stays(mitigation):
    pipe = by_hand.small_pipeline()
    before, settings = by_hand.traces(pipe), GenerationSettings(samples=1, steps=STEPS, guidance=SCALE)
    made = generate(pipe, PROMPTS, settings=settings, mitigation=mitigation, progress=False).astype(int)
    alone = generate(pipe, PROMPTS[1:], settings=settings, mitigation=mitigation, progress=False).astype(int)
    assert abs(made[1] - alone[0]).max() <= 1
    assert abs(made - generate(pipe, PROMPTS, settings=settings, progress=False)).max() > 1

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents(pipe, mitigation, callback_on_step_end=stop)
    assert by_hand.traces(pipe) == before
    assert mitigation.source


@KINDS
def test_rules_against_sampling_by_hand(kind):
    pipe = by_hand.small_pipeline(kind)
    plain = lambda index, timestep, empty, text: empty + SCALE * (text - empty)  # noqa: E731
    with guided(pipe, lambda now: now.guided(now.guidance)):
        close(
            pipe(
                PROMPTS,
                latents=by_hand.start(pipe),
                num_inference_steps=STEPS,
                guidance_scale=SCALE,
                output_type="latent",
            ).images,
            expected(pipe, plain),
        )
    for until, before in ((500, 0.0), (650, -2.0)):
        switched = lambda i, t, empty, text: empty + (before if t > until else SCALE) * (text - empty)  # noqa: B023, E731
        close(latents(pipe, StaticTransition(until=until, before=before)), expected(pipe, switched))


def effective(rule_of, differences, *, scale=SCALE):
    """Return the guidance scale [step, image] with which a mitigation answers given sizes of the difference."""
    pipe = by_hand.small_pipeline(side=4)
    images = len(differences[0])
    embeddings, used = embed(pipe, [""] * 2 * images), []
    pipe._guidance_scale = scale
    pipe.scheduler.set_timesteps(len(differences))
    with rule_of.applied(pipe, ["a"] * images):
        for timestep, sizes in zip(pipe.scheduler.timesteps, differences, strict=True):
            output = torch.cat(
                [torch.zeros(images, 4, 4, 4), torch.tensor(sizes).view(-1, 1, 1, 1).expand(-1, 4, 4, 4)]
            )
            pipe.unet.forward = lambda *_, output=output, **__: (output,)
            half = pipe.unet(torch.zeros_like(output), timestep, encoder_hidden_states=embeddings, return_dict=False)[0]
            used.append([scale * float(row.mean()) / size for row, size in zip(half[images:], sizes, strict=True)])
    return used


def test_dynamic_transition_switches_each_image_at_its_own_first_minimum():
    differences = [[5.0, 1.0], [4.0, 2.0], [3.0, 3.0], [3.5, 2.0], [2.0, 4.0], [3.0, 4.0]]
    found = effective(DynamicTransition(before=-1.0), differences)
    np.testing.assert_allclose([row[0] for row in found], [-1, -1, -1, SCALE, SCALE, SCALE], rtol=1e-5)
    np.testing.assert_allclose([row[1] for row in found], [-1, -1, -1, -1, SCALE, SCALE], rtol=1e-5)
    rising = effective(DynamicTransition(before=1.0), [[1.0], [2.0], [3.0]])
    np.testing.assert_allclose(rising, [[1.0]] * 3, rtol=1e-5)


def test_attenuation_of_three_tokens():
    logits = torch.tensor([[[1.0, 4.0, -1.0], [9.0, 0.0, 2.0]], [[8.0, -3.0, -5.0], [7.0, -4.0, -6.0]]])[None]
    largest = [[9.0, 4.0, 2.0], [8.0, -3.0, -5.0]]
    wanted = logits.clone()
    for head, (_, second, third) in enumerate(largest):
        mean, deviation = (second + third) / 2, abs(second - third) / math.sqrt(2)
        for token, value in ((1, second), (2, third)):
            if (value - mean) / deviation > 0.5:
                wanted[0, head, :, token] *= 0.3
    assert torch.equal(attenuated(logits, alpha=0.3, threshold=0.5), wanted)
    assert (wanted != logits).nonzero()[:, 3].unique().tolist() == [1]
    assert torch.equal(attenuated(logits, alpha=0.3, threshold=5.0), logits)


def test_attenuation_leaves_the_half_without_the_prompt_alone():
    pipe, mitigation = by_hand.small_pipeline(), Attenuation(alpha=0.0, threshold=-5.0)
    model, x = Denoising(pipe), by_hand.start(pipe)
    empty, text = model.pair(x, 961, embed(pipe, PROMPTS))
    with mitigation.applied(pipe, PROMPTS):
        pairs = [model.pair(x, 961, embed(pipe, PROMPTS)), (empty, model.noise(x, 961, embed(pipe, PROMPTS)))]
    for without, with_text in pairs:
        torch.testing.assert_close(without, empty)
        assert not torch.allclose(with_text, text, rtol=1e-3)
    torch.testing.assert_close(pairs[0][1], pairs[1][1])


@KINDS
def test_guard_against_sampling_by_hand(kind):
    pipe, guard = by_hand.small_pipeline(kind), Guard(alpha=0.1, threshold=0.0, repulsion=0.5)
    x = by_hand.start(pipe)
    for image, prompt in zip(x.split(1), PROMPTS, strict=True):
        # Two steps: in the first the repulsion is r, in the second r cos(pi / 4).
        scheduler, now = by_hand.schedule(pipe, 2), image
        for timestep, away in zip(scheduler.timesteps.tolist(), (0.5, 0.5 * math.cos(math.pi / 4)), strict=True):
            empty, text = (by_hand.noise(pipe, now, timestep, embed(pipe, [each])) for each in ("", prompt))
            with Attenuation(alpha=0.1, threshold=0.0).applied(pipe, [prompt]):
                attracting = by_hand.noise(pipe, now, timestep, embed(pipe, [prompt]))
            wanted = empty + SCALE * (attracting - empty) - away * (text - empty)
            now = by_hand.step_back(scheduler, now, wanted, timestep, 2)
        close(latents(pipe, guard, [prompt], latents=image, num_inference_steps=2), now)


@KINDS
def test_noise_is_adjusted_by_its_formula(kind):
    pipe, x = by_hand.small_pipeline(kind), None
    x = by_hand.start(pipe)
    moved = []
    for now, prompt in zip(x.split(1), PROMPTS, strict=True):
        for _ in range(2):
            here = by_hand.difference(pipe, now, 801, prompt)
            away = 50 * 32 / 128 * here / here.norm()  # the norms of latents are 128 in Stable Diffusion, 32 here
            now = now - 0.7 * (by_hand.difference(pipe, now + away, 801, prompt) - here)
        moved.append(now)
    late = lambda i, t, empty, text: empty if t > 500 else empty + SCALE * (text - empty)  # noqa: E731
    close(latents(pipe, AdjustedNoise(until=500)), expected(pipe, late, torch.cat(moved)))


def test_noise_is_searched_until_the_norm_is_small():
    pipe, drawn = by_hand.small_pipeline(), []
    x = by_hand.start(pipe)
    norms = [
        float(by_hand.difference(pipe, one, 801, prompt).norm())
        for one, prompt in zip(x.split(1), PROMPTS, strict=True)
    ]
    between = sum(norms) / 2
    search, scale = SearchedNoise(target=between, learning_rate=0.05, iterations=50), pipe.unet.forward
    with search.applied(pipe, PROMPTS):
        pipe.scheduler.set_timesteps(STEPS)
        drawn = pipe.prepare_latents(2, 4, 64, 64, torch.float32, "cpu", None, latents=x)
    found = [
        float(by_hand.difference(pipe, one, 801, prompt).norm())
        for one, prompt in zip(drawn.split(1), PROMPTS, strict=True)
    ]
    for before, after, image, start in zip(norms, found, drawn, x, strict=True):
        assert after <= between
        assert torch.equal(image, start) == (before <= between)
    assert pipe.unet.forward == scale


def test_without_guidance_there_is_nothing_to_rewrite():
    pipe = by_hand.small_pipeline()
    with pytest.raises(ValueError, match="guidance scale is 1; a guidance rule needs one above 1"):
        latents(pipe, StaticTransition(), guidance_scale=1.0)
    assert by_hand.traces(pipe)[0] == []
