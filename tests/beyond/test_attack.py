import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from nemolib import deactivate, generate
from nemolib.beyond.attack import attacking, dori, images_of, latent_of, overlap
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.settings import GenerationSettings
from tests.beyond import by_hand
from tests.random_pipeline import WIDTHS

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
EVERY = NeuronSet(tuple(map(range, WIDTHS)))
SETTINGS = GenerationSettings(samples=2, steps=2, guidance=3.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_first_step_goes_down_the_loss_of_a_scheduler(kind):
    pipe = by_hand.small_pipeline(kind)
    y, draws = embed(pipe, ["a b"]), torch.Generator().manual_seed(5)
    found = dori(pipe, IMAGE, start="a b", steps=(0, 1), batch=3, learning_rate=0.1, seed=5)
    timesteps = torch.randint(1000, (3,), generator=draws)
    latent = latent_of(pipe, IMAGE).expand(3, -1, -1, -1)
    eps = torch.randn(latent.shape, generator=draws)
    x = pipe.scheduler.add_noise(latent, eps, timesteps)

    @torch.no_grad()
    def loss(y):
        output = pipe.unet(x, timesteps, y.expand(3, -1, -1)).sample
        if kind == "epsilon":
            return ((output - eps) ** 2).double().mean()
        # The error of the noise is sqrt(abar) times that of the velocity.
        error = output - pipe.scheduler.get_velocity(latent, eps, timesteps)
        return (pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1) * error**2).double().mean()

    assert found.losses[0] == pytest.approx(float(loss(y)), rel=1e-4)
    assert found.evaluations == 3 * 3
    assert torch.equal(found.embeddings[0], y[0])
    step = found.embeddings[1] - y[0]
    # Adam's first step has the gradient's sign alone, but where the gradient is next to none.
    assert step.abs().max() < 1.001 * 0.1
    assert (step.abs() > 0.99 * 0.1).float().mean() > 0.95
    for token in range(4):
        along = torch.zeros_like(y)
        along[0, token] = 0.05 * step[token].sign()
        assert loss(y + along) < loss(y - along)


def test_the_loss_falls_and_starts_seeds_and_neurons_count():
    pipe = by_hand.small_pipeline()
    before = by_hand.traces(pipe)
    found = dori(pipe, IMAGE, start="", steps=(40, 10), batch=4)
    assert np.mean(found.losses[-5:]) < np.mean(found.losses[:5])
    assert torch.equal(dori(pipe, IMAGE, start="", steps=(10,), batch=4).embeddings[0], found.embeddings[1])
    noise = [dori(pipe, IMAGE, steps=(0,), seed=seed).embeddings[0] for seed in (1, 2)]
    assert not torch.equal(*noise)
    assert abs(float(torch.stack(noise).std()) - 1) < 0.1
    with deactivate(pipe, EVERY), torch.inference_mode():
        assert dori(pipe, IMAGE, start="", steps=(1,), batch=4).losses[0] != found.losses[0]
    assert by_hand.traces(pipe) == before
    with pytest.raises(ValueError, match="none below 0"):
        dori(pipe, IMAGE, steps=(-1,))
    with pytest.raises(ValueError, match="float64; expected"):
        dori(pipe, IMAGE / 255)


def test_the_latent_is_what_the_pipeline_decodes():
    pipe = by_hand.small_pipeline()
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5).eval()
    pixels = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    torch.testing.assert_close(latent_of(pipe, IMAGE), 0.5 * pipe.vae.encode(pixels).latent_dist.mean)


def test_images_of_an_attack_on_the_repaired_model():
    pipe = by_hand.small_pipeline()
    expected = generate(pipe, ["a b"], settings=SETTINGS, progress=False)[0]
    np.testing.assert_array_equal(images_of(pipe, embed(pipe, ["a b"])[0], settings=SETTINGS), expected)
    attack = attacking(pipe, steps=(1, 2), settings=SETTINGS, batch=2)
    plain, off = attack([("a", IMAGE, "a", None, 3), ("a", IMAGE, "a", EVERY, 3)])
    with deactivate(pipe, EVERY):
        found = dori(pipe, IMAGE, start="a", steps=(1, 2), batch=2, seed=3)
        np.testing.assert_array_equal(off[1], images_of(pipe, found.embeddings[1], settings=SETTINGS))
    assert off.shape == (2, 2, 64, 64, 3)
    assert not np.array_equal(plain, off)


def test_overlap_counts_neurons_and_leaves_empty_layers_open():
    found = overlap(NeuronSet(((1, 2, 3), (), (4,))), NeuronSet(((2, 3, 4, 5), (), ())))
    np.testing.assert_array_equal(found, [2 / 5, np.nan, 0.0])
