"""Two processes instead of one: the same tables, whatever happens to a process or a prompt."""

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import time

import dask
import distributed  # noqa: F401 (brings Dask's settings with it)
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from nemolib import paths, workers
from nemolib.first_step import pairs_measure
from nemolib.localization import localization_table
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import load_pipeline
from nemolib.run import Run
from nemolib.settings import PAPER, Profile
from nemolib.store import Store
from nemolib.workers import FailedPrompts, WorkersError, map_prompts
from tests.random_pipeline import random_pipeline
from tests.random_world import SMALL, amplify, write_prompts
from tests.worker_tasks import captions, unfit

pytestmark = pytest.mark.slow
CAPTIONS = {
    "memorized": [f"{colour} {animal} card" for colour in ("red", "odd") for animal in ("fox", "owl", "cat")],
    "unmemorized": ["a tree", "the sea"],
    "holdout": [f"{first} {second}{third}" for first in "abcdef" for second in "uvwxyz" for third in "jk"],
}
BAD = "odd owl card"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute here as workers do: another number of threads may change the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    amplify(random_pipeline()).save_pretrained(folder / "model", safe_serialization=True)
    kinds = dict(zip(CAPTIONS["memorized"], ["vm"] * 3 + ["tm"] * 3, strict=True))
    others = {name: CAPTIONS[name] for name in ("unmemorized", "holdout")}
    small = SMALL | {
        "detection": {"samples": 2},
        "thresholds": {"multiplier": -1.0},
        "search": {"theta_start": 3.0, "theta_step": 1.0, "theta_min": 3.0, "k_step": 1, "k_max": 1},
    }
    prompts = write_prompts(folder, kinds, **others)
    return Profile(model=str(folder / "model"), protocol="paper", prompts=prompts, holdout_size=72, **small)


@pytest.fixture(scope="module")
def pipe(profile):
    return load_pipeline(profile)


@pytest.fixture
def run(profile, pipe, tmp_path, monkeypatch):
    monkeypatch.delenv(workers.VARIABLE, raising=False)
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    return Run(profile, pipe, progress=False)


@pytest.fixture(scope="module")
def running(profile):
    """Start two processes for all tests of this file; they end with the context, whatever happens inside.

    They need no encryption where it is demanded, and what Dask puts into this process for them is taken out again.
    """
    threads = os.environ.get("MKL_NUM_THREADS")
    demanded = dask.config.set({"distributed.comm.require-encryption": True})
    with pytest.MonkeyPatch.context() as patch, demanded, contextlib.suppress(KeyboardInterrupt):
        patch.setenv(workers.VARIABLE, "local:2")
        with workers.cluster(profile) as client, workers.cluster(profile) as inner:
            assert inner is client
            client.wait_for_workers(2, timeout=120)
            yield client
            processes = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
            assert set(client.run(os.getenv, "MKL_NUM_THREADS").values()) == {"1"}
            raise KeyboardInterrupt
    assert workers._client is None
    assert os.environ.get("MKL_NUM_THREADS") == threads
    assert not psutil.wait_procs(processes, timeout=60)[1]


@pytest.fixture
def two(running, monkeypatch):
    """Let a test use the two processes."""
    monkeypatch.setenv(workers.VARIABLE, "local:2")
    yield running
    running.run(mended)


def scores(run):
    measures = [pairs_measure(PAPER, 0.0), pairs_measure(PAPER, 7.0)]
    return pd.DataFrame(run.observe([*CAPTIONS["memorized"], *CAPTIONS["unmemorized"]], measures)).map(tuple)


def localizations(run):
    return localization_table(run.search(CAPTIONS["memorized"]))


def images(run):
    sets = {name: NeuronSet.of([(0, place)], layers=7) for place, name in enumerate(CAPTIONS["memorized"])}
    return np.stack([run.images(CAPTIONS["memorized"], item) for item in (None, DeactivatedNeurons(sets))])


def assert_same(ours, theirs):
    """Compare results; other prompts in one batch may change the last digits of scores."""
    if isinstance(ours, pd.DataFrame):
        pd.testing.assert_frame_equal(ours, theirs, rtol=0, atol=1e-5)
    else:
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("stage", [scores, localizations, images])
def test_two_processes_give_what_one_gives(stage, run, two, tmp_path, monkeypatch):
    together = stage(run)
    monkeypatch.setenv(workers.VARIABLE, "off")
    assert_same(together, stage(Run(run.profile, run.pipe, store=Store(tmp_path / "one"), progress=False)))


@functools.cache
def working_call():
    return PreTrainedTokenizerBase.__call__


def broken(caption):
    """Let the tokenizer of this process raise for a caption."""
    original = working_call()

    def call(self, text, *args, **settings):
        if caption in text:
            raise ValueError(f"no word for {caption}")
        return original(self, text, *args, **settings)

    PreTrainedTokenizerBase.__call__ = call


def mended():
    PreTrainedTokenizerBase.__call__ = working_call()


@pytest.mark.parametrize("stage", [localizations, images])
def test_a_prompt_that_raises_stops_no_other(stage, run, two, monkeypatch):
    assert run.threshold
    assert run.statistics
    two.run(broken, BAD)
    with pytest.raises(FailedPrompts) as error:
        stage(run)
    assert [failure.caption for failure in error.value.failures] == [BAD]
    assert f"'{BAD}': ValueError: no word for {BAD}" in str(error.value)
    assert any("in call" in note for note in error.value.__notes__)
    two.run(mended)
    sent, keep = [], Store.put
    monkeypatch.setattr(Store, "put", lambda *args: sent.append(args[2]) or keep(*args))
    resumed = stage(run)
    assert_same(resumed, stage(run))
    # The second images, with deactivated neurons, were not begun.
    assert len(sent) == (7 if stage is images else 1)


def test_a_killed_worker_costs_time_alone(run, two, monkeypatch):
    kept, keep = [], Store.put

    def killing(*args):
        kept.append(args)
        if len(kept) == 2:
            os.kill(before[gone], signal.SIGKILL)
        return keep(*args)

    assert run.threshold
    assert run.statistics
    before = two.run(os.getpid)
    gone = next(iter(before))
    monkeypatch.setattr(Store, "put", killing)
    killed = localizations(run)
    # All results may be there before the scheduler knows of the loss.
    deadline = time.monotonic() + 60
    while gone in two.scheduler_info()["workers"] and time.monotonic() < deadline:
        time.sleep(0.1)
    two.wait_for_workers(2, timeout=60)
    assert len(set(two.run(os.getpid).values()) & set(before.values())) == 1
    assert len(kept) == len(killed)
    monkeypatch.setattr(workers, "_connect", None)
    # What is in the store starts nothing.
    assert_same(killed, localizations(run))


def results(pipe, task=captions, batches=("ab", "c"), **common):
    jobs = [[(f"key of {item}", item) for item in batch] for batch in batches]
    return list(map_prompts(task, jobs, pipe=pipe, common=common))


def test_a_changed_model_is_refused(profile, two):
    other = load_pipeline(profile)
    with torch.no_grad():
        other.unet.conv_out.bias.add_(1)
    with pytest.raises(WorkersError, match="a worker has model float32 [0-9a-f]+, .* instead of model float32"):
        results(other)


def test_a_worker_that_cannot_begin(pipe, two):
    with pytest.raises(WorkersError, match="a worker could not begin: RuntimeError: no such setting"):
        results(pipe, unfit)


def test_an_end_in_the_middle_leaves_nothing_running(pipe, two):
    jobs = [[(str(number), "a")] for number in range(50)]
    found = map_prompts(captions, jobs, pipe=pipe, common={})
    next(found)
    found.close()
    assert "pending" not in {future.status for future in two.futures.values()}
    assert len(results(pipe)) == 3


@pytest.mark.parametrize("text", ["", "off"])
def test_without_a_choice_dask_is_not_imported(profile, pipe, monkeypatch, text):
    monkeypatch.setenv(workers.VARIABLE, text)
    assert workers._choice(dataclasses.replace(profile, workers=2)) == (None if text else "local:2")
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert results(pipe) == [(f"key of {item}", item) for item in "abc"]


NO_MEANING = "NEMO_DASK is '.*'; expected tcp://host:port, local:4 or off"
NO_ANSWER = "no Dask scheduler answers at {}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, NO_MEANING) for text in ("local", "local:0", "local:-1", "local:²", "4", "yes")),
        *((text, NO_ANSWER.format(text)) for text in ("tcp://127.0.0.1:9", "nonsense://127.0.0.1:9")),
        ("local:2", r'not installed: pip install "nemolib\[workers\]"'),
    ],
)
def test_a_cluster_that_cannot_be_used(pipe, monkeypatch, text, message):
    monkeypatch.setenv(workers.VARIABLE, text)
    monkeypatch.setattr(workers, "PATIENCE", "500ms")
    monkeypatch.setattr(workers, "_client", None)
    if text == "local:2":
        monkeypatch.setitem(sys.modules, "distributed", None)
    assert results(pipe, batches=()) == []  # nothing to do starts nothing
    with pytest.raises(WorkersError, match=message):
        results(pipe)


def test_a_pipeline_without_profile_stays_here(profile, monkeypatch):
    monkeypatch.setenv(workers.VARIABLE, "local:2")
    with pytest.warns(UserWarning, match="not loaded from a profile"):
        assert len(results(load_pipeline(profile.model, device="cpu"))) == 3


def test_local_workers_take_gpus_in_turn(profile, monkeypatch):
    chosen = dataclasses.replace(profile, device="auto")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, device in ((0, "cuda:0"), (3, "cuda:1"), ("tcp://host:1", None)):
        monkeypatch.setattr("distributed.get_worker", lambda name=name: type("Worker", (), {"name": name}))
        assert workers._device(chosen) == device
    assert workers._device(profile) is None
