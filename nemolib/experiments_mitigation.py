"""Notebook 04 in functions: every mitigation of Table 1 on the same seeds, and deactivation for unmemorized prompts.

Images are kept in ``build/<profile>/store``; see `nemolib.experiments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import product
from operator import or_
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nemolib import metrics, paper
from nemolib.batching import progress_bar
from nemolib.checks import Row, claim
from nemolib.encoders import alignment_encoder, copy_encoder, quality_encoder
from nemolib.experiments import image_features, images, planted_features, planted_images
from nemolib.experiments_localization import neuron_sets
from nemolib.mitigation import (
    AttentionScaling,
    DeactivatedNeurons,
    EmbeddingAdjustment,
    Mitigation,
    RandomTokens,
    random_neurons,
)
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.profiles import Profile, load_profile
from nemolib.prompts import MEMORIZED, select
from nemolib.settings import GenerationSettings
from nemolib.tables import Grid
from nemolib.value_layers import value_activations, widths

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

NONE, NEMO, RANDOM, INITIAL = "all neurons active", "NeMo", "random neurons", "NeMo, initial selection"
"""Settings that have a part in claims; the paper's Table 1 calls the first three so."""

OFF = "memorization neurons off"
"""What `quality_table` calls images without the neurons of all memorized prompts; with them it is `NONE`."""

BASELINES = (
    "prompt embedding adjustment (Wen)",
    "attention scaling (Ren)",
    "4 random tokens (Somepalli)",
    "10 random tokens (Somepalli)",
)
"""Mitigations by others that work in the paper's Table 1; one random token does not."""

NAMES = {"neurons": "neurons", "sscd_orig": "SSCD_Orig", "sscd_gen": "SSCD_Gen", "d_sscd": "D_SSCD", "a_clip": "A_CLIP"}
"""What tables call the columns of Table 1."""

METRICS = ("sscd_orig", "sscd_gen", "d_sscd", "a_clip")
"""Metrics of Table 1."""

SINGLE_FIGURES = ("figure_10", "figure_11", "figure_12")
"""Grids of the neurons that most prompts share, as the paper numbers them."""

NO_IMAGES = Grid(np.zeros((0, 0, 1, 1, 3), dtype=np.uint8), (), ())
"""A grid of a figure that a profile has nothing for."""


def mitigations(
    pipe: StableDiffusionPipeline, profile: Profile | str, found: pd.DataFrame, *, progress: bool = True
) -> dict[str, list[Mitigation | None]]:
    """Return the settings of Table 1, in the paper's order, ours last.

    Source: Sec. 4, Table 1.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        found: Localizations (`nemolib.experiments_localization.localizations`).
        progress: Whether to show a progress bar.

    Returns:
        For each setting one mitigation per repeat; None is the untouched model.
    """
    profile = load_profile(profile)
    found = found[found["kind"].isin(MEMORIZED)]
    chosen = profile.mitigation
    sets, first = _sets_by_prompt(found), _sets_by_prompt(found, "initial")
    draws = [
        {
            prompt: random_neurons(neurons, widths(pipe.unet), seed=chosen.random.seed, repeat=repeat)
            for prompt, neurons in sets.items()
        }
        for repeat in range(chosen.random.repeats)
    ]
    tokens = [RandomTokens(number, chosen.somepalli.seed) for number in chosen.somepalli.numbers]
    return {
        NONE: [None],
        "prompt embedding adjustment (Wen)": [adjustment(pipe, profile, progress=progress)],
        RANDOM: [DeactivatedNeurons(draw) for draw in draws],
        "attention scaling (Ren)": [AttentionScaling(chosen.ren)],
        **{f"{item.name} (Somepalli)": [item] for item in tokens},
        NEMO: [DeactivatedNeurons(sets)],
        INITIAL: [DeactivatedNeurons(first)],
    }


def adjustment(pipe: StableDiffusionPipeline, profile: Profile | str, *, progress: bool = True) -> EmbeddingAdjustment:
    """Return the profile's prompt embedding adjustment; where it has no target, by rule from the threshold prompts.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        progress: Whether to show a progress bar.
    """
    profile = load_profile(profile)
    settings = profile.mitigation.wen
    if settings.target is not None:
        return EmbeddingAdjustment(settings)
    captions = select(profile, "threshold")["caption"].tolist()
    return EmbeddingAdjustment.by_rule(pipe, captions, settings=settings, progress=progress)


def measured(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    found: pd.DataFrame,
    settings: Mapping[str, Sequence[Mitigation | None]],
    *,
    generation: GenerationSettings | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Return the metrics of Table 1 for each memorized prompt, every setting on the same seeds.

    Source: Sec. 4 (metrics).

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        found: Localizations.
        settings: Mitigations by name, one per repeat (`mitigations`).
        generation: Seeds, steps and guidance of the images; None means those of the profile.
        progress: Whether to show a progress bar.

    Returns:
        One row per setting, repeat and prompt: columns setting, repeat, kind, prompt, neurons (number deactivated),
        sscd_orig (similarity to the planted image, median over seeds), sscd_orig_max (largest of the seeds; both missing
        without a planted image), sscd_gen (similarity to the same seed's image of the untouched model, median over
        seeds), d_sscd (similarity of two images of the prompt, median over pairs; missing for one seed) and a_clip
        (similarity of image and prompt, median over seeds).
    """
    profile = load_profile(profile)
    rows = found[found["kind"].isin(MEMORIZED)].reset_index(drop=True)
    prompts = rows["prompt"].tolist()
    copy, clip = copy_encoder(profile, device=pipe.device), alignment_encoder(profile, device=pipe.device)
    originals, texts = planted_features(copy, profile, _planted_rows(profile, prompts)), clip.texts.describe(prompts)
    untouched = image_features(copy, profile, images(pipe, profile, prompts, settings=generation, progress=False))
    parts = []
    with progress_bar(sum(map(len, settings.values())), "settings", unit="setting", enabled=progress) as bar:
        for name, repeat, mitigation in [(n, r, m) for n, repeats in settings.items() for r, m in enumerate(repeats)]:
            bar.set_postfix_str(name)
            made = images(pipe, profile, prompts, mitigation=mitigation, settings=generation, progress=False)
            features = image_features(copy, profile, made)
            original = metrics.sscd_orig(features, originals)
            columns = {
                "neurons": [_count(mitigation, prompt) for prompt in prompts],
                "sscd_orig": metrics.over_seeds(original),
                "sscd_orig_max": metrics.over_seeds(original, "max"),
                "sscd_gen": metrics.over_seeds(metrics.sscd_gen(features, untouched)),
                "d_sscd": metrics.over_seeds(metrics.d_sscd(features)),
                "a_clip": metrics.over_seeds(metrics.a_clip(image_features(clip.images, profile, made), texts)),
            }
            parts.append(rows[["kind", "prompt"]].assign(setting=name, repeat=repeat, **columns))
            bar.update()
    return pd.concat(parts, ignore_index=True)[
        ["setting", "repeat", "kind", "prompt", "neurons", "sscd_orig", "sscd_orig_max", *METRICS[1:]]
    ]


def table_1(values: pd.DataFrame, *, reported: pd.DataFrame | None = None, resamples: int = 2000) -> pd.DataFrame:
    """Return Table 1: median, median absolute deviation and interval over prompts, with the paper's medians beside.

    Where a setting was repeated, a prompt counts with its mean over the repeats. A prompt without a value is left out,
    and what no prompt has is missing.

    Args:
        values: What `measured` returned.
        reported: The paper's numbers, columns as of `nemolib.paper.table_1`; None means those of its Table 1.
        resamples: Resamples of the bootstrap interval.

    Returns:
        One row per setting and kind: columns setting, kind, prompts, memorized (share of the prompts whose largest
        SSCD_orig over seeds is above 0.7), then for neurons and each metric of `METRICS` the columns ``<name>`` (median),
        ``<name>_mad``, ``<name>_low`` and ``<name>_high`` (95 % bootstrap interval of the median), ``<name>_paper`` and
        ``<name>_paper_mad`` (missing where the paper has no such row).
    """
    names, group = ("neurons", *METRICS), ["setting", "kind"]
    means = values.groupby([*group, "prompt"], sort=False)[[*names, "sscd_orig_max"]].mean().reset_index()
    cells = metrics.summary_table(means, names, by=group, resamples=resamples).set_index([*group, "quantity"])
    reported = (paper.table_1() if reported is None else reported).set_index(group)
    parts, rows = dict(list(means.groupby(group))), []
    for key in [key for key in product(dict.fromkeys(values["setting"]), MEMORIZED) if key in parts]:
        part = parts[key]
        largest = part["sscd_orig_max"].dropna()
        rate = np.nan if largest.empty else metrics.memorization_rate(largest)
        row = dict(zip(group, key, strict=True)) | {"prompts": len(part), "memorized": rate}
        for name in names:
            cell = cells.loc[(*key, name)]
            row |= {name: cell["median"]} | {f"{name}_{suffix}": cell[suffix] for suffix in ("mad", "low", "high")}
            for suffix in ("", "_mad"):
                row[f"{name}_paper{suffix}"] = reported[f"{name}{suffix}"].get(key, np.nan)
        rows.append(row)
    return pd.DataFrame(rows)


def planted(profile: Profile | str, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return the planted image of each memorized prompt.

    Args:
        profile: A profile or its name.
        prompts: Memorized prompts that have an image.
        size: Height and width to which each is brought; None: as they are, so that all must have one size.

    Returns:
        Images [prompt, height, width, 3], uint8.
    """
    return planted_images(profile, _planted_rows(profile, prompts), size=size)


def all_neurons(found: pd.DataFrame) -> NeuronSet:
    """Return the memorization neurons of all memorized prompts together.

    Args:
        found: Localizations.
    """
    return reduce(or_, neuron_sets(found[found["kind"].isin(MEMORIZED)]))


def in_turn(found: pd.DataFrame, number: int) -> list[NeuronSet]:
    """Return the neuron sets of memorized prompts that have neurons, one after the other, and again from the first.

    Args:
        found: Localizations.
        number: How many sets.

    Raises:
        ValueError: No memorized prompt has neurons.
    """
    sets = [neurons for neurons in neuron_sets(found[found["kind"].isin(MEMORIZED)]) if len(neurons)]
    if not sets:
        raise ValueError("no memorized prompt has neurons, so there is nothing to deactivate")
    return [sets[place % len(sets)] for place in range(number)]


def unmemorized_table(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    prompts: Sequence[str],
    found: pd.DataFrame,
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Return what deactivating memorization neurons does to prompts that are not memorized.

    Each prompt is seen with all neurons active (``before``), without the neurons of *one* memorized prompt (``one``; the
    memorized prompts take turns), and without those of *all* memorized prompts together (``all``).

    Source: Sec. 4, Fig. 5a (there image quality against the number of neurons).

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        prompts: Unmemorized prompts.
        found: Localizations.
        progress: Whether to show progress bars.

    Returns:
        One row per prompt: columns prompt, and with each of ``_before``, ``_one`` and ``_all``: neurons (number
        deactivated), a_clip, d_sscd and sscd_gen (similarity to the same seed's image with all neurons active), medians
        over seeds.

    Raises:
        ValueError: No memorized prompt has neurons.
    """
    profile, prompts = load_profile(profile), list(prompts)
    none = NeuronSet.empty(len(widths(pipe.unet)))
    sets = {
        "before": [none] * len(prompts),
        "one": in_turn(found, len(prompts)),
        "all": [all_neurons(found)] * len(prompts),
    }
    copy, clip = copy_encoder(profile, device=pipe.device), alignment_encoder(profile, device=pipe.device)
    texts = clip.texts.describe(prompts)
    columns, untouched = {}, None
    for name, chosen in sets.items():
        made = images(pipe, profile, prompts, neurons=chosen, progress=progress)
        features = image_features(copy, profile, made)
        untouched = features if untouched is None else untouched
        columns[f"neurons_{name}"] = [len(neurons) for neurons in chosen]
        columns[f"a_clip_{name}"] = metrics.over_seeds(
            metrics.a_clip(image_features(clip.images, profile, made), texts)
        )
        columns[f"d_sscd_{name}"] = metrics.over_seeds(metrics.d_sscd(features))
        columns[f"sscd_gen_{name}"] = metrics.over_seeds(metrics.sscd_gen(features, untouched))
    return pd.DataFrame({"prompt": prompts, **columns})


def text_carried(pipe: StableDiffusionPipeline, prompts: Sequence[str], neurons: NeuronSet) -> pd.DataFrame:
    """Return how much of what prompts say goes through a neuron set, layer by layer.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: Prompts, such as unmemorized ones.
        neurons: The set, such as `all_neurons`.

    Returns:
        One row per value layer: columns layer (from 1), width (neurons of the layer), neurons (those of the set), busiest
        (how many neurons, the most active first, make up 95 % of the layer's activation), share (of the activation that
        goes through the set). Activation: mean over tokens of the absolute value, summed over prompts.
    """
    rows = []
    for layer, activations in enumerate(value_activations(pipe.unet, embed(pipe, list(prompts)))):
        summed = activations.double().sum(dim=0).cpu().numpy()
        chosen = list(neurons.layers[layer])
        sums = np.sort(summed)[::-1].cumsum() / summed.sum()
        busiest = int(np.searchsorted(sums, 0.95) + 1)
        rows.append((layer + 1, len(summed), len(chosen), busiest, float(summed[chosen].sum() / summed.sum())))
    return pd.DataFrame(rows, columns=["layer", "width", "neurons", "busiest", "share"])


def quality_table(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    prompts: Sequence[str],
    neurons: NeuronSet,
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Return how far images of unmemorized prompts are, as a set, from those of the untouched model.

    The reference is the first half of the seeds with all neurons active. What is compared with it is the other half of
    the seeds, with all neurons active (how far two halves are anyway) and with deactivated ones: equally many images,
    and no latents in common.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        prompts: Unmemorized prompts.
        neurons: One set for all prompts.
        progress: Whether to show progress bars.

    Returns:
        Columns images (`NONE`, `OFF`), number (of images), encoder, fid, kid and kid_sd (standard deviation over subsets
        of half the images). No rows if the images of a half are fewer than two: there is nothing to compare.
    """
    profile, prompts = load_profile(profile), list(prompts)
    encoder = quality_encoder(profile, device=pipe.device)
    half = profile.generation.samples // 2
    columns = ["images", "number", "encoder", "fid", "kid", "kid_sd"]
    if half * len(prompts) < 2:
        return pd.DataFrame(columns=columns)
    before = image_features(encoder, profile, images(pipe, profile, prompts, progress=progress))
    after = image_features(encoder, profile, images(pipe, profile, prompts, neurons=neurons, progress=progress))
    reference = before[:, :half].reshape(-1, before.shape[-1])
    rows = []
    for name, features in ((NONE, before), (OFF, after)):
        other = features[:, half : 2 * half].reshape(-1, features.shape[-1])
        mean, deviation = metrics.kid(reference, other, subset_size=max(2, len(other) // 2))
        rows.append((name, len(other), encoder.name, metrics.fid(reference, other), mean, deviation))
    return pd.DataFrame(rows, columns=columns)


def shared_neuron(found: pd.DataFrame, shared: pd.DataFrame, place: int) -> tuple[NeuronSet, list[str]]:
    """Return a neuron that several prompts share, and their captions.

    Args:
        found: Localizations.
        shared: What `nemolib.experiments_localization.shared_neurons` returned.
        place: Row of that table; 0 is the neuron of most prompts.
    """
    memorized = found[found["kind"].isin(MEMORIZED)]
    sets, row = neuron_sets(memorized), shared.iloc[place]
    pair = (int(row["layer"]) - 1, int(row["neuron"]))
    # Not the column captions: there a semicolon separates captions, and a caption may have one.
    prompts = [prompt for prompt, neurons in zip(memorized["prompt"], sets, strict=True) if pair in neurons]
    return NeuronSet.of([pair], layers=len(sets[0].layers)), prompts


def one_of_each(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    prompts: Sequence[str],
    settings: Mapping[str, Sequence[Mitigation | None]],
    *,
    seed: int = 0,
    progress: bool = True,
) -> tuple[np.ndarray, list[str]]:
    """Return the planted image of each prompt and one generated image for each setting, all of the same seed.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        prompts: Memorized prompts.
        settings: Mitigations by name; of repeats the first is shown.
        seed: Which of the profile's seeds.
        progress: Whether to show progress bars.

    Returns:
        Images [prompt, column, height, width, 3], uint8, and the names of the columns.
    """
    made = [
        images(pipe, profile, prompts, mitigation=repeats[0], progress=progress)[:, seed]
        for repeats in settings.values()
    ]
    return np.stack([planted(profile, prompts, size=made[0].shape[1:3]), *made], axis=1), ["planted", *settings]


def shown_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return Table 1 as it is shown: median ± median absolute deviation, ours and the paper's.

    Args:
        table: What `table_1` returned.

    Returns:
        Columns setting, prompts (VM or TM), copies (share of prompts with a copy among their images), then for neurons and
        each metric ours and the paper's as text; empty where the paper has no such row.
    """
    columns = {
        "setting": table["setting"],
        "prompts": table["kind"].str.upper(),
        "copies": ["" if np.isnan(share) else f"{share:.0%}" for share in table["memorized"]],
    }
    for name in ("neurons", *METRICS):
        digits = 1 if name == "neurons" else 2
        for suffix, label in (("", NAMES[name]), ("_paper", f"{NAMES[name]} (paper)")):
            pairs = zip(table[f"{name}{suffix}"], table[f"{name}{suffix}_mad"], strict=True)
            columns[label] = ["" if np.isnan(mid) else f"{mid:.{digits}f} ± {mad:.{digits}f}" for mid, mad in pairs]
    return pd.DataFrame(columns)


def single_neuron_grid(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    neuron: NeuronSet,
    prompts: Sequence[str],
    *,
    progress: bool = False,
) -> Grid:
    """Return images of prompts with all neurons active, and beside them without one neuron that they share.

    Source: Fig. 10 to 12.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        neuron: The neuron.
        prompts: Captions.
        progress: Whether to show progress bars.

    Returns:
        Rows are prompts, columns the seeds with all neurons active, then the same seeds without the neuron.
    """
    halves = [images(pipe, profile, prompts, neurons=chosen, progress=progress) for chosen in (None, neuron)]
    seeds = [f"seed {number}" for number in range(halves[0].shape[1])]
    return Grid(np.concatenate(halves, axis=1), tuple(prompts), tuple(2 * seeds))


def shared_neuron_grids(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    found: pd.DataFrame,
    shared: pd.DataFrame,
    *,
    most: int = 6,
    progress: bool = False,
) -> dict[str, Grid]:
    """Return the grids of Fig. 10 to 12: the neurons that most prompts share, each switched off alone.

    Source: Fig. 10 to 12.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        found: Localizations.
        shared: What `nemolib.experiments_localization.shared_neurons` returned.
        most: How many prompts of each neuron.
        progress: Whether to show progress bars.

    Returns:
        For each name of `SINGLE_FIGURES` a grid of `single_neuron_grid`; `NO_IMAGES` where fewer neurons are shared.
    """
    grids = dict.fromkeys(SINGLE_FIGURES, NO_IMAGES)
    for place, name in enumerate(SINGLE_FIGURES[: len(shared)]):
        neuron, prompts = shared_neuron(found, shared, place)
        grids[name] = single_neuron_grid(pipe, profile, neuron, prompts[:most], progress=progress)
    return grids


def single_neuron_table(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    found: pd.DataFrame,
    shared: pd.DataFrame,
    *,
    most: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Return what switching off one shared neuron alone does to each prompt that has it.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        found: Localizations.
        shared: Rows of `nemolib.experiments_localization.shared_neurons`.
        most: How many prompts of each neuron; None means all.
        progress: Whether to show progress bars.

    Returns:
        One row per neuron and prompt: columns layer (from 1), neuron, prompt, and copy_before, copy_single (without this
        neuron), copy_all (without all neurons of the prompt): similarity to the planted image, median over seeds. No
        rows if no neuron is shared.
    """
    encoder = copy_encoder(profile, device=pipe.device)
    own = _sets_by_prompt(found)
    names = ["layer", "neuron", "prompt", "copy_before", "copy_single", "copy_all"]
    parts = [] if len(shared) else [pd.DataFrame(columns=names)]
    for place in range(len(shared)):
        neuron, prompts = shared_neuron(found, shared, place)
        prompts = prompts[:most]
        originals = planted_features(encoder, profile, _planted_rows(profile, prompts))
        columns = {}
        chosen_sets = {"copy_before": None, "copy_single": neuron, "copy_all": [own[prompt] for prompt in prompts]}
        for name, chosen in chosen_sets.items():
            made = image_features(encoder, profile, images(pipe, profile, prompts, neurons=chosen, progress=progress))
            columns[name] = metrics.over_seeds(metrics.sscd_orig(made, originals))
        row = shared.iloc[place]
        parts.append(pd.DataFrame({"layer": row["layer"], "neuron": row["neuron"], "prompt": prompts, **columns}))
    return pd.concat(parts, ignore_index=True)


def staying_grid(
    pipe: StableDiffusionPipeline,
    profile: Profile | str,
    found: pd.DataFrame,
    prompts: Sequence[str],
    *,
    progress: bool = False,
) -> Grid:
    """Return the planted image of prompts, and their images with the neurons of the prompt deactivated.

    Source: Fig. 9.

    Args:
        pipe: The pipeline of the profile.
        profile: A profile or its name.
        found: Localizations.
        prompts: Memorized prompts; without any the grid is `NO_IMAGES`.
        progress: Whether to show progress bars.
    """
    if not len(prompts):
        return NO_IMAGES
    own = _sets_by_prompt(found)
    made = images(pipe, profile, prompts, neurons=[own[prompt] for prompt in prompts], progress=progress)
    columns = ["planted", *(f"seed {number}" for number in range(made.shape[1]))]
    originals = planted(profile, prompts, size=made.shape[2:4])[:, None]
    return Grid(np.concatenate([originals, made], axis=1), tuple(prompts), tuple(columns))


def paper_claims(table: pd.DataFrame) -> pd.DataFrame:
    """Return what the paper's Table 1 says about VM prompts, and whether ours says the same.

    Each rule was fixed from the paper's table, in which it holds. A claim that does not hold here is no error: it is a
    result about another model.

    Args:
        table: What `table_1` returned.

    Returns:
        Columns claim, rule, paper and ours (the numbers that the rule compares), verdict (``holds``, ``does not hold``,
        or ``not known`` where a number is missing, such as the similarity of two images if there is one per prompt).

    Raises:
        KeyError: A setting that a rule compares is not in the table, such as one random token.
    """
    rows = []
    for text, rule, numbers, holds in _CLAIMS:
        ours, theirs = (_vm(table, suffix) for suffix in ("", "_paper"))
        found = numbers(ours)
        verdict = "not known" if np.isnan(found).any() else "holds" if holds(*found) else "does not hold"
        rows.append((text, rule, _shown(numbers(theirs)), _shown(found), verdict))
    return pd.DataFrame(rows, columns=["claim", "rule", "paper", "ours", "verdict"])


def checks_of(
    values: pd.DataFrame, settings: Mapping[str, Sequence[Mitigation | None]], found: pd.DataFrame
) -> list[Row]:
    """Return what must hold for any model if the comparison is a fair one.

    Args:
        values: What `measured` returned.
        settings: Mitigations by name.
        found: Localizations.
    """
    by_setting = values.groupby("setting")
    sets = settings[NEMO][0].neurons
    common = sum(len(draw.neurons[prompt] & sets[prompt]) for draw in settings[RANDOM] for prompt in sets)
    sizes = by_setting["neurons"].sum() / by_setting["repeat"].nunique()
    prompts = int(found["kind"].isin(MEMORIZED).sum())
    return [
        claim("every setting has every memorized prompt", int(by_setting["prompt"].nunique().min()), equals=prompts),
        claim("random neurons are as many as the found ones", float(sizes[RANDOM] - sizes[NEMO]), equals=0),
        claim("no random neuron is a found one", common, equals=0),
        claim(
            "a refined set is no larger than its initial selection",
            float(sizes[INITIAL] - sizes[NEMO]),
            at_least=0,
        ),
    ]


def findings(table: pd.DataFrame, unmemorized: pd.DataFrame, quality: pd.DataFrame) -> str:
    """Return what was found, in sentences with their numbers (Markdown).

    Args:
        table: What `table_1` returned.
        unmemorized: What `unmemorized_table` returned.
        quality: What `quality_table` returned.
    """
    rows = table.set_index(["kind", "setting"])
    lines = []
    for kind in dict.fromkeys(table["kind"]):
        part = rows.loc[kind]
        best = part.drop(index=[NONE, RANDOM, NEMO, INITIAL])["sscd_orig"].dropna()
        others = "" if best.empty else f"; of the other mitigations {best.idxmin()} reaches {best.min():.2f}"
        lines.append(
            f"- **{kind.upper()}**: the copy similarity goes from {_known(part.loc[NONE, 'sscd_orig'])} to "
            f"{_known(part.loc[NEMO, 'sscd_orig'])} with {part.loc[NEMO, 'neurons']:g} deactivated neurons, to "
            f"{_known(part.loc[INITIAL, 'sscd_orig'])} with the {part.loc[INITIAL, 'neurons']:g} of the initial selection, to "
            f"{_known(part.loc[RANDOM, 'sscd_orig'])} with random ones{others}. Share of prompts with a copy: "
            f"{_known(part.loc[NONE, 'memorized'], '.0%')} before, {_known(part.loc[NEMO, 'memorized'], '.0%')} after."
        )
        lines.append(
            f"- **{kind.upper()}, diversity and alignment**: D_SSCD goes from {_known(part.loc[NONE, 'd_sscd'])} to "
            f"{_known(part.loc[NEMO, 'd_sscd'])} (paper: {part.loc[NONE, 'd_sscd_paper']:g} to {part.loc[NEMO, 'd_sscd_paper']:g}), "
            f"A_CLIP from {part.loc[NONE, 'a_clip']:.2f} to {part.loc[NEMO, 'a_clip']:.2f} (paper: "
            f"{part.loc[NONE, 'a_clip_paper']:g} to {part.loc[NEMO, 'a_clip_paper']:g})."
        )
    medians = unmemorized.median(numeric_only=True)
    apart = "" if quality.empty else (
        ", and the KID to other images of the untouched model from {:.2f} to {:.2f}".format(
            *quality.set_index("images")["kid"].loc[[NONE, OFF]]
        )
    )  # fmt: skip
    lines += [
        f"- **Unmemorized prompts** without the neurons of one memorized prompt ({medians['neurons_one']:g} neurons): A_CLIP "
        f"{medians['a_clip_before']:.2f} to {medians['a_clip_one']:.2f}; without those of all memorized prompts together "
        f"({medians['neurons_all']:g}): to {medians['a_clip_all']:.2f}{apart}. D_SSCD: {_known(medians['d_sscd_before'])}, "
        f"{_known(medians['d_sscd_one'])}, {_known(medians['d_sscd_all'])}. (Medians.)"
    ]
    return "\n".join(lines)


def _known(value: float, form: str = ".2f") -> str:
    """Return a number as text, or that it is not known: no training image, or one image per prompt."""
    return "(not known)" if np.isnan(value) else format(value, form)


def _count(mitigation: Mitigation | None, prompt: str) -> int:
    """Return how many neurons a mitigation deactivates for a prompt."""
    return len(mitigation.neurons_of(prompt)) if isinstance(mitigation, DeactivatedNeurons) else 0


def _sets_by_prompt(found: pd.DataFrame, column: str = "neurons") -> dict[str, NeuronSet]:
    """Return the neuron set of each prompt of a table of localizations."""
    return dict(zip(found["prompt"], neuron_sets(found, column), strict=True))


def _planted_rows(profile: Profile | str, prompts: Sequence[str]) -> pd.DataFrame:
    """Return the rows of memorized prompts in the prompt table."""
    return select(profile, "memorized").set_index("caption").loc[list(prompts)].reset_index()


def _vm(table: pd.DataFrame, suffix: str) -> pd.DataFrame:
    """Return the metrics of the VM prompts by setting: ours, or with suffix ``_paper`` the paper's."""
    rows = table[table["kind"] == "vm"].set_index("setting")
    names = [*METRICS, *(f"{name}_mad" for name in METRICS)]
    columns = [f"{name.removesuffix('_mad')}{suffix}{'_mad' if name.endswith('_mad') else ''}" for name in names]
    return rows[columns].set_axis(names, axis=1)


def _shown(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.2f}" for number in numbers)


def _highest_baseline(rows: pd.DataFrame) -> float:
    return float(rows.loc[[name for name in BASELINES if name in rows.index], "sscd_orig"].max())


_CLAIMS = (
    (
        "random neurons change nothing",
        "SSCD_Orig: random neurons lower it by at most a tenth of what NeMo does (untouched, random, NeMo)",
        lambda r: (r.loc[NONE, "sscd_orig"], r.loc[RANDOM, "sscd_orig"], r.loc[NEMO, "sscd_orig"]),
        lambda none, random, nemo: none - random <= 0.1 * (none - nemo),
    ),
    (
        "NeMo removes copies as well as the baselines",
        "SSCD_Orig: NeMo is not above the highest of Wen, Ren, 4 and 10 random tokens (NeMo, that baseline)",
        lambda r: (r.loc[NEMO, "sscd_orig"], _highest_baseline(r)),
        lambda nemo, baseline: nemo <= baseline,
    ),
    (
        "one random token is not enough",
        "SSCD_Orig: more than half stays (untouched, one token)",
        lambda r: (r.loc[NONE, "sscd_orig"], r.loc["1 random token (Somepalli)", "sscd_orig"]),
        lambda none, token: token > none / 2,
    ),
    (
        "images become diverse",
        "D_SSCD: less than half stays (untouched, NeMo)",
        lambda r: (r.loc[NONE, "d_sscd"], r.loc[NEMO, "d_sscd"]),
        lambda none, nemo: nemo < none / 2,
    ),
    (
        "the alignment with the prompt stays",
        "A_CLIP: falls by no more than the median absolute deviation over prompts (untouched, its MAD, NeMo)",
        lambda r: (r.loc[NONE, "a_clip"], r.loc[NONE, "a_clip_mad"], r.loc[NEMO, "a_clip"]),
        lambda none, mad, nemo: none - nemo <= mad,
    ),
)
"""Claim, rule in words, the numbers that it compares, and the rule."""
