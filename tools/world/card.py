"""The model card of the world: data, sizes, losses, seeds, hashes and the acceptance table, all of it generated."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import jinja2
import pandas as pd
from diffusers import UNet2DConditionModel
from safetensors.torch import load

from nemolib.encoders import CopyDescriptor
from nemolib.layers import value_layers
from nemolib.paths import write_atomic
from nemolib.provenance import versions
from nemolib.run import open_run
from nemolib.settings import EncoderSettings, Limits, Profile, load_profile
from nemolib.store import write_table
from tools.world import acceptance, build
from tools.world.settings import UNETS, WorldSettings

TRIED, TEMPLATE = (Path(__file__).with_name(name) for name in ("tried.csv", "card.md.j2"))
CONTRASTED = 8
"""Planted prompts of a kind, of group ``choose``, that the trained variants are compared on."""

CONTRASTED_DRAWN = 24
"""Unmemorized prompts with images that they are compared on."""

FEW_DRAWN = 6
"""Unmemorized prompts with images in the measurement that tests repeat."""


def few(profile: Profile) -> Profile:
    """Return the profile of a smaller measurement, which tests repeat: few prompts of each kind, few seeds."""
    first, images = replace(profile.detection, samples=5), replace(profile.generation, samples=2)
    limits = Limits(vm=3, tm=3, unmemorized=50)
    return replace(profile, limits=limits, threshold_prompts=50, detection=first, generation=images)


def write_results(settings: WorldSettings, work: Path, out: Path) -> None:
    """Measure the shipped model and its variants and write tables and the card to ``out``."""
    profile = replace(load_profile("tiny"), name="world", groups="report")  # results of its own
    classifier = CopyDescriptor.load(EncoderSettings(kind="descriptor", path=str(out / "classifier")))
    folders = build.folders(work, out)
    shipped = open_run(replace(profile, model=str(folders["unet"])))
    measured = acceptance.measure(shipped, classifier)
    write_table(measured, out / "measured.csv")
    write_table(
        acceptance.measure(open_run(few(shipped.profile)), classifier, drawn=FEW_DRAWN),
        out / "measured_few.csv",
    )
    write_table(acceptance.acceptance_table(measured), out / "acceptance.csv")
    contrasted = replace(profile, groups="choose", limits=Limits(vm=CONTRASTED, tm=CONTRASTED))
    variants = {
        name: acceptance.measure(open_run(replace(contrasted, model=str(folder))), classifier, drawn=CONTRASTED_DRAWN)
        for name, folder in folders.items()
    }
    write_table(pd.concat(variants, names=["model"]).reset_index("model"), out / "variants.csv")
    logs = {stage: work / f"{stage}.log.jsonl" for stage in build.STAGES}
    losses = {stage: pd.read_json(log, lines=True) for stage, log in logs.items() if log.exists()}
    write_atomic(out / "README.md", card(settings, losses, out))


def card(settings: WorldSettings, losses: dict[str, pd.DataFrame], out: Path) -> str:
    """Return the card as Markdown, from the tables in ``out``."""
    prompts = [pd.read_csv(path) for path in sorted((out / "prompts").glob("*.csv"))]
    models = pd.read_csv(out / "variants.csv").groupby("model", sort=False)
    bounds = {name: acceptance.acceptance_table(table) for name, table in models}
    contrast = bounds["unet"][["claim", "bound"]].assign(**{name: table["value"] for name, table in bounds.items()})
    holding = [table["holds"].sum() for table in bounds.values()]
    contrast.loc[len(contrast)] = ["bounds that hold", f"of {len(contrast)}", *holding]
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["table"] = lambda table: table.round(3).to_markdown(index=False)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        settings=settings,
        numbers=json.dumps(asdict(settings), indent=1),
        kinds=pd.concat(prompts).groupby("kind").size().rename("prompts").reset_index(),
        neurons=sum(
            layer.width for layer in value_layers(UNet2DConditionModel.from_pretrained(out / "model" / "unet"))
        ),
        acceptance=pd.read_csv(out / "acceptance.csv"),
        measured=pd.read_csv(out / "measured.csv"),
        contrasted=CONTRASTED,
        unets=UNETS,
        contrast=contrast.rename(columns={"unet": "shipped"}),
        tried=pd.read_csv(TRIED),
        stages=_stages(losses),
        files=_files(out),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


def _stages(losses: dict[str, pd.DataFrame]) -> pd.DataFrame:
    rows = [
        (stage, log["step"].iloc[-1], round(log["seconds"].iloc[-1] / 60, 1), round(log["loss"].tail(5).mean(), 4))
        for stage, log in losses.items()
    ]
    return pd.DataFrame(rows, columns=["stage", "steps", "minutes", "last loss"])


def _files(out: Path) -> pd.DataFrame:
    rows = []
    for path in sorted(out.rglob("*.safetensors")):
        content = path.read_bytes()
        numbers = sum(tensor.numel() for tensor in load(content).values())
        digest = hashlib.sha256(content).hexdigest()
        rows.append((str(path.relative_to(out)), numbers, round(len(content) / 1e6, 2), f"`{digest[:16]}`"))
    return pd.DataFrame(rows, columns=["file", "parameters", "MB", "SHA-256"])
