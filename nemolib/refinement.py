"""Refinement of the initial selection: which of its neurons are needed (Alg. 4 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemolib.neurons import NeuronSet
from nemolib.selection import Score

_ROUNDING = 1e-3
"""A fall of a similarity that may come from rounding, in half precision."""


@dataclass(frozen=True, slots=True)
class RefinementTest:
    """One test of the refinement.

    Attributes:
        layer: Layer that was tested; of a group, that of its first neuron.
        neuron: Neuron that was reactivated; None means all of the layer, or a group.
        score: Score of the neurons that stayed deactivated. Where the search stops a test as soon as it fails
            (`nemolib.group_testing.refine_fast`), the score of a failed test is the similarity at which it stopped.
        removed: Whether the score stayed below the threshold, so that the neuron (layer, group) is not needed.
        group: The (layer, neuron) pairs that were reactivated together, all their entries at once; empty where a layer
            or a single entry was tested.
    """

    layer: int
    neuron: int | None
    score: float
    removed: bool
    group: tuple[tuple[int, int], ...] = ()


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
    state = RefinementState(entries, score, threshold=threshold, initial_score=initial_score)
    state.test_layers()
    for place in state.places():
        state.test_neuron(*place)
    return state.result()


class RefinementState:
    """What is deactivated at a point of a refinement, how it scores, and the tests that led there.

    Args:
        entries: For each layer its candidates, in the order of the tests.
        score: Returns the score of a neuron set that is deactivated.
        threshold: Score that must be undercut, exclusive.
        initial_score: Score of all candidates; None evaluates it.

    Attributes:
        entries: For each layer the entries that are left.
        neurons: The same as a set.
        score: Its score.
        tests: The tests so far.
        evaluations: How often the score was asked.
        fallen: By how much the score fell, in all, when neurons were reactivated; 0 for a monotone score, and for one
            that differs from it by rounding.
    """

    def __init__(
        self, entries: Sequence[Sequence[int]], score: Score, *, threshold: float, initial_score: float | None = None
    ) -> None:
        self.entries = [list(layer) for layer in entries]
        self.neurons = _neurons(self.entries)
        self.tests: list[RefinementTest] = []
        self.evaluations = 0
        self.fallen = 0.0
        self._failures: set[NeuronSet] = set()
        self._evaluate, self._threshold = score, threshold
        self.score = self._ask(self.neurons) if initial_score is None else initial_score

    @property
    def below(self) -> bool:
        """Whether the score is below the threshold."""
        return self.score < self._threshold

    @property
    def excess(self) -> float:
        """How far above the threshold the last test ended."""
        return self.tests[-1].score - self._threshold

    def places(self) -> list[tuple[int, int]]:
        """Return the entries that are left as (layer, neuron), in the order of the tests."""
        return [(layer, neuron) for layer in reversed(range(len(self.entries))) for neuron in self.entries[layer]]

    def test_layers(self) -> None:
        """Test each layer as a whole, from the last to the first."""
        for layer in reversed(range(len(self.entries))):
            if self.entries[layer]:
                self._test(_replaced(self.entries, layer, []), layer)

    def test_neuron(self, layer: int, neuron: int) -> bool:
        """Test one entry of a neuron, and return whether it was removed."""
        rest = list(self.entries[layer])
        rest.remove(neuron)
        return self._test(_replaced(self.entries, layer, rest), layer, neuron)

    def has_failed(self, place: tuple[int, int]) -> bool:
        """Return whether a neuron was tested with just those deactivated that are now, and had to stay."""
        return _neurons(self._rest([place])) in self._failures

    def test_group(self, group: Sequence[tuple[int, int]]) -> bool:
        """Test all entries of some neurons together, and return whether they were removed."""
        trial, (layer, neuron) = self._rest(group), group[0]
        return self._test(trial, layer, neuron if len(group) == 1 else None, tuple(group))

    def result(self) -> Refinement:
        """Return the refinement that ends here."""
        return Refinement(self.neurons, self.score, tuple(self.tests))

    def _test(
        self, trial: list[list[int]], layer: int, neuron: int | None = None, group: tuple[tuple[int, int], ...] = ()
    ) -> bool:
        """Keep only the entries of a trial deactivated if the score stays below the threshold."""
        neurons = _neurons(trial)
        score = self.score if neurons == self.neurons else self._ask(neurons)
        removed = score < self._threshold
        self.tests.append(RefinementTest(layer, neuron, score, removed, group))
        if removed:
            fall = self.score - score
            self.fallen += fall if fall > _ROUNDING else 0.0
            self.entries, self.neurons, self.score = trial, neurons, score
        else:
            self._failures.add(neurons)
        return removed

    def _rest(self, group: Sequence[tuple[int, int]]) -> list[list[int]]:
        drop = set(group)
        return [[item for item in layer if (i, item) not in drop] for i, layer in enumerate(self.entries)]

    def _ask(self, neurons: NeuronSet) -> float:
        self.evaluations += 1
        return self._evaluate(neurons)


def _replaced(entries: list[list[int]], layer: int, rest: list[int]) -> list[list[int]]:
    return [*entries[:layer], rest, *entries[layer + 1 :]]


def _neurons(entries: Sequence[Sequence[int]]) -> NeuronSet:
    return NeuronSet(tuple(map(tuple, entries)))
