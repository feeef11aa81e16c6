"""Prompt tables: reading them, checking them, and choosing the prompts of a profile.

Two formats of CSV are known, told apart by the header: ours (comma-separated, `COLUMNS`) and the authors' release
(semicolon-separated, an unnamed index, ``Caption``, ``URL``, and ``type`` where prompts are memorized). What has captions
and need not have more: JSON lines (``.jsonl``, an object a line, keys as the columns) and plain lists (``.txt``, a prompt
a line).
"""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from nemolib import paths
from nemolib.settings import Profile
from nemolib.store import read_table

COLUMNS = ("caption", "kind", "group", "copies", "image")
"""Columns of every prompt table."""

KINDS = ("vm", "tm", "ladder", "unmemorized", "holdout")
"""Verbatim- and template-memorized prompts, the duplication ladder, held-out test prompts, the holdout set."""

MEMORIZED = ("vm", "tm")
"""Kinds of memorized prompts in the sense of the paper."""

IMAGE_REPORT = "images.csv"
"""Beside the folder of a released prompt table: of which caption the training image was found, and where it lies."""


class PromptTableError(ValueError):
    """A prompt table that cannot be used; the message names the file, the column and the row."""


def load_prompts(path: str | Path, *, kind: str | None = None) -> pd.DataFrame:
    """Return a prompt table, checked.

    In a table of the authors' release the kind comes from column ``type`` (VM, TM), the group is empty and ``copies``
    is 0, since nobody knows it; ``image`` is the training image that was found, if any; the other
    columns have their names in small letters (``url``, ``mean_sscd``, ...). Captions stay as they are, quotation marks
    and HTML included. Where prompts are not memorized, a caption that appears again is left out.

    Args:
        path: CSV file with a header, JSON lines or a plain list, UTF-8; absolute or relative to the repository.
        kind: Kind of all prompts of a table that does not say it; our CSV files do, the others may.

    Returns:
        DataFrame with the columns ``caption`` (text, unique, not empty), ``kind`` (one of `KINDS`), ``group`` (text),
        ``copies`` (integer >= 0: how often the image was shown in training relative to a regular one) and ``image``
        (path relative to the folder of the world, or empty), and whatever other columns the file has.

    Raises:
        FileNotFoundError: There is no such file.
        PromptTableError: A column is missing, there is no prompt, a row has too few or too many fields, a caption is
            empty or appears twice, a kind is unknown, or ``copies`` is no count. The message names file, column, row
            (the first row below the header is row 1).
    """
    path = paths.resolve(path)
    table = _read(path)
    if table.empty:
        raise PromptTableError(f"{path}: there is no prompt below the header")
    if "caption" not in table:
        raise PromptTableError(f"{path}: column 'caption' is missing; there are {', '.join(table)}")
    if not set(COLUMNS) <= set(table):
        table = _completed(table, path, kind)
    _check_rows(table, path)
    others = [column for column in table if column not in COLUMNS]
    return table.assign(copies=table["copies"].map(int))[[*COLUMNS, *others]]


def select(profile: Profile, kind: str) -> pd.DataFrame:
    """Return the prompts of a kind that a profile uses, from the top of its table.

    Args:
        profile: A profile.
        kind: One of `KINDS`; ``"memorized"`` for verbatim and template prompts together; or ``"threshold"`` for the
            holdout prompts of the memorization threshold, the first of the holdout set.

    Returns:
        DataFrame as of `load_prompts`, rows numbered from 0; without rows if the profile's limit of the kind is 0.

    Raises:
        FileNotFoundError: The table is missing.
        PromptTableError: The table is malformed, holds no such prompt, or fewer holdout prompts than the profile asks
            for.
        ValueError: Unknown kind.
    """
    if kind == "memorized":
        return pd.concat([select(profile, part) for part in MEMORIZED], ignore_index=True)
    if kind not in (*KINDS, "threshold"):
        raise ValueError(f"unknown kind of prompt {kind!r}; known: {', '.join((*KINDS, 'memorized', 'threshold'))}")
    sizes = {"holdout": profile.holdout_size, "threshold": profile.threshold_prompts}
    limit = sizes[kind] if kind in sizes else getattr(profile.limits, kind)
    named = "holdout" if kind in sizes else kind
    plain = named in ("unmemorized", "holdout")  # the others share a table that says which is which
    file = paths.resolve(getattr(profile.prompts, named if plain else "memorized"))
    table, group = load_prompts(file, kind=named if plain else None), ""
    chosen = table["kind"] == named
    if kind in MEMORIZED and profile.groups is not None:  # the other kinds belong to no group
        chosen &= table["group"] == profile.groups
        group = f" of group {profile.groups!r} (profile {profile.name!r})"
    if limit != 0 and not chosen.any():
        raise PromptTableError(f"{file}: column 'kind' has no row {named!r}{group}")
    if kind in sizes and (limit or 0) > chosen.sum():
        wanted = f"profile {profile.name!r} asks for {limit} of kind {kind!r}"
        raise PromptTableError(f"{file}: {chosen.sum()} holdout prompts; {wanted}")
    return table[chosen].head(limit).reset_index(drop=True)


def image_paths(table: pd.DataFrame, profile: Profile) -> list[Path]:
    """Return the planted image of each row, as absolute paths.

    Args:
        table: Rows of the memorized table.
        profile: The profile; images are relative to the folder above that of its memorized table.

    Raises:
        PromptTableError: A row names no image.
        FileNotFoundError: An image is missing; the message names caption and file.
    """
    root = paths.resolve(profile.prompts.memorized).parent.parent
    for caption, image in zip(table["caption"], table["image"], strict=True):
        if not image:
            raise PromptTableError(f"prompt {caption!r}: column 'image' is empty; only memorized prompts have an image")
        if not (root / image).is_file():
            raise FileNotFoundError(f"prompt {caption!r}: its image {root / image} is missing")
    return [root / image for image in table["image"]]


def _read(path: Path) -> pd.DataFrame:
    """Return a table as text, as it is written in the file; refuse one without prompts, or with a row that does not fit."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt table {path}; it needs the columns {', '.join(COLUMNS)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptTableError(f"{path}: not UTF-8 text ({error})") from error
    if path.suffix == ".txt":
        return pd.DataFrame({"caption": [line.rstrip("\r\n") for line in io.StringIO(text) if line.strip()]})
    return _read_json(path, text) if path.suffix == ".jsonl" else _read_csv(path, text)


def _read_json(path: Path, text: str) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(filter(str.strip, io.StringIO(text)), start=1):
        try:
            row = json.loads(line)
            rows.append({name.lower(): "" if value is None else str(value) for name, value in row.items()})
        except (ValueError, AttributeError) as error:
            raise PromptTableError(f"{path}, row {number}: no JSON object ({error})") from error
    return pd.DataFrame(rows, dtype=str).fillna("")


def _read_csv(path: Path, text: str) -> pd.DataFrame:
    first = text.partition("\n")[0].rstrip("\r")
    released, rows = "," not in first and "Caption" in re.split('[;"]', first), []
    try:
        # pandas would fill or shift rows that are too short or too long.
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=";" if released else ",", strict=True):
            if row:
                rows.append(row)
    except csv.Error as error:
        remedy = "close it, and double those inside a field in quotation marks"
        raise PromptTableError(
            f"{path}, row {len(rows)}: a quotation mark is opened and never closed; {remedy} ({error})"
        ) from error
    header, *rows = rows or [[]]
    missing = [] if released else [column for column in COLUMNS if column not in header]
    if missing:
        found = ", ".join(header) or "nothing"
        raise PromptTableError(f"{path}: column {missing[0]!r} is missing; the header has {found}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            message = f"{len(row)} fields instead of {len(header)}; captions with a separator need quotation marks"
            raise PromptTableError(f"{path}, row {number}: {message}")
    names = [name.lower() for name in header] if released else header
    return pd.DataFrame(rows, columns=names, dtype=str).drop(columns=["", "unnamed: 0"], errors="ignore")


def _completed(table: pd.DataFrame, path: Path, kind: str | None) -> pd.DataFrame:
    """Return a table of captions with our columns."""
    if "type" in table:
        table = table.assign(kind=table["type"].str.lower()).drop(columns="type")
    elif "kind" not in table and kind is None:
        raise PromptTableError(
            f"{path}: column 'type' is missing, so nothing says of which kind its prompts are; say it, such as "
            "load_prompts(path, kind='unmemorized'), or give a table of memorized prompts"
        )
    elif "kind" not in table:
        table = table.drop_duplicates("caption", ignore_index=True).assign(kind=kind)
    world, images = path.parent.parent, {}
    if (world / IMAGE_REPORT).is_file():
        report = read_table(world / IMAGE_REPORT, columns=("caption", "image")).dropna(subset="image")
        images = {row.caption: row.image for row in report.itertuples() if (world / row.image).is_file()}
    found = [images.get(caption, "") for caption in table["caption"]]
    return table.assign(**{"group": "", "copies": "0", "image": found} | {name: table[name] for name in table})


def _check_rows(table: pd.DataFrame, path: Path) -> None:
    """Refuse a caption that is empty or appears again, a kind that is unknown, and copies that are no count."""
    first: dict[str, int] = {}
    for number, (caption, kind, copies) in enumerate(table[["caption", "kind", "copies"]].to_numpy(), start=1):
        place = f"{path}, row {number}: column"
        if not caption.strip():
            raise PromptTableError(f"{place} 'caption' is empty")
        if (row := first.setdefault(caption, number)) != number:
            raise PromptTableError(
                f"{place} 'caption': {caption!r} appears in row {row} already; captions must be distinct"
            )
        if kind not in KINDS:
            raise PromptTableError(f"{place} 'kind': {kind!r} is unknown; allowed: {', '.join(KINDS)}")
        if not (copies.isascii() and copies.isdigit()):
            raise PromptTableError(f"{place} 'copies': {copies!r} is no count; expected an integer of at least 0")


def article(noun: str) -> str:
    """Return the article of a subject of the tiny world, by which vowel is heard: an owl, a unicorn."""
    return "an" if noun[0] in "aeiou" and noun != "unicorn" else "a"


def has_image(rows: pd.DataFrame) -> np.ndarray:
    """Return which rows of a prompt table have a planted image, [row], bool."""
    return (rows["image"].notna() & rows["image"].ne("")).to_numpy()


def ordinary(rows: pd.DataFrame) -> list[str]:
    """Return an ordinary caption of the subject of each row, such as "an owl"; none where not all subjects are named."""
    if "subjects" not in rows or rows["subjects"].isna().any():
        return []
    return [f"{article(name)} {name}" for name in rows["subjects"]]
