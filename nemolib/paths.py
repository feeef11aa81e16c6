"""Where things are: the only module that knows locations."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The folder of the package ``nemolib``."""


def _find_root() -> Path:
    """Return the repository: ``NEMO_ROOT`` if set, else the checkout around the package, else the working directory."""
    chosen = os.environ.get("NEMO_ROOT")
    if chosen:
        return Path(chosen).expanduser().resolve()
    checkout = PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


ROOT = _find_root()
"""The repository; every relative path in a profile starts here."""

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


def build_dir(profile: str) -> Path:
    """Return the folder ``build/<profile>`` without creating it."""
    return BUILD / profile


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path: as given, or relative to ``ROOT``; nothing is checked for existence."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else ROOT / path
