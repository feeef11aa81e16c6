import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nemolib import exhibits, paths, tables
from nemolib.exhibits import blocking
from nemolib.exhibits.base import lacking
from nemolib.experiments_blocking import FREQUENT, OTHER, OUTPUTS, QUALITY, UNTOUCHED
from nemolib.theme import TEXT_WIDTH

OURS = [item for item in vars(blocking).values() if isinstance(item, exhibits.Exhibit)]

LIKE_THE_PAPER = [
    ("value", 1, "sscd_orig", 0.2), ("value", 7, "sscd_orig", 0.3), ("key", 4, "sscd_orig", 0.1),
    ("key", 6, "sscd_orig", 0.25), ("key", 4, "a_clip", 0.26), ("convolution", 1, "sscd_orig", 0.2),
]  # fmt: skip
"""What the paper says about layers, in numbers of our own."""


def quality(*, change=0.0, spread=0.1, more=0.0):
    """Return four splits: 10 ± spread untouched; frequent neurons add a change, with a deviation of its own."""
    rows = []
    for metric in QUALITY:
        for split, offset in enumerate((-1.0, 1.0, -1.0, 1.0)):
            labels, base = (split, split, metric, "features", 40), 10 + spread * offset
            rows.append((UNTOUCHED, 0, 0, 0, *labels, base, ""))
            wiggle = more * (-1) ** (split // 2)
            rows += [(FREQUENT, asked, asked, 0, *labels, base + change * asked / 9 + wiggle, "") for asked in (3, 9)]
            rows.append((OTHER, 9, 8, 0, *labels, base, ""))
    columns = ["setting", "asked", "neurons", "draw", "split", "pair", "metric", "encoder", "images", "value", "reason"]
    return pd.DataFrame(rows, columns=columns)


def not_computed():
    table = quality().drop_duplicates(["setting", "asked", "metric"])
    return table.assign(
        split=None, pair=None, value=np.nan, encoder="", images=0, reason="not computed: 1 prompts with 1 images"
    )


def similarity(*, lowest=0.98):
    rows = []
    for setting, asked, cosine in ((FREQUENT, 3, 0.995), (FREQUENT, 9, lowest), (OTHER, 9, 0.999)):
        for output in OUTPUTS:
            for layer in range(1, 8):
                value = (cosine if layer == 2 else 1.0) - 0.1 * (output == OUTPUTS[1])
                rows.append((setting, asked, asked, 0, output, layer, "mid" if layer == 7 else "down", 6, value, value))
    columns = ["setting", "asked", "neurons", "draw", "output", "layer", "block", "samples", "cosine", "lowest"]
    return pd.DataFrame(rows, columns=columns)


def effects(changes=LIKE_THE_PAPER, numbers=range(1, 8)):
    """Return effects in which nothing changes but for (part, layer, metric, value): 0.8 and 0.3 untouched."""
    values = {"sscd_orig": 0.8, "sscd_gen": 1.0, "a_clip": 0.3}
    layers = [(UNTOUCHED, 0, "")]
    layers += [(part, layer, "mid" if layer == 7 else "down") for part in ("value", "key") for layer in numbers]
    layers += [("convolution", layer, "down") for layer in range(1, 5)]
    table = pd.DataFrame(
        [
            {"part": part, "layer": layer, "block": block, "name": f"{part} {layer}", "prompt": prompt, **values}
            for part, layer, block in layers
            for prompt in ("a", "b")
        ]
    )
    for part, layer, metric, value in changes:
        table.loc[(table["part"] == part) & (table["layer"] == layer), metric] = value
    return table


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory):
    """Save tables and grids as notebook 05 would, of a world in which all goes as in the paper."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", tmp_path_factory.mktemp("build"))
        contents = {"blocked_quality": quality(), "block_similarity": similarity(), "layer_effects": effects()}
        for name, table in contents.items():
            tables.save_table(table, name, profile="tiny")
        generator = np.random.default_rng(0)
        for number, layers in ((18, 7), (19, 7), (20, 4)):
            pictures = generator.integers(0, 255, (2, 1 + layers, 8, 8, 3), dtype=np.uint8)
            columns = ["none", *map(str, range(1, layers + 1))]
            tables.save_grid(pictures, f"figure_{number}", rows=["a", "b"], columns=columns, profile="tiny")
        yield


def reading(exhibit, **changed):
    return exhibit.read(exhibits.load_sources(exhibit, "tiny") | changed)


def drawn(exhibit, **changed):
    return exhibit.draw(exhibits.load_sources(exhibit, "tiny") | changed)


def saved_and_read(table, name):
    """Return a table as notebook 06 gets it."""
    tables.save_table(table, name, profile="other")
    return tables.read_table(name, profile="other")


def test_every_figure_and_table_of_this_half_has_its_exhibit():
    assert [item.label for item in OURS if item.label] == [
        "Figure 5a", "Figure 8", "Table 3", "Figure 16", "Figure 17", "Figure 18", "Figure 19", "Figure 20",
    ]  # fmt: skip
    assert len({item.name for item in OURS}) == len(OURS) == 10
    assert {item.notebook for item in OURS} == {"05_ablations"}
    names = {item.name for item in exhibits.EXHIBITS if item.notebook != blocking.NOTEBOOK}
    assert not names & {item.name for item in OURS}


@pytest.mark.parametrize("exhibit", OURS, ids=lambda item: item.name)
def test_every_exhibit_is_drawn_and_read(exhibit):
    content, found = drawn(exhibit), reading(exhibit)
    if isinstance(content, Figure):
        assert content.get_figwidth() == pytest.approx(TEXT_WIDTH * (blocking.SMALL_GRID if exhibit.grids else 1))
        content.draw_without_rendering()
    else:
        assert len(content)
    assert "nan" not in found.ours + found.paper
    assert found.verdict == ("beside" if exhibit in (blocking.FIGURE_18, blocking.FIGURE_19) else "agrees")


@pytest.mark.parametrize("exhibit", OURS, ids=lambda item: item.name)
def test_what_was_not_computed_is_said(exhibit):
    changed = {
        "blocked_quality": saved_and_read(not_computed(), "blocked_quality"),
        "block_similarity": saved_and_read(similarity().iloc[:0], "block_similarity"),
        "layer_effects": saved_and_read(effects().assign(sscd_orig=np.nan), "layer_effects"),
    }
    sources = exhibits.load_sources(exhibit, "tiny") | changed
    missing = lacking(exhibit, sources)
    expected = {
        "figure_5a": "not computed: 1 prompts with 1 images",
        "figure_8": "not computed: 1 prompts with 1 images",
        "table_3": "table 'block_similarity' has no rows",
        "figure_16": "table 'layer_effects' has no values of sscd_orig",
    }
    assert missing == expected.get(exhibit.name, "")
    if missing:
        return
    content, found = exhibit.draw(sources), exhibit.read(sources)
    if isinstance(content, Figure):
        content.draw_without_rendering()
    else:
        assert set(content["mean ± sd"]) == {"not computed: 1 prompts with 1 images"}
        assert not content.astype(str).map(lambda text: "nan" in text).any(axis=None)
    assert "nan" not in found.ours + found.paper
    assert found.verdict == "beside"


# Image quality


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        ({"change": 0.0}, "agrees"),
        ({"change": 2.0, "more": 0.8}, "differs"),
        ({"change": 2.0, "more": 1.0}, "agrees"),
        # No change beyond two deviations, but the interval could hide one.
        ({"change": 0.0, "spread": 2.0}, "beside"),
        ({"change": -3.0}, "agrees"),
    ],
)
def test_a_change_counts_beyond_two_deviations_and_no_change_needs_a_small_interval(made, verdict):
    found = reading(blocking.FIGURE_5A, blocked_quality=quality(**made))
    assert found.verdict == verdict
    assert "750 blocked neurons" in found.paper
    assert reading(blocking.FIGURE_8, blocked_quality=quality(**made)).verdict == verdict


def test_a_single_split_has_no_interval():
    table = quality()
    found = reading(blocking.FIGURE_5A, blocked_quality=table.assign(pair=0))
    assert found.verdict == "beside"
    assert found.ours.startswith("FID 10 untouched (40 images")
    assert "nan" not in found.ours
    shown = drawn(blocking.QUALITY_TABLE, blocked_quality=table.assign(pair=0))
    assert shown["mean ± sd"].iloc[0] == "10.000"


def test_without_blocked_neurons_nothing_is_compared():
    table = quality()
    found = reading(blocking.FIGURE_5A, blocked_quality=table[table["setting"] == UNTOUCHED])
    assert found.verdict == "beside"
    assert found.ours.startswith("FID 10")


def test_image_quality_in_numbers():
    shown = drawn(blocking.QUALITY_TABLE, blocked_quality=quality(change=0.9))
    assert len(shown) == 4 * 3
    row = shown[(shown["blocked"] == FREQUENT) & (shown["asked for"] == 9) & (shown["metric"] == "CLIP-FID")].iloc[0]
    assert row[["neurons", "features", "images", "mean ± sd", "change ± sd"]].tolist() == [
        "9", "features", 40, "10.900 ± 0.115", "+0.900 ± 0.000",
    ]  # fmt: skip
    assert shown.loc[shown["blocked"] == UNTOUCHED, "change ± sd"].tolist() == [""] * 3


# Outputs of blocks


@pytest.mark.parametrize(
    ("lowest", "verdict"), [(0.98, "agrees"), (0.975, "agrees"), (0.974, "differs"), (0.5, "differs")]
)
def test_no_block_may_fall_below_the_papers_lowest(lowest, verdict):
    found = reading(blocking.TABLE_3, block_similarity=similarity(lowest=lowest))
    assert found.verdict == verdict
    assert f"{lowest:.2f} ({FREQUENT}, 9 neurons)" in found.ours
    assert found.paper == "every cosine 0.98 to 1 (most frequent), 0.99 to 1 (random other)"


def test_table_3_has_the_papers_values_beside_the_whole_block():
    shown = drawn(blocking.TABLE_3)
    assert shown.columns.tolist() == [
        "output", "setting", "asked", "neurons", *(f"{layer} down" for layer in range(1, 7)), "7 mid",
        "lowest, ours", "lowest, paper",
    ]  # fmt: skip
    assert shown["lowest, paper"].tolist() == ["0.98", "0.98", "0.99", "", "", ""]
    assert shown["lowest, ours"].tolist()[:3] == ["0.995", "0.980", "0.999"]
    assert shown["2 down"].tolist()[3:] == ["0.895", "0.880", "0.899"]


# Layers


@pytest.mark.parametrize(
    ("change", "verdicts"),
    [
        ([], ("agrees", "agrees")),
        ([("value", 3, "sscd_orig", 0.25)], ("differs", "agrees")),
        ([("key", 5, "sscd_orig", 0.01)], ("differs", "agrees")),
        ([("key", 4, "a_clip", 0.28)], ("agrees", "differs")),
    ],
)
def test_the_strongest_layers_are_compared_with_the_papers(change, verdicts):
    table = effects([*LIKE_THE_PAPER, *change])
    found = tuple(reading(item, layer_effects=table).verdict for item in (blocking.FIGURE_16, blocking.FIGURE_17))
    assert found == verdicts


def test_prompts_that_are_no_copies_are_not_compared():
    table = effects([]).assign(sscd_orig=0.6)
    for exhibit in (blocking.FIGURE_16, blocking.FIGURE_17, blocking.FIGURE_20):
        found = reading(exhibit, layer_effects=table)
        assert found.verdict == "beside"
        assert "the untouched model gives no copies (similarity above 0.7)" in found.reason


def test_layers_that_were_not_switched_off_are_not_compared():
    table = effects(numbers=(1, 3, 5, 7))
    for exhibit in (blocking.FIGURE_16, blocking.FIGURE_17):
        found = reading(exhibit, layer_effects=table)
        assert found.verdict == "beside"
        assert "not all layers" in found.reason


def test_the_reading_of_figure_17_names_the_lowest_layers():
    found = reading(blocking.FIGURE_17)
    assert found.ours == (
        "untouched 0.30; lowest alignment: key layer 4 (0.26), value layer 1 (0.30); largest fall with the two layers that lower "
        "the similarity most: value layers 1 and 7 0%, key layers 4 and 6 13%"
    )


@pytest.mark.parametrize(("value", "verdict"), [(0.41, "agrees"), (0.39, "differs")])
def test_half_blocked_convolutions_leave_the_prompts_memorized(value, verdict):
    table = effects([("convolution", layer, "sscd_orig", value) for layer in (1, 2, 3)])
    for exhibit in (blocking.FIGURE_20, blocking.CONVOLUTIONS):
        found = reading(exhibit, layer_effects=table)
        assert found.verdict == verdict
        assert f"share that stays: {value / 0.8:.0%} (median of the layers)" in found.ours


def test_grids_show_every_layer():
    for exhibit, layers in ((blocking.FIGURE_18, 7), (blocking.FIGURE_19, 7), (blocking.FIGURE_20, 4)):
        figure = drawn(exhibit)
        assert len([axes for axes in figure.axes if axes.images]) == 2 * (1 + layers)
        labels = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert {"none", "1", str(layers), "a", "b"} <= set(labels)
        assert exhibit.grids == (exhibit.name,)


def test_labels_of_small_images_stay_in_two_lines():
    grid = tables.Grid(np.zeros((1, 17, 2, 2, 3), dtype=np.uint8), ("a very long caption " * 5,), ("x",) * 17)
    figure = drawn(blocking.FIGURE_20, figure_20=grid)
    (label,) = [text.get_text() for text in figure.axes[0].texts if text.get_text() != "x"]
    assert label == "a very long caption a\nvery long ..."
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)


def test_a_missing_table_names_notebook_05(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    with pytest.raises(
        exhibits.MissingResultError, match=r"no table 'block_similarity' .*make build/tiny/05_ablations"
    ):
        reading(blocking.TABLE_3)
