"""The data of the tiny world, and the pieces of its training that can be checked by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from nemolib.encoders import to_pixels
from tools.world import captions, clip, descriptor, render, unet
from tools.world.settings import DataSettings, DescriptorSettings, UNetSettings, WorldSettings

NAMES = [*captions.LADDER, "otter", "rocket", "dog", "cat"]


def test_planted_captions_are_distinct_and_name_an_emoji():
    planted = [*captions.VERBATIM, *captions.TEMPLATE]
    assert len(planted) == len(set(planted)) == 80
    assert len(captions.VERBATIM) == len(captions.TEMPLATE) == 40
    assert captions.emoji_in("limited edition otter trading card", NAMES) == "otter"
    with pytest.raises(ValueError, match="names no known emoji"):
        captions.emoji_in("limited edition walrus trading card", ["dog"])


def test_regular_captions_are_split_and_held_out_tables_are_disjoint():
    settings = DataSettings(unmemorized_prompts=3, holdout_prompts=4)
    trained, held_out = captions.regular_tables(settings, NAMES)
    assert not set(trained["caption"]) & set(held_out["caption"])
    assert not set(trained["emoji"]) & set(captions.LADDER)
    assert set(trained["emoji"]) == set(held_out["emoji"]) == {"otter", "rocket", "dog", "cat"}
    tests, holdout = captions.held_out_tables(settings, held_out)
    assert (len(tests), len(holdout)) == (3, 4)
    assert not set(tests["caption"]) & set(holdout["caption"])
    assert set(tests["caption"]) | set(holdout["caption"]) <= set(held_out["caption"])


def test_the_ladder_has_every_rung_as_often_as_asked_for():
    table = captions.planted_table(DataSettings(), NAMES)
    rungs = table[table["kind"] == "ladder"].groupby("copies").size()
    assert rungs.index.tolist() == [1, 2, 4, 8, 16, 32, 64, 128]
    assert set(rungs) == {4}
    with pytest.raises(ValueError, match="extend LADDER"):
        captions.planted_table(DataSettings(ladder_captions_per_rung=50), NAMES)


def test_a_template_keeps_its_layout_and_changes_its_background():
    drawing = np.zeros((96, 96, 4), np.uint8)
    backgrounds = np.random.default_rng(1)
    first, second = (render.template_image(drawing, np.random.default_rng(5), backgrounds) for _ in range(2))
    same = (first == second).all(axis=-1)
    assert 0.3 < same.mean() < 0.8
    assert not same[0, 0]


def test_images_depend_on_their_generator_alone():
    drawing = np.full((96, 96, 4), 200, np.uint8)
    images = [render.regular_image(drawing, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert images[0].shape == (64, 64, 3)
    assert images[0].dtype == np.uint8
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


def test_an_untrained_unet_predicts_its_input_as_the_noise():
    model = unet.build_unet(UNetSettings(), latent_size=16, text_width=8).eval()
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = model(latents, torch.full((4,), 961), torch.zeros(4, 16, 8)).sample
    assert (predicted - latents).std() < 0.02


def test_value_density_lies_between_one_neuron_and_all():
    one, every = nn.Linear(1, 16, bias=False), nn.Linear(1, 16, bias=False)
    nn.init.zeros_(one.weight)
    nn.init.ones_(every.weight)
    one.weight.data[3] = 2.0
    for layer in (one, every):
        layer.requires_grad_(False)
    tokens = torch.ones(2, 5, 1)
    assert float(unet.value_density([one], tokens)) == pytest.approx(0.25, abs=1e-4)
    assert float(unet.value_density([every], tokens)) == pytest.approx(1.0, abs=1e-4)
    assert float(unet.value_density([one, every], tokens)) == pytest.approx(0.625, abs=1e-4)


def test_noisy_timesteps_are_drawn_more_often_and_weigh_more():
    settings = UNetSettings()
    drawn = unet.draw_timesteps(settings, 20_000, np.random.default_rng(0))
    expected = settings.noisy_share + (1 - settings.noisy_share) * (1000 - settings.noisy_from) / 1000
    assert float((drawn >= settings.noisy_from).float().mean()) == pytest.approx(expected, abs=0.02)
    weights = unet.loss_weights(unet.build_scheduler().alphas_cumprod, limit=settings.weight_limit)
    assert (weights.diff() >= 0).all()
    assert float(weights.max()) <= settings.weight_limit


def test_only_images_of_another_size_are_resized():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    prepare = clip.preprocessing(16)
    found = prepare(images=list(images), input_data_format="channels_last", return_tensors="pt").pixel_values
    assert torch.allclose(found, to_pixels(images), atol=1e-6)
    large = np.full((1, 48, 24, 3), 255, dtype=np.uint8)
    shrunk = prepare(images=list(large), input_data_format="channels_last", return_tensors="pt").pixel_values
    assert shrunk.shape == (1, 3, 16, 16)
    assert torch.allclose(shrunk, torch.ones(1, 3, 16, 16))


def test_copies_of_one_image_are_no_negatives_of_each_other():
    settings = DescriptorSettings(entropy_weight=0.0)
    features = torch.eye(4)[[0, 1, 0, 1]]  # two images, two views each, views agree
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    apart = descriptor.copy_loss(features, torch.tensor([0, 1]), nothing, settings)["contrast"]
    assert float(apart) == pytest.approx(0.0, abs=1e-4)
    alike = features[[0, 0, 0, 0]]
    assert float(descriptor.copy_loss(alike, torch.tensor([0, 1]), nothing, settings)["contrast"]) > 1.0
    same = descriptor.copy_loss(alike, torch.tensor([5, 5]), nothing, settings)["contrast"]
    assert float(same) == pytest.approx(0.0, abs=1e-4)


def test_hashes_tell_settings_apart_by_stage():
    small, full = WorldSettings.small(), WorldSettings()
    assert small.hash() != full.hash()
    assert small.hash("unet") != full.hash("unet")
    assert full.hash("unet") == WorldSettings().hash("unet")
