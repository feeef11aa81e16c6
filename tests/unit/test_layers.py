import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_processor import AttnProcessor

from nemolib.layers import (
    check_neurons_act,
    collect_activations,
    collect_outputs,
    cross_attention_layers,
    deactivate,
    down_convolutions,
    sample_of_each,
    scale_neurons,
    scale_outputs,
    spread,
    value_activations,
    value_layer_hash,
    value_layers,
)
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from tests.random_pipeline import WIDTHS, random_unet

FIRST = NeuronSet(((0, 2), (), (5,), (), (), (), (1,)))
SECOND = NeuronSet(((), (1,), (), (), (3,), (), (0,)))
LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
VALUE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def hooks_of(pipe):
    return sum(len(module._forward_hooks) for module in pipe.unet.modules())


def noise(pipe, latents=LATENTS, prompts=("a", "b c")):
    with torch.no_grad():
        return pipe.unet(latents, 961, embed(pipe, prompts)).sample


def values(pipe, prompts=("a", "b c")):
    """Return the output of every value layer for prompts."""
    embeddings = embed(pipe, prompts)
    with torch.no_grad():
        return [layer.module(embeddings) for layer in value_layers(pipe.unet)]


# Which layers there are


def test_layers_that_are_replaced_are_noticed():
    unet = random_unet()
    before = value_layers(unet)
    assert value_layers(unet) is before
    parent = unet.get_submodule(before[2].name.rpartition(".")[0])
    parent.to_v = torch.nn.Linear(parent.to_v.in_features, 5)
    after = value_layers(unet)
    assert after[2].module is parent.to_v
    assert after[2].width == 5
    unet.mid_block = None
    assert len(value_layers(unet)) == 6


def test_layers_are_numbered_as_an_image_passes_them():
    """In a UNet with cross-attention in its up blocks, as Stable Diffusion's: 16 blocks, of which 7 are searched."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel()
    for part in ("value", "key"):
        layers = cross_attention_layers(unet, part)
        assert [layer.number for layer in layers] == list(range(1, 17))
        assert [layer.block for layer in layers] == ["down"] * 6 + ["mid"] + ["up"] * 9
        assert {(layer.part, layer.name[-5:]) for layer in layers} == {(part, ".to_" + part[0])}
    assert [layer.name for layer in cross_attention_layers(unet, "value")[:7]] == [x.name for x in value_layers(unet)]
    convolutions = down_convolutions(unet)
    assert [layer.number for layer in convolutions] == list(range(1, 17))
    assert [layer.name for layer in convolutions[:3]] == [
        f"down_blocks.0.resnets.{place}" for place in ("0.conv1", "0.conv2", "1.conv1")
    ]


def test_models_without_such_layers():
    blind = random_unet(cross_attention=False)
    with pytest.raises(ValueError, match="UNet2DConditionModel has no cross-attention value layers"):
        value_layers(blind)


def test_layers_are_spread_from_the_first_to_the_last(random_pipe):
    layers = down_convolutions(random_pipe.unet)
    assert spread(layers, 12) == spread(layers, 99) == layers
    assert [layer.number for layer in spread(layers, 4)] == [1, 5, 8, 12]
    assert [layer.number for layer in spread(layers, 1)] == [1]


# What is read


def test_embeddings_have_three_axes(random_pipe):
    with pytest.raises(ValueError, match=r"shape \(12, 16\); expected \[prompt, token, feature\]"):
        value_activations(random_pipe.unet, torch.zeros(12, 16))


def test_hash_tells_models_apart_but_not_precisions(random_pipe):
    unet = copy.deepcopy(random_pipe.unet)
    assert value_layer_hash(unet) == value_layer_hash(random_pipe.unet)
    assert value_layer_hash(unet.half()) == value_layer_hash(random_pipe.unet)
    with torch.no_grad():
        value_layers(unet)[6].module.weight[0, 0] += 1
    assert value_layer_hash(unet) != value_layer_hash(random_pipe.unet)


def test_outputs_are_collected_pass_by_pass(random_pipe):
    block = "down_blocks.0.attentions.0"
    names = [block, f"{block}.transformer_blocks.0.attn2"]
    with collect_outputs(random_pipe.unet, names) as found, collect_activations(random_pipe.unet) as collected:
        noise(random_pipe)
        noise(random_pipe, LATENTS.flip(0))
    assert [len(outputs) for outputs in collected] == [2] * 7
    assert all(torch.equal(outputs[0], plain) for outputs, plain in zip(collected, values(random_pipe), strict=True))
    # Of a module that returns several tensors the first.
    assert [tuple(found[name][0].shape) for name in names] == [(2, 8, 16, 16), (2, 256, 8)]
    assert not torch.equal(*found[block])


# What is changed


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.0])
def test_values_are_scaled_and_others_stay(random_pipe, factor):
    plain = values(random_pipe)
    with scale_neurons(random_pipe.unet, FIRST, factor=factor):
        scaled = values(random_pipe)
    for layer, (before, after) in enumerate(zip(plain, scaled, strict=True)):
        chosen = list(FIRST.layers[layer])
        others = [neuron for neuron in range(WIDTHS[layer]) if neuron not in chosen]
        assert torch.equal(after[..., chosen], before[..., chosen] * factor)
        assert torch.equal(after[..., others], before[..., others])


def test_contexts_nest_and_leave_the_hooks_of_others(random_pipe):
    layer = value_layers(random_pipe.unet)[0].module
    with layer.register_forward_hook(lambda module, args, output: None):
        with scale_neurons(random_pipe.unet, FIRST):
            with scale_neurons(random_pipe.unet, SECOND):
                nested = values(random_pipe)
            assert hooks_of(random_pipe) == 1 + sum(count > 0 for count in FIRST.counts)
        assert hooks_of(random_pipe) == 1
    with scale_neurons(random_pipe.unet, FIRST | SECOND):
        joint = values(random_pipe)
    assert all(torch.equal(a, b) for a, b in zip(nested, joint, strict=True))


# The model stays as it was


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    ("context", "hooks"),
    [
        (lambda pipe: deactivate(pipe, FIRST), 3),
        (lambda pipe: scale_neurons(pipe.unet, [FIRST, SECOND]), 5),
        (lambda pipe: scale_outputs(pipe.unet, {KEY: torch.zeros(1, 1, 1)}), 1),
        (lambda pipe: collect_activations(pipe.unet), 7),
        (lambda pipe: collect_outputs(pipe.unet, [VALUE, KEY]), 2),
    ],
)
def test_no_hook_is_left_whatever_happens(random_pipe, error, context, hooks):
    def fail():
        assert hooks_of(random_pipe) == hooks
        raise error

    with pytest.raises(error), context(random_pipe):
        fail()
    assert hooks_of(random_pipe) == 0


@pytest.mark.parametrize(
    ("context", "error", "words"),
    [
        (lambda unet: scale_neurons(unet, NeuronSet(((0,), (), (), (), (), (), (99,)))), ValueError, "neuron 99 of layer 6"),
        (lambda unet: scale_neurons(unet, NeuronSet.empty(2)), ValueError, "has 2 layers, the model has 7"),
        (lambda unet: scale_neurons(unet, []), TypeError, "expected a NeuronSet or a list of at least one"),
        (lambda unet: scale_neurons(unet, [(0, 1)]), TypeError, "expected a NeuronSet or a list of at least one"),
        (lambda unet: collect_outputs(unet, [VALUE, "nowhere"]), AttributeError, "has no attribute `nowhere`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_leaves_no_hook(random_pipe, context, error, words):
    with pytest.raises(error, match=words), context(random_pipe.unet):
        pytest.fail("the context was entered")
    assert hooks_of(random_pipe) == 0


# Models that are wrapped, and neurons that do not act


@pytest.fixture
def other(random_pipe):
    """Return a pipeline whose UNet is a copy, to be changed."""
    pipe = copy.copy(random_pipe)
    pipe.unet = copy.deepcopy(random_pipe.unet)
    return pipe


def compiled(unet):
    unet = torch.compile(unet, backend="eager")
    unet(LATENTS, 961, torch.zeros(2, 12, 16))
    return unet


def quantized(unet):
    with warnings.catch_warnings(action="ignore"):
        return torch.ao.quantization.quantize_dynamic(unet, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("wrap", [compiled, lambda unet: cpu_offload(unet, torch.device("cpu")), quantized])
def test_layers_behind_wrappers_are_found_and_act(random_pipe, other, wrap):
    other.unet = wrap(other.unet)
    assert [layer.name for layer in value_layers(other.unet)] == [
        layer.name for layer in value_layers(random_pipe.unet)
    ]
    same = value_layer_hash(other.unet) == value_layer_hash(random_pipe.unet)
    assert same == (wrap is not quantized)
    tolerance = 1e-5 if same else 0.1
    for neurons in (NeuronSet.empty(7), FIRST):
        with deactivate(other, neurons), deactivate(random_pipe, neurons):
            torch.testing.assert_close(noise(other), noise(random_pipe), atol=tolerance, rtol=tolerance)
            for found, plain in zip(values(other), values(random_pipe), strict=True):
                torch.testing.assert_close(found, plain, atol=10 * tolerance, rtol=tolerance)


def test_weights_that_are_cast_layer_by_layer(other):
    other.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert next(other.unet.parameters()).dtype.itemsize == 1
    assert all(layer.dtype == torch.float32 and layer.isfinite().all() for layer in values(other))
    plain = noise(other)
    with deactivate(other, FIRST):
        assert not torch.equal(noise(other), plain)
    assert torch.equal(noise(other), plain)


def test_a_model_inside_a_parallel_one_is_named(random_pipe):
    with pytest.raises(ValueError, match=r"DataParallel has no cross-attention value layers.*use its \.module"):
        value_layers(torch.nn.DataParallel(random_pipe.unet))


def test_neurons_that_do_not_act_are_noticed_by_one_pass(other):
    passes = []
    other.unet.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    for _ in range(2):
        check_neurons_act(other.unet)
        assert passes == [9]
    other.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match=r"neurons of down.*to_v \(7 of 7 .* do not act.*unfuse_qkv_projections\(\)"):
        check_neurons_act(other.unet)
    other.unfuse_qkv_projections(vae=False)
    with deactivate(other, FIRST):
        pass
    assert passes == [9] * 2


def test_a_layer_that_attention_does_not_call_is_named(other):
    attention = other.unet.get_submodule(KEY.removesuffix(".to_k"))
    attention.set_processor(AttnProcessor())
    layer = attention.to_v
    layer.forward, attention.to_v = layer.forward, torch.nn.Linear(16, 16)
    attention.to_v.forward = lambda text: torch.zeros(len(text), text.shape[1], 16)
    with pytest.raises(ValueError, match=r"neurons of mid_block.*to_v \(1 of 7 value layers\) do not act"):
        check_neurons_act(other.unet)


@pytest.mark.parametrize(
    ("batch", "samples", "guided", "rows"),
    [
        (4, 2, None, [0, 1, 0, 1]),
        (4, 2, True, [0, 1, 0, 1]),
        (4, 2, False, [0, 0, 1, 1]),
        (8, 2, True, [0, 0, 1, 1] * 2),
        (3, 2, False, "2 samples were prepared, but the batch has 3"),
        (6, 2, True, "2 samples were prepared, but the batch has 6"),
        (2, 3, None, "3 samples were prepared, but the batch has 2"),
    ],
)
def test_which_sample_a_row_belongs_to(batch, samples, guided, rows):
    known = None if guided is None else lambda: guided
    if isinstance(rows, list):
        assert sample_of_each(batch, samples, known).tolist() == rows
    else:
        with pytest.raises(ValueError, match=rows):
            sample_of_each(batch, samples, known)
