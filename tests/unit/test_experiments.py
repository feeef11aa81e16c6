import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from nemolib import experiments, paths
from nemolib.detection import guidance_norms, protocol_switches
from nemolib.encoders import CopyDescriptor, describe_samples
from nemolib.first_step import FirstStep
from nemolib.generation import generate
from nemolib.holdout import activation_statistics, holdout_scores, memorization_threshold, z_scores
from nemolib.hooks import deactivate
from nemolib.layer_ablation import cross_attention_layers, zero_layers
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed, load_pipeline
from nemolib.profiles import Encoders, profile_from_mapping
from nemolib.protocols import RELEASED
from nemolib.value_layers import value_activations, value_layers
from nemolib.workers import FailedPrompts
from tests.random_world import amplify

CAPTIONS = {
    "vm": ["red fox card", "red owl card"],
    "tm": ["blue cat case", "blue cow case"],
    "ladder": ["odd pin", "odd hat"],
    "unmemorized": ["a tree", "the sea", "my dog"],
    "holdout": [f"{first} {second}" for first in "abcd" for second in "uvwxyz"],
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory, random_model_folder):
    from PIL import Image

    folder = tmp_path_factory.mktemp("world")
    (folder / "prompts").mkdir()
    generator = np.random.default_rng(0)
    tables = {"memorized": [], "unmemorized": [], "holdout": []}
    for kind, captions in CAPTIONS.items():
        for number, caption in enumerate(captions):
            planted = kind in ("vm", "tm", "ladder")
            image = f"{kind}-{number}.png" if planted else ""
            if planted:
                Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / image)
            group = "report" if kind in ("vm", "tm") else f"rung-{number}" if planted else kind
            copies = 4**number if kind == "ladder" else 8 * planted
            tables["memorized" if planted else kind].append((caption, kind, group, copies, image))
    files = {name: folder / "prompts" / f"{name}.csv" for name in tables}
    for name, rows in tables.items():
        columns = ["caption", "kind", "group", "copies", "image"]
        pd.DataFrame(rows, columns=columns).to_csv(files[name], index=False)
    torch.manual_seed(0)
    CopyDescriptor((4, 4, 4), 8).save(folder / "descriptor")
    return profile_from_mapping(
        {
            "name": "random",
            "model": str(random_model_folder),
            "device": "cpu",
            "groups": "report",
            "prompts": {name: str(path) for name, path in files.items()},
            "holdout_size": 24,
            "threshold_prompts": 4,
            "detection": {"samples": 3, "guidance": 7.0},
            "similarity": {"kernel_size": 3, "sigma": 0.5},
            "generation": {"samples": 2, "steps": 2, "batch_size": 4},
            "encoders": {"copy": {"kind": "descriptor", "path": str(folder / "descriptor")}},
        }
    )


@pytest.fixture(scope="module")
def pipe(profile):
    return amplify(load_pipeline(profile))


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    return tmp_path


@pytest.fixture
def no_unet(monkeypatch):
    """Return a function after whose call the UNet must not run any more."""

    def refuse(*_, **__):
        raise AssertionError("the UNet ran, although everything was known")

    return lambda: monkeypatch.setattr(FirstStep, "raw", refuse)


def test_prompt_table(profile):
    table = experiments.prompt_table(profile)
    assert table["caption"].tolist() == [caption for kind in experiments.TESTED for caption in CAPTIONS[kind]]
    assert experiments.prompt_table(profile, ["ladder"])["copies"].tolist() == [1, 4]


def test_statistics_are_those_of_the_holdout_prompts_and_kept(pipe, profile, monkeypatch):
    found = experiments.statistics(pipe, profile, progress=False)
    direct = activation_statistics(pipe, CAPTIONS["holdout"], progress=False)
    assert all(torch.equal(a, b) for a, b in zip(found.mean + found.std, direct.mean + direct.std, strict=True))
    monkeypatch.setattr(experiments, "activation_statistics", None)
    again = experiments.statistics(pipe, profile, progress=False)
    assert torch.equal(again.mean[0], found.mean[0])


def test_holdout_scores_are_the_librarys_and_kept(pipe, profile, no_unet):
    found = experiments.holdout_scores(pipe, profile, progress=False)
    direct = holdout_scores(pipe, CAPTIONS["holdout"][:4], progress=False)
    assert found == pytest.approx(direct, abs=1e-4)
    no_unet()
    assert np.array_equal(experiments.holdout_scores(pipe, profile, progress=False), found)
    with pytest.raises(FailedPrompts, match="4 of 4 prompts failed(.|\n)*'a u': AssertionError: the UNet ran"):
        experiments.holdout_scores(pipe, profile, protocol="paper", progress=False)


def test_the_threshold_is_given_or_computed(pipe, profile):
    scores = experiments.holdout_scores(pipe, profile, progress=False)
    assert experiments.threshold(pipe, profile, progress=False) == memorization_threshold(scores)
    assert experiments.threshold(pipe, profile, multiplier=-1, progress=False) == memorization_threshold(
        scores, multiplier=-1
    )
    given = dataclasses.replace(profile, thresholds=dataclasses.replace(profile.thresholds, value=0.25))
    assert experiments.threshold(pipe, given, progress=False) == 0.25
    assert experiments.threshold(pipe, given, multiplier=0, progress=False) == pytest.approx(scores.mean())


def test_switch_table(pipe, profile):
    table = experiments.switch_table(pipe, profile, protocol_switches(RELEASED, 7.0), progress=False)
    rows = table.set_index("switch")
    assert rows.loc["none", "threshold"] == experiments.threshold(pipe, profile, progress=False)
    assert rows.loc["all", "threshold"] == experiments.threshold(pipe, profile, protocol="paper", progress=False)
    assert rows["difference"].iloc[0] == 0
    assert rows["threshold"].to_numpy() == pytest.approx((rows["mean"] + rows["sd"]).to_numpy())
    largest = experiments.holdout_scores(pipe, profile, progress=False).max(axis=1)
    assert rows.loc["none", "gate"] == (largest > rows.loc["none", "threshold"]).mean()


def test_gate_table(pipe, profile):
    table = experiments.gate_table(pipe, profile, [7.0, 0.0], progress=False)
    assert table.index.tolist() == table.columns.tolist() == [0.0, 7.0]
    effect = experiments.switch_table(pipe, profile, protocol_switches(RELEASED, 7.0), progress=False)
    gates = effect.set_index("switch")["gate"]
    assert table.loc[7.0, 7.0] == gates["none"]
    assert table.loc[0.0, 0.0] == gates["guidance"]


def test_pair_table():
    table = experiments.pair_table(np.arange(6.0).reshape(2, 3), samples=3)
    assert table.to_dict("list") == {
        "prompt": [0, 0, 0, 1, 1, 1],
        "first": [0, 0, 1, 0, 0, 1],
        "second": [1, 2, 2, 1, 2, 2],
        "similarity": [0, 1, 2, 3, 4, 5],
    }


def test_layer_table(pipe, profile):
    normal = experiments.statistics(pipe, profile, progress=False)
    table = experiments.layer_table(pipe, normal)
    assert table["layer"].tolist() == list(range(1, 8))
    assert table["neurons"].tolist() == list(normal.widths)
    assert table["block"].iloc[-1] == "mid_block.attentions.0"
    assert (table["sd_low"] <= table["sd"]).all()
    assert (table["sd"] <= table["sd_high"]).all()


def test_scores(pipe, profile, no_unet):
    table = experiments.scores(pipe, profile, progress=False)
    captions = table["caption"].tolist()
    direct = holdout_scores(pipe, captions, progress=False)
    assert table["score"].to_numpy() == pytest.approx(direct.max(axis=1), abs=1e-4)
    assert table["mean_pair"].to_numpy() == pytest.approx(direct.mean(axis=1), abs=1e-4)
    assert table["score_released"].tolist() == table["score"].tolist()
    paper = holdout_scores(pipe, captions[:2], protocol="paper", progress=False)
    assert table["score_paper"].to_numpy()[:2] == pytest.approx(paper.max(axis=1), abs=1e-4)
    assert table["wen"].iloc[0] == pytest.approx(guidance_norms(pipe, captions[0]).mean(), rel=1e-3)
    no_unet()
    pd.testing.assert_frame_equal(experiments.scores(pipe, profile, progress=False), table)


def test_a_killed_run_goes_on(pipe, profile, monkeypatch):
    whole = experiments.scores(pipe, profile, progress=False)
    store = experiments.open_store(profile, "observations")
    lines = store.path.read_bytes().splitlines(keepends=True)
    store.path.write_bytes(b"".join(lines[:7]) + lines[7][:10])
    calls = []
    raw = FirstStep.raw
    monkeypatch.setattr(FirstStep, "raw", lambda *a, **k: calls.append(1) or raw(*a, **k))
    pd.testing.assert_frame_equal(experiments.scores(pipe, profile, progress=False), whole)
    # Three values a prompt: two prompts were known, and of the third all that needs the second timestep.
    assert len(calls) == 1 + 2 * (len(whole) - 3) + 2  # the empty prompt twice


def z_of(pipe, profile, captions):
    normal = activation_statistics(pipe, CAPTIONS["holdout"], progress=False)
    return [z.abs().numpy() for z in z_scores(normal, value_activations(pipe.unet, embed(pipe, captions)))]


def test_z_by_prompt(pipe, profile):
    table = experiments.z_by_prompt(pipe, profile, kinds=("vm", "unmemorized"), progress=False)
    direct = z_of(pipe, profile, [*CAPTIONS["vm"], *CAPTIONS["unmemorized"]])
    assert len(table) == 5 * 7
    for layer, z in enumerate(direct, start=1):
        rows = table[table["layer"] == layer]
        assert rows["largest_z"].to_numpy() == pytest.approx(z.max(axis=1), rel=1e-4)
        assert rows["neuron"].tolist() == z.argmax(axis=1).tolist()


def test_z_by_neuron(pipe, profile):
    table = experiments.z_by_neuron(pipe, profile, kinds=("vm", "unmemorized"), limit=2, progress=False)
    for kind in ("vm", "unmemorized"):
        for layer, z in enumerate(z_of(pipe, profile, CAPTIONS[kind][:2]), start=1):
            rows = table[(table["kind"] == kind) & (table["layer"] == layer)]
            assert rows["neuron"].tolist() == list(range(z.shape[1]))
            assert rows["largest_z"].to_numpy() == pytest.approx(z.max(axis=0), rel=1e-4)
    assert set(table["caption"]) <= {*CAPTIONS["vm"], *CAPTIONS["unmemorized"][:2]}


def test_images_are_the_generated_ones_and_kept(pipe, profile, monkeypatch):
    captions = [*CAPTIONS["vm"], "a tree"]
    found = experiments.images(pipe, profile, captions, progress=False)
    direct = generate(pipe, captions, progress=False)
    assert found.shape == (3, 2, 64, 64, 3)
    assert np.abs(found.astype(int) - direct).max() <= 1
    monkeypatch.setattr(experiments, "generate", None)
    again = experiments.images(pipe, profile, captions[::-1], progress=False)
    assert np.array_equal(again, found[::-1])


def test_images_without_neurons(pipe, profile):
    captions, layers = CAPTIONS["vm"], len(value_layers(pipe.unet))
    neurons = NeuronSet.of([(0, 0), (3, 1)], layers=layers)
    active = experiments.images(pipe, profile, captions, progress=False)
    off = experiments.images(pipe, profile, captions, neurons=[neurons, NeuronSet.empty(layers)], progress=False)
    direct = generate(pipe, captions[:1], neurons=neurons, progress=False)
    assert np.abs(off[0].astype(int) - direct[0]).max() <= 1
    assert np.array_equal(off[1], active[1])
    assert not np.array_equal(off[0], active[0])
    with pytest.raises(ValueError, match="1 neuron sets were given for 2 prompts"):
        experiments.images(pipe, profile, captions, neurons=[neurons])


def test_planted_images(profile):
    planted = experiments.planted_images(profile, experiments.prompt_table(profile, ["vm"]))
    assert planted.shape == (2, 64, 64, 3)
    assert planted.dtype == np.uint8


def test_copies(pipe, profile):
    table = experiments.copies(pipe, profile, experiments.prompt_table(profile, ["vm", "unmemorized"]), progress=False)
    descriptor = CopyDescriptor.load(profile.encoders.copy.path)
    made = descriptor.describe(generate(pipe, CAPTIONS["vm"][:1], progress=False)[0])
    planted = descriptor.describe(experiments.planted_images(profile, table.iloc[:1]))
    to_planted = (made @ planted[0]).numpy()
    assert table["copy_similarity"].iloc[0] == pytest.approx(np.median(to_planted), abs=1e-3)
    assert table["copy_max"].iloc[0] == pytest.approx(to_planted.max(), abs=1e-3)
    assert table["seed_similarity"].iloc[0] == pytest.approx(float(made[0] @ made[1]), abs=1e-3)
    unmemorized = table[table["kind"] == "unmemorized"]
    assert unmemorized[["copy_similarity", "copy_max"]].isna().all().all()
    assert unmemorized["seed_similarity"].notna().all()
    with pytest.raises(ValueError, match="has encoders.copy = None"):
        experiments.copies(pipe, dataclasses.replace(profile, encoders=Encoders()), table)


def test_copies_of_no_prompt(pipe, profile, no_unet):
    nothing = experiments.prompt_table(profile, ("vm",)).head(0)
    table = experiments.copies(pipe, profile, nothing)
    assert table.empty
    assert table.columns.tolist() == [*nothing.columns, "copy_similarity", "copy_max", "seed_similarity"]
    assert table["copy_similarity"].dtype == float


def test_what_the_ladder_shows_in_a_sentence():
    table = pd.DataFrame({"copies": [1, 1, 64], "copy_similarity": [0.1, 0.2, 0.9]})
    assert (
        experiments.ladder_finding(table)
        == "On the ladder copy similarity goes from 0.15 at 1 copy to 0.90 at 64 copies."
    )
    assert "This profile has no ladder prompts" in experiments.ladder_finding(table.head(0))


def test_features_of_images_are_the_encoders_and_kept(profile, monkeypatch):
    made = np.random.default_rng(0).integers(0, 255, (2, 3, 64, 64, 3), dtype=np.uint8)
    descriptor = CopyDescriptor.load(profile.encoders.copy.path)
    found = experiments.image_features(descriptor, profile, made)
    assert np.allclose(found, describe_samples(descriptor, made), atol=1e-6)
    monkeypatch.setattr(descriptor, "encode", None)
    assert np.array_equal(experiments.image_features(descriptor, profile, made[:, ::-1]), found[:, ::-1])
    with pytest.raises(ValueError, match=r"must be \[prompt, seed"):
        experiments.image_features(descriptor, profile, made[0])


def test_sample_grid(pipe, profile):
    table = experiments.prompt_table(profile, ["vm", "unmemorized"])
    grid = experiments.sample_grid(pipe, profile, table, progress=False)
    assert grid.rows == tuple(table["caption"])
    assert grid.columns == ("planted", "seed 0", "seed 1")
    assert np.array_equal(grid.images[:2, 0], experiments.planted_images(profile, table.head(2)))
    assert (grid.images[2:, 0] == 255).all()
    assert np.array_equal(grid.images[:, 1:], experiments.images(pipe, profile, table["caption"], progress=False))


def test_detection_beside_paper(pipe, profile):
    table = experiments.detection_beside_paper(experiments.scores(pipe, profile, progress=False), resamples=5)
    assert len(table) == 9
    known = table.set_index(["score", "memorized"])["paper_auroc"]
    assert known["score_paper", "vm"] == known["score_released", "vm"] == 0.9964
    assert known["wen", "vm + tm"] == 0.992
    assert known.isna().sum() == 4


def test_nothing_is_kept_while_neurons_are_deactivated(pipe, profile):
    neurons = NeuronSet.of([(0, 0)], layers=len(value_layers(pipe.unet)))
    with deactivate(pipe, neurons), pytest.raises(ValueError, match="layers have hooks"):
        experiments.threshold(pipe, profile, progress=False)
    key = cross_attention_layers(pipe.unet, "key")[0].name
    with zero_layers(pipe.unet, [key]), pytest.raises(ValueError, match="layers have hooks"):
        experiments.images(pipe, profile, CAPTIONS["vm"], progress=False)


def test_a_model_is_hashed_again_only_when_it_changes(pipe, monkeypatch):
    from nemolib import provenance

    calls, original = [], provenance.model_hash
    monkeypatch.setattr(provenance, "model_hash", lambda chosen: calls.append(chosen) or original(chosen))
    before, weight = experiments.model_hash(pipe), pipe.unet.conv_in.weight
    calls.clear()
    assert experiments.model_hash(pipe) == before == original(pipe)
    assert not calls
    for change in (lambda: weight.mul_(2), lambda: weight.data.mul_(0.5), lambda: weight.data.copy_(weight * 2)):
        known = experiments.model_hash(pipe)
        with torch.no_grad():
            change()
        assert experiments.model_hash(pipe) == original(pipe) != known
    with torch.no_grad():
        weight.mul_(0.5)
    assert experiments.model_hash(pipe) == before


def test_another_model_is_another_result(pipe, profile):
    before = experiments.model_hash(pipe)
    weight = value_layers(pipe.unet)[0].module.weight
    with torch.no_grad():
        weight[0, 0] += 1
        changed = experiments.model_hash(pipe)
        weight[0, 0] -= 1
    assert changed != before
