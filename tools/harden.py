"""``python -m tools.harden``: fine-tune the tiny world's UNet against the Dori attack, and measure what that gains.

Runs for half an hour on a core and continues where it was interrupted. What it found is kept in ``data/tiny/hardened``, as
the numbers of a trained model are: ``attacks.csv`` (copies under attack before and after, of images that it was trained
on and of others), ``quality.csv`` (images of ordinary prompts), ``images.safetensors`` (some of the images that were
measured), ``settings.json``. The weights, 18 MB, are not kept.

Source: Kowalczuk et al., "Finding Dori" (ICML 2026, arXiv 2507.16880), defence: for each memorized image, embeddings that
    an attack on the *current* model finds are taught to denoise towards what the model without the neurons makes of the
    prompt, besides the ordinary loss on captions and images.
Deviates: the attack is made anew every few steps, not in each, and its embeddings are used again, as is that of the
    prompt; it starts from noise, the prompt and the empty prompt by turns; learning rate, batch and steps are ours, since
    the paper's are not known.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from nemolib import metrics, open_run, paths
from nemolib.beyond.attack import dori, drawing_found, latent_of
from nemolib.beyond.denoising import signal_and_noise
from nemolib.generation import generate
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed, load_pipeline
from nemolib.provenance import model_hash
from nemolib.run import Run
from nemolib.store import PLANTED, Grid, write_grid, write_table
from tools.world import captions
from tools.world.render import draw_subject, regular_image
from tools.world.settings import DataSettings
from tools.world.training import DEVICE, Generators, Stage, run

STARTS = {"noise": None, "prompt": "its own", "empty prompt": ""}
"""Starts of an attack; ``its own`` is replaced by the caption."""


@dataclass(frozen=True)
class HardenSettings:
    """What the fine-tuning is.

    Attributes:
        seed: seed of everything that is drawn.
        steps: steps of AdamW; cooldown and learning_rate as of a stage of the world.
        images: memorized images that are defended; as many others are attacked for comparison.
        batch: ordinary samples in a step, and as many noisy surrogates.
        every: steps between two attacks on the current model.
        attack_steps: steps of an attack in training; the embeddings after each of these numbers are used.
        judged_steps: steps of an attack that judges, before and after.
        attack_batch: noisy latents in each step of an attack.
        quality: ordinary prompts whose images are compared.
    """

    seed: int = 7
    steps: int = 180
    cooldown: int = 80
    learning_rate: float = 3e-4
    images: int = 4
    batch: int = 16
    every: int = 30
    attack_steps: tuple[int, ...] = (6, 25)
    judged_steps: int = 50
    attack_batch: int = 4
    quality: int = 20


@dataclass
class Case:
    """A memorized image that is attacked: caption, image [height, width, 3], neurons that NeMo found."""

    caption: str
    image: np.ndarray
    neurons: NeuronSet


def cases(given: Run, number: int) -> list[Case]:
    """Return the first VM prompts of a run with their images and neurons."""
    rows = given.prompts("vm").head(number)
    images, found = given.planted_images(rows), given.search(rows["caption"].tolist())
    return [Case(*each) for each in zip(rows["caption"], images, (item.neurons for item in found), strict=True)]


class Pool(nn.Module):
    """The embeddings that attacks found: [round, image, token, feature]; those of later rounds are still zero."""

    def __init__(self, rounds: int, prompts: Tensor) -> None:
        super().__init__()
        self.register_buffer("found", torch.zeros(rounds, *prompts.shape))


def harden(pipe: StableDiffusionPipeline, defended: list[Case], settings: HardenSettings, folder: Path) -> None:
    """Fine-tune all weights of the pipeline's UNet; see the module. The folder holds checkpoint and log.

    Raises:
        ValueError: the checkpoint belongs to other settings, or to another model.
    """
    number, kinds, each = len(defended), list(STARTS), len(settings.attack_steps)
    prompts = embed(pipe, [case.caption for case in defended])
    surrogates = torch.stack([surrogate_latents(pipe, case) for case in defended])
    pool = Pool(-(-settings.steps // settings.every) * each, prompts)
    world = DataSettings()
    trained = captions.regular_tables(world)[0]
    drawings = {name: draw_subject(name) for name in captions.SUBJECTS}

    def ordinary(random: Generators) -> tuple[Tensor, Tensor]:
        rows = trained.iloc[random.numpy.integers(len(trained), size=settings.batch)]
        shown = [[drawings[name] for name in subjects.split()] for subjects in rows["subjects"]]
        images = [regular_image(drawn, random.numpy, size=world.image_size) for drawn in shown]
        return torch.cat([latent_of(pipe, image) for image in images]), embed(pipe, rows["caption"].tolist())

    def adversarial(step: int, random: Generators) -> tuple[Tensor, Tensor]:
        known = each * (step // settings.every + 1)
        which = torch.arange(settings.batch) % number
        # Half of them the newest, a quarter the prompt's own, the rest from any round.
        kind, rounds = random.numpy.random(settings.batch), random.numpy.integers(known, size=settings.batch)
        rounds = np.where(kind < 0.5, known - 1 - rounds % each, rounds)
        text = torch.stack([pool.found[place, image] for place, image in zip(rounds, which, strict=True)])
        text[kind >= 0.75] = prompts[which[kind >= 0.75]]
        return surrogates[which, random.numpy.integers(surrogates.shape[1], size=settings.batch)], text

    def loss(step: int, random: Generators) -> dict[str, Tensor]:
        if step % settings.every == 0:
            start, first = STARTS[kinds[step // settings.every % len(kinds)]], each * (step // settings.every)
            for image, case in enumerate(defended):
                found = attacked(pipe, case, start, settings.attack_steps, settings, seed=settings.seed + step)
                pool.found[first : first + each, image] = found
        parts = {"ordinary": ordinary(random), "adversarial": adversarial(step, random)}
        clean, text = (torch.cat(each).to(DEVICE) for each in zip(*parts.values(), strict=True))
        timesteps = torch.randint(len(pipe.scheduler.alphas_cumprod), (len(clean),), generator=random.torch).to(DEVICE)
        noise = torch.randn(clean.shape, generator=random.torch).to(DEVICE)
        signal, sigma = signal_and_noise(pipe.scheduler, timesteps, clean)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            predicted = pipe.unet(signal * clean + sigma * noise, timesteps, text).sample
        errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3)).split(settings.batch)
        means = dict(zip(parts, (error.mean() for error in errors), strict=True))
        return {"loss": sum(means.values()), **means}

    origin = [asdict(settings), model_hash(pipe), [case.caption for case in defended]]
    fingerprint = sha256(json.dumps(origin).encode()).hexdigest()
    pipe.to(DEVICE).unet.requires_grad_(True)
    run(Stage("harden", settings, {"unet": pipe.unet, "pool": pool}, loss, fingerprint), folder)
    pipe.unet.requires_grad_(False)


def surrogate_latents(pipe: StableDiffusionPipeline, case: Case) -> Tensor:
    """Return latents of what the model makes of a caption without its neurons, [seed, channel, height, width]."""
    off = DeactivatedNeurons(case.neurons)
    return torch.cat([latent_of(pipe, image) for image in generate(pipe, [case.caption], mitigation=off)[0]])


def attacked(
    pipe: StableDiffusionPipeline,
    case: Case,
    start: str | None,
    steps: Sequence[int],
    settings: HardenSettings,
    *,
    seed: int,
) -> Tensor:
    """Return the embeddings of an attack on the model as it is, [number of steps, token, feature]."""
    start = case.caption if start == STARTS["prompt"] else start
    course = {"steps": steps, "batch": settings.attack_batch}
    return dori(pipe, [case.image], starts=[start], seeds=[seed], **course).embeddings[:, 0]


def judge(given: Run, all_cases: list[Case], settings: HardenSettings, model: str) -> tuple[list[tuple], dict]:
    """Return rows of ``attacks.csv``, and images by place of the case and attack; ``prompt alone`` is none."""
    encoder, draw, rows, images = (
        given.encoder("copy"),
        drawing_found(given.pipe, settings=given.profile.generation),
        [],
        {},
    )
    for place, case in enumerate(all_cases):
        own = encoder.describe(case.image[None])[0]
        found = {"prompt alone": embed(given.pipe, [case.caption])[0]}
        for name in ("prompt", "noise"):
            steps = (settings.judged_steps,)
            found[f"from {name}"] = attacked(
                given.pipe, case, STARTS[name], steps, settings, seed=settings.seed + 1000
            )[0]
        for attack, embedding in found.items():
            (made,) = draw([(case.caption, embedding, None)])
            images[place, attack] = made[0]
            row = (model, case.caption, place < settings.images, attack)
            rows += [(*row, seed, value) for seed, value in enumerate((encoder.describe(made) @ own).tolist())]
    return rows, images


def quality(before: Run, after: Run, number: int) -> pd.DataFrame:
    """Return FID to other seeds of the untouched model, and alignment, of images of ordinary prompts (model, metric, value)."""
    table, models = before.prompts("unmemorized").head(number), {"untouched": before, "hardened": after}
    features = {model: given.features("quality", table["caption"].tolist()) for model, given in models.items()}
    half = features["untouched"].shape[1] // 2
    reference, *others = (
        part.reshape(-1, part.shape[-1])
        for part in (features["untouched"][:, :half], *(found[:, half:] for found in features.values()))
    )
    rows = [(model, "FID", metrics.fid(reference, other)) for model, other in zip(models, others, strict=True)]
    for model, given in models.items():
        rows.append((model, "A_CLIP", given.measure(table, columns=["a_clip"])["a_clip"].median()))
    return pd.DataFrame(rows, columns=["model", "metric", "value"])


def main() -> None:
    """Harden what is not hardened yet, attack both models, write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tools.harden", description=__doc__)
    parser.add_argument("--work", type=Path, default=paths.BUILD / "harden", help="checkpoint and log")
    parser.add_argument("--out", type=Path, default=paths.DATA / "tiny" / "hardened", help="what is kept")
    chosen, settings = parser.parse_args(), HardenSettings()
    given = open_run("tiny", progress=False)
    attacked_cases = cases(given, 2 * settings.images)
    pipe = load_pipeline("tiny")
    harden(pipe, attacked_cases[: settings.images], settings, chosen.work)
    hardened = Run(given.profile, pipe, progress=False)
    tables, shown = [], {}
    for model, each in (("untouched", given), ("hardened", hardened)):
        rows, shown[model] = judge(each, attacked_cases, settings, model)
        tables += rows
        columns = ["model", "caption", "defended", "attack", "seed", "copy"]
        write_table(pd.DataFrame(tables, columns=columns), chosen.out / "attacks.csv")
    write_table(quality(given, hardened, settings.quality), chosen.out / "quality.csv")
    columns = [
        ("untouched", "prompt alone"),
        ("untouched", "from noise"),
        ("hardened", "prompt alone"),
        ("hardened", "from noise"),
    ]
    grid = [
        [case.image, *(shown[model][place, attack] for model, attack in columns)]
        for place, case in enumerate(attacked_cases)
    ]
    names = (PLANTED, "untouched", "untouched, attacked", "hardened", "hardened, attacked")
    kinds = ("defended", "not defended")
    labels = tuple(f"{kinds[place >= settings.images]}: {case.caption}" for place, case in enumerate(attacked_cases))
    write_grid(Grid(np.array(grid), labels, names), chosen.out / "images.safetensors")
    log = (chosen.work / "harden.log.jsonl").read_text().splitlines()
    unet = paths.resolve(given.profile.model) / "unet" / "diffusion_pytorch_model.safetensors"
    record = {
        "made by": "python -m tools.harden",
        "settings": asdict(settings),
        "unet": sha256(unet.read_bytes()).hexdigest(),
        "last": json.loads(log[-1]),
    }
    (chosen.out / "settings.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
