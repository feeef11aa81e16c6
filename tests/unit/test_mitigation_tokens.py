import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemolib.mitigation import RandomTokens
from nemolib.pipeline import embed
from tests.random_pipeline import random_pipeline

TOKENIZER = random_pipeline().tokenizer


def is_subsequence(words, longer):
    rest = iter(longer)
    return all(word in rest for word in words)


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6), st.sampled_from([1, 4, 10]))
def test_as_many_words_more_and_the_old_ones_in_order(words, number):
    prompt = " ".join(words)
    extended = RandomTokens(number).extend(TOKENIZER, prompt)
    assert len(extended.split(" ")) == len(words) + number
    assert is_subsequence(words, extended.split(" "))
    assert RandomTokens(number).extend(TOKENIZER, prompt) == extended


def test_words_are_tokens_and_never_special():
    for seed in range(40):
        words = RandomTokens(10, seed=seed).extend(TOKENIZER, "~~~~~").split(" ")
        words.remove("~~~~~")
        assert all(word in TOKENIZER.get_vocab() for word in words)
        assert not set(words) & set(TOKENIZER.all_special_tokens)


def test_prompts_and_seeds_have_their_own_tokens_and_places():
    extended = {RandomTokens(4, seed=seed).extend(TOKENIZER, prompt) for seed in (0, 1) for prompt in ("a b", "a c")}
    assert len(extended) == 4
    places = [RandomTokens(1, seed=seed).extend(TOKENIZER, "aa bb").split(" ").index("aa") for seed in range(20)]
    assert set(places) == {0, 1}


def test_more_tokens_begin_with_fewer():
    few = RandomTokens(1).extend(TOKENIZER, "aa bb").split(" ")
    many = RandomTokens(4).extend(TOKENIZER, "aa bb").split(" ")
    assert is_subsequence(few, many)


def test_double_spaces_stay():
    prompt = "aa  bb"
    extended = RandomTokens(1).extend(TOKENIZER, prompt).split(" ")
    assert len(extended) == 4
    assert is_subsequence(prompt.split(" "), extended)


def test_the_pipeline_gets_the_longer_prompts(random_pipe):
    mitigation = RandomTokens(4)
    with mitigation.applied(random_pipe, ["a", "b", "a"]) as inputs:
        expected = embed(random_pipe, [mitigation.extend(TOKENIZER, prompt) for prompt in ("a", "b", "a")])
        assert torch.equal(inputs.pop("prompt_embeds"), expected)
        assert not inputs
    assert (mitigation.name, RandomTokens(1).name) == ("4 random tokens", "1 random token")


def test_impossible_requests():
    with pytest.raises(ValueError, match=r"numbers is \(0,\); it must be"):
        RandomTokens(0)
    with pytest.raises(ValueError, match="seed is -1"):
        RandomTokens(1, seed=-1)

    class Wordless:
        all_special_ids = ()

        def get_vocab(self):
            return {"a": 0, "b": 1}

        def decode(self, ids, **options):
            return "\ufffd" if ids == [0] else " "

    with pytest.raises(ValueError, match="none of the 2 tokens of Wordless is a word"):
        RandomTokens(1).extend(Wordless(), "a")
