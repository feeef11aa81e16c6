import nbformat
import numpy as np
import pandas as pd
import pytest

from nemolib import paths
from nemolib.settings import load_profile
from nemolib.store import Grid, write_grid, write_table
from tools import results_full

NAMES = {"localization", "thresholds", "detection", "sample_grid"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(paths, "ROOT", tmp_path)


@pytest.fixture
def full():
    return load_profile("tiny-full")


@pytest.fixture
def saved(full):
    """Return the folder of a run with two tables and a grid."""
    build = paths.BUILD / full.name
    counts = pd.DataFrame({"prompt": list("abc"), "neuron_count": [5, 7, 20]})
    for name, table in {"localization": counts, "thresholds": pd.DataFrame({"tau": [0.4]})}.items():
        write_table(table, build / "tables" / f"{name}.csv")
    images = np.zeros((1, 1, 4, 4, 3), np.uint8)
    write_grid(Grid(images, ("a",), ("b",)), build / "grids" / "sample_grid.safetensors")
    return build


def executed(build, name, **run):
    notebook = nbformat.v4.new_notebook(metadata={"papermill": {"duration": 90.0, "exception": None} | run})
    nbformat.write(notebook, build / f"{name}.ipynb")


def test_results_are_kept_with_a_note_of_the_machine_and_the_time(full, saved):
    executed(saved, "03_localize_neurons")
    executed(saved, "04_deactivate_neurons", exception=True)
    folder = results_full.keep_results(full, NAMES)
    assert folder == paths.ROOT / "data" / "tiny" / "results_full"
    assert {path.name for path in folder.iterdir()} == {"README.md", "localization.csv", "thresholds.csv"}
    assert (folder / "localization.csv").read_bytes() == (saved / "tables" / "localization.csv").read_bytes()
    text = (folder / "README.md").read_text()
    times = " ".join(text.split()).partition("minutes | |")[2]
    assert "| 03_localize_neurons | 1.5 |" in times
    assert "04_deactivate_neurons" not in times, "a notebook that failed has no time"
    assert f"Machine: {results_full.machine()}. Time: 2 minutes" in text
    assert "Not computed: detection." in text, "a grid was computed, and stays out"
    assert "Left out" not in text


def test_keeping_again_leaves_nothing_old(full, saved, monkeypatch):
    executed(saved, "03_localize_neurons")
    folder = results_full.keep_results(full, NAMES)
    monkeypatch.setattr(results_full, "LARGEST", (saved / "tables" / "localization.csv").stat().st_size - 1)
    results_full.keep_results(full, NAMES)
    assert [path.name for path in folder.glob("*.csv")] == ["thresholds.csv"]
    assert "Left out, since they are large: localization." in (folder / "README.md").read_text()


def test_the_command_keeps_what_exhibits_read_and_says_what_to_do_without_a_run(full, saved, capsys):
    assert results_full.main(["--profile", "tiny-full"]) == 1
    assert "there is no executed notebook in" in capsys.readouterr().err
    executed(saved, "03_localize_neurons")
    assert results_full.main(["--profile", "tiny-full"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("# Results of profile tiny-full")
    assert {"scores", "copies"} <= set(told.partition("Not computed: ")[2].partition(".")[0].split(", "))
    assert {path.stem for path in paths.ROOT.rglob("results_full/*.csv")} == {"localization", "thresholds"}
    for path in (saved / "tables").iterdir():
        path.unlink()
    assert results_full.main(["--profile", "tiny-full"]) == 1
    assert "there is no table in" in capsys.readouterr().err
