import copy
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemolib.neurons import NeuronSet
from nemolib.refinement import refine_by_leading_seeds, refine_fast, refine_sequential


def keep_twice(layer):
    return [neuron for place, neuron in enumerate(layer) if layer[:place].count(neuron) < 2]


short_lists = st.lists(st.lists(st.integers(0, 5), max_size=8).map(keep_twice), min_size=1, max_size=4)
entry_lists = st.lists(st.lists(st.integers(0, 30), max_size=40).map(keep_twice), min_size=1, max_size=5)
single_entries = st.lists(st.lists(st.integers(0, 60), max_size=60, unique=True), min_size=1, max_size=7)


class Counted:
    """A score that counts how often it is asked."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, neurons):
        self.calls += 1
        return self.function(neurons)


def noise(neurons, salt=0):
    """Return a number in [0, 1] without any order, the same for the same set."""
    return int.from_bytes(hashlib.sha256(f"{salt} {neurons!r}".encode()).digest()[:4]) / 2**32


def needs(*required):
    """Return a score that is low where all required neurons are deactivated."""
    return lambda neurons: 0.1 if all(pair in neurons for pair in required) else 0.9


# One by one


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


@given(short_lists, st.none() | st.floats(0, 1))
def test_refinement_is_that_of_the_release_for_any_score(entries, threshold):
    """Where the initial selection did not reach the threshold, the score of all candidates takes its place."""
    start = noise(NeuronSet(entries))
    chosen = start if threshold is None else threshold
    refinement = refine_sequential(entries, noise, threshold=chosen)
    assert refinement.neurons == released(entries, noise, chosen)
    assert refinement.score == noise(refinement.neurons)
    assert refinement.neurons - NeuronSet(entries) == NeuronSet.empty(len(entries))
    assert refinement.score < chosen or refinement.score == start


def test_layers_come_first_then_neurons_both_from_the_last_layer():
    found = refine_sequential(((0, 1), (3,), (1, 4)), needs((0, 1), (2, 4)), threshold=0.5)
    assert found.neurons == NeuronSet(((1,), (), (4,)))
    assert found.score == 0.1
    assert [(test.layer, test.neuron, test.removed) for test in found.tests] == [
        (2, None, False),
        (1, None, True),
        (0, None, False),
        (2, 1, True),
        (2, 4, False),
        (0, 0, True),
        (0, 1, False),
    ]


@pytest.mark.parametrize("refine", [refine_sequential, refine_fast])
def test_the_input_is_left_alone_and_nothing_needs_no_evaluation(refine):
    entries = [[0, 1, 0], [2]]
    refine(entries, needs((0, 1)), threshold=0.5)
    assert entries == [[0, 1, 0], [2]]
    score = Counted(lambda neurons: 0.0)
    found = refine(((), ()), score, threshold=0.5, initial_score=1.0)
    assert (found.neurons, found.tests, score.calls) == (NeuronSet.empty(2), (), 0)


# In groups


@st.composite
def monotone_scores(draw):
    """Scores that never fall when neurons are reactivated: missing required neurons, weighted sums, or sets covered."""
    kind = draw(st.sampled_from(["required", "weights", "covers"]))
    salt = draw(st.integers(0, 10**6))
    share = draw(st.floats(0, 1))

    def weight(layer, neuron):
        return noise(f"{layer} {neuron}", salt) ** 3

    if kind == "required":
        return lambda entries: (
            lambda neurons: float(any(weight(*pair) > 1 - share and pair not in neurons for pair in NeuronSet(entries)))
        )
    if kind == "weights":

        def weighted(entries):
            everything = NeuronSet(entries)
            total = sum(weight(*pair) for pair in everything) or 1.0
            return lambda neurons: sum(weight(*pair) for pair in everything if pair not in neurons) / total

        return weighted

    def covered(entries):
        groups = {}
        for pair in NeuronSet(entries):
            groups.setdefault(int(weight(*pair) * 7), set()).add(pair)
        return lambda neurons: sum(not any(pair in neurons for pair in group) for group in groups.values()) / 7

    return covered


@settings(max_examples=150, deadline=None)
@given(entry_lists, monotone_scores(), st.none() | st.floats(0, 1.1))
def test_a_monotone_score_gives_the_sequential_set(entries, make, threshold):
    """And all candidates where the threshold is not reached, so that the score that they have takes its place."""
    score = make(entries)
    chosen = score(NeuronSet(entries)) if threshold is None else threshold
    fast = refine_fast(entries, score, threshold=chosen)
    slow = refine_sequential(entries, score, threshold=chosen)
    assert fast.neurons == slow.neurons
    assert fast.score == slow.score
    assert threshold is not None or fast.neurons == NeuronSet(entries)


def check_any(entries, function, threshold):
    score, start = Counted(function), function(NeuronSet(entries))
    chosen = start if threshold is None else threshold
    refine_sequential(entries, score, threshold=chosen)
    sequential, score.calls = score.calls, 0
    fast = refine_fast(entries, score, threshold=chosen)
    assert score.calls <= 1.1 * sequential + 8
    assert fast.score == function(fast.neurons)
    assert fast.score < chosen or fast.score == start
    assert fast.neurons - NeuronSet(entries) == NeuronSet.empty(len(entries))


@settings(max_examples=200, deadline=None)
@given(entry_lists, st.integers(0, 10**6), st.none() | st.floats(0, 1))
def test_any_score_ends_below_the_threshold_at_bounded_cost(entries, salt, threshold):
    check_any(entries, lambda neurons: noise(neurons, salt), threshold)


@settings(max_examples=100, deadline=None)
@given(single_entries, monotone_scores(), st.integers(0, 10**6), st.floats(0, 0.5), st.floats(0, 1))
def test_a_nearly_monotone_score(entries, make, salt, roughness, threshold):
    smooth = make(entries)
    check_any(entries, lambda neurons: smooth(neurons) + roughness * (noise(neurons, salt) - 0.5), threshold)


class Adversary:
    """Answers so that groups look promising and then fail: consistent, and without any order."""

    def __init__(self, start, alone_passes):
        self.start, self.alone_passes, self.last, self.known = start, alone_passes, start, {start: 0.0}

    def __call__(self, neurons):
        if neurons not in self.known:
            single = len(self.last) - len(neurons) <= 1
            self.known[neurons] = 0.0 if single and self.alone_passes else 1.0
        if self.known[neurons] < 0.5:
            self.last = neurons
        return self.known[neurons]


@pytest.mark.parametrize("alone_passes", [True, False])
@pytest.mark.parametrize("sizes", [(40,), (1000,), (3, 200, 0, 17), (1,) * 7, (0, 0)])
def test_an_adversary(sizes, alone_passes):
    entries = [list(range(size)) for size in sizes]

    def cost(search):
        score = Counted(Adversary(NeuronSet(entries), alone_passes))
        search(entries, score, threshold=0.5, initial_score=0.0)
        return score.calls

    assert cost(refine_fast) <= 1.1 * cost(refine_sequential) + 8


@pytest.mark.parametrize("needed", [0, 1, 2, 5])
def test_few_needed_among_many_cost_little(needed):
    entries = [list(range(100 * layer, 100 * layer + 100)) for layer in range(7)]
    required = [(layer, 100 * layer + 37) for layer in range(needed)]
    score = Counted(needs(*required))
    found = refine_fast(entries, score, threshold=0.5, initial_score=0.1)
    assert found.neurons == NeuronSet.of(required, layers=7)
    # Seven layers; for each needed neuron about log2(100) tests, and a test or two of what is left of its layer.
    assert score.calls <= 7 + 9 * needed


def test_tests_name_the_layers_the_groups_and_the_neurons():
    entries = [[0, 1, 2, 3, 4, 5, 6, 7], [9]]
    found = refine_fast(entries, needs((0, 6)), threshold=0.5, initial_score=0.1)
    first, second, *rest = found.tests
    assert (first.layer, first.neuron, first.group, first.removed) == (1, None, (), True)
    assert (second.layer, second.neuron, second.group, second.removed) == (0, None, (), False)
    left = {(0, neuron) for neuron in range(8)}
    for test in rest:
        asked = set(test.group or [(test.layer, test.neuron)])
        assert asked <= left
        assert (test.neuron is None) == (len(test.group) > 1)
        left -= asked if test.removed else set()
    assert NeuronSet.of(left, layers=2) == found.neurons == NeuronSet(((6,), ()))


def test_neurons_that_stayed_are_tried_again_where_the_score_fell():
    """Neuron 0 can go only after neuron 1 has gone, which lowers the score."""
    scores = {(0, 1, 2): 0.4, (1, 2): 0.55, (0, 2): 0.3, (2,): 0.2, (0,): 0.9, (1,): 0.9, (0, 1): 0.9, (): 0.9}
    found, slow = (
        refine([[0, 1, 2]], lambda neurons: scores[neurons.layers[0]], threshold=0.5)
        for refine in (refine_fast, refine_sequential)
    )
    assert slow.neurons == NeuronSet(((0, 2),))
    assert found.neurons == NeuronSet(((2,),))


# On the seeds that lead


class SeedScores:
    """A score over seeds, as `nemolib.blocked_score.BlockedScore` has it, that counts (set, seed) pairs."""

    def __init__(self, functions):
        self.functions, self.asked = functions, {}

    def value(self, neurons, place):
        return self.asked.setdefault((neurons, place), self.functions[place](neurons))

    def __call__(self, neurons):
        return max(self.value(neurons, place) for place in range(len(self.functions)))

    def of_seeds(self, neurons, places, *, limit=1.0):
        known = [self.asked[neurons, place] for place in places if (neurons, place) in self.asked]
        for place in places:
            if known and max(known) > limit:
                break
            known.append(self.value(neurons, place))
        return max(known)

    def screen(self, neurons, *, limit):
        for place in range(len(self.functions)):
            if self.value(neurons, place) > limit:
                return self.value(neurons, place)
        return self(neurons)

    def ranking(self, neurons):
        asked = [place for place in range(len(self.functions)) if (neurons, place) in self.asked]
        return sorted(asked, key=lambda place: -self.value(neurons, place))


@settings(max_examples=100, deadline=None)
@given(entry_lists, st.lists(monotone_scores(), min_size=1, max_size=6), st.floats(0, 1.1))
def test_leading_seeds_give_the_sequential_set_of_a_monotone_score(entries, makes, threshold):
    score = SeedScores([make(entries) for make in makes])
    found = refine_by_leading_seeds(entries, score, threshold=threshold)
    slow = refine_sequential(entries, score, threshold=threshold)
    assert found.neurons == slow.neurons
    assert found.score == slow.score


@settings(max_examples=150, deadline=None)
@given(
    entry_lists,
    st.lists(st.none() | monotone_scores(), min_size=1, max_size=6),
    st.integers(0, 10**6),
    st.floats(0, 1),
)
def test_leading_seeds_end_below_the_threshold_of_all(entries, makes, salt, threshold):
    """For scores without any order, and for nearly monotone ones."""
    smooth = [make and make(entries) for make in makes]
    score = SeedScores(
        [
            lambda neurons, i=i, f=f: noise(neurons, (salt, i)) if f is None else f(neurons) + 0.2 * noise(neurons, i)
            for i, f in enumerate(smooth)
        ]
    )
    start = score(NeuronSet(entries))
    found = refine_by_leading_seeds(entries, score, threshold=threshold)
    assert found.score == score(found.neurons)
    assert found.score < threshold or (found.score == start and found.neurons == NeuronSet(entries))


def test_a_new_leading_seed_is_not_evaluated_where_it_is_known_to_pass():
    # Each seed needs a neuron of its own; that of the seed that joins is tested last.
    entries = [list(range(40))[::-1]]
    needed = [(0, 20), (0, 0)]
    functions = [lambda neurons, pair=pair: 0.9 - 0.6 * (pair in neurons) - 0.1 * (pair[1] == 0) for pair in needed]
    score = SeedScores(functions)
    found = refine_by_leading_seeds(entries, score, threshold=0.5)
    assert found.neurons == NeuronSet.of(needed, layers=1)
    accepted = [neurons for (neurons, place), value in score.asked.items() if place == 0 and value < 0.5]
    larger = [neurons for neurons in accepted if (0, 0) in neurons]
    asked = [neurons for neurons, place in score.asked if place == 1 and neurons in larger]
    # All candidates, the end, and what bisection asked of those in between.
    assert len(larger) > 5
    assert len(asked) <= 2 + len(accepted).bit_length()


def test_one_leading_seed_costs_little_more_than_one_seed():
    entries = [list(range(50)) for _ in range(3)]
    strong = needs((0, 3), (2, 8))
    score = SeedScores([lambda neurons, weak=weak: strong(neurons) - 0.05 * weak for weak in range(10)])
    assert refine_by_leading_seeds(entries, score, threshold=0.35).neurons == NeuronSet(((3,), (), (8,)))
    assert len(score.asked) <= len({neurons for neurons, _ in score.asked}) + 2 * 9
