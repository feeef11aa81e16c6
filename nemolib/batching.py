"""Going through many prompts: checked, in batches that fit into memory, or in lockstep, with a progress bar."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

T = TypeVar("T")

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


def accumulated_gradient(
    function: Callable[[Any], Tensor],
    items: Sequence[Any],
    variable: Tensor,
    *,
    owner: Any,
    use: str,
    weight: float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """Return what a function gives for parts of the items, and the gradient of the weighted sum of all of it.

    There is one part if memory allows. Owner, use and exceptions are those of `shrinking`.

    Args:
        function: Computes the values of a part anew, a tensor that can be differentiated; their sum over parts must not
            depend on what is in a part.
        items: The items, such as latents.
        variable: The tensor by which it is differentiated.
        weight: Of each value in the sum; 1 / number of values makes it their mean.
    """

    def of(part: Any) -> tuple[Tensor, Tensor]:
        values = function(part)
        (gradient,) = torch.autograd.grad(values, variable, torch.full_like(values, weight))
        return values.detach(), gradient

    found = [each for _, each in shrinking(of, items, size=len(items), owner=owner, use=use)]
    return [values for values, _ in found], torch.stack([gradient for _, gradient in found]).sum(dim=0)


class Lockstep:
    """Functions that ask again and again, each for a few things, and wait for each other: one call answers all of them.

    Each runs in a thread of its own, but one at a time: a function has the turn until it asks, or ends. Once all have
    asked, the caller's thread answers. So each is written as if there were no other one.

    Args:
        answer: Computes what was asked for: items -> as many answers.
        size: How many functions run at once; as one ends, the next begins.
    """

    def __init__(self, answer: Callable[[list[Any]], Sequence[Any]], size: int) -> None:
        self._answer, self._size, self._turn, self._own = answer, size, threading.Condition(), threading.local()
        self._asked: dict[int, Sequence[Any]] = {}
        self._answers: dict[int, tuple[Any, float]] = {}
        self._left, self._stopped = 0, False

    def ask(self, items: Sequence[Any]) -> Any:
        """Return the answers to items, inside a function; what answering raises is raised in each that waits for it."""
        place, start = self._own.place, time.perf_counter()
        self._asked[place] = items
        self._turn.notify_all()
        self._turn.wait_for(lambda: place in self._answers or self._stopped)
        if self._stopped:
            raise CancelledError
        found, seconds = self._answers.pop(place)
        self._own.waited += time.perf_counter() - start - seconds
        if isinstance(found, Exception):
            raise found
        return found

    def clock(self) -> float:
        """Return seconds that pass, inside a function, only while it runs, and by its share of those of the answers."""
        return time.perf_counter() - self._own.waited

    def run(self, functions: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T | Exception]]:
        """Yield place and result of functions, or what they raised, as they come."""

        def begin(place: int, function: Callable[[], T]) -> T:
            self._own.place, self._own.waited = place, 0.0
            with self._turn:
                try:
                    return function()
                finally:
                    self._left -= 1
                    self._turn.notify_all()

        self._left = len(functions)
        with ThreadPoolExecutor(self._size) as pool:
            running = {pool.submit(begin, *each): each[0] for each in enumerate(functions)}
            try:
                while running:
                    self._advance()
                    for future in [future for future in running if future.done()]:
                        yield running.pop(future), future.exception() or future.result()
            finally:
                with self._turn:
                    self._stopped = True
                    self._turn.notify_all()
                pool.shutdown(wait=False, cancel_futures=True)

    def _advance(self) -> None:
        """Wait until all functions that run have asked, and answer them."""
        with self._turn:
            self._turn.wait_for(lambda: len(self._asked) == min(self._size, self._left))
            places, start = sorted(self._asked), time.perf_counter()
            asked = [self._asked.pop(place) for place in places]
            items = list(chain.from_iterable(asked))
            try:
                found = self._answer(items) if items else ()
            except Exception as error:
                found = error
            seconds, first = time.perf_counter() - start, 0
            for place, part in zip(places, asked, strict=True):
                own = found if isinstance(found, Exception) else found[first : first + len(part)]
                self._answers[place] = own, seconds * len(part) / len(items)
                first += len(part)
            self._turn.notify_all()


def in_order(found: Iterable[tuple[int, T | Exception]]) -> list[T]:
    """Return what `Lockstep.run` yields as a list in the order of the functions; raise the first exception among it."""
    results = [result for _, result in sorted(found, key=itemgetter(0))]
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def progress_bar(total: int, label: str, *, unit: str = "prompt", enabled: bool = True) -> Any:
    """Return a progress bar to be used as a context manager; a disabled one shows nothing."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=label, unit=unit, disable=not enabled)
