"""Making ``data/sd14`` from the files that others published: ``python -m tools.sd14_data``.

``data/sd14/sources.yaml`` names the originals, each with its SHA-256. They are fetched unless they are there, or taken
from the folder that ``NEMO_DATA_MIRROR`` names; what is kept of them are captions and numbers.
"""

from __future__ import annotations

import gzip
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from nemolib import paths
from nemolib.holdout import ActivationStatistics
from nemolib.layers import STABLE_DIFFUSION_WIDTHS
from nemolib.paths import write_atomic
from tools.fetch_data import DownloadError, fetch_file, load_manifest

FOLDER = paths.DATA / "sd14"

TABLES = {
    "memorized_laion_prompts.csv": ("prompts/memorized.csv", ["Caption", "type", "mean_sscd", "max_sscd"]),
    "unmemorized_laion_prompts.csv": ("prompts/unmemorized.csv", ["Caption"]),
    "fork_sd14_results.csv": (
        "results.csv.gz",
        ["Caption", "Initial Neurons", "Initial SSIM", "Refined Neurons", "Refined SSIM"],
    ),
}
"""Original table -> file that is made of it, and the columns that are kept, as they are."""

STATISTICS, PROMPTS = "statistics_additional_laion_prompts_v1_4.pt", 50_000
"""Original file of means and deviations, and the number of prompts that they are over."""


def make_data(originals: Path, folder: Path) -> None:
    """Write the files of ``data/sd14``.

    Args:
        originals: Folder of the files that ``sources.yaml`` names.
        folder: Where they are written.

    Raises:
        FileNotFoundError: An original is missing.
        ValueError: It lacks a column, or holds no statistics of Stable Diffusion's value layers.
    """
    for original, (name, columns) in TABLES.items():
        table = pd.read_csv(originals / original, sep=";", usecols=columns, dtype=str, keep_default_na=False)
        text = table[columns].to_csv(sep=";", index=False, lineterminator="\n").encode()
        write_atomic(folder / name, gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
    statistics = load_released(originals / STATISTICS)
    if statistics.widths != STABLE_DIFFUSION_WIDTHS:
        raise ValueError(f"{STATISTICS}: layers of {list(statistics.widths)} neurons, not those of Stable Diffusion")
    replace(statistics, count=PROMPTS).save(folder / "statistics.safetensors")


def load_released(path: Path) -> ActivationStatistics:
    """Return activation statistics as the authors' code writes them; nothing but tensors is unpickled.

    Source: authors' code, 1_compute_activations_statistics.py (a pair of lists of tensors: means, deviations).
    """
    mean, std = (tuple(tensor.float() for tensor in part) for part in torch.load(path, "cpu", weights_only=True))
    return ActivationStatistics(mean, std)


def main() -> int:
    """Fetch the originals and write the files; return the exit status."""
    manifest = load_manifest(FOLDER / "sources.yaml")
    try:
        for file in manifest.files:
            print(*fetch_file(file, manifest.folder))
        make_data(manifest.folder, FOLDER)
    except (DownloadError, ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
