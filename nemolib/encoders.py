"""Feature extractors behind one interface: images or texts in, a unit-norm feature matrix out.

``CopyDescriptor`` plays the role of SSCD in the tiny world, ``ClipEncoder`` gives the alignment of image and prompt.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Return uint8 images [image, height, width, 3] as float pixels in [-1, 1], [image, 3, height, width].

    Raises:
        ValueError: the array is not uint8 or not of this shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [image, height, width, 3], got {images.dtype} {list(images.shape)}")
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class CopyDescriptor(nn.Module):
    """A small convolutional network whose unit-norm features tell copies of an image from other images.

    Source: SSCD (Pizzi et al., CVPR 2022): generalized-mean pooling and a linear projection after a trunk.
    """

    def __init__(self, channels: tuple[int, ...], features: int) -> None:
        """Build the network: one stride-2 stage per entry of ``channels``, then ``features`` outputs."""
        super().__init__()
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

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return unit-norm features [image, feature] of pixels in [-1, 1], [image, 3, height, width]."""
        maps = self.trunk(pixels).clamp(min=1e-6)
        pooled = F.adaptive_avg_pool2d(maps**3, 2) ** (1 / 3)
        return F.normalize(self.project(pooled.flatten(1)), dim=-1)

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write ``config.json`` and ``model.safetensors`` to the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        weights = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path | str) -> "CopyDescriptor":
        """Return the descriptor saved in the folder, in float32, ready for inference.

        Raises:
            FileNotFoundError: the folder lacks one of its two files.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).exists():
                raise FileNotFoundError(f"copy-detection descriptor: {folder / name} is missing; run `make train`")
        config = json.loads((folder / "config.json").read_text())
        model = cls(tuple(config["channels"]), config["features"])
        model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def describe(self, images: np.ndarray, *, batch_size: int = 128) -> torch.Tensor:
        """Return unit-norm features [image, feature] of uint8 images [image, height, width, 3]."""
        pixels = to_pixels(images)
        return torch.cat([self(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)])


class ClipEncoder:
    """Image and text features of a CLIP model: their cosine is the alignment score A_CLIP (Sec. 4)."""

    def __init__(self, model: nn.Module, tokenizer) -> None:
        """Wrap a ``transformers.CLIPModel`` that takes pixels in [-1, 1] and its tokenizer."""
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def load(cls, folder: Path | str) -> "ClipEncoder":
        """Return the encoder saved in a folder, in float32, safetensors only.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        from transformers import CLIPModel, CLIPTokenizer

        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"alignment encoder: folder {folder} is missing; run `make train`")
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        return cls(model, CLIPTokenizer.from_pretrained(folder))

    @torch.no_grad()
    def describe_images(self, images: np.ndarray, *, batch_size: int = 128) -> torch.Tensor:
        """Return unit-norm features [image, feature] of uint8 images [image, height, width, 3]."""
        pixels = to_pixels(images)
        features = [
            self.model.visual_projection(self.model.vision_model(pixels[i : i + batch_size]).pooler_output)
            for i in range(0, len(pixels), batch_size)
        ]
        return F.normalize(torch.cat(features), dim=-1)

    @torch.no_grad()
    def describe_texts(self, texts: list[str]) -> torch.Tensor:
        """Return unit-norm features [text, feature]."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        pooled = self.model.text_model(tokens.input_ids).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)
