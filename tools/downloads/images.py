"""Training images by the URLs of a prompt table: many have gone, so the Wayback Machine is asked too.

What is found lies in ``images/`` of the world's folder; ``images.csv`` says for each prompt what was found and what
not. Everything else goes on without the missing ones.
"""

from __future__ import annotations

import hashlib
import html
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nemolib.batching import progress_bar
from nemolib.downloads.files import DownloadError, load_pooch, offline
from nemolib.files import write_atomic
from nemolib.prompts import IMAGE_REPORT, load_prompts
from nemolib.store import read_table, write_table

ARCHIVE = "https://web.archive.org/web/0id_/"
"""Before a URL: its first copy in the Wayback Machine, as it was, without a frame."""

COLUMNS = ("number", "kind", "caption", "url", "status", "image", "sha256", "reason")
"""Columns of the report; status is ``found``, ``archived`` (Wayback Machine) or ``missing``."""

SMALLEST = 32
"""Shortest side of an image in pixels; what is smaller is a placeholder."""

LARGEST = 64 * 2**20
"""Largest file in bytes."""

_AGENT = "Mozilla/5.0 (compatible; nemolib; research on memorization)"
_BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class _Found:
    """What one URL gave: status, suffix and bytes of the image, or the reason why there is none."""

    status: str
    suffix: str = ""
    content: bytes = b""
    reason: str = ""


def fetch_images(
    table: Path,
    folder: Path,
    *,
    archive: str = ARCHIVE,
    retries: int = 3,
    timeout: float = 30,
    workers: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Put the training images of a prompt table into ``images/`` of a folder, and say what is missing.

    An image that is there is not fetched again; one that is missing is tried again at every call.

    Args:
        table: Prompt table of memorized prompts with a column ``url``.
        folder: Folder of the world; the report is its ``images.csv``.
        archive: What is put before a URL to find it in an archive; empty: no archive is asked.
        retries: How often a busy server is asked again.
        timeout: Seconds without an answer after which a server is given up.
        workers: Images fetched at the same time.
        progress: Whether to show a progress bar.

    Returns:
        The report, one row for each prompt: `COLUMNS`.

    Raises:
        PromptTableError: The table cannot be used.
        DownloadError: The table has no URLs.
        OSError: The disk is full; images that were found stay.
    """
    prompts = load_prompts(table)
    if "url" not in prompts:
        raise DownloadError(f"{table} has no column 'url', so there are no training images to fetch")
    urls = dict.fromkeys(url for url in prompts["url"] if url)
    numbers = {url: int(prompts.index[prompts["url"] == url][0]) for url in urls}
    earlier = _earlier(folder, numbers)
    wanted = [url for url in urls if url not in earlier]
    if wanted and not offline():
        load_pooch()  # which brings requests; say so before the threads start
    fetched = _fetch_all(wanted, _Getter(archive, retries, timeout), numbers, folder, workers, progress)
    rows = [_row(number, prompt, {**earlier, **fetched}) for number, prompt in prompts.iterrows()]
    report = pd.DataFrame(rows, columns=list(COLUMNS))
    write_table(report, folder / IMAGE_REPORT)
    return report


def _fetch_all(
    urls: list[str],
    get: Callable[[str], _Found],
    numbers: dict[str, int],
    folder: Path,
    workers: int,
    progress: bool,
) -> dict[str, dict[str, str]]:
    """Return for each URL the entries of the report; images are written as they come."""
    entries = {}
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    try:
        jobs = {pool.submit(get, url): url for url in urls}
        with progress_bar(len(jobs), "training images", unit="image", enabled=progress and bool(jobs)) as bar:
            for job in as_completed(jobs):
                entries[jobs[job]] = _keep(job.result(), numbers[jobs[job]], folder)
                bar.update()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return entries


def _keep(found: _Found, number: int, folder: Path) -> dict[str, str]:
    """Write an image, if there is one; return the entries of the report."""
    if not found.content:
        return {"status": found.status, "image": "", "sha256": "", "reason": found.reason}
    image = f"images/{number:04d}.{found.suffix}"
    write_atomic(folder / image, found.content)
    digest = hashlib.sha256(found.content).hexdigest()
    return {"status": found.status, "image": image, "sha256": digest, "reason": found.reason}


def _earlier(folder: Path, numbers: dict[str, int]) -> dict[str, dict[str, str]]:
    """Return the entries of images that are there, by URL; files are written at once, so each is complete."""
    known = {}
    if (folder / IMAGE_REPORT).is_file():
        report = read_table(folder / IMAGE_REPORT, columns=COLUMNS).fillna("")
        known = {row["url"]: {name: str(row[name]) for name in COLUMNS[4:]} for _, row in report.iterrows()}
    there = {}
    for path in sorted((folder / "images").glob("[0-9][0-9][0-9][0-9]*.*")):
        there[path.stem] = f"images/{path.name}"
    entries = {}
    for url, number in numbers.items():
        image = there.get(f"{number:04d}")
        if image is not None:
            entry = {"status": "found", "reason": "found earlier"} | known.get(url, {})
            digest = hashlib.sha256((folder / image).read_bytes()).hexdigest()
            entries[url] = entry | {"image": image, "sha256": digest}
            if entry["status"] == "missing":
                entries[url] |= {"status": "found", "reason": "put there by hand"}
    return entries


def _row(number: int, prompt: pd.Series, entries: dict[str, dict[str, str]]) -> dict[str, Any]:
    nothing = {"status": "missing", "image": "", "sha256": "", "reason": "the table has no URL"}
    basics = {"number": number, "kind": prompt["kind"], "caption": prompt["caption"], "url": prompt["url"]}
    return basics | entries.get(prompt["url"], nothing)


class _Getter:
    """Fetches the image of a URL, from its server or from an archive; one session per thread."""

    def __init__(self, archive: str, retries: int, timeout: float) -> None:
        self._archive, self._retries, self._timeout = archive, retries, timeout
        self._threads = threading.local()

    def __call__(self, url: str) -> _Found:
        """Return what was found; never raises for what a server does."""
        if offline():
            return _Found("missing", reason="HF_HUB_OFFLINE forbids the network")
        address = html.unescape(url)
        if not address.startswith(("http://", "https://")):
            return _Found("missing", reason=f"no http address: {address[:80]}")
        places = [("found", address)] + ([("archived", self._archive + address)] if self._archive else [])
        reasons = []
        for status, place in places:
            try:
                content = self._content(place)
                return _Found(status, _image_suffix(content), content, "; ".join(reasons))
            except (OSError, ValueError) as error:  # all of requests' errors are OSErrors, bad addresses ValueErrors
                reasons.append(f"{'archive: ' if status == 'archived' else ''}{_short(error)}")
        return _Found("missing", reason="; ".join(reasons))

    def _content(self, address: str) -> bytes:
        with self._session().get(address, timeout=self._timeout, stream=True) as answer:
            answer.raise_for_status()
            parts, size = [], 0
            for part in answer.iter_content(2**16):
                parts.append(part)
                size += len(part)
                if size > LARGEST:
                    raise ValueError(f"more than {LARGEST // 2**20} MiB")
            return b"".join(parts)

    def _session(self) -> Any:
        if not hasattr(self._threads, "session"):
            import requests
            from requests.adapters import HTTPAdapter
            from urllib3 import Retry

            session = requests.Session()
            # A host that does not exist or does not answer is given up after one more try; a busy one is asked again.
            patience = Retry(
                total=self._retries, connect=1, read=1, backoff_factor=1, status_forcelist=_BUSY, raise_on_status=False
            )
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=patience))
            session.headers["User-Agent"] = _AGENT
            self._threads.session = session
        return self._threads.session


def _image_suffix(content: bytes) -> str:
    """Return the usual suffix of an image; raise ValueError unless the bytes are a whole image of some size."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, size = image.format or "", image.size
            image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"no image ({_short(error)})") from error
    if min(size) < SMALLEST:
        raise ValueError(f"a placeholder of {size[0]} x {size[1]} pixels")
    return {"JPEG": "jpg"}.get(kind, kind.lower())


def _short(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    text = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {text[0]}"[:160]
