"""Two processes instead of one: the same tables, whatever happens to a process or a prompt."""

import dataclasses
import functools
import os
import signal
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from nemolib import experiments, holdout, localization, paths, workers
from nemolib import experiments_ablations as ablations
from nemolib import experiments_localization as search
from nemolib.hooks import deactivate
from nemolib.mitigation import wen_target
from nemolib.neurons import NeuronSet
from nemolib.pipeline import load_pipeline
from nemolib.profiles import profile_from_mapping
from nemolib.settings import WenSettings
from nemolib.store import Store
from nemolib.workers import FailedPrompts, WorkersError, map_prompts
from tests.random_pipeline import random_pipeline
from tests.random_world import amplify

pytestmark = pytest.mark.slow
CAPTIONS = {
    "memorized": [f"{colour} {animal} card" for colour in ("red", "odd") for animal in ("fox", "owl", "cat")],
    "unmemorized": ["a tree", "the sea"],
    "holdout": [f"{first} {second}{third}" for first in "abcdef" for second in "uvwxyz" for third in "jk"],
}
BAD = "odd owl card"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    model = amplify(random_pipeline())
    model.save_pretrained(folder / "model", safe_serialization=True)
    for name, captions in CAPTIONS.items():
        kinds = ["vm", "vm", "vm", "tm", "tm", "tm"] if name == "memorized" else [name] * len(captions)
        columns = {"caption": captions, "kind": kinds, "group": "report", "copies": 1, "image": ""}
        pd.DataFrame(columns).to_csv(folder / f"{name}.csv", index=False)
    return profile_from_mapping(
        {
            "name": "random",
            "model": str(folder / "model"),
            "device": "cpu",
            "protocol": "paper",
            "limits": {"ladder": 0},
            "prompts": {name: str(folder / f"{name}.csv") for name in CAPTIONS},
            "holdout_size": 72,
            "threshold_prompts": 5,
            "detection": {"samples": 2},
            "similarity": {"kernel_size": 3, "sigma": 0.5},
            "thresholds": {"multiplier": -1.0},
            "search": {"theta_start": 3.0, "theta_step": 1.0, "theta_min": 3.0, "k_step": 1, "k_max": 1},
            "generation": {"samples": 2, "steps": 2, "batch_size": 4},
        }
    )


@pytest.fixture(scope="module")
def pipe(profile):
    return load_pipeline(profile)


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    monkeypatch.delenv(workers.VARIABLE, raising=False)
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def running(profile):
    """Start two processes for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(workers.VARIABLE, "local:2")
        with workers.cluster(profile) as client:
            client.wait_for_workers(2, timeout=120)
            yield client


@pytest.fixture
def two(running, monkeypatch):
    """Let a test use the two processes."""
    monkeypatch.setenv(workers.VARIABLE, "local:2")
    yield running
    running.run(mended)


def statistics(pipe, profile):
    found = experiments.statistics(pipe, profile, progress=False)
    return np.stack([torch.cat(found.mean).numpy(), torch.cat(found.std).numpy()])


def threshold(pipe, profile):
    pairs = experiments.holdout_scores(pipe, profile, progress=False)
    return np.append(pairs, experiments.threshold(pipe, profile, progress=False))


def scores(pipe, profile):
    return experiments.scores(pipe, profile, kinds=("vm", "tm", "unmemorized"), progress=False)


def localizations(pipe, profile):
    return search.without_seconds(search.localizations(pipe, profile, progress=False))


def images(pipe, profile):
    captions = CAPTIONS["memorized"]
    sets = [NeuronSet.of([(0, place)], layers=7) for place in range(len(captions))]
    return np.stack([experiments.images(pipe, profile, captions, neurons=n, progress=False) for n in (None, sets)])


def deactivated(pipe, profile):
    captions = CAPTIONS["memorized"]
    sets = [NeuronSet.of([(6, place)], layers=7) for place in range(len(captions))]
    return np.array(search._scores_after(pipe, profile, captions, sets, progress=False))


def library(pipe, profile):
    return holdout.holdout_scores(pipe, CAPTIONS["unmemorized"], progress=False)


def target(pipe, profile):
    return np.array(wen_target(pipe, CAPTIONS["unmemorized"], settings=WenSettings(latents=64), progress=False))


def variants(pipe, profile):
    levels = ablations.threshold_levels(pipe, profile, progress=False)
    return ablations.ablated(pipe, profile, ablations.compared_prompts(profile), levels, progress=False)


def assert_same(ours, theirs):
    if isinstance(ours, pd.DataFrame):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    else:
        assert np.array_equal(ours, theirs)


STAGES = (statistics, threshold, scores, localizations, images, deactivated, library, target, variants)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_what_one_gives(stage, pipe, profile, two, build, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", build / "two")
    together = stage(pipe, profile)
    monkeypatch.setattr(paths, "BUILD", build / "one")
    monkeypatch.setenv(workers.VARIABLE, "off")
    assert_same(together, stage(pipe, profile))


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


@pytest.fixture(params=["here", "there"])
def everywhere(request, monkeypatch):
    """Return a function that calls another one where prompts are computed: in this process, or in the two."""
    if request.param == "here":
        yield lambda function, *values: function(*values)
        mended()
    else:
        yield request.getfixturevalue("two").run


def counted(monkeypatch, module):
    """Return the captions that a module sends out, from now on."""
    sent = []

    def spy(task, batches, **settings):
        sent.extend(workers._caption(job) for batch in batches for job in batch)
        return map_prompts(task, batches, **settings)

    monkeypatch.setattr(module, "map_prompts", spy)
    return sent


@pytest.mark.parametrize(
    ("stage", "module"), [(localizations, localization), (scores, experiments), (images, experiments)]
)
def test_a_prompt_that_raises_stops_no_other(stage, module, pipe, profile, everywhere, monkeypatch, build):
    experiments.statistics(pipe, profile, progress=False)
    experiments.threshold(pipe, profile, progress=False)
    everywhere(broken, BAD)
    with pytest.raises(FailedPrompts) as error:
        stage(pipe, profile)
    assert [failure.caption for failure in error.value.failures] == [BAD]
    assert f"'{BAD}': ValueError: no word for {BAD}" in str(error.value)
    assert any("in call" in note for note in error.value.__notes__)
    everywhere(mended)
    sent = counted(monkeypatch, module)
    resumed = stage(pipe, profile)
    # The second images, with deactivated neurons, were not begun.
    assert sent == [BAD, *(CAPTIONS["memorized"] if stage is images else [])]
    stage(pipe, profile)
    assert len(sent) == (7 if stage is images else 1)
    monkeypatch.setattr(paths, "BUILD", build / "again")
    monkeypatch.setenv(workers.VARIABLE, "off")
    assert_same(resumed, stage(pipe, profile))


def test_statistics_name_the_prompt_that_raises(pipe, everywhere):
    everywhere(broken, CAPTIONS["holdout"][1])
    with pytest.raises(FailedPrompts, match="1 of 72 prompts failed(.|\n)*'a uk': ValueError"):
        holdout.activation_statistics(pipe, CAPTIONS["holdout"], progress=False)


class KillingStore(Store):
    """A store that kills a worker when it has two records."""

    client = None

    def put(self, key, record):
        kept = super().put(key, record)
        if len(self) == 2:
            pids = self.client.run(os.getpid)
            os.kill(next(iter(pids.values())), signal.SIGKILL)
        return kept


def test_a_killed_worker_costs_time_alone(pipe, profile, two, build, monkeypatch):
    monkeypatch.setattr(KillingStore, "client", two)
    monkeypatch.setattr(search, "open_store", lambda profile, name: KillingStore(build / f"{name}.jsonl"))
    before = two.run(os.getpid)
    killed = localizations(pipe, profile)
    two.wait_for_workers(2, timeout=60)
    assert len(set(two.run(os.getpid).values()) & set(before.values())) == 1
    monkeypatch.undo()
    monkeypatch.setattr(paths, "BUILD", build)
    assert_same(killed, localizations(pipe, profile))
    assert len(Store(build / "localization.jsonl")) == len(killed)


def test_what_is_in_the_store_starts_nothing(pipe, profile, monkeypatch):
    found = localizations(pipe, profile)
    monkeypatch.setenv(workers.VARIABLE, "local:2")
    monkeypatch.setattr(workers, "_connect", None)
    assert_same(found, localizations(pipe, profile))


def captions(pipe):
    """Return a task that gives captions back."""
    return lambda batch: [job for job in batch]


def results(pipe, task=captions, **settings):
    batches = [("a", "b"), ("c",)]
    return list(map_prompts(task, batches, pipe=pipe, common={}, label="test", progress=False, **settings))


def test_a_changed_model_is_refused(profile, two):
    other = load_pipeline(profile)
    with torch.no_grad():
        other.unet.conv_out.bias.add_(1)
    with pytest.raises(WorkersError, match="a worker has another model float32, [0-9a-f]+ instead of float32"):
        results(other)


def test_a_model_with_hooks_is_refused(pipe, two):
    with deactivate(pipe, NeuronSet.of([(0, 0)], layers=7)), pytest.raises(WorkersError, match="the UNet has hooks"):
        results(pipe)


def unfit(pipe):
    raise RuntimeError("no such setting")


def test_a_worker_that_cannot_begin(pipe, two):
    with pytest.raises(WorkersError, match="a worker could not begin: RuntimeError: no such setting"):
        results(pipe, unfit)


def test_an_end_in_the_middle_leaves_nothing_running(pipe, two):
    def interrupted():
        for _ in map_prompts(captions, [("a",)] * 50, pipe=pipe, common={}, label="test", progress=False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "pending" not in {future.status for future in two.futures.values()}
    assert len(results(pipe)) == 2


def test_a_cluster_of_its_own_is_ended(profile, monkeypatch):
    chosen = dataclasses.replace(profile, workers=1)
    monkeypatch.setattr(workers, "_client", None)
    pids = []

    def interrupted():
        with workers.cluster(chosen) as client, workers.cluster(chosen) as inner:
            assert inner is client
            pids.extend(client.run(os.getpid).values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert workers._client is None
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize("text", ["", "off"])
def test_without_a_choice_dask_is_not_imported(pipe, monkeypatch, text):
    monkeypatch.setenv(workers.VARIABLE, text)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert results(pipe) == [(("a", "b"), ["a", "b"]), (("c",), ["c"])]


def test_missing_dask(pipe, monkeypatch):
    monkeypatch.setenv(workers.VARIABLE, "local:2")
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.setattr(workers, "_client", None)
    with pytest.raises(WorkersError, match=r'not installed: pip install "nemolib\[workers\]"'):
        results(pipe)


@pytest.mark.parametrize("text", ["local", "local:0", "local:-1", "local:²", "4", "yes"])
def test_a_choice_without_meaning(pipe, monkeypatch, text):
    monkeypatch.setenv(workers.VARIABLE, text)
    with pytest.raises(WorkersError, match=r"NEMO_DASK is '.*'; expected tcp://host:port, local:4 or off"):
        results(pipe)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://127.0.0.1:9"])
def test_no_scheduler(pipe, monkeypatch, address):
    monkeypatch.setenv(workers.VARIABLE, address)
    monkeypatch.setattr(workers, "PATIENCE", "500ms")
    monkeypatch.setattr(workers, "_client", None)
    with pytest.raises(WorkersError, match=f"no Dask scheduler answers at {address}"):
        results(pipe)


def test_a_pipeline_without_profile_stays_here(profile, monkeypatch):
    monkeypatch.setenv(workers.VARIABLE, "local:2")
    with pytest.warns(UserWarning, match="not loaded from a profile"):
        assert len(results(load_pipeline(profile.model, device="cpu"))) == 2


def test_results_in_order():
    assert list(workers._sorted(iter([(2, "c"), (0, "a"), (1, "b")]))) == [(0, "a"), (1, "b"), (2, "c")]


def test_one_gpu_each(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert workers._gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers._gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert workers._gpus() == ["0", "1"]
