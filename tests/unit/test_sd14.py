"""The path of profile `sd14` without its weights: the real blocks and settings, but narrow layers, smaller latents."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from nemolib import experiments, paths
from nemolib import experiments_localization as search
from nemolib.architectures import random_pipeline
from nemolib.first_step import first_step
from nemolib.holdout import ActivationStatistics, activation_statistics
from nemolib.localization import localize_many
from nemolib.pipeline import load_pipeline
from nemolib.profiles import load_profile
from nemolib.prompts import load_prompts, select
from nemolib.protocols import load_protocol
from nemolib.settings import GenerationSettings
from tests.narrow_architecture import save_narrow_architecture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = save_narrow_architecture(tmp_path_factory.mktemp("narrow"), side=48)
    dry = load_profile("sd14-dryrun")
    whole = replace(dry.generation, side=None)
    return replace(dry, name="narrow", model=f"random:{folder}", dtype="float32", generation=whole)


@pytest.fixture(scope="module")
def pipe(profile):
    return load_pipeline(profile)


@pytest.fixture(autouse=True)
def _build(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(paths, "BUILD", tmp_path_factory.getbasetemp() / "build")


def test_the_settings_are_those_of_the_paper():
    profile = load_profile("sd14")
    assert (profile.detection.samples, profile.detection.steps, profile.detection.guidance) == (10, 50, 0.0)
    assert profile.generation == GenerationSettings(seed=2, samples=10, steps=50, guidance=7.0, batch_size=10)
    assert profile.thresholds.value == 0.428
    assert profile.similarity.betas == (0.33, 0.33, 0.33)
    assert load_protocol(profile.protocol).similarity == "ms_ssim"
    assert profile.dtype == profile.device == "auto"


def test_the_dry_run_has_the_settings_of_sd14_but_for_size():
    real, dry = load_profile("sd14"), load_profile("sd14-dryrun")
    assert dry.protocol == real.protocol
    assert dry.similarity == real.similarity
    assert dry.detection == replace(real.detection, samples=2)
    assert dry.generation.guidance == real.generation.guidance
    assert dry.downloads is dry.statistics is None


def test_from_the_threshold_to_the_neurons(profile, pipe):
    normal = experiments.statistics(pipe, profile, progress=False)
    assert normal.widths == (16, 16, 32, 32, 32, 32, 32)
    assert normal.count == 8
    tau = experiments.threshold(pipe, profile, progress=False)
    assert -1 < tau < 1
    prompts = select(profile, "memorized")["caption"].tolist()
    assert len(prompts) == 2
    table = localize_many(pipe, prompts, normal, threshold=tau, progress=False)
    # The search looks at the most active neuron of each layer, and at no other.
    assert table["memorized"].all()
    assert table["k"].tolist() == [1, 1]
    assert table["initial_count"].tolist() == [7, 7]
    assert (table["neuron_count"] <= 7).all()


def test_images_are_eight_times_as_large_as_latents(profile, pipe):
    made = experiments.images(pipe, profile, select(profile, "vm")["caption"].tolist(), progress=False)
    assert made.shape == (1, 1, 384, 384, 3)


def test_what_the_notebooks_need(profile, pipe):
    """Planted images are smaller than the generated ones here, and of every size with Stable Diffusion."""
    found = search.localizations(pipe, profile, unmemorized=1, progress=False)
    assert found["kind"].tolist() == ["vm", "tm", "unmemorized"]
    change = search.deactivation(pipe, profile, found, progress=False)
    assert change[["copy_before", "copy_after", "same_seed"]].notna().all(axis=None)
    prompts = experiments.prompt_table(profile)
    assert prompts["kind"].tolist() == ["vm", "tm", "unmemorized"]
    grid = experiments.sample_grid(pipe, profile, prompts, progress=False)
    assert grid.images.shape == (3, 2, 384, 384, 3)
    assert (grid.images[2, 0] == 255).all()
    scores = experiments.scores(pipe, profile, progress=False)
    assert scores["score"].between(-1, 1).all()


def test_statistics_of_a_file_are_used(profile, pipe, tmp_path):
    given = replace(profile, statistics=str(tmp_path / "s.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"no activation statistics .*s\.safetensors; fetch them"):
        experiments.statistics(pipe, given)
    own = activation_statistics(pipe, ["a fox", "a dog", "an owl"], progress=False)
    own.save(tmp_path / "s.safetensors")
    assert experiments.statistics(pipe, given).count == 3
    torch.save((list(own.mean), list(own.std)), tmp_path / "s.pt")
    released = experiments.statistics(pipe, replace(profile, statistics=str(tmp_path / "s.pt")))
    assert all(torch.equal(a, b) for a, b in zip(released.mean, own.mean, strict=True))
    ActivationStatistics(own.mean[:2], own.std[:2]).save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="statistics of another model"):
        experiments.statistics(pipe, given)


def test_training_images_of_any_size_and_missing_ones(profile, pipe, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    names = ["a fox", "a dog", "an owl"]
    rows = "".join(f"{place};{name};http://a/{place};VM\n" for place, name in enumerate(names))
    (folder / "memorized.csv").write_text(f";Caption;URL;type\n{rows}")
    (tmp_path / "images").mkdir()
    for place, size in enumerate([(80, 60), (64, 64)]):
        Image.new("RGB", size, (40 * place, 90, 200)).save(tmp_path / "images" / f"{place}.png")
    report = "".join(f"http://a/{place},images/{place}.png\n" for place in range(2)) + "http://a/2,\n"
    (tmp_path / "images.csv").write_text("url,image\n" + report)
    table = load_prompts(folder / "memorized.csv")
    assert table["image"].tolist() == ["images/0.png", "images/1.png", ""]
    real = replace(profile, prompts=replace(profile.prompts, memorized=str(folder / "memorized.csv")))
    with pytest.raises(ValueError, match=r"training images have different sizes, such as \[\(60, 80\), \(64, 64\)\]"):
        experiments.planted_images(real, table.head(2))
    assert experiments.planted_images(real, table.head(2), size=(32, 48)).shape == (2, 32, 48, 3)
    copies = experiments.copies(pipe, real, table, progress=False)
    assert copies["copy_similarity"].notna().tolist() == [True, True, False]
    nothing = experiments.copies(pipe, real, table.assign(image=""), progress=False)
    assert nothing["copy_similarity"].isna().all()


def test_the_model_of_sd14_is_found_in_the_cache_without_network(tmp_path):
    """The cache as huggingface_hub leaves it, with narrow weights; read by another process that is offline."""
    profile = load_profile("sd14")
    repository = tmp_path / "hub" / "models--CompVis--stable-diffusion-v1-4"
    snapshot = repository / "snapshots" / profile.revision
    (tmp_path / "narrow").mkdir()
    random_pipeline(save_narrow_architecture(tmp_path / "narrow")).save_pretrained(snapshot)
    index = json.loads((snapshot / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (snapshot / "model_index.json").write_text(json.dumps(index))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(profile.revision)
    code = (
        "from nemolib.downloads import fetch_model; from nemolib.pipeline import load_pipeline\n"
        f"print(fetch_model({profile.model!r}, revision={profile.revision!r}))\n"
        "pipe = load_pipeline('sd14', device='cpu'); print(pipe.unet.config.sample_size, pipe.safety_checker)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-2:] == [str(snapshot), "16 None"]


def test_latents_are_those_of_the_release(pipe):
    latents = first_step(pipe).latents
    expected = torch.randn((2, 4, 48, 48), generator=torch.Generator().manual_seed(1))
    assert torch.equal(latents, expected)
