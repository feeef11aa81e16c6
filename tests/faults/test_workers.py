"""Loops over prompts on a local Dask cluster of two processes: the same tables, whatever happens to a worker or a prompt."""

import numpy as np
import pandas as pd
import pytest
import torch

from nemolib import experiments, paths
from nemolib.experiments_localization import localizations, without_seconds
from nemolib.pipeline import load_pipeline
from nemolib.profiles import profile_from_mapping
from nemolib.workers import VARIABLE, FailedPrompts, WorkersError, cluster, map_prompts
from tests.worker_tasks import deadly, lengths

KINDS = {"memorized": ["vm", "vm", "tm"], "unmemorized": ["unmemorized"], "holdout": ["holdout"] * 12}


@pytest.fixture(autouse=True)
def one_thread():
    """Compute here as workers do: another number of threads may change the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def profile(tmp_path_factory, random_model_folder):
    folder = tmp_path_factory.mktemp("prompts")
    for name, kinds in KINDS.items():
        rows = [(f"{name} {number}", kind, "report", 0, "") for number, kind in enumerate(kinds)]
        table = pd.DataFrame(rows, columns=["caption", "kind", "group", "copies", "image"])
        table.to_csv(folder / f"{name}.csv", index=False)
    values = {
        "name": "random",
        "model": str(random_model_folder),
        "device": "cpu",
        "prompts": {name: str(folder / f"{name}.csv") for name in KINDS},
        "holdout_size": 12,
        "threshold_prompts": 4,
        "detection": {"samples": 3},
        "similarity": {"kernel_size": 3, "sigma": 0.5},
        "thresholds": {"value": -0.5},
        "search": {"theta_start": 3.0, "theta_step": 1.0, "k_step": 2},
        "generation": {"samples": 2, "steps": 2, "batch_size": 2},
    }
    return profile_from_mapping(values)


@pytest.fixture
def pipe(profile):
    return load_pipeline(profile)


def results(pipe, profile, folder, monkeypatch):
    """Return what all stages give, computed anew in a folder."""
    monkeypatch.setattr(paths, "BUILD", folder)
    normal = experiments.statistics(pipe, profile, progress=False)
    scores = experiments.holdout_scores(pipe, profile, progress=False)
    found = without_seconds(localizations(pipe, profile, progress=False))
    drawn = experiments.images(pipe, profile, found["prompt"].tolist(), progress=False)
    return normal, scores, found, drawn


@pytest.mark.slow
def test_two_workers_give_the_same_tables_as_none(pipe, profile, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "off")
    serial = results(pipe, profile, tmp_path / "serial", monkeypatch)
    monkeypatch.setenv(VARIABLE, "local:2")
    with cluster(profile) as client:
        assert len(client.scheduler_info()["workers"]) == 2
        spread = results(pipe, profile, tmp_path / "spread", monkeypatch)
    for here, there in zip((*serial[0].mean, *serial[0].std), (*spread[0].mean, *spread[0].std), strict=True):
        assert torch.equal(here, there)
    assert np.array_equal(serial[1], spread[1])
    pd.testing.assert_frame_equal(serial[2], spread[2], check_exact=True)
    assert np.array_equal(serial[3], spread[3])


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing_but_time(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "local:2")
    batches = [("deadly",), *((f"prompt {number}",) for number in range(5))]
    common = {"marker": str(tmp_path / "killed")}
    found = dict(map_prompts(deadly, batches, pipe=pipe, common=common, label="kill", progress=False))
    assert (tmp_path / "killed").exists()
    assert found == {batch: [len(batch[0])] for batch in batches}


@pytest.mark.parametrize("choice", ["off", pytest.param("local:2", marks=pytest.mark.slow)])
def test_a_prompt_that_raises_stops_no_other(pipe, monkeypatch, choice):
    monkeypatch.setenv(VARIABLE, choice)
    batches, got = [("bad",), ("a", "bad"), ("ccc",)], []
    run = map_prompts(lengths, batches, pipe=pipe, common={"add": 1}, label="fail", progress=False)
    with pytest.raises(FailedPrompts, match="2 of 4 prompts failed") as raised:
        got.extend(run)
    assert sorted(got) == [(("a",), [2]), (("ccc",), [4])]
    failures = [(item.caption, item.message) for item in raised.value.failures]
    assert failures == 2 * [("bad", "ValueError: no such prompt")]


@pytest.mark.parametrize("choice", ["local:0", "local:two", "yes"])
def test_a_choice_without_a_meaning(pipe, monkeypatch, choice):
    monkeypatch.setenv(VARIABLE, choice)
    with pytest.raises(WorkersError, match="expected tcp://host:port, local:4 or off"):
        list(map_prompts(lengths, [("a",)], pipe=pipe, common={"add": 0}, label="choice", progress=False))


def test_nothing_to_do_starts_nothing(pipe, monkeypatch):
    monkeypatch.setenv(VARIABLE, "tcp://nobody:1")
    assert list(map_prompts(lengths, [], pipe=pipe, common={"add": 0}, label="nothing", progress=False)) == []
