"""Features of image quality, for FID, CLIP-FID and KID.

They are the exception from unit norm: FID compares mean and covariance of the raw features, KID their raw inner
products, so these encoders have ``unit_norm = False``, and no cosine must be taken of what they return.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nemolib.encoders.base import EncoderError
from nemolib.encoders.clip import ClipEncoder, ClipImages
from nemolib.encoders.torchscript import TorchScriptEncoder
from nemolib.provenance import content_hash

SIDE = 299
"""Side of the images that Inception sees, in pixels; the aspect ratio is not kept."""


class InceptionFeatures(TorchScriptEncoder):
    """The 2,048 pooled features of Inception v3 as clean-fid computes them; raw, not of unit norm.

    Source: Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (CVPR 2022): images are
    resized as floating-point numbers, bicubic with antialias, without rounding; ``inception-2015-12-05.pt``, whose
    layers are called on (x - 128) / 128, past the file's own resizing.
    """

    called = "Inception v3"
    unit_norm = False

    def _check_network(self) -> None:
        if not hasattr(self.model, "layers"):
            raise EncoderError(
                f"{self.name}: the network has no part 'layers'; expected clean-fid's inception-2015-12-05.pt"
            )

    def identity(self) -> str:
        """Return a hash of the file and the preprocessing."""
        return content_hash(["Inception, clean-fid", self.sha256, SIDE])

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return raw features [image, feature] of uint8 images [image, height, width, 3]."""
        pixels = torch.from_numpy(np.stack([_resize(image) for image in batch])).to(self.device)
        return self.model.layers((pixels - 128) / 128).flatten(1)


def clip_features(clip: ClipEncoder, *, name: str | None = None) -> ClipImages:
    """Return the image side of a CLIP model as an encoder of image quality; raw, not of unit norm.

    Source: Kynkäänniemi et al. (ICLR 2023); clean-fid's CLIP-FID: what CLIP's projection returns, not normalized.

    Args:
        clip: The model.
        name: What tables call it; None: the name of its image side.
    """
    return ClipImages(clip.model, clip.images.processor, name=name or clip.images.name, unit_norm=False)


def _resize(image: np.ndarray) -> np.ndarray:
    """Return a uint8 image [height, width, 3] as float32 [3, 299, 299]; bicubic, so it may leave [0, 255] a little."""
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(image, -1, 0)]
    return np.stack([np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels])
