"""The benchmarks: what they count, on a random model and on searches made up by hand."""

import dataclasses
import importlib.util
import json
import sys

import pytest

from nemolib import paths
from nemolib.first_step import first_step
from nemolib.localization import localize
from nemolib.pipeline import embed
from nemolib.settings import PAPER, DetectionSettings, SearchSettings, SimilaritySettings, load_profile


def load(name):
    if not (paths.ROOT / "benchmarks" / f"{name}.py").is_file():
        pytest.skip("the benchmarks are part of the repository, not of the package")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", paths.ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def search():
    return load("search")


def test_the_release_counts_two_passes_all_seeds_and_a_pass_for_activations(search, random_pipe, statistics):
    settings = {
        "detection": DetectionSettings(samples=2),
        "similarity": SimilaritySettings(kernel_size=3, sigma=0.5),
        "search": SearchSettings(theta_start=3.0, theta_step=1.0, k_step=1, method="sequential"),
        "protocol": PAPER,
    }
    world, limits = dataclasses.replace(load_profile("tiny"), **settings), {"threshold": 0.95, "gate": -0.9}
    ours = localize(random_pipe, "zzz", statistics, **limits, **settings)
    step = first_step(random_pipe, settings=world.detection, protocol=world.protocol)
    cost = search.release(step, embed(random_pipe, ["zzz"]), statistics, world, **limits)
    steps, tests = len(ours.steps), len(ours.tests)
    assert cost.initial == len(ours.initial)
    assert ours.seeds == (0, 1)
    assert not cost.neurons - ours.initial
    # Twice two for the gate, each theta step, three more sets and the tests; those of neurons with two entries come on
    # top.
    at_least = 4 + steps * 5 + 4 * (3 + tests)
    assert cost.samples >= at_least
    assert (cost.samples - at_least) % 4 == 0


def test_replay_by_hand(search, tmp_path):
    rows = [f"{caption};[[4, 7, 9, 7], [], [1, 2], [8]];[[7], [], [], []]" for caption in ("a", "unknown")]
    (tmp_path / "run.csv").write_text("\n".join(["Caption;Initial Neurons;Refined Neurons", *rows]))
    table = search.replay(search.recorded_searches(tmp_path / "run.csv", {"a": "tm"}), {"tm": 2.0, "failing": 1.0})
    (row,) = table.to_dict("records")
    assert (row["kind"], row["candidates"]) == ("tm", 6)
    # Three layers, then the three neurons of the one that stays; the last of them leaves the empty set, tried before.
    assert row["sequential_sets"] == 5
    # One theta step; three layers, and four entries of the one that stays.
    assert row["release_samples"] == 20 + 21 + 20 * (2 + 3 + 4 + 1)
    assert row["sequential_samples"] == 10 + 10 + 50
    assert row["fast_samples"] == 10 + 10 + 2 * row["fast_sets"] + 9
    assert row["fast_neurons"] == row["sequential_neurons"] == 1
    ratios = search.ratios(table)["tm"]
    for name in ("release", "sequential"):
        assert ratios[f"{name}_over_fast"] == round(row[f"{name}_samples"] / row["fast_samples"], 4)
    assert ratios["size_ratio"] == 1


def test_holdout_texts_are_short_and_all_different_and_each_number_has_a_row(monkeypatch, tmp_path, capsys):
    holdout = load("holdout")
    texts = holdout.texts(5000)
    assert len(set(texts)) == 5000
    assert all(len(text.split()) == 3 for text in texts)
    costs = {"seconds": 2.0, "peak_mib": 600.0, "model_mib": 550.0}
    monkeypatch.setattr(holdout, "OUTPUT", tmp_path / "holdout.json")
    monkeypatch.setattr(holdout, "measure_apart", lambda number: {"prompts": number} | costs)
    holdout.main(["--prompts", "100", "200"])
    written = json.loads((tmp_path / "holdout.json").read_text())["statistics"]
    assert [(row["prompts"], row["ms_per_prompt"]) for row in written] == [(100, 20.0), (200, 10.0)]
    assert "ms_per_prompt" in capsys.readouterr().out


def test_the_page_of_speeds_has_the_ratios_that_were_measured(search):
    measured = json.loads((paths.ROOT / "benchmarks" / "search.json").read_text(encoding="utf-8"))
    assert search.ratio_table(measured) in (paths.ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    ratios = {"release_over_fast", "sequential_over_fast", "size_ratio"}
    for name, world in measured.items():
        for kind in ("vm", "tm"):
            assert world[kind].keys() - {"seconds_release_over_fast"} == ratios, (name, kind)
