"""The one interface of all encoders: images or texts in, a feature matrix out, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemolib.batching import batches

BATCH_SIZE = 128
"""Images or texts of one forward pass, if nothing else is said."""


class EncoderError(ValueError):
    """An encoder that cannot be used; the message names the file, what was found there and what to do."""


class Encoder(ABC):
    """What image and text encoders have in common.

    Attributes:
        name: What tables call it; every table of a metric says with which encoder it was computed.
        unit_norm: Whether the features have unit norm, so that their inner product is a cosine. False only for the
            features of image quality: FID and KID are defined on raw features.
    """

    name: str
    unit_norm: bool = True

    @abstractmethod
    def identity(self) -> str:
        """Return a hash of everything that determines the features: weights and preprocessing."""

    @abstractmethod
    def encode(self, batch: Any) -> Tensor:
        """Return the features [item, feature] of one batch."""

    @abstractmethod
    def check(self, items: Any) -> Any:
        """Return the items in a form of which `encode` takes slices; raise ValueError if none or something else."""

    @torch.no_grad()
    def describe(self, items: Any, *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Return the features of images or texts.

        Args:
            items: Images [image, height, width, 3], uint8, or a sequence of texts; at least one.
            batch_size: Items of one forward pass.

        Returns:
            Features [item, feature], float32, on the CPU, without gradient; of unit norm if `unit_norm`.

        Raises:
            ValueError: There are no items, or they are something else.
        """
        items = self.check(items)
        return torch.cat([self.encode(batch).float().cpu() for batch in batches(items, batch_size)])


class ImageEncoder(Encoder):
    """An encoder of images."""

    def check(self, items: np.ndarray) -> np.ndarray:
        """Return images as an array; raise ValueError unless they are uint8 [image, height, width, 3], at least one."""
        return _not_empty(self, check_images(items))


class TextEncoder(Encoder):
    """An encoder of texts."""

    def check(self, items: Sequence[str]) -> list[str]:
        """Return texts as a list; raise ValueError if there are none, or if they are one text or something else."""
        if isinstance(items, str) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{self.name}: expected a sequence of texts, got {items!r:.80}")
        return _not_empty(self, list(items))


def check_images(images: np.ndarray) -> np.ndarray:
    """Return images as an array.

    Raises:
        ValueError: They are not uint8 [image, height, width, 3].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [image, height, width, 3], got {images.dtype} {list(images.shape)}")
    return images


def to_pixels(images: np.ndarray) -> Tensor:
    """Return uint8 images [image, height, width, 3] as float pixels in [-1, 1], [image, 3, height, width].

    Raises:
        ValueError: The array is not uint8 or not of this shape.
    """
    return torch.from_numpy(np.array(check_images(images))).permute(0, 3, 1, 2).float() / 127.5 - 1


def describe_samples(encoder: ImageEncoder, images: np.ndarray, *, batch_size: int = BATCH_SIZE) -> np.ndarray:
    """Return the features of the images of several prompts and seeds.

    Args:
        encoder: An image encoder.
        images: Images [prompt, seed, height, width, 3], uint8, as `nemolib.experiments.images` returns them.
        batch_size: Images of one forward pass.

    Returns:
        Features [prompt, seed, feature], float32.

    Raises:
        ValueError: The images have another shape or type, or there are none.
    """
    images = np.asarray(images)
    if images.ndim != 5:
        raise ValueError(f"images must be [prompt, seed, height, width, 3], got {list(images.shape)}")
    features = encoder.describe(images.reshape(-1, *images.shape[2:]), batch_size=batch_size)
    return features.unflatten(0, images.shape[:2]).numpy()


def _not_empty(encoder: Encoder, items: Any) -> Any:
    if not len(items):
        raise ValueError(f"{encoder.name}: there is nothing to describe; give at least one image or text")
    return items
