"""Feature extractors behind one interface: images (or texts) in, a feature matrix out; unit norm, but for image quality.

Which encoders a profile uses is data (`nemolib.settings.Encoders`); `load_encoder` loads them. Their weights are what they
are said to be where the profile states their SHA-256, as it must for TorchScript files.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nemolib import paths
from nemolib.batching import batches, check_prompts
from nemolib.pipeline import is_hub_id, quiet
from nemolib.provenance import content_hash
from nemolib.settings import EncoderSettings, Profile, ProfileError

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

Device = str | torch.device

BATCH_SIZE = 128
"""Images or texts of one forward pass."""

SSCD_SIZE, SSCD_MEAN, SSCD_STD = (320, 320), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What SSCD sees: size of the images in pixels, and mean and standard deviation of ImageNet's channels in [0, 1]."""

INCEPTION_SIZE = (299, 299)
"""Size of the images that Inception sees, in pixels; like SSCD's, without keeping the aspect ratio."""


class EncoderError(ValueError):
    """An encoder that cannot be used; the message names the file, what was found there and what to do."""


class Encoder(ABC):
    """What image encoders have in common.

    Attributes:
        name: What tables call it; every table of a metric says with which encoder it was computed.
        unit_norm: Whether the features have unit norm, so that their inner product is a cosine. False only for the
            features of image quality: FID and KID are defined on raw features, and no cosine must be taken of them.
    """

    name: str
    unit_norm: bool = True

    @abstractmethod
    def identity(self) -> str:
        """Return a hash of what determines the features beside the code: weights, and settings that come with them."""

    @abstractmethod
    def encode(self, batch: Any) -> Tensor:
        """Return the features [image, feature] of a batch of uint8 images [image, height, width, 3]."""

    @torch.no_grad()
    def describe(self, images: np.ndarray) -> Tensor:
        """Return the features of images [image, height, width, 3], uint8; at least one.

        Returns:
            Features [image, feature], float32, on the CPU, without gradient; of unit norm if `unit_norm`.

        Raises:
            ValueError: There are no images, or they are something else.
        """
        images = _check_images(images)
        return torch.cat([self.encode(batch).float().cpu() for batch in batches(images, BATCH_SIZE)])


def _check_images(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        wanted = "images must be uint8 [image, height, width, 3], at least one"
        raise ValueError(f"{wanted}, got {images.dtype} {list(images.shape)}")
    return images


def to_pixels(images: np.ndarray) -> Tensor:
    """Return uint8 images [image, height, width, 3] as float pixels in [-1, 1], [image, 3, height, width].

    Raises:
        ValueError: The array is not uint8 or not of this shape, or holds no image.
    """
    return torch.from_numpy(np.array(_check_images(images))).permute(0, 3, 1, 2).float() / 127.5 - 1


# Copy detection


class CopyDescriptor(nn.Module, Encoder):
    """Copy detection in the tiny world: a small network whose unit-norm features tell copies of an image from others.

    Source: SSCD (Pizzi et al., CVPR 2022): generalized-mean pooling and a linear projection after a trunk.
    """

    name = "copy descriptor"

    def __init__(self, channels: Sequence[int], features: int) -> None:
        """Build the network: one stride-2 stage per entry of ``channels``, then ``features`` outputs."""
        super().__init__()
        self.config = {"channels": list(channels), "features": features}
        stages, width = [], 3
        for wider in channels:
            stages += [
                nn.Conv2d(width, wider, 4, stride=2, padding=1), nn.GroupNorm(4, wider), nn.SiLU(),
                nn.Conv2d(wider, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.SiLU(),
            ]  # fmt: skip
            width = wider
        self.trunk = nn.Sequential(*stages)
        # Pooled over a 2 x 2 grid, so that the place of things counts.
        self.project = nn.Linear(4 * width, features)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit-norm features [image, feature] of pixels in [-1, 1], [image, 3, height, width]."""
        maps = self.trunk(pixels).clamp(min=1e-6)
        pooled = F.adaptive_avg_pool2d(maps**3, 2) ** (1 / 3)
        return F.normalize(self.project(pooled.flatten(1)), dim=-1)

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return unit-norm features [image, feature] of uint8 images [image, height, width, 3]."""
        return self(to_pixels(batch).to(self.project.weight.device))

    def identity(self) -> str:
        """Return a hash of shape and weights."""
        return content_hash(["copy descriptor", self.config, dict(self.state_dict())])

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (in half precision) to the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        weights = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, chosen: EncoderSettings, *, device: Device = "cpu") -> CopyDescriptor:
        """Return the descriptor that `save` wrote to a folder, in float32, ready for inference.

        Raises:
            FileNotFoundError: The folder lacks one of its two files.
            EncoderError: The weights have another SHA-256 than the given one.
        """
        folder = _folder(chosen, "config.json")
        model = cls(**json.loads((folder / "config.json").read_text()))
        model.name = chosen.name or cls.name
        model.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
        return model.to(device).eval().requires_grad_(False)


@dataclass(eq=False)
class TorchScriptEncoder(Encoder):
    """An image encoder whose authors published its network as a TorchScript file.

    Attributes:
        model: The network, on its device.
        sha256: SHA-256 of its file.
        name: What tables call it.
        device: Where it runs.
    """

    called: ClassVar[str]  # where the profile gives no name

    model: nn.Module
    sha256: str
    name: str
    device: Device

    @classmethod
    def load(cls, chosen: EncoderSettings, *, device: Device = "cpu") -> Self:
        """Return the encoder from its file, ready for inference.

        What loading means: a TorchScript file holds weights and a program in TorchScript. It is not unpickled as Python,
        so it cannot import modules or call arbitrary functions. But it is a program: torch's interpreter runs it, and
        among its operators are some that read and write files. Load a file of unknown origin as you would start a program
        of unknown origin. Hence the SHA-256: what runs is the file that you decided to trust, and no other.

        Args:
            chosen: Path of the file, and what its SHA-256 has to be.
            device: Where it runs.

        Raises:
            FileNotFoundError: There is no such file.
            EncoderError: The SHA-256 differs or is not stated, or the file holds no TorchScript.
        """
        path = paths.resolve(chosen.path)
        _require(chosen, path)
        # What is hashed and what is loaded are the very same bytes.
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if chosen.sha256 is None:
            remedy = "compare it with the source of the file, and state it in the profile as sha256"
            raise EncoderError(f"{path} is a program, and it is not said which; its SHA-256 is {found}: {remedy}")
        check_sha256(path, found, expected=chosen.sha256)
        try:
            # TorchScript, which torch calls deprecated, is what the authors of these networks published.
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                model = torch.jit.load(io.BytesIO(content), map_location=torch.device(device))
        except RuntimeError as error:
            raise EncoderError(f"{path} holds no TorchScript network; download it again ({error!s:.200})") from error
        return cls(model.eval(), found, chosen.name or cls.called, device)

    def identity(self) -> str:
        """Return a hash of the file; what is done to images before is code."""
        return content_hash([self.called, self.sha256])


class Sscd(TorchScriptEncoder):
    """SSCD's descriptor: the cosine of two images is their copy similarity.

    Source: Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection" (CVPR 2022); authors' code,
    metrics/compute_sscd_orig.py: ``sscd_disc_mixup.torchscript.pt``, images of 320 x 320 (PIL, bilinear), mean and
    standard deviation of ImageNet. The network takes normalized pixels [image, 3, 320, 320] and returns [image, feature].
    """

    called = "SSCD"

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return unit-norm features [image, feature] of uint8 images [image, height, width, 3]."""
        return F.normalize(self.model(self.preprocess(batch).to(self.device)).float(), dim=-1)

    @staticmethod
    def preprocess(images: np.ndarray) -> Tensor:
        """Return uint8 images [image, height, width, 3] as SSCD sees them: normalized pixels [image, 3, 320, 320]."""
        resized = [np.asarray(Image.fromarray(image).resize(SSCD_SIZE, Image.Resampling.BILINEAR)) for image in images]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
        return (pixels - torch.tensor(SSCD_MEAN).view(3, 1, 1)) / torch.tensor(SSCD_STD).view(3, 1, 1)


# Image quality


@dataclass(eq=False)
class Inception(TorchScriptEncoder):
    """The 2,048 pooled features of Inception v3 as clean-fid computes them; raw, not of unit norm.

    Source: Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (CVPR 2022): images are
    resized as floating-point numbers, bicubic with antialias, without rounding; ``inception-2015-12-05.pt``, whose
    layers are called on (x - 128) / 128, past the file's own resizing.
    """

    called = "Inception v3"
    unit_norm = False

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return raw features [image, feature] of uint8 images [image, height, width, 3]."""
        pixels = torch.from_numpy(np.stack([self.resize(image) for image in batch])).to(self.device)
        return self.model.layers((pixels - 128) / 128).flatten(1)

    @staticmethod
    def resize(image: np.ndarray) -> np.ndarray:
        """Return a uint8 image [height, width, 3] as float32 [3, 299, 299]; bicubic, so it may leave [0, 255] a little."""
        channels = [Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0).astype(np.float32)]
        return np.stack([np.asarray(channel.resize(INCEPTION_SIZE, Image.Resampling.BICUBIC)) for channel in channels])


# Alignment


@dataclass(eq=False)
class ClipEncoder(Encoder):
    """Both sides of a CLIP model; the cosine of their features is A_CLIP.

    Source: Sec. 4; authors' code, metrics/compute_prompt_alignment.py (ViT-B/32).
    Deviates: the authors' code stops at texts of more than 77 tokens, here they are cut.

    Attributes:
        model: The model.
        processor: Its preprocessing of images.
        tokenizer: The tokenizer of the text side.
        name: What tables call it.
        unit_norm: False: what CLIP's projection of images returns, as clean-fid's CLIP-FID takes it (Kynkäänniemi et al.,
            ICLR 2023); for image quality only.
    """

    model: CLIPModel
    processor: CLIPImageProcessorPil
    tokenizer: CLIPTokenizer
    name: str
    unit_norm: bool = True

    @classmethod
    def load(cls, chosen: EncoderSettings, *, device: Device = "cpu") -> ClipEncoder:
        """Return the CLIP model of a folder or of a hub id, in float32; from safetensors only, without torchvision.

        Args:
            chosen: Folder (absolute, or relative to the repository), or hub id such as ``openai/clip-vit-base-patch32``
                and its revision; SHA-256 of ``model.safetensors`` in a folder, None: not checked.
            device: Where it runs.

        Raises:
            FileNotFoundError: The folder does not exist, or lacks a file.
            EncoderError: Weights have another SHA-256, or the model cannot be loaded.
        """
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        path = chosen.path
        remote = is_hub_id(path) and not paths.resolve(path).is_dir()
        if remote and chosen.sha256 is not None:
            raise EncoderError(f"CLIP model {path!r}: sha256 is for folders; a hub model is fixed by its revision")
        place = path if remote else _folder(chosen, "config.json", "preprocessor_config.json")
        where: dict[str, Any] = {"revision": chosen.revision} if remote else {"local_files_only": True}
        try:
            with quiet(bars=remote):
                model = CLIPModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True, **where)
                processor = CLIPImageProcessorPil.from_pretrained(place, **where)
                tokenizer = CLIPTokenizer.from_pretrained(place, **where)
        except (OSError, RuntimeError, ValueError) as error:
            raise EncoderError(
                f"CLIP model {path!r} could not be loaded; needed: config.json, model.safetensors, "
                "preprocessor_config.json and the tokenizer, from a folder or from the hub (network, name, revision?): "
                f"{str(error).strip().splitlines()[0]:.200}"
            ) from error
        name = chosen.name or f"CLIP ({Path(path).name})"
        return cls(model.to(device).eval().requires_grad_(False), processor, tokenizer, name)

    def identity(self) -> str:
        """Return a hash of the image side: the model and the preprocessing."""
        others = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
        settings = [
            {key: value for key, value in part.to_dict().items() if key not in others}
            for part in (self.model.config.vision_config, self.processor)
        ]
        return content_hash([dict(self.model.state_dict()), settings, self.unit_norm])

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return features [image, feature] of uint8 images [image, height, width, 3]."""
        prepared = self.processor(images=list(batch), input_data_format="channels_last", return_tensors="pt")
        pooled = self.model.vision_model(prepared.pixel_values.to(self.model.device)).pooler_output
        features = self.model.visual_projection(pooled)
        return F.normalize(features, dim=-1) if self.unit_norm else features

    @torch.no_grad()
    def describe_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the features of texts, at least one; one of more tokens than the model knows (CLIP: 77) is cut.

        Returns:
            Features [text, feature], float32, of unit norm, on the CPU, without gradient.

        Raises:
            TypeError, ValueError: There are no texts, or they are something else.
        """
        most = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        features = []
        for batch in batches(check_prompts(texts), BATCH_SIZE):
            tokens = self.tokenizer(batch, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
            pooled = self.model.text_model(tokens.input_ids.to(self.model.device)).pooler_output
            features.append(F.normalize(self.model.text_projection(pooled), dim=-1).cpu())
        return torch.cat(features)


# The encoders of a profile, by what they are for


def load_encoder(profile: Profile, role: str, *, device: Device = "cpu") -> Encoder:
    """Return an encoder of a profile by what it is for: one of the names of `nemolib.settings.Encoders`.

    Returns:
        The encoder, for ``alignment`` a `ClipEncoder`. Features of image quality are raw, not of unit norm.

    Raises:
        ProfileError: The profile names none.
        FileNotFoundError: Its files are missing.
        EncoderError: Its files are not what they should be.
    """
    chosen = getattr(profile.encoders, role)
    if chosen is None:
        raise ProfileError(f"profile {profile.name!r} has encoders.{role} = None; name its kind and path there")
    kinds = {"descriptor": CopyDescriptor, "sscd": Sscd, "clip": ClipEncoder, "inception": Inception}
    found = kinds[chosen.kind].load(chosen, device=device)
    if role != "alignment" and isinstance(found, ClipEncoder):
        found.unit_norm = False
    return found


# Files of weights


def check_sha256(path: Path, found: str, *, expected: str) -> None:
    """Raise an EncoderError if the SHA-256 that was found for a file is not the expected one."""
    if expected.lower() != found:
        raise EncoderError(
            f"{path}: expected SHA-256 {expected}, but the file has {found}: it is another file or was cut; delete it and "
            "get it again, or change what is expected"
        )


def _folder(chosen: EncoderSettings, *files: str) -> Path:
    """Return a folder that holds these files and weights; their SHA-256 is checked if it is given."""
    folder = paths.resolve(chosen.path)
    weights = folder / "model.safetensors"
    _require(chosen, *(folder / file for file in files), weights)
    if chosen.sha256 is not None:
        check_sha256(weights, hashlib.sha256(weights.read_bytes()).hexdigest(), expected=chosen.sha256)
    return folder


def _require(chosen: EncoderSettings, *files: Path) -> None:
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(
                f"{chosen.kind} encoder: {path} is missing; run `make data` or `make train`, copy the model again, or name "
                "another path in the profile (CLIP: or a hub id)"
            )
