"""What the methods after NeMo share: predicted noise, the guided trajectory, and the attention on the way.

Formulas of `nemolib.beyond` are written for the noise eps. What a model predicts instead is converted here by
`nemolib.first_step.noise_mix`, which knows of the velocity v (and of the image): eps = sqrt(abar) v + sigma x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from nemolib.first_step import ddim, noise_mix
from nemolib.layers import OpenAttention, attention_layers, placement, processors
from nemolib.mitigation import AttentionScaling
from nemolib.pipeline import embed

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

DERIVATIVE = 3
"""What a pass with a derivative counts, in passes: the pass, and a derivative that takes about two more."""

PUBLISHED_SIZE = 4 * 64 * 64
"""Numbers of one latent of Stable Diffusion, of which the norms in the papers are taken."""


def signal_and_noise(scheduler: Any, timestep: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar) and sigma of one timestep [1, 1, 1, 1], or of one per sample [sample, 1, 1, 1]."""
    index = torch.as_tensor(timestep).long().reshape(-1).cpu()
    kept = scheduler.alphas_cumprod.cpu()[index].view(-1, 1, 1, 1).to(like.device)
    return kept.sqrt(), (1 - kept).sqrt()


def noise_of(scheduler: Any, output: Tensor, latents: Tensor, timestep: int | Tensor) -> Tensor:
    """Return the noise that a UNet's output means, for one timestep or one per sample.

    Raises:
        ValueError: What the model predicts is not known.
    """
    of_output, of_latents = _mix(scheduler, timestep, output)
    return of_output * output + of_latents * latents


def output_of(scheduler: Any, noise: Tensor, latents: Tensor, timestep: int | Tensor) -> Tensor:
    """Return the UNet's output that means a noise: the inverse of `noise_of`."""
    of_output, of_latents = _mix(scheduler, timestep, noise)
    return (noise - of_latents * latents) / of_output


def _mix(scheduler: Any, timestep: int | Tensor, like: Tensor) -> Tensor:
    """Return what output and latents are multiplied by, [2, sample or 1, 1, 1, 1]."""
    mixes = [noise_mix(scheduler, each) for each in torch.as_tensor(timestep).reshape(-1).tolist()]
    return torch.tensor(mixes).T[..., None, None, None].to(like)


def norms(values: Tensor) -> Tensor:
    """Return the L2 norm of each sample, [sample]."""
    return values.flatten(1).norm(dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A prompt as a UNet sees it.

    Attributes:
        embedding: Its embedding [1, token, feature].
        end: Position of its end token, the first one; padding repeats it. Several prompts have both for each sample.
    """

    embedding: Tensor
    end: int | Tensor


def text_of(pipe: StableDiffusionPipeline, prompt: str) -> Text:
    """Return a prompt as the UNet of a pipeline sees it."""
    length = pipe.tokenizer.model_max_length
    return Text(embed(pipe, [prompt]), len(pipe.tokenizer(prompt, truncation=True, max_length=length).input_ids) - 1)


class Step(NamedTuple):
    """One step of a trajectory: its position and timestep, x_t, and the noise without and with the prompt."""

    index: int
    timestep: int
    latents: Tensor
    empty: Tensor
    text: Tensor

    @property
    def difference(self) -> Tensor:
        """What the prompt changes, [seed, channel, height, width]."""
        return self.text - self.empty


class Denoising:
    """The predicted noise of a pipeline's UNet along the DDIM schedule; the pipeline is read, never changed.

    Args:
        pipe: A StableDiffusionPipeline.
        steps: Denoising steps of the schedule.
        guidance: Classifier-free guidance scale of `trajectory`.

    Attributes:
        timesteps: The schedule, the first step first.
        evaluations: UNet sample-evaluations so far; a pass with a derivative counts as `DERIVATIVE` passes.
        empty: Embedding of the empty prompt [1, token, feature].
    """

    def __init__(self, pipe: StableDiffusionPipeline, *, steps: int = 50, guidance: float = 7.5) -> None:
        self.pipe, self.unet, self.guidance, self.evaluations = pipe, pipe.unet, guidance, 0
        self.scheduler = ddim(pipe.scheduler, steps)
        self.timesteps: list[int] = self.scheduler.timesteps.tolist()
        self.empty = embed(pipe, [""])

    def noise(self, latents: Tensor, timestep: int | Tensor, embeddings: Tensor, *, derivative: bool = False) -> Tensor:
        """Return the predicted noise, [sample, channel, height, width], float32.

        Args:
            latents: Latents x_t, one per sample.
            timestep: One timestep, or one per sample.
            embeddings: One embedding [1, token, feature], or one per sample.
            derivative: Whether a derivative of the pass will be taken, which counts.
        """
        self.evaluations += len(latents) * (DERIVATIVE if derivative else 1)
        device, dtype = placement(self.unet)
        text = embeddings.to(device, dtype).expand(len(latents), -1, -1)
        # `forward` is free of a guidance rule's hook on the whole UNet; hooks on its layers act as always.
        output = self.unet.forward(latents.to(dtype), timestep, text, return_dict=False)[0]
        return noise_of(self.pipe.scheduler, output.float(), latents, timestep)

    def pair(
        self, latents: Tensor, timestep: int, embedding: Tensor, *, derivative: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the noise of the empty prompt and of a prompt for the same latents, in one pass."""
        both = [part.to(embedding).expand(len(latents), -1, -1) for part in (self.empty, embedding)]
        noise = self.noise(torch.cat([latents] * 2), timestep, torch.cat(both), derivative=derivative)
        return tuple(noise.chunk(2))

    def difference(self, latents: Tensor, timestep: int, embedding: Tensor, *, derivative: bool = False) -> Tensor:
        """Return what a prompt changes in the noise: eps(prompt) - eps(empty prompt)."""
        empty, text = self.pair(latents, timestep, embedding, derivative=derivative)
        return text - empty

    @torch.no_grad()
    def trajectory(self, latents: Tensor, embedding: Tensor, *, until: int | None = None) -> Iterator[Step]:
        """Yield the first steps of guided sampling, or all of them."""
        for index, timestep in enumerate(self.timesteps[:until]):
            step = Step(index, timestep, latents, *self.pair(latents, timestep, embedding))
            yield step
            guided = step.empty + self.guidance * step.difference
            latents = self.scheduler.step(guided, timestep, latents).prev_sample


# Attention on the way


@contextmanager
def attention_seen(
    pipe: StableDiffusionPipeline, names: tuple[str, ...], reduce: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """See the attention of cross-attention layers inside the context.

    Yields:
        Address -> what ``reduce`` makes of the probabilities [sample, head, position, token] of the latest pass.

    Raises:
        ValueError: The attention is not that of Stable Diffusion.
    """
    AttentionScaling().check(pipe)
    seen: dict[str, Tensor] = {}

    def keeping(name: str) -> Callable[[Tensor], None]:
        return lambda weights: seen.update({name: reduce(weights.detach())})

    with processors(pipe.unet, {name: OpenAttention(see=keeping(name)) for name in names}):
        yield seen


def end_layers(unet: nn.Module) -> tuple[str, ...]:
    """Return the cross-attention layers of the first down block: their positions are those of the latent.

    Raises:
        ValueError: The first down block has none.
    """
    names = tuple(name for name in attention_layers(unet, ("down",)) if name.startswith("down_blocks.0."))
    if not names:
        raise ValueError(f"the first down block of {type(unet).__name__} has no cross-attention")
    return names


def end_attention(text: Text) -> Callable[[Tensor], Tensor]:
    """Return what makes maps [seed, position] of probabilities: the end token's, mean over heads, with the prompt."""
    return lambda weights: weights.chunk(2)[1][..., text.end].mean(dim=1)


def mean_attention(seen: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Return the mean over layers as maps of the latents' size, [seed, height, width]."""
    return torch.stack(list(seen.values())).mean(dim=0).unflatten(-1, latents.shape[-2:])
