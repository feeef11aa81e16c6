"""Notebook 07: what is pruned and for whom, its images and numbers by another way, what is claimed and drawn of them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

import nemolib
from nemolib import metrics, paths, plots
from nemolib.beyond import prune
from nemolib.experiments import prune_and_export as pruning
from nemolib.experiments.prune_and_export import NEMO, RANDOM, UNTOUCHED, WANDA, PrunedWeights
from nemolib.layers import value_layers
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.provenance import content_hash, model_hash
from nemolib.run import Run
from nemolib.settings import Profile, SimilaritySettings
from tests.random_world import write_encoders, write_prompts

NEURONS = {
    "red fox card": ("vm", [(0, 1), (6, 3)]), "red owl card": ("vm", [(0, 1), (2, 5)]),
    "blue cat case": ("tm", [(1, 4)]), "blue dog case": ("tm", [(0, 1), (1, 2)]),
}  # fmt: skip
IN_TURN = ["red fox card", "blue cat case", "red owl card", "blue dog case"]
OTHERS = ["a tree", "the sea"]


@pytest.fixture(scope="module")
def found():
    rows = [(kind, prompt, NeuronSet.of(pairs, layers=7).to_json()) for prompt, (kind, pairs) in NEURONS.items()]
    return pd.DataFrame(rows, columns=["kind", "prompt", "neurons"])


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_model_folder, random_pipe):
    folder = tmp_path_factory.mktemp("world")
    kinds = {prompt: kind for prompt, (kind, _) in NEURONS.items()}
    prompts = write_prompts(folder, kinds, unmemorized=OTHERS, holdout=["a a", "b b", "c c", "d d"])
    profile = Profile(
        name="random", model=str(random_model_folder), device="cpu", prompts=prompts, holdout_size=4, threshold_prompts=2,
        generation={"samples": 4, "steps": 1, "batch_size": 16}, encoders=write_encoders(folder, random_model_folder),
        beyond={"pruning": {"unions": [1, 9], "sparsities": [0.01, 0.5], "first": 2, "measured": 3, "samples": 2}},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", folder)
        yield Run(profile, random_pipe, progress=False)


@pytest.fixture(scope="module")
def repairs(run, found):
    return pruning.repairs(run, found, IN_TURN[:3])


@pytest.fixture(scope="module")
def table(run, repairs):
    return pruning.repaired_prompts(run, repairs, IN_TURN[:3], OTHERS)


def made(*rows):
    """Return a table of repairs: method, amount, copy similarities of two VM prompts and alignments of two others."""
    parts = []
    for method, amount, copies, aligned in rows:
        part = pd.DataFrame({"kind": ["vm", "vm", "unmemorized", "unmemorized"], "prompt": list("abcd")})
        part = part.assign(
            method=method, amount=amount, neurons=0, weights=9, fid=5.0, inside=[method != UNTOUCHED] * 2 + [False] * 2
        )
        missing = [np.nan] * 2
        parts.append(
            part.assign(
                sscd_orig=[*copies, *missing],
                sscd_orig_max=[*copies, *missing],
                a_clip=[0.5, 0.5, *aligned],
                sscd_gen=0.9,
            )
        )
    return pd.concat(parts, ignore_index=True)


def world(nemo=((0.1, 0.3), (0.8, 0.8)), least=((0.2, 0.2), (0.8, 0.8)), most=((0.0, 0.0), (0.1, 0.1))):
    return made(
        (UNTOUCHED, 0, (0.9, 0.9), (0.8, 0.8)), (NEMO, 2, *nemo), (WANDA, 0.01, *least), (WANDA, 0.1, *most)
    )  # fmt: skip


def test_vm_and_tm_prompts_take_turns_and_those_without_an_image_come_last(run, found, monkeypatch):
    assert pruning.in_turn(run, found) == IN_TURN
    monkeypatch.setattr(pruning, "has_image", lambda rows: (rows["caption"] != IN_TURN[0]).to_numpy())
    assert pruning.in_turn(run, found) == [*IN_TURN[1:3], IN_TURN[3], IN_TURN[0]]


def test_unions_grow_and_all_measured_prompts_have_one(run, repairs):
    assert [(item.method, item.amount) for item in repairs] == [
        (UNTOUCHED, 0), (NEMO, 1), (NEMO, 3), (NEMO, 4), (WANDA, 0.01), (WANDA, 0.5), (RANDOM, 0.5)
    ]  # fmt: skip
    assert list(repairs[2].mitigation.neurons) == [(0, 1), (1, 4), (2, 5), (6, 3)]
    layers = value_layers(run.pipe.unet)
    assert repairs[2].weights == sum(layers[place].module.weight[0].numel() for place in (0, 1, 2, 6))
    assert [item.prompts for item in repairs[1:]] == [IN_TURN[:1], IN_TURN[:3], IN_TURN, *[IN_TURN[:3]] * 3]


def test_the_weights_that_wanda_prunes_are_those_of_the_masks(run, repairs):
    measure = prune.measuring_inputs(run.pipe, first=2, guidance=run.profile.generation.guidance)
    seen = measure(IN_TURN[:3]), measure(["a a", "b b", "c c"])
    masks = prune.wanda_masks(run.pipe.unet, *seen, sparsity=0.5)
    number = sum(int(mask.sum()) for mask in masks.values())
    assert abs(repairs[-2].weights - number) <= 0.01 * number
    control = {
        name: np.unpackbits(np.frombuffer(bits, np.uint8)).sum() for name, bits in repairs[-1].mitigation.masks.items()
    }
    assert control == {
        name: np.unpackbits(np.frombuffer(bits, np.uint8)).sum() for name, bits in repairs[-2].mitigation.masks.items()
    }
    assert repairs[-1].weights == repairs[-2].weights
    assert repairs[-1].mitigation != repairs[-2].mitigation
    before = model_hash(run.pipe)
    mitigated = run.images(IN_TURN[:1], repairs[-2].mitigation)
    assert model_hash(run.pipe) == before
    bits = {name: np.packbits(mask.numpy()).tobytes() for name, mask in masks.items()}
    taken = prune.prune_weights(run.pipe, masks)
    assert np.array_equal(run.images(IN_TURN[:1]), run.images(IN_TURN[:1]))
    pruned = run.images(IN_TURN[:1])
    prune.restore(run.pipe, taken)
    assert np.array_equal(run.images(IN_TURN[:1], PrunedWeights(bits)), pruned)
    assert not np.array_equal(mitigated, run.images(IN_TURN[:1]))
    with pytest.raises(ZeroDivisionError), PrunedWeights(bits).applied(run.pipe, ["a"]):
        raise ZeroDivisionError
    assert model_hash(run.pipe) == before


def test_what_is_measured_of_a_repair(run, repairs, table):
    assert len(table) == len(repairs) * 5
    settings, few = replace(run.profile.generation, samples=2), ["sscd_orig", "sscd_orig_max", "a_clip", "sscd_gen"]
    row = table.query("method == @NEMO and amount == 3 and prompt == 'blue cat case'").iloc[0]
    expected = run.measure(run.rows(["blue cat case"]), repairs[2].mitigation, columns=few, settings=settings)
    assert row[few].tolist() == pytest.approx(expected.iloc[0].tolist(), abs=1e-6)
    assert table.query("amount == 1 and inside")["prompt"].tolist() == IN_TURN[:1]
    before, after = (run.features("quality", OTHERS, item, settings=settings) for item in (None, repairs[2].mitigation))
    both = [metrics.fid(before[:, first], after[:, 1 - first]) for first in (0, 1)]
    assert row["fid"] == pytest.approx(np.mean(both), rel=1e-6)
    assert np.isnan(pruning._fid(before[:, :1], after[:, :1]))


def test_medians_are_those_of_prompts_that_a_repair_was_made_for():
    table = world()
    table.loc[4, "inside"] = False
    row = pruning.summary(table).iloc[1]
    assert row[["vm", "outside", "copies", "prompts", "name"]].tolist() == [0.3, 0.1, 0, 1, "NeMo, 2 prompts"]
    first = pruning.summary(table).iloc[0]
    assert first[["vm", "copies", "a_clip", "prompts", "name"]].tolist() == [0.9, 1, 0.8, 2, "untouched"]
    assert np.isnan(first["tm"])
    more = pd.concat([table, made((NEMO, 5, (0.0, 0.0), (0.1, 0.1)))], ignore_index=True)
    assert pruning.compared(pruning.summary(more))["amount"].tolist() == [0, 0.01, 0.1, 5]


@pytest.mark.parametrize(
    ("number", "changed"),
    [
        (0, {"nemo": ((0.6, 0.6), (0.8, 0.8))}),
        (1, {"nemo": ((0.1, 0.3), (0.6, 0.6))}),
        (2, {"least": ((0.8, 0.8), (0.8, 0.8))}),
        (3, {"most": ((0.0, 0.0), (0.8, 0.8))}),
    ],
)
def test_each_claim_turns_with_its_numbers(number, changed):
    assert list(pruning.read_repairs(pd.concat([world(), made((RANDOM, 0.1, (0.9, 0.9), (0.9, 0.9)))]))) == list(
        pruning.read_repairs(world())
    )
    said, turned = list(pruning.read_repairs(world())), list(pruning.read_repairs(world(**changed)))
    assert [claim.holds for claim in said] == [True] * 4
    assert [claim.holds for claim in turned] == [place != number for place in range(4)]
    assert all(claim.n and claim.paper and claim.interval for claim in said)


def test_figures_show_the_table(run, repairs, table):
    drawn = pruning.union_curve(table)
    left, middle, right = drawn.axes
    hollow = [line for line in left.lines if line.get_markerfacecolor() == "white" and line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in hollow) == 3 + 2
    filled = [line for line in left.lines if line.get_markerfacecolor() != "white" and line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in filled) == 1 + 3 + 3
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "2\n(1)", "4\n(3)", "5\n(4)"]
    assert (
        right.lines[0].get_ydata().tolist()
        == table.query("method in (@UNTOUCHED, @NEMO)").drop_duplicates("amount")["fid"].tolist()
    )
    texts = {text.get_text().strip() for text in pruning.trade_off(table).axes[0].texts}
    assert texts == {"1", "3", "4", "1 %", "50 %"}
    shown = pruning.show_repaired_prompts(table)
    assert shown["pruned"].tolist()[-2:] == ["Wanda, 50 %", "random, 50 %"]
    grid = pruning.repair_images(run, [repairs[0], repairs[2]], IN_TURN[:2], OTHERS)
    assert grid.rows == (IN_TURN[0], OTHERS[0], IN_TURN[1], OTHERS[1])
    assert grid.columns == ("planted", "untouched", "NeMo, 3 prompts")
    assert (grid.images[1, 0] == 255).all()
    assert np.array_equal(grid.images[0, 0], run.planted_images(run.rows(IN_TURN[:1]), size=grid.images.shape[2:4])[0])
    few = replace(run.profile.generation, samples=1)
    assert np.array_equal(grid.images[3, 2], run.images(OTHERS[1:], repairs[2].mitigation, settings=few)[0, 0])
    plots.files_of(pruning.show_repair_images(grid, table))


def test_an_ordinary_prompt_is_of_the_same_subject_where_it_is_known(run, repairs, monkeypatch):
    monkeypatch.setattr(run, "rows", lambda prompts: Run.rows(run, prompts).assign(subjects=["owl", "unicorn"]))
    assert pruning.repair_images(run, repairs[:1], IN_TURN[:2], OTHERS).rows[1::2] == ("an owl", "a unicorn")


def test_answers(run, table, monkeypatch):
    monkeypatch.setattr(
        pruning, "_first", lambda run: (run.rows(IN_TURN[:1]), NeuronSet.of([(0, 1), (6, 3)], layers=7))
    )
    run.save(table, "repaired_prompts")
    vm = table.query("kind == 'vm' and prompt == 'red owl card'").set_index(["method", "amount"])["sscd_orig"]
    answers = {number: right(run) for number, right in pruning.EXERCISES.items()}
    assert answers["07.1"] == 32
    assert answers["07.2"] == pytest.approx(vm[(NEMO, 1)] / vm[(UNTOUCHED, 0)])
    half = DeactivatedNeurons(NeuronSet.of([(0, 1), (6, 3)], layers=7), 0.5)
    assert answers["07.3"] == run.measure(run.rows(IN_TURN[:1]), half)["sscd_orig"][0]


def test_five_lines_lead_from_a_pipeline_to_a_repaired_folder(random_pipe, statistics, tmp_path, monkeypatch):
    notebook = nbformat.read(paths.NOTEBOOKS / "beyond" / "07_prune_and_export.ipynb", as_version=4)
    (lines,) = (cell.source.split("```")[1] for cell in notebook.cells if cell.source.startswith("### With your own"))
    random_pipe.save_pretrained(tmp_path / "original", safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    # The latents are too small for the similarity of the paper.
    small = {"similarity": SimilaritySettings(kernel_size=3, sigma=0.5), "protocol": "paper"}
    monkeypatch.setattr(nemolib, "localize", partial(nemolib.localize, **small), raising=False)
    names = {"nemolib": nemolib, "prompt": "a b", "stats": statistics, "tau": -0.9}
    exec(lines.removeprefix("python").replace("path/or/hub-id", "original"), names)
    repaired, patched = (nemolib.load_pipeline(tmp_path / name).unet for name in ("repaired", "original"))
    assert model_hash(names["pipe"]) != model_hash(random_pipe)
    prune.apply_patch(SimpleNamespace(unet=patched), "neurons.safetensors")
    assert content_hash(dict(patched.state_dict())) == content_hash(dict(repaired.state_dict()))
    assert not any(
        value_layers(repaired)[layer].module.weight[neuron].any() for layer, neuron in names["found"].neurons
    )


def test_the_program_of_the_notebook_needs_no_nemolib(random_pipe, tmp_path):
    notebook = nbformat.read(paths.NOTEBOOKS / "beyond" / "07_prune_and_export.ipynb", as_version=4)
    (source,) = (cell.source for cell in notebook.cells if cell.source.startswith("program = "))
    program, neurons = source.split('"""')[1], NeuronSet.of([(0, 1), (6, 3)], layers=7)
    shutil.copy(paths.ROOT / "examples" / "apply_patch.py", tmp_path)
    random_pipe.save_pretrained(tmp_path / "original", safe_serialization=True)
    prune.write_patch(random_pipe, neurons, tmp_path / "neurons.safetensors")
    taken = prune.prune(random_pipe, neurons)
    random_pipe.save_pretrained(tmp_path / "repaired", safe_serialization=True)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    expected = random_pipe("a b", generator=torch.manual_seed(0), output_type="np", **call).images[0]
    prune.restore(random_pipe, taken)
    command = [sys.executable, "-c", program, json.dumps(["a b", "float32", "cpu", call])]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["refused a second time", "refused to another model"]  # fmt: skip
    for image in np.load(tmp_path / "images.npy"):
        np.testing.assert_allclose(image, expected, atol=1e-4)
