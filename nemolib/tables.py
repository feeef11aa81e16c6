"""Tables and image grids that notebooks pass on to each other, and how tables are printed.

Tables are CSV files in ``build/<profile>/tables``, grids are arrays in ``build/<profile>/grids``.

Tables of notebook 01:
    thresholds: setting, multiplier, paper, ours; low, high (95 % bootstrap interval of tau), tau.
    holdout_pairs: prompt, first, second (seeds), similarity.
    protocol_switches: switch, question, change, mean, sd, threshold, gate, difference.
    activation_statistics: layer (from 1), block, neurons, mean, sd, sd_low, sd_high.

Tables of notebook 02:
    scores: caption, kind, group, copies, image, score, mean_pair, score_released, score_paper, wen.
    detection: score, memorized, prompts, auroc, auroc_low, auroc_high, tpr_at_1_fpr, accuracy, threshold, paper_auroc,
        paper_tpr_at_1_fpr, paper_accuracy, confidence.
    z_by_neuron: kind, layer, neuron, largest_z, caption (equally many prompts of each kind).
    z_by_prompt: caption, kind, layer, neuron, largest_z.
    copies: caption, kind, group, copies, image, copy_similarity, copy_max, seed_similarity.
    ladder: the columns of copies, and score.

Grids of notebook 02:
    samples: rows are prompts (VM, TM, unmemorized), columns planted, seed 0, ...
    noise_differences: the same prompts, columns seed 0, ...; colours.

Tables of notebook 03:
    localization: kind, then the columns of `nemolib.localization.localization_table` without seconds.
    neuron_counts: kind, prompts, searched, reached, without_neurons, initial, neurons, single, at_most_5, at_least_50.
    search_steps: theta, k, neurons, score, threshold, prompt (the initial selection for one prompt).
    search_tests: test, layer (from 1), neuron, score, removed, left, prompt (its refinement).
    search_cost: kind, algorithm, prompts, seconds, evaluations, seconds_paper.
    neuron_z: kind, prompt, layer (from 0), neuron, z.
    shared_neurons: layer (from 1), neuron, prompts, words, captions.
    neuron_overlap: first, second, common_words, shared, overlap.
    deactivation: kind, prompt, neuron_count, reached, score_before, score_after, copy_before, copy_after, same_seed,
        seeds_before, seeds_after.
    plain_model: model, kind, quantity, value.
    overview: layer (from 1), neuron, z, prompt (every neuron for one prompt).

Grids of notebook 03:
    overview_images: as figure_3, of the prompt of table overview alone.
    figure_3: rows are prompts, columns the seeds with all neurons active, then the same seeds with deactivated neurons.

Tables of notebook 04:
    mitigations: setting, repeat, kind, prompt, neurons, sscd_orig, sscd_orig_max, sscd_gen, d_sscd, a_clip.
    table_1: setting, kind, prompts, memorized; then for neurons and each metric its median, and with the suffixes mad,
        low, high, paper, paper_mad what belongs to it.
    table_1_claims: claim, rule, paper, ours, verdict.
    single_neurons: layer (from 1), neuron, prompt, copy_before, copy_single, copy_all.
    unmemorized_images: prompt; neurons, a_clip, d_sscd, sscd_gen, each with the suffixes before, one, all.
    text_carried: layer (from 1), width, neurons, busiest, share.
    unmemorized_quality: images, number, encoder, fid, kid, kid_sd, neurons.

Grids of notebook 04:
    mitigations: rows are prompts, columns planted, then one image of each setting.
    figure_9: rows are prompts, columns planted, then the seeds with deactivated neurons.
    figure_10, figure_11, figure_12: as figure_3, with one neuron deactivated that the prompts share.
    unmemorized_grid: as figure_3, with the neurons of all memorized prompts deactivated.

Tables of notebook 05:
    ablation_levels: level, multiplier, threshold, default.
    ablation_searches: setting, kind, initial_threshold, refinement_threshold, gate, then the columns of
        `nemolib.localization.localization_table` without seconds.
    ablations: the columns of mitigations.
    table_4: the columns of table_1.
    table_4_claims: claim, kind, rule, paper, ours, verdict.
    scaling: kind, factor, prompts; then the columns of table_1 for each metric.
    threshold_map: kind, initial, refinement, initial_threshold, refinement_threshold, prompts, reached; then
        initial_neurons, neurons, sscd_gen, sscd_orig, and the same with the suffix paper.
    neuron_ladder: caption, copies, initial_count, neuron_count, reached, score_before, score_after, copy_before,
        copy_after.
    blocked_quality: setting, asked, neurons, draw, split, pair (equal for the same halves in another order), metric,
        encoder, images, value, reason (why there is no value).
    block_similarity: setting, asked, neurons, draw, output, layer (from 1), block, samples, cosine, lowest.
    layer_effects: part, layer (from 1; 0 for the untouched model), block, name, prompt, sscd_orig, sscd_gen, a_clip.

Grids of notebook 05:
    figure_18, figure_19, figure_20: rows are prompts, columns none, then the numbers of the layers; one seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nemolib import paths, store
from nemolib.files import write_atomic
from nemolib.metrics import median_mad
from nemolib.provenance import write_sidecar


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Images in rows and columns.

    Attributes:
        images: Array [row, column, height, width] or [row, column, height, width, 3].
        rows: A label for each row.
        columns: A label for each column.
    """

    images: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that labels and images belong together."""
        expected = (len(self.rows), len(self.columns))
        if self.images.ndim not in (4, 5) or self.images.shape[:2] != expected:
            raise ValueError(
                f"images of shape {self.images.shape}, {expected[0]} row and {expected[1]} column labels; expected "
                "[row, column, height, width] or [row, column, height, width, 3]"
            )


def table_path(name: str, *, profile: str) -> Path:
    """Return the file of a table, without creating it."""
    return paths.tables_dir(profile) / f"{name}.csv"


def save_table(table: pd.DataFrame, name: str, *, profile: str) -> Path:
    """Write a table for other notebooks, all of it or nothing.

    Args:
        table: One column per quantity; its index is not written.
        name: Name without suffix; see the list above.
        profile: Name of the profile.

    Returns:
        The file.

    Raises:
        OSError: The disk is full; an older table is unchanged.
    """
    path = table_path(name, profile=profile)
    store.write_table(table, path)
    return path


def read_table(name: str, *, profile: str, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Return a table that a notebook saved, floats bit by bit.

    Args:
        name: Name without suffix.
        profile: Name of the profile.
        columns: Columns that must be there.

    Raises:
        FileNotFoundError: No notebook has saved it yet.
        StoreError: The file was cut, or a column is missing.
    """
    return store.read_table(table_path(name, profile=profile), columns=tuple(columns))


def grid_path(name: str, *, profile: str) -> Path:
    """Return the file of an image grid, without creating it."""
    return paths.build_dir(profile) / "grids" / f"{name}.safetensors"


def save_grid(images: np.ndarray, name: str, *, rows: Sequence[str], columns: Sequence[str], profile: str) -> Path:
    """Write an image grid for other notebooks; the same images give the same bytes.

    Args:
        images: Array [row, column, height, width] or [row, column, height, width, 3].
        name: Name without suffix.
        rows: A label for each row.
        columns: A label for each column.
        profile: Name of the profile.

    Returns:
        The file.

    Raises:
        ValueError: Labels and images do not belong together.
        OSError: The disk is full; an older grid is unchanged.
    """
    from safetensors.numpy import save

    grid = Grid(np.ascontiguousarray(images), tuple(rows), tuple(columns))
    labels = json.dumps({"rows": grid.rows, "columns": grid.columns}, ensure_ascii=False)
    path = grid_path(name, profile=profile)
    write_atomic(path, save({"images": grid.images}, metadata={"grid": labels}))
    return path


def read_grid(name: str, *, profile: str) -> Grid:
    """Return an image grid that a notebook saved.

    Raises:
        FileNotFoundError: No notebook has saved it yet.
        ValueError: The file holds something else.
    """
    from safetensors import SafetensorError, safe_open

    path = grid_path(name, profile=profile)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image grid {path}; run the notebook that makes it (make notebooks)")
    try:
        with safe_open(path, framework="numpy") as file:
            labels = json.loads((file.metadata() or {})["grid"])
            return Grid(file.get_tensor("images"), tuple(labels["rows"]), tuple(labels["columns"]))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no image grid; delete it and make it again") from error


def format_median_mad(values: Sequence[float] | np.ndarray | pd.Series, *, digits: int = 2) -> str:
    """Return median ± median absolute deviation as text, such as ``"0.83 ± 0.16"``.

    Raises:
        ValueError: There is no value.
    """
    median, mad = median_mad(values)
    return f"{median:.{digits}f} ± {mad:.{digits}f}"


def to_markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown; numbers stand as they are, so round before."""
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *_cells(table)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def to_latex(table: pd.DataFrame) -> str:
    """Return a table in LaTeX for the package booktabs; numbers stand as they are, so round before."""
    numeric = [pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]
    head = " & ".join(map(_latex, map(str, table.columns))) + r" \\"
    body = [" & ".join(map(_latex, row)) + r" \\" for row in _cells(table)]
    columns = "".join("r" if number else "l" for number in numeric)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body,
                      r"\bottomrule", r"\end{tabular}"]) + "\n"  # fmt: skip


def export_table(
    table: pd.DataFrame,
    stem: str | Path,
    *,
    profile: str,
    notebook: str,
    inputs: Mapping[str, Any] | None = None,
    seeds: Mapping[str, int] | None = None,
) -> dict[str, Path]:
    """Write a table for readers as CSV, Markdown and LaTeX, and beside them a JSON file that says what it came from.

    Args:
        table: The table, rounded as it is to be shown.
        stem: Name without suffix in ``figures/<profile>/``, or a path without suffix.
        profile: Name of the profile.
        notebook: Name of the notebook that made it.
        inputs: Name -> DataFrame, Path, array or plain value; hashes go to the JSON file.
        seeds: Name -> seed.

    Returns:
        The files: ``csv``, ``md``, ``tex``, ``json``.

    Raises:
        OSError: The disk is full; older files are unchanged.
    """
    path = Path(stem) if Path(stem).is_absolute() else paths.figures_dir(profile) / stem
    contents = {
        "csv": table.to_csv(index=False, lineterminator="\n"),
        "md": to_markdown(table),
        "tex": to_latex(table),
    }
    files = {suffix: path.with_name(f"{path.name}.{suffix}") for suffix in contents}
    for suffix, content in contents.items():
        write_atomic(files[suffix], content)
    used = {
        name: value.to_csv(index=False) if hasattr(value, "to_csv") else value for name, value in (inputs or {}).items()
    }
    return files | {
        "json": write_sidecar(files["csv"], notebook=notebook, profile=profile, seeds=seeds or {}, inputs=used)
    }


def _cells(table: pd.DataFrame) -> list[list[str]]:
    """Return the fields of a table as text; a missing value is empty."""
    return [["" if pd.isna(value) else str(value) for value in row] for row in table.itertuples(index=False)]


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≥": r"$\ge$", "≤": r"$\le$",
    "τ": r"$\tau$", "µ": r"$\mu$", "σ": r"$\sigma$", "−": "$-$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
