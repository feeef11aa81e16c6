"""``python -m tools.world`` from the drawings to a pipeline folder, at a size that learns nothing."""

import sys
from dataclasses import replace

import pytest
from diffusers import StableDiffusionPipeline

from tools.world import __main__ as command
from tools.world.settings import WorldSettings


def small_world() -> WorldSettings:
    default, short = WorldSettings(), {"steps": 4, "batch_size": 8}
    return WorldSettings(
        data=replace(default.data, trained_pairs=20, images_per_subject=1, images_per_pair=1, tm_copies=2),
        autoencoder=replace(default.autoencoder, **short),
        clip=replace(default.clip, **short, width=32, layers=1, heads=2),
        unet=replace(default.unet, **short, channels=(8, 8, 16, 16)),
        decoder=replace(default.decoder, **short),
        descriptor=replace(default.descriptor, **short, channels=(8, 8, 8, 8), features=16),
        classifier=replace(default.classifier, **short, channels=(8, 8, 8, 8)),
    )


@pytest.mark.slow
def test_training_ends_with_a_pipeline_that_loads(tmp_path, monkeypatch):
    work, out = tmp_path / "w", tmp_path / "o"
    measured = []
    monkeypatch.setattr(sys, "argv", ["tools.world", "--work", str(work), "--out", str(out)])
    monkeypatch.setattr(command, "WorldSettings", small_world)
    monkeypatch.setattr(command.card, "write_results", lambda *given: measured.append(given))
    command.main()
    assert measured == [(small_world(), work, out)]
    for folder in command.build.folders(work, out).values():
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        assert pipe("an owl", num_inference_steps=1).images[0].size == (64, 64)
    assert {path.name for path in (work / "models").iterdir()} == {"short", "plain", "up"}
    folders = {"classifier", "clip", "descriptor", "model", "planted", "prompts"}
    assert {path.name for path in out.iterdir()} == folders
