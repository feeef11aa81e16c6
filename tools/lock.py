"""Print the lock file: every version that is installed in this environment.

``make lock`` writes it to ``requirements.lock``. Build labels of a version (``+cpu``) are left out, so that the file
installs everywhere.
"""

import sys
from importlib.metadata import distributions

from packaging.utils import canonicalize_name

HEADER = """\
# Every version that this project was run with. Written by `make lock`; do not edit.
# Install: pip install -r requirements.lock && pip install --no-deps -e .
# Libraries that only some machines need (CUDA for an NVIDIA GPU, say) are chosen by pip.
"""

OURS = ("nemolib", "pip")
"""The project itself, and what installs it."""

OF_CUDA = ("nvidia-", "cuda-", "triton")
"""Beginnings of the names of packages that come with a CUDA build of torch."""


def main() -> None:
    """Print the lock file."""
    installed = {canonicalize_name(package.name): package.version for package in distributions()}
    sys.stdout.write(HEADER)
    for name, version in sorted(installed.items()):
        if name not in OURS and not name.startswith(OF_CUDA):
            sys.stdout.write(f"{name}=={version.partition('+')[0]}\n")


if __name__ == "__main__":
    main()
