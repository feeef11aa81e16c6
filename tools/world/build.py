"""Runs the stages in order, two at a time where they do not depend on each other, and exports what they trained.

Everything in between lives in the work folder: checkpoints, loss logs, latents, and the plain model, whose weights are
not shipped.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from tools.world import autoencoder, clip, descriptor, unet
from tools.world.dataset import Dataset, build_dataset
from tools.world.settings import WorldSettings

#: Stages that may run at the same time, in order.
ORDER = (("autoencoder", "clip"), ("unet", "unet-plain"), ("decoder", "descriptor"))


def train(settings: WorldSettings, work: Path, *, small: bool = False) -> None:
    """Run all stages in processes of their own, each with its share of the cores.

    Raises:
        RuntimeError: a stage failed; what it reached is in its checkpoint, and the next call goes on from there.
    """
    cores = os.cpu_count() or 1
    for group in ORDER:
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // len(group)))}
        command = [sys.executable, "-m", "tools.world", "--work", str(work), *(["--small"] if small else [])]
        running = {name: subprocess.Popen([*command, "--stage", name], env=environment) for name in group}
        failed = [name for name, process in running.items() if process.wait() != 0]
        if failed:
            raise RuntimeError(f"training stage {', '.join(failed)} failed; run `make train` again to go on from there")


def run_stage(name: str, settings: WorldSettings, work: Path) -> None:
    """Run one stage in this process and save its model in the work folder."""
    stages = {
        "autoencoder": _train_autoencoder,
        "clip": _train_clip,
        "unet": partial(_train_unet, "unet"),
        "unet-plain": partial(_train_unet, "unet-plain"),
        "decoder": _train_decoder,
        "descriptor": _train_descriptor,
    }
    if name not in stages:
        raise ValueError(f"unknown stage {name!r}; known: {', '.join(stages)}")
    stages[name](settings, build_dataset(settings.data), work)


def _train_autoencoder(settings: WorldSettings, data: Dataset, work: Path) -> None:
    model = autoencoder.train_autoencoder(settings, data, work)
    model.save_pretrained(work / "autoencoder")
    latents = autoencoder.encode_images(model, data.images).half().contiguous()
    save_file({"latents": latents}, work / "latents.safetensors")


def _train_clip(settings: WorldSettings, data: Dataset, work: Path) -> None:
    model, tokenizer = clip.train_clip(settings, data, work)
    model.save_pretrained(work / "clip")
    # The captions and, last, the empty one that guidance and caption dropout use.
    embeddings = clip.embed_captions(model, tokenizer, [*data.captions, ""])
    save_file({"embeddings": embeddings}, work / "embeddings.safetensors")


def _train_unet(name: str, settings: WorldSettings, data: Dataset, work: Path) -> None:
    chosen = settings if name == "unet" else replace(settings, unet=replace(settings.unet, sparsity=0.0))
    latents = load_file(work / "latents.safetensors")["latents"]
    embeddings = load_file(work / "embeddings.safetensors")["embeddings"]
    unet.train_unet(chosen, data, latents, embeddings, work, name=name).save_pretrained(work / name)


def _train_decoder(settings: WorldSettings, data: Dataset, work: Path) -> None:
    model = AutoencoderTiny.from_pretrained(work / "autoencoder")
    autoencoder.train_decoder(settings, data, model, work).save_pretrained(work / "decoder")


def _train_descriptor(settings: WorldSettings, data: Dataset, work: Path) -> None:
    descriptor.train_descriptor(settings, data, work).save(work / "descriptor")


def assemble(work: Path, folder: Path, *, unet_name: str = "unet") -> None:
    """Write a pipeline folder (fp16 safetensors) that ``StableDiffusionPipeline.from_pretrained`` loads by itself."""
    model = CLIPModel.from_pretrained(work / "clip")
    text = CLIPTextModel(model.config.text_config)
    text.load_state_dict(_text_weights(model, text))
    pipe = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(work / "decoder"),
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / unet_name),
        scheduler=unet.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    # The half-precision weights of the text encoder are to be loaded as float32, as diffusers does it with the others.
    for part, more in {"text_encoder": {"dtype": "float32"}, "unet": {}, "vae": {}}.items():
        config = folder / part / "config.json"
        content = json.loads(config.read_text()) | more
        content.pop("_name_or_path", None)  # a folder of this machine, which diffusers notes
        config.write_text(json.dumps(content, indent=2) + "\n")


def _text_weights(model: CLIPModel, text: CLIPTextModel) -> dict[str, torch.Tensor]:
    """Return the weights of the text tower under the names that ``CLIPTextModel`` gives them."""
    tower = model.text_model.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in text.state_dict()) else ""
    return {prefix + name: value for name, value in tower.items()}


def export(settings: WorldSettings, work: Path, out: Path) -> None:
    """Write the shipped folders: model, clip, descriptor, prompts, planted images."""
    data = build_dataset(settings.data)
    export_data(data, out)
    assemble(work, out / "model")
    encoder = out / "clip"
    shutil.rmtree(encoder, ignore_errors=True)
    CLIPModel.from_pretrained(work / "clip").half().save_pretrained(encoder, safe_serialization=True)
    CLIPTokenizer.from_pretrained(work / "tokenizer").save_pretrained(encoder)
    clip.preprocessing(settings.data.image_size).save_pretrained(encoder)
    shutil.rmtree(out / "descriptor", ignore_errors=True)
    shutil.copytree(work / "descriptor", out / "descriptor")


def export_data(data: Dataset, out: Path) -> None:
    """Write the prompt tables and the planted images (a template's first copy stands for it)."""
    for folder in ("prompts", "planted"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
    for name, table in (("memorized", data.planted), ("unmemorized", data.unmemorized), ("holdout", data.holdout)):
        table.to_csv(out / "prompts" / f"{name}.csv", index=False)
    for path, image in zip(data.planted["image"], data.planted_images(), strict=True):
        Image.fromarray(image).save(out / path, optimize=True)
