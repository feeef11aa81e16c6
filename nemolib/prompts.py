"""Prompt tables: reading them, checking them, and choosing the prompts of a profile.

Two formats are known, told apart by the header: ours (comma-separated, `COLUMNS`) and the authors' release
(semicolon-separated, an unnamed index, ``Caption``, ``URL``, and ``type`` where prompts are memorized).
"""

import csv
import io
from pathlib import Path

import pandas as pd

from nemolib import paths
from nemolib.profiles import Profile, load_profile

COLUMNS = ("caption", "kind", "group", "copies", "image")
"""Columns of every prompt table."""

KINDS = ("vm", "tm", "ladder", "unmemorized", "holdout")
"""Verbatim- and template-memorized prompts, the duplication ladder, held-out test prompts, the holdout set."""

MEMORIZED = ("vm", "tm")
"""Kinds of memorized prompts in the sense of the paper."""

IMAGE_REPORT = "images.csv"
"""Beside the folder of a released prompt table: which training image of which URL was found, and where it lies."""


class PromptTableError(ValueError):
    """A prompt table that cannot be used; the message names the file, the column and the row."""


def load_prompts(path: str | Path, *, kind: str | None = None) -> pd.DataFrame:
    """Return a prompt table, checked.

    In a table of the authors' release the kind comes from column ``type`` (VM, TM), the group is empty and ``copies``
    is 0, since nobody knows it; ``image`` is the training image that was found under the URL, if any; the other
    columns have their names in small letters (``url``, ``mean_sscd``, ...). Captions stay as they are, quotation marks
    and HTML included. Where prompts are not memorized, a caption that appears again is left out.

    Args:
        path: CSV file with a header, UTF-8; absolute or relative to the repository.
        kind: kind of all prompts of a released table without a column ``type``; other tables say it themselves.

    Returns:
        DataFrame with the columns ``caption`` (text, unique, not empty), ``kind`` (one of `KINDS`), ``group`` (text),
        ``copies`` (integer >= 0: how often the image was shown in training relative to a regular one) and ``image``
        (path relative to the folder of the world, or empty), and whatever other columns the file has.

    Raises:
        FileNotFoundError: there is no such file.
        PromptTableError: a column is missing, there is no prompt, a row has too few or too many fields, a caption is
            empty or appears twice, a kind is unknown, or ``copies`` is no count. The message names file, column, row
            (the first row below the header is row 1).
    """
    path = paths.resolve(path)
    header, rows = _read_rows(path)
    table = pd.DataFrame(rows, columns=header, dtype=str)
    if "Caption" in header:
        table = _from_release(table, path, kind)
        header = list(table.columns)
    _check_captions(table, path)
    _check_kinds(table, path)
    return table.assign(copies=_counts(table, path))[[*COLUMNS, *(name for name in header if name not in COLUMNS)]]


def select(profile: Profile | str, kind: str) -> pd.DataFrame:
    """Return the prompts of a kind that a profile uses, from the top of its table.

    Args:
        profile: a profile or its name.
        kind: one of `KINDS`; ``"memorized"`` for verbatim and template prompts together; or ``"threshold"`` for the
            holdout prompts of the memorization threshold, the first of the holdout set.

    Returns:
        DataFrame as of `load_prompts`, rows numbered from 0; without rows if the profile's limit of the kind is 0.

    Raises:
        FileNotFoundError: the table is missing.
        PromptTableError: the table is malformed, holds no such prompt, or fewer holdout prompts than the profile asks
            for.
        ValueError: unknown kind.
    """
    profile = load_profile(profile)
    if kind == "memorized":
        return pd.concat([select(profile, part) for part in MEMORIZED], ignore_index=True)
    if kind in ("holdout", "threshold"):
        return _holdout(profile, kind)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of prompt {kind!r}; known: {', '.join((*KINDS, 'memorized', 'threshold'))}")
    file = profile.prompts.unmemorized if kind == "unmemorized" else profile.prompts.memorized
    table = load_prompts(file, kind="unmemorized" if kind == "unmemorized" else None)
    chosen, limit = _of_group(table[table["kind"] == kind], profile), getattr(profile.limits, kind)
    if chosen.empty and limit != 0:
        raise PromptTableError(f"{paths.resolve(file)}: column 'kind' has no row {kind!r}{_group_note(profile, kind)}")
    return chosen.head(limit).reset_index(drop=True)


def image_paths(table: pd.DataFrame, profile: Profile | str) -> list[Path]:
    """Return the planted image of each row.

    Args:
        table: rows of the memorized table.
        profile: a profile or its name; images are relative to the folder above that of its memorized table.

    Returns:
        One absolute path per row.

    Raises:
        PromptTableError: a row names no image.
        FileNotFoundError: an image is missing; the message names caption and file.
    """
    root = paths.resolve(load_profile(profile).prompts.memorized).parent.parent
    for caption, image in zip(table["caption"], table["image"], strict=True):
        if not image:
            raise PromptTableError(f"prompt {caption!r}: column 'image' is empty; only memorized prompts have an image")
        if not (root / image).is_file():
            raise FileNotFoundError(f"prompt {caption!r}: its image {root / image} is missing")
    return [root / image for image in table["image"]]


def check_captions(prompts: list[str]) -> None:
    """Check a list of captions that a caller gives.

    Args:
        prompts: captions.

    Raises:
        ValueError: no caption, one that is not text or empty, or one that appears twice; the message names it.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"expected a list of at least one prompt, got {prompts!r}")
    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt {number} is {prompt!r}; expected text that is not empty")
        if prompt in first:
            raise ValueError(f"prompt {prompt!r} appears twice, at {first[prompt]} and {number}; give it once")
        first[prompt] = number


def _holdout(profile: Profile, kind: str) -> pd.DataFrame:
    """Return the first holdout prompts, as many as the profile asks for."""
    key = "holdout_size" if kind == "holdout" else "threshold_prompts"
    wanted = getattr(profile, key)
    table = load_prompts(profile.prompts.holdout, kind="holdout")
    table = table[table["kind"] == "holdout"].reset_index(drop=True)
    if table.empty or (wanted or 0) > len(table):
        file = paths.resolve(profile.prompts.holdout)
        raise PromptTableError(f"{file}: {len(table)} holdout prompts; profile {profile.name!r} has {key} = {wanted}")
    return table.head(wanted) if wanted else table


def _of_group(table: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return the rows of the profile's group; the other kinds belong to no group and stay."""
    if profile.groups is None:
        return table
    return table[(table["group"] == profile.groups) | ~table["kind"].isin(MEMORIZED)]


def _group_note(profile: Profile, kind: str) -> str:
    return f" of group {profile.groups!r} (profile {profile.name!r})" if profile.groups and kind in MEMORIZED else ""


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return header and rows; raise if the file is missing, lacks a column or a row does not fit the header."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt table {path}; it needs the columns {', '.join(COLUMNS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptTableError(f"{path}: not UTF-8 text ({error})") from error
    header, rows = _parse(text)
    if "Caption" not in header:
        for column in COLUMNS:
            if column not in header:
                raise PromptTableError(
                    f"{path}: column {column!r} is missing; the header has {', '.join(header) or 'nothing'}"
                )
    if not rows:
        raise PromptTableError(f"{path}: there is no prompt below the header")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            message = f"{len(row)} fields instead of {len(header)}; captions with a separator need quotation marks"
            raise PromptTableError(f"{path}, row {number}: {message}")
    return header, rows


def _parse(text: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows; fields are separated by semicolons in the authors' tables, by commas in ours."""
    separator = ";" if "Caption" in text.partition("\n")[0].rstrip("\r").split(";") else ","
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row] or [[]]
    return header, rows


def _from_release(table: pd.DataFrame, path: Path, kind: str | None) -> pd.DataFrame:
    """Return a table of the authors' release with our columns."""
    table = table.rename(columns=str.lower).drop(columns=["", "unnamed: 0"], errors="ignore")
    if "type" in table:
        for number, name in enumerate(table["type"], start=1):
            if name.lower() not in MEMORIZED:
                raise PromptTableError(f"{path}, row {number}: column 'type': {name!r} is unknown; allowed: VM, TM")
        table = table.assign(kind=table["type"].str.lower()).drop(columns="type")
    elif kind is None:
        raise PromptTableError(
            f"{path}: column 'type' is missing, so nothing says of which kind its prompts are; say it, such as "
            "load_prompts(path, kind='unmemorized'), or give a table of memorized prompts"
        )
    else:
        table = table.drop_duplicates("caption", ignore_index=True).assign(kind=kind)
    images = _found_images(path)
    found = [images.get(url, "") for url in table["url"]] if "url" in table else ""
    return table.assign(group="", copies="0", image=found)


def _found_images(path: Path) -> dict[str, str]:
    """Return url -> image relative to the folder of the world, for the training images that were found."""
    report = path.parent.parent / IMAGE_REPORT
    if not report.is_file():
        return {}
    header, rows = _parse(report.read_text(encoding="utf-8"))
    for column in ("url", "image"):
        if column not in header:
            raise PromptTableError(f"{report}: column {column!r} is missing; delete the file and run `make data` again")
    entries = (dict(zip(header, row, strict=False)) for row in rows)
    found = {entry["url"]: entry.get("image", "") for entry in entries}
    return {url: image for url, image in found.items() if image and (path.parent.parent / image).is_file()}


def _check_captions(table: pd.DataFrame, path: Path) -> None:
    first: dict[str, int] = {}
    for number, caption in enumerate(table["caption"], start=1):
        if not caption.strip():
            raise PromptTableError(f"{path}, row {number}: column 'caption' is empty")
        if caption in first:
            message = (
                f"column 'caption': {caption!r} appears in row {first[caption]} already; captions must be distinct"
            )
            raise PromptTableError(f"{path}, row {number}: {message}")
        first[caption] = number


def _check_kinds(table: pd.DataFrame, path: Path) -> None:
    for number, kind in enumerate(table["kind"], start=1):
        if kind not in KINDS:
            message = f"column 'kind': {kind!r} is unknown; allowed: {', '.join(KINDS)}"
            raise PromptTableError(f"{path}, row {number}: {message}")


def _counts(table: pd.DataFrame, path: Path) -> list[int]:
    for number, copies in enumerate(table["copies"], start=1):
        if not copies.isascii() or not copies.isdigit():
            message = f"column 'copies': {copies!r} is no count; expected an integer of at least 0"
            raise PromptTableError(f"{path}, row {number}: {message}")
    return [int(copies) for copies in table["copies"]]
