import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemolib.mitigation import DeactivatedNeurons, random_neurons
from nemolib.neurons import NeuronSet
from tests.random_pipeline import WIDTHS

FIRST = NeuronSet(((0, 2), (), (5,), (), (), (), (1,)))


@st.composite
def found(draw):
    """Return layer widths and found neurons, at most half of each layer."""
    widths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=7))
    layers = [draw(st.sets(st.integers(0, width - 1), max_size=width // 2)) for width in widths]
    return widths, NeuronSet(tuple(map(tuple, layers)))


@given(found(), st.integers(0, 9), st.integers(0, 4))
def test_as_many_in_the_same_layers_and_never_a_found_one(case, seed, repeat):
    widths, neurons = case
    drawn = random_neurons(neurons, widths, seed=seed, repeat=repeat)
    drawn.check(widths)
    assert drawn.counts == neurons.counts
    assert not drawn & neurons
    assert random_neurons(neurons, widths, seed=seed, repeat=repeat) == drawn


def test_layers_repeats_seeds_and_sets_have_their_own_numbers():
    widths = (1000,) * 3
    neurons = NeuronSet((tuple(range(20)),) * 3)
    drawn = random_neurons(neurons, widths, seed=0)
    assert len(set(drawn.layers)) == 3
    others = [random_neurons(neurons, widths, seed=0, repeat=repeat) for repeat in range(1, 5)]
    others += [random_neurons(neurons, widths, seed=1)]
    others += [random_neurons(neurons | NeuronSet(((20,), (20,), (20,))), widths, seed=0)]
    assert len({drawn, *others}) == 7
    shared = [len(drawn & other) for other in others]
    assert max(shared) < 10


def test_every_other_neuron_can_be_drawn():
    neurons = NeuronSet(((0,),))
    drawn = {random_neurons(neurons, (4,), seed=0, repeat=repeat) for repeat in range(60)}
    assert drawn == {NeuronSet(((neuron,),)) for neuron in (1, 2, 3)}


def test_impossible_requests():
    with pytest.raises(ValueError, match="layer 1 has 5 neurons; without the 3 given ones only 2 remain, 3 are needed"):
        random_neurons(NeuronSet(((), (0, 1, 2))), (5, 5), seed=0)
    with pytest.raises(ValueError, match="neuron 9 of layer 0 does not exist"):
        random_neurons(NeuronSet(((9,),)), (5,), seed=0)
    with pytest.raises(ValueError, match="seed -1"):
        random_neurons(NeuronSet(((1,),)), (5,), seed=-1)


def test_each_prompt_has_its_own_neurons(random_pipe):
    sets = {"a": FIRST, "b": NeuronSet.empty(7)}
    mitigation = DeactivatedNeurons(sets, factor=0.5)
    sets.clear()
    assert mitigation.neurons_of("a") == FIRST
    assert mitigation.identity("a") == ["neurons", FIRST.layers, 0.5]
    assert mitigation.identity("b") == []
    assert DeactivatedNeurons(FIRST).identity("anything") == ["neurons", FIRST.layers, 0.0]
    with pytest.raises(ValueError, match="no neurons are given for the prompt 'c'"):
        mitigation.identity("c")
    with pytest.raises(ValueError, match="no neurons are given"), mitigation.applied(random_pipe, ["a", "c"]):
        pass


def test_names():
    assert DeactivatedNeurons(FIRST).name == "deactivated neurons"
    assert DeactivatedNeurons(FIRST, factor=0.5).name == "neurons scaled by 0.5"


def test_neurons_of_another_model(random_pipe):
    wrong = NeuronSet.of([(0, WIDTHS[0])], layers=7)
    for neurons in (wrong, {"a": FIRST, "b": wrong}):
        with pytest.raises(ValueError, match="was the set found in another model"):
            DeactivatedNeurons(neurons).check(random_pipe)
    with pytest.raises(TypeError, match="expected a NeuronSet or prompt -> NeuronSet, got list"):
        DeactivatedNeurons([FIRST])
