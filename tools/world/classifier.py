"""Stage 6: names the subjects of an image, by a network that has never seen a planted or a generated one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from nemolib.encoders import CopyDescriptor, to_pixels
from tools.world.captions import SUBJECTS
from tools.world.dataset import draw_subjects
from tools.world.descriptor import soften
from tools.world.render import regular_image, template_image, verbatim_image
from tools.world.settings import WorldSettings
from tools.world.training import DEVICE, Generators, Stage, run

PAIR_AMONG = 3
"""Two subjects count as named if both are among this many most likely ones; a single one has to be the likeliest."""


def draw_new(
    drawings: dict[str, np.ndarray], number: int, rng: np.random.Generator, *, planted: float = 0.0
) -> tuple[np.ndarray, list[list[str]]]:
    """Return new regular images and the subjects of each; a share of them as planted ones look, of random layouts."""
    images, subjects = [], []
    for _ in range(number):
        one, other = rng.choice(SUBJECTS, size=2, replace=False).tolist()
        if rng.random() < planted:
            whole = verbatim_image(drawings[one], drawings[other], rng)
            images.append(whole if rng.random() < 0.5 else template_image(drawings[one], rng, rng)[0])
            subjects.append([one])
        else:
            subjects.append([one] if rng.random() < 0.5 else [one, other])
            images.append(regular_image([drawings[name] for name in subjects[-1]], rng))
    return np.stack(images), subjects


def train_classifier(settings: WorldSettings, folder: Path) -> CopyDescriptor:
    """Return a network whose features are a score for each of `SUBJECTS`."""
    chosen = settings.classifier
    torch.manual_seed(chosen.seed)
    model, drawings = CopyDescriptor(chosen.channels, len(SUBJECTS)), draw_subjects()

    def loss(step: int, random: Generators) -> dict[str, torch.Tensor]:
        images, subjects = draw_new(drawings, chosen.batch_size, random.numpy, planted=0.25)
        shown = torch.tensor([[float(name in names) for name in SUBJECTS] for names in subjects])
        scores = model(soften(to_pixels(images), random.torch).to(DEVICE)) * chosen.scale
        return {"loss": F.cross_entropy(scores, (shown / shown.sum(dim=1, keepdim=True)).to(DEVICE))}

    stage = Stage("classifier", chosen, {"classifier": model}, loss, settings.hash("classifier"), weight_decay=0.01)
    run(stage, folder)
    return model.cpu().eval().requires_grad_(False)


def share_named(model: CopyDescriptor, images: np.ndarray, subjects: Sequence[str]) -> float:
    """Return the share of images whose subjects are named.

    Args:
        model: the classifier.
        images: uint8 [prompt, seed, height, width, 3].
        subjects: of each prompt, one name, or two with a space between them.
    """
    order = model.describe(images.reshape(-1, *images.shape[2:])).argsort(dim=1, descending=True)
    likely = np.array(SUBJECTS)[order[:, :PAIR_AMONG].numpy()].reshape(*images.shape[:2], PAIR_AMONG)
    found = []
    for names, prompt in zip(map(str.split, subjects), likely, strict=True):
        found += [set(names) <= set(seed[: 1 if len(names) == 1 else PAIR_AMONG]) for seed in prompt]
    return float(np.mean(found))
