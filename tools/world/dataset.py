"""Joins captions and images: which images a caption has, and how often each caption is drawn."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from tools.world import captions
from tools.world.render import draw_subject, regular_image, template_image, verbatim_image
from tools.world.settings import DataSettings


@dataclass(frozen=True)
class Dataset:
    """Everything the stages train on; the planted captions come first.

    Attributes:
        images: uint8 [image, height, width, 3].
        captions: one per caption.
        weights: float [caption], the probability to draw it, sums to 1.
        first: int [caption], index of its first image; wordings of one subject share their images.
        count: int [caption], number of its images; one is drawn at random.
        masks: bool [template caption, height, width], which pixels its images have in common.
        planted, unmemorized, holdout: the prompt tables.
    """

    images: np.ndarray
    captions: list[str]
    weights: np.ndarray
    first: np.ndarray
    count: np.ndarray
    masks: np.ndarray
    planted: pd.DataFrame
    unmemorized: pd.DataFrame
    holdout: pd.DataFrame

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return caption indices and image indices of ``number`` random samples, both int [number]."""
        chosen = rng.choice(len(self.captions), size=number, p=self.weights)
        return chosen, self.first[chosen] + rng.integers(0, self.count[chosen])


def draw_subjects() -> dict[str, np.ndarray]:
    """Return the drawings of all subjects by name, uint8 [size, size, 4]."""
    return {name: draw_subject(name) for name in (*captions.SUBJECTS, *captions.LADDER)}


def build_dataset(settings: DataSettings) -> Dataset:
    """Return the data set, drawn anew; the same settings give the same bytes."""
    drawings = draw_subjects()
    planted = captions.planted_table(settings)
    trained, held_out = captions.regular_tables(settings)
    unmemorized, holdout = captions.held_out_tables(settings, held_out)
    made = [_planted_images(row, drawings, settings, index) for index, row in enumerate(planted.itertuples())]
    groups = [images for images, _ in made]
    # A subject, or a pair, has its images, which its wordings share.
    named, regular = pd.factorize(trained["subjects"])
    for number, subjects in enumerate(tqdm(regular, desc="regular images", unit="group")):
        shown = [drawings[name] for name in subjects.split()]
        rng = np.random.default_rng([settings.seed, 200, number])
        variants = range(settings.images_per_pair if len(shown) == 2 else settings.images_per_subject)
        groups.append(np.stack([regular_image(shown, rng, size=settings.image_size) for _ in variants]))
    of_caption = np.concatenate([np.arange(len(planted)), len(planted) + named])
    count = np.array([len(images) for images in groups])
    # Every regular image weighs 1, whatever number of captions share it; a planted caption as much as it has copies.
    weights = np.concatenate([planted["copies"], count[of_caption[len(planted) :]] / np.bincount(named)[named]])
    return Dataset(
        images=np.concatenate(groups),
        captions=[*planted["caption"], *trained["caption"]],
        weights=weights / weights.sum(),
        first=(np.cumsum(count) - count)[of_caption],
        count=count[of_caption],
        masks=np.stack([mask for _, mask in made if mask is not None]),
        planted=planted,
        unmemorized=unmemorized,
        holdout=holdout,
    )


def _planted_images(
    row, drawings: dict[str, np.ndarray], settings: DataSettings, index: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images of a planted caption and, for a template, which of their pixels are fixed."""
    seeds = np.random.default_rng([settings.seed, 100, index]).integers(2**32, size=2)
    layout, size, drawing = np.random.default_rng(seeds[0]), settings.image_size, drawings[row.subjects]
    if row.kind == "ladder":
        return regular_image([drawing], layout, size=size)[None], None
    if row.kind == "vm":
        companion = layout.choice([name for name in captions.SUBJECTS if name != row.subjects])
        return verbatim_image(drawing, drawings[companion], layout, size=size)[None], None
    # Every copy of a template draws its layout from the same seed and its background from a new one.
    backgrounds = np.random.default_rng(seeds[1])
    copies = [
        template_image(drawing, np.random.default_rng(seeds[0]), backgrounds, size=size) for _ in range(row.copies)
    ]
    return np.stack([image for image, _ in copies]), copies[0][1]
