"""Notebook 02: the memorization score as a detector, z-scores of value neurons, copies, and the duplication ladder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nemolib import metrics, paper, plots
from nemolib.exhibits import KINDS, Claim, each_kind, effect, exhibit, median_mad, of_kinds, share_interval
from nemolib.first_step import NORMS, guidance_norms, noise_differences, pairs_measure
from nemolib.holdout import z_scores
from nemolib.layers import value_activations
from nemolib.pipeline import embed
from nemolib.prompts import MEMORIZED
from nemolib.settings import PAPER, RELEASED
from nemolib.store import Grid

if TYPE_CHECKING:
    from nemolib.run import Run

NOTEBOOK = "02_memorization_score"

TESTED = ("vm", "tm", "ladder", "unmemorized")
"""Kinds of prompts that are tested, in the order of the tables."""

SCORES = {
    "score_paper": ("SSIM (paper)", "#000000", "o-"),
    "score_released": ("MS-SSIM (released)", "#CC79A7", "D-."),
    "wen": ("Wen et al., one step", "#56B4E9", "s--"),
}
"""Label, colour, and marker and line of the scores that are compared as detectors."""

COPIES = {"copy_similarity": "sscd_orig", "copy_max": "sscd_orig_max", "seed_similarity": "d_sscd"}
"""Columns of `copies`, and what `nemolib.run.Run.measure` calls them."""

RUNGS = {"copy_similarity": "copy similarity", "score": "memorization score"}
"""What grows along the duplication ladder."""

EXERCISES = {
    "02.1": lambda run: metrics.tpr_at_fpr(*_halves(run, "score")),
    "02.2": lambda run: metrics.auroc(*_halves(run, "mean_pair")),
    "02.3": lambda run: _second_step(run, "vm") / _second_step(run, "unmemorized"),
    "02.4": lambda run: min(float((-mean / std).min()) for mean, std in zip(run.statistics.mean, run.statistics.std, strict=True)),
}  # fmt: skip


def _halves(run: Run, column: str) -> tuple[pd.Series, pd.Series]:
    """Return a column of the saved scores for the prompts that training repeated, and for the unmemorized ones."""
    scores = run.load("scores")
    clean = scores["kind"] == "unmemorized"
    return scores.loc[~clean, column], scores.loc[clean, column]


def _second_step(run: Run, kind: str) -> float:
    """Return how far text moves the prediction in the second step: the median of the first six prompts of a kind."""
    captions = run.prompts(kind)["caption"].head(6)
    return float(np.median([guidance_norms(run.pipe, caption, steps=2)[1].mean() for caption in captions]))


# What memorization looks like


def sample_grid(run: Run, rows: pd.DataFrame) -> Grid:
    """Return the planted image of each prompt, white where there is none, and the generated ones beside it.

    Returns:
        Images [prompt, 1 + seed, height, width, 3], uint8; captions and "planted", "seed 0", ... are the labels.
    """
    made = run.images(rows["caption"])
    images = np.concatenate([run.planted_like(rows, made)[:, None], made], axis=1)
    seeds = [f"seed {seed}" for seed in range(made.shape[1])]
    return Grid(images, tuple(rows["caption"]), ("planted", *seeds))


def noise_grid(run: Run, rows: pd.DataFrame) -> Grid:
    """Return the noise differences of prompts as colours: the first three channels as red, green and blue.

    Source: Fig. 13.

    Returns:
        Images [prompt, seed, height, width, 3] of at most six seeds, uint8; captions and "seed 0", ... are the labels.
    """
    own = {"settings": run.profile.detection, "protocol": run.profile.protocol}
    found = [noise_differences(run.pipe, caption, **own)[:6, :3].cpu().double() for caption in rows["caption"]]
    colours = (np.moveaxis(np.stack(found), 2, -1) * 255).round().astype(np.uint8)
    return Grid(colours, tuple(rows["caption"]), tuple(f"seed {seed}" for seed in range(colours.shape[1])))


def read_samples(copies: pd.DataFrame) -> Iterator[Claim]:
    """Yield how alike the images of a prompt are."""
    of_kinds(copies, "copies", *KINDS)
    similar = copies.groupby("kind")["seed_similarity"].agg(lambda part: median_mad(part) or "unknown (one seed)")
    theirs = each_kind(lambda kind: paper.median("all neurons active", kind, "d_sscd"))
    rule, ours = "another descriptor: only the order can be compared", each_kind(similar.get, KINDS)
    yield Claim("similarity of two seeds (median ± MAD)", ours, f"{theirs} (D_SSCD, Table 1)", rule=rule)


@exhibit("", "planted and generated images", read=read_samples)
def samples(samples: Grid, copies: pd.DataFrame) -> plots.Figure:
    """First column: the planted image, none for unmemorized prompts; then images of different seeds."""
    return plots.image_grid(samples, kinds=copies.set_index("caption")["kind"])


@exhibit("Figure 13", "noise differences")
def figure_13(noise_differences: Grid, copies: pd.DataFrame) -> plots.Figure:
    """Noise differences of the first denoising step, min-max scaled; three of the latent channels as red, green and blue."""
    return plots.image_grid(noise_differences, kinds=copies.set_index("caption")["kind"])


# The score, and how good it is as a detector


def scores(run: Run) -> pd.DataFrame:
    """Return the memorization scores of the tested prompts.

    Source: Sec. 3.1, App. B.4; Wen et al. (ICLR 2024).

    Returns:
        Columns caption, kind, group, copies, image; score (largest pair of seeds by the profile's protocol: the memorization score) and mean_pair
        (mean of its pairs); score_released and score_paper (the same by these protocols, with the profile's guidance);
        wen (norm of the difference that the text makes to the noise prediction in the first step, mean over seeds).
    """
    table, guidance = run.prompts(*TESTED), run.profile.detection.guidance
    measures = [pairs_measure(protocol, guidance) for protocol in (run.profile.protocol, RELEASED, PAPER)]
    found = list(zip(*run.observe(table["caption"], [*measures, NORMS]), strict=True))
    columns = {"score": (max, 0), "mean_pair": (np.mean, 0), "score_released": (max, 1), "score_paper": (max, 2)}
    columns |= {"wen": (np.mean, len(measures))}
    return table.assign(**{name: list(map(of, found[place])) for name, (of, place) in columns.items()})


def detection(scores: pd.DataFrame) -> pd.DataFrame:
    """Return how well the scores tell memorized from unmemorized prompts, with reported numbers beside.

    Source: App. B.4; Wen's score with one denoising step and 4 seeds as reported by Jeon et al. (ICML 2025).

    Args:
        scores: The table of `scores`.

    Returns:
        Columns score, memorized ("vm + tm", "vm" or "tm"), prompts, auroc with the ends of its 95 % bootstrap interval
        auroc_low and auroc_high, tpr_at_1_fpr, accuracy (the best balanced one), threshold (that has it), paper_auroc,
        paper_tpr_at_1_fpr, paper_accuracy and confidence; missing where nothing is known.

    Raises:
        ValueError: There is no prompt of a kind.
    """
    rows = []
    for score in SCORES:
        clean = scores.loc[scores["kind"] == "unmemorized", score]
        for kinds in (("vm", "tm"), ("vm",), ("tm",)):
            pair = scores.loc[scores["kind"].isin(kinds), score], clean
            low, high = metrics.interval(metrics.auroc, *pair, resamples=200)
            quality = metrics.auroc(*pair), low, high, metrics.tpr_at_fpr(*pair), *metrics.best_accuracy(*pair)
            rows.append((score, " + ".join(kinds), len(pair[0]), *quality))
    columns = ["score", "memorized", "prompts", "auroc", "auroc_low", "auroc_high", "tpr_at_1_fpr", "accuracy"]
    table = pd.DataFrame(rows, columns=[*columns, "threshold"])
    reported = paper.table("detection").query("score == 'ssim' or setting == '4 seeds, 1 step'")
    names = {name: f"paper_{name}" for name in ("auroc", "tpr_at_1_fpr", "accuracy")}
    beside = reported.set_index(["score", "memorized"])[[*names, "confidence"]].rename(columns=names)
    ssim = table["score"].where(table["score"] == "wen", "ssim")
    return table.join(beside.reindex(zip(ssim, table["memorized"], strict=True)).reset_index(drop=True))


def read_2a(scores: pd.DataFrame, thresholds: pd.DataFrame) -> Iterator[Claim]:
    """Yield the scores of each kind, and how many are above the threshold."""
    of_kinds(scores, "scores", *KINDS)
    found, tau = scores.groupby("kind")["score"], thresholds["tau"].iloc[0]
    above = found.agg(lambda part: f"{(part > tau).mean():.0%}")
    theirs = "unmemorized {} ± {}".format(*map(paper.reported, ("threshold.mean", "threshold.sd")))
    theirs = f"{theirs} (mean, standard deviation of holdout prompts)"
    yield Claim("memorization score (median ± MAD)", each_kind(found.agg(median_mad).get, KINDS), theirs)
    ours = f"{each_kind(above.get, KINDS)} (tau = {tau:.3f})"
    yield Claim("prompts above the threshold", ours, f"tau = {paper.reported('threshold')}")


@exhibit("Figure 2a", "memorization scores", read=read_2a)
def figure_2a(scores: pd.DataFrame, thresholds: pd.DataFrame) -> plots.Figure:
    """Share of the prompts of a kind by memorization score; a short line below the axis is a prompt.

    Dashed: the memorization threshold.
    """
    parts = of_kinds(scores, "scores", *reversed(KINDS))
    with plots.panels(fraction=0.6, legend=2) as (figure, axes):
        plots.distributions(axes, parts, "score", xlabel="memorization score (similarity of two seeds)")
        plots.threshold(axes, thresholds["tau"].iloc[0])
    return figure


def read_detection(detection: pd.DataFrame) -> Iterator[Claim]:
    """Yield how well one denoising step separates, beside reported numbers."""
    rows = detection.set_index(["score", "memorized"])
    both, vm, tm = (rows.loc[("score_paper", kind)] for kind in ("vm + tm", "vm", "tm"))
    ours = f"AUROC VM {vm['auroc']:.3f}, TM {tm['auroc']:.3f}; TPR@1%FPR {both['tpr_at_1_fpr']:.3f}"
    theirs = f"{both['paper_auroc']:.2f}, VM {vm['paper_auroc']:.4f}; TPR@1%FPR {both['paper_tpr_at_1_fpr']:.3f}"
    of, ends = "AUROC of VM and TM against unmemorized prompts", f"{both['auroc_low']:.2f} to {both['auroc_high']:.2f}"
    text = "one denoising step tells memorized prompts from others (protocol paper)"
    n = f"{both['prompts']} memorized prompts"
    yield effect(text, both["auroc"], of, at_least=0.9, ours=ours, paper=theirs, n=n, interval=ends)


@exhibit("App. B.4", "the score as a detector", read=read_detection)
def detection_table(detection: pd.DataFrame) -> pd.DataFrame:
    """In brackets what is reported for Stable Diffusion v1-4 with 500 memorized and 500 unmemorized prompts: SSIM by the paper, Wen's score with one step and 4 seeds by Jeon et al. (ICML 2025, secondary).

    Accuracy: ours balanced, at the best threshold; the paper's at 0.5.
    """
    labels = detection["score"].map({score: label for score, (label, *_) in SCORES.items()})
    shown = detection[["memorized", "prompts"]].assign(memorized=detection["memorized"].str.upper())
    shown.insert(0, "score", labels)
    for name, column in (("AUROC", "auroc"), ("TPR@1%FPR", "tpr_at_1_fpr"), ("accuracy", "accuracy")):
        pairs = zip(detection[column], detection[f"paper_{column}"], strict=True)
        shown[name] = [f"{ours:.3f}" if pd.isna(theirs) else f"{ours:.3f} ({theirs:.3f})" for ours, theirs in pairs]
    return shown


@exhibit("", "detection along the duplication ladder")
def detection_by_copies(scores: pd.DataFrame) -> plots.Figure:
    """AUROC of each score: the prompts of a rung against the unmemorized ones, without intervals, since a rung has few prompts.

    Dotted: chance.
    """
    ladder, clean = of_kinds(scores, "scores", "ladder", "unmemorized").values()
    rungs = ladder.groupby("copies")
    with plots.panels(fraction=0.6, legend=2) as (figure, axes):
        axes.axhline(0.5, color=plots.GREY, linestyle=":", linewidth=plots.LINE)
        for score, (label, color, style) in SCORES.items():
            quality = rungs[score].agg(metrics.auroc, clean[score])
            axes.plot(quality.index, quality, style, color=color, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(quality.index, [f"{copies:g}" for copies in quality.index])
        n = " to ".join(map(str, sorted({rungs.size().min(), rungs.size().max()})))
        axes.set(xlabel=f"copies in training (n = {n}, unmemorized {len(clean)})", ylabel="AUROC")
    return figure


# Which neurons stand out


def z_of(run: Run, captions: list[str]) -> list[np.ndarray]:
    """Return for each value layer the z-scores [prompt, neuron] of prompts, float64.

    Source: Sec. 3.2.
    """
    activations = value_activations(run.pipe.unet, embed(run.pipe, captions))
    return [z.double().numpy() for z in z_scores(run.statistics, [values.cpu() for values in activations])]


def z_by_neuron(run: Run) -> pd.DataFrame:
    """Return each neuron's largest absolute z-score over the prompts of a kind.

    The largest of many is larger than the largest of few, so each kind has as many prompts as there are both VM and
    unmemorized ones.

    Source: Sec. 3.2, Fig. 2b.

    Returns:
        Columns kind, layer (from 1, as in the paper), neuron (from 0), largest_z and caption (of the prompt that has
        it), one row for each kind and neuron.
    """
    table, parts = run.prompts(*KINDS), []
    table = table.groupby("kind").head(table["kind"].value_counts()[["vm", "unmemorized"]].min())
    captions = table["caption"].to_numpy()
    absolute = [abs(z) for z in z_of(run, captions.tolist())]
    for kind, rows in table.groupby("kind", sort=False).indices.items():
        for layer, z in enumerate(absolute, start=1):
            columns = {"kind": kind, "layer": layer, "neuron": np.arange(z.shape[1]), "largest_z": z[rows].max(axis=0)}
            parts.append(pd.DataFrame(columns | {"caption": captions[rows[z[rows].argmax(axis=0)]]}))
    return pd.concat(parts, ignore_index=True)


def z_by_prompt(run: Run) -> pd.DataFrame:
    """Return the largest absolute z-score in each value layer for every tested prompt.

    Source: Sec. 3.2.

    Returns:
        Columns caption, kind, layer (from 1, as in the paper), neuron (from 0) and largest_z, one row for each prompt
        and layer.
    """
    table = run.prompts(*TESTED)
    parts = [
        table[["caption", "kind"]].assign(layer=layer, neuron=abs(z).argmax(axis=1), largest_z=abs(z).max(axis=1))
        for layer, z in enumerate(z_of(run, table["caption"].tolist()), start=1)
    ]
    return pd.concat(parts, ignore_index=True)


def read_2b(z_by_neuron: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether memorized prompts reach larger z-scores in value layer 1."""
    parts = of_kinds(z_by_neuron[z_by_neuron["layer"] == 1], "z_by_neuron", "vm", "unmemorized")
    vm, clean = (part["largest_z"] for part in parts.values())
    beyond = f"beyond 5: {(vm > 5).sum()} and {(clean > 5).sum()} of {len(vm)} neurons"
    shares = f"share beyond 5: VM {share_interval(vm > 5)}, unmemorized {share_interval(clean > 5)}"
    ours = f"VM up to {vm.max():.1f}, as many unmemorized prompts up to {clean.max():.1f}; {beyond}"
    theirs, of = "larger z-scores; values are not known", "largest |z| of the layer, VM divided by unmemorized"
    text, ratio = "VM prompts have unusual activations in value layer 1", vm.max() / clean.max()
    yield effect(text, ratio, of, at_least=1.5, ours=ours, paper=theirs, n=f"{len(vm)} neurons", interval=shares)


@exhibit("Figure 2b", "z-scores in value layer 1", read=read_2b)
def figure_2b(z_by_neuron: pd.DataFrame) -> plots.Figure:
    """Largest absolute z-score of each neuron, in standard deviations, over the VM prompts and over as many unmemorized ones."""
    parts = of_kinds(z_by_neuron[z_by_neuron["layer"] == 1], "z_by_neuron", "unmemorized", "vm")
    with plots.panels(fraction=0.6, legend=2) as (figure, axes):
        for kind, rows in parts.items():
            look = plots.ROLES[kind]
            axes.vlines(rows["neuron"], 0, rows["largest_z"], color=look.color, linewidth=0.4, alpha=0.5)
            axes.plot(rows["neuron"], rows["largest_z"], **look.line_style(linestyle=""))
        axes.set(xlabel=f"neuron of value layer 1 (n = {len(rows)})", ylabel=r"largest $|z|$ (sd)")
        axes.set_ylim(bottom=0)
    return figure


def read_z_by_layer(z_by_prompt: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether activations of memorized prompts are out of distribution."""
    of_kinds(z_by_prompt, "z_by_prompt", *KINDS)
    medians = z_by_prompt.groupby("kind")["largest_z"].median()
    theirs, ours = "memorized prompts have out-of-distribution activations (Sec. 3.2)", medians.map("{:.1f}".format)
    yield Claim("largest |z| of a prompt in a layer (median)", each_kind(ours.get, KINDS), theirs)


@exhibit("", "largest z-score of a prompt in each value layer", read=read_z_by_layer)
def z_by_layer(z_by_prompt: pd.DataFrame) -> plots.Figure:
    """In standard deviations: median over prompts; bars from the first to the third quartile."""
    parts = of_kinds(z_by_prompt, "z_by_prompt", *reversed(KINDS))
    with plots.panels(fraction=0.6, legend=2) as (figure, axes):
        # Beside each other, so that bars of one layer do not hide each other.
        for shift, (kind, rows) in zip((-0.15, 0, 0.15), parts.items(), strict=True):
            ends = rows.groupby("layer")["largest_z"].quantile([0.25, 0.5, 0.75]).unstack()
            bars = ends[0.5] - ends[0.25], ends[0.75] - ends[0.5]
            look = plots.ROLES[kind]
            label = f"{look.label}, n = {rows['caption'].nunique()}"
            axes.errorbar(ends.index + shift, ends[0.5], yerr=bars, **look.line_style(label=label))
        axes.set_xticks(sorted(z_by_prompt["layer"].unique()))
        axes.set(xlabel="value layer", ylabel=r"largest $|z|$ (sd)")
        axes.set_ylim(bottom=0)
    return figure


# Copies, and how many it takes


def copies(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Return how similar the generated images of prompts are to the planted image and to each other.

    Source: Sec. 4 (SSCD_orig, D_SSCD), with the profile's encoder for copy detection.

    Args:
        run: The run.
        rows: Rows of a prompt table, or none; where ``image`` is empty there is nothing to copy.

    Returns:
        The rows with the columns copy_similarity (cosine of a generated and the planted image, median over seeds; missing
        without a planted image), copy_max (largest of the seeds) and seed_similarity (cosine of two generated images,
        median over pairs of seeds).

    Raises:
        ProfileError: The profile has no encoder for copy detection.
    """
    if rows.empty:
        return rows.assign(**dict.fromkeys(COPIES, np.empty(0)))
    found = run.measure(rows, columns=tuple(COPIES.values()))
    return rows.assign(**{name: found[measured] for name, measured in COPIES.items()})


def read_6(copies: pd.DataFrame) -> Iterator[Claim]:
    """Yield how many prompts of each kind have a copy by the paper's rule."""
    of_kinds(copies, "copies", *MEMORIZED, column="copy_max")
    found = copies.dropna(subset="copy_max").groupby("kind")["copy_max"]
    shares = each_kind(found.agg(metrics.memorization_rate).map("{:.0%}".format).get)
    medians = each_kind(found.median().map("{:.2f}".format).get)
    theirs = "all VM, no TM prompt, since that is how they are told apart (SSCD)"
    rule = "here the kinds are known from planting, and the similarity is that of another descriptor"
    text = f"prompts with a copy above {metrics.MEMORIZED_ABOVE:g}"
    yield Claim(text, f"{shares}; medians {medians}", theirs, rule=rule)


@exhibit("Figure 6", "verbatim and template memorization by copy similarity", read=read_6)
def figure_6(copies: pd.DataFrame) -> plots.Figure:
    """Largest copy similarity between a prompt's generated images and its planted image.

    Dashed: the paper's cut between TM and VM.
    """
    parts, cut = of_kinds(copies, "copies", "tm", "vm", column="copy_max"), metrics.MEMORIZED_ABOVE
    steps = (pd.concat(parts.values())["copy_max"] - cut) / 0.04
    bins = cut + 0.04 * np.arange(np.floor(steps.min()), np.ceil(steps.max()) + 1)  # one of them ends at the cut
    with plots.panels(fraction=0.6, legend=2) as (figure, axes):
        plots.distributions(axes, parts, "copy_max", xlabel="copy similarity (largest of the seeds)", bins=bins)
        axes.axvline(cut, color="black", linestyle="--", linewidth=1, label=f"cut at {cut:g}")
    return figure


def read_ladder(ladder: pd.DataFrame) -> Iterator[Claim]:
    """Yield how memorization grows with the number of copies."""
    known = of_kinds(ladder, "ladder", "ladder", column="copy_similarity")["ladder"]
    medians = known.groupby("copies")[list(RUNGS)].median()
    rank = known[["copies", *RUNGS]].corr(method="spearman")["copies"]
    for column, text in RUNGS.items():
        first, last = medians[column].iloc[[0, -1]]
        ours = f"{first:.2f} to {last:.2f}, rank correlation {rank[column]:.2f}"
        yield Claim(f"{text} from {medians.index[0]} to {medians.index[-1]} copies (median)", ours)


@exhibit("", "memorization against copies in training", read=read_ladder)
def duplication_ladder(ladder: pd.DataFrame, thresholds: pd.DataFrame) -> plots.Figure:
    """Copy similarity (left, median over seeds) and memorization score (right).

    Points: prompts; line: median of a rung. A regular caption counts as one copy.
    """
    known, look = of_kinds(ladder, "ladder", "ladder", column="copy_similarity")["ladder"], plots.ROLES["ladder"]
    with plots.panels(1, 2, aspect=0.38) as (figure, axes):
        for place, (column, text) in zip(axes, RUNGS.items(), strict=True):
            plots.rungs(place, known, column, look=look, label="median of a rung")
            place.set(xlabel=f"copies in training, n = {len(known)} prompts", ylabel=text)
        plots.threshold(axes[1], thresholds["tau"].iloc[0], horizontal=True)
        for place in axes:
            plots.legend_above(place, columns=3)
    return figure
