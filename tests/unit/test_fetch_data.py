import hashlib
import io
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from nemolib.encoders import noted_sha256
from nemolib.holdout import ActivationStatistics
from nemolib.layers import STABLE_DIFFUSION_WIDTHS
from nemolib.prompts import PromptTableError, load_prompts
from nemolib.settings import load_profile
from tests.web import Cut, serve
from tools import fetch_data as tool
from tools.fetch_data import (
    DownloadError,
    ManifestError,
    SourceFile,
    convert_statistics,
    fetch_data,
    fetch_file,
    fetch_images,
    fetch_model,
    hub_models,
    load_manifest,
    main,
)

DATA = b"some bytes " * 1000
SHA = hashlib.sha256(DATA).hexdigest()
TABLE = b";Caption;URL;Index\n0;one;u;1\n1;two;u;2\n"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Ask no proxy for this machine, do not wait between attempts, know no mirror."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("NEMO_DATA_MIRROR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)


@pytest.fixture
def site():
    with serve() as site:
        yield site


def source(site, name, **values):
    return SourceFile(path="models/net.bin", url=f"{site.url}/{name}", **values)


def left(folder):
    """Return all files of a folder, hidden ones too."""
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def test_a_file_is_downloaded_once_and_tried_again_where_it_breaks_off(site, tmp_path):
    site.pages["/a.bin"] = [Cut(DATA), 503, DATA]
    file = source(site, "a.bin", sha256=SHA)
    assert fetch_file(file, tmp_path) == "downloaded"
    assert (tmp_path / "models" / "net.bin").read_bytes() == DATA
    assert fetch_file(file, tmp_path) == "present"
    assert site.asked == ["/a.bin"] * 3
    assert left(tmp_path) == ["net.bin"]


@pytest.mark.parametrize(
    ("page", "sha256", "reason"),
    [(404, SHA, "404"), (b"login page", SHA, "SHA256 hash of"), (Cut(DATA), None, ".*IncompleteRead")],
)
def test_what_fails_is_named_with_its_reason_and_leaves_nothing(site, tmp_path, page, sha256, reason):
    site.pages["/a.bin"] = page
    words = rf"net\.bin could not be fetched from \S+/a\.bin: {reason}.*check the connection.*{tool.MIRROR}=folder"
    with pytest.raises(DownloadError, match=words):
        fetch_file(source(site, "a.bin", sha256=sha256), tmp_path)
    assert left(tmp_path) == []


def test_a_file_that_was_changed_is_not_used_and_not_lost(site, tmp_path):
    target = tmp_path / "models" / "net.bin"
    target.parent.mkdir()
    target.write_bytes(DATA[:50])
    with pytest.raises(
        DownloadError, match=rf"net\.bin: SHA-256 is [0-9a-f]+, expected {SHA}.*delete it and run again"
    ):
        fetch_file(source(site, "a.bin", sha256=SHA), tmp_path)
    assert target.read_bytes() == DATA[:50]
    assert site.asked == []


def test_without_a_known_hash_the_first_one_is_noted(site, tmp_path):
    site.pages["/a.bin"] = DATA
    file = source(site, "a.bin")
    fetch_file(file, tmp_path)
    target = tmp_path / "models" / "net.bin"
    assert json.loads((tmp_path / "models" / "net.bin.sha256.json").read_text())["sha256"] == SHA
    assert fetch_file(file, tmp_path) == "present"
    assert noted_sha256(target) == SHA, "the encoders read the same note"
    target.write_bytes(DATA + b"more")
    with pytest.raises(DownloadError, match=r"expected [0-9a-f]+: another file.*delete the note of its SHA-256"):
        fetch_file(file, tmp_path)


def test_a_table_without_a_known_hash_must_have_its_rows(site, tmp_path):
    site.pages |= {"/t.csv": TABLE, "/page.html": b"<html>no table</html>"}
    for name, rows, words in [("t.csv", 3, "2 prompts, expected 3"), ("page.html", 2, "no prompt table")]:
        with pytest.raises(DownloadError, match=words):
            fetch_file(source(site, name, rows=rows), tmp_path)
        assert left(tmp_path) == []
    assert fetch_file(source(site, "t.csv", rows=2), tmp_path) == "downloaded"
    (tmp_path / "models" / "net.bin.sha256.json").unlink()
    with pytest.raises(DownloadError, match="2 prompts, expected 3 prompts; delete it"):
        fetch_file(source(site, "t.csv", rows=3), tmp_path)
    assert left(tmp_path) == ["net.bin"], "what somebody put there is not lost"


@pytest.mark.parametrize("place", ["models/net.bin", "folder/a.bin", "a.bin"])
def test_a_mirror_is_asked_first(site, tmp_path, monkeypatch, place):
    mirror = tmp_path / "mirror"
    (mirror / place).parent.mkdir(parents=True, exist_ok=True)
    (mirror / place).write_bytes(DATA)
    monkeypatch.setenv("NEMO_DATA_MIRROR", str(mirror))
    file = source(site, "folder/a.bin", sha256=SHA)
    assert fetch_file(file, tmp_path / "data") == "copied"
    assert (tmp_path / "data" / "models" / "net.bin").read_bytes() == DATA
    assert site.asked == []
    (mirror / place).unlink()
    site.pages["/folder/a.bin"] = DATA
    assert fetch_file(file, tmp_path / "other") == "downloaded", "what the mirror lacks"


def test_a_wrong_mirror_is_named(site, tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"old version")
    monkeypatch.setenv("NEMO_DATA_MIRROR", str(tmp_path))
    with pytest.raises(DownloadError, match=r"a\.bin: SHA256 hash of .*put the right file into the mirror, or unset"):
        fetch_file(source(site, "a.bin", sha256=SHA), tmp_path / "data")
    assert left(tmp_path / "data") == []
    monkeypatch.setenv("NEMO_DATA_MIRROR", str(tmp_path / "nowhere"))
    with pytest.raises(DownloadError, match="which is no folder"):
        fetch_file(source(site, "a.bin", sha256=SHA), tmp_path / "data")


def test_offline_is_respected(site, tmp_path, monkeypatch):
    site.pages["/a.bin"] = DATA
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"models/net\.bin is not there, and HF_HUB_OFFLINE forbids the network"):
        fetch_file(source(site, "a.bin", sha256=SHA), tmp_path)
    assert site.asked == []


# The manifest


def test_the_manifest_of_sd14():
    manifest = load_manifest("sd14")
    known = {file.path: file for file in manifest.files}
    assert manifest.root.parts[-2:] == ("data", "sd14")
    assert known["prompts/memorized.csv"].sha256.startswith("0b527a59")
    assert known["prompts/holdout.csv"].rows == 50_000
    assert [path for path, file in known.items() if file.sha256 is None] == ["prompts/holdout.csv"]
    assert all(file.url.startswith("https://") for file in manifest.files)


def test_the_profile_uses_what_the_manifest_fetches():
    profile, manifest = load_profile("sd14"), load_manifest("sd14")
    fetched = {f"{manifest.folder}/{file.path}": file for file in manifest.files}
    assert {profile.prompts.memorized, profile.prompts.unmemorized, profile.prompts.holdout} <= set(fetched)
    assert profile.prompts.quality in fetched
    assert profile.statistics == f"{manifest.folder}/{manifest.statistics}"
    for encoder in (profile.encoders.copy, profile.encoders.quality):
        assert fetched[encoder.path].sha256 == encoder.sha256


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("folder: x\nfiles: [{path: ../a, url: 'http://b/a'}]", r"files.0.path: .*must be a file inside.*not '\.\./a'"),
        ("folder: x\nfiles: [{path: a, url: 'ftp://b/a'}]", "files.0.url: .*https.*not 'ftp://b/a'"),
        ("folder: x\nfiles: [{path: a, url: 'http://b/a', sha256: abc}]", "files.0.sha256: .*not 'abc'"),
        ("folder: x\nfiles: [{path: a, url: 'http://b/a', row: 3}]", "files.0.row: Extra inputs .*not 3"),
        ("files: [{path: a}]", "folder: Field required.*files.0.url: Field required"),
        ("folder: x\nfiles: []\ntraining_images: t.csv", "training_images is 't.csv', which is not among the files"),
        ("folder: x\nfiles: [{path: a, url: 'http://b'}, {path: a, url: 'http://b'}]", "a path is listed twice"),
        ("folder: [", "while parsing"),
        ("", "Input should be a valid dictionary"),
    ],
)
def test_a_broken_manifest_is_named(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError, match=words) as error:
        load_manifest(path)
    assert str(path) in str(error.value)


def test_an_unknown_manifest_lists_the_known_ones():
    with pytest.raises(ManifestError, match=r"no manifest 'sd15'.*known: sd14"):
        load_manifest("sd15")


# Models of the hub


def test_a_model_is_fetched_at_its_revision_without_pickles(monkeypatch, tmp_path):
    asked = {}

    def snapshot(repository, **options):
        asked.update(options, repository=repository)
        for name in (name for name in options["allow_patterns"] if "*" not in name):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("tools.fetch_data.snapshot_download", snapshot)
    assert fetch_model("owner/name", "abc", "pipeline") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("owner/name", "abc")
    patterns = asked["allow_patterns"]
    assert "unet/diffusion_pytorch_model.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".ckpt", ".py", "*")) or "fp16" in pattern for pattern in patterns)


def test_a_revision_without_safetensors_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr("tools.fetch_data.snapshot_download", lambda repository, **options: str(tmp_path))
    with pytest.raises(
        DownloadError, match=r"model.safetensors, preprocessor_config.json missing in .*give a revision"
    ):
        fetch_model("owner/name", None, "clip")


def test_a_model_that_is_not_cached_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DownloadError, match=r"model owner/name \(revision abc\): not in the cache .*HF_HUB_OFFLINE"):
        fetch_model("owner/name", "abc", "pipeline")


def test_a_model_behind_a_licence(monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError

    def snapshot(repository, **options):
        response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
        raise GatedRepoError("403 Client Error: access is restricted", response=response)

    monkeypatch.setattr("tools.fetch_data.snapshot_download", snapshot)
    with pytest.raises(DownloadError, match=r"https://huggingface\.co/owner/name; accept its licence.*HF_TOKEN"):
        fetch_model("owner/name", None, "pipeline")


def test_the_models_of_a_profile():
    profile = load_profile("sd14")
    models = hub_models(profile)
    assert [(name, kind) for name, _, kind in models] == [
        ("CompVis/stable-diffusion-v1-4", "pipeline"),
        ("openai/clip-vit-base-patch32", "clip"),
    ]
    assert all(len(revision) == 40 for _, revision, _ in models)
    assert hub_models(load_profile("tiny")) == hub_models(load_profile("sd14-dryrun")) == []


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


@pytest.fixture(autouse=True)
def _archive(site, monkeypatch):
    monkeypatch.setattr(tool, "ARCHIVE", f"{site.url}/web/")


def images_of(world):
    return fetch_images(world / "prompts" / "memorized.csv", world)


def test_images_from_their_server_or_from_an_archive(site, world):
    report = images_of(world).set_index("caption")
    assert report["status"].to_dict() == {
        "here": "found",
        "archived": "archived",
        "corrupt": "missing",
        "pixel": "missing",
        "escaped": "found",
        "again": "found",
        "nowhere": "missing",
        "none": "missing",
    }
    assert report["image"][["here", "archived", "escaped", "again"]].tolist() == [
        "images/0000.jpg",
        "images/0001.png",
        "images/0004.webp",
        "images/0000.jpg",
    ]
    assert (world / "images" / "0000.jpg").read_bytes() == picture()
    assert report["sha256"]["here"] == hashlib.sha256(picture()).hexdigest()
    assert left(world / "images") == ["0000.jpg", "0001.png", "0004.webp"]


def test_the_report_says_why_an_image_is_missing(site, world):
    images_of(world)
    report = pd.read_csv(world / "images.csv", keep_default_na=False).set_index("caption")
    assert report["reason"]["corrupt"].startswith("ValueError: no image (OSError: ")
    assert "archive: HTTP 404" in report["reason"]["corrupt"]
    assert "a placeholder of 1 x 3 pixels" in report["reason"]["pixel"]
    assert report["reason"]["archived"] == "HTTP 404"
    assert "ConnectionError" in report["reason"]["nowhere"]
    assert report["reason"]["none"] == "the table has no URL"


def test_later_steps_use_what_was_found(site, world):
    images_of(world)
    table = load_prompts(world / "prompts" / "memorized.csv").set_index("caption")
    assert table["image"]["archived"] == "images/0001.png"
    assert table["image"]["corrupt"] == ""
    assert table["image"]["again"] == "images/0000.jpg"


def test_only_missing_images_are_fetched_again(site, world):
    images_of(world)
    site.asked.clear()
    site.pages["/corrupt.jpg"] = picture()
    (world / "images" / "0003.png").write_bytes(picture(kind="PNG"))  # by hand, from a backup
    report = images_of(world).set_index("caption")
    assert report["status"]["corrupt"] == "found"
    assert report["reason"]["pixel"] == "put there by hand"
    assert report["status"]["archived"] == "archived"
    assert not {"/here.jpg", "/pixel.gif", "/gone.png"} & set(site.asked)
    (world / "images.csv").unlink()
    assert images_of(world).set_index("caption")["status"]["archived"] == "found", "a lost report costs no image"


def test_offline_images_are_reported_missing(site, world, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    report = images_of(world)
    assert set(report["status"]) == {"missing"}
    assert site.asked == []


def test_tables_without_urls_or_of_another_kind(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(";Caption;type\n0;a;VM\n")
    with pytest.raises(DownloadError, match="has no column 'url'"):
        fetch_images(path, tmp_path)
    path.write_text(";Caption;URL\n0;a;u\n")
    with pytest.raises(PromptTableError, match="column 'type' is missing"):
        fetch_images(path, tmp_path)


# All together


def released(widths=STABLE_DIFFUSION_WIDTHS):
    generator = torch.Generator().manual_seed(0)
    return tuple([torch.rand(width, generator=generator) for width in widths] for _ in range(2))


@pytest.fixture
def profile(site, world, tmp_path):
    """Return a profile file with a manifest whose files the site has."""
    torch.save(released(), tmp_path / "s.pt")
    site.pages |= {
        "/p/memorized.csv": (world / "prompts" / "memorized.csv").read_bytes(),
        "/s.pt": (tmp_path / "s.pt").read_bytes(),
    }
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(
        f"""
folder: {tmp_path / "data"}
files:
  - {{path: prompts/memorized.csv, url: "{site.url}/p/memorized.csv"}}
  - {{path: statistics.pt, url: "{site.url}/s.pt"}}
  - {{path: models/inception.pt, url: "{site.url}/gone.pt", optional: true}}
released_statistics: statistics.pt
statistics_count: 50000
training_images: prompts/memorized.csv
"""
    )
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"extends: tiny\ndownloads: {manifest}\nstatistics: {tmp_path / 'data' / 'statistics.safetensors'}\n"
    )
    return path


def test_everything_is_fetched_and_what_fails_does_not_stop_the_rest(profile, tmp_path):
    profile = load_profile(profile)
    statuses = [outcome.status for outcome in fetch_data(profile, ("files", "models"))]
    assert statuses == ["downloaded", "downloaded", "missing", "converted"]
    converted = ActivationStatistics.load(tmp_path / "data" / "statistics.safetensors")
    assert converted.widths == STABLE_DIFFUSION_WIDTHS
    assert converted.count == 50_000
    assert all(torch.equal(a, b) for a, b in zip(converted.mean, released()[0], strict=True))
    again = [outcome.status for outcome in fetch_data(profile, ("files",))]
    assert again == ["present", "present", "missing", "present"]


def test_statistics_of_another_model_are_refused(tmp_path, profile):
    manifest = load_manifest(load_profile(profile).downloads)
    manifest.root.mkdir()
    torch.save(released((8, 8)), manifest.root / "statistics.pt")
    outcome = convert_statistics(manifest)
    assert outcome.status == "failed"
    assert "layers of [8, 8] neurons, expected [320, 320, 640" in outcome.note
    (manifest.root / "statistics.pt").write_bytes(b"cut")
    assert "is not readable" in convert_statistics(manifest).note
    assert not (manifest.root / "statistics.safetensors").exists()


def test_the_command(profile, capsys):
    arguments = ["--profile", str(profile)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "downloaded  prompts/memorized.csv" in printed
    assert "missing  training images: 4 of 8, 1 of them from an archive; see" in printed
    assert main([*arguments, "--only", "files"]) == 0


def test_the_command_fails_if_something_needed_is_missing(profile, site, capsys):
    del site.pages["/s.pt"]
    assert main(["--profile", str(profile), "--only", "files"]) == 1
    printed = capsys.readouterr()
    assert "failed  statistics.pt: statistics.pt could not be fetched" in printed.err
    assert "2 of 4 failed" in printed.err
    assert "downloaded  prompts/memorized.csv" in printed.out


def test_the_command_with_nothing_to_fetch_or_an_unknown_profile(capsys):
    assert main(["--profile", "tiny"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out
    assert main(["--profile", "none"]) == 1
    assert "unknown profile 'none'" in capsys.readouterr().err
