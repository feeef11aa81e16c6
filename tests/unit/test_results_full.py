import json
from dataclasses import replace

import nbformat
import pandas as pd
import pytest

from nemolib import paths, tables
from nemolib.exhibits import results_full
from nemolib.experiments_mitigation import NEMO, NONE, RANDOM
from nemolib.profiles import load_profile


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(paths, "ROOT", tmp_path)


def save(profile, neurons, *, without=()):
    mitigated = [
        (setting, kind, value, 0.1)
        for kind in ("vm", "tm")
        for setting, value in ((NONE, 0.9), (RANDOM, 0.8), (NEMO, 0.2))
    ]
    contents = {
        "localization": pd.DataFrame({"kind": ["vm", "vm", "tm"], "initial_count": [9, 9, 30], "neuron_count": [neurons, neurons + 2, 20]}),
        "thresholds": pd.DataFrame({"tau": [0.4] * 4}),
        "detection": pd.DataFrame({"score": "score_paper", "memorized": ["vm + tm", "vm"], "auroc": [0.97, 0.99]}),
        "table_1": pd.DataFrame(mitigated, columns=["setting", "kind", "sscd_orig", "sscd_orig_mad"]),
    }  # fmt: skip
    for name, content in contents.items():
        if name not in without:
            tables.save_table(content, name, profile=profile)


def executed(profile, name, *, seconds=90.0, **run):
    notebook = nbformat.v4.new_notebook(metadata={"papermill": {"duration": seconds, "exception": None} | run})
    path = paths.build_dir(profile) / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def test_main_numbers():
    save("tiny", 3)
    found = results_full.main_numbers(lambda name: tables.read_table(name, profile="tiny"))
    assert found["memorization neurons per prompt, VM"] == "4.0 ± 1.0"
    assert found["initial selection per prompt, TM"] == "30.0 ± 0.0"
    assert found["prompts, VM"] == "2"
    assert found["memorization threshold"] == "0.400"
    assert found["AUROC, VM + TM"] == "0.970"
    assert found["AUROC, TM"] == "not computed"
    assert found["SSCD_Orig, VM, NeMo"] == "0.20 ± 0.10"


def test_results_are_kept_with_a_note_of_the_machine_and_the_time():
    save("tiny-full", 5, without=["detection"])
    executed("tiny-full", "03_localize_neurons")
    executed("tiny-full", "04_deactivate_neurons", exception=True)
    folder = results_full.keep_results("tiny-full", ["localization", "thresholds", "table_1", "detection"])
    assert folder == paths.ROOT / "data" / "tiny" / "results_full"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "localization.csv", "run.json", "table_1.csv", "thresholds.csv",
    ]  # fmt: skip
    kept = folder / "localization.csv"
    assert kept.read_bytes() == tables.table_path("localization", profile="tiny-full").read_bytes()
    record = json.loads((folder / "run.json").read_text())
    assert record["seconds"] == {"03_localize_neurons": 90.0}, "a notebook that failed has no time"
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["processor"]
    text = (folder / "README.md").read_text()
    assert "| 03_localize_neurons | 1.5 |" in text
    assert record["machine"]["processor"] in text
    assert "Not computed: detection." in text
    assert "Left out" not in text


def test_keeping_again_leaves_nothing_old(monkeypatch):
    save("tiny-full", 5)
    executed("tiny-full", "03_localize_neurons")
    folder = results_full.keep_results("tiny-full", ["localization", "thresholds"])
    size = tables.table_path("localization", profile="tiny-full").stat().st_size
    monkeypatch.setattr(results_full, "LARGEST", size - 1)
    results_full.keep_results("tiny-full", ["localization", "thresholds"])
    assert [path.name for path in folder.glob("*.csv")] == ["thresholds.csv"]
    assert "Left out, since they are large: localization." in (folder / "README.md").read_text()


def test_both_profiles_side_by_side():
    save("tiny", 3)
    assert results_full.beside_full("tiny") is None
    save("tiny-full", 7)
    executed("tiny-full", "03_localize_neurons")
    results_full.keep_results("tiny-full", ["localization", "thresholds"])
    table = results_full.beside_full("tiny").set_index("quantity")
    assert table.columns.tolist() == ["tiny", "tiny-full", "paper"]
    assert table.loc["memorization neurons per prompt, VM"].tolist() == ["4.0 ± 1.0", "8.0 ± 1.0", "4 ± 3"]
    assert table.loc["AUROC, VM"].tolist() == ["0.990", "not computed", "0.9964"]
    assert table.loc["SSCD_Orig, TM, NeMo"].tolist() == ["0.20 ± 0.10", "not computed", "0.05 ± 0.03"]
    assert table.loc["AUROC, TM", "paper"] == ""
    assert results_full.beside_full("tiny-full") is None, "not beside itself"
    assert results_full.beside_full(replace(load_profile("tiny"), model="another/model")) is None


def test_without_a_run_the_message_says_what_to_do(capsys):
    assert results_full.main(["--profile", "tiny-full"]) == 1
    assert "there is no table in" in capsys.readouterr().err
    save("tiny-full", 5)
    assert results_full.main(["--profile", "tiny-full"]) == 1
    assert "there is no executed notebook in" in capsys.readouterr().err
    executed("tiny-full", "03_localize_neurons")
    assert results_full.main(["--profile", "tiny-full"]) == 0
    assert capsys.readouterr().out.startswith("# Results of profile tiny-full")


def test_every_table_of_an_exhibit_is_kept():
    assert {"localization", "table_1", "scores", "overview"} <= results_full._read_by_exhibits()
