"""What several notebooks need, computed once: each result is kept in ``build/<profile>/store`` by its content hash.

A notebook that runs alone computes what it needs of earlier ones here, or finds it in the store. A result is used only
for the same model, prompts, settings and code. What is missing is computed here, or on a cluster: `nemolib.workers`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from nemolib import metrics, paper, paths, prompts, provenance
from nemolib.batching import batches, check_prompts
from nemolib.detection import Detector, Observation, Switch, detection_table
from nemolib.encoders import copy_encoder, describe_cached
from nemolib.files import write_atomic
from nemolib.generation import generate
from nemolib.holdout import (
    ActivationStatistics,
    activation_statistics,
    load_statistics,
    memorization_threshold,
    z_scores,
)
from nemolib.mitigation import DeactivatedNeurons, Mitigation
from nemolib.mitigation.attention import ScaledAttention
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.profiles import Profile, load_profile
from nemolib.protocols import PAPER, RELEASED, Protocol, load_protocol
from nemolib.provenance import content_hash, science_hash
from nemolib.settings import DetectionSettings, GenerationSettings, SimilaritySettings
from nemolib.store import Store
from nemolib.tables import Grid
from nemolib.value_layers import value_activations, value_layers, widths
from nemolib.workers import map_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from nemolib.encoders import ImageEncoder

TESTED = ("vm", "tm", "ladder", "unmemorized")
"""Kinds of prompts that are tested, in the order of the tables."""


_HASHES: weakref.WeakKeyDictionary[object, tuple[list[Any], str]] = weakref.WeakKeyDictionary()
"""The hash of each pipeline, and the state that it was in: hashing a billion weights takes seconds."""


_FEW = 4096
"""Values of a tensor that are looked at to see whether it changed."""


def open_store(profile: Profile | str, name: str) -> Store:
    """Return the store ``build/<profile>/store/<name>.jsonl``; it is made with the first record."""
    return Store(_store_folder(profile) / f"{name}.jsonl")


def model_hash(pipe: StableDiffusionPipeline) -> str:
    """Return a hash of everything in a pipeline that determines a result.

    Args:
        pipe: A StableDiffusionPipeline.

    Raises:
        ValueError: Layers of the UNet have hooks, or attention is scaled: what such a model gives must not be kept as
            the model's own.
    """
    if any(module._forward_hooks for module in pipe.unet.modules()):
        raise ValueError(
            "results are kept while layers have hooks; leave the context that deactivates neurons or layers"
        )
    if any(isinstance(processor, ScaledAttention) for processor in pipe.unet.attn_processors.values()):
        raise ValueError("results are kept while attention is scaled; leave the context that scales it")
    state = _state_of(pipe)
    if pipe not in _HASHES or _HASHES[pipe][0] != state:
        _HASHES[pipe] = (state, provenance.model_hash(pipe))
    return _HASHES[pipe][1]


def prompt_table(profile: Profile | str, kinds: Sequence[str] = TESTED) -> pd.DataFrame:
    """Return the prompts that a profile tests as one table.

    Args:
        profile: A profile or its name.
        kinds: Kinds of prompts, in the order of the rows.

    Returns:
        Columns caption, kind, group, copies, image.

    Raises:
        FileNotFoundError: A prompt table is missing.
        PromptTableError: A table is malformed or holds no prompt of a kind.
    """
    return pd.concat([prompts.select(profile, kind) for kind in kinds], ignore_index=True)


def statistics(pipe: StableDiffusionPipeline, profile: Profile | str, *, progress: bool = True) -> ActivationStatistics:
    """Return the activation statistics over the profile's holdout prompts: those of its file, else computed.

    Source: Sec. 3.2.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: The profile names a file that is missing.
        ValueError: It holds statistics of another model.
    """
    profile = load_profile(profile)
    if profile.statistics is not None:
        given = load_statistics(paths.resolve(profile.statistics))
        given.check(pipe.unet)
        return given
    captions = prompts.select(profile, "holdout")["caption"].tolist()
    key = content_hash([model_hash(pipe), captions, _code("holdout")])
    path = _store_folder(profile) / f"statistics-{key[:16]}.safetensors"
    if not path.is_file():
        activation_statistics(pipe, captions, progress=progress).save(path)
    return ActivationStatistics.load(path)


def holdout_scores(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    *,
    protocol: str | Protocol | None = None,
    guidance: float | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Return the similarity of every pair of seeds of the profile's threshold prompts.

    Source: Sec. 3.1.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        protocol: None means the profile's.
        guidance: Guidance scale of the detection; None means the profile's.
        limit: How many threshold prompts, from the top; None means all.
        progress: Whether to show a progress bar.

    Returns:
        Similarity [prompt, pair], float64.
    """
    profile = load_profile(profile)
    protocol = load_protocol(protocol or profile.protocol)
    guidance = profile.detection.guidance if guidance is None else guidance
    return _switch_scores(pipe, profile, [Switch("", "", "", protocol, guidance)], limit=limit, progress=progress)[0]


def threshold(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    *,
    multiplier: float | None = None,
    protocol: str | Protocol | None = None,
    progress: bool = True,
) -> float:
    """Return the memorization threshold of a profile: the one given there, else mean + multiplier sd of holdout scores.

    Source: Sec. 3.1, Sec. 4.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        multiplier: How many standard deviations above the mean; None means the profile's.
        protocol: None means the profile's.
        progress: Whether to show a progress bar.
    """
    profile = load_profile(profile)
    if profile.thresholds.value is not None and multiplier is None:
        return profile.thresholds.value
    multiplier = profile.thresholds.multiplier if multiplier is None else multiplier
    protocol = load_protocol(protocol or profile.protocol)
    values = holdout_scores(pipe, profile, protocol=protocol, progress=progress)
    return memorization_threshold(values, multiplier=multiplier, protocol=protocol)


def switch_table(
    pipe: StableDiffusionPipeline, profile: Profile | str, switches: Sequence[Switch], *, progress: bool = True
) -> pd.DataFrame:
    """Return what each difference between the paper's text and the authors' code does to the memorization threshold.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        switches: What `nemolib.detection.protocol_switches` returned; the first is what the others are compared with.
        progress: Whether to show a progress bar.

    Returns:
        Columns switch, question, change, mean and sd (of what the threshold is taken over), threshold (mean + 1 sd),
        gate (share of the holdout prompts whose largest pair is above the threshold) and difference (of the threshold
        from that of the first row).
    """
    rows = []
    for switch, scores_of in zip(switches, _switch_scores(pipe, profile, switches, progress=progress), strict=True):
        values = scores_of.ravel() if switch.protocol.threshold_pairs == "all" else scores_of.max(axis=1)
        tau = memorization_threshold(scores_of, protocol=switch.protocol)
        gate = (scores_of.max(axis=1) > tau).mean()
        rows.append((switch.name, switch.question, switch.change, values.mean(), values.std(ddof=1), tau, gate))
    table = pd.DataFrame(rows, columns=["switch", "question", "change", "mean", "sd", "threshold", "gate"])
    return table.assign(difference=table["threshold"] - table["threshold"].iloc[0])


def gate_table(
    pipe: StableDiffusionPipeline, profile: Profile | str, guidances: Sequence[float], *, progress: bool = True
) -> pd.DataFrame:
    """Return the share of holdout prompts that pass the gate if threshold and detection use different guidance.

    The gate is open if the largest pair of seeds is above the threshold; protocol `released`.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        guidances: Guidance scales.
        progress: Whether to show a progress bar.

    Returns:
        A row for each guidance of the detection, a column for each guidance of the threshold.
    """
    found = {
        guidance: holdout_scores(pipe, profile, protocol=RELEASED, guidance=guidance, progress=progress)
        for guidance in sorted(guidances)
    }
    limits = [memorization_threshold(values, protocol=RELEASED) for values in found.values()]
    shares = [[(values.max(axis=1) > limit).mean() for limit in limits] for values in found.values()]
    return pd.DataFrame(
        shares, index=pd.Index(found, name="detection"), columns=pd.Index(found, name="threshold"), dtype=float
    )


def pair_table(pairs: np.ndarray, *, samples: int) -> pd.DataFrame:
    """Return pair similarities as a table.

    Args:
        pairs: Similarity [prompt, pair].
        samples: Number of seeds per prompt.

    Returns:
        Columns prompt (from 0), first and second (seeds), similarity.
    """
    first, second = np.triu_indices(samples, k=1)
    prompt, pair = (index.ravel() for index in np.indices(pairs.shape))
    columns = {"prompt": prompt, "first": first[pair], "second": second[pair], "similarity": pairs.ravel()}
    return pd.DataFrame(columns)


def layer_table(pipe: StableDiffusionPipeline, normal: ActivationStatistics) -> pd.DataFrame:
    """Return the value layers with their activation statistics.

    Args:
        pipe: A StableDiffusionPipeline.
        normal: Activation statistics of this model.

    Returns:
        Columns layer (from 1, as in the paper), block, neurons, mean and sd (averaged over the neurons), sd_low and
        sd_high (smallest and largest of a neuron).
    """
    layers = value_layers(pipe.unet)
    return pd.DataFrame(
        {
            "layer": [layer.index + 1 for layer in layers],
            "block": [layer.name.partition(".transformer_blocks")[0] for layer in layers],
            "neurons": [layer.width for layer in layers],
            "mean": [float(values.mean()) for values in normal.mean],
            "sd": [float(values.mean()) for values in normal.std],
            "sd_low": [float(values.min()) for values in normal.std],
            "sd_high": [float(values.max()) for values in normal.std],
        }
    )


def scores(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    *,
    kinds: Sequence[str] = TESTED,
    progress: bool = True,
) -> pd.DataFrame:
    """Return the memorization scores of the tested prompts.

    Source: Sec. 3.1, App. B.4; Wen et al. (ICLR 2024).

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        kinds: Kinds of prompts.
        progress: Whether to show a progress bar.

    Returns:
        Columns caption, kind, group, copies, image; score (largest pair of seeds by the profile's protocol: the
        memorization score) and mean_pair (mean of its pairs); score_released and score_paper (the same by these
        protocols, with the profile's guidance); wen (norm of the difference that the text makes to the noise prediction
        in the first step, mean over seeds).
    """
    profile = load_profile(profile)
    table = prompt_table(profile, kinds)
    ours = load_protocol(profile.protocol)
    guidance = profile.detection.guidance
    measures: dict[str, tuple[Any, Callable[[Observation], np.ndarray]]] = {
        "ours": _pairs_measure(ours, guidance),
        "released": _pairs_measure(RELEASED, guidance),
        "paper": _pairs_measure(PAPER, guidance),
        "wen": ("guidance norms", Observation.guidance_norms),
    }
    found = _observe(pipe, profile, table["caption"].tolist(), measures, label="scores", progress=progress)
    return table.assign(
        score=[max(row["ours"]) for row in found],
        mean_pair=[float(np.mean(row["ours"])) for row in found],
        score_released=[max(row["released"]) for row in found],
        score_paper=[max(row["paper"]) for row in found],
        wen=[float(np.mean(row["wen"])) for row in found],
    )


def z_by_prompt(
    pipe: StableDiffusionPipeline, profile: Profile | str, *, kinds: Sequence[str] = TESTED, progress: bool = True
) -> pd.DataFrame:
    """Return the largest absolute z-score in each value layer for every tested prompt.

    Source: Sec. 3.2.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        kinds: Kinds of prompts.
        progress: Whether to show a progress bar.

    Returns:
        Columns caption, kind, layer (from 1, as in the paper), neuron (from 0) and largest_z, one row for each prompt
        and layer.
    """
    table = prompt_table(profile, kinds)
    parts = [
        table[["caption", "kind"]].assign(layer=layer, neuron=z.argmax(axis=1), largest_z=z.max(axis=1))
        for layer, z in enumerate(_absolute_z(pipe, profile, table, progress=progress), start=1)
    ]
    return pd.concat(parts, ignore_index=True)


def z_by_neuron(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    *,
    kinds: Sequence[str] = TESTED,
    limit: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Return each neuron's largest absolute z-score over the prompts of a kind.

    Source: Sec. 3.2, Fig. 2b.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        kinds: Kinds of prompts.
        limit: How many prompts of each kind, from the top; None means all. The largest of many is larger than the
            largest of few, so kinds are comparable only for the same number of prompts.
        progress: Whether to show a progress bar.

    Returns:
        Columns kind, layer (from 1, as in the paper), neuron (from 0), largest_z and caption (of the prompt that has
        it), one row for each kind and neuron.
    """
    table = pd.concat([prompts.select(profile, kind).head(limit) for kind in kinds], ignore_index=True)
    absolute = _absolute_z(pipe, profile, table, progress=progress)
    parts = []
    for kind in kinds:
        rows = (table["kind"] == kind).to_numpy()
        captions = table["caption"].to_numpy()[rows]
        for layer, z in enumerate(absolute, start=1):
            chosen = z[rows]
            columns = {"neuron": np.arange(z.shape[1]), "largest_z": chosen.max(axis=0)}
            part = pd.DataFrame(columns | {"caption": captions[chosen.argmax(axis=0)]})
            parts.append(part.assign(kind=kind, layer=layer))
    return pd.concat(parts, ignore_index=True)[["kind", "layer", "neuron", "largest_z", "caption"]]


def images(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    captions: Sequence[str],
    *,
    neurons: NeuronSet | Sequence[NeuronSet] | None = None,
    factor: float = 0.0,
    mitigation: Mitigation | None = None,
    settings: GenerationSettings | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Return generated images of prompts; those of a prompt are kept once they are made.

    Source: App. B.3.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        captions: Prompts, at least one.
        neurons: Neurons that are scaled: one set for all prompts, or one per prompt; None changes nothing.
        factor: What their values are multiplied by; 0 deactivates.
        mitigation: A mitigation of `nemolib.mitigation`, in place of neurons; None changes nothing.
        settings: Seed, samples, steps, guidance and batch size; None means those of the profile.
        progress: Whether to show a progress bar.

    Returns:
        Images [prompt, seed, height, width, 3], uint8.

    Raises:
        ValueError: There are no prompts, one is empty, a neuron set does not fit or is missing, the mitigation cannot
            handle the pipeline, or both neurons and a mitigation are given.
        FailedPrompts: Prompts raised; the images of all others are kept.
    """
    if neurons is not None and mitigation is not None:
        raise ValueError(f"both neurons and a mitigation ({mitigation.name}) are given; give one of them")
    profile, captions = load_profile(profile), check_prompts(captions)
    settings = settings or profile.generation
    sets = [neurons] * len(captions) if neurons is None or isinstance(neurons, NeuronSet) else list(neurons)
    if len(sets) != len(captions):
        raise ValueError(f"{len(sets)} neuron sets were given for {len(captions)} prompts; give one, or one per prompt")
    for item in sets:
        if item is not None:
            item.check(widths(pipe.unet))
    if mitigation is not None:
        mitigation.check(pipe)
    # The batch size has no part in an image, and a mitigation that leaves a prompt alone none in what is generated.
    base = content_hash([model_hash(pipe), replace(settings, batch_size=1), _code("generation")])
    acting = [mitigation if item is None else DeactivatedNeurons(item, factor) for item in sets]
    keys = [
        content_hash([base, caption, *([] if item is None else item.identity(caption))])
        for caption, item in zip(captions, acting, strict=True)
    ]
    folder = _store_folder(profile) / "images"
    jobs = {
        key: (caption, item, key)
        for key, caption, item in zip(keys, captions, sets, strict=True)
        if not _image_file(folder, key).is_file()
    }
    made = map_prompts(
        _drawing,
        # The number of workers has no part in what is drawn together.
        list(map(tuple, batches(list(jobs.values()), max(1, settings.batch_size // settings.samples)))),
        pipe=pipe,
        common={"settings": settings, "factor": factor, "mitigation": mitigation},
        label="images",
        progress=progress,
    )
    for batch, drawn in made:
        for (_, _, key), samples in zip(batch, drawn, strict=True):
            _write_images(_image_file(folder, key), samples)
    return np.stack([_read_images(_image_file(folder, key)) for key in keys])


def _drawing(
    pipe: StableDiffusionPipeline, *, settings: GenerationSettings, factor: float, mitigation: Mitigation | None
) -> Callable[[Sequence[tuple[str, NeuronSet | None, str]]], np.ndarray]:
    """Return what makes the images [prompt, seed, height, width, 3] of a batch of captions with their neurons."""
    none = NeuronSet.empty(len(value_layers(pipe.unet)))

    def draw(batch: Sequence[tuple[str, NeuronSet | None, str]]) -> np.ndarray:
        sets = [none if item is None else item for _, item, _ in batch]
        return generate(
            pipe,
            [caption for caption, _, _ in batch],
            settings=settings,
            neurons=sets if any(map(len, sets)) else None,
            factor=factor,
            mitigation=mitigation,
            progress=False,
        )

    return draw


def planted_images(profile: Profile | str, table: pd.DataFrame, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return the planted image of each row; with Stable Diffusion, the training image that was found under its URL.

    Args:
        profile: A profile or its name.
        table: Rows of the memorized prompt table.
        size: Height and width to which each is brought; None: as they are, so that all must have one size.

    Returns:
        Images [prompt, height, width, 3], uint8.

    Raises:
        PromptTableError: A row names no image.
        FileNotFoundError: An image is missing.
        ValueError: Images have different sizes, and none is given.
    """
    loaded = _load_planted(profile, table, size)
    sizes = {image.shape[:2] for image in loaded}
    if len(sizes) > 1:
        raise ValueError(f"training images have different sizes, such as {sorted(sizes)[:3]}; give one (size)")
    return np.stack(loaded)


def _load_planted(profile: Profile | str, table: pd.DataFrame, size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Return the planted image of each row, [height, width, 3]; see `planted_images`."""
    from PIL import Image

    loaded = []
    for path in prompts.image_paths(table, profile):
        with Image.open(path) as image:
            whole = image.convert("RGB")
        if size is not None and whole.size != size[::-1]:
            whole = whole.resize(size[::-1], Image.Resampling.LANCZOS)
        loaded.append(np.asarray(whole))
    return loaded


def image_features(encoder: ImageEncoder, profile: Profile | str, made: np.ndarray) -> np.ndarray:
    """Return the features of the images of several prompts and seeds; those of an image are kept once they are computed.

    Args:
        encoder: The encoder.
        profile: A profile or its name.
        made: Images [prompt, seed, height, width, 3], uint8, as `images` returns them.

    Returns:
        Features [prompt, seed, feature], float32.

    Raises:
        ValueError: The images have another shape or type, or there are none.
    """
    if made.ndim != 5:
        raise ValueError(f"images must be [prompt, seed, height, width, 3], got {list(made.shape)}")
    found = describe_cached(encoder, made.reshape(-1, *made.shape[2:]), _store_folder(profile) / "features")
    return found.unflatten(0, made.shape[:2]).numpy()


def planted_features(encoder: ImageEncoder, profile: Profile | str, table: pd.DataFrame) -> np.ndarray:
    """Return the features of the planted image of each row; each image is seen as it is, whatever its size.

    Args:
        encoder: The encoder.
        profile: A profile or its name.
        table: Rows of a prompt table.

    Returns:
        Features [prompt, feature], float64; a row of NaN where there is no image.

    Raises:
        FileNotFoundError: An image is missing.
    """
    has_image = _has_image(table)
    if not has_image.any():
        # The number of features is that of any image.
        some = encoder.describe(np.zeros((1, 64, 64, 3), dtype=np.uint8))
        return np.full((len(table), some.shape[1]), np.nan)
    loaded = _load_planted(profile, table[has_image])
    # Images of one size are seen together, others one by one.
    together = len({image.shape for image in loaded}) == 1
    groups = [np.stack(loaded)] if together else [image[None] for image in loaded]
    found = torch.cat([encoder.describe(group) for group in groups])
    features = np.full((len(table), found.shape[1]), np.nan)
    features[has_image] = found.double().numpy()
    return features


def copies(
    pipe: StableDiffusionPipeline, profile: Profile | str, table: pd.DataFrame, *, progress: bool = True
) -> pd.DataFrame:
    """Return how similar the generated images of prompts are to the planted image and to each other.

    Source: Sec. 4 (SSCD_orig, D_SSCD), with the profile's encoder for copy detection.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        table: Rows of a prompt table, or none; where ``image`` is empty there is nothing to copy.
        progress: Whether to show a progress bar.

    Returns:
        The table with the columns copy_similarity (cosine of a generated and the planted image, median over seeds; NaN
        without a planted image), copy_max (largest of the seeds) and seed_similarity (cosine of two generated images,
        median over pairs of seeds).

    Raises:
        ProfileError: The profile has no encoder for copy detection.
    """
    profile = load_profile(profile)
    encoder = copy_encoder(profile, device=pipe.device)
    if table.empty:
        return table.assign(**dict.fromkeys(("copy_similarity", "copy_max", "seed_similarity"), np.empty(0)))
    made = images(pipe, profile, table["caption"].tolist(), progress=progress)
    features = image_features(encoder, profile, made)
    to_planted = metrics.sscd_orig(features, planted_features(encoder, profile, table))
    return table.assign(
        copy_similarity=metrics.over_seeds(to_planted),
        copy_max=metrics.over_seeds(to_planted, "max"),
        seed_similarity=metrics.over_seeds(metrics.d_sscd(features)),
    )


def ladder_finding(table: pd.DataFrame) -> str:
    """Return what the duplication ladder shows, in a sentence; a profile without ladder prompts shows nothing.

    Args:
        table: Columns copies and copy_similarity, one row per prompt of the ladder (`copies`).
    """
    rungs = table.groupby("copies")["copy_similarity"].median()
    if rungs.empty:
        return "This profile has no ladder prompts, so it cannot show what the number of copies does."
    return (
        f"On the ladder copy similarity goes from {rungs.iloc[0]:.2f} at {rungs.index[0]} "
        f"{'copy' if rungs.index[0] == 1 else 'copies'} to {rungs.iloc[-1]:.2f} at {rungs.index[-1]} copies."
    )


def sample_grid(
    pipe: StableDiffusionPipeline, profile: Profile | str, table: pd.DataFrame, *, progress: bool = True
) -> Grid:
    """Return the planted image of each prompt, white where there is none, and the generated ones beside it.

    Args:
        pipe: The profile's pipeline.
        profile: A profile or its name.
        table: Rows of a prompt table.
        progress: Whether to show a progress bar.

    Returns:
        Images [prompt, 1 + seed, height, width, 3], uint8; captions and "planted", "seed 0", ... are the labels.
    """
    made = images(pipe, profile, table["caption"].tolist(), progress=progress)
    planted = np.full((len(table), 1, *made.shape[2:]), 255, dtype=np.uint8)
    has_image = _has_image(table)
    if has_image.any():
        planted[has_image, 0] = planted_images(profile, table[has_image], size=made.shape[2:4])
    seeds = [f"seed {index}" for index in range(made.shape[1])]
    return Grid(np.concatenate([planted, made], axis=1), tuple(table["caption"]), ("planted", *seeds))


def detection_beside_paper(table: pd.DataFrame, *, resamples: int = 200) -> pd.DataFrame:
    """Return how well the scores tell memorized from unmemorized prompts, with reported numbers beside.

    Source: App. B.4; Wen's score with one denoising step and 4 seeds as reported by Jeon et al. (ICML 2025).

    Args:
        table: The table of `scores`.
        resamples: Resamples of the interval of the AUROC.

    Returns:
        Columns of `nemolib.detection.detection_table`, then paper_auroc, paper_tpr_at_1_fpr, paper_accuracy and
        confidence; missing where nothing is known.
    """
    ours = detection_table(table, ("score_paper", "score_released", "wen"), resamples=resamples)
    reported = paper.detection()
    reported = reported[(reported["score"] == "ssim") | (reported["setting"] == "4 seeds, 1 step")]
    names = {name: f"paper_{name}" for name in ("auroc", "tpr_at_1_fpr", "accuracy")}
    reported = reported[["score", "memorized", *names, "confidence"]].rename(columns=names | {"score": "kind_of_score"})
    ours["kind_of_score"] = np.where(ours["score"] == "wen", "wen", "ssim")
    joined = ours.merge(reported, how="left", on=["kind_of_score", "memorized"])
    return joined.drop(columns="kind_of_score")


def _state_of(pipe: StableDiffusionPipeline) -> list[Any]:
    """Return what changes when a weight does: place, number of changes and a few values of each tensor."""
    parts = (getattr(pipe, name).state_dict().values() for name in ("unet", "text_encoder", "vae"))
    tensors = [tensor for part in parts for tensor in part]
    changes = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    # PyTorch does not count changes that are made through Tensor.data; values from all over a tensor tell of one that
    # scales or replaces it. All of them would be a second for Stable Diffusion, at every call.
    some = [tensor.reshape(-1)[:: max(1, tensor.numel() // _FEW)] for tensor in tensors]
    sums = [float(values.sum(dtype=torch.float32)) for values in some]
    others = [len(pipe.tokenizer), repr(pipe.scheduler.config)]
    return [others, [tensor.data_ptr() for tensor in tensors], changes, sums]


def _has_image(table: pd.DataFrame) -> np.ndarray:
    return table["image"].fillna("").ne("").to_numpy()


def _store_folder(profile: Profile | str) -> Path:
    return paths.build_dir(load_profile(profile).name) / "store"


def _code(*modules: str) -> list[str]:
    """Return what a result depends on besides its inputs: the code that computes it."""
    return [science_hash(*modules), torch.__version__.partition("+")[0]]


def _pairs_measure(protocol: Protocol, guidance: float) -> tuple[Any, Callable[[Observation], np.ndarray]]:
    """Return what determines the pair similarities, and how they are measured."""
    # The pairs themselves do not depend on the switches of the search and of the threshold.
    swapped = protocol.swap_guidance and guidance != 0
    identity = ["pairs", protocol.timestep_index, protocol.similarity, swapped, float(guidance)]
    return identity, partial(Observation.pairs, protocol=protocol, guidance=guidance)


def _switch_scores(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    switches: Sequence[Switch],
    *,
    limit: int | None = None,
    progress: bool,
) -> list[np.ndarray]:
    """Return for each switch the similarity [prompt, pair] of the threshold prompts."""
    captions = prompts.select(profile, "threshold")["caption"].head(limit).tolist()
    measures = {str(i): _pairs_measure(switch.protocol, switch.guidance) for i, switch in enumerate(switches)}
    found = _observe(pipe, profile, captions, measures, label="holdout scores", progress=progress)
    return [np.array([row[name] for row in found]) for name in measures]


def _observe(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    captions: Sequence[str],
    measures: dict[str, tuple[Any, Callable[[Observation], np.ndarray]]],
    *,
    label: str,
    progress: bool,
) -> list[dict[str, list[float]]]:
    """Return for each prompt what each measure gives, from the store where it is there."""
    profile = load_profile(profile)
    store = open_store(profile, "observations")
    same = [model_hash(pipe), replace(profile.detection, guidance=0.0), profile.similarity, _code("detection")]
    base = content_hash(same)
    keys = [
        {name: content_hash([base, caption, identity]) for name, (identity, _) in measures.items()}
        for caption in captions
    ]
    jobs = []
    for caption, row in dict(zip(captions, keys, strict=True)).items():
        # Two measures of one protocol have one key.
        wanted = {key: measures[name][1] for name, key in row.items() if key not in store}
        if wanted:
            jobs.append(((caption, wanted),))
    found = map_prompts(
        _observing,
        jobs,
        pipe=pipe,
        common={
            "settings": profile.detection,
            "similarity": profile.similarity,
            "protocol": load_protocol(profile.protocol),
        },
        label=label,
        progress=progress,
    )
    for _, values in found:
        for key, value in values.items():
            store.put(key, value)
    return [{name: store.get(key) for name, key in row.items()} for row in keys]


def _observing(
    pipe: StableDiffusionPipeline, *, settings: DetectionSettings, similarity: SimilaritySettings, protocol: Protocol
) -> Callable[[tuple[tuple[str, dict[str, Callable[[Observation], np.ndarray]]]]], dict[str, list[float]]]:
    """Return what makes the wanted measures, by key, of a prompt."""
    detector = Detector(pipe, settings=settings, similarity=similarity, protocol=protocol)

    def observe(batch: tuple[tuple[str, dict[str, Callable[[Observation], np.ndarray]]]]) -> dict[str, list[float]]:
        caption, wanted = batch[0]
        observation = detector.observe(caption)
        return {key: measure(observation).tolist() for key, measure in wanted.items()}

    return observe


def _absolute_z(
    pipe: StableDiffusionPipeline, profile: Profile | str, table: pd.DataFrame, *, progress: bool
) -> list[np.ndarray]:
    """Return for each layer the absolute z-scores [prompt, neuron]."""
    normal = statistics(pipe, profile, progress=progress)
    activations = value_activations(pipe.unet, embed(pipe, table["caption"].tolist()))
    scored = z_scores(normal, [values.cpu() for values in activations])
    return [z.abs().double().numpy() for z in scored]


def _image_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _write_images(path: Path, samples: np.ndarray) -> None:
    from safetensors.numpy import save

    write_atomic(path, save({"images": np.ascontiguousarray(samples)}))


def _read_images(path: Path) -> np.ndarray:
    from safetensors.numpy import load

    return load(path.read_bytes())["images"]
