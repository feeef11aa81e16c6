import dataclasses

import pytest

from nemolib.evaluations import Evaluations
from nemolib.protocols import PAPER, PROTOCOLS, RELEASED, Protocol, load_protocol
from nemolib.settings import DetectionSettings, GenerationSettings, SearchSettings, SimilaritySettings


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (DetectionSettings, "seed", -1),
        (DetectionSettings, "samples", 1),
        (DetectionSettings, "samples", 2.5),
        (DetectionSettings, "steps", 1),
        (DetectionSettings, "guidance", -1.0),
        (DetectionSettings, "guidance", float("nan")),
        (SimilaritySettings, "kernel_size", 4),
        (SimilaritySettings, "sigma", 0.0),
        (SimilaritySettings, "betas", ()),
        (SimilaritySettings, "betas", (0.3, -0.3)),
        (SearchSettings, "theta_step", 0.0),
        (SearchSettings, "theta_start", 0.5),
        (SearchSettings, "k_max", -1),
        (SearchSettings, "k_start", True),
        (SearchSettings, "method", "quick"),
        (GenerationSettings, "samples", 0),
        (GenerationSettings, "batch_size", "8"),
        (GenerationSettings, "side", 0),
        (GenerationSettings, "side", 100),
    ],
)
def test_impossible_settings_name_key_and_value(kind, key, value):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{key} is .*must be"):
        kind(**{key: value})


def test_settings_are_frozen_and_hashable():
    settings = SimilaritySettings(betas=[0.5, 0.5])
    assert settings.betas == (0.5, 0.5)
    assert hash(settings) == hash(SimilaritySettings(betas=(0.5, 0.5)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.sigma = 2.0


def test_protocols_differ_in_every_switch():
    differing = {
        field.name
        for field in dataclasses.fields(Protocol)
        if getattr(RELEASED, field.name) != getattr(PAPER, field.name)
    }
    assert differing == {field.name for field in dataclasses.fields(Protocol)}


def test_load_protocol():
    assert load_protocol("paper") is PROTOCOLS["paper"] is PAPER
    mixed = dataclasses.replace(RELEASED, name="mixed", timestep_index=0)
    assert load_protocol(mixed) is mixed
    with pytest.raises(ValueError, match="unknown protocol 'papper'; known protocols: released, paper"):
        load_protocol("papper")


@pytest.mark.parametrize("switch", [{"timestep_index": -1}, {"similarity": "mse"}, {"threshold_pairs": "median"}])
def test_impossible_switch(switch):
    with pytest.raises(ValueError, match=f"Protocol.{next(iter(switch))}"):
        dataclasses.replace(RELEASED, **switch)


def test_evaluations_are_counted_by_stage():
    evaluations = Evaluations()
    evaluations.add(2)
    with evaluations.stage("A3"):
        evaluations.add(5)
        evaluations.add(1)
    assert evaluations.samples == {"A1": 0, "A2": 0, "A3": 6, "A4": 0}
    assert evaluations.total == 8
    assert evaluations.seconds["A3"] > 0 == evaluations.seconds["A1"]


def test_stages_end_on_an_exception_and_do_not_nest():
    evaluations = Evaluations()
    with pytest.raises(RuntimeError, match="boom"), evaluations.stage("A1"):
        raise RuntimeError("boom")
    with evaluations.stage("A2"), pytest.raises(ValueError, match="'A4' begins inside stage 'A2'"):
        evaluations.stage("A4").__enter__()
    with pytest.raises(ValueError, match="unknown stage 'A5'; known stages: A1, A2, A3, A4"):
        evaluations.stage("A5").__enter__()
