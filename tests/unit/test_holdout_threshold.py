"""What is normal: thresholds of every switch by hand, in a random world."""

from dataclasses import fields, replace

import numpy as np
import pytest

from nemolib.experiments import holdout_threshold as holdout
from nemolib.holdout import memorization_threshold
from nemolib.layers import widths
from nemolib.run import Run
from nemolib.settings import PAPER, RELEASED


@pytest.fixture(scope="module")
def run(random_run):
    return random_run({}, holdout=[f"{a} {b}" for a in "abc" for b in "uv"], generation={"guidance": 3.0})


def test_each_switch_changes_one_thing_and_all_together_lead_to_the_paper():
    rows = {name: (protocol, guidance) for name, _, _, protocol, guidance in holdout.switches(7.0)}
    assert list(rows) == ["none", "timestep", "pairs", "similarity", "all", "guidance", "order"]
    changed = {"timestep": "timestep_index", "order": "swap_guidance", "pairs": "threshold_pairs", "similarity": "similarity"}  # fmt: skip
    for name, field in changed.items():
        assert rows[name] == (replace(RELEASED, **{field: getattr(PAPER, field)}), 7)
    assert rows["none"] == (RELEASED, 7)
    assert rows["all"] == (PAPER, 7)
    assert rows["guidance"] == (RELEASED, 0)
    differing = {field.name for field in fields(PAPER) if getattr(PAPER, field.name) != getattr(RELEASED, field.name)}
    # The others are about the search, which a threshold does not see.
    assert differing - set(changed.values()) == {"name", "evaluate_limits", "double_entries"}
    assert [guidance for *_, guidance in holdout.switches(0.0)] == [0, 0, 0, 0, 0, 7, 7]


def test_thresholds_of_the_switches(run):
    rows = holdout.switch_table(run).set_index("switch")
    for name, protocol, guidance in (("none", RELEASED, None), ("all", PAPER, None), ("guidance", RELEASED, 0.0)):
        values = run.holdout_scores(protocol=protocol, guidance=guidance)
        assert rows.loc[name, "threshold"] == memorization_threshold(values, protocol=protocol)
    assert np.allclose(rows["threshold"], rows["mean"] + rows["sd"])
    assert np.allclose(rows["difference"], rows["threshold"] - rows.loc["none", "threshold"])
    largest = run.holdout_scores(protocol=RELEASED).max(axis=1)
    assert rows.loc["none", "gate"] == (largest > rows.loc["none", "threshold"]).mean()
    kept = sorted(run.store.folder.rglob("observing/*/*"))
    run.threshold_at(guidance=run.profile.generation.guidance)
    assert sorted(run.store.folder.rglob("observing/*/*")) == kept, "Table 4 needs no UNet pass of its own"


def test_pairs_keep_their_prompt_and_seeds(run):
    scores, table = run.holdout_scores(), holdout.pair_table(run)
    seeds = table.set_index("prompt")[["first", "second"]].head(4)
    assert list(seeds.itertuples(name=None)) == [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1)]
    assert table["similarity"].to_numpy().reshape(4, 3).tolist() == scores.tolist()


def test_the_four_thresholds_and_what_other_holdout_sets_give(run):
    table, scores = holdout.thresholds(run), run.holdout_scores()
    assert table["ours"].tolist() == [memorization_threshold(scores, multiplier=times) for times in (-1, 0, 1, 2)]
    assert (table["tau"] == run.threshold).all()
    draws = [memorization_threshold(scores[rows]) for rows in np.random.default_rng(0).integers(4, size=(1000, 4))]
    assert table.loc[0, ["low", "high"]].tolist() == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())
    given = replace(run.profile, thresholds={"value": 0.25})
    assert (holdout.thresholds(Run(given, run.pipe, store=run.store, progress=False))["tau"] == 0.25).all()


def test_the_blocks_of_the_unet_and_their_value_layers(run):
    table = holdout.unet_blocks(run)
    down, up = run.pipe.unet.down_blocks, run.pipe.unet.up_blocks
    assert table["block"].nunique() == len(down) + 1 + len(up)
    depths = table.drop_duplicates("block")["depth"].tolist()
    assert depths == [*range(len(down)), len(down), *reversed(range(len(up)))]
    found = table[table["layer"] > 0]
    assert found["layer"].tolist() == list(range(1, len(found) + 1))
    assert found.loc[found["part"] != "up", "neurons"].tolist() == list(widths(run.pipe.unet))
    assert (found["features"] == run.pipe.unet.config.cross_attention_dim).all()
    drawn = [text.get_text() for text in holdout.unet_drawing(table).axes[0].texts]
    assert {"1", str(len(widths(run.pipe.unet))), "down", "mid", "up"} <= set(drawn)


def test_how_alike_images_are():
    images = np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3))
    assert holdout.seed_correlation(images[[0, 0]]) == pytest.approx(1)
    by_hand = [np.corrcoef(images[a].ravel(), images[b].ravel())[0, 1] for a, b in ((0, 1), (0, 2), (1, 2))]
    assert holdout.seed_correlation(images) == pytest.approx(np.mean(by_hand))
    assert np.isnan(holdout.seed_correlation(images[:1]))


def test_four_times_the_prompts_halve_the_spread_of_the_threshold():
    assert [holdout.EXERCISES["01.4"](None)(factor) for factor in (1, 2, 4)] == [False, True, False]
