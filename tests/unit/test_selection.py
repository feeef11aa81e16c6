import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemolib.neurons import NeuronSet
from nemolib.selection import initial_selection, out_of_distribution, schedule
from nemolib.settings import SearchSettings

ACTIVATIONS = (torch.tensor([0.1, 0.9, 0.5, 0.3]), torch.tensor([0.2, 0.4]))
Z = (torch.tensor([-6.0, 4.0, 0.0, 2.0]), torch.tensor([5.0, 5.1]))


def test_top_k_is_ordered_by_activation_and_may_repeat():
    candidates = out_of_distribution(Z, ACTIVATIONS, theta=3.0, top_k=2)
    assert candidates.entries(double=True) == ((0, 1, 1, 2), (0, 1, 1, 0))
    assert candidates.entries(double=False) == ((0, 1, 2), (0, 1))
    assert candidates.neurons == NeuronSet(((0, 1, 2), (0, 1)))


def test_top_k_ends_at_the_width():
    candidates = out_of_distribution(Z, ACTIVATIONS, theta=math.inf, top_k=100)
    assert candidates.neurons == NeuronSet((range(4), range(2)))


def test_impossible_selection():
    with pytest.raises(ValueError, match="top_k is -1"):
        out_of_distribution(Z, ACTIVATIONS, theta=5.0, top_k=-1)
    with pytest.raises(ValueError, match=r"expected \[neuron\]"):
        out_of_distribution(Z[:1], ACTIVATIONS, theta=5.0)


@pytest.mark.parametrize(
    ("search", "last", "before"),
    [
        (SearchSettings(), (1.0, 16), (1.25, 15)),
        # Steps that are not exact in binary.
        (SearchSettings(theta_step=0.1, theta_min=2.0, k_step=0), (2.0, 0), (2.1, 0)),
        (SearchSettings(k_max=3), (4.25, 3), (4.5, 2)),
        (SearchSettings(k_max=1, k_step=1), (4.75, 1), (5.0, 0)),
    ],
)
def test_the_schedule_of_the_paper_ends_at_the_limit_and_that_of_the_release_before(search, last, before):
    paper, released = (schedule(search, evaluate_limits=limits) for limits in (True, False))
    assert paper[-1] == last
    assert released == paper[:-1]
    assert released[-1] == before


@given(st.floats(1, 9), st.floats(0.01, 5), st.floats(0, 1), st.integers(0, 9), st.integers(0, 3), st.booleans())
def test_schedule_stays_within_its_limits(start, step, minimum, k, k_step, limits):
    search = SearchSettings(start, step, minimum, k, k_step, k + 50)
    pairs = schedule(search, evaluate_limits=limits)
    assert pairs[0] == (start, k)
    assert all(theta >= minimum and k <= search.k_max for theta, k in pairs)
    assert [theta for theta, _ in pairs] == sorted({theta for theta, _ in pairs}, reverse=True)


def test_selection_stops_at_the_threshold():
    selection = initial_selection(Z, ACTIVATIONS, lambda neurons: 1 - len(neurons) / 10, threshold=0.6)
    assert selection.reached
    assert selection.score == 0.6
    assert [step.theta for step in selection.steps] == [5.0, 4.75]
    assert selection.neurons == NeuronSet(((0, 1), (0, 1)))


def test_selection_that_does_not_reach_the_threshold_keeps_its_last_step():
    selection = initial_selection(Z, ACTIVATIONS, lambda neurons: 0.9, threshold=0.5)
    assert not selection.reached
    assert (selection.steps[-1].theta, selection.steps[-1].k) == (1.25, 15)
    assert selection.score == 0.9
    paper = initial_selection(Z, ACTIVATIONS, lambda neurons: 0.9, threshold=0.5, protocol="paper")
    assert (paper.steps[-1].theta, paper.steps[-1].k) == (1.0, 16)


def test_equal_selections_are_scored_once():
    asked = []

    def score(neurons):
        asked.append(neurons)
        return 0.9

    initial_selection(Z, ACTIVATIONS, score, threshold=0.5)
    assert len(asked) == len(set(asked)) < 16


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.9])
def test_a_quick_score_changes_no_result(threshold):
    """Nor where the threshold is not reached, so that the score of the last step is asked for."""

    def score(neurons):
        return 1 - len(neurons) / 10

    def quick(neurons):
        return score(neurons) if score(neurons) <= threshold else 1.0

    plain = initial_selection(Z, ACTIVATIONS, score, threshold=threshold)
    other = initial_selection(Z, ACTIVATIONS, score, quick=quick, threshold=threshold)
    assert (other.candidates, other.score, other.reached) == (plain.candidates, plain.score, plain.reached)
    assert [step.neurons for step in other.steps] == [step.neurons for step in plain.steps]
    assert other.steps[-1] == plain.steps[-1]
    assert all(step.score == 1.0 for step in other.steps[:-1])
