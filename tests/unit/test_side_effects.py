"""Side effects: what is blocked, one distance, one cosine and one layer by hand, and claims about layers."""

from dataclasses import replace
from unittest.mock import patch
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import pytest
import torch

from nemolib import batching, metrics
from nemolib.experiments import deactivate_neurons as deactivate
from nemolib.experiments import side_effects
from nemolib.experiments.deactivate_neurons import QUALITY, UNTOUCHED, Blocked
from nemolib.experiments.side_effects import FREQUENT, OTHER
from nemolib.first_step import comparing_outputs, first_step
from nemolib.layers import collect_outputs
from nemolib.mitigation import DeactivatedNeurons, switched_off
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.run import Run
from nemolib.settings import PAPER
from tests.random_pipeline import WIDTHS

VM, UNMEMORIZED = ["red fox card", "red owl card"], ["a tree", "the sea"]

NEURONS = {
    VM[0]: ("vm", [(0, 1), (6, 3)]), VM[1]: ("vm", [(0, 1), (2, 5)]), "blue cat case": ("tm", [(0, 1), (2, 4), (2, 5)]),
    "the sea": ("unmemorized", [(1, 0), (0, 1), (6, 3)]),
}  # fmt: skip
"""Neuron (0, 1) belongs to three memorized prompts, (2, 5) to two; those of an unmemorized prompt do not count."""


def found(repeats=1):
    rows = [(kind, prompt, NeuronSet.of(pairs, layers=7).to_json()) for prompt, (kind, pairs) in NEURONS.items()]
    return pd.DataFrame(rows * repeats, columns=["kind", "prompt", "neurons"])


def distances(blocked):
    """Return a change of image quality: the values with the most frequent neurons blocked, where all others are 10."""
    return lambda table: table.assign(
        value=np.where(table["setting"] == FREQUENT, blocked, 10) + 0.01 * (table["split"] % 2)
    )


def layers_that_matter(strong, key):
    """Return a change: layers that lower the similarity, and what is left of the alignment without key layers of them."""

    def change(table):
        chosen = [table["part"].eq(part) & table["layer"].isin(layers) for part, layers in strong.items()]
        return table.assign(sscd_orig=np.where(chosen[0] | chosen[1], 0.1, 0.9), a_clip=np.where(chosen[1], key, 0.7))

    return change


def convolutions(left):
    return lambda table: table.assign(sscd_orig=np.where(table["part"] == "convolution", left, 0.9))


PAPERS = layers_that_matter(side_effects.STRONG, 0.3)
OTHERS = layers_that_matter({"value": [2, 3], "key": [2, 3]}, 0.69)

TURNS = [
    ("figure_5a", "blocked_quality", distances(10), distances(20), "image quality does not suffer when many neurons are blocked"),
    ("table_3", "block_similarity", lambda table: table.assign(cosine=0.995), lambda table: table.assign(cosine=0.9),
     "outputs of cross-attention blocks hardly change"),
    ("figure_16", "layer_effects", PAPERS, OTHERS, "value layers 1 and 7 matter most"),
    ("figure_16", "layer_effects", PAPERS, OTHERS, "key layers 4 and 6 matter most"),
    ("figure_16", "layer_effects", PAPERS, lambda table: table.iloc[1:], "every layer has every prompt"),
    ("figure_17", "layer_effects", PAPERS, OTHERS, "without the key layers that matter most, images fit the prompt less"),
    ("convolutions", "layer_effects", convolutions(0.8), convolutions(0.1), "convolutions do not memorize"),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(random_run):
    kinds = dict.fromkeys(VM, "vm") | {"blue cat case": "tm"}
    images = {"samples": 4, "steps": 1, "batch_size": 16}
    return random_run(kinds, unmemorized=UNMEMORIZED, sides={VM[0]: 48}, generation=images)


@pytest.fixture(scope="module")
def sets(run):
    return side_effects.blocked_sets(run, found(repeats=2))


def test_numbers_of_neurons_span_those_of_the_paper():
    assert side_effects.counts_up_to(750, points=4) == [25, 78, 241, 750]
    assert side_effects.counts_up_to(26, points=4) == [1, 3, 8, 26]


def test_the_neurons_of_most_prompts_are_blocked_first_and_others_are_none(run, sets):
    assert side_effects.ranked_neurons(found()) == [(0, 1), (2, 5), (2, 4), (6, 3)]
    others = [(OTHER, number, number, draw) for number, draw in ((1, 0), (4, 0), (4, 1))]
    assert [item.labels for item in sets] == [(UNTOUCHED, 0, 0, 0), (FREQUENT, 1, 1, 0), (FREQUENT, 4, 4, 0), *others]
    assert sets[4].neurons != sets[5].neurons
    # With few prompts there is one number; others are none of any prompt all the same.
    for item in (*sets[3:], side_effects.blocked_sets(run, found())[-1]):
        assert not set(item.neurons) & set(side_effects.ranked_neurons(found()))
    for item in sets[4:]:
        assert item.neurons.counts == sets[2].neurons.counts
    assert len(side_effects.blocked_sets(run, found().query("kind == 'unmemorized'"))) == 1


def test_others_are_fewer_where_a_layer_has_no_more():
    taken = NeuronSet(((0, 1, 2), (0,)))
    drawn = side_effects.other_neurons(taken, taken, (5, 5), seed=0)
    assert drawn.layers[0] == (3, 4)
    assert len(drawn.layers[1]) == 1 != drawn.layers[1][0]
    assert not side_effects.other_neurons(NeuronSet(((0,), ())), taken, (5, 5), seed=0) - drawn


@pytest.mark.parametrize(("samples", "number"), [(1, 0), (2, 2), (3, 6), (4, 6), (5, 5), (10, 10)])
def test_halves_share_no_seed_and_use_all_equally(samples, number):
    splits = deactivate.halves(samples)
    assert len({(tuple(first), tuple(other)) for first, other in splits}) == len(splits) == number
    assert all(not set(first) & set(other) and len(first) == len(other) == samples // 2 for first, other in splits)
    for place in range(2 * bool(splits)):
        used = [seed for split in splits for seed in split[place]]
        assert len({used.count(seed) for seed in range(samples)}) == 1


def test_one_distance_by_hand_and_every_other(run, sets):
    quality = deactivate.blocked_quality(run, UNMEMORIZED, [sets[0], sets[2]])
    assert len(quality) == 2 * 6 * len(QUALITY)
    assert quality.groupby("pair")["split"].nunique().to_dict() == {0: 2, 1: 2, 2: 2}
    before, after = (
        run.encoder("quality").describe(made.reshape(-1, *made.shape[2:])).unflatten(0, (2, 4)).numpy()
        for made in (run.images(UNMEMORIZED), run.images(UNMEMORIZED, DeactivatedNeurons(sets[2].neurons)))
    )
    assert deactivate.halves(4)[1] == ([0, 2], [1, 3])
    reference, other = before[:, [0, 2]].reshape(4, -1), after[:, [1, 3]].reshape(4, -1)
    values = quality[(quality["setting"] == FREQUENT) & (quality["split"] == 1)].set_index("metric")["value"]
    assert values["fid"] == values["clip_fid"] == pytest.approx(metrics.fid(reference, other), rel=1e-6, abs=1e-9)
    assert values["kid"] == pytest.approx(metrics.kid(reference, other, subset_size=2)[0], rel=1e-6, abs=1e-8)
    row = deactivate.quality_summary(quality).query("metric == 'fid' and setting == @UNTOUCHED").iloc[0]
    once = quality.query("metric == 'fid' and setting == @UNTOUCHED").groupby("pair")["value"].mean()
    assert row[["mean", "sd", "change"]].tolist() == pytest.approx([once.mean(), once.std(), 0])


def test_mean_deviation_and_change_over_splits_and_draws():
    rows = [
        (setting, 9, neurons, draw, split, split, "fid", "features", 40, value)
        for split, base in enumerate((10.0, 12.0))
        for setting, neurons, draw, value in (
            (UNTOUCHED, 0, 0, base), (FREQUENT, 9, 0, base + 4 + 2 * split), (OTHER, 7, 0, base + 1), (OTHER, 8, 1, base + 3)
        )
    ]  # fmt: skip
    columns = ["setting", "asked", "neurons", "draw", "split", "pair", "metric", "encoder", "images", "value"]
    summary = deactivate.quality_summary(pd.DataFrame(rows, columns=columns)).set_index("setting")
    assert summary["mean"].tolist() == [11, 16, 13]
    # Differences in the same split: the common part of splits is gone.
    assert summary.loc[FREQUENT, ["change", "change_sd"]].tolist() == pytest.approx([5, np.std([4, 6], ddof=1)])
    assert summary.loc[OTHER, ["neurons", "change", "change_sd"]].tolist() == pytest.approx(
        [7.5, 2, np.std([1, 1, 3, 3], ddof=1)]
    )


@pytest.mark.parametrize(("prompts", "samples"), [(UNMEMORIZED, 1), (UNMEMORIZED[:1], 2), ([], 4)])
def test_too_few_images_for_a_covariance_are_not_made(run, sets, prompts, samples):
    extent = replace(run.profile.extent, quality_samples=samples)
    assert deactivate.blocked_quality(Run(replace(run.profile, extent=extent), None), prompts, sets).empty


def test_one_cosine_by_hand_and_nothing_changes_before_the_first_neuron(run, sets):
    similarity = side_effects.block_similarity(run, UNMEMORIZED, sets)
    assert len(similarity) == 5 * 2 * len(WIDTHS)
    settings = replace(run.profile.detection, samples=3, guidance=0.0)
    step, name, cosines = first_step(run.pipe, settings=settings), "down_blocks.1.attentions.0", []
    for prompt in UNMEMORIZED:
        outputs = []
        for neurons in (None, sets[2].neurons):
            with collect_outputs(run.pipe.unet, [name]) as seen:
                step.raw(embed(run.pipe, [prompt]), neurons=neurons)
            outputs.append(torch.cat(seen[name]).flatten(1).double())
        cosines.append(torch.cosine_similarity(*outputs, dim=1))
    row = similarity.query("setting == @FREQUENT and asked == 4 and output == 'block' and layer == 3").iloc[0]
    expected = torch.cat(cosines)
    assert row[["samples", "cosine", "lowest"]].tolist() == pytest.approx(
        [6, float(expected.mean()), float(expected.min())], abs=1e-6
    )
    late = Blocked(FREQUENT, 1, 0, NeuronSet.of([(3, 0)], layers=7))
    whole = side_effects.block_similarity(run, UNMEMORIZED[:1], [late]).query("output == 'block'")["cosine"].tolist()
    assert whole[:3] == pytest.approx([1, 1, 1], abs=1e-12)
    assert whole[3] < 1 - 1e-9
    assert not any(module._forward_hooks for module in run.pipe.unet.modules())
    # How many sets are computed at once has no part in what a result is.
    small = replace(run.profile, generation=replace(run.profile.generation, batch_size=1))
    with patch.object(type(run.pipe.unet), "forward", side_effect=AssertionError("computed again")):
        again = side_effects.block_similarity(Run(small, run.pipe, progress=False), UNMEMORIZED, sets)
    pd.testing.assert_frame_equal(again, similarity)
    for prompts, chosen in (([], sets), (UNMEMORIZED, sets[:1])):
        assert side_effects.block_similarity(run, prompts, chosen).empty


def test_memory_may_run_out_more_than_once(run, sets, monkeypatch):
    # The smaller batches are for this test alone.
    monkeypatch.setattr(batching, "_LARGEST", WeakKeyDictionary())
    neurons = [item.neurons for item in sets[1:4]]
    common = {"sets": neurons, "detection": replace(run.profile.detection, samples=2, guidance=3.0), "protocol": PAPER}
    (expected,) = comparing_outputs(run.pipe, **common)(UNMEMORIZED[:1])
    middle, failing = run.pipe.unet.mid_block.forward, iter([False, True, False, False, True])

    def forward(*arguments, **options):
        if next(failing, False):
            raise RuntimeError("out of memory")
        return middle(*arguments, **options)

    with patch.object(run.pipe.unet.mid_block, "forward", forward), pytest.warns(UserWarning, match="out of memory"):
        (found,) = comparing_outputs(run.pipe, **common)(UNMEMORIZED[:1])
    assert next(failing, None) is None
    assert found == pytest.approx(expected, abs=1e-7)


def test_every_layer_and_prompt_has_a_row_and_one_is_right(run):
    chosen = {part: layers[-2:] for part, layers in side_effects.switched_layers(run.pipe.unet, 2).items()}
    effects = side_effects.layer_effects(run, VM, chosen)
    assert effects["prompt"].tolist() == VM * 7
    assert effects["part"].tolist()[::2] == [UNTOUCHED, *np.repeat(list(chosen), 2)]
    assert effects.loc[0, ["layer", "block", "name"]].tolist() == [0, "", ""]
    assert effects["sscd_gen"].to_numpy()[:2] == pytest.approx(1, abs=1e-6)
    few, last = side_effects.few_images(run), switched_off(chosen["convolution"][-1])
    expected = run.measure(run.rows(VM), last, settings=few)["sscd_gen"].tolist()
    assert effects["sscd_gen"].tolist()[-2:] == expected
    grid = side_effects.layer_grid(run, VM[:1], chosen["convolution"])
    assert grid.columns == ("planted", "none", *(str(layer.number) for layer in chosen["convolution"]))
    assert np.array_equal(grid.images[0, -1], run.images(VM, last, settings=few)[0, 0])
    summary = side_effects.layer_summary(effects).set_index(["part", "layer"])
    assert summary.iloc[-1]["sscd_orig"] == effects["sscd_orig"].iloc[-2:].median()
    assert summary.iloc[0]["a_clip_untouched"] == effects["a_clip"].iloc[:2].median()


def test_layers_are_not_compared_without_copies():
    labels = [(UNTOUCHED, 0), *((part, layer) for part in ("value", "key", "convolution") for layer in range(1, 8))]
    table = pd.DataFrame([(*pair, "down", "", "a", 0.3, 1.0, 0.3) for pair in labels], columns=["part", "layer", "block", "name", "prompt", "sscd_orig", "sscd_gen", "a_clip"])  # fmt: skip
    for read in (side_effects.read_16, side_effects.read_17, side_effects.read_20):
        assert all(claim.holds is None for claim in read(table) if not claim.must)
    assert "not known" in list(side_effects.read_20(table.assign(sscd_orig=np.nan)))[0].ours
