"""Loops over prompts in this process: a prompt that raises stops no other, and a choice without a meaning is refused."""

import pandas as pd
import pytest
import torch

from nemolib.pipeline import load_pipeline
from nemolib.profiles import profile_from_mapping
from nemolib.workers import VARIABLE, FailedPrompts, WorkersError, map_prompts
from tests.worker_tasks import lengths

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


@pytest.mark.parametrize("choice", ["off"])
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
