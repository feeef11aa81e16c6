import copy
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nemolib.batching import Lockstep, in_order, shrinking
from nemolib.beyond.attack import attacking
from nemolib.beyond.triggers import token_significance
from nemolib.first_step import Sample, first_step, guidance_norms
from nemolib.generation import generate
from nemolib.mitigation import DeactivatedNeurons, EmbeddingAdjustment
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.settings import DetectionSettings, GenerationSettings, WenSettings

DETECTION = DetectionSettings(samples=5, steps=10)
SETS = {"a fox": NeuronSet.of([(0, 1)], layers=7), "a dog": NeuronSet.of([(6, 2), (3, 1)], layers=7)}
FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Memory:
    """A function that runs out of memory for batches above a size."""

    def __init__(self, largest, error=FULL):
        self.largest, self.error, self.sizes = largest, error, []

    def __call__(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.largest:
            raise self.error
        return [item * 10 for item in batch]


def collect(memory, number, size, owner, use="test"):
    """Return the sizes of the batches in which so many items are computed, each once."""
    memory.sizes.clear()
    found = [part for _, part in shrinking(memory, list(range(number)), size=size, owner=owner, use=use)]
    assert sum(found, []) == [item * 10 for item in range(number)]
    return memory.sizes


def test_a_full_memory_halves_the_batch_and_the_size_is_kept_for_the_model_and_the_use():
    memory, owner = Memory(2), nn.Identity()
    with pytest.warns(UserWarning, match=r"test: out of memory with (8|4) at once; going on with (4|2)"):
        assert collect(memory, 10, 8, owner) == [8, 4, 2, 2, 2, 2, 2]
    with warnings.catch_warnings(action="error"):
        assert collect(memory, 4, 4, owner) == [2, 2]
        assert collect(Memory(10), 7, 3, owner, "another use") == [3, 3, 1]
        assert collect(Memory(10), 7, 3, nn.Identity()) == [3, 3, 1]


@pytest.mark.parametrize(
    "words",
    [
        "MPS backend out of memory (9 GB)",
        "DefaultCPUAllocator: can't allocate memory: 4 bytes",
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    ],
)
def test_backends_without_an_exception_of_their_own(words):
    with pytest.warns(UserWarning, match="out of memory"):
        assert collect(Memory(1, RuntimeError(words)), 2, 2, nn.Identity()) == [2, 1, 1]


def test_what_no_smaller_batch_mends_is_an_error():
    with (
        pytest.raises(MemoryError, match=r"test: out of memory with a single item; .*dtype float16.*Tried to allocate"),
        pytest.warns(UserWarning, match="out of memory"),
    ):
        collect(Memory(0), 2, 2, nn.Identity())
    with pytest.raises(RuntimeError, match="shapes"):
        collect(Memory(0, RuntimeError("shapes do not fit")), 2, 2, nn.Identity())
    with pytest.raises(ValueError, match="batch size is 0"):
        collect(Memory(9), 1, 0, nn.Identity())


def run_out(module, largest):
    """Let passes of a module run out of memory for more samples than ``largest``; return the sizes of all passes."""
    sizes = []

    def refuse(module, args, kwargs):
        sizes.append(len(args[0] if args else kwargs["hidden_states"]))
        if sizes[-1] > largest:
            raise FULL

    module.register_forward_pre_hook(refuse, with_kwargs=True)
    return sizes


def differences(pipe):
    step, text = first_step(pipe, settings=DETECTION), embed(pipe, ["a fox"])
    return step.differences([Sample(text, seed, neurons) for neurons in SETS.values() for seed in range(5)])


def images(pipe):
    settings = GenerationSettings(samples=3, steps=2, guidance=3.0, batch_size=6)
    found = generate(pipe, list(SETS), settings=settings, mitigation=DeactivatedNeurons(SETS), progress=False)
    return torch.from_numpy(found).double()


def norms(pipe):
    return torch.from_numpy(guidance_norms(pipe, "a fox", steps=2, settings=DETECTION))


def adjusted(pipe):
    settings = WenSettings(target=0.0, iterations=2, latents=4)
    return EmbeddingAdjustment(settings).adjust(pipe, "a fox").embedding


def significance(pipe):
    return torch.tensor(token_significance(pipe, "a fox", samples=3)["significance"])


def attacked(pipe):
    items = [
        (caption, np.eye(64, dtype=np.uint8)[..., None].repeat(3, 2), caption, *of)
        for caption, *of in (("a fox", SETS["a fox"], 0), ("a dog", SETS["a dog"], 1))
    ]
    return torch.from_numpy(np.stack(attacking(pipe, steps=(2,), batch=3)(items)))


@pytest.mark.parametrize(
    ("function", "largest", "use", "sizes", "close"),
    [
        (differences, 3, "detection", [10, 5, 2, 2, 2, 2, 2], {"atol": 1e-4}),
        (images, 6, "generation", [12, 6, 6, 6, 6], {"atol": 1}),
        (norms, 4, "guidance norms", [10, 4, 4, 2, 4, 4, 2], {"rtol": 1e-4}),
        (adjusted, 2, "(guidance norms|prompt embedding adjustment)", [4, 2, 2] * 2 + [2, 2], {"atol": 1e-5}),
        (significance, 2, "token significance", [6, 2, 2, 2], {"rtol": 1e-4}),
        (attacked, 4, "attack", [6, 2, 2, 2] + [2] * 3, {"atol": 1e-5}),
    ],
)
def test_results_do_not_depend_on_the_memory(random_pipe, function, largest, use, sizes, close):
    pipe = copy.deepcopy(random_pipe)
    plain, seen = function(pipe), run_out(pipe.unet.conv_in, largest)
    with pytest.warns(UserWarning, match=f"{use}: out of memory"):
        assert torch.allclose(function(pipe), plain, **close)
    assert seen == sizes


# In lockstep


class Answers:
    """Doubles numbers, and remembers what was asked at once."""

    def __init__(self):
        self.asked = []

    def __call__(self, items):
        self.asked.append(items)
        if "bad" in items:
            raise ValueError("no half of it")
        return [2 * item for item in items]


def asking(lockstep, name, rounds, number=1):
    """Return a function that asks so many times for so many things, and returns how it went."""

    def ask():
        for round in range(rounds):
            items = [f"{name}{round}" for _ in range(number)]
            assert lockstep.ask(items) == [2 * item for item in items]
        return name.upper()

    return ask


def test_what_functions_ask_for_is_answered_together_and_as_one_ends_the_next_begins():
    answers = Answers()
    lockstep = Lockstep(answers, 2)
    found = list(lockstep.run([asking(lockstep, *each) for each in (("a", 3, 2), ("b", 1), ("c", 0), ("d", 4))]))
    assert answers.asked == [["a0", "a0", "b0"], ["a1", "a1", "d0"], ["a2", "a2", "d1"], ["d2"], ["d3"]]
    assert in_order(found) == ["A", "B", "C", "D"]
    assert [place for place, _ in found][-1] == 3


def test_a_function_that_raises_stops_no_other_and_an_answer_that_raises_all_that_wait_for_it():
    lockstep = Lockstep(Answers(), 3)
    functions = [asking(lockstep, "a", 3), lambda: lockstep.ask(["ok"]) / 2, asking(lockstep, "c", 0)]
    found = dict(lockstep.run(functions))
    assert (found[0], found[2]) == ("A", "C")
    assert isinstance(found[1], TypeError)
    with pytest.raises(TypeError):
        in_order(found.items())
    lockstep = Lockstep(Answers(), 2)
    functions = [asking(lockstep, "a", 3), lambda: lockstep.ask(["bad"]), asking(lockstep, "c", 3)]
    found = dict(lockstep.run(functions))
    assert [str(found[place]) for place in (0, 1)] == ["no half of it"] * 2
    assert found[2] == "C"


@pytest.mark.parametrize("end", ["interrupted", "closed"])
def test_an_end_in_the_middle_leaves_nothing_running(end):
    def answer(items):
        if end == "interrupted" and items == ["a1", "b1"]:
            raise KeyboardInterrupt
        return [2 * item for item in items]

    before, lockstep = threading.active_count(), Lockstep(answer, 2)
    running = lockstep.run([asking(lockstep, "a", 9), asking(lockstep, "b", 9), asking(lockstep, "c", 9)])
    if end == "closed":
        running = lockstep.run([asking(lockstep, "a", 0), asking(lockstep, "b", 9), asking(lockstep, "c", 9)])
        assert next(running) == (0, "A")
        running.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            list(running)
    assert threading.active_count() == before


def test_a_clock_runs_while_its_function_does_and_for_its_share_of_the_answers(monkeypatch):
    now, seconds = [0.0], {}
    monkeypatch.setattr("nemolib.batching.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def answer(items):
        now[0] += 0.2
        return items

    def timed(name, number, own):
        def run():
            start = lockstep.clock()
            lockstep.ask([name] * number)
            now[0] += own
            seconds[name] = lockstep.clock() - start

        return run

    lockstep = Lockstep(answer, 2)
    list(lockstep.run([timed("a", 3, 0.0), timed("b", 1, 0.3)]))
    assert seconds == pytest.approx({"a": 0.15, "b": 0.35})
