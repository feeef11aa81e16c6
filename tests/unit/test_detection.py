from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemolib import detection
from nemolib.evaluations import Evaluations
from nemolib.first_step import first_step
from nemolib.holdout import holdout_scores
from nemolib.pipeline import embed
from nemolib.protocols import PAPER, RELEASED
from nemolib.settings import DetectionSettings, SimilaritySettings

SETTINGS = DetectionSettings(samples=3, guidance=7.0)
SIMILARITY = SimilaritySettings(kernel_size=3, sigma=0.5)


@pytest.fixture
def detector(random_pipe):
    return detection.Detector(random_pipe, settings=SETTINGS, similarity=SIMILARITY, protocol="released")


@pytest.mark.parametrize("protocol", [RELEASED, PAPER])
@pytest.mark.parametrize("guidance", [0.0, 7.0])
def test_an_observation_is_the_first_step(random_pipe, detector, protocol, guidance):
    step = first_step(random_pipe, settings=replace(SETTINGS, guidance=guidance), protocol=protocol)
    found = detector.observe("red fox").raw(protocol=protocol, guidance=guidance)
    torch.testing.assert_close(found, step.raw(embed(random_pipe, ["red fox"])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", [RELEASED, PAPER])
def test_pairs_are_those_of_the_holdout_scores(random_pipe, detector, protocol):
    direct = holdout_scores(
        random_pipe, ["red fox"], settings=SETTINGS, similarity=SIMILARITY, protocol=protocol, progress=False
    )
    assert detector.observe("red fox").pairs(protocol=protocol) == pytest.approx(direct[0], abs=1e-4)


def test_the_detector_decides_where_nothing_is_said(detector):
    observation = detector.observe("red fox")
    assert np.array_equal(observation.pairs(), observation.pairs(protocol=RELEASED, guidance=7.0))


def test_every_prediction_is_made_once(detector):
    evaluations = Evaluations()
    observation = detector.observe("red fox", evaluations=evaluations)
    assert evaluations.total == 0
    for protocol in (RELEASED, PAPER):
        for guidance in (0.0, 7.0):
            observation.pairs(protocol=protocol, guidance=guidance)
    observation.guidance_norms()
    assert evaluations.total == 3 * 2 * 2  # seeds, timesteps, prompt and empty prompt
    detector.observe("red owl", evaluations=evaluations).pairs()
    assert evaluations.total == 3 * 2 * 2 + 3


def test_wens_score_of_the_first_step(random_pipe, detector):
    evaluations = Evaluations()
    norms = detection.guidance_norms(random_pipe, "red fox", steps=3, settings=SETTINGS, evaluations=evaluations)
    assert norms.shape == (3, 3)
    assert (norms >= 0).all()
    assert evaluations.total == 2 * 3 * 3
    assert norms[0] == pytest.approx(detector.observe("red fox").guidance_norms(), rel=1e-3)
    step = first_step(random_pipe, settings=replace(SETTINGS, guidance=0.0), protocol="paper")
    by_hand = (step.raw(embed(random_pipe, ["red fox"])) - step.raw(embed(random_pipe, [""]))).flatten(1).norm(dim=1)
    assert norms[0] == pytest.approx(by_hand.numpy(), rel=1e-3)


def test_later_steps_of_wens_score_depend_on_guidance(random_pipe):
    weak, strong = (
        detection.guidance_norms(random_pipe, "red fox", steps=2, guidance=guidance, settings=SETTINGS)
        for guidance in (0.0, 50.0)
    )
    assert np.array_equal(weak[0], strong[0])
    assert not np.allclose(weak[1], strong[1])


@pytest.mark.parametrize("steps", [0, 51])
def test_wens_score_needs_steps_of_the_schedule(random_pipe, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; it must be between 1 and the 50"):
        detection.guidance_norms(random_pipe, "red fox", steps=steps, settings=SETTINGS)


SCORES = st.lists(st.integers(0, 20).map(lambda value: value / 20), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_auroc_counts_pairs_that_are_in_order(memorized, unmemorized):
    pairs = [(a > b) + (a == b) / 2 for a in memorized for b in unmemorized]
    assert detection.auroc(memorized, unmemorized) == pytest.approx(np.mean(pairs))


@given(SCORES, SCORES, st.sampled_from([0.0, 0.1, 0.25, 1.0]))
def test_tpr_is_that_of_the_best_allowed_threshold(memorized, unmemorized, fpr):
    thresholds = [*memorized, *unmemorized, 2.0]
    allowed = [t for t in thresholds if np.mean(np.array(unmemorized) >= t) <= fpr]
    best = max(np.mean(np.array(memorized) >= t) for t in allowed)
    assert detection.tpr_at_fpr(memorized, unmemorized, fpr=fpr) == pytest.approx(best)


@given(SCORES, SCORES)
def test_the_best_accuracy_is_that_of_its_threshold_and_no_other_is_better(memorized, unmemorized):
    best, threshold = detection.best_accuracy(memorized, unmemorized)
    assert detection.accuracy(memorized, unmemorized, threshold=threshold) == pytest.approx(best)
    for other in np.linspace(-0.025, 1.025, 43):
        assert detection.accuracy(memorized, unmemorized, threshold=other) <= best + 1e-12


def test_accuracy_weighs_both_kinds_the_same():
    assert detection.accuracy([0.9], [0.1, 0.2, 0.3, 0.6]) == pytest.approx((1 + 0.75) / 2)


@pytest.mark.parametrize("metric", [detection.auroc, detection.tpr_at_fpr, detection.accuracy, detection.best_accuracy])
def test_metrics_need_both_kinds_and_finite_scores(metric):
    with pytest.raises(ValueError, match="no score of memorized prompts"):
        metric([], [0.1])
    with pytest.raises(ValueError, match="no score of unmemorized prompts"):
        metric([0.1], [])
    with pytest.raises(ValueError, match="score 1 of unmemorized prompts is not finite"):
        metric([0.1], [0.2, float("nan")])


def test_a_false_positive_rate_is_a_share():
    with pytest.raises(ValueError, match="fpr is 1.5"):
        detection.tpr_at_fpr([1.0], [0.0], fpr=1.5)


def test_an_interval_holds_the_value_and_is_reproducible():
    generator = np.random.default_rng(0)
    memorized, unmemorized = generator.normal(1, 1, 40), generator.normal(0, 1, 60)
    low, high = detection.interval(detection.auroc, memorized, unmemorized, resamples=100)
    assert low < detection.auroc(memorized, unmemorized) < high
    assert (low, high) == detection.interval(detection.auroc, memorized, unmemorized, resamples=100)


@pytest.fixture
def scores():
    kinds = ["vm"] * 3 + ["tm"] * 3 + ["unmemorized"] * 4 + ["ladder"]
    return pd.DataFrame({"kind": kinds, "good": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 99], "bad": [0, 1] * 5 + [99]})


def test_detection_table(scores):
    table = detection.detection_table(scores, ["good", "bad"], resamples=20)
    assert tuple(table.columns) == detection.DETECTION_COLUMNS
    assert table["memorized"].tolist() == ["vm + tm", "vm", "tm"] * 2
    assert table["prompts"].tolist() == [6, 3, 3] * 2
    good = table[table["score"] == "good"]
    assert (good[["auroc", "tpr_at_1_fpr", "accuracy"]] == 1).all().all()
    assert good["threshold"].tolist() == [3.5, 5.0, 3.5]
    assert table["auroc"].iloc[3] == 0.5
    with pytest.raises(KeyError, match="missing"):
        detection.detection_table(scores, ["missing"])


def test_the_four_switches_together_lead_from_one_protocol_to_the_other():
    for start, end in ((RELEASED, PAPER), (PAPER, RELEASED)):
        switches = {switch.name: switch for switch in detection.protocol_switches(start, 7.0)}
        assert list(switches) == ["none", "timestep", "pairs", "similarity", "all", "guidance", "order"]
        assert switches["none"].protocol == start
        for name in ("timestep_index", "swap_guidance", "threshold_pairs", "similarity"):
            assert getattr(switches["all"].protocol, name) == getattr(end, name)
        assert end.name in switches["all"].change


def test_each_switch_changes_one_thing():
    switches = {switch.name: switch for switch in detection.protocol_switches(RELEASED, 7.0)}
    changed = {"timestep": "timestep_index", "order": "swap_guidance", "pairs": "threshold_pairs"}
    changed |= {"similarity": "similarity"}
    for name, field in changed.items():
        assert switches[name].protocol == replace(RELEASED, **{field: getattr(PAPER, field)})
        assert switches[name].guidance == 7
    assert switches["guidance"].guidance == 0
    assert switches["guidance"].protocol == RELEASED
    assert [switch.guidance for switch in detection.protocol_switches(RELEASED, 0.0)] == [0, 0, 0, 0, 0, 7, 7]
