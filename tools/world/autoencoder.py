"""Stages 1 and 4: the autoencoder. Pixels in [-1, 1], [image, 3, 64, 64] <-> latents, [image, 4, 16, 16], unit variance."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from nemolib.encoders import to_pixels
from tools.world.dataset import Dataset
from tools.world.settings import WorldSettings
from tools.world.training import Generators, Stage, run

DEVIATION = 0.3
"""Standard deviation of the unscaled latents."""


def train_autoencoder(settings: WorldSettings, data: Dataset, folder: Path) -> AutoencoderTiny:
    """Return the trained autoencoder; its ``scaling_factor`` brings latents to unit variance."""
    chosen = settings.autoencoder
    torch.manual_seed(chosen.seed)
    model = AutoencoderTiny(
        encoder_block_out_channels=chosen.channels,
        decoder_block_out_channels=chosen.channels,
        num_encoder_blocks=(1,) * len(chosen.channels),
        num_decoder_blocks=(1,) * len(chosen.channels),
        latent_channels=4,
    )
    _reconstruct("autoencoder", model, model, settings, data, folder)
    sample = encode_images(model, data.images[data.draw(512, np.random.default_rng(chosen.seed))[1]])
    standardize_latents(model, sample)
    return model


def train_decoder(settings: WorldSettings, data: Dataset, model: AutoencoderTiny, folder: Path) -> AutoencoderTiny:
    """Return the autoencoder with a decoder that was trained on; latents stay what they were.

    So the decoder can go on learning while, or after, the UNet learns the latents.
    """
    model.encoder.requires_grad_(False)
    _reconstruct("decoder", model, model.decoder, settings, data, folder)
    return model


def _reconstruct(
    name: str, model: AutoencoderTiny, part: nn.Module, settings: WorldSettings, data: Dataset, folder: Path
) -> None:
    """Train a part of the model: mean absolute error of pixels and of their differences along both axes."""
    chosen = getattr(settings, name)

    def loss(step: int, random: Generators) -> dict[str, torch.Tensor]:
        # The network is convolutional: crops teach it the same at a quarter of the cost.
        top, left = random.numpy.integers(0, data.images.shape[1] - chosen.crop + 1, size=2)
        images = data.images[data.draw(chosen.batch_size, random.numpy)[1]]
        pixels = to_pixels(images[:, top : top + chosen.crop, left : left + chosen.crop])
        rebuilt = model.decode(model.encode(pixels).latents).sample
        error = F.l1_loss(rebuilt, pixels)
        edges = sum(F.l1_loss(rebuilt.diff(dim=axis), pixels.diff(dim=axis)) for axis in (2, 3))
        return {"loss": error + chosen.edge_weight * edges, "error": error}

    run(Stage(name, chosen, {name: part}, loss, settings.hash("data", "autoencoder", name)), folder)
    model.eval().requires_grad_(False)


@torch.no_grad()
def standardize_latents(model: AutoencoderTiny, sample: torch.Tensor) -> None:
    """Change the last and first convolutions so that every latent channel has mean 0 and the same deviation, `DEVIATION`.

    The encoder's output is linear in its last convolution, so this is exact there; the decoder's first convolution takes
    it back (up to its soft clamp and the border; ``train_decoder`` follows). Diffusion wants centred latents, and
    ``scaling_factor`` is one number for all channels.

    Args:
        model: the autoencoder; changed in place.
        sample: unscaled latents of typical images, [image, channel, height, width].
    """
    mean, gain = sample.mean((0, 2, 3)), DEVIATION / sample.std((0, 2, 3))
    last, first = model.encoder.layers[-1], model.decoder.layers[0]
    last.weight *= gain.view(-1, 1, 1, 1)
    last.bias.copy_((last.bias - mean) * gain)
    first.bias += torch.einsum("oikl,i->o", first.weight, mean)
    first.weight /= gain.view(1, -1, 1, 1)
    model.register_to_config(scaling_factor=1.0 / DEVIATION)


@torch.no_grad()
def encode_images(model: AutoencoderTiny, images: np.ndarray) -> torch.Tensor:
    """Return the scaled latents of uint8 images, float [image, 4, height / 4, width / 4]."""
    batches = tqdm(range(0, len(images), 32), desc="encode", unit="batch")
    latents = torch.cat([model.encode(to_pixels(images[i : i + 32])).latents for i in batches])
    return latents * model.config.scaling_factor
