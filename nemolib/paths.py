"""Where things are, the only module that knows locations; and how a file is replaced."""

import os
import uuid
from contextlib import suppress
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The folder of the package ``nemolib``."""


_CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()

ROOT = Path(os.environ.get("NEMO_ROOT") or _CHECKOUT).expanduser().resolve()
"""The repository: ``NEMO_ROOT`` if set, else the checkout around the package, else the working directory. Every relative
path in a profile starts here."""

DATA = ROOT / "data"
"""Inputs, read-only: prompt tables, planted images, weights."""

NOTEBOOKS = ROOT / "notebooks"
"""The notebooks as committed, with the outputs of profile ``tiny``."""

FIGURES = ROOT / "figures"
"""Publication figures, one folder per profile; committed."""

BUILD = ROOT / "build"
"""Everything else that a run writes, one folder per profile; ignored by git."""

PROFILES = PACKAGE / "profiles"
"""One YAML file per profile; part of the package."""


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path: as given, or relative to ``ROOT``; nothing is checked for existence."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else ROOT / path


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace a file at once: write a temporary file beside it, flush it to the disk, rename it.

    Args:
        path: File to write; missing folders are made.
        content: Bytes, or text that is written as UTF-8.

    Raises:
        OSError: The disk is full or cannot be written; a file that was there before is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        kept = "the file that was there is unchanged" if path.exists() else "no file was left behind"
        reason = f"{os.strerror(error.errno or 0)}; {kept}; free some space or check the rights"
        raise type(error)(error.errno, reason, str(path)) from error
    finally:
        with suppress(OSError):  # it is gone if all went well
            temporary.unlink()
