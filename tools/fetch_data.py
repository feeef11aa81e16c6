"""Fetching what a profile needs and the repository does not hold: ``python -m tools.fetch_data --profile sd14``.

``make data PROFILE=sd14`` runs it. What is fetched is data: a manifest in ``downloads/``, named by the profile's key
``downloads``, lists the files (large prompt tables, weights, the table of training images); the hub models are
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
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated

import pandas as pd
import pooch
import pydantic
import requests
import yaml
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from PIL import Image
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3 import Retry

from nemolib import paths
from nemolib.encoders import check_sha256
from nemolib.paths import write_atomic
from nemolib.pipeline import is_hub_id
from nemolib.prompts import IMAGE_REPORT, load_prompts
from nemolib.settings import Profile, ProfileError, load_profile
from nemolib.store import read_table, write_table

MANIFESTS = Path(__file__).with_name("downloads")
"""Where the manifests lie."""

MIRROR = "NEMO_DATA_MIRROR"
"""Environment variable: a folder in which files are looked for before the network."""

RETRIES, TIMEOUT, WORKERS = 3, 30, 8
"""How often a download that failed is tried again; seconds without an answer after which it has failed; images at once."""

SLOWEST = 4096
"""Bytes a second, on average and after `TIMEOUT`, below which the server of an image is given up."""

ARCHIVE = "https://web.archive.org/web/0id_/"
"""Before a URL: its first copy in the Wayback Machine, as it was, without a frame."""

IMAGE_COLUMNS = ("number", "kind", "caption", "url", "status", "image", "sha256", "reason")
"""Columns of the report on training images; status is ``found``, ``archived`` (Wayback Machine) or ``missing``."""

SMALLEST, LARGEST = 32, 64 * 2**20
"""Shortest side of an image in pixels (what is smaller is a placeholder), and largest file in bytes."""

WEIGHTS = ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
"""Files of a pipeline, but for variant and suffix."""


class DownloadError(RuntimeError):
    """Something that could not be fetched; the message names it, the reason and what to do."""


class SourceFile(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A file that comes from elsewhere.

    Attributes:
        path: Where it is put, relative to the folder of the manifest, and inside it.
        url: Where it comes from.
        sha256: Its SHA-256; None: nobody has stated it, so it is noted at the first use.
        optional: Whether everything but a few numbers can be computed without it.
    """

    path: str = pydantic.Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")
    url: str = pydantic.Field(pattern="^https?://")
    sha256: str | None = pydantic.Field(None, pattern="^[0-9a-f]{64}$")
    optional: bool = False


class Manifest(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What a world needs from elsewhere.

    Attributes:
        folder: Where it is put; in YAML relative to the repository.
        files: The files.
        training_images: Prompt table (one of the files) with the URLs of training images, or None.
    """

    folder: Annotated[Path, pydantic.AfterValidator(paths.resolve)]
    files: tuple[SourceFile, ...]
    training_images: str | None = None


def load_manifest(name: str | Path) -> Manifest:
    """Return a manifest.

    Args:
        name: Name of one in ``downloads/`` (``"sd14"``), or path of a YAML file.

    Raises:
        ProfileError: There is no such manifest, or entries do not fit.
    """
    path = Path(name).expanduser() if str(name).endswith((".yaml", ".yml")) else MANIFESTS / f"{name}.yaml"
    try:
        return Manifest.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, pydantic.ValidationError, yaml.YAMLError) as error:
        raise ProfileError(f"{path}: {error}") from error


def fetch_data(profile: Profile) -> Iterator[tuple[str, str, str]]:
    """Fetch what a profile needs and does not have yet; what fails does not stop the rest.

    Args:
        profile: Its key ``downloads`` names the manifest.

    Yields:
        For each thing, as soon as it is known: what it is; ``present``, ``copied``, ``downloaded``, ``missing`` (can be done
        without) or ``failed``; and where it lies, or why it failed and what to do.

    Raises:
        ProfileError: The manifest cannot be used.
        OSError: The disk is full; what was fetched stays.
    """
    manifest = load_manifest(profile.downloads) if profile.downloads else Manifest(folder=paths.DATA, files=())
    folder, todo = manifest.folder, []
    for file in manifest.files:
        todo.append((file.path, "missing" if file.optional else "failed", partial(fetch_file, file, folder)))
    todo += [(f"model {model[0]}", "failed", partial(fetch_model, *model)) for model in hub_models(profile)]
    if manifest.training_images:
        todo.append(("training images", "failed", partial(fetch_images, folder / manifest.training_images, folder)))
    for thing, without, fetch in todo:
        try:
            yield thing, *fetch()
        except (DownloadError, FileNotFoundError, ValueError) as error:
            yield thing, without, str(error)


def fetch_file(file: SourceFile, folder: Path) -> tuple[str, str]:
    """Put a file into a folder, unless it is there, and check it; return its status as in `fetch_data`, and its path.

    pooch takes it from the mirror if it holds the file, else from its URL, and checks it before it gets its name.

    Raises:
        DownloadError: There is no network; the source does not have it; what it has is another file.
        EncoderError: What is there is another file.
        OSError: The disk is full.
    """
    target, note, status = folder / file.path, folder / f"{file.path}.sha256", "present"
    expected = file.sha256 or (note.read_text(encoding="utf-8").strip() if note.is_file() else None)
    if not target.is_file():
        pooch.get_logger().setLevel(logging.ERROR)  # the progress bar says the rest
        mirrored = _in_mirror(file)
        status, source, retries = ("copied", str(mirrored), 0) if mirrored else ("downloaded", file.url, RETRIES)
        remedy = f"check the connection and run again, or let {MIRROR} name a folder that holds the right file"
        if constants.HF_HUB_OFFLINE and not mirrored:
            raise DownloadError(f"{file.path} is not there, and HF_HUB_OFFLINE forbids the network; unset it, {remedy}")
        registry, urls = {file.path: expected}, {file.path: source}
        try:
            cache = pooch.create(folder, base_url="", registry=registry, urls=urls, retry_if_failed=retries)
            cache.fetch(file.path, downloader=_take)
        except (requests.RequestException, ValueError) as error:
            reason = _first_line(error)
            raise DownloadError(f"{file.path} could not be fetched from {source}: {reason}; {remedy}") from error
    found = pooch.file_hash(target)
    if expected is None:
        write_atomic(note, f"{found}\n")
    else:
        check_sha256(target, found, expected=expected)
    return status, str(target)


def _take(source: str, target: str, cache: pooch.Pooch) -> None:
    """Write what a URL gives, or a file of the mirror, into a file; raise ValueError for what is no data."""
    if source.startswith(("http://", "https://")):
        pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)(source, target, cache)
    else:
        shutil.copyfile(source, target)
    with open(target, "rb") as file:
        start = file.read(256).lstrip().lower()
    if not start or start.startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{'a web page' if start else 'an empty file'} is there instead of data")


def _session() -> requests.Session:
    """Return a session that gives up a host without an answer after one more try, and asks a busy one again."""
    session, busy = requests.Session(), (429, 500, 502, 503, 504)
    patience = Retry(total=RETRIES, connect=1, read=1, backoff_factor=1, status_forcelist=busy, raise_on_status=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=patience, pool_maxsize=WORKERS))
    session.headers["User-Agent"] = "Mozilla/5.0 (compatible; nemolib; research on memorization)"
    return session


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


def hub_models(profile: Profile) -> list[tuple[str, str | None, tuple[str, ...]]]:
    """Return the hub models that a profile names, each once: hub id, revision, and the files that must be there."""
    suffix = f".{profile.variant}.safetensors" if profile.variant else ".safetensors"
    models = [(profile.model, profile.revision, ("model_index.json", *(f"{name}{suffix}" for name in WEIGHTS)))]
    encoders = (profile.encoders.alignment, profile.encoders.quality, profile.encoders.clip_quality)
    clip = ("config.json", "model.safetensors", "preprocessor_config.json")
    models += [(chosen.path, chosen.revision, clip) for chosen in encoders if chosen and chosen.kind == "clip"]
    return [model for model in dict.fromkeys(models) if is_hub_id(model[0])]


def fetch_model(repository: str, revision: str | None, files: Sequence[str]) -> tuple[str, str]:
    """Put a hub model into the hub's cache, unless it is there, and return its status as in `fetch_data`, and its folder.

    The cache is where ``HF_HOME`` says; tokens (``HF_TOKEN``, ``hf auth login``) and ``HF_HUB_OFFLINE`` are those of
    huggingface_hub. A download that was interrupted goes on where it stopped. No pickles are fetched, no copies of other
    precision, no weights of the safety checker.

    Args:
        repository: Hub id, ``owner/name``.
        revision: Commit or branch; None: its default branch.
        files: What must be there, beside configurations and tokenizers.

    Raises:
        DownloadError: No network, or forbidden, and the model is not in the cache; no such model or revision; no
            access; the revision lacks a file.
    """
    name = f"model {repository}{f' (revision {revision})' if revision else ''}"
    before = [try_to_load_from_cache(repository, file, revision=revision) for file in files]
    wanted = [*files, "*.json", "*/*.json", "*.txt", "tokenizer/*.txt"]
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        page = f"access is granted on its page, https://huggingface.co/{repository}; accept its licence there"
        raise DownloadError(f"{name}: {page}, log in with `hf auth login` or set HF_TOKEN, and run again") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DownloadError(
            f"{name}: not in the cache ({constants.HF_HUB_CACHE}), and could not be downloaded ({_first_line(error)}); check "
            "name, revision and connection, unset HF_HUB_OFFLINE, or set HF_HOME to a cache that holds it, and run again: "
            "a download goes on where it stopped"
        ) from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        why = "HF_HUB_OFFLINE forbids to fetch it; unset it, and run again"
        if not constants.HF_HUB_OFFLINE:
            why = "other formats than safetensors are not read, since they can run code; give a revision that has these"
        raise DownloadError(f"{name}: {', '.join(missing)} missing in {folder}; {why}")
    return "present" if before == [str(folder / file) for file in files] else "downloaded", str(folder)


def fetch_images(table: Path, folder: Path) -> tuple[str, str]:
    """Put the training images of a prompt table into ``images/`` of a folder, and say what is missing in ``images.csv``.

    Many have gone from their servers, so the Wayback Machine is asked too. An image that is there is not fetched again;
    one that is missing is tried again at every call. Everything but SSCD_Orig is computed without them.

    Args:
        table: Prompt table of memorized prompts with a column ``url``.
        folder: Folder of the world.

    Returns:
        Status as in `fetch_data`, and how many were found; the report has the columns `IMAGE_COLUMNS`, a row for each prompt.

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
    urls, session, entries = prompts["url"].drop_duplicates(), _session(), {}
    with ThreadPoolExecutor(WORKERS) as pool:
        asked = {pool.submit(_fetch_image, number, url, folder, known, session): url for number, url in urls.items()}
        try:
            for done in tqdm(as_completed(asked), desc="training images", unit="image", total=len(asked)):
                done.result()
        finally:  # whatever ends it, what was fetched is noted
            pool.shutdown(cancel_futures=True)
            for done, url in asked.items():
                fetched = not done.cancelled() and done.exception() is None
                entries[url] = done.result() if fetched else ("missing", "", "", "interrupted")
            found = pd.DataFrame(prompts["url"].map(entries).tolist(), columns=IMAGE_COLUMNS[4:], index=prompts.index)
            told = prompts[["kind", "caption", "url"]].assign(number=prompts.index).join(found)
            write_table(told[[*IMAGE_COLUMNS]], report)
    missing, archived = ((told["status"] == status).sum() for status in ("missing", "archived"))
    note = f"{len(told) - missing} of {len(told)}, {archived} of them from an archive; see {report}"
    return "missing" if missing else "present", note


def _fetch_image(
    number: int, url: str, folder: Path, known: Mapping[str, tuple[str, str]], session: requests.Session
) -> tuple[str, str, str, str]:
    """Put an image into its place; return status, image, SHA-256, reason: nothing is raised for what a server does."""
    for there in (folder / "images").glob(f"{number:04d}.*"):
        image = f"images/{there.name}"
        try:
            _suffix(there.read_bytes())
        except Exception as error:  # a damaged file may raise anything
            return "missing", "", "", f"{image} is damaged, delete it and run again ({_reason(error)})"
        status, reason = known.get(url, ("found", "it was there"))
        return status, image, pooch.file_hash(there), reason
    if not url or constants.HF_HUB_OFFLINE:
        return "missing", "", "", "HF_HUB_OFFLINE forbids the network" if url else "the table has no URL"
    reasons = []
    for status, before in (("found", ""), ("archived", ARCHIVE)):
        try:
            content = _content(before + html.unescape(url), session)
            suffix = _suffix(content)
        except Exception as error:  # a server may give anything
            reasons.append(f"{'archive: ' if before else ''}{_reason(error)}")
            continue
        image = f"images/{number:04d}.{suffix}"
        write_atomic(folder / image, content)
        return status, image, hashlib.sha256(content).hexdigest(), "; ".join(reasons)
    return "missing", "", "", "; ".join(reasons)


def _content(address: str, session: requests.Session) -> bytes:
    """Return what a URL gives; anything may be raised for what is an error, breaks off, is too large or comes too slowly."""
    content, started = bytearray(), time.monotonic()
    with session.get(address, timeout=TIMEOUT, stream=True) as answer:
        answer.raise_for_status()
        # What has arrived, without waiting for more: a server may send a byte now and then.
        while part := answer.raw.read1(2**16, decode_content=True):
            content += part
            seconds = time.monotonic() - started
            if len(content) > LARGEST:
                raise ValueError(f"more than {LARGEST // 2**20} MiB")
            if seconds > TIMEOUT and len(content) < SLOWEST * seconds:
                raise ValueError(f"too slow: {len(content)} bytes in {seconds:.0f} s")
    return bytes(content)


def _suffix(content: bytes) -> str:
    """Return the usual suffix of an image; anything may be raised unless it is whole and of some size."""
    with Image.open(io.BytesIO(content)) as image:
        image.convert("RGB")
        if min(image.size) < SMALLEST:
            raise ValueError(f"a placeholder of {image.width} x {image.height} pixels")
        return {"JPEG": "jpg"}.get(image.format, image.format.lower())


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the data of a profile from the command line; return the exit status, 1 if something needed is missing."""
    parser = argparse.ArgumentParser(prog="python -m tools.fetch_data", description=__doc__)
    parser.add_argument("--profile", default=os.environ.get("PROFILE") or "sd14", help="default: $PROFILE, else sd14")
    arguments = parser.parse_args(argv)
    statuses = {}
    try:
        profile = load_profile(arguments.profile)
        for thing, status, note in fetch_data(profile):
            statuses[thing] = status
            print(f"{status:>10}  {thing}: {note}", file=sys.stderr if status == "failed" else sys.stdout, flush=True)
    except (ProfileError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was fetched stays, run again to go on\n")
        return 130
    failed = [thing for thing, status in statuses.items() if status == "failed"]
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(statuses)} failed: {', '.join(failed)}\n")
    elif not statuses:
        sys.stdout.write(f"profile {profile.name}: nothing to fetch, everything is in the repository\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
