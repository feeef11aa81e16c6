"""Fixtures with a random model, for this folder alone; read-only."""

import pytest


@pytest.fixture(scope="session")
def random_pipe():
    """Return a random pipeline whose value layers matter as much as those of a trained model."""
    import torch

    from nemolib.value_layers import value_layers
    from tests.random_pipeline import random_pipeline

    pipe = random_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    with torch.no_grad():
        for layer in value_layers(pipe.unet):
            layer.module.weight.mul_(20)
    return pipe


@pytest.fixture(scope="session")
def holdout_prompts():
    return [f"{first} {second}{third}" for first in "abcd" for second in "efg" for third in "hi"]


@pytest.fixture(scope="session")
def statistics(random_pipe, holdout_prompts):
    from nemolib.holdout import activation_statistics

    return activation_statistics(random_pipe, holdout_prompts, progress=False)
