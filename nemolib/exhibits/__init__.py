"""Every figure and table that is made for readers, as one list in the paper's order.

To add one: write an `Exhibit` beside those of its notebook (which tables and image grids it needs, how it is drawn, its
caption, how it is read), and name it in `EXHIBITS`. Notebook 06 and the index page go through the list; nothing else
has to change.
"""

from collections.abc import Sequence

import pandas as pd

from nemolib import paper
from nemolib.exhibits import ablations, blocking, detection, localization, mitigation, overview, published
from nemolib.exhibits.base import (
    NOTEBOOK,
    RUN,
    VERDICTS,
    CannotDrawError,
    Exhibit,
    MissingResultError,
    NotDrawn,
    Reading,
    Rendered,
    Sources,
    command,
    comparison_table,
    load_sources,
    render,
    render_or_say_why,
)
from nemolib.profiles import Profile, load_profile

__all__ = [
    "EXHIBITS", "NOTEBOOK", "NOT_MADE", "RUN", "VERDICTS", "CannotDrawError", "Exhibit", "MissingResultError", "NotDrawn",
    "Reading", "Rendered", "Sources", "command", "comparison_table", "load_sources", "missing_table", "of_profile",
    "render", "render_all", "render_or_say_why",
]  # fmt: skip

EXHIBITS: tuple[Exhibit, ...] = (
    # Figures of the paper.
    overview.FIGURE_1,
    detection.FIGURE_2A,
    detection.FIGURE_2B,
    localization.FIGURE_3,
    localization.FIGURE_4A,
    published.FIGURE_4A,
    localization.FIGURE_4B,
    published.FIGURE_4B,
    blocking.FIGURE_5A,
    ablations.FIGURE_5B,
    detection.FIGURE_6,
    localization.FIGURE_7,
    published.FIGURE_7,
    blocking.FIGURE_8,
    mitigation.FIGURE_9,
    localization.HIGHLY_MEMORIZED,
    mitigation.FIGURE_10,
    mitigation.FIGURE_11,
    mitigation.FIGURE_12,
    localization.SHARED_NEURONS,
    published.SHARED_NEURONS,
    detection.FIGURE_13,
    ablations.FIGURE_14,
    ablations.FIGURE_15,
    blocking.FIGURE_16,
    blocking.FIGURE_17,
    blocking.FIGURE_18,
    blocking.FIGURE_19,
    blocking.FIGURE_20,
    # Tables of the paper.
    mitigation.TABLE_1,
    localization.TABLE_2,
    blocking.TABLE_3,
    ablations.TABLE_4,
    detection.THRESHOLDS,
    # The paper's text.
    localization.SEARCH,
    localization.NEURON_COUNTS,
    detection.DETECTION,
    # Ours.
    detection.SAMPLES,
    detection.HOLDOUT,
    detection.SWITCHES,
    detection.SWITCH_TABLE,
    detection.ROC,
    detection.LADDER,
    detection.Z_BY_LAYER,
    localization.SCORES_BEFORE_AFTER,
    localization.NEURON_Z,
    localization.PLAIN_MODEL,
    mitigation.TABLE_1_FIGURE,
    mitigation.CLAIMS,
    mitigation.MITIGATION_IMAGES,
    mitigation.UNHARMED,
    mitigation.UNMEMORIZED_IMAGES,
    mitigation.QUALITY,
    blocking.QUALITY_TABLE,
    blocking.CONVOLUTIONS,
    ablations.TABLE_4_FIGURE,
    ablations.CLAIMS,
    ablations.LADDER,
)
"""All figures and tables, in the paper's order; ours that are not in the paper come last."""

NOT_MADE: dict[str, str] = {}
"""Figures and tables of the paper that no exhibit shows, and why not."""


def of_profile(profile: Profile | str) -> tuple[Exhibit, ...]:
    """Return the exhibits that a profile can have: those of a published run only if it names one."""
    has_run = load_profile(profile).published_run is not None
    return tuple(exhibit for exhibit in EXHIBITS if has_run or not exhibit.published)


def render_all(profile: Profile | str, exhibits: Sequence[Exhibit] | None = None) -> list[Rendered | NotDrawn]:
    """Return all exhibits, drawn and written where the profile gives them; see `render_or_say_why`.

    Args:
        profile: A profile or its name.
        exhibits: Which ones; None means all of the profile.

    Returns:
        One entry per exhibit, in the order of the list: drawn, or the reason why not.

    Raises:
        MissingResultError: A table or image grid is missing; the message says which notebook makes it. In a profile with
            a published run it is a reason instead.
    """
    return [render_or_say_why(exhibit, profile) for exhibit in (of_profile(profile) if exhibits is None else exhibits)]


def missing_table(items: Sequence[Rendered | NotDrawn]) -> pd.DataFrame:
    """Return what a page does not show, and why: columns exhibit, shows, reason.

    First the exhibits that were not drawn, then the figures and tables of the paper that have none.

    Args:
        items: What `render_all` returned.
    """
    lines = [
        (item.exhibit.label or item.exhibit.heading, item.exhibit.title, item.reason)
        for item in items
        if isinstance(item, NotDrawn)
    ]
    lines += [(name, paper.FIGURES_AND_TABLES[name], reason) for name, reason in NOT_MADE.items()]
    return pd.DataFrame(lines, columns=["exhibit", "shows", "reason"])
