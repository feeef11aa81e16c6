import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nemolib import deactivate, paths
from nemolib.beyond import prune
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.provenance import content_hash
from tests.beyond import by_hand
from tests.random_pipeline import WIDTHS

NEURONS = NeuronSet.of([(0, 1), (0, 5), (3, 2), (6, 15)], layers=7)
EVERY = NeuronSet(tuple(map(range, WIDTHS)))
LAST = "mid_block.attentions.0.transformer_blocks.0"
STANDALONE = """
import sys, torch
sys.modules["nemolib"] = None
from apply_patch import StableDiffusionPipeline, apply_patch
torch.set_num_threads(1)
original, other, repaired, patch, found = sys.argv[1:]
load = lambda folder: StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, safety_checker=None)
pipes = [load(original), load(repaired)]
apply_patch(pipes[0].unet, patch)
for again in (pipes[0], load(other)):
    try:
        apply_patch(again.unet, patch)
        raise SystemExit("was applied")
    except ValueError as error:
        assert "belongs to another model" in str(error), error
x = torch.load(found + ".x", weights_only=True)
options = dict(latents=x, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
torch.save([pipe(["a b", "c"], **options).images for pipe in pipes], found)
"""


@pytest.fixture
def pipe():
    return by_hand.small_pipeline()


def weights(pipe):
    return content_hash(dict(pipe.unet.state_dict()))


@pytest.mark.parametrize("neurons", [NEURONS, EVERY], ids=len)
@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5, 4.0, 0.3])
def test_images_are_those_of_deactivated_neurons_to_the_last_bit_where_a_product_is_exact(pipe, neurons, factor):
    before, plain = weights(pipe), by_hand.made(pipe)
    with deactivate(pipe, neurons, factor=factor):
        expected = by_hand.made(pipe)
    taken = prune.prune(pipe, neurons, factor=factor)
    torch.testing.assert_close(by_hand.made(pipe), expected, **({} if factor == 0.3 else {"rtol": 0, "atol": 0}))
    assert not torch.equal(expected, plain)
    further = prune.prune(pipe, EVERY)
    prune.restore(pipe, further)
    prune.restore(pipe, taken)
    assert weights(pipe) == before


def test_the_bias_of_a_layer_goes_with_its_rows(pipe):
    layer = pipe.unet.get_submodule(f"{LAST}.attn2.to_v")
    layer.bias = torch.nn.Parameter(torch.ones(16), requires_grad=False)
    prune.prune(pipe, NEURONS)
    assert ((layer(torch.randn(3, 16)) == 0).all(dim=0) == (torch.arange(16) == 15)).all()


def test_a_patch_fits_its_model_alone(pipe, tmp_path):
    before, path = weights(pipe), tmp_path / "patch.safetensors"
    prune.write_patch(pipe, NEURONS, path)
    assert weights(pipe) == before
    assert path.stat().st_size < 4096
    with safe_open(path, framework="pt") as file:
        assert NeuronSet.from_json(file.metadata()["neurons"]) == NEURONS
    taken = prune.apply_patch(pipe, path)
    patched = weights(pipe)
    for refusing in (pipe, other := by_hand.small_pipeline(seed=1)):
        with pytest.raises(ValueError, match="another model, or the patch is applied already"):
            prune.apply_patch(refusing, path)
    assert (weights(pipe), weights(other)) == (patched, weights(by_hand.small_pipeline(seed=1)))
    prune.restore(pipe, taken)
    assert weights(pipe) == before
    prune.prune(pipe, NEURONS)
    assert weights(pipe) == patched


def test_folder_and_patch_work_where_there_is_no_nemolib(pipe, tmp_path):
    folders = [tmp_path / name for name in ("original", "other", "repaired")]
    torch.save(by_hand.start(pipe), tmp_path / "found.x")
    pipe.save_pretrained(folders[0], safe_serialization=True)
    by_hand.small_pipeline(seed=1).save_pretrained(folders[1], safe_serialization=True)
    prune.write_patch(pipe, NEURONS, tmp_path / "patch.safetensors")
    with deactivate(pipe, NEURONS):
        expected = by_hand.made(pipe)
    prune.prune(pipe, NEURONS)
    pipe.save_pretrained(folders[2], safe_serialization=True)
    shutil.copy(paths.ROOT / "examples" / "apply_patch.py", tmp_path)
    command = [sys.executable, "-c", STANDALONE, *folders, tmp_path / "patch.safetensors", tmp_path / "found"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    patched, repaired = torch.load(tmp_path / "found", weights_only=True)
    assert torch.equal(patched, repaired)
    torch.testing.assert_close(patched, expected)  # perhaps made with another number of threads


def test_wanda_masks_weight_by_weight_and_the_weights_come_back(pipe):
    before, weight = weights(pipe), pipe.unet.get_submodule(f"{LAST}.ff.net.2").weight
    squares = {}
    for prompt in ("a b", "c"):
        for half in ("", prompt):
            rows = inputs(pipe, half)
            squares[prompt] = squares.get(prompt, 0) + sum((row / row.norm()) ** 2 for row in rows)
    first = masks(pipe, "a b", "c", first=1)
    for row, mask in zip(weight.abs(), first[f"{LAST}.ff.net.2.weight"], strict=True):
        mine, theirs = (row * squares[prompt].sqrt() for prompt in ("a b", "c"))
        best = sorted(range(len(row)), key=mine.tolist().__getitem__)[-int(0.1 * len(row)) :]
        assert set(mask.nonzero().flatten().tolist()) == {i for i in best if mine[i] > theirs[i]}
    later = masks(pipe, "a b", "c", first=3)
    assert len(later) == 7
    assert all((later[name] >= first[name]).all() for name in later)
    assert any((later[name] != first[name]).any() for name in later)
    taken = prune.prune_weights(pipe, later)
    assert ((weight == 0) == later[f"{LAST}.ff.net.2.weight"]).all()
    prune.restore(pipe, taken)
    assert weights(pipe) == before
    assert by_hand.traces(pipe)[0] == []
    assert not any(mask.any() for mask in masks(pipe, "c", "c").values())


def test_inputs_of_a_caption_are_the_same_in_any_batch_and_add_up_over_samples(pipe):
    options = {"first": 2, "steps": 4, "guidance": 3.0}
    together = prune.measuring_inputs(pipe, samples=3, **options)(["a b", "c"])
    for caption, found in zip(("a b", "c"), together, strict=True):
        alone = prune.measuring_inputs(pipe, samples=3, **options)([caption])[0]
        np.testing.assert_allclose(found, alone, rtol=1e-4)
        one = prune.measuring_inputs(pipe, samples=1, **options)([caption])[0]
        # Each row has norm 1, so that all inputs of a layer together count positions, halves and samples.
        np.testing.assert_allclose(found.sum(axis=1), 3 * one.sum(axis=1), rtol=1e-4)
        assert not np.allclose(found, 3 * one, rtol=1e-2)
    assert together[0].shape == (2, sum(mask.shape[1] for mask in masks(pipe, "a b", "c").values()))


def masks(pipe, memorized, base, *, first=10, sparsity=0.1):
    measure = prune.measuring_inputs(pipe, first=first, steps=4, guidance=3.0)
    return prune.wanda_masks(pipe.unet, measure([memorized]), measure([base]), sparsity=sparsity)


def inputs(pipe, prompt):
    """Return what the last feed-forward layer is given in the first of four steps, [position, feature]."""
    seen, module = [], pipe.unet.get_submodule(f"{LAST}.ff.net.2")
    handle = module.register_forward_pre_hook(lambda _, args: seen.extend(args[0][0]))
    by_hand.noise(pipe, by_hand.start(pipe, 1, seed=0), 751, embed(pipe, [prompt]))
    handle.remove()
    return seen


def test_what_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="offloaded.* prune first"):
        prune.prune(SimpleNamespace(unet=by_hand.small_pipeline().unet.to("meta")), NEURONS)
    with pytest.raises(ValueError, match="was the set found in another model"):
        prune.prune(pipe, NeuronSet.of([(0, 99)], layers=7))
    with pytest.raises(ValueError, match="the neuron set is empty"):
        prune.write_patch(pipe, NeuronSet.empty(7), tmp_path / "patch.safetensors")
    with pytest.raises(ValueError, match="sparsity is 0.0"):
        masks(pipe, "a", "b", sparsity=0.0)
    with pytest.raises(ValueError, match="1 memorized and 2 base prompts"):
        prune.wanda_masks(pipe.unet, [0], [0, 0])
