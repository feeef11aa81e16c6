"""Random tokens in the prompt (Somepalli et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nemolib.mitigation.base import Mitigation
from nemolib.pipeline import embed
from nemolib.seeding import stream
from nemolib.settings import SomepalliSettings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class RandomTokens(Mitigation):
    """Random tokens as words at random places of the prompt.

    Tokens and places belong to the prompt. More tokens begin with the same ones as fewer. What exceeds the length of
    the text encoder is cut off at the end of the prompt, as always.

    Source: Somepalli et al. (NeurIPS 2023), style rand_word_add; function prompt_augmentation in the code of Wen et al.,
        optim_utils.py, who took it from theirs.
    Deviates: drawn per prompt from a seed, not from one running generator; special tokens are never drawn (there: ids
        of 49,400 and above); a token that is no text by itself (part of a character, white space) is drawn anew, since
        it would not add a word.

    Attributes:
        number: How many tokens.
        seed: Seed.
    """

    source: ClassVar[str] = "Somepalli et al. (NeurIPS 2023)"

    number: int = 4
    seed: int = SomepalliSettings().seed

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        SomepalliSettings(numbers=(self.number,), seed=self.seed)

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        return f"{self.number} random token{'s' if self.number > 1 else ''}"

    def identity(self, prompt: str) -> list[Any]:
        """Return number and seed."""
        return ["random tokens", self.number, self.seed]

    def extend(self, tokenizer: Any, prompt: str) -> str:
        """Return the prompt with the tokens.

        Args:
            tokenizer: The tokenizer of a pipeline.
            prompt: The prompt.

        Raises:
            ValueError: No token of the vocabulary is a word.
        """
        numbers = stream(self.seed, "random tokens", prompt)
        ids = np.array(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
        words = prompt.split(" ")
        for _ in range(self.number):
            word = _word(tokenizer, numbers.permutation(ids))
            words.insert(int(numbers.integers(len(words) + 1)), word)
        return " ".join(words)

    @contextmanager
    def _prepared(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> Iterator[dict[str, Any]]:
        # As embeddings: the pipeline would warn of each prompt that the tokens make too long.
        yield {"prompt_embeds": embed(pipe, [self.extend(pipe.tokenizer, prompt) for prompt in prompts])}


def _word(tokenizer: Any, ids: np.ndarray) -> str:
    """Return the first token that is a word."""
    for token in ids.tolist():
        word = tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()
        if word and word.isprintable() and "\ufffd" not in word and len(word.split()) == 1:
            return word
    raise ValueError(f"none of the {len(ids)} tokens of {type(tokenizer).__name__} is a word")
