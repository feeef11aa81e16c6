"""Prompt tables in the format of the authors' release: semicolons, an unnamed index, quotation marks, HTML."""

import csv
import dataclasses

import pandas as pd
import pytest

from nemolib.prompts import PromptTableError, image_paths, load_prompts, select
from nemolib.settings import Limits, Profile, PromptTables
from nemolib.store import StoreError

MEMORIZED = (
    ";Caption;URL;type;mean_sscd;max_sscd;Index\n"
    "0;The No Limits Podcast;https://a.org/1.jpg;VM;0.83;0.84;10\n"
    '1;"""Watch: A Video, """"Lifted Up"""", now""";"http://b.org/v?x=1&amp;y=2";VM;0.86;0.87;11\n'
    "2;\"Rug <b>grey</b> &amp; round, 5' x 7'\";https://c.org/rug.jpg;TM;;;12\n"
    '3;"Case; with a semicolon";https://d.org/case.png;TM;0.1;0.2;13\n'
)
UNMEMORIZED = ";Caption;URL;Index\n0;A pagoda;https://e.org/p.jpg;396\n1;NA;;397\n"
HOLDOUT = "Unnamed: 0;Caption;URL;Index\n7;one;u;1\n8;two;u;2\n9;one;u;3\n10;アヤワスカ;u;4\n"


@pytest.fixture
def profile(tmp_path):
    folder = tmp_path / "world" / "prompts"
    folder.mkdir(parents=True)
    files = {"memorized": MEMORIZED, "unmemorized": UNMEMORIZED, "holdout": HOLDOUT}
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    prompts = {name: str(folder / f"{name}.csv") for name in files}
    tables, none = PromptTables(**prompts), Limits(ladder=0)
    return Profile("x", "m", tables, limits=none, holdout_size=3, threshold_prompts=2)


def test_kinds_come_from_the_type_and_captions_stay_as_they_are(profile):
    table = load_prompts(profile.prompts.memorized)
    assert table["kind"].tolist() == ["vm", "vm", "tm", "tm"]
    assert table["caption"].tolist() == [
        "The No Limits Podcast",
        '"Watch: A Video, ""Lifted Up"", now"',
        "Rug <b>grey</b> &amp; round, 5' x 7'",
        "Case; with a semicolon",
    ]
    ours = ["caption", "kind", "group", "copies", "image"]
    assert list(table.columns) == [*ours, "url", "mean_sscd", "max_sscd", "index"]
    assert table["copies"].tolist() == [0] * 4
    assert set(table["group"]) == set(table["image"]) == {""}
    assert table["max_sscd"].tolist() == ["0.84", "0.87", "", "0.2"]


def test_tables_without_a_type_are_of_the_kind_that_is_asked_for(profile):
    assert select(profile, "unmemorized")["caption"].tolist() == ["A pagoda", "NA"]
    assert set(select(profile, "unmemorized")["kind"]) == {"unmemorized"}
    assert select(profile, "memorized")["kind"].tolist() == ["vm", "vm", "tm", "tm"]
    with pytest.raises(PromptTableError, match=r"unmemorized\.csv: column 'type' is missing.*kind='unmemorized'"):
        load_prompts(profile.prompts.unmemorized)
    # A caption that appears again is left out.
    assert select(profile, "holdout")["caption"].tolist() == ["one", "two", "アヤワスカ"]


def test_a_kind_with_limit_0_needs_no_prompts(profile):
    table = select(profile, "ladder")
    assert table.empty
    assert "caption" in table
    with pytest.raises(PromptTableError, match="no row 'ladder'"):
        select(dataclasses.replace(profile, limits=Limits()), "ladder")


def test_images_that_were_found_are_those_of_the_caption(profile, tmp_path):
    world = tmp_path / "world"
    (world / "images").mkdir()
    (world / "images" / "0000.jpg").touch()
    report = "caption,status,image\nThe No Limits Podcast,found,images/0000.jpg\nThe No Limits,missing,\n"
    (world / "images.csv").write_text(report + "Case; with a semicolon,found,images/0003.png\n")
    table = select(profile, "memorized")
    # The last one is in the report, but its file is gone.
    assert table["image"].tolist() == ["images/0000.jpg", "", "", ""]
    assert image_paths(table.head(1), profile) == [world / "images" / "0000.jpg"]
    (world / "images.csv").write_text("caption,state\nu,found\n")
    with pytest.raises(StoreError, match=r"images\.csv: column 'image' is missing"):
        select(profile, "vm")


def test_all_fields_may_be_in_quotation_marks(tmp_path):
    path = tmp_path / "quoted.csv"
    table = pd.DataFrame({"Caption": ["a fox; red", "a cat"], "URL": ["http://a/1", ""], "type": ["VM", "TM"]})
    table.to_csv(path, sep=";", quoting=csv.QUOTE_ALL)
    assert load_prompts(path)["caption"].tolist() == ["a fox; red", "a cat"]
