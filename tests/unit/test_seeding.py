import torch

from nemolib import seeding


def test_latents_come_from_one_generator_whatever_the_defaults_of_the_session():
    expected = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = seeding.latents((4, 8, 8), samples=3, seed=5)
            assert seeding.sample_generators(5, [0])[0].device.type == "cpu"
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_latents_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    seeding.latents((4, 8, 8), samples=3, seed=5)
    seeding.sample_generators(5, [0, 1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sample_depends_on_seed_and_index_alone():
    alone = torch.randn(4, generator=seeding.sample_generators(2, [3])[0])
    among = torch.randn(4, generator=seeding.sample_generators(2, [0, 3])[1])
    assert torch.equal(alone, among)


def test_sample_seeds_differ_and_stay():
    seeds = {seeding.sample_seed(seed, index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeding.sample_seed(2, 0) == 5064105440874769477


def test_streams_depend_on_every_key_and_nothing_else():
    draws = [
        seeding.stream(seed, *keys).integers(2**32)
        for seed, *keys in ((0,), (1,), (0, 1), (0, "1"), (0, 1, "a"), (0, "a", 1), (0, "a1"), (0, "\ud800"))
    ]
    assert len(set(draws)) == len(draws)
    assert seeding.stream(0, "a", 1).integers(2**32) == draws[5]
