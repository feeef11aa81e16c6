"""Exhibits of notebook 05, second half: image quality, outputs of blocks, and layers switched off one by one."""

from __future__ import annotations

import textwrap

import pandas as pd

from nemolib import experiments_blocking as science
from nemolib import paper
from nemolib.exhibits.base import Exhibit, Reading, Sources, values
from nemolib.experiments_blocking import FREQUENT, OTHER, OUTPUTS, QUALITY, SMALL, UNTOUCHED
from nemolib.figures import blocking, images
from nemolib.metrics import MEMORIZED_ABOVE
from nemolib.tables import Grid

NOTEBOOK = "05_ablations"

KEPT = 0.5
"""Share of the copy similarity above which a prompt counts as still memorized."""

LOST = 0.1
"""Share of the alignment that counts as a fall."""

NOT_COMPARED = (
    "not all layers that the paper names were switched off, or the untouched model gives no copies (similarity above "
    f"{MEMORIZED_ABOVE}) of the prompts"
)
"""Why layers are not compared with the paper's."""

STRONG_VALUES, STRONG_KEYS = (1, 7), (4, 6)
"""Layers that matter most in the paper (App. C.8)."""


MANY = 12
"""Columns of an image grid from which on images are small: it takes the full width, and labels of rows are cut."""

SMALL_GRID = 0.65
"""Width of a grid with fewer columns, as a share of the text width."""


def _computed(sources: Sources) -> str:
    """Return why there are no values of image quality, or nothing if there are."""
    table = sources["blocked_quality"]
    return str(table["reason"].iloc[0]) if table["value"].isna().all() else ""


def _summary(sources: Sources) -> pd.DataFrame:
    return science.quality_summary(sources["blocked_quality"])


def _read_quality(sources: Sources) -> Reading:
    summary = _summary(sources)
    rows = summary[(summary["metric"] == "fid") & (summary["setting"] == FREQUENT)]
    said = f"no significant loss of quality with up to {paper.reported('quality.most_blocked')} blocked neurons (values not known)"
    rule = (
        "differs if the FID without the most neurons is more than two standard deviations above the untouched model's in the "
        f"same splits; else agrees if two standard deviations are at most {SMALL:.0%} of its FID, and otherwise no more can be said"
    )
    ours = science.quality_sentence(summary)
    last = rows.loc[rows["asked"].idxmax()] if len(rows) else None
    if last is None or pd.isna(last["change_sd"]):
        return Reading(ours, said, "beside", "there are no values to compare")
    if last["change"] > 2 * last["change_sd"]:
        return Reading(ours, said, "differs", rule)
    return Reading(ours, said, "agrees" if science.interval_share(summary) <= SMALL else "beside", rule)


def _draw_quality_table(sources: Sources) -> pd.DataFrame:
    """Return Fig. 8 in numbers, or why there are none."""
    rows = []
    for row in _summary(sources).itertuples():
        known = not pd.isna(row.mean)
        rows.append(
            {
                "blocked": row.setting,
                "asked for": row.asked,
                "neurons": f"{row.neurons:g}",
                "metric": QUALITY[row.metric],
                "features": row.encoder if known else "",
                "images": row.images,
                "mean ± sd": _plus_minus(row.mean, row.sd) if known else str(row.reason),
                "change ± sd": _plus_minus(row.change, row.change_sd, "+")
                if known and row.setting != UNTOUCHED
                else "",
            }
        )
    return pd.DataFrame(rows)


def _plus_minus(mean: float, deviation: float, sign: str = "") -> str:
    return f"{mean:{sign}.3f}" + ("" if pd.isna(deviation) else f" ± {deviation:.3f}")


def _draw_table_3(sources: Sources) -> pd.DataFrame:
    similarity, parts = sources["block_similarity"], []
    for output in OUTPUTS:
        table = science.table_3(similarity, output=output)
        parts.append(table.assign(output=output, neurons=table["neurons"].map("{:g}".format)))
    table = pd.concat(parts, ignore_index=True).rename(columns={"lowest": "lowest, ours", "paper": "lowest, paper"})
    # The paper does not say what exactly it compares; its values stand beside the whole block.
    table["lowest, paper"] = table["lowest, paper"].where(table["output"] == OUTPUTS[0])
    numbers = [name for name in table if name not in ("setting", "asked", "neurons", "output", "lowest, paper")]
    table[numbers] = table[numbers].map("{:.3f}".format)
    table["lowest, paper"] = ["" if pd.isna(value) else f"{value:g}" for value in table["lowest, paper"]]
    return table[["output", *(name for name in table if name != "output")]]


def _read_table_3(sources: Sources) -> Reading:
    similarity = sources["block_similarity"]
    low, random = paper.reported("blocks.cosine"), paper.reported("blocks.cosine.random")
    said = f"every cosine {low} to 1 ({FREQUENT}), {random} to 1 ({OTHER})"
    lowest = science.table_3(similarity).groupby("setting")["lowest"].min()
    return Reading(
        science.blocks_sentence(similarity),
        said,
        # Rounded as the paper's entries are.
        "agrees" if round(lowest[FREQUENT], 2) >= low.value else "differs",
        "agrees if no whole block falls below the paper's lowest cosine with the most frequent neurons; the layers of Stable "
        "Diffusion are wider, so that as many neurons are a smaller share of them",
    )


def _places(sources: Sources) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    """Return the summary of layers, and the numbers of those that matter most, by part."""
    summary = science.layer_summary(sources["layer_effects"])
    return summary, {part: science.strongest(summary, part)["layer"].tolist() for part in ("value", "key")}


def _comparable(summary: pd.DataFrame) -> bool:
    """Return whether the layers that the paper names were switched off, and the untouched model replays the prompts."""
    known = summary[summary["sscd_orig"].notna() & (summary["sscd_orig_untouched"] > MEMORIZED_ABOVE)]
    chosen = {part: set(known.loc[known["part"] == part, "layer"]) for part in ("value", "key")}
    return set(STRONG_VALUES) <= chosen["value"] and set(STRONG_KEYS) <= chosen["key"]


def _listed(numbers: tuple[int, ...] | list[int]) -> str:
    return " and ".join(map(str, numbers))


def _read_figure_16(sources: Sources) -> Reading:
    summary, top = _places(sources)
    said = f"value layers {_listed(STRONG_VALUES)} and key layers {_listed(STRONG_KEYS)} matter most; up layers hardly do (no numbers)"
    ours = f"value layers: {science.layers_sentence(summary, 'value')}; key layers: {science.layers_sentence(summary, 'key')}"
    if not _comparable(summary):
        return Reading(ours, said, "beside", NOT_COMPARED)
    return Reading(
        ours,
        said,
        "agrees" if set(top["value"]) == set(STRONG_VALUES) and set(top["key"]) == set(STRONG_KEYS) else "differs",
        "agrees if the two value and the two key layers that lower the similarity most are the paper's",
    )


def _read_figure_17(sources: Sources) -> Reading:
    summary, top = _places(sources)
    parts = {part: rows for part, rows in summary.groupby("part")}
    falls = {
        part: 1 - float(parts[part].set_index("layer")["a_clip"].reindex(top[part]).min()) / float(parts[part]["a_clip_untouched"].iloc[0])
        for part in ("value", "key")
        if top[part]
    }  # fmt: skip
    lowest = ", ".join(
        f"{part} layer {int(rows.loc[rows['a_clip'].idxmin(), 'layer'])} ({rows['a_clip'].min():.2f})"
        for part, rows in parts.items()
        if part in ("value", "key")
    )
    ours = f"untouched {parts['key']['a_clip_untouched'].iloc[0]:.2f}; lowest alignment: {lowest}"
    said = "with the key layers that matter most the alignment drops, within 0.22 to 0.34 (axis; no numbers)"
    if not _comparable(summary):
        return Reading(ours, said, "beside", NOT_COMPARED)
    shown = ", ".join(f"{part} layers {_listed(top[part])} {fall:.0%}" for part, fall in falls.items())
    return Reading(
        f"{ours}; largest fall with the two layers that lower the similarity most: {shown}",
        said,
        "agrees" if falls["key"] > LOST else "differs",
        f"agrees if one of the two key layers that lower the similarity most takes more than {LOST:.0%} of the alignment",
    )


def _read_part(sources: Sources, part: str) -> Reading:
    return Reading(
        science.layers_sentence(science.layer_summary(sources["layer_effects"]), part),
        "images; see Figure 16 for what is said about them",
        "beside",
        "other prompts, another model",
    )


def _read_figure_20(sources: Sources) -> Reading:
    summary = science.layer_summary(sources["layer_effects"])
    rows = summary[summary["part"] == "convolution"].sort_values("layer")
    said = "still memorized with half of a layer blocked; quality suffers for early layers (images, no numbers)"
    ours = science.layers_sentence(summary, "convolution")
    kept = rows["sscd_orig"] / rows["sscd_orig_untouched"]
    if not (rows["sscd_orig_untouched"] > MEMORIZED_ABOVE).any():
        reason = f"the untouched model gives no copies (similarity above {MEMORIZED_ABOVE}) of the prompts"
        return Reading(ours, said, "beside", reason)
    middle = len(rows) // 2
    early, late = kept.iloc[:middle].median() if middle else kept.median(), kept.iloc[middle:].median()
    return Reading(
        f"{ours}; share that stays: {kept.median():.0%} (median of the layers), first half of the layers {early:.0%}, second half "
        f"{late:.0%}",
        said,
        "agrees" if kept.median() > KEPT else "differs",
        f"agrees if more than {KEPT:.0%} of the copy similarity stays in the median of the layers",
    )


def _labelled(grid: Grid) -> Grid:
    """Return a grid with labels of rows that fit into two lines where images are small."""
    if len(grid.columns) < MANY:
        return grid
    rows = tuple(textwrap.shorten(label, 2 * images.CHARACTERS - 4, placeholder=" ...") for label in grid.rows)
    return Grid(grid.images, rows, grid.columns)


def _grid(number: int, part: str, title: str) -> Exhibit:
    """Return the exhibit of images with layers of a part switched off."""
    name = f"figure_{number}"
    return Exhibit(
        name, f"Figure {number}", title, NOTEBOOK,
        "A row is a memorized prompt, all images are of one seed. none: the untouched model, which replays the training image; "
        "a number: the layer of that number, counted as an image passes them, is switched off.",
        lambda s: images.image_grid(_labelled(s[name]), fraction=1.0 if len(s[name].columns) >= MANY else SMALL_GRID),
        _read_figure_20 if part == "convolution" else lambda s: _read_part(s, part),
        tables=("layer_effects",), grids=(name,),
    )  # fmt: skip


FIGURE_5A = Exhibit(
    "figure_5a", "Figure 5a", "image quality against the number of blocked neurons", NOTEBOOK,
    "Distance of images of unmemorized prompts from other images of the untouched model; mean and standard deviation over splits of "
    "the seeds (and draws of random neurons). Dotted, with its band: the untouched model compared with itself. With few images "
    "the distances are far too large: only points of one panel can be compared.",
    lambda s: blocking.figure_5a(_summary(s)), _read_quality, tables=("blocked_quality",), needs=(_computed,),
)  # fmt: skip

FIGURE_8 = Exhibit(
    "figure_8", "Figure 8", "FID, CLIP-FID and KID against the number of blocked neurons", NOTEBOOK,
    "As Figure 5a. Which encoder gave the features stands in the table of the numbers; where there is one, CLIP-FID is FID.",
    lambda s: blocking.figure_8(_summary(s)), _read_quality, tables=("blocked_quality",), needs=(_computed,),
)  # fmt: skip

TABLE_3 = Exhibit(
    "table_3", "Table 3", "outputs of cross-attention blocks with blocked neurons", NOTEBOOK,
    "Cosine of the output with blocked neurons and untouched, first denoising step, mean over unmemorized prompts and seeds (and "
    "draws of random neurons). block: the whole output, with residual connections; cross-attention: its own part alone. asked: "
    "how many neurons were to be blocked; neurons: how many were.",
    _draw_table_3, _read_table_3, tables=("block_similarity",),
)  # fmt: skip

FIGURE_16 = Exhibit(
    "figure_16", "Figure 16", "similarity with value and key layers set to zero", NOTEBOOK,
    "Similarity to the planted image, one layer at a time. Small points: VM prompts; diamonds: their median; dotted: the untouched "
    "model.",
    lambda s: blocking.figure_16(s["layer_effects"]), _read_figure_16, tables=("layer_effects",),
    needs=(values("layer_effects", "sscd_orig"),),
)  # fmt: skip

FIGURE_17 = Exhibit(
    "figure_17", "Figure 17", "alignment with value and key layers set to zero", NOTEBOOK,
    "Alignment of image and prompt, one layer at a time; points as in Figure 16.",
    lambda s: blocking.figure_17(s["layer_effects"]), _read_figure_17, tables=("layer_effects",),
)  # fmt: skip

FIGURE_18 = _grid(18, "value", "images with each value layer set to zero")

FIGURE_19 = _grid(19, "key", "images with each key layer set to zero")

FIGURE_20 = _grid(20, "convolution", "images with half of each convolution blocked")

CONVOLUTIONS = Exhibit(
    "convolutions", "", "similarity and alignment with half of each convolution blocked", NOTEBOOK,
    "Half of the output channels, drawn at random, are zero, one convolution of the down blocks at a time; points as in Figure 16.",
    lambda s: blocking.figure_convolutions(s["layer_effects"]), _read_figure_20, tables=("layer_effects",),
)  # fmt: skip

QUALITY_TABLE = Exhibit(
    "blocked_quality", "", "Figure 8 in numbers", NOTEBOOK,
    "images: in each of the two sets that are compared. change: from the untouched model in the same split. sd: standard deviation "
    "over splits of the seeds (and draws); splits share images, so that it is rather too small.",
    _draw_quality_table, _read_quality, tables=("blocked_quality",),
)  # fmt: skip
