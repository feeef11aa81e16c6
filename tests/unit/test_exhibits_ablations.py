import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nemolib import exhibits, paper, paths, tables
from nemolib import experiments_ablations as science
from nemolib.exhibits import ablations
from nemolib.experiments_ablations import GUIDANCE, NO_TOP_K
from nemolib.experiments_mitigation import METRICS, NONE
from nemolib.theme import TEXT_WIDTH

OURS = [item for item in vars(ablations).values() if isinstance(item, exhibits.Exhibit)]

LEVELS = pd.DataFrame(
    {
        "level": ["mean - 1 sd", "mean", "mean + 1 sd", "mean + 2 sd"],
        "multiplier": [-1.0, 0.0, 1.0, 2.0],
        "threshold": [0.288, 0.358, 0.428, 0.498],
        "default": [False, False, True, False],
    }
)


def like_the_paper(changes=()):
    """Return Table 4 with the paper's numbers as ours, but for (setting, column, value) of VM prompts."""
    table = science._reported(LEVELS).assign(prompts=4, memorized=0.25)
    for name in ("neurons", *METRICS):
        for suffix in ("", "_mad"):
            table[f"{name}_paper{suffix}"] = table[f"{name}{suffix}"]
        table[f"{name}_low"] = table[f"{name}_high"] = table[name]
    for setting, column, value in changes:
        table.loc[(table["setting"] == setting) & (table["kind"] == "vm"), column] = value
    return table


def pairs():
    """Return Fig. 14 and 15 with the paper's numbers as ours."""
    table, limits = paper.threshold_maps(), LEVELS.set_index("multiplier")
    for name in ("initial", "refinement"):
        table[f"{name}_threshold"] = table[name].map(limits["threshold"])
        table[name] = table[name].map(limits["level"])
    names = ["initial_neurons", "neurons", "sscd_gen", "sscd_orig"]
    return table.assign(prompts=6, reached=4, **{f"{name}_paper": table[name] for name in names})


def ladder():
    return pd.DataFrame(
        {
            "caption": ["a", "b", "c"],
            "copies": [1, 8, 64],
            "initial_count": [0, 20, 30],
            "neuron_count": [0, 4, 9],
            "reached": [False, True, True],
            "score_before": [0.3, 0.5, 0.7],
            "score_after": [0.3, 0.4, 0.4],
            "copy_before": [0.1, 0.4, 0.9],
            "copy_after": [0.1, 0.2, 0.05],
        }
    )


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory):
    """Save tables as notebook 05 would, of a world in which all goes as in the paper."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", tmp_path_factory.mktemp("build"))
        table = like_the_paper()
        contents = {
            "ablation_levels": LEVELS,
            "table_4": table,
            "table_4_claims": science.ablation_claims(table, LEVELS),
            "scaling": science.scaling_table(table, LEVELS),
            "threshold_map": pairs(),
            "neuron_ladder": ladder(),
        }
        for name, content in contents.items():
            tables.save_table(content, name, profile="tiny")
        yield


def reading(exhibit, **changed):
    return exhibit.read(exhibits.load_sources(exhibit, "tiny") | changed)


def drawn(exhibit, **changed):
    return exhibit.draw(exhibits.load_sources(exhibit, "tiny") | changed)


@pytest.mark.parametrize("exhibit", OURS, ids=lambda item: item.name)
def test_every_exhibit_is_drawn_and_read(exhibit):
    content, found = drawn(exhibit), reading(exhibit)
    if isinstance(content, Figure):
        assert content.get_figwidth() == pytest.approx(TEXT_WIDTH)
        content.draw_without_rendering()
    else:
        assert len(content)
    assert found.ours
    assert "nan" not in found.ours + found.paper + found.reason
    assert found.verdict == ("beside" if exhibit is ablations.LADDER else "agrees")


def test_names_are_distinct():
    assert len(OURS) == 7
    assert len({exhibit.name for exhibit in OURS}) == 7
    assert {exhibit.notebook for exhibit in OURS} == {"05_ablations"}


def test_table_4_shows_both_columns():
    shown = drawn(ablations.TABLE_4).set_index(["setting", "prompts"])
    assert len(shown) == 30
    assert shown.loc[(NO_TOP_K, "VM"), ["neurons", "SSCD_Gen (paper)"]].tolist() == ["11.0 ± 10.0", "0.21 ± 0.13"]


def test_table_4_reads_like_the_paper():
    found = reading(ablations.TABLE_4)
    assert found.ours == found.paper
    assert "default 4 and 0.09, no refinement 26.5 and 0.07, no top-k 11 and 0.11" in found.ours


@pytest.mark.parametrize(
    ("setting", "value", "verdict"),
    [
        (GUIDANCE, 0.41, "agrees"), (GUIDANCE, 0.42, "differs"), ("factor -0.5", 0.42, "differs"),
        ("factor 0.5", 0.8, "agrees"), ("no refinement", np.nan, "beside"),
    ],
)  # fmt: skip
def test_every_search_has_to_remove_more_than_half(setting, value, verdict):
    found = reading(ablations.TABLE_4, table_4=like_the_paper([(setting, "sscd_orig", value)]))
    assert found.verdict == verdict


def test_claims_that_do_not_hold_are_named():
    table = like_the_paper([(NO_TOP_K, "neurons", 3), ("factor 0.25", "sscd_orig", np.nan)])
    found = reading(ablations.CLAIMS, table_4_claims=science.ablation_claims(table, LEVELS))
    assert found.ours == "13 of 15 hold; not: without top-k there are more neurons (VM)"
    assert found.verdict == "differs"
    table = like_the_paper([("factor 0.25", "sscd_orig", np.nan)])
    assert reading(ablations.CLAIMS, table_4_claims=science.ablation_claims(table, LEVELS)).verdict == "beside"


def test_figure_5b_reads_the_fall():
    found = reading(ablations.FIGURE_5B)
    assert found.ours == found.paper == "VM, SSCD_Orig: 0.83 at 1, 0.62 at 0.5, 0.09 at 0, 0.08 at -1"


@pytest.mark.parametrize(
    ("factor", "value", "verdict"),
    [
        (0.5, 0.41, "differs"),
        (0.0, 0.42, "differs"),
        (-0.75, 0.42, "differs"),
        (0.25, 0.8, "agrees"),
        (-1, np.nan, "beside"),
    ],
)
def test_where_the_copy_breaks(factor, value, verdict):
    scaled = exhibits.load_sources(ablations.FIGURE_5B, "tiny")["scaling"]
    scaled["sscd_orig"] = scaled["sscd_orig"].mask((scaled["factor"] == factor) & (scaled["kind"] == "vm"), value)
    assert reading(ablations.FIGURE_5B, scaling=scaled).verdict == verdict


def test_factors_that_were_not_used_are_missing():
    scaled = exhibits.load_sources(ablations.FIGURE_5B, "tiny")["scaling"]
    found = reading(ablations.FIGURE_5B, scaling=scaled[scaled["factor"].isin([0, 1])])
    assert "– at 0.5" in found.ours
    assert found.verdict == "beside"


@pytest.mark.parametrize(
    ("kind", "initial", "column", "value", "verdict"),
    [
        ("vm", "mean", "neurons", 10.6, "differs"),
        ("vm", "mean", "neurons", 10.5, "agrees"),
        ("tm", "mean + 1 sd", "initial_neurons", 837, "differs"),
        ("tm", "mean - 1 sd", "neurons", np.nan, "beside"),
    ],
)
def test_neurons_become_fewer_along_the_diagonal(kind, initial, column, value, verdict):
    table = pairs()
    rows = (table["kind"] == kind) & (table["initial"] == initial)
    found = reading(ablations.FIGURE_14, threshold_map=table.assign(**{column: table[column].mask(rows, value)}))
    assert found.verdict == verdict
    assert "the lowest threshold for 8 of 12 prompts" in found.reason


def test_one_threshold_is_nothing_to_compare():
    table = pairs()
    single = table[(table["initial"] == "mean") & (table["refinement"] == "mean")]
    assert reading(ablations.FIGURE_14, threshold_map=single).verdict == "beside"
    drawn(ablations.FIGURE_14, threshold_map=single).draw_without_rendering()


@pytest.mark.parametrize(("value", "verdict"), [(0.41, "agrees"), (0.42, "differs"), (np.nan, "agrees")])
def test_every_pair_has_to_remove_more_than_half(value, verdict):
    table = pairs()
    table.loc[1, "sscd_orig"] = value
    found = reading(ablations.FIGURE_15, threshold_map=table)
    assert found.verdict == verdict
    assert found.paper == "VM, SSCD_Orig of all pairs: 0.08 to 0.10"


def test_the_ladder_reads_from_the_lowest_to_the_highest_rung():
    found = reading(ablations.LADDER)
    assert found.ours == (
        "from 1 to 64 copies: 0 to 9 neurons, copy similarity 0.10 to 0.90, with the neurons deactivated 0.10 to 0.05; rank "
        "correlation of copies and neurons 1.00"
    )


def test_a_profile_without_a_ladder():
    tables.save_table(pd.DataFrame(columns=list(science.LADDER_COLUMNS)), "no_ladder", profile="tiny")
    empty = tables.read_table("no_ladder", profile="tiny")
    assert reading(ablations.LADDER, neuron_ladder=empty).ours == "this profile has no duplication ladder"
    assert not drawn(ablations.LADDER, neuron_ladder=empty).axes


@pytest.mark.parametrize("value", [np.nan, -0.1])
def test_without_copies_there_is_nothing_to_remove(value):
    changes = [(setting, "sscd_orig", value) for setting in like_the_paper()["setting"].unique()]
    table = like_the_paper(changes)
    for exhibit, name, content in (
        (ablations.TABLE_4, "table_4", table),
        (ablations.FIGURE_15, "table_4", table),
        (ablations.FIGURE_5B, "scaling", science.scaling_table(table, LEVELS)),
    ):
        found = reading(exhibit, **{name: content})
        assert found.verdict == "beside"
        assert "nan" not in found.ours + found.reason
    assert NONE in reading(ablations.TABLE_4, table_4=table).ours
