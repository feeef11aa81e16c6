"""Runs the stages in order and exports what they trained.

Everything in between lives in the work folder: checkpoints, loss logs, latents, and the variants of the model, whose
weights are not shipped.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from tools.world import autoencoder, classifier, clip, descriptor, unet
from tools.world.dataset import Dataset
from tools.world.settings import UNETS, WorldSettings

STAGES = ("autoencoder", "clip", *UNETS, "decoder", "descriptor", "classifier")


def run_stage(name: str, settings: WorldSettings, data: Dataset, work: Path) -> None:
    """Run one of `STAGES` from where it was interrupted and save its model in the work folder."""
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
        case _ if name in UNETS:
            changed = replace(settings.unet, **UNETS[name])
            settings = replace(settings, unet=replace(changed, steps=min(changed.steps, settings.unet.steps)))
            latents = load_file(work / "latents.safetensors")["latents"]
            embeddings = load_file(work / "embeddings.safetensors")["embeddings"]
            unet.train_unet(settings, data, latents, embeddings, work, name=name).save_pretrained(work / name)
        case "decoder":
            model = AutoencoderTiny.from_pretrained(work / "autoencoder")
            autoencoder.train_decoder(settings, data, model, work).save_pretrained(work / name)
        case "descriptor":
            descriptor.train_descriptor(settings, data, work).save(work / name)
        case "classifier":
            classifier.train_classifier(settings, work).save(work / name)


def folders(work: Path, out: Path) -> dict[str, Path]:
    """Return where the pipeline of each of `UNETS` is written: the shipped one with what is shipped."""
    return {name: work / "models" / name for name in UNETS} | {"unet": out / "model"}


def assemble(work: Path, folder: Path, *, name: str) -> None:
    """Write one of `UNETS` as a pipeline folder (fp16 safetensors), which ``StableDiffusionPipeline.from_pretrained`` loads."""
    pipe = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(work / "decoder"),
        text_encoder=CLIPTextModel.from_pretrained(work / "clip"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / name),
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


def export(settings: WorldSettings, data: Dataset, work: Path, out: Path) -> None:
    """Write the shipped folders but the model: clip, descriptor, classifier, prompts, planted images."""
    export_data(data, out)
    for name in ("clip", "descriptor", "classifier"):
        shutil.rmtree(out / name, ignore_errors=True)
    CLIPModel.from_pretrained(work / "clip").half().save_pretrained(out / "clip", safe_serialization=True)
    CLIPTokenizer.from_pretrained(work / "tokenizer").save_pretrained(out / "clip")
    clip.preprocessing(settings.data.image_size).save_pretrained(out / "clip")
    for name in ("descriptor", "classifier"):
        shutil.copytree(work / name, out / name)


def export_data(data: Dataset, out: Path) -> None:
    """Write the prompt tables and the planted images (a template's first copy stands for it), with masks of templates."""
    for folder in ("prompts", "planted"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
    for name, table in {"memorized": data.planted, "unmemorized": data.unmemorized, "holdout": data.holdout}.items():
        table.to_csv(out / "prompts" / f"{name}.csv", index=False)
    for path, first in zip(data.planted["image"], data.first, strict=False):  # planted captions come first
        Image.fromarray(data.images[first]).save(out / path, optimize=True)
    templates = data.planted.loc[data.planted["kind"] == "tm", "image"]
    for path, mask in zip(templates, data.masks, strict=True):
        Image.fromarray(mask).save(out / path.replace(".png", "_mask.png"), optimize=True)
