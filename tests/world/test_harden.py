"""The fine-tuning against the attack, two steps of it on a small random model."""

import numpy as np
import pytest
import torch

from nemolib.neurons import NeuronSet
from nemolib.settings import GenerationSettings
from tests.beyond import by_hand
from tests.random_pipeline import WIDTHS
from tools import harden

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
CASES = [harden.Case("a b", IMAGE, NeuronSet(tuple(map(range, WIDTHS)))), harden.Case("b", IMAGE[::-1].copy(), NeuronSet.empty(len(WIDTHS)))]  # fmt: skip
SETTINGS = harden.HardenSettings(steps=2, cooldown=1, images=2, batch=3, every=1, attack_steps=(1, 2), attack_batch=2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    few = GenerationSettings(samples=2, steps=2, guidance=3.0)
    monkeypatch.setattr(harden, "generate", lambda pipe, *given, **more: _generate(pipe, *given, **more, settings=few))


_generate = harden.generate


def test_all_weights_are_trained_on_embeddings_that_attacks_found(tmp_path):
    pipe, plain = by_hand.small_pipeline(), by_hand.small_pipeline()
    harden.harden(pipe, CASES, SETTINGS, tmp_path)
    moved = [
        not torch.equal(one, other) for one, other in zip(pipe.unet.parameters(), plain.unet.parameters(), strict=True)
    ]
    assert np.mean(moved) > 0.9
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
    state = torch.load(tmp_path / "harden.checkpoint.pt", weights_only=True)
    found = state["modules"]["pool"]["found"]
    # Two attacks, each with an embedding after one and after two steps, for each of two images.
    assert found.shape[:2] == (4, 2)
    assert (found.flatten(2).norm(dim=2) > 0).all()
    assert state["log"][-1]["loss"] == pytest.approx(
        state["log"][-1]["ordinary"] + state["log"][-1]["adversarial"], rel=1e-5
    )
    with torch.no_grad():
        plain.unet.conv_in.weight.mul_(2)
    with pytest.raises(ValueError, match="checkpoint"):
        harden.harden(plain, CASES, SETTINGS, tmp_path)


def test_a_stand_in_is_what_the_model_makes_without_the_neurons(tmp_path):
    pipe = by_hand.small_pipeline()
    with_neurons = harden.surrogate_latents(pipe, harden.Case("a b", IMAGE, NeuronSet.empty(len(WIDTHS))))
    without = harden.surrogate_latents(pipe, CASES[0])
    assert without.shape == with_neurons.shape
    assert len(without) == 2
    assert not torch.equal(without, with_neurons)
