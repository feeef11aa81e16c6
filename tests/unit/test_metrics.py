import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemolib import metrics

NAN = float("nan")


def unit(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def turned(*degrees):
    """Return unit vectors in the plane, so that cosines are known."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


# Similarities


def test_similarities_by_hand():
    assert metrics.sscd_orig([turned(0, 60, 90), turned(180, 0, 60)], turned(0, 0)) == pytest.approx(
        np.array([[1, 0.5, 0], [-1, 1, 0.5]])
    )
    assert metrics.sscd_gen([turned(0, 60)], [turned(60, 60)]) == pytest.approx(np.array([[0.5, 1]]))
    assert metrics.d_sscd([turned(0, 60, 90)]) == pytest.approx(np.array([[0.5, 0, np.sqrt(3) / 2]]))
    assert metrics.a_clip([turned(0, 60)], turned(60)) == pytest.approx(np.array([[0.5, 1]]))


def test_ten_seeds_have_45_pairs_and_one_has_none():
    features = unit(4, 10, 16)
    found = metrics.d_sscd(torch.from_numpy(features))
    assert found.shape == (4, 45)
    matrix = features[2] @ features[2].T
    assert sorted(found[2]) == pytest.approx(sorted(matrix[np.tril_indices(10, k=-1)]))
    assert np.isnan(metrics.over_seeds(metrics.d_sscd(features[:, :1]))).all()


def test_a_prompt_without_original_stays_missing():
    found = metrics.sscd_orig([turned(0, 60)] * 2, [turned(0)[0], [np.nan, np.nan]])
    assert found[0] == pytest.approx([1, 0.5])
    assert np.isnan(metrics.over_seeds(found)).tolist() == [False, True]
    assert metrics.memorization_rate([0.7, 0.71, 0.2, np.nan]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.sscd_orig(unit(2, 3, 4), unit(3, 4)), r"shape \[3, 4\]; expected \[2, 4\]"),
        (lambda: metrics.sscd_orig(unit(2, 3, 4), unit(2, 5)), r"shape \[2, 5\]; expected \[2, 4\]"),
        (lambda: metrics.sscd_gen(unit(2, 3, 4), unit(2, 1, 4)), r"expected \[2, 3, 4\]"),
        (lambda: metrics.d_sscd(unit(3, 4)), r"shape \[3, 4\]; expected \[prompt, seed, feature\]"),
        (lambda: metrics.d_sscd(2 * unit(2, 3, 4)), "a cosine needs unit norm"),
        (lambda: metrics.over_seeds(unit(2, 3, 4)), r"expected \[prompt, seed\]"),
        (lambda: metrics.median_mad([np.nan]), "at least one value"),
        (lambda: metrics.kid(gaussian(20), gaussian(30)), "20 real and 30 generated images, but at least 1000"),
        (lambda: metrics.kid(gaussian(20), gaussian(30), subset_size=1), "at least 2 images"),
        (lambda: metrics.fid(gaussian(1), gaussian(30)), "1 real and 30 generated images, but at least 2"),
        (lambda: metrics.fid(gaussian(9), gaussian(9, features=5)), r"\[9, 6\] and \[9, 5\]; expected twice"),
        (lambda: metrics.fid(unit(2, 3, 4), unit(2, 3, 4)), r"expected twice \[image, feature\]"),
        (lambda: metrics.fid(gaussian(9), NAN * gaussian(9)), "features of generated images: not all numbers"),
        (
            lambda: metrics.kid(NAN * gaussian(9), gaussian(9), subset_size=2),
            "features of real images: not all numbers",
        ),
        (lambda: metrics.d_sscd(NAN * unit(2, 3, 4)), "features: not all numbers are finite in float64"),
        (lambda: metrics.sscd_gen(unit(2, 3, 4), NAN * unit(2, 3, 4)), "features: not all numbers"),
        (lambda: metrics.sscd_orig(unit(2, 3, 4), [[NAN, 1, 0, 0]] * 2), "features of originals: not all numbers"),
        (lambda: metrics.a_clip(unit(2, 3, 4), NAN * unit(2, 4)), "features of texts: not all numbers"),
        (lambda: metrics.auroc([], [0.1]), "no score of memorized prompts"),
        (lambda: metrics.best_accuracy([0.1], []), "no score of unmemorized prompts"),
        (lambda: metrics.tpr_at_fpr([0.1], [0.2, np.nan]), "scores of unmemorized prompts: not all numbers are finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Medians


@pytest.mark.parametrize("number", [1, 2, 9, 10])
def test_medians_are_those_of_numpy_and_scipy(number):
    values = np.random.default_rng(number).normal(size=(5, number))
    assert np.array_equal(metrics.over_seeds(values), np.median(values, axis=1))
    expected = np.median(values[0]), scipy.stats.median_abs_deviation(values[0])
    assert metrics.median_mad([*values[0], np.nan]) == pytest.approx(expected, rel=1e-12)


def test_the_bootstrap_interval_is_scipys():
    values = np.random.default_rng(0).gamma(2, size=60)
    found = metrics.bootstrap_interval(values)
    other = scipy.stats.bootstrap((values,), np.median, method="percentile", rng=np.random.default_rng(1))
    # Both are of random draws; the quantiles of a median jump between neighbouring values.
    assert found == pytest.approx(tuple(other.confidence_interval), abs=0.1)
    assert found == metrics.bootstrap_interval(values)
    assert metrics.bootstrap_interval([3.0] * 5) == (3, 3)


def test_summary_table():
    table = pd.DataFrame({"kind": ["vm", "vm", "tm", "vm"], "a": [0.1, 0.2, 0.5, 0.9], "b": [1.0, np.nan, np.nan, 3.0]})
    found = metrics.summary_table(table, ["a", "b"], by=["kind"]).set_index(["kind", "quantity"])
    assert found.index.tolist() == [("vm", "a"), ("vm", "b"), ("tm", "a"), ("tm", "b")]
    assert found["prompts"].tolist() == [3, 2, 1, 0]
    assert found.loc[("vm", "a"), ["median", "mad"]].tolist() == pytest.approx([0.2, 0.1])
    assert found.loc[("vm", "a"), ["low", "high"]].between(0.1, 0.9).all()
    assert found.loc[("vm", "b"), "median"] == 2
    assert found.loc[("tm", "b")].drop("prompts").isna().all()


# Image quality


def gaussian(number, features=6, shift=0.0, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(number, features)) @ generator.normal(size=(features, features)) + shift


def test_fid_is_the_frechet_distance_of_scipy():
    real, generated = gaussian(50), gaussian(40, shift=0.5, seed=1)
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(generated.T)).real
    distance = ((real.mean(axis=0) - generated.mean(axis=0)) ** 2).sum()
    expected = distance + np.trace(np.cov(real.T) + np.cov(generated.T) - 2 * root)
    assert metrics.fid(real, generated) == pytest.approx(expected, rel=1e-9)
    spread = np.array([[-1.0], [1.0]])  # mean 0, variance 2
    # (3 - 0)^2 + 2 + 8 - 2 sqrt(2 * 8)
    assert metrics.fid(spread, 2 * spread + 3) == pytest.approx(9 + 10 - 8)


def test_fid_is_computed_in_double_precision_without_an_inception_of_torchmetrics(monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", type("Refused", (), {}))
    # The spread is far below what float32 resolves at this distance from 0.
    real, generated = 1e4 + gaussian(50) * 1e-3, 1e4 + gaussian(50, seed=1) * 1e-3
    assert metrics.fid(real, generated) == pytest.approx(metrics.fid(real - 1e4, generated - 1e4), rel=0.05)
    assert metrics.fid(real, real) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_squared_mmd():
    real, generated = gaussian(20), gaussian(20, shift=0.5, seed=1)

    def kernel(first, second):
        return (first @ second.T / 6 + 1) ** 3

    apart = ~np.eye(20, dtype=bool)
    within = kernel(real, real)[apart].mean() + kernel(generated, generated)[apart].mean()
    expected = within - 2 * kernel(real, generated).mean()
    assert metrics.kid(real, generated, subset_size=20) == pytest.approx((expected, 0), rel=1e-9, abs=1e-9)


def test_kid_draws_from_its_own_seed(monkeypatch):
    real, generated = gaussian(30), gaussian(40, seed=1)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("generators of GPUs were set"))
    with torch.device("meta"):  # nor does a default device of the session count
        first = metrics.kid(real, generated, subset_size=10)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert metrics.kid(real, generated, subset_size=10) == first
    assert first[1] > 0


# Detection

SCORES = st.lists(st.integers(0, 20).map(lambda value: value / 20), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_auroc_counts_pairs_that_are_in_order(memorized, unmemorized):
    pairs = [(a > b) + (a == b) / 2 for a in memorized for b in unmemorized]
    assert metrics.auroc(memorized, unmemorized) == pytest.approx(np.mean(pairs))


@given(SCORES, SCORES, st.sampled_from([0.0, 0.1, 0.25, 1.0]))
def test_tpr_is_that_of_the_best_allowed_threshold(memorized, unmemorized, fpr):
    thresholds = [*memorized, *unmemorized, 2.0]
    allowed = [t for t in thresholds if np.mean(np.array(unmemorized) >= t) <= fpr]
    best = max(np.mean(np.array(memorized) >= t) for t in allowed)
    assert metrics.tpr_at_fpr(memorized, unmemorized, fpr=fpr) == pytest.approx(best)


@given(SCORES, SCORES)
def test_the_best_accuracy_is_that_of_its_threshold_and_no_other_is_better(memorized, unmemorized):
    best, threshold = metrics.best_accuracy(memorized, unmemorized)
    assert metrics.accuracy(memorized, unmemorized, threshold=threshold) == pytest.approx(best)
    assert metrics.accuracy([0.9], [0.1, 0.2, 0.3, 0.6], threshold=0.5) == pytest.approx((1 + 0.75) / 2)
    for other in np.linspace(-0.025, 1.025, 43):
        assert metrics.accuracy(memorized, unmemorized, threshold=other) <= best + 1e-12


def test_an_interval_holds_the_value_and_is_reproducible():
    generator = np.random.default_rng(0)
    memorized, unmemorized = generator.normal(1, 1, 40), generator.normal(0, 1, 60)
    low, high = metrics.interval(metrics.auroc, memorized, unmemorized, resamples=100)
    assert low < metrics.auroc(memorized, unmemorized) < high
    assert (low, high) == metrics.interval(metrics.auroc, memorized, unmemorized, resamples=100)
