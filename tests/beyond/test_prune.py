import subprocess
import sys
import textwrap

import pytest
import torch

from nemolib import deactivate, generate
from nemolib.beyond import prune
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.provenance import content_hash
from nemolib.settings import GenerationSettings
from tests.beyond import by_hand
from tests.random_pipeline import WIDTHS

NEURONS = NeuronSet.of([(0, 1), (0, 5), (3, 2), (6, 15)], layers=7)
EVERY = NeuronSet(tuple(map(range, WIDTHS)))
SETTINGS = GenerationSettings(samples=2, steps=2, guidance=3.0)
STANDALONE = """
import hashlib, json, sys, safetensors, torch
sys.modules["nemolib"] = None
from diffusers import StableDiffusionPipeline
{apply_patch}
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
torch.save([pipe(["a b"] * 2, **options).images for pipe in pipes], found)
"""


@pytest.fixture
def pipe():
    return by_hand.small_pipeline()


def weights(pipe):
    return content_hash(dict(pipe.unet.state_dict()))


@pytest.mark.parametrize("neurons", [NEURONS, EVERY, NeuronSet.empty(7)], ids=len)
@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5, 4.0])
def test_images_are_those_of_deactivated_neurons_to_the_last_bit(pipe, neurons, factor):
    before, x = weights(pipe), by_hand.start(pipe)
    options = {"latents": x, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    plain = pipe(["a b"] * 2, **options).images
    with deactivate(pipe, neurons, factor=factor):
        expected = pipe(["a b"] * 2, **options).images
    taken = prune.prune(pipe, neurons, factor=factor)
    made = pipe(["a b"] * 2, **options).images
    assert torch.equal(made, expected)
    assert torch.equal(made, plain) == (not neurons)
    prune.restore(pipe, taken)
    assert weights(pipe) == before


def test_a_factor_that_rounds_gives_the_same_up_to_rounding_and_sets_come_off_in_turn(pipe):
    before = weights(pipe)
    with deactivate(pipe, NEURONS, factor=0.3):
        expected = generate(pipe, ["a b"], settings=SETTINGS, progress=False)
    first = prune.prune(pipe, NEURONS, factor=0.3)
    assert abs(generate(pipe, ["a b"], settings=SETTINGS, progress=False).astype(int) - expected).max() <= 1
    second = prune.prune(pipe, EVERY)
    prune.restore(pipe, second)
    prune.restore(pipe, first)
    assert weights(pipe) == before


def test_the_bias_of_a_layer_goes_with_its_rows(pipe):
    layer = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_v")
    layer.bias = torch.nn.Parameter(torch.ones(16), requires_grad=False)
    prune.prune(pipe, NEURONS)
    values = layer(torch.randn(3, 16))
    assert (values[:, 15] == 0).all()
    assert (values[:, :15] != 0).all()


def test_a_set_of_another_model_is_refused(pipe):
    with pytest.raises(ValueError, match="was the set found in another model"):
        prune.prune(pipe, NeuronSet.of([(0, 99)], layers=7))


def test_a_patch_fits_its_model_alone(pipe, tmp_path):
    before, path = weights(pipe), tmp_path / "patch.safetensors"
    prune.write_patch(pipe, NEURONS, path)
    assert weights(pipe) == before
    assert path.stat().st_size < 4096
    assert prune.patch_neurons(path) == NEURONS
    taken = prune.apply_patch(pipe, path)
    patched = weights(pipe)
    with pytest.raises(ValueError, match="another model, or the patch is applied already"):
        prune.apply_patch(pipe, path)
    prune.restore(pipe, taken)
    assert weights(pipe) == before
    prune.prune(pipe, NEURONS)
    assert weights(pipe) == patched
    other = by_hand.small_pipeline(seed=1)
    kept = weights(other)
    with pytest.raises(ValueError, match="another model"):
        prune.apply_patch(other, path)
    assert weights(other) == kept


def test_a_patch_of_float32_fits_the_model_in_float16(pipe, tmp_path):
    prune.write_patch(pipe, NEURONS, tmp_path / "patch.safetensors", factor=0.5)
    expected = pipe.unet.to(torch.float16).mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight[15] * 0.5
    prune.apply_patch(pipe, tmp_path / "patch.safetensors")
    found = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
    assert torch.equal(found[15], expected)
    assert found.dtype == torch.float16


def test_what_is_no_patch_is_refused(pipe, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no patch"):
        prune.apply_patch(pipe, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="the neuron set is empty"):
        prune.write_patch(pipe, NeuronSet.empty(7), tmp_path / "patch.safetensors")


def test_folder_and_patch_work_where_there_is_no_nemolib(pipe, tmp_path):
    text = textwrap.dedent(prune.__doc__[prune.__doc__.index("    def apply_patch") :])
    script, folders = STANDALONE.format(apply_patch=text), [tmp_path / name for name in ("original", "other", "repaired")]
    x, torch_threads = by_hand.start(pipe), torch.get_num_threads()
    torch.save(x, tmp_path / "found.x")
    pipe.save_pretrained(folders[0], safe_serialization=True)
    by_hand.small_pipeline(seed=1).save_pretrained(folders[1], safe_serialization=True)
    prune.write_patch(pipe, NEURONS, tmp_path / "patch.safetensors")
    taken = prune.prune(pipe, NEURONS)
    pipe.save_pretrained(folders[2], safe_serialization=True)
    prune.restore(pipe, taken)
    command = [sys.executable, "-c", script, *folders, tmp_path / "patch.safetensors", tmp_path / "found"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path, capture_output=True, text=True)
    torch.set_num_threads(1)
    with deactivate(pipe, NEURONS):
        options = {"latents": x, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
        expected = pipe(["a b"] * 2, **options).images
    torch.set_num_threads(torch_threads)
    patched, repaired = torch.load(tmp_path / "found", weights_only=True)
    assert torch.equal(patched, expected)
    assert torch.equal(repaired, expected)


# Wanda


def columns(pipe, prompts, steps, first):
    """Return step -> weight -> norms of the inputs, [input], a sum over single rows."""
    found = [{} for _ in range(first)]
    for prompt in prompts:
        course = by_hand.sampled(pipe, by_hand.start(pipe, 1, seed=0), prompt, steps, lambda i, t, e, c: e + 3 * (c - e))
        for index, (timestep, x, *_) in zip(range(first), course, strict=False):
            for half in ("", prompt):
                for name, rows in inputs(pipe, x, timestep, half).items():
                    for row in rows:
                        found[index][name] = found[index].get(name, 0) + (row / row.norm()) ** 2
    return found


def inputs(pipe, x, timestep, prompt):
    rows = {}
    handles = []
    for name, module in pipe.unet.named_modules():
        if name.endswith(".ff.net.2"):
            keep = lambda module, args, name=name: rows.update({name: args[0].flatten(0, 1)})  # noqa: E731
            handles.append(module.register_forward_pre_hook(keep))
    by_hand.noise(pipe, x, timestep, embed(pipe, [prompt]))
    for handle in handles:
        handle.remove()
    return rows


def test_wanda_masks_by_single_weights_and_the_weights_come_back(pipe):
    sparsity, steps, first, before = 0.1, 4, 2, weights(pipe)
    options = {"sparsity": sparsity, "steps": steps, "first": first, "guidance": 3.0}
    masks = prune.wanda_masks(pipe, ["a b"], ["c"], **options)
    needed, common = (columns(pipe, [prompt], steps, first) for prompt in ("a b", "c"))
    assert len(masks) == 7
    name = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    weight = pipe.unet.get_submodule(name).weight
    for output, row in enumerate(weight.abs()):
        expected = set()
        for mine, theirs in zip(needed, common, strict=True):
            score, other = row * mine[name].sqrt(), row * theirs[name].sqrt()
            best = sorted(range(len(row)), key=lambda i: -score[i])[: int(sparsity * len(row))]  # noqa: B023
            expected |= {i for i in best if score[i] > other[i]}
        assert set(masks[f"{name}.weight"][output].nonzero().flatten().tolist()) == expected
    taken = prune.prune_weights(pipe, masks)
    assert (weight[masks[f"{name}.weight"]] == 0).all()
    assert not (weight[~masks[f"{name}.weight"]] == 0).any()
    prune.restore(pipe, taken)
    assert weights(pipe) == before
    assert by_hand.traces(pipe)[0] == []
    assert not any(mask.any() for mask in prune.wanda_masks(pipe, ["a b"], ["a b"], **options).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"sparsity": 0.0}, "sparsity is 0.0"), ({"base": ["a", "b"]}, "1 memorized and 2 base prompts")],
)
def test_wanda_refuses(pipe, changed, message):
    with pytest.raises(ValueError, match=message):
        prune.wanda_masks(pipe, **({"memorized": ["a"], "base": ["b"]} | changed))
