"""Stable Diffusion v1-4 itself, as others measured it: drawn by the exhibits of notebooks 02 and 03, and marked.

``data/sd14`` holds the SSCD of the authors' memorized prompts, their activation statistics, and the neurons that a run of
the authors' code by others found. A profile may name another run (``published_run``). The authors' code writes one row
per prompt, separated by semicolons: the prompt, the neurons of the initial selection (a neuron that was found twice
stands there twice) and those that refinement left. Such a table does not say with which settings it was made.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from nemolib import metrics, paper, paths, plots
from nemolib.exhibits import KINDS, Claim, each_kind, exhibit, exhibit_of, median_mad, of_kinds
from nemolib.experiments import localize_neurons as search
from nemolib.experiments import memorization_score as score
from nemolib.holdout import load_statistics
from nemolib.localization import memorized
from nemolib.neurons import NeuronSet
from nemolib.prompts import MEMORIZED, load_prompts

if TYPE_CHECKING:
    from nemolib.run import Run

NOTEBOOK = "06_figures"

SHIPPED = paths.DATA / "sd14"
"""What others measured, with a README that says whose it is."""

RESULTS, PROMPTS = SHIPPED / "results.csv.gz", SHIPPED / "prompts" / "memorized.csv"

KEY = ["layer", "neuron"]

COLUMNS = ("Caption", "Initial Neurons", "Refined Neurons")
"""Columns of a table of results of the authors' code that are read."""


class PublishedRunError(ValueError):
    """A table of results that cannot be used; the message names the file, the row and the column."""


def tables(run: Run) -> dict[str, pd.DataFrame]:
    """Return what was published, by the names under which the exhibits look for it.

    Returns:
        ``published_localization``: the table of `localizations`. ``published_copies``: the authors' memorized prompts,
        columns kind, caption, copy_max (largest SSCD of ten generations and the training image, or missing).
        ``published_statistics``: columns layer (from 1), neuron (from 0), mean and std of its activation over holdout
        prompts.

    Raises:
        FileNotFoundError, PublishedRunError: As `localizations`.
    """
    copies, normal = load_prompts(PROMPTS), load_statistics(SHIPPED / "statistics.safetensors")
    neurons = [(layer, neuron) for layer, width in enumerate(normal.widths, 1) for neuron in range(width)]
    statistics = pd.DataFrame(neurons, columns=KEY)
    return {
        "published_localization": localizations(run),
        "published_copies": copies[["kind", "caption"]].assign(copy_max=pd.to_numeric(copies["max_sscd"])),
        "published_statistics": statistics.assign(mean=np.concatenate(normal.mean), std=np.concatenate(normal.std)),
    }


def localizations(run: Run) -> pd.DataFrame:
    """Return the published run as a table of localizations: that of the profile, else that in ``data/sd14``.

    Source: authors' code, 3_detect_memorized_neurons.py.

    Returns:
        One row per prompt of the run, columns kind (missing if the caption is not in the prompt table: the profile's, or
        that in ``data/sd14``), prompt, initial_count and neuron_count (different neurons before and after refinement),
        neurons (JSON of a neuron set).

    Raises:
        FileNotFoundError: The file, or the table of prompts, is missing.
        PublishedRunError: A column is missing, neurons are no lists of lists of integers, or a refined neuron is no
            candidate; or no caption of the run is among the prompts.
    """
    own = run.profile.published_run
    path, prompts = (paths.resolve(own), run.profile.prompts.memorized) if own else (RESULTS, PROMPTS)
    known = load_prompts(prompts).set_index("caption")["kind"]
    table = pd.DataFrame(_rows(path), columns=["prompt", "initial_count", "neuron_count", "neurons"])
    table.insert(0, "kind", table["prompt"].map(known))
    if table["kind"].isna().all():
        raise PublishedRunError(f"{path}: none of its {len(table)} captions is in the prompt table {prompts}")
    return table


def _rows(path: Path) -> Iterator[tuple[str, int, int, str]]:
    """Yield the checked rows of a table of results: prompt, number of candidates, number and set of refined neurons."""
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


# What notebooks 02 and 03 draw and claim, of these tables

PREFIX = "published_"
"""Before the name of an exhibit, and before those of its tables: the same, of what was published."""

RUN, RELEASE = "published run", "released table"
"""Where numbers come from, as labels, figures and claims say it."""

NOTES = {
    RUN: "Not computed here: a run of the authors' code on Stable Diffusion v1-4 that others published, unless the "
    "profile names another. Its settings are not recorded, and it need not have all prompts (`data/sd14/README.md`).",
    RELEASE: "Not computed here: the authors' numbers for Stable Diffusion v1-4 (`data/sd14/README.md`).",
}
"""What stands in captions."""


def _published(function: Callable[..., Any], source: str) -> Callable[..., Any]:
    """Return a function that draws or claims the same of what was published, and says so in what it returns."""

    @functools.wraps(function)
    def told(**published: pd.DataFrame) -> Any:
        result = function(**{name.removeprefix(PREFIX): table for name, table in published.items()})
        if isinstance(result, plots.Figure):
            with mpl.rc_context(plots.neurips()):
                result.suptitle(f"{source}, not computed here", size=plots.TICK_SIZE, style="italic", color=plots.GREY)
        elif not isinstance(result, pd.DataFrame):
            return [replace(claim, ours=f"{claim.ours} ({source})") for claim in result]
        return result

    taken = inspect.signature(function)
    renamed = [item.replace(name=f"{PREFIX}{item.name}") for item in taken.parameters.values()]
    told.__name__, told.__signature__ = f"{PREFIX}{function.__name__}", taken.replace(parameters=renamed)
    return told


def read_counts(localization: pd.DataFrame) -> Iterator[Claim]:
    """Yield what `localize_neurons.read_4a` does, and whether the numbers are the paper's: the model is the same."""
    yield from search.read_4a(localization)
    for column, name in search.REPORTED.items():
        theirs = pd.Series({kind: paper.reported(name.format(kind)).value for kind in MEMORIZED})
        ratios = memorized(localization).groupby("kind")[column].median() / theirs
        ours, medians = each_kind(ratios.map("{:.2g} times".format).get), each_kind(theirs.map("{:g}".format).get)
        text, near = f"as many neurons as in the paper ({search.STAGES[column]})", bool(ratios.between(0.5, 2).all())
        yield Claim(text, ours, medians, near, "both medians within a factor of 2")
    if unknown := localization["kind"].isna().sum():
        yield Claim("prompts left out, since they are not in the prompt table", f"{unknown}")


def read_split(copies: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether VM prompts are those with a copy, and how many lie near the cut."""
    known, cut = copies.dropna(subset="copy_max"), metrics.MEMORIZED_ABOVE
    follow, near = (known["copy_max"] > cut) == (known["kind"] == "vm"), (known["copy_max"] - cut).abs() < 0.1
    ours = f"{follow.sum()} of {len(known)} prompts; {len(copies) - len(known)} more have no SSCD"
    theirs = "the kinds are told apart so; 16 training images were not at hand (App. C.1)"
    yield Claim(f"VM if the largest SSCD is above {cut:g}, else TM", ours, theirs, bool(follow.all()), "no exception")
    ours = each_kind(known.groupby("kind")["copy_max"].agg(median_mad).get)
    yield Claim("largest SSCD (median ± MAD)", f"{ours}; {near.sum()} prompts less than 0.1 from the cut")


for _draw, _read, _source in (
    (score.figure_6, read_split, RELEASE),
    (search.figure_4a, read_counts, RUN),
    (search.figure_4b, search.read_4b, RUN),
    (search.figure_7, search.read_7, RUN),
):
    _same, _told = exhibit_of(_draw), _published(_read, _source)
    _texts = f"{_same.label} ({_source})", _same.title, f"{_same.caption} {NOTES[_source]}"
    exhibit(*_texts, read=_told)(_published(_draw, _source))


# Neurons that the paper names, and how active they are

NAMED = paper.table("neurons").set_index(KEY)["paper"]
"""What the paper says of neurons."""


def _owned(localization: pd.DataFrame) -> pd.DataFrame:
    """Return the neurons of VM and TM prompts, a row each: columns layer (from 1), neuron, kind, prompt."""
    found = of_kinds(localization, "published_localization", *MEMORIZED)
    return search.neuron_rows(pd.concat(found.values()).sort_index())


def read_shared(localization: pd.DataFrame) -> Iterator[Claim]:
    """Yield how many VM prompts have one of the two neurons of value layer 1 that the paper names, or it alone."""
    owned = _owned(localization).query("kind == 'vm'")
    first = owned.query("layer == 1 and neuron in (25, 221)")["prompt"].unique()
    alone, theirs = owned["prompt"].value_counts() == 1, paper.reported("shared.vm_share").value
    text, rule = "VM prompts that have neuron 25 or 221 of value layer 1", "the share is within 5 percentage points"
    share = len(first) / (localization["kind"] == "vm").sum()
    yield Claim(text, f"{share:.0%}", f"{theirs:.0%}", bool(abs(share - theirs) <= 0.05), rule)
    yield Claim("VM prompts with a single neuron, which is one of the two", f"{alone[first].sum()} of {alone.sum()}")


@exhibit(f"Figures 10-12 (as a table, {RUN})", "neurons that prompts share, and their captions",
    "Prompts with the neuron in their refined set, and the first captions: the neurons that the paper names, and the two that most other "
    f"prompts share. Activation: mean over 50,000 ordinary prompts ({RELEASE}), and its rank in the layer. {NOTES[RUN]}",
    read=_published(read_shared, RUN))  # fmt: skip
@functools.partial(_published, source=RUN)
def shared_neurons(localization: pd.DataFrame, statistics: pd.DataFrame) -> pd.DataFrame:
    owned, normal = _owned(localization), statistics.set_index(KEY)["mean"]
    counts = owned.groupby([*KEY, "kind"]).size().unstack(fill_value=0)
    chosen = [*NAMED.index, *counts.drop(NAMED.index, errors="ignore").sum(axis=1).nlargest(2).index]
    places, captions = normal.groupby("layer").rank(ascending=False), owned.groupby(KEY)["prompt"].agg("; ".join)
    shown = pd.DataFrame({"in the paper": NAMED.reindex(chosen).fillna("")})
    for kind in MEMORIZED:
        shown[f"{KINDS[kind]} prompts"] = counts[kind].reindex(chosen, fill_value=0)
    shown["activation"] = [f"{normal[key]:.2f} (rank {places[key]:.0f} in its layer)" for key in chosen]
    shown["captions"] = [textwrap.shorten(captions.get(key, ""), 250, placeholder=" …") for key in chosen]
    return shown.reset_index(names=["value layer", "neuron"])


@exhibit("", "what is normal in Stable Diffusion v1-4: the activation of its value neurons",
    "Mean and standard deviation over 50,000 ordinary prompts, a point for each of the 5,760 neurons. "
    f"Marked: the neurons that the paper names. {NOTES[RELEASE]}")  # fmt: skip
@functools.partial(_published, source=RELEASE)
def statistics(statistics: pd.DataFrame) -> plots.Figure:
    across = statistics["layer"] + 0.8 * (statistics.groupby("layer")["neuron"].rank(pct=True) - 0.5)
    table, color = statistics.assign(across=across), plots.ROLES["vm"].color
    named = table.set_index(KEY).loc[NAMED.index].reset_index()
    with plots.panels(1, 2, aspect=0.45, sharey=True) as (figure, axes):
        for place, (column, text) in zip(axes, {"mean": "mean", "std": "standard deviation"}.items(), strict=True):
            place.plot(table["across"], table[column], ".", color="0.7", markersize=1)
            place.plot(named["across"], named[column], "o", color=color, markersize=3)
            for neuron, *at in named[["neuron", "across", column]].itertuples(index=False):
                box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}
                style = {"size": plots.TICK_SIZE, "color": color, "bbox": box}
                place.annotate(f"#{neuron}", at, (4, 3), textcoords="offset points", **style)
            place.set(xlabel="value layer", ylabel=f"activation ({text})", yscale="log", xticks=range(1, 8))
    return figure
