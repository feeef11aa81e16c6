"""Fetching what a profile needs and the repository does not hold: ``python -m tools.fetch_data --profile sd14``.

``make data PROFILE=sd14`` runs it. What is fetched is data: a manifest in ``downloads/``, named by the profile's key
``downloads``, lists the files (prompt tables, statistics, weights, the table of training images); the hub models are
those that the profile names. Each file has a SHA-256, stated in the manifest or noted at its first use; a file that is
there is never fetched again, and a part of one never counts. ``NEMO_DATA_MIRROR`` names a folder to take files from.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import logging
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

import pandas as pd
import pooch
import pydantic
import requests
import yaml
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from PIL import Image
from requests.adapters import HTTPAdapter
from tqdm.contrib.concurrent import thread_map
from urllib3 import Retry

from nemolib import paths
from nemolib.encoders import note_sha256, noted_sha256
from nemolib.holdout import load_statistics
from nemolib.layers import STABLE_DIFFUSION_WIDTHS
from nemolib.paths import write_atomic
from nemolib.pipeline import is_hub_id
from nemolib.prompts import IMAGE_REPORT, load_prompts
from nemolib.settings import Profile, ProfileError, load_profile
from nemolib.store import read_table, write_table

MANIFESTS = Path(__file__).with_name("downloads")
"""Where the manifests lie."""

MIRROR = "NEMO_DATA_MIRROR"
"""Environment variable: a folder in which files are looked for before the network."""

RETRIES, TIMEOUT, WORKERS = 3, 60, 8
"""How often a download that failed is tried again; seconds without an answer after which it has failed; images at once."""

ARCHIVE = "https://web.archive.org/web/0id_/"
"""Before a URL: its first copy in the Wayback Machine, as it was, without a frame."""

IMAGE_COLUMNS = ("number", "kind", "caption", "url", "status", "image", "sha256", "reason")
"""Columns of the report on training images; status is ``found``, ``archived`` (Wayback Machine) or ``missing``."""

SMALLEST, LARGEST = 32, 64 * 2**20
"""Shortest side of an image in pixels (what is smaller is a placeholder), and largest file in bytes."""

PARTS = ("files", "models", "images")
"""What can be fetched alone: files with checksums, hub models, training images."""

MODEL_FILES = {
    "pipeline": (
        "model_index.json",
        "text_encoder/model.safetensors",
        *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
        *("*/*.json", "tokenizer/*.txt"),
    ),
    "clip": ("config.json", "model.safetensors", "preprocessor_config.json", "*.json", "*.txt"),
}
"""The files of a hub model that are read, and must be there where a name is given whole; no pickles, no half-precision
copies, no weights of the safety checker."""


class DownloadError(RuntimeError):
    """Something that could not be fetched; the message names it, the reason and what to do."""


class Outcome(NamedTuple):
    """What became of one thing that was to be fetched.

    Attributes:
        thing: What it is.
        status: ``present``, ``copied``, ``downloaded``, ``converted``, ``missing`` (can be done without) or ``failed``.
        note: Where it lies, or why it failed and what to do.
    """

    thing: str
    status: str
    note: str


class SourceFile(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A file that comes from elsewhere.

    Attributes:
        path: Where it is put, relative to the folder of the manifest, and inside it.
        url: Where it comes from.
        sha256: Its SHA-256; None: nobody has stated it, so it is noted at the first use.
        rows: Number of rows of a prompt table, checked where the SHA-256 is not known; None: not checked.
        optional: Whether everything but a few numbers can be computed without it.
    """

    path: str = pydantic.Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")
    url: str = pydantic.Field(pattern="^https?://")
    sha256: str | None = pydantic.Field(None, pattern="^[0-9a-f]{64}$")
    rows: int | None = None
    optional: bool = False


class Manifest(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What a world needs from elsewhere.

    Attributes:
        folder: Where it is put; in YAML relative to the repository.
        files: The files.
        released_statistics: Activation statistics as the authors store them (one of the files), or None.
        statistics: Where they are put as safetensors, relative to the folder.
        statistics_count: Number of prompts that they were computed from.
        training_images: Prompt table (one of the files) with the URLs of training images, or None.
    """

    folder: Annotated[Path, pydantic.AfterValidator(paths.resolve)]
    files: tuple[SourceFile, ...]
    released_statistics: str | None = None
    statistics: str = "statistics.safetensors"
    statistics_count: int = 0
    training_images: str | None = None


def load_manifest(name: str | Path) -> Manifest:
    """Return a manifest.

    Args:
        name: Name of one in ``downloads/`` (``"sd14"``), or path of a YAML file.

    Raises:
        ProfileError: There is no such manifest, or entries do not fit.
    """
    path = Path(name).expanduser() if str(name).endswith((".yaml", ".yml")) else MANIFESTS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in MANIFESTS.glob("*.yaml")))
        raise ProfileError(f"there is no manifest {str(name)!r} ({path}); known: {known}; or give a YAML file")
    try:
        return Manifest.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (pydantic.ValidationError, yaml.YAMLError) as error:
        raise ProfileError(f"{path}: {error}") from error


def fetch_data(profile: Profile, parts: Collection[str] = PARTS) -> Iterator[Outcome]:
    """Fetch what a profile needs and does not have yet; what fails does not stop the rest.

    Args:
        profile: Its key ``downloads`` names the manifest.
        parts: What to fetch, of `PARTS`.

    Yields:
        What became of each thing, as soon as it is known.

    Raises:
        ProfileError: The manifest cannot be used.
        OSError: The disk is full; what was fetched stays.
    """
    manifest = load_manifest(profile.downloads) if profile.downloads else Manifest(folder=paths.DATA, files=())
    folder, todo = manifest.folder, []
    if "files" in parts:
        for file in manifest.files:
            todo.append((file.path, "missing" if file.optional else "failed", partial(fetch_file, file, folder)))
        if manifest.released_statistics:
            thing = f"statistics as safetensors ({manifest.statistics})"
            todo.append((thing, "failed", partial(convert_statistics, manifest)))
    if "models" in parts:
        todo += [(f"model {model[0]}", "failed", partial(fetch_model, *model)) for model in hub_models(profile)]
    if "images" in parts and manifest.training_images:
        todo.append(("training images", "failed", partial(fetch_images, folder / manifest.training_images, folder)))
    for thing, without, fetch in todo:
        try:
            yield Outcome(thing, *fetch())
        except (DownloadError, FileNotFoundError, ValueError) as error:
            yield Outcome(thing, without, str(error))


def fetch_file(file: SourceFile, folder: Path) -> tuple[str, str]:
    """Put a file into a folder, unless it is there, and check it; return its status as in `Outcome`, and its path.

    Raises:
        DownloadError: There is no network; the source does not have it; what it has, or what is there, is another file.
        EncoderError: The note of the SHA-256 at its first use cannot be read.
        OSError: The disk is full.
    """
    target, status = folder / file.path, "present"
    expected = file.sha256 or noted_sha256(target)
    if not target.is_file():
        status = _fetch(file, folder, expected)
    found = pooch.file_hash(target)
    if expected not in (None, found):
        also = "" if file.sha256 else "; if the new file is right, delete the note of its SHA-256 beside it as well"
        what = f"SHA-256 is {found}, expected {expected}: another file, or a part of it"
        raise DownloadError(f"{target}: {what}; delete it and run again{also}")
    if expected is None:
        if file.rows is not None and (prompts := _prompts(target)) != f"{file.rows} prompts":
            if status != "present":
                target.unlink()
            remedy = "delete it, if it is there, and run again"
            raise DownloadError(f"{target}: {prompts}, expected {file.rows} prompts; {remedy}")
        note_sha256(target, found)
    return status, str(target)


def _fetch(file: SourceFile, folder: Path, expected: str | None) -> str:
    """Let pooch put a file into its place, from the mirror if it holds the file, else from its URL; return its status.

    It is checked before it gets its name, so that what has the name is complete.
    """
    pooch.get_logger().setLevel(logging.ERROR)  # its progress bar says the rest
    mirrored, status = _in_mirror(file), "copied"
    source, retries, download = str(mirrored), 0, _copy
    remedy = f"put the right file into the mirror, or unset {MIRROR}"
    if mirrored is None:
        status, source, retries = "downloaded", file.url, RETRIES
        download = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
        remedy = f"check the connection and run again, or give a folder that holds the file: {MIRROR}=folder"
        if constants.HF_HUB_OFFLINE:
            raise DownloadError(
                f"{file.path} is not there, and HF_HUB_OFFLINE forbids the network; unset it, or {remedy}"
            )
    registry, urls = {file.path: expected}, {file.path: source}
    try:
        cache = pooch.create(folder, base_url="", registry=registry, urls=urls, retry_if_failed=retries)
        cache.fetch(file.path, downloader=download)
    except (requests.RequestException, ValueError) as error:
        reason = _first_line(error)
        raise DownloadError(f"{file.path} could not be fetched from {source}: {reason}; {remedy}") from error
    return status


def _copy(source: str, target: str, _: pooch.Pooch) -> None:
    shutil.copyfile(source, target)


def _in_mirror(file: SourceFile) -> Path | None:
    """Return the file in the mirror, by its path in the manifest or by its name at its source; None without one."""
    if not os.environ.get(MIRROR):
        return None
    root = Path(os.environ[MIRROR]).expanduser()
    if not root.is_dir():
        raise DownloadError(f"{MIRROR} is {str(root)!r}, which is no folder; give one, or unset it")
    source = PurePosixPath(file.url.partition("?")[0])
    places = (file.path, f"{source.parent.name}/{source.name}", source.name)
    return next((root / place for place in places if (root / place).is_file()), None)


def _prompts(path: Path) -> str:
    """Return how many prompts a table of the authors' release has, as text; or that it is none, and why."""
    try:
        return f"{len(pd.read_csv(path, sep=';', usecols=['Caption'], keep_default_na=False))} prompts"
    except ValueError as error:
        return f"no prompt table ({_first_line(error)})"


def convert_statistics(manifest: Manifest) -> tuple[str, str]:
    """Write the authors' activation statistics as safetensors, unless that was done; return status and path.

    Raises:
        FileNotFoundError: They are missing.
        ValueError: They are not readable, or statistics of another model.
    """
    target, status = manifest.folder / manifest.statistics, "present"
    if not target.is_file():
        released = load_statistics(manifest.folder / manifest.released_statistics, widths=STABLE_DIFFUSION_WIDTHS)
        replace(released, count=manifest.statistics_count).save(target)
        status = "converted"
    return status, str(target)


def hub_models(profile: Profile) -> list[tuple[str, str | None, str]]:
    """Return the hub models that a profile names: hub id, revision and kind (of `MODEL_FILES`), each once."""
    models = [(profile.model, profile.revision, "pipeline")]
    encoders = (profile.encoders.alignment, profile.encoders.quality, profile.encoders.clip_quality)
    models += [(chosen.path, chosen.revision, "clip") for chosen in encoders if chosen and chosen.kind == "clip"]
    return [model for model in dict.fromkeys(models) if is_hub_id(model[0])]


def fetch_model(repository: str, revision: str | None, kind: str) -> tuple[str, str]:
    """Put a hub model into the hub's cache, unless it is there, and return its status as in `Outcome`, and its folder.

    The cache is where ``HF_HOME`` says; tokens (``HF_TOKEN``, ``hf auth login``) and ``HF_HUB_OFFLINE`` are those of
    huggingface_hub. A download that was interrupted goes on where it stopped.

    Args:
        repository: Hub id, ``owner/name``.
        revision: Commit or branch; None: its default branch.
        kind: ``pipeline`` (Stable Diffusion in diffusers format) or ``clip``.

    Raises:
        DownloadError: No network, or forbidden, and the model is not in the cache; no such model or revision; no
            access; the revision has no safetensors.
    """
    name = f"model {repository}{f' (revision {revision})' if revision else ''}"
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(MODEL_FILES[kind])))
    except GatedRepoError as error:
        page = f"access is granted on its page, https://huggingface.co/{repository}; accept its licence there"
        raise DownloadError(f"{name}: {page}, log in with `hf auth login` or set HF_TOKEN, and run again") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DownloadError(
            f"{name}: not in the cache ({constants.HF_HUB_CACHE}), and could not be downloaded ({_first_line(error)}); check "
            "name, revision and connection, unset HF_HUB_OFFLINE, or set HF_HOME to a cache that holds it, and run again: "
            "a download goes on where it stopped"
        ) from error
    missing = [file for file in MODEL_FILES[kind] if "*" not in file and not (folder / file).is_file()]
    if missing:
        why = (
            "other formats than safetensors are not read, since they can run code; give a revision that has safetensors"
        )
        raise DownloadError(f"{name}: {', '.join(missing)} missing in {folder}; {why}")
    return "present", str(folder)


def fetch_images(table: Path, folder: Path) -> tuple[str, str]:
    """Put the training images of a prompt table into ``images/`` of a folder, and say what is missing in ``images.csv``.

    Many have gone from their servers, so the Wayback Machine is asked too. An image that is there is not fetched again;
    one that is missing is tried again at every call. Everything but SSCD_Orig is computed without them.

    Args:
        table: Prompt table of memorized prompts with a column ``url``.
        folder: Folder of the world.

    Returns:
        Status as in `Outcome`, and how many were found; the report has the columns `IMAGE_COLUMNS`, a row for each prompt.

    Raises:
        FileNotFoundError: There is no such table.
        PromptTableError: The table cannot be used.
        DownloadError: The table has no URLs.
        OSError: The disk is full; images that were found stay.
    """
    prompts, report = load_prompts(table), folder / IMAGE_REPORT
    if "url" not in prompts:
        raise DownloadError(f"{table} has no column 'url', so there are no training images to fetch")
    known = read_table(report, columns=IMAGE_COLUMNS).fillna("").to_dict("records") if report.is_file() else []
    known = {row["url"]: (row["status"], row["reason"]) for row in known if row["status"] != "missing"}
    urls = prompts["url"].drop_duplicates()
    fetch = partial(_fetch_image, folder=folder, known=known, session=_session())
    bar = {"desc": "training images", "unit": "image", "max_workers": WORKERS}
    entries = dict(zip(urls, thread_map(fetch, urls.index, urls, **bar), strict=True))
    found = pd.DataFrame(prompts["url"].map(entries).tolist(), columns=IMAGE_COLUMNS[4:], index=prompts.index)
    told = prompts[["kind", "caption", "url"]].assign(number=prompts.index).join(found)
    write_table(told[[*IMAGE_COLUMNS]], report)
    missing, archived = ((told["status"] == status).sum() for status in ("missing", "archived"))
    note = f"{len(told) - missing} of {len(told)}, {archived} of them from an archive; see {report}"
    return "missing" if missing else "present", note


def _fetch_image(
    number: int, url: str, *, folder: Path, known: Mapping[str, tuple[str, str]], session: requests.Session
) -> tuple[str, str, str, str]:
    """Put an image into its place; return status, image, SHA-256, reason: nothing is raised for what a server does."""
    there = next((folder / "images").glob(f"{number:04d}.*"), None)
    if there is not None:
        status, reason = known.get(url, ("found", "it was there"))
        return status, f"images/{there.name}", pooch.file_hash(there), reason
    if not url or constants.HF_HUB_OFFLINE:
        return "missing", "", "", "HF_HUB_OFFLINE forbids the network" if url else "the table has no URL"
    reasons = []
    for status, before in (("found", ""), ("archived", ARCHIVE)):
        try:
            content, suffix = _download(before + html.unescape(url), session)
        except Exception as error:  # a server may give anything
            reasons.append(f"{'archive: ' if before else ''}{type(error).__name__}: {_first_line(error)}")
            continue
        image = f"images/{number:04d}.{suffix}"
        write_atomic(folder / image, content)
        return status, image, hashlib.sha256(content).hexdigest(), "; ".join(reasons)
    return "missing", "", "", "; ".join(reasons)


def _session() -> requests.Session:
    """Return a session that gives up a host without an answer after one more try, and asks a busy one again."""
    session, busy = requests.Session(), (429, 500, 502, 503, 504)
    patience = Retry(total=RETRIES, connect=1, read=1, backoff_factor=1, status_forcelist=busy, raise_on_status=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=patience, pool_maxsize=WORKERS))
    session.headers["User-Agent"] = "Mozilla/5.0 (compatible; nemolib; research on memorization)"
    return session


def _download(address: str, session: requests.Session) -> tuple[bytes, str]:
    """Return an image and its usual suffix; anything may be raised unless it is a whole image of some size."""
    content = bytearray()
    with session.get(address, timeout=TIMEOUT / 2, stream=True) as answer:
        answer.raise_for_status()
        for part in answer.iter_content(2**16):
            content += part
            if len(content) > LARGEST:
                raise ValueError(f"more than {LARGEST // 2**20} MiB")
    with Image.open(io.BytesIO(content)) as image:
        image.convert("RGB")
        if min(image.size) < SMALLEST:
            raise ValueError(f"a placeholder of {image.width} x {image.height} pixels")
        return bytes(content), {"JPEG": "jpg"}.get(image.format, image.format.lower())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the data of a profile from the command line; return the exit status, 1 if something needed is missing."""
    parser = argparse.ArgumentParser(prog="python -m tools.fetch_data", description=__doc__)
    parser.add_argument("--profile", default=os.environ.get("PROFILE") or "sd14", help="default: $PROFILE, else sd14")
    parser.add_argument("--only", choices=PARTS, action="append", help="fetch only this; may be given again")
    arguments = parser.parse_args(argv)
    outcomes = []
    try:
        profile = load_profile(arguments.profile)
        for outcome in fetch_data(profile, arguments.only or PARTS):
            outcomes.append(outcome)
            stream = sys.stderr if outcome.status == "failed" else sys.stdout
            print(f"{outcome.status:>10}  {outcome.thing}: {outcome.note}", file=stream, flush=True)
    except (ProfileError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was fetched stays, run again to go on\n")
        return 130
    failed = [outcome.thing for outcome in outcomes if outcome.status == "failed"]
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(outcomes)} failed: {', '.join(failed)}\n")
    elif not outcomes:
        sys.stdout.write(f"profile {profile.name}: nothing to fetch, everything is in the repository\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
