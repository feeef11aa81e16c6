"""Results that survive: a JSON line per finished piece of work, tables that are replaced at once.

A process may be killed at any point. A line that was cut is dropped, a finished piece is never computed again, and
several processes may write to one store.
"""

import contextlib
import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from nemolib.files import write_all, write_atomic

Record = Any


class StoreError(ValueError):
    """A file of results that cannot be read; the message names the file, the line and what to do."""


class Store:
    """Finished records by key, in a file of JSON lines that only ever grows.

    Keys are content hashes of everything that determines a record (`nemolib.provenance.content_hash`).

    Attributes:
        path: the file; it is made with the first record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the finished records; a cut last line is ignored and removed by the next `put`.

        Raises:
            StoreError: a line other than the last cannot be read.
        """
        self.path = Path(path)
        self._records: dict[str, Record] = {}
        self._end = 0
        if self.path.exists():
            self._absorb(self.path.read_bytes())

    @property
    def done(self) -> Mapping[str, Record]:
        """Read-only mapping key -> record of all finished records, in the order of the file."""
        return MappingProxyType(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self)} records)"

    def get(self, key: str, default: Record = None) -> Record:
        """Return the record of a key, or the default."""
        return self._records.get(key, default)

    def put(self, key: str, record: Record) -> Record:
        """Append a record and flush it to the disk; what another process finished first stays.

        Args:
            key: content hash of everything that determines the record.
            record: plain values only (what JSON can hold).

        Returns:
            The record as a later run will read it (tuples have become lists).

        Raises:
            TypeError: the record holds something that JSON cannot.
            OSError: the disk is full; the records before this one are safe.
        """
        line = json.dumps({"key": key, "record": record}, ensure_ascii=False).encode("utf-8") + b"\n"
        with self._locked() as descriptor:
            self._catch_up(descriptor)
            if key not in self._records:
                self._append(descriptor, line)
        return self._records[key]

    def compute(self, key: str, function: Callable[[], Record]) -> Record:
        """Return the record of a key; if there is none yet, compute it and keep it."""
        return self._records[key] if key in self else self.put(key, function())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file for this process alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _catch_up(self, descriptor: int) -> None:
        """Read what other processes wrote since, and remove a line that was cut."""
        size = os.fstat(descriptor).st_size
        if size < self._end:
            raise StoreError(f"{self.path}: became shorter while it was open ({size} < {self._end} bytes); start again")
        os.lseek(descriptor, self._end, os.SEEK_SET)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            self._absorb(file.read())
        os.ftruncate(descriptor, self._end)

    def _append(self, descriptor: int, line: bytes) -> None:
        """Write one line; if that fails, leave the file as it was."""
        try:
            os.lseek(descriptor, self._end, os.SEEK_SET)
            write_all(descriptor, line)
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, self._end)
            reason = os.strerror(error.errno or 0)
            kept = f"the {len(self)} records before this one are safe; free some space and run again"
            raise type(error)(error.errno, f"{reason}; {kept}", str(self.path)) from error
        self._absorb(line)

    def _absorb(self, data: bytes) -> None:
        """Add the records of complete lines; the end of the last complete line becomes the end of the file."""
        lines = data.split(b"\n")
        for line in lines[:-1]:
            key, record = self._parse(line)
            self._records.setdefault(key, record)
            self._end += len(line) + 1

    def _parse(self, line: bytes) -> tuple[str, Record]:
        try:
            entry = json.loads(line)
            return entry["key"], entry["record"]
        except (ValueError, KeyError, TypeError) as error:
            number = self.path.read_bytes()[: self._end].count(b"\n") + 1
            raise StoreError(f"{self.path}, line {number}: not a record; remove this line and run again") from error


def write_table(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table as CSV, replacing the file at once; the index is not written.

    Floats are written so that reading gives the same bits.

    Args:
        table: one column per quantity; no column may be unnamed.
        path: the CSV file.

    Raises:
        OSError: the disk is full; the table that was there before is unchanged.
    """
    write_atomic(path, table.to_csv(index=False, lineterminator="\n"))


def read_table(path: str | os.PathLike[str], *, columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """Return a table written by `write_table`.

    Only an empty field is missing: a caption "null" or "NA" stays text.

    Args:
        path: the CSV file.
        columns: columns that must be there.

    Returns:
        The table, floats bit by bit as they were written.

    Raises:
        FileNotFoundError: there is no such table.
        StoreError: the file was cut, a row has too few or too many fields, or a column is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {path}; run the notebook that makes it (make notebooks)")
    text = path.read_text(encoding="utf-8")
    _check_complete(text, path)
    table = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise StoreError(f"{path}: column {missing[0]!r} is missing; there are {', '.join(table.columns)}")
    return table


def _check_complete(text: str, path: Path) -> None:
    """Raise StoreError if a table lacks its end or a row has another number of fields than the header."""
    if not text.endswith("\n"):
        raise StoreError(f"{path}: the file was cut (its last line has no end); delete it and make it again")
    rows = csv.reader(io.StringIO(text))
    width = len(next(rows))
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise StoreError(f"{path}, row {number}: {len(row)} fields instead of {width}; delete it and make it again")
