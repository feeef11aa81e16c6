"""``python -m tools.world`` from the package data to a pipeline folder, at a size that learns nothing."""

import subprocess
import sys

import pytest
from diffusers import StableDiffusionPipeline

from nemolib import paths


@pytest.mark.slow
def test_training_ends_with_a_pipeline_that_loads(tmp_path):
    folders = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    command = [sys.executable, "-m", "tools.world", "--small", *folders]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "o" / "model", safety_checker=None)
    assert pipe("an owl", num_inference_steps=1).images[0].size == (64, 64)
    folders = {"classifier", "clip", "descriptor", "model", "planted", "prompts"}
    assert {path.name for path in (tmp_path / "o").iterdir()} == folders
