"""Notebook 10: maps of the memorized part of an image against exact masks, and mitigations that change the guidance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, product
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter

from nemolib import metrics, paper, paths, plots
from nemolib.beyond import guidance
from nemolib.beyond.denoising import Denoising, text_of
from nemolib.beyond.regions import MAPS, best_iou, mapping, on_grid, pixel_auroc
from nemolib.exhibits import KINDS, Claim, effect, exhibit, of_kinds
from nemolib.experiments.deactivate_neurons import NONE, adjustment, under_one_bar
from nemolib.first_step import initial_latents
from nemolib.layers import OpenAttention, attention_layers, processors
from nemolib.localization import by_prompt, memorized
from nemolib.mitigation import AttentionScaling, DeactivatedNeurons, EmbeddingAdjustment, Mitigation, RandomTokens
from nemolib.plots import ROLES, Figure, Role, image_grid, legend_below, panels
from nemolib.prompts import has_image
from nemolib.run import Run
from nemolib.store import PLANTED, Grid

NOTEBOOK = "beyond/10_where_is_it"

DIFFERENCE, ENDING, CURVATURE = MAPS

LOOKS = dict(zip(MAPS, (("#0072B2", "o", "-"), ("#E69F00", "s", "--"), ("#CC79A7", "^", ":")), strict=True))
"""Colour, marker and line of each map."""

COLORS = *mpl.color_sequences["petroff10"], "black"
MARKERS, LINES = "os^vDPhXd<>", 7 * ["-"] + 4 * ["--"]
"""Of the mitigations, in the order of `strengths`; the last ones are those of notebook 04."""

COPIED = 0.5
"""Similarity above which MemBench counts an image as a copy."""


# Maps


def maps_of(run: Run, captions: Sequence[str], mitigation: Mitigation | None = None, **changes: Any) -> np.ndarray:
    """Return maps of prompts along guided sampling, [prompt, map, step, seed, height, width], float32.

    Args:
        run: The run.
        captions: The prompts.
        mitigation: What is done to the model; None changes nothing.
        changes: Other settings of `nemolib.beyond.regions.region_maps` than the profile's.
    """
    own = run.profile.beyond.regions
    used = {"maps": MAPS} | {name: getattr(own, name) for name in ("indices", "samples", "steps", "probes")}
    used |= {"seed": run.profile.detection.seed, "guidance": run.profile.generation.guidance} | changes
    items = [(caption, mitigation and mitigation.of(caption)) for caption in captions]
    return np.stack(run.compute(mapping, items, label="region maps", **used))


def masks(run: Run, rows: pd.DataFrame) -> list[np.ndarray | None]:
    """Return which part of the planted image of each prompt all its copies share, [height, width], bool; None: not known.

    It lies beside the image: ``<image>_mask.png``. VM images have no such file, being shared as a whole.
    """
    root = paths.resolve(run.profile.prompts.memorized).parent.parent
    files = [(root / image).with_name(f"{(root / image).stem}_mask.png") for image in rows["image"]]
    return [np.asarray(Image.open(file).convert("L")) > 127 if file.is_file() else None for file in files]


def agreement(run: Run, rows: pd.DataFrame, maps: np.ndarray) -> pd.DataFrame:
    """Return how well maps (`maps_of`) of prompts agree with their masks, where there are masks.

    Source: Kim & Lee (ICML 2026) for the IoU.

    Returns:
        One row per map and step: columns map, step (from 1), prompts, auroc (pixels inside against outside: mean over
        seeds, median over prompts) with its interval auroc_low and auroc_high, iou (best mean IoU of one threshold for
        all images), iou_paper, and whole (IoU of a map that takes everything). No rows without masks.
    """
    known, table = [pair for pair in zip(maps, masks(run, rows), strict=True) if pair[1] is not None], []
    theirs, steps = paper.table("region_maps").set_index("map")["iou"], run.profile.beyond.regions.indices
    for (place, name), (at, step) in product(enumerate(MAPS), enumerate(steps if known else ())):
        images = np.concatenate([found[place, at] for found, _ in known])
        inside = np.repeat([on_grid(mask[None], maps.shape[-2:])[0] for _, mask in known], maps.shape[3], axis=0)
        each = pixel_auroc(images, inside).reshape(len(known), -1).mean(axis=1)
        reported = theirs[name] if step == steps[-1] else np.nan
        numbers = (np.median(each), *metrics.bootstrap_interval(each), best_iou(images, inside)[0], reported)
        table.append((name, step + 1, len(known), *numbers, inside.mean()))
    columns = "map", "step", "prompts", "auroc", "auroc_low", "auroc_high", "iou", "iou_paper", "whole"
    return pd.DataFrame(table, columns=columns).assign(auroc_paper=np.nan, iou_low=np.nan, iou_high=np.nan)


def read_agreement(region_agreement: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether maps find the region at the step that was published."""
    whole = paper.table("region_maps").set_index("map").loc["whole image", "iou"]
    for _, row in region_agreement[region_agreement["iou_paper"].notna()].iterrows():
        yield effect(
            f"the {row['map']} of the last step finds the memorized region", row["iou"] - row["whole"], "best mean IoU above that of the whole image", at_least=0.1,
            paper=f"{row['iou_paper']:.2f}, whole image {whole:.2f} (Kim & Lee, ICML 2026)", ours=f"{row['iou']:.2f}, whole image {row['whole']:.2f}; pixel AUROC {row['auroc']:.2f}",
            n=f"{row['prompts']} TM prompts", interval=f"pixel AUROC {row['auroc_low']:.2f} to {row['auroc_high']:.2f}")  # fmt: skip


@exhibit("", "how well maps agree with the part that is fixed in training", read=read_agreement)
def show_region_agreement(region_agreement: pd.DataFrame) -> Figure:
    """Left: how often a pixel of the fixed part is brighter than another one of its image (dotted: chance), median over TM prompts with its 95 % bootstrap interval.

    Right: best mean intersection over union of one threshold for all images (dotted: the whole image). Hollow:
    Kim & Lee (ICML 2026) with Stable Diffusion v1.4, where the whole image has 0.52; without masks, they take
    what differs between copies.
    """
    named = {"auroc": ("pixel AUROC", 0.5), "iou": ("best mean IoU", region_agreement["whole"].iloc[0])}
    with panels(1, 2, aspect=0.42) as (figure, axes):
        for panel, (name, (label, base)) in zip(axes, named.items(), strict=True):
            for kind, rows in region_agreement.groupby("map", sort=False):
                plots.along(panel, rows, "step", name, Role(kind, *LOOKS[kind], ""))
            panel.axhline(base, color=plots.GREY, linestyle=":", linewidth=0.8)
            panel.set(xlabel="denoising step", ylabel=label, ylim=(None, 1.02), xticks=rows["step"])
        legend_below(figure, columns=3)
    return figure


def darkness(run: Run, rows: pd.DataFrame, found: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Return how bright the guidance difference of the first step is, with and without the neurons of the prompt.

    Its sum over the image is the square of Wen's norm.

    Returns:
        One row per prompt: columns kind, prompt, active and off (mean over image and seeds; where a prompt has no neurons
        both are the same). And the maps without neurons, [prompt, seed, height, width].
    """
    sets, captions = by_prompt(memorized(found)), rows["caption"].tolist()
    any_set = next(iter(sets.values()))
    own = DeactivatedNeurons(dict.fromkeys(captions, any_set - any_set) | sets)
    active, off = (maps_of(run, captions, item, maps=(DIFFERENCE,), indices=(0,))[:, 0, 0] for item in (None, own))
    means = {name: maps.mean(axis=(1, 2, 3)) for name, maps in (("active", active), ("off", off))}
    return rows[["kind"]].assign(prompt=captions, **means), off


def image_of(run: Run, caption: str) -> np.ndarray:
    """Return the image that the pipeline makes from the noise of the first seed of the maps, [height, width, 3], uint8."""
    own, pipe = run.profile.beyond.regions, run.pipe
    start = initial_latents(pipe, samples=own.samples, seed=run.profile.detection.seed)[:1].to(pipe.unet.dtype)
    options = {"num_inference_steps": own.steps, "guidance_scale": run.profile.generation.guidance}
    made = pipe(caption, latents=start, output_type="np", **options).images[0]
    return (made * 255).round().astype(np.uint8)


def overlaid(image: np.ndarray, inside: np.ndarray, found: np.ndarray, top: float) -> np.ndarray:
    """Return an image in grey under the root of a map in colours, brightest where it is ``top``, and the mask's outline."""
    shades = Image.fromarray((255 * np.clip(found / top, 0, 1) ** 0.5).astype(np.uint8)).resize(image.shape[1::-1])
    over = 0.35 * image.mean(axis=-1, keepdims=True) + 166 * mpl.colormaps["viridis"](np.asarray(shades))[..., :3]
    edge = Image.fromarray(inside).convert("L").filter(ImageFilter.FIND_EDGES)
    return np.where(np.asarray(edge)[..., None] > 0, 255, over).astype(np.uint8)


def overlays(run: Run, rows: pd.DataFrame, maps: np.ndarray, off: np.ndarray) -> Grid:
    """Return planted image, its fixed part, an image that is made, and maps over it, a row for each prompt.

    The maps of a column have one scale, which ends at the 95 % quantile over TM prompts. All are of the first seed.

    Args:
        run: The run.
        rows: Rows of prompt tables.
        maps: Their maps (`maps_of`): the guidance difference of the first step, the others of the last one are shown.
        off: The guidance difference of the first step without neurons (`darkness`).
    """
    shown = {name: maps[:, place, 0 if name == DIFFERENCE else -1, 0] for place, name in enumerate(MAPS)}
    tops, lines = [np.quantile(found[rows["kind"] == "tm"], 0.95) for found in shown.values()], []
    shown |= {f"{DIFFERENCE}, neurons off": off[:, 0]}
    for place, mask in enumerate(masks(run, rows)):
        row, image = rows.iloc[[place]], image_of(run, rows["caption"][place])
        size, planted = image.shape[:2], run.planted_like(row, image)[0]
        inside = np.full(size, has_image(row)) if mask is None else on_grid(mask[None], size)[0]
        scales = zip(shown.values(), [*tops, tops[0]], strict=True)
        over = [overlaid(image, inside, found[place], top) for found, top in scales]
        lines.append([planted, np.where(inside[..., None], planted, 255), image, *over])
    return Grid(np.array(lines), tuple(rows["caption"]), (PLANTED, "fixed part (mask)", "generated", *shown))


@exhibit("", "maps of the memorized region over images")
def region_maps(region_maps: Grid, guidance_path: pd.DataFrame) -> Figure:
    """Planted: the training image.

    Fixed part: what all its copies in training share, known exactly. Generated: an image that the model makes
    of the caption; then the same image in grey under maps: yellow where a map is high, blue where it is low, a
    white line around the fixed part. The guidance difference is that of the first step, the others are of the
    last one; a column has one scale, and the last column that of the guidance difference.
    """
    return image_grid(region_maps, kinds=guidance_path.drop_duplicates("caption").set_index("caption")["kind"])


# When does the guidance difference fall, and what does attenuation take?


def guidance_path(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Return how much the prompt changes in each step, along guided sampling and along sampling without the prompt.

    Returns:
        One row per scale, prompt and step: columns kind, caption, guidance, timestep, norm (of the guidance difference, mean
        over seeds) and minimum (share of the seeds whose trajectory has a local minimum, as the dynamic transition looks
        for it).
    """
    timesteps, parts = Denoising(run.pipe, steps=run.profile.beyond.regions.steps).timesteps, []
    used = {"maps": (DIFFERENCE,), "indices": tuple(range(len(timesteps)))}
    for scale in (run.profile.generation.guidance, 0.0):
        maps = maps_of(run, rows["caption"], guidance=scale, **used)[:, 0]
        norms = np.sqrt(maps.sum(axis=(-2, -1)))  # [prompt, step, seed]
        first, middle, last = norms[:, :-2], norms[:, 1:-1], norms[:, 2:]
        share = ((middle < first) & (last > middle)).any(axis=1).mean(axis=1)
        known = rows[["kind", "caption"]].loc[np.repeat(rows.index, len(timesteps))].reset_index(drop=True)
        numbers = {"norm": norms.mean(axis=-1).ravel(), "minimum": np.repeat(share, len(timesteps))}
        parts.append(known.assign(guidance=scale, timestep=timesteps * len(rows), **numbers))
    return pd.concat(parts, ignore_index=True)


def read_path(guidance_path: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether there is a transition point before which guidance can wait."""
    free = of_kinds(guidance_path[guidance_path["guidance"] == 0], "guidance_path", "vm")["vm"]
    norm = free.groupby("timestep")["norm"].median()
    yield effect(
        "without guidance, VM prompts have a transition point", free["minimum"].mean(), "share of the trajectories with a local minimum of the guidance difference", at_least=0.5,
        ours=f"norm {norm.iloc[-1]:.1f} in the first step, at most {norm.max():.1f}", n=f"{free['caption'].nunique()} VM prompts",
        paper="the norm is large until the transition point, then it falls (Jain et al., CVPR 2025; curves)")  # fmt: skip


@exhibit("", "how much the prompt changes in each step", read=read_path)
def show_guidance_path(guidance_path: pd.DataFrame) -> Figure:
    """Norm of the guidance difference Δε, mean over seeds, median over prompts; denoising runs from left to right."""
    with panels(1, 2, aspect=0.4) as (figure, axes):
        for panel, (scale, part) in zip(axes, guidance_path.groupby("guidance", sort=False), strict=True):
            for kind, rows in part.groupby("kind", sort=False):
                look = ROLES[kind].line_style(markersize=3, label=f"{KINDS[kind]}, n = {rows['caption'].nunique()}")
                panel.plot(rows.groupby("timestep")["norm"].median(), **look)
            panel.set(xlabel="timestep", ylabel=r"$\|\Delta\epsilon\|$", title=f"sampling with guidance {scale:g}")
            panel.invert_xaxis()
        legend_below(figure)
    return figure


def spiking(run: Run, captions: Sequence[str]) -> pd.Series:
    """Return what attenuation at its published strength does to the tokens that spike, in the first step.

    Returns:
        Means over layers, heads, positions and prompts: negative (share of their logits below 0, which attenuation raises),
        before and after (attention that they get together).
    """
    own, chosen, table = guidance.Attenuation(), run.profile.beyond.regions, []

    def look(logits: torch.Tensor) -> torch.Tensor:
        plain = logits.chunk(2)[1]
        less = guidance.attenuated(plain, alpha=own.alpha, threshold=own.threshold)
        spikes = less != plain
        given = [(each.softmax(dim=-1) * spikes).sum(dim=-1).mean() for each in (plain, less)]
        table.append([float(value) for value in ((plain[spikes] < 0).float().mean(), *given)])
        return logits

    model, layers = Denoising(run.pipe, steps=chosen.steps), attention_layers(run.pipe.unet, ("down", "mid"))
    latents = initial_latents(run.pipe, samples=chosen.samples, seed=run.profile.detection.seed)
    with processors(run.pipe.unet, dict.fromkeys(layers, OpenAttention(change=look))), torch.no_grad():
        for caption in captions:
            model.pair(latents, model.timesteps[0], text_of(run.pipe, caption).embedding)
    return pd.DataFrame(table, columns=["negative", "before", "after"]).mean()


# Mitigations


Strengths = dict[tuple[str, str], tuple[Mitigation | None, bool]]
"""Mitigations by name and strength, from weak to strong, and whether the strength is the published one."""


def strengths(run: Run, found: pd.DataFrame, ordinary: Sequence[str]) -> Strengths:
    """Return the untouched model and the mitigations at several strengths.

    Args:
        run: The run.
        found: Localizations of the memorized prompts.
        ordinary: Unmemorized prompts: each is made without the neurons of one memorized prompt, which take turns.
    """
    found = memorized(found)
    sets = {"refined": by_prompt(found), "initial": by_prompt(found, "initial")}
    for neurons in sets.values():
        neurons |= dict(zip(ordinary, cycle([*filter(None, neurons.values())] or [*neurons.values()]), strict=False))
    own, wen, mitigations = run.profile.beyond.regions, adjustment(run).settings, run.profile.mitigation
    norm, search = own.noise_target or wen.target, {"learning_rate": own.noise_rate, "iterations": own.noise_iterations}
    choices = {
        "static transition": ("until {}", (500, 300), 500, guidance.StaticTransition),
        "opposite guidance": ("until {}", (650,), 650, lambda until: guidance.StaticTransition(until, -2.0)),
        "dynamic transition": ("", ("",), "", lambda _: guidance.DynamicTransition()),
        "attention attenuation": ("alpha {:g}", (0.3, 0.0), 0.3, guidance.Attenuation),
        "GUARD": ("r {:g}", (2.0,), 2.0, lambda r: guidance.Guard(repulsion=r)),
        "adjusted noise": ("until {}", (860, 500), 860, lambda until: guidance.AdjustedNoise(until=until)),
        "searched noise": ("norm {:.2f}", (norm,), own.noise_target, lambda norm: guidance.SearchedNoise(norm, **search)),
        "NeMo": ("{} neurons", ("refined", "initial"), "refined", lambda name: DeactivatedNeurons(sets[name])),
        "embedding adjustment (Wen)": ("target {:.2f}", (wen.target,), EmbeddingAdjustment().settings.target, lambda _: EmbeddingAdjustment(wen)),
        "attention scaling (Ren)": ("c1 {:g}", (mitigations.ren.c1,), AttentionScaling().settings.c1, lambda _: AttentionScaling(mitigations.ren)),
        "random tokens (Somepalli)": ("{}", (4, 10), 4, lambda number: RandomTokens(number, mitigations.somepalli.seed)),
    }  # fmt: skip
    return {(NONE, ""): (None, False)} | {(name, label.format(value)): (made(value), value == published) for name, (label, values, published, made) in choices.items() for value in values}  # fmt: skip


def likeness(run: Run, rows: pd.DataFrame, item: Mitigation | None) -> np.ndarray:
    """Return how much of its planted image an image of a prompt repeats, [prompt, seed].

    Where the part that all copies share is known (`masks`), the correlation of its pixels with the planted ones: what is
    around it is new in every copy. Else the similarity of copy descriptors; missing without a planted image.
    """
    captions, known = rows["caption"].tolist(), masks(run, rows)
    if any(mask is None for mask in known):
        return metrics.sscd_orig(run.features("copy", captions, item), run.planted_features(rows))
    images = run.images(captions, item)
    planted, fixed = run.planted_images(rows, size=images.shape[2:4]), on_grid(np.stack(known), images.shape[2:4])
    parts = [[each[inside].ravel() for each in (original, *made)] for original, made, inside in zip(planted, images, fixed, strict=True)]  # fmt: skip
    return np.array([np.corrcoef(pixels)[0, 1:] for pixels in parts])


def curves(run: Run, rows: pd.DataFrame, chosen: Strengths) -> pd.DataFrame:
    """Return how much is copied and how well images fit their prompt: untouched, and with each strength.

    Source: MemBench (TMLR 2025, arXiv 2407.17095): largest similarity of a prompt's images, mean of the three largest,
        and share of images above 0.5; alignment, and ordinary prompts beside.
    Deviates: as many images as the profile generates, not 10; compared with the prompt's own planted image alone.

    Returns:
        One row per strength: columns mitigation, strength, published, prompts (VM, with a planted image), top_1, top_3, copies,
        alignment (of VM prompts, means), layout (largest `likeness` of TM prompts) and layout_alignment, ordinary
        (alignment of unmemorized prompts), same (similarity of these to the untouched images).
    """
    parts, table = {kind: part.reset_index(drop=True) for kind, part in rows.groupby("kind")}, []
    for quiet, (names, (item, published)) in under_one_bar(run, [*chosen.items()], "strengths"):
        similar, layout = (likeness(quiet, parts[kind], item) for kind in ("vm", "tm"))
        ranked = np.sort(similar[~np.isnan(similar).any(axis=1)], axis=1)[:, ::-1]
        copied = ranked[:, 0].mean(), ranked[:, :3].mean(), (ranked > COPIED).mean()
        vm, tm = (quiet.measure(parts[kind], item, columns=["a_clip"])["a_clip"].mean() for kind in ("vm", "tm"))
        kept = quiet.measure(parts["unmemorized"], item, columns=["a_clip", "sscd_gen"]).mean()
        table.append((*names, published, len(ranked), *copied, vm, pd.Series(layout.max(axis=1)).mean(), tm, *kept))
    columns = ["mitigation", "strength", "published", "prompts", "top_1", "top_3", "copies", "alignment"]
    return pd.DataFrame(table, columns=[*columns, "layout", "layout_alignment", "ordinary", "same"])


def read_curves(guidance_mitigations: pd.DataFrame) -> Iterator[Claim]:
    """Yield what mitigations with published numbers do at their published strength; these numbers fulfil both bounds."""
    none, theirs = guidance_mitigations.iloc[0], paper.table("guidance")
    ours = guidance_mitigations[guidance_mitigations["published"]].merge(theirs, on="mitigation")
    rules = ("top_1", "removes copies", {"at_most": 0.8}), ("alignment", "keeps the alignment", {"at_least": 0.75})
    for (_, row), (name, text, bound) in product(ours.iterrows(), rules):
        yield effect(
            f"{row['mitigation']} {text}", row[name] / none[name], f"share of {name.replace('_', '-')} that stays", **bound, ours=f"{none[name]:.2f} to {row[name]:.2f}",
            paper=f"{row[f'{name}_before']:.2f} to {row[f'{name}_after']:.2f} ({row['source']})", n=f"{none['prompts']} VM prompts")  # fmt: skip


@exhibit("", "copy similarity against alignment, every mitigation at several strengths", read=read_curves)
def show_guidance_mitigations(guidance_mitigations: pd.DataFrame) -> Figure:
    """A line is a mitigation from weak to strong and begins at the untouched model (star); dashed: those of notebook 04.

    Filled: the published strength. Best is the lower right corner. Up: the largest value of a prompt's images
    (MemBench's top-1), mean over prompts; left and middle copy similarity of VM prompts, of which MemBench counts
    none below the dotted line as a copy, right, for TM prompts, the correlation of pixels with the planted image in
    the part that all its copies share (without masks, their copy similarity). Across: alignment of the images of the
    prompts in the title.
    """
    table, shown = guidance_mitigations, {"VM: copy similarity": ("alignment", "top_1"), "unmemorized, beside it": ("ordinary", "top_1"), "TM: layout": ("layout_alignment", "layout")}  # fmt: skip
    with panels(1, 3, aspect=0.6, sharey=True) as (figure, axes):
        for panel, (title, (across, up)) in zip(axes, shown.items(), strict=True):
            for place, name in enumerate(table["mitigation"].unique()[1:]):
                rows = table[table["mitigation"].isin([NONE, name])]
                look = Role(name, COLORS[place], MARKERS[place], LINES[place], "").line_style(markersize=4, linewidth=1)
                panel.plot(rows[across], rows[up], **look | {"markerfacecolor": "white", "markevery": slice(1, None)})
                panel.plot(across, up, data=rows[rows["published"]], **look | {"linestyle": "", "label": "_"})
            panel.plot(table[across][0], table[up][0], "k*", markersize=8, label="untouched")
            if up == "top_1":
                panel.axhline(COPIED, color=plots.GREY, linestyle=":", linewidth=0.8)
            panel.set(title=title, xlabel="alignment (A_CLIP)", ylabel="top-1 of memorized prompts")
            panel.label_outer()
        legend_below(figure, columns=3)
    return figure


def halving(table: pd.DataFrame) -> pd.DataFrame:
    """Return for each mitigation of `curves` the weakest strength that halves the copy similarity, else the one that leaves least."""
    limit, groups = table["top_1"].iloc[0] / 2, table.iloc[1:].groupby("mitigation", sort=False)["top_1"]
    return table.loc[[part.index[(part <= max(limit, part.min())).argmax()] for _, part in groups]]


def pictures(run: Run, rows: pd.DataFrame, table: pd.DataFrame, chosen: Strengths) -> Grid:
    """Return the planted image of each prompt, a column, and one image for each mitigation at the strength of `halving`."""
    best = map(tuple, halving(table)[["mitigation", "strength"]].to_numpy())
    items = {NONE: None} | {", ".join(filter(None, pair)): chosen[pair][0] for pair in best}
    made = [run.images(rows["caption"].tolist(), item)[:, 0] for item in items.values()]
    names = tuple(f"{ROLES[row.kind].short}: {row.caption}" for row in rows.itertuples())
    return Grid(np.stack([run.planted_like(rows, made[0]), *made]), (PLANTED, *items), names)


@exhibit("", "an image of each mitigation")
def guidance_images(guidance_images: Grid) -> Figure:
    """All of one seed.

    Of each mitigation the weakest strength that halves the copy similarity of VM prompts, or where none does,
    the one that leaves least of it. Unmemorized prompts have no planted image.
    """
    return image_grid(guidance_images)


# Exercises


def first_auroc(run: Run, name: str, *, mean: bool = False, **changes: Any) -> float:
    """Return the pixel AUROC of a map of the first step for the first TM prompt: mean over seeds, or of their mean."""
    row = run.prompts("tm").head(1)
    maps = maps_of(run, row["caption"].tolist(), maps=(name,), indices=(0,), **changes)[0, 0, 0]
    maps, inside = maps.mean(axis=0, keepdims=True) if mean else maps, on_grid(masks(run, row)[0][None], maps.shape[1:])
    return float(pixel_auroc(maps, inside.repeat(len(maps), axis=0)).mean())


def latest(run: Run) -> int:
    """Return the first of these timesteps until which guidance has to wait so that the first VM prompt gives no copy; else 0."""
    row, untils = run.prompts("vm", most=1), (600, 500, 300, 150, 50)
    largest = {until: run.measure(row, guidance.StaticTransition(until))["sscd_orig_max"][0] for until in untils}
    return next((until for until, copy in largest.items() if copy <= COPIED), 0)


EXERCISES = {"10.1": lambda run: first_auroc(run, CURVATURE, probes=64), "10.2": lambda run: first_auroc(run, DIFFERENCE, mean=True), "10.3": latest}  # fmt: skip
"""The right answers of the exercises of notebook 10 (`nemolib.exercises.check`)."""
