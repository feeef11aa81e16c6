"""Second half of notebook 05 in functions: what else suffers when neurons or whole layers are switched off.

Image quality against the number of blocked neurons (Fig. 5a, 8), the outputs of cross-attention blocks (Table 3), key,
value and convolution layers one by one (Fig. 16 to 20). Images are kept in ``build/<profile>/store``; see
`nemolib.experiments`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from nemolib import metrics, paper
from nemolib.batching import batches, progress_bar
from nemolib.checks import Row, claim, comparison, lacking
from nemolib.encoders import quality_encoder
from nemolib.experiments import image_features, images
from nemolib.experiments_localization import neuron_sets
from nemolib.experiments_mitigation import measured
from nemolib.first_step import FirstStep, first_step
from nemolib.layer_ablation import Layer, collect_outputs, cross_attention_layers, switched_off
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.profiles import Profile, load_profile
from nemolib.prompts import MEMORIZED, load_prompts, select
from nemolib.seeding import stream
from nemolib.settings import GenerationSettings
from nemolib.tables import Grid
from nemolib.value_layers import widths as layer_widths

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import Tensor

UNTOUCHED, FREQUENT, OTHER = "untouched", "most frequent", "random other"
"""What is blocked: nothing, the memorization neurons of most prompts, or as many neurons that are none."""

QUALITY = {"fid": "FID", "clip_fid": "CLIP-FID", "kid": "KID"}
"""Metrics of Fig. 8."""

SMALL = 0.1
"""Share of the untouched model's FID below which an interval counts as small: the axis of the paper's Fig. 5a spans as much."""

FEW_SEEDS = 4
"""Number of seeds up to which all ways to split them are compared; with more there are too many."""

OUTPUTS = ("block", "cross-attention")
"""What is compared: the output of the whole block with its residual connections, and that of cross-attention alone."""

METRICS = ("sscd_orig", "sscd_gen", "a_clip")
"""What is measured for each layer."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Neurons that are blocked.

    Attributes:
        setting: `UNTOUCHED`, `FREQUENT` or `OTHER`.
        asked: How many neurons were asked for.
        draw: Which of several draws.
        neurons: The neurons; fewer than asked for where a layer has no more.
    """

    setting: str
    asked: int
    draw: int
    neurons: NeuronSet


def ranked_neurons(found: pd.DataFrame) -> pd.DataFrame:
    """Return the memorization neurons of memorized prompts, those of most prompts first.

    Args:
        found: Localizations (`nemolib.experiments_localization.localizations`).

    Returns:
        Columns layer (from 0), neuron, prompts (how many have it); ties in the order of layers and neurons.
    """
    sets = neuron_sets(found[found["kind"].isin(MEMORIZED)])
    counts = Counter(pair for neurons in sets for pair in neurons)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return pd.DataFrame([(*pair, number) for pair, number in ranked], columns=["layer", "neuron", "prompts"])


def counts_up_to(most: int, *, points: int = 4, span: float = 30.0) -> tuple[int, ...]:
    """Return numbers of neurons from a small one up to the largest, evenly spaced on a logarithmic scale.

    Source: Fig. 5a goes from 25 to 750 neurons, so that the largest number is 30 times the smallest.

    Args:
        most: The largest number.
        points: How many numbers, at most.
        span: The largest divided by the smallest.

    Returns:
        Numbers in order, each once; none if ``most`` is 0.
    """
    if most < 1:
        return ()
    return tuple(sorted({max(1, round(most / span ** (1 - place))) for place in np.linspace(0, 1, points)}))


def blocked_sets(
    found: pd.DataFrame, widths: Sequence[int], counts: Sequence[int], *, draws: int = 2, seed: int = 0
) -> list[Blocked]:
    """Return the neuron sets of Fig. 5a: nothing, the most frequent memorization neurons, and random others.

    Source: Fig. 5a, 8, Table 3.
    Deviates: random neurons are none of any prompt, and lie in the layers of the frequent ones. Where a layer has fewer
        others, all of them are taken, and the set is smaller than asked for.

    Args:
        found: Localizations.
        widths: Number of neurons of each value layer.
        counts: Numbers of neurons.
        draws: How often random neurons are drawn.
        seed: Seed of the draws.

    Raises:
        ValueError: A number is larger than that of all memorization neurons, or below 1.
    """
    ranked = ranked_neurons(found)
    pairs = list(zip(ranked["layer"], ranked["neuron"], strict=True))
    wrong = [count for count in counts if not 1 <= count <= len(pairs)]
    if wrong:
        raise ValueError(f"{wrong[0]} neurons are asked for; memorized prompts have 1 to {len(pairs)} together")
    every = NeuronSet.of(pairs, layers=len(widths))
    found_sets = {count: NeuronSet.of(pairs[:count], layers=len(widths)) for count in counts}
    return [
        Blocked(UNTOUCHED, 0, 0, NeuronSet.empty(len(widths))),
        *(Blocked(FREQUENT, count, 0, neurons) for count, neurons in found_sets.items()),
        *(
            Blocked(OTHER, count, draw, other_neurons(neurons, every, widths, seed=seed, draw=draw))
            for count, neurons in found_sets.items()
            for draw in range(draws)
        ),
    ]


def other_neurons(
    neurons: NeuronSet, taken: NeuronSet, widths: Sequence[int], *, seed: int, draw: int = 0
) -> NeuronSet:
    """Return as many random neurons in the same layers, none of which is taken; fewer where a layer has no more.

    Args:
        neurons: The neurons that say how many are drawn in which layer.
        taken: Neurons that are not drawn.
        widths: Number of neurons of each layer.
        seed: Seed.
        draw: Which of several draws; within one, a larger set of neurons gives a larger set of others.

    Raises:
        ValueError: A neuron does not exist.
    """
    for item in (neurons, taken):
        item.check(widths)
    drawn = []
    for layer, (chosen, width) in enumerate(zip(neurons.layers, widths, strict=True)):
        others = sorted(set(range(width)) - set(taken.layers[layer]))
        order = stream(seed, "other neurons", draw, layer).permutation(len(others))
        drawn.append(tuple(others[place] for place in order[: len(chosen)]))
    return NeuronSet(tuple(drawn))


# Fig. 5a, 8: image quality


def quality_prompts(profile: Profile | str, number: int | None = None) -> list[str]:
    """Return prompts whose images are compared: the profile's own for image quality, else its unmemorized ones.

    Source: Sec. 4 (prompts of COCO).

    Args:
        profile: A profile or its name; ``prompts.quality`` names a table.
        number: How many, from the top; None means all.

    Raises:
        ValueError: The number is negative.
    """
    if number is not None and number < 0:
        raise ValueError(f"number is {number}; give a number of prompts, or None for all")
    profile = load_profile(profile)
    file = profile.prompts.quality
    table = select(profile, "unmemorized") if file is None else load_prompts(file, kind="unmemorized")
    return table["caption"][:number].tolist()


def halves(samples: int) -> list[tuple[list[int], list[int]]]:
    """Return ways to split seeds into a reference half and another: no seed in common, every seed equally often.

    Args:
        samples: Number of seeds.

    Returns:
        Pairs (reference, other): all for up to 4 seeds, else as many as there are seeds, each a turn of the last by one
        seed; none for one seed.
    """
    seeds, half = range(samples), samples // 2
    if not half:
        return []
    if samples > FEW_SEEDS:
        turns = [[(start + place) % samples for place in range(2 * half)] for start in seeds]
        return [(turn[:half], turn[half:]) for turn in turns]
    firsts = [list(first) for first in combinations(seeds, half)]
    return [(first, other) for first in firsts for other in firsts if not set(first) & set(other)]


def blocked_quality(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    prompts: Sequence[str],
    sets: Sequence[Blocked],
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Return how far images with blocked neurons are, as a set, from those of the untouched model.

    For each split (`halves`) the reference are images of the untouched model from half of the seeds; compared with it
    are those of the other half: of the untouched model (how far two halves are anyway), and with blocked neurons.

    Source: Sec. 4, Fig. 5a, 8.
    Deviates: the reference are images of the untouched model, not photographs, so that the distance of the untouched
        model is that of two sets of its own images.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name; ``extent.quality_samples`` says how many images a prompt gets. CLIP-FID takes its
            ``encoders.clip_quality``, or if it has none, the features of FID.
        prompts: Unmemorized prompts.
        sets: What is blocked, the untouched model first (`blocked_sets`).
        progress: Whether to show progress bars.

    Returns:
        One row per set, split and metric: columns setting, asked, neurons, draw, split (from 0), pair (equal for two splits
        that have the same halves in another order), metric (of `QUALITY`), encoder, images (in each half), value, reason.
        Where there are too few images for a covariance nothing is made: one row per set and metric, without a value, and
        the reason why.

    Raises:
        ValueError: The untouched model is not the first.
    """
    if not sets or sets[0].setting != UNTOUCHED:
        raise ValueError(f"the first set must be {UNTOUCHED!r}: what all others are compared with")
    profile, prompts = load_profile(profile), list(prompts)
    samples = profile.extent.quality_samples or profile.generation.samples
    settings = replace(profile.generation, samples=samples)
    number = len(prompts) * (samples // 2)
    columns = ["setting", "asked", "neurons", "draw", "split", "pair", "metric", "encoder", "images", "value", "reason"]
    if number < 2:
        each = _count(samples, "image")
        reason = (
            f"not computed: {_count(len(prompts), 'prompt')} with {each} each make {_count(number, 'image')} to compare; a "
            "covariance needs 2"
        )
        rows = [(*_labels(item), None, None, name, "", number, np.nan, reason) for item in sets for name in QUALITY]
        return pd.DataFrame(rows, columns=columns)
    encoders = _quality_encoders(profile, pipe.device)
    splits, rows, references = halves(samples), [], {}
    pairs = _pairs(splits)
    with progress_bar(len(sets), "image quality", unit="set", enabled=progress) as bar:
        for item in sets:
            bar.set_postfix_str(f"{item.setting}, {item.asked}")
            made = images(pipe, profile, prompts, neurons=item.neurons, settings=settings, progress=False)
            features = {
                name: image_features(encoder, profile, made) for name, encoder in _by_identity(encoders).items()
            }
            references = references or features
            for split, (first, second) in enumerate(splits):
                for metric, encoder in encoders.items():
                    value = _distance(
                        metric, _flat(references[id(encoder)], first), _flat(features[id(encoder)], second)
                    )
                    rows.append((*_labels(item), split, pairs[split], metric, encoder.name, number, value, ""))
            bar.update()
    return pd.DataFrame(rows, columns=columns)


def quality_summary(values: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation of image quality over splits and draws, and the change from the untouched model.

    Splits share images, so that the standard deviation is rather too small than too large. The untouched model compared
    with itself is the same for two halves in either order, and counts once for both.

    Args:
        values: What `blocked_quality` returned.

    Returns:
        One row per metric, setting and number: columns metric, encoder, setting, asked, neurons (mean over draws),
        images, values (how many), mean, sd, change and change_sd (mean and standard deviation of the difference to the
        untouched model in the same split), reason.
    """
    base = values[values["setting"] == UNTOUCHED].set_index(["metric", "split"])["value"]
    keys = pd.MultiIndex.from_frame(values[["metric", "split"]])
    values = values.assign(change=values["value"].to_numpy() - base.reindex(keys).to_numpy())
    rows = []
    for (metric, setting, asked), part in values.groupby(["metric", "setting", "asked"], sort=False):
        known = part["value"].dropna()
        if setting == UNTOUCHED:
            known = part.dropna(subset="value").groupby("pair")["value"].mean()
        rows.append(
            {
                "metric": metric, "encoder": part["encoder"].iloc[0], "setting": setting, "asked": asked,
                "neurons": part["neurons"].mean(), "images": int(part["images"].iloc[0]), "values": len(known),
                "mean": known.mean(), "sd": known.std(), "change": part["change"].mean(),
                "change_sd": part["change"].std(), "reason": part["reason"].iloc[0],
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    return table.sort_values(
        "metric", key=lambda names: names.map(list(QUALITY).index), kind="stable", ignore_index=True
    )


def interval_share(summary: pd.DataFrame, metric: str = "fid") -> float:
    """Return the width of the interval against what it is measured on: two standard deviations over the untouched value.

    Args:
        summary: What `quality_summary` returned.
        metric: One of `QUALITY`.

    Returns:
        Two standard deviations of the untouched model's value, as a share of it; missing if there is none.
    """
    rows = summary[(summary["metric"] == metric) & (summary["setting"] == UNTOUCHED)]
    return float(2 * rows["sd"].iloc[0] / rows["mean"].iloc[0])


# Table 3: outputs of cross-attention blocks


def block_similarity(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    prompts: Sequence[str],
    sets: Sequence[Blocked],
    *,
    seeds: int = 3,
    progress: bool = True,
) -> pd.DataFrame:
    """Return how similar the outputs of cross-attention blocks are with blocked neurons and untouched.

    Cosine of the whole output (all positions and channels) of one latent, in the first denoising step, without
    guidance. Deactivated neurons of one block change the input of all later ones.

    Source: Table 3 (500 unmemorized prompts, 3 seeds).
    Deviates: the paper does not say at which step, nor whether residual connections count; here both outputs are given.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        prompts: Unmemorized prompts; without any the table has no rows.
        sets: What is blocked (`blocked_sets`); the untouched model is computed anyway.
        seeds: How many latents, at least 2.
        progress: Whether to show a progress bar.

    Returns:
        One row per blocked set, output (of `OUTPUTS`) and block: columns setting, asked, neurons, draw, output, layer
        (from 1), block (down, mid or up), samples, cosine (mean over prompts and seeds) and lowest.
    """
    profile = load_profile(profile)
    blocked = [item for item in sets if item.setting != UNTOUCHED]
    step = first_step(pipe, settings=replace(profile.detection, samples=seeds, guidance=0.0), protocol=profile.protocol)
    places = _block_outputs(pipe.unet)
    together = max(1, profile.generation.batch_size // seeds)
    cosines: list[list[np.ndarray]] = [[] for _ in blocked]
    with progress_bar(len(prompts), "block outputs", enabled=progress) as bar:
        for prompt in prompts:
            embedding = embed(pipe, [prompt])
            before = _outputs(step, embedding, places, [NeuronSet.empty(len(layer_widths(pipe.unet)))])
            for batch in batches(list(zip(blocked, cosines, strict=True)), together):
                after = _outputs(step, embedding, places, [item.neurons for item, _ in batch])
                for number, (_, found) in enumerate(batch):
                    found.append(np.stack([_cosine(a[0], b[number]) for a, b in zip(before, after, strict=True)]))
            bar.update()
    columns = ["setting", "asked", "neurons", "draw", "output", "layer", "block", "samples", "cosine", "lowest"]
    rows = []
    for item, found in zip(blocked, cosines, strict=True):
        # [prompt, place, seed] -> [place, sample]
        values = np.stack(found).swapaxes(0, 1).reshape(len(places), -1) if found else []
        for (output, layer, _), cosine in zip(places, values, strict=False):
            rows.append((*_labels(item), output, layer.number, layer.block, len(cosine), cosine.mean(), cosine.min()))
    return pd.DataFrame(rows, columns=columns)


def table_3(similarity: pd.DataFrame, *, output: str = "block") -> pd.DataFrame:
    """Return Table 3: a row for each setting and number of neurons, a column for each block, the paper's lowest beside.

    Args:
        similarity: What `block_similarity` returned.
        output: One of `OUTPUTS`.

    Returns:
        Columns setting, asked, neurons (mean over draws), one per block (``1 down``, ...; mean over draws), lowest (of
        these) and paper (its lowest entry of the setting).
    """
    part = similarity[similarity["output"] == output]
    part = part.assign(column=part["layer"].astype(str) + " " + part["block"])
    names, rows = list(dict.fromkeys(part["column"])), []
    reported = {FREQUENT: paper.reported("blocks.cosine"), OTHER: paper.reported("blocks.cosine.random")}
    for (setting, asked), group in part.groupby(["setting", "asked"], sort=False):
        cosines = group.groupby("column")["cosine"].mean()[names]
        start = {"setting": setting, "asked": asked, "neurons": group["neurons"].mean()}
        rows.append(start | cosines.to_dict() | {"lowest": cosines.min(), "paper": reported[setting].value})
    return pd.DataFrame(rows, columns=["setting", "asked", "neurons", *names, "lowest", "paper"])


# Fig. 16 to 20: layers one by one


def layer_effects(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    prompts: Sequence[str],
    layers: Sequence[Layer],
    *,
    settings: GenerationSettings | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Return what switching off layers, one at a time, does to images of memorized prompts, all of the same seeds.

    Source: App. C.8, Fig. 16, 17 (key and value layers set to zero); App. C.9, Fig. 20 (convolutions, half blocked).

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        prompts: Memorized prompts; without any the table has no rows.
        layers: The layers (`nemolib.layer_ablation.cross_attention_layers`, `nemolib.layer_ablation.down_convolutions`).
        settings: Seeds, steps and guidance of the images; None means those of the profile.
        progress: Whether to show a progress bar.

    Returns:
        One row per layer and prompt, the untouched model first: columns part (``untouched``, ``value``, ``key`` or
        ``convolution``), layer (from 1; 0 for the untouched model), block, name (address), prompt, and medians over
        seeds: sscd_orig (similarity to the planted image, missing without one), sscd_gen (to the untouched model's
        image of the same seed), a_clip (of image and prompt).
    """
    profile, prompts = load_profile(profile), list(prompts)
    if not prompts:
        return pd.DataFrame(columns=["part", "layer", "block", "name", "prompt", *METRICS])
    kinds = select(profile, "memorized").set_index("caption").loc[prompts, "kind"]
    rows = pd.DataFrame({"kind": kinds.to_numpy(), "prompt": prompts})
    chosen = {labels["name"]: labels for labels in map(_layer_labels, (None, *layers))}
    mitigations = {"": [None], **{layer.name: [switched_off(layer)] for layer in layers}}
    values = measured(pipe, profile, rows, mitigations, generation=settings, progress=progress)
    labels = pd.DataFrame([chosen[name] for name in values["setting"]])
    return pd.concat([labels, values[["prompt", *METRICS]]], axis=1)


def layer_summary(effects: pd.DataFrame) -> pd.DataFrame:
    """Return the effect of each layer: median over prompts, and the same of the untouched model.

    Args:
        effects: What `layer_effects` returned.

    Returns:
        One row per layer: columns part, layer, block, name, prompts, and for each of `METRICS` ``<metric>`` and
        ``<metric>_untouched``; missing where no prompt has a value.
    """
    base = effects[effects["part"] == UNTOUCHED]
    keys = ["part", "layer", "block", "name"]
    rows = []
    for key, part in effects[effects["part"] != UNTOUCHED].groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True)) | {"prompts": len(part)}
        for metric in METRICS:
            row |= {metric: part[metric].median(), f"{metric}_untouched": base[metric].median()}
        rows.append(row)
    columns = [*keys, "prompts", *(f"{metric}{suffix}" for metric in METRICS for suffix in ("", "_untouched"))]
    return pd.DataFrame(rows, columns=columns)


def layer_grid(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    prompts: Sequence[str],
    layers: Sequence[Layer],
    *,
    settings: GenerationSettings | None = None,
    seed: int = 0,
) -> Grid:
    """Return images of prompts with layers switched off, one at a time, all of one seed.

    Source: Fig. 18 to 20.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        prompts: Prompts.
        layers: The layers.
        settings: As in `layer_effects`, so that images come from the store.
        seed: Which of the seeds.

    Returns:
        Rows are prompts; columns ``none`` (the untouched model), then the numbers of the layers.
    """
    columns = ("none", *(str(layer.number) for layer in layers))
    if not len(prompts):
        return Grid(np.zeros((0, len(columns), 1, 1, 3), dtype=np.uint8), (), columns)
    made = [
        _layer_images(pipe, load_profile(profile), list(prompts), layer, settings)[:, seed] for layer in (None, *layers)
    ]
    return Grid(np.stack(made, axis=1), tuple(prompts), columns)


def strongest(summary: pd.DataFrame, part: str, *, number: int = 2, metric: str = "sscd_orig") -> pd.DataFrame:
    """Return the layers of a part that lower a metric most, in the order of their numbers.

    Args:
        summary: What `layer_summary` returned.
        part: ``value``, ``key`` or ``convolution``.
        number: How many.
        metric: One of `METRICS`.
    """
    rows = summary[(summary["part"] == part) & summary[metric].notna()]
    return rows.nsmallest(number, metric).sort_values("layer", ignore_index=True)


# What was found


def checks_of(
    found: pd.DataFrame, sets: Sequence[Blocked], similarity: pd.DataFrame, effects: pd.DataFrame
) -> list[Row]:
    """Return what must hold for any model if the comparisons are fair, and our numbers beside the paper's.

    Args:
        found: Localizations.
        sets: What `blocked_sets` returned.
        similarity: What `block_similarity` returned.
        effects: What `layer_effects` returned, of all layers.
    """
    ranked = ranked_neurons(found)
    memorization = set(zip(ranked["layer"], ranked["neuron"], strict=True))
    frequent = {item.asked: item.neurons for item in sets if item.setting == FREQUENT}
    missing = sum(abs(asked - len(neurons)) for asked, neurons in frequent.items())
    random = [item for item in sets if item.setting == OTHER]
    per_layer = effects.groupby(["part", "layer"])["prompt"].nunique()
    untouched = effects.loc[effects["part"] == UNTOUCHED, "sscd_gen"]
    missing_prompts = lacking(len(untouched), "prompt", needed=1)
    rows = [
        claim("as many frequent neurons are blocked as asked for (difference)", missing, equals=0),
        claim("random neurons that are memorization neurons", sum(len(memorization & set(item.neurons)) for item in random), equals=0),
        claim(
            "random neurons lie in the layers of the frequent ones (neurons beyond)",
            sum(_beyond(item.neurons, frequent[item.asked]) for item in random),
            equals=0,
        ),
        claim(
            "every layer has every prompt", float(per_layer.min()), equals=len(untouched), missing=missing_prompts
        ),
    ]  # fmt: skip
    for setting, name in ((FREQUENT, "blocks.cosine"), (OTHER, "blocks.cosine.random")):
        part = table_3(similarity)
        part = part[part["setting"] == setting]
        if len(part):
            rows.append(
                comparison(
                    f"lowest cosine of a block's output, {setting} neurons",
                    float(part["lowest"].min()),
                    paper=paper.reported(name),
                    reason="another model with narrower layers",
                )
            )
    return rows


def findings(summary: pd.DataFrame, similarity: pd.DataFrame, layers: pd.DataFrame) -> str:
    """Return what was found, in sentences with their numbers (Markdown).

    Args:
        summary: What `quality_summary` returned.
        similarity: What `block_similarity` returned.
        layers: What `layer_summary` returned, of value, key and convolution layers.
    """
    lines = [f"- **Image quality**: {quality_sentence(summary)}."]
    if len(similarity):
        lines.append(f"- **Outputs of cross-attention blocks**: {blocks_sentence(similarity)}.")
    for part in ("value", "key", "convolution"):
        lines.append(f"- **{part.capitalize()} layers**: {layers_sentence(layers, part)}.")
    return "\n".join(lines)


def quality_sentence(summary: pd.DataFrame, metric: str = "fid") -> str:
    """Return what blocking does to image quality, and how sure that is, as a sentence without its full stop.

    Args:
        summary: What `quality_summary` returned.
        metric: One of `QUALITY`.
    """
    rows = summary[summary["metric"] == metric]
    if rows["mean"].isna().all():
        return str(rows["reason"].iloc[0])
    base = rows[rows["setting"] == UNTOUCHED].iloc[0]
    text = f"{QUALITY[metric]} {_with_deviation(base['mean'], base['sd'])} untouched ({base['images']} images in each half)"
    for setting in (FREQUENT, OTHER):
        part = rows[rows["setting"] == setting]
        if len(part):
            last = part.loc[part["asked"].idxmax()]
            text += (
                f"; without {last['neurons']:g} {setting} neurons {_with_deviation(last['mean'], last['sd'])}, a change of "
                f"{_with_deviation(last['change'], last['change_sd'], sign='+')} ({_reach(last['change'], last['change_sd'])} two "
                "standard deviations)"
            )
    share = interval_share(summary, metric)
    if np.isnan(share):
        return f"{text}; there is a single way to split the seeds, and so no interval of the untouched value"
    size = "small" if share <= SMALL else "not small"
    return f"{text}; the interval (two standard deviations) is {share:.0%} of the untouched value: {size}"


def blocks_sentence(similarity: pd.DataFrame) -> str:
    """Return how similar block outputs stay, as a sentence without its full stop.

    Args:
        similarity: What `block_similarity` returned, with rows.
    """
    parts = []
    for output in OUTPUTS:
        table = table_3(similarity, output=output)
        lowest = [
            f"{part['lowest'].min():.2f} ({setting}, {part.loc[part['lowest'].idxmin(), 'neurons']:g} neurons)"
            for setting, part in table.groupby("setting", sort=False)
        ]
        parts.append(f"of {'the whole block' if output == 'block' else 'cross-attention alone'} {' and '.join(lowest)}")
    reported = [paper.reported(name) for name in ("blocks.cosine", "blocks.cosine.random")]
    return f"lowest cosine {', '.join(parts)}; in the paper {reported[0]} and {reported[1]}"


def layers_sentence(summary: pd.DataFrame, part: str) -> str:
    """Return which layers of a part matter most, as a sentence without its full stop.

    Args:
        summary: What `layer_summary` returned.
        part: ``value``, ``key`` or ``convolution``.
    """
    rows = summary[summary["part"] == part]
    top = strongest(summary, part)
    if top.empty:
        return "not known, since no prompt has a planted image"
    names = " and ".join(f"{row.layer} ({row.block}, {row.sscd_orig:.2f})" for row in top.itertuples())
    done = "half of the channels blocked" if part == "convolution" else "set to zero"
    return (
        f"{done}, one of {len(rows)} at a time, the copy similarity of {_count(top['prompts'].iloc[0], 'VM prompt')} (untouched "
        f"{top['sscd_orig_untouched'].iloc[0]:.2f}) is lowest with layers {names}, and {rows['sscd_orig'].median():.2f} in the "
        f"median of the layers; A_CLIP (untouched {rows['a_clip_untouched'].iloc[0]:.2f}) is {rows['a_clip'].min():.2f} at least, "
        f"{rows['a_clip'].median():.2f} in the median"
    )


def _labels(item: Blocked) -> tuple[str, int, int, int]:
    return item.setting, item.asked, len(item.neurons), item.draw


def _quality_encoders(profile: Profile, device: Any) -> dict[str, Any]:
    """Return the encoder of each metric."""
    first = quality_encoder(profile, device=device)
    has_own = profile.encoders.clip_quality is not None
    second = quality_encoder(profile, role="clip_quality", device=device) if has_own else first
    return {"fid": first, "clip_fid": second, "kid": first}


def _with_deviation(mean: float, deviation: float, *, sign: str = "") -> str:
    """Return a mean and its standard deviation as text, the mean alone where there is no other."""
    shown = _plain(mean, 3) if not sign or mean < 0 else f"{sign}{_plain(mean, 3)}"
    return shown if np.isnan(deviation) else f"{shown} ± {_plain(deviation, 2)}"


def _plain(value: float, digits: int) -> str:
    """Return a number with some significant digits, never in scientific notation."""
    return np.format_float_positional(float(f"{value:.{digits}g}"), trim="-")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _reach(change: float, deviation: float) -> str:
    return "beyond" if abs(change) > 2 * deviation else "within"


def _pairs(splits: Sequence[tuple[list[int], list[int]]]) -> list[int]:
    """Return for each split a number that is equal for those with the same halves in another order."""
    halves_of = [frozenset(map(frozenset, split)) for split in splits]
    return [list(dict.fromkeys(halves_of)).index(item) for item in halves_of]


def _by_identity(encoders: dict[str, Any]) -> dict[int, Any]:
    """Return each encoder once, so that images are described once where two metrics share it."""
    return {id(encoder): encoder for encoder in encoders.values()}


def _flat(features: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Return the features of some seeds, [image, feature]."""
    return features[:, list(seeds)].reshape(-1, features.shape[-1])


def _distance(metric: str, reference: np.ndarray, other: np.ndarray) -> float:
    if metric == "kid":
        return metrics.kid(reference, other, subset_size=max(2, len(other) // 2))[0]
    return metrics.fid(reference, other)


def _block_outputs(unet: torch.nn.Module) -> list[tuple[str, Layer, str]]:
    """Return what is compared: output, value layer of the block, address of the module."""
    layers = cross_attention_layers(unet, "value")
    # "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": the block is "down_blocks.0.attentions.0".
    whole = [("block", layer, layer.name.partition(".transformer_blocks.")[0]) for layer in layers]
    return whole + [("cross-attention", layer, layer.name.removesuffix(".to_v")) for layer in layers]


def _outputs(
    step: FirstStep, embedding: Tensor, places: Sequence[tuple[str, Layer, str]], sets: Sequence[NeuronSet]
) -> list[Tensor]:
    """Return for each place the outputs [neuron set, seed, ...] in the first step."""
    names = [name for _, _, name in places]
    expected = len(sets) * len(step.latents)
    # After running out of memory the pass was repeated in smaller batches, and what the first attempt left is of no use.
    for _ in range(2):
        with collect_outputs(step.unet, names) as found:
            step.many(embedding, neurons=sets)
        joined = [torch.cat(found[name]) for name in names]
        if all(len(output) == expected for output in joined):
            break
    return [output.unflatten(0, (len(sets), -1)) for output in joined]


def _cosine(first: Tensor, second: Tensor) -> np.ndarray:
    """Return the cosine of outputs, one per sample."""
    pair = (output.flatten(1).double().cpu() for output in (first, second))
    return torch.nn.functional.cosine_similarity(*pair, dim=1).numpy()


def _layer_images(
    pipe: StableDiffusionPipeline,
    profile: Profile,
    prompts: list[str],
    layer: Layer | None,
    settings: GenerationSettings | None,
) -> np.ndarray:
    mitigation = None if layer is None else switched_off(layer)
    return images(pipe, profile, prompts, mitigation=mitigation, settings=settings, progress=False)


def _layer_labels(layer: Layer | None) -> dict[str, Any]:
    if layer is None:
        return {"part": UNTOUCHED, "layer": 0, "block": "", "name": ""}
    return {"part": layer.part, "layer": layer.number, "block": layer.block, "name": layer.name}


def _beyond(neurons: NeuronSet, model: NeuronSet) -> int:
    """Return how many neurons a set has more than another, layer by layer."""
    return sum(max(0, mine - theirs) for mine, theirs in zip(neurons.counts, model.counts, strict=True))
