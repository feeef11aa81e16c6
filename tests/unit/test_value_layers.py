import copy

import pytest
import torch

from nemolib.pipeline import embed
from nemolib.value_layers import value_activations, value_layer_hash, value_layers, widths
from tests.random_pipeline import WIDTHS, random_unet


def test_order_and_names(random_pipe):
    layers = value_layers(random_pipe.unet)
    assert [layer.index for layer in layers] == list(range(7))
    assert [layer.name.split(".attentions")[0] for layer in layers] == [
        "down_blocks.0",
        "down_blocks.0",
        "down_blocks.1",
        "down_blocks.1",
        "down_blocks.2",
        "down_blocks.2",
        "mid_block",
    ]
    assert widths(random_pipe.unet) == WIDTHS
    assert all(random_pipe.unet.get_submodule(layer.name) is layer.module for layer in layers)


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


def test_a_model_without_value_layers():
    with pytest.raises(ValueError, match="UNet2DConditionModel has no cross-attention value layers"):
        value_layers(random_unet(cross_attention=False))


def test_activations_are_token_means_of_absolute_values(random_pipe):
    embeddings = embed(random_pipe, ["a", "b c"])
    activations = value_activations(random_pipe.unet, embeddings)
    assert [tuple(layer.shape) for layer in activations] == [(2, width) for width in WIDTHS]
    weight = value_layers(random_pipe.unet)[3].module.weight
    torch.testing.assert_close(activations[3], (embeddings @ weight.T).abs().mean(dim=1))


def test_activations_need_three_axes(random_pipe):
    with pytest.raises(ValueError, match=r"shape \(12, 16\); expected \[prompt, token, feature\]"):
        value_activations(random_pipe.unet, torch.zeros(12, 16))


def test_hash_tells_models_apart_but_not_precisions(random_pipe):
    unet = copy.deepcopy(random_pipe.unet)
    assert value_layer_hash(unet) == value_layer_hash(random_pipe.unet)
    assert value_layer_hash(unet.half()) == value_layer_hash(random_pipe.unet)
    with torch.no_grad():
        value_layers(unet)[6].module.weight[0, 0] += 1
    assert value_layer_hash(unet) != value_layer_hash(random_pipe.unet)
