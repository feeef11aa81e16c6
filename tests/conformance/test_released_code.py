"""Protocol `released` against the authors' code: same numbers, same neurons."""

import ast
import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from nemolib import paths, seeding
from nemolib.first_step import FirstStep, timestep_of
from nemolib.holdout import ActivationStatistics, statistics_of, z_scores
from nemolib.layers import collect_activations, value_activations, widths
from nemolib.localization import Search, Variant
from nemolib.neurons import NeuronSet
from nemolib.selection import out_of_distribution
from nemolib.settings import PAPER, RELEASED, SearchSettings, SimilaritySettings
from nemolib.similarity import max_pairwise, pair_similarities, pairwise
from tools.sd14_data import load_released

FILES = {
    "1_compute_activations_statistics.py", "2_compute_pairwise_ssim.py", "3_detect_memorized_neurons.py", "4_generate_images.py",
    "hooks/block_activations.py", "hooks/collect_activations.py", "hooks/deactivation_context.py",
    "metrics/compute_diversity.py", "metrics/compute_prompt_alignment.py", "metrics/compute_sscd_gen.py",
    "metrics/compute_sscd_orig.py", "utils/activation_detection.py", "utils/datasets.py", "utils/stable_diffusion.py",
}  # fmt: skip
"""The authors' code."""

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = range(1, 7)
KEPT_SAMPLES = [0, 9]
SMALL_WINDOW = SimilaritySettings(kernel_size=3, sigma=0.5)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "tensors.safetensors")


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(GOLDEN / "unet").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def statistics():
    return load_released(GOLDEN / "statistics.pt")


@pytest.fixture(scope="module")
def step(unet, golden):
    """Return a function (latent size, guidance) -> the first step of protocol `released`."""
    scheduler = DDIMScheduler.from_pretrained(GOLDEN / "scheduler")

    def make(size, guidance):
        return FirstStep(
            unet,
            timestep_of(scheduler, steps=50, index=RELEASED.timestep_index),
            seeding.latents((4, size, size), samples=10, seed=1),
            guidance=guidance,
            unconditional=golden["embeddings"][:1],
            swap_guidance=RELEASED.swap_guidance,
        )

    return make


def embedding(golden, prompt):
    return golden["embeddings"][prompt : prompt + 1]


def layers(golden, name):
    return tuple(golden[f"{name}.{layer}"] for layer in range(7))


def close(actual, desired, tolerance=TOLERANCE):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(desired), atol=tolerance, rtol=0)


def test_latents_are_those_of_one_generator(golden):
    latents = seeding.latents((4, 64, 64), samples=10, seed=1)
    assert torch.equal(latents[KEPT_SAMPLES], golden["latents_seed1"])


def test_timestep_is_the_second_of_the_schedule():
    scheduler = DDIMScheduler.from_pretrained(GOLDEN / "scheduler")
    assert timestep_of(scheduler, steps=50, index=RELEASED.timestep_index) == 961
    assert timestep_of(scheduler, steps=50, index=PAPER.timestep_index) == 981


@pytest.mark.parametrize("guidance", [0, 7])
@pytest.mark.parametrize("prompt", [1, 2])
@pytest.mark.parametrize("blocked", [False, True])
def test_noise_differences(step, golden, expected, guidance, prompt, blocked):
    neurons = NeuronSet(expected["blocked"]) if blocked else None
    name = f"noise_diff{'_blocked' if blocked else ''}.g{guidance}.p{prompt}"
    differences = step(64, guidance)(embedding(golden, prompt), neurons=neurons, seeds=KEPT_SAMPLES)
    close(differences, golden[name])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_activations_from_the_text_alone(unet, golden, prompt):
    activations = value_activations(unet, embedding(golden, prompt))
    for actual, desired in zip(activations, layers(golden, f"activation.p{prompt}"), strict=True):
        close(actual[0], desired)


def test_activations_from_a_unet_pass_are_the_same(unet, step, golden):
    with collect_activations(unet) as collected:
        step(16, 0)(embedding(golden, 1), seeds=[0])
    for outputs, desired in zip(collected, layers(golden, "activation.p1"), strict=True):
        close(outputs[0][0].abs().mean(dim=0), desired)


@pytest.mark.parametrize("batch_size", [64, 7])
def test_statistics(unet, golden, statistics, batch_size):
    found = statistics_of(unet, golden["holdout_embeddings"].split(batch_size))
    assert found.count == 64
    for name in ("mean", "std"):
        for place, computed in enumerate(getattr(found, name)):
            close(computed, golden[f"holdout_{name}.{place}"])
            close(computed, getattr(statistics, name)[place])


def test_released_statistics_fit_the_model(unet, statistics):
    assert isinstance(statistics, ActivationStatistics)
    assert statistics.widths == widths(unet) == (8, 8, 16, 16, 24, 24, 24)
    statistics.check(unet)


def test_largest_pairwise_similarity_of_each_seed(step, golden):
    differences = step(64, 0)(embedding(golden, 1))
    close(max_pairwise(pairwise(differences)), golden["max_pairwise_ssim.p1"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_largest_pairwise_similarity_of_small_latents(step, golden, prompt):
    differences = step(16, 0)(embedding(golden, prompt))
    matrix = pairwise(differences, settings=SMALL_WINDOW)
    close(max_pairwise(matrix), golden[f"det16.max_pairwise_ssim.p{prompt}"])


def test_similarity_of_all_pairs(step, golden):
    differences = step(64, 7)(embedding(golden, 6))
    close(pair_similarities(differences), golden["script2_pairwise_ssim"][5])


@pytest.mark.parametrize("name", sorted(json.loads((GOLDEN / "expected.json").read_text())["selection"]))
def test_out_of_distribution_neurons(golden, expected, statistics, name):
    prompt, rest = name.split(".theta")
    theta, k = rest.rsplit(".k", 1)
    activations = layers(golden, f"activation.{prompt}")
    z = z_scores(statistics, activations)
    theta = math.inf if theta == "inf" else float(theta)
    candidates = out_of_distribution(z, activations, theta=theta, top_k=int(k))
    assert [list(layer) for layer in candidates.entries(double=True)] == expected["selection"][name]
    assert candidates.neurons == NeuronSet(expected["selection"][name])


def detection_cases():
    for run in ("a", "b"):
        with (GOLDEN / f"detection_{run}.csv").open(newline="") as file:
            for row in csv.DictReader(file, delimiter=";"):
                yield pytest.param(run, row, id=f"{run}-{row['Caption']}")


@pytest.mark.parametrize("method", ["sequential", "fast"])
@pytest.mark.parametrize(("run", "row"), list(detection_cases()))
def test_neurons_of_the_search(step, golden, expected, statistics, run, row, method):
    """One by one they are those of the release; in groups, at least those that it starts from."""
    settings = expected["detection"][run]
    threshold, text = settings["threshold"], embedding(golden, int(row["Caption"].split()[1]) + 1)
    chosen = {"similarity": SMALL_WINDOW, "search": SearchSettings(method=method), "protocol": RELEASED}
    first = Search(step(settings["latent_size"], 0), text, statistics, gate=settings["gate"], **chosen)
    found = first.localize(Variant("", threshold, threshold))
    assert found.initial == NeuronSet(ast.literal_eval(row["Initial Neurons"]))
    close(found.initial_score, float(row["Initial SSIM"]))
    assert found.reached == (float(row["Initial SSIM"]) <= threshold)
    if method == "sequential":
        assert found.neurons == NeuronSet(ast.literal_eval(row["Refined Neurons"]))
        close(found.refined_score, float(row["Refined SSIM"]))
    else:
        target = threshold if found.reached else found.initial_score
        assert found.refined_score < target or found.neurons == found.initial


def test_files_that_are_named_as_sources_are_those_of_the_authors_code():
    texts = [path.read_text(encoding="utf-8") for path in paths.PACKAGE.rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"\b(?:[1-4]_|(?:hooks|metrics|utils)/)\w+\.py", text)}
    assert "utils/activation_detection.py" in named
    assert named <= FILES
