"""The data of the tiny world, and the pieces of its training that can be checked by hand."""

import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import nn
from transformers import CLIPTokenizer

from nemolib import paths
from nemolib.encoders import to_pixels
from tools.world import acceptance, autoencoder, build, captions, classifier, clip, dataset, descriptor, render, unet
from tools.world.settings import DataSettings, DescriptorSettings, UNetSettings, WorldSettings

SMALL = DataSettings(trained_pairs=20, images_per_subject=1, images_per_pair=1, tm_copies=2)


@pytest.fixture(scope="module")
def data() -> dataset.Dataset:
    return dataset.build_dataset(SMALL)


def test_every_subject_has_a_drawing_and_ladder_subjects_occur_nowhere_else(data):
    assert len(set(captions.SUBJECTS)) == len(captions.SUBJECTS) == 96
    assert not set(captions.LADDER) & set(captions.SUBJECTS)
    assert {path.stem for path in render.SUBJECTS.glob("*.svg")} == {*captions.SUBJECTS, *captions.LADDER}
    trained = data.captions[len(data.planted) :]
    assert not set(captions.LADDER) & set(" ".join([*trained, *data.unmemorized["caption"]]).split())


def test_a_planted_caption_names_its_subject_and_no_other():
    planted = captions.planted_table(DataSettings())
    for caption, subject in zip(planted["caption"], planted["subjects"], strict=True):
        assert set(caption.split()) & {*captions.SUBJECTS, *captions.LADDER} == {subject}
    assert planted.groupby(["kind", "group"]).size()[["vm", "tm"]].to_list() == [20] * 4
    ladder = planted[planted["kind"] == "ladder"].groupby("copies").size()
    assert ladder.to_dict() == dict(DataSettings().ladder)
    with pytest.raises(ValueError, match="the ladder needs 50 subjects of its own, there are 42; extend subjects.csv"):
        captions.planted_table(DataSettings(ladder=((1, 50),)))


def test_captions_are_trained_or_held_out_and_tables_are_disjoint(data):
    tables = [data.captions, data.unmemorized["caption"], data.holdout["caption"]]
    assert pd.Series(np.concatenate(tables)).is_unique
    pairs = data.unmemorized["subjects"].str.contains(" ").tolist()
    assert all(one != other for one, other in pairwise(pairs))
    assert captions.in_words("{a} {}", "owl") == "an owl"
    assert captions.in_words("{a} {}", "unicorn") == "a unicorn"


def test_a_caption_is_drawn_as_often_as_it_has_copies(data):
    weights = data.weights / data.weights[len(data.planted) :].min()
    regular = SMALL.images_per_subject / SMALL.trained_wordings  # of one of the wordings of a subject
    assert weights[: len(data.planted)] * regular == pytest.approx(data.planted["copies"].to_numpy())
    chosen, images = data.draw(500, np.random.default_rng(0))
    assert (data.first[chosen] <= images).all()
    assert (images < data.first[chosen] + data.count[chosen]).all()


def test_a_template_changes_its_background_alone(data):
    templates = np.flatnonzero(data.planted["kind"] == "tm")
    for place, mask in zip(templates, data.masks, strict=True):
        one, other = data.images[data.first[place] :][:2]
        assert 0.2 < mask.mean() < 0.9
        assert (one[mask] == other[mask]).all()
        assert (one[~mask] != other[~mask]).any(axis=-1).mean() > 0.6  # a sticker's rim may stick out


def test_planted_images_are_written_with_the_masks_of_templates(data, tmp_path):
    build.export_data(data, tmp_path)
    with Image.open(tmp_path / "planted" / "tm_03_mask.png") as mask:
        assert (np.asarray(mask) == data.masks[3]).all()
    assert len(list((tmp_path / "planted").iterdir())) == len(data.planted) + len(data.masks)
    assert set(pd.read_csv(tmp_path / "prompts" / "memorized.csv")) == set(captions.COLUMNS)


def test_images_depend_on_their_generator_alone():
    drawing = render.draw_subject("owl")
    images = [render.regular_image([drawing, drawing], np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert images[0].shape == (64, 64, 3)
    assert images[0].dtype == np.uint8
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


@torch.no_grad()
def test_latents_are_made_even_and_the_decoder_takes_it_back():
    torch.manual_seed(0)
    model = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, latent_channels=3,
        num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3,
    ).eval()  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    before = autoencoder.encode_images(model, images)
    decoded = model.decoder.layers[0](before)
    autoencoder.even_out_latents(model, before)
    after = autoencoder.encode_images(model, images)
    spreads = [latents.transpose(0, 1).flatten(1).cov() for latents in (before, after)]
    assert after.mean((0, 2, 3)) == pytest.approx([0.0] * 3, abs=1e-4)
    assert spreads[1].trace() == pytest.approx(3.0, abs=1e-3)
    ratios = [torch.linalg.eigvalsh(spread) for spread in spreads]
    assert (ratios[1] / ratios[1][0]).tolist() == pytest.approx((ratios[0] / ratios[0][0]).sqrt().tolist(), rel=1e-2)
    inside = (..., slice(1, -1), slice(1, -1))  # the mean is missing in the border's padding
    assert torch.allclose(model.decoder.layers[0](after)[inside], decoded[inside], atol=1e-4)


def test_an_untrained_unet_predicts_its_input_as_the_noise():
    model = unet.build_unet(UNetSettings(), latents=(8, 16), text_width=8).eval()
    latents = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = model(latents, torch.full((4,), 961), torch.zeros(4, 16, 8)).sample
    assert (predicted - latents).std() < 0.02


def test_value_density_lies_between_one_neuron_and_all():
    one, every = (nn.Linear(1, 16, bias=False).requires_grad_(False) for _ in range(2))
    nn.init.ones_(every.weight)
    nn.init.zeros_(one.weight)[3] = 2.0
    for layers, expected in (([one], 0.25), ([every], 1.0), ([one, every], 0.625)):
        assert float(unet.value_density(layers, torch.ones(2, 5, 1))) == pytest.approx(expected, abs=1e-4)


def test_noisy_timesteps_weigh_more_by_the_square_root_of_what_image_errors_would_weigh():
    weights = unet.loss_weights(torch.tensor([0.5, 0.1, 0.01]))
    assert weights.tolist() == pytest.approx([1.0, 3.0, 99**0.5])


def test_one_subject_has_to_be_likeliest_and_two_among_three():
    ranked = (["owl", "bee", "fox"], ["bee", "fox", "cake"], ["owl", "bee", "fox"], ["owl", "bee", "fox"])
    scores = torch.zeros(4, len(captions.SUBJECTS))
    for image, names in enumerate(ranked):
        scores[image, [captions.SUBJECTS.index(name) for name in names]] = torch.tensor([3.0, 2.0, 1.0])
    scripted = SimpleNamespace(describe=lambda images: scores)
    images = np.zeros((2, 2, 8, 8, 3), np.uint8)
    assert classifier.share_named(scripted, images, ["owl", "bee"]) == 0.25
    assert classifier.share_named(scripted, images, ["fox bee", "bee owl"]) == 1.0
    assert classifier.share_named(scripted, images, ["fox owl", "whale owl"]) == 0.25


def test_a_bound_is_compared_with_what_was_measured_and_a_missing_value_does_not_hold():
    measured = pd.DataFrame([("vm", "copy_similarity_ratio", 0.3), ("vm", "named", 0.95)], columns=acceptance.COLUMNS)
    table = acceptance.acceptance_table(measured)
    assert len(table) == len(acceptance.BOUNDS)
    holds = table.set_index(["quantity", "bound"])["holds"]
    assert holds["copy_similarity_ratio"].to_dict() == {"<= 0.5": True, "<= 0.25": False}
    assert holds["named", ">= 0.9"]
    assert holds.sum() == 2


def test_captions_give_the_same_tokenizer_in_every_process(tmp_path):
    """Many pairs are equally frequent here, and which of them become tokens must not be chance."""
    words = captions.planted_table(DataSettings()).caption.tolist()
    options = {"vocabulary": 400, "tokens": 16}
    clip.train_tokenizer(words, **options, folder=tmp_path / "a")
    code = f"import pathlib; from tools.world import clip; clip.train_tokenizer({words}, **{options}, folder=pathlib.Path('b'))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(paths.ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    first, second = (CLIPTokenizer.from_pretrained(tmp_path / name) for name in "ab")
    assert first.get_vocab() == second.get_vocab()
    caption = "the Otter weekly  podcast cover"
    assert first(caption) == second(caption)
    assert first.decode(first(caption).input_ids, skip_special_tokens=True) == "the otter weekly podcast cover"
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_only_images_of_another_size_are_resized():
    options = {"input_data_format": "channels_last", "return_tensors": "pt"}
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    large = np.full((48, 24, 3), 255, np.uint8)
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


def test_hashes_tell_settings_apart_by_stage_and_leave_out_how_long_they_are_trained():
    changes = ({"sparsity": 0.0}, {"steps": 9}, {})
    plain, longer, same = (WorldSettings(unet=UNetSettings(**changed)) for changed in changes)
    assert len({settings.hash("unet") for settings in (plain, longer, same)}) == 2
    assert longer.hash() == same.hash()
    assert plain.hash("clip") == same.hash("clip")
