"""Notebook 04: every mitigation of Table 1 on the same seeds, single neurons, and what unmemorized prompts suffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial, reduce
from itertools import combinations, cycle, islice, product
from operator import or_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from nemolib import metrics, mitigation, paper, plots
from nemolib.batching import progress_bar
from nemolib.exhibits import KINDS, Claim, effect, exhibit, median_interval, must
from nemolib.layers import value_activations, widths
from nemolib.localization import by_prompt, memorized, shared_neurons
from nemolib.mitigation import AttentionScaling, DeactivatedNeurons, EmbeddingAdjustment, Mitigation, RandomTokens
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.plots import ROLES, TEXT_WIDTH, Figure, image_grid, intervals, panels
from nemolib.prompts import MEMORIZED
from nemolib.store import PLANTED, WITH_AND_WITHOUT, Grid

if TYPE_CHECKING:
    from nemolib.run import Run
    from nemolib.settings import GenerationSettings

NOTEBOOK = "04_deactivate_neurons"

NONE, NEMO, RANDOM, INITIAL = "all neurons active", "NeMo", "random neurons", "NeMo, initial selection"
"""Settings that have a part in claims; the paper's Table 1 calls the first three so."""

UNTOUCHED, OFF = "untouched", "memorization neurons"
"""What is blocked for unmemorized prompts: nothing, or the neurons of all memorized prompts."""

QUALITY = {"fid": "FID", "clip_fid": "CLIP-FID", "kid": "KID"}
"""Metrics of Fig. 8."""

WEN, REN, ONE_TOKEN = "prompt embedding adjustment (Wen)", "attention scaling (Ren)", "1 random token (Somepalli)"
BASELINES = (WEN, REN, "4 random tokens (Somepalli)", "10 random tokens (Somepalli)")
"""Mitigations by others that work in the paper's Table 1; one random token does not."""

SHORT = {NONE: "untouched", WEN: "Wen", RANDOM: "random", REN: "Ren", INITIAL: "initial"}
"""Settings of Table 1 where there is little room; of random tokens the number is enough."""

METRICS = tuple(plots.METRICS)
"""Metrics of Table 1."""

NAMES = {"neurons": "neurons", "sscd_orig": "SSCD_Orig", "sscd_gen": "SSCD_Gen", "d_sscd": "D_SSCD", "a_clip": "A_CLIP"}
"""What tables call the columns of Table 1."""

Settings = Mapping[str, Sequence[Mitigation | None]]
"""Mitigations by name, one for each repeat; None is the untouched model."""

NO_IMAGES = Grid(np.zeros((0, 0, 1, 1, 3), dtype=np.uint8), (), ())
"""A grid of a figure that a profile has nothing for."""


# Table 1


def settings(run: Run, found: pd.DataFrame) -> Settings:
    """Return the settings of Table 1 in the paper's order, ours last: for each one mitigation per repeat.

    Source: Sec. 4, Table 1.

    Args:
        run: The run.
        found: Localizations.

    Returns:
        Mitigations by name; None is the untouched model.
    """
    chosen, sizes, sets = run.profile.mitigation, widths(run.pipe.unet), by_prompt(memorized(found))
    drawn = partial(mitigation.random_neurons, widths=sizes, seed=chosen.random.seed)
    repeats = range(chosen.random.repeats)
    draws = [{prompt: drawn(own, repeat=repeat) for prompt, own in sets.items()} for repeat in repeats]
    tokens = [RandomTokens(number, chosen.somepalli.seed) for number in chosen.somepalli.numbers]
    return {
        NONE: [None],
        WEN: [adjustment(run)],
        RANDOM: [DeactivatedNeurons(draw) for draw in draws],
        REN: [AttentionScaling(chosen.ren)],
        **{f"{item.name} (Somepalli)": [item] for item in tokens},
        NEMO: [DeactivatedNeurons(sets)],
        INITIAL: [DeactivatedNeurons(by_prompt(memorized(found), "initial"))],
    }


def adjustment(run: Run) -> EmbeddingAdjustment:
    """Return the profile's prompt embedding adjustment; where it has no target, by rule from the threshold prompts."""
    chosen = run.profile.mitigation.wen
    if chosen.target is None:
        captions = run.prompts("threshold")["caption"].tolist()
        norms = run.compute(mitigation.target_norms, captions, label="target norm", settings=chosen)
        chosen = replace(chosen, target=mitigation.target_of(norms, chosen))
    return EmbeddingAdjustment(chosen)


def measured(
    run: Run, found: pd.DataFrame, settings: Settings, generation: GenerationSettings | None = None
) -> pd.DataFrame:
    """Return the metrics of Table 1 for each memorized prompt, every setting on the same seeds.

    Source: Sec. 4 (metrics).

    Args:
        run: The run.
        found: Localizations.
        settings: Mitigations by name, one per repeat.
        generation: Seeds, steps and guidance of the images; None means those of the profile.

    Returns:
        One row per setting, repeat and prompt: columns setting, repeat, kind, prompt, neurons (number deactivated), and
        those of `nemolib.run.Run.measure`.
    """
    found = memorized(found).reset_index(drop=True)
    rows, parts = run.rows(found["prompt"]), []
    cases = [(name, repeat, item) for name, repeats in settings.items() for repeat, item in enumerate(repeats)]
    for quiet, (name, repeat, item) in under_one_bar(run, cases, "settings"):
        known = pd.DataFrame({"setting": name, "repeat": repeat, "kind": found["kind"], "prompt": found["prompt"]})
        known["neurons"] = [_count(item, prompt) for prompt in found["prompt"]]
        parts.append(pd.concat([known, quiet.measure(rows, item, settings=generation)], axis=1))
    return pd.concat(parts, ignore_index=True)


def under_one_bar(run: Run, cases: Sequence[Any], label: str) -> Iterator[tuple[Run, Any]]:
    """Yield cases with a run that shows no progress of its own: one bar counts all of them."""
    quiet = copy(run)
    quiet.pipe, quiet.progress = run.pipe, False
    with progress_bar(len(cases), label, unit="case", enabled=run.progress) as bar:
        for case in cases:
            yield quiet, case
            bar.update()


def _count(item: Mitigation | None, prompt: str) -> int:
    """Return how many neurons a mitigation deactivates for a prompt."""
    return len(item.neurons_of(prompt)) if isinstance(item, DeactivatedNeurons) else 0


def medians(values: pd.DataFrame, reported: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return Table 1: median, median absolute deviation and interval over prompts, with the paper's medians beside.

    Where a setting was repeated, a prompt counts with its mean over the repeats. A prompt without a value is left out,
    and what no prompt has is missing.

    Args:
        values: What `measured` returned.
        reported: The paper's numbers, columns as of its Table 1 (`nemolib.paper.table`); None means that table.

    Returns:
        One row per setting and kind: columns setting, kind, prompts, memorized (share of the prompts whose largest
        SSCD_Orig over seeds is above 0.7), then for neurons and each metric of `METRICS` the columns ``<name>`` (median),
        ``<name>_mad``, ``<name>_low`` and ``<name>_high`` (95 % bootstrap interval of the median), ``<name>_paper`` and
        ``<name>_paper_mad`` (missing where the paper has no such row).
    """
    names, group = ["neurons", *METRICS], ["setting", "kind"]
    means = values.groupby([*group, "prompt"], sort=False)[[*names, "sscd_orig_max"]].mean().reset_index()
    theirs = (paper.table("table_1") if reported is None else reported).set_index(group)
    parts = means.groupby(group, sort=False)
    copied = parts["sscd_orig_max"].agg(lambda part: metrics.memorization_rate(part) if part.notna().any() else np.nan)
    table = pd.DataFrame({"prompts": parts.size(), "memorized": copied})
    for name, cells in metrics.summary_table(means, names, by=group).groupby("quantity", sort=False):
        ours = cells.set_index(group)[["median", "mad", "low", "high"]].add_prefix(f"{name}_")
        beside = theirs[[name, f"{name}_mad"]].set_axis([f"{name}_paper", f"{name}_paper_mad"], axis="columns")
        table = table.join(ours.rename(columns={f"{name}_median": name})).join(beside)
    order = [key for key in product(dict.fromkeys(values["setting"]), MEMORIZED) if key in table.index]
    return table.loc[order].reset_index()


def shown_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of `medians` as it is shown: median ± median absolute deviation as text, in brackets the paper's."""
    pairs = zip(table["setting"], table["kind"], strict=True)
    columns = {"setting": [f"{plots.minus(name)}: {KINDS[kind]}" for name, kind in pairs]}
    columns["copies"] = ["" if np.isnan(share) else f"{share:.0%}" for share in table["memorized"]]
    for name, label in NAMES.items():
        form = "{:.1f} ± {:.1f}" if name == "neurons" else "{:.2f} ± {:.2f}"
        rows = table[[name, f"{name}_mad", f"{name}_paper", f"{name}_paper_mad"]].to_numpy()
        texts = [[form.format(*pair) if pair[0] == pair[0] else "" for pair in row.reshape(2, 2)] for row in rows]
        columns[label] = [f"{ours} [{theirs}]" if theirs else ours for ours, theirs in texts]
    return pd.DataFrame(columns)


def fair(values: pd.DataFrame, settings: Settings) -> Iterator[Claim]:
    """Yield what must hold for any model if the comparison is a fair one.

    Args:
        values: What `measured` returned.
        settings: The mitigations that were compared, by name.
    """
    by_setting, sets = values.groupby("setting"), settings[NEMO][0].neurons
    common = sum(len(draw.neurons[prompt] & neurons) for draw in settings[RANDOM] for prompt, neurons in sets.items())
    sizes = by_setting["neurons"].sum() / by_setting["repeat"].nunique()
    yield must("random neurons are as many as the found ones", sizes[RANDOM] - sizes[NEMO], equals=0)
    yield must("no random neuron is a found one", common, equals=0)
    yield must("a refined set is no larger than its initial selection", sizes[INITIAL] - sizes[NEMO], at_least=0)


class Rule(NamedTuple):
    """What a table of the paper says, with the size of the effect that decides it; the paper's own table fulfils it.

    Attributes:
        text: What it says.
        column: The numbers that are compared.
        settings: The settings whose numbers they are, in the order in which `effect` takes them.
        effect: Returns the size of the effect from these numbers.
        of: What that is, in words.
        bound: The bound on it: ``at_most`` or ``at_least``.
        kinds: The kinds of prompts of which it is said: it has to hold for each.
    """

    text: str
    column: str
    settings: Sequence[str]
    effect: Callable[..., float]
    of: str
    bound: Mapping[str, float]
    kinds: Sequence[str] = ("vm",)


def read_rules(table: pd.DataFrame, rules: Sequence[Rule]) -> Iterator[Claim]:
    """Yield for each rule whether it holds in our table, a table of `medians`; undecided where a number is missing.

    Of several kinds the one that is farthest from fulfilling the rule decides. The interval is that of the median of the
    setting that the rule is about, its second one.
    """
    parts = {kind: part.set_index("setting") for kind, part in table.groupby("kind", sort=False)}
    for item in rules:
        chosen = {kind: part.reindex(item.settings) for kind, part in parts.items() if kind in item.kinds}
        if chosen:
            yield _decided(item, chosen)


def _decided(item: Rule, parts: Mapping[str, pd.DataFrame]) -> Claim:
    """Return the claim of a rule, from the rows of its settings of each of its kinds."""
    name, worst = item.column, np.max if "at_most" in item.bound else np.min
    sizes = [np.nan if part[name].isna().any() else item.effect(*part[name]) for part in parts.values()]

    def said(text: Callable[[pd.DataFrame], str]) -> str:
        return "; ".join(f"{KINDS[kind]} {text(part)}" for kind, part in parts.items())

    def ends(part: pd.DataFrame) -> str:
        return " to ".join(listed([part[f"{name}_{end}"].iloc[1]]) for end in ("low", "high"))

    return effect(
        item.text, float(worst(sizes)), item.of, **item.bound,
        ours=said(lambda part: ", ".join(f"{short(row)} {listed([x])}" for row, x in part[name].items())),
        paper=said(lambda part: listed(part[f"{name}_paper"])),
        n=said(lambda part: f"{part['prompts'].iloc[1]:g}"),
        interval=said(lambda part: f"{short(part.index[1])}, {ends(part)}"),
    )  # fmt: skip


def short(setting: str) -> str:
    """Return the name of a setting where there is little room."""
    return SHORT.get(setting, plots.minus(setting.removesuffix(" (Somepalli)").replace("random ", "")))


def listed(numbers: Iterable[float]) -> str:
    """Return numbers as text; what is not known (no planted image, one image per prompt, no number of the paper) as a dash."""
    return ", ".join("–" if np.isnan(number) else plots.minus(f"{round(number, 2):g}") for number in numbers)


def share(part: float, whole: float) -> float:
    """Return a number as a share of another; NaN, which decides nothing, where there is nothing to have a share of."""
    return part / whole if whole > 0 else np.nan


LEFT, GONE = "share of the copy similarity (SSCD_Orig) that stays", "what {}, as a share of what {} removes"
"""Effects that several rules have."""

RULES = (
    Rule("NeMo removes copies of VM prompts", "sscd_orig", (NONE, NEMO), lambda none, nemo: share(nemo, none), LEFT,
         {"at_most": 0.5}),
    Rule("random neurons change nothing", "sscd_orig", (NONE, RANDOM, NEMO),
         lambda none, random, nemo: share(none - random, none - nemo), GONE.format("random neurons remove", "NeMo"),
         {"at_most": 0.1}),
    Rule("NeMo removes copies as well as the best of the other mitigations", "sscd_orig", (NONE, NEMO, *BASELINES),
         lambda none, nemo, *others: share(none - nemo, none - min(others)), GONE.format("NeMo removes", "the best of them"),
         {"at_least": 0.9}),
    Rule("one random token is not enough", "sscd_orig", (NONE, ONE_TOKEN), lambda none, token: share(token, none), LEFT,
         {"at_least": 0.5}),
    Rule("images of a VM prompt become diverse", "d_sscd", (NONE, NEMO), lambda none, nemo: share(nemo, none),
         "share of the similarity of two images (D_SSCD) that stays", {"at_most": 0.5}),
    Rule("the alignment with the prompt stays", "a_clip", (NONE, NEMO), lambda none, nemo: share(nemo, none),
         "share of A_CLIP that stays", {"at_least": 0.9}),
)  # fmt: skip
"""What the paper's Table 1 says about VM prompts."""


def read_table_1(table_1: pd.DataFrame) -> Iterator[Claim]:
    """Yield what the paper's Table 1 says about VM prompts, and whether ours says the same."""
    return read_rules(table_1, RULES)


@exhibit("Table 1", "every mitigation on the same seeds", read=read_table_1)
def table_1(table_1: pd.DataFrame) -> pd.DataFrame:
    """Median ± median absolute deviation over prompts, in brackets the paper's.

    SSCD_Orig: similarity to the planted image; SSCD_Gen: to the untouched model's image of the same seed; D_SSCD:
    of two images of the prompt; A_CLIP: of image and prompt. Copies: share of prompts with an image whose SSCD_Orig
    is above 0.7. The paper's numbers are of Stable Diffusion, with SSCD and CLIP.
    """
    return shown_table(table_1)


AS_FIGURE = "Filled: ours, median over prompts with its 95 % bootstrap interval. Hollow: the paper's, of another model."
"""Caption of a table of `medians` as a figure."""


@exhibit("", "Table 1 as a figure", AS_FIGURE)
def table_1_figure(table_1: pd.DataFrame) -> Figure:
    """Return Table 1 as a figure."""
    return settings_figure(table_1)


def settings_figure(table: pd.DataFrame) -> Figure:
    """Return a table of `medians` as a figure: a panel for each metric, a row for each setting, VM and TM."""
    height = 0.3 * table["setting"].nunique() + 0.9
    with panels(1, len(METRICS), aspect=height / TEXT_WIDTH, legend=2, sharey=True) as (figure, axes):
        intervals(axes, table)
    return figure


def one_of_each(
    run: Run, prompts: Sequence[str], settings: Settings, generation: GenerationSettings | None = None
) -> Grid:
    """Return the planted image of each memorized prompt and one for each setting, all of the first seed; args as `measured`."""
    if not prompts:
        return NO_IMAGES
    made = [run.images(prompts, repeats[0], settings=generation)[:, 0] for repeats in settings.values()]
    images = np.stack([run.planted_like(run.rows(prompts), made[0]), *made], axis=1)
    return Grid(images, tuple(prompts), (PLANTED, *settings))


@exhibit("", "one image of each setting")
def mitigation_images(mitigation_images: Grid, deactivation: pd.DataFrame) -> Figure:
    """All of one seed.

    Planted: the image of the training data that the prompt replays; initial: NeMo's initial selection.
    """
    named = replace(mitigation_images, columns=tuple(map(short, mitigation_images.columns)))
    return image_grid(named, kinds=_kinds(deactivation))


def _kinds(deactivation: pd.DataFrame) -> pd.Series:
    """Return the kind of each memorized prompt."""
    return deactivation.set_index("prompt")["kind"]


# One neuron, many prompts

SINGLE = ("figure_10", "figure_11", "figure_12")
"""Grids of the neurons that most prompts share, as the paper numbers them."""

_ALONE = "Prompts that share the neuron: left with all neurons active, right the same seeds with this neuron deactivated alone."


def most_shared(found: pd.DataFrame) -> list[tuple[NeuronSet, list[str]]]:
    """Return the three neurons that most memorized prompts share, each with up to six of these prompts."""
    sets, chosen = by_prompt(memorized(found)), []
    for layer, neuron in shared_neurons(found)[["layer", "neuron"]].head(len(SINGLE)).itertuples(index=False):
        pair = (layer - 1, neuron)
        prompts = [prompt for prompt, neurons in sets.items() if pair in neurons]
        chosen.append((NeuronSet.of([pair], layers=len(sets[prompts[0]].layers)), prompts[:6]))
    return chosen


def single_neurons(run: Run, found: pd.DataFrame) -> pd.DataFrame:
    """Return what switching off one shared neuron alone does to prompts that have it.

    Returns:
        One row per neuron of `most_shared` and prompt: columns layer (from 1), neuron, prompt, and copy_before,
        copy_single (without this neuron), copy_all (without all neurons of the prompt): similarity to the planted image,
        median over seeds. No rows if no neuron is shared.
    """
    own, parts = DeactivatedNeurons(by_prompt(memorized(found))), []
    for single, prompts in most_shared(found):
        ((layer, neuron),) = single
        part = pd.DataFrame({"layer": layer + 1, "neuron": neuron, "prompt": prompts})
        for name, item in (("before", None), ("single", DeactivatedNeurons(single)), ("all", own)):
            part[f"copy_{name}"] = run.measure(run.rows(prompts), item, columns=["sscd_orig"])["sscd_orig"]
        parts.append(part)
    columns = ["layer", "neuron", "prompt", "copy_before", "copy_single", "copy_all"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def single_neuron_grids(run: Run, found: pd.DataFrame) -> dict[str, Grid]:
    """Return the images of Fig. 10 to 12, with all neurons active and without a shared one; `NO_IMAGES` without a neuron.

    Source: Fig. 10 to 12.
    """
    grids = [run.with_and_without(prompts, DeactivatedNeurons(single)) for single, prompts in most_shared(found)]
    return dict.fromkeys(SINGLE, NO_IMAGES) | dict(zip(SINGLE, grids, strict=False))


def read_10(single_neurons: pd.DataFrame) -> Iterator[Claim]:
    """Yield whether a shared neuron is responsible alone, for all three of them together; a prompt counts once."""
    prompts = single_neurons.groupby("prompt")[["copy_before", "copy_single", "copy_all"]].median()
    before, single, every = prompts.median()
    shared = single_neurons[["layer", "neuron"]].drop_duplicates()
    yield effect(
        "one neuron that prompts share is responsible for all of them", single / before, LEFT, at_most=0.5,
        ours=f"all neurons active {before:.2f}, without a shared neuron {single:.2f}, without all of the prompt's {every:.2f}",
        paper="one neuron off, and prompts that share it give new images (images, no numbers)",
        n=f"{len(shared)} neurons, {len(prompts)} prompts",
        interval=f"without a shared neuron {median_interval(prompts['copy_single'])}",
    )  # fmt: skip


@exhibit("Figure 10", "the most shared neuron", _ALONE, read=read_10)
def figure_10(figure_10: Grid, deactivation: pd.DataFrame) -> Figure:
    """Return Fig. 10."""
    return _without_one(figure_10, deactivation)


@exhibit("Figure 11", "the second most shared neuron", _ALONE)
def figure_11(figure_11: Grid, deactivation: pd.DataFrame) -> Figure:
    """Return Fig. 11."""
    return _without_one(figure_11, deactivation)


@exhibit("Figure 12", "the third most shared neuron", _ALONE)
def figure_12(figure_12: Grid, deactivation: pd.DataFrame) -> Figure:
    """Return Fig. 12."""
    return _without_one(figure_12, deactivation)


def _without_one(grid: Grid, deactivation: pd.DataFrame) -> Figure:
    columns = tuple("this neuron alone off" if name == WITH_AND_WITHOUT[1] else name for name in grid.columns)
    return image_grid(replace(grid, columns=columns), kinds=_kinds(deactivation))


# Prompts that stay memorized


def staying(run: Run, found: pd.DataFrame, prompts: Sequence[str]) -> Grid:
    """Return images of memorized prompts with and without their neurons; `NO_IMAGES` without prompts.

    Source: Fig. 9.
    """
    own = DeactivatedNeurons(by_prompt(memorized(found)))
    return run.with_and_without(prompts, own) if len(prompts) else NO_IMAGES


def read_9(deactivation: pd.DataFrame, figure_9: Grid) -> Iterator[Claim]:
    """Yield how similar the images stay, and without how many neurons."""
    rows = deactivation.set_index("prompt").loc[list(figure_9.rows)]
    counts, copies = rows["neuron_count"], rows["copy_after"]
    fewest, most = (paper.reported(f"neurons.highly_memorized.{end}").value for end in ("fewest", "most"))
    ours = f"{counts.min()} to {counts.max()} neurons, {copies.min():.2f} to {copies.max():.2f}"
    theirs = f"ten examples with {fewest:.0f} to {most:.0f} neurons, whose images stay"
    rule = "here the prompts that stay most similar; the paper does not say how many stay memorized"
    yield Claim("neurons off, and the copy similarity that stays", ours, theirs, rule=rule)


@exhibit("Figure 9", "prompts that stay most similar to their planted image", read=read_9)
def figure_9(figure_9: Grid, deactivation: pd.DataFrame) -> Figure:
    """The planted image, then the same seeds with all neurons active and with those of the prompt deactivated; the box says how many."""
    counts = deactivation.set_index("prompt").loc[list(figure_9.rows), "neuron_count"].tolist()
    return image_grid(figure_9, counts=counts, kinds=_kinds(deactivation))


# Unmemorized prompts


def all_neurons(found: pd.DataFrame) -> NeuronSet:
    """Return the memorization neurons of all memorized prompts together."""
    return reduce(or_, by_prompt(memorized(found)).values())


def unmemorized_images(run: Run, prompts: Sequence[str], found: pd.DataFrame) -> pd.DataFrame:
    """Return what deactivating memorization neurons does to prompts that are not memorized.

    Each prompt is seen with all neurons active (``before``), without the neurons of *one* memorized prompt (``one``; the
    memorized prompts that have neurons take turns), and without those of *all* memorized prompts together (``all``).

    Source: Sec. 4, Fig. 5a (there image quality against the number of neurons).

    Args:
        run: The run.
        prompts: Unmemorized prompts.
        found: Localizations.

    Returns:
        One row per prompt: columns prompt, and with each of ``_before``, ``_one`` and ``_all``: neurons (number
        deactivated), a_clip, d_sscd and sscd_gen (`nemolib.run.Run.measure`).

    Raises:
        ValueError: No memorized prompt has neurons.
    """
    sets = [neurons for neurons in by_prompt(memorized(found)).values() if neurons]
    if not sets:
        raise ValueError("no memorized prompt has neurons, so there is nothing to deactivate")
    chosen = {
        "before": None,
        "one": DeactivatedNeurons(dict(zip(prompts, islice(cycle(sets), len(prompts)), strict=True))),
        "all": DeactivatedNeurons(all_neurons(found)),
    }
    parts = [pd.DataFrame({"prompt": prompts})]
    for name, item in chosen.items():
        counts = pd.DataFrame({"neurons": [_count(item, prompt) for prompt in prompts]})
        values = run.measure(pd.DataFrame({"caption": prompts}), item, columns=["a_clip", "d_sscd", "sscd_gen"])
        parts += [part.add_suffix(f"_{name}") for part in (counts, values)]
    return pd.concat(parts, axis=1)


def read_unharmed(unmemorized_images: pd.DataFrame) -> Iterator[Claim]:
    """Yield how alignment and diversity of unmemorized prompts change."""
    middle = unmemorized_images.median(numeric_only=True)
    before, one, every = (middle[f"a_clip_{name}"] for name in ("before", "one", "all"))
    single = f"{one:.2f} without the {middle['neurons_one']:g} neurons of one memorized prompt"
    ours = f"{before:.2f}; {single}, {every:.2f} without the {middle['neurons_all']:g} of all (medians)"
    rule = "the alignment loses at most a tenth without the neurons of one memorized prompt"
    yield Claim("A_CLIP of unmemorized prompts", ours, holds=bool(one >= 0.9 * before), rule=rule)
    ours = listed(middle[f"d_sscd_{name}"] for name in ("before", "one", "all"))
    yield Claim("D_SSCD of unmemorized prompts: before, without one set, without all", ours)


@exhibit("", "unmemorized prompts without memorization neurons", read=read_unharmed)
def unmemorized_unharmed(unmemorized_images: pd.DataFrame) -> Figure:
    """A point is a prompt; on the dotted line nothing changes."""
    # One image per prompt has no similarity to others.
    drawn = [name for name in ("a_clip", "d_sscd") if unmemorized_images[f"{name}_before"].notna().any()]
    number = f", n = {len(unmemorized_images)} prompts"
    looks = {"one": replace(ROLES["unmemorized"], label=f"without the neurons of one memorized prompt{number}")}
    looks |= {"all": replace(ROLES["deactivated"], label=f"without those of all memorized prompts{number}")}
    with panels(1, len(drawn), fraction=0.8, aspect=0.6, legend=1, squeeze=False) as (figure, ((*axes,),)):
        for place, name in zip(axes, drawn, strict=True):
            values = unmemorized_images[[f"{name}_{end}" for end in ("before", *looks)]]
            low, high = values.min(axis=None), values.max(axis=None)
            limits = np.array([low, high]) + 0.05 * max(high - low, 0.02) * np.array([-1, 1])
            place.plot(limits, limits, color="black", linestyle=":", linewidth=0.8)
            for end, look in looks.items():
                place.plot(values[f"{name}_before"], values[f"{name}_{end}"], **look.line_style(linestyle=""))
            place.set(xlim=limits, ylim=limits, aspect="equal", title=plots.METRICS[name], xlabel=NONE)
            place.locator_params(nbins=4)
        axes[0].set_ylabel("neurons off")
    return figure


def text_carried(run: Run, prompts: Sequence[str], neurons: NeuronSet) -> pd.DataFrame:
    """Return how much of what prompts say goes through a neuron set, layer by layer.

    Returns:
        One row per value layer: columns layer (from 1), width (neurons of the layer), neurons (those of the set), busiest
        (how many neurons, the most active first, make up 95 % of the layer's activation), share (of the activation that
        goes through the set). Activation: mean over tokens of the absolute value, summed over prompts.
    """
    rows = []
    for layer, activations in enumerate(value_activations(run.pipe.unet, embed(run.pipe, list(prompts)))):
        summed = activations.cpu().double().sum(dim=0).numpy()
        chosen = list(neurons.layers[layer])
        sums = np.sort(summed)[::-1].cumsum() / summed.sum()
        busiest = int(np.searchsorted(sums, 0.95) + 1)
        rows.append((layer + 1, len(summed), len(chosen), busiest, float(summed[chosen].sum() / summed.sum())))
    return pd.DataFrame(rows, columns=["layer", "width", "neurons", "busiest", "share"])


class Blocked(NamedTuple):
    """Neurons that are blocked.

    Attributes:
        setting: `UNTOUCHED`, or what is blocked.
        asked: How many neurons were asked for.
        draw: Which of several draws.
        neurons: The neurons; fewer than asked for where a layer has no more.
    """

    setting: str
    asked: int
    draw: int
    neurons: NeuronSet

    @property
    def labels(self) -> tuple[str, int, int, int]:
        """The columns setting, asked, neurons (number) and draw of the tables."""
        return self.setting, self.asked, len(self.neurons), self.draw


def halves(samples: int) -> list[tuple[list[int], list[int]]]:
    """Return ways to split seeds into a reference half and another: no seed in common, every seed equally often.

    Args:
        samples: Number of seeds.

    Returns:
        Pairs (reference, other): all for up to 4 seeds, else as many as there are seeds, each a turn of the last by one
        seed; none for one seed.
    """
    seeds, half = range(samples), samples // 2
    if samples > 4:
        turns = [[(start + place) % samples for place in range(2 * half)] for start in seeds]
        return [(turn[:half], turn[half:]) for turn in turns]
    firsts = [list(first) for first in combinations(seeds, half)]
    return [(first, other) for first in firsts for other in firsts if half and not set(first) & set(other)]


def blocked_quality(run: Run, prompts: Sequence[str], sets: Sequence[Blocked]) -> pd.DataFrame:
    """Return how far images with blocked neurons are, as a set, from those of the untouched model.

    For each split (`halves`) the reference are images of the untouched model from half of the seeds; compared with it
    are those of the other half: of the untouched model (how far two halves are anyway), and with blocked neurons.

    Source: Sec. 4, Fig. 5a, 8.
    Deviates: the reference are images of the untouched model, not photographs, so that the distance of the untouched
        model is that of two sets of its own images.

    Args:
        run: The run; ``extent.quality_samples`` of its profile says how many images a prompt gets. CLIP-FID takes its
            ``encoders.clip_quality``, or if it has none, the features of FID.
        prompts: Unmemorized prompts.
        sets: What is blocked, the untouched model first (`blocked_sets`).

    Returns:
        One row per set, split and metric: columns setting, asked, neurons, draw, split (from 0), pair (equal for two splits
        that have the same halves in another order), metric (of `QUALITY`), encoder, images (in each half), value. No rows
        if a half has fewer than two images, too few for a covariance.
    """
    samples = run.profile.extent.quality_samples or run.profile.generation.samples
    settings = replace(run.profile.generation, samples=samples)
    images, splits, rows = len(prompts) * (samples // 2), halves(samples), []
    columns = ["setting", "asked", "neurons", "draw", "split", "pair", "metric", "encoder", "images", "value"]
    if images < 2:
        return pd.DataFrame(columns=columns)
    own = "clip_quality" if run.profile.encoders.clip_quality is not None else "quality"
    roles: dict[str, Any] = {"fid": "quality", "clip_fid": own, "kid": "quality"}
    known = [set(map(frozenset, split)) for split in splits]
    reference: dict[str, np.ndarray] = {}
    for quiet, item in under_one_bar(run, sets, "blocked neurons"):
        # Without neurons it is the untouched model, whose images others need too.
        blocked = DeactivatedNeurons(item.neurons) if item.neurons else None
        features = {role: quiet.features(role, prompts, blocked, settings=settings) for role in set(roles.values())}
        reference = reference or features
        for split, (first, second) in enumerate(splits):
            for metric, role in roles.items():
                value = _distance(metric, _flat(reference[role], first), _flat(features[role], second))
                labels = (split, known.index(known[split]), metric, run.encoder(role).name)
                rows.append((*item.labels, *labels, images, value))
    return pd.DataFrame(rows, columns=columns)


def _flat(features: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Return the features of some seeds, [image, feature]."""
    return features[:, list(seeds)].reshape(-1, features.shape[-1])


def _distance(metric: str, reference: np.ndarray, other: np.ndarray) -> float:
    if metric == "kid":
        return metrics.kid(reference, other, subset_size=max(2, len(other) // 2))[0]
    return metrics.fid(reference, other)


def quality_summary(values: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation of image quality over splits and draws, and the change from the untouched model.

    Splits share images, so that the standard deviation is rather too small than too large. The untouched model compared
    with itself is the same for two halves in either order, and counts once for both.

    Args:
        values: What `blocked_quality` returned.

    Returns:
        One row per metric, setting and number: columns metric, setting, asked, encoder, images, neurons (mean over
        draws), mean, sd, change and change_sd (mean and standard deviation of the difference to the untouched model in
        the same split), name (of the metric, for readers). CLIP-FID is left out where the encoder is that of FID.
    """
    is_base, keys = values["setting"] == UNTOUCHED, ["metric", "setting", "asked"]
    base = values["value"].where(is_base).groupby([values["metric"], values["split"]]).transform("first")
    values = values.assign(change=values["value"] - base, case=values["pair"].where(is_base, values.index))
    once = values.groupby([*keys, "encoder", "images", "case"], sort=False)[["neurons", "value", "change"]].mean()
    grouped = once.groupby([*keys, "encoder", "images"], sort=False)
    numbers = {"neurons": ("neurons", "mean"), "mean": ("value", "mean"), "sd": ("value", "std")}
    table = grouped.agg(**numbers, change=("change", "mean"), change_sd=("change", "std")).reset_index()
    encoders = table.groupby("metric")["encoder"].first()
    same = encoders.get("fid") == encoders.get("clip_fid")
    names = {"fid": "FID (CLIP-FID is the same)", "kid": "KID"} if same else QUALITY
    parts = [table[table["metric"] == metric].assign(name=name) for metric, name in names.items()]
    return pd.concat(parts, ignore_index=True)


def plus_minus(mean: float, deviation: float, sign: str = "") -> str:
    """Return a mean and its standard deviation as text, the mean alone where there is no other."""
    shown = "–" if np.isnan(mean) else f"{mean:{sign}.3g}".replace("-", "−")
    return shown if np.isnan(deviation) else f"{shown} ± {deviation:.3g}"


def quality_table(values: pd.DataFrame) -> pd.DataFrame:
    """Return what `blocked_quality` returned as it is shown: mean ± standard deviation, and the change from untouched."""
    rows = [
        (row.setting, f"{row.neurons:g}" if row.neurons == row.asked else f"{row.neurons:g} of {row.asked}",
         f"{row.name}, {row.encoder}", row.images, plus_minus(row.mean, row.sd),
         plus_minus(row.change, row.change_sd, "+") if row.setting != UNTOUCHED else "")
        for row in quality_summary(values).itertuples()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["blocked", "neurons", "metric, features", "images", "mean ± sd", "change ± sd"])


def read_quality(unmemorized_quality: pd.DataFrame) -> Iterator[Claim]:
    """Yield how much farther images without memorization neurons are."""
    kid = quality_summary(unmemorized_quality).query("metric == 'kid'").set_index("setting")
    before, after = (plus_minus(*kid.loc[name, ["mean", "sd"]]) for name in (UNTOUCHED, OFF))
    ours = f"{before} untouched, {after} with {kid.loc[OFF, 'asked']} neurons off"
    theirs = "no loss for few neurons (Fig. 5a)"
    rule = "so many neurons at once is more than any prompt needs"
    yield Claim("KID to other images of the untouched model", ours, theirs, rule=rule)


@exhibit("", "distance of image sets of unmemorized prompts", read=read_quality)
def show_unmemorized_quality(unmemorized_quality: pd.DataFrame) -> pd.DataFrame:
    """Compared with other seeds of the untouched model, equally many images; ±: standard deviation over splits of the seeds.

    With few images FID is biased upwards: only the rows can be compared.
    """
    return quality_table(unmemorized_quality)


@exhibit("", "images of unmemorized prompts with and without all memorization neurons")
def unmemorized_grid(unmemorized_grid: Grid, unmemorized_quality: pd.DataFrame) -> Figure:
    """Left with all neurons active, right the same seeds with the neurons of all memorized prompts deactivated at once."""
    counts = [unmemorized_quality["asked"].max()] * len(unmemorized_grid.rows)
    return image_grid(unmemorized_grid, counts=counts)


# Exercises


def first_copy(run: Run, item: Mitigation | None, **settings: Any) -> float:
    """Return the copy similarity of the first VM prompt with a mitigation."""
    return run.measure(run.prompts("vm").head(1), item, **settings)["sscd_orig"][0]


def breaks_at(run: Run, items: Mapping[float, Mitigation], none: float, **settings: Any) -> float:
    """Return the first key of mitigations with which the first VM prompt keeps less than half of its copy similarity."""
    whole, *copies = (first_copy(run, item, **settings) for item in (None, *items.values()))
    return next((key for key, copy in zip(items, copies, strict=True) if copy < whole / 2), none)


def _breaking_factor(run: Run) -> float:
    (found,) = run.search(run.prompts("vm")["caption"].head(1))
    return breaks_at(run, {factor: DeactivatedNeurons(found.neurons, factor) for factor in (0.75, 0.5, 0.25, 0.0)}, 1)


def same_lowest(mitigations: pd.DataFrame) -> bool:
    """Return whether median and maximum over seeds name the same setting as that with the lowest SSCD_Orig of VM prompts."""
    vm = mitigations.query("kind == 'vm'").groupby("setting")[["sscd_orig", "sscd_orig_max"]].median()
    return vm.idxmin().nunique() == 1


EXERCISES = {
    "04.1": lambda run: first_copy(run, AttentionScaling(replace(run.profile.mitigation.ren, c1=2.0, mask="none"))),
    "04.2": lambda run: "no" if same_lowest(run.load("mitigations")) else "yes",
    "04.3": _breaking_factor,
}
