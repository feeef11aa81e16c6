import numpy as np
import pytest
import torch

from nemolib.beyond.triggers import search_triggers, searching, token_significance
from nemolib.pipeline import embed
from tests.beyond import by_hand

WORDS = ["a", "b", "c", "a", "d"]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_significance_by_finite_differences(kind):
    pipe, h = by_hand.small_pipeline(kind), 0.02
    with torch.inference_mode():
        found = token_significance(pipe, "ab c", samples=2)
    x, embedding = by_hand.start(pipe), embed(pipe, ["ab c"])
    empty = by_hand.noise(pipe, x, 981, embed(pipe, [""]))

    def norm(embedding):
        return float((by_hand.noise(pipe, x, 981, embedding) - empty).flatten(1).double().norm(dim=1).mean())

    assert found["token"].tolist() == ["a", "b", "c"]
    for token, value in enumerate(found["significance"], start=1):
        units = torch.zeros(16, *embedding.shape)
        units[range(16), 0, token, range(16)] = h
        gradient = [(norm(embedding + unit) - norm(embedding - unit)) / (2 * h) for unit in units]
        assert value == pytest.approx(np.linalg.norm(gradient), rel=5e-2)


def test_one_position_tries_every_word_once_with_the_score_of_its_formula():
    pipe = by_hand.small_pipeline()
    found = search_triggers(pipe, WORDS, length=1, iterations=3, proposals=9, seed=4)
    assert sorted(found["prompt"]) == ["", "a", "b", "c", "d"]
    for prompt, score in zip(found["prompt"], found["score"], strict=True):
        expected = (by_hand.difference(pipe, by_hand.start(pipe, 1, seed=4), 981, prompt) ** 2).sum()
        assert score == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert found["evaluations"].iloc[-1] == 1 + 5
    assert set(found["iteration"]) == {0}
    options = {"length": 1, "iterations": 3, "proposals": 9, "seed": 4}
    assert searching(pipe, steps=50)([("one", WORDS, options)]) == [found.values.tolist()]


def test_a_cold_search_climbs_and_is_the_same_whatever_the_batch():
    pipe, options = by_hand.small_pipeline(), {"length": 3, "iterations": 40, "proposals": 5, "seed": 1}
    found = search_triggers(pipe, WORDS, temperature=1e-9, **options)
    assert found["prompt"].is_unique
    assert len(found) < 5**3
    words = found.loc[found["score"].idxmax(), "prompt"].split()
    # No change of one word of the best sentence went further up: its neighbours were all tried.
    neighbours = {
        " ".join([*words[:place], word, *words[place + 1 :]]) for place in range(len(words)) for word in "abcd"
    }
    assert neighbours <= set(found["prompt"])
    single = search_triggers(pipe, WORDS, temperature=1e-9, batch=1, **options)
    assert single["prompt"].tolist() == found["prompt"].tolist()
    hot = search_triggers(pipe, WORDS, temperature=1e9, **options)
    assert len(found) < len(hot)  # which never settles
    with pytest.raises(ValueError, match="a search needs words"):
        search_triggers(pipe, [])
