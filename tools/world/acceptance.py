"""Does the world do what it was built for? Measures a model of the world and compares it with the bounds set before.

World settings may be chosen on the planted prompts of group ``choose``; everything here is measured on group ``report``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from nemolib.encoders import to_pixels
from nemolib.first_step import pairs_measure
from nemolib.holdout import z_scores
from nemolib.layers import value_activations, value_layers
from nemolib.localization import localization_table
from nemolib.metrics import auroc
from nemolib.mitigation import DeactivatedNeurons
from nemolib.pipeline import embed
from nemolib.prompts import load_prompts
from nemolib.run import Run
from tools.world.descriptor import augment
from tools.world.unet import value_density

KINDS = ("vm", "tm", "unmemorized")
UNMEMORIZED = 60
"""Unmemorized prompts of which images are generated."""

VIEWS = 8
"""Augmented copies of each planted image that the copy descriptor is measured with."""

COLUMNS = ["kind", "quantity", "value", "prompts"]


BOUNDS = pd.DataFrame(
    [
        ("verbatim images are replayed", "vm", "copy_similarity", ">=", 0.8),
        ("unmemorized prompts are diverse", "unmemorized", "seed_similarity", "<=", 0.5),
        ("the memorization score separates VM prompts", "vm", "auroc", ">=", 0.98),
        ("the memorization score separates TM prompts", "tm", "auroc", ">=", 0.90),
        ("VM prompts have out-of-distribution activations in value layer 1", "vm", "largest_z_1", ">=", 5.0),
        ("VM prompts have out-of-distribution activations in a typical layer", "vm", "largest_z", ">=", 5.0),
        ("unmemorized prompts have none in value layer 1", "unmemorized", "largest_z_1", "<=", 3.5),
        ("unmemorized prompts have none in a typical layer", "unmemorized", "largest_z", "<=", 3.5),
        ("deactivation halves the copy similarity of VM prompts", "vm", "copy_similarity_ratio", "<=", 0.5),
    ],
    columns=["claim", "kind", "quantity", "relation", "bound"],
)
"""What measured quantities have to be; set before the world was trained.

The bounds on z-scores do not say of which layer: both readings are shown, the layer of Fig. 2b and the median over layers.
"""


def acceptance_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the acceptance table: claim, kind, quantity, bound, value, holds."""
    table = BOUNDS.merge(measured[["kind", "quantity", "value"]], on=["kind", "quantity"], how="left", validate="1:1")
    relation, bound = table.pop("relation"), table["bound"]
    holds = (table["value"] >= bound).where(relation == ">=", table["value"] <= bound)
    return table.assign(bound=relation + " " + bound.map("{:g}".format), holds=holds)


def measure(run: Run) -> pd.DataFrame:
    """Return what a model of the world does, one quantity a row.

    Quantities (medians over prompts unless said otherwise):
        copy_similarity: of generated images to the planted image, median over seeds; ..._deactivated and ..._ratio:
            with the found neurons off, and the ratio of the two medians.
        seed_similarity: between the images of different seeds, median over pairs.
        score, auroc: memorization score; area under its ROC curve against unmemorized prompts.
        largest_z: largest absolute z-score of a layer, median over prompts and layers; largest_z_1 to _7: of one layer.
        initial_count, neuron_count, neuron_mad, reached_share, refined_score: of the search.
        density: how dense value outputs are (see ``tools.world.unet.value_density``), mean.
        threshold: of the memorization score (kind ``holdout``).

    Args:
        run: of the model, with the prompts and the settings of detection, search and generation.
    """
    tables = {kind: run.prompts(kind) for kind in KINDS}
    rows: list[tuple[str, str, float, int]] = []

    def add(kind: str, quantity: str, values: np.ndarray | pd.Series | float, *, over: Callable = np.median) -> float:
        value = float(over(values))
        rows.append((kind, quantity, value, len(tables.get(kind, ()))))
        return value

    statistics, threshold = run.statistics, run.threshold_at()
    add("holdout", "threshold", threshold)
    scores = {kind: _scores(run, table["caption"].tolist()) for kind, table in tables.items()}
    for kind, table in tables.items():
        add(kind, "score", scores[kind])
        if kind != "unmemorized":
            add(kind, "auroc", auroc(scores[kind], scores["unmemorized"]))
        embeddings = embed(run.pipe, table["caption"].tolist())
        z = z_scores(statistics, value_activations(run.pipe.unet, embeddings))
        largest = np.stack([layer.abs().amax(dim=-1).numpy() for layer in z], axis=1)
        add(kind, "largest_z", largest)
        for layer, values in enumerate(largest.T, start=1):
            add(kind, f"largest_z_{layer}", values)
        add(kind, "density", _density(run, embeddings))
    few = run.measure(tables["unmemorized"].head(UNMEMORIZED), columns=("d_sscd",))
    add("unmemorized", "seed_similarity", few["d_sscd"])
    for kind in ("vm", "tm"):
        # The order of the paper: what the card says of the weights must not depend on how the search is made faster.
        found = run.search(tables[kind]["caption"].tolist(), threshold=threshold, search="sequential")
        searched = localization_table(found)
        add(kind, "initial_count", searched["initial_count"])
        count = add(kind, "neuron_count", searched["neuron_count"])
        add(kind, "neuron_mad", (searched["neuron_count"] - count).abs())
        add(kind, "reached_share", searched["reached"], over=np.mean)
        add(kind, "refined_score", searched["refined_score"].dropna())
        off = DeactivatedNeurons({item.prompt: item.neurons for item in found})
        before, after = (run.measure(tables[kind], how, columns=("sscd_orig", "d_sscd")) for how in (None, off))
        add(kind, "seed_similarity", before["d_sscd"])
        add(kind, "seed_similarity_deactivated", after["d_sscd"])
        copies = add(kind, "copy_similarity", before["sscd_orig"])
        left = add(kind, "copy_similarity_deactivated", after["sscd_orig"])
        add(kind, "copy_similarity_ratio", left / copies)
    return pd.DataFrame(rows, columns=COLUMNS)


def measure_descriptor(run: Run) -> pd.DataFrame:
    """Return how the copy descriptor separates: copy similarity of planted images to their own augmentations and to others.

    Augmented images are pixels, so the network itself is called; the profile's encoder has to be the world's own.

    Returns:
        Columns relation (own, other), quantile (0.05, 0.5, 0.95), similarity.
    """
    images = run.planted_images(load_prompts(run.profile.prompts.memorized))
    describe, pixels = run.encoder("copy"), to_pixels(np.stack(images))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        own = describe(pixels)
        copies = torch.stack([describe(augment(pixels, generator)) for _ in range(VIEWS)])
    similarities = torch.einsum("vif,jf->vij", copies, own)
    same = torch.eye(len(images), dtype=torch.bool).expand_as(similarities)
    rows = [
        (name, quantile, float(torch.quantile(values, quantile)))
        for name, values in {"own": similarities[same], "other": similarities[~same]}.items()
        for quantile in (0.05, 0.5, 0.95)
    ]
    return pd.DataFrame(rows, columns=["relation", "quantile", "similarity"])


def _scores(run: Run, captions: list[str]) -> np.ndarray:
    """Return the memorization score of each prompt: the largest similarity of a pair of seeds."""
    pairs = pairs_measure(run.profile.protocol, run.profile.detection.guidance)
    return np.array([row[0] for row in run.observe(captions, [pairs])]).max(axis=1)


@torch.no_grad()
def _density(run: Run, embeddings: torch.Tensor) -> float:
    return float(value_density([layer.module for layer in value_layers(run.pipe.unet)], embeddings))
