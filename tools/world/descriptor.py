"""Stage 5: the copy-detection descriptor, trained with SSCD's recipe on the images of the world.

Source: SSCD (Pizzi et al., CVPR 2022): InfoNCE between augmented copies plus an entropy term that spreads the features.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from nemolib.encoders import CopyDescriptor, to_pixels
from tools.world.dataset import Dataset
from tools.world.settings import DescriptorSettings, WorldSettings
from tools.world.training import DEVICE, Generators, Stage, run


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random copies of pixels in [-1, 1], [image, 3, height, width].

    Crops of 70-100 % of each side (with a slight shift and turn), brightness, contrast and colour changes, blur, noise.
    """
    number = len(pixels)
    zoom, turn = _uniform(number, 0.7, 1.0, generator), _uniform(number, -0.1, 0.1, generator)
    slack = 1 - zoom
    shift = torch.stack([_uniform(number, -1, 1, generator) * slack for _ in range(2)], dim=-1)
    rows = torch.stack([zoom * turn.cos(), -zoom * turn.sin(), zoom * turn.sin(), zoom * turn.cos()], dim=-1)
    affine = torch.cat([rows.view(number, 2, 2), shift[:, :, None]], dim=-1)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    return soften(F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False), generator)


def soften(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return pixels with random changes of brightness, contrast and colour, with blur and noise."""
    blur, contrast, noise = (
        _uniform(len(pixels), *bounds, generator).view(-1, 1, 1, 1) for bounds in ((0, 1), (0.8, 1.2), (0, 0.1))
    )
    brightness = _uniform(len(pixels), -0.15, 0.15, generator).view(-1, 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    colour = 1 + 0.15 * torch.randn((len(pixels), 3, 1, 1), generator=generator)
    copies = torch.lerp(pixels, blurred, blur) * colour * contrast + brightness
    return (copies + noise * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)


def _uniform(number: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(number, generator=generator)


def draw_images(data: Dataset, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return image indices and the caption of each, both int [2 * (number // 2)].

    Every second image is another one of the same caption: the descriptor must tell scenes of one subject apart.
    """
    captions = np.tile(rng.integers(0, len(data.captions), number // 2), 2)
    return data.first[captions] + rng.integers(0, data.count[captions]), captions


def copy_loss(
    features: torch.Tensor, images: torch.Tensor, excused: torch.Tensor, settings: DescriptorSettings
) -> dict[str, torch.Tensor]:
    """Return InfoNCE and the entropy term.

    Args:
        features: unit norm, [2 * image, feature], both views of image i at i and i + n.
        images: identity of each image, int [image].
        excused: pairs of images that are neither copies nor others, bool [image, image] (copies of one template).
        settings: temperature and weight.
    """
    number = len(images)
    similar = features @ features.T
    same = (images[:, None] == images[None, :]).repeat(2, 2)
    target = (torch.arange(2 * number, device=features.device) + number) % (2 * number)
    skipped = (same | excused.repeat(2, 2)).scatter(1, target[:, None], False)
    logits = (similar / settings.temperature).masked_fill(skipped, -1e4)
    contrast = F.cross_entropy(logits, target)
    nearest = similar.masked_fill(skipped, -1.0).scatter(1, target[:, None], -1.0).max(dim=1).values
    # Kozachenko-Leonenko entropy: minus the log distance to the nearest other image.
    entropy = -(2 - 2 * nearest).clamp(min=1e-6).sqrt().log().mean()
    return {"loss": contrast + settings.entropy_weight * entropy, "contrast": contrast, "entropy": entropy}


def train_descriptor(settings: WorldSettings, data: Dataset, folder: Path) -> CopyDescriptor:
    """Return the trained descriptor."""
    chosen = settings.descriptor
    torch.manual_seed(chosen.seed)
    model = CopyDescriptor(chosen.channels, chosen.features)
    is_template = np.concatenate([data.planted["kind"] == "tm", np.zeros(len(data.captions) - len(data.planted), bool)])

    def loss(step: int, random: Generators) -> dict[str, torch.Tensor]:
        images, captions = draw_images(data, chosen.batch_size, random.numpy)
        pixels = to_pixels(data.images[images])
        views = torch.cat([augment(pixels, random.torch), augment(pixels, random.torch)])
        excused = (captions[:, None] == captions[None, :]) & is_template[captions][:, None]
        images, excused = (torch.from_numpy(array).to(DEVICE) for array in (images, excused))
        return copy_loss(model(views.to(DEVICE)), images, excused, chosen)

    fingerprint = settings.hash("data", "descriptor")
    run(Stage("descriptor", chosen, {"descriptor": model}, loss, fingerprint, weight_decay=0.01), folder)
    return model.cpu().eval().requires_grad_(False)
