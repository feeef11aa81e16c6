import warnings

import numpy as np
import pytest
import torch
from torch import nn

from nemolib.batching import shrinking
from nemolib.blocked_score import BlockReuse
from nemolib.first_step import first_step, guidance_norms
from nemolib.generation import generate
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.settings import DetectionSettings, GenerationSettings
from tests.random_pipeline import random_pipeline

DETECTION = DetectionSettings(samples=5, steps=10)


class Memory:
    """A function that runs out of memory for batches above a size."""

    def __init__(self, largest, error=torch.cuda.OutOfMemoryError):
        self.largest, self.error, self.sizes = largest, error, []

    def __call__(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.largest:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [item * 10 for item in batch]


@pytest.fixture
def pipe():
    pipe = random_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return pipe


def run_out(unet, largest):
    """Let passes of a UNet run out of memory for more samples than ``largest``; return the sizes of all passes."""
    sizes = []

    def refuse(module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > largest:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    unet.register_forward_pre_hook(refuse)
    return sizes


def collect(memory, items, size, owner):
    return [value for _, part in shrinking(memory, items, size=size, owner=owner, use="test") for value in part]


def test_with_enough_memory_batches_have_their_size():
    memory, owner = Memory(10), nn.Identity()
    assert collect(memory, list(range(7)), 3, owner) == [item * 10 for item in range(7)]
    assert memory.sizes == [3, 3, 1]


def test_a_full_memory_halves_the_batch_and_goes_on_with_it():
    memory, owner = Memory(2), nn.Identity()
    with pytest.warns(UserWarning, match=r"test: out of memory with (8|4) at once; going on with (4|2)"):
        assert collect(memory, list(range(10)), 8, owner) == [item * 10 for item in range(10)]
    assert memory.sizes == [8, 4, 2, 2, 2, 2, 2]


def test_the_smaller_size_is_kept_for_the_model_and_the_use():
    memory, owner = Memory(2), nn.Identity()
    with pytest.warns(UserWarning, match="out of memory"):
        collect(memory, list(range(4)), 4, owner)
    memory.sizes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(memory, list(range(4)), 4, owner)
    assert memory.sizes == [2, 2]
    large = Memory(4)
    for other, use in [(owner, "another use"), (nn.Identity(), "test")]:
        list(shrinking(large, list(range(4)), size=4, owner=other, use=use))
    assert large.sizes == [4, 4]


def test_what_was_done_is_not_done_again():
    owner, seen = nn.Identity(), []

    def function(batch):
        if len(batch) > 1 and 3 in batch:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        seen.extend(batch)
        return batch

    with pytest.warns(UserWarning, match="going on with 1"):
        collect(function, [0, 1, 2, 3], 2, owner)
    assert seen == [0, 1, 2, 3]


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
    def function(batch):
        if len(batch) > 1:
            raise RuntimeError(words)
        return batch

    with pytest.warns(UserWarning, match="out of memory"):
        assert collect(function, [1, 2], 2, nn.Identity()) == [1, 2]


def test_a_single_item_that_does_not_fit_is_an_error():
    with (
        pytest.raises(MemoryError, match=r"test: out of memory with a single item; .*dtype float16.*Tried to allocate"),
        pytest.warns(UserWarning, match="out of memory"),
    ):
        collect(Memory(0), [1, 2], 2, nn.Identity())


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"):
        collect(Memory(0, error=lambda words: RuntimeError("shapes do not fit")), [1, 2], 2, nn.Identity())
    with pytest.raises(ValueError, match="batch size is 0"):
        collect(Memory(9), [1], 0, nn.Identity())


def test_noise_differences_do_not_depend_on_the_memory(pipe):
    step, text = first_step(pipe, settings=DETECTION), embed(pipe, ["a fox"])
    sets = [NeuronSet.of([(0, 1)], layers=7), NeuronSet.of([(6, 2), (3, 1)], layers=7)]
    plain, blocked = step(text), step.many(text, neurons=sets)
    sizes = run_out(pipe.unet, 3)
    with pytest.warns(UserWarning, match="detection: out of memory with 5 at once; going on with 2"):
        assert torch.allclose(step(text), plain, atol=1e-4)
    assert torch.allclose(step.many(text, neurons=sets), blocked, atol=1e-4)
    assert sizes == [5, 2, 2, 1] + [2] * 5


def test_images_do_not_depend_on_the_memory(pipe):
    settings = GenerationSettings(samples=3, steps=2, guidance=3.0, batch_size=6)
    sets = [NeuronSet.of([(0, 1)], layers=7), NeuronSet.of([(6, 2)], layers=7)]
    plain = generate(pipe, ["a fox", "a dog"], settings=settings, neurons=sets, progress=False)
    sizes = run_out(pipe.unet, 6)
    with pytest.warns(UserWarning, match="generation: out of memory with 6 at once; going on with 3"):
        again = generate(pipe, ["a fox", "a dog"], settings=settings, neurons=sets, progress=False)
    assert np.abs(again.astype(int) - plain).max() <= 1
    assert sizes == [12, 6, 6, 6, 6]


def test_guidance_norms_do_not_depend_on_the_memory(pipe):
    plain = guidance_norms(pipe, "a fox", steps=2, settings=DETECTION)
    run_out(pipe.unet, 4)
    with pytest.warns(UserWarning, match="guidance norms: out of memory"):
        again = guidance_norms(pipe, "a fox", steps=2, settings=DETECTION)
    assert again.shape == (2, 5)
    assert np.allclose(again, plain, rtol=1e-4)


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
    last = pipe.unet.up_blocks[-1]
    last.register_forward_pre_hook(lambda module, args, kwargs: full(kwargs["hidden_states"]), with_kwargs=True)

    def full(hidden):
        if len(hidden) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    with pytest.warns(UserWarning, match="going on with 2"):
        found = [passing(item) for item in sets[1:]]
    for ours, theirs in zip(found, expected[1:], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
