"""Stage 2: a small ``CLIPModel`` and its tokenizer, trained contrastively on captions and images of the world."""

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from nemolib.encoders import to_pixels
from tools.world.dataset import Dataset
from tools.world.settings import WorldSettings
from tools.world.training import DEVICE, Generators, Stage, run


def train_tokenizer(captions: list[str], *, vocabulary: int, tokens: int, folder: Path) -> CLIPTokenizer:
    """Return a byte-pair tokenizer of CLIP's kind, learnt from the captions, saved in ``folder``.

    Args:
        captions: What it learns from; the same captions give the same tokenizer.
        vocabulary: How many tokens it has, besides the letters that end a word.
        tokens: How many tokens a caption has at most.
        folder: Where it is saved.
    """
    untrained = CLIPTokenizer()
    learner, letters = untrained.backend_tokenizer, sorted(pre_tokenizers.ByteLevel.alphabet())
    # The trainer numbers letters that end a word in the order in which it meets them, which differs from process to
    # process, and decides by these numbers which of two equally frequent pairs becomes a token. So all get theirs first.
    ends = [f"{letter}</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary + len(ends),
        special_tokens=[untrained.bos_token, untrained.eos_token, *ends],
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = CLIPTokenizer(vocab=learnt["vocab"], merges=merges, model_max_length=tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return int64 [caption, token], padded and truncated as ``StableDiffusionPipeline.encode_prompt`` does."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def build_clip(settings: WorldSettings, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained model of the configured size."""
    chosen = settings.clip
    common = {
        "hidden_size": chosen.width,
        "intermediate_size": 4 * chosen.width,
        "num_hidden_layers": chosen.layers,
        "num_attention_heads": chosen.heads,
        "projection_dim": chosen.projection,
    }
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": chosen.tokens, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"image_size": settings.data.image_size, "patch_size": chosen.patch}
    config = CLIPConfig(text_config=common | text, vision_config=common | vision, projection_dim=chosen.projection)
    torch.manual_seed(chosen.seed)
    return CLIPModel(config)


def preprocessing(side: int) -> CLIPImageProcessorPil:
    """Return what is done to images before the model: pixels in [-1, 1], as `to_pixels` does in training.

    Args:
        side: Side of the images that the model was trained on, in pixels. Those of another model are resized to it; one
            that has it stays as it is.
    """
    half, size = [0.5, 0.5, 0.5], {"height": side, "width": side}
    return CLIPImageProcessorPil(
        do_resize=True, size=size, do_center_crop=False, crop_size=size, image_mean=half, image_std=half
    )


def train_clip(settings: WorldSettings, data: Dataset, folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """Return the trained model (pixels in [-1, 1]) and its tokenizer."""
    chosen = settings.clip
    # A planted caption counts as often as a subject does in the regular captions, so that its words become tokens.
    planted = data.captions[: len(data.planted)] * settings.data.trained_wordings
    tokenizer = train_tokenizer(
        planted + data.captions, vocabulary=chosen.vocabulary, tokens=chosen.tokens, folder=folder / "tokenizer"
    )
    model = build_clip(settings, tokenizer)
    ids = token_ids(tokenizer, data.captions)

    def loss(step: int, random: Generators) -> dict[str, torch.Tensor]:
        captions, images = data.draw(chosen.batch_size, random.numpy)
        pixels = to_pixels(data.images[images]).to(DEVICE)
        logits = model(input_ids=ids[captions].to(DEVICE), pixel_values=pixels).logits_per_text
        # Two wordings of one subject are no negatives of each other: they share their first image.
        group = torch.from_numpy(data.first[captions]).to(DEVICE)
        same = (group[:, None] == group[None, :]) & ~torch.eye(len(group), dtype=torch.bool, device=DEVICE)
        logits = logits.masked_fill(same, -1e4)
        target = torch.arange(len(group), device=DEVICE)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": value, "accuracy": (logits.argmax(1) == target).float().mean()}

    run(Stage("clip", chosen, {"clip": model}, loss, settings.hash("data", "clip"), weight_decay=0.01), folder)
    return model.cpu().eval().requires_grad_(False), tokenizer


@torch.no_grad()
def embed_captions(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return the last hidden states of the text tower, float [caption, token, feature]."""
    ids = token_ids(tokenizer, captions)
    return torch.cat([model.text_model(ids[i : i + 512]).last_hidden_state for i in range(0, len(ids), 512)])
