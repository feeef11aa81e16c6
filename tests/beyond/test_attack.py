import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from nemolib import DeactivatedNeurons, activation_statistics, deactivate, generate, localize
from nemolib.beyond.attack import attacking, dori, drawing_found, latent_of, localizing_found, overlap, standing_for
from nemolib.localization import Localization
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.provenance import model_hash
from nemolib.settings import DetectionSettings, GenerationSettings, SearchSettings, SimilaritySettings
from tests.beyond import by_hand
from tests.random_pipeline import WIDTHS

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
EVERY, NONE = NeuronSet(tuple(map(range, WIDTHS))), NeuronSet.empty(len(WIDTHS))
SETTINGS = GenerationSettings(samples=2, steps=2, guidance=3.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_first_step_goes_down_the_loss_of_a_scheduler(kind):
    pipe = by_hand.small_pipeline(kind)
    y, draws = embed(pipe, ["a b"]), torch.Generator().manual_seed(5)
    found = dori(pipe, [IMAGE], starts=["a b"], steps=(0, 1), batch=3, learning_rate=0.1, seeds=[5])
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

    assert found.losses[0, 0] == pytest.approx(float(loss(y)), rel=1e-4)
    assert found.evaluations == 3 * 3
    assert torch.equal(found.embeddings[0], y)
    step = found.embeddings[1, 0] - y[0]
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
    found = dori(pipe, [IMAGE], starts=[""], steps=(40, 10), batch=4)
    assert np.mean(found.losses[-5:]) < np.mean(found.losses[:5])
    assert torch.equal(dori(pipe, [IMAGE], starts=[""], steps=(10,), batch=4).embeddings[0], found.embeddings[1])
    noise = dori(pipe, [IMAGE] * 2, steps=(0,), seeds=(1, 2)).embeddings[0]
    assert not torch.equal(*noise)
    assert abs(float(noise.std()) - 1) < 0.1
    with deactivate(pipe, EVERY), torch.inference_mode():
        assert dori(pipe, [IMAGE], starts=[""], steps=(1,), batch=4).losses[0] != found.losses[0]
    assert by_hand.traces(pipe) == before
    with pytest.raises(ValueError, match="none below 0"):
        dori(pipe, [IMAGE], steps=(-1,))
    with pytest.raises(ValueError, match="2 images, 1 starts, 2 seeds"):
        dori(pipe, [IMAGE] * 2, starts=["a"])
    with pytest.raises(ValueError, match="float64; expected"):
        dori(pipe, [IMAGE / 255])


def test_the_latent_is_what_the_pipeline_decodes():
    pipe = by_hand.small_pipeline()
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5).eval()
    pixels = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    torch.testing.assert_close(latent_of(pipe, IMAGE), 0.5 * pipe.vae.encode(pixels).latent_dist.mean)


def test_images_that_are_attacked_together_are_attacked_as_alone():
    pipe = by_hand.small_pipeline()
    attack = attacking(pipe, steps=(1, 3), batch=2, learning_rate=0.1)
    other = np.ascontiguousarray(IMAGE[::-1])
    items = [("a", IMAGE, "a", None, 3), ("a", IMAGE, None, EVERY, 4), ("b", other, "", None, 5)]
    together = attack(items)
    for item, found in zip(items, together, strict=True):
        assert found.shape == (2, *embed(pipe, ["a"]).shape[1:])
        np.testing.assert_allclose(attack([item])[0], found, atol=1e-3)
    with deactivate(pipe, EVERY):
        alone = dori(pipe, [IMAGE], steps=(1, 3), batch=2, seeds=[4]).embeddings[:, 0].numpy()
    np.testing.assert_allclose(alone, together[1], atol=1e-3)
    plain = dori(pipe, [IMAGE], steps=(1, 3), batch=2, seeds=[4]).embeddings[:, 0].numpy()
    assert np.abs(plain - together[1]).max() > 0.05


def test_a_prompt_stands_for_an_embedding():
    pipe = by_hand.small_pipeline()
    first, second = embed(pipe, ["a b", "b"])
    before = by_hand.traces(pipe)
    with standing_for(pipe, {"x": first, "y": second}):
        assert torch.equal(embed(pipe, ["y", "x", "b", "a"]), torch.stack([second, first, *embed(pipe, ["b", "a"])]))
        with pytest.raises(ValueError, match="cannot be kept"):
            model_hash(pipe)
        with standing_for(pipe, {"z": first}):
            assert torch.equal(embed(pipe, ["z", "y"]), torch.stack([first, second]))
        assert torch.equal(embed(pipe, ["y"])[0], second)
    assert by_hand.traces(pipe) == before
    assert not torch.equal(embed(pipe, ["x"])[0], first)
    expected = generate(pipe, ["a b", "b"], settings=SETTINGS, mitigation=DeactivatedNeurons({"a b": EVERY, "b": NONE}), progress=False)  # fmt: skip
    items = [("a", first.numpy(), DeactivatedNeurons(EVERY)), ("a", second.numpy(), None)]
    np.testing.assert_array_equal(drawing_found(pipe, settings=SETTINGS)(items), expected)


def test_the_neurons_of_an_embedding_are_those_of_its_prompt():
    pipe = by_hand.small_pipeline()
    statistics = activation_statistics(pipe, ["a", "b", "a b"], progress=False)
    given = {"statistics": statistics, "threshold": -0.9, "search": SearchSettings(theta_start=1.0, theta_min=0.5)}
    given |= {"detection": DetectionSettings(samples=2), "protocol": "paper"}
    given |= {"similarity": SimilaritySettings(kernel_size=3, sigma=0.9)}
    expected = localize(pipe, "a b", **given)
    assert expected.memorized
    items = [("c", embed(pipe, [prompt])[0].numpy()) for prompt in ("a b", "b")]
    found = dict(localizing_found(pipe, **given)(items))
    record, other = found[0], found[1]
    assert Localization.from_record(record).neurons == expected.neurons
    assert Localization.from_record(other).unblocked_score != expected.unblocked_score


def test_overlap_counts_neurons_and_leaves_empty_layers_open():
    found = overlap(NeuronSet(((1, 2, 3), (), (4,))), NeuronSet(((2, 3, 4, 5), (), ())))
    np.testing.assert_array_equal(found, [2 / 5, np.nan, 0.0])
