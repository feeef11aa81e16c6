"""Going through many prompts: checked, in batches that fit into memory, with a progress bar."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_LIMITS: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()
"""For each model the largest batch, by use, since memory ran out."""

_FULL = ("out of memory", "can't allocate memory", "not enough memory")
"""What the messages of backends say that have no exception of their own for it."""

MAPS_PER_SAMPLE = 130
"""Memory of one sample in a UNet pass, in feature maps of the first block; twice what Stable Diffusion v1-4 took on a CPU."""


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
    if size < 1:
        raise ValueError(f"batch size is {size}; it must be at least 1")
    size, start = min(size, batch_limit(owner, use) or size), 0
    while start < len(items):
        batch = items[start : start + size]
        result, full = _attempt(function, batch, use)
        if full:
            size = max(1, len(batch) // 2)
            _LIMITS.setdefault(owner, {})[use] = size
            _release_memory()
            warnings.warn(f"{use}: out of memory with {len(batch)} at once; going on with {size}", stacklevel=2)
            continue
        yield batch, result
        start += len(batch)


def batch_limit(owner: Any, use: str) -> int | None:
    """Return the largest batch of a model for a use since memory ran out; None if it never did."""
    return _LIMITS.get(owner, {}).get(use)


def fitting_size(unet: nn.Module, wanted: int, *, passes: int = 1) -> int:
    """Return how many samples the free memory of a UNet's device is likely to hold at once, at most ``wanted``.

    Args:
        unet: A conditional UNet of diffusers.
        wanted: How many there are.
        passes: Latents per sample in one pass: 1, or 2 with classifier-free guidance.

    Returns:
        At least 1; ``wanted`` on a CPU, whose memory is not that of the model alone.
    """
    parameter = next(unet.parameters())
    free = free_memory(parameter.device)
    if free is None:
        return wanted
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    one = MAPS_PER_SAMPLE * height * width * unet.config.block_out_channels[0] * parameter.element_size()
    return max(1, min(wanted, free // (one * passes)))


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of a GPU in bytes; None for a CPU."""
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return None


def _attempt(function: Callable[[Sequence[Any]], Any], batch: Sequence[Any], use: str) -> tuple[Any, bool]:
    """Return the result of a batch, and whether memory ran out."""
    try:
        return function(batch), False
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise MemoryError(
                f"{use}: out of memory with a single item; close other programs on the device, use dtype float16 or "
                f"bfloat16, or another device ({str(error).splitlines()[0]})"
            ) from error
    # Left only after the exception is gone: it holds what the failed pass had allocated.
    return None, True


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in _FULL)


def _release_memory() -> None:
    """Give back what the allocators of GPUs keep."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def progress_bar(total: int, label: str, *, unit: str = "prompt", enabled: bool = True) -> Any:
    """Return a progress bar to be used as a context manager; a disabled one shows nothing."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=label, unit=unit, disable=not enabled)
