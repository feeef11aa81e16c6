"""Settings of the algorithms: small frozen dataclasses that a profile holds and every function accepts.

The defaults are those of the paper's experiment with Stable Diffusion v1-4. Each class checks its values when it is
made, so that a wrong value fails before any computation, with the name of the setting and what it may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real


def _require(condition: bool, owner: object, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{type(owner).__name__}.{key} is {value!r}; it must be {allowed}.")


def _integer(owner: object, key: str, minimum: int) -> None:
    value = getattr(owner, key)
    valid = isinstance(value, Integral) and not isinstance(value, bool) and value >= minimum
    _require(valid, owner, key, value, f"an integer of at least {minimum}")


def _real(owner: object, key: str, *, minimum: float, open_end: bool = False) -> None:
    value = getattr(owner, key)
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    valid = is_number and (value > minimum if open_end else value >= minimum)
    _require(valid, owner, key, value, f"a finite number {'above' if open_end else 'of at least'} {minimum:g}")


@dataclass(frozen=True, slots=True)
class DetectionSettings:
    """How noise differences are computed (Alg. 1 of the paper).

    Attributes:
        seed: Seed of the initial latents.
        samples: Initial latents per prompt, at least 2 (a score compares pairs of them).
        steps: Denoising steps of the schedule whose first steps are used.
        guidance: Classifier-free guidance scale; 0 means the text-conditional prediction alone, at half the cost.
    """

    seed: int = 1
    samples: int = 10
    steps: int = 50
    guidance: float = 0.0

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        _integer(self, "seed", 0)
        _integer(self, "samples", 2)
        _integer(self, "steps", 2)
        _real(self, "guidance", minimum=0.0)


@dataclass(frozen=True, slots=True)
class SimilaritySettings:
    """Window and scales of the structural similarity of two noise differences.

    Attributes:
        kernel_size: Side of the window in latent pixels, odd. A Gaussian window takes its side from ``sigma``; the
            kernel size only bounds how small the coarsest scale may be.
        sigma: Standard deviation of the Gaussian window, in latent pixels.
        betas: Exponent of each scale, finest first; their number is the number of scales (MS-SSIM only).
    """

    kernel_size: int = 11
    sigma: float = 1.5
    betas: tuple[float, ...] = (0.33, 0.33, 0.33)

    def __post_init__(self) -> None:
        """Reject values that no run can use; lists (from YAML) become tuples."""
        _integer(self, "kernel_size", 1)
        _require(self.kernel_size % 2 == 1, self, "kernel_size", self.kernel_size, "odd")
        _real(self, "sigma", minimum=0.0, open_end=True)
        is_sequence = isinstance(self.betas, (list, tuple)) and len(self.betas) > 0
        valid = is_sequence and all(isinstance(b, Real) and not isinstance(b, bool) and b > 0 for b in self.betas)
        _require(valid, self, "betas", self.betas, "a non-empty list of positive numbers, one per scale")
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """Course of the initial neuron selection (Alg. 3 of the paper).

    Attributes:
        theta_start: First threshold on a neuron's z-score.
        theta_step: How much the threshold falls in each step.
        theta_min: Smallest threshold; at it the search ends (whether it is itself tried is a protocol switch).
        k_start: Neurons per layer taken for their activation alone, at the first step.
        k_step: How much this number grows in each step.
        k_max: Largest such number; beyond it the search ends.
    """

    theta_start: float = 5.0
    theta_step: float = 0.25
    theta_min: float = 1.0
    k_start: int = 0
    k_step: int = 1
    k_max: int = 1280

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        _real(self, "theta_min", minimum=0.0)
        _real(self, "theta_start", minimum=0.0)
        _require(
            self.theta_start >= self.theta_min, self, "theta_start", self.theta_start, "at least theta_min "
            f"({self.theta_min:g})",
        )  # fmt: skip
        _real(self, "theta_step", minimum=0.0, open_end=True)
        _integer(self, "k_start", 0)
        _integer(self, "k_step", 0)
        _integer(self, "k_max", 0)
        _require(self.k_max >= self.k_start, self, "k_max", self.k_max, f"at least k_start ({self.k_start})")


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How images are generated.

    Attributes:
        seed: Base seed; sample ``i`` of every prompt uses its own generator made from it and ``i``.
        samples: Images per prompt.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale.
        batch_size: Images per pipeline call.
    """

    seed: int = 2
    samples: int = 10
    steps: int = 50
    guidance: float = 7.0
    batch_size: int = 10

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        _integer(self, "seed", 0)
        _integer(self, "samples", 1)
        _integer(self, "steps", 1)
        _real(self, "guidance", minimum=0.0)
        _integer(self, "batch_size", 1)
