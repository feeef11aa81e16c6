"""Copy detection in the tiny world: a small network in the role of SSCD."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nemolib.encoders.base import ImageEncoder, to_pixels
from nemolib.encoders.checksums import check_sha256
from nemolib.provenance import content_hash


class CopyDescriptor(nn.Module, ImageEncoder):
    """A small convolutional network whose unit-norm features tell copies of an image from other images.

    Source: SSCD (Pizzi et al., CVPR 2022): generalized-mean pooling and a linear projection after a trunk.
    """

    def __init__(self, channels: tuple[int, ...], features: int, *, name: str = "copy descriptor") -> None:
        """Build the network: one stride-2 stage per entry of ``channels``, then ``features`` outputs."""
        super().__init__()
        self.name = name
        self.config = {"channels": list(channels), "features": features}
        stages, width = [], 3
        for wider in channels:
            stages += [
                nn.Conv2d(width, wider, 4, stride=2, padding=1), nn.GroupNorm(4, wider), nn.SiLU(),
                nn.Conv2d(wider, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.SiLU(),
            ]  # fmt: skip
            width = wider
        self.trunk = nn.Sequential(*stages)
        # Pooled over a 2 x 2 grid, so that the place of things counts.
        self.project = nn.Linear(4 * width, features)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit-norm features [image, feature] of pixels in [-1, 1], [image, 3, height, width]."""
        maps = self.trunk(pixels).clamp(min=1e-6)
        pooled = F.adaptive_avg_pool2d(maps**3, 2) ** (1 / 3)
        return F.normalize(self.project(pooled.flatten(1)), dim=-1)

    def encode(self, batch: np.ndarray) -> Tensor:
        """Return unit-norm features [image, feature] of uint8 images [image, height, width, 3]."""
        return self(to_pixels(batch).to(self.project.weight.device))

    def identity(self) -> str:
        """Return a hash of shape and weights; pixels in [-1, 1] are all its preprocessing."""
        return content_hash(["copy descriptor", self.config, dict(self.state_dict())])

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write ``config.json`` and ``model.safetensors`` to the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        weights = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        sha256: str | None = None,
        name: str | None = None,
        device: str | torch.device = "cpu",
    ) -> CopyDescriptor:
        """Return the descriptor saved in the folder, in float32, ready for inference.

        Args:
            folder: What `save` wrote.
            sha256: SHA-256 of ``model.safetensors``; None: not checked.
            name: What tables call it.
            device: Where it runs.

        Raises:
            FileNotFoundError: The folder lacks one of its two files.
            EncoderError: The weights have another SHA-256.
        """
        folder = Path(folder)
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).exists():
                raise FileNotFoundError(f"copy-detection descriptor: {folder / file} is missing; run `make train`")
        check_sha256(folder / "model.safetensors", sha256)
        config = json.loads((folder / "config.json").read_text())
        model = cls(tuple(config["channels"]), config["features"], **({} if name is None else {"name": name}))
        model.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
        return model.to(device).eval().requires_grad_(False)
