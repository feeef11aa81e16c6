"""What the estimate says of the stages of the notebooks, against a count of what they do in a random world."""

from contextlib import contextmanager

import pandas as pd
import pytest

from nemolib import detection, experiments
from nemolib import experiments_ablations as ablations
from nemolib import experiments_blocking as blocking
from nemolib import experiments_mitigation as mitigation
from nemolib.estimate import Counts, stages
from nemolib.layer_ablation import cross_attention_layers, down_convolutions
from nemolib.neurons import NeuronSet
from nemolib.pipeline import load_pipeline
from nemolib.profiles import profile_from_mapping
from nemolib.protocols import RELEASED
from tests.random_pipeline import WIDTHS
from tests.random_world import build_in, write_encoders, write_prompts

MEMORIZED = {"red fox card": "vm", "red owl card": "vm", "blue cat case": "tm"}
UNMEMORIZED = ["a tree", "the sea", "a house"]
COUNTS = Counts(vm=2, tm=1, unmemorized=3, holdout=4, threshold=3, quality=3)


@pytest.fixture(scope="module")
def profile(tmp_path_factory, random_model_folder):
    folder = tmp_path_factory.mktemp("world")
    return profile_from_mapping(
        {
            "name": "counted",
            "model": str(random_model_folder),
            "device": "cpu",
            "similarity": {"kernel_size": 3, "sigma": 0.5},
            "search": {"theta_start": 1000.0, "theta_min": 999.0, "theta_step": 1.0, "k_start": 1, "k_max": 1},
            "detection": {"samples": 3},
            "limits": {"ladder": 0},
            "holdout_size": 4,
            "threshold_prompts": 3,
            "extent": {"mitigated": 1, "ablated": 1, "layers": 1, "blocks": 2, "quality": 2, "quality_samples": 2},
            "generation": {"samples": 2, "steps": 2, "batch_size": 16},
            "mitigation": {"wen": {"target": 1e-6, "iterations": 2, "latents": 2}},
            "encoders": write_encoders(folder, random_model_folder),
            "prompts": write_prompts(
                folder, MEMORIZED, unmemorized=UNMEMORIZED, holdout=[f"{letter} {letter}" for letter in "abcd"]
            ),
        }
    )


@pytest.fixture(scope="module")
def pipe(profile):
    return load_pipeline(profile)


@pytest.fixture(autouse=True)
def build(tmp_path):
    """Nothing is in the store, so that everything is made."""
    with build_in(tmp_path, experiments) as folder:
        yield folder


@pytest.fixture
def found():
    """Each prompt has a neuron of its own, and others before its refinement."""
    rows = [
        {
            "kind": kind,
            "prompt": prompt,
            "initial": NeuronSet.of([(0, number), (2, number), (3, 0)], layers=7).to_json(),
            "neurons": NeuronSet.of([(0, number), (2, number)], layers=7).to_json(),
        }
        for number, (prompt, kind) in enumerate(MEMORIZED.items())
    ]
    return pd.DataFrame(rows)


@contextmanager
def counted(unet):
    """Count the latents that go through a UNet."""
    passes = []
    handle = unet.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    try:
        yield passes
    finally:
        handle.remove()


def said(profile, *names):
    """Return what the estimate says of some stages together."""
    by_name = {part.name: part.total for part in stages(profile, COUNTS)}
    return sum(by_name[name] for name in names)


def test_threshold_and_scores(pipe, profile):
    switches = detection.protocol_switches(RELEASED, 0.0)
    with counted(pipe.unet) as passes:
        experiments.switch_table(pipe, profile, switches, progress=False)
    empty = 3  # samples of the empty prompt, once
    assert sum(passes) - empty == said(profile, "memorization threshold, all protocols")
    with counted(pipe.unet) as passes:
        experiments.scores(pipe, profile, progress=False)
    assert sum(passes) - empty == said(profile, "memorization scores, all protocols")


def test_table_1(pipe, profile, found):
    first = found.groupby("kind", sort=False).head(profile.extent.mitigated)
    with counted(pipe.unet) as passes:
        settings = mitigation.mitigations(pipe, profile, first, progress=False)
        mitigation.measured(pipe, profile, first, settings, progress=False)
    shared = 2 * len(first) * 2 * 2 * 2  # all neurons active, and NeMo: two images of two steps with guidance
    steps = said(
        profile,
        "images, initial selection and random neurons",
        "images, prompt embedding adjustment",
        "images, attention scaling",
        "images, random tokens",
    )
    # A pass with gradients is one pass here, and counts for three there.
    gradients = len(first) * 2 * 2
    assert sum(passes) - shared == steps - 2 * gradients


def test_blocked_neurons(pipe, profile, found):
    sets = blocking.blocked_sets(found, WIDTHS, (1, 2, 3, 4), draws=2)
    clean = blocking.quality_prompts(profile, profile.extent.quality)
    with counted(pipe.unet) as passes:
        blocking.blocked_quality(pipe, profile, clean, sets, progress=False)
    assert sum(passes) == said(profile, "image quality")
    with counted(pipe.unet) as passes:
        blocking.block_similarity(pipe, profile, clean[:2], sets, seeds=3, progress=False)
    assert sum(passes) == said(profile, "outputs of blocks")


def test_layers(pipe, profile, monkeypatch):
    unet, prompt = pipe.unet, ["red fox card"]
    layers = [*cross_attention_layers(unet, "value"), *cross_attention_layers(unet, "key"), *down_convolutions(unet)]
    monkeypatch.setattr("nemolib.estimate.SWITCHED_LAYERS", len(layers))
    with counted(unet) as passes:
        blocking.layer_effects(pipe, profile, prompt, layers, progress=False)
    assert sum(passes) == said(profile, "layers switched off")


def test_ablations(pipe, profile):
    prompts = ablations.compared_prompts(profile, profile.extent.ablated)
    levels = ablations.threshold_levels(pipe, profile, progress=False)
    table = ablations.ablated(pipe, profile, prompts, levels, guidance=7.0, progress=False)
    default = table[table["setting"] == ablations.default_setting(levels)]
    settings = ablations.ablation_settings(table, levels)
    one, images = 2 * 2 * 2, said(profile, "ablations, images")
    assert (len(settings) - 2) * len(default) * one == images
    with counted(pipe.unet) as passes:
        mitigation.measured(pipe, profile, default, settings, progress=False)
    # With all neurons active and the default besides; equal neuron sets make their images once.
    assert 0 < sum(passes) <= images + 2 * len(default) * one
