"""Every mitigation of Table 1 on the shipped world, with one verbatim memorized prompt."""

from dataclasses import replace

import numpy as np
import pytest

from nemolib.generation import generate
from nemolib.mitigation import AttentionScaling, EmbeddingAdjustment, RandomTokens, wen_target
from nemolib.pipeline import load_pipeline
from nemolib.prompts import select
from nemolib.settings import GenerationSettings, load_profile

pytestmark = pytest.mark.world
PROFILE = load_profile("tiny")
SETTINGS = GenerationSettings(seed=2, samples=2, steps=10, guidance=3.0)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(PROFILE)


@pytest.fixture(scope="module")
def adjustment(pipe):
    normal = select(PROFILE, "threshold")["caption"].head(40).tolist()
    return EmbeddingAdjustment(replace(PROFILE.mitigation.wen, target=wen_target(pipe, normal)))


@pytest.fixture(scope="module")
def prompt():
    return select(PROFILE, "vm")["caption"].iloc[0]


def test_the_adjustment_lowers_the_norm_of_a_memorized_prompt(pipe, adjustment, prompt):
    norms = adjustment.adjust(pipe, prompt).norms
    assert norms[0] > adjustment.settings.target
    assert norms[-1] < norms[0]


def test_images_are_no_longer_the_replay(pipe, adjustment, prompt):
    replay = generate(pipe, [prompt], settings=SETTINGS, progress=False).astype(float)
    for mitigation in (adjustment, AttentionScaling(), RandomTokens(4)):
        images = generate(pipe, [prompt], settings=SETTINGS, mitigation=mitigation, progress=False)
        assert np.abs(images - replay).mean() > 5
