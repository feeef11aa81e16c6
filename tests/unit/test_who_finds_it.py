"""Notebook 09: readings and drawings from small made tables; searches and draws in a random world."""

import numpy as np
import pandas as pd
import pytest

from nemolib import metrics, paths
from nemolib.beyond.detectors import DETECTORS, Sampled, quantile_threshold
from nemolib.exhibits import NotEnough
from nemolib.experiments import who_finds_it as finds
from nemolib.pipeline import load_pipeline
from nemolib.run import Run
from nemolib.settings import Profile
from tests.random_world import SMALL, amplify, write_encoders, write_prompts

OWN = {"samples": 2, "similarity_samples": 2, "sampling_samples": 1, "steps": 5}
TRIGGERS = {"words": 6, "length": 2, "chains": 2, "proposals": 2, "drawn": 3}


def detections(good=1.0, unmemorized=100):
    """Return scores of two detectors: the guidance norm grows with copies by ``good``, the other one says nothing."""
    rows = []
    kinds = (
        [("vm", 24, 0.9)] * 3
        + [("ladder", 1, 0.1)] * 4
        + [("ladder", 64, 0.9)] * 4
        + [("unmemorized", 0, None)] * unmemorized
    )
    for number, (kind, copies, copy_max) in enumerate(kinds):
        common = {"caption": f"{kind} {number}", "kind": kind, "copies": copies, "copy_max": copy_max, "subjects": "a"}
        for samples in (1, 2):
            rows.append(common | {"detector": "guidance norm", "samples": samples, "evaluations": 2 * samples,
                                  "score": good * copies + number % 4 / 100})  # fmt: skip
        rows.append(common | {"detector": "bright ending", "samples": 1, "evaluations": 24, "score": number % 4 / 100})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def quality():
    return finds.quality(detections())


def prompts():
    return detections().drop_duplicates("caption")


def row(quality, detector, group, samples):
    return quality.query("detector == @detector and group == @group and samples == @samples").iloc[0]


def test_quality_of_a_detector_that_works_and_of_one_that_does_not(quality):
    for group, number in ((finds.ALL, 7), (finds.OFTEN, 3), (finds.COPIED, 4)):
        good = row(quality, "guidance norm", group, 2)
        assert good[["auroc", "auroc_low", "tpr", "found"]].tolist() == [1] * 4
        assert good["prompts"] == number
        assert row(quality, "bright ending", group, 1)["tpr"] == 0
    for detector in ("guidance norm", "bright ending"):
        quiet = row(quality, detector, finds.QUIET, 1)
        assert quiet["found"] == (detector == "guidance norm")
    table = detections()
    chosen = table[(table["detector"] == "bright ending") & (table["kind"] == "unmemorized")]["score"]
    assert row(quality, "bright ending", finds.ALL, 1)["threshold"] == quantile_threshold(chosen)
    rungs = quality.dropna(subset="copies")
    assert rungs["samples"].tolist() == [2, 2, 1, 1]
    assert rungs["tpr"].isna().all()
    assert rungs["auroc"].tolist() == pytest.approx([1.0, 1.0, 0.5, 0.5], abs=0.01)


def test_too_few_unmemorized_prompts_give_no_threshold_and_none_at_all_nothing():
    few = finds.quality(detections(unmemorized=99))
    assert few[["threshold", "found"]].isna().all(axis=None)
    assert few["auroc"].notna().all()
    assert (finds.detectors_table(few).filter(like="found") == "nan%").all(axis=None)
    with pytest.raises(NotEnough, match="unmemorized"):
        finds.quality(detections(unmemorized=0))


def test_the_best_buy_finds_most_for_the_least(quality):
    best = finds.best_buy(quality)
    assert (best["detector"], best["samples"], best["evaluations"]) == ("guidance norm", 1, 2)
    assert finds.of_group(quality)["detector"].tolist() == ["guidance norm", "bright ending"]
    assert finds.of_group(quality)["samples"].tolist() == [2, 1]


def test_the_first_rung_is_that_from_which_all_reach_the_bound():
    values = pd.Series([0.95, 0.4, 0.9, 1.0], index=[1, 2, 4, 8])
    assert [finds.first_rung(values, bound) for bound in (0.3, 0.9, 1.1)] == ["1 copies", "4 copies", "no rung"]


def test_claims_by_copies_turn_with_the_table(quality):
    said = {claim.text: claim.ours for claim in finds.read_by_copies(quality, prompts())}
    assert said["the median prompt of a rung has a copy"] == "from 64 copies on"
    assert said["AUROC of at least 0.9 from 1 copies on"] == "guidance norm"
    assert said["AUROC of at least 0.9 from no rung on"] == "bright ending"
    said = [claim.text for claim in finds.read_by_copies(finds.quality(detections(good=0.0)), prompts())]
    assert said[1:] == ["AUROC of at least 0.9 from no rung on"]


def test_claims_by_cost_hold_or_not(quality):
    found, verdict = finds.read_by_cost(quality)
    assert "guidance norm, latents: 1, evaluations: 2; TPR 1.00, AUROC 1.00" in found.ours
    assert verdict.holds is True
    *_, verdict = finds.read_by_cost(finds.quality(detections(good=-1.0)))
    assert verdict.holds is False
    assert verdict.paper == "guidance norm 0.976"


def test_figures_draw_their_tables(quality):
    figure = finds.detectors_by_copies(quality, prompts())
    copied, norm, ending, empty = figure.axes
    assert copied.lines[1].get_ydata().tolist() == [0.1, 0.9]
    assert norm.lines[0].get_ydata().tolist() == [1.0, 1.0]
    assert norm.get_title() == "guidance norm (4)"
    assert ending.lines[0].get_ydata() == pytest.approx([0.5, 0.5], abs=0.01)
    assert not empty.get_visible()
    # The rung whose median prompt has a copy is shaded: from half a rung below to half a rung above 64.
    assert [patch.get_x() for patch in norm.patches] == pytest.approx([64 / 2**0.5])
    costs, auroc, tpr = finds.detectors_by_cost(quality).axes
    assert [bar.get_width() for bar in costs.patches] == [4, 24]
    assert [label.get_text() for label in costs.get_yticklabels()] == ["guidance norm", "bright ending"]
    fewest, every, theirs = auroc.lines
    assert every.get_xdata().tolist() == finds.of_group(quality)["auroc"].tolist()
    assert fewest.get_xdata().tolist() == every.get_xdata().tolist()
    assert theirs.get_xdata().tolist() == [0.976, 0.886]
    assert tpr.lines[2].get_xdata().tolist() == [0.896, 0.39]
    with pytest.raises(NotEnough, match="ladder"):
        finds.detectors_by_copies(quality, prompts().query("kind != 'ladder'"))


def test_the_table_says_who_reported_what(quality):
    table = finds.detectors_table(quality).set_index("detector")
    assert table.loc["guidance norm", f"found: {finds.QUIET}"] == "100%"
    assert table.loc["bright ending", "reported"].startswith("0.886 / 0.390: ")
    assert "Jeon" in table.loc["guidance norm", "reported"]


def test_tokens_are_bars_in_the_order_of_the_prompt():
    table = pd.DataFrame(
        {
            "kind": ["vm"] * 2 + ["tm"],
            "place": [0, 1, 0],
            "token": ["red", "fox", "owl"],
            "significance": [1.0, 3.0, 2.0],
        }
    )
    vm, tm = finds.show_token_significance(table).axes
    assert [bar.get_width() for bar in vm.patches] == [1.0, 3.0]
    assert [label.get_text() for label in vm.get_yticklabels()] == ["red", "fox"]
    assert vm.get_xlim() == tm.get_xlim()


def test_suspects_share_no_word():
    scored = pd.DataFrame({"prompt": ["a b", "b c", "", "c d", "e"], "score": [5, 4, 9, 3, 1]})
    assert finds.suspects(scored, 9) == ["a b", "c d", "e"]
    assert finds.suspects(scored, 1) == ["a b"]


def test_recall_is_drawn_and_read():
    table = pd.DataFrame(
        {"strategy": [finds.WORDS] * 2 + [finds.GIBBS], "evaluations": [10, 20, 15], "found": [1, 2, 0], "images": 7}
    )
    figure = finds.trigger_recall(table)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0, 1, 2]
    assert "of 7" in figure.axes[0].get_ylabel()
    first, second = finds.read_triggers(table)
    assert first.ours == "2 of 7 (20 evaluations, 2 images drawn)"
    assert second.ours == "0 of 7 (15 evaluations, 1 images drawn)"


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_model_folder):
    folder = tmp_path_factory.mktemp("world")
    kinds = {"red fox card": "vm", "blue cat case": "tm", "odd pin": "ladder", "odd hat": "ladder"}
    clean = ["a tree in the sea", "my dog"]
    files = write_prompts(folder, kinds, unmemorized=clean, holdout=["u v", "w x"], copies={"odd hat": 4})
    encoders = write_encoders(folder, random_model_folder)
    beyond = {"detectors": OWN | {"triggers": TRIGGERS}}
    profile = Profile(
        model=str(random_model_folder),
        prompts=files,
        holdout_size=2,
        encoders=encoders,
        beyond=beyond,
        protocol="paper",
        **SMALL,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", folder)
        yield Run(profile, amplify(load_pipeline(profile)), progress=False)


def test_every_detector_scores_every_prompt_with_the_settings_of_the_profile(run):
    chosen = finds.detectors_of(run)
    assert [type(each) for each in chosen] == list(DETECTORS)
    assert {each.seed for each in chosen} == {run.profile.detection.seed}
    assert {each.steps for each in chosen if isinstance(each, Sampled)} == {5}
    assert [each.samples for each in chosen] == [1 if isinstance(each, Sampled) else 2 for each in chosen]
    table = finds.detections(run, finds.tested(run))
    assert len(table) == 6 * (2 * 6 + 3 + 1)
    assert table["copy_max"].notna().sum() == 4 * 16
    some = table.query("caption == 'my dog' and detector == 'guidance norm'")
    for samples, score in zip(some["samples"], some["score"], strict=True):
        norm = next(each for each in chosen if each.name == "guidance norm")
        direct = type(norm)(samples=samples, seed=norm.seed, guidance=norm.guidance).score(run.pipe, "my dog")
        assert score == pytest.approx(direct.score, rel=1e-3)


def test_each_strategy_asks_for_as_many_sentences_as_there_are_words(run):
    words = finds.vocabulary(run)
    assert len(set(words)) == 6
    search = finds.trigger_search(run)
    parts = dict(list(search.groupby("strategy", sort=False)))
    assert sorted(parts[finds.WORDS]["prompt"]) == ["", *sorted(words)]
    assert {len(prompt.split()) for prompt in parts[finds.RANDOM]["prompt"]} == {0, 2}
    assert parts[finds.GIBBS]["search"].nunique() == 2
    assert max(map(len, parts.values())) <= 2 + len(words)


def test_what_was_drawn_is_compared_with_planted_images(run, monkeypatch):
    assert finds.targets(run)["caption"].tolist() == ["red fox card", "odd pin"]
    search = pd.DataFrame(
        {"strategy": [finds.WORDS] * 3, "search": 0, "prompt": ["fox", "dog", "cat"], "score": [3.0, 2.0, 1.0]}
    )
    known = run.planted_features(finds.targets(run))
    monkeypatch.setattr(run, "features", lambda *a, **k: np.stack([known[0], known[0], known[1]])[:, None])
    draws = finds.trigger_draws(run, search)
    assert draws["copy_of"].tolist() == ["red fox card", "red fox card", "odd pin"]
    assert draws["found"].tolist() == [1, 1, 2]
    steps = run.profile.generation.steps
    assert draws["evaluations"].tolist() == [3 + 1 + 2 * steps * number for number in (1, 2, 3)]
    assert draws["images"].unique() == [2]
    monkeypatch.undo()
    grid = finds.trigger_grid(run, draws)
    assert grid.columns[0] == "planted"
    assert set(grid.rows) == {"fox", "cat"}
    assert (draws["copy_similarity"] > metrics.MEMORIZED_ABOVE).all()


def test_one_token_is_measured_after_another(run):
    table = finds.significance(run)
    assert table.groupby("kind", sort=False)["caption"].first().tolist() == [
        "red fox card",
        "blue cat case",
        "a tree in the sea",
    ]
    assert (table["significance"] > 0).all()
