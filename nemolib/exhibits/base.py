"""What an exhibit is: a figure or table for readers, made from tables and image grids that notebooks saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

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


class MissingResultError(FileNotFoundError):
    """A table or image grid that no notebook has made yet; the message says which one makes it."""


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
        tables: Names of the tables that it needs.
        grids: Names of the image grids that it needs.
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

    @property
    def heading(self) -> str:
        """The label and the title."""
        return f"{self.label}: {self.title}" if self.label else f"{self.title[0].upper()}{self.title[1:]}"


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


def load_sources(exhibit: Exhibit, profile: Profile | str) -> dict[str, Any]:
    """Return the tables and image grids that an exhibit needs.

    Raises:
        MissingResultError: One of them is missing; the message says which notebook makes it.
    """
    name = load_profile(profile).name
    readers = [
        *((item, files.read_table) for item in exhibit.tables),
        *((item, files.read_grid) for item in exhibit.grids),
    ]
    sources = {}
    for item, read in readers:
        try:
            sources[item] = read(item, profile=name)
        except FileNotFoundError as error:
            raise MissingResultError(
                f"{exhibit.heading}: there is no {'table' if read is files.read_table else 'image grid'} {item!r} of "
                f"profile {name!r}; run notebook {exhibit.notebook}: {command(exhibit, name)}"
            ) from error
    return sources


def command(exhibit: Exhibit, profile: str) -> str:
    """Return the command that computes what an exhibit shows."""
    return f"make build/{profile}/{exhibit.notebook}.ipynb PROFILE={profile}"


def render(exhibit: Exhibit, profile: Profile | str) -> Rendered:
    """Draw an exhibit, write its files to ``figures/<profile>/``, and return it.

    The same sources give the same bytes.

    Args:
        exhibit: The exhibit.
        profile: A profile or its name.

    Raises:
        MissingResultError: A table or image grid is missing; the message says which notebook makes it.
    """
    profile = load_profile(profile)
    sources = load_sources(exhibit, profile)
    content = exhibit.draw(sources)
    shared = {
        "profile": profile.name,
        "notebook": exhibit.notebook,
        "inputs": {name: value.images if isinstance(value, Grid) else value for name, value in sources.items()},
        "seeds": {"detection": profile.detection.seed, "generation": profile.generation.seed},
    }
    save = files.export_table if isinstance(content, pd.DataFrame) else save_figure
    return Rendered(exhibit, content, exhibit.read(sources), save(content, exhibit.name, **shared))


def comparison_table(rendered: Sequence[Rendered]) -> pd.DataFrame:
    """Return what agrees and what differs: columns exhibit, ours, paper, verdict, reason."""
    rows = [
        (item.exhibit.label or item.exhibit.heading, item.reading.ours, item.reading.paper, item.reading.verdict, item.reading.reason)
        for item in rendered
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["exhibit", "ours", "paper", "verdict", "reason"])
