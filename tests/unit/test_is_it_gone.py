"""Notebook 08: readings and drawings from small made tables, controls, and what is stored of the defence."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from nemolib import exhibits, metrics, paper, paths
from nemolib.exhibits import exhibit_of
from nemolib.experiments import is_it_gone as gone
from nemolib.neurons import NeuronSet
from nemolib.run import Run
from nemolib.settings import load_profile
from nemolib.store import Grid, read_grid, read_table

CASES = [
    ("vm", "memorized (24 copies)", "untouched", "no attack"), ("vm", "memorized (24 copies)", "neurons off", "no attack"),
    ("vm", "memorized (24 copies)", "neurons off", "noise"), ("vm", "memorized (24 copies)", "neurons off", "prompt"),
    ("vm", "memorized (24 copies)", "neurons off", "empty prompt"), ("vm", "memorized (24 copies)", "untouched", "noise"),
    ("unmemorized", "never trained", "untouched", "noise"), ("unmemorized", "never trained", "neurons off", "noise"),
    ("ladder", "trained 1×", "neurons off", "noise"),
]  # fmt: skip


def attacks(**copies):
    """Return a table of attacks on three images, similarities 0.9, or by start of an attack or kind as given."""
    rows = []
    for kind, image, model, start in CASES:
        for steps in [0] if start == "no attack" else [10, 50]:
            base = (
                copies.get(kind, copies.get(start.partition(" ")[0], 0.9))
                if steps
                else 0.9
                if model == "untouched"
                else 0.2
            )
            shift = -0.1 if steps == 10 else 0
            rows += [
                (kind, image, f"caption {n}", model, start, steps, seed, base + shift + 0.01 * n)
                for n in range(3)
                for seed in range(2)
            ]
    return pd.DataFrame(rows, columns=["kind", "image", "caption", "model", "start", "steps", "seed", "copy"])


def said(read, *tables):
    return {claim.text: claim for claim in read(*tables)}


def test_what_the_attack_says_can_turn():
    found = said(gone.read_attacks, attacks(unmemorized=0.3, ladder=0.0))
    assert [claim.holds for claim in found.values()] == [True, True, True]
    assert "untouched 0.91, neurons off 0.21, attacked 0.91" in str(
        found["an attack on the embedding brings the image back though the neurons are off"]
    )
    nowhere = said(gone.read_attacks, attacks(noise=0.1, prompt=0.1, empty=0.1, unmemorized=0.3))
    assert not nowhere["it does so from any start"].holds
    lost = said(gone.read_attacks, attacks(noise=0.3, unmemorized=0.9))
    assert [claim.holds for claim in lost.values()] == [False, False, False]
    assert "n = 3 images" in str(lost["an image that was never trained is not found so"])


def test_similarities_are_those_after_the_last_step_medians_over_seeds():
    table = attacks()
    np.testing.assert_allclose(gone.at_the_end(table, "vm", "neurons off", "noise"), [0.9, 0.91, 0.92])
    cells = gone.cells(table[table["steps"] == 10], "kind", "model", "start").iloc[0]
    assert (cells["prompts"], cells["median"], cells["copies"]) == (3, pytest.approx(0.81), 1.0)
    assert gone.in_words(gone.cells(attacks(noise=0.1), "start")).loc[1, "copies"].startswith("0%")


def test_the_table_has_published_numbers_beside_their_cases():
    table = gone.attack_table(attacks())
    beside = dict(
        zip(zip(table["image"], table["model"], table["start"], strict=True), table["published"], strict=True)
    )
    row = paper.table("attacks").iloc[2]
    assert (
        beside["memorized (24 copies)", "neurons off", "noise"]
        == f"{row['copy']:g} ± {row['copy_sd']:g}, {row['share']:.0%}"
    )
    assert beside["never trained", "untouched", "noise"] == "0.48 ± 0.06, 0%"
    assert beside["trained 1×", "neurons off", "noise"] == ""
    assert table["copy similarity"].iloc[2].startswith("0.91 (0.90 to 0.92)")


def test_the_course_draws_each_median():
    figure = gone.attack_course(attacks(unmemorized=0.3))
    first, _, starts = figure.axes
    lines = {line.get_label(): line for line in first.lines}
    np.testing.assert_allclose(lines["never trained"].get_xydata(), [[10, 0.21], [50, 0.31]])
    assert {line.get_label() for line in starts.lines} >= {"from noise", "from prompt", "from empty prompt"}
    assert first.get_ylabel() == "copy similarity"
    assert [panel.get_xlabel() for panel in figure.axes] == ["steps"] * 3


def neurons(*rows):
    texts = [(*row[:3], NeuronSet(row[3]).to_json()) for row in rows]
    return pd.DataFrame(texts, columns=["caption", "start", "score", "neurons"])


def test_overlaps_compare_what_they_should_and_leave_empty_layers_out():
    table = neurons(
        ("a", "no attack", 0.9, ((1, 2), ())), ("b", "no attack", 0.9, ((2, 3), ())),
        ("a", "noise", 0.9, ((1, 2, 3, 4), ())), ("a", "prompt", 0.9, ((4, 5), (7,))),
    )  # fmt: skip
    found = gone.layer_overlap(table)
    shares = {pair: part["iou"].tolist() for pair, part in found.groupby("pair")}
    np.testing.assert_allclose(shares[gone.PROMPTS], [1 / 3, np.nan])
    np.testing.assert_allclose(shares[gone.OWN], [1 / 2, np.nan, 0, 0])
    np.testing.assert_allclose(shares[gone.ONE_IMAGE], [1 / 5, 0])
    figure = gone.neurons_shared(found)
    assert "0.33\n(0%)" in [text.get_text() for text in figure.axes[0].texts]


def test_claims_about_local_can_turn():
    distances = pd.DataFrame([(gone.ONE_IMAGE, 10.0), (gone.PROMPTS, 10.0)], columns=["pair", "distance"])
    alike = pd.DataFrame([(gone.ONE_IMAGE, 1, 0.9), (gone.ONE_IMAGE, 2, np.nan)], columns=["pair", "layer", "iou"])
    far, shared = gone.read_overlap(alike, distances)
    assert (far.holds, shared.holds) == (True, False)
    assert "1 of 2 layers" in shared.ours
    assert shared.n == "1 pairs"
    far, shared = gone.read_overlap(alike.assign(iou=0.1), distances.assign(distance=[5.0, 10.0]))
    assert (far.holds, shared.holds) == (False, True)
    assert [claim.holds for claim in gone.read_overlap(alike.assign(iou=np.nan), distances)] == [True, None]
    assert [claim.holds for claim in gone.read_overlap(alike, distances.head(1))] == [None, False]


def hardened(defended, others):
    rows = [
        (model, f"caption {defence}{n}", defence, attack, seed, value if model == "hardened" else 0.9)
        for model in ("untouched", "hardened")
        for attack in ("prompt alone", "from noise")
        for defence, value in ((True, defended), (False, others))
        for n in range(3)
        for seed in range(2)
    ]
    return pd.DataFrame(rows, columns=["model", "caption", "defended", "attack", "seed", "copy"])


def test_a_defence_is_judged_on_both_sets_of_images():
    assert [claim.holds for claim in gone.read_defence(hardened(0.2, 0.8))] == [True, False]
    assert [claim.holds for claim in gone.read_defence(hardened(0.8, 0.2))] == [False, True]
    table = gone.hardened_table(hardened(0.2, 0.8))
    assert (
        table.loc[(table["defended"] == "no") & (table["model"] == "hardened"), "copies"].str.startswith("100%").all()
    )


def test_nothing_stored_is_no_error(tmp_path):
    profile = load_profile(_profile(tmp_path, model="random:sd14"))
    run = Run(profile, None)
    attacks, quality, images = gone.stored_defence(run)
    assert attacks.empty
    assert quality.empty
    run_load = {"hardened": attacks, "hardened_images": images}.__getitem__
    for draw in (gone.hardened_table, gone.hardened_grid):
        assert exhibits.render(exhibit_of(draw), run, load=run_load, write=False).content is None


def _profile(folder, *, model):
    path = folder / "other.yaml"
    path.write_text(f"extends: tiny\nmodel: {model}\n")
    return path


def test_what_is_stored_belongs_to_the_shipped_model():
    folder = paths.DATA / "tiny" / "hardened"
    record = json.loads((folder / "settings.json").read_text())
    unet = paths.DATA / "tiny" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    assert record["unet"] == hashlib.sha256(unet.read_bytes()).hexdigest(), (
        "run python -m tools.harden for the new model"
    )
    attacks = read_table(folder / "attacks.csv")
    counts = attacks.groupby(["model", "defended", "attack"])["caption"].nunique()
    assert (counts == record["settings"]["images"]).all()
    assert len(counts) == 2 * 2 * 3
    images = read_grid(folder / "images.safetensors")
    defended = attacks.drop_duplicates("caption")["defended"]
    assert images.rows == tuple(np.where(defended, "defended: ", "not defended: ") + attacks["caption"].unique())
    assert set(read_table(folder / "quality.csv")["metric"]) == {"FID", "A_CLIP"}


def test_a_control_is_another_image_of_the_same_making():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    other = gone.never_trained(image)
    np.testing.assert_array_equal(other[:, ::-1][..., [1, 2, 0]], image)
    np.testing.assert_array_equal(np.sort(other.ravel()), np.sort(image.ravel()))


def test_grids_are_drawn():
    grid = Grid(np.zeros((2, 5, 8, 8, 3), dtype=np.uint8), ("a", "b"), ("planted", "x", "x", "y", "y"))
    for draw in (gone.is_it_gone, gone.hardened_grid):
        assert len(draw(grid).axes) == 10
    assert metrics.MEMORIZED_ABOVE == 0.7
