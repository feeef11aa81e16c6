"""Features on disk, found by content: the same image or text is encoded once, in whatever run and order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nemolib.batching import batches
from nemolib.encoders.base import BATCH_SIZE, Encoder
from nemolib.files import write_atomic
from nemolib.provenance import content_hash, science_hash


def describe_cached(
    encoder: Encoder, items: np.ndarray | Sequence[str], folder: Path, *, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Return the features of images or texts; each is encoded only if it is not in the cache yet.

    An entry is found by the content of the image or text, by what the encoder is (weights and preprocessing) and by the
    code of the encoders. Entries are written batch by batch, so a run that was killed loses one batch at most. An entry
    that was damaged is computed again. A feature may depend in its last digits on the batch that it was computed in.

    Args:
        encoder: An image or text encoder.
        items: Images [image, height, width, 3], uint8, or texts; at least one.
        folder: Where the entries lie, such as ``build/<profile>/store/features``.
        batch_size: Items of one forward pass.

    Returns:
        Features [item, feature], float32, as `nemolib.encoders.Encoder.describe` returns them.

    Raises:
        ValueError: There are no items, or they are something else.
        OSError: The disk is full; the entries before are safe.
    """
    items = encoder.check(items)
    base = content_hash([encoder.identity(), science_hash("encoders")])
    keys = [content_hash([base, item]) for item in items]
    first: dict[str, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    known = {key: entry for key in first if (entry := _read(folder, key)) is not None}
    for batch in batches([place for key, place in first.items() if key not in known], batch_size):
        chosen = items[batch] if isinstance(items, np.ndarray) else [items[place] for place in batch]
        for place, features in zip(batch, encoder.describe(chosen, batch_size=batch_size), strict=True):
            known[keys[place]] = features
            _write(folder, keys[place], features)
    return torch.stack([known[key] for key in keys])


def _file(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def _write(folder: Path, key: str, features: Tensor) -> None:
    # Safetensors has no checksum of its own, so the tensor is called by its content.
    write_atomic(_file(folder, key), save({content_hash(features): features.clone()}))


def _read(folder: Path, key: str) -> Tensor | None:
    """Return an entry; None if there is none or it was damaged."""
    try:
        ((name, features),) = load(_file(folder, key).read_bytes()).items()
    except (FileNotFoundError, SafetensorError, ValueError):
        return None
    return features if content_hash(features) == name else None
