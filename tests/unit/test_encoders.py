import dataclasses
import hashlib
import json
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
    ClipEncoder,
    CopyDescriptor,
    EncoderError,
    ImageEncoder,
    InceptionFeatures,
    Sscd,
    TextEncoder,
    alignment_encoder,
    clip_features,
    copy_encoder,
    describe_cached,
    describe_samples,
    quality_encoder,
    to_pixels,
)
from nemolib.encoders.checksums import FirstUse, record_path
from nemolib.encoders.sscd import MEAN, STD
from nemolib.profiles import Encoders, EncoderSettings, ProfileError, load_profile

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


def script(model, path):
    torch.manual_seed(0)
    torch.jit.script(model.eval()).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def sscd_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "sscd.pt"
    return path, script(ColourNet(), path)


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
    import shutil

    shutil.copytree(folder, target)
    CLIPImageProcessorPil(**settings).save_pretrained(target)
    return target


@pytest.fixture
def plain_clip(clip_folder, tmp_path):
    """Return a folder whose images are taken as they are, pixels in [-1, 1]: the way of the tiny world."""
    half = [0.5] * 3
    return with_preprocessing(
        clip_folder, tmp_path / "plain", do_resize=False, do_center_crop=False, image_mean=half, image_std=half
    )


@pytest.fixture
def real_clip(clip_folder, tmp_path):
    """Return a folder with CLIP's preprocessing, but for 32 instead of 224 pixels."""
    size = {"height": 32, "width": 32}
    return with_preprocessing(clip_folder, tmp_path / "real", size={"shortest_edge": 32}, crop_size=size)


class MeanColour(ImageEncoder):
    """An encoder that counts the images that it sees."""

    name = "mean colour"

    def __init__(self, version=1):
        self.version, self.seen = version, 0

    def identity(self):
        return f"mean colour {self.version}"

    def encode(self, batch):
        self.seen += len(batch)
        return F.normalize(to_pixels(batch).mean(dim=(2, 3)), dim=-1)


class Length(TextEncoder):
    name = "length"

    def __init__(self):
        self.seen = []

    def identity(self):
        return "length"

    def encode(self, batch):
        self.seen += batch
        return torch.tensor([[float(len(text)), 1.0] for text in batch])


# The interface


def test_features_do_not_depend_on_the_batch_size():
    encoder, images = CopyDescriptor((4, 4), 8).eval(), pictures(5)
    whole = encoder.describe(images)
    assert whole.shape == (5, 8)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    torch.testing.assert_close(encoder.describe(images, batch_size=2), whole)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 8, 8, 3)), "uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"\[8, 8, 3\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\[2, 3, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "nothing to describe"),
    ],
)
def test_what_is_no_image_is_refused(images, words):
    with pytest.raises(ValueError, match=words):
        MeanColour().describe(images)


@pytest.mark.parametrize("texts", ["one text", [1, 2], []])
def test_what_is_no_list_of_texts_is_refused(texts):
    with pytest.raises(ValueError, match="length: "):
        Length().describe(texts)


def test_samples_keep_their_places():
    images = pictures(6).reshape(2, 3, 64, 64, 3)
    features = describe_samples(MeanColour(), images)
    assert features.shape == (2, 3, 3)
    assert np.array_equal(features[1, 2], MeanColour().describe(images[1, 2:])[0].numpy())
    with pytest.raises(ValueError, match=r"must be \[prompt, seed"):
        describe_samples(MeanColour(), images[0])


def test_pixels():
    pixels = to_pixels(np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3))
    assert pixels.flatten().tolist() == pytest.approx([-1, -0.6, 1])


# Copy detection


def test_the_descriptor_comes_back(tmp_path):
    torch.manual_seed(0)
    CopyDescriptor((4, 4), 8).save(tmp_path)
    loaded = CopyDescriptor.load(tmp_path, name="mine")
    assert loaded.name == "mine"
    again = CopyDescriptor.load(tmp_path)
    assert again.identity() == loaded.identity()
    with torch.no_grad():
        again.project.bias += 1
    assert again.identity() != loaded.identity()
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert CopyDescriptor.load(tmp_path, sha256=digest.upper()).identity() == loaded.identity()
    with pytest.raises(EncoderError, match=f"the profile states SHA-256 {'0' * 64}, but the file has {digest}"):
        CopyDescriptor.load(tmp_path, sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match="config.json is missing; run `make train`"):
        CopyDescriptor.load(tmp_path / "none")


def test_sscd_normalizes_as_imagenet(sscd_file):
    path, digest = sscd_file
    encoder = Sscd.load(path, sha256=digest)
    colour = np.array([10, 100, 200], np.uint8)
    features = encoder.describe(np.broadcast_to(colour, (2, 20, 30, 3)))
    pixels = (torch.tensor([10, 100, 200]) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    expected = F.normalize(encoder.model.mix(pixels), dim=-1)
    torch.testing.assert_close(features, expected.expand(2, -1), atol=1e-5, rtol=0)
    assert encoder.name == "SSCD"
    assert encoder.unit_norm


@pytest.mark.parametrize("side", [64, 400])
def test_sscd_sees_320_pixels_resized_with_antialias(side):
    from nemolib.encoders.sscd import preprocess

    images = pictures(2, side, side + 40)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, (320, 320), mode="bilinear", antialias=True)
    found = preprocess(images) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    # Pillow rounds to whole numbers, here after each of the two directions.
    assert (found * 255 - resized).abs().max() < 1.01


def test_the_first_use_of_a_file_is_told_and_noted(sscd_file):
    path, digest = sscd_file
    with pytest.warns(FirstUse, match=f"first time; its SHA-256 is {digest}"):
        first = Sscd.load(path)
    assert json.loads(record_path(path).read_text()) == {"file": "sscd.pt", "sha256": digest}
    second = Sscd.load(path)
    assert second.identity() == first.identity()


@pytest.mark.parametrize("stated", [True, False])
def test_another_file_is_refused(sscd_file, stated):
    path, digest = sscd_file
    record_path(path).write_text(json.dumps({"sha256": digest}))
    path.write_bytes(path.read_bytes()[:-1])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(EncoderError) as error:
        Sscd.load(path, sha256=digest if stated else None)
    for word in (str(path), digest, found, "the profile states" if stated else "first use"):
        assert word in str(error.value)


def test_what_is_no_torchscript_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match="weights.pt are missing"):
        Sscd.load(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.warns(FirstUse), pytest.raises(EncoderError, match="holds no TorchScript"):
        Sscd.load(path)
    record_path(path).write_text("{")
    with pytest.raises(EncoderError, match="is not readable; delete it"):
        Sscd.load(path)


def test_a_network_that_gives_no_vectors_is_refused(tmp_path):
    path = tmp_path / "maps.pt"
    digest = script(nn.Sequential(nn.AvgPool2d(160)), path)
    with pytest.raises(EncoderError, match=r"expected features \[1, feature\], got \[1, 3, 2, 2\]"):
        Sscd.load(path, sha256=digest).describe(pictures(1))


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
    assert plain.images.identity() != clip_features(plain).identity()


def test_long_texts_are_cut_at_77_tokens(real_clip):
    encoder = ClipEncoder.load(real_clip)
    assert encoder.texts.tokens == 77
    long, longer = "a b " * 40, "a b " * 60 + "something else"
    features = encoder.texts.describe([long, longer, "a b", "a c"])
    torch.testing.assert_close(features[0], features[1])
    assert not torch.allclose(features[2], features[3], atol=1e-3)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


def test_both_sides_have_one_space_and_one_name(real_clip):
    encoder = ClipEncoder.load(real_clip, name="small CLIP")
    assert encoder.name == encoder.images.name == encoder.texts.name == "small CLIP"
    assert (encoder.images.describe(pictures()) @ encoder.texts.describe(["a", "b"]).T).shape == (3, 2)
    assert ClipEncoder.load(real_clip).name == "CLIP (real)"


def test_a_clip_folder_that_lacks_something(clip_folder, plain_clip):
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json is missing"):
        ClipEncoder.load(clip_folder)
    with pytest.raises(FileNotFoundError, match="folder .*nothing is missing"):
        ClipEncoder.load(plain_clip / "nothing")
    with pytest.raises(EncoderError, match="states SHA-256 0000"):
        ClipEncoder.load(plain_clip, sha256="0" * 64)
    (plain_clip / "config.json").write_text("{}")  # of another size
    with pytest.raises(EncoderError, match="could not be loaded; needed: config.json"):
        ClipEncoder.load(plain_clip)
    (plain_clip / "model.safetensors").rename(plain_clip / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        ClipEncoder.load(plain_clip)


def test_a_hub_model_that_cannot_be_loaded(monkeypatch):
    asked = {}

    def offline(place, **options):
        asked.update(options, place=place)
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    with pytest.raises(EncoderError, match=r"'openai/clip-vit-base-patch32' could not be loaded.*: no network$"):
        ClipEncoder.load("openai/clip-vit-base-patch32", revision="abc")
    assert asked["place"] == "openai/clip-vit-base-patch32"
    assert asked["revision"] == "abc"
    assert asked["use_safetensors"] is True
    with pytest.raises(EncoderError, match="fixed by its revision"):
        ClipEncoder.load("openai/clip-vit-base-patch32", sha256="0" * 64)


# Image quality


@pytest.mark.parametrize("side", [64, 400])
def test_inception_sees_unrounded_images_resized_with_antialias(tmp_path, side):
    path = tmp_path / "inception.pt"
    encoder = InceptionFeatures.load(path, sha256=script(LayeredNet(), path))
    images = pictures(2, side, side + 40)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, (299, 299), mode="bicubic", antialias=True)
    found = encoder.describe(images).reshape(resized.shape) * 128 + 128
    torch.testing.assert_close(found, resized, atol=2e-2, rtol=0)
    assert (found != found.round()).any()


def test_quality_features_are_raw(tmp_path, real_clip):
    path = tmp_path / "inception.pt"
    inception = InceptionFeatures.load(path, sha256=script(LayeredNet(2), path))
    clip = ClipEncoder.load(real_clip)
    raw = clip_features(clip, name="image tower")
    assert raw.name == "image tower"
    for encoder in (inception, raw):
        assert not encoder.unit_norm
        assert (encoder.describe(pictures()).norm(dim=1) - 1).abs().max() > 0.01
    torch.testing.assert_close(F.normalize(raw.describe(pictures()), dim=-1), clip.images.describe(pictures()))


def test_a_network_without_layers_is_no_inception(sscd_file):
    path, digest = sscd_file
    with pytest.raises(EncoderError, match="has no part 'layers'"):
        InceptionFeatures.load(path, sha256=digest)


# The encoders of a profile


def profile_with(**roles):
    chosen = {role: EncoderSettings(**values) for role, values in roles.items()}
    return dataclasses.replace(load_profile("tiny"), name="mine", encoders=Encoders(**chosen))


def test_a_profile_names_its_encoders(sscd_file, plain_clip, tmp_path):
    path, digest = sscd_file
    inception = tmp_path / "inception.pt"
    profile = profile_with(
        copy={"kind": "sscd", "path": str(path), "sha256": digest},
        alignment={"kind": "clip", "path": str(plain_clip), "name": "small CLIP"},
        quality={"kind": "inception", "path": str(inception), "sha256": script(LayeredNet(), inception)},
        clip_quality={"kind": "clip", "path": str(plain_clip)},
    )
    assert isinstance(copy_encoder(profile), Sscd)
    assert alignment_encoder(profile).texts.name == "small CLIP"
    assert isinstance(quality_encoder(profile), InceptionFeatures)
    raw = quality_encoder(profile, role="clip_quality")
    assert raw.name == "CLIP (plain)"
    assert not raw.unit_norm


def test_a_descriptor_by_its_folder(tmp_path, monkeypatch):
    CopyDescriptor((4, 4), 8).save(tmp_path / "models" / "descriptor")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    profile = profile_with(copy={"kind": "descriptor", "path": "models/descriptor"})
    assert copy_encoder(profile).describe(pictures()).shape == (3, 8)


@pytest.mark.parametrize(
    ("load", "role"), [(copy_encoder, "copy"), (alignment_encoder, "alignment"), (quality_encoder, "quality")]
)
def test_a_profile_without_an_encoder(load, role):
    with pytest.raises(ProfileError, match=f"profile 'mine' has encoders.{role} = None; name its kind and path"):
        load(profile_with())


def test_public_names_are_there():
    assert all(getattr(encoders, name).__doc__ for name in encoders.__all__)


# The cache


def test_what_is_in_the_cache_is_not_encoded_again(tmp_path):
    encoder, images = MeanColour(), pictures(5)
    expected = MeanColour().describe(images)
    assert torch.equal(describe_cached(encoder, images[[0, 1, 0]], tmp_path), expected[[0, 1, 0]])
    assert encoder.seen == 2
    assert torch.equal(describe_cached(encoder, images[::-1], tmp_path, batch_size=2), expected.flip(0))
    assert encoder.seen == 5
    assert torch.equal(describe_cached(MeanColour(), images, tmp_path), expected)
    describe_cached(other := MeanColour(version=2), images, tmp_path)
    assert other.seen == 5


def test_texts_are_cached_too(tmp_path):
    encoder = Length()
    assert describe_cached(encoder, ["a", "abc", "a"], tmp_path)[:, 0].tolist() == [1, 3, 1]
    assert describe_cached(encoder, ("abc", "ab"), tmp_path)[:, 0].tolist() == [3, 2]
    assert encoder.seen == ["a", "abc", "ab"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_entry_is_computed_again(tmp_path, damage):
    images = pictures(2)
    expected = describe_cached(MeanColour(), images, tmp_path)
    entry, other = sorted(tmp_path.rglob("*.safetensors"))
    content = entry.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    from safetensors.torch import save

    two = save({"a": torch.ones(3), "b": torch.ones(3)})
    entry.write_bytes({"cut": content[:-5], "flipped": flipped, "empty": b"", "other": two}[damage])
    encoder = MeanColour()
    assert torch.equal(describe_cached(encoder, images, tmp_path), expected)
    assert encoder.seen == 1
    assert entry.read_bytes() == content


def test_a_killed_run_keeps_its_finished_batches(tmp_path):
    class Fails(MeanColour):
        def encode(self, batch):
            if self.seen >= 2:
                raise KeyboardInterrupt
            return super().encode(batch)

    images = pictures(5)
    with pytest.raises(KeyboardInterrupt):
        describe_cached(Fails(), images, tmp_path, batch_size=2)
    encoder = MeanColour()
    assert torch.equal(describe_cached(encoder, images, tmp_path, batch_size=2), MeanColour().describe(images))
    assert encoder.seen == 3


def test_nothing_to_describe(tmp_path):
    with pytest.raises(ValueError, match="nothing to describe"):
        describe_cached(Length(), [], tmp_path)
