import dataclasses
import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from nemolib import encoders, paths
from nemolib.encoders import (
    SSCD_MEAN,
    SSCD_STD,
    ClipEncoder,
    CopyDescriptor,
    EncoderError,
    FirstUse,
    ImageEncoder,
    Inception,
    Sscd,
    TextEncoder,
    alignment_encoder,
    copy_encoder,
    quality_encoder,
    to_pixels,
)
from nemolib.settings import Encoders, EncoderSettings, ProfileError, load_profile

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def pictures(number=3, height=64, width=64, seed=0):
    """Return smooth random images, so that ways of resizing can be compared."""
    small = torch.rand(number, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(small, (height, width), mode="bicubic").clamp(0, 1) * 255
    return smooth.round().byte().permute(0, 2, 3, 1).numpy()


class ColourNet(nn.Module):
    """Eight random mixtures of the mean colours: what stands for a large network here."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 8)

    def forward(self, pixels):
        return self.mix(pixels.mean(dim=(2, 3)))


class LayeredNet(nn.Module):
    """A network that, like Inception's file, has its layers in a part of that name."""

    def __init__(self, side: int = 299):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(1))

    def forward(self, pixels):
        return self.layers(pixels) * 0


def script(kind, path, model):
    """Write a TorchScript file, and return the settings of the encoder that has it."""
    torch.jit.script(model.eval()).save(path)
    return EncoderSettings(kind, str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def sscd(tmp_path):
    torch.manual_seed(0)
    return script("sscd", tmp_path / "sscd.pt", ColourNet())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, random_model_folder):
    """Return the folder of a random CLIP model for images of 32 x 32, without a preprocessing."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(random_model_folder / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    # CLIP's own tokenizer says 77; one that says nothing must not lead to longer texts either.
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(folder)
    return folder


def with_preprocessing(folder, target, **settings):
    shutil.copytree(folder, target)
    CLIPImageProcessorPil(**settings).save_pretrained(target)
    return EncoderSettings("clip", str(target))


@pytest.fixture
def plain_clip(clip_folder, tmp_path):
    """Return a CLIP model whose images are taken as they are, pixels in [-1, 1]: the way of the tiny world."""
    half = [0.5] * 3
    return with_preprocessing(
        clip_folder, tmp_path / "plain", do_resize=False, do_center_crop=False, image_mean=half, image_std=half
    )


@pytest.fixture
def real_clip(clip_folder, tmp_path):
    """Return a model with CLIP's preprocessing, but for 32 instead of 224 pixels."""
    size = {"height": 32, "width": 32}
    return with_preprocessing(clip_folder, tmp_path / "real", size={"shortest_edge": 32}, crop_size=size)


class MeanColour(ImageEncoder):
    name = "mean colour"

    def identity(self):
        return "mean colour"

    def encode(self, batch):
        return F.normalize(to_pixels(batch).mean(dim=(2, 3)), dim=-1)


class Length(TextEncoder):
    name = "length"

    def identity(self):
        return "length"

    def encode(self, batch):
        return torch.tensor([[float(len(text)), 1.0] for text in batch])


# The interface


def test_features_do_not_depend_on_the_batch_size(monkeypatch):
    encoder, images = CopyDescriptor((4, 4), 8).eval(), pictures(5)
    whole = encoder.describe(images)
    assert whole.shape == (5, 8)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    monkeypatch.setattr(encoders, "BATCH_SIZE", 2)
    torch.testing.assert_close(encoder.describe(images), whole)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    ("encoder", "items", "words"),
    [
        (MeanColour(), np.zeros((2, 8, 8, 3)), "uint8"),
        (MeanColour(), np.zeros((8, 8, 3), np.uint8), r"\[8, 8, 3\]"),
        (MeanColour(), np.zeros((2, 3, 8, 8), np.uint8), r"\[2, 3, 8, 8\]"),
        (MeanColour(), np.zeros((0, 8, 8, 3), np.uint8), "mean colour: there is nothing to describe"),
        (Length(), "one text", "length: expected a sequence of texts"),
        (Length(), [1, 2], "length: expected a sequence of texts"),
        (Length(), [], "length: there is nothing to describe"),
    ],
)
def test_what_is_no_image_or_no_list_of_texts_is_refused(encoder, items, words):
    with pytest.raises(ValueError, match=words):
        encoder.describe(items)


def test_pixels():
    pixels = to_pixels(np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3))
    assert pixels.flatten().tolist() == pytest.approx([-1, -0.6, 1])


# Copy detection


def test_the_descriptor_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    chosen = EncoderSettings("descriptor", "models/descriptor")
    torch.manual_seed(0)
    CopyDescriptor((4, 4), 8).save(tmp_path / "models" / "descriptor")
    loaded = CopyDescriptor.load(dataclasses.replace(chosen, name="mine"))
    again = CopyDescriptor.load(chosen)
    assert (loaded.name, again.name) == ("mine", "copy descriptor")
    assert loaded.describe(pictures()).shape == (3, 8)
    assert again.identity() == loaded.identity()
    with torch.no_grad():
        again.project.bias += 1
    assert again.identity() != loaded.identity()
    weights = tmp_path / "models" / "descriptor" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    CopyDescriptor.load(dataclasses.replace(chosen, sha256=digest))
    with pytest.raises(EncoderError, match=f"the profile states SHA-256 {'0' * 64}, but the file has {digest}"):
        CopyDescriptor.load(dataclasses.replace(chosen, sha256="0" * 64))
    assert [path.name for path in sorted(weights.parent.iterdir())] == ["config.json", "model.safetensors"]
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing; run `make train`"):
        CopyDescriptor.load(chosen)


def test_sscd_normalizes_as_imagenet(sscd):
    encoder = Sscd.load(sscd)
    colour = np.array([10, 100, 200], np.uint8)
    features = encoder.describe(np.broadcast_to(colour, (2, 20, 30, 3)))
    pixels = (torch.tensor([10, 100, 200]) / 255 - torch.tensor(SSCD_MEAN)) / torch.tensor(SSCD_STD)
    expected = F.normalize(encoder.model.mix(pixels), dim=-1)
    torch.testing.assert_close(features, expected.expand(2, -1), atol=1e-5, rtol=0)
    assert encoder.name == "SSCD"
    assert encoder.unit_norm


@pytest.mark.parametrize("side", [64, 400])
def test_images_are_resized_with_antialias(side):
    images = pictures(2, side, side + 40)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    seen = Sscd.preprocess(images) * torch.tensor(SSCD_STD).view(3, 1, 1) + torch.tensor(SSCD_MEAN).view(3, 1, 1)
    # Pillow rounds to whole numbers, here after each of the two directions.
    resized = F.interpolate(pixels, (320, 320), mode="bilinear", antialias=True)
    assert (seen * 255 - resized).abs().max() < 1.01
    # Inception sees them without rounding.
    seen = torch.from_numpy(Inception.resize(images[1]))
    resized = F.interpolate(pixels, (299, 299), mode="bicubic", antialias=True)[1]
    torch.testing.assert_close(seen, resized, atol=2e-2, rtol=0)
    assert (seen != seen.round()).any()


# Files of weights


def test_the_first_use_of_a_file_is_told_and_noted(sscd, tmp_path):
    unstated = dataclasses.replace(sscd, sha256=None)
    assert encoders.noted_sha256(tmp_path / "sscd.pt") is None
    with pytest.warns(FirstUse, match=f"first time; its SHA-256 is {sscd.sha256}"):
        first = Sscd.load(unstated)
    note = tmp_path / "sscd.pt.sha256.json"
    assert json.loads(note.read_text()) == {"file": "sscd.pt", "sha256": sscd.sha256}
    assert encoders.noted_sha256(tmp_path / "sscd.pt") == sscd.sha256
    assert Sscd.load(unstated).identity() == first.identity() == Sscd.load(sscd).identity()
    note.write_text("{")
    with pytest.raises(EncoderError, match="is not readable; delete it"):
        Sscd.load(unstated)


@pytest.mark.parametrize("stated", [True, False])
def test_another_file_is_refused(sscd, tmp_path, stated):
    path = tmp_path / "sscd.pt"
    encoders.note_sha256(path, sscd.sha256)
    path.write_bytes(path.read_bytes()[:-1])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(EncoderError) as error:
        Sscd.load(sscd if stated else dataclasses.replace(sscd, sha256=None))
    for word in (str(path), sscd.sha256, found, "the profile states" if stated else "first use"):
        assert word in str(error.value)


def test_what_is_no_torchscript_or_another_network_is_refused(sscd, tmp_path):
    path = tmp_path / "weights.pt"
    chosen = EncoderSettings("sscd", str(path))
    with pytest.raises(FileNotFoundError, match="weights.pt are missing"):
        Sscd.load(chosen)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.warns(FirstUse), pytest.raises(EncoderError, match="holds no TorchScript"):
        Sscd.load(chosen)
    maps = script("sscd", path, nn.Sequential(nn.AvgPool2d(160)))
    with pytest.raises(EncoderError, match=r"expected features \[1, feature\], got \[1, 3, 2, 2\]"):
        Sscd.load(maps).describe(pictures(1))
    with pytest.raises(EncoderError, match="has no part 'layers'"):
        Inception.load(sscd)


# Alignment


def test_images_of_the_tiny_world_are_taken_as_they_are(plain_clip):
    encoder, images = ClipEncoder.load(plain_clip), pictures(3, 32, 32)
    pooled = encoder.model.vision_model(to_pixels(images)).pooler_output
    expected = F.normalize(encoder.model.visual_projection(pooled), dim=-1)
    assert torch.equal(encoder.images.describe(images), expected)


def test_images_of_real_clip_are_resized_cropped_and_normalized(real_clip):
    encoder, images = ClipEncoder.load(real_clip), pictures(2, 48, 80)
    prepared = []
    for image in images:
        resized = Image.fromarray(image).resize((53, 32), Image.Resampling.BICUBIC)  # shorter side 32
        prepared.append(np.asarray(resized)[:, 10:42] / 255)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy(((np.stack(prepared) - mean) / std).transpose(0, 3, 1, 2)).float()
    expected = encoder.model.get_image_features(pixel_values=pixels)
    expected = F.normalize(getattr(expected, "pooler_output", expected), dim=-1)
    torch.testing.assert_close(encoder.images.describe(images), expected, atol=1e-5, rtol=0)
    assert "torchvision" not in sys.modules


def test_preprocessing_is_part_of_an_encoders_identity(plain_clip, real_clip):
    plain, real = ClipEncoder.load(plain_clip), ClipEncoder.load(real_clip)
    assert plain.images.identity() != real.images.identity()
    assert plain.texts.identity() == real.texts.identity()
    assert plain.images.identity() == ClipEncoder.load(plain_clip).images.identity()


def test_both_sides_have_one_space_and_one_name_and_long_texts_are_cut(real_clip):
    encoder = ClipEncoder.load(dataclasses.replace(real_clip, name="small CLIP"))
    assert encoder.name == encoder.images.name == encoder.texts.name == "small CLIP"
    assert ClipEncoder.load(real_clip).name == "CLIP (real)"
    assert encoder.texts.tokens == 77
    features = encoder.texts.describe(["a b " * 40, "a b " * 60 + "something else", "a b", "a c"])
    torch.testing.assert_close(features[0], features[1])
    assert not torch.allclose(features[2], features[3], atol=1e-3)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert (encoder.images.describe(pictures()) @ features.T).shape == (3, 4)


def test_a_clip_folder_that_lacks_something(clip_folder, plain_clip, tmp_path):
    folder = tmp_path / "plain"
    for path, words in (
        (clip_folder, "preprocessor_config.json is missing"),
        (folder / "no", "/no/config.json is missing"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            ClipEncoder.load(EncoderSettings("clip", str(path)))
    with pytest.raises(EncoderError, match="states SHA-256 0000"):
        ClipEncoder.load(dataclasses.replace(plain_clip, sha256="0" * 64))
    (folder / "config.json").write_text("{}")  # of another size
    with pytest.raises(EncoderError, match="could not be loaded; needed: config.json"):
        ClipEncoder.load(plain_clip)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        ClipEncoder.load(plain_clip)


def test_a_hub_model_that_cannot_be_loaded(monkeypatch):
    asked = {}

    def offline(place, **options):
        asked.update(options, place=place)
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    chosen = EncoderSettings("clip", "openai/clip-vit-base-patch32", revision="abc")
    with pytest.raises(EncoderError, match=r"'openai/clip-vit-base-patch32' could not be loaded.*: no network$"):
        ClipEncoder.load(chosen)
    assert (asked["place"], asked["revision"], asked["use_safetensors"]) == (chosen.path, "abc", True)
    with pytest.raises(EncoderError, match="fixed by its revision"):
        ClipEncoder.load(dataclasses.replace(chosen, sha256="0" * 64))


# The encoders of a profile


def profile_with(**roles):
    return dataclasses.replace(load_profile("tiny"), name="mine", encoders=Encoders(**roles))


def test_a_profile_names_its_encoders_and_those_of_quality_are_raw(sscd, real_clip, tmp_path):
    inception = script("inception", tmp_path / "inception.pt", LayeredNet(2))
    profile = profile_with(copy=sscd, alignment=real_clip, quality=inception, clip_quality=real_clip)
    assert isinstance(copy_encoder(profile), Sscd)
    clip, raw = alignment_encoder(profile), quality_encoder(profile, role="clip_quality")
    assert (clip.texts.name, raw.name) == ("CLIP (real)", "CLIP (real)")
    assert isinstance(quality_encoder(profile), Inception)
    for encoder in (quality_encoder(profile), raw):
        assert not encoder.unit_norm
        assert (encoder.describe(pictures()).norm(dim=1) - 1).abs().max() > 0.01
    torch.testing.assert_close(F.normalize(raw.describe(pictures()), dim=-1), clip.images.describe(pictures()))
    assert raw.identity() != clip.images.identity()


@pytest.mark.parametrize(
    ("load", "role"), [(copy_encoder, "copy"), (alignment_encoder, "alignment"), (quality_encoder, "quality")]
)
def test_a_profile_without_an_encoder(load, role):
    with pytest.raises(ProfileError, match=f"profile 'mine' has encoders.{role} = None; name its kind and path"):
        load(profile_with())
