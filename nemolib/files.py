"""Writing files so that a reader sees the old content or the new, never a part of it."""

import os
import tempfile
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace a file at once: write a temporary file beside it, flush it to the disk, rename it.

    Args:
        path: file to write; missing folders are made.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: the disk is full or cannot be written; a file that was there before is unchanged.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            write_all(descriptor, data)
            os.fchmod(descriptor, 0o666 & ~_umask())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _explained(error, path) from error
        raise


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte to an open file descriptor; `os.write` alone may write only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _umask() -> int:
    """Return the process's umask, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explained(error: OSError, path: Path) -> OSError:
    """Return the error with the path and what became of the old file."""
    kept = "the file that was there is unchanged" if path.exists() else "no file was left behind"
    return type(error)(
        error.errno, f"{os.strerror(error.errno or 0)}; {kept}; free some space or check the rights", str(path)
    )
