import dataclasses

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


def test_a_table_has_its_columns_and_types(profile):
    table = load_prompts(profile.prompts.memorized)
    assert list(table.columns) == ["caption", "kind", "group", "copies", "image"]
    assert table["copies"].tolist() == [64, 64, 64, 32, 32, 1, 64]
    assert table["caption"][2] == "card c, gold"


def test_captions_that_look_like_missing_values_stay_text(profile):
    table = load_prompts(profile.prompts.unmemorized)
    assert table["caption"].tolist() == ["null", "NA"]
    assert table["image"].tolist() == ["", ""]


def test_further_columns_and_another_order_are_kept(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("url,image,copies,group,kind,caption\nu,,1,,vm,a\n")
    table = load_prompts(path)
    assert list(table.columns) == ["caption", "kind", "group", "copies", "image", "url"]
    assert table.iloc[0].tolist() == ["a", "vm", "", 1, "", "u"]


def test_select_by_kind(profile):
    assert select(profile, "vm")["caption"].tolist() == ["card a", "card b", "card c, gold"]
    assert select(profile, "memorized")["kind"].tolist() == ["vm"] * 3 + ["tm"] * 2
    assert select(profile, "ladder")["copies"].tolist() == [1, 64]
    assert len(select(profile, "unmemorized")) == 2


def test_a_group_restricts_memorized_prompts_only(profile):
    profile = dataclasses.replace(profile, groups="report")
    assert select(profile, "vm")["caption"].tolist() == ["card b", "card c, gold"]
    assert select(profile, "tm")["caption"].tolist() == ["case a"]
    assert len(select(profile, "ladder")) == 2
    assert len(select(profile, "unmemorized")) == 2


def test_limits_cut_from_the_top(profile):
    profile = dataclasses.replace(profile, groups="report", limits=Limits(vm=1, unmemorized=1, ladder=9))
    assert select(profile, "vm")["caption"].tolist() == ["card b"]
    assert select(profile, "unmemorized")["caption"].tolist() == ["null"]
    assert len(select(profile, "ladder")) == 2


def test_holdout_prompts_and_those_of_the_threshold(profile):
    assert select(profile, "holdout")["caption"].tolist() == [f"holdout {number}" for number in range(5)]
    assert select(profile, "threshold")["caption"].tolist() == ["holdout 0", "holdout 1"]
    everything = dataclasses.replace(profile, holdout_size=None)
    assert len(select(everything, "holdout")) == 6


def test_too_few_holdout_prompts_are_an_error(profile):
    with pytest.raises(PromptTableError, match=r"holdout\.csv: 6 holdout prompts; profile 'x' has holdout_size = 7"):
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
