import dataclasses
import shutil
from unittest.mock import Mock

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from nemolib import pipeline, settings
from nemolib.first_step import ddim
from nemolib.pipeline import embed, load_pipeline
from nemolib.settings import PAPER, RELEASED, load_profile, profile_of, protocol_of, settings_of
from tests.random_pipeline import TOKENS, random_pipeline


@pytest.fixture(scope="module")
def pipe(random_model_folder):
    return load_pipeline(random_model_folder, device="cpu")


def test_a_folder_gives_a_frozen_pipeline_that_makes_images(pipe):
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.safety_checker is None
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    images = pipe("a", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (1, 64, 64, 3)
    assert 0 <= images.min() <= images.max() <= 1


def test_a_profile_gives_model_dtype_and_device(random_model_folder):
    profile = dataclasses.replace(load_profile("tiny"), model=str(random_model_folder), dtype="bfloat16")
    pipe = load_pipeline(profile)
    assert pipe.unet.dtype == torch.bfloat16
    assert load_pipeline(profile, dtype="float32").unet.dtype == torch.float32
    assert load_pipeline(profile, dtype=torch.float16).unet.dtype == torch.float16


def test_settings_are_those_of_the_profile_else_those_of_the_paper(pipe, random_model_folder):
    profile = dataclasses.replace(load_profile("tiny"), model=str(random_model_folder))
    tiny = load_pipeline(profile)
    assert profile_of(tiny) is settings_of(tiny) is profile
    assert protocol_of(tiny) is PAPER
    assert profile_of(pipe) is None
    assert settings_of(pipe).detection == settings.DetectionSettings()
    assert protocol_of(pipe) is RELEASED
    assert protocol_of(pipe, "paper") is PAPER
    with pytest.raises(ValueError, match="unknown protocol ''"):
        protocol_of(pipe, "")


def test_files_of_a_variant_are_loaded_by_its_name(tmp_path):
    random_pipeline().save_pretrained(tmp_path / "model", variant="fp16", safe_serialization=True)
    (tmp_path / "mine.yaml").write_text(f"extends: tiny\nmodel: {tmp_path / 'model'}\nvariant: fp16\n")
    for source, variant in ((tmp_path / "model", "fp16"), (tmp_path / "mine.yaml", None)):
        weight = load_pipeline(source, device="cpu", variant=variant).unet.conv_in.weight
        assert torch.equal(weight, random_pipeline().unet.conv_in.weight)
    with pytest.raises(pipeline.PipelineError, match=r"say which variant of its files is there.*variant='fp16'"):
        load_pipeline(tmp_path / "model", device="cpu")


def test_other_pipelines_are_refused_alike(random_model_folder, tmp_path, monkeypatch):
    words = "'StableDiffusionXLPipeline'; expected 'StableDiffusionPipeline': Stable Diffusion v1 and v2"
    shutil.copytree(random_model_folder, tmp_path / "xl")
    index = tmp_path / "xl" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    with pytest.raises(pipeline.PipelineError, match=words):
        load_pipeline(tmp_path / "xl")
    asked = Mock(return_value=str(index))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    with pytest.raises(pipeline.PipelineError, match=words):
        load_pipeline("stabilityai/xl", revision="abc")
    asked.assert_called_once_with("stabilityai/xl", "model_index.json", revision="abc")
    with pytest.raises(pipeline.PipelineError, match=words):
        embed(type("StableDiffusionXLPipeline", (), {})(), ["a fox"])


def test_another_scheduler_becomes_ddim_with_its_betas(tmp_path):
    other = random_pipeline()
    other.register_modules(scheduler=PNDMScheduler.from_config(other.scheduler.config, skip_prk_steps=True))
    other.save_pretrained(tmp_path)
    scheduler = load_pipeline(tmp_path, device="cpu").scheduler
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[:2].tolist() == [981, 961]
    assert torch.equal(scheduler.betas, random_pipeline().scheduler.betas)


def test_latents_are_not_clipped_where_a_scheduler_says_nothing_of_it(tmp_path):
    other = random_pipeline()
    other.register_modules(scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1))
    assert "clip_sample" not in other.scheduler.config
    other.save_pretrained(tmp_path)
    for schedule in (load_pipeline(tmp_path, device="cpu").scheduler, ddim(other.scheduler, 2)):
        schedule.set_timesteps(2)
        noise = torch.zeros(1, 4, 2, 2)
        image = schedule.step(noise, int(schedule.timesteps[0]), noise + 5).pred_original_sample
        assert (image > 5).all()


def test_embeddings_are_those_of_the_pipeline(pipe):
    prompts = ["a fox", "", "a prompt that is much longer than the tokens of the model"]
    expected, empty = pipe.encode_prompt(prompts, pipe.device, 1, True)
    found = embed(pipe, prompts, batch_size=2)
    assert found.shape == (3, TOKENS, 16)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found[1], empty[0], atol=1e-6)
    assert not found.requires_grad


@pytest.mark.parametrize("wrong", [[], "a fox", ["a", 3]])
def test_wrong_prompts_are_named(pipe, wrong):
    with pytest.raises(ValueError, match="expected"):
        embed(pipe, wrong)


def test_loading_says_nothing_and_leaves_the_verbosity_as_it_was(random_model_folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_pipeline(random_model_folder, device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_relative_folder_starts_where_the_caller_is(random_model_folder, monkeypatch):
    monkeypatch.chdir(random_model_folder.parent)
    assert load_pipeline(random_model_folder.name, device="cpu").unet.config.sample_size == 16
    profile = dataclasses.replace(load_profile("tiny"), model=random_model_folder.name)
    with pytest.raises(pipeline.PipelineError, match="no such folder"):
        load_pipeline(profile)


def test_the_type_auto_follows_the_device(random_model_folder):
    assert load_pipeline(random_model_folder, device="cpu", dtype="auto").unet.dtype == torch.float32
    assert pipeline._dtype("auto", torch.device("cuda")) == torch.float16
    assert pipeline._dtype("auto", torch.device("mps")) == torch.float32
