from dataclasses import replace

import pandas as pd
import pytest

from nemolib import exhibits, index, paths
from nemolib.exhibits import published
from nemolib.neurons import NeuronSet
from nemolib.profiles import ProfileError, load_profile, profile_from_mapping, profile_to_mapping
from nemolib.published_runs import PublishedRunError, localizations
from nemolib.theme import TEXT_WIDTH

OURS = [item for item in vars(published).values() if isinstance(item, exhibits.Exhibit)]

RUN = """Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM
the fox podcast;http://a/1;[[25, 7, 25], [3], []];0.25;[[25], [], []];0.375
"the owl; podcast";;[[221], [3], [4]];0.25;[[221], [3], []];0.375
a phone case;;[[25, 30], [3], [4, 5, 6]];0.25;[[], [3], [4, 5, 6]];0.375
an unknown caption;;[[9], [], []];0.25;[[9], [], []];0.375
"""

PROMPTS = """;Caption;URL;type
0;the fox podcast;http://a/1;VM
1;"the owl; podcast";;VM
2;a phone case;;TM
3;never searched;;VM
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    (tmp_path / "run.csv").write_text(RUN, encoding="utf-8")
    (tmp_path / "prompts.csv").write_text(PROMPTS, encoding="utf-8")
    return tmp_path


@pytest.fixture
def profile(files):
    base = load_profile("sd14")
    prompts = replace(base.prompts, memorized=str(files / "prompts.csv"))
    return replace(base, prompts=prompts, published_run=str(files / "run.csv"))


def test_a_run_becomes_a_table_of_localizations(files):
    table = localizations(files / "run.csv", files / "prompts.csv")
    assert table["kind"].tolist()[:3] == ["vm", "vm", "tm"]
    assert table["kind"].isna().tolist() == [False, False, False, True]
    assert table["prompt"].tolist()[1] == "the owl; podcast"
    # A neuron that is listed twice counts once.
    assert table["initial_count"].tolist() == [3, 3, 6, 1]
    assert table["neuron_count"].tolist() == [1, 2, 4, 1]
    assert NeuronSet.from_json(table.loc[2, "neurons"]) == NeuronSet(((), (3,), (4, 5, 6)))
    assert table["refined_score"].eq(0.375).all()


def test_a_run_of_other_prompts_is_refused(files):
    (files / "prompts.csv").write_text(";Caption;URL;type\n0;other;;VM\n", encoding="utf-8")
    with pytest.raises(PublishedRunError, match="none of its 4 captions is in the prompt table"):
        localizations(files / "run.csv", files / "prompts.csv")


@pytest.mark.parametrize("exhibit", OURS, ids=lambda item: item.name)
def test_every_exhibit_says_what_it_is(profile, exhibit):
    item = exhibits.render(exhibit, profile)
    assert exhibit.label.endswith("published run)")
    assert "Not computed here" in exhibit.caption
    assert item.reading.ours.startswith(
        "published run of 4 prompts (2 VM, 1 TM; 1 not in the prompt table, left out): "
    )
    assert "the run need not have the paper's settings" in item.reading.reason
    assert '"published_file"' in item.files["json"].read_text()
    if not isinstance(item.content, pd.DataFrame):
        assert item.content.get_figwidth() <= TEXT_WIDTH
        assert item.content.get_suptitle() == published.MARK
    assert item.exhibit.shows == ()


def test_numbers_are_those_of_the_run(profile):
    page = {item.exhibit.name: item for item in exhibits.render_all(profile, OURS)}
    reading = page["published_figure_4a"].reading
    assert "VM 1.5 ± 0.5, TM 4.0 ± 0.0 neurons; a single neuron for 1 VM prompts" in reading.ours
    assert "VM 0.38 times the paper's, TM 0.19 times the paper's" in reading.reason
    assert reading.verdict == "differs"
    assert "initial VM 3.0 ± 0.0, TM 6.0 ± 0.0" in page["published_figure_7"].reading.ours
    bars = page["published_figure_4a"].content.axes[0].containers
    assert [sum(bar.get_height() for bar in container) for container in bars] == [2, 1]
    shown = page["published_shared_neurons"].content
    assert shown[["layer", "neuron", "prompts", "VM prompts", "of all VM prompts"]].to_numpy().tolist() == [
        [2, 3, 2, 1, "50%"]
    ]
    shared = page["published_shared_neurons"].reading
    assert "neuron 25 of value layer 1 belongs to 1 VM prompts and is the only one of 1" in shared.ours
    assert "neuron 221 of value layer 1 belongs to 1 VM prompts and is the only one of 0" in shared.ours
    assert "together 100% of the VM prompts" in shared.ours
    assert shared.verdict == "differs"


def test_medians_near_the_papers_agree():
    values = {"vm": pd.Series([2, 4, 8]), "tm": pd.Series([20.0])}
    reported = {kind: exhibits.published.paper.reported(f"neurons.{kind}") for kind in values}
    assert published._compared(values, reported)[0]
    assert not published._compared(values | {"tm": pd.Series([43.0])}, reported)[0]
    assert not published._compared(values | {"vm": pd.Series([1.9])}, reported)[0]


def test_the_page_lists_what_was_not_computed(profile):
    page = exhibits.render_all(profile)
    drawn = [item for item in page if isinstance(item, exhibits.Rendered)]
    assert [item.exhibit for item in drawn] == [item for item in exhibits.EXHIBITS if item.published]
    missing = exhibits.missing_table(page)
    assert missing.loc[missing["exhibit"] == "Table 1", "reason"].item().endswith(
        "run notebook 04_deactivate_neurons: make build/sd14/04_deactivate_neurons.ipynb PROFILE=sd14"
    )  # fmt: skip
    for path in index.write_index(page, profile).values():
        text = path.read_text(encoding="utf-8")
        assert "-p published_run=FILE" in text
        assert "Published run" in text
        assert "**Ours**" not in text
        assert "<dt>Ours</dt>" not in text


def test_only_a_profile_with_a_run_has_these_exhibits(profile):
    assert set(OURS) <= set(exhibits.of_profile(profile))
    assert not set(OURS) & set(exhibits.of_profile("tiny"))
    item = exhibits.render_or_say_why(published.FIGURE_4A, replace(profile, published_run=None))
    assert "has no published run (key 'published_run')" in item.reason


def test_without_the_prompt_table_the_message_says_how_to_get_it(profile):
    lost = replace(profile, prompts=replace(profile.prompts, memorized="nowhere.csv"))
    with pytest.raises(FileNotFoundError, match=r"fetch it: python -m nemolib.downloads --profile sd14 --only files"):
        exhibits.render_all(lost, [published.FIGURE_4A])


def test_a_run_without_a_kind_is_not_drawn(profile, files):
    (files / "prompts.csv").write_text(";Caption;URL;type\n0;the fox podcast;;VM\n", encoding="utf-8")
    item = exhibits.render_or_say_why(published.FIGURE_4A, profile)
    assert item.reason == "table 'published_run' has no rows with kind 'tm'"


def test_the_key_of_the_profile():
    values = profile_to_mapping(load_profile("sd14"))
    assert values["published_run"] is None
    assert profile_from_mapping(values | {"published_run": "a.csv"}).published_run == "a.csv"
    with pytest.raises(ProfileError, match="key 'published_run': expected text or nothing"):
        profile_from_mapping(values | {"published_run": 1})
