"""Stages 1 and 4: the autoencoder. Pixels in [-1, 1], [image, 3, 64, 64] <-> latents, [image, 8, 16, 16], unit variance."""

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
from tools.world.training import DEVICE, Generators, Stage, run


def build_autoencoder(settings: WorldSettings) -> AutoencoderTiny:
    """Return an untrained autoencoder."""
    chosen = settings.autoencoder
    torch.manual_seed(chosen.seed)
    return AutoencoderTiny(
        encoder_block_out_channels=chosen.channels,
        decoder_block_out_channels=chosen.channels,
        num_encoder_blocks=chosen.encoder_blocks,
        num_decoder_blocks=chosen.decoder_blocks,
        latent_channels=chosen.latents,
    )


def train_autoencoder(settings: WorldSettings, data: Dataset, folder: Path) -> AutoencoderTiny:
    """Return the trained autoencoder, with latents as ``even_out_latents`` makes them."""
    model = build_autoencoder(settings)
    _reconstruct("autoencoder", model, model, settings, data, folder)
    sample = data.draw(512, np.random.default_rng(settings.autoencoder.seed))[1]
    even_out_latents(model, encode_images(model, data.images[sample]))
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
    """Train a part of the model on errors of pixels and of their differences along both axes.

    A little noise on the latents makes the decoder forgive what a small UNet gets wrong.
    """
    chosen = getattr(settings, name)

    def loss(step: int, random: Generators) -> dict[str, torch.Tensor]:
        # The network is convolutional: crops teach it the same at a quarter of the cost.
        top, left = random.numpy.integers(0, data.images.shape[1] - chosen.crop + 1, size=2)
        images = data.images[data.draw(chosen.batch_size, random.numpy)[1]]
        pixels = to_pixels(images[:, top : top + chosen.crop, left : left + chosen.crop]).to(DEVICE)
        latents = model.encode(pixels).latents
        noise = torch.randn(latents.shape, generator=random.torch).to(DEVICE)
        rebuilt = model.decode(latents + chosen.noise * latents.detach().std() * noise).sample
        error = F.l1_loss(rebuilt, pixels) + 2 * F.mse_loss(rebuilt, pixels)
        edges = sum(F.l1_loss(rebuilt.diff(dim=axis), pixels.diff(dim=axis)) for axis in (2, 3))
        return {"loss": error + chosen.edge_weight * edges, "error": error}

    model.to(DEVICE)
    run(Stage(name, chosen, {name: part}, loss, settings.hash("data", "autoencoder", name)), folder)
    model.cpu().eval().requires_grad_(False)


@torch.no_grad()
def even_out_latents(model: AutoencoderTiny, sample: torch.Tensor) -> None:
    """Change the last and first convolutions so that latents have mean 0, mean variance 1, and more even directions.

    A few directions, which carry colour, have most of the variance of the latents; those of shapes would be drowned in
    noise until the last steps. Standard deviations along the principal directions become their square roots. The
    encoder's output is linear in its last convolution, so this is exact there; the decoder's first convolution takes it
    back (up to its soft clamp and the border; ``train_decoder`` follows).

    Args:
        model: the autoencoder; changed in place.
        sample: latents of typical images, [image, channel, height, width].
    """
    mean = sample.mean((0, 2, 3))
    variances, directions = torch.linalg.eigh(sample.transpose(0, 1).flatten(1).cov())
    gains = variances**-0.25 / variances.sqrt().mean().sqrt()
    change, back = ((directions * factor) @ directions.T for factor in (gains, 1 / gains))
    last, first = model.encoder.layers[-1], model.decoder.layers[0]
    last.weight.copy_(torch.einsum("oc,cikl->oikl", change, last.weight))
    last.bias.copy_(change @ (last.bias - mean))
    first.bias += torch.einsum("oikl,i->o", first.weight, mean)
    first.weight.copy_(torch.einsum("ocij,cd->odij", first.weight, back))


@torch.no_grad()
def encode_images(model: AutoencoderTiny, images: np.ndarray) -> torch.Tensor:
    """Return the latents of uint8 images, float [image, channel, height / 4, width / 4]."""
    batches = tqdm(range(0, len(images), 32), desc="encode", unit="batch")
    return torch.cat([model.encode(to_pixels(images[i : i + 32])).latents for i in batches])


@torch.no_grad()
def signal_to_noise(model: AutoencoderTiny, images: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of rebuilt uint8 images [image, height, width, 3]: mean in dB."""
    pixels = to_pixels(images)
    rebuilt = model.decode(model.encode(pixels).latents).sample.clamp(-1, 1)
    return float(-10 * ((rebuilt - pixels) / 2).square().mean(dim=(1, 2, 3)).log10().mean())
