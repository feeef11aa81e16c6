"""CLIP: images and texts in one space; the cosine of an image and its prompt is their alignment."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nemolib import paths
from nemolib.encoders.base import EncoderError, ImageEncoder, TextEncoder
from nemolib.encoders.checksums import check_sha256
from nemolib.provenance import content_hash

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

PREPROCESSING = "preprocessor_config.json"
"""What is done to images before the network: size, crop, mean, standard deviation. It belongs to the weights."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NO_SETTINGS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


class ClipImages(ImageEncoder):
    """The image side of a CLIP model.

    Attributes:
        model: The model.
        processor: Its preprocessing.
    """

    def __init__(
        self, model: CLIPModel, processor: CLIPImageProcessorPil, *, name: str = "CLIP", unit_norm: bool = True
    ) -> None:
        """Wrap a model and its preprocessing; raw features are for image quality only."""
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
    """The text side of a CLIP model.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        tokens: Tokens of a text, start and end included; what is longer is cut.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, *, name: str = "CLIP") -> None:
        """Wrap a model and its tokenizer."""
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.tokens = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    def identity(self) -> str:
        """Return a hash of the text tower, its projection and the tokenizer."""
        parts = [self.model.text_model.state_dict(), self.model.text_projection.state_dict()]
        tokenizer = [self.tokenizer.backend_tokenizer.to_str(), self.tokens]
        settings = [_settings(self.model.config.text_config), tokenizer]
        return content_hash(["CLIP texts", [dict(part) for part in parts], settings])

    def encode(self, batch: Sequence[str]) -> Tensor:
        """Return unit-norm features [text, feature]; a text of more than `tokens` tokens is cut (CLIP: 77)."""
        ids = self.tokenizer(
            list(batch), padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        ).input_ids
        pooled = self.model.text_model(ids.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)


class ClipEncoder:
    """Both sides of a CLIP model: ``images`` and ``texts``; the cosine of their features is A_CLIP.

    Source: Sec. 4; authors' code, metrics/compute_prompt_alignment.py (ViT-B/32).
    Deviates: the authors' code stops at texts of more than 77 tokens, here they are cut.

    Attributes:
        images: The image encoder.
        texts: The text encoder.
        model: The model of both.
        name: What tables call it.
    """

    def __init__(
        self, model: CLIPModel, processor: CLIPImageProcessorPil, tokenizer: CLIPTokenizer, *, name: str = "CLIP"
    ) -> None:
        """Wrap a ``transformers.CLIPModel``, its preprocessing of images and its tokenizer."""
        self.model, self.name = model.eval().requires_grad_(False), name
        self.images = ClipImages(self.model, processor, name=name)
        self.texts = ClipTexts(self.model, tokenizer, name=name)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        name: str | None = None,
        device: str | torch.device = "cpu",
    ) -> ClipEncoder:
        """Return the CLIP model of a folder or of a hub id, in float32; from safetensors only, without torchvision.

        What differs between models is data: image size, crop, mean and standard deviation stand in
        ``preprocessor_config.json`` beside the weights.

        Args:
            path: Folder (absolute, or relative to the repository), or hub id such as ``openai/clip-vit-base-patch32``.
            revision: Commit or branch of a hub model; None: its default.
            sha256: SHA-256 of ``model.safetensors`` in a folder; None: not checked.
            name: What tables call it; None: ``CLIP (<last part of path>)``.
            device: Where it runs.

        Raises:
            FileNotFoundError: The folder does not exist, or lacks a file.
            EncoderError: Weights have another SHA-256, or the model cannot be loaded.
        """
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        place = _locate(path, sha256=sha256)
        where: dict[str, Any] = {"local_files_only": True} if isinstance(place, Path) else {"revision": revision}
        try:
            with _quiet(bars=not isinstance(place, Path)):
                model = CLIPModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True, **where)
                processor = CLIPImageProcessorPil.from_pretrained(place, **where)
                tokenizer = CLIPTokenizer.from_pretrained(place, **where)
        except (OSError, RuntimeError, ValueError) as error:
            raise EncoderError(
                f"CLIP model {str(path)!r} could not be loaded; needed: config.json, model.safetensors, "
                f"{PREPROCESSING} and the tokenizer, from a folder or from the hub (network, name, revision?): "
                f"{str(error).strip().splitlines()[0]:.200}"
            ) from error
        return cls(model.to(device), processor, tokenizer, name=name or f"CLIP ({Path(path).name})")


def _locate(path: Path | str, *, sha256: str | None) -> Path | str:
    """Return a folder that holds what is needed, or a hub id."""
    folder = paths.resolve(path)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(path)) or folder.parent.is_dir():
            raise FileNotFoundError(f"CLIP model: folder {folder} is missing; run `make train`, or give a hub id")
        if sha256 is not None:
            raise EncoderError(f"CLIP model {str(path)!r}: sha256 is for folders; a hub model is fixed by its revision")
        return str(path)
    for file in ("config.json", PREPROCESSING, "model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"CLIP model: {folder / file} is missing; run `make train`, or copy the model again"
            )
    check_sha256(folder / "model.safetensors", sha256)
    return folder


def _settings(config: Any) -> dict[str, Any]:
    """Return the settings of a config or a processor that determine features."""
    return {key: value for key, value in config.to_dict().items() if key not in _NO_SETTINGS}


@contextlib.contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """Let transformers speak of errors only, and show bars only for what takes long, a download."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
