import pytest

from nemolib.blocked_score import BlockedScore
from nemolib.first_step import Evaluations, first_step
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.settings import PAPER, RELEASED, DetectionSettings, SimilaritySettings
from nemolib.similarity import similarity

SEEDS = [0, 2, 3, 4]
SIMILARITY = SimilaritySettings(kernel_size=3, sigma=0.5)


def some(**layers):
    """Return a set by layer: l0=[1], l6=[2, 3]."""
    return NeuronSet.of([(int(name[1:]), i) for name, items in layers.items() for i in items], layers=7)


SETS = [some(l0=[1, 2], l2=[3], l6=[3, 4]), some(l0=[1, 2], l2=[3]), some(l5=[7], l6=[3]), some(l0=list(range(8)))]


@pytest.fixture(scope="module")
def step(random_pipe):
    return first_step(random_pipe, settings=DetectionSettings(samples=5))


@pytest.fixture
def make(random_pipe, step):
    def score(protocol=PAPER, evaluations=None, prompt="zzz"):
        embedding = embed(random_pipe, [prompt])
        shared = {"similarity": SIMILARITY, "protocol": protocol, "evaluations": evaluations}
        return BlockedScore(step, embedding, seeds=SEEDS, unblocked=step(embedding)[SEEDS], **shared)

    return score


def by_hand(random_pipe, step, neurons, protocol):
    embedding = embed(random_pipe, ["zzz"])
    plain, blocked = step(embedding)[SEEDS], step(embedding, neurons=neurons)[SEEDS]
    return similarity(plain, blocked, settings=SIMILARITY, protocol=protocol)


def total(evaluations):
    return sum(evaluations.samples.values())


@pytest.mark.parametrize("protocol", [PAPER, RELEASED])
@pytest.mark.parametrize("neurons", SETS)
def test_the_score_is_the_largest_similarity_however_it_is_asked(random_pipe, step, make, protocol, neurons):
    values = by_hand(random_pipe, step, neurons, protocol)
    score = make(protocol)
    # In pieces, one of them twice, then as a whole.
    score.of_seeds(neurons, [2])
    score.of_seeds(neurons, [2, 0])
    assert score(neurons) == pytest.approx(float(values.max()), abs=1e-5)
    assert make(protocol)(neurons) == pytest.approx(float(values.max()), abs=1e-5)
    ranked = values[score.ranking(neurons)]
    assert (ranked.diff() <= 1e-5).all()


@pytest.mark.parametrize("neurons", SETS)
@pytest.mark.parametrize(("protocol", "tolerance"), [(PAPER, 1e-5), (RELEASED, 0.01)])
def test_some_seeds_are_those_of_all(random_pipe, step, make, neurons, protocol, tolerance):
    """Nearly so with several scales, where a similarity depends a little on all seeds of a call."""
    values, score = by_hand(random_pipe, step, neurons, protocol), make(protocol)
    score(SETS[0])
    for places in ([1], [3, 0], [0, 1, 2, 3], [1]):
        assert score.of_seeds(neurons, places) == pytest.approx(float(values[places].max()), abs=tolerance)


def test_no_seed_is_evaluated_twice(make):
    evaluations = Evaluations()
    score = make(evaluations=evaluations)
    empty = NeuronSet.empty(7)
    assert score.of_seeds(empty, [0]) == pytest.approx(score(empty), abs=1e-5) == pytest.approx(1.0, abs=1e-5)
    assert total(evaluations) == 0
    first = score.of_seeds(SETS[0], [1])
    assert total(evaluations) == 1
    # A known one that is above the limit answers for all.
    assert score.of_seeds(SETS[0], [1, 3], limit=first - 0.01) == first
    assert total(evaluations) == 1
    score.of_seeds(SETS[0], [1, 3], limit=first)
    assert total(evaluations) == 2
    for _ in range(2):
        score(SETS[0])
        score.ranking(SETS[0])
        score.screen(SETS[0], limit=-1.0)
        assert total(evaluations) == 4


@pytest.mark.parametrize("protocol", [PAPER, RELEASED])
def test_screening_tells_what_the_score_tells(make, protocol):
    exact = make(protocol)
    for limit in (-0.5, 0.5, 0.8, 0.9, 0.95, 0.99):
        evaluations = Evaluations()
        score = make(protocol, evaluations=evaluations)
        for neurons in SETS:
            value = score.screen(neurons, limit=limit)
            assert (value > limit) == (exact(neurons) > limit)
            if value <= limit:
                assert value == pytest.approx(exact(neurons), abs=1e-5)
        if limit < 0:
            assert total(evaluations) == len(SETS)
