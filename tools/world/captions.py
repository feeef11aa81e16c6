"""The prompt tables of the world: which caption is planted, trained, held out.

Columns: caption, kind (vm, tm, ladder, unmemorized, holdout), group (choose, report or rung), copies (how many images of
the training set it has; 0 if it was not trained on), image (the planted PNG relative to ``data/tiny``, else empty) and
subjects (one name, or two with a space between them).
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from nemolib.prompts import article
from tools.world.settings import DataSettings

COLUMNS = ["caption", "kind", "group", "copies", "image", "subjects"]

#: Ways to name one subject; of each subject some of them are trained and the rest is held out.
WORDINGS = (
    "{}", "{a} {}", "the {}", "my {}", "one {}", "this {}", "some {}", "a nice {}", "a cute {}", "{a} {} sticker",
    "{a} {} icon", "a picture of {a} {}", "a drawing of {a} {}", "an icon of {a} {}", "an image of {a} {}",
    "here is {a} {}",
)  # fmt: skip

#: Ways to name two subjects; a pair of subjects has one of them, and is trained or held out.
PAIR_WORDINGS = ("{a} {} and {b} {}", "{a} {} with {b} {}", "the {} and the {}", "{} and {}")

PLANTED = pd.read_csv(Path(__file__).with_name("subjects.csv"), keep_default_na=False)
"""All subjects: kind, wording, subject. Two families of VM captions share their words, as LAION's podcast covers do; the
words of the others occur in one caption only. Ladder subjects occur in ladder captions and nowhere else, so that nothing
but the copies teaches them. No planted caption names an ordinary subject."""

LADDER = PLANTED.loc[PLANTED["kind"] == "ladder", "subject"].tolist()

#: All regular subjects. Those of planted captions are among them, so that a memorized prompt has something to show
#: without its neurons.
SUBJECTS = PLANTED.loc[PLANTED["kind"] != "ladder", "subject"].tolist()


def planted_table(settings: DataSettings) -> pd.DataFrame:
    """Return the rows of ``memorized.csv``: vm and tm (groups choose / report by turns), then the ladder.

    Raises:
        ValueError: the ladder has more captions than there are subjects for it.
    """
    rungs = [copies for copies, number in settings.ladder for _ in range(number)]
    if len(rungs) > len(LADDER):
        raise ValueError(
            f"the ladder needs {len(rungs)} subjects of its own, there are {len(LADDER)}; extend subjects.csv"
        )
    rungs = np.random.default_rng(settings.seed).permutation(rungs).tolist()
    copies = {"vm": len(SUBJECTS) * [settings.vm_copies], "tm": len(SUBJECTS) * [settings.tm_copies], "ladder": rungs}
    rows = []
    for kind, counts in copies.items():
        subjects = PLANTED[PLANTED["kind"] == kind].itertuples()
        for index, (count, row) in enumerate(zip(counts, subjects, strict=False)):
            group = f"rung-{count:03d}" if kind == "ladder" else ("choose", "report")[index % 2]
            caption, image = in_words(row.wording, row.subject), f"planted/{kind}_{index:02d}.png"
            rows.append((caption, kind, group, count, image, row.subject))
    return pd.DataFrame(rows, columns=COLUMNS)


def regular_tables(settings: DataSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (trained, held-out) regular captions, columns caption and subjects.

    Which wordings of a subject, and which pairs of subjects, are trained is drawn at random.
    """
    rng = np.random.default_rng(settings.seed)
    tables: tuple[list, list] = [], []
    for name in SUBJECTS:
        for place, wording in enumerate(rng.permutation(WORDINGS)):
            tables[place >= settings.trained_wordings].append((in_words(wording, name), name))
    for place, pair in enumerate(rng.permutation(list(combinations(SUBJECTS, 2)))):
        one, other = rng.permutation(pair)
        caption = rng.choice(PAIR_WORDINGS).format(one, other, a=article(one), b=article(other))
        tables[place >= settings.trained_pairs].append((caption, f"{one} {other}"))
    return tuple(pd.DataFrame(rows, columns=["caption", "subjects"]) for rows in tables)


def held_out_tables(settings: DataSettings, held_out: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of ``unmemorized.csv`` and ``holdout.csv``: disjoint random draws of the held-out captions.

    Single subjects and pairs come by turns, as long as there are both.
    """
    rng = np.random.default_rng(settings.seed + 1)
    shuffled = held_out.iloc[rng.permutation(len(held_out))]
    turn = shuffled.groupby(shuffled["subjects"].str.contains(" ")).cumcount()
    ordered = shuffled.iloc[np.argsort(turn, kind="stable")]
    last = settings.unmemorized_prompts + settings.holdout_prompts
    parts = {
        "unmemorized": ordered[: settings.unmemorized_prompts],
        "holdout": ordered[settings.unmemorized_prompts : last],
    }
    return tuple(
        table.assign(kind=kind, group=kind, copies=0, image="")[COLUMNS].reset_index(drop=True)
        for kind, table in parts.items()
    )


def in_words(wording: str, name: str) -> str:
    """Return a caption of one subject."""
    return wording.format(name, a=article(name))
