"""Scores, detection, z-scores and copies: what the tables hold, by hand, in a random world."""

import numpy as np
import pandas as pd
import pytest

from nemolib.experiments import memorization_score as score
from nemolib.first_step import guidance_norms
from nemolib.holdout import holdout_scores

VM, CLEAN = ["red fox card", "red owl card"], ["a tree", "the sea", "my dog"]


def activations(vm):
    """Return a change: the largest z-scores of VM prompts, where those of all others are 3."""
    return lambda table: table.assign(largest_z=np.where(table["kind"] == "vm", vm, 3.0))


TURNS = [
    ("figure_2b", "z_by_neuron", activations(9.0), activations(3.0), "VM prompts have unusual activations in value layer 1"),
    ("detection_table", "detection", lambda table: table.assign(auroc=0.95), lambda table: table.assign(auroc=0.5),
     "one denoising step tells memorized prompts from others (protocol paper)"),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(random_run):
    kinds = dict.fromkeys(VM, "vm") | {"blue cat case": "tm", "odd pin": "ladder", "odd hat": "ladder"}
    holdout = [f"{first} {second}" for first in "abc" for second in "uv"]
    return random_run(kinds, unmemorized=CLEAN, holdout=holdout, copies={"odd hat": 4})


@pytest.fixture(scope="module")
def scores(run):
    return score.scores(run)


def test_scores_are_the_librarys(run, scores):
    captions = scores["caption"].tolist()
    assert scores["kind"].tolist() == ["vm"] * 2 + ["tm"] + ["ladder"] * 2 + ["unmemorized"] * 3
    direct = holdout_scores(run.pipe, captions, progress=False)
    assert scores["score"].to_numpy() == pytest.approx(direct.max(axis=1), abs=1e-4)
    assert scores["mean_pair"].to_numpy() == pytest.approx(direct.mean(axis=1), abs=1e-4)
    assert scores["score"].tolist() == scores["score_released"].tolist()
    theirs = holdout_scores(run.pipe, captions[:1], protocol="paper", progress=False).max()
    assert scores["score_paper"].iloc[0] == pytest.approx(theirs, abs=1e-4)
    assert scores["wen"].iloc[0] == pytest.approx(guidance_norms(run.pipe, captions[0]).mean(), rel=1e-3)


def test_detection_counts_pairs_and_has_reported_numbers_beside():
    kinds = ["vm"] * 3 + ["tm"] * 3 + ["unmemorized"] * 4 + ["ladder"]
    good, bad = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 99], [0, 1] * 5 + [99]
    table = score.detection(pd.DataFrame({"kind": kinds, "score_paper": good, "score_released": good, "wen": bad}))
    assert table["memorized"].tolist() == ["vm + tm", "vm", "tm"] * 3
    assert table["prompts"].tolist() == [6, 3, 3] * 3
    assert (table.loc[:5, ["auroc", "auroc_low", "tpr_at_1_fpr", "accuracy"]] == 1).all().all()
    assert table["threshold"].tolist()[:3] == [3.5, 5.0, 3.5]
    assert table["auroc"].iloc[6] == 0.5
    known = table.set_index(["score", "memorized"])["paper_auroc"]
    assert known["score_paper", "vm"] == known["score_released", "vm"] == 0.9964
    assert known["wen", "vm + tm"] == 0.992
    assert known.isna().sum() == 4
    shown = score.detection_table(table).set_index(["score", "memorized"])
    assert shown.loc[("SSIM (paper)", "VM"), "AUROC"] == "1.000 (0.996)"
    assert shown.loc[("Wen et al., one step", "TM"), "AUROC"] == "0.583"


def test_detection_of_the_rungs_against_unmemorized_prompts():
    kinds, copies = ["ladder"] * 4 + ["unmemorized"] * 2, [1, 1, 8, 8, 0, 0]
    columns = {name: [0, 2, 2, 3, 1, 1] for name in score.SCORES}
    figure = score.detection_by_copies(pd.DataFrame({"kind": kinds, "copies": copies, **columns}))
    chance, *lines = figure.axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [[0.5, 1.0]] * 3
    assert figure.axes[0].get_xlabel() == "copies in training (n = 2, unmemorized 2)"
