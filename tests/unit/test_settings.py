import dataclasses
import pickle

import pytest
import yaml

from nemolib.settings import (
    PAPER,
    PROTOCOLS,
    RELEASED,
    DetectionSettings,
    EncoderSettings,
    Profile,
    ProfileError,
    PromptTables,
    Protocol,
    SearchSettings,
    known_profiles,
    load_profile,
    load_protocol,
    search_settings,
)

PROMPTS = {"memorized": "m.csv", "unmemorized": "u.csv", "holdout": "h.csv"}
LEAST = {"model": "some/model", "prompts": PROMPTS}


@pytest.fixture
def load(tmp_path):
    """Return what makes a profile of changes to the least that a file must say."""

    def load(change, least=LEAST):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(least | change))
        return load_profile(path)

    return load


# --- Settings -----------------------------------------------------------------------------------------------------------


def test_a_wrong_setting_is_named_in_python_too():
    with pytest.raises(ValueError, match="samplse"):
        DetectionSettings(samplse=3)
    wrongs = {"similarity": "mse", "timestep_index": -1, "threshold_pairs": "median", "swap_guidance": 1}
    for switch, wrong in wrongs.items():
        with pytest.raises(ValueError, match=f"{switch}\n.*{wrong}"):
            dataclasses.replace(RELEASED, **{switch: wrong})


def test_search_settings_by_method():
    default = SearchSettings(theta_min=2.0)
    assert search_settings(None, default) is default
    assert search_settings("sequential", default) == dataclasses.replace(default, method="sequential")
    assert search_settings(SearchSettings(), default) == SearchSettings()
    with pytest.raises(ValueError, match="'fast' or 'sequential'"):
        search_settings("quick", default)


# --- Protocols ----------------------------------------------------------------------------------------------------------


def test_protocols_differ_in_every_switch():
    switches = [field.name for field in dataclasses.fields(Protocol)]
    assert all(getattr(RELEASED, name) != getattr(PAPER, name) for name in switches)


def test_load_protocol():
    assert load_protocol("paper") is PROTOCOLS["paper"] is PAPER
    mixed = dataclasses.replace(RELEASED, name="mixed", timestep_index=0)
    assert load_protocol(mixed) is mixed
    with pytest.raises(ValueError, match="unknown protocol 'papper'; known protocols: released, paper"):
        load_protocol("papper")


# --- Profiles -----------------------------------------------------------------------------------------------------------


def test_the_default_profile_runs_on_the_cpu():
    tiny = load_profile("tiny")
    assert (tiny.name, tiny.device, tiny.dtype) == ("tiny", "cpu", "float32")
    assert tiny.protocol is PAPER  # its small latents do not suit the release's multi-scale similarity


@pytest.mark.parametrize("name", known_profiles())
def test_every_profile_loads_and_travels(name):
    profile = load_profile(name)
    assert profile.name == name
    assert pickle.loads(pickle.dumps(profile)) == profile
    assert hash(profile) == hash(load_profile(name))
    assert load_profile(profile) is profile


def test_tiny_full_differs_from_tiny_only_in_size():
    tiny, full = load_profile("tiny"), load_profile("tiny-full")
    sizes = ("name", "groups", "extent", "holdout_size", "threshold_prompts", "generation")
    assert dataclasses.replace(tiny, **{key: getattr(full, key) for key in sizes}) == full
    assert full.groups is None
    assert set(dataclasses.asdict(full.limits).values()) == {None}


def test_what_is_not_given_has_the_defaults(load):
    assert load({}) == Profile(name="mine", model="some/model", prompts=PromptTables(**PROMPTS))
    assert load({"name": "x"}).name == "x"
    assert load({"protocol": "released"}).protocol is RELEASED


def test_a_path_may_start_where_the_caller_is_or_at_the_repository(tmp_path, monkeypatch):
    for folder in ("repository", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.yaml").write_text("extends: tiny")
    monkeypatch.setattr("nemolib.paths.ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [load_profile(f"{name}.yaml").name for name in ("repository", "elsewhere")] == ["repository", "elsewhere"]


def test_a_file_anywhere_can_extend_a_known_profile(load):
    mine = load({"extends": "tiny", "generation": {"samples": 2}, "similarity": {"betas": [1, 2]}}, least={})
    tiny = load_profile("tiny")
    assert mine.name == "mine"
    assert mine.generation == dataclasses.replace(tiny.generation, samples=2)
    assert mine.similarity.betas == (1.0, 2.0)
    assert mine.search == tiny.search


def test_another_encoder_inherits_nothing(load):
    changes = {"copy": {"kind": "sscd", "path": "sscd.pt"}, "alignment": {"name": "mine"}, "clip_quality": None}
    mine, tiny = load({"extends": "tiny", "encoders": changes}, least={}).encoders, load_profile("tiny").encoders
    assert mine.copy == EncoderSettings("sscd", "sscd.pt")
    assert mine.alignment == dataclasses.replace(tiny.alignment, name="mine")
    assert mine.quality == tiny.quality
    assert mine.clip_quality is None


def _encoder(**keys):
    return {"encoders": {"copy": {"kind": "sscd", "path": "x"} | keys}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampels": 3}, ["unknown key sampels = 3", "allowed", "detection"]),
        ({"detection": {"sample": 3}}, ["unknown key detection.sample = 3", "guidance, samples, seed, steps"]),
        ({"detection": 3}, ["'detection'", "got 3", "guidance, samples, seed, steps"]),
        ({"detection": {"samples": "10"}}, ["'detection.samples' is '10'", "integer"]),
        ({"detection": {"samples": 1}}, ["'detection.samples' is 1", "greater than or equal to 2"]),
        ({"detection": {"guidance": float("nan")}}, ["'detection.guidance' is nan", "finite"]),
        ({"similarity": {"betas": []}}, ["'similarity.betas' is []", "at least 1"]),
        ({"similarity": {"sigma": 0.0}}, ["'similarity.sigma' is 0.0", "greater than 0"]),
        ({"similarity": {"kernel_size": 10}}, ["'similarity.kernel_size'", "10", "odd"]),
        ({"search": {"theta_start": 0.5}}, ["'search'", "theta_start is 0.5", "at least theta_min (1)"]),
        ({"search": {"k_start": 1281}}, ["'search'", "k_max is 1280", "at least k_start (1281)"]),
        ({"generation": {"side": 100}}, ["'generation.side' is 100", "multiple of 8"]),
        ({"mitigation": {"wen": {"multiplier": -11.0}}}, ["'mitigation.wen.multiplier' is -11.0"]),
        ({"mitigation": {"ren": {"mask": "all"}}}, ["'mitigation.ren.mask' is 'all'", "'padding', 'summary' or"]),
        ({"mitigation": {"somepalli": {"numbers": [1, 0]}}}, ["'mitigation.somepalli.numbers.1' is 0"]),
        ({"mitigation": {"wen": {"step": 50}}}, ["'mitigation.wen'", "step is 50", "below steps (50)"]),
        ({"device": "gpu"}, ["'device' is 'gpu'", "'auto', 'cpu', 'cuda' or 'mps'"]),
        ({"protocol": "mine"}, ["'protocol'", "'mine'", "released, paper"]),
        ({"thresholds": {"value": 1.5}}, ["'thresholds.value' is 1.5", "less than or equal to 1"]),
        ({"prompts": {"memorized": "m.csv"}}, ["'prompts.holdout' is missing", "'prompts.unmemorized' is missing"]),
        ({"solutions": "yes"}, ["'solutions' is 'yes'", "boolean"]),
        (_encoder(kind="clip"), ["'encoders.copy'", "kind is 'clip'", "descriptor, sscd"]),
        ({"encoders": {"copy": {"kind": "sscd"}}}, ["'encoders.copy.path' is missing", "kind, name, path"]),
        ({"encoders": {"copy": "sscd"}}, ["'encoders.copy'", "'sscd'", "kind, name, path"]),
        (_encoder(sha256="abc"), ["'encoders.copy.sha256' is 'abc'", "[0-9a-fA-F]{64}"]),
        (_encoder(revision="a"), ["'encoders.copy'", "revision is 'a'", "'sscd'", "only clip"]),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_what_is_allowed(load, change, words):
    with pytest.raises(ProfileError) as error:
        load(change)
    for word in ["mine.yaml: ", *words]:
        assert word in str(error.value)


def test_all_that_is_wrong_is_named_at_once(load):
    with pytest.raises(ProfileError, match="(?=.*x = 1)(?=.*'dtype' is 3)(?=.*detection.sample = 3)(?=.*'model' is 2)"):
        load({"x": 1, "dtype": 3, "detection": {"sample": 3}, "model": 2})


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ProfileError, match="unknown profile 'tny'.*tiny, tiny-full"):
        load_profile("tny")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not readable as YAML"),
        ("- model", "expected keys and values"),
        ("extends: nothing", "unknown profile 'nothing'"),
        ("extends: other.yaml", "other.yaml does not exist"),
        ("extends: broken.yaml", "extends this profile again"),
        (None, "broken.yaml does not exist"),
    ],
)
def test_a_broken_or_missing_file_is_named(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ProfileError, match=words):
        load_profile(path)
