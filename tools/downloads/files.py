"""Files with checksums: fetched once, checked always, complete or not there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemolib.downloads.manifest import SourceFile
from nemolib.encoders.checksums import record_path
from nemolib.files import write_atomic

MIRROR = "NEMO_DATA_MIRROR"
"""Environment variable: a folder in which files are looked for before the network."""

RETRIES = 3
"""How often a download that failed is tried again."""

TIMEOUT = 60
"""Seconds without an answer after which a download has failed."""


class DownloadError(RuntimeError):
    """Something that could not be fetched; the message names it, the reason and what to do."""


def fetch_file(file: SourceFile, folder: Path, *, progress: bool = True) -> str:
    """Put a file into a folder, unless it is there, and check it.

    It comes from the mirror if there is one that holds it, else from its URLs, one after the other. It is checked
    before it gets its name, so that what has the name is complete.

    Args:
        file: The file.
        folder: The folder of its manifest.
        progress: Whether to show a progress bar.

    Returns:
        ``present`` (it was there), ``copied`` (from the mirror) or ``downloaded``.

    Raises:
        DownloadError: The file that is there is another one; there is no network; no source has it; what they have is
            something else.
        OSError: The disk is full.
    """
    target = folder / file.path
    expected = file.sha256 or _noted(target)
    if target.is_file():
        _check(target, file, expected, remedy=f"delete it and run again{_note_remedy(file, target)}")
        _note(target, file)
        return "present"
    mirrored = _in_mirror(file)
    with _staged(target) as staged:
        if mirrored is not None:
            shutil.copyfile(mirrored, staged)
            _check(staged, file, expected, remedy=f"put the right file into the mirror, or unset {MIRROR}", at=mirrored)
        else:
            _download(file, staged, expected, progress=progress)
        os.replace(staged, target)
    _note(target, file)
    return "downloaded" if mirrored is None else "copied"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits; the file may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def offline() -> bool:
    """Return whether the user forbids the network (``HF_HUB_OFFLINE``)."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "on", "yes", "true"}


def _in_mirror(file: SourceFile) -> Path | None:
    """Return the file in the mirror, by its path in the manifest or by its name at its source; None without one."""
    mirror = os.environ.get(MIRROR)
    if not mirror:
        return None
    root = Path(mirror).expanduser()
    if not root.is_dir():
        raise DownloadError(f"{MIRROR} is {mirror!r}, which is no folder; give one, or unset it")
    parent = Path(file.urls[0].partition("?")[0]).parent.name
    places = (root / file.path, root / parent / file.source_name, root / file.source_name)
    return next((place for place in places if place.is_file()), None)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Yield a name beside the target for the file while it is not checked; afterwards nothing is left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def _download(file: SourceFile, staged: Path, expected: str | None, *, progress: bool) -> None:
    """Download a file from the first of its URLs that has it."""
    if offline():
        raise DownloadError(
            f"{file.path}: not there, and HF_HUB_OFFLINE forbids the network; unset it, or give a folder that holds the "
            f"file: {MIRROR}=folder"
        )
    pooch = load_pooch()
    reasons = []
    for url in file.urls:
        cache = pooch.create(
            staged.parent,
            base_url="",
            registry={staged.name: expected},
            urls={staged.name: url},
            retry_if_failed=RETRIES,
        )
        try:
            with _quiet(pooch):
                cache.fetch(staged.name, downloader=pooch.HTTPDownloader(progressbar=progress, timeout=TIMEOUT))
            _check(staged, file, expected, remedy="look at what the address gives", at=url)
        except (OSError, ValueError, DownloadError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            staged.unlink(missing_ok=True)
            reasons.append(f"{url}: {_first_line(error)}")
        else:
            return
    raise DownloadError(
        f"{file.path} could not be downloaded; check the connection and run again, or download it by other means and "
        f"give its folder: {MIRROR}=folder ({'; '.join(reasons)})"
    )


def load_pooch() -> Any:
    """Return the package pooch.

    Raises:
        DownloadError: It is not installed.
    """
    try:
        import pooch
    except ImportError as error:
        raise DownloadError("downloads need the package pooch; install it: pip install 'nemolib[sd14]'") from error
    return pooch


@contextmanager
def _quiet(pooch: Any) -> Iterator[None]:
    """Let pooch speak of errors only; its progress bar says the rest."""
    logger = pooch.get_logger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check(path: Path, file: SourceFile, expected: str | None, *, remedy: str, at: object = None) -> None:
    """Raise DownloadError if a file is not what it should be."""
    if expected is not None:
        found = sha256_of(path)
        if found != expected:
            raise DownloadError(
                f"{at or path}: SHA-256 is {found}, expected {expected}: another file, or a part of it; {remedy}"
            )
    elif file.rows is not None:
        _check_rows(path, file, remedy=remedy, at=at)


def _check_rows(path: Path, file: SourceFile, *, remedy: str, at: object) -> None:
    """Raise DownloadError if a file is no prompt table with the expected number of rows."""
    import pandas as pd

    try:
        found = len(pd.read_csv(path, sep=";", usecols=["Caption"], keep_default_na=False))
    except (ValueError, UnicodeDecodeError) as error:
        raise DownloadError(f"{at or path}: no prompt table ({_first_line(error)}); {remedy}") from error
    if found != file.rows:
        raise DownloadError(f"{at or path}: {found} prompts, expected {file.rows}; {remedy}")


def _noted(target: Path) -> str | None:
    """Return the SHA-256 that was noted at the first use of a file."""
    note = record_path(target)
    if not note.is_file():
        return None
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(f"{note} is not readable; delete it, and check the SHA-256 of its file again") from error


def _note(target: Path, file: SourceFile) -> None:
    """Note the SHA-256 of a file that has none in the manifest, at its first use."""
    if file.sha256 is None and not record_path(target).is_file():
        content = {"file": target.name, "sha256": sha256_of(target)}
        write_atomic(record_path(target), json.dumps(content, indent=2) + "\n")


def _note_remedy(file: SourceFile, target: Path) -> str:
    return "" if file.sha256 else f"; if the new file is right, delete {record_path(target).name} as well"


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
