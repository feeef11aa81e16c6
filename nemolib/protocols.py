"""Protocols: where the paper's text and the authors' code differ, as one dataclass of switches.

`released` reproduces the authors' code, `paper` follows the text. Take one and change a single switch with
`dataclasses.replace` to see what that difference alone does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Similarity = Literal["ms_ssim", "ssim"]
ThresholdPairs = Literal["all", "max"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """The known differences between the paper's text and the authors' code.

    Attributes:
        name: Name of the protocol, for tables and figures.
        timestep_index: Which timestep of the schedule conditions the UNet in Alg. 1. The text says the first (0);
            the code never calls the scheduler's step and so evaluates the *initial latents* at the second (1).
        similarity: Structural similarity on several scales (code) or on one (text).
        swap_guidance: Whether the halves of classifier-free guidance change places, as in the code's noise
            difference: eps(text) + g (eps(empty) - eps(text)). Only matters where the guidance is not 0.
        evaluate_limits: Whether the initial selection still tries the smallest threshold and the largest number of
            neurons per layer. The code stops when it reaches either, before trying it.
        double_entries: Whether a candidate that is found both by its z-score and among the largest activations is
            entered twice, as in the code: refinement then tests it at the place of its last entry. No neuron set ever
            holds a neuron twice; this is about the order of the tests.
        threshold_pairs: Whether the memorization threshold is taken over all pairs of seeds of all holdout prompts
            (code, Sec. 4) or over each prompt's largest pair (Sec. 3.1).
    """

    name: str
    timestep_index: int = 1
    similarity: Similarity = "ms_ssim"
    swap_guidance: bool = True
    evaluate_limits: bool = False
    double_entries: bool = True
    threshold_pairs: ThresholdPairs = "all"

    def __post_init__(self) -> None:
        """Reject values that no run can use."""
        if not isinstance(self.timestep_index, int) or isinstance(self.timestep_index, bool) or self.timestep_index < 0:
            raise ValueError(
                f"Protocol.timestep_index is {self.timestep_index!r}; it must be an integer of at least 0."
            )
        if self.similarity not in ("ms_ssim", "ssim"):
            raise ValueError(f"Protocol.similarity is {self.similarity!r}; it must be 'ms_ssim' or 'ssim'.")
        if self.threshold_pairs not in ("all", "max"):
            raise ValueError(f"Protocol.threshold_pairs is {self.threshold_pairs!r}; it must be 'all' or 'max'.")


RELEASED = Protocol("released")
"""The authors' code, commit f952ede."""

PAPER = Protocol(
    "paper",
    timestep_index=0,
    similarity="ssim",
    swap_guidance=False,
    evaluate_limits=True,
    double_entries=False,
    threshold_pairs="max",
)
"""The paper's text."""

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (RELEASED, PAPER)}


def load_protocol(protocol: str | Protocol) -> Protocol:
    """Return the protocol of a name; a protocol is returned as it is.

    Raises:
        ValueError: The name is not that of a known protocol.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known protocols: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]
