import json

import numpy as np
import pandas as pd
import pytest

from nemolib import paths, tables
from nemolib.store import StoreError


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    return tmp_path


def test_a_table_comes_back_bit_by_bit():
    table = pd.DataFrame({"caption": ["a, b", 'say "NA"', "NA"], "score": [0.1 + 0.2, 1e-17, np.nan], "n": [1, 2, 3]})
    path = tables.save_table(table, "scores", profile="tiny")
    assert path == paths.tables_dir("tiny") / "scores.csv"
    pd.testing.assert_frame_equal(tables.read_table("scores", profile="tiny"), table)


def test_a_missing_table_and_a_missing_column_are_named():
    with pytest.raises(FileNotFoundError, match=r"scores\.csv; run the notebook"):
        tables.read_table("scores", profile="tiny")
    tables.save_table(pd.DataFrame({"a": [1]}), "scores", profile="tiny")
    with pytest.raises(StoreError, match="column 'b' is missing"):
        tables.read_table("scores", profile="tiny", columns=["a", "b"])


def test_a_grid_comes_back(build):
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 5, 3), dtype=np.uint8)
    labels = {"rows": ["a", "ü"], "columns": ["x", "y", "z"]}
    path = tables.save_grid(images, "samples", profile="tiny", **labels)
    grid = tables.read_grid("samples", profile="tiny")
    assert np.array_equal(grid.images, images)
    assert grid.rows == ("a", "ü")
    assert grid.columns == ("x", "y", "z")
    first = path.read_bytes()
    assert tables.save_grid(images, "samples", profile="tiny", **labels).read_bytes() == first


def test_a_grid_needs_a_label_for_each_row_and_column():
    with pytest.raises(ValueError, match="1 row and 3 column labels"):
        tables.save_grid(np.zeros((2, 3, 4, 5)), "samples", rows=["a"], columns=list("xyz"), profile="tiny")
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        tables.Grid(np.zeros((2, 3)), ("a", "b"), ("x", "y", "z"))


def test_a_grid_that_is_missing_or_something_else():
    with pytest.raises(FileNotFoundError, match="there is no image grid"):
        tables.read_grid("samples", profile="tiny")
    path = tables.grid_path("samples", profile="tiny")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no grid")
    with pytest.raises(ValueError, match="holds no image grid"):
        tables.read_grid("samples", profile="tiny")


def test_median_and_mad_leave_out_what_is_missing():
    assert tables.median_mad([1, 2, 4, np.nan]) == (2, 1)
    assert tables.format_median_mad([0.826, 0.83, 0.99]) == "0.83 ± 0.00"
    assert tables.format_median_mad(pd.Series([1, 2, 4, 10]), digits=1) == "3.0 ± 1.5"
    with pytest.raises(ValueError, match="at least one value"):
        tables.median_mad([np.nan])


def test_markdown_and_latex():
    table = pd.DataFrame({"name": ["a|b", "50 % & _x", None], "value": [0.5, np.nan, 2.0]})
    assert tables.to_markdown(table).splitlines() == [
        "| name | value |",
        "| --- | --- |",
        "| a\\|b | 0.5 |",
        "| 50 % & _x |  |",
        "|  | 2.0 |",
    ]
    latex = tables.to_latex(table)
    assert latex.startswith("\\begin{tabular}{lr}\n\\toprule\nname & value \\\\\n")
    assert r"50 \% \& \_x &  \\" in latex


def test_export_writes_three_forms_and_what_they_came_from():
    table = pd.DataFrame({"setting": ["mean ± sd"], "ours": [0.4]})
    arguments = {"profile": "tiny", "notebook": "01", "inputs": {"thresholds": table}, "seeds": {"detection": 1}}
    files = tables.export_table(table, "table_4", **arguments)
    assert {path.name for path in files.values()} == {"table_4.csv", "table_4.md", "table_4.tex", "table_4.json"}
    assert files["csv"].parent == paths.figures_dir("tiny")
    assert "mean $\\pm$ sd" in files["tex"].read_text()
    assert set(json.loads(files["json"].read_text())["inputs"]) == {"thresholds"}
    before = {name: path.read_bytes() for name, path in files.items()}
    again = tables.export_table(table, "table_4", **arguments)
    assert {name: path.read_bytes() for name, path in again.items()} == before
