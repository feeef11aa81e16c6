"""Randomness: initial latents and generators, the same on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def latents(shape: Sequence[int], *, samples: int, seed: int) -> Tensor:
    """Return initial latents drawn from one CPU generator, as the authors' code draws them.

    Sample ``i`` depends on the seed alone, so fewer samples are the first of more, on any device.

    Source: authors' code, utils/stable_diffusion.py.

    Args:
        shape: Shape of one latent, [channel, height, width].
        samples: Number of latents.
        seed: Seed of the generator.

    Returns:
        Standard normal latents [seed, channel, height, width], float32, on the CPU.
    """
    # Type and device are stated: a session may have other defaults.
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((samples, *shape), generator=generator, dtype=torch.float32, device="cpu")


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of sample ``index``: well mixed, so that neighbouring seeds share no sample.

    Raises:
        ValueError: The seed or the index is negative.
    """
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per sample index, so that an image does not depend on the batch it is made in.

    Args:
        seed: Base seed.
        indices: Index of each sample.

    Returns:
        Fresh generators, in the order of ``indices``.
    """
    return [torch.Generator("cpu").manual_seed(sample_seed(seed, index)) for index in indices]


def stream(seed: int, *keys: int | str) -> np.random.Generator:
    """Return random numbers of their own for each sequence of keys, such as a prompt or a layer.

    Args:
        seed: Base seed.
        keys: What the numbers belong to; ``1`` and ``"1"`` differ.
    """
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
