"""Notebook 09: detectors against copies and cost, the tokens that betray a prompt, and a search for triggers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import seaborn as sns

from nemolib import metrics, paper, plots
from nemolib.beyond import detectors as methods
from nemolib.beyond.denoising import PUBLISHED_SIZE
from nemolib.beyond.triggers import searching, token_significance
from nemolib.exhibits import Claim, effect, exhibit, of_kinds
from nemolib.experiments import memorization_score
from nemolib.metrics import MEMORIZED_ABOVE
from nemolib.prompts import MEMORIZED, has_image, load_prompts
from nemolib.seeding import stream
from nemolib.store import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nemolib.run import Run

NOTEBOOK = "beyond/09_who_finds_it"

# Prompts that detectors are tested on. A prompt of the ladder has a copy if one of its images is above
# `metrics.MEMORIZED_ABOVE`; the first group is the next two together.
ALL, OFTEN, COPIED, QUIET = "all with a copy", "VM and TM", "ladder, with a copy", "ladder, without a copy"

# The ways to look for triggers.
WORDS, GIBBS, RANDOM = "every word alone", "climbing (Gibbs)", "random sentences"

EXERCISES = {
    "09.1": lambda run: _one_subject(run.load("detections").query("detector == 'bright ending'")),
    "09.2": lambda run: 1 / (1 + 999 * 0.01 / best_buy(run.load("detector_quality"))["tpr"]),
    "09.3": lambda run: run.load("trigger_draws").query("copy_similarity > @MEMORIZED_ABOVE")["copy_of"].nunique(),
}


def _one_subject(scores: pd.DataFrame) -> float:
    """Return the AUROC of the lowest rung against the unmemorized prompts of one subject."""
    ladder, clean = of_kinds(scores, "detections", "ladder", "unmemorized").values()
    alone = clean["subjects"].str.split().str.len() == 1
    return metrics.auroc(ladder.loc[ladder["copies"] == ladder["copies"].min(), "score"], clean.loc[alone, "score"])


# Detectors


def detectors_of(run: Run) -> tuple[methods.Detector, ...]:
    """Return the detectors with the settings of a profile: the same seed for all, so that few latents are the first of many.

    Deviates: the norm in the anisotropy is scaled to a latent of the published size, which its weight belongs to.
    """
    profile, own, config = run.profile, run.profile.beyond.detectors, run.pipe.unet.config
    scale = math.sqrt(PUBLISHED_SIZE / (config.in_channels * config.sample_size**2))
    common = {"seed": profile.detection.seed, "guidance": profile.generation.guidance, "samples": own.samples}
    special = dict.fromkeys(methods.Sampled.__subclasses__(), {"samples": own.sampling_samples, "steps": own.steps})
    special[methods.NoiseSimilarity] = {"samples": own.similarity_samples, "similarity": profile.similarity}
    special[methods.NoiseSimilarity] |= {"protocol": profile.protocol}
    special[methods.Anisotropy] = {"weights": (scale, 2.0)}
    return tuple(kind(**common | special.get(kind, {})) for kind in methods.DETECTORS)


def tested(run: Run) -> pd.DataFrame:
    """Return the prompts that are tested, those with an image with the columns of `memorization_score.copies`."""
    own = run.profile.beyond.detectors
    often = run.prompts(*MEMORIZED, most=own.memorized)
    planted = memorization_score.copies(run, pd.concat([often, run.prompts("ladder")], ignore_index=True))
    return pd.concat([planted, run.prompts("unmemorized", most=own.unmemorized)], ignore_index=True)


def detections(run: Run, prompts: pd.DataFrame) -> pd.DataFrame:
    """Return what each detector says of each prompt (of `tested`) with the first of its latents, the first two, and so on.

    Returns:
        The columns of the prompts, and detector, samples, score, evaluations.
    """
    detectors, latents = detectors_of(run), run.profile.beyond.detectors.samples
    common = {"detectors": detectors, "together": max(1, run.profile.generation.batch_size // latents)}
    found = run.compute(methods.detecting, prompts["caption"].tolist(), label="detectors", **common)
    return pd.DataFrame(
        {**row, "detector": detector.name, "samples": number, "score": score, "evaluations": evaluations}
        for row, each in zip(prompts.to_dict("records"), found, strict=True)
        for detector, said in zip(detectors, each, strict=True)
        for number, (score, evaluations) in enumerate(said, start=detector.least)
    )


def quality(detections: pd.DataFrame) -> pd.DataFrame:
    """Return how well each detector tells groups of prompts from the unmemorized ones.

    Returns:
        Columns detector, samples, evaluations (of a prompt), group (`ALL`, `OFTEN`, `COPIED`, `QUIET`; with all latents also
        each rung), copies (of a rung), prompts, auroc and, but for rungs, tpr (at 1 % false positives), with the ends of their 95 % bootstrap
        intervals (_low, _high); threshold (`methods.quantile_threshold`, where there are enough prompts) and found (the
        share above it).
    """
    rows, most = [], detections.groupby("detector")["samples"].max()
    for (detector, samples), part in detections.groupby(["detector", "samples"], sort=False):
        clean = of_kinds(part, "detections", "unmemorized")["unmemorized"]["score"].to_numpy()
        limit = methods.quantile_threshold(clean) if len(clean) >= 100 else math.nan
        often, ladder = part["kind"].isin(MEMORIZED), part["kind"] == "ladder"
        copied = ladder & (part["copy_max"] > MEMORIZED_ABOVE)
        groups = {ALL: often | copied, OFTEN: often, COPIED: copied, QUIET: ladder & ~copied}
        rungs = sorted(part.loc[ladder, "copies"].unique()) if samples == most[detector] else []
        groups |= {copies: ladder & (part["copies"] == copies) for copies in rungs}
        for group, chosen in filter(lambda item: item[1].any(), groups.items()):
            scores = part.loc[chosen, "score"].to_numpy()
            row = {"detector": detector, "samples": samples, "evaluations": part["evaluations"].iloc[0], "group": group}
            row |= {"copies": group if group in rungs else None, "prompts": len(scores), "threshold": limit}
            row["found"] = math.nan if math.isnan(limit) else float((scores > limit).mean())
            # A handful of prompts says nothing of one percent.
            for name, metric in (("auroc", metrics.auroc), ("tpr", metrics.tpr_at_fpr))[: 1 if group in rungs else 2]:
                low, high = metrics.interval(metric, scores, clean, resamples=200)
                row |= {name: metric(scores, clean), f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def of_group(quality: pd.DataFrame) -> pd.DataFrame:
    """Return the row of each detector for `ALL` with all of its latents, the cheapest first."""
    rows = quality[quality["group"] == ALL].sort_values(["evaluations", "detector"], kind="stable")
    return rows.groupby("detector", sort=False).tail(1).reset_index(drop=True)


def best_buy(quality: pd.DataFrame) -> pd.Series:
    """Return the row of the detector and number of latents that find as many prompts at 1 % false positives as any, at the least cost."""
    rows = quality[quality["group"] == ALL]
    return rows.sort_values(["tpr", "evaluations", "detector"], ascending=[False, True, True]).iloc[0]


def first_rung(values: pd.Series, least: float) -> str:
    """Return from which rung on (index: copies) all values reach a bound, in words."""
    reached = [copies for copies in values.index if (values.loc[copies:] >= least).all()]
    return f"{reached[0]:g} copies" if reached else "no rung"


def read_by_copies(detector_quality: pd.DataFrame, detector_prompts: pd.DataFrame) -> Iterator[Claim]:
    """Yield from how many copies on images are copies, and from how many each detector sees it."""
    ladder = of_kinds(detector_prompts, "detector_prompts", "ladder")["ladder"].groupby("copies")["copy_max"].median()
    yield Claim("the median prompt of a rung has a copy", f"from {first_rung(ladder, MEMORIZED_ABOVE)} on")
    curves = detector_quality.dropna(subset="copies").set_index("copies").groupby("detector", sort=False)["auroc"]
    seen = pd.Series({name: first_rung(curve, 0.9) for name, curve in curves})
    for rung, names in seen.groupby(seen, sort=False):
        yield Claim(f"AUROC of at least 0.9 from {rung} on", ", ".join(names.index))


@exhibit("", "where memorization begins, and where each detector sees it", read=read_by_copies)
def detectors_by_copies(detector_quality: pd.DataFrame, detector_prompts: pd.DataFrame) -> Figure:
    """First panel: the largest copy similarity of a prompt's images; points are prompts, the line is the median of a rung.

    Others: AUROC of the prompts of a rung against the unmemorized ones with its 95 % bootstrap interval; in
    brackets UNet evaluations per prompt. Shaded: rungs whose median prompt has a copy. Dotted: chance.
    """
    ladder = of_kinds(detector_prompts, "detector_prompts", "ladder")["ladder"]
    curves, look = detector_quality.dropna(subset="copies").groupby("detector", sort=False), plots.ROLES["ladder"]
    copied = ladder.groupby("copies")["copy_max"].median() > MEMORIZED_ABOVE
    with plots.panels(math.ceil((1 + len(curves)) / 4), 4, aspect=0.66, sharex=True) as (figure, axes):
        first, *others = axes.flat
        plots.rungs(first, ladder, "copy_max", look=look, label="_")
        first.set_title("copies among its images", fontsize=plots.TICK_SIZE - 0.5)
        for place, (name, rows) in zip(others, curves, strict=False):
            place.fill_between(rows["copies"], rows["auroc_low"], rows["auroc_high"], color="0.8", linewidth=0)
            place.plot(rows["copies"], rows["auroc"], "o-", color="black", markersize=2.5)
            place.set_title(f"{name} ({rows['evaluations'].iloc[0]})", fontsize=plots.TICK_SIZE - 0.5)
        for place in axes.flat:
            place.set(ylim=(-0.05, 1.08), visible=place.has_data())
            place.axhline(0.5, color=plots.GREY, linestyle=":", linewidth=plots.LINE * (place is not first))
            for copies in copied.index[copied]:
                place.axvspan(copies / 2**0.5, copies * 2**0.5, color=look.color, alpha=0.2, linewidth=0)
        if axes.ndim > 1 and not axes[-1, -1].has_data():
            axes[-2, -1].tick_params(labelbottom=True)
        first.set_xticks(copied.index[::2], [f"{copies:g}" for copies in copied.index[::2]])
        figure.supxlabel("copies in training", fontsize=plots.LABEL_SIZE)
        figure.supylabel("AUROC (first panel: copy similarity)", fontsize=plots.LABEL_SIZE)
    return figure


def read_by_cost(detector_quality: pd.DataFrame) -> Iterator[Claim]:
    """Yield which detector is worth its cost, what more latents give, and whether the literature's order holds."""
    best, rows = best_buy(detector_quality), of_group(detector_quality).set_index("detector")["auroc"]
    found = f"TPR {best['tpr']:.2f}, AUROC {best['auroc']:.2f}"
    text = f"most found at 1 % false positives for the least, chosen on the same {best['prompts']} prompts"
    yield Claim(text, f"{best['detector']}, latents: {best['samples']}, evaluations: {best['evaluations']}; {found}")
    theirs = paper.table("detectors").set_index("detector")["auroc"]
    good = rows[theirs.reindex(rows.index) >= 0.95]
    low, text = good.idxmin(), "detectors with an AUROC of at least 0.95 for Stable Diffusion work here"
    yield effect(text, good[low], "lowest AUROC of these", at_least=0.9, ours=low, paper=f"{low} {theirs[low]:.3f}",
                 n=f"{len(good)} detectors, {best['prompts']} prompts")  # fmt: skip


@exhibit("", "what detectors cost, and what they find", read=read_by_cost)
def detectors_by_cost(detector_quality: pd.DataFrame) -> Figure:
    """The cheapest first.

    Left: UNet evaluations per prompt. Middle and right: VM, TM and all prompts of the ladder that have a copy,
    against the unmemorized ones, with 95 % bootstrap intervals. Small: with the fewest latents. Hollow:
    reported for Stable Diffusion with other prompts (sources: table of detectors).
    """
    rows, theirs = of_group(detector_quality), paper.table("detectors").set_index("detector")
    fewest = detector_quality[detector_quality["group"] == ALL].groupby("detector").first().loc[rows["detector"]]
    color, height = plots.ROLES["ladder"].color, np.arange(len(rows))
    with plots.panels(1, 3, aspect=0.5, sharey=True, width_ratios=(2, 3, 3)) as (figure, axes):
        bars = axes[0].barh(height, rows["evaluations"], color="0.8", height=0.6)
        axes[0].bar_label(bars, padding=2, fontsize=plots.TICK_SIZE)
        axes[0].set_yticks(height, rows["detector"])
        axes[0].set(xlabel="evaluations", xlim=(0, 1.3 * rows["evaluations"].max()), ylim=(len(rows) - 0.5, -0.5))
        for place, name, label in ((axes[1], "auroc", "AUROC"), (axes[2], "tpr", "TPR at 1 % FPR")):
            place.hlines(height, rows[f"{name}_low"], rows[f"{name}_high"], color=color, linewidth=1.2)
            place.plot(fewest[name], height + 0.28, ".", color=color, markersize=3, label="fewest latents")
            place.plot(rows[name], height, "D", color=color, markersize=4, label="all latents")
            place.plot(
                theirs[name][rows["detector"]], height - 0.24, "ko", mfc="white", ms=3.5, label="for Stable Diffusion"
            )
            place.set(xlim=(-0.04, 1.04), xlabel=label)
        plots.legend_below(figure, columns=3)
    return figure


@exhibit("", "detectors in use: one threshold, and who reported what")
def detectors_table(detector_quality: pd.DataFrame) -> pd.DataFrame:
    """Found: prompts above the 99 % quantile of the unmemorized prompts (missing with fewer than 100 of them).

    Reported: AUROC / TPR at 1 % false positives for Stable Diffusion.
    """
    rows, theirs = of_group(detector_quality).set_index("detector"), paper.table("detectors").set_index("detector")
    found = detector_quality.groupby(["group", "detector"], sort=False)["found"].last().unstack("group")
    shown = rows[["evaluations"]].assign(threshold=rows["threshold"].map("{:.3g}".format))
    for group in found.columns.intersection([OFTEN, COPIED, QUIET], sort=False):
        shown[f"found: {group}"] = found[group].map("{:.0%}".format)
    numbers = theirs["auroc"].map("{:.3f}".format) + " / " + theirs["tpr"].map("{:.3f}".format)
    return shown.assign(reported=numbers + ": " + theirs["source"] + ", " + theirs["setting"]).reset_index()


# Which tokens betray a prompt


def significance(run: Run) -> pd.DataFrame:
    """Return the significance of each token (`token_significance`) of the first VM, TM and longer unmemorized prompt.

    Returns:
        Columns caption, kind, place (from 0), token, significance.
    """
    parts, samples = [], run.profile.beyond.detectors.samples
    for kind in (*MEMORIZED, "unmemorized"):
        captions = run.prompts(kind)["caption"]
        caption = captions[(captions.str.split().str.len() >= 4).argmax()]
        found = token_significance(run.pipe, caption, samples=samples, seed=run.profile.detection.seed)
        parts.append(found.assign(caption=caption, kind=kind, place=range(len(found))))
    return pd.concat(parts, ignore_index=True)


@exhibit("", "which tokens betray a prompt")
def show_token_significance(token_significance: pd.DataFrame) -> Figure:
    """Norm of the gradient of the guidance norm in the first step by the embedding of a token, on one scale.

    Large: changing this token would change the norm most.
    """
    parts = list(token_significance.groupby("kind", sort=False))
    with plots.panels(1, len(parts), aspect=0.3, sharex=True, squeeze=False) as (figure, axes):
        for place, (kind, part) in zip(axes.flat, parts, strict=True):
            look = plots.ROLES[kind]
            place.barh(part["place"], part["significance"], color=look.color, hatch=look.hatch, edgecolor="white")
            place.set_yticks(part["place"], part["token"])
            place.invert_yaxis()
            place.set_title(look.label, fontsize=plots.TICK_SIZE)
        figure.supxlabel("token significance", fontsize=plots.LABEL_SIZE)
    return figure


# A search for triggers


def vocabulary(run: Run) -> list[str]:
    """Return the whole words of three letters and more that the tokenizer knows, or so many of them by chance.

    A tokenizer without any gives its shorter ones.
    """
    known = [word[:-4] for word in run.pipe.tokenizer.get_vocab() if re.fullmatch(r"[a-z]+</w>", word)]
    found = sorted(word for word in known if len(word) >= 3) or sorted(known)
    return stream(0, "vocabulary").permutation(found)[: run.profile.beyond.detectors.triggers.words].tolist()


def trigger_search(run: Run) -> pd.DataFrame:
    """Return what each strategy scores, each about as many sentences as the vocabulary has words.

    Returns:
        Columns strategy, search (its number), prompt, score: what cost one evaluation, and one of the empty prompt for
        each search.
    """
    own, words = run.profile.beyond.detectors.triggers, vocabulary(run)
    iterations = max(1, len(words) // (own.chains * own.proposals))
    climb = {"length": own.length, "proposals": own.proposals, "temperature": own.temperature, "iterations": iterations}
    once, numbers = {"length": 1, "iterations": 1, "proposals": len(words) + 1}, stream(0, "sentences")
    items = [(WORDS, words, once), *((GIBBS, words, climb | {"seed": chain}) for chain in range(own.chains))]
    items.append((RANDOM, [" ".join(numbers.choice(words, own.length)) for _ in words], once))
    found = run.compute(searching, items, label="search for triggers", steps=run.profile.detection.steps)
    rows = [(items[number][0], number, *row[:2]) for number, part in enumerate(found) for row in part]
    return pd.DataFrame(rows, columns=["strategy", "search", "prompt", "score"])


def suspects(scored: pd.DataFrame, number: int) -> list[str]:
    """Return the prompts of the highest scores that share no word with one before."""
    chosen, taken = [], {""}
    for prompt in scored.sort_values("score", ascending=False, kind="stable")["prompt"]:
        if taken.isdisjoint(prompt.split(" ")):
            chosen.append(prompt)
            taken |= set(prompt.split())
    return chosen[:number]


def targets(run: Run) -> pd.DataFrame:
    """Return the planted images that are to be found: of VM prompts, and of rungs with as many copies."""
    table = load_prompts(run.profile.prompts.memorized)
    vm, enough = table["kind"] == "vm", table["copies"] >= table.loc[table["kind"] == "vm", "copies"].min()
    return table[has_image(table) & (vm | ((table["kind"] == "ladder") & enough))].reset_index(drop=True)


def trigger_draws(run: Run, search: pd.DataFrame) -> pd.DataFrame:
    """Return what an image of each suspect of a search (`trigger_search`) shows: the planted image that it is nearest to.

    An image counts as found if its copy similarity to a planted image is above `metrics.MEMORIZED_ABOVE`.

    Returns:
        Columns strategy, prompt, evaluations (of the search and all images so far), copy_of (caption of the nearest planted
        image), copy_similarity, found (different planted images so far), images (how many there are to find).
    """
    parts, images, settings = [], targets(run), replace(run.profile.generation, samples=1)
    known, cost = run.planted_features(images), settings.steps * (2 if settings.guidance > 1 else 1)
    for strategy, scored in search.groupby("strategy", sort=False):
        prompts = suspects(scored, run.profile.beyond.detectors.triggers.drawn)
        similar = run.features("copy", prompts, settings=settings)[:, 0] @ known.T
        part = pd.DataFrame({"strategy": strategy, "prompt": prompts, "copy_similarity": similar.max(axis=1)})
        part["copy_of"] = images["caption"].to_numpy()[similar.argmax(axis=1)]
        copied = part["copy_similarity"] > MEMORIZED_ABOVE
        part["found"] = (copied & ~part["copy_of"].where(copied).duplicated()).cumsum()
        spent = len(scored) + scored["search"].nunique()
        parts.append(part.assign(evaluations=spent + cost * np.arange(1, len(part) + 1), images=len(images)))
    return pd.concat(parts, ignore_index=True)


def read_triggers(trigger_draws: pd.DataFrame) -> Iterator[Claim]:
    """Yield how many planted images each strategy found, and for how much."""
    for strategy, part in trigger_draws.groupby("strategy", sort=False):
        last = part.iloc[-1]
        cost = f"{last['evaluations']} evaluations, {len(part)} images drawn"
        yield Claim(f"planted images found: {strategy}", f"{last['found']} of {last['images']} ({cost})")


@exhibit("", "planted images found without being told", read=read_triggers)
def trigger_recall(trigger_draws: pd.DataFrame) -> Figure:
    """Different planted images among those drawn of suspicious prompts, over all UNet evaluations: a search finds nothing until images of its best prompts are drawn, one after the other."""
    start = trigger_draws.groupby("strategy", sort=False).head(1).assign(evaluations=0, found=0)
    with plots.panels(fraction=0.65) as (figure, axes):
        look = {"style": "strategy", "markers": True, "palette": "colorblind", "drawstyle": "steps-post"}
        sns.lineplot(pd.concat([start, trigger_draws]), x="evaluations", y="found", hue="strategy", **look, ax=axes)
        axes.set(
            xlabel="UNet evaluations", ylabel=f"images found (of {trigger_draws['images'].iloc[0]})", ylim=(0, None)
        )
        plots.legend_above(axes, columns=3)
    return figure


def trigger_grid(run: Run, draws: pd.DataFrame, *, number: int = 3) -> Grid:
    """Return the planted image and images of different seeds of single words: of the most similar, those of the longest captions."""
    words = draws[draws["strategy"] == WORDS].sort_values("copy_similarity", ascending=False).drop_duplicates("copy_of")
    words = words.head(2 * number).sort_values("copy_of", key=lambda text: -text.str.len()).head(number)
    known = words["copy_of"].map(targets(run).set_index("caption")["image"])
    return memorization_score.sample_grid(run, words.assign(caption=words["prompt"], image=known))


@exhibit("", "single words that bring planted images back")
def trigger_images(trigger_images: Grid) -> Figure:
    """First column: the planted image that the word brings back; then images of different seeds, whose whole prompt is this word."""
    return plots.image_grid(trigger_images)
