"""Results of a long run that are kept in the repository: ``python -m nemolib.exhibits.results_full --profile tiny-full``.

A run with all prompts takes hours, so its tables stand in ``results_full/`` beside the prompt tables, with a note of the
machine and the time. Notebook 06 shows its main numbers beside those of the profile that it renders.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from nemolib import paper, paths, store, tables
from nemolib.experiments_mitigation import NEMO, NONE, RANDOM
from nemolib.files import write_atomic
from nemolib.profiles import Profile, ProfileError, load_profile
from nemolib.provenance import versions
from nemolib.tables import format_median_mad

FOLDER = "results_full"
"""Name of the folder, beside that of the prompt tables."""

NOTE, RECORD = "README.md", "run.json"
"""The note for readers, and what it was written from."""

LARGEST = 1_000_000
"""Tables with more bytes stay out of the repository; the note names them."""

Read = Callable[[str], pd.DataFrame]
"""Returns a table by its name; raises FileNotFoundError if there is none."""


def results_folder(profile: Profile | str) -> Path:
    """Return the folder of kept results of the world that a profile belongs to, without creating it."""
    return paths.resolve(load_profile(profile).prompts.memorized).parent.parent / FOLDER


def keep_results(profile: Profile | str, names: Iterable[str] | None = None) -> Path:
    """Copy the tables of a finished run to the repository, and write a note of the machine and the time.

    Run it on the machine that made the run: the note describes the machine that writes it. Times are those that the
    executed notebooks in ``build/<profile>`` hold; a second run reads what the first one kept, so begin without them.

    Args:
        profile: A profile or its name.
        names: Names of tables; None means all that exhibits read.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no table or no executed notebook of the profile; the message says which command
            makes them.
    """
    profile = load_profile(profile)
    source, target = paths.tables_dir(profile.name), results_folder(profile)
    wanted = sorted(_read_by_exhibits() if names is None else names)
    found = [source / f"{name}.csv" for name in wanted if (source / f"{name}.csv").is_file()]
    seconds = notebook_seconds(profile)
    if not found or not seconds:
        what = "table in " + str(source) if not found else "executed notebook in " + str(paths.build_dir(profile.name))
        raise FileNotFoundError(f"there is no {what}; run: make all PROFILE={profile.name}")
    for path in target.glob("*.csv"):
        path.unlink()
    small = [path for path in found if path.stat().st_size <= LARGEST]
    for path in small:
        write_atomic(target / path.name, path.read_bytes())
    record = {
        "profile": profile.name,
        "model": profile.model,
        "machine": machine(),
        "versions": versions(),
        "seconds": seconds,
        "tables": [path.stem for path in small],
        "too large": [path.stem for path in found if path not in small],
        "not computed": [name for name in wanted if source / f"{name}.csv" not in found],
    }
    write_atomic(target / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    write_atomic(target / NOTE, note(record))
    return target


def _read_by_exhibits() -> set[str]:
    """Return the names of all tables that exhibits read."""
    # The list imports every exhibit; only the command needs it.
    from nemolib.exhibits import EXHIBITS

    return {name for exhibit in EXHIBITS for name in exhibit.tables}


def notebook_seconds(profile: Profile | str) -> dict[str, float]:
    """Return how many seconds each executed notebook of a profile took, by its name.

    A notebook that did not run to its end is left out.
    """
    found = {}
    for path in sorted(paths.build_dir(load_profile(profile).name).glob("[0-9]*.ipynb")):
        run = nbformat.read(path, as_version=4).metadata.get("papermill", {})
        if run.get("duration") is not None and not run.get("exception"):
            found[path.stem] = round(float(run["duration"]), 1)
    return found


def machine() -> dict[str, Any]:
    """Return what a reader needs to know of this machine: processor, cores, memory in GiB, system, Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    """Return the memory in GiB, if the system tells it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def note(record: dict[str, Any]) -> str:
    """Return the note for readers from a record of `keep_results`."""
    here, seconds = record["machine"], record["seconds"]
    times = pd.DataFrame({"notebook": list(seconds), "minutes": [f"{value / 60:.1f}" for value in seconds.values()]})
    memory = f", {here['memory']:g} GiB" if here["memory"] is not None else ""
    parts = [
        f"# Results of profile {record['profile']}",
        f"Tables of `make all PROFILE={record['profile']}`, as the notebooks saved them; `nemolib.tables` lists their "
        "columns. Notebook 06 shows the main numbers beside its own.",
        f"Machine: {here['processor']}, {here['cores']} cores{memory}, {here['system']}, Python {here['python']}. "
        f"Time: {sum(seconds.values()) / 60:.0f} minutes in all.",
        tables.to_markdown(times).rstrip(),
    ]
    texts = {"too large": "Left out, since they are large", "not computed": "Not computed"}
    parts += [f"{text}: {', '.join(record[name])}." for name, text in texts.items() if record[name]]
    parts.append(f"Written by `python -m nemolib.exhibits.results_full --profile {record['profile']}`.")
    return "\n\n".join(parts) + "\n"


def kept_record(profile: Profile | str) -> dict[str, Any] | None:
    """Return the record of the kept results (profile, machine, versions, seconds, tables), or None if there are none."""
    path = results_folder(profile) / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def kept_table(profile: Profile | str, name: str) -> pd.DataFrame:
    """Return a table of the kept results.

    Raises:
        FileNotFoundError: It was not kept.
    """
    return store.read_table(results_folder(profile) / f"{name}.csv")


def beside_full(profile: Profile | str) -> pd.DataFrame | None:
    """Return the main numbers of a profile beside those of the kept results and the paper's.

    Returns:
        Columns quantity, one of the profile's name, one of the name of the kept run's profile, paper. None if nothing was
        kept, or if it belongs to this very profile or to another model.
    """
    profile = load_profile(profile)
    record = kept_record(profile)
    if record is None or record["profile"] == profile.name or record["model"] != profile.model:
        return None
    here = main_numbers(lambda name: tables.read_table(name, profile=profile.name))
    kept = main_numbers(lambda name: kept_table(profile, name))
    reported = _reported()
    rows = [(name, here[name], kept[name], reported.get(name, "")) for name in here]
    return pd.DataFrame(rows, columns=["quantity", profile.name, record["profile"], "paper"])


ABSENT = "not computed"
"""What stands for a number whose table is missing."""


def main_numbers(read: Read) -> dict[str, str]:
    """Return the main numbers of a run as text, by what they are.

    Prompts and neurons per prompt (median and median absolute deviation), threshold, AUROC of the score, and SSCD_Orig
    of Table 1 with all neurons active, with random ones and with those of the search deactivated.

    Args:
        read: Returns a table by its name.
    """
    parts = {"localization": _localized, "thresholds": _threshold, "detection": _detected, "table_1": _mitigated}
    numbers: dict[str, str] = {}
    for name, count in parts.items():
        try:
            table = read(name)
        except FileNotFoundError:
            table = None
        numbers |= count(table)
    return numbers


def _localized(table: pd.DataFrame | None) -> dict[str, str]:
    found = {}
    for kind in ("vm", "tm"):
        part = None if table is None else table[table["kind"] == kind]
        found[f"prompts, {kind.upper()}"] = ABSENT if part is None else f"{len(part)}"
        for column, words in (("initial_count", "initial selection"), ("neuron_count", "memorization neurons")):
            name = f"{words} per prompt, {kind.upper()}"
            found[name] = ABSENT if part is None or part.empty else format_median_mad(part[column], digits=1)
    return found


def _threshold(table: pd.DataFrame | None) -> dict[str, str]:
    return {"memorization threshold": ABSENT if table is None else f"{table['tau'].iloc[0]:.3f}"}


def _detected(table: pd.DataFrame | None) -> dict[str, str]:
    found = {}
    for kind in ("vm + tm", "vm", "tm"):
        part = [] if table is None else table.loc[
            (table["score"] == "score_paper") & (table["memorized"] == kind), "auroc"
        ].dropna()  # fmt: skip
        found[f"AUROC, {kind.upper()}"] = f"{part.iloc[0]:.3f}" if len(part) else ABSENT
    return found


SETTINGS = {NONE: "all neurons active", RANDOM: "random neurons", NEMO: "NeMo"}
"""Settings of Table 1 whose SSCD_Orig is a main number, and what they are called."""


def _mitigated(table: pd.DataFrame | None) -> dict[str, str]:
    found = {}
    for kind in ("vm", "tm"):
        for setting, words in SETTINGS.items():
            part = None if table is None else table[(table["kind"] == kind) & (table["setting"] == setting)].dropna(
                subset="sscd_orig"
            )  # fmt: skip
            found[f"SSCD_Orig, {kind.upper()}, {words}"] = (
                ABSENT if part is None or part.empty else _median_mad(part.iloc[0], "sscd_orig")
            )
    return found


def _median_mad(row: pd.Series, name: str) -> str:
    return f"{row[name]:.2f} ± {row[f'{name}_mad']:.2f}"


def _reported() -> dict[str, str]:
    """Return the paper's main numbers as text."""
    detection = paper.detection()
    ssim = detection[detection["score"] == "ssim"].set_index("memorized")["auroc"]
    found = {"memorization threshold": str(paper.reported("threshold"))}
    found |= {f"AUROC, {kind.upper()}": f"{value:g}" for kind, value in ssim.items()}
    for kind in ("vm", "tm"):
        found[f"prompts, {kind.upper()}"] = str(paper.reported(f"prompts.{kind}"))
        found[f"initial selection per prompt, {kind.upper()}"] = str(paper.reported(f"neurons.{kind}.initial"))
        found[f"memorization neurons per prompt, {kind.upper()}"] = str(paper.reported(f"neurons.{kind}"))
        rows = paper.table_1().query("kind == @kind").set_index("setting")
        found |= {
            f"SSCD_Orig, {kind.upper()}, {words}": _median_mad(rows.loc[setting], "sscd_orig")
            for setting, words in SETTINGS.items()
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Keep the results of a profile from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nemolib.exhibits.results_full", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--profile", default="tiny-full", help="the profile that was run (default: tiny-full)")
    arguments = parser.parse_args(argv)
    try:
        folder = keep_results(arguments.profile)
    except (ProfileError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write((folder / NOTE).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
