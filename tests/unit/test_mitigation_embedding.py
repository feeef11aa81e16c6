import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from nemolib.generation import generate
from nemolib.mitigation import EmbeddingAdjustment, embedding_norms, wen_target
from nemolib.mitigation.embedding import GuidanceNorm
from nemolib.pipeline import embed
from nemolib.settings import GenerationSettings, WenSettings
from tests.random_pipeline import random_pipeline

SETTINGS = WenSettings(target=0.0, iterations=3, latents=2, learning_rate=0.02)


def norm(pipe, embedding, settings=SETTINGS):
    return embedding_norms(pipe, embedding[None], settings=settings)[0]


def test_the_norm_by_hand(random_pipe):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(SETTINGS.seed))
    schedule = DDIMScheduler.from_config(random_pipe.scheduler.config)
    schedule.set_timesteps(50)
    assert int(schedule.timesteps[0]) == 981
    with torch.no_grad():
        noise = [
            random_pipe.unet(latents, 981, embed(random_pipe, [prompt]).expand(2, -1, -1)).sample
            for prompt in ("b c", "")
        ]
    expected = np.mean([float(((noise[0] - noise[1])[i] ** 2).sum() ** 0.5) for i in range(2)])
    assert norm(random_pipe, embed(random_pipe, ["b c"])[0]) == pytest.approx(expected, rel=1e-4)


def test_norms_of_many_prompts_do_not_depend_on_the_batch(random_pipe):
    embeddings = embed(random_pipe, ["a", "b c", "", "d"])
    found = embedding_norms(random_pipe, embeddings, settings=SETTINGS)
    assert found.shape == (4,)
    assert found[2] == pytest.approx(0, abs=1e-4)
    small = embedding_norms(random_pipe, embeddings, settings=SETTINGS, batch_size=1)
    np.testing.assert_allclose(found, small, atol=1e-5)


def test_the_norm_falls_and_the_begin_token_stays(random_pipe):
    before = embed(random_pipe, ["b c"])[0]
    found = EmbeddingAdjustment(SETTINGS).adjust(random_pipe, "b c")
    assert len(found.norms) == 3
    assert torch.equal(found.embedding[0], before[0])
    assert (found.embedding[1:] - before[1:]).abs().amin(dim=1).min() > 0
    assert found.norms[0] == pytest.approx(norm(random_pipe, before), rel=1e-5)
    assert norm(random_pipe, found.embedding) < found.norms[-1] < found.norms[0]


def test_the_first_step_is_that_of_adamw(random_pipe):
    """The first step of Adam goes by the learning rate against the sign of the gradient, after the weight decay."""
    before = embed(random_pipe, ["b c"])[0]
    settings = dataclasses.replace(SETTINGS, iterations=1)
    after = EmbeddingAdjustment(settings).adjust(random_pipe, "b c").embedding
    free = before.clone().requires_grad_()
    GuidanceNorm.of(random_pipe, settings)(free[None]).mean().backward()
    expected = before * (1 - 0.02 * 0.01) - 0.02 * free.grad.sign()
    clear = free.grad[1:].abs() > 1e-4
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(after[1:][clear], expected[1:][clear], atol=1e-3, rtol=0)


def test_it_ends_at_the_target(random_pipe):
    course = EmbeddingAdjustment(dataclasses.replace(SETTINGS, iterations=6)).adjust(random_pipe, "b c").norms
    target = (course[2] + course[3]) / 2
    stopped = EmbeddingAdjustment(dataclasses.replace(SETTINGS, iterations=6, target=target)).adjust(random_pipe, "b c")
    assert len(stopped.norms) == 4
    assert stopped.norms == pytest.approx(course[:4], rel=1e-5)
    assert norm(random_pipe, stopped.embedding) == pytest.approx(stopped.norms[-1], rel=1e-4)
    assert stopped.norms[-1] <= target < stopped.norms[-2]


def test_a_prompt_that_is_not_above_the_target_stays(random_pipe):
    found = EmbeddingAdjustment(dataclasses.replace(SETTINGS, target=1e6)).adjust(random_pipe, "b c")
    assert len(found.norms) == 1
    torch.testing.assert_close(found.embedding, embed(random_pipe, ["b c"])[0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(random_pipe, context):
    expected = EmbeddingAdjustment(SETTINGS).adjust(random_pipe, "b c")
    with context():
        found = EmbeddingAdjustment(SETTINGS).adjust(random_pipe, "b c")
        with EmbeddingAdjustment(SETTINGS).applied(random_pipe, ["b c"]) as inputs:
            random_pipe(**inputs, num_inference_steps=1, output_type="latent")
    assert torch.equal(found.embedding, expected.embedding)
    assert not found.embedding.requires_grad
    assert torch.equal(inputs["prompt_embeds"][0], expected.embedding)


@pytest.mark.parametrize("required", [True, False])
def test_parameters_keep_their_flags_and_get_no_gradients(required):
    pipe = random_pipeline()
    pipe.unet.requires_grad_(required)
    pipe.text_encoder.requires_grad_(not required)
    pipe.unet.eval()
    pipe.text_encoder.eval()
    EmbeddingAdjustment(SETTINGS).adjust(pipe, "b c")
    assert {parameter.requires_grad for parameter in pipe.unet.parameters()} == {required}
    assert {parameter.requires_grad for parameter in pipe.text_encoder.parameters()} == {not required}
    assert all(parameter.grad is None for part in (pipe.unet, pipe.text_encoder) for parameter in part.parameters())


def test_a_random_state_of_the_caller_neither_counts_nor_changes(random_pipe):
    torch.manual_seed(1)
    first = EmbeddingAdjustment(SETTINGS).adjust(random_pipe, "b c").embedding
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(EmbeddingAdjustment(SETTINGS).adjust(random_pipe, "b c").embedding, first)
    other = dataclasses.replace(SETTINGS, seed=SETTINGS.seed + 1)
    assert not torch.equal(EmbeddingAdjustment(other).adjust(random_pipe, "b c").embedding, first)


def test_each_prompt_is_adjusted_once_per_batch(random_pipe, monkeypatch):
    adjusted = []
    adjust = EmbeddingAdjustment.adjust
    monkeypatch.setattr(EmbeddingAdjustment, "adjust", lambda *args: adjusted.append(args[2]) or adjust(*args))
    with EmbeddingAdjustment(SETTINGS).applied(random_pipe, ["a", "b", "a", "a"]) as inputs:
        assert inputs["prompt_embeds"].shape == (4, 12, 16)
    assert adjusted == ["a", "b"]
    adjusted.clear()
    settings = GenerationSettings(samples=2, steps=1, batch_size=3)
    generate(random_pipe, ["a", "b"], settings=settings, mitigation=EmbeddingAdjustment(SETTINGS), progress=False)
    assert adjusted == ["a", "b"]
    assert torch.equal(inputs["prompt_embeds"][0], inputs["prompt_embeds"][3])


def test_the_target_by_rule(random_pipe):
    prompts = ["a", "b c", "d", "e f"]
    norms = embedding_norms(random_pipe, embed(random_pipe, prompts), settings=SETTINGS)
    once = wen_target(random_pipe, prompts, settings=SETTINGS, progress=False)
    assert once == pytest.approx(norms.mean() + norms.std(ddof=1), abs=6e-4)
    assert once == round(once, 3)
    twice = dataclasses.replace(SETTINGS, multiplier=2.0, target=None)
    target = wen_target(random_pipe, prompts, settings=twice, progress=False)
    assert target == pytest.approx(norms.mean() + 2 * norms.std(ddof=1), abs=6e-4)
    found = EmbeddingAdjustment.by_rule(random_pipe, prompts, settings=twice, progress=False)
    assert found == EmbeddingAdjustment(dataclasses.replace(twice, target=target))
    assert EmbeddingAdjustment.by_rule(random_pipe, [], settings=SETTINGS) == EmbeddingAdjustment(SETTINGS)
    with pytest.raises(ValueError, match="needs at least 2"):
        wen_target(random_pipe, ["a"], settings=SETTINGS)


def test_what_is_refused(random_pipe, monkeypatch):
    with pytest.raises(ValueError, match=r"target is None.*use EmbeddingAdjustment.by_rule"):
        EmbeddingAdjustment(WenSettings(target=None))
    velocity = random_pipeline()
    velocity.scheduler = DDIMScheduler.from_config(velocity.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="predicts 'v_prediction'"):
        EmbeddingAdjustment(SETTINGS).check(velocity)
    with torch.inference_mode():
        frozen = random_pipeline()
    with pytest.raises(ValueError, match="loaded in torch.inference_mode"):
        EmbeddingAdjustment(SETTINGS).check(frozen)
    monkeypatch.setattr(GuidanceNorm, "__call__", lambda self, embeddings: embeddings.sum(dim=(1, 2)) * torch.nan)
    with pytest.raises(ValueError, match="norm of the guidance is nan in step 1; use dtype float32"):
        EmbeddingAdjustment(SETTINGS).adjust(random_pipe, "a")


def test_the_multiplier_has_no_part_in_the_identity():
    other = dataclasses.replace(SETTINGS, multiplier=3.0)
    assert EmbeddingAdjustment(other).identity("a") == EmbeddingAdjustment(SETTINGS).identity("b")
    lower = dataclasses.replace(SETTINGS, target=0.5)
    assert EmbeddingAdjustment(lower).identity("a") != EmbeddingAdjustment(SETTINGS).identity("a")


@pytest.mark.parametrize(
    ("key", "value"),
    [("target", -1.0), ("learning_rate", 0.0), ("iterations", 0), ("step", 50), ("latents", 0), ("seed", -1)],
)
def test_impossible_settings(key, value):
    with pytest.raises(ValueError, match=rf"WenSettings\.{key} is .*must be"):
        WenSettings(**{key: value})
