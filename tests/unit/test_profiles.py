import dataclasses

import pytest

from nemolib import profiles
from nemolib.profiles import (
    Profile,
    ProfileError,
    known_profiles,
    load_profile,
    profile_from_mapping,
    profile_to_mapping,
)

PROMPTS = {"memorized": "m.csv", "unmemorized": "u.csv", "holdout": "h.csv"}
LEAST = {"name": "x", "model": "some/model", "prompts": PROMPTS}


def test_the_default_profile_runs_on_the_cpu():
    tiny = load_profile("tiny")
    assert tiny.name == "tiny"
    assert tiny.device == "cpu"
    assert tiny.dtype == "float32"
    assert tiny.protocol == "paper"  # its small latents do not suit the release's multi-scale similarity


@pytest.mark.parametrize("name", known_profiles())
def test_every_profile_loads_and_survives_the_way_through_mappings(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile_from_mapping(profile_to_mapping(profile)) == profile
    assert hash(profile) == hash(load_profile(name))


def test_tiny_full_differs_from_tiny_only_in_size():
    tiny, full = (profile_to_mapping(load_profile(name)) for name in ("tiny", "tiny-full"))
    differing = {key for key in tiny if tiny[key] != full[key]}
    assert differing <= {
        "name",
        "groups",
        "limits",
        "extent",
        "holdout_size",
        "threshold_prompts",
        "detection",
        "generation",
    }
    assert full["groups"] is None
    assert all(limit is None for limit in full["limits"].values())


def test_a_profile_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_profile("tiny").name = "other"


def test_loading_a_profile_again_returns_it():
    tiny = load_profile("tiny")
    assert load_profile(tiny) is tiny


def test_a_yaml_file_anywhere_can_extend_a_known_profile(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\ngeneration: {samples: 2}\nsimilarity: {betas: [1, 2]}\n")
    mine, tiny = load_profile(path), load_profile("tiny")
    assert mine.name == "mine"
    assert mine.generation == dataclasses.replace(tiny.generation, samples=2)
    assert mine.similarity.betas == (1.0, 2.0)
    assert mine.search == tiny.search


def test_encoders_are_data():
    encoders = {
        "copy": {"kind": "sscd", "path": "models/sscd.pt", "sha256": "0a" * 32},
        "alignment": {"kind": "clip", "path": "openai/clip-vit-base-patch32", "revision": "main"},
        "quality": {"kind": "inception", "path": "models/inception.pt"},
        "clip_quality": None,
    }
    profile = profile_from_mapping(LEAST | {"encoders": encoders})
    assert profile.encoders.copy == profiles.EncoderSettings(**encoders["copy"])
    assert profile.encoders.clip_quality is None
    assert profile_from_mapping(profile_to_mapping(profile)) == profile
    assert load_profile("tiny").encoders.quality.name == "tiny CLIP image tower"


def test_another_encoder_inherits_nothing(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\nencoders: {copy: {kind: sscd, path: sscd.pt}, alignment: {name: mine}}\n")
    mine, tiny = load_profile(path).encoders, load_profile("tiny").encoders
    assert mine.copy == profiles.EncoderSettings("sscd", "sscd.pt")
    assert mine.alignment == dataclasses.replace(tiny.alignment, name="mine")
    assert mine.quality == tiny.quality


def test_what_is_not_given_has_the_defaults_of_the_dataclass():
    profile = profile_from_mapping(LEAST)
    assert profile == Profile(name="x", model="some/model", prompts=profiles.PromptTables(**PROMPTS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampels": 3}, ["unknown key", "sampels", "3", "allowed", "detection"]),
        ({"detection": {"sample": 3}}, ["unknown key", "detection.sample", "3", "samples"]),
        ({"detection": 3}, ["detection", "3", "guidance"]),
        ({"detection": {"samples": "ten"}}, ["detection.samples", "'ten'", "integer"]),
        ({"detection": {"samples": True}}, ["detection.samples", "True", "integer"]),
        ({"detection": {"samples": 2.5}}, ["detection.samples", "2.5", "integer"]),
        ({"detection": {"samples": 1}}, ["detection", "samples", "1", "at least 2"]),
        ({"detection": {"guidance": -1}}, ["guidance", "-1", "at least 0"]),
        ({"detection": {"guidance": float("nan")}}, ["guidance", "nan", "finite"]),
        ({"similarity": {"betas": []}}, ["similarity.betas", "[]", "list"]),
        ({"similarity": {"betas": [0.3, "x"]}}, ["similarity.betas", "x", "list of a number"]),
        ({"similarity": {"kernel_size": 10}}, ["kernel_size", "10", "odd"]),
        ({"search": {"theta_step": 0}}, ["theta_step", "0", "above 0"]),
        ({"dtype": "float8"}, ["dtype", "float8", "float32, float16, bfloat16"]),
        ({"device": "gpu"}, ["device", "gpu", "auto, cpu, cuda, mps"]),
        ({"protocol": "mine"}, ["protocol", "mine", "released, paper"]),
        ({"groups": 3}, ["groups", "3", "text"]),
        ({"limits": {"vm": -1}}, ["limits.vm", "-1", "0 to"]),
        ({"holdout_size": 1}, ["holdout_size", "1", "2 to"]),
        ({"thresholds": {"value": 1.5}}, ["thresholds.value", "1.5", "-1 to 1"]),
        ({"thresholds": {"value": float("nan")}}, ["thresholds.value", "nan", "-1 to 1"]),
        ({"prompts": {"memorized": "m.csv"}}, ["prompts.", "missing", "holdout"]),
        ({"model": None}, ["model", "None", "text"]),
        (
            {"encoders": {"copy": {"kind": "dino", "path": "x"}}},
            ["encoders.copy.kind", "'dino'", "one of descriptor, sscd"],
        ),
        (
            {"encoders": {"copy": {"kind": "clip", "path": "x"}}},
            ["encoders", "copy has kind 'clip'", "descriptor, sscd"],
        ),
        ({"encoders": {"copy": {"kind": "sscd"}}}, ["encoders.copy.path", "missing"]),
        ({"encoders": {"copy": "sscd"}}, ["encoders.copy", "'sscd'", "kind"]),
        ({"encoders": {"sscd": None}}, ["unknown key encoders.sscd", "alignment, clip_quality, copy, quality"]),
        ({"encoders": {"copy": {"kind": "sscd", "path": "x", "sha256": "abc"}}}, ["sha256", "'abc'", "64 hexadecimal"]),
        ({"encoders": {"copy": {"kind": "sscd", "path": "x", "revision": "a"}}}, ["revision", "'sscd'", "only clip"]),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_what_is_allowed(change, words):
    with pytest.raises(ProfileError) as error:
        profile_from_mapping(LEAST | change, where="here")
    for word in ["here", *words]:
        assert word in str(error.value)


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ProfileError, match="unknown profile 'tny'.*tiny, tiny-full"):
        load_profile("tny")


def test_a_name_is_no_way_out_of_the_folder_of_profiles():
    with pytest.raises(ProfileError, match="unknown profile"):
        load_profile("../profiles/tiny")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not readable as YAML"),
        ("- model", "expected keys and values"),
        ("extends: nothing", "unknown profile 'nothing'"),
        ("extends: other.yaml", "does not exist"),
        ("extends: broken.yaml", "extends this profile again"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=words):
        load_profile(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ProfileError, match="does not exist"):
        load_profile(tmp_path / "none.yaml")
