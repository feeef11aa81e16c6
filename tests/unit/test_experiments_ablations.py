import dataclasses
import io
import math

import numpy as np
import pandas as pd
import pytest

from nemolib import experiments, paper
from nemolib import experiments_ablations as ablations
from nemolib import experiments_localization as search
from nemolib import experiments_mitigation as mitigation
from nemolib.checks import ClaimError, check_table
from nemolib.experiments_ablations import GUIDANCE, LADDER_COLUMNS, NO_REFINEMENT, NO_TOP_K
from nemolib.experiments_localization import neuron_sets
from nemolib.experiments_mitigation import METRICS, NONE
from nemolib.first_step import first_step
from nemolib.holdout import memorization_threshold
from nemolib.localization import localize
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed, load_pipeline
from nemolib.profiles import profile_from_mapping
from nemolib.settings import DetectionSettings, SearchSettings, SimilaritySettings
from nemolib.variants import Variant, localize_variants, repeats
from tests.random_world import amplify, build_in, write_encoders, write_prompts

VM, TM = ["a tree", "the sea"], ["old map", "red owl card"]
LADDER = {"my dog": 4, "my cat": 4, "my hat": 1, "my cup": 1}
HOLDOUT = [f"{first} {second}" for first in "cdef" for second in "uvyz"]
DEFAULT = "default (mean + 1 sd)"
OTHERS = ["threshold mean - 1 sd", "threshold mean", "threshold mean + 2 sd"]
CELLS = [
    "initial mean - 1 sd, refinement mean", "initial mean - 1 sd, refinement mean + 1 sd",
    "initial mean, refinement mean + 1 sd",
]  # fmt: skip


@pytest.fixture(scope="module")
def profile(tmp_path_factory, random_model_folder):
    """Return a world in which the memorized prompts score above mean + 1 sd of the holdout prompts."""
    folder = tmp_path_factory.mktemp("world")
    return profile_from_mapping(
        {
            "name": "random",
            "model": str(random_model_folder),
            "device": "cpu",
            "protocol": "paper",
            "holdout_size": len(HOLDOUT),
            "threshold_prompts": 6,
            "detection": {"samples": 3},
            "similarity": {"kernel_size": 3, "sigma": 0.5},
            "search": {"theta_start": 12.0, "theta_step": 1.0, "theta_min": 11.0, "k_start": 1, "k_step": 1},
            "generation": {"samples": 2, "steps": 2, "guidance": 3.0, "batch_size": 16},
            "encoders": write_encoders(folder, random_model_folder),
            "prompts": write_prompts(
                folder,
                dict.fromkeys(VM, "vm") | dict.fromkeys(TM, "tm") | dict.fromkeys(LADDER, "ladder"),
                unmemorized=["a house"],
                holdout=HOLDOUT,
                copies=LADDER,
            ),
        }
    )


@pytest.fixture(scope="module", autouse=True)
def build(tmp_path_factory):
    with build_in(tmp_path_factory.mktemp("build"), experiments, ablations) as folder:
        yield folder


@pytest.fixture(scope="module")
def pipe(profile):
    """Return the pipeline of the profile, whose value layers matter as much as those of a trained model."""
    return amplify(load_pipeline(profile))


@pytest.fixture(scope="module")
def levels(pipe, profile):
    return ablations.threshold_levels(pipe, profile, progress=False)


@pytest.fixture(scope="module")
def prompts(profile):
    return ablations.compared_prompts(profile, 2)


@pytest.fixture(scope="module")
def found(pipe, profile, prompts, levels):
    return ablations.ablated(pipe, profile, prompts, levels, progress=False)


@pytest.fixture(scope="module")
def settings(found, levels):
    return ablations.ablation_settings(found, levels, factors=(0.5, -1.0))


@pytest.fixture(scope="module")
def values(pipe, profile, found, settings):
    return mitigation.measured(pipe, profile, found[found["setting"] == DEFAULT], settings, progress=False)


# Searches that share what they evaluate

SIMILARITY = SimilaritySettings(kernel_size=3, sigma=0.5)
SEARCH = SearchSettings(theta_start=3.0, theta_step=1.0, k_step=2)
HIGH, LOW, UNREACHED = 0.997, 0.993, 0.5


@pytest.fixture(scope="module")
def step(random_pipe):
    return first_step(random_pipe, settings=DetectionSettings(samples=3), protocol="paper")


def localized(pipe, statistics, prompt, *, step, method="fast", chosen=None, gate=-0.9, known=None):
    variants = chosen or [
        Variant("low", LOW, LOW),
        Variant("both", LOW, HIGH),
        Variant("unreached", UNREACHED, UNREACHED),
        Variant("high", HIGH, HIGH),
        Variant("no top-k", HIGH, HIGH, top_k=False),
    ]
    options = {"similarity": SIMILARITY, "protocol": "paper", "prompt": prompt, "known": known}
    searched = dataclasses.replace(SEARCH, method=method)
    return localize_variants(step, embed(pipe, [prompt]), statistics, variants, gate=gate, search=searched, **options)


def alone(pipe, statistics, prompt, threshold, search):
    settings = {"detection": DetectionSettings(samples=3), "similarity": SIMILARITY, "protocol": "paper"}
    return localize(pipe, prompt, statistics, threshold=threshold, gate=-0.9, search=search, **settings)


@pytest.mark.parametrize(
    ("prompt", "method"), [("red fox card", "fast"), ("blue cat case", "fast"), ("blue cat case", "sequential")]
)
def test_a_variant_is_what_a_search_of_its_own_finds(random_pipe, statistics, step, prompt, method):
    found = localized(random_pipe, statistics, prompt, step=step, method=method)
    searched = dataclasses.replace(SEARCH, method=method)
    without = dataclasses.replace(searched, k_step=0)
    expected = {
        "low": alone(random_pipe, statistics, prompt, LOW, searched),
        "high": alone(random_pipe, statistics, prompt, HIGH, searched),
        "unreached": alone(random_pipe, statistics, prompt, UNREACHED, searched),
        "no top-k": alone(random_pipe, statistics, prompt, HIGH, without),
    }
    assert list(found) == ["low", "both", "unreached", "high", "no top-k"]
    assert {name: item.reached for name, item in expected.items()} == {
        "low": True, "high": True, "unreached": False, "no top-k": found["no top-k"].reached,
    }  # fmt: skip
    for name, other in expected.items():
        ours = found[name]
        same = ("prompt", "seeds", "initial", "neurons", "reached", "theta", "k", "memorized", "unblocked_score")
        for field in same:
            assert getattr(ours, field) == getattr(other, field), (name, field)
        assert ours.refined_score == pytest.approx(other.refined_score, abs=1e-6)


def test_what_is_shared_is_not_evaluated_again(random_pipe, statistics, step):
    found = localized(random_pipe, statistics, "red fox card", step=step)
    total = sum(sum(item.evaluations.values()) for item in found.values())
    each = 0
    for name, item in found.items():
        variant = [Variant(name, *{"low": (LOW, LOW), "both": (LOW, HIGH), "high": (HIGH, HIGH)}.get(name, (0.5, 0.5)))]
        if name != "no top-k":
            (single,) = localized(random_pipe, statistics, "red fox card", step=step, chosen=variant).values()
            assert single.neurons == item.neurons
            each += sum(single.evaluations.values())
    assert total < each
    assert found["high"].evaluations["A1"] == 3
    assert all(found[name].evaluations["A1"] == 0 for name in ("low", "both", "unreached", "no top-k"))
    assert found["both"].evaluations["A3"] == 0


def test_a_higher_refinement_threshold_starts_from_the_same_neurons(random_pipe, statistics, step):
    found = localized(random_pipe, statistics, "red fox card", step=step)
    assert found["both"].initial == found["low"].initial
    assert found["both"].refined_score < HIGH
    assert len(found["both"].neurons) <= len(found["low"].neurons)
    assert found["low"].refined_score < LOW


def test_a_threshold_out_of_reach_leaves_the_score_that_was_reached(random_pipe, statistics, step):
    chosen = [Variant("unreached", UNREACHED, UNREACHED), Variant("loose", UNREACHED, 0.9999)]
    found = localized(random_pipe, statistics, "red fox card", step=step, chosen=chosen)
    assert not found["unreached"].reached
    assert found["unreached"].refined_score <= found["unreached"].initial_score
    assert found["unreached"].initial_score < found["loose"].refined_score < 0.9999


def test_a_closed_gate_leaves_nothing_to_search(random_pipe, statistics, step):
    found = localized(random_pipe, statistics, "red fox card", step=step, gate=0.99)
    assert [len(item.neurons) + len(item.initial) for item in found.values()] == [0] * 5
    assert not any(item.memorized for item in found.values())
    assert [sum(item.evaluations.values()) for item in found.values()] == [3, 0, 0, 0, 0]


@pytest.mark.parametrize("method", ["fast", "sequential"])
def test_a_search_that_is_known_is_not_repeated(random_pipe, statistics, step, method):
    given = {"step": step, "method": method}
    default = Variant("default", UNREACHED, UNREACHED)
    known = localized(random_pipe, statistics, "red fox card", chosen=[default], **given)["default"]
    assert not known.reached
    # A threshold between that of the default and all scores is not reached either.
    other = Variant("other", (UNREACHED + known.lowest_score) / 2, known.initial_score)
    alone = localized(random_pipe, statistics, "red fox card", chosen=[other], **given)["other"]
    free = localized(random_pipe, statistics, "red fox card", chosen=[other], known=known, **given)["other"]
    assert sum(alone.evaluations.values()) > 0
    assert sum(free.evaluations.values()) == sum(free.seconds.values()) == 0
    for name in ("memorized", "seeds", "initial", "neurons", "initial_score", "theta", "k", "reached"):
        assert getattr(free, name) == getattr(alone, name)
    if method == "sequential":
        assert free.refined_score == alone.refined_score


def test_a_search_that_would_go_another_way_is_made(random_pipe, statistics, step):
    default = Variant("default", UNREACHED, UNREACHED)
    known = localized(random_pipe, statistics, "red fox card", step=step, chosen=[default])["default"]
    within = (UNREACHED + known.lowest_score) / 2
    assert repeats(Variant("a", within, within), known)
    assert not repeats(Variant("a", within, within, top_k=False), known)
    assert not repeats(Variant("a", known.lowest_score, known.lowest_score), known)
    assert not repeats(Variant("a", within, known.initial_score + 1e-6), known)
    assert not repeats(Variant("a", within, within), dataclasses.replace(known, reached=True))
    # Without seeds there is nothing to search, whatever the thresholds.
    assert repeats(Variant("a", 0.999, 0.999, top_k=False), dataclasses.replace(known, memorized=False))


def test_a_gate_that_is_known_to_be_closed_costs_nothing(random_pipe, statistics, step):
    closed = localized(random_pipe, statistics, "red fox card", step=step, gate=0.99)["low"]
    found = localized(random_pipe, statistics, "red fox card", step=step, gate=0.99, known=closed)
    assert not any(item.memorized for item in found.values())
    assert [sum(item.evaluations.values()) for item in found.values()] == [0] * 5


def test_impossible_variants_are_refused(random_pipe, statistics, step):
    with pytest.raises(ValueError, match=r"'a': the refinement threshold 0\.200 is below .* 0\.300"):
        Variant("a", 0.3, 0.2)
    with pytest.raises(ValueError, match=r"names \['a', 'a'\]"):
        localized(random_pipe, statistics, "x", step=step, chosen=[Variant("a", 0.1, 0.1), Variant("a", 0.2, 0.2)])


# Thresholds and settings


def test_levels_are_those_of_the_paper_and_the_profiles_own(pipe, profile, levels):
    assert levels["level"].tolist() == ["mean - 1 sd", "mean", "mean + 1 sd", "mean + 2 sd"]
    assert levels["default"].tolist() == [False, False, True, False]
    steps = levels["threshold"].diff().dropna()
    assert steps.to_numpy() == pytest.approx(steps.iloc[0])
    assert levels.loc[2, "threshold"] == experiments.threshold(pipe, profile)


def test_another_multiplier_has_a_level_of_its_own(pipe, profile):
    other = dataclasses.replace(profile, thresholds=dataclasses.replace(profile.thresholds, multiplier=-10.0))
    levels = ablations.threshold_levels(pipe, other, progress=False)
    assert levels["level"].tolist() == ["mean - 10 sd", "mean - 1 sd", "mean", "mean + 1 sd", "mean + 2 sd"]
    assert ablations.default_setting(levels) == "default (mean - 10 sd)"
    assert ablations.threshold_pairs(levels) == [("default (mean - 10 sd)", "mean - 10 sd", "mean - 10 sd")]
    names = [variant.name for variant in ablations.variants_of(levels)]
    assert names == [
        "threshold mean - 1 sd",
        "threshold mean",
        "threshold mean + 1 sd",
        "threshold mean + 2 sd",
        NO_TOP_K,
    ]


def test_a_given_threshold_is_the_default(pipe, profile):
    given = dataclasses.replace(profile, thresholds=dataclasses.replace(profile.thresholds, value=0.9))
    levels = ablations.threshold_levels(pipe, given, progress=False)
    assert levels.iloc[-1][["level", "threshold", "default"]].tolist() == ["tau = 0.9", 0.9, True]
    assert ablations.default_setting(levels) == "default (tau = 0.9)"
    # A name that is a number would come back from a table as one.
    assert pd.read_csv(io.StringIO(levels.tail(1).to_csv(index=False)))["level"].tolist() == ["tau = 0.9"]
    reported = ablations._reported(levels).set_index(["setting", "kind"])
    assert reported.loc[("default (tau = 0.9)", "vm"), "neurons"] == 4


def test_variants_are_all_but_the_default(levels):
    chosen = ablations.variants_of(levels)
    assert sorted(variant.name for variant in chosen) == sorted([*OTHERS, *CELLS, NO_TOP_K])
    by_name = {variant.name: variant for variant in chosen}
    low, middle, high, _ = levels["threshold"]
    assert by_name[CELLS[1]] == Variant(CELLS[1], low, high)
    assert by_name[OTHERS[1]] == Variant(OTHERS[1], middle, middle)
    assert by_name[NO_TOP_K] == Variant(NO_TOP_K, high, high, top_k=False)


def test_the_guided_threshold_follows_the_profiles_rule(pipe, profile):
    few = ablations.guided_threshold(pipe, profile, guidance=3.0, prompts=4, progress=False)
    scores = experiments.holdout_scores(pipe, profile, guidance=3.0, progress=False)
    assert scores.shape == (6, 3)
    assert few == memorization_threshold(scores[:4], protocol="paper")
    assert ablations.guided_threshold(pipe, profile, progress=False) == memorization_threshold(scores, protocol="paper")


def test_the_first_prompts_of_each_kind_are_compared(profile):
    assert ablations.compared_prompts(profile, 1)["caption"].tolist() == [VM[0], TM[0]]
    assert ablations.compared_prompts(profile, 9)["caption"].tolist() == [*VM, *TM]
    with pytest.raises(ValueError, match="number is 0"):
        ablations.compared_prompts(profile, 0)


# Searches of the profile


def test_every_setting_has_every_prompt(found, levels):
    assert found.groupby("setting", sort=False)["prompt"].agg(list).to_dict() == {
        name: [*VM, *TM] for name in [DEFAULT, *(variant.name for variant in ablations.variants_of(levels)), GUIDANCE]
    }
    assert found["kind"].tolist() == ["vm", "vm", "tm", "tm"] * 9
    gates = found.groupby("setting")["gate"].first()
    assert (gates.drop(GUIDANCE) == levels.loc[2, "threshold"]).all()
    assert gates[GUIDANCE] != levels.loc[2, "threshold"]


def test_the_default_is_that_of_notebook_03(pipe, profile, found, prompts):
    theirs = search.localizations(pipe, profile, prompts=prompts, progress=False)
    ours = found[found["setting"] == DEFAULT]
    assert ours["memorized"].all()
    assert ours["neurons"].tolist() == theirs["neurons"].tolist()
    assert theirs["kind"].tolist() == prompts["kind"].tolist()


def test_without_top_k_fewer_are_selected(found):
    sizes = {name: part["initial_count"].sum() for name, part in found.groupby("setting")}
    assert sizes[NO_TOP_K] < sizes[DEFAULT]
    assert (found.loc[found["setting"] == NO_TOP_K, "k"] == 0).all()


def test_finished_prompts_are_not_searched_again(pipe, profile, prompts, levels, found, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("searched again")

    monkeypatch.setattr(ablations, "localize_variants", forbidden)
    again = ablations.ablated(pipe, profile, prompts, levels, progress=False)
    pd.testing.assert_frame_equal(again, found)


def test_other_thresholds_are_searched_anew(pipe, profile, prompts, levels, monkeypatch):
    asked, original = [], ablations.localize_variants
    monkeypatch.setattr(
        ablations,
        "localize_variants",
        lambda *args, **kwargs: asked.append(kwargs["prompt"]) or original(*args, **kwargs),
    )
    ablations.ablated(pipe, profile, prompts.head(1), levels, guided=0.035, progress=False)
    assert asked == [VM[0]]


def test_settings_are_those_of_the_paper_then_the_cells(settings):
    order = [NONE, DEFAULT, GUIDANCE, *OTHERS, NO_REFINEMENT, NO_TOP_K, "factor 0.5", "factor -1"]
    assert list(settings) == [*order, *CELLS]
    assert settings[NONE] == [None]
    for factor, name in ((0.5, "factor 0.5"), (-1.0, "factor -1")):
        assert settings[name] == [DeactivatedNeurons(settings[DEFAULT][0].neurons, factor)]


def test_no_refinement_is_the_initial_selection_of_the_default(found, settings):
    default = found[found["setting"] == DEFAULT]
    expected = dict(zip(default["prompt"], neuron_sets(default, "initial"), strict=True))
    assert settings[NO_REFINEMENT][0].neurons == expected


def test_images_of_equal_neurons_are_made_once(pipe, profile, found, settings, values, build):
    sets = {
        (prompt, item.neurons[prompt], item.factor) for (item,) in settings.values() if item for prompt in item.neurons
    }
    made = {key for key in sets if len(key[1])}
    files = list((build / "random" / "store" / "images").iterdir())
    assert len(files) <= len(made) + 4 + 2 * len(LADDER)


# Table 4 and what follows from it


def test_table_4_of_a_random_model(values, levels):
    table = ablations.table_4(values, levels, resamples=20)
    assert table["setting"].unique().tolist() == [
        NONE, DEFAULT, GUIDANCE, *OTHERS, NO_REFINEMENT, NO_TOP_K, "factor 0.5", "factor -1",
    ]  # fmt: skip
    reported = paper.table_4().set_index(["setting", "kind"])
    ours = table.set_index(["setting", "kind"])
    pairs = {
        DEFAULT: "default (0.428)", OTHERS[0]: "threshold 0.288", OTHERS[2]: "threshold 0.498",
        GUIDANCE: "guidance 7 in detection", "factor -1": "factor -1", NO_TOP_K: "no top-k",
    }  # fmt: skip
    for name, theirs in pairs.items():
        for kind in ("vm", "tm"):
            assert ours.loc[(name, kind), "neurons_paper"] == reported.loc[(theirs, kind), "neurons"]
            assert ours.loc[(name, kind), "a_clip_paper_mad"] == reported.loc[(theirs, kind), "a_clip_mad"]
    assert ours.loc[(NONE, "vm"), "sscd_orig_paper"] == 0.83


def test_table_1_is_compared_with_table_1(values):
    table = mitigation.table_1(values[values["setting"] == NONE], resamples=20)
    assert table["sscd_orig_paper"].tolist() == [0.83, 0.04]


def test_checks_hold_for_a_random_model(found, values, levels):
    table = ablations.table_4(values, levels, resamples=20)
    checked = check_table(ablations.checks_of(found, values, table, levels))
    assert checked["result"].tolist() == ["holds"] * 5 + ["beside"] * 2


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("initial_count", 10_000, "never gives a larger initial selection"),
        ("refined_score", 1.5, "never ends above the threshold"),
        ("neurons", NeuronSet.of([(0, layer) for layer in range(8)], layers=7).to_json(), "lies within"),
    ],
)
def test_checks_can_fail(found, values, levels, column, value, message):
    table = ablations.table_4(values, levels, resamples=20)
    rows = (found["setting"] == OTHERS[2]) & (found["prompt"] == VM[0])
    with pytest.raises(ClaimError, match=message):
        check_table(
            ablations.checks_of(found.assign(**{column: found[column].mask(rows, value)}), values, table, levels)
        )


def made_up(levels, changes=()):
    """Return Table 4 with the paper's numbers as ours, but for (setting, kind, column, value)."""
    table = ablations._reported(levels).assign(prompts=4, memorized=0.25)
    for name in ("neurons", *METRICS):
        for suffix in ("", "_mad"):
            table[f"{name}_paper{suffix}"] = table[f"{name}{suffix}"]
        table[f"{name}_low"] = table[f"{name}_high"] = table[name]
    for setting, kind, column, value in changes:
        table.loc[(table["setting"] == setting) & (table["kind"] == kind), column] = value
    return table


def verdicts(levels, changes=()):
    claims = ablations.ablation_claims(made_up(levels, changes), levels)
    return claims.set_index(["kind", "claim"])["verdict"]


def test_every_claim_holds_in_the_papers_table(levels):
    found = verdicts(levels)
    assert len(found) == 15
    assert (found == "holds").all()
    claims = ablations.ablation_claims(made_up(levels), levels)
    assert (claims["paper"] == claims["ours"]).all()
    assert claims.loc[0, "paper"] == "10.5, 6, 4, 3"


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ((OTHERS[1], "tm", "neurons", 33.0), "a higher threshold gives fewer neurons"),
        ((OTHERS[2], "vm", "sscd_orig", 0.42), "every threshold removes copies"),
        ((GUIDANCE, "tm", "neurons", 22), "guidance in detection gives no more neurons"),
        ((NO_REFINEMENT, "vm", "neurons", 8), "refinement leaves less than half of the neurons"),
        ((NO_REFINEMENT, "vm", "sscd_orig", 0.0), "refinement does not bring copies back"),
        ((NO_TOP_K, "vm", "neurons", 4), "without top-k there are more neurons"),
        ((NO_TOP_K, "tm", "sscd_gen", 0.04), "without top-k images change less"),
        (("factor 0.5", "vm", "sscd_orig", 0.41), "half of the activation is enough for a copy"),
        (("factor 0.25", "vm", "sscd_orig", 0.42), "a quarter of it is not"),
        (("factor -0.75", "vm", "sscd_orig", 0.17), "negative factors do what 0 does"),
    ],
)
def test_a_claim_that_does_not_hold_says_so(levels, change, claim):
    found = verdicts(levels, [change])
    assert found[(change[1], claim)] == "does not hold"
    assert (found.drop((change[1], claim)) == "holds").all()


def test_a_missing_number_has_no_verdict(levels):
    found = verdicts(levels, [("factor 0.25", "vm", "sscd_orig", np.nan)])
    assert found[("vm", "a quarter of it is not")] == "no value"
    table = made_up(levels)
    claims = ablations.ablation_claims(table[~table["setting"].str.startswith("factor ")], levels)
    assert claims["verdict"].value_counts().to_dict() == {"holds": 12, "no value": 3}


def test_factors_are_in_order_from_the_untouched_model_to_its_opposite(levels):
    scaled = ablations.scaling_table(made_up(levels), levels)
    vm = scaled[scaled["kind"] == "vm"]
    assert vm["factor"].tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]
    assert vm["sscd_orig"].tolist() == [0.08, 0.08, 0.08, 0.09, 0.09, 0.20, 0.62, 0.79, 0.83]
    assert vm["sscd_gen_paper"].iloc[-1] == 1
    assert not any(name.startswith("neurons") for name in scaled)


def test_the_map_has_the_pairs_of_the_paper(found, values, levels):
    table = ablations.threshold_map(found, values, levels)
    assert table["kind"].tolist() == ["vm"] * 6 + ["tm"] * 6
    theirs = paper.threshold_maps()
    for name in ("initial_neurons", "neurons", "sscd_gen", "sscd_orig"):
        assert table[f"{name}_paper"].tolist() == theirs[name].tolist()
    cell = table[(table["kind"] == "vm") & (table["initial"] == "mean") & (table["refinement"] == "mean + 1 sd")].iloc[
        0
    ]
    mine = found[(found["kind"] == "vm") & (found["setting"] == CELLS[2])]
    seen = values[(values["kind"] == "vm") & (values["setting"] == CELLS[2])]
    assert cell["neurons"] == mine["neuron_count"].median()
    assert cell["initial_neurons"] == mine["initial_count"].median()
    assert cell["sscd_orig"] == seen["sscd_orig"].median()
    assert (cell["reached"], cell["prompts"]) == (mine["reached"].sum(), 2)
    assert cell["initial_threshold"] < cell["refinement_threshold"]


def test_the_papers_figure_agrees_with_its_table():
    """The pairs of equal thresholds in Fig. 14 are rows of Table 4; Fig. 15 differs from it, as the paper does."""
    maps, table = paper.threshold_maps(), paper.table_4().set_index(["setting", "kind"])["neurons"]
    equal = maps[maps["initial"] == maps["refinement"]].set_index(["kind", "initial"])["neurons"]
    for multiplier, name in ((-1, "threshold 0.288"), (0, "threshold 0.358"), (1, "default (0.428)")):
        for kind in ("vm", "tm"):
            assert equal[kind, multiplier] == table[name, kind]
    initial = maps.groupby(["kind", "initial"])["initial_neurons"].unique()
    assert (initial.map(len) == 1).all()
    assert initial["vm", -1][0] == paper.reported("initial.vm.0.288").value


# The duplication ladder


@pytest.fixture(scope="module")
def ladder(pipe, profile):
    return ablations.ladder_table(pipe, profile, progress=False)


def test_the_ladder_goes_up(ladder):
    assert ladder.columns.tolist() == list(LADDER_COLUMNS)
    assert ladder["caption"].tolist() == ["my hat", "my cup", "my dog", "my cat"]
    assert ladder["copies"].tolist() == [1, 1, 4, 4]


def test_the_ladder_says_what_deactivation_does(pipe, profile, ladder):
    row = ladder.iloc[2]
    prompts = experiments.prompt_table(profile, ["ladder"])
    prompts = prompts[prompts["caption"] == row["caption"]]
    found = search.localizations(pipe, profile, prompts=prompts, progress=False).iloc[0]
    assert (row["neuron_count"], row["initial_count"]) == (found["neuron_count"], found["initial_count"])
    assert row["score_before"] == found["unblocked_score"]
    before = experiments.copies(pipe, profile, prompts, progress=False)["copy_similarity"].iloc[0]
    assert row["copy_before"] == pytest.approx(before, abs=1e-6)
    unchanged = ladder[ladder["neuron_count"] == 0]
    assert (unchanged["copy_before"] == unchanged["copy_after"]).all()


def test_fewer_prompts_of_each_rung(pipe, profile):
    few = ablations.ladder_table(pipe, profile, per_rung=1, progress=False)
    assert few["caption"].tolist() == ["my hat", "my dog"]


def test_a_profile_without_a_ladder_has_no_rows(pipe, profile, levels):
    none = dataclasses.replace(profile, limits=dataclasses.replace(profile.limits, ladder=0))
    table = ablations.ladder_table(pipe, none, progress=False)
    assert table.empty
    assert table.columns.tolist() == list(LADDER_COLUMNS)
    assert ablations.ladder_ranks(table).isna().all()
    claims = ablations.ablation_claims(made_up(levels), levels)
    assert "this profile has none" in ablations.findings(made_up(levels), claims, table, levels)


def rungs(counts):
    table = pd.DataFrame({"caption": list("abcd"), "copies": [1, 1, 8, 8], "neuron_count": counts, "initial_count": 9})
    return table.assign(
        reached=True, score_before=[0.1, 0.2, 0.6, 0.8], score_after=0.1, copy_before=0.5, copy_after=[0.2, 0.1, 0, 0]
    )


def test_medians_and_ranks_of_the_ladder():
    table = rungs([0, 0, 3, 5])
    medians = ablations.ladder_medians(table)
    assert medians[["copies", "prompts", "neuron_count", "score_before"]].to_numpy().tolist() == [
        [1, 2, 0, pytest.approx(0.15)], [8, 2, 4, pytest.approx(0.7)],
    ]  # fmt: skip
    ranks = ablations.ladder_ranks(table)
    assert ranks["neuron_count"] == pytest.approx(table["copies"].corr(table["neuron_count"], method="spearman"))
    assert ranks["copy_after"] < 0 < ranks["score_before"]
    assert math.isnan(ranks["copy_before"])


def test_findings_have_the_numbers(levels):
    table, ladder = made_up(levels), rungs([0, 0, 3, 5])
    claims = ablations.ablation_claims(table, levels)
    text = ablations.findings(table, claims, ladder, levels)
    assert "**VM, thresholds** from mean - 1 sd to mean + 2 sd: 10.5, 6, 4, 3 neurons" in text
    assert "without refinement 674.5 neurons in place of 21" in text
    assert "copy similarity 0.79 at 0.75, 0.62 at 0.5" in text
    assert "10 of 10 hold." in text
    assert "5 of 5 hold." in text
    assert "2 of 4 prompts have no neurons, up to 1 copies." in text
    assert "nan" not in text


# One seed, one prompt


def test_one_image_of_one_prompt(profile):
    small = dataclasses.replace(
        profile,
        generation=dataclasses.replace(profile.generation, samples=1),
        detection=dataclasses.replace(profile.detection, samples=2),
        search=SearchSettings(theta_start=1000.0, theta_step=1.0, theta_min=998.0, k_start=1, k_step=1, k_max=1),
        thresholds=dataclasses.replace(profile.thresholds, multiplier=-10.0),
        protocol="released",
    )
    pipe = load_pipeline(small)
    prompts = ablations.compared_prompts(small, 1)
    levels = ablations.threshold_levels(pipe, small, progress=False)
    found = ablations.ablated(pipe, small, prompts, levels, progress=False)
    settings = ablations.ablation_settings(found, levels, factors=(0.5,))
    default = found[found["setting"] == ablations.default_setting(levels)]
    values = mitigation.measured(pipe, small, default, settings, progress=False)
    table = ablations.table_4(values, levels, resamples=5)
    assert table["d_sscd"].isna().all()
    check_table(ablations.checks_of(found, values, table, levels))
    claims = ablations.ablation_claims(table, levels)
    assert "nan" not in ablations.findings(table, claims, rungs([0, 0, 1, 1]).iloc[:0], levels)
    assert len(ablations.threshold_map(found, values, levels)) == 2
