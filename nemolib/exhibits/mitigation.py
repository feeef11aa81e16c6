"""Exhibits of notebook 04: Table 1, images of every setting, shared neurons one by one, unmemorized prompts."""

from __future__ import annotations

import pandas as pd

from nemolib import paper
from nemolib.exhibits.base import Exhibit, Reading, Sources, values
from nemolib.experiments_mitigation import INITIAL, NEMO, NONE, OFF, RANDOM, shown_table
from nemolib.figures import images, mitigation
from nemolib.tables import Grid

NOTEBOOK = "04_deactivate_neurons"

_COMPARED = tuple(values("table_1", "sscd_orig", kind="vm", setting=name) for name in (NONE, RANDOM, NEMO, INITIAL))


def _cell(table: pd.DataFrame, setting: str, metric: str, kind: str = "vm") -> float:
    return float(table.set_index(["kind", "setting"]).loc[(kind, setting), metric])


def _read_table_1(sources: Sources) -> Reading:
    table = sources["table_1"]
    ours, theirs = (
        [_cell(table, name, f"sscd_orig{suffix}") for name in (NONE, RANDOM, NEMO)] for suffix in ("", "_paper")
    )
    shown = "untouched {:.2f}, random neurons {:.2f}, NeMo {:.2f}"
    return Reading(
        f"VM, SSCD_Orig: {shown.format(*ours)}; initial selection {_cell(table, INITIAL, 'sscd_orig'):.2f}",
        f"VM, SSCD_Orig: {shown.format(*theirs)}",
        "agrees" if ours[2] < 0.5 * ours[0] < ours[1] else "differs",
        "agrees if NeMo removes more than half of the copy similarity of VM prompts, and random neurons do not; another "
        "descriptor, so not on one scale",
    )


def _read_claims(sources: Sources) -> Reading:
    claims = sources["table_1_claims"]
    failed = claims.loc[claims["verdict"] != "holds", "claim"].tolist()
    return Reading(
        f"{len(claims) - len(failed)} of {len(claims)} hold" + (f"; not: {', '.join(failed)}" if failed else ""),
        "all hold in the paper's Table 1",
        "differs" if failed else "agrees",
        "the rules are in the table; the reasons are in notebook 04",
    )


def _read_images(sources: Sources) -> Reading:
    grid: Grid = sources["mitigations"]
    return Reading(f"{len(grid.rows)} prompts, {len(grid.columns) - 1} settings, one seed")


def _read_single(sources: Sources, place: int) -> Reading:
    table = sources["single_neurons"]
    (layer, neuron), part = list(table.groupby(["layer", "neuron"], sort=False))[place]
    medians = part[["copy_before", "copy_single", "copy_all"]].median()
    reported = paper.reported("shared.vm_share")
    return Reading(
        f"neuron {neuron} of value layer {layer}, {len(part)} prompts: copy similarity {medians['copy_before']:.2f}, without "
        f"this neuron {medians['copy_single']:.2f}, without all neurons of the prompt {medians['copy_all']:.2f} (medians)",
        f"two neurons of value layer 1 belong to {reported.value:.0%} of the VM prompts, by families of captions",
        "beside",
        "which neurons are shared, and by how many prompts, depends on the model",
    )


def _read_staying(sources: Sources) -> Reading:
    chosen = sources["deactivation"].set_index("prompt").loc[list(sources["figure_9"].rows)]
    return Reading(
        f"{int(chosen['neuron_count'].min())} to {int(chosen['neuron_count'].max())} neurons off, copy similarity "
        f"{chosen['copy_after'].min():.2f} to {chosen['copy_after'].max():.2f}",
        "ten examples with 101 to 379 neurons, whose images stay",
        "beside",
        "here the prompts that stay most similar; the paper does not say how many stay memorized",
    )


def _read_unharmed(sources: Sources) -> Reading:
    medians = sources["unmemorized_images"].median(numeric_only=True)
    return Reading(
        f"A_CLIP {medians['a_clip_before']:.2f}; {medians['a_clip_one']:.2f} without the {medians['neurons_one']:g} neurons of one "
        f"memorized prompt, {medians['a_clip_all']:.2f} without the {medians['neurons_all']:g} of all (medians)",
        "image quality hardly changes while neurons are few (Fig. 5a; heights of the curves are not known)",
        "agrees" if medians["a_clip_before"] - medians["a_clip_one"] <= 0.1 * medians["a_clip_before"] else "differs",
        "agrees if the alignment loses at most a tenth without the neurons of one memorized prompt",
    )


def _draw_quality(sources: Sources) -> pd.DataFrame:
    table = sources["unmemorized_quality"]
    return pd.DataFrame(
        {
            "images": table["images"],
            "number": table["number"],
            "features": table["encoder"],
            "FID": table["fid"].map("{:.3f}".format),
            "KID": [f"{mean:.4f} ± {sd:.4f}" for mean, sd in zip(table["kid"], table["kid_sd"], strict=True)],
        }
    )


def _read_unmemorized_images(sources: Sources) -> Reading:
    if sources["unmemorized_quality"]["kid"].notna().all():
        return _read_quality(sources)
    number = len(sources["unmemorized_grid"].rows)
    return Reading(f"{number} prompts, {int(sources['unmemorized_quality']['neurons'].iloc[0])} neurons off")


def _single_neuron(sources: Sources, place: int) -> str:
    """Return what is missing for the exhibit of one of the most shared neurons."""
    number = len(sources["single_neurons"].groupby(["layer", "neuron"]))
    return "" if number > place else f"only {number} neurons are shared by several prompts"


def _read_quality(sources: Sources) -> Reading:
    table = sources["unmemorized_quality"].set_index("images")
    return Reading(
        f"KID {table.loc[NONE, 'kid']:.4f} untouched, {table.loc[OFF, 'kid']:.4f} with {int(table['neurons'].iloc[0])} neurons off",
        "no loss of quality for few neurons (Fig. 5a)",
        "beside",
        "so many neurons at once is more than any prompt needs",
    )


def _single(place: int) -> Exhibit:
    """Return the exhibit of one of the three most shared neurons."""
    name = f"figure_{10 + place}"
    return Exhibit(
        name, f"Figure {10 + place}", f"the {('', 'second ', 'third ')[place]}most shared neuron", NOTEBOOK,
        "Prompts that share the neuron: left with all neurons active, right the same seeds with this neuron deactivated alone.",
        lambda s: images.figure_3(s[name], [1] * len(s[name].rows), names=images.SINGLE),
        lambda s: _read_single(s, place), tables=("single_neurons",), grids=(name,), needs=(lambda s: _single_neuron(s, place),),
    )  # fmt: skip


FIGURE_9 = Exhibit(
    "figure_9", "Figure 9", "prompts that stay most similar to their planted image", NOTEBOOK,
    "Left the planted image, then one image per seed with the neurons of the prompt deactivated.",
    lambda s: images.image_grid(s["figure_9"]), _read_staying, tables=("deactivation",), grids=("figure_9",),
)  # fmt: skip

FIGURE_10, FIGURE_11, FIGURE_12 = _single(0), _single(1), _single(2)

TABLE_1 = Exhibit(
    "table_1", "Table 1", "every mitigation on the same seeds", NOTEBOOK,
    "Median ± median absolute deviation over prompts. SSCD_Orig: similarity to the planted image; SSCD_Gen: to the untouched "
    "model's image of the same seed; D_SSCD: of two images of the prompt; A_CLIP: of image and prompt. Copies: share of prompts "
    "with an image whose SSCD_Orig is above 0.7. The paper's numbers are of Stable Diffusion, with SSCD and CLIP.",
    lambda s: shown_table(s["table_1"]), _read_table_1, tables=("table_1",), needs=_COMPARED,
)  # fmt: skip

TABLE_1_FIGURE = Exhibit(
    "table_1_figure", "", "Table 1 as a figure", NOTEBOOK,
    "Filled: ours, median over prompts with its 95 % bootstrap interval. Hollow: the paper's median, of another model.",
    lambda s: mitigation.figure_table_1(s["table_1"]), _read_table_1, tables=("table_1",), needs=_COMPARED,
)  # fmt: skip

CLAIMS = Exhibit(
    "table_1_claims", "", "what the paper's Table 1 says about VM prompts", NOTEBOOK,
    "Each rule holds in the paper's table. Numbers are those that the rule compares, in its order.",
    lambda s: s["table_1_claims"], _read_claims, tables=("table_1_claims",),
)  # fmt: skip

MITIGATION_IMAGES = Exhibit(
    "mitigation_images", "", "one image of each setting", NOTEBOOK,
    "All of one seed. Planted: the image of the training data that the prompt replays.",
    lambda s: images.image_grid(
        Grid(s["mitigations"].images, s["mitigations"].rows, mitigation.short_names(s["mitigations"].columns))
    ),
    _read_images, grids=("mitigations",),
)  # fmt: skip

UNHARMED = Exhibit(
    "unmemorized_unharmed", "", "unmemorized prompts without memorization neurons", NOTEBOOK,
    "A point is a prompt; on the dotted line nothing changes.",
    lambda s: mitigation.figure_unharmed(s["unmemorized_images"]), _read_unharmed, tables=("unmemorized_images",),
    needs=(values("unmemorized_images", "a_clip_before", "a_clip_one", "a_clip_all"),),
)  # fmt: skip

UNMEMORIZED_IMAGES = Exhibit(
    "unmemorized_grid", "", "images of unmemorized prompts with and without all memorization neurons", NOTEBOOK,
    "Left with all neurons active, right the same seeds with the neurons of all memorized prompts deactivated at once.",
    lambda s: images.figure_3(
        s["unmemorized_grid"], [int(s["unmemorized_quality"]["neurons"].iloc[0])] * len(s["unmemorized_grid"].rows)
    ),
    _read_unmemorized_images, tables=("unmemorized_quality",), grids=("unmemorized_grid",),
)  # fmt: skip

QUALITY = Exhibit(
    "unmemorized_quality", "", "distance of image sets of unmemorized prompts", NOTEBOOK,
    "Compared with other seeds of the untouched model, equally many images. With so few images FID is biased upwards: only the "
    "rows can be compared.",
    _draw_quality, _read_quality, tables=("unmemorized_quality",),
    needs=tuple(values("unmemorized_quality", "fid", "kid", images=name) for name in (NONE, OFF)),
)  # fmt: skip
