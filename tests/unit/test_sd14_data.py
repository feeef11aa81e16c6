"""The files of Stable Diffusion v1-4 in the repository: what they hold, and that they are made as is said."""

import gzip
import hashlib
import pickle

import pandas as pd
import pytest
import torch

from nemolib.holdout import load_statistics
from nemolib.layers import STABLE_DIFFUSION_WIDTHS
from nemolib.prompts import load_prompts
from nemolib.settings import load_profile
from tests.web import serve
from tools import sd14_data
from tools.fetch_data import load_manifest
from tools.sd14_data import FOLDER, STATISTICS, TABLES, load_released, make_data

STATISTICS_FILE = FOLDER / "statistics.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return a folder like that of the originals: with columns that are not kept, and statistics as a pickle."""
    folder = tmp_path_factory.mktemp("originals")
    for original, (name, _) in TABLES.items():
        table = pd.read_csv(FOLDER / name, sep=";", dtype=str, keep_default_na=False)
        table.insert(1, "URL", "http://a.org/1.jpg")
        table.to_csv(folder / original, sep=";")
    kept = load_statistics(STATISTICS_FILE)
    torch.save((list(kept.mean), list(kept.std)), folder / STATISTICS)
    return folder


def contents(folder):
    """Return the files of a folder by name, unpacked."""
    files = [*(name for name, _ in TABLES.values()), STATISTICS_FILE.name]
    read = {name: (folder / name).read_bytes() for name in files}
    return {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in read.items()}


def test_statistics_of_another_model_are_refused(originals, tmp_path):
    for original in TABLES:
        (tmp_path / original).symlink_to(originals / original)
    torch.save(([torch.ones(8)], [torch.ones(8)]), tmp_path / STATISTICS)
    with pytest.raises(ValueError, match=r"layers of \[8\] neurons"):
        make_data(tmp_path, tmp_path)


class Evil:
    """Would run code where it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code was run",))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save(([Evil()], []), tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights only"):
        load_released(tmp_path / "evil.pt")


def test_captions_and_numbers_and_no_more():
    assert not any(b"://" in content for name, content in contents(FOLDER).items() if name.endswith((".csv", ".gz")))
    assert sum(path.stat().st_size for path in [FOLDER / name for name, _ in TABLES.values()]) < 400_000
    statistics = load_statistics(STATISTICS_FILE)
    assert (statistics.widths, sum(statistics.widths)) == (STABLE_DIFFUSION_WIDTHS, 5760)
    assert statistics.count == 50_000
    profile = load_profile("sd14")
    memorized = load_prompts(profile.prompts.memorized)
    assert memorized["kind"].value_counts().to_dict() == {"vm": 112, "tm": 388}
    assert len(load_prompts(profile.prompts.unmemorized, kind="unmemorized")) == 500
    run = pd.read_csv(FOLDER / "results.csv.gz", sep=";")
    assert run["Caption"].tolist() == memorized["caption"].tolist()[:251]


def test_where_they_come_from_is_said():
    manifest, said = load_manifest(FOLDER / "sources.yaml"), (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {file.path for file in manifest.files} == {*TABLES, STATISTICS}
    assert all(file.sha256 in said for file in manifest.files)
    assert all(name in said for name in [*(name for name, _ in TABLES.values()), STATISTICS_FILE.name])


def test_the_command_takes_the_originals_that_are_stated_and_no_others(originals, tmp_path, monkeypatch, capsys):
    with serve() as site:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        files = []
        for path in originals.iterdir():
            site.pages[f"/{path.name}"] = path.read_bytes()
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            files.append(f"{{path: {path.name}, url: '{site.url}/{path.name}', sha256: {sha256}}}")
        (tmp_path / "sources.yaml").write_text(f"folder: {tmp_path / 'fetched'}\nfiles: [{', '.join(files)}]\n")
        monkeypatch.setattr(sd14_data, "FOLDER", tmp_path)
        assert sd14_data.main() == 0
        assert contents(tmp_path) == contents(FOLDER)
        (tmp_path / "fetched" / STATISTICS).write_bytes(b"other")
        assert sd14_data.main() == 1
        assert "expected SHA-256" in capsys.readouterr().err
