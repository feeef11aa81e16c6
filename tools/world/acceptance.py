"""Does the world do what it was built for? Measures a model of the world and compares it with the bounds set before.

World settings may be chosen on the planted prompts of group ``choose``; everything here is measured on group ``report``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from nemolib import metrics
from nemolib.detection import auroc
from nemolib.encoders import ImageEncoder, copy_encoder, describe_samples, to_pixels
from nemolib.experiments import planted_images
from nemolib.generation import generate
from nemolib.holdout import (
    ActivationStatistics,
    activation_statistics,
    holdout_scores,
    memorization_threshold,
    z_scores,
)
from nemolib.localization import localize_many
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed, load_pipeline
from nemolib.profiles import Profile, load_profile
from nemolib.prompts import select
from nemolib.value_layers import value_activations, value_layers
from nemolib.world.descriptor import augment
from nemolib.world.unet import value_density

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

KINDS = ("vm", "tm", "unmemorized")
COLUMNS = ["kind", "quantity", "value", "prompts"]


@dataclass(frozen=True)
class Bound:
    """One line of the acceptance table: a measured quantity and what it has to be."""

    claim: str
    kind: str
    quantity: str
    relation: str
    bound: float

    def holds(self, value: float) -> bool:
        """Return whether a value is within the bound."""
        return bool(value >= self.bound if self.relation == ">=" else value <= self.bound)


#: Set before the world was trained. The bounds on z-scores do not say of which layer: both readings are shown, the layer
#: of Fig. 2b and the median over layers.
BOUNDS = (
    Bound("verbatim images are replayed", "vm", "copy_similarity", ">=", 0.8),
    Bound("unmemorized prompts are diverse", "unmemorized", "seed_similarity", "<=", 0.5),
    Bound("the memorization score separates VM prompts", "vm", "auroc", ">=", 0.98),
    Bound("the memorization score separates TM prompts", "tm", "auroc", ">=", 0.90),
    Bound("VM prompts have out-of-distribution activations in value layer 1", "vm", "largest_z_1", ">=", 5.0),
    Bound("VM prompts have out-of-distribution activations in a typical layer", "vm", "largest_z", ">=", 5.0),
    Bound("unmemorized prompts have none in value layer 1", "unmemorized", "largest_z_1", "<=", 3.5),
    Bound("unmemorized prompts have none in a typical layer", "unmemorized", "largest_z", "<=", 3.5),
    Bound("deactivation halves the copy similarity of VM prompts", "vm", "copy_similarity_ratio", "<=", 0.5),
)


def acceptance_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the acceptance table: claim, kind, quantity, bound, value, holds."""
    values = measured.set_index(["kind", "quantity"])["value"]
    rows = [
        {
            "claim": bound.claim,
            "kind": bound.kind,
            "quantity": bound.quantity,
            "bound": f"{bound.relation} {bound.bound:g}",
            "value": float(values[bound.kind, bound.quantity]),
            "holds": bound.holds(float(values[bound.kind, bound.quantity])),
        }
        for bound in BOUNDS
    ]
    return pd.DataFrame(rows)


def measure(
    model: str | Path,
    *,
    profile: Profile | str = "tiny",
    group: str = "report",
    unmemorized: int = 60,
    searched: Sequence[str] = ("vm", "tm"),
    progress: bool = True,
) -> pd.DataFrame:
    """Return what a model of the world does, one quantity a row.

    Quantities (medians over prompts unless said otherwise):
        copy_similarity: of generated images to the planted image, median over seeds; ..._deactivated and ..._ratio:
            with the found neurons off, and the ratio of the two medians.
        seed_similarity: between the images of different seeds, median over pairs.
        score, auroc: memorization score; area under its ROC curve against unmemorized prompts.
        largest_z: largest absolute z-score of a layer, median over prompts and layers; largest_z_1 to _7: of one layer.
        initial_count, neuron_count, neuron_mad, reached_share, refined_score: of the search.
        density: how dense value outputs are (see ``nemolib.world.unet.value_density``), mean.
        threshold: of the memorization score (kind ``holdout``).

    Args:
        model: pipeline folder.
        profile: settings of detection, search and generation.
        group: which half of the planted prompts.
        unmemorized: number of unmemorized prompts of which images are generated.
        searched: kinds of planted prompts that are searched, and of which images are generated.
        progress: whether to show progress bars.
    """
    profile = replace(load_profile(profile), model=str(model), groups=group)
    pipe = load_pipeline(profile)
    tables = {kind: select(profile, kind) for kind in KINDS}
    prompts = {kind: table["caption"].to_list() for kind, table in tables.items()}
    rows: list[tuple[str, str, float, int]] = []

    def add(kind: str, quantity: str, values: np.ndarray | list[float] | float, *, over: Callable = np.median) -> float:
        value = float(over(values))
        rows.append((kind, quantity, value, len(prompts.get(kind, ()))))
        return value

    statistics = activation_statistics(pipe, select(profile, "holdout")["caption"].to_list(), progress=progress)
    normal = holdout_scores(pipe, select(profile, "threshold")["caption"].to_list(), progress=progress)
    threshold = memorization_threshold(normal, multiplier=profile.thresholds.multiplier, protocol=profile.protocol)
    add("holdout", "threshold", threshold)
    scores = {kind: _scores(pipe, prompts[kind]) for kind in KINDS}
    for kind in KINDS:
        add(kind, "score", scores[kind])
        if kind != "unmemorized":
            add(kind, "auroc", auroc(scores[kind], scores["unmemorized"]))
        largest = _largest_z(pipe, statistics, prompts[kind])
        add(kind, "largest_z", largest)
        for layer, values in enumerate(largest.T, start=1):
            add(kind, f"largest_z_{layer}", values)
        add(kind, "density", _density(pipe, prompts[kind]))
    encoder = copy_encoder(profile)
    few = generate(pipe, prompts["unmemorized"][:unmemorized], progress=progress)
    add("unmemorized", "seed_similarity", _seed_similarity(encoder, few))
    for kind in searched:
        # The order of the paper: what the card says of the weights must not depend on how the search is made faster.
        found = localize_many(
            pipe, prompts[kind], statistics, threshold=threshold, search="sequential", progress=progress
        )
        add(kind, "initial_count", found["initial_count"])
        count = add(kind, "neuron_count", found["neuron_count"])
        add(kind, "neuron_mad", (found["neuron_count"] - count).abs())
        add(kind, "reached_share", found["reached"], over=np.mean)
        add(kind, "refined_score", found["refined_score"].dropna())
        planted = encoder.describe(planted_images(profile, tables[kind]))
        sets = [NeuronSet.from_json(text) for text in found["neurons"]]
        active = generate(pipe, prompts[kind], progress=progress)
        off = generate(pipe, prompts[kind], neurons=sets, progress=progress)
        add(kind, "seed_similarity", _seed_similarity(encoder, active))
        add(kind, "seed_similarity_deactivated", _seed_similarity(encoder, off))
        before = add(kind, "copy_similarity", _copy_similarity(encoder, active, planted))
        after = add(kind, "copy_similarity_deactivated", _copy_similarity(encoder, off, planted))
        add(kind, "copy_similarity_ratio", after / before)
    return pd.DataFrame(rows, columns=COLUMNS)


def measure_descriptor(profile: Profile | str = "tiny", *, seed: int = 0, views: int = 8) -> pd.DataFrame:
    """Return how the copy descriptor separates: copy similarity of planted images to their own augmentations and to others.

    Augmented images are pixels, so the network itself is called; the profile's encoder has to be the world's own.

    Returns:
        Columns relation (own, other), quantile (0.05, 0.5, 0.95), similarity.
    """
    profile = replace(load_profile(profile), groups=None)
    describe = copy_encoder(profile)
    images = np.concatenate([planted_images(profile, select(profile, kind)) for kind in ("vm", "tm", "ladder")])
    pixels = to_pixels(images)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        own = describe(pixels)
        copies = torch.stack([describe(augment(pixels, generator)) for _ in range(views)])
    similarities = torch.einsum("vif,jf->vij", copies, own)
    same = torch.eye(len(images), dtype=torch.bool).expand_as(similarities)
    rows = [
        {"relation": name, "quantile": q, "similarity": float(torch.quantile(values, q))}
        for name, values in (("own", similarities[same]), ("other", similarities[~same]))
        for q in (0.05, 0.5, 0.95)
    ]
    return pd.DataFrame(rows)


def _scores(pipe: StableDiffusionPipeline, prompts: list[str]) -> np.ndarray:
    """Return the memorization score of each prompt: the largest similarity of a pair of seeds."""
    return holdout_scores(pipe, prompts, progress=False).max(axis=1)


def _largest_z(pipe: StableDiffusionPipeline, statistics: ActivationStatistics, prompts: list[str]) -> np.ndarray:
    """Return the largest |z| of each layer, float [prompt, layer]."""
    z = z_scores(statistics, value_activations(pipe.unet, embed(pipe, prompts)))
    return np.stack([layer.abs().amax(dim=-1).numpy() for layer in z], axis=1)


@torch.no_grad()
def _density(pipe: StableDiffusionPipeline, prompts: list[str]) -> float:
    projections = [layer.module for layer in value_layers(pipe.unet)]
    return float(value_density(projections, embed(pipe, prompts)))


def _copy_similarity(encoder: ImageEncoder, images: np.ndarray, planted: torch.Tensor) -> np.ndarray:
    """Return the median over seeds of the copy similarity to the planted image, [prompt]."""
    return metrics.over_seeds(metrics.sscd_orig(describe_samples(encoder, images), planted))


def _seed_similarity(encoder: ImageEncoder, images: np.ndarray) -> np.ndarray:
    """Return the median over pairs of seeds of the copy similarity between them, [prompt]."""
    return metrics.over_seeds(metrics.d_sscd(describe_samples(encoder, images)))
