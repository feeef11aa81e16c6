"""Claims with numbers: a table of what must hold, what the paper says and what was found here.

Two kinds of rows. A claim *must hold*: it has a bound or an expected value with a tolerance, and the notebook fails if
it does not. A comparison only *stands beside* the paper's value: another model gives another number, and the row says
so. A row for which something is missing, such as prompts enough for a median, is shown as *not checked*, with the reason:
it neither passes silently nor fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    import torch


class ClaimError(AssertionError):
    """A claim that does not hold; the message names the claim, the value found and the one allowed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table of claims; see `claim` and `comparison`.

    Attributes:
        claim: What is claimed, in words.
        ours: What was found here.
        paper: What the paper says, as text with its confidence; empty if nothing.
        low: Smallest allowed value; None for a comparison.
        high: Largest allowed value; None for a comparison.
        reason: Why this bound or tolerance, or why the numbers may differ.
        missing: What it would take to check the row and is not there; empty if it is checked.
    """

    claim: str
    ours: float
    paper: str = ""
    low: float | None = None
    high: float | None = None
    reason: str = ""
    missing: str = ""

    @property
    def must_hold(self) -> bool:
        """Whether the value is bounded, and there is what it takes to check it."""
        return not self.missing and (self.low is not None or self.high is not None)

    @property
    def holds(self) -> bool:
        """Whether the value is within its bounds; a missing value (NaN) never is."""
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return not self.must_hold or low <= self.ours <= high

    @property
    def result(self) -> str:
        """What the table says of a row that does not fail."""
        return f"not checked: {self.missing}" if self.missing else "holds" if self.must_hold else "beside"

    @property
    def bound(self) -> str:
        """The bounds as text."""
        if self.low is not None and self.high is not None:
            return f"{self.low:.4g} to {self.high:.4g}"
        if self.low is None and self.high is None:
            return ""
        return f">= {self.low:.4g}" if self.high is None else f"<= {self.high:.4g}"


def claim(
    text: str,
    ours: float | bool,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    equals: float | None = None,
    atol: float = 0.0,
    paper: object = "",
    reason: str = "",
    missing: str = "",
) -> Row:
    """Return a row that must hold.

    Args:
        text: The claim in words.
        ours: What was found here; True and False stand for 1 and 0, and without bounds must be True.
        at_least: Smallest allowed value.
        at_most: Largest allowed value.
        equals: Expected value.
        atol: How far from ``equals`` a value may be.
        paper: What the paper says.
        reason: Why this bound, or where the tolerance comes from.
        missing: What it would take to check the claim and is not there (see `lacking`); empty: the claim is checked.

    Raises:
        ValueError: A number without a bound, or ``equals`` together with a bound.
    """
    bounds = (at_least, at_most)
    if equals is not None and bounds != (None, None):
        raise ValueError(f"claim {text!r} has both equals={equals} and a bound {bounds}; give one of them")
    if equals is None and bounds == (None, None):
        if not _is_truth(ours):
            raise ValueError(f"claim {text!r} has the value {ours!r} and no bound; give at_least, at_most or equals")
        equals = 1.0
    low, high = bounds if equals is None else (equals - atol, equals + atol)
    return Row(text, float(ours), str(paper), low, high, reason, missing)


def comparison(text: str, ours: float, *, paper: object, reason: str = "", missing: str = "") -> Row:
    """Return a row that stands beside the paper's value and cannot fail.

    Args:
        text: What is compared, in words.
        ours: What was found here.
        paper: What the paper says.
        reason: Why the numbers may differ.
        missing: As in `claim`.
    """
    return Row(text, float(ours), str(paper), None, None, reason, missing)


def lacking(number: int, what: str, *, needed: int) -> str:
    """Return what is missing for a row about many things, such as ``"1 VM prompt, 10 needed"``; nothing if there are enough.

    Args:
        number: How many there are.
        what: What they are, in the singular.
        needed: How many it takes.
    """
    return "" if number >= needed else f"{number or 'no'} {what}{'s' * (number != 1)}, {needed} needed"


def rounding(dtype: torch.dtype, *, at_least: float = 1e-4) -> float:
    """Return how far two ways to the same numbers of about 1 may differ in a floating-point type.

    Args:
        dtype: Type in which the model computes.
        at_least: What is allowed in any case; the types with few digits allow more: eight units in the last place of 1.
    """
    import torch

    return max(at_least, 8 * torch.finfo(dtype).eps)


def check_table(rows: Sequence[Row], *, digits: int = 3) -> pd.DataFrame:
    """Return claims as a table, and raise if one that must hold does not.

    Args:
        rows: What `claim` and `comparison` returned.
        digits: Decimals of the values shown.

    Returns:
        Columns claim, paper, ours, bound, result ("holds", "beside" for a comparison, or "not checked: ..." with what is
        missing) and reason.

    Raises:
        ClaimError: Claims that do not hold; the message names each with its value and bound.
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("there are no claims to check")
    failed = [f"{row.claim}: {row.ours:.6g}, must be {row.bound}" for row in rows if not row.holds]
    if failed:
        raise ClaimError("; ".join(failed))
    return pd.DataFrame(
        {
            "claim": [row.claim for row in rows],
            "paper": [row.paper for row in rows],
            "ours": ["" if row.missing and math.isnan(row.ours) else _shown(row.ours, digits) for row in rows],
            "bound": [row.bound for row in rows],
            "result": [row.result for row in rows],
            "reason": [row.reason for row in rows],
        }
    )


def _is_truth(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ == "bool"


def _shown(value: float, digits: int) -> str:
    """Return a value as text; small ones in scientific notation, so that 3e-7 is not shown as 0."""
    if value == 0 or math.isnan(value) or abs(value) >= 10**-digits:
        return f"{value:.{digits}f}".rstrip("0").rstrip(".")
    return f"{value:.0e}"
