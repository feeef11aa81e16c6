"""Neurons moved by hand: frames are what the library computes, and a page shows them in a real browser."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nemolib import explore, paths
from nemolib.generation import generate
from nemolib.localization import localize
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import load_pipeline
from nemolib.run import Run
from nemolib.settings import Profile
from nemolib.similarity import memorization_score
from tests.browser import chromium, needs_chromium
from tests.random_world import SMALL, amplify, write_encoders, write_prompts

CAPTIONS = {"red fox card": "vm", "red owl card": "vm", "blue cat case": "tm", "odd <b> & pin": "tm"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_model_folder):
    folder = tmp_path_factory.mktemp("world")
    holdout = [f"{first} {second}" for first in "abcd" for second in "uvwxyz"]
    profile = Profile(
        model=str(random_model_folder),
        prompts=write_prompts(folder, CAPTIONS, unmemorized=["a tree"], holdout=holdout),
        holdout_size=24,
        thresholds={"value": 0.5},
        search={"theta_start": 3.0, "theta_step": 1.0, "theta_min": 1.0, "k_max": 3, "method": "sequential"},
        encoders=write_encoders(folder, random_model_folder),
        **SMALL,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", folder / "build")
        patch.setattr(paths, "FIGURES", folder / "figures")
        yield Run(profile, amplify(load_pipeline(profile)), progress=False)


@pytest.fixture(scope="module")
def found(run):
    return explore.prompts_with_neurons(run, 2)


def test_x(run):
    rows=run.prompts("vm","tm")
    for t in (0.0,0.3,0.5,0.6,0.7,.8,.9):
      for item in run.search(rows["caption"],threshold=t):
        print(t,item.prompt, item.memorized,item.unblocked_score,item.neurons, len(item.initial), item.theta, item.k, item.refined_score, item.initial_score,item.reached)
    assert 0
