"""What holds for every mitigation, then each of them."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor2_0
from hypothesis import given
from hypothesis import strategies as st

from nemolib import mitigation as module
from nemolib.first_step import guidance_norm
from nemolib.generation import generate
from nemolib.layers import OpenAttention, attention_layers, collect_outputs, cross_attention_layers
from nemolib.mitigation import (
    AttentionScaling,
    DeactivatedNeurons,
    EmbeddingAdjustment,
    RandomTokens,
    SwitchedOffLayers,
    random_neurons,
)
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.provenance import content_hash
from nemolib.settings import GenerationSettings, WenSettings
from tests.random_pipeline import TOKENS, WIDTHS, random_pipeline

SETTINGS = GenerationSettings(seed=2, samples=2, steps=2, guidance=3.0, batch_size=4)
PROMPTS = ["a", "b c"]
WEN = WenSettings(target=0.0, iterations=2, latents=2, learning_rate=0.5)
FULL = NeuronSet(tuple(tuple(range(width)) for width in WIDTHS))
SETS = {"a": FULL, "b c": NeuronSet.of([(0, 1), (6, 3)], layers=7)}
WRONG = NeuronSet.of([(0, WIDTHS[0])], layers=7)
VALUE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "down_blocks.1.resnets.0.conv2"
MITIGATIONS = [
    DeactivatedNeurons(SETS),
    DeactivatedNeurons(FULL, factor=-1.0),
    EmbeddingAdjustment(WEN),
    AttentionScaling(),
    RandomTokens(1),
    RandomTokens(4),
    SwitchedOffLayers((VALUE,)),
    SwitchedOffLayers((CONVOLUTION,), share=0.5),
]
SLOW = WenSettings(target=0.0, iterations=3, latents=2, learning_rate=0.02)
WORDLESS = SimpleNamespace(
    all_special_ids=(), get_vocab=lambda: {"a": 0, "b": 1}, decode=lambda ids, **_: "\ufffd" if ids == [0] else " "
)
EACH = pytest.mark.parametrize("mitigation", MITIGATIONS, ids=lambda mitigation: mitigation.name)


def images(pipe, prompts=PROMPTS, settings=SETTINGS, mitigation=None):
    return generate(pipe, prompts, settings=settings, mitigation=mitigation, progress=False)


def same(first, second):
    """Whether images agree up to one level of grey; sums in a batch of another size round otherwise."""
    return np.abs(first.astype(int) - second.astype(int)).max() <= 1


def features(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention_layer():
    torch.manual_seed(0)
    return Attention(query_dim=6, cross_attention_dim=4, heads=2, dim_head=3).requires_grad_(False)


@torch.inference_mode()
def inference_pipeline():
    return random_pipeline()


def state(pipe):
    """Return what a mitigation could leave behind."""
    hooks = [name for name, part in pipe.unet.named_modules() if part._forward_hooks or part._forward_pre_hooks]
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    flags = [parameter.requires_grad for part in parts for parameter in part.parameters()]
    gradients = [parameter.grad for part in parts for parameter in part.parameters()]
    weights = content_hash([dict(part.state_dict()) for part in parts])
    return hooks, {name: id(item) for name, item in pipe.unet.attn_processors.items()}, flags, gradients, weights


@pytest.fixture(scope="module")
def plain(random_pipe):
    return images(random_pipe)


# Every mitigation


@EACH
def test_images_change_and_do_not_depend_on_the_batch(random_pipe, plain, mitigation):
    together = images(random_pipe, mitigation=mitigation)
    assert not same(together, plain)
    for batch_size in (1, 3):
        other = dataclasses.replace(SETTINGS, batch_size=batch_size)
        for row, prompt in enumerate(PROMPTS):
            assert same(images(random_pipe, [prompt], other, mitigation.of(prompt))[0], together[row])
    assert same(images(random_pipe), plain)


@EACH
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_all_images_of_a_prompt_are_treated_alike_by_a_call_of_the_users_own(random_pipe, mitigation, guidance):
    options = {"latents": features(1, 4, 16, 16).repeat(4, 1, 1, 1), "num_inference_steps": 2, "output_type": "np"}

    def call(prompts, images):
        with mitigation.applied(random_pipe, prompts) as inputs:
            return random_pipe(**inputs, **options, guidance_scale=guidance, num_images_per_prompt=images).images

    made = call(["a", "b c"], 2)
    np.testing.assert_allclose(made, call(["a", "a", "b c", "b c"], 1), atol=1e-4)
    np.testing.assert_allclose(made, call(["a", "b c", "a", "b c"], 1)[[0, 2, 1, 3]], atol=1e-4)
    plain = random_pipe(["a", "a", "b c", "b c"], **options, guidance_scale=guidance).images
    assert np.abs(made - plain).reshape(2, -1).max(axis=1).min() > 1 / 255


@EACH
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_as_before_whatever_happens(random_pipe, mitigation, failure):
    def stop(*_):
        raise failure("stop")

    before = state(random_pipe)
    with pytest.raises(failure, match="stop"), mitigation.applied(random_pipe, PROMPTS) as inputs:
        random_pipe(**inputs, num_inference_steps=2, output_type="latent", callback_on_step_end=stop)
    assert state(random_pipe) == before


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (DeactivatedNeurons(SETS), DeactivatedNeurons(FULL, factor=0), True),
        (DeactivatedNeurons(SETS, factor=0.5), DeactivatedNeurons(FULL), False),
        (EmbeddingAdjustment(WEN), EmbeddingAdjustment(dataclasses.replace(WEN, multiplier=3.0)), True),
        (EmbeddingAdjustment(WEN), EmbeddingAdjustment(dataclasses.replace(WEN, target=0.5)), False),
        (SwitchedOffLayers((KEY, VALUE, KEY)), SwitchedOffLayers((VALUE, KEY), share=1, seed=3), True),
        (SwitchedOffLayers((KEY,)), SwitchedOffLayers((KEY,), share=0.5), False),
        (RandomTokens(4), RandomTokens(4, seed=6), False),
        (DeactivatedNeurons({"a": NeuronSet.empty(7)}), None, True),
        (SwitchedOffLayers(()), None, True),
        (SwitchedOffLayers((KEY,), share=0), None, True),
    ],
)
def test_what_has_no_part_in_an_image_is_neutral(first, second, equal):
    found, other = first.of("a"), None if second is None else second.of("a")
    assert (found == other) is equal
    assert (content_hash(found) == content_hash(other)) is equal


@EACH
def test_pipelines_and_prompts_that_cannot_be_handled(random_pipe, mitigation):
    two = SimpleNamespace(**dict.fromkeys(("unet", "text_encoder", "tokenizer", "text_encoder_2"), object()))
    for pipe, words in ((object(), "has no unet"), (two, "more than one text encoder")):
        with pytest.raises(ValueError, match=words):
            mitigation.check(pipe)
    with pytest.raises(ValueError, match="prompt 1 is ' '"), mitigation.applied(random_pipe, ["a", " "]):
        pass


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pipe: DeactivatedNeurons([FULL]), "instance of NeuronSet"),
        (lambda pipe: DeactivatedNeurons(SETS).of("c"), "no neurons are given for the prompt 'c'"),
        (lambda pipe: DeactivatedNeurons({"a": FULL, "b": WRONG}).check(pipe), "was the set found in another model"),
        (
            lambda pipe: random_neurons(NeuronSet(((0, 1, 2),)), (5,), seed=0),
            "only 2 other neurons remain, 3 are needed",
        ),
        (lambda pipe: SwitchedOffLayers(VALUE), "valid tuple.*input_type=str"),
        (lambda pipe: SwitchedOffLayers((VALUE,), share=-0.1), "share\n.*greater than or equal to 0"),
        (lambda pipe: SwitchedOffLayers(("mid.conv1",)).check(pipe), "'mid.conv1' is no linear layer or convolution"),
        (lambda pipe: SwitchedOffLayers(("down_blocks.0",)).check(pipe), "'down_blocks.0' is no linear layer or conv"),
        (lambda pipe: EmbeddingAdjustment(WenSettings(target=None)), "target is None.*that of nemolib.wen_target"),
        (lambda pipe: module.wen_target(pipe, ["a"], settings=SLOW), "needs at least 2"),
        (lambda pipe: AttentionScaling().check(random_pipeline(cross_attention=False)), "no cross-attention"),
        (lambda pipe: OpenAttention()(attention_layer(), features(1, 7, 6)), "needs text features"),
        (
            lambda pipe: OpenAttention()(attention_layer(), *[features(1, 3, 4)] * 3),
            "cannot take a mask of another origin",
        ),
        (lambda pipe: EmbeddingAdjustment(SLOW).check(inference_pipeline()), "loaded in torch.inference_mode"),
        (lambda pipe: RandomTokens(number=0), "number\n.*greater than or equal to 1"),
        (lambda pipe: RandomTokens(1).extend(WORDLESS, "a"), "none of the 2 tokens of SimpleNamespace is a word"),
    ],
)
def test_what_no_run_can_use(random_pipe, call, words):
    with pytest.raises(ValueError, match=words):
        call(random_pipe)


# Neurons and layers


@given(st.lists(st.sets(st.integers(0, 19), max_size=10), min_size=1, max_size=7), st.integers(0, 9), st.integers(0, 4))
def test_random_neurons_are_as_many_in_the_same_layers_and_never_found_ones(layers, seed, repeat):
    widths, neurons = tuple(range(20, 20 + len(layers))), NeuronSet(tuple(layers))
    drawn = random_neurons(neurons, widths, seed=seed, repeat=repeat)
    drawn.check(widths)
    assert drawn.counts == neurons.counts
    assert not drawn & neurons
    assert random_neurons(neurons, widths, seed=seed, repeat=repeat) == drawn


def test_layers_repeats_seeds_and_sets_have_their_own_random_neurons():
    neurons = NeuronSet((tuple(range(20)),) * 3)
    drawn = random_neurons(neurons, (1000,) * 3, seed=0)
    assert len(set(drawn.layers)) == 3
    more = neurons | NeuronSet(((20,), (20,), (20,)))
    for chosen, options in ((neurons, {"seed": 0, "repeat": 1}), (neurons, {"seed": 1}), (more, {"seed": 0})):
        assert len(drawn & random_neurons(chosen, (1000,) * 3, **options)) < 10


def test_values_of_zero_are_all_neurons_deactivated(random_pipe):
    names = [layer.name for layer in cross_attention_layers(random_pipe.unet, "value")]
    whole = NeuronSet.of([(0, neuron) for neuron in range(WIDTHS[0])], layers=7)
    zeroed = images(random_pipe, mitigation=SwitchedOffLayers((names[0],)))
    assert np.array_equal(images(random_pipe, mitigation=DeactivatedNeurons(whole)), zeroed)
    first, second = images(random_pipe, ["a fox", "the sea"], mitigation=SwitchedOffLayers(tuple(names)))
    # Without any values the text says nothing.
    assert same(first, second)
    assert not same(*images(random_pipe, ["a fox", "the sea"]))


def test_keys_of_zero_give_every_token_the_same_attention(random_pipe):
    attention = random_pipe.unet.get_submodule(KEY.removesuffix(".to_k"))
    positions, text = features(1, 4, 16), features(1, 5, 16, seed=1)
    with torch.no_grad(), SwitchedOffLayers((KEY,)).applied(random_pipe, ["a"]):
        found = attention(positions, text)
    with torch.no_grad():
        uniform = attention.to_out[0](attention.to_v(text).mean(dim=1, keepdim=True)).expand_as(found)
    torch.testing.assert_close(found, uniform, atol=1e-5, rtol=1e-5)


def test_a_share_of_the_channels(random_pipe):
    half, quarter = (SwitchedOffLayers((CONVOLUTION,), share=share) for share in (0.5, 0.25))
    chosen = half.channels(CONVOLUTION, 16)
    assert len(chosen) == 8
    assert set(quarter.channels(CONVOLUTION, 16)) < set(chosen)
    assert half.channels(VALUE, 16) != chosen != dataclasses.replace(half, seed=1).channels(CONVOLUTION, 16)
    with half.applied(random_pipe, ["a"]), collect_outputs(random_pipe.unet, [CONVOLUTION]) as found:
        random_pipe("a", num_inference_steps=1, output_type="latent")
    assert (found[CONVOLUTION][0] == 0).all(dim=3).all(dim=2).all(dim=0).nonzero().flatten().tolist() == chosen


def test_names():
    few = [DeactivatedNeurons(FULL, factor=0.5), SwitchedOffLayers((VALUE, KEY), share=0.5), RandomTokens(4)]
    names = ["neurons scaled by 0.5", "50% of 2 layers switched off", "4 random tokens"]
    assert [mitigation.name for mitigation in few] == names


# Prompt embedding adjustment


def adjusted(pipe, prompt="b c", **changes):
    return EmbeddingAdjustment(dataclasses.replace(SLOW, **changes)).adjust(pipe, prompt)


def norm(pipe, embedding):
    with torch.no_grad():
        return float(guidance_norm(pipe, SLOW)(embedding[None]).mean())


def test_the_norm_falls_by_adamw_and_the_begin_token_stays(random_pipe):
    """The first step of Adam goes by the learning rate against the sign of the gradient, after the weight decay."""
    before = embed(random_pipe, ["b c"])[0]
    first, found = adjusted(random_pipe, iterations=1).embedding, adjusted(random_pipe)
    assert len(found.norms) == 3
    assert found.norms[0] == pytest.approx(norm(random_pipe, before), rel=1e-5)
    assert norm(random_pipe, found.embedding) < found.norms[-1] < found.norms[0]
    assert torch.equal(found.embedding[0], before[0])
    free = before.clone().requires_grad_()
    guidance_norm(random_pipe, SLOW)(free[None]).mean().backward()
    expected = before * (1 - 0.02 * 0.01) - 0.02 * free.grad.sign()
    clear = free.grad[1:].abs() > 1e-4
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(first[1:][clear], expected[1:][clear], atol=1e-3, rtol=0)


def test_it_ends_at_the_target(random_pipe):
    course = adjusted(random_pipe, iterations=6).norms
    target = (course[2] + course[3]) / 2
    stopped = adjusted(random_pipe, iterations=6, target=target)
    assert stopped.norms == pytest.approx(course[:4], rel=1e-5)
    assert norm(random_pipe, stopped.embedding) == pytest.approx(stopped.norms[-1], rel=1e-4)
    # A prompt that is not above the target stays.
    torch.testing.assert_close(adjusted(random_pipe, target=1e6).embedding, embed(random_pipe, ["b c"])[0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(random_pipe, context):
    expected = adjusted(random_pipe).embedding
    with context(), EmbeddingAdjustment(SLOW).applied(random_pipe, ["b c"]) as inputs:
        random_pipe(**inputs, num_inference_steps=1, output_type="latent")
    assert torch.equal(inputs["prompt_embeds"][0], expected)
    assert not inputs["prompt_embeds"].requires_grad


def test_a_random_state_of_the_caller_neither_counts_nor_changes(random_pipe):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adjusted(random_pipe).embedding
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(adjusted(random_pipe).embedding, first)
    assert not torch.equal(adjusted(random_pipe, seed=SLOW.seed + 1).embedding, first)


def test_each_prompt_is_adjusted_once_per_batch(random_pipe, monkeypatch):
    calls, adjust = [], EmbeddingAdjustment.adjust
    monkeypatch.setattr(EmbeddingAdjustment, "adjust", lambda *args: calls.append(args[2]) or adjust(*args))
    with EmbeddingAdjustment(SLOW).applied(random_pipe, ["a", "b", "a", "a"]) as inputs:
        assert inputs["prompt_embeds"].shape == (4, 12, 16)
    images(random_pipe, ["a", "b"], dataclasses.replace(SETTINGS, batch_size=3), EmbeddingAdjustment(SLOW))
    assert calls == ["a", "b"] * 2


def test_the_target_by_rule(random_pipe):
    prompts = ["a", "b c", "d", "e f"]
    measure = module.target_norms(random_pipe, settings=SLOW)
    norms = measure(prompts)
    settings = dataclasses.replace(SLOW, multiplier=2.0, target=None)
    target = module.wen_target(random_pipe, prompts, settings=settings)
    assert target == module.target_of(norms, settings) == round(target, 3)
    assert target == pytest.approx(np.mean(norms) + 2 * np.std(norms, ddof=1), abs=6e-4)
    assert norms == pytest.approx([norm(random_pipe, embed(random_pipe, [prompt])[0]) for prompt in prompts], abs=1e-4)


# Attention scaling


def by_hand(attn, image, text, c1, allowed):
    """Return what the processor must give for one sample, with loops over heads and positions."""
    query, key, value = attn.to_q(image), attn.to_k(text), attn.to_v(text)
    output = torch.zeros(len(image), 6)
    for part in (slice(0, 3), slice(3, 6)):
        for position in range(len(image)):
            logits = key[:, part] @ query[position, part] / 3**0.5
            logits[0] *= c1
            weights = logits.exp() * allowed
            output[position, part] = weights @ value[:, part] / weights.sum()
    return attn.to_out[0](output)


@pytest.mark.parametrize("guided", [False, True])
def test_attention_by_hand(guided):
    """With guidance the unconditional half, which comes first, stays as it is."""
    attn, c1 = attention_layer(), 1.25
    allowed = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])
    samples = 4 if guided else 2
    image, text = features(samples, 7, 6), features(samples, 5, 4, seed=1)
    change = partial(module.scaled, c1=c1, allowed=allowed, guided=lambda: guided)
    output = OpenAttention(change=change)(attn, image, text)
    for sample in range(samples):
        changed = (c1, allowed[sample - samples + 2]) if sample >= samples - 2 else (1.0, torch.ones(5))
        expected = by_hand(attn, image[sample], text[sample], *changed)
        torch.testing.assert_close(output[sample], expected, atol=1e-5, rtol=0)


def test_which_tokens_get_attention(random_pipe):
    prompts = ["abc", "a b", "a" * 50]
    for mask, numbers in (("padding", [5, 4, TOKENS]), ("summary", [4, 3, TOKENS - 1]), ("none", [TOKENS] * 3)):
        allowed = module.attended_tokens(random_pipe.tokenizer, prompts, mask=mask)
        assert allowed.tolist() == [[True] * number + [False] * (TOKENS - number) for number in numbers]


class Custom(AttnProcessor2_0):
    pass


@pytest.mark.parametrize("processor", [Custom(), AttnAddedKVProcessor(), None])
def test_unknown_attention_is_refused_and_stays(processor):
    pipe = random_pipeline()
    name = attention_layers(pipe.unet)[0]
    attention = pipe.unet.get_submodule(name)
    if processor is None:
        attention.norm_cross, words = torch.nn.LayerNorm(16), r"no attention layer of Stable Diffusion \(norm_cross\)"
    else:
        attention.set_processor(processor)
        words = f"the attention processor {type(processor).__name__}, which"
    before = state(pipe)
    with pytest.raises(ValueError, match=f"{name} .*{words}"), AttentionScaling().applied(pipe, ["a"]):
        pass
    assert state(pipe) == before


# Random tokens

TOKENIZER = random_pipeline().tokenizer


@given(st.lists(st.text("abc", max_size=3), min_size=2, max_size=6), st.sampled_from([1, 4, 10]))
def test_as_many_words_more_and_the_prompts_own_in_order(words, number):
    few, extended, again = (RandomTokens(n).extend(TOKENIZER, " ".join(words)).split(" ") for n in (1, number, number))
    assert len(extended) == len(words) + number
    assert again == extended
    for shorter in (words, few):
        rest = iter(extended)
        assert all(word in rest for word in shorter)


def test_words_are_tokens_and_never_special_and_prompts_and_seeds_have_their_own():
    extended = [RandomTokens(10, seed=seed).extend(TOKENIZER, "~~~~~").split(" ") for seed in range(40)]
    words = {word for each in extended for word in each} - {"~~~~~"}
    assert words <= set(TOKENIZER.get_vocab()) - set(TOKENIZER.all_special_tokens)
    assert {each.index("~~~~~") for each in extended} >= {0, 10}
    assert len({RandomTokens(4, seed=seed).extend(TOKENIZER, text) for seed in (0, 1) for text in ("a b", "a c")}) == 4


def test_the_pipeline_gets_the_longer_prompts(random_pipe):
    longer = [RandomTokens(4).extend(TOKENIZER, prompt) for prompt in ("a", "b", "a")]
    with RandomTokens(4).applied(random_pipe, ["a", "b", "a"]) as inputs:
        assert torch.equal(inputs["prompt_embeds"], embed(random_pipe, longer))
