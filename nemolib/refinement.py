"""Refinement of the initial selection: which of its neurons are needed (Alg. 4 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemolib.neurons import NeuronSet
from nemolib.selection import Score


@dataclass(frozen=True, slots=True)
class RefinementTest:
    """One test of the refinement.

    Attributes:
        layer: Layer that was tested.
        neuron: Neuron that was reactivated; None means all of the layer.
        score: Score of the neurons that stayed deactivated.
        removed: Whether the score stayed below the threshold, so that the neuron (or layer) is not needed.
    """

    layer: int
    neuron: int | None
    score: float
    removed: bool


@dataclass(frozen=True, slots=True)
class Refinement:
    """Result of the refinement: the neurons that are needed, their score, and all tests in order."""

    neurons: NeuronSet
    score: float
    tests: tuple[RefinementTest, ...]


def refine_sequential(
    entries: Sequence[Sequence[int]], score: Score, *, threshold: float, initial_score: float | None = None
) -> Refinement:
    """Return the neurons that are needed to keep the score below the threshold (Alg. 4), tested one by one.

    First each layer, from the last to the first, is reactivated as a whole; then, in the same order of layers, each
    neuron that is left. What can be reactivated with the score below the threshold stays so.

    A neuron with two entries loses one of them at the first. The set is then the same, so that nothing is evaluated:
    the entry goes if the score is below the threshold, and what counts is the test at the last entry. Where the score
    is not below it (the initial selection did not reach the threshold, and nothing was removed yet), the neuron stays.

    Source: Sec. 3.3, Alg. 4; authors' code, utils/activation_detection.py.

    Args:
        entries: For each layer its candidates, in the order of the tests (`nemolib.selection.Candidates.entries`).
        score: Returns the score of a neuron set that is deactivated.
        threshold: Score that must be undercut, exclusive.
        initial_score: Score of all candidates, if it is known.

    Returns:
        The needed neurons, a subset of the candidates.
    """
    state = _State([list(layer) for layer in entries], score, threshold, initial_score)
    order = range(len(entries) - 1, -1, -1)
    for layer in order:
        if state.entries[layer]:
            state.test(layer, None, [])
    for layer in order:
        for neuron in tuple(state.entries[layer]):
            rest = list(state.entries[layer])
            rest.remove(neuron)
            state.test(layer, neuron, rest)
    return Refinement(state.neurons, state.score, tuple(state.tests))


class _State:
    """What is deactivated at a point of the refinement, and how it scores."""

    def __init__(self, entries: list[list[int]], score: Score, threshold: float, initial_score: float | None) -> None:
        self.entries = entries
        self.neurons = _neurons(entries)
        self.tests: list[RefinementTest] = []
        self._evaluate, self._threshold = score, threshold
        self.score = score(self.neurons) if initial_score is None else initial_score

    def test(self, layer: int, neuron: int | None, rest: list[int]) -> None:
        """Keep only ``rest`` of a layer if the score stays below the threshold."""
        trial = [*self.entries[:layer], rest, *self.entries[layer + 1 :]]
        neurons = _neurons(trial)
        score = self.score if neurons == self.neurons else self._evaluate(neurons)
        removed = score < self._threshold
        self.tests.append(RefinementTest(layer, neuron, score, removed))
        if removed:
            self.entries, self.neurons, self.score = trial, neurons, score


def _neurons(entries: Sequence[Sequence[int]]) -> NeuronSet:
    return NeuronSet(tuple(map(tuple, entries)))
