"""Answers are compared with what a run gives; the right one is never told."""

import re

import nbformat
import numpy as np
import pytest

from nemolib import exercises
from nemolib.exhibits import NotEnough
from tests import notebook_files

RIGHT = {"number": 0.25, "numbers": [1, 2.5], "word": "b", "test": lambda answer: answer > 3}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    found = {name: lambda run, value=value: value for name, value in RIGHT.items()}

    def missing(run):
        raise NotEnough("no prompt")

    monkeypatch.setattr(exercises, "answers", lambda: found | {"missing": missing})


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("number", [0.25, 0.2505, np.float32(0.25)], [0.26, "a quarter", [0.25], "0.3"]),
        ("numbers", [(1, 2.5), np.array([1, 2.5])], [[1], [2.5, 1], 1]),
        ("word", ["b", " B"], ["a", 1]),
        ("test", [4], [3, "four", [4]]),
    ],
)
def test_right_and_wrong_answers(name, right, wrong):
    for answer in right:
        assert exercises.check(name, answer, None).right is True
    for answer in wrong:
        verdict = exercises.check(name, answer, None)
        assert not verdict
        assert repr(verdict).startswith(f"Exercise {name}: not yet. ")


@pytest.mark.parametrize(
    ("name", "answer", "advice"),
    [
        ("number", 0.3, "hint"),
        ("number", 25, "As a share, not in per cent."),
        ("number", "a quarter", "Asked for: one number."),
        ("number", [0.25], "Asked for: one number."),
        ("numbers", 1, "Asked for: 2 numbers."),
        ("numbers", [2.5, 1], "hint"),
        ("word", 1, "A word is asked for"),
        ("word", "a", "hint"),
        ("test", "four", "hint"),
    ],
)
def test_a_wrong_answer_gets_advice_on_its_form_or_the_hint(name, answer, advice):
    assert advice in repr(exercises.check(name, answer, None))


def test_no_answer_and_a_run_that_cannot_tell_are_not_wrong():
    for verdict in (exercises.check("number", None, None), exercises.check("missing", 1, None)):
        assert verdict
        assert verdict.right is None
    assert "no prompt" in repr(verdict)
    with pytest.raises(KeyError, match="unknown exercise 'other'; known: missing, number"):
        exercises.check("other", 1, None)


def test_every_exercise_has_an_answer_and_every_answer_an_exercise(monkeypatch):
    monkeypatch.undo()
    notebooks = [nbformat.read(path, as_version=4) for path in notebook_files.notebooks()]
    sources = "\n".join(cell.source for notebook in notebooks for cell in notebook.cells)
    assert sorted(exercises.answers()) == sorted(set(re.findall(r"exercises\.check\(\"([\d.]+)\"", sources)))
