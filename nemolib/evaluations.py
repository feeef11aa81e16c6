"""What a computation costs: UNet sample-evaluations and seconds, by algorithm of the paper.

A UNet sample-evaluation is one latent through the UNet once; with classifier-free guidance a sample costs two. It is
the unit that compares searches on different machines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ALGORITHMS = ("A1", "A2", "A3", "A4")
"""Noise differences, out-of-distribution neurons, initial selection, refinement (Alg. 1-4 of the paper)."""


class Evaluations:
    """An observer that counts; pass it in where a function accepts ``evaluations``.

    What is counted inside `stage` goes to that stage; stages do not nest.

    Args:
        stages: Names of the stages, all reported even where nothing was counted.
    """

    def __init__(self, stages: Sequence[str] = ALGORITHMS) -> None:
        self.samples: dict[str, int] = dict.fromkeys(stages, 0)
        self.seconds: dict[str, float] = dict.fromkeys(stages, 0.0)
        self.unstaged = 0
        self._stage: str | None = None

    @property
    def total(self) -> int:
        """All UNet sample-evaluations that were counted."""
        return sum(self.samples.values()) + self.unstaged

    def add(self, samples: int) -> None:
        """Count UNet sample-evaluations."""
        if self._stage is None:
            self.unstaged += samples
        else:
            self.samples[self._stage] += samples

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count and time what happens inside for the stage ``name``.

        Raises:
            ValueError: The stage is unknown, or another one is still running.
        """
        if name not in self.samples:
            raise ValueError(f"unknown stage {name!r}; known stages: {', '.join(self.samples)}")
        if self._stage is not None:
            raise ValueError(f"stage {name!r} begins inside stage {self._stage!r}; end that one first")
        self._stage, start = name, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
            self._stage = None
