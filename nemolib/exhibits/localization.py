"""Exhibits of notebook 03: the search for memorization neurons, and what their deactivation does."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from nemolib import paper
from nemolib.exhibits.base import Exhibit, Reading, Sources, Verdict, of_kinds, positive, values
from nemolib.experiments_localization import stay_memorized
from nemolib.figures import images, localization
from nemolib.tables import format_median_mad

NOTEBOOK = "03_localize_neurons"


def _neurons(sources: Sources, column: str) -> dict[str, pd.Series]:
    table = sources["localization"]
    return {kind: table.loc[table["kind"] == kind, column] for kind in ("vm", "tm")}


def _shown(values: Mapping[str, pd.Series], digits: int = 1) -> str:
    return ", ".join(f"{kind.upper()} {format_median_mad(item, digits=digits)}" for kind, item in values.items())


def _order(values: Mapping[str, float]) -> Verdict:
    """Return whether VM prompts have fewer than TM prompts, as in the paper."""
    return "agrees" if values["vm"] <= values["tm"] else "differs"


def _read_figure_3(sources: Sources) -> Reading:
    chosen = sources["deactivation"].set_index("prompt").loc[list(sources["figure_3"].rows)]
    return Reading(
        f"{int(chosen['neuron_count'].min())} to {int(chosen['neuron_count'].max())} neurons off; similarity to the planted "
        f"image falls from {chosen['copy_before'].median():.2f} to {chosen['copy_after'].median():.2f} (medians of these prompts)",
        "1 to 4 neurons in the boxes of the figure",
        "agrees" if chosen["copy_after"].median() < 0.5 * chosen["copy_before"].median() else "differs",
        "agrees if the similarity falls to less than half; the number of neurons depends on the model's size and training",
    )


def _read_figure_4a(sources: Sources) -> Reading:
    counts = _neurons(sources, "neuron_count")
    medians = {kind: float(item.median()) for kind, item in counts.items()}
    small = {kind: float(((item >= 1) & (item <= 5)).mean()) for kind, item in counts.items()}
    return Reading(
        f"{_shown(counts)} neurons; at most 5: {small['vm']:.0%} of the VM and {small['tm']:.0%} of the TM prompts",
        f"VM {paper.reported('neurons.vm')}, TM {paper.reported('neurons.tm')} of 5,760; at most 5: two thirds of VM, 30 % of TM",
        _order(medians),
        "compared: VM prompts need no more neurons than TM prompts (medians); how many depends on the model",
    )


def read_layers(table: pd.DataFrame) -> Reading:
    """Return how Fig. 4b is read: in which value layers the neurons of VM and of TM prompts lie.

    Args:
        table: Localizations, with VM and TM prompts.
    """
    means = localization.layer_means(table)
    first = (means[[1, 2]].sum(axis=1) / means.sum(axis=1)).to_dict()
    most = {kind: int(row.idxmax()) for kind, row in means.iterrows()}
    return Reading(
        f"share of the neurons in layers 1 and 2: VM {first['vm']:.0%}, TM {first['tm']:.0%}; most in layer {most['vm']} (VM) "
        f"and {most['tm']} (TM)",
        "VM mostly in the first layers, TM deeper; heights of the bars are not known",
        "agrees" if first["vm"] >= first["tm"] else "differs",
        "compared: share of the first down block, VM at least TM",
    )


def _read_figure_7(sources: Sources) -> Reading:
    initial, refined = _neurons(sources, "initial_count"), _neurons(sources, "neuron_count")
    return Reading(
        f"initial {_shown(initial)}; refined {_shown(refined)}",
        f"initial VM {paper.reported('neurons.vm.initial')}, TM {paper.reported('neurons.tm.initial')}; refined VM "
        f"{paper.reported('neurons.vm')}, TM {paper.reported('neurons.tm')}",
        "agrees" if all(refined[kind].median() < initial[kind].median() for kind in initial) else "differs",
        "compared: refinement leaves fewer neurons",
    )


def _read_search(sources: Sources) -> Reading:
    steps, tests = sources["search_steps"], sources["search_tests"]
    end = steps.iloc[-1]
    return Reading(
        f"{steps['prompt'].iloc[0]}: {int(end['neurons'])} neurons at theta = {end['theta']:g}, score {end['score']:.2f}; "
        f"{int(tests['left'].iloc[-1])} after {len(tests)} tests",
    )


def _read_scores(sources: Sources) -> Reading:
    table = sources["deactivation"]
    parts = {kind: table[table["kind"] == kind] for kind in ("vm", "tm")}
    falls = all(part["score_after"].median() < part["score_before"].median() for part in parts.values())
    texts = [
        f"{kind.upper()} score {part['score_before'].median():.2f} to {part['score_after'].median():.2f}, copy similarity "
        f"{part['copy_before'].median():.2f} to {part['copy_after'].median():.2f}"
        for kind, part in parts.items()
    ]
    return Reading(
        "; ".join(texts),
        "SSCD to the original: VM 0.83 to 0.09, TM 0.04 to 0.05 (Table 1)",
        "agrees" if falls else "differs",
        "compared: the score falls; another descriptor, so similarities are not on one scale",
    )


def _read_neuron_z(sources: Sources) -> Reading:
    table = sources["neuron_z"]
    shares = {kind: (part["z"].abs() > 3).mean() for kind, part in table.groupby("kind")}
    return Reading("with |z| > 3: " + ", ".join(f"{kind.upper()} {share:.0%}" for kind, share in shares.items()))


def _read_plain(sources: Sources) -> Reading:
    table = sources["plain_model"]
    values = table[table["kind"] == "vm"].groupby(["quantity", "model"])["value"].median()
    names = {
        "neuron_count": "neurons",
        "largest_z": "largest |z|",
        "copy_similarity_deactivated": "copy similarity without them",
    }
    texts = [
        f"{text} {values[name]['sparse']:.2g} (sparse) and {values[name]['plain']:.2g} (plain)"
        for name, text in names.items()
        if name in values.index.get_level_values(0)
    ]
    return Reading("VM: " + "; ".join(texts))


def _draw_counts(sources: Sources) -> pd.DataFrame:
    reported = {
        "vm": (f"{paper.reported('neurons.vm.initial')}", f"{paper.reported('neurons.vm')}"),
        "tm": (f"{paper.reported('neurons.tm.initial')}", f"{paper.reported('neurons.tm')}"),
        "unmemorized": ("", f"{paper.reported('unmemorized.neurons')}"),
    }
    table = sources["neuron_counts"]
    return pd.DataFrame(
        {
            "prompts": [kind.upper() if len(kind) == 2 else kind for kind in table["kind"]],
            "number": table["prompts"],
            "without neurons": table["without_neurons"],
            "reached": table["reached"],
            "initial": table["initial"],
            "initial (paper)": [reported[kind][0] for kind in table["kind"]],
            "refined": table["neurons"],
            "refined (paper)": [reported[kind][1] for kind in table["kind"]],
        }
    )


def _read_counts(sources: Sources) -> Reading:
    table = sources["neuron_counts"].set_index("kind")
    if "unmemorized" not in table.index:
        return Reading("no unmemorized prompts were searched")
    row = table.loc["unmemorized"]
    share = row["without_neurons"] / row["prompts"]
    return Reading(
        f"{int(row['without_neurons'])} of {int(row['prompts'])} unmemorized prompts have no neurons ({share:.0%})",
        "442 of 500 (88 %)",
        "agrees" if share >= 0.8 else "differs",
        "agrees if at least 80 % have none",
    )


def _draw_table_2(sources: Sources) -> pd.DataFrame:
    wide = {}
    for (kind, algorithm), row in sources["search_cost"].set_index(["kind", "algorithm"]).iterrows():
        column = wide.setdefault(algorithm, {})
        column |= {
            f"{kind.upper()} seconds": f"{row['seconds']:.2f}",
            f"{kind.upper()} seconds (paper, GPU)": f"{row['seconds_paper']:.2f}",
            f"{kind.upper()} UNet evaluations": f"{row['evaluations']:.0f}",
        }
    return pd.DataFrame.from_dict(wide, orient="index").rename_axis("algorithm").reset_index()


def _read_table_2(sources: Sources) -> Reading:
    table = sources["search_cost"].set_index(["kind", "algorithm"])
    shares = {
        who: {kind: table.loc[(kind, "A4"), column] / table.loc[(kind, "total"), column] for kind in ("vm", "tm")}
        for who, column in (("ours", "seconds"), ("paper", "seconds_paper"))
    }
    texts = {
        who: ", ".join(f"{kind.upper()} {share:.0%}" for kind, share in item.items()) for who, item in shares.items()
    }
    return Reading(
        f"the refinement (A4) takes most of the time: {texts['ours']}",
        f"{texts['paper']} (derived from Table 2)",
        "agrees" if min(shares["ours"].values()) > 0.5 else "differs",
        "compared: the refinement takes more than half; seconds are those of this machine",
    )


def _draw_shared(sources: Sources) -> pd.DataFrame:
    table = sources["shared_neurons"].head(12)
    return table[["layer", "neuron", "prompts", "words"]]


def _read_shared(sources: Sources) -> Reading:
    overlap = sources["neuron_overlap"]
    family = overlap["common_words"] >= 2
    means = overlap.groupby(family)["overlap"].mean()
    if len(means) < 2:
        return Reading("no two captions share words")
    return Reading(
        f"captions that share two words share {means[True]:.0%} of their neurons, others {means[False]:.0%} (means)",
        "neurons 25 and 221 of value layer 1 belong to 17 % of the VM prompts, families of captions",
        "agrees" if means[True] > means[False] else "differs",
        "compared: families share more",
    )


def _draw_staying(sources: Sources) -> pd.DataFrame:
    table = sources["deactivation"]
    rest = stay_memorized(table, share=0.0).head(10)
    return pd.DataFrame(
        {
            "prompt": rest["prompt"],
            "kind": rest["kind"].str.upper(),
            "neurons": rest["neuron_count"],
            "score before": rest["score_before"].map("{:.2f}".format),
            "score after": rest["score_after"].map("{:.2f}".format),
            "copy before": rest["copy_before"].map("{:.2f}".format),
            "copy after": rest["copy_after"].map("{:.2f}".format),
        }
    )


def _read_staying(sources: Sources) -> Reading:
    table = sources["deactivation"]
    staying = stay_memorized(table)
    return Reading(
        f"{len(staying)} of {len(table)} prompts keep more than half of their similarity to the planted image, with "
        f"{int(staying['neuron_count'].min())} to {int(staying['neuron_count'].max())} neurons"
        if len(staying)
        else f"none of {len(table)} prompts keeps more than half of its similarity to the planted image",
        "rare; ten examples with 101 to 379 neurons, whose images stay",
        "beside",
        "the paper does not say how many",
    )


FIGURE_3 = Exhibit(
    "figure_3", "Figure 3", "images with and without the neurons of their prompt", NOTEBOOK,
    "Left with all neurons active, right the same seeds with the memorization neurons of the prompt deactivated; the box "
    "says how many. The prompts are spread evenly over how much copy similarity falls.",
    lambda s: images.figure_3(s["figure_3"], s["deactivation"].set_index("prompt").loc[list(s["figure_3"].rows), "neuron_count"].tolist()),
    _read_figure_3, tables=("deactivation",), grids=("figure_3",),
)  # fmt: skip

FIGURE_4A = Exhibit(
    "figure_4a", "Figure 4a", "memorization neurons per prompt", NOTEBOOK,
    "Histogram over prompts; vertical lines are medians.",
    lambda s: localization.figure_4a(s["localization"]), _read_figure_4a, tables=("localization",),
    needs=of_kinds("localization", "vm", "tm"),
)  # fmt: skip

FIGURE_4B = Exhibit(
    "figure_4b", "Figure 4b", "memorization neurons per value layer", NOTEBOOK,
    "Mean number per prompt. Layers 1 and 2 lie in the first down block, 7 in the mid block.",
    lambda s: localization.figure_4b(s["localization"]), lambda s: read_layers(s["localization"]), tables=("localization",),
    needs=tuple(positive("localization", "neuron_count", kind=kind) for kind in ("vm", "tm")),
)  # fmt: skip

FIGURE_7 = Exhibit(
    "figure_7", "Figure 7", "neurons of the initial selection and after refinement", NOTEBOOK,
    "Histograms over prompts; vertical lines are medians.",
    lambda s: localization.figure_7(s["localization"]), _read_figure_7, tables=("localization",),
    needs=of_kinds("localization", "vm", "tm"),
)  # fmt: skip

HIGHLY_MEMORIZED = Exhibit(
    "highly_memorized", "Figure 9 (as a table)", "prompts that stay most similar to their planted image", NOTEBOOK,
    "Memorization score and copy similarity before and after deactivation, the highest copy similarity after it first.",
    _draw_staying, _read_staying, tables=("deactivation",), needs=(values("deactivation", "copy_after"),),
)  # fmt: skip

SHARED_NEURONS = Exhibit(
    "shared_neurons", "Figures 10-12 (as a table)", "neurons that several prompts share", NOTEBOOK,
    "Number of prompts that have the neuron in their refined set, and the words that their captions have in common.",
    _draw_shared, _read_shared, tables=("shared_neurons", "neuron_overlap"),
)  # fmt: skip

SEARCH = Exhibit(
    "search", "Alg. 3 and 4", "the search for one prompt", NOTEBOOK,
    "Score and number of deactivated neurons: left while the threshold of the z-score falls, right test by test of the "
    "refinement. The dotted line is the score to stay below.",
    lambda s: localization.figure_search(s["search_steps"], s["search_tests"]),
    _read_search, tables=("search_steps", "search_tests"),
)  # fmt: skip

NEURON_COUNTS = Exhibit(
    "neuron_counts", "Sec. 4, Table 4", "neurons found, by kind of prompt", NOTEBOOK,
    "Median and median absolute deviation over prompts (unmemorized: over those with neurons). Reached: the initial "
    "selection brought the score to the threshold.",
    _draw_counts, _read_counts, tables=("neuron_counts",), needs=of_kinds("neuron_counts", "vm", "tm"),
)  # fmt: skip

TABLE_2 = Exhibit(
    "table_2", "Table 2", "what the search costs", NOTEBOOK,
    "Mean per prompt. A UNet evaluation is one latent once through the UNet, two with guidance.",
    _draw_table_2, _read_table_2, tables=("search_cost",), needs=of_kinds("search_cost", "vm", "tm"),
)  # fmt: skip

SCORES_BEFORE_AFTER = Exhibit(
    "scores_before_after", "", "score and copy similarity before and after deactivation", NOTEBOOK,
    "A point is a prompt; below the dotted line it is less memorized without its neurons. Dashed: the memorization threshold.",
    lambda s: localization.figure_scores(s["deactivation"], threshold=float(s["search_steps"]["threshold"].iloc[0])),
    _read_scores, tables=("deactivation", "search_steps"), needs=of_kinds("deactivation", "vm", "tm", column="copy_after"),
)  # fmt: skip

NEURON_Z = Exhibit(
    "neuron_z", "", "z-scores of the memorization neurons", NOTEBOOK,
    "A point is a neuron of a prompt; those within the grey band were chosen for their large activation alone.",
    lambda s: localization.figure_neuron_z(s["neuron_z"]), _read_neuron_z, tables=("neuron_z",),
)  # fmt: skip

PLAIN_MODEL = Exhibit(
    "plain_model", "", "where memorization sits in a model trained without sparse values", NOTEBOOK,
    "Same data and schedule; the shipped model was trained with a term that makes value activations sparse.",
    lambda s: localization.figure_plain(s["plain_model"]), _read_plain, tables=("plain_model",),
)  # fmt: skip
