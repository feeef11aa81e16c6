import warnings

import pytest
import torch
from torch import nn

from nemolib.batching import shrinking
from nemolib.blocked_score import BlockReuse
from nemolib.first_step import first_step, guidance_norms
from nemolib.generation import generate
from nemolib.mitigation import DeactivatedNeurons, target_norms
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.settings import DetectionSettings, GenerationSettings, WenSettings
from tests.random_pipeline import random_pipeline

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
    found = [
        value for _, part in shrinking(memory, list(range(number)), size=size, owner=owner, use=use) for value in part
    ]
    assert found == [item * 10 for item in range(number)]
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


@pytest.fixture
def pipe():
    pipe = random_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return pipe


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
    return first_step(pipe, settings=DETECTION).many(embed(pipe, ["a fox"]), neurons=list(SETS.values()))


def images(pipe):
    settings = GenerationSettings(samples=3, steps=2, guidance=3.0, batch_size=6)
    found = generate(pipe, list(SETS), settings=settings, mitigation=DeactivatedNeurons(SETS), progress=False)
    return torch.from_numpy(found).double()


def norms(pipe):
    return torch.from_numpy(guidance_norms(pipe, "a fox", steps=2, settings=DETECTION))


def targets(pipe):
    return torch.tensor(target_norms(pipe, settings=WenSettings(latents=2))(["a fox", "a dog", "an owl"]))


@pytest.mark.parametrize(
    ("function", "largest", "use", "sizes", "close"),
    [
        (differences, 3, "detection", [10, 5, 2, 2, 2, 2, 2], {"atol": 1e-4}),
        (images, 6, "generation", [12, 6, 6, 6, 6], {"atol": 1}),
        (norms, 4, "guidance norms", [10, 4, 4, 2, 4, 4, 2], {"rtol": 1e-4}),
        (targets, 4, "target norms", [2, 6, 2, 2, 2], {"rtol": 1e-4}),
    ],
)
def test_results_do_not_depend_on_the_memory(pipe, function, largest, use, sizes, close):
    plain, seen = function(pipe), run_out(pipe.unet, largest)
    with pytest.warns(UserWarning, match=f"{use}: out of memory"):
        assert torch.allclose(function(pipe), plain, **close)
    assert seen == sizes


def test_reuse_of_blocks_stays_right_when_a_pass_is_split(pipe):
    step, text = first_step(pipe, settings=DETECTION), embed(pipe, ["a fox"])
    sets = [NeuronSet.of([(6, n)], layers=7) for n in range(4)] + [NeuronSet.of([(6, 3), (0, 1)], layers=7)]
    expected = [step(text, neurons=item) for item in sets]
    reuse = BlockReuse(pipe.unet)

    def passing(item):
        with reuse.passing(item):
            return step(text, neurons=item)

    assert torch.equal(passing(sets[0]), expected[0])
    # From here on memory runs out in the last block, after blocks of the whole batch were reused.
    run_out(pipe.unet.up_blocks[-1], 2)
    with pytest.warns(UserWarning, match="going on with 2"):
        found = [passing(item) for item in sets[1:]]
    for ours, theirs in zip(found, expected[1:], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
