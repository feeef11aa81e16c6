import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nemolib import exhibits, index, paper, paths, tables
from nemolib import experiments_mitigation as science
from nemolib.exhibits import mitigation
from nemolib.experiments_mitigation import INITIAL, METRICS, NEMO, NONE, OFF, RANDOM
from nemolib.theme import TEXT_WIDTH

OURS = [item for item in vars(mitigation).values() if isinstance(item, exhibits.Exhibit)]


def like_the_paper(changes=()):
    """Return a table of `table_1` with the paper's numbers as ours, but for (setting, column, value)."""
    initial = paper.table_4().query("setting == 'no refinement'").assign(setting=INITIAL)
    table = pd.concat([paper.table_1(), initial], ignore_index=True).assign(prompts=4, memorized=0.25)
    for name in ("neurons", *METRICS):
        table[f"{name}_low"] = table[f"{name}_high"] = table[name]
        for suffix in ("", "_mad"):
            table[f"{name}_paper{suffix}"] = table[f"{name}{suffix}"].where(table["setting"] != INITIAL)
    for setting, column, value in changes:
        table.loc[(table["setting"] == setting) & (table["kind"] == "vm"), column] = value
    return table


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory):
    """Save tables and grids as notebooks 03 and 04 would, of a world in which all goes as in the paper."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", tmp_path_factory.mktemp("build"))
        save()
        yield


def save():
    single = [
        (layer, neuron, f"prompt {number}", 0.9, 0.5 + number / 10, 0.1)
        for layer, neuron, prompts in ((1, 25, 3), (1, 221, 2), (3, 25, 1))
        for number in range(prompts)
    ]
    contents = {
        "table_1": like_the_paper(),
        "table_1_claims": science.paper_claims(like_the_paper()),
        "single_neurons": pd.DataFrame(
            single, columns=["layer", "neuron", "prompt", "copy_before", "copy_single", "copy_all"]
        ),
        "deactivation": pd.DataFrame(
            {"prompt": ["a", "b", "c"], "neuron_count": [7, 30, 900], "copy_after": [0.625, 0.75, 0.01]}
        ),
        "unmemorized_images": pd.DataFrame(
            {
                "prompt": ["a", "b"],
                "neurons_one": [3, 5],
                "neurons_all": 77,
                "a_clip_before": [0.3, 0.4],
                "a_clip_one": [0.3, 0.36],
                "a_clip_all": [0.3, 0.3],
                "d_sscd_before": [0.2, 0.3],
                "d_sscd_one": [0.2, 0.2],
                "d_sscd_all": [0.2, 0.2],
            }
        ),
        "unmemorized_quality": pd.DataFrame(
            {
                "images": [NONE, OFF],
                "number": 20,
                "encoder": "tiny CLIP",
                "fid": [1.2345, 2.0],
                "kid": [0.01234, 0.05],
                "kid_sd": [0.0011, 0.002],
                "neurons": 77,
            }
        ),
    }
    for name, content in contents.items():
        tables.save_table(content, name, profile="tiny")
    settings = list(dict.fromkeys(like_the_paper()["setting"]))
    pair = ["seed 0", "seed 0"]
    columns = {
        "mitigations": ["planted", *settings],
        "figure_9": ["planted", "seed 0"],
        **{f"figure_{number}": pair for number in (10, 11, 12)},
        "unmemorized_grid": pair,
    }
    generator = np.random.default_rng(0)
    for name, labels in columns.items():
        pictures = generator.integers(0, 255, (2, len(labels), 8, 8, 3), dtype=np.uint8)
        tables.save_grid(pictures, name, rows=["a", "b"], columns=labels, profile="tiny")


def reading(exhibit, **changed):
    return exhibit.read(exhibits.load_sources(exhibit, "tiny") | changed)


def drawn(exhibit):
    return exhibit.draw(exhibits.load_sources(exhibit, "tiny"))


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def documented(kind):
    """Return the names that the list of tables and grids has: ``Tables`` or ``Grids``."""
    sections = re.findall(rf"^{kind} of notebook \d\d:\n(.*?)(?=\n\n|\Z)", tables.__doc__, re.M | re.S)
    entries = re.findall(r"^ {4}(\w[\w, ]*):", "\n".join(sections), re.M)
    return {name.strip() for entry in entries for name in entry.split(",")}


def test_all_are_in_the_list_once():
    assert len(OURS) == 11
    assert set(OURS) <= set(exhibits.EXHIBITS)
    names = [exhibit.name for exhibit in exhibits.EXHIBITS]
    assert len(set(names)) == len(names)
    index.check_exhibits(exhibits.EXHIBITS)


def test_what_an_exhibit_needs_is_documented():
    known_tables, known_grids = documented("Tables"), documented("Grids")
    for exhibit in exhibits.EXHIBITS:
        assert set(exhibit.tables) <= known_tables, exhibit.name
        assert set(exhibit.grids) <= known_grids, exhibit.name


@pytest.mark.parametrize("exhibit", OURS, ids=lambda item: item.name)
def test_every_exhibit_is_drawn_and_read(exhibit):
    content, found = drawn(exhibit), reading(exhibit)
    if isinstance(content, Figure):
        assert content.get_figwidth() == pytest.approx(TEXT_WIDTH * (0.8 if exhibit is mitigation.UNHARMED else 1))
        content.draw_without_rendering()
    else:
        assert len(content)
    assert found.ours
    assert "nan" not in found.ours + found.paper
    assert found.verdict in exhibits.VERDICTS


@pytest.mark.parametrize("exhibit", [mitigation.TABLE_1, mitigation.TABLE_1_FIGURE], ids=lambda item: item.name)
def test_table_1_agrees_in_a_world_like_the_papers(exhibit):
    found = reading(exhibit)
    numbers = "VM, SSCD_Orig: untouched 0.83, random neurons 0.80, NeMo 0.09"
    assert found.ours == f"{numbers}; initial selection 0.07"
    assert found.paper == numbers
    assert found.verdict == "agrees"


@pytest.mark.parametrize(
    ("setting", "value", "verdict"),
    [(NEMO, 0.41, "agrees"), (NEMO, 0.42, "differs"), (RANDOM, 0.42, "agrees"), (RANDOM, 0.41, "differs")],
)
def test_nemo_removes_more_than_half_and_random_neurons_do_not(setting, value, verdict):
    found = reading(mitigation.TABLE_1, table_1=like_the_paper([(setting, "sscd_orig", value)]))
    assert found.verdict == verdict
    assert f"{value:.2f}" in found.ours
    assert f"{value:.2f}" not in found.paper


def test_table_1_shows_both_columns():
    shown = drawn(mitigation.TABLE_1).set_index(["setting", "prompts"])
    assert len(shown) == 18
    row = shown.loc[(NEMO, "VM")]
    assert row[["copies", "neurons", "SSCD_Orig", "SSCD_Orig (paper)"]].tolist() == [
        "25%", "4.0 ± 3.0", "0.09 ± 0.06", "0.09 ± 0.06",
    ]  # fmt: skip
    assert shown.loc[(INITIAL, "TM"), "SSCD_Orig (paper)"] == ""


def test_claims_that_hold_and_that_do_not():
    found = reading(mitigation.CLAIMS)
    assert (found.ours, found.verdict) == ("5 of 5 hold", "agrees")
    table = like_the_paper([(NEMO, "d_sscd", 0.6), (NEMO, "a_clip", 0.2)])
    found = reading(mitigation.CLAIMS, table_1_claims=science.paper_claims(table))
    assert found.ours == "3 of 5 hold; not: images become diverse, the alignment with the prompt stays"
    assert found.verdict == "differs"
    assert len(drawn(mitigation.CLAIMS)) == 5


def test_one_image_of_each_setting():
    assert reading(mitigation.MITIGATION_IMAGES).ours == "2 prompts, 9 settings, one seed"
    figure = drawn(mitigation.MITIGATION_IMAGES)
    assert len([axes for axes in figure.axes if axes.images]) == 2 * 10
    labels = texts(figure)
    assert {"planted", "untouched", "Wen", "10 tokens", "NeMo", "initial"} <= set(labels)
    assert NONE not in labels


@pytest.mark.parametrize(
    ("exhibit", "label", "words"),
    [
        (mitigation.FIGURE_10, "Figure 10", "neuron 25 of value layer 1, 3 prompts: copy similarity 0.90, without this neuron 0.60"),
        (mitigation.FIGURE_11, "Figure 11", "neuron 221 of value layer 1, 2 prompts: copy similarity 0.90, without this neuron 0.55"),
        (mitigation.FIGURE_12, "Figure 12", "neuron 25 of value layer 3, 1 prompts: copy similarity 0.90, without this neuron 0.50"),
    ],
    ids=lambda item: getattr(item, "name", ""),
)  # fmt: skip
def test_shared_neurons_one_by_one(exhibit, label, words):
    assert exhibit.label == label
    assert exhibit.grids == (exhibit.name,)
    assert reading(exhibit).ours == f"{words}, without all neurons of the prompt 0.10 (medians)"
    assert "17% of the VM prompts" in reading(exhibit).paper
    labels = texts(drawn(exhibit))
    assert labels.count("1") == 2
    assert "this neuron deactivated" in labels


def test_the_reading_of_figure_9_is_of_its_prompts():
    found = reading(mitigation.FIGURE_9)
    assert found.ours == "7 to 30 neurons off, copy similarity 0.62 to 0.75"
    assert found.verdict == "beside"


def test_unmemorized_prompts():
    unharmed = reading(mitigation.UNHARMED)
    assert unharmed.ours == (
        "A_CLIP 0.35; 0.33 without the 4 neurons of one memorized prompt, 0.30 without the 77 of all (medians)"
    )
    assert unharmed.verdict == "agrees"
    words = "KID 0.0123 untouched, 0.0500 with 77 neurons off"
    assert reading(mitigation.QUALITY).ours == reading(mitigation.UNMEMORIZED_IMAGES).ours == words
    assert texts(drawn(mitigation.UNMEMORIZED_IMAGES)).count("77") == 2


def test_image_sets_as_they_are_shown():
    shown = drawn(mitigation.QUALITY)
    assert shown.columns.tolist() == ["images", "number", "features", "FID", "KID"]
    assert shown.iloc[0].tolist() == [NONE, 20, "tiny CLIP", "1.234", "0.0123 ± 0.0011"]


def test_a_missing_grid_names_notebook_04(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    with pytest.raises(
        exhibits.MissingResultError, match=r"no image grid 'mitigations' .*make build/tiny/04_deactivate"
    ):
        reading(mitigation.MITIGATION_IMAGES)
