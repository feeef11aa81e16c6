"""A run that somebody else has published: its table of results beside what is computed here, marked in every exhibit.

The authors' code writes one row per prompt, separated by semicolons: the prompt, the neurons of the initial selection
(a neuron that was found twice stands there twice) and those that refinement left. Such a table does not say with which
model and settings it was made. Kinds of prompts are those of the profile's prompt table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nemolib import localization, paper, paths, plots
from nemolib.exhibits import Claim, each_kind, exhibit, of_kinds
from nemolib.experiments import localize_neurons as search
from nemolib.neurons import NeuronSet
from nemolib.prompts import MEMORIZED, load_prompts

if TYPE_CHECKING:
    from nemolib.run import Run

NOTEBOOK = "06_figures"

COLUMNS = ("Caption", "Initial Neurons", "Refined Neurons")
"""Columns of a table of results of the authors' code that are read."""

KEPT = ("kind", "prompt", "initial_count", "neuron_count", "neurons")


class PublishedRunError(ValueError):
    """A table of results that cannot be used; the message names the file, the row and the column."""


def localizations(run: Run) -> pd.DataFrame:
    """Return the profile's published run as a table of localizations; without rows if it names none.

    Source: authors' code, 3_detect_memorized_neurons.py.

    Returns:
        One row per prompt of the run, columns kind (missing if the profile's prompts do not have the caption), prompt,
        initial_count and neuron_count (different neurons before and after refinement), neurons (JSON of a neuron set).

    Raises:
        FileNotFoundError: The file, or the table of prompts, is missing.
        PublishedRunError: A column is missing, neurons are no lists of lists of integers, or a refined neuron is no
            candidate; or no caption of the run is among the prompts.
    """
    if run.profile.published_run is None:
        return pd.DataFrame(columns=list(KEPT))
    path, prompts = paths.resolve(run.profile.published_run), run.profile.prompts.memorized
    known = load_prompts(prompts).set_index("caption")["kind"]
    table = pd.DataFrame(_rows(path), columns=list(KEPT[1:]))
    table.insert(0, "kind", table["prompt"].map(known))
    if table["kind"].isna().all():
        raise PublishedRunError(f"{path}: none of its {len(table)} captions is in the prompt table {prompts}")
    return table


def _rows(path: Path) -> Iterator[tuple[str, int, int, str]]:
    """Yield the checked rows of a table of results: all of `KEPT` but the kind."""
    text = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    try:
        table = pd.read_csv(path, sep=";", usecols=COLUMNS, index_col=False, **text)
    except ValueError as error:
        raise PublishedRunError(f"{path}: {error}; expected columns {', '.join(COLUMNS)}, split by ;") from error
    for number, row in enumerate(table.to_dict("records"), start=1):
        where = f"{path}, row {number}: column"
        initial, refined = (_neurons(row[column], f"{where} {column!r}") for column in COLUMNS[1:])
        if len(initial.layers) != len(refined.layers) or refined - initial:
            raise PublishedRunError(f"{where} 'Refined Neurons' is not within the initial neurons")
        yield row["Caption"], len(initial), len(refined), refined.to_json()


def _neurons(text: str, where: str) -> NeuronSet:
    try:
        return NeuronSet.from_json(f'{{"layers": {text}}}')
    except (ValueError, RecursionError):
        expected = "neurons by layer, such as [[3], [], [1, 2]]"
        raise PublishedRunError(f"{where} is {text[:60]!r}; expected {expected}") from None


# What it gives

MARK = "published run, not computed here"
"""What stands in every figure."""

NOTE = (
    "Not computed here: a table of results of the authors' code that others published. Its model and settings are not "
    "recorded in it; kinds of prompts are those of the profile's prompt table."
)
"""What stands in every caption."""

OTHER = "the run need not have the paper's settings, nor all of its prompts"
"""Why numbers may differ."""

FACTOR = 2.0
"""How many times larger or smaller than the paper's a median may be to agree with it."""

TOLERANCE = 0.05
"""How far the share of the VM prompts that have the neurons that the paper names may be from the paper's."""

SHARED = ((0, 25), (0, 221))
"""These neurons, as (layer, neuron) of a neuron set: value layer 1 (Sec. 4)."""


def _known(published_run: pd.DataFrame) -> pd.DataFrame:
    """Return the VM and TM prompts of the run; raise `NotEnough` if there are none of a kind."""
    return pd.concat(of_kinds(published_run, "published_run", *MEMORIZED).values())


def _near(claim: Claim, known: pd.DataFrame, column: str, reported: str) -> Claim:
    """Return a claim about medians, decided by how near they are to those that the paper reports."""
    medians = known.groupby("kind")[column].median()
    ratios = {kind: medians[kind] / paper.reported(reported.format(kind)).value for kind in MEMORIZED}
    near = each_kind(lambda kind: f"{ratios[kind]:.2g} times the paper's")
    holds = all(1 / FACTOR <= ratio <= FACTOR for ratio in ratios.values())
    return replace(claim, holds=holds, rule=f"both medians are within a factor of {FACTOR:g}: {near}; {OTHER}")


def _marked(figure: Figure) -> Figure:
    """Return a figure with what it is written above it."""
    with mpl.rc_context(plots.neurips()):
        figure.suptitle(MARK, fontsize=plots.TICK_SIZE, style="italic", color=plots.GREY)
    return figure


def read_4a(published_run: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether VM and TM prompts have as many neurons as in the paper."""
    known = _known(published_run)
    neurons, _, single = search.read_4a(known)
    counts, other = known["kind"].value_counts(), len(published_run) - len(known)
    left_out = f"; {other} not in the prompt table, left out" if other else ""
    yield Claim("prompts of the run", f"VM {counts['vm']}, TM {counts['tm']}{left_out}")
    yield from (_near(neurons, known, "neuron_count", "neurons.{}"), single)


@exhibit("Figure 4a (published run)", "memorization neurons per prompt, not computed here",
    f"Histogram over prompts; vertical lines are medians. {NOTE}", read=read_4a)  # fmt: skip
def published_figure_4a(published_run: pd.DataFrame) -> Figure:
    return _marked(search.counts_figure(_known(published_run), {"neuron_count": "memorization neurons"}))


def read_4b(published_run: pd.DataFrame) -> Iterator[Claim]:
    """Yield in which value layers the neurons lie."""
    (share,) = search.read_4b(_known(published_run))
    yield replace(share, rule=f"{share.rule}; {OTHER}")


@exhibit("Figure 4b (published run)", "memorization neurons per value layer, not computed here",
    f"Mean number per prompt. {NOTE}", read=read_4b)  # fmt: skip
def published_figure_4b(published_run: pd.DataFrame) -> Figure:
    return _marked(search.figure_4b(_known(published_run)))


def read_7(published_run: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether the initial selection has as many neurons as in the paper, each counted once."""
    known = _known(published_run)
    initial, refined = search.read_7(known)
    initial = _near(initial, known, "initial_count", "neurons.{}.initial")
    yield from (initial, replace(refined, holds=None, rule=""))


@exhibit("Figure 7 (published run)", "neurons before and after refinement, not computed here",
    f"Histograms over prompts; vertical lines are medians. {NOTE}", read=read_7)  # fmt: skip
def published_figure_7(published_run: pd.DataFrame) -> Figure:
    return _marked(search.counts_figure(_known(published_run), search.STAGES))


def read_shared(published_run: pd.DataFrame) -> Iterator[Claim]:
    """Yield how many VM prompts have one of the two neurons that the paper names."""
    verbatim, reported = of_kinds(published_run, "published_run", "vm")["vm"], paper.reported("shared.vm_share").value
    share = np.mean([any(pair in neurons for pair in SHARED) for neurons in localization.neuron_sets(verbatim)])
    rule = f"the share is within {100 * TOLERANCE:g} percentage points; {OTHER}"
    near, text = bool(abs(share - reported) <= TOLERANCE), "VM prompts that have neuron 25 or 221 of value layer 1"
    yield Claim(text, f"{share:.0%}", f"{reported:.0%}", near, rule)


@exhibit("Figures 10-12 (as a table, published run)", "neurons that VM prompts share, not computed here",
    f"Neurons that most VM prompts have in their refined set, and the words that their captions have in common. {NOTE}",
    read=read_shared)  # fmt: skip
def published_shared_neurons(published_run: pd.DataFrame) -> pd.DataFrame:
    verbatim = of_kinds(published_run, "published_run", "vm")["vm"]
    shown = localization.shared_neurons(verbatim).head(12)
    shown.insert(3, "of all VM prompts", (shown["prompts"] / len(verbatim)).map("{:.0%}".format))
    return shown.drop(columns="captions").rename(columns={"prompts": "VM prompts"})
