"""Files of weights are what they are said to be: SHA-256 given in the profile, or noted at the first use."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from pathlib import Path

import torch

from nemolib.encoders.base import EncoderError
from nemolib.files import write_atomic


class FirstUse(UserWarning):
    """A file of weights whose SHA-256 nobody has stated yet."""


def check_sha256(path: Path, expected: str | None) -> None:
    """Raise EncoderError if a file has another SHA-256 than expected; None means that nothing is expected."""
    if expected is not None:
        _compare(path, hashlib.sha256(path.read_bytes()).hexdigest(), expected, "the profile states")


def record_path(path: Path) -> Path:
    """Return the file beside a file of weights in which its SHA-256 is noted at the first use."""
    return path.with_name(f"{path.name}.sha256.json")


def read_verified(path: Path, *, sha256: str | None = None) -> tuple[bytes, str]:
    """Return the bytes of a file, and their SHA-256, after comparing it with what is known of the file.

    Known is the SHA-256 that is given or else the one noted beside the file. If there is neither, the file is used for
    the first time: its SHA-256 is noted there, and the user is told.

    Args:
        path: The file.
        sha256: What its SHA-256 has to be; None: what was noted at the first use.

    Returns:
        The very bytes that were hashed, and 64 hexadecimal digits.

    Raises:
        FileNotFoundError: There is no such file.
        EncoderError: The SHA-256 differs, or the note beside the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} are missing; download them and give their path in the profile")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    note = record_path(path)
    if sha256 is not None:
        _compare(path, found, sha256, "the profile states")
    elif note.is_file():
        _compare(path, found, _noted(note), f"{note.name}, written at its first use, states")
    else:
        write_atomic(note, json.dumps({"file": path.name, "sha256": found}, indent=2) + "\n")
        warnings.warn(
            f"{path} is used for the first time; its SHA-256 is {found} (noted in {note.name}). Compare it with the "
            "source of the file, and state it in the profile as sha256.",
            FirstUse,
            stacklevel=2,
        )
    return content, found


def load_torchscript(
    path: Path | str, *, sha256: str | None = None, device: str | torch.device = "cpu"
) -> tuple[torch.jit.ScriptModule, str]:
    """Return a TorchScript network, ready for inference, and the SHA-256 of its file.

    What loading means: a TorchScript file holds weights and a program in TorchScript. It is not unpickled as Python, so
    it cannot import modules or call arbitrary functions. But it is a program: torch's interpreter runs it, and among
    its operators are some that read and write files. Load a file of unknown origin as you would start a program of
    unknown origin. Hence the SHA-256: what runs is the file that you decided to trust, and no other.

    Args:
        path: The file.
        sha256: What its SHA-256 has to be; None: what was noted at the first use (see `read_verified`).
        device: Where it runs.

    Returns:
        The network, and 64 hexadecimal digits.

    Raises:
        FileNotFoundError: There is no such file.
        EncoderError: The SHA-256 differs, or the file holds no TorchScript.
    """
    path = Path(path)
    content, found = read_verified(path, sha256=sha256)
    try:
        with warnings.catch_warnings():
            # TorchScript is what the authors of these networks published.
            warnings.filterwarnings("ignore", message=".*torch.jit.load.*", category=DeprecationWarning)
            model = torch.jit.load(io.BytesIO(content), map_location=torch.device(device))
    except RuntimeError as error:
        raise EncoderError(f"{path} holds no TorchScript network; download it again ({error!s:.200})") from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), found


def _compare(path: Path, found: str, expected: str, who: str) -> None:
    if found != expected.lower():
        raise EncoderError(
            f"{path}: {who} SHA-256 {expected}, but the file has {found}; it is another file or was cut, so it is not "
            "loaded. Download it again, or change what is expected"
        )


def _noted(note: Path) -> str:
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise EncoderError(f"{note} is not readable; delete it, and check the SHA-256 of its file again") from error
