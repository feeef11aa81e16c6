"""Loading a Stable Diffusion pipeline for a profile, and embedding prompts with it.

An architecture is a folder of JSON files, one for each of `PARTS`, from which a pipeline with random weights is made:
everything that Stable Diffusion does, without a download and without meaning. A profile with ``model: random:sd14`` runs
every line of the profile ``sd14`` at the real shapes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import pre_tokenizers

from nemolib import paths
from nemolib.layers import value_layers
from nemolib.settings import PUBLISHED, Profile, known_profiles, load_profile, note_profile

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTokenizer

ARCHITECTURES = paths.PACKAGE / "architectures"
"""Where the architectures lie that come with the package."""

PARTS = ("unet", "vae", "text_encoder", "scheduler")
"""The parts of an architecture, a file each; all but the last have weights."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_RANDOM = "random:"

_SUPPORTED = "StableDiffusionPipeline"


class PipelineError(ValueError):
    """A model that cannot be loaded; the message says what is missing and what to do."""


def load_pipeline(
    source: str | Path | Profile = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> StableDiffusionPipeline:
    """Return a Stable Diffusion pipeline, ready for detection and generation.

    Weights come from safetensors only, so that nothing is unpickled; no code of a hub is executed; the safety checker
    is not loaded; a scheduler of another kind is replaced by DDIM with the same betas and offset, as the paper uses it.

    Source: App. B.3 (DDIM).

    Args:
        source: name of a profile, path of a profile's YAML file, a Profile, a folder in diffusers format, a hub id, or
            ``random:`` and an architecture: its name (``random:sd14``) or its folder.
        device: overrides the profile's device; ``"auto"``: CUDA if there is one, else MPS, else the CPU.
        dtype: overrides the profile's dtype; ``"float32"``, ``"float16"``, ``"bfloat16"``, a torch.dtype, or
            ``"auto"``: float16 with CUDA, else float32.
        revision: overrides the profile's revision of a hub model.
        variant: overrides the profile's variant of the files of weights, such as ``"fp16"``.

    Returns:
        The pipeline: weights frozen, in evaluation mode, without a progress bar of its own.

    Raises:
        ProfileError: the profile cannot be read.
        PipelineError: no such profile, folder or architecture; a folder without ``model_index.json`` or without
            safetensors; a pipeline of another kind; a UNet without cross-attention value layers; no network; an unknown
            dtype or device.
    """
    named = isinstance(source, Profile) or str(source) in known_profiles() or str(source).endswith((".yaml", ".yml"))
    profile = load_profile(source) if named else None
    # A relative folder of a profile starts at the repository; one that a caller types may start where the caller is.
    location = _locate(profile.model, paths.ROOT) if profile else _locate(str(source), Path.cwd(), paths.ROOT)
    chosen = profile or PUBLISHED
    place = _device(device or chosen.device)
    weights = _dtype(dtype or chosen.dtype, place)
    if str(location).startswith(_RANDOM):
        pipe = random_pipeline(str(location).removeprefix(_RANDOM), dtype=weights)
    else:
        files = {"revision": revision or chosen.revision, "variant": variant or chosen.variant}
        pipe = _from_pretrained(location, dtype=weights, **files)
    _prepare(pipe, location)
    pipe.to(place)
    if place.type != "cpu" and hasattr(pipe.vae, "enable_slicing"):
        pipe.vae.enable_slicing()  # images are decoded one by one
    if profile:
        note_profile(profile, pipe)
    return pipe


def is_hub_id(model: str) -> bool:
    """Return whether a model of a profile is a hub id (``owner/name``) and no folder."""
    return bool(_HUB_ID.fullmatch(model)) and not paths.resolve(model).parent.is_dir()


@torch.no_grad()
def embed(pipe: StableDiffusionPipeline, prompts: Sequence[str], *, batch_size: int = 64) -> torch.Tensor:
    """Return the text embeddings of prompts, as the pipeline itself computes them: learnt tokens, adapters and all.

    Args:
        pipe: the pipeline.
        prompts: at least one prompt, cut to the model's length; the empty one is allowed (it is the unconditional one).
        batch_size: prompts per pass of the text encoder.

    Returns:
        Tensor [prompt, token, feature] on the pipeline's device, in its dtype.

    Raises:
        PipelineError: a pipeline of another kind.
        ValueError: no prompt, or one that is not text.
    """
    _check_kind("this pipeline", *(kind.__name__ for kind in type(pipe).__mro__))
    if isinstance(prompts, str) or not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"expected a list of at least one prompt, each a text, got {prompts!r:.200}")
    found = []
    # Diffusers would tell of every text that is cut.
    with quiet(bars=True):
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            try:
                embedded, _ = pipe.encode_prompt(batch, pipe._execution_device, 1, False)
            except NotImplementedError as error:
                raise PipelineError(
                    f"the text encoder cannot be used where its weights are offloaded; leave it on a device ({error})"
                ) from error
            found.append(embedded.to(pipe.unet.dtype))
    return torch.cat(found)


def _locate(model: str, *starts: Path) -> Path | str:
    """Return the folder of a model, or the hub id; raise PipelineError for a folder that is missing or no pipeline."""
    if model.startswith(_RANDOM):
        return model
    places = [start / Path(model).expanduser() for start in starts]
    for place in places:
        if place.is_file():
            raise PipelineError(f"model {model!r} is a file; give the folder of a pipeline in diffusers format")
        if place.is_dir():
            _check_folder(place)
            return place
    if not _HUB_ID.fullmatch(model) or any(place.parent.is_dir() for place in places):
        known = ", ".join(known_profiles())
        raise PipelineError(
            f"model {model!r}: there is no such folder ({places[-1]}), and it is neither a profile ({known}) nor a hub "
            "id (owner/name)"
        )
    return model


def _check_folder(folder: Path) -> None:
    """Raise PipelineError unless a folder holds a pipeline of the right kind with safetensors."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise PipelineError(
            f"model folder {folder} has no model_index.json; give the folder that pipe.save_pretrained wrote"
        )
    _check_index(index)
    for part in PARTS[:3]:
        if not any((folder / part).glob("*.safetensors")):
            raise PipelineError(
                f"model folder {folder / part} has no safetensors file; other formats are not read, since they can "
                "run code; save the model with safe_serialization=True"
            )


def _check_index(index: Path) -> None:
    """Raise PipelineError unless a ``model_index.json`` is that of the supported kind of pipeline."""
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise PipelineError(f"{index} is not readable as JSON ({error}); copy the model again") from error
    _check_kind(str(index), kind)


def _check_kind(where: str, *kinds: str) -> None:
    """Raise PipelineError unless one of these names of classes, those of one pipeline, is that of the supported kind."""
    if _SUPPORTED not in kinds:
        raise PipelineError(
            f"{where}: _class_name is {kinds[0]!r}; expected {_SUPPORTED!r}: Stable Diffusion v1 and v2, and models with "
            "their architecture; others (SDXL, SD3, Flux, ...) have other text encoders or no cross-attention"
        )


def _from_pretrained(
    location: Path | str, *, dtype: torch.dtype, revision: str | None, variant: str | None
) -> StableDiffusionPipeline:
    """Return the pipeline of a folder or a hub id; errors of the loader become a PipelineError."""
    local = isinstance(location, Path)
    where = {"local_files_only": True} if local else {"revision": revision}
    safely = {"use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}
    try:
        with quiet(bars=not local):
            from diffusers import StableDiffusionPipeline
            from huggingface_hub import hf_hub_download

            if not local:  # before the weights are fetched
                _check_index(Path(hf_hub_download(location, "model_index.json", revision=revision)))
            source = str(location)
            return StableDiffusionPipeline.from_pretrained(source, dtype=dtype, variant=variant, **where, **safely)
    except PipelineError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}"
        if local:
            raise PipelineError(
                f"model folder {location} could not be loaded; say which variant of its files is there, such as "
                f"load_pipeline(folder, variant='fp16'), or copy the model again ({reason})"
            ) from error
        raise PipelineError(
            f"model {location!r} could not be loaded from the hub: no network, no such model, or no access; check the "
            f"name and the connection, fetch it with `make data`, or give a local folder ({reason})"
        ) from error


@contextlib.contextmanager
def quiet(*, bars: bool) -> Iterator[None]:
    """Let diffusers and transformers speak of errors only, and show bars only for what takes long, a download.

    They warn of a missing torchvision, which is not needed, and of an autoencoder that is no AutoencoderKL.
    """
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    with contextlib.ExitStack() as before:
        for library in (ours, theirs):
            before.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
            if not bars and library.is_progress_bar_enabled():
                before.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield


def _prepare(pipe: StableDiffusionPipeline, location: Path | str) -> None:
    """Set the scheduler, freeze the weights, and silence the progress bar; refuse a UNet without value layers."""
    from diffusers import DDIMScheduler

    try:
        value_layers(pipe.unet)
    except ValueError as error:
        raise PipelineError(f"model {str(location)!r}: {error}") from error
    if not isinstance(pipe.scheduler, DDIMScheduler):
        # Latents are no pixels, and DDIM clips where nothing is said.
        pipe.register_modules(scheduler=DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    known = {"auto": torch.float16 if device.type == "cuda" else torch.float32}
    known |= {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
    if isinstance(dtype, str) and dtype not in known:
        raise PipelineError(f"dtype {dtype!r} is unknown; allowed: {', '.join(known)}")
    return known.get(dtype, dtype)


def _device(device: str | torch.device) -> torch.device:
    """Return a device that is there; raise PipelineError for one that is not."""
    there = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        chosen = there if device == "auto" else torch.device(device)
    except RuntimeError as error:
        raise PipelineError(f"device {device!r} is unknown; allowed: auto, cpu, cuda, mps") from error
    if chosen.type not in ("cpu", there.type):
        raise PipelineError(f"device {str(device)!r} is not available on this machine; use 'auto' or 'cpu'")
    return chosen


# --- Random weights -----------------------------------------------------------------------------------------------------


def random_pipeline(architecture: str | Path, *, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Return a Stable Diffusion pipeline of an architecture whose weights are drawn at random, on the CPU.

    Its tokenizer is CLIP's without merges: a text is spelt letter by letter, with CLIP's numbers of the letters. The
    weights are always the same, and torch's own random numbers stay as they were.

    Args:
        architecture: Name of an architecture that comes with the package (``"sd14"``), or a folder.
        dtype: Floating-point type in which the weights are drawn: half of the memory need not be drawn whole, and cast.

    Raises:
        PipelineError: There is no such architecture, a file is missing, or a file does not describe its part.
    """
    places = (ARCHITECTURES / str(architecture), paths.resolve(architecture))
    folder = next((place for place in places if (place / "unet.json").is_file()), None)
    if folder is None:
        known = ", ".join(sorted(path.parent.name for path in ARCHITECTURES.glob("*/unet.json")))
        files = ", ".join(f"{part}.json" for part in PARTS)
        raise PipelineError(
            f"there is no architecture {str(architecture)!r}; known: {known}; or give a folder with {files}"
        )
    with quiet(bars=False), torch.random.fork_rng(devices=[]):
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel
        from transformers.modeling_utils import local_torch_dtype

        kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "scheduler": DDIMScheduler}
        kinds["text_encoder"] = lambda **config: CLIPTextModel(CLIPTextConfig(**config))
        parts = {}
        # torch.manual_seed would set the generators of GPUs too.
        torch.default_generator.manual_seed(0)
        for part in PARTS:
            try:
                config = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
                with local_torch_dtype(torch.float32 if part == "scheduler" else dtype):
                    parts[part] = kinds[part](**config)
            except (OSError, ValueError, TypeError, KeyError) as error:
                reason = f"{part}.json does not describe its part ({error})"
                raise PipelineError(f"architecture {folder}: {reason}") from error
        parts["tokenizer"] = _spelling(parts["text_encoder"].config)
        others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, **others)


def _spelling(text: CLIPTextConfig) -> CLIPTokenizer:
    """Return CLIP's tokenizer without merges: 256 letters, the same at the end of a word, and the two marks.

    Source: Radford et al. (GPT-2), byte-level vocabularies: bytes that print stand for themselves and come first.
    """
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {name: index for index, name in enumerate(names)} | {start: text.bos_token_id, end: text.eos_token_id}
    marks = {"bos_token": start} | dict.fromkeys(("eos_token", "pad_token", "unk_token"), end)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=text.max_position_embeddings, **marks)
