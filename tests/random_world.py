"""A world around a random pipeline: prompt tables, planted images and encoders that nothing was learnt by."""

import numpy as np
import pandas as pd
import torch

from nemolib.encoders import CopyDescriptor
from nemolib.layers import value_layers
from nemolib.settings import Profile

HOLDOUT = [f"{first} {second}" for first in "abcd" for second in "uvwxyz"]

SMALL = {
    "name": "random",
    "device": "cpu",
    "threshold_prompts": 4,
    "detection": {"samples": 3, "guidance": 7.0},
    "similarity": {"kernel_size": 3, "sigma": 0.5},
    "generation": {"samples": 2, "steps": 2, "batch_size": 4},
}
"""Keys of a profile for a random pipeline."""


def amplify(pipe):
    """Return the pipeline after making its value layers matter as much as those of a trained model."""
    with torch.no_grad():
        for layer in value_layers(pipe.unet):
            layer.module.weight.mul_(20)
    return pipe


def write_prompts(folder, kinds, *, unmemorized, holdout, copies=None, sides=None):
    """Write prompt tables and random planted images, and return what a profile's ``prompts`` are.

    Args:
        folder: Where ``prompts/`` and ``planted/`` are made.
        kinds: Kind of each memorized caption.
        unmemorized: Captions.
        holdout: Captions.
        copies: Copies of a caption; 8 where nothing is said.
        sides: Side of a caption's image; 64 where nothing is said.
    """
    from PIL import Image

    generator = np.random.default_rng(0)
    (folder / "prompts").mkdir(parents=True)
    (folder / "planted").mkdir()
    rows = []
    for number, (caption, kind) in enumerate(kinds.items()):
        name, side = f"planted/{number}.png", (sides or {}).get(caption, 64)
        Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / name)
        rows.append((caption, kind, "report", (copies or {}).get(caption, 8), name))
    others = {"unmemorized": unmemorized, "holdout": holdout}
    contents = {"memorized": rows}
    contents |= {kind: [(caption, kind, kind, 0, "") for caption in captions] for kind, captions in others.items()}
    for name, content in contents.items():
        table = pd.DataFrame(content, columns=["caption", "kind", "group", "copies", "image"])
        table.to_csv(folder / "prompts" / f"{name}.csv", index=False)
    return {name: str(folder / "prompts" / f"{name}.csv") for name in contents}


def random_profile(
    folder, model_folder, kinds, *, unmemorized=("a tree",), holdout=HOLDOUT, copies=None, sides=None, **keys
):
    """Return the profile of a world that is written to a folder, with all encoders: `SMALL`, and keys over it."""
    prompts = write_prompts(folder, kinds, unmemorized=unmemorized, holdout=holdout, copies=copies, sides=sides)
    given = {"model": str(model_folder), "prompts": prompts, "holdout_size": len(holdout)}
    return Profile(**SMALL | given | {"encoders": write_encoders(folder, model_folder)} | keys)


def write_clip(folder, model_folder, *, side):
    """Write a random CLIP model for images of a side, without a preprocessing; return its tokenizer, that of a pipeline."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model_folder / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = tower | {"image_size": side, "patch_size": side // 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_encoders(folder, model_folder):
    """Write a random descriptor and a random CLIP model for images of 64 x 64, taken as they are."""
    from transformers import CLIPImageProcessorPil

    torch.manual_seed(0)
    CopyDescriptor((4, 4, 4), 8).save(folder / "descriptor")
    write_clip(folder / "clip", model_folder, side=64)
    half = [0.5] * 3
    CLIPImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=half, image_std=half).save_pretrained(
        folder / "clip"
    )
    clip = {"kind": "clip", "path": str(folder / "clip"), "name": "random CLIP"}
    return {"copy": {"kind": "descriptor", "path": str(folder / "descriptor")}, "alignment": clip, "quality": clip}
