import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemolib.neurons import NeuronSet

WIDTHS = (4, 4, 6)
layers = st.tuples(*(st.lists(st.integers(0, width - 1)) for width in WIDTHS))


@given(layers)
def test_a_set_is_canonical(entries):
    neurons = NeuronSet(entries)
    assert neurons.layers == tuple(tuple(sorted(set(layer))) for layer in entries)
    assert neurons == NeuronSet([list(reversed(layer)) for layer in entries])
    assert hash(neurons) == hash(NeuronSet(neurons.layers))
    assert len(neurons) == sum(neurons.counts) == len(list(neurons))
    assert bool(neurons) == any(entries)
    neurons.check(WIDTHS)


@given(layers, layers)
def test_set_operations_are_those_of_sets_of_pairs(first, second):
    a, b = NeuronSet(first), NeuronSet(second)
    assert set(a | b) == set(a) | set(b)
    assert set(a & b) == set(a) & set(b)
    assert set(a - b) == set(a) - set(b)
    assert all(pair in a for pair in a)
    assert not any(pair in a - b for pair in b)


@given(layers)
def test_json_and_pairs_give_the_set_back(entries):
    neurons = NeuronSet(entries)
    assert NeuronSet.from_json(neurons.to_json()) == neurons
    assert NeuronSet.of(neurons, layers=len(WIDTHS)) == neurons


def test_printed_form():
    assert str(NeuronSet(((25, 3), (), (507,)))) == "3 neurons (layer 0: 3, 25; layer 2: 507)"
    assert str(NeuronSet(((1,), ()))) == "1 neuron (layer 0: 1)"
    assert str(NeuronSet.empty(7)) == "0 neurons"


def test_empty_and_without_layer():
    full = NeuronSet(tuple(map(range, WIDTHS)))
    assert full.counts == WIDTHS
    assert full.without_layer(2).counts == (4, 4, 0)
    assert full - full == NeuronSet.empty(3)
    with pytest.raises(IndexError, match="layer 3 does not exist; layers are 0 to 2"):
        full.without_layer(3)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        (NeuronSet(((4,), (), ())), "neuron 4 of layer 0 does not exist; allowed are 0 to 3"),
        (NeuronSet(((), (), (0, 6))), "neuron 6 of layer 2 does not exist; allowed are 0 to 5"),
        (NeuronSet.empty(2), "has 2 layers, the model has 3 value layers"),
    ],
)
def test_a_set_that_does_not_fit(neurons, message):
    with pytest.raises(ValueError, match=message):
        neurons.check(WIDTHS)


def test_impossible_neurons():
    for layers, words in ((((), (-1,)), "neuron -1 of layer 1"), (((0.5,),), "neuron 0.5 of layer 0")):
        with pytest.raises(ValueError, match=f"{words} is no integer from 0 on"):
            NeuronSet(layers)
    with pytest.raises(ValueError, match="layer 2 of neuron 1 does not exist"):
        NeuronSet.of([(2, 1)], layers=2)


def test_sets_of_different_models_do_not_combine():
    with pytest.raises(ValueError, match="2 and 3 layers cannot be combined"):
        NeuronSet.empty(2) | NeuronSet.empty(3)
    with pytest.raises(TypeError):
        NeuronSet.empty(2) | {1}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 3}', '{"layers": [["a"]]}', '{"layers": [[-1]]}'])
def test_text_that_is_no_neuron_set(text):
    with pytest.raises(ValueError, match="not a neuron set|no integer"):
        NeuronSet.from_json(text)
