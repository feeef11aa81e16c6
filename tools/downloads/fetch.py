"""Everything that a profile needs from elsewhere, one thing after the other; what fails does not stop the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from nemolib.downloads.files import DownloadError, fetch_file
from nemolib.downloads.hub import fetch_model
from nemolib.downloads.images import fetch_images
from nemolib.downloads.manifest import Manifest, load_manifest
from nemolib.holdout import ActivationStatistics, load_released
from nemolib.pipeline import is_hub_id
from nemolib.profiles import Profile, load_profile
from nemolib.value_layers import STABLE_DIFFUSION_WIDTHS

Part = Literal["files", "models", "images"]

PARTS: tuple[Part, ...] = ("files", "models", "images")
"""What can be fetched alone: files with checksums, hub models, training images."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one thing that was to be fetched.

    Attributes:
        thing: What it is.
        status: ``present``, ``copied``, ``downloaded``, ``converted``, ``missing`` (can be done without) or ``failed``.
        note: Where it lies, or why it failed and what to do.
    """

    thing: str
    status: str
    note: str = ""


def fetch_data(
    profile: Profile | str,
    *,
    parts: Sequence[Part] = PARTS,
    progress: bool = True,
    report: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Fetch what a profile needs and does not have yet.

    Args:
        profile: A profile or its name; its key ``downloads`` names the manifest.
        parts: What to fetch, of `PARTS`.
        progress: Whether to show progress bars.
        report: Is told each outcome as soon as it is known.

    Returns:
        What became of each thing, in order.

    Raises:
        ProfileError: The profile cannot be read.
        ManifestError: The manifest cannot be used.
        OSError: The disk is full; what was fetched stays.
    """
    profile = load_profile(profile)
    outcomes = []
    for outcome in _outcomes(profile, parts, progress=progress):
        outcomes.append(outcome)
        if report is not None:
            report(outcome)
    return outcomes


def outcome_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Return outcomes as a table: columns thing, status, note."""
    return pd.DataFrame(
        [(item.thing, item.status, item.note) for item in outcomes], columns=["thing", "status", "note"]
    )


def convert_statistics(manifest: Manifest) -> Outcome:
    """Write the authors' activation statistics as safetensors, unless that was done.

    Args:
        manifest: A manifest with ``released_statistics``.

    Returns:
        What became of it; failed if the file holds no statistics of Stable Diffusion's value layers.
    """
    source, target = manifest.root / str(manifest.released_statistics), manifest.root / manifest.statistics
    thing = f"statistics as safetensors ({manifest.statistics})"
    try:
        released = load_released(source, widths=STABLE_DIFFUSION_WIDTHS)
        statistics = ActivationStatistics(released.mean, released.std, count=manifest.statistics_count)
        if target.is_file() and _same(ActivationStatistics.load(target), statistics):
            return Outcome(thing, "present", str(target))
        statistics.save(target)
    except (FileNotFoundError, ValueError) as error:
        return Outcome(thing, "failed", str(error))
    return Outcome(thing, "converted", str(target))


def _same(one: ActivationStatistics, other: ActivationStatistics) -> bool:
    pairs = zip((*one.mean, *one.std), (*other.mean, *other.std), strict=True)
    return one.widths == other.widths and one.count == other.count and all(a.equal(b) for a, b in pairs)


def _outcomes(profile: Profile, parts: Sequence[Part], *, progress: bool) -> Iterator[Outcome]:
    manifest = None if profile.downloads is None else load_manifest(profile.downloads)
    if manifest is not None and "files" in parts:
        for file in manifest.files:
            try:
                status, note = fetch_file(file, manifest.root, progress=progress), str(manifest.root / file.path)
            except DownloadError as error:
                status, note = "missing" if file.optional else "failed", str(error)
            yield Outcome(file.path, status, note)
        if manifest.released_statistics is not None:
            yield convert_statistics(manifest)
    if "models" in parts:
        for repository, revision, kind in hub_models(profile):
            try:
                status, note = "present", str(fetch_model(repository, revision=revision, kind=kind))
            except DownloadError as error:
                status, note = "failed", str(error)
            yield Outcome(f"model {repository}", status, note)
    if manifest is not None and manifest.training_images is not None and "images" in parts:
        yield _images(manifest.root / manifest.training_images, manifest.root, progress=progress)


def hub_models(profile: Profile) -> list[tuple[str, str | None, Literal["pipeline", "clip"]]]:
    """Return the hub models that a profile names: hub id, revision and kind, each once."""
    models: list[tuple[str, str | None, Literal["pipeline", "clip"]]] = []
    if is_hub_id(profile.model):
        models.append((profile.model, profile.revision, "pipeline"))
    for role in ("alignment", "quality", "clip_quality"):
        chosen = getattr(profile.encoders, role)
        if chosen is not None and chosen.kind == "clip" and is_hub_id(chosen.path):
            models.append((chosen.path, chosen.revision, "clip"))
    return list(dict.fromkeys(models))


def _images(table: Path, folder: Path, *, progress: bool) -> Outcome:
    if not table.is_file():
        return Outcome("training images", "failed", f"their prompt table {table} is missing; see above")
    try:
        report = fetch_images(table, folder, progress=progress)
    except (DownloadError, ValueError) as error:
        return Outcome("training images", "failed", str(error))
    missing = int((report["status"] == "missing").sum())
    archived = int((report["status"] == "archived").sum())
    note = f"{len(report) - missing} of {len(report)}, {archived} of them from an archive; see {folder / 'images.csv'}"
    # Their servers forget them; everything but SSCD_Orig is computed without.
    return Outcome("training images", "missing" if missing else "present", note)
