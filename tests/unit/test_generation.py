import dataclasses

import numpy as np
import pytest

from nemolib.generation import drawing, generate
from nemolib.mitigation import AttentionScaling, DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.settings import GenerationSettings
from tests.random_pipeline import WIDTHS

SETTINGS = GenerationSettings(seed=2, samples=2, steps=2, batch_size=4)
FULL, NONE = NeuronSet(tuple(tuple(range(width)) for width in WIDTHS)), NeuronSet.empty(7)
MIXED = {"a": NONE, "b c": FULL}


def made(pipe, prompts=("a", "b c"), settings=SETTINGS, mitigation=None):
    return generate(pipe, prompts, settings=settings, mitigation=mitigation, progress=False)


def same(first, second):
    """Whether images agree up to one level of grey; sums in a batch of another size round otherwise."""
    return np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max() <= 1


@pytest.fixture(scope="module")
def images(random_pipe):
    return made(random_pipe)


def test_axes_type_and_side(random_pipe, images):
    assert (images.shape, images.dtype) == ((2, 2, 64, 64, 3), np.uint8)
    small = made(random_pipe, ["a"], GenerationSettings(samples=1, steps=2, side=32))
    assert small.shape == (1, 1, 32, 32, 3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_does_not_depend_on_its_batch_but_on_its_seed(random_pipe, images, batch_size):
    assert same(made(random_pipe, settings=dataclasses.replace(SETTINGS, batch_size=batch_size)), images)
    alone = made(random_pipe, ["b c"], dataclasses.replace(SETTINGS, samples=3, batch_size=batch_size))
    assert same(alone[0, :2], images[1])
    assert not same(alone[0, 2], alone[0, 0])
    assert not same(made(random_pipe, settings=dataclasses.replace(SETTINGS, seed=3)), images)


def test_the_progress_bar_of_the_pipeline_is_as_before(random_pipe, capsys):
    random_pipe.set_progress_bar_config(desc="mine")
    try:
        made(random_pipe, ["a"])
        assert random_pipe._progress_bar_config == {"desc": "mine"}
        assert capsys.readouterr().err == ""
        generate(random_pipe, ["a"], settings=SETTINGS)
        assert "images: 100%" in capsys.readouterr().err
    finally:
        random_pipe.set_progress_bar_config()


def test_a_batch_of_mitigations_is_drawn_kind_by_kind(random_pipe, images, monkeypatch):
    half, scaling = DeactivatedNeurons(MIXED, 0.5), AttentionScaling()
    batch = [("a", half.of("a")), ("b c", half.of("b c")), ("a", scaling.of("a")), ("b c", scaling), ("b c", None)]
    calls = []
    monkeypatch.setattr(
        "nemolib.generation.generate", lambda *args, **kw: calls.append(args[1]) or generate(*args, **kw)
    )
    found = drawing(random_pipe, settings=SETTINGS)(batch)
    assert calls == [("a", "b c"), ("a", "b c"), ("b c",)]
    assert np.array_equal(found[:2], made(random_pipe, mitigation=half))
    assert np.array_equal(found[2:4], made(random_pipe, mitigation=scaling))
    assert same(found[4], images[1])
    assert np.array_equal(drawing(random_pipe, settings=SETTINGS)([("a", None), ("b c", None)]), images)


def test_a_faster_solver_makes_the_image_of_many_steps_and_leaves_the_scheduler_alone(random_pipe):
    own = random_pipe.scheduler

    def with_steps(steps, solver="own"):
        settings = dataclasses.replace(SETTINGS, samples=1, steps=steps, solver=solver, guidance=0.0)
        return made(random_pipe, ["a"], settings).astype(float)

    many, few, fast = with_steps(100), with_steps(10), with_steps(10, "dpm++")
    assert np.abs(fast - many).mean() < 0.5 * np.abs(few - many).mean()
    assert random_pipe.scheduler is own
    with pytest.raises(ValueError, match="one is empty|empty"):
        made(random_pipe, [""], dataclasses.replace(SETTINGS, solver="dpm++"))
    assert random_pipe.scheduler is own
