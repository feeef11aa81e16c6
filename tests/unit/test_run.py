"""A run: what it computes is what the library computes, once, for the model as it is."""

import dataclasses
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline

from nemolib import exhibits
from nemolib import run as runs
from nemolib.encoders import CopyDescriptor
from nemolib.first_step import NORMS, guidance_norms, pairs_measure
from nemolib.generation import generate
from nemolib.holdout import activation_statistics, holdout_scores, memorization_threshold
from nemolib.layers import deactivate
from nemolib.localization import localization_table, localize
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.provenance import content_hash
from nemolib.run import Run, localize_many, open_run
from nemolib.settings import PAPER, RELEASED, Encoders, GenerationSettings
from nemolib.store import Store
from nemolib.workers import FailedPrompts
from tests.random_world import HOLDOUT

VM, CLEAN = ["red fox card", "red owl card"], ["a tree", "the sea", "my dog"]


@pytest.fixture(scope="module")
def world(random_run):
    kinds = dict.fromkeys(VM, "vm") | {"blue cat case": "tm", "odd pin": "ladder"}
    search = {"theta_start": 3.0, "theta_step": 1.0, "theta_min": 3.0, "k_max": 1}
    changes = {"unmemorized": CLEAN, "sides": {"red owl card": 48}, "search": search}
    return random_run(kinds, **changes)


@pytest.fixture
def run(world, tmp_path):
    """Return a run with nothing in its store."""
    return Run(world.profile, world.pipe, store=Store(tmp_path / "store"), progress=False)


@pytest.fixture
def asked(monkeypatch):
    """Return the sizes of the batches of each call that had to compute something."""
    sizes, real = [], runs.map_prompts

    def counted(task, batches, **settings):
        sizes.extend([list(map(len, batches))] * bool(batches))
        return real(task, batches, **settings)

    monkeypatch.setattr(runs, "map_prompts", counted)
    return sizes


def echo(pipe, *, add):
    return lambda items: [{"item": item, "add": add} for item in items]


def test_a_task_is_asked_once_for_each_item_and_what_is_common(run, asked):
    items = ["a", ("b", 1), "a"]
    first = run.compute(echo, items, label="echo", add=1)
    assert first == [{"item": "a", "add": 1}, {"item": ["b", 1], "add": 1}, {"item": "a", "add": 1}]
    assert run.compute(echo, ["a"], label="echo", add=2)[0]["add"] == 2
    assert run.compute(echo, items[::-1], label="echo", add=1) == first[::-1]
    pairs = [(name, number) for name in "cd" for number in range(3)]
    run.compute(echo, pairs, label="echo", together=lambda item: item[0], add=1)
    run.compute(echo, list("efghi"), label="echo", together=2, add=1)
    assert asked == [[1, 1], [1], [3, 3], [2, 2, 1]]


def test_another_model_has_other_results_and_one_that_cannot_be_told_has_none(run, asked):
    for factor in (1, 2, 0.5):
        run.pipe.unet.conv_out.bias.data *= factor
        run.compute(echo, ["a"], label="echo", add=1)
    assert asked == [[1], [1]]
    with (
        deactivate(run.pipe, NeuronSet.of([(0, 0)], layers=7)),
        pytest.raises(ValueError, match="results cannot be kept"),
    ):
        run.images(VM)


def test_statistics_are_those_of_the_holdout_prompts_and_kept(run, monkeypatch):
    found, direct = run.statistics, activation_statistics(run.pipe, HOLDOUT, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(found.mean + found.std, direct.mean + direct.std, strict=True))
    monkeypatch.setattr(runs, "activation_statistics", None)
    assert content_hash(run.statistics) == content_hash(found)


def test_scores_and_threshold_are_the_librarys_and_kept(run, asked):
    found, unguided = run.holdout_scores(), dataclasses.replace(run.profile.detection, guidance=0.0)
    assert found == pytest.approx(holdout_scores(run.pipe, HOLDOUT[:4], progress=False), abs=1e-4)
    assert run.threshold == memorization_threshold(found)
    assert run.threshold_at(-1.0) == memorization_threshold(found, multiplier=-1)
    given = dataclasses.replace(run.profile, thresholds={"value": 0.25})
    assert Run(given, run.pipe, progress=False).threshold == 0.25
    measures = [pairs_measure(PAPER, 0.0), pairs_measure(RELEASED, 7.0), NORMS]
    paper, released, norms = run.observe(VM[:1], measures)[0]
    direct = holdout_scores(run.pipe, VM[:1], protocol="paper", settings=unguided, progress=False)[0]
    assert paper == pytest.approx(direct, abs=1e-4)
    assert released == pytest.approx(holdout_scores(run.pipe, VM[:1], progress=False)[0], abs=1e-4)
    assert np.mean(norms) == pytest.approx(guidance_norms(run.pipe, VM[0]).mean(), rel=1e-3)
    assert np.array_equal(run.holdout_scores(), found)
    assert run.observe(VM[:1], measures[::-1]) == [[norms, released, paper]]
    assert len(asked) == 2


def test_the_search_is_the_librarys_and_kept(run, asked):
    found = run.search([*VM, "a tree"], gate=-0.9)
    direct = localize(run.pipe, VM[0], run.statistics, threshold=run.threshold, gate=-0.9)
    assert found[0].neurons == direct.neurons
    assert found[0].evaluations == direct.evaluations
    asked.clear()
    kept = {"store": run.store, "threshold": run.threshold, "gate": -0.9, "progress": False}
    kept |= {"search": "fast", "detection": run.profile.detection, "protocol": "released"}
    table = localize_many(run.pipe, [*VM, "a tree"], run.statistics, **kept)
    assert not asked
    pd.testing.assert_frame_equal(table, localization_table(found))
    with pytest.raises(ValueError, match=r"threshold is 2; a similarity is in \(-1, 1\]"):
        run.search(VM, threshold=2)


def test_images_are_the_generated_ones_and_kept(run, asked):
    captions = [*VM, "a tree"]
    off = DeactivatedNeurons({VM[0]: NeuronSet.of([(0, 0), (3, 1)], layers=7), VM[1]: NeuronSet.empty(7)})
    active, without = run.images(captions), run.images(VM, off)
    assert np.abs(active.astype(int) - generate(run.pipe, captions, progress=False)).max() <= 1
    direct = generate(run.pipe, VM[:1], mitigation=off, progress=False)
    assert np.abs(without[0].astype(int) - direct[0]).max() <= 1
    assert not np.array_equal(without[0], active[0])
    asked.clear()
    # A prompt without neurons is the untouched model's, and the size of a batch has no part in an image.
    assert np.array_equal(without[1], active[1])
    settings = dataclasses.replace(run.profile.generation, batch_size=1)
    assert np.array_equal(run.images(captions[::-1], settings=settings), active[::-1])
    assert not asked
    with pytest.raises(ValueError, match="no neurons are given for the prompt 'a tree'"):
        run.images(captions, off)


def test_planted_images_are_seen_as_they_are_and_once(run, monkeypatch):
    rows = run.prompts("vm", "unmemorized")
    assert [image.shape for image in run.planted_images(rows.head(2))] == [(64, 64, 3), (48, 48, 3)]
    assert [image.shape for image in run.planted_images(rows.head(2), size=(32, 32))] == [(32, 32, 3)] * 2
    with warnings.catch_warnings(action="error"):
        features = run.planted_features(rows)
    assert np.isfinite(features[:2]).all()
    assert np.isnan(features[2:]).all()
    assert np.isnan(run.planted_features(rows.tail(2))).all()
    monkeypatch.setattr(run.encoder("copy"), "encode", None)
    assert np.array_equal(run.planted_features(rows), features, equal_nan=True)
    assert run.rows(VM[::-1])["caption"].tolist() == VM[::-1]


def test_what_is_measured(run):
    rows = run.prompts("vm", "unmemorized")
    table = run.measure(rows)
    features = run.features("copy", rows["caption"].tolist())
    similar = features[0] @ run.planted_features(rows)[0]
    assert table["sscd_orig"].iloc[0] == pytest.approx(np.median(similar), abs=1e-6)
    assert table["sscd_orig_max"].iloc[0] == pytest.approx(similar.max(), abs=1e-6)
    assert table["d_sscd"].iloc[0] == pytest.approx(float(features[0, 0] @ features[0, 1]), abs=1e-6)
    assert table["sscd_gen"].to_numpy() == pytest.approx(1, abs=1e-6)
    assert table["a_clip"].notna().all()
    assert table.loc[rows["kind"] == "unmemorized", ["sscd_orig", "sscd_orig_max"]].isna().all().all()
    other = Run(dataclasses.replace(run.profile, encoders=Encoders()), run.pipe, progress=False)
    with pytest.raises(ValueError, match="encoders.copy"):
        other.measure(rows)


def fragile(pipe):
    def some(items):
        if any("bad" in item for item in items):
            raise ValueError("no such item")
        return items

    return some


def test_a_prompt_that_fails_loses_no_other(run, asked):
    for _ in range(2):
        with pytest.raises(FailedPrompts, match="1 prompt failed(.|\n)*'bad': ValueError: no such item"):
            run.compute(fragile, ["a", "bad", "b"], label="items", together=3)
    assert asked == [[3], [1]]
    # It is told once, whatever was asked of it.
    with pytest.raises(FailedPrompts, match="1 prompt failed"):
        run.compute(fragile, [("bad", 1), ("a", 1), ("bad", 2)], label="items")


def test_a_run_is_opened_by_name_or_made_of_any_pipeline(world, tmp_path):
    opened = open_run(world.profile, progress=False)
    assert opened.profile is world.profile
    own = Run(world.profile, opened.pipe, store=Store(tmp_path / "mine"), progress=False)
    assert own.images(["a tree"], settings=GenerationSettings(samples=1, steps=1)).shape == (1, 1, 64, 64, 3)
    assert list((tmp_path / "mine" / "drawing").iterdir())


def test_saved_tables_need_no_model(monkeypatch):
    monkeypatch.setattr(runs, "load_pipeline", lambda profile: pytest.fail(f"the model of {profile.name} was loaded"))
    run = runs.open_run("sd14")
    with pytest.raises(FileNotFoundError, match="make notebooks PROFILE=sd14"):
        run.load("scores")
    drawn = exhibits.render_all(run, write=False)
    assert all(item.reason for item in drawn)


def test_a_prompt_that_cannot_be_drawn_stops_no_features_of_others(run, monkeypatch):
    read = StableDiffusionPipeline.encode_prompt

    def encode(self, prompt, *arguments, **settings):
        if "a bad one" in prompt:
            raise ValueError("no word")
        return read(self, prompt, *arguments, **settings)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", encode)
    with pytest.raises(FailedPrompts, match="1 prompt failed(.|\n)*'a bad one': ValueError: no word"):
        run.features("copy", [VM[1], "a bad one", VM[0]])
    monkeypatch.setattr(runs, "map_prompts", lambda *_, **__: pytest.fail("drawn again"))
    assert run.features("copy", VM).shape[0] == len(VM)


@pytest.mark.parametrize("order", [1, -1])
def test_images_are_described_as_they_come_and_once(run, monkeypatch, order):
    captions, compute, seen = [*VM, *CLEAN], runs.map_prompts, []
    encoder, settings = run.encoder("copy"), dataclasses.replace(run.profile.generation, batch_size=1)
    describe = CopyDescriptor.load(run.profile.encoders.copy).describe
    monkeypatch.setattr(runs, "map_prompts", lambda task, parts, **others: compute(task, parts[::order], **others))
    monkeypatch.setattr(encoder, "describe", lambda images: seen.append(len(images)) or describe(images))
    found = run.features("copy", captions, settings=settings)
    made = run.images(captions, settings=settings)
    assert np.array_equal(found, np.stack([describe(images).numpy() for images in made]))
    assert np.array_equal(run.features("copy", captions[::-1], settings=settings), found[::-1])
    assert seen == [settings.samples] * len(captions)
