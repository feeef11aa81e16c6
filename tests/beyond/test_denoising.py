import pytest
import torch
from diffusers import DDIMScheduler

from nemolib.beyond.denoising import Denoising, attention_seen, noise_of, output_of, text_of
from nemolib.layers import attention_layers
from nemolib.pipeline import embed, load_pipeline
from tests.beyond import by_hand
from tests.narrow_architecture import save_narrow_architecture


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_what_a_model_predicts_is_converted_for_each_sample_and_back(kind):
    scheduler, (image, eps) = DDIMScheduler(prediction_type=kind), torch.randn(2, 2, 4, 8, 8)
    timesteps = torch.tensor([100, 900])
    x, velocity = scheduler.add_noise(image, eps, timesteps), scheduler.get_velocity(image, eps, timesteps)
    output = {"v_prediction": velocity, "sample": image}[kind]
    torch.testing.assert_close(noise_of(scheduler, output, x, timesteps), eps, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output_of(scheduler, eps, x, timesteps), output, atol=1e-4, rtol=1e-4)


def test_the_end_token_of_short_and_long_prompts():
    pipe = by_hand.small_pipeline()
    ids = pipe.tokenizer("a b", padding="max_length").input_ids
    assert text_of(pipe, "a b").end == ids.index(pipe.tokenizer.eos_token_id) == 3
    assert text_of(pipe, "a " * 50).end == pipe.tokenizer.model_max_length - 1


def test_attention_is_seen_as_diffusers_computes_it_and_the_layers_are_as_before():
    pipe = by_hand.small_pipeline()
    x, embedding, names = by_hand.start(pipe), embed(pipe, ["a"]), attention_layers(pipe.unet)
    before, model = by_hand.traces(pipe), Denoising(pipe)
    with attention_seen(pipe, names, lambda weights: weights) as seen:
        torch.testing.assert_close(model.noise(x, 961, embedding), by_hand.noise(pipe, x, 961, embedding))
        with pytest.raises(ValueError, match="attention processor OpenAttention"), attention_seen(pipe, names, len):
            pass
    torch.testing.assert_close(seen, dict(zip(names, by_hand.attention(pipe, x, 961, "a").values(), strict=True)))
    with pytest.raises(ZeroDivisionError), attention_seen(pipe, names, lambda weights: 1 / 0):
        model.noise(x, 961, embedding)
    assert by_hand.traces(pipe) == before


def test_layers_of_stable_diffusion_come_in_the_order_of_an_image(tmp_path):
    unet = load_pipeline(f"random:{save_narrow_architecture(tmp_path)}", device="cpu").unet
    names = attention_layers(unet)
    assert [name.split("_")[0] for name in names] == ["down"] * 6 + ["mid"] + ["up"] * 9
    assert attention_layers(unet, ("down", "mid")) == names[:7]
