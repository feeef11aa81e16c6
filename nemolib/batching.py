"""Going through many prompts: checked, in batches, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return prompts as a list.

    Raises:
        ValueError: There are none, or one is not text, or is empty; the message says which.
        TypeError: A single text was given.
    """
    if isinstance(prompts, str):
        raise TypeError(f"one prompt was given ({prompts[:40]!r}); give a list of prompts")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("the list of prompts is empty; give at least one")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt {index} is {prompt!r}; every prompt must be a text that is not empty")
    return prompts


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Return an iterator over the items in order, at most ``size`` at a time.

    Raises:
        ValueError: The size is below 1.
    """
    if size < 1:
        raise ValueError(f"batch size is {size}; it must be at least 1")
    return (items[start : start + size] for start in range(0, len(items), size))


def progress_bar(total: int, label: str, *, unit: str = "prompt", enabled: bool = True) -> Any:
    """Return a progress bar to be used as a context manager; a disabled one shows nothing."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=label, unit=unit, disable=not enabled)
