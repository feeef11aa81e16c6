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
    """Run one stage, of `ORDER`, in this process and save its model in the work folder."""
    data = build_dataset(settings.data)
    match name:
        case "autoencoder":
            model = autoencoder.train_autoencoder(settings, data, work)
            model.save_pretrained(work / name)
            latents = autoencoder.encode_images(model, data.images).half().contiguous()
            save_file({"latents": latents}, work / "latents.safetensors")
        case "clip":
            model, tokenizer = clip.train_clip(settings, data, work)
            model.save_pretrained(work / name)
            # The captions and, last, the empty one that guidance and caption dropout use.
            embeddings = clip.embed_captions(model, tokenizer, [*data.captions, ""])
            save_file({"embeddings": embeddings}, work / "embeddings.safetensors")
        case "unet" | "unet-plain":
            if name == "unet-plain":
                settings = replace(settings, unet=replace(settings.unet, sparsity=0.0))
            latents = load_file(work / "latents.safetensors")["latents"]
            embeddings = load_file(work / "embeddings.safetensors")["embeddings"]
            unet.train_unet(settings, data, latents, embeddings, work, name=name).save_pretrained(work / name)
        case "decoder":
            model = AutoencoderTiny.from_pretrained(work / "autoencoder")
            autoencoder.train_decoder(settings, data, model, work).save_pretrained(work / name)
        case "descriptor":
            descriptor.train_descriptor(settings, data, work).save(work / name)


def assemble(work: Path, folder: Path, *, unet_name: str = "unet") -> None:
    """Write a pipeline folder (fp16 safetensors) that ``StableDiffusionPipeline.from_pretrained`` loads by itself."""
    pipe = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(work / "decoder"),
        text_encoder=CLIPTextModel.from_pretrained(work / "clip"),
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


def export(settings: WorldSettings, work: Path, out: Path) -> None:
    """Write the shipped folders: model, clip, descriptor, prompts, planted images."""
    data = build_dataset(settings.data)
    export_data(data, out)
    assemble(work, out / "model")
    for name in ("clip", "descriptor"):
        shutil.rmtree(out / name, ignore_errors=True)
    CLIPModel.from_pretrained(work / "clip").half().save_pretrained(out / "clip", safe_serialization=True)
    CLIPTokenizer.from_pretrained(work / "tokenizer").save_pretrained(out / "clip")
    clip.preprocessing(settings.data.image_size).save_pretrained(out / "clip")
    shutil.copytree(work / "descriptor", out / "descriptor")


def export_data(data: Dataset, out: Path) -> None:
    """Write the prompt tables and the planted images (a template's first copy stands for it)."""
    for folder in ("prompts", "planted"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
    for name, table in {"memorized": data.planted, "unmemorized": data.unmemorized, "holdout": data.holdout}.items():
        table.to_csv(out / "prompts" / f"{name}.csv", index=False)
    for path, first in zip(data.planted["image"], data.first, strict=False):  # planted captions come first
        Image.fromarray(data.images[first]).save(out / path, optimize=True)
