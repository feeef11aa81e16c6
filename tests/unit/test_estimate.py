from dataclasses import replace

import pandas as pd
import pytest

from nemolib import estimate
from nemolib.estimate import (
    Counts,
    Stage,
    cost_table,
    counts_of,
    detection_evaluations,
    evaluations_per_second,
    image_evaluations,
    refinement_tests,
    search_evaluations,
    shown,
    stages,
)
from nemolib.evaluations import Evaluations
from nemolib.holdout import holdout_scores
from nemolib.localization import localize
from nemolib.profiles import Extent, load_profile
from nemolib.settings import DetectionSettings, SearchSettings, SimilaritySettings


@pytest.fixture(scope="module")
def sd14():
    return load_profile("sd14")


def by_name(parts):
    return {part.name: part for part in parts}


def test_one_prompt_of_the_paper(sd14):
    assert detection_evaluations(sd14) == 10
    assert detection_evaluations(replace(sd14, detection=DetectionSettings(guidance=7.0))) == 20
    assert image_evaluations(sd14) == 10 * 50 * 2


def test_a_threshold_costs_what_is_said(random_pipe):
    """The formula against a count of what is done."""
    profile = replace(load_profile("tiny"), detection=DetectionSettings(samples=3, guidance=7.0))
    counted = Evaluations()
    small = SimilaritySettings(kernel_size=3, sigma=0.5)
    holdout_scores(
        random_pipe,
        ["a", "b"],
        settings=profile.detection,
        similarity=small,
        protocol="paper",
        evaluations=counted,
        progress=False,
    )
    assert counted.total == 2 * detection_evaluations(profile) == 12


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
    with pytest.raises(ValueError, match="method is 'slow'; it must be 'fast' or 'sequential'"):
        refinement_tests(5, 1, layers=7, method="slow")


def test_the_search_of_a_prompt(sd14):
    sequential = search_evaluations(sd14, "tm", method="sequential")
    assert sequential == 10 * (1 + 16 + 681.5)
    assert search_evaluations(sd14, "tm", method="fast") < sequential / 3
    assert search_evaluations(sd14, "vm") < search_evaluations(sd14, "tm")


def test_the_stages_of_the_paper(sd14):
    parts = by_name(stages(sd14))
    assert parts["memorization threshold, all protocols"].total == 50_000 * 20
    assert parts["activation statistics (text encoder only)"].total == 0
    assert parts["memorization scores, all protocols"].total == 1000 * 20
    assert parts["images and scores, memorization neurons deactivated"].total == 500 * 1010
    assert parts["images, initial selection and random neurons"].total == 500 * 6 * 1000
    assert parts["images, random tokens"].total == 500 * 3 * 1000
    assert parts["images, prompt embedding adjustment"].evaluations == 1000 + 4 + 3 * 10 * 4
    assert parts["image quality"].total == 5000 * 2 * 13 * 100
    assert parts["outputs of blocks"].total == 500 * 13 * 3


def test_a_profile_says_how_many_prompts_are_taken(sd14):
    few = replace(sd14, extent=Extent(drawn=5, searched=0, mitigated=3, ablated=200, layers=2, blocks=1, quality=7))
    parts = by_name(stages(few))
    numbers = {name: part.prompts for name, part in parts.items()}
    assert numbers["images, all neurons active"] == 505
    assert numbers["localization, unmemorized"] == 0
    assert numbers["images, attention scaling"] == 6
    assert numbers["ablations, images"] == 112 + 200
    assert (numbers["layers switched off"], numbers["outputs of blocks"], numbers["image quality"]) == (2, 1, 7)
    assert parts["image quality"].evaluations == 10 * 13 * 100


def test_a_small_image_costs_less(sd14):
    small = replace(sd14, generation=replace(sd14.generation, side=128))
    assert image_evaluations(small) == image_evaluations(sd14) / 16


def test_the_table_sums_and_tells_hours():
    table = cost_table([Stage("a", 10, 360.0), Stage("b", 2, 0.0)], per_second=2.0)
    assert list(table.columns) == ["stage", "prompts", "each", "evaluations", "hours"]
    assert table["evaluations"].tolist() == [3600, 0, 3600]
    assert table["hours"].tolist() == [0.5, 0.0, 0.5]
    assert pd.isna(table["prompts"].iloc[-1])
    assert "hours" not in cost_table([Stage("a", 1, 1.0)])


@pytest.mark.parametrize("speed", [0, -1.0, float("inf"), float("nan")])
def test_an_impossible_speed(speed):
    with pytest.raises(ValueError, match="per_second is"):
        cost_table([Stage("a", 1, 1.0)], per_second=speed)


def test_the_table_as_text():
    text = shown(cost_table([Stage("a stage", 50_000, 10.0), Stage("b", 1, 5.0)], per_second=30.0))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["stage", "prompts", "each", "evaluations", "hours"]
    assert rows[2] == ["a stage", "50,000", "10", "500,000", "4.6"]
    assert rows[4] == ["sum", "", "", "500,005", "4.6"]


def test_prompts_are_counted_where_their_tables_are(sd14, tmp_path):
    tiny = counts_of("tiny")
    assert (tiny.holdout, tiny.threshold, tiny.quality) == (1000, 200, 200)
    assert 0 < tiny.vm < 112
    missing = {name: str(tmp_path / f"{name}.csv") for name in ("memorized", "unmemorized", "holdout")}
    absent = replace(sd14, prompts=replace(sd14.prompts, **missing))
    assert counts_of(absent) == Counts(threshold=1000)


def test_the_speed_is_what_the_clock_says(random_pipe):
    passes, now = [], [0.0]
    handle = random_pipe.unet.register_forward_hook(lambda module, args, output: (passes.append(len(args[0])), None)[1])

    def clock():
        now[0] = 0.5 * len(passes)
        return now[0]

    try:
        speed = evaluations_per_second(random_pipe, samples=4, seconds=3.0, clock=clock)
    finally:
        handle.remove()
    # One pass to warm up, then six of half a second with four samples each.
    assert passes == [4] * 7
    assert speed == 8.0


def test_a_hub_model_is_measured_with_random_weights(monkeypatch, sd14):
    asked = []
    monkeypatch.setattr(estimate, "load_pipeline", asked.append)
    estimate.measured_pipeline(sd14)
    estimate.measured_pipeline(load_profile("tiny"))
    assert [profile.model for profile in asked] == ["random:sd14", "data/tiny/model"]


def test_the_command(capsys, monkeypatch, random_pipe):
    assert estimate.main(["--profile", "sd14", "--paper", "--per-second", "25"]) == 0
    printed = capsys.readouterr().out
    assert "Profile sd14, 25 UNet sample-evaluations a second (given)" in printed
    assert "500,000" in printed
    monkeypatch.setattr(estimate, "measured_pipeline", lambda profile: random_pipe)
    monkeypatch.setattr(estimate, "evaluations_per_second", lambda pipe, samples: 10.0 * samples)
    assert estimate.main(["--profile", "tiny"]) == 0
    assert "Profile tiny, 10 UNet sample-evaluations a second (measured here)" in capsys.readouterr().out


def test_errors_of_the_command(capsys):
    assert estimate.main(["--profile", "none"]) == 1
    assert "unknown profile 'none'" in capsys.readouterr().err
    assert estimate.main(["--profile", "tiny", "--per-second", "-3"]) == 1
    assert "per_second is -3.0" in capsys.readouterr().err
