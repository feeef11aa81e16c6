"""Fixtures for all tests; those of the session are read-only."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_model_folder(tmp_path_factory) -> Path:
    """Return the folder of a random pipeline in diffusers format; read-only."""
    from tests.random_pipeline import save_random_pipeline

    return save_random_pipeline(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def random_run(tmp_path_factory, random_model_folder):
    """Return a function that gives the run of a world around a random pipeline: see `tests.random_world.random_profile`."""
    from nemolib import paths
    from nemolib.pipeline import load_pipeline
    from nemolib.run import Run
    from tests.random_world import amplify, random_profile

    folder = tmp_path_factory.mktemp("world")

    def make(kinds, **settings):
        profile = random_profile(folder, random_model_folder, kinds, **settings)
        return Run(profile, amplify(load_pipeline(profile)), progress=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", folder / "build")
        patch.setattr(paths, "FIGURES", folder / "figures")
        yield make


@pytest.fixture(scope="session")
def blind_model_folder(tmp_path_factory) -> Path:
    """Return the folder of a random pipeline whose UNet has no value layers; read-only."""
    from tests.random_pipeline import save_random_pipeline

    return save_random_pipeline(tmp_path_factory.mktemp("blind") / "model", cross_attention=False)
