import dataclasses
import subprocess
import sys

import pytest

import nemolib


@pytest.mark.parametrize("name", nemolib.__all__)
def test_every_public_name_is_there_and_described(name):
    value = getattr(nemolib, name)
    assert value.__doc__
    assert name in dir(nemolib)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'nemolib' has no attribute 'deactivat'"):
        nemolib.deactivat  # noqa: B018 - the access is the test


def test_import_loads_no_heavy_package():
    code = "import sys, nemolib; print([name for name in ('torch', 'diffusers', 'pandas') if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_five_lines_with_the_settings_of_a_profile(random_model_folder, holdout_prompts):
    chosen = {"detection": {"samples": 3, "guidance": 7.0}, "similarity": {"kernel_size": 3, "sigma": 0.5}}
    profile = dataclasses.replace(nemolib.load_profile("tiny"), model=str(random_model_folder), device="cpu", **chosen)
    pipe = nemolib.load_pipeline(profile)
    stats = nemolib.activation_statistics(pipe, holdout_prompts, progress=False)
    found = nemolib.localize(pipe, "zzz", stats, threshold=0.999)
    with nemolib.deactivate(pipe, found.neurons):
        image = pipe("zzz", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert found.evaluations["A1"] == 2 * 3
    assert nemolib.first_step.first_step(pipe).timestep == 981
