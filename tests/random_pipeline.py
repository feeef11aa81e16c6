"""A Stable Diffusion pipeline with random weights: seven value layers, a few hundred kilobytes, made in a second."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nemolib.pipeline import ARCHITECTURES

WIDTHS = (8, 8, 16, 16, 16, 16, 16)
"""Neurons of the value layers."""

TOKENS = 12
"""Length to which prompts are padded or cut."""


def random_unet(*, cross_attention: bool = True, seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    down = ("CrossAttnDownBlock2D" if cross_attention else "DownBlock2D",) * 3
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=down,
        mid_block_type="UNetMidBlock2DCrossAttn" if cross_attention else None,
        up_block_types=("UpBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def random_pipeline(*, cross_attention: bool = True, seed: int = 0) -> StableDiffusionPipeline:
    tokenizer = _tokenizer()
    unet = random_unet(cross_attention=cross_attention, seed=seed)
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(json.loads((ARCHITECTURES / "sd14" / "scheduler.json").read_text())),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_random_pipeline(folder: Path, *, cross_attention: bool = True, seed: int = 0) -> Path:
    random_pipeline(cross_attention=cross_attention, seed=seed).save_pretrained(folder, safe_serialization=True)
    return folder


def _tokenizer() -> CLIPTokenizer:
    """Return a tokenizer of CLIP's kind that knows letters but no words."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [start, end, *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={name: index for index, name in enumerate(names)},
        merges=[],
        model_max_length=TOKENS,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
    )
