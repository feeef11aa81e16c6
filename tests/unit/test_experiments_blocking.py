from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from nemolib import experiments, metrics, tables
from nemolib import experiments_blocking as blocking
from nemolib.checks import ClaimError, check_table
from nemolib.encoders import copy_encoder, describe_samples, quality_encoder
from nemolib.experiments_blocking import FREQUENT, OTHER, QUALITY, UNTOUCHED, Blocked
from nemolib.first_step import first_step
from nemolib.layer_ablation import collect_outputs, cross_attention_layers, down_convolutions, switched_off
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.profiles import profile_from_mapping
from tests.random_pipeline import WIDTHS
from tests.random_world import build_in, write_encoders, write_prompts

VM, UNMEMORIZED = ["red fox card", "red owl card"], ["a tree", "the sea"]

NEURONS = {
    "red fox card": ("vm", [(0, 1), (6, 3)]),
    "red owl card": ("vm", [(0, 1), (2, 5)]),
    "blue cat case": ("tm", [(0, 1), (2, 4), (2, 5)]),
    "the sea": ("unmemorized", [(1, 0), (0, 1), (6, 3)]),
}
"""Neuron (0, 1) belongs to three memorized prompts, (2, 5) to two; those of an unmemorized prompt do not count."""


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
            "generation": {"samples": 4, "steps": 1, "batch_size": 16},
            "encoders": write_encoders(folder, random_model_folder),
            "prompts": write_prompts(
                folder,
                dict.fromkeys(VM, "vm") | {"blue cat case": "tm"},
                unmemorized=UNMEMORIZED,
                holdout=[f"{letter} {letter}" for letter in "abcd"],
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
    rows = [(kind, prompt, NeuronSet.of(pairs, layers=7).to_json()) for prompt, (kind, pairs) in NEURONS.items()]
    return pd.DataFrame(rows, columns=["kind", "prompt", "neurons"])


@pytest.fixture(scope="module")
def sets(found):
    return blocking.blocked_sets(found, WIDTHS, (1, 4), draws=2, seed=3)


@pytest.fixture(scope="module")
def quality(random_pipe, profile, sets):
    return blocking.blocked_quality(random_pipe, profile, UNMEMORIZED, sets, progress=False)


@pytest.fixture(scope="module")
def similarity(random_pipe, profile, sets):
    return blocking.block_similarity(random_pipe, profile, UNMEMORIZED, sets, seeds=3, progress=False)


@pytest.fixture(scope="module")
def layers(random_pipe):
    unet = random_pipe.unet
    values, keys = (cross_attention_layers(unet, part) for part in ("value", "key"))
    return (*values[:2], *keys[5:], *down_convolutions(unet)[:2])


@pytest.fixture(scope="module")
def effects(random_pipe, profile, layers):
    return blocking.layer_effects(random_pipe, profile, VM, layers, progress=False)


def pairs(neurons):
    return list(neurons)


# What is blocked


def test_neurons_of_most_memorized_prompts_come_first(found):
    ranked = blocking.ranked_neurons(found)
    assert ranked.to_numpy().tolist() == [[0, 1, 3], [2, 5, 2], [2, 4, 1], [6, 3, 1]]
    assert blocking.ranked_neurons(found[found["kind"] == "unmemorized"]).empty


def test_numbers_of_neurons_span_those_of_the_paper():
    assert blocking.counts_up_to(750) == (25, 78, 241, 750)
    assert blocking.counts_up_to(26) == (1, 3, 8, 26)
    assert blocking.counts_up_to(2) == (1, 2)
    assert blocking.counts_up_to(0) == ()
    assert blocking.counts_up_to(100, points=2, span=10) == (10, 100)


def test_sets_of_every_number_and_draw(sets):
    assert [(item.setting, item.asked, item.draw) for item in sets] == [
        (UNTOUCHED, 0, 0), (FREQUENT, 1, 0), (FREQUENT, 4, 0), (OTHER, 1, 0), (OTHER, 1, 1), (OTHER, 4, 0), (OTHER, 4, 1),
    ]  # fmt: skip
    frequent = {item.asked: item.neurons for item in sets if item.setting == FREQUENT}
    assert pairs(frequent[1]) == [(0, 1)]
    assert pairs(frequent[4]) == [(0, 1), (2, 4), (2, 5), (6, 3)]
    for item in sets:
        if item.setting == OTHER:
            assert item.neurons.counts == frequent[item.asked].counts
            assert not item.neurons & frequent[4]
    assert sets[-2].neurons != sets[-1].neurons


def test_numbers_that_cannot_be_blocked(found):
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"{count} neurons are asked for; memorized prompts have 1 to 4 together"):
            blocking.blocked_sets(found, WIDTHS, (1, count))
    assert [item.setting for item in blocking.blocked_sets(found, WIDTHS, ())] == [UNTOUCHED]


def test_others_are_fewer_where_a_layer_has_no_more():
    taken = NeuronSet(((0, 1, 2), (0,)))
    drawn = blocking.other_neurons(taken, taken, (5, 5), seed=0)
    assert drawn.layers[0] == (3, 4)
    assert len(drawn.layers[1]) == 1
    assert drawn.layers[1] != (0,)
    smaller = blocking.other_neurons(NeuronSet(((0,), ())), taken, (5, 5), seed=0)
    assert not smaller - drawn
    draws = {blocking.other_neurons(NeuronSet(((), (0,))), taken, (5, 50), seed=0, draw=draw) for draw in range(20)}
    assert len(draws) > 5
    with pytest.raises(ValueError, match="neuron 9 of layer 0 does not exist"):
        blocking.other_neurons(NeuronSet(((9,), ())), taken, (5, 5), seed=0)


# Image quality


@pytest.mark.parametrize(("samples", "number"), [(2, 2), (3, 6), (4, 6), (5, 5), (10, 10)])
def test_halves_share_no_seed_and_use_all_equally(samples, number):
    splits = blocking.halves(samples)
    assert len(splits) == len({(tuple(first), tuple(other)) for first, other in splits}) == number
    for place in (0, 1):
        used = [seed for split in splits for seed in split[place]]
        assert len({used.count(seed) for seed in range(samples)}) == 1
    assert all(not set(first) & set(other) and len(first) == len(other) == samples // 2 for first, other in splits)
    assert blocking.halves(1) == []


def test_every_set_split_and_metric_has_a_value(quality, sets):
    assert quality.groupby("pair")["split"].nunique().to_dict() == {0: 2, 1: 2, 2: 2}
    assert len(quality) == len(sets) * 6 * 3
    assert quality["value"].notna().all()
    assert (quality["reason"] == "").all()
    assert (quality["images"] == 4).all()
    assert set(quality["metric"]) == set(QUALITY)
    assert quality.groupby(["setting", "asked"])["neurons"].first().to_dict() == {
        (UNTOUCHED, 0): 0, (FREQUENT, 1): 1, (FREQUENT, 4): 4, (OTHER, 1): 1, (OTHER, 4): 4,
    }  # fmt: skip


def test_one_distance_by_hand(random_pipe, profile, quality, sets):
    encoder = quality_encoder(profile)
    before, after = (
        describe_samples(encoder, experiments.images(random_pipe, profile, UNMEMORIZED, neurons=item, progress=False))
        for item in (None, sets[2].neurons)
    )
    assert blocking.halves(4)[1] == ([0, 2], [1, 3])
    reference, other = before[:, [0, 2]].reshape(4, -1), after[:, [1, 3]].reshape(4, -1)
    rows = quality[(quality["setting"] == FREQUENT) & (quality["asked"] == 4) & (quality["split"] == 1)]
    rows = rows.set_index("metric")
    assert rows.loc["fid", "value"] == pytest.approx(metrics.fid(reference, other), rel=1e-6, abs=1e-9)
    assert rows.loc["kid", "value"] == pytest.approx(metrics.kid(reference, other, subset_size=2)[0], rel=1e-6)
    assert rows.loc["fid", "value"] != pytest.approx(metrics.fid(reference, before[:, [1, 3]].reshape(4, -1)))


def test_without_an_encoder_of_its_own_clip_fid_has_that_of_fid(random_pipe, profile, quality, sets):
    values = quality.pivot_table(index=["setting", "asked", "draw", "split"], columns="metric", values="value")
    np.testing.assert_array_equal(values["fid"], values["clip_fid"])
    assert quality["encoder"].unique().tolist() == [quality_encoder(profile).name]
    own = replace(profile.encoders.quality, name="another CLIP")
    other = replace(profile, encoders=replace(profile.encoders, clip_quality=own))
    table = blocking.blocked_quality(random_pipe, other, UNMEMORIZED, sets[:1], progress=False)
    names = table.groupby("metric")["encoder"].unique()
    assert names["clip_fid"][0].startswith("another CLIP")
    assert names["fid"][0] == names["kid"][0] == quality_encoder(profile).name


@pytest.mark.parametrize(
    ("prompts", "samples"), [(UNMEMORIZED[:1], 1), (UNMEMORIZED, 1), (UNMEMORIZED[:1], 2), ([], 4)]
)
def test_too_few_images_give_a_reason_and_no_images(profile, sets, prompts, samples):
    few = replace(profile, generation=replace(profile.generation, samples=samples))
    values = blocking.blocked_quality(None, few, prompts, sets, progress=False)
    assert len(values) == len(sets) * 3
    assert values["value"].isna().all()
    words = f"{len(prompts)} prompt{'s' * (len(prompts) != 1)} with {samples} image{'s' * (samples != 1)} each"
    assert values["reason"].str.startswith(f"not computed: {words}").all()
    summary = blocking.quality_summary(values)
    assert summary[["mean", "sd", "change", "change_sd"]].isna().all(axis=None)
    assert (summary["values"] == 0).all()
    assert blocking.quality_sentence(summary).startswith("not computed")


def test_the_untouched_model_comes_first(profile, sets):
    for chosen in ([], sets[1:]):
        with pytest.raises(ValueError, match="the first set must be 'untouched'"):
            blocking.blocked_quality(None, profile, UNMEMORIZED, chosen)


def made_up_quality(change=(4.0, 6.0), base=(10.0, 12.0)):
    """Return two splits in which frequent neurons add a change, and two draws of random ones add 1 and 3."""
    rows = []
    for metric in QUALITY:
        for split, value in enumerate(base):
            labels = (split, split, metric, "features", 40)
            rows.append((UNTOUCHED, 0, 0, 0, *labels, value, ""))
            rows.append((FREQUENT, 9, 9, 0, *labels, value + change[split], ""))
            rows += [(OTHER, 9, 7 + draw, draw, *labels, value + more, "") for draw, more in enumerate((1.0, 3.0))]
    columns = ["setting", "asked", "neurons", "draw", "split", "pair", "metric", "encoder", "images", "value", "reason"]
    return pd.DataFrame(rows, columns=columns)


def test_mean_deviation_and_change_over_splits_and_draws():
    summary = blocking.quality_summary(made_up_quality())
    assert summary["metric"].tolist() == ["fid"] * 3 + ["clip_fid"] * 3 + ["kid"] * 3
    rows = summary[summary["metric"] == "fid"].set_index("setting")
    assert rows["values"].to_dict() == {UNTOUCHED: 2, FREQUENT: 2, OTHER: 4}
    assert rows["mean"].to_dict() == pytest.approx({UNTOUCHED: 11, FREQUENT: 16, OTHER: 13})
    assert rows["sd"].to_dict() == pytest.approx(
        {
            UNTOUCHED: np.std([10, 12], ddof=1),
            FREQUENT: np.std([14, 18], ddof=1),
            OTHER: np.std([11, 13, 13, 15], ddof=1),
        }
    )
    # Differences in the same split: the common part of splits is gone.
    assert rows.loc[FREQUENT, ["change", "change_sd"]].tolist() == pytest.approx([5, np.std([4, 6], ddof=1)])
    assert rows.loc[OTHER, ["change", "change_sd"]].tolist() == pytest.approx([2, np.std([1, 1, 3, 3], ddof=1)])
    assert rows.loc[UNTOUCHED, ["change", "change_sd"]].tolist() == [0, 0]
    assert rows["neurons"].to_dict() == {UNTOUCHED: 0, FREQUENT: 9, OTHER: 7.5}
    assert blocking.interval_share(summary) == pytest.approx(2 * np.sqrt(2) / 11)


def test_the_untouched_model_counts_once_for_the_same_halves(quality):
    values = quality[quality["metric"] == "fid"].pivot(
        index="split", columns=["setting", "asked", "draw"], values="value"
    )
    untouched = values[(UNTOUCHED, 0, 0)]
    # The distance is symmetric: the second order of the same halves tells nothing new.
    assert untouched.to_numpy() == pytest.approx(untouched.to_numpy()[::-1], rel=1e-6, abs=1e-9)
    summary = blocking.quality_summary(quality)
    row = summary[(summary["metric"] == "fid") & (summary["setting"] == UNTOUCHED)].iloc[0]
    assert row["values"] == 3
    assert row["sd"] == pytest.approx(untouched.iloc[:3].std(), rel=1e-5, abs=1e-9)
    assert summary.loc[summary["setting"] == FREQUENT, "values"].unique().tolist() == [6]


def test_with_a_single_split_there_is_no_interval():
    table = made_up_quality().assign(pair=0)
    text = blocking.quality_sentence(blocking.quality_summary(table))
    assert text.startswith("FID 11 untouched (40 images")
    assert text.endswith("a single way to split the seeds, and so no interval of the untouched value")
    assert "nan" not in text


def test_a_summary_of_a_saved_table_is_the_same(quality):
    tables.save_table(quality, "blocked_quality", profile="random")
    again = tables.read_table("blocked_quality", profile="random")
    pd.testing.assert_frame_equal(
        blocking.quality_summary(again).drop(columns="reason"), blocking.quality_summary(quality).drop(columns="reason")
    )


def test_the_sentence_says_whether_the_interval_is_small():
    wide = blocking.quality_sentence(blocking.quality_summary(made_up_quality()))
    assert wide == (
        "FID 11 ± 1.4 untouched (40 images in each half); without 9 most frequent neurons 16 ± 2.8, a change of +5 ± 1.4 "
        "(beyond two standard deviations); without 7.5 random other neurons 13 ± 1.6, a change of +2 ± 1.2 (within two "
        "standard deviations); the interval (two standard deviations) is 26% of the untouched value: not small"
    )
    narrow = blocking.quality_sentence(blocking.quality_summary(made_up_quality(base=(10.0, 10.1))))
    assert narrow.endswith("1% of the untouched value: small")


def test_prompts_of_image_quality(profile, tmp_path):
    assert blocking.quality_prompts(profile, 5) == UNMEMORIZED
    assert blocking.quality_prompts(profile, 1) == ["a tree"]
    assert blocking.quality_prompts(profile, 0) == []
    (tmp_path / "coco.csv").write_text(";Caption;URL;Index\n0;a person;;0000\n1;two men;;0001\n")
    given = replace(profile, prompts=replace(profile.prompts, quality=str(tmp_path / "coco.csv")))
    assert blocking.quality_prompts(given, 9) == ["a person", "two men"]


# Outputs of blocks


def test_every_block_has_two_outputs(similarity):
    assert len(similarity) == 6 * 2 * 7
    assert (similarity["samples"] == 6).all()
    assert similarity["layer"].unique().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert similarity.set_index("layer")["block"].to_dict() == {**dict.fromkeys(range(1, 7), "down"), 7: "mid"}
    assert (similarity["lowest"] <= similarity["cosine"] + 1e-12).all()
    assert similarity["cosine"].max() <= 1 + 1e-9
    assert similarity.loc[similarity["asked"] == 4, "cosine"].min() < 1 - 1e-6


def test_one_cosine_by_hand(random_pipe, profile, similarity, sets):
    step = first_step(random_pipe, settings=replace(profile.detection, samples=3), protocol=profile.protocol)
    name, cosines = "down_blocks.1.attentions.0", []
    for prompt in UNMEMORIZED:
        outputs = []
        for neurons in (None, sets[2].neurons):
            with collect_outputs(random_pipe.unet, [name]) as found:
                step.raw(embed(random_pipe, [prompt]), neurons=neurons)
            outputs.append(torch.cat(found[name]).flatten(1).double())
        cosines.append(torch.nn.functional.cosine_similarity(*outputs, dim=1))
    expected = torch.cat(cosines)
    row = similarity.query("setting == @FREQUENT and asked == 4 and output == 'block' and layer == 3").iloc[0]
    assert row["cosine"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert row["lowest"] == pytest.approx(float(expected.min()), abs=1e-6)


def test_the_batch_has_no_part_in_a_cosine(random_pipe, profile, similarity, sets):
    small = replace(profile, generation=replace(profile.generation, batch_size=1))
    table = blocking.block_similarity(random_pipe, small, UNMEMORIZED, sets, seeds=3, progress=False)
    pd.testing.assert_frame_equal(table, similarity, atol=1e-6)


def test_nothing_changes_before_the_first_blocked_neuron(random_pipe, profile):
    late = Blocked(FREQUENT, 1, 0, NeuronSet.of([(3, 0)], layers=7))
    table = blocking.block_similarity(random_pipe, profile, UNMEMORIZED[:1], [late], seeds=2, progress=False)
    whole = table[table["output"] == "block"].set_index("layer")["cosine"]
    assert whole[[1, 2, 3]].tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    assert whole[4] < 1 - 1e-9


def test_no_hook_stays(random_pipe, profile, sets):
    blocking.block_similarity(random_pipe, profile, UNMEMORIZED[:1], sets[:2], seeds=2, progress=False)
    assert not [name for name, module in random_pipe.unet.named_modules() if module._forward_hooks]


def test_table_3_means_over_draws_and_finds_the_lowest(similarity):
    table = blocking.table_3(similarity)
    assert table.columns.tolist() == [
        "setting", "asked", "neurons", *(f"{layer} down" for layer in range(1, 7)), "7 mid", "lowest", "paper",
    ]  # fmt: skip
    assert table[["setting", "asked"]].to_numpy().tolist() == [[FREQUENT, 1], [FREQUENT, 4], [OTHER, 1], [OTHER, 4]]
    assert table["paper"].tolist() == [0.98, 0.98, 0.99, 0.99]
    cosines = similarity.query("setting == @OTHER and asked == 4 and output == 'block' and layer == 2")["cosine"]
    assert len(cosines) == 2
    assert table.loc[3, "2 down"] == pytest.approx(cosines.mean())
    assert (table["lowest"] == table.filter(regex="down|mid").min(axis=1)).all()
    other = blocking.table_3(similarity, output="cross-attention")
    assert not np.allclose(other["lowest"], table["lowest"])


def test_without_prompts_or_neurons_there_is_an_empty_table(random_pipe, profile, sets):
    for prompts, chosen in (([], sets), (UNMEMORIZED, sets[:1])):
        table = blocking.block_similarity(random_pipe, profile, prompts, chosen, progress=False)
        assert table.empty
        assert "cosine" in table
        assert blocking.table_3(table).empty


# Layers one by one


def test_every_layer_and_prompt_has_a_row(effects, layers):
    assert effects["prompt"].tolist() == VM * (1 + len(layers))
    assert effects["part"].tolist()[::2] == ["untouched", "value", "value", "key", "key", "convolution", "convolution"]
    assert effects["layer"].tolist()[::2] == [0, 1, 2, 6, 7, 1, 2]
    assert effects["block"].tolist()[::2] == ["", "down", "down", "down", "mid", "down", "down"]
    assert effects[["sscd_orig", "sscd_gen", "a_clip"]].notna().all(axis=None)


def test_the_untouched_model_gives_the_same_image_twice(effects):
    untouched = effects["part"] == UNTOUCHED
    assert effects.loc[untouched, "sscd_gen"].to_numpy() == pytest.approx(1, abs=1e-6)
    assert (effects.loc[effects["part"] == "value", "sscd_gen"] < 1 - 1e-9).any()


def test_a_layer_by_hand(random_pipe, profile, effects, layers):
    made = experiments.images(random_pipe, profile, VM, mitigation=switched_off(layers[-1]), progress=False)
    plain = experiments.images(random_pipe, profile, VM, progress=False)
    encoder = copy_encoder(profile)
    expected = metrics.sscd_gen(describe_samples(encoder, made), describe_samples(encoder, plain))
    assert effects["sscd_gen"].to_numpy()[-2:] == pytest.approx(np.median(expected, axis=1), abs=1e-6)


def test_layers_are_kept_apart_in_the_store(build, random_pipe, profile, effects, layers, monkeypatch):
    assert len(effects)
    kept = len(list((build / "random" / "store" / "images").iterdir()))
    monkeypatch.setattr(experiments, "generate", None)
    again = blocking.layer_effects(random_pipe, profile, VM, layers, progress=False)
    pd.testing.assert_frame_equal(again, effects)
    assert len(list((build / "random" / "store" / "images").iterdir())) == kept


def test_images_of_layers_come_from_the_store(random_pipe, profile, effects, layers, monkeypatch):
    assert len(effects)
    monkeypatch.setattr(experiments, "generate", None)
    grid = blocking.layer_grid(random_pipe, profile, VM[:1], layers[:2], seed=1)
    assert grid.rows == ("red fox card",)
    assert grid.columns == ("none", "1", "2")
    plain = experiments.images(random_pipe, profile, VM, progress=False)
    assert np.array_equal(grid.images[0, 0], plain[0, 1])


def made_up_effects(changes=()):
    """Return effects in which nothing changes but for (part, layer, metric, value): 0.8 and 0.3 untouched."""
    values = {"sscd_orig": 0.8, "sscd_gen": 1.0, "a_clip": 0.3}
    numbers = [(UNTOUCHED, 0, "")]
    numbers += [(part, layer, "mid" if layer == 7 else "down") for part in ("value", "key") for layer in range(1, 8)]
    numbers += [("convolution", layer, "down") for layer in range(1, 5)]
    table = pd.DataFrame(
        [
            {"part": part, "layer": layer, "block": block, "name": "", "prompt": prompt, **values}
            for part, layer, block in numbers
            for prompt in ("a", "b", "c")
        ]
    )
    for part, layer, metric, value in changes:
        table.loc[(table["part"] == part) & (table["layer"] == layer), metric] = value
    return table


LIKE_THE_PAPER = [
    ("value", 1, "sscd_orig", 0.2), ("value", 7, "sscd_orig", 0.3), ("key", 4, "sscd_orig", 0.1),
    ("key", 6, "sscd_orig", 0.25), ("key", 4, "a_clip", 0.2), ("convolution", 1, "sscd_orig", 0.5),
]  # fmt: skip
"""What the paper says about layers, in numbers of our own."""


def test_the_strongest_layers():
    summary = blocking.layer_summary(made_up_effects(LIKE_THE_PAPER))
    assert blocking.strongest(summary, "value")["layer"].tolist() == [1, 7]
    assert blocking.strongest(summary, "key")["layer"].tolist() == [4, 6]
    assert blocking.strongest(summary, "key", number=1, metric="a_clip")["layer"].tolist() == [4]
    row = summary[(summary["part"] == "value") & (summary["layer"] == 1)].iloc[0]
    assert row[["sscd_orig", "sscd_orig_untouched", "a_clip", "prompts"]].tolist() == pytest.approx([0.2, 0.8, 0.3, 3])
    assert blocking.layers_sentence(summary, "value") == (
        "set to zero, one of 7 at a time, the copy similarity of 3 VM prompts (untouched 0.80) is lowest with layers 1 (down, 0.20) "
        "and 7 (mid, 0.30), and 0.80 in the median of the layers; A_CLIP (untouched 0.30) is 0.30 at least, 0.30 in the median"
    )


def test_without_training_images_the_similarity_is_not_known():
    effects = made_up_effects().assign(sscd_orig=np.nan)
    summary = blocking.layer_summary(effects)
    assert blocking.layers_sentence(summary, "key") == "not known, since no prompt has a planted image"


def test_without_memorized_prompts_there_is_nothing(random_pipe, profile, layers, found, sets, similarity):
    empty = blocking.layer_effects(random_pipe, profile, [], layers, progress=False)
    assert empty.empty
    assert blocking.layer_summary(empty).empty
    assert blocking.layer_grid(random_pipe, profile, [], layers).images.shape[:2] == (0, 1 + len(layers))
    checked = check_table(blocking.checks_of(found, sets, similarity, empty))
    assert checked["result"].tolist()[3] == "not checked: no prompts, 1 needed"


# What was found


def test_checks_hold_for_a_fair_comparison_and_fail_for_another(found, sets, similarity, effects):
    checked = check_table(blocking.checks_of(found, sets, similarity, effects))
    assert checked["result"].tolist() == ["holds"] * 4 + ["beside"] * 2
    assert checked["paper"].tolist()[-2:] == ["0.98", "0.99"]
    wrong = replace(sets[-1], neurons=sets[2].neurons)
    with pytest.raises(ClaimError, match="random neurons that are memorization neurons: 4, must be 0"):
        check_table(blocking.checks_of(found, [*sets[:-1], wrong], similarity, effects))
    elsewhere = replace(sets[-1], neurons=NeuronSet.of([(5, 0)], layers=7))
    with pytest.raises(ClaimError, match="in the layers of the frequent ones"):
        check_table(blocking.checks_of(found, [*sets[:-1], elsewhere], similarity, effects))
    with pytest.raises(ClaimError, match="every layer has every prompt"):
        check_table(blocking.checks_of(found, sets, similarity, effects.iloc[:-1]))
    fewer = replace(sets[1], neurons=NeuronSet.empty(7))
    with pytest.raises(ClaimError, match="as many frequent neurons are blocked as asked for"):
        check_table(blocking.checks_of(found, [sets[0], fewer, *sets[2:]], similarity, effects))


def test_findings_have_a_line_for_each_question(similarity):
    layers = blocking.layer_summary(made_up_effects(LIKE_THE_PAPER))
    text = blocking.findings(blocking.quality_summary(made_up_quality()), similarity, layers)
    assert text.count("\n- ") == 4
    assert "nan" not in text
    assert "in the paper 0.98 and 0.99" in text
    few = blocking.findings(blocking.quality_summary(made_up_quality()), similarity.iloc[:0], layers)
    assert "cross-attention" not in few
