"""Print the lock file: every version that nemolib and its tools need, as installed in this environment.

``make lock`` writes it to ``requirements.lock``. The packages are those of ``pyproject.toml`` with all extras, and what
they need in turn. Build labels of a version (``+cpu``) are left out, so that the file installs everywhere.
"""

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
# Every version that this project was run with. Written by `make lock`; do not edit.
# Install: pip install -r requirements.lock && pip install --no-deps -e .
# Libraries that only some machines need (CUDA for an NVIDIA GPU, say) are chosen by pip.
"""

LEFT_OUT = ("nvidia-", "cuda-", "triton")
"""Beginnings of the names of packages that come with a CUDA build of torch."""


def requirements(project: Path) -> list[Requirement]:
    """Return what ``pyproject.toml`` asks for, with all extras."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = table.get("optional-dependencies", {}).values()
    return [Requirement(text) for text in [*table["dependencies"], *(text for extra in extras for text in extra)]]


def closure(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Return name -> version of the wanted packages and all that they need, as installed."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, extra) for requirement in wanted for extra in ("", *requirement.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen or name.startswith(LEFT_OUT):
            continue
        seen.add((name, extra))
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version.partition("+")[0]
        for text in distribution.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting.extend((needed, part) for part in ("", *needed.extras))
    return found


def main() -> None:
    """Print the lock file."""
    versions = closure(requirements(Path(__file__).resolve().parent.parent / "pyproject.toml"))
    lines = [f"{name}=={version}" for name, version in sorted(versions.items())]
    sys.stdout.write(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
