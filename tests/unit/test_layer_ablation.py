import numpy as np
import pytest
import torch

from nemolib import layer_ablation
from nemolib.generation import generate
from nemolib.hooks import scale_neurons
from nemolib.layer_ablation import (
    BlockedChannels,
    ZeroedLayers,
    block_channels,
    collect_outputs,
    cross_attention_layers,
    down_convolutions,
    spread,
    switched_off,
    zero_layers,
)
from nemolib.neurons import NeuronSet
from nemolib.provenance import content_hash
from nemolib.settings import GenerationSettings
from nemolib.value_layers import value_layers
from tests.random_pipeline import WIDTHS, random_pipeline, random_unet

SETTINGS = GenerationSettings(seed=2, samples=2, steps=2, guidance=3.0, batch_size=4)
VALUE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "down_blocks.1.resnets.0.conv2"
MITIGATIONS = [ZeroedLayers((VALUE,)), ZeroedLayers((KEY,)), BlockedChannels(CONVOLUTION)]
EACH = pytest.mark.parametrize("mitigation", MITIGATIONS, ids=["value", "key", "convolution"])


@pytest.fixture(scope="module")
def up_unet():
    """Return a UNet with cross-attention in its up blocks, as Stable Diffusion's."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,), layers_per_block=2, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip


def forward(unet, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, unet.config.sample_size, unet.config.sample_size, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return unet(latents, 500, text).sample


def hooks(unet):
    return [name for name, module in unet.named_modules() if module._forward_hooks or module._forward_pre_hooks]


def images(pipe, prompts, mitigation=None):
    return generate(pipe, prompts, settings=SETTINGS, mitigation=mitigation, progress=False)


# Which layers there are


def test_layers_are_numbered_as_an_image_passes_them(up_unet):
    for part in ("value", "key"):
        layers = cross_attention_layers(up_unet, part)
        assert [layer.number for layer in layers] == [1, 2, 3, 4, 5, 6]
        assert [layer.block for layer in layers] == ["down", "down", "mid", "up", "up", "up"]
        assert {layer.name[-5:] for layer in layers} == {".to_" + part[0]}
        assert {layer.part for layer in layers} == {part}
    assert cross_attention_layers(up_unet, "value")[2].name == KEY[:-1] + "v"


def test_the_first_value_layers_are_those_of_the_search(random_pipe):
    found = [layer.name for layer in cross_attention_layers(random_pipe.unet, "value")]
    assert found == [layer.name for layer in value_layers(random_pipe.unet)]


def test_convolutions_are_those_of_the_down_blocks(random_pipe):
    layers = down_convolutions(random_pipe.unet)
    assert [layer.number for layer in layers] == list(range(1, 13))
    assert [layer.name for layer in layers[:3]] == [
        "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv2", "down_blocks.0.resnets.1.conv1",
    ]  # fmt: skip
    assert {layer.block for layer in layers} == {"down"}


def test_stable_diffusion_has_sixteen_of_each():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel()
    blocks = [layer.block for layer in cross_attention_layers(unet, "key")]
    assert [blocks.count(block) for block in ("down", "mid", "up")] == [6, 1, 9]
    assert len(down_convolutions(unet)) == 16


def test_models_without_such_layers():
    with pytest.raises(ValueError, match="has no value layers of cross-attention"):
        cross_attention_layers(random_unet(cross_attention=False), "value")
    with pytest.raises(ValueError, match="unknown part 'query'; known: value, key"):
        cross_attention_layers(random_unet(), "query")
    with pytest.raises(ValueError, match="has no convolutions"):
        down_convolutions(torch.nn.Linear(1, 1))


def test_layers_are_spread_from_the_first_to_the_last(random_pipe):
    layers = down_convolutions(random_pipe.unet)
    assert spread(layers, 12) == spread(layers, 99) == layers
    assert [layer.number for layer in spread(layers, 4)] == [1, 5, 8, 12]
    assert [layer.number for layer in spread(layers, 1)] == [1]
    with pytest.raises(ValueError, match="at most 0 layers"):
        spread(layers, 0)


# What is done to them


def test_values_of_zero_are_all_neurons_deactivated(random_pipe):
    layers = cross_attention_layers(random_pipe.unet, "value")
    for place in (0, 6):
        whole = NeuronSet.of([(place, neuron) for neuron in range(WIDTHS[place])], layers=7)
        with zero_layers(random_pipe.unet, [layers[place].name]):
            zeroed = forward(random_pipe.unet)
        with scale_neurons(random_pipe.unet, whole):
            assert torch.equal(forward(random_pipe.unet), zeroed)
        assert not torch.equal(forward(random_pipe.unet), zeroed)


def test_without_any_values_the_text_says_nothing(random_pipe):
    every = ZeroedLayers(tuple(layer.name for layer in cross_attention_layers(random_pipe.unet, "value")))
    first, second = images(random_pipe, ["a fox", "the sea"], every)
    assert np.abs(first.astype(int) - second).max() <= 1
    first, second = images(random_pipe, ["a fox", "the sea"])
    assert np.abs(first.astype(int) - second).max() > 1


def test_keys_of_zero_give_every_token_the_same_attention(random_pipe):
    attention = random_pipe.unet.get_submodule(KEY.removesuffix(".to_k"))
    generator = torch.Generator().manual_seed(0)
    positions, text = torch.randn(1, 4, 16, generator=generator), torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad(), zero_layers(random_pipe.unet, [KEY]):
        found = attention(positions, text)
    with torch.no_grad():
        uniform = attention.to_out[0](attention.to_v(text).mean(dim=1, keepdim=True)).expand_as(found)
    torch.testing.assert_close(found, uniform, atol=1e-5, rtol=1e-5)


def test_blocked_channels_are_zero_and_no_others(random_pipe):
    name = CONVOLUTION
    with block_channels(random_pipe.unet, name, [0, 3]), collect_outputs(random_pipe.unet, [name]) as found:
        forward(random_pipe.unet)
    (output,) = found[name]
    silent = (output == 0).all(dim=3).all(dim=2).all(dim=0)
    assert silent.nonzero().flatten().tolist() == [0, 3]
    for channels, words in (([16], "has no channel 16; allowed are 0 to 15"), ([-1], "no channel -1")):
        with pytest.raises(ValueError, match=words), block_channels(random_pipe.unet, name, channels):
            pass
    with pytest.raises(ValueError, match="is a Linear; channels are those of a Conv2d"):
        BlockedChannels(VALUE).check(random_pipe)


def test_outputs_are_collected_pass_by_pass(random_pipe):
    block = "down_blocks.0.attentions.0"
    names = [block, f"{block}.transformer_blocks.0.attn2"]
    with collect_outputs(random_pipe.unet, names) as found:
        forward(random_pipe.unet)
        forward(random_pipe.unet, seed=1)
    assert [len(found[name]) for name in names] == [2, 2]
    assert found[block][0].shape == (2, 8, 16, 16)
    assert found[names[1]][0].shape == (2, 256, 8)
    assert not torch.equal(*found[block])
    with pytest.raises(ValueError, match="has no module 'nowhere'"), collect_outputs(random_pipe.unet, ["nowhere"]):
        pass


def test_a_share_of_the_channels():
    half = BlockedChannels(CONVOLUTION)
    assert len(half.channels(16)) == 8
    assert half.channels(16) == BlockedChannels(CONVOLUTION).channels(16)
    assert set(BlockedChannels(CONVOLUTION, share=0.25).channels(16)) < set(half.channels(16))
    assert BlockedChannels(CONVOLUTION, share=1).channels(16) == tuple(range(16))
    others = {BlockedChannels(CONVOLUTION, seed=seed).channels(64) for seed in range(4)}
    others |= {BlockedChannels("down_blocks.0.resnets.0.conv1").channels(64)}
    assert len(others) == 5
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"share is {share}"):
            BlockedChannels(CONVOLUTION, share=share)


# As mitigations


@EACH
def test_images_change_and_the_model_does_not(random_pipe, mitigation):
    plain = images(random_pipe, ["a", "b c"])
    weights = content_hash(dict(random_pipe.unet.state_dict()))
    # Attention of random keys is nearly uniform, so that the images differ by little; but in the same batch they are equal.
    assert not np.array_equal(images(random_pipe, ["a", "b c"], mitigation), plain)
    assert np.array_equal(images(random_pipe, ["a", "b c"]), plain)
    assert content_hash(dict(random_pipe.unet.state_dict())) == weights


@EACH
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_no_hook_stays_whatever_happens(random_pipe, mitigation, failure):
    def run():
        with mitigation.applied(random_pipe, ["a"]):
            assert hooks(random_pipe.unet)
            raise failure("stop")

    with pytest.raises(failure, match="stop"):
        run()
    assert not hooks(random_pipe.unet)


def test_identity_tells_mitigations_and_code_apart(monkeypatch):
    different = [
        *MITIGATIONS,
        ZeroedLayers((VALUE, KEY)),
        BlockedChannels(CONVOLUTION, share=0.25),
        BlockedChannels(CONVOLUTION, seed=1),
    ]
    keys = {content_hash(item.identity("a")) for item in different}
    assert len(keys) == len(different)
    assert ZeroedLayers((KEY, VALUE, KEY)).identity("a") == ZeroedLayers((VALUE, KEY)).identity("b")
    assert ZeroedLayers(()).identity("a") == BlockedChannels(CONVOLUTION, share=0).identity("a") == []
    monkeypatch.setattr(layer_ablation, "_code", lambda: "other code")
    assert not keys & {content_hash(item.identity("a")) for item in different}


def test_layers_of_another_model_are_refused():
    pipe = random_pipeline()
    for mitigation, words in (
        (
            ZeroedLayers(("up_blocks.1.attentions.0.attn2.to_v",)),
            "is no key or value layer of cross-attention, such as",
        ),
        (ZeroedLayers((CONVOLUTION,)), "is no key or value layer"),
        (BlockedChannels("down_blocks.9.conv1"), "has no module 'down_blocks.9.conv1'"),
    ):
        with pytest.raises(ValueError, match=words), mitigation.applied(pipe, ["a"]):
            pass
    assert not hooks(pipe.unet)
    with pytest.raises(TypeError, match="one address was given"):
        ZeroedLayers(VALUE)


def test_each_part_has_its_intervention(random_pipe):
    value, key = (cross_attention_layers(random_pipe.unet, part)[0] for part in ("value", "key"))
    assert switched_off(value) == ZeroedLayers((VALUE,))
    assert switched_off(key).layers == (VALUE[:-1] + "k",)
    convolution = down_convolutions(random_pipe.unet)[0]
    assert switched_off(convolution, share=0.25, seed=3) == BlockedChannels(convolution.name, 0.25, 3)
    assert [item.name for item in MITIGATIONS] == ["1 zeroed layer"] * 2 + ["50% of the channels blocked"]
