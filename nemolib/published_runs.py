"""Results of searches that others have published: tables as the authors' code writes them.

The authors' code writes one row per prompt, separated by semicolons: the prompt, the neurons of the initial selection
(a neuron that was found twice stands there twice) and those that refinement left, each with its score. Such a table does
not say with which model and settings it was made.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pandas as pd

from nemolib import paths
from nemolib.neurons import NeuronSet
from nemolib.prompts import load_prompts

COLUMNS = ("Caption", "URL", "Initial Neurons", "Initial SSIM", "Refined Neurons", "Refined SSIM")
"""Columns of a table of results of the authors' code."""


class PublishedRunError(ValueError):
    """A table of results that cannot be used; the message names the file, the row and the column."""


def load_published_run(path: str | Path) -> pd.DataFrame:
    """Return the table of results of a run of the authors' code, checked.

    Source: authors' code, 3_detect_memorized_neurons.py.

    Args:
        path: CSV file, separated by semicolons, UTF-8, with at least `COLUMNS`.

    Returns:
        One row per prompt, columns caption, url, entries (for each layer the candidates as they were listed, repeated
        ones included: lists of lists), initial and refined (`NeuronSet`), initial_score, refined_score (float64).

    Raises:
        FileNotFoundError: There is no such file.
        PublishedRunError: A column is missing, there is no row, a row has too few or too many fields, neurons are no
            lists of lists of integers, a refined neuron is no candidate, or a score is no finite number.
    """
    path = Path(path)
    # The default limit of 131,072 characters is too small for the candidates of a prompt with many.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        text = path.read_text(encoding="utf-8-sig")
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=";") if row] or [[]]
    except UnicodeDecodeError as error:
        raise PublishedRunError(f"{path}: not UTF-8 text ({error})") from error
    finally:
        csv.field_size_limit(limit)
    for column in COLUMNS:
        if column not in header:
            raise PublishedRunError(
                f"{path}: column {column!r} is missing; the header has {', '.join(header) or 'nothing'}"
            )
    if not rows:
        raise PublishedRunError(f"{path}: there is no row below the header")
    return pd.DataFrame([_row(header, row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)])


def localizations(path: str | Path, prompts: str | Path) -> pd.DataFrame:
    """Return a published run as a table of localizations, with the kind of each prompt from a table of prompts.

    Args:
        path: Table of results (`load_published_run`), absolute or relative to the repository.
        prompts: Table of memorized prompts (`nemolib.prompts.load_prompts`) that says which are VM and which TM; the
            authors' has it in column ``type``.

    Returns:
        One row per prompt of the run, columns kind (missing if the prompts do not have the caption), prompt,
        initial_count and neuron_count (different neurons before and after refinement), initial and neurons (JSON of a
        neuron set), initial_score and refined_score.

    Raises:
        FileNotFoundError: One of the files is missing.
        PublishedRunError: See `load_published_run`; or no caption of the run is among the prompts.
    """
    path = paths.resolve(path)
    run = load_published_run(path)
    known = load_prompts(prompts)
    kinds = dict(zip(known["caption"], known["kind"], strict=True))
    table = pd.DataFrame(
        {
            "kind": run["caption"].map(kinds),
            "prompt": run["caption"],
            "initial_count": run["initial"].map(len),
            "neuron_count": run["refined"].map(len),
            "initial": run["initial"].map(NeuronSet.to_json),
            "neurons": run["refined"].map(NeuronSet.to_json),
            "initial_score": run["initial_score"],
            "refined_score": run["refined_score"],
        }
    )
    if table["kind"].isna().all():
        raise PublishedRunError(
            f"{path}: none of its {len(table)} captions is in the prompt table {paths.resolve(prompts)}"
        )
    return table


def _row(header: list[str], row: list[str], where: str) -> dict[str, object]:
    """Return a row of the result."""
    if len(row) != len(header):
        raise PublishedRunError(f"{where}: {len(row)} fields instead of {len(header)}")
    fields = dict(zip(header, row, strict=True))
    entries = _neurons(fields, "Initial Neurons", where)
    initial, refined = NeuronSet(entries), NeuronSet(_neurons(fields, "Refined Neurons", where))
    if len(initial.layers) != len(refined.layers) or refined - initial:
        raise PublishedRunError(f"{where}: column 'Refined Neurons' is not within the initial neurons")
    return {
        "caption": fields["Caption"],
        "url": fields["URL"],
        "entries": entries,
        "initial": initial,
        "refined": refined,
        "initial_score": _score(fields, "Initial SSIM", where),
        "refined_score": _score(fields, "Refined SSIM", where),
    }


def _neurons(fields: dict[str, str], column: str, where: str) -> list[list[int]]:
    """Return lists of neurons by layer."""
    problem = (
        f"{where}: column {column!r} holds no neurons by layer, such as [[3], [], [1, 2]]: {fields[column][:60]!r}"
    )
    try:
        layers = json.loads(fields[column])
        if not isinstance(layers, list) or not all(isinstance(layer, list) for layer in layers):
            raise PublishedRunError(problem)
        NeuronSet(layers)
    except (ValueError, TypeError, RecursionError) as error:
        raise PublishedRunError(problem) from error
    return layers


def _score(fields: dict[str, str], column: str, where: str) -> float:
    """Return a finite number."""
    try:
        value = float(fields[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise PublishedRunError(f"{where}: column {column!r} is {fields[column]!r}; it must be a finite number")
    return value
