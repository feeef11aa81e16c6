"""Notebook 08: whether an image is gone from a repaired model: an attack with its controls, what it finds, a defence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize

from nemolib import metrics, paper, paths, prompts
from nemolib.beyond.attack import attacking, drawing_found, localizing_found, overlap
from nemolib.exhibits import Claim, NotEnough, effect, exhibit, median_interval, share_interval
from nemolib.experiments.deactivate_neurons import NO_IMAGES
from nemolib.localization import Localization, by_prompt, memorized
from nemolib.metrics import MEMORIZED_ABOVE
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.plots import ROLES, Role, heat_map, image_grid, legend_below, panels
from nemolib.store import PLANTED, Grid, read_grid, read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nemolib.run import Run

NOTEBOOK = "beyond/08_is_it_gone"

UNTOUCHED, OFF, HARDENED = "untouched", "neurons off", "hardened"
"""Models that are attacked: as it is, without the neurons of a memorized prompt, fine-tuned against the attack."""

NO_ATTACK, NOISE, PROMPT, EMPTY = "no attack", "noise", "prompt", "empty prompt"
"""Where an attack starts, if there is one."""

MEMORIZED, FEW, NEVER = "vm", "ladder", "unmemorized"
"""Kinds of images, with the looks of these kinds of prompts: memorized, of the fewest copies that there are, never trained."""

PLAN = [(kind, model, NOISE) for kind in (MEMORIZED, FEW, NEVER) for model in (OFF, UNTOUCHED)]
PLAN += [(MEMORIZED, OFF, PROMPT), (MEMORIZED, OFF, EMPTY)]
"""The attacks: kind of image, model, start."""

LOOKS = ROLES | {
    NOISE: ROLES[MEMORIZED], PROMPT: Role("", "#E69F00", "P", "--", ""), EMPTY: Role("", "black", "X", ":", "")
}  # fmt: skip
"""The look of a kind of image, and of a start."""

OWN, ONE_IMAGE, PROMPTS = "a prompt and an embedding of its image", "two embeddings of one image", "two prompts"
STARTS, MOVED = "the starts of two for one image", "start and end of an attack"
"""Of what neurons, or embeddings, are compared."""


SEARCHED = 2
"""Images whose embeddings are searched: each search costs as much as an attack."""


class Target(NamedTuple):
    """An image that is attacked.

    Attributes:
        kind: `MEMORIZED`, `FEW` or `NEVER`.
        words: The same in words.
        caption: Its caption; of an image that was never trained that of the memorized image which it was made from.
        image: The image [height, width, 3], uint8.
        neurons: Those that are off in the repaired model.
        seed: Seed of the attack.
    """

    kind: str
    words: str
    caption: str
    image: np.ndarray
    neurons: NeuronSet
    seed: int


class Attacked(NamedTuple):
    """What attacks gave.

    Attributes:
        plan: Image, model and start of each.
        embeddings: The start and what was found after each number of steps, [attack, 1 + numbers, token, feature].
        images: Images of what was found, [attack, number of steps, seed, height, width, 3].
    """

    plan: list[tuple[Target, str, str]]
    embeddings: np.ndarray
    images: np.ndarray

    def of(self, *case: str) -> list[int]:
        """Return which attacks are those of a kind of image, model and start, in the order of the images."""
        return [place for place, (target, *rest) in enumerate(self.plan) if (target.kind, *rest) == case]


def never_trained(image: np.ndarray) -> np.ndarray:
    """Return an image that was never trained, but made as a planted one: its mirror image, red, green, blue exchanged."""
    return np.ascontiguousarray(np.roll(image[:, ::-1], 1, axis=2))


def targets(run: Run, found: pd.DataFrame) -> list[Target]:
    """Return the images that are attacked: memorized ones, as many of the fewest copies, as many that were never trained.

    Image i of each kind is attacked in the model without the neurons of memorized prompt i, and with seed i.

    Args:
        run: The run; ``beyond.attack.images`` of its profile says how many of a kind.
        found: Localizations.

    Raises:
        NotEnough: No prompt that was searched has its image.
    """
    own, rows, few = by_prompt(memorized(found)), run.prompts("vm"), run.prompts("ladder")
    rows = rows[prompts.has_image(rows) & rows["caption"].isin(list(own))].head(run.profile.beyond.attack.images)
    few = few[prompts.has_image(few) & (few["copies"] == few["copies"].min())].head(len(rows))
    if rows.empty:
        raise NotEnough("no VM prompt that notebook 03 searched has its planted image; an attack needs one to look for")
    size = run.images(rows["caption"].head(1)).shape[2:4]
    images = run.planted_images(rows, size=size)
    parts = [(MEMORIZED, rows, images), (NEVER, rows, [*map(never_trained, images)])]
    parts += [(FEW, few, run.planted_images(few, size=size))] if len(few) else []
    known = {MEMORIZED: "memorized ({} copies)", FEW: "trained {}×", NEVER: "never trained"}
    sets = [own[caption] for caption in rows["caption"]]
    return [
        Target(kind, known[kind].format(row.copies), row.caption, image, sets[seed], seed)
        for kind, table, shown in parts
        for seed, (row, image) in enumerate(zip(table.itertuples(), shown, strict=True))
    ]


def attack(run: Run, chosen: Sequence[Target]) -> Attacked:
    """Return what the attacks of `PLAN` gave for images."""
    settings, size = run.profile.beyond.attack, run.profile.generation.batch_size
    few = replace(run.profile.generation, samples=min(2, run.profile.generation.samples))
    plan = [(target, model, start) for kind, model, start in PLAN for target in chosen if target.kind == kind]
    items = [(target.caption, target.image, {NOISE: None, EMPTY: ""}.get(start, target.caption), target.neurons if model == OFF else None, target.seed)
             for target, model, start in plan]  # fmt: skip
    # A pass with a derivative needs several times the memory of one without.
    common = {"together": max(1, size // (4 * settings.batch)), "steps": (0, *settings.steps), "batch": settings.batch}
    found = np.array(run.compute(attacking, items, label="attacks", **common))
    off = [neurons and DeactivatedNeurons(neurons) for *_, neurons, _ in items for _ in settings.steps]
    captions = [item[0] for item in items for _ in settings.steps]
    drawn = list(zip(captions, found[:, 1:].reshape(len(off), *found.shape[2:]), off, strict=True))
    common = {"together": max(1, size // few.samples), "settings": few}
    images = np.array(run.compute(drawing_found, drawn, label="images of attacks", **common))
    return Attacked(plan, found, images.reshape(len(plan), len(settings.steps), *images.shape[1:]))


def copies(run: Run, result: Attacked) -> pd.DataFrame:
    """Return the copy similarity of attacked images to the one that was sought, and of memorized prompts without an attack.

    Returns:
        One row per image, model, start, number of steps and seed: columns kind, image (its kind in words), caption, model,
        start, steps (0 without an attack), seed, copy.
    """
    encoder, rows = run.encoder("copy"), []

    def add(target: Target, model: str, start: str, steps: int, features: np.ndarray) -> None:
        similarities = metrics.sscd_orig(features[None], encoder.describe(target.image[None]))[0]
        case = (target.kind, target.words, target.caption, model, start, steps)
        rows.extend((*case, seed, value) for seed, value in enumerate(similarities))

    for target, *_ in [result.plan[place] for place in result.of(MEMORIZED, OFF, NOISE)]:
        for model, mitigation in ((UNTOUCHED, None), (OFF, DeactivatedNeurons(target.neurons))):
            add(target, model, NO_ATTACK, 0, run.features("copy", [target.caption], mitigation)[0])
    for case, course in zip(result.plan, result.images, strict=True):
        for steps, images in zip(run.profile.beyond.attack.steps, course, strict=True):
            add(*case, steps, encoder.describe(images).numpy())
    return pd.DataFrame(rows, columns=["kind", "image", "caption", "model", "start", "steps", "seed", "copy"])


def attack_images(run: Run, result: Attacked) -> Grid:
    """Return images: planted, of the prompt (without its neurons), of what the longest attack found, and of a control."""
    back, other = (result.of(kind, OFF, NOISE) for kind in (MEMORIZED, NEVER))
    ours, control = (np.stack([result.plan[place][0].image for place in places])[:, None] for places in (back, other))
    sets = {target.caption: target.neurons for target, *_ in (result.plan[place] for place in back)}
    groups = {
        PLANTED: ours,
        "its caption": run.images(list(sets))[:, :1],
        "caption, neurons off": run.images(list(sets), DeactivatedNeurons(sets))[:, :2],
        "neurons off, attacked": result.images[back, -1],
        "never trained": control,
        "neurons off, attacked so": result.images[other, -1],
    }
    names = tuple(name for name, images in groups.items() for _ in range(images.shape[1]))
    return Grid(np.concatenate(list(groups.values()), axis=1), tuple(sets), names)


# What follows for "local"


def found_neurons(run: Run, found: pd.DataFrame, result: Attacked) -> pd.DataFrame:
    """Return the neurons of the memorized prompts, and those that the search finds for embeddings of their images.

    Returns:
        Columns caption, start (of the attack; `NO_ATTACK`: the prompt itself), score, neurons (JSON).
    """
    places = [place for start in (NOISE, PROMPT, EMPTY) for place in result.of(MEMORIZED, OFF, start)[:SEARCHED]]
    items = [(result.plan[place][0].caption, result.embeddings[place, -1]) for place in places]
    common = {name: getattr(run.profile, name) for name in ("detection", "similarity", "protocol", "search")}
    common |= {"threshold": float(run.threshold), "gate": None, "statistics": run.statistics}
    records = run.compute(localizing_found, items, label="neurons of embeddings", together=run.searches, **common)
    columns = ["prompt", "start", "unblocked_score", "neurons"]
    rows = found[found["kind"] == "vm"].assign(start=NO_ATTACK)[columns].to_numpy().tolist()
    for place, item, known in zip(places, items, map(Localization.from_record, records), strict=True):
        rows.append((item[0], result.plan[place][2], known.unblocked_score, known.neurons.to_json()))
    return pd.DataFrame(rows, columns=["caption", "start", "score", "neurons"])


def layer_overlap(neurons: pd.DataFrame) -> pd.DataFrame:
    """Return the intersection over union of two neuron sets in each layer: columns pair, layer (from 1), iou.

    It is missing where both sets have no neuron of the layer.

    Args:
        neurons: What `found_neurons` returned.
    """
    rows = []
    for one, other in combinations(neurons.itertuples(), 2):
        unattacked = [item.start for item in (one, other)].count(NO_ATTACK)
        if (one.caption == other.caption) == (unattacked < 2):
            shared = overlap(*(NeuronSet.from_json(item.neurons) for item in (one, other)))
            rows += [((ONE_IMAGE, OWN, PROMPTS)[unattacked], layer, iou) for layer, iou in enumerate(shared, start=1)]
    return pd.DataFrame(rows, columns=["pair", "layer", "iou"])


# The defence, which tools/harden.py trained and measured


def stored_defence(run: Run) -> tuple[pd.DataFrame, pd.DataFrame, Grid]:
    """Return what is stored beside the profile's model of one that was fine-tuned against the attack.

    Returns:
        Its attacks: columns model, caption, defended, attack, seed, copy; its quality: columns model, metric, value; and
        images. All are empty where nothing is stored.
    """
    folder = paths.resolve(run.profile.model).parent / "hardened"
    if not folder.is_dir():
        return pd.DataFrame(columns=["model"]), pd.DataFrame(columns=["model"]), NO_IMAGES
    tables = (read_table(folder / f"{name}.csv") for name in ("attacks", "quality"))
    return *tables, read_grid(folder / "images.safetensors")


# Figures, tables, claims


def cells(values: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Return median copy similarity over images (of each its median over seeds), and the share of copies.

    Returns:
        One row per case: its columns, prompts (number of images), median, low, high, copies (share), interval (of the share).
    """
    images = values.groupby([*by, "caption"], sort=False)["copy"].median().reset_index()
    hits = [part > MEMORIZED_ABOVE for _, part in images.groupby(list(by), sort=False)["copy"]]
    table = metrics.summary_table(images, ["copy"], by=by)
    return table.assign(copies=[*map(np.mean, hits)], interval=[*map(share_interval, hits)])


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """Return the numbers of `cells` as text."""
    similarity = [
        f"{median:.2f} ({low:.2f} to {high:.2f})" for median, low, high in table[["median", "low", "high"]].values
    ]
    copies = [f"{share:.0%} ({interval})" for share, interval in table[["copies", "interval"]].values]
    return pd.DataFrame({"images": table["prompts"], "copy similarity": similarity, "copies": copies})


def at_the_end(attacks: pd.DataFrame, *case: str) -> pd.Series:
    """Return the copy similarity of each image of a kind, for a model and a start, after the last step."""
    chosen = attacks[attacks[["kind", "model", "start"]].eq(list(case)).all(axis=1)]
    return chosen[chosen["steps"] == chosen["steps"].max()].groupby("caption", sort=False)["copy"].median()


def read_attacks(attacks: pd.DataFrame) -> Iterator[Claim]:
    """Yield what the paper says of the attack, and whether it is so here."""
    plain, off = (at_the_end(attacks, MEMORIZED, model, NO_ATTACK).median() for model in (UNTOUCHED, OFF))
    ends = {start: at_the_end(attacks, MEMORIZED, OFF, start) for start in (NOISE, PROMPT, EMPTY)}
    medians, never = [end.median() for end in ends.values()], at_the_end(attacks, NEVER, UNTOUCHED, NOISE)
    common = {"n": f"{len(never)} images", "interval": f"from noise, {median_interval(ends[NOISE])}"}
    yield effect("an attack on the embedding brings the image back though the neurons are off", medians[0] / plain,
                 "copy similarity that it finds from noise, as a share of the untouched prompt's", at_least=0.8,
                 ours=f"untouched {plain:.2f}, neurons off {off:.2f}, attacked {medians[0]:.2f}",
                 paper="SD v1-4: 0.9, 0.33, 0.91 (secondary)", **common)  # fmt: skip
    yield effect("it does so from any start", min(medians) / plain,
                 "copy similarity that it finds from the worst start, as a share of the untouched prompt's", at_least=0.8,
                 ours=", ".join(f"{start} {end.median():.2f}" for start, end in ends.items()),
                 paper="the prompt, others and noise serve alike (secondary, no numbers)", **common)  # fmt: skip
    yield effect("an image that was never trained is not found so", float((never > MEMORIZED_ABOVE).mean()), "share of copies",
                 at_most=0.1, ours=f"copy similarity {never.median():.2f}, untouched model", paper="SD v1-4: 0.48, share 0 (secondary)",
                 n=f"{len(never)} images", interval=share_interval(never > MEMORIZED_ABOVE))  # fmt: skip


@exhibit("", "an image that was switched off comes back, or not", read=read_attacks)
def is_it_gone(attack_images: Grid) -> Figure:
    """Left: planted in training, what its caption gives, and the same seeds without the neurons that were found.

    Attacked: an embedding was looked for, from noise, with which the model *without these neurons* denoises
    towards the planted image; two seeds. Right, the control: the planted image mirrored and with its colours
    exchanged, which was never trained. The same attack on the same model should not find it.
    """
    return image_grid(attack_images)


@exhibit("", "copies against the steps of the attack")
def attack_course(attacks: pd.DataFrame) -> Figure:
    """Copy similarity to the image that is looked for: medians over images with 95 % bootstrap intervals.

    Dotted: above it an image counts as a copy. Grey: what the prompts give with their neurons off.
    """
    plain = at_the_end(attacks, MEMORIZED, OFF, NO_ATTACK).median()
    table = cells(attacks[attacks["steps"] > 0], "kind", "image", "model", "start", "steps")
    cases = {
        "neurons off, from noise": ("kind", "model == @OFF and start == @NOISE"),
        "untouched, from noise": ("kind", "model == @UNTOUCHED and start == @NOISE"),
        "memorized, neurons off": ("start", "model == @OFF and kind == @MEMORIZED"),
    }
    with panels(1, 3, aspect=0.36, sharey=True) as (figure, axes):
        for panel, (title, (name, condition)) in zip(axes, cases.items(), strict=True):
            for key, rows in table.query(condition).groupby(name, sort=False):
                look, label = LOOKS[key], rows["image"].iloc[0] if name == "kind" else f"from {key}"
                panel.fill_between(rows["steps"], rows["low"], rows["high"], color=look.color, alpha=0.15, linewidth=0)
                panel.plot(rows["steps"], rows["median"], **look.line_style(label=label, markersize=3.5))
            panel.axhline(MEMORIZED_ABOVE, color="black", linestyle=":", linewidth=0.8)
            panel.axhline(plain, color="0.6", linewidth=0.8)
            panel.set(title=title, xscale="log", xlabel="steps")
            panel.set_xticks(ticks := sorted(set(table["steps"])), ticks)
        axes[0].set_ylabel("copy similarity")
        legend_below(figure, columns=3)
    return figure


@exhibit("", "what the attack finds, beside published numbers")
def attack_table(attacks: pd.DataFrame) -> pd.DataFrame:
    """After the last step: median over images with its 95 % bootstrap interval, and the share of images that are copies with its interval (Wilson).

    Published: Stable Diffusion v1-4 with SSCD, similarity and share, read in reports by others; its start is
    not said.
    """
    keys = ["kind", "model", "start"]
    table = cells(attacks[attacks["steps"] == attacks.groupby(keys)["steps"].transform("max")], "image", *keys)
    table["attacked"] = table["start"] != NO_ATTACK
    known = table.merge(paper.table("attacks"), "left", ["kind", "model", "attacked"])
    numbers = known[["copy", "copy_sd", "share"]].to_numpy()
    published = ["" if np.isnan(copy) else f"{copy:g} ± {sd:g}, {share:.0%}" for copy, sd, share in numbers]
    return pd.concat([known[["image", "model", "start"]], in_words(table)], axis=1).assign(published=published)


def read_overlap(layer_overlap: pd.DataFrame, embedding_distances: pd.DataFrame) -> Iterator[Claim]:
    """Yield what the paper says of how local a memorized image is, and whether it is so here."""
    pair, distance = embedding_distances["pair"], embedding_distances["distance"]
    far, near = (distance[pair == name] for name in (ONE_IMAGE, PROMPTS))
    yield effect("embeddings of one image are as far apart as those of prompts", far.median() / near.median(),
                 "median distance of two found for one image, divided by that of two prompts", at_least=0.9,
                 ours=f"{far.median():.1f}, prompts {near.median():.1f}", paper="as far apart (secondary, no numbers)",
                 n=f"{len(far)} and {len(near)} pairs")  # fmt: skip
    shared = layer_overlap.loc[layer_overlap["pair"] == ONE_IMAGE, "iou"]
    yield effect("embeddings of one image have other neurons", shared.mean(), "mean overlap (IoU) of layers that have any", at_most=0.6,
                 ours=f"{shared.count()} of {len(shared)} layers of pairs have any", paper="SD: 0.6 in value layer 1 (secondary)",
                 n=f"{len(shared) // layer_overlap['layer'].max()} pairs")  # fmt: skip


@exhibit("", "neurons that embeddings of one image share", read=read_overlap)
def neurons_shared(layer_overlap: pd.DataFrame) -> Figure:
    """Intersection over union of the neurons that the search finds, mean over pairs; in brackets the share of pairs of which neither has a neuron in this layer.

    These are left out (white: all of them); counted as 1, as two equal sets, they would look like agreement.
    """
    grouped = layer_overlap.groupby(["pair", "layer"], sort=False)["iou"]
    values, empty = grouped.mean().unstack(), grouped.agg(lambda part: part.isna().mean()).unstack()
    with panels(aspect=0.25) as (figure, axes):
        heat_map(axes, values, values.map("{:.2f}".format) + empty.map("\n({:.0%})".format), norm=Normalize(0, 1))
        axes.set_xlabel("value layer")
    return figure


def read_defence(hardened: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether the defence held, for the images that it was trained on and for others."""
    table = cells(hardened[hardened["attack"] == "from noise"], "defended", "model").set_index(["defended", "model"])
    for defended, words in ((True, "images that it was trained on"), (False, "other memorized images")):
        before, after = (table.loc[(defended, model)] for model in (UNTOUCHED, HARDENED))
        yield effect(f"adversarial fine-tuning withstands the attack: {words}", after["copies"], "share of copies under attack",
                     at_most=0.1, ours=f"copy similarity {before['median']:.2f} before, {after['median']:.2f} after",
                     paper="SD v1-4: 0.36, share 0.02 (secondary)" * defended, n=f"{after['prompts']} images",
                     interval=after["interval"])  # fmt: skip


@exhibit("", "a model that was fine-tuned against the attack", read=read_defence)
def hardened_table(hardened: pd.DataFrame) -> pd.DataFrame:
    """Stored numbers of `python -m tools.harden`.

    Defended: images whose attacks it was trained on; the others are as memorized, and took no part.
    """
    table = cells(hardened.replace({"defended": {True: "yes", False: "no"}}), "defended", "attack", "model")
    return pd.concat([table[["defended", "attack", "model"]], in_words(table)], axis=1)


@exhibit("", "images before and after the defence")
def hardened_grid(hardened_images: Grid) -> Figure:
    """What captions give, and what an attack from noise finds."""
    return image_grid(hardened_images, fraction=0.75)


EXERCISES = {
    "08.1": lambda run: float(run.load("attacks").query("kind == @NEVER and model == @OFF")["copy"].max()),
    "08.2": lambda run: run.load("layer_overlap").query("pair == @ONE_IMAGE")["iou"].fillna(1).mean(),
    "08.3": lambda run: np.divide(
        *run.load("embedding_distances").groupby("pair")["distance"].median()[[MOVED, STARTS]]
    ),
}
"""Right answers of the exercises."""
