"""Results that survive: one file per finished result, tables and image grids that are replaced at once.

A process may be killed at any point, and several may write to one folder: a reader sees a whole file or none.
"""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from nemolib.paths import write_atomic
from nemolib.provenance import content_hash

TEXTS = ("caption", "prompt")
"""Columns of a table that hold text, whatever it looks like."""

PLANTED, ORDINARY = "planted", "ordinary prompt"
WITH_AND_WITHOUT = "all neurons active", "neurons off (how many: box)"
"""Labels of columns of image grids (`nemolib.run.Run.with_and_without`)."""


class StoreError(ValueError):
    """A file of results that cannot be read; the message names the file, the place and what to do."""


@dataclass(frozen=True, slots=True)
class Store:
    """Finished results of tasks, each in a file of its own: plain values as JSON, an array as safetensors.

    Attributes:
        folder: Where they lie; it is made with the first result.
    """

    folder: Path

    def get(self, task: str, key: str) -> Any:
        """Return a result; None if there is none, or if its file was damaged (then with a warning)."""
        path = self._path(task, key)
        for file, read in ((path.with_suffix(".json"), json.loads), (path.with_suffix(".safetensors"), load)):
            try:
                ((checksum, value),) = read(file.read_bytes()).items()
            except FileNotFoundError:
                continue
            except Exception:
                checksum, value = "", None
            if content_hash(value) == checksum:
                return value
            warnings.warn(f"{file} was damaged; this result is computed again", stacklevel=2)
        return None

    def put(self, task: str, key: str, value: Any) -> Any:
        """Keep a result, and return it as a later run will read it (tuples have become lists).

        Args:
            task: What computed it; the name of a folder.
            key: Content hash of everything that determines it (`nemolib.provenance.content_hash`).
            value: An array, or plain values that JSON can hold.

        Raises:
            TypeError: The value is neither.
            OSError: The disk is full; the results before this one are safe.
        """
        path = self._path(task, key)
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value)
            write_atomic(path.with_suffix(".safetensors"), save({content_hash(value): value}))
            return value
        value = json.loads(json.dumps(value))
        write_atomic(path.with_suffix(".json"), json.dumps({content_hash(value): value}, ensure_ascii=False))
        return value

    def _path(self, task: str, key: str) -> Path:
        return self.folder / task / key[:2] / key


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Images in rows and columns.

    Attributes:
        images: Array [row, column, height, width] or [row, column, height, width, 3].
        rows: A label for each row.
        columns: A label for each column.
    """

    images: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that labels and images belong together."""
        expected = (len(self.rows), len(self.columns))
        if self.images.ndim not in (4, 5) or self.images.shape[:2] != expected:
            raise ValueError(
                f"images of shape {self.images.shape}, {expected[0]} row and {expected[1]} column labels; expected "
                "[row, column, height, width] or [row, column, height, width, 3]"
            )


def write_grid(grid: Grid, path: Path) -> None:
    """Write an image grid, all of it or nothing; the same images give the same bytes."""
    labels = json.dumps({"rows": grid.rows, "columns": grid.columns}, ensure_ascii=False)
    write_atomic(path, save({"images": np.ascontiguousarray(grid.images)}, metadata={"grid": labels}))


def read_grid(path: Path) -> Grid:
    """Return an image grid that `write_grid` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: The file holds something else.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            labels = json.loads((file.metadata() or {})["grid"])
            return Grid(file.get_tensor("images"), tuple(labels["rows"]), tuple(labels["columns"]))
    except (SafetensorError, KeyError) as error:
        raise StoreError(f"{path} holds no image grid; delete it and make it again") from error


def write_table(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table as CSV, all of it or nothing, without its index; reading gives floats bit by bit."""
    text = table.to_csv(index=False, lineterminator="\n")
    if "\r" in text:
        # The csv module of Python 3.11 leaves a text with one unquoted.
        text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    write_atomic(path, text)


def read_table(path: str | os.PathLike[str], *, columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """Return a table that `write_table` wrote; only an empty field is missing, captions "NA", "007", "True" stay text.

    Args:
        path: The CSV file.
        columns: Columns that must be there.

    Raises:
        FileNotFoundError: There is no such table.
        StoreError: The file was cut, a row has too few or too many fields, or a column is missing.
    """
    text = Path(path).read_bytes().decode()
    if not text.endswith("\n"):
        raise StoreError(f"{path}: the file was cut (its last line has no end); delete it and make it again")
    rows = csv.reader(io.StringIO(text))
    width = len(next(rows))
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise StoreError(f"{path}, row {number}: {len(row)} fields instead of {width}; delete it and make it again")
    table = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""], dtype=dict.fromkeys(TEXTS, str))
    for column in columns:
        if column not in table:
            raise StoreError(f"{path}: column {column!r} is missing; there are {', '.join(table.columns)}")
    return table
