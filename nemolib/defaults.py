"""What holds where nothing is said: the settings of the profile that a pipeline was loaded from, else the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemolib.pipeline import profile_of
from nemolib.protocols import Protocol, load_protocol
from nemolib.settings import (
    DetectionSettings,
    GenerationSettings,
    MitigationSettings,
    SearchSettings,
    SimilaritySettings,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from nemolib.profiles import Profile


@dataclass(frozen=True, slots=True)
class Defaults:
    """The settings of the paper's experiment with Stable Diffusion v1-4."""

    detection: DetectionSettings = DetectionSettings()
    similarity: SimilaritySettings = SimilaritySettings()
    search: SearchSettings = SearchSettings()
    generation: GenerationSettings = GenerationSettings()
    mitigation: MitigationSettings = MitigationSettings()


def default_settings(pipe: StableDiffusionPipeline) -> Profile | Defaults:
    """Return the profile that a pipeline was loaded from, else the settings of the paper's experiment."""
    return profile_of(pipe) or Defaults()


def default_protocol(pipe: StableDiffusionPipeline, protocol: str | Protocol | None = None) -> Protocol:
    """Return the given protocol; None means that of the pipeline's profile, else `released`.

    Raises:
        ValueError: The name is not that of a known protocol.
    """
    if protocol is not None:
        return load_protocol(protocol)
    profile = profile_of(pipe)
    return load_protocol("released" if profile is None else profile.protocol)
