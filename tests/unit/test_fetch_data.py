import hashlib
import io
import re
import subprocess
import zlib
from concurrent.futures import as_completed
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import httpx
import pandas as pd
import pytest
import yaml
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from nemolib import paths
from nemolib.encoders import EncoderError
from nemolib.prompts import load_prompts
from nemolib.settings import ProfileError, load_profile
from tests.web import Cut, Slow, serve
from tools import fetch_data as tool
from tools.fetch_data import DownloadError, SourceFile, fetch_images, fetch_model, load_manifest, main

DATA = b"some bytes " * 1000
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Ask no proxy for this machine, do not wait between attempts, know no mirror."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(tool.MIRROR, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)


@pytest.fixture
def site(monkeypatch):
    with serve() as site:
        monkeypatch.setattr(tool, "ARCHIVE", f"{site.url}/web/")
        yield site


@pytest.fixture
def fetch(site, tmp_path):
    """Return a function that fetches a page of the site as data/models/net.bin, and returns its status."""

    def fetch(name, **values):
        file = SourceFile(path="models/net.bin", url=f"{site.url}/{name}", **values)
        return tool.fetch_file(file, tmp_path / "data")[0]

    return fetch


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "models" / "net.bin"


def left(folder):
    """Return all files of a folder, hidden ones too."""
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def test_a_file_is_downloaded_once_and_tried_again_where_it_breaks_off(site, fetch, target):
    site.pages["/a.bin"] = [Cut(DATA), 503, DATA]
    assert fetch("a.bin", sha256=SHA) == "downloaded"
    assert target.read_bytes() == DATA
    assert fetch("a.bin", sha256=SHA) == "present"
    assert site.asked == ["/a.bin"] * 3
    assert left(target.parent) == ["net.bin"]


@pytest.mark.parametrize(
    ("page", "sha256", "reason"),
    [
        (404, SHA, "404"),
        (b"other bytes", SHA, "SHA256 hash of"),
        (Cut(DATA), None, ".*IncompleteRead.5500 bytes read"),
        (b"\n<!DOCTYPE html>", None, "a web page is there"),
        (b"", None, "an empty file is there"),
    ],
)
def test_what_fails_is_named_with_its_reason_and_leaves_nothing(site, fetch, tmp_path, page, sha256, reason):
    site.pages["/a.bin"] = page
    words = rf"net\.bin could not be fetched from \S+/a\.bin: {reason}.*check the connection.*{tool.MIRROR} name a"
    with pytest.raises(DownloadError, match=words):
        fetch("a.bin", sha256=sha256)
    assert left(tmp_path) == []


def test_a_file_that_was_changed_is_not_used_and_not_lost(site, fetch, target):
    site.pages["/a.bin"] = DATA
    assert fetch("a.bin") == "downloaded", "the first hash is noted, since none is known"
    assert (target.parent / "net.bin.sha256").read_text() == f"{SHA}\n"
    assert fetch("a.bin") == "present"
    target.write_bytes(DATA[:50])
    for sha256 in (SHA, None):
        with pytest.raises(EncoderError, match=rf"net\.bin: expected SHA-256 {SHA}, but the file has"):
            fetch("a.bin", sha256=sha256)
    assert target.read_bytes() == DATA[:50]
    assert site.asked == ["/a.bin"]


def test_a_mirror_is_asked_first(site, fetch, target, tmp_path, monkeypatch):
    monkeypatch.setenv(tool.MIRROR, str(tmp_path))
    site.pages["/folder/a.bin"] = DATA
    for place in ("models/net.bin", "folder/a.bin", "a.bin"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(DATA)
        assert fetch("folder/a.bin", sha256=SHA) == "copied"
        (tmp_path / place).unlink()
        target.unlink()
    assert site.asked == []
    assert fetch("folder/a.bin", sha256=SHA) == "downloaded", "what the mirror lacks"


def test_a_wrong_mirror_is_named_and_offline_is_respected(site, fetch, tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"old version")
    for mirror, words in [
        (tmp_path, rf"a\.bin: SHA256 hash of .*let {tool.MIRROR} name a folder that holds the right file"),
        (tmp_path / "nowhere", "which is no folder"),
        ("", r"models/net\.bin is not there, and HF_HUB_OFFLINE forbids the network"),
    ]:
        monkeypatch.setenv(tool.MIRROR, str(mirror))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not mirror)
        with pytest.raises(DownloadError, match=words):
            fetch("a.bin", sha256=SHA)
    assert left(tmp_path) == ["a.bin"]
    assert site.asked == []


# The manifest


def test_the_profile_uses_what_the_manifest_fetches():
    profile, manifest = load_profile("sd14"), load_manifest("sd14")
    fetched = {str(manifest.folder / file.path): file for file in manifest.files}
    assert {str(paths.resolve(table)) for table in (profile.prompts.holdout, profile.prompts.quality)} <= set(fetched)
    for shipped in (profile.prompts.memorized, profile.prompts.unmemorized, profile.statistics):
        assert paths.resolve(shipped).is_file()
    if (paths.ROOT / ".git").exists():
        asked = ["git", "check-ignore", *fetched]
        ignored = subprocess.run(asked, cwd=paths.ROOT, capture_output=True, text=True).stdout
        assert ignored.splitlines() == list(fetched), "what is fetched is never committed"
    for encoder in (profile.encoders.copy, profile.encoders.quality):
        assert fetched[str(paths.resolve(encoder.path))].sha256 == encoder.sha256
    assert [file.path for file in manifest.files if not file.sha256] == ["prompts/holdout.csv"]
    assert all(file.url.startswith("https://") for file in manifest.files)
    assert manifest.training_images in {file.path for file in manifest.files}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("files: [{path: ../a, url: 'ftp://b/a', rows: 3}]", r"folder\n.*'\.\./a'.*url\n.*https.*rows\n.*Extra"),
        ("folder: [", "while parsing"),
        (None, "No such file"),
    ],
)
def test_a_broken_or_unknown_manifest_is_named(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ProfileError, match=rf"(?s){path}.*{words}"):
        load_manifest(path)


# Models of the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Let the hub put what is asked for by its whole name into a cache; return what was asked, and files that it lacks."""
    asked, snapshot = {"lost": []}, tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"

    def download(repository, **options):
        asked.update(options, repository=repository)
        for name in (name for name in options["allow_patterns"] if "*" not in name and name not in asked["lost"]):
            (snapshot / name).parent.mkdir(exist_ok=True, parents=True)
            (snapshot / name).touch()
        return str(snapshot)

    monkeypatch.setattr(tool, "snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return asked


def test_a_model_is_fetched_once_at_its_revision_without_pickles(hub, tmp_path):
    profile = replace(load_profile("tiny"), model="owner/name", revision="abc")
    for variant, suffix in ((None, ""), ("fp16", ".fp16")):
        (model,) = tool.hub_models(replace(profile, variant=variant))
        for status in ("downloaded", "present"):
            assert fetch_model(*model) == (status, str(tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"))
        assert (hub["repository"], hub["revision"]) == ("owner/name", "abc")
        exact = [pattern for pattern in hub["allow_patterns"] if "*" not in pattern]
        assert exact == ["model_index.json", *(f"{name}{suffix}.safetensors" for name in tool.WEIGHTS)]
        assert {Path(pattern).suffix for pattern in hub["allow_patterns"]} == {".json", ".safetensors", ".txt"}


def test_a_model_that_cannot_be_had_is_named_with_the_reason(hub, monkeypatch):
    hub["lost"] = ["model.safetensors"]
    for offline, words in ((False, "give a revision"), (True, "HF_HUB_OFFLINE forbids")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(DownloadError, match=rf"name: model.safetensors missing in .*{words}"):
            fetch_model("owner/name", None, ["config.json", "model.safetensors"])
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    for error, words in [
        (GatedRepoError("403", response=response), r"https://huggingface\.co/owner/name; accept its licence.*HF_TOKEN"),
        (OSError("offline"), r"model owner/name: not in the cache .*\(offline\).*HF_HUB_OFFLINE"),
    ]:
        monkeypatch.setattr(tool, "snapshot_download", Mock(side_effect=error))
        with pytest.raises(DownloadError, match=words):
            fetch_model("owner/name", None, ["config.json"])


def test_the_models_of_a_profile():
    models = tool.hub_models(load_profile("sd14"))
    assert [name for name, _, _ in models] == ["CompVis/stable-diffusion-v1-4", "openai/clip-vit-base-patch32"]
    assert all(len(revision) == 40 for _, revision, _ in models)
    assert tool.hub_models(load_profile("tiny")) == tool.hub_models(load_profile("sd14-dryrun")) == []


# Training images


def picture(side=48, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side + 2), (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def world(site, tmp_path):
    """Return a folder whose prompt table has URLs of every kind."""
    urls = {
        "here": f"{site.url}/here.jpg",
        "archived": f"{site.url}/gone.png",
        "corrupt": f"{site.url}/corrupt.jpg",
        "pixel": f"{site.url}/pixel.gif",
        "escaped": f'"{site.url}/escaped.jpg?a=1&amp;b=2"',
        "again": f"{site.url}/here.jpg",
        "nowhere": "http://127.0.0.1:9/closed.jpg",
        "none": "",
    }
    rows = "".join(f"{i};{name};{url};{'VM' if i % 2 else 'TM'}\n" for i, (name, url) in enumerate(urls.items()))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "memorized.csv").write_text(f";Caption;URL;type\n{rows}")
    site.pages |= {
        "/here.jpg": picture(),
        f"/web/{site.url}/gone.png": picture(kind="PNG"),
        "/corrupt.jpg": picture()[:-200],
        "/pixel.gif": picture(side=1, kind="GIF"),
        "/escaped.jpg?a=1&b=2": picture(kind="WEBP"),
    }
    return tmp_path


def images_of(world):
    """Fetch the images of a world; return the report by caption."""
    fetch_images(world / "prompts" / "memorized.csv", world)
    return pd.read_csv(world / "images.csv", keep_default_na=False).set_index("caption")


def test_images_from_their_server_or_from_an_archive_and_why_others_are_missing(site, world):
    report = images_of(world)
    found = {"here": "0000.jpg", "archived": "0001.png", "escaped": "0004.webp", "again": "0000.jpg"}
    expected = {name: f"images/{found[name]}" if name in found else "" for name in report.index}
    assert report["image"].to_dict() == expected
    later = load_prompts(world / "prompts" / "memorized.csv").set_index("caption")
    assert later["image"].to_dict() == expected, "later steps use what was found"
    assert left(world / "images") == ["0000.jpg", "0001.png", "0004.webp"]
    statuses = {name: "found" if name in found else "missing" for name in report.index} | {"archived": "archived"}
    assert report["status"].to_dict() == statuses
    assert (world / "images" / "0000.jpg").read_bytes() == picture()
    assert report["sha256"]["here"] == hashlib.sha256(picture()).hexdigest()
    for name, words in {
        "corrupt": "^OSError: .*archive: HTTPError: 404",
        "pixel": "a placeholder of 1 x 3 pixels",
        "archived": "^HTTPError: 404",
        "nowhere": "ConnectionError",
        "none": "^the table has no URL$",
    }.items():
        assert re.search(words, report["reason"][name]), name


def test_only_missing_images_are_fetched_again(site, world):
    images_of(world)
    site.asked.clear()
    site.pages["/corrupt.jpg"] = picture()
    (world / "images" / "0003.png").write_bytes(picture(kind="PNG"))  # by hand, from a backup
    report = images_of(world)
    assert report["status"][["corrupt", "archived", "pixel"]].tolist() == ["found", "archived", "found"]
    assert report["reason"]["pixel"] == "it was there"
    assert not {"/here.jpg", "/pixel.gif", "/gone.png"} & set(site.asked)
    (world / "images.csv").unlink()
    assert images_of(world)["status"]["archived"] == "found", "a lost report costs no image"


def test_what_is_damaged_or_comes_too_slowly_is_missing_with_a_reason(site, world, monkeypatch):
    chunk = b"\0\0\0\0iCCP" + zlib.crc32(b"iCCP").to_bytes(4)
    whole = picture(kind="PNG")
    site.pages |= {"/here.jpg": whole[:-12] + chunk + whole[-12:], "/corrupt.jpg": Slow(picture())}
    (world / "images").mkdir()
    (world / "images" / "0003.png").write_bytes(whole[:50])
    monkeypatch.setattr(tool, "TIMEOUT", 1)  # of the others too, on a busy machine
    report = images_of(world)
    assert report["status"][["here", "corrupt", "pixel"]].tolist() == ["missing"] * 3
    assert report["reason"]["here"].startswith("IndexError: ")
    assert "too slow" in report["reason"]["corrupt"]
    assert "images/0003.png is damaged, delete it and run again" in report["reason"]["pixel"]


def test_an_interrupted_fetch_notes_what_was_fetched(world, monkeypatch):
    def interrupted(futures):
        yield from islice(as_completed(futures), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "as_completed", interrupted)
    monkeypatch.setattr(tool, "WORKERS", 1)
    with pytest.raises(KeyboardInterrupt):
        images_of(world)
    report = pd.read_csv(world / "images.csv", keep_default_na=False)
    assert sorted(set(report["image"]) - {""}) == [f"images/{name}" for name in left(world / "images")] != []
    assert "interrupted" in set(report["reason"])


def test_images_without_network_or_urls(site, world, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert set(images_of(world)["status"]) == {"missing"}
    assert site.asked == []
    path = world / "t.csv"
    path.write_text(";Caption;type\n0;a;VM\n")
    with pytest.raises(DownloadError, match="has no column 'url'"):
        fetch_images(path, world)


# All together


@pytest.fixture
def profile(site, world, tmp_path):
    """Return a profile file with a manifest whose files the site has, but for an optional one."""
    site.pages |= {"/p/memorized.csv": (world / "prompts" / "memorized.csv").read_bytes(), "/net.pt": DATA}
    files = {"prompts/memorized.csv": "p/memorized.csv", "models/net.pt": "net.pt", "models/inception.pt": "gone.pt"}
    listed = [{"path": path, "url": f"{site.url}/{name}", "optional": "gone" in name} for path, name in files.items()]
    manifest = {"folder": str(tmp_path / "data"), "files": listed, "training_images": "prompts/memorized.csv"}
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: tiny\ndownloads: {tmp_path / 'manifest.yaml'}\n")
    return path


def test_everything_is_fetched_once_and_what_fails_does_not_stop_the_rest(profile, tmp_path, capsys):
    for status in ("downloaded", "present"):
        assert main(["--profile", str(profile)]) == 0
        printed = capsys.readouterr().out
        assert [line.split()[0] for line in printed.splitlines()] == [status, status, "missing", "missing"]
        assert f"{status}  prompts/memorized.csv" in printed
        assert "missing  training images: 4 of 8, 1 of them from an archive; see" in printed
    assert (tmp_path / "data" / "models" / "net.pt").read_bytes() == DATA


def test_the_command_fails_if_something_needed_is_missing(profile, site, capsys):
    del site.pages["/net.pt"], site.pages["/p/memorized.csv"]
    lost = ["failed  models/net.pt: models/net.pt could not be", "3 of 4 failed", "missing  models/inception.pt"]
    for named, status, words in ((profile, 1, lost), ("tiny", 0, ["nothing to fetch"]), ("none", 1, ["'none'"])):
        assert main(["--profile", str(named)]) == status
        printed = "".join(capsys.readouterr())
        assert all(word in printed for word in words)
