"""Going through many prompts: checked, in batches that fit into memory, with a progress bar."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

_LARGEST: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()
"""For each model the largest batch, by use, since memory ran out."""


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


def shrinking(
    function: Callable[[Sequence[Any]], Any], items: Sequence[Any], *, size: int, owner: Any, use: str
) -> Iterator[tuple[Sequence[Any], Any]]:
    """Yield batches of items, in order, each with what a function returns for it; less memory means smaller batches.

    Where memory runs out, the batch is halved and computed again, and what was done stays done. The smaller size is
    kept for the model, so that it is not found anew for every prompt.

    Args:
        function: Computes a batch; its result must not depend on how items are batched.
        items: The items, such as prompts or latents.
        size: Largest batch.
        owner: The model whose memory it is.
        use: What the model is used for, such as ``"generation"``; each use has a size of its own.

    Raises:
        ValueError: The size is below 1.
        MemoryError: Memory runs out with a single item; the message says what to change.
    """
    largest, start = _LARGEST.setdefault(owner, {}), 0
    while start < len(items):
        batch = next(batches(items[start:], min(size, largest.get(use, size))))
        try:
            result = function(batch)
        except RuntimeError as error:
            # Accelerate looks for a full stop behind these words, which not all drivers write.
            if not should_reduce_batch_size(error) and not any(
                words in str(error).lower() for words in ("out of memory", "not enough memory")
            ):
                raise
            if len(batch) == 1:
                raise MemoryError(
                    f"{use}: out of memory with a single item; close other programs on the device, use dtype float16 "
                    f"or bfloat16, or another device ({str(error).splitlines()[0]})"
                ) from error
        else:
            yield batch, result
            start += len(batch)
            continue
        # Only now, without the exception, which held what the failed pass had allocated.
        clear_device_cache(garbage_collection=True)
        largest[use] = len(batch) // 2
        warnings.warn(f"{use}: out of memory with {len(batch)} at once; going on with {largest[use]}", stacklevel=2)


def progress_bar(total: int, label: str, *, unit: str = "prompt", enabled: bool = True) -> Any:
    """Return a progress bar to be used as a context manager; a disabled one shows nothing."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=label, unit=unit, disable=not enabled)
