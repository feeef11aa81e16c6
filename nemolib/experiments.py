"""What several notebooks need, computed once: each result is kept in ``build/<profile>/store`` by its content hash.

A notebook that runs alone computes what it needs of earlier ones here, or finds it in the store. A result is used only
for the same model, prompts, settings and code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nemolib.holdout import ActivationStatistics
from nemolib.neurons import NeuronSet
from nemolib.profiles import Profile
from nemolib.protocols import Protocol
from nemolib.settings import GenerationSettings
from nemolib.store import Store

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def open_store(profile: Profile | str, name: str) -> Store:
    """Return the store ``build/<profile>/store/<name>.jsonl``."""
    raise NotImplementedError


def model_hash(pipe: StableDiffusionPipeline) -> str:
    """Return a hash of everything in a pipeline that determines a result."""
    raise NotImplementedError


def test_prompts(profile: Profile | str) -> pd.DataFrame:
    """Return the prompts that are tested: vm, tm, ladder, unmemorized, in this order, as one table."""
    raise NotImplementedError


def statistics(pipe: StableDiffusionPipeline, profile: Profile | str, *, progress: bool = True) -> ActivationStatistics:
    """Return the activation statistics over the profile's holdout prompts."""
    raise NotImplementedError


def holdout_scores(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    *,
    protocol: str | Protocol | None = None,
    guidance: float | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Return the similarity [prompt, pair] of the profile's threshold prompts."""
    raise NotImplementedError


def threshold(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    *,
    multiplier: float | None = None,
    protocol: str | Protocol | None = None,
    progress: bool = True,
) -> float:
    """Return the memorization threshold of a profile: its given value, else mean + multiplier sd of the holdout scores."""
    raise NotImplementedError


def scores(pipe: StableDiffusionPipeline, profile: Profile | str, *, progress: bool = True) -> pd.DataFrame:
    """Return the memorization score of every tested prompt: caption, kind, group, copies, image, score, ..."""
    raise NotImplementedError


def images(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    captions: Sequence[str],
    *,
    neurons: NeuronSet | Sequence[NeuronSet] | None = None,
    factor: float = 0.0,
    settings: GenerationSettings | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Return generated images [prompt, seed, height, width, 3], uint8; each prompt's are kept once made."""
    raise NotImplementedError


def planted_images(profile: Profile | str, table: pd.DataFrame) -> np.ndarray:
    """Return the planted image of each row [prompt, height, width, 3], uint8."""
    raise NotImplementedError


def copies(
    pipe: StableDiffusionPipeline, profile: Profile | str, table: pd.DataFrame, *, progress: bool = True
) -> pd.DataFrame:
    """Return how similar the generated images of prompts are to the planted ones and to each other."""
    raise NotImplementedError
