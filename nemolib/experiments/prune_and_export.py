"""Notebook 07: neurons taken out for good, alone and of many prompts at once, beside feed-forward weights that Wanda prunes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from nemolib import metrics, plots
from nemolib.beyond.prune import measuring_inputs, prune_weights, restore, wanda_masks
from nemolib.exhibits import Claim, effect, exhibit, median_interval
from nemolib.experiments.deactivate_neurons import LEFT, halves, under_one_bar
from nemolib.layers import value_layers
from nemolib.localization import by_prompt, memorized
from nemolib.mitigation import DeactivatedNeurons, Mitigation
from nemolib.neurons import NeuronSet
from nemolib.plots import ROLES, Role
from nemolib.prompts import has_image, ordinary
from nemolib.provenance import code_hash
from nemolib.seeding import stream
from nemolib.settings import validated
from nemolib.store import PLANTED, Grid

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from matplotlib.figure import Figure

    from nemolib.run import Run

NOTEBOOK = "beyond/07_prune_and_export"

UNTOUCHED, NEMO, WANDA, RANDOM = "untouched", "NeMo", "Wanda", "random"
"""What is pruned: nothing, memorization neurons, feed-forward weights, or as many others of each layer."""

METHODS = {
    NEMO: replace(ROLES["deactivated"], label="NeMo: neurons of so many prompts", line="-"),
    WANDA: Role("Wanda: such a share of feed-forward weights", "0.25", "s", "--", ""),
    RANDOM: Role("as many random weights", "0.6", "x", ":", ""),
}
"""How the methods look."""

LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.8}
"""What is behind a label, so that lines do not cross it."""


# Export


@exhibit("", "the repaired model in other hands")
def export_images(export_images: Grid) -> Figure:
    """One prompt, one seed, the same steps.

    Planted: the training image. Folder and patch: made in a process that cannot import nemolib.
    """
    return plots.image_grid(export_images)


# Repairs


@validated
class PrunedWeights(Mitigation):
    """Weights that are zero while images are made, so that they are compared as other mitigations are.

    Attributes:
        masks: Name of a weight of the UNet -> the bits of its mask.
        code: Hash of what sets them to zero, which belongs to what the images are.
    """

    name = "pruned weights"
    masks: dict[str, bytes]
    code: str = code_hash(prune_weights)

    @contextmanager
    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> Iterator[None]:
        masks = {}
        for name, bits in self.masks.items():
            shape = pipe.unet.get_parameter(name).shape
            mask = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=shape.numel())
            masks[name] = torch.from_numpy(mask).view(shape).bool()
        taken = prune_weights(pipe, masks)
        try:
            yield
        finally:
            restore(pipe, taken)


@dataclass(frozen=True, slots=True)
class Repair:
    """A model with something pruned.

    Attributes:
        method: `UNTOUCHED`, `NEMO`, `WANDA` or `RANDOM`.
        amount: Number of prompts whose neurons are pruned, or sparsity.
        weights: Number of weights that are zero.
        mitigation: What makes its images; None: nothing is pruned.
        prompts: What it was made for.
        neurons: Number of neurons.
    """

    method: str
    amount: float
    weights: int
    mitigation: Mitigation | None
    prompts: Sequence[str] = ()
    neurons: int = 0


def in_turn(run: Run, found: pd.DataFrame) -> list[str]:
    """Return memorized prompts, VM and TM in turn, those with a planted image first."""
    found = memorized(found)
    turn, without = found.groupby("kind").cumcount(), ~has_image(run.rows(found["prompt"]))
    return found["prompt"].iloc[np.lexsort((turn, without))].tolist()


def weights_of(run: Run, neurons: NeuronSet) -> int:
    """Return how many weights compute neurons."""
    rows = zip(neurons.counts, value_layers(run.pipe.unet), strict=True)
    return sum(count * layer.module.in_features for count, layer in rows)


def repairs(run: Run, found: pd.DataFrame, measured: Sequence[str]) -> list[Repair]:
    """Return the untouched model, unions of the neurons of more and more prompts, and Wanda at several sparsities, with a control.

    Source: Chavhan et al. (arXiv 2406.18566) for Wanda, which is given all measured prompts, and as many holdout prompts as
        base.

    Args:
        run: The run; its profile says which unions and sparsities.
        found: Localizations.
        measured: Memorized prompts whose images will be measured; one of the unions is that of all of them.
    """
    chosen, order = run.profile.beyond.pruning, in_turn(run, found)
    sets, made = by_prompt(memorized(found)), [Repair(UNTOUCHED, 0, 0, None)]
    for number in sorted({min(number, len(order)) for number in (*chosen.unions, len(measured))}):
        neurons = reduce(or_, map(sets.get, order[:number]))
        changed, item = weights_of(run, neurons), DeactivatedNeurons(neurons)
        made.append(Repair(NEMO, number, changed, item, order[:number], len(neurons)))
    base, settings = run.prompts("holdout")["caption"].head(len(measured)), run.profile.generation
    common = {"first": chosen.first, "guidance": settings.guidance, "together": max(1, settings.batch_size // 2)}
    seen = run.compute(measuring_inputs, [*measured, *base], label="feed-forward inputs", **common)
    for sparsity in chosen.sparsities:
        masks = wanda_masks(run.pipe.unet, seen[: len(measured)], seen[len(measured) :], sparsity=sparsity)
        made.append(_zeroed(WANDA, sparsity, {name: mask.cpu().numpy() for name, mask in masks.items()}, measured))
    mixed = {name: stream(0, RANDOM, name).permutation(mask.cpu().numpy().ravel()) for name, mask in masks.items()}
    made.append(_zeroed(RANDOM, sparsity, mixed, measured))
    return made


def _zeroed(method: str, sparsity: float, masks: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Repair:
    """Return the model in which the weights of masks are zero."""
    bits = {name: np.packbits(mask).tobytes() for name, mask in masks.items()}
    return Repair(method, sparsity, sum(int(mask.sum()) for mask in masks.values()), PrunedWeights(bits), prompts)


def repaired_prompts(
    run: Run, repairs: Sequence[Repair], measured: Sequence[str], others: Sequence[str]
) -> pd.DataFrame:
    """Return what repairs do to memorized and to other prompts, all on the same seeds.

    Args:
        run: The run.
        repairs: What is pruned, nothing first (`repairs`).
        measured: Memorized prompts.
        others: Prompts that are not memorized.

    Returns:
        One row per repair and prompt: columns method, amount, neurons, weights, fid (of all images of other prompts, from
        those of the untouched model with other seeds, mean over halves of the seeds; missing where there are too few), kind (vm, tm, unmemorized), prompt, inside (whether the repair was made for it), and those of
        `nemolib.run.Run.measure`.
    """
    settings, parts, reference = replace(run.profile.generation, samples=run.profile.beyond.pruning.samples), [], None
    rows = pd.concat([run.rows(measured), pd.DataFrame({"caption": others, "kind": "unmemorized"})], ignore_index=True)
    for quiet, item in under_one_bar(run, repairs, "repairs"):
        values = quiet.measure(rows, item.mitigation, settings=settings)
        features = quiet.features("quality", others, item.mitigation, settings=settings)
        reference = features if reference is None else reference
        part = rows[["kind", "caption"]].rename(columns={"caption": "prompt"})
        labels = {name: getattr(item, name) for name in ("method", "amount", "neurons", "weights")}
        part = part.assign(**labels, fid=_fid(reference, features), inside=part["prompt"].isin(item.prompts))
        parts.append(pd.concat([part, values], axis=1))
    return pd.concat(parts, ignore_index=True)


def _fid(reference: np.ndarray, features: np.ndarray) -> float:
    """Return the distance of features [prompt, seed, feature], of half of the seeds, from the other half of a reference."""
    prompts, samples, size = features.shape
    if prompts * (samples // 2) < 2:
        return np.nan
    pairs = [(reference[:, first], features[:, other]) for first, other in halves(samples)]
    return float(np.mean([metrics.fid(*(part.reshape(-1, size) for part in pair)) for pair in pairs]))


def summary(repaired_prompts: pd.DataFrame) -> pd.DataFrame:
    """Return medians over prompts.

    Returns:
        One row per repair: columns method, amount, neurons, weights, fid, name, vm and tm (similarity to the planted image,
        those that the repair was made for or that are untouched alone), outside (the same of the other memorized prompts),
        copies (share of VM prompts with a copy), a_clip and sscd_gen (of unmemorized prompts), prompts (VM prompts).
    """
    rows, keys = [], ["method", "amount", "neurons", "weights", "fid"]
    for key, part in repaired_prompts.groupby(keys, sort=False, dropna=False):
        row, known = dict(zip(keys, key, strict=True)), part[part["kind"] != "unmemorized"]
        meant = known if row["method"] == UNTOUCHED else known[known["inside"]]
        kinds, other = dict(list(meant.groupby("kind"))), part[part["kind"] == "unmemorized"]
        row |= {kind: kinds[kind]["sscd_orig"].median() if kind in kinds else np.nan for kind in ("vm", "tm")}
        largest = kinds["vm"]["sscd_orig_max"].dropna() if "vm" in kinds else []
        row["copies"] = metrics.memorization_rate(largest) if len(largest) else np.nan
        row |= {"prompts": len(largest), "outside": known.loc[~known["inside"], "sscd_orig"].median()}
        rows.append(row | {name: other[name].median() for name in ("a_clip", "sscd_gen")})
    return pd.DataFrame(rows).assign(name=[named(row["method"], row["amount"]) for row in rows])


def named(method: str, amount: float) -> str:
    """Return what a repair is called."""
    if method == NEMO:
        return f"NeMo, {amount:g} prompt{'s' * (amount != 1)}"
    return method if method == UNTOUCHED else f"{method}, {100 * amount:g} %"


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a summary that were made for the same prompts: untouched, one union, Wanda and its control."""
    most = table.loc[table["method"] == NEMO, "prompts"].idxmax()
    return table[(table["method"] != NEMO) | (table.index == most)]


def read_repairs(repaired_prompts: pd.DataFrame) -> Iterator[Claim]:
    """Yield what NeMo's paper and Kowalczuk et al. say of pruned neurons and weights, and whether it is so here."""
    repaired_prompts = repaired_prompts[repaired_prompts["method"] != RANDOM]
    table, parts = compared(summary(repaired_prompts)), repaired_prompts.groupby(["method", "amount", "kind"])
    none, nemo, wanda, most = table.iloc[[0, 1, 2, -1]].itertuples()
    others, secondary = "share of the A_CLIP of other prompts that stays", "Kowalczuk et al. (ICML 2026, secondary)"
    for text, row, kind, bound, theirs in (
        ("neurons of many prompts, pruned together, take the copies of all of them", nemo, "vm", {"at_most": 0.5},
         f"{secondary}, each prompt with its own: 0.90, 0.33"),
        ("pruning the neurons of many prompts costs other prompts little", nemo, "unmemorized", {"at_least": 0.9},
         "Figure 5a: no significant loss of quality with up to 750 neurons"),
        (f"{wanda.name} of each row, takes the copies", wanda, "vm", {"at_most": 0.5}, f"{secondary}: 0.90, 0.20"),
        (f"{most.name} of each row, costs other prompts", most, "unmemorized", {"at_most": 0.9},
         f"{secondary}: quality collapses at 10 %"),
    ):  # fmt: skip
        column, of = ("sscd_orig", LEFT) if kind == "vm" else ("a_clip", others)
        values, before = (parts.get_group((each.method, each.amount, kind))[column] for each in (row, none))
        numbers = {"ours": f"untouched {before.median():.2f}, {row.name} {values.median():.2f}", "paper": theirs}
        numbers |= {"n": f"{len(values)} {'VM ' * (kind == 'vm')}prompts", "interval": median_interval(values)}
        yield effect(text, values.median() / before.median(), of, **bound, **numbers)


# Figures and tables


@exhibit("", "what pruning takes and what it costs", read=read_repairs)
def show_repaired_prompts(repaired_prompts: pd.DataFrame) -> pd.DataFrame:
    """NeMo: the neurons of so many prompts together; random: as many feed-forward weights as Wanda above it.

    Weights: how many are zero. VM, TM: similarity to the planted image (SSCD_Orig), of prompts that the repair
    was made for; memorized others: of those that it was not made for. Then unmemorized prompts: alignment
    (A_CLIP), and distance of the images as a set from others of the untouched model (FID; few images, so that
    only rows can be compared). Medians over prompts.
    """
    names = {"name": "pruned", "weights": "weights", "vm": "VM", "tm": "TM", "outside": "memorized others"}
    names |= {"a_clip": "A_CLIP, others", "fid": "FID, others"}
    return summary(repaired_prompts)[list(names)].round(2).rename(columns=names)


@exhibit("", "neurons of more and more prompts pruned")
def union_curve(repaired_prompts: pd.DataFrame) -> Figure:
    """Points are prompts, filled those whose neurons are pruned, hollow all others; lines are medians.

    Left: memorized prompts; middle and right: prompts that are not memorized; dotted: the untouched model
    compared with itself.
    """
    rows, other = repaired_prompts[repaired_prompts["method"].isin((UNTOUCHED, NEMO))], ROLES["unmemorized"]
    ticks = rows.drop_duplicates("amount").reset_index(drop=True)
    at = pd.Series(pd.factorize(rows["amount"], use_na_sentinel=False)[0], rows.index)
    looks = {("sscd_orig", kind): ROLES[kind] for kind in ("vm", "tm")}
    looks |= {("a_clip", "unmemorized"): replace(other, label=f"{plots.METRICS['a_clip']}, {other.label}", line="-")}
    gen = {"label": f"{plots.METRICS['sscd_gen']}, {other.label}", "marker": "s"}
    looks |= {("sscd_gen", "unmemorized"): replace(other, **gen)}
    with plots.panels(1, 3, aspect=0.42) as (figure, axes):
        for (name, kind), look in looks.items():
            part, place = rows[rows["kind"] == kind], axes[int(kind == "unmemorized")]
            # What has another marker stands a little to the right.
            small = look.line_style(linestyle="", markersize=3, alpha=0.7, label="_")
            across = at[part.index] + (look.marker == "s") / 10
            for inside, points in part.groupby("inside"):
                fill = {} if inside else {"markerfacecolor": "white"}
                place.plot(across[points.index], points[name], **small | fill)
            label = f"{look.label}, n = {part['prompt'].nunique()}"
            medians = part.groupby(across)[name].median()
            place.plot(medians.index, medians, **look.line_style(label=label, markevery=[]))
        axes[2].plot(ticks.index, ticks["fid"], **other.line_style(linestyle="-", label="_"))
        axes[2].axhline(ticks["fid"].iloc[0], color="black", linestyle=":", linewidth=0.8)
        labels = ["0", *(f"{row.neurons}\n({row.amount:g})" for row in ticks.iloc[1:].itertuples())]
        for place, label in zip(axes, ("copy similarity", "similarity", "FID"), strict=True):
            place.set_xticks(ticks.index, labels)
            place.set(xlabel="neurons pruned\n(of how many prompts)", ylabel=label)
        plots.legend_below(figure, columns=2)
    return figure


@exhibit("", "copies against other prompts")
def trade_off(repaired_prompts: pd.DataFrame) -> Figure:
    """Each point is a model with something pruned; beside it of how many prompts the neurons are, or the sparsity.

    Copy similarity: median of the VM prompts that it was made for. The upper left corner would be free of
    copies, and of cost to other prompts.
    """
    table = summary(repaired_prompts)
    with plots.panels(1, 2, aspect=0.45) as (figure, axes):
        for place, name in zip(axes, ("a_clip", "sscd_gen"), strict=True):
            for method, look in METHODS.items():
                rows = table[table["method"].isin((UNTOUCHED, method))]
                place.plot(rows["vm"], rows[name], **look.line_style())
                for row in rows.iloc[1:].itertuples() if method != RANDOM else ():
                    text = row.name.split(", ")[1].split(" p")[0]
                    at, below = (row.vm, getattr(row, name)), method == NEMO
                    shift, ha, va = ((5, -4), "left", "top") if below else ((-4, 4), "right", "bottom")
                    style = {"ha": ha, "va": va, "fontsize": plots.TICK_SIZE, "bbox": LABEL}
                    place.annotate(text, at, xytext=shift, textcoords="offset points", **style)
            place.margins(0.1)
            place.plot(*rows.iloc[0][["vm", name]], "k*", markersize=6, label=UNTOUCHED)
            place.set(xlabel="copy similarity, VM prompts", ylabel=f"{plots.METRICS[name]}, other prompts")
        plots.legend_below(figure, columns=2)
    return figure


def repair_images(run: Run, repairs: Sequence[Repair], prompts: Sequence[str], others: Sequence[str]) -> Grid:
    """Return images of memorized prompts, below each another prompt, for repairs: the first seed, the planted image first.

    The other prompt is an ordinary one of the same subject, where the prompt table names it, else one of ``others``.
    """
    rows, few = run.rows(prompts), replace(run.profile.generation, samples=1)
    settings = replace(few, samples=run.profile.beyond.pruning.samples)
    others = ordinary(rows) or others
    pairs = (prompts, settings), (others[: len(prompts)], few)
    # [repair, memorized or other, prompt, height, width, 3]
    made = np.stack(
        [[run.images(part, item.mitigation, settings=each)[:, 0] for part, each in pairs] for item in repairs]
    )
    first = np.full_like(made[:1], 255)
    first[0, 0] = run.planted_like(rows, made[0, 0])
    images = np.concatenate([first, made]).swapaxes(0, 2).reshape(-1, 1 + len(repairs), *made.shape[3:])
    names = [name for pair in zip(prompts, others, strict=False) for name in pair]
    columns = (PLANTED, *(named(item.method, item.amount) for item in repairs))
    return Grid(images, tuple(names), columns)


@exhibit("", "memorized prompts and ordinary ones of the same subject, after each repair")
def show_repair_images(repair_images: Grid, repaired_prompts: pd.DataFrame) -> Figure:
    """A column is a model, a row a prompt; all images are of one seed.

    NeMo and Wanda were given the same prompts; random: as many weights of each layer as Wanda beside it.
    """
    kinds = repaired_prompts.drop_duplicates("prompt").set_index("prompt")["kind"]
    return plots.image_grid(repair_images, kinds=kinds)


# Exercises of notebook 07


def _kept_elsewhere(run: Run) -> float:
    """Return the share of their copy similarity that VM prompts keep whose neurons are not pruned, with the fewest pruned."""
    vm = run.load("repaired_prompts").query("kind == 'vm'").set_index("prompt")
    few = vm[(vm["method"] == NEMO) & (vm["amount"] == vm.loc[vm["method"] == NEMO, "amount"].min()) & ~vm["inside"]]
    return few["sscd_orig"].median() / vm.loc[vm["method"] == UNTOUCHED, "sscd_orig"].loc[few.index].median()


def _first(run: Run) -> tuple[pd.DataFrame, NeuronSet]:
    """Return the row of the first VM prompt and its neurons."""
    return (row := run.prompts("vm").head(1)), run.search(row["caption"].tolist())[0].neurons


EXERCISES = {
    "07.1": lambda run: weights_of(run, _first(run)[1]),
    "07.2": _kept_elsewhere,
    "07.3": lambda run: run.measure(_first(run)[0], DeactivatedNeurons(_first(run)[1], 0.5))["sscd_orig"][0],
}
"""The right answers (`nemolib.exercises.check`)."""
