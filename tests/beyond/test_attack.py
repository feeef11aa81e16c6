import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from nemolib import deactivate, generate
from nemolib.beyond.attack import attacking, dori, images_of, latent_of, overlap
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.provenance import code_hash, content_hash
from nemolib.settings import GenerationSettings
from tests.beyond import by_hand
from tests.random_pipeline import WIDTHS

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
EVERY = NeuronSet(tuple(map(range, WIDTHS)))
SETTINGS = GenerationSettings(samples=2, steps=2, guidance=3.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_first_step_goes_down_the_loss_of_a_scheduler(kind):
    pipe = by_hand.small_pipeline(kind)
    batch, rate, y = 3, 0.1, embed(pipe, ["a b"])
    found = dori(pipe, IMAGE, start="a b", steps=(0, 1), batch=batch, learning_rate=rate, seed=5)
    draws = torch.Generator().manual_seed(5)
    timesteps = torch.randint(1000, (batch,), generator=draws)
    latent = latent_of(pipe, IMAGE).expand(batch, -1, -1, -1)
    eps = torch.randn(latent.shape, generator=draws)
    x = pipe.scheduler.add_noise(latent, eps, timesteps)

    @torch.no_grad()
    def loss(y):
        output = pipe.unet(x, timesteps, y.expand(batch, -1, -1)).sample
        if kind == "epsilon":
            return ((output - eps) ** 2).double().mean()
        # The error of the noise is sqrt(abar) times that of the velocity.
        error = output - pipe.scheduler.get_velocity(latent, eps, timesteps)
        return (pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1) * error**2).double().mean()

    assert found.losses[0] == pytest.approx(float(loss(y)), rel=1e-4)
    assert torch.equal(found.embeddings[0], y[0])
    step = found.embeddings[1] - y[0]
    # Adam's first step has the gradient's sign alone, but where the gradient is next to none.
    assert step.abs().max() < 1.001 * rate
    assert (step.abs() > 0.99 * rate).float().mean() > 0.95
    for token in range(4):
        unit = torch.zeros_like(y)
        unit[0, token, torch.arange(16)] = step[token].sign()
        assert loss(y + 0.05 * unit) < loss(y - 0.05 * unit)
    assert found.evaluations == 3 * batch


def test_the_loss_falls_and_starts_and_seeds_count():
    pipe = by_hand.small_pipeline()
    before = by_hand.traces(pipe)
    found = dori(pipe, IMAGE, start="", steps=(40, 10), batch=4)
    assert np.mean(found.losses[-5:]) < np.mean(found.losses[:5])
    assert torch.equal(dori(pipe, IMAGE, start="", steps=(10,), batch=4).embeddings[0], found.embeddings[1])
    noise = [dori(pipe, IMAGE, steps=(0,), seed=seed).embeddings[0] for seed in (1, 2)]
    assert not torch.equal(*noise)
    assert abs(float(torch.stack(noise).std()) - 1) < 0.1
    with deactivate(pipe, EVERY):
        repaired = dori(pipe, IMAGE, start="", steps=(1,), batch=4)
        with torch.inference_mode():
            assert dori(pipe, IMAGE, start="", steps=(1,), batch=4).losses == repaired.losses
    assert repaired.losses[0] != found.losses[0]
    assert by_hand.traces(pipe) == before


@pytest.mark.parametrize(
    ("image", "steps", "message"),
    [(IMAGE[0], (1,), r"image of shape \[64, 3\]"), (IMAGE / 255, (1,), "float64"), (IMAGE, (), "at least one"), (IMAGE, (-1,), "none below 0")],
)
def test_bad_inputs(image, steps, message):
    with pytest.raises(ValueError, match=message):
        dori(by_hand.small_pipeline(), image, steps=steps)


def test_the_latent_is_what_the_pipeline_decodes():
    pipe = by_hand.small_pipeline()
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5).eval()
    pixels = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    expected = 0.5 * pipe.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(latent_of(pipe, IMAGE), expected)


def test_images_of_a_prompts_embedding_are_those_of_the_prompt():
    pipe = by_hand.small_pipeline()
    expected = generate(pipe, ["a b"], settings=SETTINGS, progress=False)[0]
    np.testing.assert_array_equal(images_of(pipe, embed(pipe, ["a b"])[0], settings=SETTINGS), expected)


def test_the_task_attacks_the_repaired_model():
    pipe = by_hand.small_pipeline()
    attack = attacking(pipe, steps=(1, 2), settings=SETTINGS, batch=2)
    (plain, off) = attack([("a", IMAGE, "a", None, 3), ("a", IMAGE, "a", EVERY, 3)])
    with deactivate(pipe, EVERY):
        found = dori(pipe, IMAGE, start="a", steps=(1, 2), batch=2, seed=3)
        np.testing.assert_array_equal(off[1], images_of(pipe, found.embeddings[1], settings=SETTINGS))
    assert off.shape == (2, 2, 64, 64, 3)
    assert not np.array_equal(plain, off)
    assert len(code_hash(attacking)) == len(content_hash(("a", IMAGE, None, EVERY, 3))) == 64
    assert by_hand.traces(pipe)[0] == []


def test_overlap_counts_neurons_and_leaves_empty_layers_open():
    first, second = NeuronSet(((1, 2, 3), (), (4,))), NeuronSet(((2, 3, 4, 5), (), ()))
    assert overlap(first, second)[::2] == (2 / 5, 0.0)
    assert np.isnan(overlap(first, second)[1])
