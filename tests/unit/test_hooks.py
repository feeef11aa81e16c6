import pytest
import torch

from nemolib.hooks import collect_activations, deactivate, scale_neurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.value_layers import value_layers
from tests.random_pipeline import WIDTHS

FIRST = NeuronSet(((0, 2), (), (5,), (), (), (), (1,)))
SECOND = NeuronSet(((), (1,), (), (), (3,), (), (0,)))
LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def hooks_of(pipe):
    return sum(len(module._forward_hooks) for module in pipe.unet.modules())


def noise(pipe, latents=LATENTS, prompts=("a", "b c")):
    with torch.no_grad():
        return pipe.unet(latents, 961, embed(pipe, prompts)).sample


def values(pipe, prompts=("a", "b c")):
    """Return the output of every value layer for prompts."""
    embeddings = embed(pipe, prompts)
    with torch.no_grad():
        return [layer.module(embeddings) for layer in value_layers(pipe.unet)]


def test_deactivated_values_are_zero_and_others_stay(random_pipe):
    plain = values(random_pipe)
    with scale_neurons(random_pipe.unet, FIRST):
        scaled = values(random_pipe)
    for layer, (before, after) in enumerate(zip(plain, scaled, strict=True)):
        chosen = list(FIRST.layers[layer])
        others = [neuron for neuron in range(WIDTHS[layer]) if neuron not in chosen]
        assert (after[..., chosen] == 0).all()
        assert torch.equal(after[..., others], before[..., others])


def test_scaling_by_a_factor(random_pipe):
    plain = values(random_pipe)
    with scale_neurons(random_pipe.unet, FIRST, factor=-0.5):
        scaled = values(random_pipe)
    assert torch.equal(scaled[0][..., [0, 2]], plain[0][..., [0, 2]] * -0.5)
    with scale_neurons(random_pipe.unet, FIRST, factor=1.0):
        assert all(torch.equal(after, before) for after, before in zip(values(random_pipe), plain, strict=True))


def test_deactivation_changes_the_noise_and_ends(random_pipe):
    plain = noise(random_pipe)
    with deactivate(random_pipe, FIRST) as pipe:
        assert pipe is random_pipe
        assert (noise(pipe) - plain).abs().max() > 1e-4
    assert torch.equal(noise(random_pipe), plain)
    assert hooks_of(random_pipe) == 0


def test_one_set_per_sample(random_pipe):
    with scale_neurons(random_pipe.unet, [FIRST, SECOND]):
        both = noise(random_pipe)
    for row, neurons in enumerate((FIRST, SECOND)):
        with scale_neurons(random_pipe.unet, neurons):
            torch.testing.assert_close(both[row], noise(random_pipe)[row], atol=1e-5, rtol=0)


def test_sets_repeat_over_both_halves_of_guidance(random_pipe):
    latents, prompts = LATENTS.repeat(2, 1, 1, 1), ("", "", "a", "b c")
    with scale_neurons(random_pipe.unet, [FIRST, SECOND]):
        both = noise(random_pipe, latents, prompts)
    for row, neurons in enumerate((FIRST, SECOND, FIRST, SECOND)):
        with scale_neurons(random_pipe.unet, neurons):
            torch.testing.assert_close(both[row], noise(random_pipe, latents, prompts)[row], atol=1e-5, rtol=0)


def test_one_factor_per_sample(random_pipe):
    plain = values(random_pipe)
    with scale_neurons(random_pipe.unet, FIRST, factor=[0.0, 2.0]):
        scaled = values(random_pipe)
    assert (scaled[0][0, :, [0, 2]] == 0).all()
    assert torch.equal(scaled[0][1, :, [0, 2]], plain[0][1, :, [0, 2]] * 2)


def test_outputs_of_the_layer_are_not_changed_in_place(random_pipe):
    layer = value_layers(random_pipe.unet)[0].module
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with scale_neurons(random_pipe.unet, FIRST):
            values(random_pipe)
    finally:
        handle.remove()
    assert (seen[0][..., 0] != 0).any()


def test_contexts_nest(random_pipe):
    with scale_neurons(random_pipe.unet, FIRST):
        with scale_neurons(random_pipe.unet, SECOND):
            nested = values(random_pipe)
        assert hooks_of(random_pipe) == sum(count > 0 for count in FIRST.counts)
    with scale_neurons(random_pipe.unet, FIRST | SECOND):
        joint = values(random_pipe)
    assert all(torch.equal(a, b) for a, b in zip(nested, joint, strict=True))


def test_collected_activations(random_pipe):
    with collect_activations(random_pipe.unet) as collected:
        noise(random_pipe)
        noise(random_pipe)
    assert [len(outputs) for outputs in collected] == [2] * 7
    assert all(torch.equal(outputs[0], plain) for outputs, plain in zip(collected, values(random_pipe), strict=True))
    assert hooks_of(random_pipe) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    ("context", "hooks"),
    [
        (lambda pipe: deactivate(pipe, FIRST), 3),
        (lambda pipe: scale_neurons(pipe.unet, [FIRST, SECOND]), 5),
        (lambda pipe: collect_activations(pipe.unet), 7),
    ],
)
def test_no_hook_is_left_whatever_happens(random_pipe, error, context, hooks):
    def fail():
        assert hooks_of(random_pipe) == hooks
        raise error

    with pytest.raises(error), context(random_pipe):
        fail()
    assert hooks_of(random_pipe) == 0


def test_no_hook_is_left_when_the_model_is_interrupted_in_a_pass(random_pipe, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(random_pipe.unet.mid_block, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt), deactivate(random_pipe, FIRST):
        random_pipe("a", num_inference_steps=2, output_type="latent")
    assert hooks_of(random_pipe) == 0


def test_hooks_of_others_stay(random_pipe):
    layer = value_layers(random_pipe.unet)[0].module
    handle = layer.register_forward_hook(lambda module, args, output: None)
    try:
        with deactivate(random_pipe, FIRST):
            pass
        assert hooks_of(random_pipe) == 1
    finally:
        handle.remove()


def test_a_set_that_does_not_fit_leaves_no_hook(random_pipe):
    wrong = NeuronSet(((0,), (), (), (), (), (), (99,)))
    with pytest.raises(ValueError, match="neuron 99 of layer 6 does not exist"), deactivate(random_pipe, wrong):
        pytest.fail("the context was entered")
    with pytest.raises(ValueError, match="has 2 layers, the model has 7"):
        scale_neurons(random_pipe.unet, NeuronSet.empty(2)).__enter__()
    assert hooks_of(random_pipe) == 0


def test_lists_that_do_not_fit(random_pipe):
    with pytest.raises(ValueError, match="no neuron set was given"):
        scale_neurons(random_pipe.unet, []).__enter__()
    with pytest.raises(ValueError, match="2 neuron sets but 3 factors"):
        scale_neurons(random_pipe.unet, [FIRST, SECOND], factor=[0.0, 1.0, 2.0]).__enter__()
    with pytest.raises(TypeError, match="expected a NeuronSet or a list of them"):
        scale_neurons(random_pipe.unet, [(0, 1)]).__enter__()
    with (
        pytest.raises(ValueError, match="3 neuron sets were given for a batch of 2"),
        scale_neurons(random_pipe.unet, [FIRST, SECOND, FIRST]),
    ):
        noise(random_pipe)
    assert hooks_of(random_pipe) == 0
