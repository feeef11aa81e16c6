import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.stats
import torch

from nemolib import metrics


def unit(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def turned(*degrees):
    """Return unit vectors in the plane, so that cosines are known."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


# Similarities


def test_sscd_orig_by_hand():
    generated = np.stack([turned(0, 60, 90), turned(180, 0, 60)])
    found = metrics.sscd_orig(generated, turned(0, 0))
    assert found == pytest.approx(np.array([[1, 0.5, 0], [-1, 1, 0.5]]))


def test_a_prompt_without_original_stays_missing():
    originals = np.stack([turned(0)[0], [np.nan, np.nan]])
    found = metrics.sscd_orig(np.stack([turned(0, 60)] * 2), originals)
    assert found[0] == pytest.approx([1, 0.5])
    assert np.isnan(found[1]).all()
    largest = metrics.over_seeds(found, "max")
    assert largest[0] == pytest.approx(1)
    assert np.isnan(largest[1])
    assert np.isnan(metrics.over_seeds(found, median="lower")).tolist() == [False, True]
    assert metrics.memorization_rate(largest) == 1


def test_sscd_gen_compares_equal_seeds():
    found = metrics.sscd_gen([turned(0, 60)], [turned(60, 60)])
    assert found == pytest.approx(np.array([[0.5, 1]]))


def test_d_sscd_by_hand_and_by_matrix():
    assert metrics.d_sscd([turned(0, 60, 90)]) == pytest.approx(np.array([[0.5, 0, np.sqrt(3) / 2]]))
    features = unit(4, 10, 16)
    found = metrics.d_sscd(features)
    assert found.shape == (4, 45)
    matrix = features[2] @ features[2].T
    assert sorted(found[2]) == pytest.approx(sorted(matrix[np.tril_indices(10, k=-1)]))


def test_one_seed_has_no_pair():
    pairs = metrics.d_sscd(unit(3, 1, 4))
    assert pairs.shape == (3, 0)
    assert np.isnan(metrics.over_seeds(pairs)).all()


def test_a_clip_is_the_cosine_with_the_prompt():
    assert metrics.a_clip([turned(0, 60)], turned(60)) == pytest.approx(np.array([[0.5, 1]]))


def test_tensors_do_as_well():
    features = unit(2, 3, 4)
    expected = metrics.d_sscd(features)
    assert metrics.d_sscd(torch.from_numpy(features)) == pytest.approx(expected)
    assert metrics.d_sscd(torch.from_numpy(features).float()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.sscd_orig(unit(2, 3, 4), unit(3, 4)), r"\[2, 3, 4\] and \[3, 4\] do not belong"),
        (lambda: metrics.sscd_orig(unit(2, 3, 4), unit(2, 5)), r"\[2, 3, 4\] and \[2, 5\] do not belong"),
        (lambda: metrics.sscd_gen(unit(2, 3, 4), unit(2, 2, 4)), "do not belong"),
        (lambda: metrics.d_sscd(unit(3, 4)), r"shape \[3, 4\]; expected \[prompt, seed, feature\]"),
        (lambda: metrics.d_sscd(2 * unit(2, 3, 4)), "a cosine needs unit norm"),
        (lambda: metrics.over_seeds(unit(2, 3, 4)), r"expected \[prompt, seed\]"),
        (lambda: metrics.over_seeds(unit(2, 3), "min"), "reduction is 'min'; it must be one of median, max, mean"),
        (
            lambda: metrics.over_seeds(unit(2, 3), median="upper"),
            "median is 'upper'; it must be one of midpoint, lower",
        ),
        (lambda: metrics.median_over([]), "at least one value"),
        (lambda: metrics.median_mad([np.nan]), "at least one value"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Medians


def test_both_definitions_of_the_median():
    values = np.array([[4.0, 1, 3, 2], [9, 9, 0, 0]])
    assert metrics.over_seeds(values).tolist() == [2.5, 4.5]
    assert metrics.over_seeds(values, median="lower").tolist() == [2, 0]
    assert metrics.over_seeds(values, "max").tolist() == [4, 9]
    assert metrics.over_seeds(values, "mean").tolist() == [2.5, 4.5]


@pytest.mark.parametrize("number", [1, 2, 9, 10])
def test_the_lower_median_is_torchs_and_the_midpoint_numpys(number):
    values = np.random.default_rng(number).normal(size=(5, number))
    lower = torch.from_numpy(values).median(dim=1).values.numpy()
    assert np.array_equal(metrics.median_over(values, median="lower"), lower)
    assert np.array_equal(metrics.median_over(values), np.median(values, axis=1))


def test_median_absolute_deviation_is_scipys():
    values = np.random.default_rng(0).normal(size=38)
    assert metrics.median_mad(values) == pytest.approx(
        (np.median(values), scipy.stats.median_abs_deviation(values)), rel=1e-12
    )
    tensor = torch.from_numpy(values)
    median = tensor.median()
    assert metrics.median_mad(values, median="lower") == (float(median), float((tensor - median).abs().median()))


def test_memorization_rate_counts_what_is_above():
    assert metrics.memorization_rate([0.7, 0.71, 0.2, np.nan]) == pytest.approx(1 / 3)
    assert metrics.memorization_rate([0.7, 0.71, 0.2], threshold=0.1) == 1


def test_the_bootstrap_interval_is_scipys():
    values = np.random.default_rng(0).gamma(2, size=60)
    found = metrics.bootstrap_interval(values, resamples=20_000)
    other = scipy.stats.bootstrap(
        (values,), np.median, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # Both are of random draws; the quantiles of a median jump between neighbouring values.
    assert found == pytest.approx(tuple(other), abs=0.05)
    assert found == metrics.bootstrap_interval(values, resamples=20_000)
    assert found[0] < np.median(values) < found[1]
    assert metrics.bootstrap_interval([3.0] * 5) == (3, 3)


def test_a_wider_level_is_a_wider_interval():
    values = np.random.default_rng(0).normal(size=40)
    narrow, wide = metrics.bootstrap_interval(values, level=0.5), metrics.bootstrap_interval(values, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_a_summary_leaves_out_what_is_missing():
    found = metrics.summarize([1, 2, 4, np.nan])
    assert (found.prompts, found.median, found.mad) == (3, 2, 1)
    assert 1 <= found.low <= 2 <= found.high <= 4
    assert str(found) == "2.00 ± 1.00"
    assert metrics.summarize([1, 2, 3, 4], median="lower").median == 2


def test_summary_table():
    table = pd.DataFrame({"kind": ["vm", "vm", "tm", "vm"], "a": [0.1, 0.2, 0.5, 0.9], "b": [1.0, np.nan, np.nan, 3.0]})
    found = metrics.summary_table(table, ["a", "b"], resamples=10).set_index(["kind", "quantity"])
    assert found.index.tolist() == [("vm", "a"), ("vm", "b"), ("tm", "a"), ("tm", "b")]
    assert found["prompts"].tolist() == [3, 2, 1, 0]
    assert found.loc[("vm", "a"), "median"] == 0.2
    assert found.loc[("vm", "a"), "mad"] == pytest.approx(0.1)
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


def test_fid_by_hand():
    spread = np.array([[-1.0], [1.0]])  # mean 0, variance 2
    assert metrics.fid(spread, spread + 3) == pytest.approx(9)
    # (3 - 0)^2 + 2 + 8 - 2 sqrt(2 * 8)
    assert metrics.fid(spread, 2 * spread + 3) == pytest.approx(9 + 10 - 8)


def test_fid_is_computed_in_double_precision():
    # The spread is far below what float32 resolves at this distance from 0.
    real, generated = 1e4 + gaussian(50) * 1e-3, 1e4 + gaussian(50, seed=1) * 1e-3
    at_zero = metrics.fid(real - 1e4, generated - 1e4)
    assert metrics.fid(real, generated) == pytest.approx(at_zero, rel=0.05)
    assert metrics.fid(real, real) == pytest.approx(0, abs=1e-6)


def explicit_mmd(real, generated):
    """Return the unbiased squared MMD, written out."""

    def kernel(one, other):
        return (float(one @ other) / len(one) + 1) ** 3

    def within(values):
        number = len(values)
        pairs = [kernel(values[i], values[j]) for i in range(number) for j in range(number) if i != j]
        return sum(pairs) / (number * (number - 1))

    between = np.mean([[kernel(one, other) for other in generated] for one in real])
    return within(real) + within(generated) - 2 * between


def test_kid_is_the_mmd():
    real, generated = gaussian(20), gaussian(20, shift=0.5, seed=1)
    mean, deviation = metrics.kid(real, generated, subsets=3, subset_size=20)
    assert mean == pytest.approx(explicit_mmd(real, generated), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kid_draws_from_its_own_seed():
    real, generated = gaussian(30), gaussian(40, seed=1)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = metrics.kid(real, generated, subsets=4, subset_size=10)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert metrics.kid(real, generated, subsets=4, subset_size=10) == first
    assert metrics.kid(real, generated, subsets=4, subset_size=10, seed=1) != first
    assert first[1] > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.kid(gaussian(20), gaussian(30)), "20 real and 30 generated images, but at least 1000"),
        (lambda: metrics.kid(gaussian(20), gaussian(30), subset_size=1), "at least 1 subset of 2 images"),
        (lambda: metrics.fid(gaussian(1), gaussian(30)), "1 real and 30 generated images, but at least 2"),
        (lambda: metrics.fid(gaussian(9), gaussian(9, features=5)), r"\[9, 6\] and \[9, 5\]; expected twice"),
        (lambda: metrics.fid(unit(2, 3, 4), unit(2, 3, 4)), r"expected twice \[image, feature\]"),
    ],
)
def test_sets_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_torchmetrics_needs_no_inception_of_its_own(monkeypatch):
    from torchmetrics.image import fid

    monkeypatch.setattr(fid, "NoTrainInceptionV3", type("Refused", (), {}))
    assert metrics.fid(gaussian(9), gaussian(9, seed=1)) > 0
