"""Notebook 05, sections 5 to 7: what else suffers when neurons or whole layers are switched off.

Image quality against the number of blocked neurons (Fig. 5a, 8), the outputs of cross-attention blocks (Table 3), and key,
value and convolution layers one by one (Fig. 16 to 20).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from nemolib import paper, plots
from nemolib.exhibits import Claim, effect, exhibit, must
from nemolib.experiments import deactivate_neurons as deactivate
from nemolib.experiments.deactivate_neurons import UNTOUCHED, Blocked, listed, plus_minus, quality_summary
from nemolib.first_step import compared_places, comparing_outputs
from nemolib.layers import Layer, cross_attention_layers, down_convolutions, spread, widths
from nemolib.localization import memorized, neuron_sets
from nemolib.metrics import MEMORIZED_ABOVE
from nemolib.mitigation import SwitchedOffLayers, switched_off
from nemolib.neurons import NeuronSet
from nemolib.prompts import load_prompts
from nemolib.seeding import stream
from nemolib.settings import GenerationSettings
from nemolib.store import Grid

if TYPE_CHECKING:
    from nemolib.run import Run

NOTEBOOK = "05_ablations"

FREQUENT, OTHER = "most frequent", "random other"
"""What is blocked, besides nothing (`UNTOUCHED`): the memorization neurons of most prompts, or as many neurons that are none."""

SMALL = 0.1
"""Share of the untouched model's FID below which an interval counts as small: the axis of the paper's Fig. 5a spans as much."""

OUTPUTS = ("block", "cross-attention")
"""What is compared: the output of the whole block with its residual connections, and that of cross-attention alone."""

COSINES = {FREQUENT: paper.reported("blocks.cosine"), OTHER: paper.reported("blocks.cosine.random")}
"""The paper's lowest entries of Table 3."""

STRONG = {"value": [1, 7], "key": [4, 6]}
"""Layers that matter most in the paper (App. C.8)."""

KEPT, LOST = 0.5, 0.1
"""Share of the copy similarity above which a prompt counts as still memorized, and of the alignment that counts as a fall."""


# What is blocked


def ranked_neurons(found: pd.DataFrame) -> list[tuple[int, int]]:
    """Return the memorization neurons (layer, neuron) of memorized prompts, those of most prompts first.

    Args:
        found: Localizations.
    """
    counts = Counter(pair for neurons in neuron_sets(memorized(found)) for pair in neurons)
    return sorted(counts, key=lambda pair: (-counts[pair], pair))


def counts_up_to(most: int, points: int) -> list[int]:
    """Return at most so many numbers of neurons up to the largest, evenly spaced on a logarithmic scale; none up to 0.

    Source: Fig. 5a goes from 25 to 750 neurons, so that the largest number is 30 times the smallest.
    """
    return sorted({max(1, round(most / 30 ** (1 - place))) for place in np.linspace(0, 1, points)}) if most else []


def blocked_sets(run: Run, found: pd.DataFrame) -> list[Blocked]:
    """Return the neuron sets of Fig. 5a: nothing, the most frequent memorization neurons, and random others.

    Numbers are four at most, and at most half as many as prompts; the largest of several is that of all memorization
    neurons. Random ones of this number are drawn twice, to see what the draw does.

    Source: Fig. 5a, 8, Table 3.
    Deviates: random neurons are none of any prompt, and lie in the layers of the frequent ones. Where a layer has fewer
        others, all of them are taken, and the set is smaller than asked for.

    Args:
        run: The run.
        found: Localizations.
    """
    pairs, model, random = ranked_neurons(found), widths(run.pipe.unet), run.profile.mitigation.random
    counts = counts_up_to(len(pairs), points=min(4, max(1, len(memorized(found)) // 2)))
    every, none = NeuronSet.of(pairs, layers=len(model)), NeuronSet.empty(len(model))
    frequent = {count: NeuronSet.of(pairs[:count], layers=len(model)) for count in counts}
    sets = [Blocked(UNTOUCHED, 0, 0, none), *(Blocked(FREQUENT, count, 0, item) for count, item in frequent.items())]
    again = [(counts[-1], 1)] if counts and random.repeats > 1 else []
    for count, draw in [*((count, 0) for count in counts), *again]:
        others = other_neurons(frequent[count], every, model, seed=random.seed, draw=draw)
        sets.append(Blocked(OTHER, count, draw, others))
    return sets


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
    """
    drawn = []
    for layer, (chosen, width) in enumerate(zip(neurons.layers, widths, strict=True)):
        others = sorted(set(range(width)) - set(taken.layers[layer]))
        order = stream(seed, "other neurons", draw, layer).permutation(len(others))
        drawn.append(tuple(others[place] for place in order[: len(chosen)]))
    return NeuronSet(tuple(drawn))


# Image quality (Fig. 5a, 8)


def quality_prompts(run: Run) -> list[str]:
    """Return prompts whose images are compared: the profile's own for image quality, else its unmemorized ones.

    Source: Sec. 4 (prompts of COCO).
    """
    file, number = run.profile.prompts.quality, run.profile.extent.quality
    table = run.prompts("unmemorized") if file is None else load_prompts(file, kind="unmemorized")
    return table["caption"].head(number).tolist()


# Outputs of cross-attention blocks (Table 3)


def block_similarity(run: Run, prompts: Sequence[str], sets: Sequence[Blocked]) -> pd.DataFrame:
    """Return how similar the outputs of cross-attention blocks are with blocked neurons and untouched.

    Cosine of the whole output (all positions and channels) of one latent, in the first denoising step, without
    guidance. Deactivated neurons of one block change the input of all later ones.

    Source: Table 3 (500 unmemorized prompts, 3 seeds).
    Deviates: the paper does not say at which step, nor whether residual connections count; here both outputs are given.

    Args:
        run: The run.
        prompts: Unmemorized prompts; without any the table has no rows.
        sets: What is blocked (`blocked_sets`); the untouched model is computed anyway.

    Returns:
        One row per blocked set, output (of `OUTPUTS`) and block: columns setting, asked, neurons, draw, output, layer
        (from 1), block (down, mid or up), samples, cosine (mean over prompts and seeds) and lowest.
    """
    blocked, profile = [item for item in sets if item.setting != UNTOUCHED], run.profile
    columns = ["setting", "asked", "neurons", "draw", "output", "layer", "block", "samples", "cosine", "lowest"]
    if not prompts or not blocked:
        return pd.DataFrame(columns=columns)
    detection = replace(profile.detection, samples=min(3, profile.detection.samples))
    common = {"sets": [item.neurons for item in blocked], "detection": detection, "protocol": profile.protocol}
    found = run.compute(comparing_outputs, list(prompts), label="block outputs", **common)
    rows = []
    # [prompt, set, place, seed] -> [set, place, sample]
    for item, values in zip(blocked, np.concatenate(found, axis=-1), strict=True):
        for (output, layer, _), cosine in zip(compared_places(run.pipe.unet), values, strict=True):
            rows.append((*item.labels, output, layer.number, layer.block, len(cosine), cosine.mean(), cosine.min()))
    return pd.DataFrame(rows, columns=columns)


# Layers one by one (Fig. 16 to 20)


def switched_layers(unet: torch.nn.Module, prompts: int) -> dict[str, tuple[Layer, ...]]:
    """Return the layers that are switched off, by part: for few prompts some of them, evenly spread.

    Args:
        unet: A UNet.
        prompts: Number of prompts; a layer costs as many images.
    """
    parts = {part: cross_attention_layers(unet, part) for part in ("value", "key")}
    parts["convolution"] = down_convolutions(unet)
    return {part: spread(layers, 6 * max(1, prompts)) for part, layers in parts.items()}


def few_images(run: Run) -> GenerationSettings:
    """Return how the images of layers are made: two of a prompt at most."""
    return replace(run.profile.generation, samples=min(2, run.profile.generation.samples))


def layer_effects(run: Run, prompts: Sequence[str], layers: Mapping[str, Sequence[Layer]]) -> pd.DataFrame:
    """Return what switching off layers, one at a time, does to images of memorized prompts, all of the same seeds.

    Source: App. C.8, Fig. 16, 17 (key and value layers set to zero); App. C.9, Fig. 20 (convolutions, half blocked).

    Args:
        run: The run.
        prompts: Memorized prompts; without any the table has no rows.
        layers: What `switched_layers` returned.

    Returns:
        One row per layer and prompt, the untouched model first: columns part (``untouched``, ``value``, ``key`` or
        ``convolution``), layer (from 1; 0 for the untouched model), block, name (address), prompt, and medians over
        seeds: sscd_orig (similarity to the planted image, missing without one), sscd_gen (to the untouched model's
        image of the same seed), a_clip (of image and prompt).
    """
    columns = ["part", "layer", "block", "name", "prompt", "sscd_orig", "sscd_gen", "a_clip"]
    if not prompts:
        return pd.DataFrame(columns=columns)
    chosen = [layer for part in layers.values() for layer in part]
    settings = {"": [None]} | {layer.name: [switched_off(layer)] for layer in chosen}
    labels = [(UNTOUCHED, 0, "", ""), *((layer.part, layer.number, layer.block, layer.name) for layer in chosen)]
    rows = run.rows(prompts).rename(columns={"caption": "prompt"})
    values = deactivate.measured(run, rows, settings, few_images(run)).rename(columns={"setting": "name"})
    return pd.DataFrame(labels, columns=columns[:4]).merge(values, on="name")[columns]


def layer_summary(effects: pd.DataFrame) -> pd.DataFrame:
    """Return the effect of each layer: median over prompts, and the same of the untouched model.

    Returns:
        One row per layer: columns part, layer, block, name, prompts, and for sscd_orig, sscd_gen and a_clip ``<metric>``
        and ``<metric>_untouched``; missing where no prompt has a value.
    """
    names, keys = ["sscd_orig", "sscd_gen", "a_clip"], ["part", "layer", "block", "name"]
    is_base = effects["part"] == UNTOUCHED
    grouped = effects[~is_base].groupby(keys, sort=False)
    base = effects.loc[is_base, names].median().add_suffix("_untouched")
    table = pd.concat([grouped.size().rename("prompts"), grouped[names].median()], axis=1).reset_index()
    return table.assign(**base)


def strongest(summary: pd.DataFrame, part: str) -> pd.DataFrame:
    """Return the two layers of a part that lower the similarity to the planted image most, in the order of their numbers."""
    rows = summary[(summary["part"] == part) & summary["sscd_orig"].notna()]
    return rows.nsmallest(2, "sscd_orig").sort_values("layer", ignore_index=True)


def layer_grid(run: Run, prompts: Sequence[str], layers: Sequence[Layer]) -> Grid:
    """Return images of prompts with layers switched off, one at a time, all of the first seed.

    Source: Fig. 18 to 20.

    Args:
        run: The run.
        prompts: Prompts, some of `layer_effects`, so that their images are there.
        layers: The layers.

    Returns:
        Rows are prompts; columns ``planted``, ``none`` (the untouched model), then the numbers of the layers. `NO_IMAGES`
        without prompts.
    """
    settings = {"none": [None]} | {str(layer.number): [switched_off(layer)] for layer in layers}
    return deactivate.one_of_each(run, prompts, settings, few_images(run))


# What the paper says, and what we found


def read_quality(blocked_quality: pd.DataFrame) -> Iterator[Claim]:
    """Yield what blocking does to image quality, and how sure that is."""
    fid = quality_summary(blocked_quality).query("metric == 'fid'").set_index("setting")
    most = fid.groupby(level=0, sort=False).tail(1)
    change, deviation = most.reindex([FREQUENT]).iloc[0][["change", "change_sd"]] / most.loc[UNTOUCHED, "mean"]
    low, high = change - 2 * deviation, change + 2 * deviation
    values = [f"{row.Index} {plus_minus(row.mean, row.sd)} ({row.neurons:g} neurons)" for row in most.itertuples()]
    # So few images may be too few to tell; without a second split nobody knows.
    known = change if low > SMALL or high <= SMALL else np.nan
    yield effect(
        "image quality does not suffer when many neurons are blocked", known,
        "growth of the FID with the most frequent neurons, decided where two standard deviations do not cross the bound",
        at_most=SMALL,
        ours=f"FID: {'; '.join(values)}",
        paper=f"no significant loss with up to {paper.reported('quality.most_blocked')} blocked neurons (values not known)",
        n=f"{most['images'].iloc[0]} images in each half",
        interval="" if np.isnan(deviation) else f"growth {low:.2f} to {high:.2f} (two standard deviations)",
    )  # fmt: skip


def read_table_3(block_similarity: pd.DataFrame) -> Iterator[Claim]:
    """Yield how similar the outputs of blocks stay."""
    means = block_similarity.groupby(["setting", "output", "asked", "layer"])["cosine"].mean()
    low = means.groupby(["setting", "output"]).min().unstack()
    lowest = block_similarity.groupby(["setting", "output"])["lowest"].min().unstack()
    reported = {setting: f"{number} to 1" for setting, number in COSINES.items()}
    # Rounded as the paper's entries are.
    least, bound = round(low.loc[FREQUENT, OUTPUTS[0]], 2), COSINES[FREQUENT].value
    yield effect(
        "outputs of cross-attention blocks hardly change", least, "lowest cosine of a block's output", at_least=bound,
        ours=f"{FREQUENT} neurons: of cross-attention alone {low.loc[FREQUENT, OUTPUTS[1]]:.2f}", paper=reported[FREQUENT],
        n=f"{block_similarity['samples'].iloc[0]} samples",
        interval=f"from {lowest.loc[FREQUENT, OUTPUTS[0]]:.2f} in the lowest sample",
    )  # fmt: skip
    ours = f"{low.loc[OTHER, OUTPUTS[0]]:.2f}"
    yield Claim("lowest cosine of a block's output, random other neurons", ours, reported[OTHER])


def read_16(layer_effects: pd.DataFrame) -> Iterator[Claim]:
    """Yield which value and key layers matter most for the similarity to the planted image."""
    prompts = layer_effects.groupby(["part", "layer"])["prompt"].nunique()
    yield must("every layer has every prompt", prompts.min(), equals=layer_effects["prompt"].nunique())
    of = f"how many of these are among the two that lower SSCD_Orig most ({COMPARED})"
    for part, strong in STRONG.items():
        yield _layer_claim(
            layer_effects, f"{part} layers {strong[0]} and {strong[1]} matter most", of,
            lambda table, part=part, strong=strong: len({*strongest(table, part)["layer"]} & {*strong}),
            at_least=2, ours=lambda table, part=part: lowest(table, part),
            paper="the other layers hardly matter alone (no numbers)",
        )  # fmt: skip


def read_17(layer_effects: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether the alignment falls with the key layers that matter most for the similarity."""

    def lost(table: pd.DataFrame) -> float:
        top = strongest(table, "key")
        return 1 - (top["a_clip"] / top["a_clip_untouched"]).min()

    yield _layer_claim(
        layer_effects, "without the key layers that matter most, images fit the prompt less",
        f"share of A_CLIP that one of the two key layers takes that lower SSCD_Orig most ({COMPARED})", lost, at_least=LOST,
        ours=lambda table: f"key layers {' and '.join(map(str, strongest(table, 'key')['layer']))}",
        paper="it drops, within 0.22 to 0.34 (axis; no numbers)",
    )  # fmt: skip


def read_20(layer_effects: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether prompts stay memorized with half of a convolution blocked."""

    def kept(table: pd.DataFrame, name: str = "sscd_orig") -> float:
        return (table[name] / table[f"{name}_untouched"])[table["part"] == "convolution"].median()

    yield _layer_claim(
        layer_effects, "convolutions do not memorize",
        "share of SSCD_Orig that stays with half of one blocked, median over the convolutions, where there are copies", kept,
        at_least=KEPT, ours=lambda table: f"SSCD_Orig {lowest(table, 'convolution')}; share {listed([kept(table, 'a_clip')])} of A_CLIP stays",
        paper="still memorized; quality suffers for early layers (images, no numbers)", needed={"convolution": [1]},
    )  # fmt: skip


COMPARED = f"decided where all layers were switched off and the untouched model gives copies, above {MEMORIZED_ABOVE}"
"""When layers are compared with those that the paper names."""


def _layer_claim(
    effects: pd.DataFrame, text: str, of: str, number: Callable[[pd.DataFrame], float], *,
    ours: Callable[[pd.DataFrame], str], paper: str, needed: Mapping[str, Sequence[int]] = STRONG, **bound: float,
) -> Claim:  # fmt: skip
    """Return a claim about a number of a `layer_summary`, decided where the layers that it needs are there, and copies.

    In place of an interval it says how the number is for single prompts: so few prompts tell no more.
    """
    summary = layer_summary(effects)
    known = summary[summary["sscd_orig_untouched"] > MEMORIZED_ABOVE].dropna(subset="sscd_orig")
    there = all(set(layers) <= set(known.loc[known["part"] == part, "layer"]) for part, layers in needed.items())
    each = pd.Series([number(layer_summary(part)) for _, part in effects.groupby("prompt")]).dropna()
    return effect(
        text, number(summary) if there else np.nan, of, ours=ours(summary), paper=paper, **bound,
        n=f"{effects['prompt'].nunique()} VM prompts, {summary['part'].isin(needed).sum()} layers",
        interval="" if each.empty else f"{each.min():.2g} to {each.max():.2g} for single prompts",
    )  # fmt: skip


def lowest(summary: pd.DataFrame, part: str) -> str:
    """Return which two layers of a part lower the similarity to the planted image most."""
    rows = strongest(summary, part)
    if rows.empty:
        return "not known, since no prompt has a planted image"
    named = [f"{row.layer} ({row.block}, {row.sscd_orig:.2f})" for row in rows.itertuples()]
    return f"{rows['sscd_orig_untouched'].iloc[0]:.2f} untouched, lowest with layers {' and '.join(named)}"


# Figures and tables


@exhibit("Figure 5a", "image quality against the number of blocked neurons", read=read_quality)
def figure_5a(blocked_quality: pd.DataFrame) -> plots.Figure:
    """Distance of images of unmemorized prompts from other images of the untouched model; bars: mean ± one standard deviation over splits of the seeds (and two draws of the most random neurons).

    Dotted, with its band: the untouched model compared with itself. With few images the distances are far too
    large: only points of one panel can be compared. KID can be below 0, since both halves have the same prompts.
    """
    return _draw_quality(quality_summary(blocked_quality).query("metric != 'clip_fid'"), aspect=0.45)


@exhibit("Figure 8", "FID, CLIP-FID and KID against the number of blocked neurons")
def figure_8(blocked_quality: pd.DataFrame) -> plots.Figure:
    """As Figure 5a, whose claim it shares.

    Where one encoder gives the features of both, CLIP-FID is FID and is drawn once.
    """
    return _draw_quality(quality_summary(blocked_quality), aspect=0.38)


def _draw_quality(summary: pd.DataFrame, *, aspect: float) -> plots.Figure:
    """Return a panel for each metric; random neurons stand a little to the right, so that intervals can be told apart."""
    frequent = plots.ROLES["deactivated"].line_style(linestyle="-", label="most frequent memorization neurons")
    other = plots.Role("random other neurons", "0.4", "o", "--", "").line_style(markerfacecolor="white")
    with plots.panels(1, summary["name"].nunique(), aspect=aspect, legend=3) as (figure, axes):
        for place, (name, metric) in zip(axes, summary.groupby("name", sort=False), strict=True):
            base, *rows = (part for _, part in metric.groupby("setting", sort=False))
            middle, deviation = base.iloc[0][["mean", "sd"]]
            place.axhline(middle, color="black", linestyle=":", label="all neurons active")
            place.axhspan(middle - deviation, middle + deviation, color="0.9", zorder=0)
            for part, style, shift in zip(rows, (frequent, other), (1.0, 1.06), strict=False):
                # A point that was measured once has no interval.
                place.errorbar(shift * part["neurons"], part["mean"], part["sd"].fillna(0), capsize=2, **style)
                place.set_xscale("log")
                place.set_xticks(part["asked"], [str(count) for count in part["asked"]])
                place.xaxis.set_minor_locator(NullLocator())
            place.set(xlabel="blocked neurons", ylabel="distance", title=name)
        figure.suptitle(f"n = {summary['images'].max()} images in each half", fontsize=plots.TICK_SIZE)
    return figure


@exhibit("", "Figure 8 in numbers")
def show_blocked_quality(blocked_quality: pd.DataFrame) -> pd.DataFrame:
    """Neurons: how many were blocked, of how many asked for, where a layer has no more.

    Images: in each of the two sets that are compared. Change: from the untouched model in the same split. ±:
    standard deviation over splits of the seeds (and draws); splits share images, so that it is rather too small.
    """
    return deactivate.quality_table(blocked_quality)


@exhibit("Table 3", "outputs of cross-attention blocks with blocked neurons", read=read_table_3)
def table_3(block_similarity: pd.DataFrame) -> pd.DataFrame:
    """Cosine of the output with blocked neurons and untouched, first denoising step, mean over unmemorized prompts and seeds (and two draws of the most random neurons); in brackets the paper's lowest.

    Block: the whole output, with residual connections; cross-attention: its own part alone. The paper does not say
    what exactly it compares; its values stand beside the whole block.
    """
    rows, order = [], block_similarity.sort_values("output", kind="stable")
    for (output, setting, _), part in order.groupby(["output", "setting", "asked"], sort=False):
        means = part.groupby(["layer", "block"])["cosine"].mean()
        reported = f" [{COSINES[setting].value:g}]" if output == "block" else ""
        where, neurons = "{} ({})".format(*means.idxmin()), f"{part['neurons'].mean():g}"
        texts = [f"{value:.3f}" for value in (means.min(), means.median(), means.max())]
        rows.append((output, setting, neurons, texts[0] + reported, where, *texts[1:]))
    names = ["output", "blocked", "neurons", "lowest of the blocks", "in block", "median of the blocks", "highest"]
    return pd.DataFrame(rows, columns=names)


@exhibit("Figure 16", "similarity with value and key layers set to zero", read=read_16)
def figure_16(layer_effects: pd.DataFrame) -> plots.Figure:
    """Similarity to the planted image, one layer at a time.

    Small points: VM prompts; diamonds: their median; dotted: the untouched model.
    """
    return _draw_layers(layer_effects, ["value", "key"], ["sscd_orig"])


@exhibit("Figure 17", "alignment with value and key layers set to zero", read=read_17)
def figure_17(layer_effects: pd.DataFrame) -> plots.Figure:
    """Alignment of image and prompt, one layer at a time; points as in Figure 16."""
    return _draw_layers(layer_effects, ["value", "key"], ["a_clip"])


@exhibit("Figure 20 (as curves)", "similarity and alignment with half of each convolution blocked", read=read_20)
def convolutions(layer_effects: pd.DataFrame) -> plots.Figure:
    """Half of the output channels, drawn at random, are zero, one convolution of the down blocks at a time; points as in Figure 16."""
    return _draw_layers(layer_effects, ["convolution"], ["sscd_orig", "a_clip"])


def _draw_layers(effects: pd.DataFrame, parts: list[str], chosen: list[str]) -> plots.Figure:
    """Return a panel for each part and metric."""
    with plots.panels(1, 2, aspect=0.42, sharey=len(chosen) == 1, legend=3) as (figure, axes):
        for place, (part, metric) in zip(axes, product(parts, chosen), strict=True):
            _draw_part(place, effects, part, metric)
            place.set_xlabel("cross-attention layer" if part in STRONG else "convolution of the down blocks")
            place.set_ylabel("" if part == "key" else plots.METRICS[metric])
            place.set_title(f"n = {effects['prompt'].nunique()} prompts", fontsize=plots.TICK_SIZE, loc="right", pad=14)
            title = f"{part} layers set to zero" if part in STRONG else "half of it blocked"
            place.set_title(title, pad=14, loc="left")
    return figure


def _draw_part(axes: Axes, effects: pd.DataFrame, part: str, metric: str) -> None:
    """Draw a metric over the layers of a part; every other block of the UNet is shaded, with its name above."""
    rows, look = effects[effects["part"] == part], plots.ROLES["vm"]
    if rows[metric].isna().all():
        plots.say(axes, "not known: no prompt has a training image")
        return
    medians = rows.groupby("layer")[metric].median()
    base = effects.loc[effects["part"] == UNTOUCHED, metric].median()
    small = {"linestyle": "", "markersize": 3.5, "alpha": 0.6, "markeredgewidth": 0}
    axes.axhline(base, color="black", linestyle=":", label="untouched model, median")
    axes.plot(rows["layer"], rows[metric], **look.line_style(label="a prompt, layer switched off", **small))
    axes.plot(medians.index, medians, "D-", color="black", markersize=3.5, linewidth=0.6, label="median over prompts")
    axes.set_xlim(medians.index[0] - 0.5, medians.index[-1] + 0.5)
    axes.set_xticks(medians.index[:: 1 + (len(medians) - 1) // 10])
    blocks = rows.groupby("block", sort=False)["layer"].agg(["min", "max"]).sort_values("min")
    for number, (block, (first, last)) in enumerate(blocks.iterrows() if len(blocks) > 1 else ()):
        style = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": plots.TICK_SIZE}
        axes.annotate(block, ((first + last) / 2, 1.01), **style)
        if number % 2:
            axes.axvspan(first - 0.5, last + 0.5, color="0.93", zorder=0)


ONE_SEED = (
    "A row is a VM prompt, all images are of one seed. Planted: the training image; none: the untouched model; a number: the layer "
    "of that number, counted as an image passes them, is switched off (a convolution: half of it)."
)
"""Caption of the images."""


@exhibit("Figure 18", "images with each value layer set to zero", ONE_SEED)
def figure_18(figure_18: Grid) -> plots.Figure:
    return _layer_images(figure_18)


@exhibit("Figure 19", "images with each key layer set to zero", ONE_SEED)
def figure_19(figure_19: Grid) -> plots.Figure:
    return _layer_images(figure_19)


@exhibit("Figure 20", "images with half of each convolution blocked", f"{ONE_SEED} Some of the layers, evenly spread.")
def figure_20(figure_20: Grid) -> plots.Figure:
    """Return Fig. 20 with as many layers as can be seen."""
    layers = range(2, len(figure_20.columns))
    places = [0, 1, *spread(layers, 6)]
    columns = tuple(figure_20.columns[place] for place in places)
    return _layer_images(replace(figure_20, images=figure_20.images[:, places], columns=columns))


def _layer_images(grid: Grid) -> plots.Figure:
    return plots.image_grid(grid, kinds=dict.fromkeys(grid.rows, "vm"))


# Exercises of notebook 05


def _kept_neurons(run: Run) -> float:
    """Return which share of the default's neurons the lowest threshold finds too, median over VM prompts."""
    found, levels = run.load("ablation_searches").query("kind == 'vm'"), run.load("ablation_levels")
    alike = found[found["initial_threshold"] == found["refinement_threshold"]]
    alike = alike[~alike["setting"].str.startswith(("no ", "guidance"))].set_index(["prompt", "initial_threshold"])
    own, lowest = float(levels.loc[levels["default"], "threshold"].iloc[0]), levels["threshold"].min()
    pairs = [neuron_sets(alike.loc[[(prompt, own), (prompt, lowest)]]) for prompt in alike.index.unique(level=0)]
    return float(np.median([len(mine & other) / len(mine) for mine, other in pairs if mine]))


def _forgets_at(run: Run) -> float:
    """Return the smallest share of the first convolution without which the first VM prompt has no copy; 0: none."""
    first = down_convolutions(run.pipe.unet)[0].name
    items = {share: SwitchedOffLayers((first,), share) for share in (0.25, 0.5, 0.75, 1)}
    return deactivate.breaks_at(run, items, 0, settings=few_images(run))


EXERCISES = {
    "05.1": _kept_neurons,
    "05.2": lambda run: lambda answer: 0 <= answer <= 1,
    "05.3": _forgets_at,
}
