"""Keeping the tables of a long run in the repository: ``python -m tools.results_full --profile tiny-full``.

A run with all prompts takes hours, so its tables stand in ``results_full/`` beside the prompt tables, with a note of the
machine and the time. Notebook 06 shows what they claim beside the claims of the profile that it renders.
"""

from __future__ import annotations

import argparse
import inspect
import platform
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
import psutil

from nemolib import paths
from nemolib.exhibits import exhibits, markdown
from nemolib.paths import write_atomic
from nemolib.settings import Profile, ProfileError, load_profile

NOTE = Path(__file__).with_name("results_full.md.j2")
"""The note for readers, as a template."""

LARGEST = 1_000_000
"""Tables with more bytes stay out of the repository; the note names them."""


def keep_results(profile: Profile, names: Collection[str]) -> Path:
    """Copy the tables of a finished run to the repository, and write a note for readers.

    Run it on the machine that made the run: the note describes the machine that writes it. Times are those that the
    executed notebooks in ``build/<profile>`` hold; a second run reads what the first one kept, so begin without them.

    Args:
        profile: A profile.
        names: Names of tables; image grids of these names stay out.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no table or no executed notebook of the profile; the message says which command
            makes them.
    """
    build = paths.BUILD / profile.name
    target = paths.resolve(profile.prompts.memorized).parent.parent / "results_full"
    found = {path.stem: path.read_bytes() for path in sorted((build / "tables").glob("*.csv")) if path.stem in names}
    grids = {path.stem for path in (build / "grids").glob("*.safetensors")}
    seconds = notebook_seconds(build)
    if not (found and seconds):
        what = "executed notebook" if found else "table"
        raise FileNotFoundError(f"there is no {what} in {build}; run: make all PROFILE={profile.name}")
    kept = {name: content for name, content in found.items() if len(content) <= LARGEST}
    for path in target.glob("*.csv"):
        path.unlink()
    for name, content in kept.items():
        write_atomic(target / f"{name}.csv", content)
    minutes = pd.Series(seconds, name="minutes").rename_axis("notebook") / 60
    note = NOTE.read_text(encoding="utf-8")
    text = jinja2.Template(note, keep_trailing_newline=True, trim_blocks=True).render(
        profile=profile.name,
        machine=machine(),
        minutes=minutes.sum(),
        times=markdown(minutes.map("{:.1f}".format).reset_index()),
        too_large=sorted(found.keys() - kept),
        not_computed=sorted({*names} - found.keys() - grids),
    )
    write_atomic(target / "README.md", text)
    return target


def notebook_seconds(build: Path) -> dict[str, float]:
    """Return how many seconds each executed notebook of a folder took, by its name, if it ran to its end."""
    seconds = {}
    for path in sorted(build.glob("[0-9]*.ipynb")):
        run = nbformat.read(path, as_version=4).metadata.get("papermill", {})
        if run.get("duration") and not run.get("exception"):
            seconds[path.stem] = round(float(run["duration"]), 1)
    return seconds


def machine() -> str:
    """Return what a reader needs to know of this machine: processor, cores, memory, system, Python."""
    listed = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", listed.read_text() if listed.is_file() else "", re.MULTILINE)
    processor = names[0] if names else platform.processor() or platform.machine()
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{processor}, {psutil.cpu_count()} cores, {memory}, {system}"


def main(argv: Sequence[str] | None = None) -> int:
    """Keep the tables that exhibits read from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.results_full", description=__doc__)
    parser.add_argument("--profile", default="tiny-full", help="the profile that was run (default: tiny-full)")
    arguments = parser.parse_args(argv)
    functions = [function for item in exhibits() for function in (item.draw, item.read) if function is not None]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    names = {name for name in names if not name.startswith("published_")}  # somebody else's
    try:
        folder = keep_results(load_profile(arguments.profile), names)
    except (ProfileError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write((folder / "README.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
