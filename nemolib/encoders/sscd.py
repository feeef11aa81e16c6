"""Copy detection at the scale of the paper: SSCD."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nemolib.encoders.base import EncoderError
from nemolib.encoders.torchscript import TorchScriptEncoder
from nemolib.provenance import content_hash

SIDE = 320
"""Side of the images that SSCD sees, in pixels; the aspect ratio is not kept."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels of ImageNet, for pixels in [0, 1]."""


class Sscd(TorchScriptEncoder):
    """SSCD's descriptor: the cosine of two images is their copy similarity.

    Source: Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection" (CVPR 2022); authors' code,
    metrics/compute_sscd_orig.py: ``sscd_disc_mixup.torchscript.pt``, images of 320 x 320 (PIL, bilinear), mean and
    standard deviation of ImageNet. The network takes normalized pixels [image, 3, 320, 320] and returns [image, feature].
    """

    called = "SSCD"

    def identity(self) -> str:
        """Return a hash of the file and the preprocessing."""
        return content_hash(["SSCD", self.sha256, SIDE, MEAN, STD])

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return unit-norm features [image, feature] of uint8 images [image, height, width, 3].

        Raises:
            EncoderError: The network returns something else than one vector per image.
        """
        features = self.model(preprocess(batch).to(self.device))
        if features.ndim != 2 or len(features) != len(batch):
            raise EncoderError(f"{self.name}: expected features [{len(batch)}, feature], got {list(features.shape)}")
        return F.normalize(features.float(), dim=-1)


def preprocess(images: np.ndarray) -> Tensor:
    """Return uint8 images [image, height, width, 3] as SSCD sees them: normalized pixels [image, 3, 320, 320]."""
    resized = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for image in images]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
