"""What holds for every mitigation."""

import numpy as np
import pytest
import torch

from nemolib import experiments
from nemolib.generation import generate
from nemolib.mitigation import AttentionScaling, DeactivatedNeurons, EmbeddingAdjustment, Mitigation, RandomTokens
from nemolib.neurons import NeuronSet
from nemolib.profiles import ProfileError, load_profile, profile_from_mapping
from nemolib.provenance import content_hash
from nemolib.settings import GenerationSettings, WenSettings
from tests.random_pipeline import WIDTHS

SETTINGS = GenerationSettings(seed=2, samples=2, steps=2, guidance=3.0, batch_size=4)
PROMPTS = ["a", "b c"]
WEN = WenSettings(target=0.0, iterations=2, latents=2, learning_rate=0.5)
SETS = {"a": NeuronSet.full(WIDTHS), "b c": NeuronSet.of([(0, 1), (6, 3)], layers=7)}
MITIGATIONS = [
    DeactivatedNeurons(SETS),
    DeactivatedNeurons(SETS["a"], factor=-1.0),
    EmbeddingAdjustment(WEN),
    AttentionScaling(),
    RandomTokens(1),
    RandomTokens(4),
]
EACH = pytest.mark.parametrize("mitigation", MITIGATIONS, ids=lambda mitigation: mitigation.name)


def same(first, second):
    """Whether images agree up to one level of grey; sums in a batch of another size round otherwise."""
    return np.abs(first.astype(int) - second.astype(int)).max() <= 1


def state(pipe):
    """Return what a mitigation could leave behind."""
    hooks = [name for name, module in pipe.unet.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    flags = [parameter.requires_grad for part in parts for parameter in part.parameters()]
    gradients = [parameter.grad for part in parts for parameter in part.parameters()]
    weights = content_hash([dict(part.state_dict()) for part in parts])
    return hooks, {name: id(item) for name, item in pipe.unet.attn_processors.items()}, flags, gradients, weights


@pytest.fixture(scope="module")
def plain(random_pipe):
    return generate(random_pipe, PROMPTS, settings=SETTINGS, progress=False)


def test_the_interface_cannot_be_used_alone():
    with pytest.raises(TypeError, match="abstract"):
        Mitigation()


@EACH
def test_images_change_and_do_not_depend_on_the_batch(random_pipe, plain, mitigation):
    together = generate(random_pipe, PROMPTS, settings=SETTINGS, mitigation=mitigation, progress=False)
    assert not same(together, plain)
    for batch_size in (1, 3):
        other = GenerationSettings(seed=2, samples=2, steps=2, guidance=3.0, batch_size=batch_size)
        for row, prompt in enumerate(PROMPTS):
            alone = generate(random_pipe, [prompt], settings=other, mitigation=mitigation, progress=False)
            assert same(alone[0], together[row])
    assert same(generate(random_pipe, PROMPTS, settings=SETTINGS, progress=False), plain)


@EACH
def test_without_guidance_and_with_repetitions(random_pipe, mitigation):
    settings = GenerationSettings(seed=2, samples=1, steps=2, guidance=0.0)
    images = generate(random_pipe, ["a", "b c", "a"], settings=settings, mitigation=mitigation, progress=False)
    assert same(images[0], images[2])
    assert not same(images, generate(random_pipe, ["a", "b c", "a"], settings=settings, progress=False))


@EACH
def test_a_user_can_call_the_pipeline_alone(random_pipe, mitigation):
    with mitigation.applied(random_pipe, ["a", "a"]) as inputs:
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
        images = random_pipe(**inputs, latents=latents, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 64, 64, 3)
    np.testing.assert_allclose(images[0], images[1], atol=1e-4)


@EACH
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_as_before_whatever_happens(random_pipe, mitigation, failure):
    before = state(random_pipe)

    def run():
        with mitigation.applied(random_pipe, PROMPTS) as inputs:
            random_pipe(**inputs, num_inference_steps=1, output_type="latent")
            raise failure("stop")

    with pytest.raises(failure, match="stop"):
        run()
    assert state(random_pipe) == before


@EACH
def test_identity_is_plain_and_tells_mitigations_apart(mitigation):
    keys = [content_hash(other.identity("a")) for other in MITIGATIONS]
    assert keys.count(content_hash(mitigation.identity("a"))) == 1
    assert mitigation.identity("a")
    assert mitigation.source
    assert mitigation.name


@EACH
def test_pipelines_and_prompts_that_cannot_be_handled(random_pipe, mitigation):
    class Two:
        unet = text_encoder = tokenizer = text_encoder_2 = object()

    for pipe, words in ((object(), "has no unet"), (Two(), "more than one text encoder")):
        with pytest.raises(ValueError, match=words):
            mitigation.check(pipe)
    with pytest.raises(ValueError, match="prompt 1 is ' '"), mitigation.applied(random_pipe, ["a", " "]):
        pass
    with pytest.raises(TypeError, match="one prompt was given"), mitigation.applied(random_pipe, "a"):
        pass


def test_neurons_and_a_mitigation_exclude_each_other(random_pipe):
    chosen = {"neurons": SETS["a"], "mitigation": RandomTokens(1)}
    with pytest.raises(ValueError, match="both neurons and a mitigation \\(1 random token\\)"):
        generate(random_pipe, ["a"], settings=SETTINGS, **chosen)
    with pytest.raises(ValueError, match="both neurons and a mitigation"):
        experiments.images(random_pipe, "tiny", ["a"], settings=SETTINGS, **chosen)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_store_folder", lambda profile: tmp_path)
    return lambda: len(list((tmp_path / "images").glob("*")))


def test_images_of_a_mitigation_are_kept(random_pipe, plain, store, monkeypatch):
    def images(**options):
        return experiments.images(random_pipe, "tiny", PROMPTS, settings=SETTINGS, progress=False, **options)

    assert same(images(), plain)
    made = [images(mitigation=mitigation) for mitigation in MITIGATIONS]
    for mitigation, found in zip(MITIGATIONS, made, strict=True):
        assert same(found, generate(random_pipe, PROMPTS, settings=SETTINGS, mitigation=mitigation, progress=False))
    assert store() == 2 * (1 + len(MITIGATIONS))
    monkeypatch.setattr(experiments, "generate", None)
    assert all(np.array_equal(images(mitigation=m), found) for m, found in zip(MITIGATIONS, made, strict=True))
    assert np.array_equal(images(neurons=[SETS[prompt] for prompt in PROMPTS]), made[0])
    nothing = DeactivatedNeurons(NeuronSet.empty(7))
    assert np.array_equal(images(mitigation=nothing), images())


def test_nothing_is_kept_while_a_mitigation_is_applied(random_pipe):
    for mitigation in MITIGATIONS[0], AttentionScaling():
        with mitigation.applied(random_pipe, PROMPTS), pytest.raises(ValueError, match="results are kept while"):
            experiments.model_hash(random_pipe)


def test_settings_are_in_the_profile():
    chosen = load_profile("tiny").mitigation
    assert chosen.wen.target is None
    assert chosen.wen.steps == load_profile("tiny").generation.steps
    assert (chosen.ren.c1, chosen.ren.mask) == (1.25, "padding")
    assert (chosen.somepalli.numbers, chosen.random.repeats) == ((1, 4, 10), 5)
    seeds = {chosen.wen.seed, chosen.somepalli.seed, chosen.random.seed}
    assert len(seeds | {load_profile("tiny").generation.seed, load_profile("tiny").detection.seed}) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ren": {"mask": "all"}}, "mitigation.ren.mask': expected one of padding, summary, none, got 'all'"),
        ({"ren": {"c1": -1}}, "mitigation.ren'.*c1 is -1.0; it must be a finite number of at least 0"),
        ({"somepalli": {"numbers": [1, 0]}}, "mitigation.somepalli'.*integers of at least 1"),
        ({"random": {"repeats": 0}}, "mitigation.random'.*repeats is 0"),
        ({"wen": {"goal": 3}}, "unknown key mitigation.wen.goal = 3"),
    ],
)
def test_a_bad_value_in_a_profile_is_named(change, words):
    prompts = dict.fromkeys(("memorized", "unmemorized", "holdout"), "x.csv")
    with pytest.raises(ProfileError, match=words):
        profile_from_mapping({"name": "x", "model": "a/b", "prompts": prompts, "mitigation": change})
