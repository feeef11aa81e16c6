import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemolib.beyond import detectors
from nemolib.beyond.denoising import text_of
from nemolib.first_step import first_step, guidance_norms
from nemolib.pipeline import embed
from nemolib.provenance import code_hash, content_hash
from nemolib.settings import RELEASED, DetectionSettings, SimilaritySettings
from nemolib.similarity import memorization_score
from tests.beyond import by_hand

WINDOW = SimilaritySettings(kernel_size=3, sigma=0.5)
COMMON = {"samples": 2, "seed": 1, "steps": 5, "guidance": 3.0}  # timesteps 801, 601, 401, 201, 1
PROMPT = "a b"
COARSE = {"similarity": WINDOW, "protocol": replace(RELEASED, similarity="ssim")}
COSTS = (2, 4, 4 + 3 * 4, 8, 20, 20, 20, 4, 8, 3 * 4)


@pytest.fixture(params=["epsilon", "v_prediction"])
def pipe(request):
    return by_hand.small_pipeline(request.param)


def score(pipe, name, **options):
    return getattr(detectors, name)(**(COMMON | options)).score(pipe, PROMPT).score


def course(pipe):
    """Return timestep, x, noise without and with the prompt for each step."""
    return list(by_hand.sampled(pipe, by_hand.start(pipe), PROMPT, 5, by_hand.follow))[:-1]


@pytest.mark.parametrize(("kind", "cost"), list(zip(detectors.DETECTORS, COSTS, strict=True)))
def test_every_detector_says_score_and_cost_and_leaves_nothing_behind(kind, cost):
    pipe = by_hand.small_pipeline()
    detector = kind(**COMMON, **(COARSE if cost == 2 else {}))
    before = by_hand.traces(pipe)
    found = detector.score(pipe, PROMPT)
    assert found.evaluations == cost
    first, second = detectors.detecting(pipe, detectors=(detector, detector))([PROMPT, "c"])
    assert first[0] == first[1]
    for each, alone in ((first, found), (second, detector.score(pipe, "c"))):
        assert each[0][-1] == (pytest.approx(alone.score, rel=1e-5), cost)
    assert second[0][-1].score != pytest.approx(found.score, rel=2e-5)
    pipe.unet.conv_out.forward = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        detector.score(pipe, PROMPT)
    assert by_hand.traces(pipe) == before
    assert detector.source
    assert content_hash(detector) != content_hash(replace(detector, seed=9))
    assert len(code_hash(detectors.detecting)) == 64


@pytest.mark.parametrize("measure", ["ms_ssim", "ssim"])
def test_noise_similarity_and_guidance_norm_are_those_of_the_package(measure):
    pipe, protocol = by_hand.small_pipeline(), replace(RELEASED, similarity=measure)
    settings = DetectionSettings(seed=1, samples=10, steps=50)
    differences = first_step(pipe, settings=settings, protocol=protocol)(embed(pipe, [PROMPT]))
    expected = memorization_score(differences, settings=WINDOW, protocol=protocol)
    found = detectors.NoiseSimilarity(protocol=protocol, similarity=WINDOW).score(pipe, PROMPT).score
    assert found == pytest.approx(expected, abs=1e-6)
    assert expected > 0
    norms = guidance_norms(pipe, PROMPT, steps=3, settings=replace(settings, samples=2))
    assert score(pipe, "GuidanceNorm", first=3, steps=50, guidance=7.5) == pytest.approx(norms.mean(), rel=1e-4)


def test_sharpness_by_finite_differences(pipe):
    x, sigma = by_hand.start(pipe), (1 - pipe.scheduler.alphas_cumprod[801]).sqrt()
    direction = -by_hand.difference(pipe, x, 801, PROMPT) / sigma
    h = 0.05 / direction.flatten(1).norm(dim=1).max()
    up, down = (-by_hand.difference(pipe, x + step * direction, 801, PROMPT) / sigma for step in (h, -h))
    expected = ((up - down) / (2 * h)).flatten(1).norm(dim=1).mean()
    assert score(pipe, "Sharpness") == pytest.approx(float(expected), rel=2e-2)


def test_anisotropy_pixel_by_pixel(pipe):
    x = by_hand.start(pipe)
    empty, moved = by_hand.noise(pipe, x, 401, embed(pipe, [""])), by_hand.difference(pipe, x, 401, PROMPT)
    pixels = [each.movedim(1, -1).reshape(-1, 4) for each in (empty, moved)]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(*pixels, strict=True)]
    norm = float(by_hand.difference(pipe, x, 801, PROMPT).flatten(1).norm(dim=1).mean())
    found = score(pipe, "Anisotropy", weights=(0.5, 3.0))
    assert found == pytest.approx(0.5 * norm + 3 * np.mean(cosines), abs=1e-3)


def test_bright_ending_and_entropies_from_the_probabilities_of_diffusers(pipe):
    end = text_of(pipe, PROMPT).end
    layers = [by_hand.attention(pipe, x, timestep, PROMPT) for timestep, x, *_ in course(pipe)]
    full = [weights for name, weights in layers[-1].items() if name.startswith("down_blocks.0.")]
    bright = np.mean([float(weights[..., end].mean()) for weights in full])
    assert score(pipe, "BrightEnding") == pytest.approx(bright, rel=1e-4)

    def entropy(values):
        return -sum(p * math.log(p) for p in values)

    tokens = np.array([[each.mean(dim=(1, 2)).tolist() for each in step.values()] for step in layers])
    early = np.mean([entropy(seed) for seed in tokens[0, 3]])
    assert score(pipe, "EarlyEntropy") == pytest.approx(early, rel=1e-4)
    first, last = tokens.mean(axis=1)[[0, -1]]  # each [seed, token]
    changes = [abs(entropy(b[end:]) - entropy(a[end:])) for a, b in zip(first, last, strict=True)]
    late = np.mean([entropy(seed) for seed in last]) + np.mean(changes)
    assert score(pipe, "LateEntropy") == pytest.approx(late, rel=1e-4)


def test_entropy_of_three_tokens():
    found = detectors.entropy(torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
    assert found.tolist() == pytest.approx([1.5 * math.log(2), 0.0])


def test_local_norm_looks_where_the_mask_is_bright(pipe, monkeypatch):
    mask = torch.zeros(2, 16, 16)
    mask[:, 3, 5] = 0.5
    monkeypatch.setattr(detectors.denoising, "mean_attention", lambda *_: mask)
    norms = [float((text - empty)[:, :, 3, 5].norm(dim=1).mean()) for *_, empty, text in course(pipe)]
    assert score(pipe, "LocalNorm") == pytest.approx(np.mean(norms) * 16 * 16, rel=1e-3)


def test_detectors_that_look_at_a_sampling_share_it_and_others_measure_for_themselves():
    pipe, passes = by_hand.small_pipeline(), []
    kinds = [detectors.BrightEnding, detectors.LocalNorm, detectors.LateEntropy, detectors.GuidanceNorm]
    each = [kind(**COMMON) for kind in kinds]
    alone = [one.scores(pipe, [PROMPT])[0] for one in each]
    pipe.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *a, **k: passes.append(1) or forward(*a, **k)
    assert detectors.detecting(pipe, detectors=tuple(each))([PROMPT]) == [tuple(alone)]
    assert len(passes) == 5 + 1
    other = replace(each[0], seed=2)
    assert detectors.detecting(pipe, detectors=(each[0], other))([PROMPT])[0][1] == other.scores(pipe, [PROMPT])[0]


def test_scores_with_few_latents_are_those_of_the_first_ones():
    pipe = by_hand.small_pipeline()
    for kind, options in (
        (detectors.GuidanceNorm, {}),
        (detectors.LateEntropy, {}),
        (detectors.NoiseSimilarity, COARSE),
    ):
        detector = kind(**COMMON | {"samples": 3} | options)
        (found,) = detector.scores(pipe, [PROMPT])
        assert [said.evaluations for said in found] == [
            detector.score(pipe, PROMPT).evaluations * number // 3 for number in range(detector.least, 4)
        ]
        for number, said in enumerate(found, start=detector.least):
            assert said.score == pytest.approx(replace(detector, samples=number).score(pipe, PROMPT).score, rel=1e-3)


def test_prediction_change_between_two_steps(pipe):
    texts = [text for *_, text in course(pipe)]
    for index in (0, 1):
        expected = ((texts[index + 1] - texts[index]) ** 2).sum(dim=(1, 2, 3)).mean()
        assert score(pipe, "PredictionChange", index=index) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_energy_gradient_by_finite_differences(kind):
    pipe, h, expected = by_hand.small_pipeline(kind, side=4), 0.02, []
    for x in by_hand.start(pipe).split(1):
        around = torch.cat([x + step * each.view_as(x) for step in (h, -h) for each in torch.eye(64)])
        text, empty = (by_hand.noise(pipe, around, 801, embed(pipe, [each])).double() for each in (PROMPT, ""))
        up, down = ((text**2 - empty**2).sum(dim=(1, 2, 3)) / 2).chunk(2)
        expected.append(float((((up - down) / (2 * h)) ** 2).sum()))
    assert score(pipe, "EnergyGradient") == pytest.approx(np.mean(expected), rel=2e-2)


@given(st.lists(st.floats(-5, 5), min_size=20, max_size=80), st.sampled_from([0.5, 0.9, 0.95]))
def test_few_unmemorized_prompts_are_above_the_threshold(scores, quantile):
    limit, values = detectors.quantile_threshold(scores, quantile=quantile), np.array(scores)
    assert (values > limit).mean() <= 1 - quantile + 1e-9
    assert (values >= limit).mean() > 1 - quantile - 1 / len(scores) - 1e-9
    with pytest.raises(ValueError, match="needs at least 100"):
        detectors.quantile_threshold(scores)
