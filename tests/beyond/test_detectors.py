import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemolib.beyond import detectors as module
from nemolib.beyond.denoising import text_of
from nemolib.beyond.detectors import (
    DETECTORS,
    Anisotropy,
    BrightEnding,
    EarlyEntropy,
    EnergyGradient,
    GuidanceNorm,
    LateEntropy,
    LocalNorm,
    NoiseSimilarity,
    PredictionChange,
    Sharpness,
    detecting,
    entropy,
    quantile_threshold,
)
from nemolib.first_step import first_step, guidance_norms
from nemolib.pipeline import embed
from nemolib.provenance import code_hash, content_hash
from nemolib.settings import RELEASED, DetectionSettings, SimilaritySettings
from nemolib.similarity import memorization_score
from tests.beyond import by_hand

KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
WINDOW = SimilaritySettings(kernel_size=3, sigma=0.5)
COMMON = {"samples": 2, "seed": 1, "steps": 5, "guidance": 3.0}
PROMPT = "a b"
EVALUATIONS = {
    "noise similarity": 2,
    "guidance norm": 4,
    "sharpness": 4 + 3 * 4,
    "anisotropy": 8,
    "bright ending": 20,
    "local guidance norm": 40,
    "late attention entropy": 20,
    "early attention entropy": 4,
    "prediction change": 8,
    "energy gradient": 3 * 4,
}


def made(kind):
    return kind(**COMMON, similarity=WINDOW, measure="ssim") if kind is NoiseSimilarity else kind(**COMMON)


def follow(index, timestep, empty, text):
    return empty + COMMON["guidance"] * (text - empty)


def course(pipe, x, until=None):
    return list(by_hand.sampled(pipe, x, PROMPT, COMMON["steps"], follow))[:-1][:until]


@pytest.mark.parametrize("kind", DETECTORS, ids=lambda kind: kind.name)
def test_every_detector_says_a_finite_score_and_its_cost_and_leaves_nothing_behind(kind):
    pipe, detector = by_hand.small_pipeline(), made(kind)
    before = by_hand.traces(pipe)
    found = detector.score(pipe, PROMPT)
    assert found.evaluations == EVALUATIONS[detector.name]
    assert detecting(pipe, detector=detector)([PROMPT, "c"])[0] == (found.score, found.evaluations)
    assert detector.score(pipe, "c").score != found.score
    velocity = detector.score(by_hand.small_pipeline("v_prediction"), PROMPT)
    assert math.isfinite(velocity.score)
    # The network's own attention at x_T does not know what its output means.
    assert (velocity.score == found.score) == (kind is EarlyEntropy)
    with pytest.raises(KeyboardInterrupt):
        pipe.unet.conv_out.forward = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        detector.score(pipe, PROMPT)
    assert by_hand.traces(pipe) == before
    assert detector.source
    assert content_hash(detector) != content_hash(replace(detector, seed=9))
    assert len(code_hash(detecting)) == 64


def test_memory_that_runs_out_makes_batches_smaller_and_changes_no_score(monkeypatch):
    pipe = by_hand.small_pipeline()
    expected = Sharpness(**COMMON).score(pipe, PROMPT)
    plain = pipe.unet.conv_in.forward

    def scarce(x):
        if len(x) > 2:
            raise RuntimeError("not enough memory")
        return plain(x)

    monkeypatch.setattr(pipe.unet.conv_in, "forward", scarce)
    with pytest.warns(UserWarning, match="sharpness: out of memory with 2 at once"):
        assert Sharpness(**COMMON).score(pipe, PROMPT).score == pytest.approx(expected.score, rel=1e-4)


@pytest.mark.parametrize("measure", ["ms_ssim", "ssim"])
def test_noise_similarity_is_the_memorization_score(measure):
    pipe, protocol = by_hand.small_pipeline(), replace(RELEASED, similarity=measure)
    settings = DetectionSettings(seed=1, samples=10, steps=50)
    differences = first_step(pipe, settings=settings, protocol=protocol)(embed(pipe, [PROMPT]))
    expected = memorization_score(differences, settings=WINDOW, protocol=protocol)
    assert expected > 0
    found = NoiseSimilarity(samples=10, measure=measure, similarity=WINDOW).score(pipe, PROMPT)
    assert found.score == pytest.approx(expected, abs=1e-6)


def test_guidance_norm_is_wens():
    pipe, settings = by_hand.small_pipeline(), DetectionSettings(seed=1, samples=2, steps=5)
    expected = guidance_norms(pipe, PROMPT, steps=3, settings=settings).mean()
    found = GuidanceNorm(samples=2, steps=5, guidance=7.5, first=3).score(pipe, PROMPT)
    assert found.score == pytest.approx(expected, rel=1e-4)
    assert found.evaluations == 3 * 2 * 2


@KINDS
def test_sharpness_by_finite_differences(kind):
    pipe = by_hand.small_pipeline(kind)
    x, timestep = by_hand.start(pipe), 801
    sigma = (1 - pipe.scheduler.alphas_cumprod[timestep]).sqrt()

    def score(x):
        return -by_hand.difference(pipe, x, timestep, PROMPT) / sigma

    direction = score(x)
    h = 0.05 / direction.flatten(1).norm(dim=1).max()
    derivative = (score(x + h * direction) - score(x - h * direction)) / (2 * h)
    expected = derivative.flatten(1).norm(dim=1).mean()
    assert Sharpness(**COMMON).score(pipe, PROMPT).score == pytest.approx(float(expected), rel=2e-2)


@KINDS
def test_anisotropy_pixel_by_pixel(kind):
    pipe = by_hand.small_pipeline(kind)
    x = by_hand.start(pipe)
    empty = by_hand.noise(pipe, x, 401, embed(pipe, [""]))  # the last but two of 801, 601, 401, 201, 1
    moved = by_hand.difference(pipe, x, 401, PROMPT)
    cosines = [
        float(torch.dot(a, b) / (a.norm() * b.norm()))
        for a, b in zip(empty.movedim(1, -1).reshape(-1, 4), moved.movedim(1, -1).reshape(-1, 4), strict=True)
    ]
    norm = by_hand.difference(pipe, x, 801, PROMPT).flatten(1).norm(dim=1).mean()
    found = Anisotropy(**COMMON, weights=(0.5, 3.0)).score(pipe, PROMPT)
    assert found.score == pytest.approx(0.5 * float(norm) + 3 * np.mean(cosines), abs=1e-3)


def test_bright_ending_and_entropies_from_the_probabilities_of_diffusers():
    pipe = by_hand.small_pipeline()
    end, steps = text_of(pipe, PROMPT).end, course(pipe, by_hand.start(pipe))
    layers = [by_hand.attention(pipe, x, timestep, PROMPT) for timestep, x, *_ in steps]
    full = [weights for name, weights in layers[-1].items() if name.startswith("down_blocks.0.")]
    bright = np.mean([float(weights[..., end].mean()) for weights in full])
    assert BrightEnding(**COMMON).score(pipe, PROMPT).score == pytest.approx(bright, rel=1e-4)
    tokens = [[weights.mean(dim=(1, 2)).tolist() for weights in each.values()] for each in layers]  # step, layer, seed

    def plain(values):
        return -sum(p * math.log(p) for p in values)

    early = np.mean([plain(seed) for seed in tokens[0][3]])
    assert EarlyEntropy(**COMMON).score(pipe, PROMPT).score == pytest.approx(early, rel=1e-4)
    mean = np.array(tokens).mean(axis=1)  # step, seed, token
    late = [
        plain(seed) + abs(plain(seed[end:]) - plain(first[end:])) for seed, first in zip(mean[-1], mean[0], strict=True)
    ]
    assert LateEntropy(**COMMON).score(pipe, PROMPT).score == pytest.approx(np.mean(late), rel=1e-4)


def test_entropy_of_three_tokens():
    found = entropy(torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
    assert found.tolist() == pytest.approx([1.5 * math.log(2), 0.0])


def test_local_norm_looks_where_the_mask_is_bright(monkeypatch):
    pipe = by_hand.small_pipeline()
    mask = torch.zeros(2, 16, 16)
    mask[:, 3, 5] = 0.5
    monkeypatch.setattr(module, "bright_ending", lambda *_: mask)
    differences = [(text - empty)[:, :, 3, 5] for _, _, empty, text in course(pipe, by_hand.start(pipe))]
    expected = np.mean([float(each.norm(dim=1).mean()) for each in differences]) * 16 * 16
    assert LocalNorm(**COMMON).score(pipe, PROMPT).score == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("index", [0, 1])
def test_prediction_change_between_two_steps(index):
    pipe = by_hand.small_pipeline()
    texts = [text for *_, text in course(pipe, by_hand.start(pipe), until=3)]
    expected = ((texts[index + 1] - texts[index]) ** 2).sum(dim=(1, 2, 3)).mean()
    found = PredictionChange(**COMMON, index=index).score(pipe, PROMPT)
    assert found.score == pytest.approx(float(expected), rel=1e-3)


@KINDS
def test_energy_gradient_by_finite_differences(kind):
    pipe, h = by_hand.small_pipeline(kind, side=4), 0.02
    expected = []
    for x in by_hand.start(pipe).split(1):
        around = torch.cat([x + sign * h * each.view_as(x) for sign in (1, -1) for each in torch.eye(64)])
        energies = [
            by_hand.noise(pipe, around, 801, embed(pipe, [each])).double().square().sum(dim=(1, 2, 3)) / 2
            for each in (PROMPT, "")
        ]
        up, down = (energies[0] - energies[1]).chunk(2)
        expected.append(float((((up - down) / (2 * h)) ** 2).sum()))
    found = EnergyGradient(**COMMON).score(pipe, PROMPT)
    assert found.score == pytest.approx(np.mean(expected), rel=2e-2)


@given(st.lists(st.floats(-5, 5), min_size=20, max_size=80), st.sampled_from([0.5, 0.9, 0.95]))
def test_few_enough_unmemorized_prompts_are_above_the_threshold(scores, quantile):
    limit = quantile_threshold(scores, quantile=quantile)
    assert limit in scores
    assert np.mean(np.array(scores) > limit) <= 1 - quantile + 1e-9
    lower = [score for score in scores if score < limit]
    if lower:
        assert np.mean(np.array(scores) > max(lower)) > 1 - quantile - 1 / len(scores) - 1e-9


@pytest.mark.parametrize(
    ("quantile", "message"), [(0.99, "99 unmemorized prompts.*at least 100"), (1.0, "between 0 and 1")]
)
def test_a_threshold_needs_enough_prompts(quantile, message):
    with pytest.raises(ValueError, match=message):
        quantile_threshold([0.0] * 99, quantile=quantile)


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match="layer is 7; the UNet has 7"):
        EarlyEntropy(layer=7).score(by_hand.small_pipeline(), PROMPT)
