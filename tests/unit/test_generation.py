import numpy as np
import pytest

from nemolib.generation import generate
from nemolib.neurons import NeuronSet
from nemolib.settings import GenerationSettings

SETTINGS = GenerationSettings(seed=2, samples=2, steps=2, batch_size=4)
FULL = NeuronSet.full((8, 8, 16, 16, 16, 16, 16))


def same(first, second):
    """Whether images agree up to one level of grey; sums in a batch of another size round otherwise."""
    return np.abs(first.astype(int) - second.astype(int)).max() <= 1


@pytest.fixture(scope="module")
def images(random_pipe):
    return generate(random_pipe, ["a", "b c"], settings=SETTINGS, progress=False)


def test_axes_and_type(images):
    assert images.shape == (2, 2, 64, 64, 3)
    assert images.dtype == np.uint8
    assert images.std() > 0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_does_not_depend_on_its_batch(random_pipe, images, batch_size):
    settings = GenerationSettings(seed=2, samples=2, steps=2, batch_size=batch_size)
    assert same(generate(random_pipe, ["a", "b c"], settings=settings, progress=False), images)


def test_an_image_does_not_depend_on_other_prompts_or_samples(random_pipe, images):
    settings = GenerationSettings(seed=2, samples=3, steps=2)
    alone = generate(random_pipe, ["b c"], settings=settings, progress=False)
    assert same(alone[0, :2], images[1])
    assert not same(alone[0, 2], alone[0, 0])


def test_another_seed_gives_other_images(random_pipe, images):
    settings = GenerationSettings(seed=3, samples=2, steps=2)
    assert not same(generate(random_pipe, ["a", "b c"], settings=settings, progress=False), images)


def test_deactivated_neurons_change_the_image_and_the_model_stays(random_pipe, images):
    blocked = generate(random_pipe, ["a", "b c"], settings=SETTINGS, neurons=FULL, progress=False)
    assert not np.array_equal(blocked, images)
    assert np.array_equal(generate(random_pipe, ["a", "b c"], settings=SETTINGS, progress=False), images)


def test_factor_one_changes_nothing(random_pipe, images):
    scaled = generate(random_pipe, ["a", "b c"], settings=SETTINGS, neurons=FULL, factor=1.0, progress=False)
    assert same(scaled, images)


def test_one_set_per_prompt(random_pipe, images):
    sets = [NeuronSet.empty(7), FULL]
    mixed = generate(random_pipe, ["a", "b c"], settings=SETTINGS, neurons=sets, progress=False)
    blocked = generate(random_pipe, ["a", "b c"], settings=SETTINGS, neurons=FULL, progress=False)
    assert same(mixed[0], images[0])
    assert same(mixed[1], blocked[1])


def test_without_guidance(random_pipe):
    settings = GenerationSettings(samples=2, steps=2, guidance=0.0)
    sets = [NeuronSet.empty(7), FULL]
    assert generate(random_pipe, ["a", "b"], settings=settings, neurons=sets, progress=False).shape[0] == 2


def test_images_of_another_side(random_pipe):
    for side, expected in ((None, 64), (32, 32)):
        settings = GenerationSettings(samples=1, steps=2, side=side)
        made = generate(random_pipe, ["a"], settings=settings, progress=False)
        assert made.shape == (1, 1, expected, expected, 3)


def test_the_progress_bar_of_the_pipeline_is_as_before(random_pipe, capsys):
    random_pipe.set_progress_bar_config(desc="mine")
    try:
        generate(random_pipe, ["a"], settings=SETTINGS, progress=False)
        assert random_pipe._progress_bar_config == {"desc": "mine"}
        assert capsys.readouterr().err == ""
        generate(random_pipe, ["a"], settings=SETTINGS)
        assert "images: 100%" in capsys.readouterr().err
    finally:
        random_pipe.set_progress_bar_config()


def test_impossible_requests(random_pipe):
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        generate(random_pipe, [], settings=SETTINGS)
    with pytest.raises(ValueError, match="3 neuron sets were given for 1 prompts"):
        generate(random_pipe, ["a"], settings=SETTINGS, neurons=[FULL] * 3)
    with pytest.raises(ValueError, match="has 2 layers, the model has 7"):
        generate(random_pipe, ["a"], settings=SETTINGS, neurons=NeuronSet.empty(2), progress=False)
