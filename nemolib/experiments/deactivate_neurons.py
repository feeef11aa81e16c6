"""Notebook 04: every mitigation of Table 1 on the same seeds, single neurons, and what unmemorized prompts suffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nemolib import metrics, paper, plots
from nemolib.experiments.localize_neurons import by_prompt, memorized
from nemolib.layers import widths
from nemolib.mitigation import (
    AttentionScaling,
    DeactivatedNeurons,
    EmbeddingAdjustment,
    Mitigation,
    RandomTokens,
    norms_together,
    random_neurons,
    target_norms,
    target_of,
)
from nemolib.prompts import MEMORIZED
from nemolib.store import Grid

if TYPE_CHECKING:
    from nemolib.run import Run
    from nemolib.settings import GenerationSettings

NOTEBOOK = "04_deactivate_neurons"

NONE, NEMO, RANDOM, INITIAL = "all neurons active", "NeMo", "random neurons", "NeMo, initial selection"
"""Settings that have a part in claims; the paper's Table 1 calls the first three so."""

METRICS = tuple(plots.METRICS)
"""Metrics of Table 1."""

NAMES = {"neurons": "neurons", "sscd_orig": "SSCD_Orig", "sscd_gen": "SSCD_Gen", "d_sscd": "D_SSCD", "a_clip": "A_CLIP"}
"""What tables call the columns of Table 1."""

NO_IMAGES = Grid(np.zeros((0, 0, 1, 1, 3), dtype=np.uint8), (), ())
"""A grid of a figure that a profile has nothing for."""


# Table 1


def settings(run: Run, found: pd.DataFrame) -> dict[str, list[Mitigation | None]]:
    """Return the settings of Table 1 in the paper's order, ours last: for each one mitigation per repeat.

    Source: Sec. 4, Table 1.

    Args:
        run: The run.
        found: Localizations.

    Returns:
        Mitigations by name; None is the untouched model.
    """
    chosen, sets = run.profile.mitigation, by_prompt(memorized(found))
    draws = [
        {
            prompt: random_neurons(neurons, widths(run.pipe.unet), seed=chosen.random.seed, repeat=repeat)
            for prompt, neurons in sets.items()
        }
        for repeat in range(chosen.random.repeats)
    ]
    tokens = [RandomTokens(number, chosen.somepalli.seed) for number in chosen.somepalli.numbers]
    return {
        NONE: [None],
        "prompt embedding adjustment (Wen)": [adjustment(run)],
        RANDOM: [DeactivatedNeurons(draw) for draw in draws],
        "attention scaling (Ren)": [AttentionScaling(chosen.ren)],
        **{f"{item.name} (Somepalli)": [item] for item in tokens},
        NEMO: [DeactivatedNeurons(sets)],
        INITIAL: [DeactivatedNeurons(by_prompt(memorized(found), "initial"))],
    }


def adjustment(run: Run) -> EmbeddingAdjustment:
    """Return the profile's prompt embedding adjustment; where it has no target, by rule from the threshold prompts."""
    chosen = run.profile.mitigation.wen
    if chosen.target is None:
        captions = run.prompts("threshold")["caption"].tolist()
        together = norms_together(chosen)
        norms = run.compute(target_norms, captions, label="target norm", together=together, settings=chosen)
        chosen = replace(chosen, target=target_of(norms, chosen))
    return EmbeddingAdjustment(chosen)


def measured(
    run: Run,
    found: pd.DataFrame,
    settings: Mapping[str, Sequence[Mitigation | None]],
    generation: GenerationSettings | None = None,
) -> pd.DataFrame:
    """Return the metrics of Table 1 for each memorized prompt, every setting on the same seeds.

    Source: Sec. 4 (metrics).

    Args:
        run: The run.
        found: Localizations.
        settings: Mitigations by name, one per repeat.
        generation: Seeds, steps and guidance of the images; None means those of the profile.

    Returns:
        One row per setting, repeat and prompt: columns setting, repeat, kind, prompt, neurons (number deactivated), and
        those of `nemolib.run.Run.measure`.
    """
    found = memorized(found).reset_index(drop=True)
    rows, parts = run.rows(found["prompt"]), []
    for name, repeats in settings.items():
        for repeat, mitigation in enumerate(repeats):
            known = pd.DataFrame({"setting": name, "repeat": repeat, "kind": found["kind"], "prompt": found["prompt"]})
            known["neurons"] = [_count(mitigation, prompt) for prompt in found["prompt"]]
            parts.append(pd.concat([known, run.measure(rows, mitigation, settings=generation)], axis=1))
    return pd.concat(parts, ignore_index=True)


def _count(mitigation: Mitigation | None, prompt: str) -> int:
    """Return how many neurons a mitigation deactivates for a prompt."""
    return len(mitigation.neurons_of(prompt)) if isinstance(mitigation, DeactivatedNeurons) else 0


def table_1(values: pd.DataFrame, reported: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return Table 1: median, median absolute deviation and interval over prompts, with the paper's medians beside.

    Where a setting was repeated, a prompt counts with its mean over the repeats. A prompt without a value is left out,
    and what no prompt has is missing.

    Args:
        values: What `measured` returned.
        reported: The paper's numbers, columns as of its Table 1 (`nemolib.paper.table`); None means that table.

    Returns:
        One row per setting and kind: columns setting, kind, prompts, memorized (share of the prompts whose largest
        SSCD_Orig over seeds is above 0.7), then for neurons and each metric of `METRICS` the columns ``<name>`` (median),
        ``<name>_mad``, ``<name>_low`` and ``<name>_high`` (95 % bootstrap interval of the median), ``<name>_paper`` and
        ``<name>_paper_mad`` (missing where the paper has no such row).
    """
    names, group = ("neurons", *METRICS), ["setting", "kind"]
    means = values.groupby([*group, "prompt"], sort=False)[[*names, "sscd_orig_max"]].mean().reset_index()
    cells = metrics.summary_table(means, names, by=group).set_index([*group, "quantity"])
    theirs = (paper.table("table_1") if reported is None else reported).set_index(group)
    parts, rows = dict(list(means.groupby(group))), []
    for key in [key for key in product(dict.fromkeys(values["setting"]), MEMORIZED) if key in parts]:
        largest = parts[key]["sscd_orig_max"].dropna()
        share = np.nan if largest.empty else metrics.memorization_rate(largest)
        row = dict(zip(group, key, strict=True)) | {"prompts": len(parts[key]), "memorized": share}
        for name in names:
            cell = cells.loc[(*key, name)]
            row |= {name: cell["median"]} | {f"{name}_{end}": cell[end] for end in ("mad", "low", "high")}
            row |= {f"{name}_paper{end}": theirs[f"{name}{end}"].get(key, np.nan) for end in ("", "_mad")}
        rows.append(row)
    return pd.DataFrame(rows)


def shown_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of `table_1` as it is shown: median ± median absolute deviation as text, ours and the paper's."""
    shares = ["" if np.isnan(share) else f"{share:.0%}" for share in table["memorized"]]
    columns = {"setting": table["setting"], "prompts": table["kind"].str.upper(), "copies": shares}
    for name, label in NAMES.items():
        digits = 1 if name == "neurons" else 2
        for end, title in (("", label), ("_paper", f"{label} (paper)")):
            pairs = zip(table[f"{name}{end}"], table[f"{name}{end}_mad"], strict=True)
            columns[title] = ["" if np.isnan(mid) else f"{mid:.{digits}f} ± {mad:.{digits}f}" for mid, mad in pairs]
    return pd.DataFrame(columns)
