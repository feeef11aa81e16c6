"""What an exhibit is: a figure or table for readers, made from tables and image grids that notebooks saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from nemolib import paths, published_runs
from nemolib import tables as files
from nemolib.profiles import Profile, load_profile
from nemolib.tables import Grid
from nemolib.theme import save_figure

Verdict = Literal["agrees", "differs", "beside"]

VERDICTS: dict[str, str] = {
    "agrees": "agrees with the paper",
    "differs": "differs from the paper",
    "beside": "no value of the paper to compare with",
}
"""What the verdicts mean."""

NOTEBOOK = "06_figures"
"""The notebook that renders the exhibits."""


RUN = "published_run"
"""Name of the source that holds the published run of a profile, as `nemolib.published_runs.localizations` returns it."""


class MissingResultError(FileNotFoundError):
    """A table or image grid that no notebook has made yet; the message says which one makes it."""


class CannotDrawError(ValueError):
    """What a profile computed is there, but holds too little for an exhibit; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an exhibit shows.

    Attributes:
        ours: What we found, a sentence with numbers.
        paper: What the paper reports; empty if nothing is known.
        verdict: Whether the two agree; see `VERDICTS`.
        reason: Why they differ, or in what sense they agree.
    """

    ours: str
    paper: str = ""
    verdict: Verdict = "beside"
    reason: str = ""


Sources = Mapping[str, Any]
"""Tables (DataFrame) and image grids (`nemolib.tables.Grid`) by name."""

Need = Callable[[Sources], str]
"""Something that an exhibit needs of its sources: returns what is missing, as a sentence, or nothing if all is there."""


def rows(table: str, *, at_least: int = 1, **where: str) -> Need:
    """Return the need for rows of a table.

    Args:
        table: Name of the table.
        at_least: Smallest number of rows.
        where: Columns and the value that the rows must have there, such as ``kind="vm"``.
    """

    def missing(sources: Sources) -> str:
        return _too_few(len(_chosen(sources[table], where)), at_least, f"rows{_wanted(where)}", table)

    return missing


def values(table: str, *columns: str, at_least: int = 1, **where: str) -> Need:
    """Return the need for numbers in columns of a table: missing ones (such as metrics without an encoder) do not count.

    Args:
        table: Name of the table.
        columns: Columns, each of which must have them.
        at_least: Smallest number of numbers in each column.
        where: Columns and the value that the rows must have there.
    """

    def missing(sources: Sources) -> str:
        found = _chosen(sources[table], where)
        texts = [
            _too_few(int(found[column].notna().sum()), at_least, f"values of {column}{_wanted(where)}", table)
            for column in columns
        ]
        return next(filter(None, texts), "")

    return missing


def positive(table: str, column: str, **where: str) -> Need:
    """Return the need for at least one number above 0 in a column of a table, in the rows with these values."""

    def missing(sources: Sources) -> str:
        number = int((_chosen(sources[table], where)[column] > 0).sum())
        return _too_few(number, 1, f"{column} above 0{_wanted(where)}", table)

    return missing


def _chosen(table: pd.DataFrame, where: Mapping[str, str]) -> pd.DataFrame:
    """Return the rows that have the given values in the given columns."""
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def _wanted(where: Mapping[str, str]) -> str:
    return "".join(f" with {column} {value!r}" for column, value in where.items())


def _too_few(number: int, needed: int, what: str, table: str) -> str:
    """Return what a table lacks, or nothing if there is enough of it."""
    if number >= needed:
        return ""
    return (
        f"table {table!r} has no {what}"
        if not number
        else f"table {table!r} has {number} of the {needed} {what} needed"
    )


def of_kinds(table: str, *kinds: str, column: str | None = None) -> tuple[Need, ...]:
    """Return the need for at least one row of each kind of prompt, with a number in a column if one is given."""
    return tuple(rows(table, kind=kind) if column is None else values(table, column, kind=kind) for kind in kinds)


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A figure or table.

    Attributes:
        name: Stem of its files; figures and tables do not share one.
        label: Its number in the paper, or empty for one of our own.
        title: What it shows, in a few words.
        notebook: The notebook that computes its tables and grids.
        caption: How to read it.
        draw: Returns the Figure, or the DataFrame as it is to be shown (rounded), from its sources.
        read: Returns the reading from its sources.
        tables: Names of the tables that it needs, each with at least one row.
        grids: Names of the image grids that it needs.
        needs: What else must be in them. A profile whose tables do not give it has no such exhibit, and the page says why.
        elsewhere: Pairs (table or grid, notebook) for those that another notebook makes.
        covers: Names of `nemolib.paper.FIGURES_AND_TABLES` that it shows; without any, those that its label names.
        published: Whether it shows a published run instead of what this profile computed. Then its source is `RUN`, and
            it exists only in profiles that have one.
    """

    name: str
    label: str
    title: str
    notebook: str
    caption: str
    draw: Callable[[Sources], Figure | pd.DataFrame]
    read: Callable[[Sources], Reading]
    tables: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    elsewhere: tuple[tuple[str, str], ...] = ()
    covers: tuple[str, ...] = ()
    published: bool = False

    @property
    def heading(self) -> str:
        """The label and the title."""
        return f"{self.label}: {self.title}" if self.label else f"{self.title[0].upper()}{self.title[1:]}"

    @property
    def shows(self) -> tuple[str, ...]:
        """The figures and tables of the paper that it shows."""
        return self.covers or (() if self.published else named(self.label))


def named(label: str) -> tuple[str, ...]:
    """Return the figures or tables that a label names: ``"Figures 16-17"`` gives Figure 16 and Figure 17.

    A label with anything else in it, such as "Table 4 (thresholds)", names none: it shows a part.
    """
    match = re.fullmatch(r"(Figure|Table)s? ((?:(?:, | and )?(?:\d+-\d+|\d+[a-z]?))+)", label)
    if match is None:
        return ()
    found: list[str] = []
    for part in re.split(r", | and ", match[2]):
        first, _, last = part.partition("-")
        found += [str(number) for number in range(int(first), int(last) + 1)] if last else [first]
    return tuple(f"{match[1]} {number}" for number in found)


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """An exhibit that was drawn and written.

    Attributes:
        exhibit: The exhibit.
        content: The Figure or DataFrame.
        reading: What it shows.
        files: Its files by suffix.
    """

    exhibit: Exhibit
    content: Figure | pd.DataFrame
    reading: Reading
    files: dict[str, Path]


@dataclass(frozen=True, slots=True)
class NotDrawn:
    """An exhibit that was not drawn.

    Attributes:
        exhibit: The exhibit.
        reason: Why.
        computed: Whether its tables and grids are there.
    """

    exhibit: Exhibit
    reason: str
    computed: bool


def load_sources(exhibit: Exhibit, profile: Profile | str) -> dict[str, Any]:
    """Return the tables and image grids that an exhibit needs, and the published run for one that shows it.

    Raises:
        MissingResultError: One of them is missing; the message says which notebook makes it.
        CannotDrawError: It shows a published run, and the profile has none.
        PublishedRunError: The published run cannot be used.
    """
    profile = load_profile(profile)
    readers = [
        *((item, files.read_table) for item in exhibit.tables),
        *((item, files.read_grid) for item in exhibit.grids),
    ]
    sources = {RUN: _published_run(exhibit, profile)} if exhibit.published else {}
    for item, read in readers:
        try:
            sources[item] = read(item, profile=profile.name)
        except FileNotFoundError as error:
            notebook = dict(exhibit.elsewhere).get(item, exhibit.notebook)
            raise MissingResultError(
                f"{exhibit.heading}: there is no {'table' if read is files.read_table else 'image grid'} {item!r} of "
                f"profile {profile.name!r}; run notebook {notebook}: {_command(notebook, profile.name)}"
            ) from error
    return sources


def _published_run(exhibit: Exhibit, profile: Profile) -> pd.DataFrame:
    if profile.published_run is None:
        raise CannotDrawError(f"{exhibit.heading}: profile {profile.name!r} has no published run (key 'published_run')")
    if not paths.resolve(profile.prompts.memorized).is_file():
        raise FileNotFoundError(
            f"{exhibit.heading}: there is no prompt table {paths.resolve(profile.prompts.memorized)}, which says which "
            f"prompts of the run are VM and which TM; fetch it: python -m nemolib.downloads --profile {profile.name} --only files"
        )
    return published_runs.localizations(profile.published_run, profile.prompts.memorized)


def lacking(exhibit: Exhibit, sources: Sources) -> str:
    """Return what the sources of an exhibit lack, or nothing if it can be drawn."""
    always = [rows(name) for name in exhibit.tables]
    pictures = [name for name in exhibit.grids if not sources[name].images.size]
    reasons = [*(need(sources) for need in always), *(f"image grid {name!r} has no image" for name in pictures)]
    # The others look at columns and kinds, which a table without rows need not have.
    return next(filter(None, reasons), "") or next(filter(None, (need(sources) for need in exhibit.needs)), "")


def command(exhibit: Exhibit, profile: str) -> str:
    """Return the command that computes what an exhibit shows."""
    return _command(exhibit.notebook, profile)


def _command(notebook: str, profile: str) -> str:
    return f"make build/{profile}/{notebook}.ipynb PROFILE={profile}"


def render(exhibit: Exhibit, profile: Profile | str) -> Rendered:
    """Draw an exhibit, write its files to ``figures/<profile>/``, and return it.

    The same sources give the same bytes.

    Args:
        exhibit: The exhibit.
        profile: A profile or its name.

    Raises:
        MissingResultError: A table or image grid is missing; the message says which notebook makes it.
        CannotDrawError: They are there and hold too little; the message says what is missing.
    """
    profile = load_profile(profile)
    sources = load_sources(exhibit, profile)
    missing = lacking(exhibit, sources)
    if missing:
        raise CannotDrawError(f"{exhibit.heading}: {missing}")
    content = exhibit.draw(sources)
    inputs = {name: value.images if isinstance(value, Grid) else value for name, value in sources.items()}
    if exhibit.published:
        inputs["published_file"] = paths.resolve(profile.published_run)
    shared = {
        "profile": profile.name,
        "notebook": exhibit.notebook,
        "inputs": inputs,
        "seeds": {"detection": profile.detection.seed, "generation": profile.generation.seed},
    }
    save = files.export_table if isinstance(content, pd.DataFrame) else save_figure
    return Rendered(exhibit, content, exhibit.read(sources), save(content, exhibit.name, **shared))


def render_or_say_why(exhibit: Exhibit, profile: Profile | str) -> Rendered | NotDrawn:
    """Draw an exhibit as `render` does, or return why the profile does not give it.

    A table that no notebook made is an error, unless the profile has a published run: then the exhibits of that run are
    worth showing although nothing else was computed.

    Raises:
        MissingResultError: A table or image grid is missing, and the profile has no published run.
    """
    profile = load_profile(profile)
    try:
        return render(exhibit, profile)
    except CannotDrawError as error:
        return NotDrawn(exhibit, _reason(exhibit, error), computed=True)
    except MissingResultError as error:
        if profile.published_run is None:
            raise
        return NotDrawn(exhibit, _reason(exhibit, error), computed=False)


def _reason(exhibit: Exhibit, error: Exception) -> str:
    return str(error).removeprefix(f"{exhibit.heading}: ")


def comparison_table(items: Sequence[Rendered | NotDrawn]) -> pd.DataFrame:
    """Return what agrees and what differs: columns exhibit, ours, paper, verdict, reason; only what was drawn."""
    lines = [
        (item.exhibit.label or item.exhibit.heading, item.reading.ours, item.reading.paper, item.reading.verdict, item.reading.reason)
        for item in items if isinstance(item, Rendered)
    ]  # fmt: skip
    return pd.DataFrame(lines, columns=["exhibit", "ours", "paper", "verdict", "reason"])
