"""Every figure and table that is made for readers, as one list in the paper's order.

To add one: write an `Exhibit` beside those of its notebook (which tables and image grids it needs, how it is drawn, its
caption, how it is read), and name it in `EXHIBITS`. Notebook 06 and the index page go through the list; nothing else
has to change.
"""

from collections.abc import Sequence

from nemolib.exhibits import detection, localization, mitigation
from nemolib.exhibits.base import (
    NOTEBOOK,
    VERDICTS,
    Exhibit,
    MissingResultError,
    Reading,
    Rendered,
    Sources,
    command,
    comparison_table,
    load_sources,
    render,
)
from nemolib.profiles import Profile

__all__ = [
    "EXHIBITS", "NOTEBOOK", "VERDICTS", "Exhibit", "MissingResultError", "Reading", "Rendered", "Sources", "command",
    "comparison_table", "load_sources", "render", "render_all",
]  # fmt: skip

EXHIBITS: tuple[Exhibit, ...] = (
    detection.FIGURE_2A,
    detection.FIGURE_2B,
    localization.FIGURE_3,
    localization.FIGURE_4A,
    localization.FIGURE_4B,
    detection.FIGURE_6,
    localization.FIGURE_7,
    mitigation.FIGURE_9,
    localization.HIGHLY_MEMORIZED,
    mitigation.FIGURE_10,
    mitigation.FIGURE_11,
    mitigation.FIGURE_12,
    localization.SHARED_NEURONS,
    localization.SEARCH,
    localization.NEURON_COUNTS,
    detection.FIGURE_13,
    mitigation.TABLE_1,
    localization.TABLE_2,
    detection.THRESHOLDS,
    detection.DETECTION,
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
)
"""All figures and tables, in the paper's order; ours that are not in the paper come last."""


def render_all(profile: Profile | str, exhibits: Sequence[Exhibit] | None = None) -> list[Rendered]:
    """Return all exhibits, drawn and written; see `render`.

    Args:
        profile: A profile or its name.
        exhibits: Which ones; None means all.

    Raises:
        MissingResultError: A table or image grid is missing; the message says which notebook makes it.
    """
    return [render(exhibit, profile) for exhibit in (EXHIBITS if exhibits is None else exhibits)]
