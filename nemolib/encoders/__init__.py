"""Feature extractors behind one interface: images or texts in, a feature matrix out; unit norm, but for image quality.

Which encoders a profile uses is data (`nemolib.profiles.Encoders`); `copy_encoder`, `alignment_encoder` and
`quality_encoder` load them.

Modules: ``base`` (the interface), ``copy_descriptor`` (copy detection in the tiny world), ``sscd`` (copy detection),
``clip`` (alignment), ``quality`` (FID, CLIP-FID, KID), ``torchscript`` (networks published as such), ``checksums`` (SHA-256 of weights), ``cache`` (features on disk),
``roles`` (the encoders of a profile).
"""

from nemolib.encoders.base import Encoder, EncoderError, ImageEncoder, TextEncoder, describe_samples, to_pixels
from nemolib.encoders.cache import describe_cached
from nemolib.encoders.clip import ClipEncoder, ClipImages, ClipTexts
from nemolib.encoders.copy_descriptor import CopyDescriptor
from nemolib.encoders.quality import InceptionFeatures, clip_features
from nemolib.encoders.roles import alignment_encoder, copy_encoder, quality_encoder
from nemolib.encoders.sscd import Sscd

__all__ = [
    "ClipEncoder",
    "ClipImages",
    "ClipTexts",
    "CopyDescriptor",
    "Encoder",
    "EncoderError",
    "ImageEncoder",
    "InceptionFeatures",
    "Sscd",
    "TextEncoder",
    "alignment_encoder",
    "clip_features",
    "copy_encoder",
    "describe_cached",
    "describe_samples",
    "quality_encoder",
    "to_pixels",
]
