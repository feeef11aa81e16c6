"""Feature extractors behind one interface: images or texts in, a feature matrix out; unit norm, but for image quality.

Which encoders a profile uses is data (`nemolib.settings.Encoders`); `copy_encoder`, `alignment_encoder` and
`quality_encoder` load them. Their weights are what they are said to be: a profile states the SHA-256, or that of a
TorchScript file is noted at its first use.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nemolib import paths
from nemolib.batching import batches
from nemolib.pipeline import is_hub_id, quiet
from nemolib.provenance import content_hash
from nemolib.settings import EncoderSettings, Profile, ProfileError
from nemolib.store import write_atomic

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

Device = str | torch.device

BATCH_SIZE = 128
"""Images or texts of one forward pass."""

SSCD_SIDE, SSCD_MEAN, SSCD_STD = 320, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What SSCD sees: side of the images in pixels, and mean and standard deviation of ImageNet's channels in [0, 1]."""

INCEPTION_SIDE = 299
"""Side of the images that Inception sees, in pixels; like SSCD's, without keeping the aspect ratio."""

PREPROCESSING = "preprocessor_config.json"
"""What is done to images before a CLIP network: size, crop, mean, standard deviation. It belongs to the weights."""


class EncoderError(ValueError):
    """An encoder that cannot be used; the message names the file, what was found there and what to do."""


class FirstUse(UserWarning):
    """A file of weights whose SHA-256 nobody has stated yet."""


class Encoder(ABC):
    """What image and text encoders have in common.

    Attributes:
        name: What tables call it; every table of a metric says with which encoder it was computed.
        unit_norm: Whether the features have unit norm, so that their inner product is a cosine. False only for the
            features of image quality: FID and KID are defined on raw features, and no cosine must be taken of them.
    """

    name: str
    unit_norm: bool = True

    @abstractmethod
    def identity(self) -> str:
        """Return a hash of everything that determines the features: weights and preprocessing."""

    @abstractmethod
    def encode(self, batch: Any) -> Tensor:
        """Return the features [item, feature] of one batch of checked items."""

    @abstractmethod
    def check(self, items: Any) -> Any:
        """Return the items in a form of which `encode` takes slices; raise ValueError if they are something else."""

    @torch.no_grad()
    def describe(self, items: Any) -> Tensor:
        """Return the features of images [image, height, width, 3], uint8, or of a sequence of texts; at least one.

        Returns:
            Features [item, feature], float32, on the CPU, without gradient; of unit norm if `unit_norm`.

        Raises:
            ValueError: There are no items, or they are something else.
        """
        items = self.check(items)
        if not len(items):
            raise ValueError(f"{self.name}: there is nothing to describe; give at least one image or text")
        return torch.cat([self.encode(batch).float().cpu() for batch in batches(items, BATCH_SIZE)])


class ImageEncoder(Encoder):
    """An encoder of images."""

    def check(self, items: np.ndarray) -> np.ndarray:
        """Return images as an array; raise ValueError unless they are uint8 [image, height, width, 3]."""
        return _check_images(items)


class TextEncoder(Encoder):
    """An encoder of texts."""

    def check(self, items: Sequence[str]) -> list[str]:
        """Return texts as a list; raise ValueError if they are one text or something else."""
        if isinstance(items, str) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{self.name}: expected a sequence of texts, got {items!r:.80}")
        return list(items)


def to_pixels(images: np.ndarray) -> Tensor:
    """Return uint8 images [image, height, width, 3] as float pixels in [-1, 1], [image, 3, height, width].

    Raises:
        ValueError: The array is not uint8 or not of this shape.
    """
    return torch.from_numpy(np.array(_check_images(images))).permute(0, 3, 1, 2).float() / 127.5 - 1


# Copy detection


class CopyDescriptor(nn.Module, ImageEncoder):
    """Copy detection in the tiny world: a small network whose unit-norm features tell copies of an image from others.

    Source: SSCD (Pizzi et al., CVPR 2022): generalized-mean pooling and a linear projection after a trunk.
    """

    def __init__(self, channels: Sequence[int], features: int, *, name: str | None = None) -> None:
        """Build the network: one stride-2 stage per entry of ``channels``, then ``features`` outputs."""
        super().__init__()
        self.name = name or "copy descriptor"
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
        """Return a hash of shape and weights; pixels in [-1, 1] are all its preprocessing."""
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
        model = cls(**json.loads((folder / "config.json").read_text()), name=chosen.name)
        model.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
        return model.to(device).eval().requires_grad_(False)


class TorchScriptEncoder(ImageEncoder):
    """An image encoder whose authors published its network as a TorchScript file.

    Args:
        model: The network, on its device.
        sha256: SHA-256 of its file.
        name: What tables call it; None: as its authors do.
        device: Where it runs.
    """

    called: ClassVar[str]

    def __init__(self, model: nn.Module, *, sha256: str, name: str | None = None, device: Device = "cpu") -> None:
        self.model, self.sha256, self.name, self.device = model, sha256, name or self.called, device

    @classmethod
    def load(cls, chosen: EncoderSettings, *, device: Device = "cpu") -> Self:
        """Return the encoder from its file; read `load_torchscript` first.

        Raises:
            FileNotFoundError: There is no such file.
            EncoderError: The SHA-256 differs, or the file holds no TorchScript or another network.
        """
        model, found = load_torchscript(paths.resolve(chosen.path), sha256=chosen.sha256, device=device)
        return cls(model, sha256=found, name=chosen.name, device=device)


class Sscd(TorchScriptEncoder):
    """SSCD's descriptor: the cosine of two images is their copy similarity.

    Source: Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection" (CVPR 2022); authors' code,
    metrics/compute_sscd_orig.py: ``sscd_disc_mixup.torchscript.pt``, images of 320 x 320 (PIL, bilinear), mean and
    standard deviation of ImageNet. The network takes normalized pixels [image, 3, 320, 320] and returns [image, feature].
    """

    called = "SSCD"

    def identity(self) -> str:
        """Return a hash of the file and the preprocessing."""
        return content_hash(["SSCD", self.sha256, SSCD_SIDE, SSCD_MEAN, SSCD_STD])

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return unit-norm features [image, feature] of uint8 images [image, height, width, 3].

        Raises:
            EncoderError: The network returns something else than one vector per image.
        """
        features = self.model(self.preprocess(batch).to(self.device))
        if features.ndim != 2 or len(features) != len(batch):
            raise EncoderError(f"{self.name}: expected features [{len(batch)}, feature], got {list(features.shape)}")
        return F.normalize(features.float(), dim=-1)

    @staticmethod
    def preprocess(images: np.ndarray) -> Tensor:
        """Return uint8 images [image, height, width, 3] as SSCD sees them: normalized pixels [image, 3, 320, 320]."""
        size = (SSCD_SIDE, SSCD_SIDE)
        resized = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in images]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
        return (pixels - torch.tensor(SSCD_MEAN).view(3, 1, 1)) / torch.tensor(SSCD_STD).view(3, 1, 1)


# Image quality


class Inception(TorchScriptEncoder):
    """The 2,048 pooled features of Inception v3 as clean-fid computes them; raw, not of unit norm.

    Source: Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (CVPR 2022): images are
    resized as floating-point numbers, bicubic with antialias, without rounding; ``inception-2015-12-05.pt``, whose
    layers are called on (x - 128) / 128, past the file's own resizing.
    """

    called = "Inception v3"
    unit_norm = False

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        if not hasattr(model, "layers"):
            raise EncoderError(
                f"{self.name}: the network has no part 'layers'; expected clean-fid's inception-2015-12-05.pt"
            )

    def identity(self) -> str:
        """Return a hash of the file and the preprocessing."""
        return content_hash(["Inception, clean-fid", self.sha256, INCEPTION_SIDE])

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return raw features [image, feature] of uint8 images [image, height, width, 3]."""
        pixels = torch.from_numpy(np.stack([self.resize(image) for image in batch])).to(self.device)
        return self.model.layers((pixels - 128) / 128).flatten(1)

    @staticmethod
    def resize(image: np.ndarray) -> np.ndarray:
        """Return a uint8 image [height, width, 3] as float32 [3, 299, 299]; bicubic, so it may leave [0, 255] a little."""
        channels = [Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0).astype(np.float32)]
        size = (INCEPTION_SIDE, INCEPTION_SIDE)
        return np.stack([np.asarray(channel.resize(size, Image.Resampling.BICUBIC)) for channel in channels])


# Alignment


class ClipImages(ImageEncoder):
    """The image side of a CLIP model.

    Args:
        model: The model.
        processor: Its preprocessing of images.
        name: What tables call it.
        unit_norm: False: what CLIP's projection returns, as clean-fid's CLIP-FID takes it (Kynkäänniemi et al., ICLR
            2023); for image quality only.
    """

    def __init__(
        self, model: CLIPModel, processor: CLIPImageProcessorPil, *, name: str, unit_norm: bool = True
    ) -> None:
        self.model, self.processor, self.name, self.unit_norm = model, processor, name, unit_norm

    def identity(self) -> str:
        """Return a hash of the image tower, its projection and the preprocessing."""
        parts = [self.model.vision_model.state_dict(), self.model.visual_projection.state_dict()]
        settings = [_settings(self.model.config.vision_config), _settings(self.processor), self.unit_norm]
        return content_hash(["CLIP images", [dict(part) for part in parts], settings])

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return features [image, feature] of uint8 images [image, height, width, 3]."""
        prepared = self.processor(images=list(batch), input_data_format="channels_last", return_tensors="pt")
        pooled = self.model.vision_model(prepared.pixel_values.to(self.model.device)).pooler_output
        features = self.model.visual_projection(pooled)
        return F.normalize(features, dim=-1) if self.unit_norm else features


class ClipTexts(TextEncoder):
    """The text side of a CLIP model; a text of more tokens than it knows (CLIP: 77, start and end included) is cut."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, *, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.tokens = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    def identity(self) -> str:
        """Return a hash of the text tower, its projection and the tokenizer."""
        parts = [self.model.text_model.state_dict(), self.model.text_projection.state_dict()]
        tokenizer = [self.tokenizer.backend_tokenizer.to_str(), self.tokens]
        settings = [_settings(self.model.config.text_config), tokenizer]
        return content_hash(["CLIP texts", [dict(part) for part in parts], settings])

    def encode(self, batch: Sequence[str]) -> Tensor:
        """Return unit-norm features [text, feature]."""
        ids = self.tokenizer(
            list(batch), padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        ).input_ids
        pooled = self.model.text_model(ids.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)


class ClipEncoder:
    """Both sides of a CLIP model: ``images`` and ``texts``; the cosine of their features is A_CLIP.

    Source: Sec. 4; authors' code, metrics/compute_prompt_alignment.py (ViT-B/32).
    Deviates: the authors' code stops at texts of more than 77 tokens, here they are cut.
    """

    def __init__(
        self, model: CLIPModel, processor: CLIPImageProcessorPil, tokenizer: CLIPTokenizer, *, name: str
    ) -> None:
        self.model, self.name = model.eval().requires_grad_(False), name
        self.images = ClipImages(self.model, processor, name=name)
        self.texts = ClipTexts(self.model, tokenizer, name=name)

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
        place = path if remote else _folder(chosen, "config.json", PREPROCESSING)
        where: dict[str, Any] = {"revision": chosen.revision} if remote else {"local_files_only": True}
        try:
            with quiet(bars=remote):
                model = CLIPModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True, **where)
                processor = CLIPImageProcessorPil.from_pretrained(place, **where)
                tokenizer = CLIPTokenizer.from_pretrained(place, **where)
        except (OSError, RuntimeError, ValueError) as error:
            raise EncoderError(
                f"CLIP model {path!r} could not be loaded; needed: config.json, model.safetensors, {PREPROCESSING} and "
                "the tokenizer, from a folder or from the hub (network, name, revision?): "
                f"{str(error).strip().splitlines()[0]:.200}"
            ) from error
        return cls(model.to(device), processor, tokenizer, name=chosen.name or f"CLIP ({Path(path).name})")


def _settings(config: Any) -> dict[str, Any]:
    """Return the settings of a config or a processor that determine features."""
    others = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
    return {key: value for key, value in config.to_dict().items() if key not in others}


# The encoders of a profile, by what they are for


def copy_encoder(profile: Profile, *, device: Device = "cpu") -> ImageEncoder:
    """Return the encoder whose cosine of two images is their copy similarity: SSCD, or the tiny world's descriptor.

    Raises:
        ProfileError: ``encoders.copy`` of the profile names none.
        FileNotFoundError: Its files are missing.
        EncoderError: Its files are not what they should be.
    """
    return _load(profile, "copy", device)


def alignment_encoder(profile: Profile, *, device: Device = "cpu") -> ClipEncoder:
    """Return the CLIP model whose cosine of an image and its prompt is their alignment (``encoders.alignment``).

    Raises:
        ProfileError, FileNotFoundError, EncoderError: As `copy_encoder`.
    """
    return _load(profile, "alignment", device)


def quality_encoder(
    profile: Profile, *, role: Literal["quality", "clip_quality"] = "quality", device: Device = "cpu"
) -> ImageEncoder:
    """Return the encoder of image quality, with raw features: Inception, or the image side of a CLIP model.

    Args:
        profile: The profile.
        role: ``quality`` for FID and KID, ``clip_quality`` for CLIP-FID: which of its ``encoders``.
        device: Where it runs.

    Raises:
        ProfileError, FileNotFoundError, EncoderError: As `copy_encoder`.
    """
    found = _load(profile, role, device)
    if isinstance(found, ClipEncoder):
        return ClipImages(found.model, found.images.processor, name=found.name, unit_norm=False)
    return found


def _load(profile: Profile, role: str, device: Device) -> Any:
    chosen = getattr(profile.encoders, role)
    if chosen is None:
        raise ProfileError(
            f"profile {profile.name!r} has encoders.{role} = None; name its kind and path (see nemolib.settings.Encoders)"
        )
    kinds = {"descriptor": CopyDescriptor, "sscd": Sscd, "clip": ClipEncoder, "inception": Inception}
    return kinds[chosen.kind].load(chosen, device=device)


# Files of weights


def load_torchscript(
    path: Path, *, sha256: str | None = None, device: Device = "cpu"
) -> tuple[torch.jit.ScriptModule, str]:
    """Return a TorchScript network, ready for inference, and the SHA-256 of its file.

    What loading means: a TorchScript file holds weights and a program in TorchScript. It is not unpickled as Python, so
    it cannot import modules or call arbitrary functions. But it is a program: torch's interpreter runs it, and among
    its operators are some that read and write files. Load a file of unknown origin as you would start a program of
    unknown origin. Hence the SHA-256: what runs is the file that you decided to trust, and no other.

    Args:
        path: The file.
        sha256: What its SHA-256 has to be; None: what was noted at the first use (see `check_sha256`).
        device: Where it runs.

    Returns:
        The network, and 64 hexadecimal digits.

    Raises:
        FileNotFoundError: There is no such file.
        EncoderError: The SHA-256 differs, or the file holds no TorchScript.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} are missing; download them and give their path in the profile")
    # What is hashed and what is loaded are the very same bytes.
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    check_sha256(path, found, stated=sha256)
    try:
        with warnings.catch_warnings():
            # TorchScript is what the authors of these networks published.
            warnings.filterwarnings("ignore", message=".*torch.jit.load.*", category=DeprecationWarning)
            model = torch.jit.load(io.BytesIO(content), map_location=torch.device(device))
    except RuntimeError as error:
        raise EncoderError(f"{path} holds no TorchScript network; download it again ({error!s:.200})") from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), found


def check_sha256(path: Path, found: str, *, stated: str | None = None) -> None:
    """Compare the SHA-256 that was found for a file with the stated one, or else with the one noted beside the file.

    If there is neither, the file is used for the first time: its SHA-256 is noted there, and the user is told.

    Raises:
        EncoderError: The SHA-256 differs, or the note beside the file cannot be read.
    """
    expected = noted_sha256(path) if stated is None else stated
    if expected is None:
        note = note_sha256(path, found)
        warnings.warn(
            f"{path} is used for the first time; its SHA-256 is {found} (noted in {note.name}). Compare it with the "
            "source of the file, and state it in the profile as sha256.",
            FirstUse,
            stacklevel=2,
        )
    elif found != expected.lower():
        who = f"{_note(path).name}, written at its first use, states" if stated is None else "the profile states"
        raise EncoderError(
            f"{path}: {who} SHA-256 {expected}, but the file has {found}; it is another file or was cut, so it is not "
            "loaded. Download it again, or change what is expected"
        )


def noted_sha256(path: Path) -> str | None:
    """Return the SHA-256 that was noted at the first use of a file, None if there is no note.

    Raises:
        EncoderError: The note cannot be read.
    """
    note = _note(path)
    if not note.is_file():
        return None
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise EncoderError(f"{note} is not readable; delete it, and check the SHA-256 of its file again") from error


def note_sha256(path: Path, found: str) -> Path:
    """Note the SHA-256 of a file beside it, and return the note."""
    write_atomic(_note(path), json.dumps({"file": path.name, "sha256": found}, indent=2) + "\n")
    return _note(path)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256.json")


def _folder(chosen: EncoderSettings, *files: str) -> Path:
    """Return a folder that holds these files and weights; their SHA-256 is checked if it is given."""
    folder = paths.resolve(chosen.path)
    weights = folder / "model.safetensors"
    for path in (*(folder / file for file in files), weights):
        if not path.is_file():
            raise FileNotFoundError(
                f"{chosen.kind} encoder: {path} is missing; run `make train`, copy the model again, or name another "
                "folder in the profile (CLIP: or a hub id)"
            )
    if chosen.sha256 is not None:
        check_sha256(weights, hashlib.sha256(weights.read_bytes()).hexdigest(), stated=chosen.sha256)
    return folder


def _check_images(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [image, height, width, 3], got {images.dtype} {list(images.shape)}")
    return images
