"""What `tools.check_gpu` measures on a card, with a narrow architecture and the tiny world on this CPU."""

import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemolib import workers
from nemolib.neurons import NeuronSet
from nemolib.run import Run
from nemolib.settings import load_profile
from nemolib.store import Store
from tests.narrow_architecture import save_narrow_architecture
from tools import check_gpu, estimate

SMALL = check_gpu.Sizes(latents=(1, 2), seconds=0.01, texts=8, prompts=2, images=1, crowd=6, compared=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = save_narrow_architecture(tmp_path_factory.mktemp("narrow"), side=48)
    whole = check_gpu.full_size("cpu", "float32")
    small = replace(
        whole,
        model=f"random:{folder}",
        detection=replace(whole.detection, samples=2),
        generation=replace(whole.generation, steps=2, side=64),
    )
    return Run(small, store=Store(tmp_path_factory.mktemp("store")), progress=False)


@pytest.fixture
def asked(monkeypatch):
    """Return what is asked of Dask, and compute it here: that two processes give the same is tested with workers."""
    found = []

    @contextmanager
    def cluster(source):
        found.append(os.environ.get(workers.VARIABLE))
        yield None

    monkeypatch.setattr(workers, "cluster", cluster)
    return found


def test_the_parts_of_the_experiment_are_measured(run, asked):
    rows = list(check_gpu.experiment(run, SMALL))
    assert asked[-1] == "local:2"
    assert asked.count("local:2") == 1
    rows += check_gpu.speeds(run.pipe, SMALL)
    assert len(rows) == 6
    assert all(row.value > 0 and row.good for row in rows), rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_method_of_each_notebook_on_what_came_after_is_measured(run, dtype, monkeypatch):
    half = Run(replace(run.profile, dtype=dtype), store=run.store, progress=False)
    rows = list(check_gpu.beyond(half))
    assert len(rows) == 5
    assert all(row.value > 0 and row.good for row in rows), rows
    monkeypatch.setattr(check_gpu, "prune", lambda pipe, neurons: {})
    assert not next(check_gpu.beyond(half)).good


def memory_for(pipe, latents):
    """Return a limit under which the UNet takes that many latents at once."""

    @contextmanager
    def limit(device):
        def full(module, inputs):
            if len(inputs[0]) > latents:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        handle = pipe.unet.register_forward_pre_hook(full)
        try:
            yield
        finally:
            handle.remove()

    return limit


def test_halving_is_seen_and_so_is_its_absence(run):
    times, deviation = check_gpu.halving(run.pipe, SMALL, memory_for(run.pipe, 3))
    assert (times.value, times.good, deviation.good) == (1, True, True)
    times, _ = check_gpu.halving(run.pipe, replace(SMALL, crowd=5), memory_for(run.pipe, 100))
    assert (times.value, times.good) == (0, False)


def test_half_precision_agrees_with_single_precision(random_model_folder):
    """A CPU in half precision stands for the card, and random weights for the tiny world's."""
    world = load_profile("tiny")
    small = replace(
        world,
        model=str(random_model_folder),
        thresholds=replace(world.thresholds, value=0.5),
        holdout_size=100,
        detection=replace(world.detection, samples=2),
        search=replace(world.search, theta_start=4.5, theta_min=4.0, theta_step=0.5, k_max=1),
        generation=replace(world.generation, samples=1, steps=2),
    )
    half = {"float16": check_gpu.TOLERANCES["float16"]}
    found = {row.what: row for row in check_gpu.agreement(small, "cpu", SMALL, half)}
    # The sets of so few seeds may differ in any number of neurons.
    assert all(found[f"tiny world, float16: {name}"].good for name in ("differences", "scores", "images")), found
    assert found["tiny world, float16: scores"].value > 0


def test_what_deviates_is_seen():
    maps, neurons = np.zeros((1, 2, 1, 4, 4)), {(0, *pair) for pair in NeuronSet(((1, 2, 3),))}
    here = {"differences": maps, "scores": np.zeros(2), "neurons": neurons, "images": np.zeros((2, 8))}
    allowed = check_gpu.TOLERANCES["float32"]
    assert all(fits for _, fits in check_gpu._deviations(here, here, allowed).values())
    changes = {"differences": maps + 0.2, "scores": np.full(2, 0.1), "neurons": set(), "images": np.full((2, 8), 9.0)}
    for name, other in changes.items():
        found = check_gpu._deviations(here, here | {name: other}, allowed)
        assert [key for key, (_, fits) in found.items() if not fits] == [name]


def test_a_part_that_fails_stops_no_other(capsys):
    def broken():
        yield check_gpu.Row("first", 1.0)
        raise RuntimeError("no kernel image is available")

    found = check_gpu.report([("broken", broken), ("sound", lambda: iter([check_gpu.Row("second", 2.0)]))])
    assert found["what"].tolist() == ["first", "broken", "second"]
    assert found["good"].tolist() == [True, False, True]
    assert "no kernel image" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_one_sentence(capsys):
    assert check_gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_estimate_takes_the_speed_of_a_card_that_was_checked(run, tmp_path, monkeypatch):
    card = SimpleNamespace(name="NVIDIA T1", total_memory=2**34)
    monkeypatch.setattr(check_gpu.torch.cuda, "get_device_properties", lambda device: card)
    for module in (check_gpu, estimate):
        monkeypatch.setattr(module, "GPU_REPORT", tmp_path / "gpu.json")
    profile = load_profile("sd14")
    assert estimate.speed_of_a_card(profile) is None
    rows = [check_gpu.Row(f"speed, {size} latents", 10.0 * size, "1/s", latents=size) for size in (1, 8, 16)]
    parts = [("speed", lambda: iter([*rows, check_gpu.Row("2 images", 3.0)]))]
    assert check_gpu.write_report(check_gpu.report(parts), seconds=1.0)
    assert estimate.speed_of_a_card(profile) == (80.0, "measured on NVIDIA T1")
    assert estimate.speed_of_a_card(replace(profile, device="cpu")) is None
