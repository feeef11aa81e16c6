"""Exhibits of notebooks 01 and 02: the threshold, the memorization score, z-scores, detection, the duplication ladder."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nemolib import paper
from nemolib.exhibits.base import Exhibit, Reading, Sources, Verdict, of_kinds, rows, values
from nemolib.figures import detection, images
from nemolib.tables import format_median_mad

THRESHOLD_NOTEBOOK, SCORE_NOTEBOOK = "01_holdout_threshold", "02_memorization_score"

SCORE_NAMES = {"score_paper": "SSIM (paper)", "score_released": "MS-SSIM (released)", "wen": "Wen et al., one step"}
"""What tables call the scores."""

KINDS = ("vm", "tm", "unmemorized")
"""Kinds of prompts that are compared."""

_DETECTED = tuple(values("detection", "auroc", memorized=kind) for kind in ("vm + tm", "vm", "tm"))


def _tau(sources: Sources) -> float:
    return float(sources["thresholds"]["tau"].iloc[0])


def _pairs(sources: Sources) -> np.ndarray:
    """Return the pair similarities of holdout prompts, [prompt, pair]."""
    table = sources["holdout_pairs"]
    return table["similarity"].to_numpy().reshape(table["prompt"].nunique(), -1)


def _kinds(table: pd.DataFrame, column: str) -> dict[str, pd.Series]:
    return {kind: rows[column].dropna() for kind, rows in table.groupby("kind", sort=False)}


def _verdict(agrees: bool) -> Verdict:
    return "agrees" if agrees else "differs"


def _auroc(sources: Sources, score: str, memorized: str) -> pd.Series:
    table = sources["detection"]
    return table[(table["score"] == score) & (table["memorized"] == memorized)].iloc[0]


def _read_figure_2a(sources: Sources) -> Reading:
    scores, tau = _kinds(sources["scores"], "score"), _tau(sources)
    shown = ", ".join(f"{kind} {format_median_mad(scores[kind])}" for kind in ("vm", "tm", "unmemorized"))
    order = scores["vm"].median() > scores["tm"].median() > scores["unmemorized"].median()
    above = {kind: f"{(scores[kind] > tau).mean():.0%}" for kind in ("vm", "tm", "unmemorized")}
    return Reading(
        f"scores {shown}; above tau = {tau:.3f}: VM {above['vm']}, TM {above['tm']}, unmemorized {above['unmemorized']}",
        f"unmemorized {paper.reported('threshold.mean')} ± {paper.reported('threshold.sd')} (mean, standard deviation of holdout "
        f"prompts); tau = {paper.reported('threshold')}",
        _verdict(order),
        "compared: the order of the medians, VM above TM above unmemorized",
    )


def _read_figure_2b(sources: Sources) -> Reading:
    table = sources["z_by_neuron"]
    first = _kinds(table[table["layer"] == 1], "largest_z")
    beyond = {kind: int((first[kind] > 5).sum()) for kind in ("vm", "unmemorized")}
    return Reading(
        f"value layer 1, largest |z|: VM up to {first['vm'].max():.1f}, unmemorized up to {first['unmemorized'].max():.1f}; beyond 5: "
        f"{beyond['vm']} and {beyond['unmemorized']} of {len(first['vm'])} neurons",
        "memorized prompts reach larger z-scores than unmemorized ones; values are not known",
        _verdict(first["vm"].max() > first["unmemorized"].max()),
        "compared: the largest |z| of the layer, as many unmemorized as VM prompts",
    )


def _read_figure_6(sources: Sources) -> Reading:
    best = _kinds(sources["copies"], "copy_max")
    shares = {kind: float((best[kind] > 0.7).mean()) for kind in ("vm", "tm")}
    return Reading(
        f"above 0.7: {shares['vm']:.0%} of the VM and {shares['tm']:.0%} of the TM prompts; medians {best['vm'].median():.2f} and "
        f"{best['tm'].median():.2f}",
        "above 0.7: all VM, no TM prompt, since that is how they are told apart (SSCD)",
        "beside",
        "here the kinds are known from planting, and the similarity is that of another descriptor",
    )


def _read_figure_13(sources: Sources) -> Reading:
    return Reading(
        f"{len(sources['noise_differences'].rows)} prompts, {len(sources['noise_differences'].columns)} seeds",
        "noise differences of memorized prompts look alike, those of others do not",
    )


def _read_samples(sources: Sources) -> Reading:
    typical = sources["copies"].groupby("kind")["seed_similarity"].median()
    shown = {kind: "unknown (one seed)" if pd.isna(value) else f"{value:.2f}" for kind, value in typical.items()}
    return Reading(
        f"similarity of two seeds (median): VM {shown['vm']}, TM {shown['tm']}, unmemorized {shown['unmemorized']}",
        "0.99 for VM and 0.17 for TM prompts (D_SSCD, Table 1)",
        "beside",
        "another descriptor: only the order can be compared",
    )


def _read_thresholds(sources: Sources) -> Reading:
    table = sources["thresholds"].set_index("multiplier")
    ours = table["ours"]
    return Reading(
        f"{ours[1.0]:.3f} = {ours[0.0]:.3f} + {ours[1.0] - ours[0.0]:.3f}; 95 % of other holdout sets: {table['low'].iloc[0]:.2f} to "
        f"{table['high'].iloc[0]:.2f}",
        f"{paper.reported('threshold')} = {paper.reported('threshold.mean')} + {paper.reported('threshold.sd')}",
        "beside",
        "another model with smaller latents: its similarities have another scale",
    )


def _read_holdout(sources: Sources) -> Reading:
    pairs = _pairs(sources)
    return Reading(
        f"{len(pairs)} prompts, {pairs.shape[1]} pairs each: all pairs {pairs.mean():.3f} ± {pairs.std(ddof=1):.3f}, largest pairs "
        f"{pairs.max(axis=1).mean():.3f} ± {pairs.max(axis=1).std(ddof=1):.3f} (mean, standard deviation)",
        f"{paper.reported('threshold.mean')} ± {paper.reported('threshold.sd')}",
    )


def _read_switches(sources: Sources) -> Reading:
    table = sources["protocol_switches"].set_index("switch")
    single = table.loc[["timestep", "pairs", "similarity"], "difference"]
    strongest = single.abs().idxmax()
    return Reading(
        f"`released` {table.loc['none', 'threshold']:.3f}, `paper` {table.loc['all', 'threshold']:.3f}; the largest single change is "
        f"{table.loc[strongest, 'change']} ({single[strongest]:+.3f})",
        "text and code differ; what each difference does is not reported",
    )


def _read_detection(sources: Sources) -> Reading:
    ours, wen = _auroc(sources, "score_paper", "vm + tm"), _auroc(sources, "wen", "vm + tm")
    vm, tm = _auroc(sources, "score_paper", "vm"), _auroc(sources, "score_paper", "tm")
    return Reading(
        f"AUROC {ours['auroc']:.3f} (VM {vm['auroc']:.3f}, TM {tm['auroc']:.3f}), TPR@1%FPR {ours['tpr_at_1_fpr']:.3f}; Wen's score "
        f"{wen['auroc']:.3f}",
        f"AUROC {ours['paper_auroc']:.2f} (VM {vm['paper_auroc']:.4f}), TPR@1%FPR {ours['paper_tpr_at_1_fpr']:.3f}; Wen's score "
        f"{wen['paper_auroc']:.3f} (secondary)",
        _verdict(ours["auroc"] >= 0.9 and vm["auroc"] >= ours["auroc"] - 0.005),
        "agrees if one step separates well (AUROC at least 0.9) and VM at least as well as all",
    )


def _read_roc(sources: Sources) -> Reading:
    both = {name: _auroc(sources, name, "vm + tm")["tpr_at_1_fpr"] for name in SCORE_NAMES}
    return Reading("TPR@1%FPR: " + ", ".join(f"{SCORE_NAMES[name]} {value:.2f}" for name, value in both.items()))


def _read_ladder(sources: Sources) -> Reading:
    table = sources["ladder"]
    medians = table.groupby("copies")[["copy_similarity", "score"]].median()
    rank = table[["copies", "copy_similarity", "score"]].corr(method="spearman")["copies"]
    return Reading(
        f"from {medians.index[0]} to {medians.index[-1]} copies: copy similarity {medians['copy_similarity'].iloc[0]:.2f} to "
        f"{medians['copy_similarity'].iloc[-1]:.2f}, score {medians['score'].iloc[0]:.2f} to {medians['score'].iloc[-1]:.2f}; rank "
        f"correlations {rank['copy_similarity']:.2f} and {rank['score']:.2f}",
    )


def _read_z_by_layer(sources: Sources) -> Reading:
    typical = sources["z_by_prompt"].groupby("kind")["largest_z"].median()
    shown = {kind: f"{typical[kind]:.1f}" for kind in ("vm", "tm", "unmemorized")}
    return Reading(
        f"largest |z| of a layer (median): VM {shown['vm']}, TM {shown['tm']}, unmemorized {shown['unmemorized']}",
        "memorized prompts have out-of-distribution activations (Sec. 3.2)",
        _verdict(min(typical["vm"], typical["tm"]) > typical["unmemorized"]),
        "compared: both kinds of memorized prompts above unmemorized ones",
    )


def _draw_thresholds(sources: Sources) -> pd.DataFrame:
    return sources["thresholds"][["setting", "paper", "ours"]].round(3)


def _draw_detection(sources: Sources) -> pd.DataFrame:
    table = sources["detection"]
    shares = {
        "AUROC": "auroc",
        "AUROC (reported)": "paper_auroc",
        "TPR@1%FPR": "tpr_at_1_fpr",
        "TPR@1%FPR (reported)": "paper_tpr_at_1_fpr",
        "accuracy": "accuracy",
        "accuracy (reported)": "paper_accuracy",
    }
    shown = pd.DataFrame({"score": table["score"].replace(SCORE_NAMES), "memorized": table["memorized"]})
    for name, column in shares.items():
        shown[name] = [f"{value:.3f}" if pd.notna(value) else "" for value in table[column]]
    return shown.assign(confidence=table["confidence"].fillna(""))


def _draw_switches(sources: Sources) -> pd.DataFrame:
    columns = ["question", "change", "mean", "sd", "threshold", "difference", "gate"]
    table = sources["protocol_switches"][columns]
    return table.assign(question=table["question"].fillna("")).round(3)


THRESHOLDS = Exhibit(
    "table_4_thresholds", "Table 4 (thresholds)", "four memorization thresholds", THRESHOLD_NOTEBOOK,
    "Mean of the holdout scores plus a multiple of their standard deviation.",
    _draw_thresholds, _read_thresholds, tables=("thresholds",),
    needs=(rows("thresholds", at_least=4),),
)  # fmt: skip

HOLDOUT = Exhibit(
    "holdout_distribution", "", "similarity of the seeds of holdout prompts", THRESHOLD_NOTEBOOK,
    "Similarity of two seeds of a holdout prompt: all pairs (filled) and the largest pair of each prompt (outlined). Lines: the four "
    "thresholds.",
    lambda s: detection.holdout_distribution(_pairs(s), s["thresholds"]), _read_holdout, tables=("holdout_pairs", "thresholds"),
    needs=(rows("holdout_pairs", at_least=2),),
)  # fmt: skip

SWITCHES = Exhibit(
    "protocol_switches", "", "what each difference between paper and code does to the threshold", THRESHOLD_NOTEBOOK,
    "Mean of the values that the threshold is taken over (point) and the threshold (bar, one standard deviation above). Dashed: protocol "
    "released.",
    lambda s: detection.protocol_switches(s["protocol_switches"]), _read_switches, tables=("protocol_switches",),
)  # fmt: skip

SWITCH_TABLE = Exhibit(
    "protocol_switches_table", "", "thresholds by protocol switch", THRESHOLD_NOTEBOOK,
    "Gate: share of holdout prompts whose largest pair is above the threshold. Questions are those of notebook 01.",
    _draw_switches, _read_switches, tables=("protocol_switches",),
)  # fmt: skip

FIGURE_2A = Exhibit(
    "figure_2a", "Figure 2a", "memorization scores", SCORE_NOTEBOOK,
    "Share of the prompts of a kind by memorization score; a short line below the axis is a prompt. Dashed: the memorization threshold.",
    lambda s: detection.figure_2a(s["scores"], threshold=_tau(s)), _read_figure_2a, tables=("scores", "thresholds"),
    needs=of_kinds("scores", *KINDS, column="score"),
)  # fmt: skip

FIGURE_2B = Exhibit(
    "figure_2b", "Figure 2b", "z-scores in value layer 1", SCORE_NOTEBOOK,
    "Largest absolute z-score of each neuron over the VM prompts and over as many unmemorized ones.",
    lambda s: detection.figure_2b(s["z_by_neuron"]), _read_figure_2b, tables=("z_by_neuron",),
    needs=of_kinds("z_by_neuron", "vm", "unmemorized"),
)  # fmt: skip

FIGURE_6 = Exhibit(
    "figure_6", "Figure 6", "verbatim and template memorization by copy similarity", SCORE_NOTEBOOK,
    "Largest copy similarity between a prompt's generated images and its planted image. Dashed: the paper's cut between TM and VM.",
    lambda s: detection.figure_6(s["copies"]), _read_figure_6, tables=("copies",),
    needs=of_kinds("copies", "vm", "tm", column="copy_max"),
)  # fmt: skip

FIGURE_13 = Exhibit(
    "figure_13", "Figure 13", "noise differences", SCORE_NOTEBOOK,
    "Noise differences of the first denoising step, min-max scaled; three of the four latent channels as red, green and blue. From above: "
    "VM, TM and unmemorized prompts, the same number of each.",
    lambda s: detection.figure_13(s["noise_differences"]), _read_figure_13, grids=("noise_differences",),
)  # fmt: skip

DETECTION = Exhibit(
    "detection_table", "App. B.4", "the score as a detector", SCORE_NOTEBOOK,
    "Reported: Stable Diffusion v1-4, 500 memorized and 500 unmemorized prompts; SSIM by the paper, Wen's score with one step and 4 seeds by "
    "Jeon et al. (ICML 2025). Accuracy: ours balanced, at the best threshold; the paper's at 0.5.",
    _draw_detection, _read_detection, tables=("detection",), needs=_DETECTED,
)  # fmt: skip

ROC = Exhibit(
    "detection_roc", "", "ROC curves of the scores", SCORE_NOTEBOOK,
    "VM and TM prompts together against unmemorized ones. Dashed line: false positive rate 1 %.",
    lambda s: detection.detection_roc(s["scores"], list(SCORE_NAMES)), _read_roc, tables=("scores", "detection"),
    needs=(*_DETECTED, *of_kinds("scores", *KINDS)),
)  # fmt: skip

LADDER = Exhibit(
    "duplication_ladder", "", "memorization against copies in training", SCORE_NOTEBOOK,
    "Copy similarity (left, median over seeds) and memorization score (right). Points: prompts; line: median of a rung.",
    lambda s: detection.duplication_ladder(s["ladder"], threshold=_tau(s)), _read_ladder, tables=("ladder", "thresholds"),
    needs=(values("ladder", "copy_similarity", "score", at_least=2),),
)  # fmt: skip

Z_BY_LAYER = Exhibit(
    "z_by_layer", "", "largest z-score of a prompt in each value layer", SCORE_NOTEBOOK,
    "Median over prompts; bars from the first to the third quartile.",
    lambda s: detection.z_by_layer(s["z_by_prompt"]), _read_z_by_layer, tables=("z_by_prompt",),
    needs=of_kinds("z_by_prompt", *KINDS),
)  # fmt: skip

SAMPLES = Exhibit(
    "samples", "", "planted and generated images", SCORE_NOTEBOOK,
    "First column: the planted image, none for unmemorized prompts; then images of different seeds. From above: VM, TM and unmemorized prompts, "
    "the same number of each.",
    lambda s: images.image_grid(s["samples"]), _read_samples, tables=("copies",), grids=("samples",),
    needs=of_kinds("copies", *KINDS),
)  # fmt: skip
