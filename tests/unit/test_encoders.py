import dataclasses
import hashlib
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel

from nemolib import encoders, paths
from nemolib.encoders import ClipEncoder, CopyDescriptor, EncoderError, Inception, Sscd, to_pixels
from nemolib.settings import Encoders, EncoderSettings, load_profile
from tests.random_world import write_clip

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def pictures(number=3, height=64, width=64):
    """Return smooth random images, so that ways of resizing can be compared."""
    small = torch.rand(number, 3, 6, 6, generator=torch.Generator().manual_seed(0))
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


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def script(kind, path, model):
    """Write a TorchScript file, and return the settings of the encoder that has it."""
    torch.jit.script(model.eval()).save(path)
    return EncoderSettings(kind, str(path), sha256=sha256(path))


@pytest.fixture
def sscd(tmp_path):
    torch.manual_seed(0)
    return script("sscd", tmp_path / "sscd.pt", ColourNet())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, random_model_folder):
    """Return the folder of a random CLIP model for images of 32 x 32, without a preprocessing."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    torch.manual_seed(0)
    tokenizer = write_clip(folder, random_model_folder, side=32)
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
    half = dict.fromkeys(("image_mean", "image_std"), [0.5] * 3)
    return with_preprocessing(clip_folder, tmp_path / "plain", do_resize=False, do_center_crop=False, **half)


@pytest.fixture
def real_clip(clip_folder, tmp_path):
    """Return a model with CLIP's preprocessing, but for 32 instead of 224 pixels."""
    size = {"height": 32, "width": 32}
    return with_preprocessing(clip_folder, tmp_path / "real", size={"shortest_edge": 32}, crop_size=size)


# Copy detection


def test_features_do_not_depend_on_the_batch_size(monkeypatch):
    encoder, images = CopyDescriptor((4, 4), 8).eval(), pictures(5)
    whole = encoder.describe(images)
    assert (whole.shape, whole.dtype, whole.requires_grad) == ((5, 8), torch.float32, False)
    monkeypatch.setattr(encoders, "BATCH_SIZE", 2)
    torch.testing.assert_close(encoder.describe(images), whole)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(5))


def test_the_descriptor_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    chosen, folder = EncoderSettings("descriptor", "models/descriptor"), tmp_path / "models" / "descriptor"
    CopyDescriptor((4, 4), 8).save(folder)
    assert [path.name for path in sorted(folder.iterdir())] == ["config.json", "model.safetensors"]
    loaded, again = CopyDescriptor.load(dataclasses.replace(chosen, name="mine")), CopyDescriptor.load(chosen)
    assert (loaded.name, again.name) == ("mine", "copy descriptor")
    assert loaded.describe(pictures()).shape == (3, 8)
    assert again.identity() == loaded.identity()
    with torch.no_grad():
        again.project.bias += 1
    assert again.identity() != loaded.identity()
    for wrong, words in ((np.zeros((2, 8, 8, 3)), "uint8"), (np.zeros((8, 8, 3), np.uint8), r"\[8, 8, 3\]")):
        with pytest.raises(ValueError, match=words):
            loaded.describe(wrong)
    weights = folder / "model.safetensors"
    digest = sha256(weights)
    CopyDescriptor.load(dataclasses.replace(chosen, sha256=digest))
    with pytest.raises(EncoderError, match=f"expected SHA-256 {'0' * 64}, but the file has {digest}"):
        CopyDescriptor.load(dataclasses.replace(chosen, sha256="0" * 64))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing; run `make data` or `make train`"):
        CopyDescriptor.load(chosen)


def test_sscd_normalizes_as_imagenet(sscd):
    encoder = Sscd.load(sscd)
    features = encoder.describe(np.broadcast_to(np.array([10, 100, 200], np.uint8), (2, 20, 30, 3)))
    pixels = (torch.tensor([10, 100, 200]) / 255 - torch.tensor(encoders.SSCD_MEAN)) / torch.tensor(encoders.SSCD_STD)
    expected = F.normalize(encoder.model.mix(pixels), dim=-1)
    torch.testing.assert_close(features, expected.expand(2, -1), atol=1e-5, rtol=0)
    assert (encoder.name, encoder.unit_norm) == ("SSCD", True)


@pytest.mark.parametrize("side", [64, 400])
def test_images_are_resized_with_antialias(side):
    images = pictures(2, side, side + 40)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoders.SSCD_MEAN, encoders.SSCD_STD))
    # Pillow rounds to whole numbers, here after each of the two directions.
    resized = F.interpolate(pixels, (320, 320), mode="bilinear", antialias=True)
    assert ((Sscd.preprocess(images) * std + mean) * 255 - resized).abs().max() < 1.01
    # Inception sees them without rounding.
    seen = torch.from_numpy(Inception.resize(images[1]))
    resized = F.interpolate(pixels, (299, 299), mode="bicubic", antialias=True)[1]
    torch.testing.assert_close(seen, resized, atol=2e-2, rtol=0)
    assert (seen != seen.round()).any()


# Files of weights


@pytest.mark.parametrize(
    ("stated", "words"), [(None, "it is not said which; its"), ("0" * 64, "expected SHA-256 0{64}, but")]
)
def test_a_program_is_only_run_if_it_is_the_stated_one(sscd, stated, words):
    with pytest.raises(EncoderError, match=f"{sscd.path}.*{words}.*{sscd.sha256}"):
        Sscd.load(dataclasses.replace(sscd, sha256=stated))
    assert Sscd.load(dataclasses.replace(sscd, sha256=sscd.sha256.upper())).identity() == Sscd.load(sscd).identity()


def test_what_is_missing_or_no_torchscript_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match="sscd encoder: .*weights.pt is missing"):
        Sscd.load(EncoderSettings("sscd", str(path)))
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(EncoderError, match="holds no TorchScript"):
        Sscd.load(EncoderSettings("sscd", str(path), sha256=sha256(path)))


# Alignment


def test_images_of_the_tiny_world_are_taken_as_they_are(plain_clip):
    encoder, images = ClipEncoder.load(plain_clip), pictures(3, 32, 32)
    pooled = encoder.model.vision_model(to_pixels(images)).pooler_output
    assert torch.equal(encoder.describe(images), F.normalize(encoder.model.visual_projection(pooled), dim=-1))


def test_images_of_real_clip_are_resized_cropped_and_normalized(real_clip):
    encoder, images = ClipEncoder.load(real_clip), pictures(2, 48, 80)
    # The shorter side becomes 32.
    resized = [Image.fromarray(image).resize((53, 32), Image.Resampling.BICUBIC) for image in images]
    prepared = np.stack(resized)[:, :, 10:42] / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy(((prepared - mean) / std).transpose(0, 3, 1, 2)).float()
    expected = encoder.model.visual_projection(encoder.model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(encoder.describe(images), F.normalize(expected, dim=-1), atol=1e-5, rtol=0)
    assert "torchvision" not in sys.modules


def test_both_sides_have_one_space_and_long_texts_are_cut(real_clip):
    encoder = ClipEncoder.load(dataclasses.replace(real_clip, name="small CLIP"))
    assert (encoder.name, ClipEncoder.load(real_clip).name) == ("small CLIP", "CLIP (real)")
    features = encoder.describe_texts(["a b " * 40, "a b " * 60 + "something else", "a b", "a c"])
    torch.testing.assert_close(features[0], features[1])
    assert not torch.allclose(features[2], features[3], atol=1e-3)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert (encoder.describe(pictures()) @ features.T).shape == (3, 4)
    with pytest.raises(TypeError, match="one prompt was given"):
        encoder.describe_texts("one text")


def test_a_clip_folder_that_lacks_something(clip_folder, plain_clip, tmp_path):
    folder = tmp_path / "plain"
    for path, words in ((clip_folder, "preprocessor_config.json is missing"), (folder / "no", "/no/config.json is")):
        with pytest.raises(FileNotFoundError, match=words):
            ClipEncoder.load(EncoderSettings("clip", str(path)))
    with pytest.raises(EncoderError, match="expected SHA-256 0000"):
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


def test_a_profile_names_its_encoders_and_those_of_quality_are_raw(sscd, plain_clip, real_clip, tmp_path):
    inception = script("inception", tmp_path / "inception.pt", LayeredNet(2))
    profile = profile_with(copy=sscd, alignment=real_clip, quality=inception, clip_quality=real_clip)
    assert isinstance(encoders.load_encoder(profile, "copy"), Sscd)
    clip, raw = encoders.load_encoder(profile, "alignment"), encoders.load_encoder(profile, "clip_quality")
    own = encoders.load_encoder(profile, "quality")
    assert isinstance(own, Inception)
    for encoder in (own, raw):
        assert not encoder.unit_norm
        assert (encoder.describe(pictures()).norm(dim=1) - 1).abs().max() > 0.01
    torch.testing.assert_close(F.normalize(raw.describe(pictures()), dim=-1), clip.describe(pictures()))
    # The preprocessing is part of the identity, and so is the norm; where the files lie is not.
    others = [encoders.load_encoder(profile_with(alignment=chosen), "alignment") for chosen in (plain_clip, real_clip)]
    assert len({encoder.identity() for encoder in (clip, raw, *others)}) == 3
    assert others[1].identity() == clip.identity()
