"""The path of profile `sd14` without its weights: the real blocks and settings, but narrow layers, smaller latents."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import constants

from nemolib.holdout import ActivationStatistics, activation_statistics
from nemolib.pipeline import load_pipeline, random_pipeline
from nemolib.run import Run
from nemolib.settings import GenerationSettings, load_profile
from tests.narrow_architecture import save_narrow_architecture
from tools.fetch_data import fetch_model, hub_models

pytestmark = pytest.mark.slow


@pytest.fixture
def profile(tmp_path):
    (tmp_path / "architecture").mkdir()
    folder = save_narrow_architecture(tmp_path / "architecture", side=48)
    dry = load_profile("sd14-dryrun")
    return replace(dry, name="narrow", model=f"random:{folder}", dtype="float32")


def test_the_settings_are_those_of_the_paper():
    profile = load_profile("sd14")
    assert (profile.detection.samples, profile.detection.steps, profile.detection.guidance) == (10, 50, 0.0)
    assert profile.generation == GenerationSettings(seed=2, samples=10, steps=50, guidance=7.0, batch_size=10)
    assert profile.thresholds.value == 0.428
    assert profile.similarity.betas == (0.33, 0.33, 0.33)
    assert profile.protocol.similarity == "ms_ssim"
    assert profile.dtype == profile.device == "auto"


def test_the_dry_run_has_the_settings_of_sd14_but_for_size():
    real, dry = load_profile("sd14"), load_profile("sd14-dryrun")
    assert dry.protocol == real.protocol
    assert dry.similarity == real.similarity
    assert dry.detection == replace(real.detection, samples=2)
    assert dry.generation.guidance == real.generation.guidance
    assert dry.downloads is dry.statistics is None


def test_statistics_of_a_file_are_used(profile, tmp_path):
    pipe = load_pipeline(profile)
    given = Run(replace(profile, statistics=str(tmp_path / "s.safetensors")), pipe, progress=False)
    with pytest.raises(FileNotFoundError, match=r"no activation statistics .*s\.safetensors; without"):
        given.statistics  # noqa: B018 (reading it is what raises)
    own = activation_statistics(pipe, ["a fox", "a dog", "an owl"], progress=False)
    own.save(tmp_path / "s.safetensors")
    assert given.statistics.count == 3
    ActivationStatistics(own.mean[:2], own.std[:2]).save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="statistics of another model"):
        given.statistics  # noqa: B018 (reading it is what raises)


def test_the_model_of_sd14_is_found_in_the_cache_without_network(tmp_path, monkeypatch):
    """The cache as huggingface_hub leaves it, with narrow weights; tests are offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    profile = load_profile("sd14")
    repository = tmp_path / "models--CompVis--stable-diffusion-v1-4"
    snapshot = repository / "snapshots" / profile.revision
    (tmp_path / "narrow").mkdir()
    random_pipeline(save_narrow_architecture(tmp_path / "narrow")).save_pretrained(snapshot)
    index = json.loads((snapshot / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (snapshot / "model_index.json").write_text(json.dumps(index))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(profile.revision)
    assert fetch_model(*hub_models(profile)[0]) == ("present", str(snapshot))
    pipe = load_pipeline("sd14", device="cpu")
    assert (pipe.unet.config.sample_size, pipe.safety_checker) == (16, None)
