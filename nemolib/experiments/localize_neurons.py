"""Notebook 03: the search for the memorization neurons of all prompts, and what deactivating them does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nemolib import paper, plots
from nemolib.blocked_score import BlockedScore
from nemolib.exhibits import (
    KINDS,
    Claim,
    counted,
    drawn_interval,
    each_kind,
    effect,
    exhibit,
    median_interval,
    median_mad,
    must,
    of_kinds,
    rounding,
    share_interval,
)
from nemolib.experiments.memorization_score import z_of
from nemolib.first_step import ALGORITHMS, first_step, scoring
from nemolib.localization import Search, by_prompt, localization_table, memorized, neuron_sets
from nemolib.mitigation import DeactivatedNeurons, random_neurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.prompts import MEMORIZED
from nemolib.refinement import RefinementTest
from nemolib.selection import SelectionStep
from nemolib.settings import SearchSettings
from nemolib.store import Grid

if TYPE_CHECKING:
    import torch

    from nemolib.run import Run

NOTEBOOK = "03_localize_neurons"


def prompt_score(run: Run, prompt: str) -> BlockedScore:
    """Return the score that the search asks of neuron sets for one prompt."""
    step = first_step(run.pipe, settings=run.profile.detection, protocol=run.profile.protocol)
    how = {name: getattr(run.profile, name) for name in ("similarity", "search", "protocol")}
    return Search(step, embed(run.pipe, [prompt]), run.statistics, gate=run.threshold, **how).score


def _followed(run: Run) -> tuple[BlockedScore, NeuronSet]:
    """Return the score of the prompt that the notebook searches by hand, and the neurons that it kept."""
    table = run.load("overview")
    pairs = table.loc[table["refined"], ["layer", "neuron"]].sub([1, 0]).itertuples(index=False, name=None)
    return prompt_score(run, table["prompt"].iloc[0]), NeuronSet.of(pairs, layers=len(run.statistics.widths))


def _dispensable(run: Run) -> int:
    """Return how many of the kept neurons can be reactivated alone with the score below tau_ref."""
    score, kept = _followed(run)
    tau_ref = max(run.threshold, run.load("search_steps")["score"].iloc[-1])
    return sum(score(kept - NeuronSet.of([pair], layers=len(kept.layers))) < tau_ref for pair in kept)


def _without_top_k(run: Run) -> list[float]:
    """Return the theta at which the initial selection ends that takes no neuron for its activation alone, and its size."""
    (found,) = run.search([run.load("overview")["prompt"].iloc[0]], search=replace(run.profile.search, k_step=0))
    return [found.theta, len(found.initial)]


def _most_frequent_share(run: Run) -> float:
    """Return the share of the VM prompts that have the most frequent neuron of value layer 1."""
    vm = run.load("localization").query("kind == 'vm'")
    return neuron_rows(vm).query("layer == 1")["neuron"].value_counts().head(1).sum() / len(vm)


def _random_score(run: Run) -> float:
    score, kept = _followed(run)
    return score(random_neurons(kept, run.statistics.widths, seed=0))


EXERCISES = {
    "03.1": lambda run: lambda answer: abs(answer - _random_score(run)) < 0.1,
    "03.2": _dispensable,
    "03.3": _without_top_k,
    "03.4": _most_frequent_share,
}


# 1. One prompt by hand


def search_steps(steps: Sequence[SelectionStep], threshold: float) -> pd.DataFrame:
    """Return the steps of an initial selection as a table: columns theta, k, neurons (number), score, threshold."""
    rows = [(step.theta, step.k, len(step.neurons), step.score, threshold) for step in steps]
    return pd.DataFrame(rows, columns=["theta", "k", "neurons", "score", "threshold"])


def search_tests(initial: NeuronSet, tests: Sequence[RefinementTest]) -> pd.DataFrame:
    """Return the tests of a refinement as a table.

    Args:
        initial: The candidates that it started from.
        tests: Its tests in order, of whole layers and of single neurons.

    Returns:
        Columns test (from 1), layer (from 1, as in the paper), neuron (missing where a whole layer was tested), score
        (with it reactivated), removed (it is not needed) and left (neurons that stay deactivated after the test).
    """
    left, rows = initial, []
    for number, test in enumerate(tests, start=1):
        if test.removed and test.neuron is None:
            left = left.without_layer(test.layer)
        elif test.removed:
            left = left - NeuronSet.of([(test.layer, test.neuron)], layers=len(left.layers))
        rows.append((number, test.layer + 1, test.neuron, test.score, test.removed, len(left)))
    table = pd.DataFrame(rows, columns=["test", "layer", "neuron", "score", "removed", "left"])
    return table.astype({"neuron": "Int64"})


def prompt_neurons(z: Sequence[torch.Tensor], initial: NeuronSet, refined: NeuronSet) -> pd.DataFrame:
    """Return all neurons for one prompt: columns layer (from 1, as in the paper), neuron, z, initial and refined (bool).

    Args:
        z: For each layer the z-scores [neuron] of the prompt.
        initial: Its candidates.
        refined: Those that refinement keeps.
    """
    rows = [
        (layer + 1, neuron, value, (layer, neuron) in initial, (layer, neuron) in refined)
        for layer, values in enumerate(z)
        for neuron, value in enumerate(values.cpu().double().tolist())
    ]
    return pd.DataFrame(rows, columns=["layer", "neuron", "z", "initial", "refined"])


@exhibit("Alg. 3 and 4", "the search for one prompt")
def search(search_steps: pd.DataFrame, search_tests: pd.DataFrame) -> plots.Figure:
    """Score and number of deactivated neurons: left while the threshold of the z-score falls, right test by test of the refinement; orange marks are neurons that must stay deactivated.

    The dotted line is the score to stay below.
    """
    steps, tests, threshold = search_steps, search_tests, float(search_steps["threshold"].iloc[0])
    with plots.panels(2, 2, aspect=0.5, sharex="col", width_ratios=(1, 2)) as (figure, axes):
        (score, tested), (count, left) = axes
        score.plot(steps["theta"], steps["score"], "o-", color="black")
        count.plot(steps["theta"], steps["neurons"], "s-", color="black")
        removed, kept = tests[tests["removed"]], tests[~tests["removed"]]
        color = plots.ROLES["vm"].color
        tested.plot("test", "score", "o", data=removed, color="0.6", markersize=2.5, label="not needed: reactivated")
        tested.plot("test", "score", "v", data=kept, color=color, markersize=2.5, label="needed: stays off")
        left.step(tests["test"], tests["left"], where="post", color="black")
        # Where the initial selection did not reach the threshold, its own score takes the threshold's place.
        for place, line in ((score, threshold), (tested, max(threshold, steps["score"].iloc[-1]))):
            place.axhline(line, color="black", linestyle=":", linewidth=0.8)
        score.set(title="initial selection", ylabel="score", ylim=(0, 1.05))
        tested.set(title="refinement", ylim=(0, 1.05))
        count.set(xlabel=r"threshold $\theta$ of the z-score", ylabel="neurons off", ylim=(0, None))
        left.set(xlabel="test (layers first, then neurons)", ylim=(0, None))
        count.invert_xaxis()
        figure.suptitle(steps["prompt"].iloc[0], fontsize=plots.LABEL_SIZE, parse_math=False)
        figure.legend(*tested.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


# 2. All prompts


def localizations(run: Run, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the memorization neurons of prompts, one row each.

    Args:
        run: The run.
        rows: Rows of prompt tables, at least one; None: VM, TM, and as many unmemorized ones as the profile's extent says.

    Returns:
        Column kind, then those of `nemolib.localization.localization_table` with the seconds of each algorithm.
    """
    if rows is None:
        rows = pd.concat([run.prompts(*MEMORIZED), run.prompts("unmemorized", most=run.profile.extent.searched)])
    table = localization_table(run.search(rows["caption"].tolist()), seconds=True)
    return pd.concat([rows[["kind"]].reset_index(drop=True), table], axis=1)


def search_claims(run: Run, found: pd.DataFrame, limits: pd.Series | None = None) -> Iterator[Claim]:
    """Yield what must hold of localizations, whatever the search finds; limits: thresholds of the refinement, if not the run's."""
    searched, limits = found[found["memorized"]], run.threshold if limits is None else limits[found["memorized"]]
    pairs = zip(neuron_sets(searched), neuron_sets(searched, "initial"), strict=True)
    yield must("every refined set lies within its initial selection", all(not kept - first for kept, first in pairs))
    text = "refinement never ends above the threshold it was given"
    excess = max([0, *(searched["refined_score"] - searched["initial_score"].clip(lower=limits))])
    why = "a score that is evaluated twice may differ in the last digits"
    yield must(text, excess, at_most=rounding(run.pipe.unet.dtype), reason=why)
    outside = found.loc[~found["memorized"], "neuron_count"].sum()
    yield must("prompts that fail the gate have no neurons", int(outside), equals=0)


def counts_table(found: pd.DataFrame) -> pd.DataFrame:
    """Return how many neurons the search found, by kind of prompt.

    Returns:
        One row per kind, columns kind, prompts, reached (the initial selection brought the score to the threshold),
        without_neurons, initial and neurons (median and median absolute deviation, over prompts with neurons for the
        unmemorized, as in the paper).
    """
    rows = []
    for kind, part in found.groupby("kind", sort=False):
        none = part["neuron_count"] == 0
        counted = part[~none] if kind == "unmemorized" else part
        texts = [median_mad(counted[name], digits=1) for name in ("initial_count", "neuron_count")]
        rows.append((kind, len(part), part["reached"].sum(), none.sum(), *texts))
    return pd.DataFrame(rows, columns=["kind", "prompts", "reached", "without_neurons", "initial", "neurons"])


UNMEMORIZED = "unmemorized.without_neurons", "prompts.unmemorized"
"""What the paper reports of unmemorized prompts."""


def read_counts(neuron_counts: pd.DataFrame) -> Iterator[Claim]:
    """Yield how many searches reach the threshold, and whether unmemorized prompts have no neurons."""
    table = neuron_counts.set_index("kind")
    reached = each_kind((table["reached"].map(str) + " of " + table["prompts"].map(str)).get)
    yield Claim("searches whose initial selection reaches the threshold", reached, rule="the paper gives no number")
    if "unmemorized" in table.index:
        without, prompts = table.loc["unmemorized", ["without_neurons", "prompts"]]
        ours, theirs = f"{without} of {prompts}", "{} of {}".format(*map(paper.reported, UNMEMORIZED))
        ends = share_interval(np.arange(prompts) < without)
        size = {"at_least": 0.8, "ours": ours, "paper": theirs, "n": f"{prompts} prompts", "interval": ends}
        yield effect("most unmemorized prompts have no neurons", without / prompts, "share without neurons", **size)


@exhibit("Sec. 4, Table 4", "neurons found, by kind of prompt", read=read_counts)
def neuron_counts(neuron_counts: pd.DataFrame) -> pd.DataFrame:
    """Median and median absolute deviation over prompts (unmemorized: over those with neurons).

    Reached: the initial selection brought the score to the threshold.
    """
    of_kinds(neuron_counts, "neuron_counts", *MEMORIZED)
    table, kinds = neuron_counts, neuron_counts["kind"]
    shown = {"kind": kinds.map(KINDS), "prompts": table["prompts"], "without neurons": table["without_neurons"]}
    initial = [paper.reported(f"neurons.{kind}.initial") if kind in MEMORIZED else "not reported" for kind in kinds]
    refined = [paper.reported(f"neurons.{kind}") for kind in kinds]
    shown |= {"reached": table["reached"], "initial selection (paper)": _beside(table["initial"], initial)}
    return pd.DataFrame(shown | {"after refinement (paper)": _beside(table["neurons"], refined)})


def _beside(ours: Iterable[object], theirs: Iterable[object]) -> list[str]:
    """Return our values as text, each with the paper's in brackets."""
    return [f"{mine or 'none'} ({other})" for mine, other in zip(ours, theirs, strict=True)]


def counts_figure(localization: pd.DataFrame, stages: Mapping[str, str]) -> plots.Figure:
    """Return which share of the VM and TM prompts has at most how many neurons, each column a panel with its title."""
    parts = of_kinds(localization, "localization", *MEMORIZED)
    single = {"fraction": 0.5, "aspect": 0.75, "legend": 1}
    size = single if len(stages) == 1 else {"aspect": 0.4, "sharey": True, "legend": 2}
    with plots.panels(1, len(stages), squeeze=False, **size) as (figure, axes):
        for place, (column, title) in zip(axes[0], stages.items(), strict=True):
            for kind, part in parts.items():
                look = plots.ROLES[kind]
                style = {"color": look.color, "linestyle": look.line, "label": f"{look.label}, n = {len(part)}"}
                place.ecdf(part[column], **style)
                place.plot(part[column].median(), 0.5, color=look.color, marker=look.marker)
            place.set(title=title, xlabel="at most so many neurons", xlim=(0, None), ylim=(0, 1.03))
        axes[0, 0].set_ylabel("share of the prompts")
        axes[0, 0].yaxis.set_major_formatter(plots.PercentFormatter(1.0, decimals=0))
    return figure


STAGES = {"initial_count": "initial selection", "neuron_count": "after refinement"}
"""Columns of Fig. 7, and what they are."""

REPORTED = {"initial_count": "neurons.{}.initial", "neuron_count": "neurons.{}"}
"""What the paper reports of them, for a kind of prompts."""


def median_counts(localization: pd.DataFrame, column: str) -> tuple[str, str]:
    """Return a column of Fig. 7 for VM and TM prompts as text: median ± median absolute deviation, and the paper's."""
    counts = {kind: part[column] for kind, part in of_kinds(localization, "localization", *MEMORIZED).items()}
    theirs = each_kind(lambda kind: paper.reported(REPORTED[column].format(kind)))
    return each_kind(lambda kind: median_mad(counts[kind], digits=1)), theirs


def read_4a(localization: pd.DataFrame) -> Iterator[Claim]:
    """Yield how many neurons VM and TM prompts have."""
    ours, theirs = median_counts(localization, "neuron_count")
    parts = of_kinds(localization, "localization", *MEMORIZED)
    counts = {kind: part["neuron_count"] for kind, part in parts.items()}
    ratio, n = counts["vm"].median() / counts["tm"].median(), each_kind(lambda kind: len(counts[kind]))
    ends = each_kind(lambda kind: median_interval(counts[kind]))
    size = {"at_most": 0.5, "ours": ours, "paper": theirs, "n": n, "interval": ends}
    yield effect("VM prompts have fewer neurons than TM prompts", ratio, "median of VM divided by that of TM", **size)
    few = {kind: part.between(1, 5) for kind, part in counts.items()}
    ours = each_kind(lambda kind: f"{few[kind].mean():.0%}")
    theirs = each_kind(lambda kind: f"{paper.reported(f'neurons.{kind}.share_up_to_5').value:.0%}")
    size = {"at_least": 0.5, "ours": ours, "paper": theirs, "n": n, "interval": f"VM {share_interval(few['vm'])}"}
    yield effect("a few neurons are enough for a VM prompt", few["vm"].mean(), "share with 1 to 5 neurons", **size)
    ours = each_kind(lambda kind: f"{(counts[kind] == 1).sum()} of {len(counts[kind])}")
    theirs = f"VM {paper.reported('neurons.vm.single')} of {paper.reported('prompts.vm')}"
    yield Claim("prompts with a single neuron", ours, theirs)


@exhibit("Figure 4a", "memorization neurons per prompt", read=read_4a)
def figure_4a(localization: pd.DataFrame) -> plots.Figure:
    """Share of the prompts that have at most so many neurons; a marker is the median."""
    return counts_figure(localization, {"neuron_count": "memorization neurons"})


def read_7(localization: pd.DataFrame) -> Iterator[Claim]:
    """Yield how many neurons the initial selection has, and refinement leaves."""
    for column, stage in STAGES.items():
        yield Claim(f"neurons, {stage}", *median_counts(localization, column))


@exhibit("Figure 7", "neurons of the initial selection and after refinement", read=read_7)
def figure_7(localization: pd.DataFrame) -> plots.Figure:
    """Share of the prompts that have at most so many neurons; a marker is the median."""
    return counts_figure(localization, STAGES)


def layer_counts(found: pd.DataFrame) -> pd.DataFrame:
    """Return the neurons of each VM and TM prompt by value layer from 1 (columns); the index is the kind."""
    chosen = memorized(found)
    counts = pd.DataFrame([item.counts for item in neuron_sets(chosen)], index=chosen["kind"])
    return counts.rename(columns=lambda layer: layer + 1)


def layer_means(found: pd.DataFrame) -> pd.DataFrame:
    """Return the mean number of neurons per prompt by kind (VM, TM: rows) and value layer from 1 (columns)."""
    return layer_counts(found).groupby("kind", sort=False).mean()


def read_4b(localization: pd.DataFrame) -> Iterator[Claim]:
    """Yield in which value layers the neurons of VM and of TM prompts lie."""
    of_kinds(localization[localization["neuron_count"] > 0], "localization (prompts with neurons)", *MEMORIZED)
    means = layer_means(localization)
    first = means[[1, 2]].sum(axis=1) / means.sum(axis=1)
    ours, n = each_kind(lambda kind: f"{first[kind]:.0%}"), each_kind(localization["kind"].value_counts().get)
    theirs = "VM mostly in the first layers; heights of the bars are not known"
    vm = layer_counts(localization).loc[["vm"]]
    ends = f"VM {drawn_interval(lambda counts: counts[:, :2].sum() / max(1, counts.sum()), vm)}"
    size = {"at_least": 0.5, "ours": ours, "paper": theirs, "n": n, "interval": ends}
    yield effect("neurons of VM prompts lie in the first layers", first["vm"], "share in value layers 1 and 2", **size)


@exhibit("Figure 4b", "memorization neurons per value layer", read=read_4b)
def figure_4b(localization: pd.DataFrame) -> plots.Figure:
    """Mean number per prompt, with its 95 % bootstrap interval.

    Layers 1 and 2 lie in the first down block, 7 in the mid block.
    """
    of_kinds(localization[localization["neuron_count"] > 0], "localization (prompts with neurons)", *MEMORIZED)
    counts = layer_counts(localization).rename_axis(columns="layer").stack().rename("neurons").reset_index()
    with plots.panels(fraction=0.5, aspect=0.75, legend=2) as (figure, axes):
        plots.bars(axes, counts, "layer", "neurons")
        n = each_kind(memorized(localization)["kind"].value_counts().get)
        axes.set(xlabel=f"value layer (prompts: {n})", ylabel="neurons per prompt")
    return figure


def neuron_rows(found: pd.DataFrame) -> pd.DataFrame:
    """Return the neurons that were found, a row each: columns kind, prompt, layer (from 1), neuron (from 0)."""
    sets = zip(found["kind"], found["prompt"], neuron_sets(found), strict=True)
    rows = [(kind, prompt, layer + 1, neuron) for kind, prompt, neurons in sets for layer, neuron in neurons]
    return pd.DataFrame(rows, columns=["kind", "prompt", "layer", "neuron"])


def neuron_z_scores(run: Run, found: pd.DataFrame) -> pd.DataFrame:
    """Return the z-score of each neuron that was found: the columns of `neuron_rows`, and z."""
    table, z = neuron_rows(found), z_of(run, found["prompt"].tolist())
    places = table["prompt"].map(found["prompt"].tolist().index)
    rows = zip(table["layer"], places, table["neuron"], strict=True)
    return table.assign(z=[z[layer - 1][place, neuron] for layer, place, neuron in rows])


@exhibit("", "z-scores of the memorization neurons")
def neuron_z(neuron_z: pd.DataFrame) -> plots.Figure:
    """A point is a neuron of a prompt (n: their number), in standard deviations; those within the grey band were chosen for their large activation alone."""
    table, theta = pd.concat(of_kinds(neuron_z, "neuron_z", *MEMORIZED).values()), SearchSettings().theta_min
    with plots.panels(fraction=0.6, aspect=0.65, legend=2) as (figure, axes):
        plots.points(axes, table, "layer", "z")
        axes.axhspan(-theta, theta, color="0.9", zorder=0)
        n = each_kind(table.groupby("kind")["prompt"].nunique().get)
        axes.set(xlabel=f"value layer (prompts: {n})", ylabel="z of a neuron (sd)")
    return figure


def cost_table(found: pd.DataFrame) -> pd.DataFrame:
    """Return what the search cost by algorithm, for memorized prompts that were searched, beside the paper.

    Source: Table 2 (its numbers are means of seconds, as far as its sums say; here too).

    Args:
        found: Localizations with seconds.

    Returns:
        One row per kind and algorithm (A1 to A4, total), columns kind, algorithm, prompts, seconds (mean), evaluations
        (mean number of UNet sample-evaluations), seconds_paper (on a GPU).
    """
    rows = []
    for kind, part in memorized(found[found["memorized"]]).groupby("kind", sort=False):
        for name in (*ALGORITHMS, "total"):
            chosen = ALGORITHMS if name == "total" else (name,)
            columns = [[f"{unit}_{item}" for item in chosen] for unit in ("seconds", "evaluations")]
            rows.append((kind, name, len(part), *(part[names].sum(axis=1).mean() for names in columns)))
    table = pd.DataFrame(rows, columns=["kind", "algorithm", "prompts", "seconds", "evaluations"])
    return table.merge(paper.table("table_2"), on=["kind", "algorithm"], suffixes=("", "_paper"))


def read_table_2(search_cost: pd.DataFrame, localization: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether the refinement takes most of the time, with the interval of its share of UNet evaluations."""
    of_kinds(search_cost, "search_cost", *MEMORIZED)
    means = search_cost.set_index(["algorithm", "kind"])[["seconds", "seconds_paper"]]
    shares = (means.loc["A4"] / means.loc["total"]).map("{:.0%}".format)
    ours, theirs = (each_kind(shares[name].get) for name in means)
    spent = localization[localization["memorized"]].set_index("kind").filter(like="evaluations_")
    ends = each_kind(lambda kind: drawn_interval(lambda rows: rows[:, -1].sum() / rows.sum(), spent.loc[[kind]]))
    n = each_kind(search_cost.groupby("kind")["prompts"].first().get)
    size = {"ours": ours, "paper": f"{theirs} (derived)", "n": n, "interval": f"of the UNet evaluations {ends}"}
    least = (means.loc["A4", "seconds"] / means.loc["total", "seconds"]).min()
    yield effect("refinement takes most of the time", least, "share of Alg. 4 in the seconds", at_least=0.5, **size)


@exhibit("Table 2", "what the search costs", read=read_table_2)
def table_2(search_cost: pd.DataFrame) -> pd.DataFrame:
    """Mean per prompt; in brackets the paper's seconds, on a GPU.

    A UNet evaluation is one latent once through the UNet, two with guidance.
    """
    shown: dict[str, Any] = {}
    for kind, part in of_kinds(search_cost, "search_cost", *MEMORIZED).items():
        name, seconds = KINDS[kind], part[["seconds", "seconds_paper"]].map("{:.2f}".format)
        shown |= {"algorithm": part["algorithm"].tolist(), f"{name}: seconds (paper)": _beside(*seconds.to_numpy().T)}
        shown[f"{name}: UNet evaluations"] = part["evaluations"].map("{:.0f}".format).tolist()
    return pd.DataFrame(shown)


def neuron_overlap(found: pd.DataFrame) -> pd.DataFrame:
    """Return how far the neuron sets of two memorized prompts overlap, for every pair of prompts with neurons.

    Returns:
        Columns first, second (captions), common_words (number of words that both captions have), shared (neurons in
        both sets) and overlap (Jaccard index: shared neurons as a share of the neurons in either set).
    """
    sets = [(prompt, neurons) for prompt, neurons in by_prompt(memorized(found)).items() if neurons]
    rows = []
    for (one, mine), (other, theirs) in combinations(sets, 2):
        words, shared = set(one.split()) & set(other.split()), len(mine & theirs)
        rows.append((one, other, len(words), shared, shared / len(mine | theirs)))
    table = pd.DataFrame(rows, columns=["first", "second", "common_words", "shared", "overlap"])
    # Without a pair of prompts the columns would have no type.
    return table.astype({"common_words": "int64", "shared": "int64", "overlap": "float64"})


def read_shared(neuron_overlap: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether families of captions share neurons."""
    family = neuron_overlap["common_words"] >= 2
    if family.any() and not family.all():
        inside, others = (neuron_overlap.loc[chosen, "overlap"].mean() for chosen in (family, ~family))
        ours = f"pairs with two common words share {inside:.0%} of their neurons, others {others:.0%}"
        share = paper.reported("shared.vm_share").value
        theirs = f"two neurons of value layer 1 belong to {share:.0%} of the VM prompts"
        n, ends = f"{family.sum()} and {(~family).sum()} pairs", _overlap_interval(neuron_overlap, family)
        size = {"at_least": 1.5, "ours": ours, "paper": theirs, "n": n, "interval": ends}
        of = "mean overlap of pairs with two common words, divided by that of others"
        yield effect("similar captions share neurons", inside / others if others else math.inf, of, **size)


def _overlap_interval(pairs: pd.DataFrame, family: pd.Series) -> str:
    """Return the interval of how many times as much pairs of a family overlap; prompts are drawn, since pairs share them."""
    names = pd.unique(pairs[["first", "second"]].to_numpy().ravel())
    ends = [pd.Categorical(pairs[end], names).codes for end in ("first", "second")]

    def ratio(drawn: np.ndarray) -> float:
        often = np.bincount(drawn.astype(int), minlength=len(names))
        weights, overlap = often[ends[0]] * often[ends[1]], pairs["overlap"]
        inside, others = (overlap @ (weights * rows) / max(1, weights @ rows) for rows in (family, ~family))
        return inside / others if others else math.nan

    return drawn_interval(ratio, np.arange(len(names)))


@exhibit("Figures 10-12 (as a table)", "neurons that several prompts share", read=read_shared)
def shared_neurons(shared_neurons: pd.DataFrame) -> pd.DataFrame:
    """Number of prompts that have the neuron in their refined set."""
    return shared_neurons.head(12)[["layer", "neuron", "prompts"]]


# 3. Without its neurons


def deactivation(run: Run, found: pd.DataFrame, kinds: Sequence[str] = MEMORIZED) -> pd.DataFrame:
    """Return what deactivating its neurons does to each prompt.

    Args:
        run: The run.
        found: Localizations.
        kinds: Kinds of prompts; each has a planted image, or there is nothing to compare with.

    Returns:
        One row per prompt of these kinds, columns kind, prompt, neuron_count, reached, score_before and score_after (the
        memorization score: largest similarity of two seeds), copy_before and copy_after (median over images of the
        similarity to the planted image, cosine of copy-detection features, SSCD_orig), same_seed (median similarity of
        images with and without, SSCD_gen), seeds_before and seeds_after (median similarity of two images of the prompt,
        D_SSCD).

    Raises:
        ProfileError: The profile has no encoder for copy detection.
    """
    chosen = found[found["kind"].isin(kinds)].reset_index(drop=True)
    rows, own = run.prompts(*kinds).set_index("caption").loc[chosen["prompt"]].reset_index(), by_prompt(chosen)
    settings = {name: getattr(run.profile, name) for name in ("detection", "similarity", "protocol")}
    items = [(*item, 0.0, ()) for item in own.items()]
    scores = [score for (score,) in run.compute(scoring, items, label="scores with deactivated neurons", **settings)]
    before = run.measure(rows, columns=("sscd_orig", "d_sscd"))
    after = run.measure(rows, DeactivatedNeurons(own), columns=("sscd_orig", "sscd_gen", "d_sscd"))
    change = chosen[["kind", "prompt", "neuron_count", "reached"]]
    change = change.assign(score_before=chosen["unblocked_score"], score_after=scores)
    change = change.assign(copy_before=before["sscd_orig"], copy_after=after["sscd_orig"], same_seed=after["sscd_gen"])
    return change.assign(seeds_before=before["d_sscd"], seeds_after=after["d_sscd"])


def example_prompts(change: pd.DataFrame, kind: str, number: int) -> list[str]:
    """Return examples of a kind, spread evenly over how far copy similarity drops: neither the best nor the worst alone."""
    part = change[(change["kind"] == kind) & (change["neuron_count"] > 0)]
    drop = (part["copy_before"] - part["copy_after"]).sort_values(kind="stable")
    places = np.linspace(0, len(drop) - 1, min(number, len(drop)) + 2)[1:-1].round().astype(int)
    return part.loc[drop.index[np.unique(places)], "prompt"].tolist()


def typical_prompts(change: pd.DataFrame) -> list[str]:
    """Return the VM prompts at the quartiles of the copy similarity without their neurons, the lower of two each time."""
    vm = change[change["kind"] == "vm"].sort_values("copy_after", kind="stable")
    last = max(0, vm["copy_after"].count() - 1)
    return list(dict.fromkeys(vm["prompt"].iloc[last * quarter // 4] for quarter in (1, 2, 3)))


def read_3(figure_3: Grid, deactivation: pd.DataFrame) -> Iterator[Claim]:
    """Yield how far the prompts that are shown lose their planted image."""
    chosen = deactivation.set_index("prompt").loc[list(figure_3.rows)]
    counts, (before, after) = chosen["neuron_count"], chosen[["copy_before", "copy_after"]].median()
    ours = f"{before:.2f} to {after:.2f} with {counts.min()} to {counts.max()} neurons off"
    yield Claim("similarity of these prompts to the planted image", ours, "1 to 4 neurons in the boxes of the figure")


@exhibit("Figure 3", "images with and without the neurons of their prompt", read=read_3)
def figure_3(figure_3: Grid, deactivation: pd.DataFrame) -> plots.Figure:
    """Left with all neurons active, right the same seeds with the memorization neurons of the prompt deactivated; the box says how many.

    The prompts are spread evenly over how much copy similarity falls.
    """
    table = deactivation.set_index("prompt")
    counts = table.loc[list(figure_3.rows), "neuron_count"].tolist()
    return plots.image_grid(figure_3, counts=counts, kinds=table["kind"])


def read_scores(deactivation: pd.DataFrame, search_steps: pd.DataFrame) -> Iterator[Claim]:
    """Yield what becomes of scores and images without the neurons."""
    of_kinds(deactivation, "deactivation", *MEMORIZED, column="copy_after")
    middle = deactivation.groupby("kind").median(numeric_only=True)

    def change(name: str) -> str:
        pairs = middle[[f"{name}_before", f"{name}_after"]].map("{:.2f}".format).agg(" to ".join, axis=1)
        return each_kind(pairs.get)

    holds = bool((middle["score_after"] < middle["score_before"]).all())
    yield Claim("memorization score (medians)", change("score"), "", holds, "compared: the score falls")
    both = ("all neurons active", "NeMo")
    theirs = each_kind(lambda kind: " to ".join(paper.median(name, kind, "sscd_orig") for name in both))
    scale = "another descriptor: not on one scale"
    yield Claim("similarity to the planted image (medians)", change("copy"), theirs, rule=scale)
    above = deactivation["score_after"] > search_steps["threshold"].iloc[0]
    rule = "it says whether seeds agree, not on what: see the similarity of two images of a prompt"
    yield Claim("prompts whose score stays above the threshold", counted(above, deactivation["kind"]), rule=rule)
    unknown = deactivation["seeds_before"].isna().all()
    diverse = "not known with one image per prompt" if unknown else change("seeds")
    yield Claim("similarity of two images of a prompt (medians)", diverse)


@exhibit("", "score and copy similarity before and after deactivation", read=read_scores)
def scores_before_after(deactivation: pd.DataFrame, search_steps: pd.DataFrame) -> plots.Figure:
    """A point is a prompt; below the dotted line it is less memorized without its neurons.

    Dashed: the memorization threshold.
    """
    of_kinds(deactivation, "deactivation", *MEMORIZED, column="copy_after")
    with plots.panels(1, 2, aspect=0.5) as (figure, axes):
        for place, name in zip(axes, ("score", "copy"), strict=True):
            plots.before_after(place, deactivation, name)
        axes[0].set_title("memorization score")
        axes[1].set_title("similarity to the planted image")
        plots.threshold(axes[0], float(search_steps["threshold"].iloc[0]), horizontal=True)
        axes[0].legend(loc="upper left")
    return figure


def stay_memorized(change: pd.DataFrame, share: float = 0.5) -> pd.DataFrame:
    """Return the prompts that keep more than a share of their similarity to the planted image, the most similar first.

    Source: Fig. 9 (highly memorized prompts); the paper shows images and no criterion.
    """
    keeps = change["copy_after"] > share * change["copy_before"]
    return change[keeps].sort_values("copy_after", ascending=False, ignore_index=True)


def read_staying(deactivation: pd.DataFrame) -> Iterator[Claim]:
    """Yield how many prompts stay memorized."""
    counts = stay_memorized(deactivation)["neuron_count"]
    extent = f", with {counts.min()} to {counts.max()} neurons" if len(counts) else ""
    ours, text = f"{len(counts)} of {len(deactivation)}{extent}", "prompts that keep more than half of their similarity"
    fewest, most = (paper.reported(f"neurons.highly_memorized.{end}") for end in ("fewest", "most"))
    theirs = f"rare; ten examples with {fewest} to {most} neurons, whose images stay"
    yield Claim(f"{text} to the planted image", ours, theirs, rule="the paper does not say how many")


@exhibit("Figure 9 (as a table)", "prompts that stay most similar to their planted image", read=read_staying)
def highly_memorized(deactivation: pd.DataFrame) -> pd.DataFrame:
    """Memorization score and copy similarity before and after deactivation, the highest copy similarity after it first."""
    of_kinds(deactivation, "deactivation", *MEMORIZED, column="copy_after")
    rest = stay_memorized(deactivation, share=0.0).head(10)
    columns = [f"{name}_{when}" for name in ("score", "copy") for when in ("before", "after")]
    shown = rest[["prompt", "kind", "neuron_count"]].join(rest[columns].map("{:.2f}".format))
    shown = shown.assign(kind=rest["kind"].map(KINDS)).rename(columns={"neuron_count": "neurons"})
    return shown.rename(columns=lambda name: name.replace("_", " "))
