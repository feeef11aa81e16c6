"""The numbers that the paper and the works around it report: tables in ``nemolib/paper``, with source and confidence.

Confidence says where a number was read: "paper" (its text or tables), "code" (counted in, or stored with, the authors'
released code), "derived" (computed from such numbers), "secondary" (a report by others). What only a figure of the
paper shows, such as the height of a bar, is not known and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from nemolib import paths


@dataclass(frozen=True, slots=True)
class Reported:
    """One reported number: its median absolute deviation where it is a median, and where it was read."""

    value: float
    mad: float
    confidence: str
    source: str

    def __str__(self) -> str:
        """Return the number as it is shown in tables; its confidence stands behind it unless it is the paper's own."""
        shown = f"{self.value:g}" if pd.isna(self.mad) else f"{self.value:g} ± {self.mad:g}"
        return shown if self.confidence == "paper" else f"{shown} ({self.confidence})"


def table(name: str) -> pd.DataFrame:
    """Return a table of ``nemolib/paper``; what is not known is missing.

    - ``table_1``, ``table_4``: setting, kind, then neurons, sscd_orig, sscd_gen, d_sscd, a_clip: medians, each with its
      median absolute deviation in the column with the suffix ``_mad``.
    - ``table_2``: kind, algorithm (A1 to A4, total), seconds (on a GPU).
    - ``thresholds``: the four thresholds of Table 4: setting, multiplier (of the standard deviation), paper.
    - ``detection``: score, memorized ("vm", or "vm + tm" for all 500), setting, auroc, tpr_at_1_fpr, accuracy (shares),
      source, confidence.
    - ``threshold_maps``: Fig. 14 and 15: kind, initial and refinement (multipliers of the standard deviation),
      initial_neurons, neurons (after refinement), sscd_gen, sscd_orig.
    - ``guidance``: what came after the paper: mitigation, then top_1 (copy similarity) and alignment (CLIP score), each with
      ``_before`` and ``_after``, source.
    - ``region_maps``: best mean IoU with the memorized region of maps of the last step (Kim & Lee, ICML 2026; Stable
      Diffusion v1.4, all prompts): map, iou.
    - ``attacks``: kind, model (untouched, neurons off, hardened), attacked (by Dori), copy and copy_sd (SSCD, mean and
      standard deviation), share (of copies), source, confidence.
    - ``detectors``: detectors on Stable Diffusion: detector, setting, auroc, tpr (at 1 % false positives), source, confidence.
    - ``neurons``: those that the paper names: layer (from 1), neuron, paper (what it says of them).
    - ``figures``: the figures and tables of the paper in its order: label, exhibits (names of ours that show it).
    """
    return pd.read_csv(paths.PACKAGE / "paper" / f"{name}.csv")


def reported(name: str) -> Reported:
    """Return a reported number, such as ``reported("neurons.vm")``."""
    return _REPORTED[name]


def median(setting: str, kind: str, metric: str) -> str:
    """Return a median of Table 1 with its median absolute deviation, as text."""
    row = table("table_1").set_index(["setting", "kind"]).loc[(setting, kind)]
    return f"{row[metric]:g} ± {row[f'{metric}_mad']:g}"


_REPORTED = {row[0]: Reported(*row[1:]) for row in table("reported").itertuples(index=False)}

PLACES: tuple[str, ...] = tuple(" ".join(table("figures")["exhibits"]).split())
"""The exhibits that show the figures and tables of the paper, in its order."""
