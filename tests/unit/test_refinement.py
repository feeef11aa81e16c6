import copy
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemolib.neurons import NeuronSet
from nemolib.refinement import refine_sequential

entry_lists = st.lists(
    st.lists(st.integers(0, 5), max_size=8).map(lambda layer: keep_twice(layer)), min_size=1, max_size=4
)


def keep_twice(layer):
    return [neuron for place, neuron in enumerate(layer) if layer[:place].count(neuron) < 2]


def rough_score(neurons):
    """Return a score in [0, 1] without any order, the same for the same set."""
    return hashlib.sha256(repr(neurons).encode()).digest()[0] / 255


def released(entries, score, threshold):
    """The authors' loops, with lists that hold a neuron twice."""
    blocked = [list(layer) for layer in entries]

    def score_of(lists):
        return score(NeuronSet(lists))

    for layer in reversed(range(len(blocked))):
        trial = copy.deepcopy(blocked)
        trial[layer] = []
        if blocked[layer] and score_of(trial) < threshold:
            blocked = trial
    for layer in reversed(range(len(blocked))):
        for neuron in list(blocked[layer]):
            trial = copy.deepcopy(blocked)
            trial[layer].remove(neuron)
            if score_of(trial) < threshold:
                blocked = trial
    return NeuronSet(blocked)


@given(entry_lists, st.floats(0, 1))
def test_refinement_is_that_of_the_release_for_any_score(entries, threshold):
    refinement = refine_sequential(entries, rough_score, threshold=threshold)
    assert refinement.neurons == released(entries, rough_score, threshold)
    assert refinement.score == rough_score(refinement.neurons)


@given(entry_lists)
def test_refinement_against_the_score_of_all_candidates(entries):
    """Where the initial selection did not reach the threshold, its score takes the threshold's place."""
    threshold = rough_score(NeuronSet(entries))
    refinement = refine_sequential(entries, rough_score, threshold=threshold, initial_score=threshold)
    assert refinement.neurons == released(entries, rough_score, threshold)


@given(entry_lists, st.floats(0, 1))
def test_what_is_left_is_a_subset_and_never_scores_worse(entries, threshold):
    start = rough_score(NeuronSet(entries))
    refinement = refine_sequential(entries, rough_score, threshold=threshold)
    assert refinement.neurons - NeuronSet(entries) == NeuronSet.empty(len(entries))
    assert refinement.score < threshold or refinement.score == start


def needs(*required):
    """Return a score that is low where all required neurons are deactivated."""
    return lambda neurons: 0.1 if all(pair in neurons for pair in required) else 0.9


def test_exactly_the_needed_neurons_stay():
    entries = ((0, 1, 2), (3,), (1, 4))
    refinement = refine_sequential(entries, needs((0, 1), (2, 4)), threshold=0.5)
    assert refinement.neurons == NeuronSet(((1,), (), (4,)))
    assert refinement.score == 0.1


def test_layers_come_first_then_neurons_both_from_the_last_layer():
    tests = refine_sequential(((0, 1), (3,), (1, 4)), needs((0, 1), (2, 4)), threshold=0.5).tests
    order = [(test.layer, test.neuron, test.removed) for test in tests]
    assert order == [
        (2, None, False),
        (1, None, True),
        (0, None, False),
        (2, 1, True),
        (2, 4, False),
        (0, 0, True),
        (0, 1, False),
    ]


def test_nothing_to_refine_needs_no_evaluation():
    def score(neurons):
        pytest.fail("nothing was to be evaluated")

    refinement = refine_sequential(((), ()), score, threshold=0.5, initial_score=1.0)
    assert refinement.neurons == NeuronSet.empty(2)
    assert refinement.tests == ()


def test_a_double_entry_is_tested_at_its_last_place():
    asked = []

    def score(neurons):
        asked.append(neurons)
        return 0.1 if neurons else 0.9

    refine_sequential(((0, 1, 0),), score, threshold=0.5, initial_score=0.1)
    # The layer, then 1 (the first entry of 0 changes nothing), then 0.
    assert asked == [NeuronSet(((),)), NeuronSet(((0,),)), NeuronSet(((),))]


def test_a_double_entry_stays_where_the_score_is_not_below_the_threshold():
    refinement = refine_sequential(((0, 0, 1),), lambda neurons: 0.9, threshold=0.9, initial_score=0.9)
    assert refinement.neurons == NeuronSet(((0, 1),))


def test_the_input_is_left_alone():
    entries = [[0, 1, 0], [2]]
    refine_sequential(entries, needs((0, 1)), threshold=0.5)
    assert entries == [[0, 1, 0], [2]]
