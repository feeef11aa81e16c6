"""Fixtures for all tests; those of the session are read-only."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_model_folder(tmp_path_factory) -> Path:
    """Return the folder of a random pipeline in diffusers format; read-only."""
    from tests.random_pipeline import save_random_pipeline

    return save_random_pipeline(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="session")
def blind_model_folder(tmp_path_factory) -> Path:
    """Return the folder of a random pipeline whose UNet has no value layers; read-only."""
    from tests.random_pipeline import save_random_pipeline

    return save_random_pipeline(tmp_path_factory.mktemp("blind") / "model", cross_attention=False)
