"""What the estimate says of the stages of the notebooks, against a count of what they do in a random world."""

from unittest.mock import patch

import pandas as pd
import pytest

from nemolib.experiments import ablations, holdout_threshold, memorization_score, side_effects
from nemolib.experiments import deactivate_neurons as deactivate
from nemolib.layers import check_neurons_act
from nemolib.neurons import NeuronSet
from nemolib.run import Run
from nemolib.store import Store
from tests.random_world import SMALL
from tools.estimate import stages

MEMORIZED = {"red fox card": "vm", "red owl card": "vm", "blue cat case": "tm"}
UNMEMORIZED = ["a tree", "the sea", "a house"]
COUNTS = {"vm": 2, "tm": 1, "unmemorized": 3, "holdout": 4, "threshold": 3, "quality": 3}


@pytest.fixture(scope="module")
def world(random_run):
    run = random_run(
        MEMORIZED,
        unmemorized=UNMEMORIZED,
        holdout=["a a", "b b", "c c", "d d"],
        search={"theta_start": 1000.0, "theta_min": 999.0, "theta_step": 1.0, "k_start": 1, "k_max": 1},
        detection={"samples": 3},
        generation=SMALL["generation"] | {"batch_size": 16},
        limits={"ladder": 0},
        threshold_prompts=3,
        extent={"mitigated": 1, "ablated": 1, "layers": 1, "blocks": 2, "quality": 2, "quality_samples": 2},
        mitigation={"wen": {"target": 1e-6, "iterations": 2, "latents": 2}},
    )
    check_neurons_act(run.pipe.unet)  # one small pass, which no estimate counts
    return run


@pytest.fixture
def run(world, tmp_path):
    """Return a run with nothing in its store, so that everything is made."""
    return Run(world.profile, world.pipe, store=Store(tmp_path), progress=False)


@pytest.fixture
def found():
    """Each prompt has a neuron of its own, and others before its refinement."""
    rows = []
    for number, (prompt, kind) in enumerate(MEMORIZED.items()):
        neurons = [(0, number), (2, number), (3, 0)]
        sets = (NeuronSet.of(chosen, layers=7).to_json() for chosen in (neurons, neurons[:2]))
        rows.append((kind, prompt, *sets))
    return pd.DataFrame(rows, columns=["kind", "prompt", "initial", "neurons"])


def counted(run, function, *arguments):
    """Return how many latents go through the UNet."""
    model = type(run.pipe.unet)
    # A hook, or another method of this UNet alone, would keep a run from keeping results.
    with patch.object(model, "forward", autospec=True, side_effect=model.forward) as called:
        function(run, *arguments)
    return sum(len(call.args[1]) for call in called.call_args_list)


def said(run, *names):
    """Return what the estimate says of some stages together."""
    return stages(run.profile, COUNTS).set_index("stage")["evaluations"][list(names)].sum()


def test_threshold_and_scores(run):
    empty = 3  # samples of the empty prompt, once
    passes = counted(run, holdout_threshold.switch_table)
    assert passes - empty == said(run, "memorization threshold, all protocols")
    assert counted(run, memorization_score.scores) - empty == said(run, "memorization scores, all protocols")


def test_table_1(run, found):
    first = found.groupby("kind", sort=False).head(run.profile.extent.mitigated)
    passes = counted(run, deactivate.measured, first, deactivate.settings(run, first))
    shared = 2 * len(first) * 2 * 2 * 2  # all neurons active, and NeMo: two images of two steps with guidance
    names = (
        "initial selection and random neurons",
        "prompt embedding adjustment",
        "attention scaling",
        "random tokens",
    )
    # A pass with gradients is one pass here, and counts for three there.
    gradients = len(first) * 2 * 2
    assert passes - shared == said(run, *(f"images, {name}" for name in names)) - 2 * gradients


def test_blocked_neurons(run):
    neurons = [NeuronSet.of([(layer, number // 2) for layer in range(2, 7)], layers=7).to_json() for number in range(8)]
    found = pd.DataFrame({"kind": "vm", "prompt": list("abcdefgh"), "neurons": neurons})
    sets, clean = side_effects.blocked_sets(run, found), side_effects.quality_prompts(run)
    assert counted(run, deactivate.blocked_quality, clean, sets) == said(run, "image quality")
    assert counted(run, side_effects.block_similarity, clean[:2], sets) == said(run, "outputs of blocks")


def test_layers(run, monkeypatch):
    layers = side_effects.switched_layers(run.pipe.unet, 1)
    monkeypatch.setattr("tools.estimate.SWITCHED_LAYERS", sum(map(len, layers.values())))
    passes = counted(run, side_effects.layer_effects, ["red fox card"], layers)
    assert passes == said(run, "layers switched off")


def test_ablations(run):
    prompts, levels = run.prompts("vm", "tm", most=run.profile.extent.ablated), ablations.threshold_levels(run)
    table = ablations.ablated(run, prompts, levels)
    default = table[table["setting"] == ablations.default_setting(levels)]
    settings = ablations.ablation_settings(table, levels)
    one, images = 2 * 2 * 2, said(run, "ablations, images")
    assert (len(settings) - 2) * len(default) * one == images
    passes = counted(run, deactivate.measured, default, settings)
    # With all neurons active and the default besides; equal neuron sets make their images once.
    assert 0 < passes <= images + 2 * len(default) * one
