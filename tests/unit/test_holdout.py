import copy
import math

import numpy as np
import pytest
import torch

from nemolib.holdout import (
    ActivationStatistics,
    activation_statistics,
    holdout_scores,
    load_statistics,
    memorization_threshold,
    z_scores,
)
from nemolib.layers import value_layers
from nemolib.settings import SimilaritySettings
from tests.random_pipeline import random_unet

SMALL = SimilaritySettings(kernel_size=3, sigma=0.5)


def test_batch_size_does_not_matter_and_no_unet_pass_is_needed(random_pipe, holdout_prompts, statistics, monkeypatch):
    monkeypatch.setattr(random_pipe.unet, "forward", lambda *args, **kwargs: pytest.fail("the UNet ran"))
    small = activation_statistics(random_pipe, holdout_prompts, batch_size=5, progress=False)
    assert small.count == statistics.count == len(holdout_prompts)
    for a, b in zip(small.mean + small.std, statistics.mean + statistics.std, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="batch size is 0"):
        activation_statistics(random_pipe, holdout_prompts, batch_size=0, progress=False)
    with pytest.raises(ValueError, match="1 prompts were given; a standard deviation needs at least two"):
        activation_statistics(random_pipe, ["a"], progress=False)


def test_statistics_of_a_file(tmp_path, statistics):
    statistics.save(tmp_path / "own.safetensors")
    found = load_statistics(tmp_path / "own.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(found.mean + found.std, statistics.mean + statistics.std, strict=True))
    assert (found.count, found.model_hash) == (statistics.count, statistics.model_hash)
    with pytest.raises(FileNotFoundError, match=r"no activation statistics .*none\.safetensors; without a file"):
        load_statistics(tmp_path / "none.safetensors")


def test_files_that_hold_no_statistics(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"abc")
    for name in ("other.safetensors", "cut.safetensors"):
        with pytest.raises(ValueError, match=f"{name} holds no activation statistics"):
            load_statistics(tmp_path / name)


def test_statistics_of_another_model(statistics, random_pipe):
    unet = copy.deepcopy(random_pipe.unet)
    with torch.no_grad():
        value_layers(unet)[0].module.weight.mul_(2)
    with pytest.raises(
        ValueError, match=r"statistics of another model: layers of .* neurons \([0-9a-f]{12}\), the model has"
    ):
        statistics.check(unet)
    narrow = ActivationStatistics(statistics.mean[:2], statistics.std[:2])
    with pytest.raises(ValueError, match=r"statistics of another model: layers of \[8, 8\] neurons"):
        narrow.check(random_pipe.unet)
    with pytest.raises(ValueError, match="has no cross-attention value layers"):
        statistics.check(random_unet(cross_attention=False))
    with pytest.raises(ValueError, match="do not fit"):
        ActivationStatistics(statistics.mean, statistics.std[:2])
    with pytest.raises(ValueError, match="activation statistics: not all numbers are finite"):
        ActivationStatistics((torch.ones(2),), (torch.tensor([1.0, torch.inf]),))


def test_z_scores():
    statistics = ActivationStatistics((torch.tensor([1.0, 2.0, 3.0, 3.0]),), (torch.tensor([0.5, 1.0, 0.0, 0.0]),))
    z = z_scores(statistics, (torch.tensor([2.0, 0.0, 3.0, 4.0]),))
    assert z[0].tolist() == [2.0, -2.0, 0.0, math.inf]
    with pytest.raises(ValueError, match=r"activations of layers of \[2\] neurons, statistics of \[4\]"):
        z_scores(statistics, (torch.ones(2),))


def test_threshold_over_all_pairs_or_over_the_largest():
    scores = np.array([[0.1, 0.3], [0.2, 0.6]])
    assert memorization_threshold(scores, multiplier=0.0) == pytest.approx(0.3)
    assert memorization_threshold(scores, multiplier=0.0, protocol="paper") == pytest.approx(0.45)
    deviation = np.std([0.1, 0.3, 0.2, 0.6], ddof=1)
    assert memorization_threshold(scores) == pytest.approx(0.3 + deviation)
    assert memorization_threshold(scores, multiplier=-1.0) == pytest.approx(0.3 - deviation)


def test_threshold_of_too_few_scores():
    with pytest.raises(ValueError, match=r"expected \[prompt, pair\]"):
        memorization_threshold(np.ones(3))
    with pytest.raises(ValueError, match="1 scores were given; a threshold needs at least two"):
        memorization_threshold(np.ones((1, 45)), protocol="paper")
    with pytest.raises(ValueError, match="holdout scores: not all numbers are finite in float64"):
        memorization_threshold(np.array([[0.1, np.nan]]))


@pytest.mark.parametrize("function", [activation_statistics, holdout_scores])
def test_prompts_that_cannot_be_used(random_pipe, function):
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        function(random_pipe, [])
    with pytest.raises(ValueError, match="prompt 1 is ' '; every prompt must be a text that is not empty"):
        function(random_pipe, ["a", " "])
    with pytest.raises(ValueError, match="prompt 0 is nan"):
        function(random_pipe, [float("nan")])
    with pytest.raises(TypeError, match="one prompt was given"):
        function(random_pipe, "a prompt")
