"""Architectures with random weights: everything that Stable Diffusion does, without a download and without meaning.

A profile with ``model: random:sd14`` runs every line of the profile ``sd14`` at the real shapes. An architecture is a
folder of four JSON files: ``unet``, ``vae``, ``text_encoder`` and ``scheduler``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemolib import paths

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

FOLDER = paths.PACKAGE / "architectures"
"""Where the architectures lie that come with the package."""

PARTS = ("unet", "vae", "text_encoder", "scheduler")
"""The files of an architecture."""


class ArchitectureError(ValueError):
    """An architecture that cannot be built; the message names the file and what is missing."""


def known_architectures() -> list[str]:
    """Return the names of the architectures that come with the package, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob("*/unet.json"))


def random_pipeline(
    architecture: str | Path, *, seed: int = 0, dtype: torch.dtype | None = None
) -> StableDiffusionPipeline:
    """Return a Stable Diffusion pipeline of an architecture whose weights are drawn at random.

    Its tokenizer is CLIP's without merges: a text is spelt letter by letter, with CLIP's numbers of the letters. The values
    of a large weight repeat (`nemolib.architectures.drawing`).

    Args:
        architecture: Name of an architecture that comes with the package (``"sd14"``), or a folder.
        seed: Seed of the weights; torch's own random numbers stay as they were.
        dtype: Floating-point type in which the weights are drawn; None: float32.

    Returns:
        The pipeline, on the CPU.

    Raises:
        ArchitectureError: There is no such architecture, a file is missing, or a file does not describe its part.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from nemolib.architectures.drawing import weights_drawn

    folder = _folder(architecture)
    configs = {part: _config(folder / f"{part}.json") for part in PARTS}
    text = configs["text_encoder"]
    try:
        with weights_drawn(seed=seed, dtype=dtype or torch.float32):
            parts = {
                "unet": UNet2DConditionModel(**configs["unet"]),
                "vae": AutoencoderKL(**configs["vae"]),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
            }
        scheduler = DDIMScheduler(**configs["scheduler"])
        tokenizer = _spelling(text["max_position_embeddings"], text["bos_token_id"], text["eos_token_id"])
    except (TypeError, ValueError, KeyError) as error:
        raise ArchitectureError(f"architecture {folder} cannot be built: {error}") from error
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _folder(architecture: str | Path) -> Path:
    """Return the folder of an architecture."""
    folders = (FOLDER / str(architecture), paths.resolve(architecture))
    for folder in folders:
        if (folder / "unet.json").is_file():
            return folder
    raise ArchitectureError(
        f"there is no architecture {str(architecture)!r}; known: {', '.join(known_architectures())}; or give a folder with "
        f"{', '.join(f'{part}.json' for part in PARTS)}"
    )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArchitectureError(f"architecture {path.parent}: {path.name} is missing")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArchitectureError(f"{path} is not readable as JSON ({error})") from error


def _spelling(length: int, start_id: int, end_id: int) -> CLIPTokenizer:
    """Return CLIP's tokenizer without merges: 256 letters, the same at the end of a word, and the two marks."""
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = _byte_letters()
    names = [*letters, *(letter + "</w>" for letter in letters)]
    marks = {start: start_id, end: end_id}
    return CLIPTokenizer(
        vocab={name: index for index, name in enumerate(names)} | marks,
        merges=[],
        model_max_length=length,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
    )


def _byte_letters() -> list[str]:
    """Return the letters that stand for bytes in byte-level vocabularies, in CLIP's order.

    Source: Radford et al. (GPT-2): bytes that print stand for themselves and come first.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printing)
    return [chr(code) for code in printing] + [chr(256 + place) for place in range(others)]
