"""Fixtures with a random model, for this folder alone; read-only."""

import pytest


@pytest.fixture(scope="session")
def random_pipe():
    """Return a random pipeline whose value layers matter as much as those of a trained model."""
    from tests.random_pipeline import random_pipeline
    from tests.random_world import amplify

    pipe = random_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return amplify(pipe)


@pytest.fixture(scope="session")
def holdout_prompts():
    return [f"{first} {second}{third}" for first in "abcd" for second in "efg" for third in "hi"]


@pytest.fixture(scope="session")
def statistics(random_pipe, holdout_prompts):
    from nemolib.holdout import activation_statistics

    return activation_statistics(random_pipe, holdout_prompts, progress=False)
