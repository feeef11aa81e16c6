from dataclasses import replace

import pandas as pd
import pytest

from nemolib.holdout import holdout_scores
from nemolib.localization import localize
from nemolib.settings import DetectionSettings, Extent, SearchSettings, SimilaritySettings, load_profile
from tools import estimate
from tools.estimate import (
    PAPER,
    cost_table,
    counts_of,
    detection_evaluations,
    evaluations_per_second,
    image_evaluations,
    refinement_tests,
    search_evaluations,
    stages,
)


@pytest.fixture(scope="module")
def sd14():
    return load_profile("sd14")


def by_name(parts):
    """Return the columns of stages by the stage's name."""
    return parts.set_index("stage")


def test_one_prompt_of_the_paper(sd14):
    assert detection_evaluations(sd14) == 10
    assert detection_evaluations(replace(sd14, detection=DetectionSettings(guidance=7.0))) == 20
    assert image_evaluations(sd14) == 10 * 50 * 2


def test_a_threshold_costs_what_is_said(random_pipe):
    """The formula against a count of what is done."""
    profile = replace(load_profile("tiny"), detection=DetectionSettings(samples=3, guidance=7.0))
    counted = []
    small = SimilaritySettings(kernel_size=3, sigma=0.5)
    settings = {"settings": profile.detection, "similarity": small, "protocol": "paper", "progress": False}
    with random_pipe.unet.register_forward_pre_hook(lambda module, args: counted.append(len(args[0]))):
        holdout_scores(random_pipe, ["a", "b"], **settings)
    assert sum(counted) == 2 * detection_evaluations(profile) == 12


def test_a_search_costs_at_most_what_is_said(random_pipe, statistics):
    search = SearchSettings(theta_start=100.0, theta_min=98.0, theta_step=1.0, k_start=1, k_max=2, method="sequential")
    detection = DetectionSettings(samples=3)
    found = localize(
        random_pipe,
        "zzz",
        statistics,
        threshold=-0.5,
        detection=detection,
        similarity=SimilaritySettings(kernel_size=3, sigma=0.5),
        search=search,
        protocol="paper",
    )
    tests = refinement_tests(len(found.initial), len(found.neurons), layers=7, method="sequential")
    said = 3 * (1 + 3 + tests)
    assert 0 < sum(found.evaluations.values()) <= said


def test_refinement_by_method():
    assert refinement_tests(674.5, 21, layers=7, method="sequential") == 681.5
    fast = refinement_tests(674.5, 21, layers=7, method="fast")
    assert fast == pytest.approx(7 + 21 * (5.0053 + 1.5) + 1, rel=1e-3)
    # Where most neurons stay, splitting does not pay; it never costs more than a tenth above, and 8.
    assert refinement_tests(100, 95, layers=7, method="fast") == pytest.approx(1.1 * 107 + 8)
    assert refinement_tests(5, 0, layers=7, method="fast") < 12


def test_the_search_of_a_prompt(sd14):
    slow = replace(sd14, search=replace(sd14.search, method="sequential"))
    assert search_evaluations(slow, "tm") == 10 * (1 + 16 + 681.5)
    assert search_evaluations(sd14, "tm") < search_evaluations(slow, "tm") / 3
    assert search_evaluations(sd14, "vm") < search_evaluations(sd14, "tm")


def test_the_stages_of_the_paper(sd14):
    parts = by_name(stages(sd14))
    assert parts.loc["images, prompt embedding adjustment", "each"] == 1000 + 4 + 3 * 10 * 4
    assert parts["evaluations"][["image quality", "outputs of blocks"]].tolist() == [5000 * 2 * 13 * 100, 500 * 13 * 3]
    expected = {
        "memorization threshold, all protocols": 50_000 * 20,
        "activation statistics (text encoder only)": 0,
        "memorization scores, all protocols": 1000 * 20,
        "images and scores, memorization neurons deactivated": 500 * 1010,
        "images, initial selection and random neurons": 500 * 6 * 1000,
        "images, random tokens": 500 * 3 * 1000,
    }
    assert parts["evaluations"][list(expected)].to_dict() == expected


def test_a_profile_says_how_many_prompts_are_taken(sd14):
    few = replace(sd14, extent=Extent(drawn=5, searched=0, mitigated=3, ablated=200, layers=2, blocks=1, quality=7))
    parts = by_name(stages(few))
    expected = {
        "images, all neurons active": 505,
        "localization, unmemorized": 0,
        "images, attention scaling": 6,
        "ablations, images": 112 + 200,
        "layers switched off": 2,
        "outputs of blocks": 1,
        "image quality": 7,
    }
    assert parts["prompts"][list(expected)].to_dict() == expected
    assert parts.loc["image quality", "each"] == 10 * 13 * 100


def test_a_small_image_costs_less(sd14):
    small = replace(sd14, generation=replace(sd14.generation, side=128))
    assert image_evaluations(small) == image_evaluations(sd14) / 16


def test_the_table_sums_and_tells_hours():
    parts = pd.DataFrame({"stage": ["a", "b"], "prompts": [50_000, 1], "each": [10.0, 5.0], "evaluations": [5e5, 5.0]})
    text = cost_table(parts, 30.0)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["stage", "prompts", "each", "evaluations", "hours"]
    assert rows[2:] == [
        ["a", "50,000", "10", "500,000", "4.6"],
        ["b", "1", "5", "5", "0.00"],
        ["sum", "", "", "500,005", "4.6"],
    ]
    for speed in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="per_second is"):
            cost_table(parts, speed)


def test_prompts_are_counted_where_their_tables_are(sd14, tmp_path):
    tiny = counts_of(load_profile("tiny"))
    assert (tiny["holdout"], tiny["threshold"], tiny["quality"]) == (1000, 200, 200)
    assert 0 < tiny["vm"] < 112
    missing = {name: str(tmp_path / f"{name}.csv") for name in ("memorized", "unmemorized", "holdout")}
    absent = replace(sd14, prompts=replace(sd14.prompts, **missing))
    assert counts_of(absent) == PAPER | {"threshold": 1000}


def test_the_speed_counts_the_latents_of_a_pass(random_pipe):
    passes = []
    handle = random_pipe.unet.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    try:
        speed = evaluations_per_second(random_pipe, samples=4, seconds=0.05)
    finally:
        handle.remove()
    assert set(passes) == {4}
    assert len(passes) >= 2
    assert speed > 4


def test_a_hub_model_is_measured_with_random_weights(monkeypatch, sd14, random_pipe):
    asked = []
    monkeypatch.setattr(estimate, "load_pipeline", lambda profile: asked.append(profile.model) or random_pipe)
    monkeypatch.setattr(estimate, "evaluations_per_second", lambda pipe, samples: 10.0 * samples)
    assert estimate.measured_speed(sd14) == estimate.measured_speed(load_profile("tiny")) == 10.0
    assert asked == ["random:sd14", "data/tiny/model"]


def test_the_command(capsys, monkeypatch):
    assert estimate.main(["--profile", "sd14", "--paper", "--per-second", "25"]) == 0
    printed = capsys.readouterr().out
    assert "Profile sd14, 25 UNet sample-evaluations a second (given)" in printed
    assert "500,000" in printed
    monkeypatch.setattr(estimate, "measured_speed", lambda profile: 10.0)
    assert estimate.main(["--profile", "tiny"]) == 0
    assert "Profile tiny, 10 UNet sample-evaluations a second (measured here)" in capsys.readouterr().out
    assert estimate.main(["--profile", "none"]) == 1
    assert "unknown profile 'none'" in capsys.readouterr().err
    assert estimate.main(["--profile", "tiny", "--per-second", "-3"]) == 1
    assert "per_second is -3.0" in capsys.readouterr().err
