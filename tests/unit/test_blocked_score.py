import pytest
import torch

from nemolib.blocked_score import BlockedScore
from nemolib.evaluations import Evaluations
from nemolib.first_step import first_step
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.protocols import PAPER, RELEASED
from nemolib.settings import DetectionSettings, SimilaritySettings
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
    def score(protocol=PAPER, **settings):
        embedding = embed(random_pipe, ["zzz"])
        return BlockedScore(
            step,
            embedding,
            seeds=SEEDS,
            unblocked=step(embedding)[SEEDS],
            similarity=SIMILARITY,
            protocol=protocol,
            **settings,
        )

    return score


def by_hand(random_pipe, step, neurons, protocol):
    embedding = embed(random_pipe, ["zzz"])
    return similarity(
        step(embedding)[SEEDS], step(embedding, neurons=neurons)[SEEDS], settings=SIMILARITY, protocol=protocol
    )


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
    assert make(protocol, reuse=False)(neurons) == pytest.approx(float(values.max()), abs=1e-5)
    ranked = values[score.ranking(neurons)]
    assert (ranked.diff() <= 1e-5).all()


@pytest.mark.parametrize("neurons", SETS)
def test_some_seeds_are_those_of_all(random_pipe, step, make, neurons):
    values = by_hand(random_pipe, step, neurons, PAPER)
    score = make()
    for places in ([1], [3, 0], [0, 1, 2, 3], [1]):
        assert score.of_seeds(neurons, places) == pytest.approx(float(values[places].max()), abs=1e-5)


@pytest.mark.parametrize("neurons", SETS)
def test_with_several_scales_some_seeds_are_nearly_those_of_all(random_pipe, step, make, neurons):
    values = by_hand(random_pipe, step, neurons, RELEASED)
    score = make(RELEASED)
    score(SETS[0])
    for place in range(4):
        assert score.of_seeds(neurons, [place]) == pytest.approx(float(values[place]), abs=0.01)


def test_no_seed_is_evaluated_twice(make):
    evaluations = Evaluations()
    score = make(evaluations=evaluations)
    score.of_seeds(SETS[0], [1])
    assert evaluations.total == 1
    score.of_seeds(SETS[0], [1, 3])
    assert evaluations.total == 2
    score(SETS[0])
    assert evaluations.total == 4
    score.many([SETS[0], SETS[1], SETS[1], SETS[2], NeuronSet.empty(7)])
    assert evaluations.total == 12
    score.ranking(SETS[1])
    score.screen(SETS[2], limit=-1.0)
    assert evaluations.total == 12


def test_seeds_are_not_evaluated_if_a_known_one_is_above_the_limit(make):
    evaluations = Evaluations()
    score = make(evaluations=evaluations)
    first = score.of_seeds(SETS[0], [0])
    assert score.of_seeds(SETS[0], [0, 1, 2], limit=first - 0.01) == first
    assert evaluations.total == 1
    score.of_seeds(SETS[0], [0, 1, 2], limit=first)
    assert evaluations.total == 3


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
            assert evaluations.total == len(SETS)


def test_the_empty_set_needs_no_evaluation(make):
    evaluations = Evaluations()
    score = make(evaluations=evaluations)
    empty = NeuronSet.empty(7)
    assert score.of_seeds(empty, [0]) == pytest.approx(1.0, abs=1e-5)
    assert score(empty) == pytest.approx(1.0, abs=1e-5)
    assert evaluations.total == 0


def test_the_model_is_left_as_it_was(random_pipe, step, make):
    embedding = embed(random_pipe, ["zzz"])
    before = step(embedding)
    make()(SETS[0])
    assert torch.equal(step(embedding), before)
    assert not [name for name, module in random_pipe.unet.named_modules() if "forward" in module.__dict__]
