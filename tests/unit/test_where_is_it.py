"""Notebook 10: maps and their agreement with masks, trajectories, attenuated tokens and curves by another way; claims and drawings."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from nemolib import metrics, paths, plots
from nemolib.beyond.denoising import Denoising, text_of
from nemolib.beyond.guidance import StaticTransition
from nemolib.beyond.regions import region_maps
from nemolib.experiments import where_is_it as where
from nemolib.experiments.deactivate_neurons import NONE
from nemolib.experiments.where_is_it import CURVATURE, DIFFERENCE, ENDING, MAPS
from nemolib.first_step import initial_latents
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.run import Run
from nemolib.settings import Profile
from tests.random_world import write_encoders, write_prompts

KINDS = {"red fox card": "vm", "red owl card": "vm", "blue cat case": "tm", "blue dog case": "tm"}
OTHERS = ["a tree", "the sea"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_model_folder, random_pipe):
    folder = tmp_path_factory.mktemp("world")
    prompts = write_prompts(folder, KINDS, unmemorized=OTHERS, holdout=["a a", "b b", "c c", "d d"])
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(folder / "planted" / "2_mask.png")
    profile = Profile(
        name="random", model=str(random_model_folder), device="cpu", prompts=prompts, holdout_size=4, threshold_prompts=2,
        generation={"samples": 4, "steps": 2, "batch_size": 16}, encoders=write_encoders(folder, random_model_folder),
        mitigation={"wen": {"target": 1.0, "iterations": 1, "latents": 1}},
        beyond={"regions": {"prompts": 2, "samples": 2, "steps": 3, "indices": [0, 2], "probes": 2, "mitigated": 2, "noise_iterations": 1}},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", folder)
        yield Run(profile, random_pipe, progress=False)


@pytest.fixture(scope="module")
def found():
    sets = [NeuronSet.of(pairs, layers=7).to_json() for pairs in ([(0, 1)], [], [(2, 5), (6, 3)], [(1, 4)])]
    return pd.DataFrame(
        {"kind": KINDS.values(), "prompt": KINDS.keys(), "neurons": sets, "initial": sets, "memorized": True}
    )


@pytest.fixture(scope="module")
def rows(run):
    rows = run.prompts("tm", "vm", "unmemorized", most=2)
    return rows[rows["kind"].eq("tm") | ~rows["kind"].duplicated()].reset_index(drop=True)


@pytest.fixture(scope="module")
def maps(run, rows):
    return where.maps_of(run, rows["caption"])


@pytest.fixture(scope="module")
def path(run):
    return where.guidance_path(run, run.prompts("tm", "vm", "unmemorized", most=1))


@pytest.fixture(scope="module")
def curves(run, found):
    mixed = run.prompts("tm", "vm", "unmemorized", most=2)
    chosen = where.strengths(run, found, OTHERS)
    few = {key: chosen[key] for key in chosen if key[0] in (NONE, "static transition", "NeMo")}
    return mixed, chosen, where.curves(run, mixed, few)


def test_maps_are_those_of_the_methods_with_and_without_neurons(run, rows, maps):
    assert rows["kind"].tolist() == ["tm", "tm", "vm", "unmemorized"]
    own = {"samples": 2, "steps": 3, "indices": (0, 2), "probes": 2, "seed": run.profile.detection.seed}
    own["guidance"] = run.profile.generation.guidance
    expected = region_maps(run.pipe, "blue dog case", **own)
    np.testing.assert_allclose(maps[1], torch.stack([expected[name] for name in MAPS]), rtol=1e-3, atol=1e-6)
    off = DeactivatedNeurons(NeuronSet.of([(0, 1)], layers=7))
    with off.applied(run.pipe, ["blue dog case"]):
        expected = region_maps(run.pipe, "blue dog case", **own | {"maps": (ENDING,)})[ENDING]
    changed = where.maps_of(run, ["blue dog case"], off, maps=(ENDING,))[0, 0]
    np.testing.assert_allclose(changed, expected, rtol=1e-3, atol=1e-6)
    assert not np.allclose(changed, maps[1, 1])


def test_a_map_that_is_the_mask_agrees_and_its_opposite_does_not(run, rows, maps):
    inside = np.zeros(maps.shape[-2:], bool)
    inside[: len(inside) // 2] = True
    made = maps * 0 + 1
    made[:, 0, 0], made[:, 1, 0] = inside, ~inside
    table = where.agreement(run, rows, made).set_index(["map", "step"])
    assert table["prompts"].eq(1).all()
    assert table.loc[(DIFFERENCE, 1), ["auroc", "auroc_low", "iou", "whole"]].tolist() == [1, 1, 1, 0.5]
    assert table.loc[(ENDING, 1), ["auroc", "iou"]].tolist() == [0, 0.5]
    assert table.loc[(CURVATURE, 3), ["auroc", "iou", "iou_paper"]].tolist() == [0.5, 0.5, 0.953]
    assert table["iou_paper"].notna().tolist() == [False, True] * 3
    assert where.agreement(run, rows.iloc[1:], made[1:]).empty


def test_without_neurons_nothing_changes_where_there_are_none(run, found, rows, maps):
    table, off = where.darkness(run, rows, found)
    same = [prompt in ("red owl card", *OTHERS) for prompt in table["prompt"]]
    assert np.isclose(table["active"], table["off"], rtol=1e-4).tolist() == same
    np.testing.assert_allclose(table["active"], maps[:, 0, 0].mean(axis=(1, 2, 3)), rtol=1e-3)
    assert off.shape == (4, 2, *maps.shape[-2:])


def test_the_picture_shows_planted_image_fixed_part_and_maps(run, rows, maps):
    grid = where.overlays(run, rows, maps, maps[:, 0, 0] * 0)
    assert grid.columns == ("planted", "fixed part (mask)", "generated", *MAPS, f"{DIFFERENCE}, neurons off")
    half = grid.images.shape[2] // 2
    assert np.array_equal(grid.images[0, 1, :half], grid.images[0, 0, :half])
    assert (grid.images[0, 1, half:] == 255).all()
    assert np.array_equal(grid.images[2, 0], grid.images[2, 1])
    assert (grid.images[3, :2] == 255).all()
    dark = grid.images[3, -1].astype(float) - 0.35 * grid.images[3, 2].mean(axis=-1, keepdims=True)
    assert np.abs(dark - 166 * np.array([0.267, 0.005, 0.329])).max() < 2
    kinds = pd.DataFrame({"caption": rows["caption"], "kind": rows["kind"]})
    plots.files_of(where.region_maps(grid, kinds))


def test_the_image_under_the_maps_is_that_of_the_same_noise(run):
    own, caption = run.profile.beyond.regions, OTHERS[0]
    model = Denoising(run.pipe, steps=own.steps, guidance=run.profile.generation.guidance)
    latents = initial_latents(run.pipe, samples=own.samples, seed=run.profile.detection.seed)[:1]
    *_, last = model.trajectory(latents, text_of(run.pipe, caption).embedding)
    ended = model.scheduler.step(last.empty + model.guidance * last.difference, last.timestep, last.latents).prev_sample
    made = run.pipe.vae.decode(ended / run.pipe.vae.config.scaling_factor).sample
    made = run.pipe.image_processor.postprocess(made.detach(), output_type="np")[0]
    assert np.abs(made * 255 - where.image_of(run, caption)).max() <= 2


def test_norms_are_sums_of_the_map_and_minima_are_seen(run, path, maps, monkeypatch):
    first = path.query("caption == 'blue cat case' and guidance > 0").iloc[0]
    assert first["norm"] == pytest.approx(np.sqrt(maps[0, 0, 0].sum(axis=(1, 2))).mean(), rel=1e-3)
    falls = np.array([[[3, 3], [1, 2], [2, 1]]], dtype=float)  # of two seeds the first has a minimum
    monkeypatch.setattr(where, "maps_of", lambda *_, **__: falls[:, None, :, :, None, None])
    table = where.guidance_path(run, run.prompts("tm", "vm", "unmemorized", most=1).head(1))
    assert table["minimum"].eq(0.5).all()
    assert len(table) == 6


def test_spiking_tokens_are_those_that_attenuation_changes(run, monkeypatch):
    found = where.spiking(run, OTHERS)
    assert 0 < found["before"] < 1
    monkeypatch.setattr(where.guidance, "attenuated", lambda logits, **_: logits + 1)
    every = where.spiking(run, OTHERS)
    assert every[["before", "after"]].tolist() == pytest.approx([1, 1], rel=1e-4)
    assert 0 < every["negative"] < 1


def test_curves_are_similarities_and_alignments_of_the_same_seeds(run, curves):
    mixed, chosen, table = curves
    assert len({name for name, _ in chosen}) == 1 + len(where.COLORS) == 1 + len(where.MARKERS) == 1 + len(where.LINES)
    published = {name: is_published for (name, _), (_, is_published) in chosen.items()}
    assert published["attention scaling (Ren)"]
    assert not published["embedding adjustment (Wen)"]  # its target is not that of the paper
    row = table.set_index("strength").loc["until 500"]
    vm = mixed.query("kind == 'vm'")
    features = run.features("copy", vm["caption"].tolist(), StaticTransition(500))
    similar = metrics.sscd_orig(features, run.planted_features(vm))
    assert row["top_1"] == pytest.approx(similar.max(axis=1).mean())
    assert row["top_3"] == pytest.approx((similar.sum(axis=1) - similar.min(axis=1)).mean() / 3)
    assert row["copies"] == (similar > 0.5).mean()
    assert bool(row["published"]) is True
    assert table["same"].iloc[0] == pytest.approx(1)
    halved = where.halving(table)
    grid = where.pictures(run, mixed, table, chosen)
    names = [", ".join(filter(None, pair)) for pair in halved[["mitigation", "strength"]].to_numpy()]
    assert grid.rows == ("planted", NONE, *names)
    assert grid.columns[::3] == ("TM: blue cat case", "VM: red owl card")
    assert (grid.images[0, -1] == 255).all()
    plots.files_of(where.guidance_images(grid))


def test_the_layout_is_that_of_the_fixed_part_where_it_is_known(run, monkeypatch):
    row = run.prompts("tm").head(1)
    planted, image = run.planted_images(row)[0], np.zeros((64, 64, 3), np.uint8)
    image[:32] = planted[:32] // 2  # darker, and nothing but the fixed part
    monkeypatch.setattr(run, "images", lambda *_: np.stack([image, 255 - planted])[None])
    assert where.likeness(run, row, None)[0] == pytest.approx([1, -1], abs=1e-3)
    monkeypatch.setattr(run, "features", lambda *_: run.planted_features(row)[:, None])
    monkeypatch.setattr(where, "masks", lambda *_: [None])
    assert where.likeness(run, row, None).tolist() == [[pytest.approx(1)]]


def test_a_prompt_without_a_planted_image_has_no_copies(run, curves, monkeypatch):
    mixed, chosen, table = curves
    known = run.planted_features(mixed.query("kind == 'vm'"))
    known[1] = np.nan
    monkeypatch.setattr(run, "planted_features", lambda rows: known)
    row = where.curves(run, mixed, {(NONE, ""): chosen[NONE, ""]}).iloc[0]
    similar = metrics.sscd_orig(run.features("copy", ["red fox card"]), known[:1])
    assert row[["top_1", "prompts"]].tolist() == [pytest.approx(similar.max()), 1]
    assert row["alignment"] == table["alignment"].iloc[0]


def strengths(left, aligned):
    """Return a table of curves: a mitigation whose published strength leaves these shares."""
    numbers = {"prompts": 3, "top_1": [0.8, 0.8 * left], "alignment": [0.5, 0.5 * aligned], "ordinary": 0.5}
    numbers |= {"layout": 0.9, "layout_alignment": 0.4}
    return pd.DataFrame({"mitigation": [NONE, "GUARD"], "strength": ["", "r 2"], "published": [False, True], **numbers})


def agreement(iou):
    columns = {"map": MAPS, "step": 12, "prompts": 3, "auroc": 0.8, "auroc_low": 0.7, "auroc_high": 0.9, "iou": iou}
    return pd.DataFrame(
        columns | {"iou_paper": 0.9, "whole": 0.5, "auroc_paper": np.nan, "iou_low": np.nan, "iou_high": np.nan}
    )


def trajectory(minimum):
    known = {"kind": "vm", "caption": "a", "guidance": 0.0, "timestep": [900, 1], "norm": [1.0, 2.0]}
    return pd.DataFrame(known | {"minimum": minimum})


@pytest.mark.parametrize(
    ("read", "holding", "turned"),
    [
        (where.read_agreement, agreement(0.7), agreement(0.55)),
        (where.read_path, trajectory(0.9), trajectory(0.1)),
        (where.read_curves, strengths(0.5, 0.9), strengths(0.9, 0.5)),
    ],
)
def test_each_claim_turns_with_its_numbers(read, holding, turned):
    said = list(read(holding))
    assert said
    assert all(claim.holds and claim.paper and claim.n for claim in said)
    assert [claim.holds for claim in read(turned)] == [False] * len(said)


def test_the_weakest_strength_that_halves_is_chosen_or_the_one_that_leaves_least():
    rows = [(NONE, 0.8), ("a", 0.7), ("a", 0.4), ("a", 0.1), ("b", 0.5), ("b", 0.6)]
    table = pd.DataFrame(rows, columns=["mitigation", "top_1"])
    assert where.halving(table).index.tolist() == [2, 4]


def test_figures_show_the_tables():
    left, right = where.show_region_agreement(agreement([0.7, 0.6, 0.55])).axes
    assert [line.get_ydata()[0] for line in right.lines[::2][:3]] == [0.7, 0.6, 0.55]
    assert right.lines[-1].get_ydata()[0] == 0.5
    each = pd.concat([trajectory(0).assign(kind=kind) for kind in where.KINDS])
    both = pd.concat([each.assign(guidance=3.0, norm=5.0), each])
    guided, free = where.show_guidance_path(both).axes
    assert guided.lines[0].get_ydata().tolist() == [5, 5]
    assert free.lines[0].get_xydata().tolist() == [[1, 2], [900, 1]]
    assert free.get_xlim()[0] > free.get_xlim()[1]
    panel, *others = where.show_guidance_mitigations(strengths(0.5, 0.9)).axes
    assert [each.lines[-1].get_linestyle() for each in (panel, *others)] == [":", ":", "None"]
    assert panel.lines[0].get_xydata().tolist() == [[0.5, 0.8], [0.45, 0.4]]
    assert panel.lines[1].get_xydata().tolist() == [[0.45, 0.4]]
    assert {text.get_text() for text in panel.figure.legends[0].get_texts()} == {"GUARD", "untouched"}


def test_answers(run, maps):
    right = {number: answer(run) for number, answer in where.EXERCISES.items()}
    averaged, inside = maps[0, 0, 0].mean(axis=0), np.arange(maps.shape[-2]) < maps.shape[-2] // 2
    ranks = averaged[inside].ravel()[:, None] > averaged[~inside].ravel()
    assert right["10.2"] == pytest.approx(ranks.mean(), abs=0.01)
    assert right["10.3"] in (600, 0)
    assert 0 < right["10.1"] < 1
