import csv
import dataclasses
import json

import pandas as pd
import pytest

from nemolib.prompts import PromptTableError, image_paths, load_prompts, select
from nemolib.settings import Limits, Profile, PromptTables

HEADER = "caption,kind,group,copies,image\n"
MEMORIZED = HEADER + (
    "card a,vm,choose,64,planted/a.png\n"
    "card b,vm,report,64,planted/b.png\n"
    '"card c, gold",vm,report,64,planted/c.png\n'
    "case a,tm,report,32,planted/d.png\n"
    "case b,tm,choose,32,planted/e.png\n"
    "rung a,ladder,1,1,planted/f.png\n"
    "rung b,ladder,64,64,planted/g.png\n"
)
UNMEMORIZED = HEADER + "null,unmemorized,unmemorized,0,\nNA,unmemorized,unmemorized,0,\n"
HOLDOUT = HEADER + "".join(f"holdout {number},holdout,holdout,0,\n" for number in range(6))


@pytest.fixture
def profile(tmp_path):
    folder = tmp_path / "world" / "prompts"
    folder.mkdir(parents=True)
    files = {"memorized": MEMORIZED, "unmemorized": UNMEMORIZED, "holdout": HOLDOUT}
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    prompts = {name: str(folder / f"{name}.csv") for name in files}
    return Profile("x", "m", PromptTables(**prompts), holdout_size=5, threshold_prompts=2)


def test_a_table_has_its_columns_and_types_and_further_ones(profile, tmp_path):
    table = load_prompts(profile.prompts.memorized)
    assert list(table.columns) == ["caption", "kind", "group", "copies", "image"]
    assert table["copies"].tolist() == [64, 64, 64, 32, 32, 1, 64]
    assert table["caption"][2] == "card c, gold"
    path = tmp_path / "t.csv"
    path.write_text("url,image,copies,group,kind,caption\nu,,1,,vm,a\n")
    table = load_prompts(path)
    assert list(table.columns) == ["caption", "kind", "group", "copies", "image", "url"]
    assert table.iloc[0].tolist() == ["a", "vm", "", 1, "", "u"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
def test_captions_that_look_like_something_else_stay_text_in_every_format(tmp_path, suffix):
    captions = ["null", "NA", "007", "True", '"Lifted up"', "a; b, c", " 1e3", "アヤワスカ"]
    path, table = tmp_path / f"prompts.{suffix}", pd.DataFrame({"caption": captions})
    if suffix == "txt":
        path.write_text("\ufeff" + "\r\n".join(captions) + "\n\n", encoding="utf-8")
    elif suffix == "jsonl":
        captions.append("two\rlines\r\nor more")
        path.write_text("".join(json.dumps({"Caption": caption, "seed": 3}) + "\n" for caption in captions))
    else:
        captions.append("two\rlines\r\nor more")
        table = pd.DataFrame({"caption": captions, "kind": "holdout", "group": "", "copies": 0, "image": ""})
        table.to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    found = load_prompts(path, kind="holdout")
    assert found["caption"].tolist() == captions
    assert found[["kind", "group", "copies", "image"]].iloc[0].tolist() == ["holdout", "", 0, ""]


def test_prompts_are_chosen_by_kind_and_group_from_the_top(profile):
    assert select(profile, "vm")["caption"].tolist() == ["card a", "card b", "card c, gold"]
    assert select(profile, "memorized")["kind"].tolist() == ["vm"] * 3 + ["tm"] * 2
    assert select(profile, "ladder")["copies"].tolist() == [1, 64]
    assert select(profile, "unmemorized")["caption"].tolist() == ["null", "NA"]
    grouped = dataclasses.replace(profile, groups="report")
    assert select(grouped, "vm")["caption"].tolist() == ["card b", "card c, gold"]
    assert select(grouped, "tm")["caption"].tolist() == ["case a"]
    # The other kinds belong to no group.
    limited = dataclasses.replace(grouped, limits=Limits(vm=1, unmemorized=1, ladder=9))
    assert [len(select(limited, kind)) for kind in ("vm", "unmemorized", "ladder")] == [1, 1, 2]


def test_holdout_prompts_and_those_of_the_threshold(profile):
    assert select(profile, "holdout")["caption"].tolist() == [f"holdout {number}" for number in range(5)]
    assert select(profile, "threshold")["caption"].tolist() == ["holdout 0", "holdout 1"]
    assert len(select(dataclasses.replace(profile, holdout_size=None), "holdout")) == 6
    with pytest.raises(
        PromptTableError, match=r"holdout\.csv: 6 holdout prompts; profile 'x' asks for 7 of kind 'holdout'"
    ):
        select(dataclasses.replace(profile, holdout_size=7), "holdout")


def test_an_unknown_kind_or_group_is_named(profile):
    with pytest.raises(ValueError, match="unknown kind of prompt 'dm'; known: vm, tm"):
        select(profile, "dm")
    with pytest.raises(PromptTableError, match="no row 'vm' of group 'other'"):
        select(dataclasses.replace(profile, groups="other"), "vm")
    swapped = dataclasses.replace(profile, prompts=PromptTables(*[profile.prompts.holdout] * 3))
    with pytest.raises(PromptTableError, match="no row 'unmemorized'"):
        select(swapped, "unmemorized")


def test_images_are_found_beside_the_prompts(profile, tmp_path):
    table = select(profile, "vm")
    planted = tmp_path / "world" / "planted"
    planted.mkdir()
    for name in "ab":
        (planted / f"{name}.png").touch()
    assert image_paths(table.head(2), profile) == [planted / "a.png", planted / "b.png"]
    with pytest.raises(FileNotFoundError, match=r"'card c, gold': its image .*c\.png is missing"):
        image_paths(table, profile)
    with pytest.raises(PromptTableError, match="'null': column 'image' is empty"):
        image_paths(select(profile, "unmemorized"), profile)
