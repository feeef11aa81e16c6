"""Refinement of the initial selection: which of its neurons are needed (Alg. 4 of the paper), one by one or in groups.

`refine_sequential` is the authors' course. `refine_fast` tests groups, with far fewer evaluations: most candidates are not
needed. Several of them, reactivated together, then pass one test where the sequential search needs one each; and where a
group fails, bisection finds its first neuron that must stay. The candidates come in the order of the sequential search,
and a test always asks for a *prefix* of those that are left. For a monotone score (it never falls when neurons are
reactivated) every decision is therefore that of the sequential search.

This is generalized binary splitting (Hwang, 1972), with two changes: the size of a group follows from the share of
needed neurons seen so far, and a layer that failed its own test is known to hold one of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nemolib.neurons import NeuronSet
from nemolib.selection import Score

if TYPE_CHECKING:
    from nemolib.blocked_score import BlockedScore

SPARE = 8
"""Evaluations that the fast search may spend beyond eleven tenths of those of the sequential search."""

_ROUNDING = 1e-3
"""A fall of a similarity that may come from rounding, in half precision."""

_ROUNDS = 3
"""Rounds of `refine_by_leading_seeds` before all seeds take part."""

_PRIOR_WEIGHT = 3.0
"""How many neurons the first guess of the share of needed ones counts as; it makes no difference of note."""


@dataclass(frozen=True, slots=True)
class RefinementTest:
    """One test of the refinement.

    Attributes:
        layer: Layer that was tested; of a group, that of its first neuron.
        neuron: Neuron that was reactivated; None means all of the layer, or a group.
        score: Score of the neurons that stayed deactivated. Where the search stops a test as soon as it fails
            (`refine_fast`), the score of a failed test is the similarity at which it stopped.
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
    for place in state.left:
        state.test_neuron(*place)
    return state.result()


def refine_fast(
    entries: Sequence[Sequence[int]], score: Score, *, threshold: float, initial_score: float | None = None
) -> Refinement:
    """Return the neurons that are needed to keep the score below the threshold (Alg. 4), tested in groups.

    Layers are tested one by one, as in `refine_sequential`; so are neurons as long as the score is not below the
    threshold (the initial selection did not reach it, and nothing was removed yet). From there on the neurons that are
    left are tested in groups.

    What holds for *any* score:

    - Every set that is accepted was evaluated. The result scores below the threshold if the candidates do, and never
      above both the threshold and the score of the candidates.
    - At most 1.1 n + 8 evaluations, where n is the number of the sequential search. Up to the first group both searches
      do the same. Then the sequential search evaluates each of the N neurons that are left exactly once. Here an
      evaluation decides at least one neuron, except where a group of several fails; such groups are formed only while
      evaluations minus decided neurons stay within n / 10 + 8. The clean-up stays within the same limit.

    What holds for a monotone score: the result is that of the sequential search.

    The score of a model is not quite monotone. If it fell when neurons were reactivated, a neuron that had to stay may
    have become dispensable. Those that failed by less than all these falls together are tested once more, one by one,
    as far as the limit above allows.

    Source: Sec. 3.3, Alg. 4; F. K. Hwang, "A method for detecting all defective members in a population by group
        testing", 1972.
    Deviates: several neurons at a time, and the clean-up.

    Args:
        entries: For each layer its candidates, in the order of the tests (`nemolib.selection.Candidates.entries`).
        score: Returns the score of a neuron set that is deactivated. Where that is not below the threshold, any value
            that is not below it either will do.
        threshold: Score that must be undercut, exclusive.
        initial_score: Score of all candidates, if it is known.

    Returns:
        The needed neurons, a subset of the candidates.
    """
    state = RefinementState(entries, score, threshold=threshold, initial_score=initial_score)
    state.test_layers()
    places = list(state.left)
    while places and state.score >= threshold:
        state.test_neuron(*places.pop(0))
    groups = _Groups(state, _last_places(state.left, places))
    groups.decide()
    groups.clean_up()
    return state.result()


def refine_by_leading_seeds(entries: Sequence[Sequence[int]], score: BlockedScore, *, threshold: float) -> Refinement:
    """Return the neurons that are needed to keep a score below the threshold (Alg. 4), tested in groups on few seeds.

    The score is a maximum over seeds, and a few of them lead it. `refine_fast` runs on the leading seed alone; the set
    that it ends with is evaluated for the others. If one of them is not below the threshold, it joins the leading ones
    and the search is repeated: bisection finds the first accepted set that fails for the new seed, and up to there
    nothing is evaluated again. After three rounds all seeds take part.

    As with `refine_fast`, the result scores below the threshold if the candidates do, and is that of the sequential
    search for a score that is monotone for each seed: what fails for one seed fails for all; an accepted set contains
    the later ones, so that it passes for a seed for which one of them does; and the last one passed for all seeds.

    Source: Sec. 3.3, Alg. 4.
    Deviates: as `refine_fast`; and sets are rejected on few seeds, without their score over all.

    Args:
        entries: For each layer its candidates, in the order of the tests.
        score: The score of the prompt.
        threshold: Score that must be undercut, exclusive.

    Returns:
        The needed neurons; the tests are those of the last round.
    """
    start = NeuronSet(entries)
    initial_score = score(start)

    def refine(leading: list[int], passing: Sequence[NeuronSet]) -> tuple[Refinement, list[NeuronSet]]:
        """Return what some seeds leave, and the sets that they accepted, in order; ``passing``: for the newest seed too."""
        accepted = []

        def ask(neurons: NeuronSet) -> float:
            seeds = score.ranking(neurons)[:1] if neurons in passing else leading
            found = score.of_seeds(neurons, seeds, limit=threshold)
            if found < threshold:
                accepted.append(neurons)
            return found

        return refine_fast(entries, ask, threshold=threshold, initial_score=initial_score), accepted

    leading, passing = score.ranking(start)[:1], []
    for _ in range(_ROUNDS):
        found, accepted = refine(leading, passing)
        final = initial_score if found.neurons == start else score.screen(found.neurons, limit=threshold)
        if final < threshold or found.neurons == start:
            return Refinement(found.neurons, final, found.tests)
        newest = score.ranking(found.neurons)[0]
        if newest in leading:
            # It passed for a later set, and was taken for monotone.
            break
        first = bisect_left(accepted, True, key=lambda neurons: score.of_seeds(neurons, [newest]) >= threshold)
        leading, passing = [newest, *leading], accepted[:first]
    everywhere = partial(score.screen, limit=threshold)
    return refine_fast(entries, everywhere, threshold=threshold, initial_score=initial_score)


class RefinementState:
    """What is deactivated at a point of a refinement, how it scores, and the tests that led there.

    Args:
        entries: For each layer its candidates, in the order of the tests.
        score: Returns the score of a neuron set that is deactivated.
        threshold: Score that must be undercut, exclusive.
        initial_score: Score of all candidates; None evaluates it.

    Attributes:
        left: The entries that are left as (layer, neuron), in the order of the tests: the last layer first.
        neurons: The same as a set.
        score: Its score.
        tests: The tests so far.
        evaluations: How often the score was asked.
        fallen: By how much the score fell, in all, when neurons were reactivated; 0 for a monotone score, and for one
            that differs from it by rounding.
        last_excess: How far above the threshold the last test that failed ended.
    """

    def __init__(
        self, entries: Sequence[Sequence[int]], score: Score, *, threshold: float, initial_score: float | None = None
    ) -> None:
        self._layers = range(len(entries))
        self.left = [(layer, neuron) for layer in reversed(self._layers) for neuron in entries[layer]]
        self.neurons = self._set(self.left)
        self.tests: list[RefinementTest] = []
        self.evaluations = 0
        self.fallen = self.last_excess = 0.0
        self._failures: set[NeuronSet] = set()
        self._evaluate, self._threshold = score, threshold
        self.score = self._ask(self.neurons) if initial_score is None else initial_score

    def test_layers(self) -> None:
        """Test each layer as a whole, from the last to the first."""
        for layer in reversed(self._layers):
            if self.neurons.layers[layer]:
                self._test([place for place in self.left if place[0] != layer], layer)

    def test_neuron(self, layer: int, neuron: int) -> None:
        """Test the first entry of a neuron."""
        rest = list(self.left)
        rest.remove((layer, neuron))
        self._test(rest, layer, neuron)

    def test_group(self, group: Sequence[tuple[int, int]]) -> bool:
        """Test all entries of some neurons together, and return whether they were removed."""
        layer, neuron = group[0]
        return self._test(self._without(group), layer, neuron if len(group) == 1 else None, tuple(group))

    def has_failed(self, place: tuple[int, int]) -> bool:
        """Return whether a neuron was tested with just those deactivated that are now, and had to stay."""
        return self._set(self._without([place])) in self._failures

    def result(self) -> Refinement:
        """Return the refinement that ends here."""
        return Refinement(self.neurons, self.score, tuple(self.tests))

    def _test(
        self,
        rest: list[tuple[int, int]],
        layer: int,
        neuron: int | None = None,
        group: tuple[tuple[int, int], ...] = (),
    ) -> bool:
        """Keep only the rest deactivated if the score stays below the threshold."""
        neurons = self._set(rest)
        score = self.score if neurons == self.neurons else self._ask(neurons)
        removed = score < self._threshold
        self.tests.append(RefinementTest(layer, neuron, score, removed, group))
        if removed:
            fall = self.score - score
            self.fallen += fall if fall > _ROUNDING else 0.0
            self.left, self.neurons, self.score = rest, neurons, score
        else:
            self._failures.add(neurons)
            self.last_excess = score - self._threshold
        return removed

    def _without(self, group: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        drop = set(group)
        return [place for place in self.left if place not in drop]

    def _set(self, places: Sequence[tuple[int, int]]) -> NeuronSet:
        return NeuronSet.of(places, layers=len(self._layers))

    def _ask(self, neurons: NeuronSet) -> float:
        self.evaluations += 1
        return self._evaluate(neurons)


def _last_places(left: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the neurons that the sequential search would still evaluate: each at the last of its entries.

    A neuron whose first entry was passed over before the score fell below the threshold keeps its other one for good.

    Args:
        left: All entries that are left.
        places: Those of them that were not tested yet.
    """
    left, pending = Counter(left), []
    for place in places:
        left[place] -= 1
        if not left[place]:
            pending.append(place)
    return pending


class _Groups:
    """Group tests on the pending neurons, in order; what lies before ``start`` is decided."""

    def __init__(self, state: RefinementState, pending: list[tuple[int, int]]) -> None:
        self._state, self._pending = state, pending
        self._start = 0
        self._kept: list[tuple[tuple[int, int], float]] = []
        # A layer that failed its test needs one of its neurons, if all of them are still pending.
        layers = [layer for layer, _ in pending]
        whole = [i for i in dict.fromkeys(layers) if layers.count(i) == len(state.neurons.layers[i])]
        self._open = [(layers.index(i), layers.index(i) + layers.count(i)) for i in whole]
        self._failed: int | None = None
        self._excess = 0.0
        self._prior = min(0.5, max(1, len(whole)) / max(1, len(pending)))
        self._debt = 0
        self._allowed = (state.evaluations + len(pending)) // 10 + SPARE

    def decide(self) -> None:
        """Decide all pending neurons."""
        while self._start < len(self._pending):
            end = self._known_failure()
            if end == self._start + 1:
                # Its own test is that of the group that failed; if it is the last of its layer, there was none.
                self._keep(self._excess if end == self._failed else 0.0, evaluations=0)
                continue
            size = self._size(end)
            if self._state.test_group(self._pending[self._start : self._start + size]):
                self._debt += 1 - size
                self._start += size
            elif size == 1:
                self._keep(self._state.last_excess, evaluations=1)
            else:
                self._debt += 1
                self._failed, self._excess = self._start + size, self._state.last_excess

    def clean_up(self) -> None:
        """Test neurons that stayed once more, one by one: those that may pass, as far as the score is known to fall."""
        for place, excess in self._kept:
            if self._debt >= self._allowed:
                return
            if excess < self._state.fallen and not self._state.has_failed(place):
                self._debt += 1
                self._state.test_group([place])

    def _keep(self, excess: float, *, evaluations: int) -> None:
        """Let the next neuron stay, whose test ended so far above the threshold."""
        self._kept.append((self._pending[self._start], excess))
        self._debt += evaluations - 1
        self._start += 1
        self._failed = None
        self._open = [(first, end) for first, end in self._open if first >= self._start]

    def _known_failure(self) -> int | None:
        """Return the smallest end so that reactivating all neurons up to it is known to fail."""
        ends = [end for _, end in self._open if end > self._start]
        return min(ends + ([] if self._failed is None else [self._failed]), default=None)

    def _size(self, end: int | None) -> int:
        """Return how many neurons to test: so many that the test passes about as likely as not."""
        last = len(self._pending) if end is None else end - 1
        if self._debt >= self._allowed:
            return 1
        return min(range(1, last - self._start + 1), key=lambda size: abs(self._passes(size, end) - 0.5))

    def _passes(self, size: int, end: int | None) -> float:
        """Return the probability that the next neurons are not needed, if each one is with the same probability."""
        rate = (len(self._kept) + _PRIOR_WEIGHT * self._prior) / (self._start + _PRIOR_WEIGHT)
        spared = 1 - rate
        if end is None:
            return spared**size
        # One of those from ``first`` to ``end`` is needed; nothing is known of those before.
        first = self._start
        if end != self._failed:
            first = max(first, next(begin for begin, stop in self._open if stop == end))
        free = first - self._start
        if size <= free:
            return spared**size
        return (spared**size - spared ** (end - self._start)) / (1 - spared ** (end - first))
