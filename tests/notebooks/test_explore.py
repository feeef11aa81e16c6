"""Notebook ``explore`` runs without anybody who moves its sliders, for a profile that is not the tiny one."""

import nbformat
import pytest
import yaml

from nemolib import paths
from tests.random_world import SMALL, write_encoders, write_prompts
from tools.runner import run_notebook

pytestmark = pytest.mark.slow

NOTEBOOK = paths.NOTEBOOKS / "explore.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory, random_model_folder):
    """Return the executed notebook and the page that it wrote."""
    folder = tmp_path_factory.mktemp("explore")
    holdout = [f"{first} {second}" for first in "abcd" for second in "uvwxyz"]
    prompts = write_prompts(folder, {"a fox": "vm", "a $5 case": "tm"}, unmemorized=["a tree"], holdout=holdout)
    keys = SMALL | {
        "model": str(random_model_folder),
        "prompts": prompts,
        "holdout_size": 24,
        "thresholds": {"value": -0.5},
    }
    keys |= {"search": {"theta_min": 2.0, "k_max": 2}, "encoders": write_encoders(folder, random_model_folder)}
    (folder / "random.yaml").write_text(yaml.safe_dump({k: v for k, v in keys.items() if k != "name"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_ROOT", str(folder))
        parameters = {"profile": str(folder / "random.yaml"), "prompts": 1, "samples": 2, "steps": 2}
        run_notebook(NOTEBOOK, folder / "explore.ipynb", parameters)
    return nbformat.read(folder / "explore.ipynb", as_version=4), folder / "figures" / "random" / "explore.html"


def test_a_still_frame_stands_where_no_front_end_moves_the_sliders(executed):
    notebook, _ = executed
    data = next(cell for cell in notebook.cells if cell.id == "explore-panel").outputs[-1].data
    assert "application/vnd.jupyter.widget-view+json" in data
    assert " neurons off, score " in data["text/html"]
    assert data["text/html"].count("<img ") == 3
    still = next(cell for cell in notebook.cells if cell.id == "explore-frames").outputs[-1].data["text/html"]
    assert still.count("<img ") == still.count(' alt="') == 4


def test_nothing_is_drawn_on_the_error_stream(executed):
    notebook, page = executed
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert page.is_file()
