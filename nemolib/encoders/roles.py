"""The encoders of a profile by what they are for: copy detection, alignment, image quality."""

from __future__ import annotations

from typing import Literal

import torch

from nemolib import paths
from nemolib.encoders.base import ImageEncoder
from nemolib.encoders.clip import ClipEncoder
from nemolib.encoders.copy_descriptor import CopyDescriptor
from nemolib.encoders.quality import InceptionFeatures, clip_features
from nemolib.encoders.sscd import Sscd
from nemolib.profiles import EncoderSettings, Profile, ProfileError, load_profile

Device = str | torch.device


def copy_encoder(profile: Profile | str, *, device: Device = "cpu") -> ImageEncoder:
    """Return the encoder whose cosine of two images is their copy similarity: SSCD, or the tiny world's descriptor.

    Args:
        profile: A profile or its name; ``encoders.copy`` says which.
        device: Where it runs.

    Raises:
        ProfileError: The profile names none.
        FileNotFoundError: Its files are missing.
        EncoderError: Its files are not what they should be.
    """
    profile = load_profile(profile)
    chosen = _chosen(profile, "copy")
    load = {"descriptor": CopyDescriptor.load, "sscd": Sscd.load}[chosen.kind]
    return load(paths.resolve(chosen.path), sha256=chosen.sha256, name=chosen.name, device=device)


def alignment_encoder(profile: Profile | str, *, device: Device = "cpu") -> ClipEncoder:
    """Return the CLIP model whose cosine of an image and its prompt is their alignment.

    Args:
        profile: A profile or its name; ``encoders.alignment`` says which.
        device: Where it runs.

    Raises:
        ProfileError: The profile names none.
        FileNotFoundError: Its files are missing.
        EncoderError: Its files are not what they should be.
    """
    return _clip(_chosen(load_profile(profile), "alignment"), device)


def quality_encoder(
    profile: Profile | str, *, role: Literal["quality", "clip_quality"] = "quality", device: Device = "cpu"
) -> ImageEncoder:
    """Return the encoder of image quality, with raw features: Inception, or the image side of a CLIP model.

    Args:
        profile: A profile or its name; ``encoders.quality`` says which, for CLIP-FID ``encoders.clip_quality``.
        role: ``quality`` for FID and KID, ``clip_quality`` for CLIP-FID.
        device: Where it runs.

    Raises:
        ProfileError: The profile names none.
        FileNotFoundError: Its files are missing.
        EncoderError: Its files are not what they should be.
    """
    chosen = _chosen(load_profile(profile), role)
    if chosen.kind == "clip":
        return clip_features(_clip(chosen, device))
    path = paths.resolve(chosen.path)
    return InceptionFeatures.load(path, sha256=chosen.sha256, name=chosen.name, device=device)


def _clip(chosen: EncoderSettings, device: Device) -> ClipEncoder:
    return ClipEncoder.load(
        chosen.path, revision=chosen.revision, sha256=chosen.sha256, name=chosen.name, device=device
    )


def _chosen(profile: Profile, role: str) -> EncoderSettings:
    chosen = getattr(profile.encoders, role)
    if chosen is None:
        raise ProfileError(
            f"profile {profile.name!r} has encoders.{role} = None; name its kind and path (see nemolib.profiles.Encoders)"
        )
    return chosen
