from dataclasses import replace

import pytest

from nemolib.localization import localize
from nemolib.settings import DetectionSettings, Extent, SearchSettings, SimilaritySettings, load_profile
from tools import estimate
from tools.estimate import PAPER, refinement_tests, stages


@pytest.fixture(scope="module")
def sd14():
    return load_profile("sd14")


def test_a_search_costs_at_most_what_is_said(random_pipe, statistics):
    search = SearchSettings(theta_start=100.0, theta_min=98.0, theta_step=1.0, k_start=1, k_max=2, method="sequential")
    small = {"detection": DetectionSettings(samples=3), "similarity": SimilaritySettings(kernel_size=3, sigma=0.5)}
    found = localize(random_pipe, "zzz", statistics, threshold=-0.5, search=search, protocol="paper", **small)
    tests = refinement_tests(len(found.initial), len(found.neurons), method="sequential")
    assert 0 < sum(found.evaluations.values()) <= 3 * (1 + 3 + tests)


def test_refinement_by_method():
    assert refinement_tests(674.5, 21, method="sequential") == 681.5
    fast = refinement_tests(674.5, 21, method="fast")
    assert fast == pytest.approx(7 + 21 * (5.0053 + 1.5) + 1, rel=1e-3)
    # Where most neurons stay, splitting does not pay; it never costs more than a tenth above, and 8.
    assert refinement_tests(100, 95, method="fast") == pytest.approx(1.1 * 107 + 8)
    assert refinement_tests(5, 0, method="fast") < 12


def test_a_profile_says_how_many_prompts_are_taken(sd14):
    few = replace(sd14, extent=Extent(drawn=5, searched=0, mitigated=3, ablated=200, layers=2, blocks=1, quality=7))
    parts = stages(few).set_index("stage")
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
    assert parts.loc["image quality", "each"] == 10 * 10 * 100


def test_prompts_are_counted_where_their_tables_are(sd14, tmp_path):
    tiny = estimate.counts_of(load_profile("tiny"))
    assert (tiny["holdout"], tiny["threshold"], tiny["quality"]) == (1000, 200, 200)
    assert 0 < tiny["vm"] < 112
    missing = {name: str(tmp_path / f"{name}.csv") for name in ("memorized", "unmemorized", "holdout")}
    absent = replace(sd14, prompts=replace(sd14.prompts, **missing))
    assert estimate.counts_of(absent) == PAPER | {"threshold": 1000}


def test_the_speed_is_that_of_passes_with_random_weights_for_a_hub_model(monkeypatch, sd14, random_pipe):
    asked, passes = [], []
    monkeypatch.setattr(estimate, "load_pipeline", lambda profile: asked.append(profile.model) or random_pipe)
    with random_pipe.unet.register_forward_pre_hook(lambda module, args: passes.append(len(args[0]))):
        speeds = [estimate.measured_speed(profile, seconds=0.05) for profile in (sd14, load_profile("tiny"))]
    assert asked == ["random:sd14", "data/tiny/model"]
    assert set(passes) == {1}, "a latent at a time on a CPU"
    assert len(passes) >= 4
    assert min(speeds) > 1


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "measured_speed", lambda profile: 10.0)
    for arguments, status, words in [
        (["sd14", "--per-second", "25"], 0, "Profile sd14, 25 UNet sample-evaluations a second (given)"),
        (["tiny"], 0, "Profile tiny, 10 UNet sample-evaluations a second (measured here)"),
        (["none"], 1, "unknown profile 'none'"),
        (["tiny", "--per-second", "-3"], 1, "per_second is -3.0"),
    ]:
        assert estimate.main(["--profile", *arguments]) == status
        assert words in "".join(capsys.readouterr())
