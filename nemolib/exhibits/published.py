"""Exhibits of a published run: what somebody else's table of results gives, beside what was computed here.

Such a table does not say which model and settings it was made with; every exhibit says so. Kinds of prompts come from the
profile's own table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from nemolib import paper
from nemolib.exhibits.base import NOTEBOOK, RUN, Exhibit, Reading, Sources, of_kinds
from nemolib.exhibits.localization import read_layers
from nemolib.experiments_localization import neuron_sets, shared_neurons
from nemolib.figures import localization
from nemolib.prompts import MEMORIZED
from nemolib.tables import format_median_mad
from nemolib.theme import TICK_SIZE, neurips

MARK = "published run, not computed here"
"""What stands in every figure."""

NOTE = (
    "Not computed here: a table of results of the authors' code that others published. Its model and settings are not "
    "recorded in it; kinds of prompts are those of the profile's prompt table."
)
"""What stands in every caption."""


def _run(sources: Sources) -> pd.DataFrame:
    """Return the prompts of the run whose kind is known."""
    table = sources[RUN]
    return table[table["kind"].isin(MEMORIZED)]


def _numbers(sources: Sources) -> str:
    """Return how many prompts of the run are shown."""
    table, known = sources[RUN], _run(sources)
    parts = [f"{int((known['kind'] == kind).sum())} {kind.upper()}" for kind in MEMORIZED]
    left_out = len(table) - len(known)
    return f"published run of {len(table)} prompts ({', '.join(parts)}" + (
        f"; {left_out} not in the prompt table, left out)" if left_out else ")"
    )


def _counts(sources: Sources, column: str) -> dict[str, pd.Series]:
    table = _run(sources)
    return {kind: table.loc[table["kind"] == kind, column] for kind in MEMORIZED}


def _shown(values: Mapping[str, pd.Series]) -> str:
    return ", ".join(f"{kind.upper()} {format_median_mad(item, digits=1)}" for kind, item in values.items())


def _marked(draw: Callable[[pd.DataFrame], Figure]) -> Callable[[Sources], Figure]:
    """Return what draws the run and writes above the figure what it is."""

    def drawn(sources: Sources) -> Figure:
        figure = draw(_run(sources))
        with mpl.rc_context(neurips()):
            figure.suptitle(MARK, fontsize=TICK_SIZE, style="italic", color="0.35")
        return figure

    return drawn


BINS = 24
"""Number of bars of each kind in a histogram: a run of Stable Diffusion has prompts with few and with very many neurons."""

FACTOR = 2.0
"""How many times larger or smaller than the paper's a median may be to agree with it."""


def _compared(values: Mapping[str, pd.Series], reported: Mapping[str, paper.Reported]) -> tuple[bool, str]:
    """Return whether all medians are near the paper's, and how near each is, in words."""
    ratios = {kind: float(values[kind].median()) / reported[kind].value for kind in MEMORIZED}
    near = all(1 / FACTOR <= ratio <= FACTOR for ratio in ratios.values())
    texts = ", ".join(f"{kind.upper()} {ratio:.2g} times the paper's" for kind, ratio in ratios.items())
    return near, f"agrees if both medians are within a factor of {FACTOR:g}: {texts}; {OTHER}"


OTHER = "the run need not have the paper's settings, nor all of its prompts"
"""Why numbers may differ."""


def _read_4a(sources: Sources) -> Reading:
    counts = _counts(sources, "neuron_count")
    reported = {kind: paper.reported(f"neurons.{kind}") for kind in MEMORIZED}
    near, reason = _compared(counts, reported)
    return Reading(
        f"{_numbers(sources)}: {_shown(counts)} neurons; a single neuron for {int((counts['vm'] == 1).sum())} VM prompts",
        f"VM {reported['vm']}, TM {reported['tm']}; a single neuron for {paper.reported('neurons.vm.single')} of "
        f"{paper.reported('prompts.vm')} VM prompts",
        "agrees" if near else "differs",
        reason,
    )


def _read_4b(sources: Sources) -> Reading:
    reading = read_layers(_run(sources))
    return replace(reading, ours=f"{_numbers(sources)}: {reading.ours}", reason=f"{reading.reason}; {OTHER}")


def _read_7(sources: Sources) -> Reading:
    initial, refined = _counts(sources, "initial_count"), _counts(sources, "neuron_count")
    reported = {kind: paper.reported(f"neurons.{kind}.initial") for kind in MEMORIZED}
    near, reason = _compared(initial, reported)
    return Reading(
        f"{_numbers(sources)}: initial {_shown(initial)}; refined {_shown(refined)}",
        f"initial VM {reported['vm']}, TM {reported['tm']}; refined VM {paper.reported('neurons.vm')}, TM "
        f"{paper.reported('neurons.tm')}",
        "agrees" if near else "differs",
        f"initial selection, each neuron counted once: {reason}",
    )


SHARED = ((1, 25), (1, 221))
"""The two neurons of value layer 1 that the paper names, as (layer, neuron), the layer counted from 1 (Sec. 4)."""

TOLERANCE = 0.05
"""How far the share of the VM prompts that have them may be from the paper's."""


def owners(table: pd.DataFrame, layer: int, neuron: int) -> set[str]:
    """Return the prompts of a table of localizations that have a neuron; the layer is counted from 1."""
    having = [(layer - 1, neuron) in neurons for neurons in neuron_sets(table)]
    return set(table.loc[having, "prompt"])


def _draw_shared(sources: Sources) -> pd.DataFrame:
    verbatim = _run(sources).query("kind == 'vm'")
    table = shared_neurons(_run(sources)).head(12)
    numbers = [len(owners(verbatim, row.layer, row.neuron)) for row in table.itertuples()]
    return pd.DataFrame(
        {
            "layer": table["layer"],
            "neuron": table["neuron"],
            "prompts": table["prompts"],
            "VM prompts": numbers,
            "of all VM prompts": [f"{number / len(verbatim):.0%}" for number in numbers],
            "words": table["words"],
        }
    )


def _read_shared(sources: Sources) -> Reading:
    verbatim, reported = _run(sources).query("kind == 'vm'"), paper.reported("shared.vm_share")
    having = [owners(verbatim, *pair) for pair in SHARED]
    share = len(set().union(*having)) / len(verbatim)
    texts = [
        f"neuron {neuron} of value layer {layer} belongs to {len(owned)} VM prompts and is the only one of "
        f"{int((verbatim['prompt'].isin(owned) & (verbatim['neuron_count'] == 1)).sum())}"
        for (layer, neuron), owned in zip(SHARED, having, strict=True)
    ]
    return Reading(
        f"{_numbers(sources)}: {', '.join(texts)}; together {share:.0%} of the VM prompts have one of them",
        f"the two belong to {reported.value:.0%} of the VM prompts",
        "agrees" if abs(share - reported.value) <= TOLERANCE else "differs",
        f"agrees if the share is within {100 * TOLERANCE:g} percentage points; {OTHER}",
    )


_NEEDS = of_kinds(RUN, *MEMORIZED)

FIGURE_4A = Exhibit(
    "published_figure_4a", "Figure 4a (published run)", "memorization neurons per prompt, not computed here", NOTEBOOK,
    f"Histogram over prompts; vertical lines are medians. {NOTE}",
    _marked(lambda table: localization.figure_4a(table, bins=BINS)), _read_4a, needs=_NEEDS, published=True,
)  # fmt: skip

FIGURE_4B = Exhibit(
    "published_figure_4b", "Figure 4b (published run)", "memorization neurons per value layer, not computed here", NOTEBOOK,
    f"Mean number per prompt. {NOTE}",
    _marked(localization.figure_4b), _read_4b, needs=_NEEDS, published=True,
)  # fmt: skip

FIGURE_7 = Exhibit(
    "published_figure_7", "Figure 7 (published run)", "neurons before and after refinement, not computed here", NOTEBOOK,
    f"Histograms over prompts; vertical lines are medians. {NOTE}",
    _marked(lambda table: localization.figure_7(table, bins=BINS)), _read_7, needs=_NEEDS, published=True,
)  # fmt: skip

SHARED_NEURONS = Exhibit(
    "published_shared_neurons", "Figures 10-12 (as a table, published run)", "shared neurons, not computed here", NOTEBOOK,
    f"Neurons that most prompts have in their refined set, and the words that their captions have in common. {NOTE}",
    _draw_shared, _read_shared, needs=_NEEDS, published=True,
)  # fmt: skip
