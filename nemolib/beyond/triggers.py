"""Which words trigger a memorized image: the weight of each token of a prompt, and a search for prompts that do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from nemolib.batching import accumulated_gradient, shrinking
from nemolib.beyond.denoising import Denoising, norms, text_of
from nemolib.first_step import initial_latents
from nemolib.pipeline import embed
from nemolib.seeding import stream

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@torch.inference_mode(False)
@torch.enable_grad()
def token_significance(
    pipe: StableDiffusionPipeline, prompt: str, *, samples: int = 4, seed: int = 1, steps: int = 50
) -> pd.DataFrame:
    """Return how much each token of a prompt could lower the guidance norm: the norm of its gradient at the first step.

    Source: Wen et al. (ICLR 2024), token-wise significance; YuxinWenRick/diffusion_memorization, no licence; written
        from the formula. The first token, the end token and the padding are left out, as in their plot.

    Args:
        pipe: A StableDiffusionPipeline.
        prompt: The prompt.
        samples: Initial latents over which the norm is averaged; seed is theirs.
        steps: Denoising steps of the schedule.

    Returns:
        Columns token (its text) and significance, in the order of the prompt.
    """
    model, text = Denoising(pipe, steps=steps), text_of(pipe, prompt)
    latents = initial_latents(pipe, samples=samples, seed=seed)
    free = text.embedding.float().clone().requires_grad_()
    _, gradient = accumulated_gradient(
        lambda part: norms(model.difference(part, model.timesteps[0], free, derivative=True)),
        latents, free, owner=pipe.unet, use="token significance", weight=1 / samples,
    )  # fmt: skip
    inner = slice(1, text.end)
    tokens = [pipe.tokenizer.decode([each]).strip() for each in pipe.tokenizer(prompt).input_ids[inner]]
    return pd.DataFrame({"token": tokens, "significance": gradient[0, inner].norm(dim=1).tolist()})


@torch.no_grad()
def search_triggers(
    pipe: StableDiffusionPipeline,
    vocabulary: Sequence[str],
    *,
    length: int = 8,
    iterations: int = 150,
    proposals: int = 200,
    temperature: float = 0.1,
    seed: int = 0,
    steps: int = 50,
    batch: int = 32,
) -> pd.DataFrame:
    """Search for prompts that move the predicted noise far, over the words of a vocabulary (Gibbs sampling).

    In each iteration one position of the sentence is drawn anew: words are proposed for it, each sentence is scored,
    and one is drawn with probability softmax(score / temperature). Nothing is said of what was planted.

    Source: Hong et al., MemBench (TMLR 2025, arXiv 2407.17095): squared guidance norm of one x_T at the first timestep,
        8 words, 150 iterations, 200 proposals, temperature 0.1; chunsanHong/MemBench_code, no licence; written from the
        text.
    Deviates: proposals are drawn from a vocabulary, where they take BERT's 200 most probable words; a position may stay
        empty, so that shorter prompts are found too. Scores of smaller latents are smaller: the temperature is not
        scaled.

    Args:
        pipe: A StableDiffusionPipeline.
        vocabulary: Words.
        length: Positions of the sentence.
        iterations: How often a position is drawn anew.
        proposals: How many words are tried for it.
        temperature: Of the draw, in units of the score.
        seed: Seed of sentence and draws, and of x_T; another seed is another search.
        steps: Denoising steps of the schedule whose first timestep is taken.
        batch: Sentences in one UNet pass.

    Returns:
        Every sentence that was scored, in order: columns prompt, score, evaluations (UNet sample-evaluations until its
        score was known), iteration.

    Raises:
        ValueError: The vocabulary has no word, or a number is below 1.
    """
    words, numbers = np.array(["", *dict.fromkeys(vocabulary)]), stream(seed, "triggers")
    if len(words) < 2 or min(length, iterations, proposals) < 1 or temperature <= 0:
        raise ValueError("a search needs words, length, iterations and proposals of at least 1, a temperature above 0")
    model = Denoising(pipe, steps=steps)
    latents = initial_latents(pipe, samples=1, seed=seed)
    empty = model.noise(latents, model.timesteps[0], model.empty)
    known: dict[str, float] = {}
    rows: list[tuple[str, float, int, int]] = []

    def scores(prompts: Sequence[str]) -> list[float]:
        noise = model.noise(latents.expand(len(prompts), -1, -1, -1), model.timesteps[0], embed(pipe, prompts))
        return norms(noise - empty).cpu().double().square().tolist()

    sentence = numbers.choice(words[1:], size=length).tolist()
    for iteration in range(iterations):
        place = int(numbers.integers(length))
        tried = numbers.choice(words, size=min(proposals, len(words)), replace=False).tolist()
        tried = list(dict.fromkeys([sentence[place], *tried]))
        sentences = [[*sentence[:place], word, *sentence[place + 1 :]] for word in tried]
        prompts = [" ".join(filter(None, each)) for each in sentences]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for part, found in shrinking(scores, new, size=batch, owner=pipe.unet, use="trigger search"):
            known |= dict(zip(part, found, strict=True))
            rows += [(prompt, known[prompt], model.evaluations, iteration) for prompt in part]
        weights = torch.tensor([known[prompt] for prompt in prompts], dtype=torch.float64) / temperature
        sentence = sentences[int(numbers.choice(len(sentences), p=weights.softmax(dim=0).numpy()))]
    return pd.DataFrame(rows, columns=["prompt", "score", "evaluations", "iteration"])


def searching(pipe: StableDiffusionPipeline, *, steps: int) -> Callable[[Sequence[Any]], list[Any]]:
    """Return what gives the rows of `search_triggers` for a name, a vocabulary and options: a task (`Run.compute`)."""
    return lambda items: [
        search_triggers(pipe, words, steps=steps, **options).values.tolist() for _, words, options in items
    ]
