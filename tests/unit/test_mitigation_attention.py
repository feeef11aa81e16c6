import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor, AttnProcessor2_0

from nemolib.generation import generate
from nemolib.mitigation import AttentionScaling
from nemolib.mitigation.attention import ScaledAttention, attended_tokens, cross_attention
from nemolib.pipeline import embed
from nemolib.settings import GenerationSettings, RenSettings
from tests.random_pipeline import TOKENS, random_pipeline

NOTHING = RenSettings(c1=1.0, mask="none")


def features(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(heads=2):
    torch.manual_seed(0)
    return Attention(query_dim=6, cross_attention_dim=4, heads=heads, dim_head=3).requires_grad_(False)


def by_hand(attn, image, text, c1, allowed):
    """Return what the processor must give for one sample, with loops over heads and positions."""
    query, key, value = attn.to_q(image), attn.to_k(text), attn.to_v(text)
    output = torch.zeros(len(image), attn.heads * 3)
    for head in range(attn.heads):
        part = slice(3 * head, 3 * head + 3)
        for position in range(len(image)):
            logits = [float(query[position, part] @ key[token, part]) / 3**0.5 for token in range(len(text))]
            logits[0] *= c1
            weights = [np.exp(logit) if ok else 0.0 for logit, ok in zip(logits, allowed, strict=True)]
            for token, weight in enumerate(weights):
                output[position, part] += weight / sum(weights) * value[token, part]
    return attn.to_out[0](output)


@pytest.mark.parametrize("guided", [False, True])
def test_attention_by_hand(guided):
    attn, c1 = layer(), 1.25
    allowed = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])
    samples = 4 if guided else 2
    image, text = features(samples, 7, 6), features(samples, 5, 4, seed=1)
    output = ScaledAttention(c1, allowed)(attn, image, text)
    assert output.shape == image.shape
    for sample in range(samples):
        conditional = sample >= samples - 2
        expected = by_hand(
            attn,
            image[sample],
            text[sample],
            c1 if conditional else 1.0,
            allowed[sample - samples + 2].tolist() if conditional else [True] * 5,
        )
        torch.testing.assert_close(output[sample], expected, atol=1e-5, rtol=0)


def test_the_unconditional_half_stays():
    attn, allowed = layer(), torch.tensor([[True, True, False]])
    image, text = features(2, 7, 6), features(2, 3, 4, seed=1)
    plain = AttnProcessor2_0()(attn, image, text)
    scaled = ScaledAttention(2.0, allowed)(attn, image, text)
    torch.testing.assert_close(scaled[0], plain[0])
    assert (scaled[1] - plain[1]).abs().max() > 1e-3


def test_more_weight_for_the_begin_token():
    """With a positive logit of the begin token, a larger scale moves the output towards its value."""
    attn = layer(heads=1)
    text = features(1, 3, 4, seed=1)
    image = torch.linalg.lstsq(attn.to_q.weight, attn.to_k(text)[0, 0][:, None]).solution.T[None]
    target = attn.to_out[0](attn.to_v(text)[0, 0])
    every = torch.ones(1, 3, dtype=torch.bool)
    distances = [(ScaledAttention(c1, every)(attn, image, text)[0, 0] - target).norm() for c1 in (1.0, 1.25, 2.0, 50.0)]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_scale_one_without_a_mask_changes_nothing(random_pipe, guidance):
    settings = GenerationSettings(samples=2, steps=2, guidance=guidance)
    plain = generate(random_pipe, ["a", "b c"], settings=settings, progress=False)
    same = generate(random_pipe, ["a", "b c"], settings=settings, mitigation=AttentionScaling(NOTHING), progress=False)
    assert np.abs(plain.astype(int) - same.astype(int)).max() <= 1


def test_unconditional_noise_stays_and_conditional_changes(random_pipe):
    latents, embeddings = features(2, 4, 16, 16).repeat(2, 1, 1, 1), embed(random_pipe, ["", "", "a", "b c"])
    with torch.no_grad():
        plain = random_pipe.unet(latents, 961, embeddings).sample
        with AttentionScaling().applied(random_pipe, ["a", "b c"]):
            scaled = random_pipe.unet(latents, 961, embeddings).sample
    torch.testing.assert_close(scaled[:2], plain[:2], atol=1e-5, rtol=0)
    assert (scaled[2:] - plain[2:]).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_which_tokens_get_attention(random_pipe):
    prompts = ["abc", "a b", "a" * 50]
    padding = attended_tokens(random_pipe.tokenizer, prompts, mask="padding")
    summary = attended_tokens(random_pipe.tokenizer, prompts, mask="summary")
    assert padding.shape == (3, TOKENS)
    assert padding.sum(dim=1).tolist() == [5, 4, TOKENS]
    assert summary.sum(dim=1).tolist() == [4, 3, TOKENS - 1]
    assert padding[0].tolist() == [True] * 5 + [False] * (TOKENS - 5)
    assert attended_tokens(random_pipe.tokenizer, prompts, mask="none").all()


def test_processors_of_the_user_come_back():
    pipe = random_pipeline()
    pipe.unet.set_attn_processor({name: AttnProcessor() for name in pipe.unet.attn_processors})
    theirs = dict(pipe.unet.attn_processors)
    with AttentionScaling().applied(pipe, ["a"]):
        inside = pipe.unet.attn_processors
        changed = {name for name in theirs if inside[name] is not theirs[name]}
        assert changed == {f"{name}.processor" for name in cross_attention(pipe.unet)}
        assert changed == {name for name in theirs if ".attn2." in name}
    after = pipe.unet.attn_processors
    assert all(after[name] is theirs[name] for name in theirs)


def test_a_batch_that_does_not_belong_to_the_prompts(random_pipe):
    with (
        AttentionScaling().applied(random_pipe, ["a", "b"]),
        pytest.raises(ValueError, match="set up for 2 images and 12 tokens, but the batch has 3 samples"),
    ):
        random_pipe.unet(features(3, 4, 16, 16), 961, embed(random_pipe, ["a", "b", "c"]))
    processor = ScaledAttention(1.0, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs text features"):
        processor(layer(), features(1, 7, 6))
    with pytest.raises(ValueError, match="mask of another origin"):
        processor(layer(), features(1, 7, 6), features(1, 3, 4), torch.zeros(1, 3))


class Custom(AttnProcessor2_0):
    pass


@pytest.mark.parametrize("processor", [Custom(), AttnAddedKVProcessor()])
def test_unknown_processors_are_refused_and_stay(processor):
    pipe = random_pipeline()
    name = next(iter(cross_attention(pipe.unet)))
    module = pipe.unet.get_submodule(name)
    module.set_processor(processor)
    with (
        pytest.raises(ValueError, match=f"{name} has the attention processor {type(processor).__name__}, which"),
        AttentionScaling().applied(pipe, ["a"]),
    ):
        pass
    assert module.processor is processor


def test_custom_self_attention_is_allowed():
    pipe = random_pipeline()
    name = next(iter(cross_attention(pipe.unet))).replace("attn2", "attn1")
    pipe.unet.get_submodule(name).set_processor(Custom())
    AttentionScaling().check(pipe)


def test_other_attention_layers_are_refused():
    pipe = random_pipeline()
    name, module = next(iter(cross_attention(pipe.unet).items()))
    module.norm_cross = torch.nn.LayerNorm(16)
    with pytest.raises(ValueError, match=f"{name} is no attention layer of Stable Diffusion \\(norm_cross\\)"):
        AttentionScaling().check(pipe)
    with pytest.raises(ValueError, match="no cross-attention"):
        AttentionScaling().check(random_pipeline(cross_attention=False))


def test_scaling_twice_is_refused(random_pipe):
    with (
        AttentionScaling().applied(random_pipe, ["a"]),
        pytest.raises(ValueError, match="processor ScaledAttention"),
        AttentionScaling().applied(random_pipe, ["a"]),
    ):
        pass


@pytest.mark.parametrize(("key", "value"), [("c1", -1.0), ("c1", float("nan")), ("mask", "all")])
def test_impossible_settings(key, value):
    with pytest.raises(ValueError, match=rf"RenSettings\.{key} is .*must be"):
        RenSettings(**{key: value})
