"""Models of the Hugging Face hub: one pinned revision, safetensors only, into the hub's own cache.

The cache is where ``HF_HOME`` says; tokens (``HF_TOKEN``, ``hf auth login``) and ``HF_HUB_OFFLINE`` are those of
huggingface_hub. A download that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nemolib.downloads.files import DownloadError

Kind = Literal["pipeline", "clip"]

PATTERNS: dict[str, tuple[str, ...]] = {
    "pipeline": (
        "model_index.json",
        "scheduler/*.json",
        "tokenizer/*.json",
        "tokenizer/*.txt",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "feature_extractor/*.json",
    ),
    "clip": ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer*.json", "*.txt", "vocab.json")
    + ("special_tokens_map.json",),
}
"""The files of a model that are read; no pickles, no half-precision copies, no safety checker."""

_NEEDED: dict[str, tuple[str, ...]] = {
    "pipeline": tuple(name for name in PATTERNS["pipeline"] if name.endswith(".safetensors")),
    "clip": ("config.json", "model.safetensors", "preprocessor_config.json"),
}


def fetch_model(repository: str, *, revision: str | None, kind: Kind = "pipeline") -> Path:
    """Put a hub model into the hub's cache, unless it is there, and return its folder.

    Args:
        repository: Hub id, ``owner/name``.
        revision: Commit or branch; None: its default branch.
        kind: ``pipeline`` (Stable Diffusion in diffusers format) or ``clip``.

    Raises:
        DownloadError: No network, or forbidden, and the model is not in the cache; no such model or revision; no
            access; the revision has no safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name = f"{repository}{f' (revision {revision})' if revision else ''}"
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(PATTERNS[kind])))
    except GatedRepoError as error:
        raise DownloadError(
            f"model {name}: access is granted on its page, https://huggingface.co/{repository}; accept its licence "
            "there, then log in with `hf auth login` or set HF_TOKEN, and run again"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise DownloadError(
            f"model {name}: not in the cache ({_cache()}), and the hub is not reached; connect to the network and unset "
            "HF_HUB_OFFLINE, or set HF_HOME to a cache that holds it"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DownloadError(
            f"model {name}: could not be downloaded; check name, revision and connection, and run again: the download "
            f"goes on where it stopped ({str(error).strip().splitlines()[0][:300]})"
        ) from error
    missing = [file for file in _NEEDED[kind] if not (folder / file).is_file()]
    if missing:
        raise DownloadError(
            f"model {name}: {', '.join(missing)} missing in {folder}; other formats than safetensors are not read, since "
            "they can run code; give a revision that has safetensors"
        )
    return folder


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
