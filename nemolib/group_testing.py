"""Refinement by group testing: the sequential search of Alg. 4 with far fewer evaluations.

Most candidates are not needed. Several of them, reactivated together, then pass one test where the sequential search
needs one each; and where a group fails, bisection finds its first neuron that must stay. The candidates come in the
order of the sequential search, and a test always asks for a *prefix* of those that are left. For a monotone score (it
never falls when neurons are reactivated) every decision is therefore that of the sequential search.

This is generalized binary splitting (Hwang, 1972), with two changes: the size of a group follows from the share of
needed neurons seen so far, and a layer that failed its own test is known to hold one of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from nemolib.neurons import NeuronSet
from nemolib.refinement import Refinement, RefinementState
from nemolib.selection import Score

if TYPE_CHECKING:
    from nemolib.blocked_score import BlockedScore

SPARE = 8
"""Evaluations that the fast search may spend beyond eleven tenths of those of the sequential search."""

_ROUNDS = 3
"""Rounds of `refine_by_leading_seeds` before all seeds take part."""

_PRIOR_WEIGHT = 3.0
"""How many neurons the first guess of the share of needed ones counts as; it makes no difference of note."""


def refine_fast(
    entries: Sequence[Sequence[int]],
    score: Score,
    *,
    threshold: float,
    initial_score: float | None = None,
) -> Refinement:
    """Return the neurons that are needed to keep the score below the threshold (Alg. 4), tested in groups.

    Layers are tested one by one, as in `nemolib.refinement.refine_sequential`; so are neurons as long as the score is
    not below the threshold (the initial selection did not reach it, and nothing was removed yet). From there on the
    neurons that are left are tested in groups.

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
    places = state.places()
    while places and not state.below:
        state.test_neuron(*places.pop(0))
    pending = _last_places(state, places)
    groups = _Groups(state, pending)
    groups.decide()
    groups.clean_up()
    return state.result()


def refine_by_leading_seeds(
    entries: Sequence[Sequence[int]],
    score: BlockedScore,
    *,
    threshold: float,
    refine: Callable[..., Refinement] = refine_fast,
) -> Refinement:
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
        refine: The search of each round; `refine_fast`, or `nemolib.refinement.refine_sequential`.

    Returns:
        The needed neurons; the tests are those of the last round.
    """
    start = NeuronSet(tuple(map(tuple, entries)))
    initial_score, leading = score(start), score.ranking(start)[:1]
    accepted: list[NeuronSet] = []
    for _ in range(_ROUNDS):
        ask = _Asked(score, leading, threshold=threshold, passing=accepted)
        found = refine(entries, ask, threshold=threshold, initial_score=initial_score)
        final = initial_score if found.neurons == start else score.screen(found.neurons, limit=threshold)
        if final < threshold or found.neurons == start:
            return Refinement(found.neurons, final, found.tests)
        newest = score.ranking(found.neurons)[0]
        if newest in leading:
            # It passed for a later set, and was taken for monotone.
            break
        first = bisect_left(ask.accepted, True, key=lambda neurons: score.of_seeds(neurons, [newest]) >= threshold)
        leading, accepted = [newest, *leading], ask.accepted[:first]
    everywhere = partial(score.screen, limit=threshold)
    return refine(entries, everywhere, threshold=threshold, initial_score=initial_score)


class _Asked:
    """The largest similarity of the leading seeds, and the sets that it accepted, in order.

    Args:
        score: The score of the prompt.
        leading: Positions of the leading seeds, the newest first.
        threshold: Score that must be undercut; what does not is known by one seed.
        passing: Sets that pass for the newest seed too, without being evaluated for it.
    """

    def __init__(
        self, score: BlockedScore, leading: Sequence[int], *, threshold: float, passing: Sequence[NeuronSet]
    ) -> None:
        self.accepted: list[NeuronSet] = []
        self._score, self._leading, self._threshold, self._passing = score, leading, threshold, frozenset(passing)

    def __call__(self, neurons: NeuronSet) -> float:
        seeds = self._score.ranking(neurons)[:1] if neurons in self._passing else self._leading
        found = self._score.of_seeds(neurons, seeds, limit=self._threshold)
        if found < self._threshold:
            self.accepted.append(neurons)
        return found


def _last_places(state: RefinementState, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the neurons that the sequential search would still evaluate: each at the last of its entries.

    A neuron whose first entry was passed over before the score fell below the threshold keeps its other one for good.
    """
    left = {}
    for place in state.places():
        left[place] = left.get(place, 0) + 1
    pending = []
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
        whole = [i for i in dict.fromkeys(layers) if layers.count(i) == len(set(state.entries[i]))]
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
                self._keep(self._state.excess, evaluations=1)
            else:
                self._debt += 1
                self._failed, self._excess = self._start + size, self._state.excess

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
