"""Attention scaling (Ren et al., ECCV 2024): more attention for the begin token, none for the tokens after the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from nemolib.mitigation.base import Mitigation
from nemolib.settings import Mask, RenSettings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""Processors of diffusers that compute the attention of Stable Diffusion and nothing else."""

_EXTRAS = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
"""Parts of an attention layer that Stable Diffusion does not have."""


@dataclass(frozen=True)
class AttentionScaling(Mitigation):
    """Attention logits of the begin token are scaled, and tokens after the prompt are masked, in cross-attention.

    With classifier-free guidance this is done for the text-conditional half of the batch alone.

    Source: Ren et al. (ECCV 2024); their code, refactored_classes/refactored_attention_processor.py, with
        ``--c1 1.25 --cross_attn_mask --miti_mem``. There the end token keeps its attention; ``--mask_length_minis1``
        masks it too (here: mask ``summary``).
    Deviates: their code masks the unconditional half as well, at the length of the prompt; here that half stays as it
        is. It scales every other sample of a batch, which is right for a single image only.

    Attributes:
        settings: Scale and mask.
    """

    source: ClassVar[str] = "Ren et al. (ECCV 2024)"

    settings: RenSettings = RenSettings()

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        return "attention scaling"

    def identity(self, prompt: str) -> list[Any]:
        """Return the settings."""
        return ["attention scaling", asdict(self.settings)]

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a UNet whose cross-attention is not that of Stable Diffusion."""
        super().check(pipe)
        for name, layer in cross_attention(pipe.unet).items():
            kind = type(layer.processor)
            if kind.__name__ not in _PLAIN or not kind.__module__.startswith("diffusers."):
                raise ValueError(
                    f"{name} has the attention processor {kind.__name__}, which attention scaling would replace without "
                    f"knowing what it does; known: {', '.join(_PLAIN)}; see pipe.unet.set_default_attn_processor()"
                )
            extra = next((part for part in _EXTRAS if getattr(layer, part, None) is not None), None)
            if extra or layer.residual_connection or layer.rescale_output_factor != 1:
                raise ValueError(f"{name} is no attention layer of Stable Diffusion ({extra or 'it has a residual'})")

    @contextmanager
    def _prepared(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> Iterator[dict[str, Any]]:
        allowed = attended_tokens(pipe.tokenizer, prompts, mask=self.settings.mask).to(pipe.unet.device)
        processor = ScaledAttention(self.settings.c1, allowed)
        before = [(layer, layer.processor) for layer in cross_attention(pipe.unet).values()]
        try:
            for layer, _ in before:
                layer.set_processor(processor)
            yield {"prompt": prompts}
        finally:
            for layer, theirs in before:
                layer.set_processor(theirs)


class ScaledAttention:
    """An attention processor of diffusers for cross-attention, with scaled begin token and masked tokens.

    Args:
        c1: What the logit of the first token is multiplied by.
        allowed: For each image the tokens that get attention, [image, token], bool. A batch of as many samples is
            text-conditional; in one of twice as many the unconditional samples come first.
    """

    def __init__(self, c1: float, allowed: Tensor) -> None:
        self.c1, self.allowed = c1, allowed

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the output of an attention layer; arguments as diffusers gives them.

        Args:
            attn: The layer.
            hidden_states: Image features [sample, position, channel].
            encoder_hidden_states: Text features [sample, token, feature].
            attention_mask: Must be None.
            temb: Not used.

        Raises:
            ValueError: The batch does not belong to the prompts, or there is a mask of another origin.
        """
        if encoder_hidden_states is None or attention_mask is not None:
            raise ValueError(
                "attention scaling needs text features and cannot take an attention mask of another origin"
            )
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        scale, blocked = self._changes(len(query), key.shape[-2])
        logits = query.float() @ key.float().transpose(-1, -2) * attn.scale
        weights = (logits * scale).masked_fill(blocked, -torch.inf).softmax(dim=-1)
        output = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        for part in attn.to_out:
            output = part(output)
        return output

    def _changes(self, samples: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the factors of the logits and which tokens are masked, both [sample, 1, 1, token]."""
        images = len(self.allowed)
        if samples not in (images, 2 * images) or tokens != self.allowed.shape[1]:
            raise ValueError(
                f"attention scaling was set up for {images} images and {self.allowed.shape[1]} tokens, but the batch "
                f"has {samples} samples and {tokens} tokens; give one prompt per image"
            )
        scale = torch.ones(samples, 1, 1, tokens, device=self.allowed.device)
        blocked = torch.zeros(samples, 1, 1, tokens, device=self.allowed.device, dtype=torch.bool)
        scale[-images:, ..., 0] = self.c1
        blocked[-images:, 0, 0] = ~self.allowed
        return scale, blocked


def attended_tokens(tokenizer: Any, prompts: list[str], *, mask: Mask) -> Tensor:
    """Return which tokens of prompts get attention.

    Args:
        tokenizer: The tokenizer of a pipeline.
        prompts: The prompts.
        mask: See `nemolib.settings.RenSettings`.

    Returns:
        Tensor [prompt, token], bool, as long as the tokenizer pads prompts.
    """
    length = tokenizer.model_max_length
    if mask == "none":
        return torch.ones(len(prompts), length, dtype=torch.bool)
    used = [len(ids) for ids in tokenizer(prompts, truncation=True, max_length=length).input_ids]
    ends = torch.tensor(used) - int(mask == "summary")
    return torch.arange(length) < ends[:, None]


def cross_attention(unet: nn.Module) -> dict[str, Any]:
    """Return the cross-attention layers of a UNet by their address.

    Raises:
        ValueError: There are none.
    """
    layers = {
        name: module
        for name, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False) and hasattr(module, "set_processor")
    }
    if not layers:
        raise ValueError(f"{type(unet).__name__} has no cross-attention, which attention scaling needs")
    return layers
