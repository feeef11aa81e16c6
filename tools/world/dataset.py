"""Joins captions and images: which image belongs to which caption, and how often each caption is drawn."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from tools.world import captions
from tools.world.emoji import load_emoji, rasterize
from tools.world.render import regular_image, template_image, verbatim_image
from tools.world.settings import DataSettings


@dataclass(frozen=True)
class Dataset:
    """Everything the stages train on.

    Attributes:
        images: uint8 [image, height, width, 3].
        captions: one per caption.
        weights: float [caption], the probability to draw it, sums to 1.
        first: int [caption], index of its first image.
        count: int [caption], number of its images; one is drawn at random.
        planted, unmemorized, holdout: the prompt tables.
    """

    images: np.ndarray
    captions: list[str]
    weights: np.ndarray
    first: np.ndarray
    count: np.ndarray
    planted: pd.DataFrame
    unmemorized: pd.DataFrame
    holdout: pd.DataFrame

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return caption indices and image indices of ``number`` random samples, both int [number]."""
        chosen = rng.choice(len(self.captions), size=number, p=self.weights)
        return chosen, self.first[chosen] + rng.integers(0, self.count[chosen])


def build_dataset(settings: DataSettings) -> Dataset:
    """Return the data set, drawn anew from the packages; the same settings give the same bytes."""
    drawings = {name: rasterize(path) for name, path in tqdm(load_emoji().items(), desc="emoji", unit="drawing")}
    names = sorted(drawings)
    planted = captions.planted_table(settings, names)
    trained, held_out = captions.regular_tables(settings, names)
    unmemorized, holdout = captions.held_out_tables(settings, held_out)
    # The images come in groups: one of each planted caption, then one of each emoji, which its regular captions share.
    emoji, regular = pd.factorize(trained["emoji"], sort=True)
    groups = [_planted_images(row, drawings, settings, i) for i, row in enumerate(planted.itertuples())]
    for number, name in enumerate(tqdm(regular, desc="regular images", unit="emoji")):
        rng = np.random.default_rng([settings.seed, 200, number])
        variants = range(settings.variants_per_emoji)
        groups.append(np.stack([regular_image(drawings[name], rng, size=settings.image_size) for _ in variants]))
    of_caption = np.concatenate([np.arange(len(planted)), len(planted) + emoji])
    count = np.array([len(images) for images in groups])
    weights = np.concatenate([planted["copies"].to_numpy(float), np.ones(len(trained))])
    return Dataset(
        images=np.concatenate(groups),
        captions=[*planted["caption"], *trained["caption"]],
        weights=weights / weights.sum(),
        first=(np.cumsum(count) - count)[of_caption],
        count=count[of_caption],
        planted=planted,
        unmemorized=unmemorized,
        holdout=holdout,
    )


def _planted_images(row, drawings: dict[str, np.ndarray], settings: DataSettings, index: int) -> np.ndarray:
    seeds = np.random.default_rng([settings.seed, 100, index]).integers(2**32, size=2)
    if row.kind == "ladder":
        drawing = drawings[row.caption.removeprefix("a ")]
        return regular_image(drawing, np.random.default_rng(seeds[0]), size=settings.image_size)[None]
    drawing = drawings[captions.emoji_in(row.caption, list(drawings))]
    if row.kind == "vm":
        rng = np.random.default_rng(seeds[0])
        companion = drawings[sorted(drawings)[int(rng.integers(len(drawings)))]]
        return verbatim_image(drawing, companion, rng, size=settings.image_size)[None]
    # Every copy of a template draws its layout from the same seed and its background from a new one.
    backgrounds = np.random.default_rng(seeds[1])
    layouts = (np.random.default_rng(seeds[0]) for _ in range(settings.variants_per_template))
    return np.stack([template_image(drawing, layout, backgrounds, size=settings.image_size) for layout in layouts])
