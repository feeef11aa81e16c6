"""Command-line tools beside the package: `python -m tools.NAME` in the root of the repository."""
