import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from nemolib import experiments, metrics, paper, tables
from nemolib import experiments_mitigation as mitigation
from nemolib.checks import ClaimError, check_table
from nemolib.encoders import CopyDescriptor, alignment_encoder, copy_encoder, describe_samples, quality_encoder
from nemolib.experiments_localization import neuron_sets, shared_neurons
from nemolib.experiments_mitigation import INITIAL, METRICS, NEMO, NONE, OFF, RANDOM
from nemolib.mitigation import EmbeddingAdjustment, wen_target
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.profiles import profile_from_mapping
from nemolib.prompts import select
from nemolib.value_layers import value_activations
from tests.random_pipeline import WIDTHS
from tests.random_world import build_in, write_encoders, write_prompts

VM, TM, UNMEMORIZED = ["red fox card", "red owl card"], ["blue cat case"], ["a tree", "the sea"]
WEN, REN, ONE_TOKEN = "prompt embedding adjustment (Wen)", "attention scaling (Ren)", "1 random token (Somepalli)"

NEURONS = {
    "red fox card": [(0, 1), (6, 3)],
    "red owl card": [(0, 1)],
    "blue cat case": [(0, 1), (2, 4), (2, 5)],
    "a tree": [],
    "the sea": [(1, 0)],
}
"""Neuron (0, 1) belongs to all memorized prompts, and one of them has no other."""

SEEDS = 2


def neurons_of(prompt, *, more=()):
    return NeuronSet.of([*NEURONS[prompt], *more], layers=7)


def documented(name):
    """Return the columns that the list of tables names for a table."""
    (text,) = re.findall(rf"^    {name}: ([^:]*?)\.$", tables.__doc__.partition("Grids of notebook 04")[0], re.M | re.S)
    return [column.strip() for column in re.sub(r"\([^)]*\)", "", text).split(",")]


@pytest.fixture(scope="module")
def profile(tmp_path_factory, random_model_folder):
    folder = tmp_path_factory.mktemp("world")
    return profile_from_mapping(
        {
            "name": "random",
            "model": str(random_model_folder),
            "device": "cpu",
            "holdout_size": 4,
            "threshold_prompts": 3,
            "generation": {"samples": SEEDS, "steps": 2, "batch_size": 16},
            "mitigation": {
                "wen": {"target": None, "steps": 2, "iterations": 2, "latents": 1},
                "random": {"repeats": 2},
            },
            "encoders": write_encoders(folder, random_model_folder),
            "prompts": write_prompts(
                folder,
                dict.fromkeys(VM, "vm") | dict.fromkeys(TM, "tm"),
                unmemorized=UNMEMORIZED,
                holdout=[f"{letter} {letter}" for letter in "abcd"],
                # Training images have different sizes.
                sides={VM[0]: 48},
            ),
        }
    )


@pytest.fixture(scope="module", autouse=True)
def build(tmp_path_factory):
    with build_in(tmp_path_factory.mktemp("build"), experiments) as folder:
        yield folder


@pytest.fixture(scope="module")
def found():
    kinds = {"vm": VM, "tm": TM, "unmemorized": UNMEMORIZED}
    rows = [
        (kind, prompt, neurons_of(prompt).to_json(), neurons_of(prompt, more=[(5, 0), (5, 1)]).to_json())
        for kind, prompts in kinds.items()
        for prompt in prompts
    ]
    return pd.DataFrame(rows, columns=["kind", "prompt", "neurons", "initial"])


@pytest.fixture(scope="module")
def settings(random_pipe, profile, found):
    return mitigation.mitigations(random_pipe, profile, found, progress=False)


@pytest.fixture(scope="module")
def values(random_pipe, profile, found, settings):
    return mitigation.measured(random_pipe, profile, found, settings, progress=False)


@pytest.fixture
def shared(found):
    return shared_neurons(found)


def images(pipe, profile, prompts, **options):
    return experiments.images(pipe, profile, prompts, progress=False, **options)


# The settings of Table 1


def test_settings_are_those_of_the_paper_and_ours(settings):
    assert list(settings) == [*dict.fromkeys(paper.table_1()["setting"]), INITIAL]
    assert {NONE, NEMO, RANDOM, *mitigation.BASELINES} < set(settings)
    assert [len(repeats) for repeats in settings.values()] == [1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert settings[NONE] == [None]
    assert [settings[name][0].number for name in settings if "token" in name] == [1, 4, 10]


def test_neurons_of_the_settings_are_those_of_memorized_prompts(settings):
    for name, more in ((NEMO, []), (INITIAL, [(5, 0), (5, 1)])):
        sets = settings[name][0].neurons
        assert sets == {prompt: neurons_of(prompt, more=more) for prompt in (*VM, *TM)}


def test_random_neurons_are_as_many_others_in_the_same_layers(settings):
    first, second = settings[RANDOM]
    for draw in (first, second):
        for prompt in (*VM, *TM):
            assert draw.neurons[prompt].counts == neurons_of(prompt).counts
            assert not draw.neurons[prompt] & neurons_of(prompt)
    assert first.neurons != second.neurons


def test_the_target_of_wen_follows_from_the_threshold_prompts(random_pipe, profile, settings):
    captions = select(profile, "threshold")["caption"].tolist()
    assert len(captions) == 3
    expected = wen_target(random_pipe, captions, settings=profile.mitigation.wen, progress=False)
    assert settings[WEN][0].settings == dataclasses.replace(profile.mitigation.wen, target=expected)


def test_a_target_of_the_profile_is_taken_as_it_is(profile):
    wen = dataclasses.replace(profile.mitigation.wen, target=1.25)
    given = dataclasses.replace(profile, mitigation=dataclasses.replace(profile.mitigation, wen=wen))
    assert mitigation.adjustment(None, given) == EmbeddingAdjustment(wen)


# What they do


def test_every_setting_repeat_and_prompt_has_a_row(values):
    assert values.columns.tolist() == documented("mitigations")
    assert values["prompt"].tolist() == [*VM, *TM] * 10
    assert values.groupby("setting")["repeat"].max().to_dict() == {
        name: int(name == RANDOM) for name in values["setting"].unique()
    }
    assert values["kind"].tolist() == ["vm", "vm", "tm"] * 10
    for name in ("sscd_orig", "sscd_orig_max", *METRICS):
        assert values[name].between(-1.0001, 1.0001).all(), name


def test_the_untouched_model_gives_the_same_image_twice(values):
    untouched = values["setting"] == NONE
    assert values.loc[untouched, "sscd_gen"].to_numpy() == pytest.approx(1, abs=1e-6)
    assert (values.loc[~untouched].groupby("setting")["sscd_gen"].min() < 1 - 1e-5).all()


def test_neurons_are_counted(values):
    counts = values.groupby(["setting", "repeat"], sort=False)["neurons"].apply(list)
    for repeat in (0, 1):
        assert counts[RANDOM, repeat] == [2, 1, 3]
    assert (counts[NEMO, 0], counts[INITIAL, 0]) == ([2, 1, 3], [4, 3, 5])
    assert counts[NONE, 0] == counts[WEN, 0] == counts[REN, 0] == counts[ONE_TOKEN, 0] == [0, 0, 0]


def test_metrics_of_a_prompt_by_hand(random_pipe, profile, values):
    from PIL import Image

    made = images(random_pipe, profile, TM, neurons=neurons_of(TM[0]))
    describe = CopyDescriptor.load(profile.encoders.copy.path).describe
    (path,) = experiments.prompts.image_paths(select(profile, "tm"), profile)
    original = describe(np.asarray(Image.open(path))[None])[0]
    similar = [float(feature @ original) for feature in describe(made[0])]
    first, second = describe(made[0])
    clip = alignment_encoder(profile)
    aligned = clip.images.describe(made[0]) @ clip.texts.describe(TM)[0]
    before = describe(images(random_pipe, profile, TM)[0])
    row = values[(values["setting"] == NEMO) & (values["prompt"] == TM[0])].iloc[0]
    assert row["sscd_orig"] == pytest.approx(np.median(similar), abs=1e-5)
    assert row["sscd_orig_max"] == pytest.approx(max(similar), abs=1e-5)
    assert row["d_sscd"] == pytest.approx(float(first @ second), abs=1e-5)
    assert row["a_clip"] == pytest.approx(np.median(aligned), abs=1e-5)
    assert row["sscd_gen"] == pytest.approx(np.median((describe(made[0]) * before).sum(1)), abs=1e-5)


def test_a_resumed_run_gives_the_same_rows(random_pipe, profile, found, settings, values, build, monkeypatch):
    made, generate = [], experiments.generate

    def counted(pipe, prompts, **options):
        made.extend(prompts)
        return generate(pipe, prompts, **options)

    monkeypatch.setattr(experiments, "generate", counted)
    few = {name: settings[name] for name in (NONE, NEMO)}
    expected = values[values["setting"].isin(few)].reset_index(drop=True)
    for path in (build / "random" / "store" / "images").rglob("*.*"):
        path.unlink()
    again = mitigation.measured(random_pipe, profile, found, few, progress=False)
    pd.testing.assert_frame_equal(again, expected)
    assert made == [*VM, *TM] * 2
    pd.testing.assert_frame_equal(mitigation.measured(random_pipe, profile, found, few, progress=False), expected)
    assert len(made) == 6


# Table 1


def rows(setting, kind, sscd_orig, *, repeat=0, neurons=0, **columns):
    """Return rows of `measured`, a prompt for each similarity."""
    values = pd.DataFrame({"sscd_orig": sscd_orig}).assign(setting=setting, repeat=repeat, kind=kind, neurons=neurons)
    values["prompt"] = [f"{kind} {number}" for number in range(len(values))]
    return values.assign(
        **{"sscd_orig_max": values["sscd_orig"], "sscd_gen": 1.0, "d_sscd": 0.5, "a_clip": 0.3} | columns
    )


@pytest.fixture
def made_up():
    return pd.concat(
        [
            rows(NONE, "tm", [0.2, 0.4]),
            rows(NONE, "vm", [0.9, 0.8, 0.5], sscd_orig_max=[0.95, 0.9, 0.6]),
            rows(RANDOM, "vm", [0.6, 0.7, 0.9], repeat=0, neurons=[1, 4, 9], sscd_orig_max=[0.8, 0.6, 0.9]),
            rows(RANDOM, "vm", [0.8, 0.9, 1.0], repeat=1, neurons=[1, 4, 9], sscd_orig_max=[0.5, 0.6, 0.9]),
            rows(INITIAL, "vm", [0.1, 0.2, 0.3], neurons=[5, 6, 10]),
        ],
        ignore_index=True,
    )


def test_table_1_has_every_column(made_up):
    table = mitigation.table_1(made_up, resamples=20)
    suffixes = ("", "_mad", "_low", "_high", "_paper", "_paper_mad")
    expected = [f"{name}{suffix}" for name in ("neurons", *METRICS) for suffix in suffixes]
    assert table.columns.tolist() == ["setting", "kind", "prompts", "memorized", *expected]
    assert table[["setting", "kind"]].to_numpy().tolist() == [
        [NONE, "vm"], [NONE, "tm"], [RANDOM, "vm"], [INITIAL, "vm"],
    ]  # fmt: skip
    assert table["prompts"].tolist() == [3, 2, 3, 3]


def test_a_prompt_counts_with_its_mean_over_repeats(made_up):
    row = mitigation.table_1(made_up, resamples=50).set_index("setting").loc[RANDOM]
    means = np.array([0.7, 0.8, 0.95])
    assert row["sscd_orig"] == pytest.approx(0.8)
    assert row["sscd_orig_mad"] == pytest.approx(0.1)
    assert row[["neurons", "neurons_mad"]].tolist() == [4, 3]
    assert row["memorized"] == pytest.approx(1 / 3)
    low, high = metrics.bootstrap_interval(means, resamples=50)
    assert row[["sscd_orig_low", "sscd_orig_high"]].tolist() == pytest.approx([low, high])
    assert 0.7 <= low < 0.8 < high <= 0.95


def test_the_papers_numbers_stand_beside(made_up):
    table = mitigation.table_1(made_up, resamples=20).set_index(["setting", "kind"])
    assert table.loc[(NONE, "vm"), ["sscd_orig_paper", "sscd_orig_paper_mad"]].tolist() == [0.83, 0.16]
    assert table.loc[(NONE, "tm"), ["d_sscd_paper", "d_sscd_paper_mad"]].tolist() == [0.17, 0.06]
    assert table.loc[(RANDOM, "vm"), ["neurons_paper", "neurons_paper_mad"]].tolist() == [4, 3]
    ours_alone = table.loc[(INITIAL, "vm")].filter(like="_paper")
    assert len(ours_alone) == 10
    assert ours_alone.isna().all()


def test_what_no_prompt_has_is_missing(made_up):
    table = mitigation.table_1(made_up.assign(d_sscd=np.nan, sscd_orig_max=np.nan), resamples=20)
    assert table[["memorized", "d_sscd", "d_sscd_mad", "d_sscd_low", "d_sscd_high"]].isna().all(axis=None)
    assert table["sscd_orig"].notna().all()
    shown = mitigation.shown_table(table)
    assert (shown["copies"] == "").all()
    assert (shown["D_SSCD"] == "").all()


def test_a_prompt_without_a_planted_image_is_left_out(made_up):
    made_up.loc[made_up["prompt"] == "vm 2", ["sscd_orig", "sscd_orig_max"]] = np.nan
    row = mitigation.table_1(made_up, resamples=20).iloc[0]
    assert row["sscd_orig"] == pytest.approx(0.85)
    assert row["memorized"] == 1
    assert row["prompts"] == 3


def test_table_1_as_it_is_shown(made_up):
    shown = mitigation.shown_table(mitigation.table_1(made_up, resamples=20))
    assert shown.columns.tolist() == [
        "setting", "prompts", "copies", "neurons", "neurons (paper)", "SSCD_Orig", "SSCD_Orig (paper)",
        "SSCD_Gen", "SSCD_Gen (paper)", "D_SSCD", "D_SSCD (paper)", "A_CLIP", "A_CLIP (paper)",
    ]  # fmt: skip
    assert shown["prompts"].tolist() == ["VM", "TM", "VM", "VM"]
    assert shown["copies"].tolist() == ["67%", "0%", "33%", "0%"]
    assert shown["SSCD_Orig"].tolist() == ["0.80 ± 0.10", "0.30 ± 0.10", "0.80 ± 0.10", "0.20 ± 0.10"]
    assert shown["SSCD_Orig (paper)"].tolist() == ["0.83 ± 0.16", "0.04 ± 0.04", "0.80 ± 0.11", ""]
    assert shown["neurons"].tolist()[2:] == ["4.0 ± 3.0", "6.0 ± 1.0"]
    assert shown["neurons (paper)"].tolist()[2:] == ["4.0 ± 3.0", ""]


# What the paper claims


def like_the_paper(changes=()):
    """Return a table of `table_1` with the paper's numbers as ours, but for (setting, kind, column, value)."""
    initial = paper.table_4().query("setting == 'no refinement'").assign(setting=INITIAL)
    table = pd.concat([paper.table_1(), initial], ignore_index=True).assign(prompts=4, memorized=0.25)
    for name in ("neurons", *METRICS):
        table[f"{name}_low"] = table[f"{name}_high"] = table[name]
        for suffix in ("", "_mad"):
            table[f"{name}_paper{suffix}"] = table[f"{name}{suffix}"].where(table["setting"] != INITIAL)
    for setting, kind, column, value in changes:
        table.loc[(table["setting"] == setting) & (table["kind"] == kind), column] = value
    return table


def failing(table):
    said = mitigation.paper_claims(table)
    return said.loc[said["verdict"] == "does not hold", "claim"].tolist()


def test_every_rule_holds_in_the_papers_table():
    said = mitigation.paper_claims(like_the_paper())
    assert said.columns.tolist() == documented("table_1_claims")
    assert len(said) == 5
    assert (said["verdict"] == "holds").all()
    assert said["paper"].tolist() == said["ours"].tolist()
    assert said["paper"].tolist() == [
        "0.83, 0.80, 0.09", "0.09, 0.09", "0.83, 0.59", "0.99, 0.16", "0.32, 0.02, 0.31",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "column", "value", "claim"),
    [
        (RANDOM, "sscd_orig", 0.75, "random neurons change nothing"),
        (NEMO, "sscd_orig", 0.1, "NeMo removes copies as well as the baselines"),
        (ONE_TOKEN, "sscd_orig", 0.41, "one random token is not enough"),
        (NEMO, "d_sscd", 0.5, "images become diverse"),
        (NEMO, "a_clip", 0.29, "the alignment with the prompt stays"),
        (NONE, "a_clip_mad", 0.005, "the alignment with the prompt stays"),
    ],
)
def test_each_rule_can_fail_alone(setting, column, value, claim):
    assert failing(like_the_paper([(setting, "vm", column, value)])) == [claim]
    assert failing(like_the_paper([(setting, "tm", column, value)])) == []


def test_the_papers_numbers_stay_the_papers():
    said = mitigation.paper_claims(like_the_paper([(RANDOM, "vm", "sscd_orig", 0.5)]))
    assert said.loc[0, ["paper", "ours"]].tolist() == ["0.83, 0.80, 0.09", "0.83, 0.50, 0.09"]


def test_one_random_token_is_no_baseline():
    assert failing(like_the_paper([(NEMO, "vm", "sscd_orig", 0.3)])) == ["NeMo removes copies as well as the baselines"]
    assert failing(like_the_paper([(NEMO, "vm", "sscd_orig", 0.3), (REN, "vm", "sscd_orig", 0.3)])) == []


def test_a_baseline_may_be_absent_but_no_setting_of_a_rule():
    table = like_the_paper()
    without_tokens = table[~table["setting"].str.contains("4 random|10 random")]
    assert failing(without_tokens) == ["NeMo removes copies as well as the baselines"]
    with pytest.raises(KeyError, match="1 random token"):
        mitigation.paper_claims(table[table["setting"] != ONE_TOKEN])


def test_a_rule_without_a_number_is_not_known():
    said = mitigation.paper_claims(like_the_paper([(NEMO, "vm", "d_sscd", np.nan)])).set_index("claim")["verdict"]
    assert said.pop("images become diverse") == "not known"
    assert (said == "holds").all()


# Checks and findings


def failed_checks(values, settings, found):
    return [row.claim for row in mitigation.checks_of(values, settings, found) if not row.holds]


def test_a_fair_comparison_passes(values, settings, found):
    assert (check_table(mitigation.checks_of(values, settings, found))["result"] == "holds").sum() == 4


def test_a_random_set_that_hits_a_found_neuron_fails(values, settings, found):
    broken = settings | {RANDOM: [settings[RANDOM][0], settings[NEMO][0]]}
    assert failed_checks(values, broken, found) == ["no random neuron is a found one"]
    with pytest.raises(ClaimError, match="no random neuron is a found one: 6, must be 0 to 0"):
        check_table(mitigation.checks_of(values, broken, found))


@pytest.mark.parametrize(
    ("setting", "column", "value", "words"),
    [
        (RANDOM, "neurons", 3, "as many as the found ones"),
        (INITIAL, "neurons", 0, "no larger than its initial selection"),
    ],
)
def test_what_is_not_fair_fails(values, settings, found, setting, column, value, words):
    broken = values.copy()
    broken.loc[broken["setting"] == setting, column] = value
    (claim,) = failed_checks(broken, settings, found)
    assert words in claim


def test_a_missing_prompt_fails(values, settings, found):
    broken = values[(values["setting"] != REN) | (values["prompt"] != TM[0])]
    assert failed_checks(broken, settings, found) == ["every setting has every memorized prompt"]


def test_findings_have_the_numbers():
    unmemorized = pd.DataFrame(
        {
            "prompt": ["a", "b", "c"],
            "neurons_one": [3, 4, 9],
            "neurons_all": [77, 77, 77],
            "a_clip_before": [0.31, 0.33, 0.9],
            "a_clip_one": [0.25, 0.29, 0.9],
            "a_clip_all": [0.21, 0.22, 0.9],
            "d_sscd_before": [0.11, 0.12, 0.9],
            "d_sscd_one": [0.11, 0.13, 0.9],
            "d_sscd_all": [0.13, 0.14, 0.9],
        }
    )
    quality = pd.DataFrame({"images": [NONE, OFF], "kid": [0.0123, 0.0456]})
    changed = [(NEMO, "vm", "a_clip", 0.27), (NEMO, "vm", "memorized", 0.0)]
    text = mitigation.findings(like_the_paper(changed), unmemorized, quality)
    lines = text.splitlines()
    assert len(lines) == 5
    for part in (
        "from 0.83 to 0.09 with 4 deactivated neurons", "to 0.07 with the 26.5 of the initial selection",
        "to 0.80 with random ones", "10 random tokens (Somepalli) reaches 0.03", "25% before, 0% after",
    ):  # fmt: skip
        assert part in lines[0]
    assert (
        "D_SSCD goes from 0.99 to 0.16 (paper: 0.99 to 0.16), A_CLIP from 0.32 to 0.27 (paper: 0.32 to 0.31)"
        in lines[1]
    )
    assert lines[2].startswith("- **TM**: the copy similarity goes from 0.04 to 0.05 with 21 ")
    for part in (
        "(4 neurons): A_CLIP 0.33 to 0.29", "(77): to 0.22", "D_SSCD: 0.12, 0.13, 0.14", "from 0.01 to 0.05",
    ):  # fmt: skip
        assert part in lines[4]


def test_findings_say_what_is_not_known():
    names = [f"{name}_{when}" for name in ("neurons", "a_clip", "d_sscd") for when in ("before", "one", "all")]
    unmemorized = pd.DataFrame({name: [np.nan if name.startswith("d_") else 0.5] for name in names})
    changes = [(NONE, kind, column, np.nan) for kind in ("vm", "tm") for column in ("d_sscd", "memorized")]
    nothing = pd.DataFrame(columns=["images", "number", "encoder", "fid", "kid", "kid_sd"])
    text = mitigation.findings(like_the_paper(changes), unmemorized, nothing)
    assert "D_SSCD goes from (not known) to 0.16" in text
    assert "(not known) before" in text
    assert "KID" not in text
    assert "nan" not in text


def test_findings_without_training_images():
    unmemorized = pd.DataFrame(
        {f"{name}_{when}": [0.5] for name in ("neurons", "a_clip", "d_sscd") for when in ("before", "one", "all")}
    )
    table = like_the_paper().assign(sscd_orig=np.nan)
    text = mitigation.findings(table, unmemorized, pd.DataFrame({"images": [NONE, OFF], "kid": [0.1, 0.2]}))
    assert "the copy similarity goes from (not known) to (not known)" in text
    assert "of the other mitigations" not in text


# Unmemorized prompts


def test_all_neurons_are_those_of_memorized_prompts(found):
    assert list(mitigation.all_neurons(found)) == [(0, 1), (2, 4), (2, 5), (6, 3)]


def test_memorized_prompts_take_turns(found):
    sets = mitigation.in_turn(found, 5)
    own = [neurons for neurons in neuron_sets(found[found["kind"].isin(("vm", "tm"))]) if neurons]
    assert sets == [*own, *own][:5]
    with pytest.raises(ValueError, match="no memorized prompt has neurons"):
        mitigation.in_turn(found[found["kind"] == "unmemorized"], 1)


def test_unmemorized_prompts_lose_one_set_and_all(random_pipe, profile, found):
    table = mitigation.unmemorized_table(random_pipe, profile, UNMEMORIZED, found, progress=False)
    names = [
        f"{name}_{suffix}"
        for name in ("neurons", "a_clip", "d_sscd", "sscd_gen")
        for suffix in ("before", "one", "all")
    ]
    assert sorted(table.columns) == sorted(["prompt", *names])
    assert table["prompt"].tolist() == UNMEMORIZED
    assert table["sscd_gen_before"].to_numpy() == pytest.approx(1, abs=1e-6)
    one, everything = mitigation.in_turn(found, len(UNMEMORIZED)), mitigation.all_neurons(found)
    assert table["neurons_one"].tolist() == [len(neurons) for neurons in one]
    assert (table["neurons_all"] == len(everything)).all()
    clip, copy = alignment_encoder(profile), copy_encoder(profile)
    untouched = describe_samples(copy, images(random_pipe, profile, UNMEMORIZED))
    for name, neurons in (("before", None), ("one", one), ("all", everything)):
        made = images(random_pipe, profile, UNMEMORIZED, neurons=neurons)
        aligned = metrics.a_clip(describe_samples(clip.images, made), clip.texts.describe(UNMEMORIZED))
        assert table[f"a_clip_{name}"].tolist() == np.median(aligned, axis=1).tolist()
        same = metrics.sscd_gen(describe_samples(copy, made), untouched)
        assert table[f"sscd_gen_{name}"].tolist() == np.median(same, axis=1).tolist()


def test_the_text_that_a_set_carries(random_pipe):
    table = mitigation.text_carried(random_pipe, UNMEMORIZED, NeuronSet.of([(0, 1), (0, 2), (3, 0)], layers=7))
    assert table.columns.tolist() == documented("text_carried")
    assert table["width"].tolist() == list(WIDTHS)
    assert table["neurons"].tolist() == [2, 0, 0, 1, 0, 0, 0]
    activations = value_activations(random_pipe.unet, embed(random_pipe, UNMEMORIZED))
    first = activations[0].sum(dim=0).numpy()
    assert table["share"].iloc[0] == pytest.approx((first[1] + first[2]) / first.sum(), rel=1e-5)
    assert (table["share"].iloc[[1, 2, 4, 5, 6]] == 0).all()
    largest = sorted(first, reverse=True)
    busiest = int(table["busiest"].iloc[0])
    assert sum(largest[: busiest - 1]) < 0.95 * first.sum() <= sum(largest[:busiest])
    whole = mitigation.text_carried(random_pipe, UNMEMORIZED, NeuronSet.full(WIDTHS))
    assert whole["share"].to_numpy() == pytest.approx(1)


def with_samples(profile, samples):
    return dataclasses.replace(profile, generation=dataclasses.replace(profile.generation, samples=samples))


def test_sets_of_equally_many_images_without_common_latents(random_pipe, profile):
    three = with_samples(profile, 3)
    table = mitigation.quality_table(random_pipe, three, UNMEMORIZED, NeuronSet.full(WIDTHS), progress=False)
    assert [*table.columns, "neurons"] == documented("unmemorized_quality")
    assert table["images"].tolist() == [NONE, OFF]
    assert table["number"].tolist() == [2, 2]
    assert (table["encoder"] == "random CLIP").all()
    describe = quality_encoder(profile).describe
    before = images(random_pipe, three, UNMEMORIZED)
    after = images(random_pipe, three, UNMEMORIZED, neurons=NeuronSet.full(WIDTHS))
    expected = [metrics.fid(describe(before[:, 0]), describe(other[:, 1])) for other in (before, after)]
    # Features are float32 and may differ in the last digits with the batch; FID is a difference of their sums.
    assert table["fid"].tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)


def test_image_sets_without_deactivated_neurons(random_pipe, profile):
    table = mitigation.quality_table(random_pipe, profile, UNMEMORIZED, NeuronSet.empty(7), progress=False)
    first, second = table[["number", "fid", "kid", "kid_sd"]].to_numpy().tolist()
    assert first == second


@pytest.mark.parametrize(("samples", "prompts"), [(1, UNMEMORIZED), (2, UNMEMORIZED[:1])])
def test_too_few_images_have_no_halves(random_pipe, profile, samples, prompts):
    fewer = with_samples(profile, samples)
    table = mitigation.quality_table(random_pipe, fewer, prompts, NeuronSet.empty(7), progress=False)
    assert table.empty
    assert [*table.columns, "neurons"] == documented("unmemorized_quality")


# Images


def test_the_neuron_that_most_prompts_share(found, shared):
    neuron, prompts = mitigation.shared_neuron(found, shared, 0)
    assert list(neuron) == [(0, 1)]
    assert len(neuron.layers) == 7
    assert prompts == [*VM, *TM]


def test_a_caption_may_have_a_semicolon(found):
    captions = {"red fox card": "fox &amp; owl", "red owl card": "one; two"}
    renamed = found.assign(prompt=found["prompt"].replace(captions))
    assert mitigation.shared_neuron(renamed, shared_neurons(renamed), 0)[1] == ["fox &amp; owl", "one; two", *TM]


def test_one_neuron_off(random_pipe, profile, found, shared):
    neuron, prompts = mitigation.shared_neuron(found, shared, 0)
    grid = mitigation.single_neuron_grid(random_pipe, profile, neuron, prompts)
    assert grid.images.shape == (3, 2 * SEEDS, 64, 64, 3)
    assert grid.rows == (*VM, *TM)
    assert grid.columns == ("seed 0", "seed 1", "seed 0", "seed 1")
    assert np.array_equal(grid.images[:, :SEEDS], images(random_pipe, profile, prompts))
    assert np.array_equal(grid.images[:, SEEDS:], images(random_pipe, profile, prompts, neurons=neuron))


def test_grids_of_shared_neurons(random_pipe, profile, found, shared):
    grids = mitigation.shared_neuron_grids(random_pipe, profile, found, shared, most=2)
    assert list(grids) == ["figure_10", "figure_11", "figure_12"]
    assert grids["figure_10"].rows == tuple(VM)
    assert grids["figure_10"].images.shape == (2, 2 * SEEDS, 64, 64, 3)
    # No second neuron is shared.
    assert grids["figure_11"] is grids["figure_12"] is mitigation.NO_IMAGES
    assert not mitigation.NO_IMAGES.images.size


def test_without_shared_neurons_the_table_is_empty(random_pipe, profile, found, shared):
    table = mitigation.single_neuron_table(random_pipe, profile, found, shared.head(0))
    assert table.empty
    assert table.columns.tolist() == documented("single_neurons")


def test_no_prompt_that_stays(random_pipe, profile, found):
    assert mitigation.staying_grid(random_pipe, profile, found, []) is mitigation.NO_IMAGES


def test_one_neuron_against_all_of_the_prompt(random_pipe, profile, found, shared, values):
    table = mitigation.single_neuron_table(random_pipe, profile, found, shared)
    assert table.columns.tolist() == documented("single_neurons")
    assert table["prompt"].tolist() == [*VM, *TM]
    assert (table[["layer", "neuron"]] == [1, 1]).all(axis=None)
    for column, setting in (("copy_before", NONE), ("copy_all", NEMO)):
        expected = values.loc[values["setting"] == setting, "sscd_orig"].tolist()
        assert table[column].tolist() == pytest.approx(expected, abs=0.05)
    own = table.set_index("prompt")
    assert own.loc["red owl card", "copy_single"] == pytest.approx(own.loc["red owl card", "copy_all"], abs=1e-6)
    assert own.loc["blue cat case", "copy_single"] != own.loc["blue cat case", "copy_all"]


def test_planted_images_are_brought_to_one_size(profile):
    assert mitigation.planted(profile, [*TM, VM[1]]).shape == (2, 64, 64, 3)
    assert mitigation.planted(profile, VM, size=(32, 40)).shape == (2, 32, 40, 3)
    with pytest.raises(ValueError, match="different sizes"):
        mitigation.planted(profile, VM)


def test_planted_images_beside_those_without_neurons(random_pipe, profile, found):
    prompts = [TM[0], VM[0]]
    grid = mitigation.staying_grid(random_pipe, profile, found, prompts)
    assert grid.rows == tuple(prompts)
    assert grid.columns == ("planted", "seed 0", "seed 1")
    assert np.array_equal(grid.images[:, 0], mitigation.planted(profile, prompts, size=(64, 64)))
    own = [neurons_of(prompt) for prompt in prompts]
    assert np.array_equal(grid.images[:, 1:], images(random_pipe, profile, prompts, neurons=own))


def test_one_image_of_each_setting(random_pipe, profile, settings):
    prompts, few = [VM[0], TM[0]], {name: settings[name] for name in (NONE, RANDOM, NEMO)}
    plain = images(random_pipe, profile, prompts)
    for seed in (0, 1):
        made, columns = mitigation.one_of_each(random_pipe, profile, prompts, few, seed=seed, progress=False)
        assert made.shape == (2, 4, 64, 64, 3)
        assert made.dtype == np.uint8
        assert columns == ["planted", NONE, RANDOM, NEMO]
        assert np.array_equal(made[:, 0], mitigation.planted(profile, prompts, size=(64, 64)))
        assert np.array_equal(made[:, 1], plain[:, seed])
    first = images(random_pipe, profile, prompts, mitigation=settings[RANDOM][0])
    assert np.array_equal(made[:, 2], first[:, 1])
