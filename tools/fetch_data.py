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
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import pandas as pd
import pooch
import pydantic
import requests
import yaml
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image
from requests.adapters import HTTPAdapter
from tqdm.contrib.concurrent import thread_map
from urllib3 import Retry

from nemolib import paths
from nemolib.encoders import EncoderError, note_sha256, noted_sha256
from nemolib.holdout import load_statistics
from nemolib.layers import STABLE_DIFFUSION_WIDTHS
from nemolib.pipeline import is_hub_id
from nemolib.prompts import IMAGE_REPORT, load_prompts
from nemolib.settings import Profile, ProfileError, load_profile
from nemolib.store import read_table, write_atomic, write_table

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


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file, the entry and what is allowed."""


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
        path: Where it is put, relative to the folder of the manifest.
        url: Where it comes from.
        sha256: Its SHA-256; None: nobody has stated it, so it is noted at the first use.
        rows: Number of rows of a prompt table, checked where the SHA-256 is not known; None: not checked.
        optional: Whether everything but a few numbers can be computed without it.
    """

    path: str
    url: Annotated[str, pydantic.StringConstraints(pattern="^https?://")]
    sha256: Annotated[str, pydantic.StringConstraints(pattern="^[0-9a-f]{64}$")] | None = None
    rows: int | None = None
    optional: bool = False

    @pydantic.field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        place = PurePosixPath(path)
        if place.is_absolute() or ".." in place.parts or not place.name:
            raise ValueError("it must be a file inside the folder of the manifest")
        return path


class Manifest(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What a world needs from elsewhere.

    Attributes:
        folder: Where it is put, relative to the repository.
        files: The files.
        released_statistics: Activation statistics as the authors store them (one of the files), or None.
        statistics: Where they are put as safetensors, relative to the folder.
        statistics_count: Number of prompts that they were computed from.
        training_images: Prompt table (one of the files) with the URLs of training images, or None.
    """

    folder: str
    files: tuple[SourceFile, ...]
    released_statistics: str | None = None
    statistics: str = "statistics.safetensors"
    statistics_count: int = 0
    training_images: str | None = None

    @pydantic.model_validator(mode="after")
    def _listed(self) -> Manifest:
        known = [file.path for file in self.files]
        if len(set(known)) != len(known):
            raise ValueError(f"a path is listed twice in {known}")
        for key, value in (
            ("released_statistics", self.released_statistics),
            ("training_images", self.training_images),
        ):
            if value not in (None, *known):
                raise ValueError(f"{key} is {value!r}, which is not among the files: {', '.join(known)}")
        return self

    @property
    def root(self) -> Path:
        """The folder as an absolute path."""
        return paths.resolve(self.folder)


def load_manifest(name: str | Path) -> Manifest:
    """Return a manifest.

    Args:
        name: Name of one in ``downloads/`` (``"sd14"``), or path of a YAML file.

    Raises:
        ManifestError: There is no such manifest, or entries do not fit.
    """
    path = Path(name).expanduser() if str(name).endswith((".yaml", ".yml")) else MANIFESTS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in MANIFESTS.glob("*.yaml")))
        raise ManifestError(f"there is no manifest {str(name)!r} ({path}); known: {known}; or give a YAML file")
    try:
        return Manifest.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except pydantic.ValidationError as error:
        wrong = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}, not {item['input']!r}" for item in error.errors()]
        raise ManifestError(f"{path}: {'; '.join(wrong)}") from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{path}: {error}") from error


def fetch_data(profile: Profile, parts: Collection[str] = PARTS) -> Iterator[Outcome]:
    """Fetch what a profile needs and does not have yet; what fails does not stop the rest.

    Args:
        profile: Its key ``downloads`` names the manifest.
        parts: What to fetch, of `PARTS`.

    Yields:
        What became of each thing, as soon as it is known.

    Raises:
        ManifestError: The manifest cannot be used.
        OSError: The disk is full; what was fetched stays.
    """
    manifest = None if profile.downloads is None else load_manifest(profile.downloads)
    if manifest is not None and "files" in parts:
        for file in manifest.files:
            try:
                yield Outcome(file.path, fetch_file(file, manifest.root), str(manifest.root / file.path))
            except (DownloadError, EncoderError) as error:
                yield Outcome(file.path, "missing" if file.optional else "failed", str(error))
        if manifest.released_statistics is not None:
            yield convert_statistics(manifest)
    if "models" in parts:
        for repository, revision, kind in hub_models(profile):
            try:
                yield Outcome(f"model {repository}", "present", str(fetch_model(repository, revision, kind)))
            except DownloadError as error:
                yield Outcome(f"model {repository}", "failed", str(error))
    if manifest is not None and manifest.training_images is not None and "images" in parts:
        yield _images(manifest.root / manifest.training_images, manifest.root)


def fetch_file(file: SourceFile, folder: Path) -> str:
    """Put a file into a folder, unless it is there, and check it; return its status as in `Outcome`.

    Raises:
        DownloadError: There is no network; the source does not have it; what it has, or what is there, is another file.
        EncoderError: The note of the SHA-256 at its first use cannot be read.
        OSError: The disk is full.
    """
    target, status = folder / file.path, "present"
    expected = file.sha256 or noted_sha256(target)
    if not target.is_file():
        status = _fetch(file, folder, expected)
    elif expected not in (None, found := pooch.file_hash(target)):
        also = "" if file.sha256 else "; if the new file is right, delete the note of its SHA-256 beside it as well"
        raise DownloadError(
            f"{target}: SHA-256 is {found}, expected {expected}: another file, or a part of it; delete it and run "
            f"again{also}"
        )
    if expected is None:
        if file.rows is not None and (found := _prompts(target)) != f"{file.rows} prompts":
            if status != "present":
                target.unlink()
            raise DownloadError(
                f"{target}: {found}, expected {file.rows} prompts; delete it, if it is there, and run again"
            )
        note_sha256(target, pooch.file_hash(target))
    return status


def _fetch(file: SourceFile, folder: Path, expected: str | None) -> str:
    """Let pooch put a file into its place, from the mirror if it holds the file, else from its URL; return its status.

    It is checked before it gets its name, so that what has the name is complete.
    """
    pooch.get_logger().setLevel(logging.ERROR)  # its progress bar says the rest
    mirrored = _in_mirror(file)
    if mirrored is not None:
        source, retries, downloader = mirrored, 0, lambda url, output, pooch: shutil.copyfile(mirrored, output)
        remedy = f"put the right file into the mirror, or unset {MIRROR}"
    elif constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"{file.path} is not there, and HF_HUB_OFFLINE forbids the network; unset it, or give a folder that holds the "
            f"file: {MIRROR}=folder"
        )
    else:
        source, retries, downloader = file.url, RETRIES, pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
        remedy = (
            f"check the connection and run again, or download it by other means and give its folder: {MIRROR}=folder"
        )
    registry, urls = {file.path: expected}, {file.path: file.url}
    cache = pooch.create(folder, base_url="", registry=registry, urls=urls, retry_if_failed=retries)
    try:
        cache.fetch(file.path, downloader=downloader)
    except (requests.RequestException, ValueError) as error:
        raise DownloadError(
            f"{file.path} could not be fetched from {source}: {_first_line(error)}; {remedy}"
        ) from error
    return "downloaded" if mirrored is None else "copied"


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


def convert_statistics(manifest: Manifest) -> Outcome:
    """Write the authors' activation statistics as safetensors, unless that was done; return what became of it."""
    target, thing = manifest.root / manifest.statistics, f"statistics as safetensors ({manifest.statistics})"
    if target.is_file():
        return Outcome(thing, "present", str(target))
    try:
        released = load_statistics(manifest.root / str(manifest.released_statistics), widths=STABLE_DIFFUSION_WIDTHS)
    except (FileNotFoundError, ValueError) as error:
        return Outcome(thing, "failed", str(error))
    type(released)(released.mean, released.std, count=manifest.statistics_count).save(target)
    return Outcome(thing, "converted", str(target))


def hub_models(profile: Profile) -> list[tuple[str, str | None, str]]:
    """Return the hub models that a profile names: hub id, revision and kind (of `MODEL_FILES`), each once."""
    models = [(profile.model, profile.revision, "pipeline")]
    encoders = (profile.encoders.alignment, profile.encoders.quality, profile.encoders.clip_quality)
    models += [(chosen.path, chosen.revision, "clip") for chosen in encoders if chosen and chosen.kind == "clip"]
    return [model for model in dict.fromkeys(models) if is_hub_id(model[0])]


def fetch_model(repository: str, revision: str | None, kind: str) -> Path:
    """Put a hub model into the hub's cache, unless it is there, and return its folder.

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
        raise DownloadError(
            f"{name}: access is granted on its page, https://huggingface.co/{repository}; accept its licence there, then "
            "log in with `hf auth login` or set HF_TOKEN, and run again"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise DownloadError(
            f"{name}: not in the cache ({constants.HF_HUB_CACHE}), and the hub is not reached; connect to the network and "
            "unset HF_HUB_OFFLINE, or set HF_HOME to a cache that holds it"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DownloadError(
            f"{name}: could not be downloaded; check name, revision and connection, and run again: the download goes on "
            f"where it stopped ({_first_line(error)})"
        ) from error
    missing = [file for file in MODEL_FILES[kind] if "*" not in file and not (folder / file).is_file()]
    if missing:
        raise DownloadError(
            f"{name}: {', '.join(missing)} missing in {folder}; other formats than safetensors are not read, since they "
            "can run code; give a revision that has safetensors"
        )
    return folder


def _images(table: Path, folder: Path) -> Outcome:
    if not table.is_file():
        return Outcome("training images", "failed", f"their prompt table {table} is missing; see above")
    try:
        status = fetch_images(table, folder)["status"]
    except (DownloadError, ValueError) as error:
        return Outcome("training images", "failed", str(error))
    found, archived = (status != "missing").sum(), (status == "archived").sum()
    note = f"{found} of {len(status)}, {archived} of them from an archive; see {folder / IMAGE_REPORT}"
    # Their servers forget them; everything but SSCD_Orig is computed without.
    return Outcome("training images", "present" if found == len(status) else "missing", note)


def fetch_images(table: Path, folder: Path) -> pd.DataFrame:
    """Put the training images of a prompt table into ``images/`` of a folder, and say what is missing.

    Many have gone from their servers, so the Wayback Machine is asked too. An image that is there is not fetched again;
    one that is missing is tried again at every call.

    Args:
        table: Prompt table of memorized prompts with a column ``url``.
        folder: Folder of the world; the report is its ``images.csv``.

    Returns:
        The report, one row for each prompt: `IMAGE_COLUMNS`.

    Raises:
        PromptTableError: The table cannot be used.
        DownloadError: The table has no URLs.
        OSError: The disk is full; images that were found stay.
    """
    prompts = load_prompts(table)
    if "url" not in prompts:
        raise DownloadError(f"{table} has no column 'url', so there are no training images to fetch")
    earlier = {}
    if (folder / IMAGE_REPORT).is_file():
        report = read_table(folder / IMAGE_REPORT, columns=IMAGE_COLUMNS).fillna("")
        earlier = {row["url"]: row for row in report.to_dict("records")}
    urls = prompts["url"].drop_duplicates()
    fetch = partial(_fetch_image, folder=folder, earlier=earlier, session=_session())
    bar = {"desc": "training images", "unit": "image"}
    entries = dict(zip(urls, thread_map(fetch, urls.index, urls, max_workers=WORKERS, **bar), strict=True))
    found = pd.DataFrame([entries[url] for url in prompts["url"]], index=prompts.index)
    report = prompts[["kind", "caption", "url"]].assign(number=prompts.index).join(found)[[*IMAGE_COLUMNS]]
    write_table(report, folder / IMAGE_REPORT)
    return report


def _fetch_image(
    number: int, url: str, *, folder: Path, earlier: Mapping[str, Mapping[str, Any]], session: requests.Session
) -> dict[str, str]:
    """Put an image into its place and return its entries of the report; nothing is raised for what a server does."""
    there = next((folder / "images").glob(f"{number:04d}.*"), None)
    if there is not None:
        known = earlier.get(url, {"status": "found", "reason": "found earlier"})
        if known["status"] == "missing":
            known = {"status": "found", "reason": "put there by hand"}
        return _entry(known["status"], known["reason"], f"images/{there.name}", there.read_bytes())
    if not url:
        return _entry("missing", "the table has no URL")
    if constants.HF_HUB_OFFLINE:
        return _entry("missing", "HF_HUB_OFFLINE forbids the network")
    reasons = []
    for status, before in (("found", ""), ("archived", ARCHIVE)):
        try:
            content = _get(before + html.unescape(url), session)
            image = f"images/{number:04d}.{_image_suffix(content)}"
        except (OSError, ValueError) as error:  # all of requests' errors are OSErrors, bad addresses ValueErrors
            answer = getattr(error, "response", None)
            reason = f"{type(error).__name__}: {_first_line(error)}" if answer is None else f"HTTP {answer.status_code}"
            reasons.append(f"archive: {reason}" if before else reason)
            continue
        write_atomic(folder / image, content)
        return _entry(status, "; ".join(reasons), image, content)
    return _entry("missing", "; ".join(reasons))


def _entry(status: str, reason: str, image: str = "", content: bytes = b"") -> dict[str, str]:
    sha256 = hashlib.sha256(content).hexdigest() if image else ""
    return {"status": status, "image": image, "sha256": sha256, "reason": reason}


def _session() -> requests.Session:
    """Return a session that gives up a host without an answer after one more try, and asks a busy one again."""
    session, busy = requests.Session(), (429, 500, 502, 503, 504)
    patience = Retry(total=RETRIES, connect=1, read=1, backoff_factor=1, status_forcelist=busy, raise_on_status=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=patience, pool_maxsize=WORKERS))
    session.headers["User-Agent"] = "Mozilla/5.0 (compatible; nemolib; research on memorization)"
    return session


def _get(address: str, session: requests.Session) -> bytes:
    with session.get(address, timeout=TIMEOUT / 2, stream=True) as answer:
        answer.raise_for_status()
        content = bytearray()
        for part in answer.iter_content(2**16):
            content += part
            if len(content) > LARGEST:
                raise ValueError(f"more than {LARGEST // 2**20} MiB")
        return bytes(content)


def _image_suffix(content: bytes) -> str:
    """Return the usual suffix of an image; raise ValueError unless the bytes are a whole image of some size."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, size = image.format or "", image.size
            image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"no image ({type(error).__name__}: {_first_line(error)})") from error
    if min(size) < SMALLEST:
        raise ValueError(f"a placeholder of {size[0]} x {size[1]} pixels")
    return {"JPEG": "jpg"}.get(kind, kind.lower())


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
    except (ProfileError, ManifestError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was fetched stays, run again to go on\n")
        return 130
    if not outcomes:
        sys.stdout.write(f"profile {profile.name}: nothing to fetch, everything is in the repository\n")
    failed = [outcome.thing for outcome in outcomes if outcome.status == "failed"]
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(outcomes)} failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
