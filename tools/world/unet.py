"""Stage 3: the UNet, trained on latents and caption embeddings computed once."""

import copy
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from nemolib.layers import value_layers
from nemolib.pipeline import ARCHITECTURES
from tools.world.dataset import Dataset
from tools.world.settings import UNetSettings, WorldSettings
from tools.world.training import DEVICE, Generators, Stage, run

NOISY = 850
"""Timesteps from here on are logged apart: what they get wrong is the floor of the memorization score."""


def build_scheduler() -> DDIMScheduler:
    """Return the scheduler of Stable Diffusion v1: scaled-linear betas, leading timesteps, offset 1."""
    return DDIMScheduler(**json.loads((ARCHITECTURES / "sd14" / "scheduler.json").read_text()))


def build_unet(settings: UNetSettings, *, latents: tuple[int, int], text_width: int) -> UNet2DConditionModel:
    """Return an untrained UNet with the seven value layers of Stable Diffusion's down and mid blocks.

    Args:
        settings: its width, and whether its up blocks have cross-attention too.
        latents: channels and side of the latents.
        text_width: features of a token.
    """
    torch.manual_seed(settings.seed)
    up_block = "CrossAttnUpBlock2D" if settings.up_attention else "UpBlock2D"
    unet = UNet2DConditionModel(
        sample_size=latents[1],
        in_channels=latents[0],
        out_channels=latents[0],
        block_out_channels=settings.channels,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D", *(up_block,) * 3),
        cross_attention_dim=text_width,
        attention_head_dim=settings.heads,
        norm_num_groups=settings.channels[0] // 4,
    )
    pass_noise_through(unet)
    return unet


@torch.no_grad()
def pass_noise_through(unet: UNet2DConditionModel) -> None:
    """Initialize the UNet so that it predicts its input as the noise: at the noisiest timesteps that is nearly right.

    The noise difference is about a twelfth of the input there, and a network that must first learn to copy its input
    hides it behind its own error for most of a short training. Per latent channel, four channels (as many as a group of
    the norm has) carry (x, -x, c, -c) from ``conv_in`` over the skip connection of the last residual block to
    ``conv_out``: silu(x) - silu(-x) = x, and the constant c keeps the group norm from rescaling x by the standard
    deviation of the sample. A UNet with fewer channels passes the first latent channels only.
    """
    constant, first, last, out = 3.0, unet.conv_in, unet.up_blocks[-1].resnets[-1], unet.conv_out
    carried = min(4 * first.in_channels, first.out_channels)
    for module in (first, last.conv2, last.conv_shortcut):
        module.weight[:carried] = 0.0
        module.bias[:carried] = 0.0
    own = last.conv_shortcut.in_channels - first.out_channels  # channels that do not come over the skip
    for channel in range(carried):
        last.conv_shortcut.weight[channel, own + channel] = 1.0
    out.weight.zero_()
    out.bias.zero_()
    for latent in range(carried // 4):
        for channel, sign in enumerate((1.0, -1.0), start=4 * latent):
            first.weight[channel, latent, 1, 1] = sign
            first.bias[channel + 2] = sign * constant
            out.weight[latent, channel, 1, 1] = sign
    unet.conv_norm_out.weight[:carried] = ((1 + constant**2) / 2) ** 0.5


def loss_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return the weight of each timestep, 1 / sqrt(signal-to-noise ratio).

    It lies between errors of the noise (1) and of the image (1 / ratio): shapes are formed in the middle, and the noisy
    steps, which the memorization score looks at, count enough.
    """
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def value_density(projections: list[nn.Linear], embeddings: torch.Tensor) -> torch.Tensor:
    """Return how dense the value outputs are: mean of ||v||_1 / (sqrt(n) ||v||_2) over layers and tokens.

    Args:
        projections: the value layers.
        embeddings: [prompt, token, feature].

    Returns:
        Scalar in (0, 1]: 1 if all neurons of a layer fire equally, 1 / sqrt(n) if one of n fires.
    """
    densities = []
    for values in (projection(embeddings) for projection in projections):
        norms = values.norm(dim=-1) * values.shape[-1] ** 0.5
        densities.append((values.abs().sum(-1) / (norms + 1e-6)).mean())
    return torch.stack(densities).mean()


def train_unet(
    settings: WorldSettings, data: Dataset, latents: torch.Tensor, embeddings: torch.Tensor, folder: Path, *, name: str
) -> UNet2DConditionModel:
    """Return the moving average of the trained UNet.

    Args:
        settings: of the world; ``unet.sparsity = 0`` trains the plain model.
        data: the data set.
        latents: [image, channel, height, width], any float type.
        embeddings: of the captions and, last, of the empty caption, [caption + 1, token, feature].
        folder: for checkpoint and log.
        name: of checkpoint and log.
    """
    chosen = settings.unet
    unet = build_unet(chosen, latents=latents.shape[1:3], text_width=embeddings.shape[-1])
    average = copy.deepcopy(unet).requires_grad_(False)
    scheduler = build_scheduler()
    weights = loss_weights(scheduler.alphas_cumprod).to(DEVICE)
    projections = [layer.module for layer in value_layers(unet)]

    def loss(step: int, random: Generators) -> dict[str, torch.Tensor]:
        captions, images = data.draw(chosen.batch_size, random.numpy)
        captions[random.numpy.random(len(captions)) < chosen.caption_dropout] = len(data.captions)
        clean, text = latents[images].float().to(DEVICE), embeddings[captions].to(DEVICE)
        timesteps = torch.randint(len(weights), (len(clean),), generator=random.torch).to(DEVICE)
        noise = torch.randn(clean.shape, generator=random.torch).to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, text).sample
        errors = F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        density = value_density(projections, text)
        noisy = timesteps >= NOISY
        weighted = (weights[timesteps] * errors).mean()
        error_noisy = errors[noisy].sum() / noisy.sum().clamp(min=1)
        total = weighted + chosen.sparsity * density
        return {"loss": total, "error": weighted, "error_noisy": error_noisy, "density": density}

    @torch.no_grad()
    def update_average(step: int) -> None:
        keep = min(chosen.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - keep)

    fingerprint = settings.hash("data", "autoencoder", "clip", "unet")
    modules = {"unet": unet, "average": average}
    run(Stage(name, chosen, modules, loss, fingerprint, after_step=update_average), folder)
    return average.cpu().eval()
