"""``python -m tools.world`` from the package data to a pipeline folder, at a size that learns nothing."""

import subprocess
import sys

import pytest
from diffusers import StableDiffusionPipeline

from nemolib import paths
from tools.world import build
from tools.world.settings import WorldSettings


@pytest.mark.slow
def test_training_ends_with_a_pipeline_that_loads(tmp_path):
    folders = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    command = [sys.executable, "-m", "tools.world", "--small", *folders]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "o" / "model", safety_checker=None)
    assert pipe("a dog", num_inference_steps=1).images[0].size == (64, 64)
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"clip", "descriptor", "model", "planted", "prompts"}


def test_a_failed_stage_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ORDER", (("nonsense",),))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="stage nonsense failed; run `make train` again"):
        build.train(WorldSettings.small(), tmp_path)
