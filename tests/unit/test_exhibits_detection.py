import numpy as np
import pandas as pd
import pytest

from nemolib import detection as science
from nemolib import exhibits, experiments, paper, paths, tables
from nemolib.exhibits import detection
from nemolib.protocols import RELEASED

OURS = [item for item in vars(detection).values() if isinstance(item, exhibits.Exhibit)]

KINDS = {"vm": 0.8, "tm": 0.6, "unmemorized": 0.3}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Save tables as notebooks 01 and 02 would, of a world in which all goes as in the paper."""
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    generator = np.random.default_rng(0)
    kinds = [kind for kind in KINDS for _ in range(4)]
    scores = pd.DataFrame({"caption": [f"prompt {i}" for i in range(12)], "kind": kinds})
    for name in ("score", "score_paper", "score_released", "wen", "mean_pair"):
        scores[name] = [KINDS[kind] for kind in kinds] + generator.random(12) / 20
    planted = scores["kind"] != "unmemorized"
    similar = scores["score"].where(planted)
    copies = scores.assign(copy_similarity=similar, copy_max=similar, seed_similarity=scores["score"])
    switches = [(s.name, s.question, s.change) for s in science.protocol_switches(RELEASED, 0.0)]
    effects = pd.DataFrame(switches, columns=["switch", "question", "change"]).assign(mean=0.2, sd=0.1, gate=0.5)
    z = [(kind, layer, neuron, 9 * KINDS[kind]) for kind in KINDS for layer in (1, 2) for neuron in (0, 1)]
    by_neuron = pd.DataFrame(z, columns=["kind", "layer", "neuron", "largest_z"])
    contents = {
        "thresholds": paper.thresholds().assign(ours=[0.2, 0.3, 0.4, 0.5], low=0.3, high=0.5, tau=0.4),
        "holdout_pairs": experiments.pair_table(generator.random((5, 3)), samples=3),
        "protocol_switches": effects.assign(threshold=[0.3, 0.31, 0.5, 0.2, 0.4, 0.6, 0.7], difference=[0, 0.01, 0.2, -0.1, 0.1, 0.3, 0.4]),
        "scores": scores,
        "detection": experiments.detection_beside_paper(scores, resamples=5),
        "z_by_neuron": by_neuron,
        "z_by_prompt": by_neuron.assign(caption="x"),
        "copies": copies,
        "ladder": copies[planted].assign(copies=[1, 2, 4, 8] * 2),
    }  # fmt: skip
    for name, content in contents.items():
        tables.save_table(content, name, profile="tiny")
    pictures = generator.integers(0, 255, (3, 2, 8, 8, 3), dtype=np.uint8)
    for name in ("samples", "noise_differences"):
        tables.save_grid(pictures, name, rows=["a", "b", "c"], columns=["seed 0", "seed 1"], profile="tiny")


def test_all_are_in_the_list():
    assert len(OURS) == 13
    assert set(OURS) <= set(exhibits.EXHIBITS)


@pytest.mark.parametrize("exhibit", OURS, ids=lambda item: item.name)
def test_every_exhibit_is_drawn_and_read(saved, exhibit):
    rendered = exhibits.render(exhibit, "tiny")
    assert rendered.reading.ours
    assert rendered.reading.verdict in exhibits.VERDICTS
    assert "nan" not in rendered.reading.ours
    assert {path.name.partition(".")[0] for path in rendered.files.values()} == {exhibit.name}
    assert all(path.stat().st_size for path in rendered.files.values())


def test_readings_say_what_the_tables_hold(saved):
    table = exhibits.comparison_table(exhibits.render_all("tiny", OURS)).set_index("exhibit")
    assert table.loc["Table 4 (thresholds)", "ours"].startswith(
        "0.400 = 0.300 + 0.100; 95 % of other holdout sets: 0.30 to 0.50"
    )
    assert "VM 100%, TM 100%, unmemorized 0%" in table.loc["Figure 2a", "ours"]
    assert "beyond 5: 2 and 0 of 2 neurons" in table.loc["Figure 2b", "ours"]
    assert "AUROC 1.000 (VM 1.000, TM 1.000)" in table.loc["App. B.4", "ours"]
    assert "AUROC 0.98 (VM 0.9964), TPR@1%FPR 0.876" in table.loc["App. B.4", "paper"]
    switches = table.loc["What each difference between paper and code does to the threshold", "ours"]
    assert "largest single change is largest pairs, not all (+0.200)" in switches
    assert (table.loc[["Figure 2a", "Figure 2b", "App. B.4"], "verdict"] == "agrees").all()


def test_what_does_not_agree_is_said(saved):
    scores = tables.read_table("scores", profile="tiny")
    upside_down = scores.assign(
        **{name: 1 - scores[name] for name in ("score", "score_paper", "score_released", "wen")}
    )
    tables.save_table(upside_down, "scores", profile="tiny")
    tables.save_table(experiments.detection_beside_paper(upside_down, resamples=5), "detection", profile="tiny")
    for exhibit in (detection.FIGURE_2A, detection.DETECTION):
        assert exhibits.render(exhibit, "tiny").reading.verdict == "differs"


def test_the_detection_table_shows_the_confidence_of_reported_numbers(saved):
    shown = exhibits.render(detection.DETECTION, "tiny").content
    assert list(shown["score"].unique()) == ["SSIM (paper)", "MS-SSIM (released)", "Wen et al., one step"]
    known = shown["AUROC (reported)"] != ""
    assert shown.loc[known, "confidence"].isin(["paper", "secondary"]).all()
    assert (shown.loc[~known, "confidence"] == "").all()
