"""Keeping the tables of a long run in the repository: ``python -m tools.results_full --profile tiny-full``.

A run with all prompts takes hours, so its tables stand in ``results_full/`` beside the prompt tables, with a note of the
machine and the time. Notebook 06 shows what they claim beside the claims of the profile that it renders.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import psutil

from nemolib import paths
from nemolib.exhibits import exhibits, markdown
from nemolib.paths import write_atomic
from nemolib.provenance import versions
from nemolib.settings import Profile, ProfileError, load_profile

LARGEST = 1_000_000
"""Tables with more bytes stay out of the repository; the note names them."""


def results_folder(profile: Profile) -> Path:
    """Return the folder of kept results of the world that a profile belongs to, without creating it."""
    return paths.resolve(profile.prompts.memorized).parent.parent / "results_full"


def keep_results(profile: Profile, names: Collection[str]) -> Path:
    """Copy the tables of a finished run to the repository, and write ``run.json`` and a note for readers.

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
    build, target = paths.build_dir(profile.name), results_folder(profile)
    found = {name: build / "tables" / f"{name}.csv" for name in sorted(names)}
    grids = {path.stem for path in (build / "grids").glob("*.safetensors")}
    absent = [name for name, path in found.items() if not path.is_file()]
    kept = [name for name, path in found.items() if name not in absent and path.stat().st_size <= LARGEST]
    seconds = notebook_seconds(build)
    if len(absent) == len(found) or not seconds:
        what = "table" if len(absent) == len(found) else "executed notebook"
        raise FileNotFoundError(f"there is no {what} in {build}; run: make all PROFILE={profile.name}")
    for path in target.glob("*.csv"):
        path.unlink()
    for name in kept:
        write_atomic(target / f"{name}.csv", found[name].read_bytes())
    record = {
        "profile": profile.name,
        "model": profile.model,
        "machine": machine(),
        "versions": versions(),
        "seconds": seconds,
        "tables": kept,
        "too large": [name for name in found if name not in (*kept, *absent)],
        "not computed": [name for name in absent if name not in grids],
    }
    write_atomic(target / "run.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    write_atomic(target / "README.md", note(record))
    return target


def notebook_seconds(build: Path) -> dict[str, float]:
    """Return how many seconds each executed notebook of a folder took, by its name, if it ran to its end."""
    runs = {path.stem: nbformat.read(path, as_version=4).metadata for path in sorted(build.glob("[0-9]*.ipynb"))}
    runs = {name: metadata.get("papermill", {}) for name, metadata in runs.items()}
    finished = {name: run["duration"] for name, run in runs.items() if run.get("duration") and not run.get("exception")}
    return {name: round(float(duration), 1) for name, duration in finished.items()}


def machine() -> dict[str, Any]:
    """Return what a reader needs to know of this machine: processor, cores, memory in GiB, system, Python."""
    listed = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", listed.read_text() if listed.is_file() else "", re.MULTILINE)
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def note(record: dict[str, Any]) -> str:
    """Return the note for readers from a record of `keep_results`."""
    profile, here, seconds = record["profile"], record["machine"], record["seconds"]
    times = pd.DataFrame({"notebook": list(seconds), "minutes": [f"{value / 60:.1f}" for value in seconds.values()]})
    parts = [
        f"# Results of profile {profile}",
        f"Tables of `make all PROFILE={profile}`, as the notebooks saved them; the modules of `nemolib/experiments` that "
        "make them say what their columns are. Notebook 06 shows what they claim beside its own claims.",
        f"Machine: {here['processor']}, {here['cores']} cores, {here['memory']:g} GiB, {here['system']}, Python "
        f"{here['python']}. Time: {sum(seconds.values()) / 60:.0f} minutes in all.",
        markdown(times),
    ]
    texts = {"too large": "Left out, since they are large", "not computed": "Not computed"}
    parts += [f"{text}: {', '.join(record[name])}." for name, text in texts.items() if record[name]]
    return "\n\n".join([*parts, f"Written by `python -m tools.results_full --profile {profile}`."]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Keep the tables that exhibits read from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.results_full", description=__doc__)
    parser.add_argument("--profile", default="tiny-full", help="the profile that was run (default: tiny-full)")
    arguments = parser.parse_args(argv)
    functions = [function for item in exhibits() for function in (item.draw, item.read) if function is not None]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    try:
        folder = keep_results(load_profile(arguments.profile), names - {"published_run"})  # somebody else's
    except (ProfileError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write((folder / "README.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
