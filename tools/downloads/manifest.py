"""Manifests: the files of a world that come from elsewhere, with the places they come from and their SHA-256."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nemolib import paths

FOLDER = paths.PACKAGE / "downloads"
"""Where the manifests lie."""


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file, the entry and what is allowed."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that comes from elsewhere.

    Attributes:
        path: Where it is put, relative to the folder of the manifest.
        urls: Where it comes from; the next is tried where one fails.
        sha256: Its SHA-256; None: nobody has stated it, so it is noted at the first use.
        rows: Number of rows of a prompt table, checked where the SHA-256 is not known; None: not checked.
        optional: Whether everything but a few numbers can be computed without it.
    """

    path: str
    urls: tuple[str, ...]
    sha256: str | None = None
    rows: int | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        """Reject what cannot be fetched."""
        place = PurePosixPath(self.path)
        if place.is_absolute() or ".." in place.parts or not place.name:
            raise ValueError(f"path {self.path!r} must be a file inside the folder of the manifest")
        object.__setattr__(self, "urls", (self.urls,) if isinstance(self.urls, str) else tuple(self.urls))
        if not self.urls or not all(str(url).startswith(("https://", "http://")) for url in self.urls):
            raise ValueError(f"{self.path}: urls {list(self.urls)!r} must be at least one http(s) address")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(self.sha256)):
            raise ValueError(f"{self.path}: sha256 {self.sha256!r} must be 64 hexadecimal digits in small letters")

    @property
    def source_name(self) -> str:
        """The file's name where it comes from."""
        return PurePosixPath(self.urls[0].partition("?")[0]).name


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a world needs from elsewhere.

    Attributes:
        folder: Where it is put, relative to the repository.
        files: The files.
        released_statistics: Activation statistics as the authors store them (one of the files), or None.
        statistics: Where they are put as safetensors, relative to the folder.
        statistics_count: Number of prompts that they were computed from.
        training_images: Prompt table (one of the files) with the URLs of training images, or None.
    """

    folder: str
    files: tuple[SourceFile, ...]
    released_statistics: str | None = None
    statistics: str = "statistics.safetensors"
    statistics_count: int = 0
    training_images: str | None = None

    def __post_init__(self) -> None:
        """Reject a reference to a file that is not listed."""
        known = [file.path for file in self.files]
        if len(set(known)) != len(known):
            raise ValueError(f"files: a path is listed twice in {known}")
        for key in ("released_statistics", "training_images"):
            value = getattr(self, key)
            if value is not None and value not in known:
                raise ValueError(f"{key} is {value!r}, which is not among the files: {', '.join(known)}")

    @property
    def root(self) -> Path:
        """The folder as an absolute path."""
        return paths.resolve(self.folder)


def load_manifest(name: str | Path) -> Manifest:
    """Return a manifest.

    Args:
        name: Name of one that comes with the package (``"sd14"``), or path of a YAML file.

    Raises:
        ManifestError: There is no such manifest, or an entry does not fit.
    """
    path = Path(name).expanduser() if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ManifestError(f"there is no manifest {str(name)!r} ({path}); known: {known}; or give a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _build(Manifest, values | {"files": tuple(_build(SourceFile, item) for item in values.get("files", []))})
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ManifestError(f"{path}: {error}") from error


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    """Return a dataclass made from a mapping; raise ValueError for a key that it does not have."""
    allowed = [field.name for field in fields(kind)]
    for key in values:
        if key not in allowed:
            raise ValueError(f"unknown key {key!r} = {values[key]!r}; allowed: {', '.join(allowed)}")
    return kind(**values)
