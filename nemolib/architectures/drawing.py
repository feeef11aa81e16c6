"""Drawing the weights of a new model: a billion of them in seconds, since they mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PERIOD = 99_991
"""After how many values those of a weight repeat; a prime, so that its rows do not."""

_DRAWS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)


@contextmanager
def weights_drawn(*, seed: int, dtype: torch.dtype) -> Iterator[None]:
    """Let new modules draw their weights by a seed and in a type; of a large weight only the first hundred thousand values.

    Each layer draws from the distribution that it always has. Drawing all values takes ten seconds for Stable Diffusion.

    Args:
        seed: Seed of the weights; torch's own random numbers stay as they were.
        dtype: Floating-point type of the weights: half of the memory need not be drawn as all of it, and cast.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), _Repeated():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


class _Repeated(TorchDispatchMode):
    """Draws the first values of a tensor, and repeats them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in _DRAWS or args[0].numel() <= PERIOD or not args[0].is_contiguous():
            return func(*args, **(kwargs or {}))
        tensor: Tensor = args[0]
        flat = tensor.view(-1)
        func(flat[:PERIOD], *args[1:], **(kwargs or {}))
        whole = len(flat) // PERIOD * PERIOD
        flat[PERIOD:whole].view(-1, PERIOD).copy_(flat[:PERIOD].expand(whole // PERIOD - 1, -1))
        flat[whole:].copy_(flat[: len(flat) - whole])
        return tensor
