"""Settings of the algorithms: small frozen dataclasses that a profile holds and every function accepts.

The defaults are those of the paper's experiment with Stable Diffusion v1-4. Each class checks its values when it is
made, so that a wrong value fails before any computation, with the name of the setting and what it may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal, get_args

SearchMethod = Literal["fast", "sequential"]


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
    """Course of the neuron search: the initial selection (Alg. 3 of the paper) and the method.

    Attributes:
        theta_start: First threshold on a neuron's z-score.
        theta_step: How much the threshold falls in each step.
        theta_min: Smallest threshold; at it the search ends (whether it is itself tried is a protocol switch).
        k_start: Neurons per layer taken for their activation alone, at the first step.
        k_step: How much this number grows in each step.
        k_max: Largest such number; beyond it the search ends.
        method: Course of the whole search (Alg. 3 and 4). ``sequential``: all kept seeds, one candidate at a time, as in
            the authors' code. ``fast``: the seeds first that are likely to decide, candidates in groups.
    """

    theta_start: float = 5.0
    theta_step: float = 0.25
    theta_min: float = 1.0
    k_start: int = 0
    k_step: int = 1
    k_max: int = 1280
    method: SearchMethod = "fast"

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        _require(self.method in get_args(SearchMethod), self, "method", self.method, "'fast' or 'sequential'")
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


def search_settings(search: SearchSettings | str | None, default: SearchSettings) -> SearchSettings:
    """Return search settings: as given; or the default with the method that is named; or the default.

    Raises:
        ValueError: The name is not that of a method.
    """
    return replace(default, method=search) if isinstance(search, str) else search or default


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How images are generated.

    Attributes:
        seed: Base seed; sample ``i`` of every prompt uses its own generator made from it and ``i``.
        samples: Images per prompt.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale.
        batch_size: Images per pipeline call.
        side: Side of the images in pixels, a multiple of 8; None: that of the model. Smaller ones are worse and cost less.
    """

    seed: int = 2
    samples: int = 10
    steps: int = 50
    guidance: float = 7.0
    batch_size: int = 10
    side: int | None = None

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        _integer(self, "seed", 0)
        _integer(self, "samples", 1)
        _integer(self, "steps", 1)
        _real(self, "guidance", minimum=0.0)
        _integer(self, "batch_size", 1)
        if self.side is not None:
            _integer(self, "side", 8)
            _require(self.side % 8 == 0, self, "side", self.side, "a multiple of 8, or None")


Mask = Literal["padding", "summary", "none"]


@dataclass(frozen=True, slots=True)
class WenSettings:
    """Prompt embedding adjustment (Wen et al., ICLR 2024).

    Attributes:
        target: The adjustment ends when the mean norm of the difference that the text makes to the noise prediction is
            not above this. None: set by a rule (`nemolib.mitigation.wen_target`). The authors' code takes one norm over
            the latents of all four images of a prompt and stops at 3: that is 3 / sqrt(4) = 1.5 for one.
        multiplier: The rule: how many standard deviations above the mean of unmemorized prompts the target lies.
        learning_rate: Step size of AdamW.
        iterations: Largest number of steps.
        steps: Denoising steps of the schedule.
        step: Position in the schedule of the denoising step that is looked at; 0 is the first.
        latents: Initial latents over which the norm is averaged.
        seed: Seed of these latents, another than that of the generated images.
    """

    target: float | None = 1.5
    multiplier: float = 1.0
    learning_rate: float = 0.05
    iterations: int = 10
    steps: int = 50
    step: int = 0
    latents: int = 4
    seed: int = 4

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        if self.target is not None:
            _real(self, "target", minimum=0.0)
        _real(self, "multiplier", minimum=-10.0)
        _real(self, "learning_rate", minimum=0.0, open_end=True)
        _integer(self, "iterations", 1)
        _integer(self, "steps", 1)
        _integer(self, "step", 0)
        _require(self.step < self.steps, self, "step", self.step, f"below steps ({self.steps})")
        _integer(self, "latents", 1)
        _integer(self, "seed", 0)


@dataclass(frozen=True, slots=True)
class RenSettings:
    """Attention scaling (Ren et al., ECCV 2024).

    Attributes:
        c1: What the attention logit of the begin token is multiplied by.
        mask: Tokens that get no attention: ``padding`` (all after the end token), ``summary`` (these and the end
            token, whose embeddings sum up the prompt), ``none``.
    """

    c1: float = 1.25
    mask: Mask = "padding"

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        _real(self, "c1", minimum=0.0)
        _require(self.mask in ("padding", "summary", "none"), self, "mask", self.mask, "'padding', 'summary' or 'none'")


@dataclass(frozen=True, slots=True)
class SomepalliSettings:
    """Random tokens in the prompt (Somepalli et al., NeurIPS 2023).

    Attributes:
        numbers: How many tokens are inserted: one row of Table 1 for each.
        seed: Seed of tokens and places; each prompt has its own.
    """

    numbers: tuple[int, ...] = (1, 4, 10)
    seed: int = 5

    def __post_init__(self) -> None:
        """Reject values that no run can use; lists (from YAML) become tuples."""
        is_sequence = isinstance(self.numbers, (list, tuple)) and len(self.numbers) > 0
        valid = is_sequence and all(
            isinstance(n, Integral) and not isinstance(n, bool) and n >= 1 for n in self.numbers
        )
        _require(valid, self, "numbers", self.numbers, "a non-empty list of integers of at least 1")
        object.__setattr__(self, "numbers", tuple(int(number) for number in self.numbers))
        _integer(self, "seed", 0)


@dataclass(frozen=True, slots=True)
class RandomNeuronSettings:
    """Random neurons in place of the found ones (Sec. 4 of the paper).

    Attributes:
        seed: Seed; each repeat, layer and neuron set has its own random numbers.
        repeats: How often they are drawn.
    """

    seed: int = 3
    repeats: int = 5

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        _integer(self, "seed", 0)
        _integer(self, "repeats", 1)


@dataclass(frozen=True, slots=True)
class MitigationSettings:
    """The rows of Table 1 that deactivated memorization neurons are compared with.

    Attributes:
        wen: Prompt embedding adjustment.
        ren: Attention scaling.
        somepalli: Random tokens.
        random: Random neurons.
    """

    wen: WenSettings = WenSettings()
    ren: RenSettings = RenSettings()
    somepalli: SomepalliSettings = SomepalliSettings()
    random: RandomNeuronSettings = RandomNeuronSettings()
