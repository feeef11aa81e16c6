"""The numbers that the paper and the works around it report, as data with source and confidence.

Confidence says where a number was read: "paper" (its text or tables), "code" (counted in, or stored with, the authors'
released code), "derived" (computed from such numbers), "secondary" (a report by others). What only a figure of the
paper shows, such as the height of a bar, is not known and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

Confidence = Literal["paper", "code", "derived", "secondary"]


@dataclass(frozen=True, slots=True)
class Reported:
    """One reported number.

    Attributes:
        value: The number.
        source: Section or table of the paper, or another work.
        confidence: Where it was read.
        mad: Median absolute deviation, where the number is a median; else None.
    """

    value: float
    source: str
    confidence: Confidence = "paper"
    mad: float | None = None

    def __str__(self) -> str:
        """Return the number as it is shown in tables; its confidence stands behind it unless it is the paper's own."""
        shown = f"{self.value:g}" if self.mad is None else f"{self.value:g} ± {self.mad:g}"
        return shown if self.confidence == "paper" else f"{shown} ({self.confidence})"


REPORTED: dict[str, Reported] = {
    # Data and threshold.
    "prompts.memorized": Reported(500, "Sec. 4"),
    "prompts.vm": Reported(112, "prompts/memorized_laion_prompts.csv", "code"),
    "prompts.tm": Reported(388, "prompts/memorized_laion_prompts.csv", "code"),
    "prompts.unmemorized": Reported(500, "Sec. 4"),
    "prompts.holdout": Reported(50_000, "Sec. 4"),
    "threshold": Reported(0.428, "Sec. 4, Table 4"),
    "threshold.mean": Reported(0.358, "Table 4"),
    "threshold.sd": Reported(0.070, "Table 4: 0.428 - 0.358", "derived"),
    # Neurons.
    "neurons.searched": Reported(5760, "widths of the 7 value layers", "derived"),
    "neurons.vm": Reported(4, "Table 1", mad=3),
    "neurons.tm": Reported(21, "Table 1", mad=18),
    "neurons.vm.initial": Reported(26.5, "Table 4", mad=22.5),
    "neurons.tm.initial": Reported(674.5, "Table 4", mad=624.5),
    "neurons.vm.single": Reported(28, "Sec. 4"),
    "neurons.vm.share_up_to_5": Reported(2 / 3, "Sec. 4 (two thirds)"),
    "neurons.tm.share_up_to_5": Reported(0.3, "Sec. 4 (about 30 %)"),
    "neurons.tm.share_from_50": Reported(1 / 3, "Sec. 4 (about one third)"),
    "unmemorized.without_neurons": Reported(442, "Sec. 4, of 500"),
    "unmemorized.neurons": Reported(62, "Sec. 4, of the other 58", mad=27),
    "shared.vm_share": Reported(0.17, "Sec. 4: value layer 1, neurons 25 and 221"),
    # Blocked neurons and unmemorized prompts.
    "quality.most_blocked": Reported(750, "Fig. 5a, 8"),
    "blocks.cosine": Reported(0.98, "Table 3, lowest entry of the most frequent neurons (blocks 1 and 2)"),
    "blocks.cosine.random": Reported(0.99, "Table 3, lowest entry of random neurons"),
    # Figure 14: median number of neurons of the initial selection by threshold.
    "initial.vm.0.288": Reported(228, "Fig. 14"),
    "initial.vm.0.358": Reported(51.5, "Fig. 14"),
    "initial.tm.0.288": Reported(942.5, "Fig. 14"),
    "initial.tm.0.358": Reported(836.5, "Fig. 14"),
}
"""Single numbers by name."""


def reported(name: str) -> Reported:
    """Return a reported number.

    Raises:
        KeyError: The name is unknown; the message lists those known.
    """
    if name not in REPORTED:
        raise KeyError(f"unknown number {name!r}; known: {', '.join(REPORTED)}")
    return REPORTED[name]


FIGURES_AND_TABLES: dict[str, str] = {
    "Figure 1": "the method, from a prompt to images without its memorization neurons",
    "Figure 2a": "memorization scores of unmemorized, template- and verbatim-memorized prompts",
    "Figure 2b": "z-scores in value layer 1",
    "Figure 3": "images with all neurons active and with the memorization neurons deactivated",
    "Figure 4a": "memorization neurons per prompt",
    "Figure 4b": "memorization neurons per value layer",
    "Figure 5a": "image quality against the number of deactivated neurons",
    "Figure 5b": "similarity against the factor that scales the memorization neurons",
    "Figure 6": "verbatim and template memorization by the largest copy similarity",
    "Figure 7": "neurons of the initial selection and after refinement",
    "Figure 8": "FID, CLIP-FID and KID against the number of deactivated neurons",
    "Figure 9": "highly memorized prompts",
    "Figure 10": "a neuron that captions about people share",
    "Figure 11": "a neuron that captions of podcast covers share",
    "Figure 12": "neurons that captions of phone cases share",
    "Figure 13": "noise differences",
    "Figure 14": "number of neurons by the thresholds of initial selection and refinement",
    "Figure 15": "copy similarity by the thresholds of initial selection and refinement",
    "Figure 16": "copy similarity without one key or value layer",
    "Figure 17": "alignment with the prompt without one key or value layer",
    "Figure 18": "images without one value layer",
    "Figure 19": "images without one key layer",
    "Figure 20": "images with half of the neurons of a convolution deactivated",
    "Table 1": "every mitigation: deactivated neurons, copy similarity, diversity, alignment",
    "Table 2": "run time of the search",
    "Table 3": "similarity of the outputs of cross-attention blocks with and without deactivated neurons",
    "Table 4": "ablations: thresholds, guidance, refinement, top-k, scaling factors",
}
"""The figures and tables of the paper, each part by itself, and what they show."""


def thresholds() -> pd.DataFrame:
    """Return the four memorization thresholds of Table 4: columns setting, multiplier (of the standard deviation), paper."""
    rows = [
        ("mean - 1 sd", -1.0, 0.288),
        ("mean", 0.0, 0.358),
        ("mean + 1 sd", 1.0, 0.428),
        ("mean + 2 sd", 2.0, 0.498),
    ]
    return pd.DataFrame(rows, columns=["setting", "multiplier", "paper"])


def detection() -> pd.DataFrame:
    """Return how well scores tell memorized from unmemorized prompts, as shares.

    Returns:
        Columns score, memorized ("vm", or "vm + tm" for all 500), setting, auroc, tpr_at_1_fpr, accuracy, source,
        confidence. What is not known is missing.
    """
    nan = float("nan")
    jeon = "Jeon et al. (ICML 2025), Table 1"
    rows = [
        ("ssim", "vm + tm", "10 seeds, 1 step", 0.98, 0.876, 0.942, "App. B.4", "paper"),
        ("ssim", "vm", "10 seeds, 1 step", 0.9964, 0.9821, 0.9739, "App. B.4", "paper"),
        ("wen", "vm + tm", "4 seeds, 50 steps", 0.994, 0.982, 0.990, "Wen et al. (ICLR 2024), notebook det_mem_viz", "code"),
        ("wen", "vm + tm", "1 seed, 1 step", 0.976, 0.896, nan, jeon, "secondary"),
        ("wen", "vm + tm", "4 seeds, 1 step", 0.992, 0.944, nan, jeon, "secondary"),
        ("wen", "vm + tm", "16 seeds, 1 step", 0.990, 0.928, nan, jeon, "secondary"),
        ("wen", "vm + tm", "4 seeds, 50 steps", 0.996, 0.982, nan, jeon, "secondary"),
    ]  # fmt: skip
    columns = ["score", "memorized", "setting", "auroc", "tpr_at_1_fpr", "accuracy", "source", "confidence"]
    return pd.DataFrame(rows, columns=columns)


METRICS = ("neurons", "sscd_orig", "sscd_gen", "d_sscd", "a_clip")
"""Columns of Tables 1 and 4; each has a second one with the suffix ``_mad``."""

_TABLE_1 = """
all neurons active | vm | 0 ± 0 | 0.83 ± 0.16 | 1.0 ± 0.0 | 0.99 ± 0.01 | 0.32 ± 0.02
all neurons active | tm | 0 ± 0 | 0.04 ± 0.04 | 1.0 ± 0.0 | 0.17 ± 0.06 | 0.31 ± 0.02
prompt embedding adjustment (Wen) | vm | 0 ± 0 | 0.04 ± 0.02 | 0.08 ± 0.03 | 0.08 ± 0.03 | 0.30 ± 0.02
prompt embedding adjustment (Wen) | tm | 0 ± 0 | 0.03 ± 0.02 | 0.08 ± 0.03 | 0.09 ± 0.03 | 0.31 ± 0.02
random neurons | vm | 4 ± 3 | 0.80 ± 0.11 | 0.999 ± 0.0 | 0.99 ± 0.01 | 0.32 ± 0.02
random neurons | tm | 21 ± 18 | 0.05 ± 0.04 | 0.997 ± 0.0 | 0.16 ± 0.06 | 0.31 ± 0.02
attention scaling (Ren) | vm | 0 ± 0 | 0.08 ± 0.04 | 0.14 ± 0.07 | 0.15 ± 0.05 | 0.31 ± 0.02
attention scaling (Ren) | tm | 0 ± 0 | 0.05 ± 0.02 | 0.19 ± 0.12 | 0.12 ± 0.03 | 0.31 ± 0.02
1 random token (Somepalli) | vm | 0 ± 0 | 0.59 ± 0.31 | 0.68 ± 0.31 | 0.67 ± 0.33 | 0.31 ± 0.02
1 random token (Somepalli) | tm | 0 ± 0 | 0.04 ± 0.03 | 0.16 ± 0.05 | 0.17 ± 0.05 | 0.31 ± 0.02
4 random tokens (Somepalli) | vm | 0 ± 0 | 0.09 ± 0.06 | 0.12 ± 0.09 | 0.15 ± 0.06 | 0.30 ± 0.02
4 random tokens (Somepalli) | tm | 0 ± 0 | 0.04 ± 0.03 | 0.13 ± 0.04 | 0.15 ± 0.04 | 0.30 ± 0.02
10 random tokens (Somepalli) | vm | 0 ± 0 | 0.03 ± 0.02 | 0.07 ± 0.05 | 0.11 ± 0.03 | 0.28 ± 0.03
10 random tokens (Somepalli) | tm | 0 ± 0 | 0.03 ± 0.03 | 0.08 ± 0.05 | 0.12 ± 0.04 | 0.29 ± 0.03
NeMo | vm | 4 ± 3 | 0.09 ± 0.06 | 0.10 ± 0.07 | 0.16 ± 0.06 | 0.31 ± 0.02
NeMo | tm | 21 ± 18 | 0.05 ± 0.03 | 0.05 ± 0.04 | 0.12 ± 0.05 | 0.31 ± 0.02
"""

_TABLE_4 = """
default (0.428) | vm | 4 ± 3 | 0.09 ± 0.06 | 0.10 ± 0.07 | 0.16 ± 0.06 | 0.31 ± 0.02
default (0.428) | tm | 21 ± 18 | 0.05 ± 0.03 | 0.05 ± 0.04 | 0.12 ± 0.05 | 0.31 ± 0.02
guidance 7 in detection | vm | 3 ± 2 | 0.09 ± 0.06 | 0.14 ± 0.07 | 0.15 ± 0.06 | 0.31 ± 0.02
guidance 7 in detection | tm | 6 ± 5 | 0.05 ± 0.03 | 0.12 ± 0.07 | 0.11 ± 0.04 | 0.32 ± 0.02
threshold 0.288 | vm | 10.5 ± 9.5 | 0.08 ± 0.06 | 0.14 ± 0.06 | 0.15 ± 0.05 | 0.32 ± 0.02
threshold 0.288 | tm | 32.0 ± 27 | 0.06 ± 0.03 | 0.10 ± 0.07 | 0.14 ± 0.05 | 0.31 ± 0.03
threshold 0.358 | vm | 6 ± 5 | 0.10 ± 0.06 | 0.14 ± 0.07 | 0.16 ± 0.05 | 0.31 ± 0.02
threshold 0.358 | tm | 30 ± 25 | 0.06 ± 0.03 | 0.11 ± 0.07 | 0.13 ± 0.04 | 0.31 ± 0.02
threshold 0.498 | vm | 3 ± 2 | 0.10 ± 0.06 | 0.15 ± 0.07 | 0.15 ± 0.06 | 0.32 ± 0.02
threshold 0.498 | tm | 7 ± 6 | 0.06 ± 0.03 | 0.12 ± 0.04 | 0.12 ± 0.04 | 0.31 ± 0.03
no refinement | vm | 26.5 ± 22.5 | 0.07 ± 0.05 | 0.11 ± 0.06 | 0.15 ± 0.06 | 0.32 ± 0.02
no refinement | tm | 674.5 ± 624.5 | 0.04 ± 0.03 | 0.09 ± 0.05 | 0.13 ± 0.04 | 0.31 ± 0.02
no top-k | vm | 11 ± 10 | 0.11 ± 0.05 | 0.21 ± 0.13 | 0.16 ± 0.04 | 0.32 ± 0.02
no top-k | tm | 30 ± 23 | 0.05 ± 0.03 | 0.41 ± 0.32 | 0.13 ± 0.03 | 0.31 ± 0.02
factor 0.75 | vm | 4 ± 3 | 0.79 ± 0.12 | 0.995 ± 0.00 | 0.96 ± 0.04 | 0.32 ± 0.02
factor 0.75 | tm | 21 ± 18 | 0.05 ± 0.04 | 0.966 ± 0.03 | 0.15 ± 0.05 | 0.31 ± 0.02
factor 0.5 | vm | 4 ± 3 | 0.62 ± 0.29 | 0.97 ± 0.02 | 0.67 ± 0.33 | 0.32 ± 0.01
factor 0.5 | tm | 21 ± 18 | 0.05 ± 0.03 | 0.83 ± 0.15 | 0.14 ± 0.04 | 0.31 ± 0.02
factor 0.25 | vm | 4 ± 3 | 0.20 ± 0.17 | 0.32 ± 0.25 | 0.21 ± 0.12 | 0.32 ± 0.02
factor 0.25 | tm | 21 ± 18 | 0.05 ± 0.03 | 0.23 ± 0.16 | 0.12 ± 0.04 | 0.32 ± 0.02
factor -0.25 | vm | 4 ± 3 | 0.09 ± 0.06 | 0.12 ± 0.06 | 0.15 ± 0.05 | 0.32 ± 0.02
factor -0.25 | tm | 21 ± 18 | 0.05 ± 0.03 | 0.09 ± 0.06 | 0.13 ± 0.04 | 0.31 ± 0.02
factor -0.5 | vm | 4 ± 3 | 0.08 ± 0.05 | 0.12 ± 0.06 | 0.17 ± 0.06 | 0.31 ± 0.02
factor -0.5 | tm | 21 ± 18 | 0.05 ± 0.03 | 0.08 ± 0.05 | 0.13 ± 0.04 | 0.31 ± 0.02
factor -0.75 | vm | 4 ± 3 | 0.08 ± 0.05 | 0.11 ± 0.06 | 0.17 ± 0.06 | 0.31 ± 0.02
factor -0.75 | tm | 21 ± 18 | 0.05 ± 0.03 | 0.08 ± 0.05 | 0.14 ± 0.05 | 0.31 ± 0.02
factor -1 | vm | 4 ± 3 | 0.08 ± 0.05 | 0.11 ± 0.07 | 0.16 ± 0.06 | 0.31 ± 0.02
factor -1 | tm | 21 ± 18 | 0.04 ± 0.03 | 0.07 ± 0.05 | 0.14 ± 0.05 | 0.30 ± 0.02
"""


def table_1() -> pd.DataFrame:
    """Return Table 1: columns setting, kind, and `METRICS` as medians, each with its median absolute deviation."""
    return _parse(_TABLE_1)


def table_2() -> pd.DataFrame:
    """Return Table 2, the run time on a GPU: columns kind, algorithm (A1 to A4, total), seconds."""
    times = {"vm": (0.21, 0.29, 2.31, 12.85, 15.68), "tm": (0.18, 0.25, 6.09, 39.37, 45.90)}
    names = ("A1", "A2", "A3", "A4", "total")
    rows = [(kind, name, value) for kind, values in times.items() for name, value in zip(names, values, strict=True)]
    return pd.DataFrame(rows, columns=["kind", "algorithm", "seconds"])


def table_4() -> pd.DataFrame:
    """Return Table 4, the ablations: columns as of `table_1`."""
    return _parse(_TABLE_4)


def threshold_maps() -> pd.DataFrame:
    """Return Fig. 14 and 15, medians over prompts for each pair of thresholds of initial selection and refinement.

    Returns:
        Columns kind, initial and refinement (multipliers of the standard deviation: thresholds 0.288, 0.358, 0.428),
        initial_neurons, neurons (after refinement), sscd_gen, sscd_orig. Where the refinement threshold is lower, there
        is nothing in the paper.
    """
    pairs = [(-1, -1), (-1, 0), (-1, 1), (0, 0), (0, 1), (1, 1)]
    cells = {
        "vm": {
            "initial_neurons": (228, 228, 228, 51.5, 51.5, 26.5),
            "neurons": (10.5, 8, 5, 6, 4, 4),
            "sscd_gen": (0.095, 0.099, 0.098, 0.099, 0.11, 0.11),
            "sscd_orig": (0.084, 0.09, 0.09, 0.096, 0.096, 0.096),
        },
        "tm": {
            "initial_neurons": (942.5, 942.5, 942.5, 836.5, 836.5, 674.5),
            "neurons": (32, 32.5, 32.5, 30, 27, 21),
            "sscd_gen": (0.05, 0.054, 0.054, 0.055, 0.055, 0.058),
            "sscd_orig": (0.057, 0.057, 0.055, 0.055, 0.055, 0.053),
        },
    }
    places = pd.DataFrame(pairs, columns=["initial", "refinement"], dtype=float)
    parts = [places.assign(**columns).assign(kind=kind) for kind, columns in cells.items()]
    table = pd.concat(parts, ignore_index=True)
    return table[["kind", "initial", "refinement", "initial_neurons", "neurons", "sscd_gen", "sscd_orig"]]


def _parse(text: str) -> pd.DataFrame:
    """Return the rows of a table of medians and median absolute deviations."""
    columns = [name for metric in METRICS for name in (metric, f"{metric}_mad")]
    rows = []
    for line in text.strip().splitlines():
        setting, kind, *cells = (part.strip() for part in line.split("|"))
        rows.append([setting, kind, *(float(number) for cell in cells for number in cell.split("±"))])
    return pd.DataFrame(rows, columns=["setting", "kind", *columns])
