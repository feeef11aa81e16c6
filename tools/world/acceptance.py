"""Does the world do what it was built for? Measures a model of the world and compares it with the bounds set before.

World settings may be chosen on the planted prompts of group ``choose``; everything here is measured on group ``report``,
but for the copy descriptor, which is shown all planted images.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from skimage.metrics import peak_signal_noise_ratio

from nemolib.encoders import CopyDescriptor, to_pixels
from nemolib.first_step import pairs_measure
from nemolib.holdout import z_scores
from nemolib.layers import value_activations, value_layers
from nemolib.localization import Localization, localization_table
from nemolib.metrics import auroc, fid
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.prompts import load_prompts
from nemolib.run import Run
from tools.world.autoencoder import signal_to_noise
from tools.world.captions import in_words
from tools.world.classifier import draw_new, share_named
from tools.world.dataset import draw_subjects
from tools.world.descriptor import augment
from tools.world.unet import value_density

KINDS = ("vm", "tm", "unmemorized")
DRAWN = 60
"""Unmemorized prompts of which images are generated."""

SEEDS = (101, 102, 103, 104)
"""Seeds of further images of unmemorized prompts: how much images of one model differ by chance."""

FREQUENT = (5, 10, 20)
"""Numbers of most frequent neurons that are deactivated for prompts that they do not belong to."""

NEW_IMAGES = 200
"""Regular images, drawn anew, that autoencoder and classifier are measured with."""

VIEWS = 8
"""Augmented copies of each planted image that the copy descriptor is measured with."""

COLUMNS = ["kind", "quantity", "value"]

BOUNDS = pd.read_csv(Path(__file__).with_name("bounds.csv"))
"""What measured quantities have to be; set before the world was trained.

The bounds on z-scores do not say of which layer: both readings are shown, the layer of Fig. 2b and the median over layers.
"""

Values = dict[tuple[str, str], float]
"""Values by kind and quantity."""


def acceptance_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the acceptance table: claim, kind, quantity, bound, value, holds."""
    table = BOUNDS.merge(measured, on=["kind", "quantity"], how="left", validate="m:1")
    relation, bound = table.pop("relation"), table["bound"]
    holds = (table["value"] >= bound).where(relation == ">=", table["value"] <= bound)
    return table.assign(bound=relation + " " + bound.map("{:g}".format), holds=holds)


def measure(run: Run, classifier: CopyDescriptor, *, drawn: int = DRAWN) -> pd.DataFrame:
    """Return what a model of the world does, one quantity a row: columns kind, quantity, value.

    Quantities (medians over prompts unless said otherwise):
        score, auroc: memorization score; area under its ROC curve against unmemorized prompts. above_threshold: share
            of prompts. threshold: of the score (kind ``holdout``).
        largest_z: largest absolute z-score of a layer, median over prompts and layers; largest_z_1 to _7: of one layer.
        density: how dense value outputs are (see ``tools.world.unet.value_density``), mean.
        initial_count, neuron_count, reached_share, refined_score: of the search.
        copy_similarity: of generated images to the planted image, median over seeds. seed_similarity: between the images
            of different seeds. named: share of images whose subjects the classifier names (``_single`` and ``_pair`` of
            unmemorized prompts). All three with ``_deactivated``: with the found neurons off; ``_ratio``: by how much.
        named_ordinary: ``named`` of an unmemorized prompt of the same subject.
        fid_excess: FID of unmemorized prompts with neurons off that belong to other prompts, against the untouched model:
            by how many standard deviations it exceeds the untouched model's own with other seeds. named_loss: what their
            ``named`` loses. Kind ``others``: all neurons of one planted prompt, for each prompt another one;
            ``frequent_5`` and so on: the neurons that most planted prompts share.
        signal_to_noise: of the autoencoder (dB, mean), kind ``new``: regular images drawn anew; kind ``vm``: planted
            ones. named_single, named_pair of kind ``new``: the classifier on those images.
        similarity_own, similarity_other: of augmented planted images to the same and to other planted images, by the copy
            descriptor; ``_lowest`` and ``_highest``: the 5 % nearest to the other kind.
        signal_to_noise of kind ``profile_solver`` and ``ddim_25``: images by the profile's solver and by 25 DDIM steps
            against those by 100 DDIM steps (dB, mean).

    Args:
        run: of the model, with the prompts and the settings of detection, search and generation.
        classifier: of subjects.
        drawn: unmemorized prompts of which images are generated.
    """
    tables = {kind: run.prompts(kind) for kind in KINDS}
    # The order of the paper: what the card says of the weights must not depend on how the search is made faster.
    found = {kind: run.search(tables[kind]["caption"].tolist(), search="sequential") for kind in ("vm", "tm")}
    values = _first_step(run, tables) | _new_images(run, tables["vm"], classifier) | _copies(run)
    some = max(1, drawn // 12)
    values |= _solvers(run, [caption for table in tables.values() for caption in table["caption"].head(some)])
    for kind, items in found.items():
        values |= {(kind, name): value for name, value in _deactivated(run, tables[kind], items, classifier).items()}
    values |= _others(
        run, tables["unmemorized"].head(drawn), [item.neurons for item in sum(found.values(), [])], classifier
    )
    return pd.DataFrame([(*key, float(value)) for key, value in values.items()], columns=COLUMNS)


@torch.no_grad()
def _first_step(run: Run, tables: dict[str, pd.DataFrame]) -> Values:
    """Return scores and value activations, for which no image is made."""
    pairs = pairs_measure(run.profile.protocol, run.profile.detection.guidance)
    values: Values = {("holdout", "threshold"): run.threshold}
    scores = {
        kind: np.array([row[0] for row in run.observe(table["caption"].tolist(), [pairs])]).max(axis=1)
        for kind, table in tables.items()
    }
    for kind, table in tables.items():
        values[kind, "score"] = np.median(scores[kind])
        values[kind, "above_threshold"] = np.mean(scores[kind] > run.threshold)
        values[kind, "auroc"] = auroc(scores[kind], scores["unmemorized"])
        embeddings = embed(run.pipe, table["caption"].tolist())
        layers = z_scores(run.statistics, value_activations(run.pipe.unet, embeddings))
        largest = np.stack([layer.abs().amax(dim=-1).numpy() for layer in layers])
        values[kind, "largest_z"] = np.median(largest)
        values |= {(kind, f"largest_z_{i}"): np.median(layer) for i, layer in enumerate(largest, start=1)}
        values[kind, "density"] = value_density([layer.module for layer in value_layers(run.pipe.unet)], embeddings)
    return values


def _new_images(run: Run, verbatim: pd.DataFrame, classifier: CopyDescriptor) -> Values:
    """Return how sharp the autoencoder is, and how the classifier does, on regular images that nobody has seen."""
    images, subjects = draw_new(draw_subjects(), NEW_IMAGES, np.random.default_rng(0))
    return {
        ("new", "signal_to_noise"): signal_to_noise(run.pipe.vae, images),
        ("vm", "signal_to_noise"): signal_to_noise(run.pipe.vae, np.stack(run.planted_images(verbatim))),
    } | _named("new", classifier, images[:, None], [" ".join(names) for names in subjects])


def _named(kind: str, classifier: CopyDescriptor, images: np.ndarray, subjects: list[str]) -> Values:
    """Return the shares of images whose one subject, or both, are named."""
    pair = np.array([" " in names for names in subjects])
    chosen = {"named_single": ~pair, "named_pair": pair}
    return {
        (kind, name): share_named(classifier, images[rows], np.array(subjects)[rows]) for name, rows in chosen.items()
    }


def _deactivated(
    run: Run, table: pd.DataFrame, found: list[Localization], classifier: CopyDescriptor
) -> dict[str, float]:
    """Return what the search finds for planted prompts and what deactivation does to their images."""
    searched, subjects = localization_table(found), table["subjects"].tolist()
    values = {name: searched[name].median() for name in ("initial_count", "neuron_count", "refined_score")}
    values["reached_share"] = searched["reached"].mean()
    off = DeactivatedNeurons({item.prompt: item.neurons for item in found})
    for suffix, mitigation in {"": None, "_deactivated": off}.items():
        alike = run.measure(table, mitigation, columns=("sscd_orig", "d_sscd"))
        values["copy_similarity" + suffix] = alike["sscd_orig"].median()
        values["seed_similarity" + suffix] = alike["d_sscd"].median()
        values["named" + suffix] = share_named(classifier, run.images(table["caption"].tolist(), mitigation), subjects)
    for name in ("copy_similarity", "seed_similarity"):
        values[name + "_ratio"] = values[name + "_deactivated"] / values[name]
    ordinary = [in_words("{a} {}", name) for name in subjects]
    return values | {"named_ordinary": share_named(classifier, run.images(ordinary), subjects)}


def _others(run: Run, table: pd.DataFrame, planted: list[NeuronSet], classifier: CopyDescriptor) -> Values:
    """Return what unmemorized prompts look like, and what they lose by neurons of planted prompts."""
    captions, subjects = table["caption"].tolist(), table["subjects"].tolist()
    by_turns = {caption: planted[i % len(planted)] for i, caption in enumerate(captions)}
    ranked = [pair for pair, _ in Counter(pair for neurons in planted for pair in neurons).most_common()]
    mitigations = {"others": DeactivatedNeurons(by_turns)}
    for number in FREQUENT:
        most = NeuronSet.of(ranked[:number], layers=len(value_layers(run.pipe.unet)))
        mitigations[f"frequent_{number}"] = DeactivatedNeurons(most)
    settings = [replace(run.profile.generation, seed=seed) for seed in SEEDS]

    own = run.features("quality", captions)

    def distance(mitigation: DeactivatedNeurons | None, chosen) -> float:
        others = run.features("quality", captions, mitigation, settings=chosen)
        return fid(own.reshape(-1, own.shape[-1]), others.reshape(-1, own.shape[-1]))

    untouched = [distance(None, chosen) for chosen in settings]
    before = share_named(classifier, run.images(captions, settings=settings[0]), subjects)
    values = _named("unmemorized", classifier, run.images(captions), subjects)
    values["unmemorized", "seed_similarity"] = run.measure(table, columns=("d_sscd",))["d_sscd"].median()
    for kind, mitigation in mitigations.items():
        excess = distance(mitigation, settings[0]) - np.mean(untouched)
        values[kind, "fid_excess"] = excess / np.std(untouched, ddof=1)
        after = share_named(classifier, run.images(captions, mitigation, settings=settings[0]), subjects)
        values[kind, "named_loss"] = before - after
    return values


def _solvers(run: Run, captions: list[str]) -> Values:
    """Return how near images with few steps are to those with many."""
    own = run.profile.generation
    many, *few = (
        run.images(captions, settings=settings)
        for settings in (replace(own, solver="own", steps=100), own, replace(own, solver="own", steps=25))
    )
    return {
        (kind, "signal_to_noise"): np.mean([peak_signal_noise_ratio(*pair) for pair in zip(many, images, strict=True)])
        for kind, images in zip(("profile_solver", "ddim_25"), few, strict=True)
    }


@torch.no_grad()
def _copies(run: Run) -> Values:
    """Return how the copy descriptor tells copies of planted images, softened and cropped, from other planted images.

    Augmented images are pixels, so the network itself is called; the profile's encoder has to be the world's own.
    """
    images = run.planted_images(load_prompts(run.profile.prompts.memorized))
    describe, pixels = run.encoder("copy"), to_pixels(np.stack(images))
    generator = torch.Generator().manual_seed(0)
    copies = torch.stack([describe(augment(pixels, generator)) for _ in range(VIEWS)])
    similarities = torch.einsum("vif,jf->vij", copies, describe(pixels))
    same = torch.eye(len(images), dtype=torch.bool).expand_as(similarities)
    own, other = similarities[same], similarities[~same]
    return {
        ("planted", "similarity_own"): own.median(),
        ("planted", "similarity_own_lowest"): own.quantile(0.05),
        ("planted", "similarity_other"): other.median(),
        ("planted", "similarity_other_highest"): other.quantile(0.95),
    }
