"""The data of the tiny world, and the pieces of its training that can be checked by hand."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from nemolib import paths
from nemolib.encoders import to_pixels
from tools.world import captions, clip, descriptor, render, unet
from tools.world.settings import DataSettings, DescriptorSettings, UNetSettings, WorldSettings

NAMES = [*captions.LADDER, "otter", "rocket", "dog", "cat"]


def test_planted_captions_are_distinct_and_name_an_emoji():
    assert len(captions.VERBATIM) == len(captions.TEMPLATE) == 40
    assert len({*captions.VERBATIM, *captions.TEMPLATE}) == 80
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
    assert rungs.to_dict() == dict.fromkeys([1, 2, 4, 8, 16, 32, 64, 128], 4)
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
    one, every = (nn.Linear(1, 16, bias=False).requires_grad_(False) for _ in range(2))
    nn.init.ones_(every.weight)
    nn.init.zeros_(one.weight)[3] = 2.0
    for layers, expected in (([one], 0.25), ([every], 1.0), ([one, every], 0.625)):
        assert float(unet.value_density(layers, torch.ones(2, 5, 1))) == pytest.approx(expected, abs=1e-4)


def test_noisy_timesteps_are_drawn_more_often_and_weigh_more():
    settings = UNetSettings()
    drawn = unet.draw_timesteps(settings, 20_000, np.random.default_rng(0))
    expected = settings.noisy_share + (1 - settings.noisy_share) * (1000 - settings.noisy_from) / 1000
    assert float((drawn >= settings.noisy_from).float().mean()) == pytest.approx(expected, abs=0.02)
    weights = unet.loss_weights(unet.build_scheduler().alphas_cumprod, limit=settings.weight_limit)
    assert (weights.diff() >= 0).all()
    assert float(weights.max()) <= settings.weight_limit


def test_captions_give_the_same_tokenizer_in_every_process(tmp_path):
    """Many pairs are equally frequent here, and which of them become tokens must not be chance."""
    code = (
        "import sys; from pathlib import Path; from tools.world import captions, clip\n"
        "words = [*captions.VERBATIM, *captions.TEMPLATE]\n"
        "clip.train_tokenizer(words, vocabulary=400, tokens=16, folder=Path(sys.argv[1]))"
    )
    for name in "ab":
        subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=paths.ROOT, check=True, capture_output=True)
    first, second = (CLIPTokenizer.from_pretrained(tmp_path / name) for name in "ab")
    assert first.get_vocab() == second.get_vocab()
    caption = "the Otter weekly  podcast cover"
    assert first(caption) == second(caption)
    assert first.decode(first(caption).input_ids, skip_special_tokens=True) == "the otter weekly podcast cover"
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_only_images_of_another_size_are_resized():
    options = {"input_data_format": "channels_last", "return_tensors": "pt"}
    images, large = (
        np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8),
        np.full((48, 24, 3), 255, np.uint8),
    )
    same, shrunk = (clip.preprocessing(16)(images=list(given), **options).pixel_values for given in (images, [large]))
    assert torch.allclose(same, to_pixels(images), atol=1e-6)
    assert torch.allclose(shrunk, torch.ones(1, 3, 16, 16))


def test_copies_of_one_image_are_no_negatives_of_each_other():
    settings = DescriptorSettings(entropy_weight=0.0)
    features = torch.eye(4)[[0, 1, 0, 1]]  # two images, two views each, views agree
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    alike = features[[0, 0, 0, 0]]
    apart, confused, same = (
        float(descriptor.copy_loss(views, torch.tensor(images), nothing, settings)["contrast"])
        for views, images in ((features, [0, 1]), (alike, [0, 1]), (alike, [5, 5]))
    )
    assert apart == pytest.approx(0.0, abs=1e-4)
    assert confused > 1.0
    assert same == pytest.approx(0.0, abs=1e-4)


def test_hashes_tell_settings_apart_by_stage():
    small, full = WorldSettings.small(), WorldSettings()
    assert small.hash() != full.hash()
    assert small.hash("unet") != full.hash("unet")
    assert full.hash("unet") == WorldSettings().hash("unet")
