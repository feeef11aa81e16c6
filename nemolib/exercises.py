"""Exercises of the notebooks: whether an answer is right, without telling the right one.

    exercises.check("01.1", answer, run)

The module of a notebook holds in `EXERCISES`, by number, a function of the run for each of its exercises. It returns the
right answer, computed from what the run has, or a test: a function that says of an answer whether it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nemolib.exhibits import NotEnough, experiments

if TYPE_CHECKING:
    from nemolib.run import Run


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of an answer. It is false where the answer is wrong, and only there.

    Attributes:
        right: Whether it is right; None: there is no answer yet, or this run has too little to tell.
        text: The same in words.
    """

    right: bool | None
    text: str

    def __bool__(self) -> bool:
        return self.right is not False

    def __repr__(self) -> str:
        return self.text


def answers() -> dict[str, Callable[[Run], Any]]:
    """Return for each exercise, by number, what gives its answer or the test of an answer."""
    return {number: right for module in experiments() for number, right in getattr(module, "EXERCISES", {}).items()}


def check(number: str, answer: Any, run: Run) -> Verdict:
    """Return whether an answer is right; nothing is computed before there is one.

    Args:
        number: Number of the exercise, such as ``"01.1"``.
        answer: The answer: a number or several (to 1 %), a word, or what the exercise asks for; None: there is none yet.
        run: The run of the notebook.

    Raises:
        KeyError: There is no such exercise; the message names those known.
    """
    known = answers()
    if number not in known:
        raise KeyError(f"unknown exercise {number!r}; known: {', '.join(sorted(known))}")
    if answer is None:
        return Verdict(None, f"Exercise {number}: no answer yet.")
    try:
        expected = known[number](run)
    except (NotEnough, FileNotFoundError) as error:
        return Verdict(None, f"Exercise {number}: this run has too little to check it ({error}).")
    try:
        right = bool(expected(answer) if callable(expected) else _same(answer, expected))
    except (TypeError, ValueError):  # such as a word, put to a test of numbers
        right = False
    return Verdict(right, f"Exercise {number}: {'right.' if right else f'not yet. {_advice(answer, expected)}'}")


def _same(answer: Any, expected: Any) -> bool:
    """Return whether two answers are the same: words whatever their case, numbers to 1 %."""
    if isinstance(expected, str):
        return str(answer).strip().lower() == expected.lower()
    try:
        ours, theirs = (np.asarray(value, dtype=float) for value in (answer, expected))
    except (TypeError, ValueError):
        return False
    return ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=0.01, atol=1e-6)


def _advice(answer: Any, expected: Any) -> str:
    """Return what helps with a wrong answer: what is wrong with its form, if that is it, else where the hint is."""
    hint = "The hint above, folded, says how to begin."
    if callable(expected):
        return hint
    if isinstance(expected, str):
        return hint if isinstance(answer, str) else "A word is asked for, in quotation marks."
    asked = np.shape(expected)
    try:
        given = np.asarray(answer, dtype=float)
    except (TypeError, ValueError):
        given = None
    if given is None or given.shape != asked:
        return f"Asked for: {f'{asked[0]} numbers' if asked else 'one number'}."
    return "As a share, not in per cent." if _same(given / 100, expected) else hint
