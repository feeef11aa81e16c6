import pytest
import torch

from nemolib.first_step import first_step
from nemolib.localization import BlockedScore
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.protocols import RELEASED
from nemolib.reuse import BlockReuse
from nemolib.settings import DetectionSettings, SimilaritySettings
from tests.random_pipeline import WIDTHS

SETTINGS = DetectionSettings(samples=2, guidance=7.0)


def neurons(**layers):
    """Return a set by layer: l0=[1], l6=[2, 3]."""
    return NeuronSet.of([(int(name[1:]), i) for name, items in layers.items() for i in items], layers=7)


COURSE = [
    neurons(l0=[1, 2], l2=[3], l4=[1], l5=[2], l6=[3, 4]),
    neurons(l0=[1, 2], l2=[3], l4=[1], l5=[2], l6=[3]),
    neurons(l0=[1, 2], l2=[3], l4=[1], l5=[2]),
    neurons(l0=[1, 2], l2=[3], l4=[1], l5=[7], l6=[3]),
    neurons(l0=[1, 2], l2=[3], l6=[3]),
    neurons(l0=[1, 2], l6=[3]),
    neurons(l0=[2], l6=[3]),
    neurons(l0=[1, 2], l2=[3], l4=[1], l5=[2], l6=[3, 4]),
    neurons(l1=[5]),
]


@pytest.fixture
def step(random_pipe):
    return first_step(random_pipe, settings=SETTINGS)


def test_reused_blocks_give_the_same_bits(random_pipe, step):
    embedding, reuse = embed(random_pipe, ["zzz"]), BlockReuse(random_pipe.unet)
    for item in COURSE:
        plain = step(embedding, neurons=item)
        with reuse.passing(item):
            assert torch.equal(step(embedding, neurons=item), plain), item


def test_only_what_may_differ_is_computed(random_pipe, step):
    embedding, reuse = embed(random_pipe, ["zzz"]), BlockReuse(random_pipe.unet)
    passes = []
    unet = random_pipe.unet
    blocks = {**{f"down {i}": block for i, block in enumerate(unet.down_blocks)}, "mid": unet.mid_block}
    # The first module inside a block runs only if the block is computed.
    handles = [
        block.resnets[0].register_forward_hook(lambda *_, name=name: passes.append(name))
        for name, block in blocks.items()
    ]
    try:
        for item, expected in zip(
            COURSE[:7],
            [["down 0", "down 1", "down 2", "mid"], ["mid"], ["mid"], ["down 2", "mid"], ["down 2", "mid"],
             ["down 1", "down 2", "mid"], ["down 0", "down 1", "down 2", "mid"]],
            strict=True,
        ):  # fmt: skip
            passes.clear()
            with reuse.passing(item):
                step(embedding, neurons=item)
            assert passes == expected
    finally:
        for handle in handles:
            handle.remove()


def test_the_model_is_left_as_it_was(random_pipe, step):
    embedding, reuse = embed(random_pipe, ["zzz"]), BlockReuse(random_pipe.unet)
    plain = step(embedding)
    # A set of another model fails in the middle of the pass.
    with pytest.raises(ValueError, match="does not exist"), reuse.passing(COURSE[0]):
        step(embedding, neurons=neurons(l0=[99]))
    assert not [name for name, module in random_pipe.unet.named_modules() if "forward" in module.__dict__]
    assert torch.equal(step(embedding), plain)


def test_two_scores_do_not_mix(random_pipe, step):
    def score(prompt):
        embedding = embed(random_pipe, [prompt])
        return BlockedScore(
            step,
            embedding,
            seeds=[0, 1],
            unblocked=step(embedding),
            similarity=SimilaritySettings(kernel_size=3, sigma=0.5),
            protocol=RELEASED,
        )

    one, other = score("zzz"), score("b q")
    mixed = [(one(item), other(item)) for item in COURSE]
    assert [pair[0] for pair in mixed] == [score("zzz")(item) for item in COURSE]
    assert [pair[1] for pair in mixed] == [score("b q")(item) for item in COURSE]


def test_sets_of_one_batch_and_single_ones_agree(random_pipe, step):
    embedding = embed(random_pipe, ["zzz"])
    settings = {"similarity": SimilaritySettings(kernel_size=3, sigma=0.5), "protocol": RELEASED}
    together = BlockedScore(step, embedding, seeds=[0, 1], unblocked=step(embedding), **settings)
    single = BlockedScore(step, embedding, seeds=[0, 1], unblocked=step(embedding), **settings)
    assert together.many(COURSE) == pytest.approx([single(item) for item in COURSE], abs=1e-5)
    for item in COURSE:
        item.check(WIDTHS)
