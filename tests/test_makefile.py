"""The Makefile, in a copy of the repository that holds small notebooks and a stand-in for the environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest

from nemolib import paths
from tests.notebook_files import save_notebook

TARGETS = [
    "help", "env", "lab", "all", "notebooks", "figures", "explore", "beyond", "data", "estimate", "check-gpu",
    "published", "results-full", "site", "readme", "test", "lint",
    "train", "student", "refresh", "lock", "clean",
]  # fmt: skip

NAMES = ("01_threshold", "02_score", "03_neurons", "06_figures")
SOONEST = ["01_threshold", "03_neurons", "02_score", "06_figures"]
"""The order in which two at once end soonest."""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path):
    """Return a folder with the Makefile, four notebooks, and a finished .venv whose tools are those of the tests."""
    shutil.copy(paths.ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / "nemolib").mkdir()
    (tmp_path / "nemolib" / "code.py").touch()
    for name in NAMES:
        save_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "print(profile)")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, module in {"python": "", "nbstripout": "-m nbstripout"}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (tools / name).chmod(0o755)
    for path in [*tmp_path.rglob("*.ipynb"), *tmp_path.rglob("*.py"), *tmp_path.glob("*.*")]:
        _set_age(path, 1000)
    _set_age(tmp_path / ".venv" / ".installed", 900)
    return tmp_path


@pytest.fixture
def alone(checkout):
    """Return that folder with the first notebook alone: each costs a process."""
    for name in NAMES[1:]:
        (checkout / "notebooks" / f"{name}.ipynb").unlink()
    return checkout


def _set_age(path, seconds):
    path.touch()
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def make(folder, *arguments):
    outer = ("PROFILE", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "JOBS", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in outer} | {
        "PYTHONPATH": str(paths.ROOT)
    }
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=environment)


def planned(folder, *arguments):
    """Return the names of the notebooks that make would run, in this order."""
    lines = make(folder, "-n", *arguments).stdout.splitlines()
    return [line.split("notebooks/")[1].split(".ipynb")[0] for line in lines if "-m tools.runner" in line]


def test_the_default_lists_every_target_with_a_line(checkout):
    shown = make(checkout)
    assert shown.returncode == 0
    assert shown.stdout == make(checkout, "help").stdout
    assert re.findall(r"^  make ([\w-]+) +\S.*$", shown.stdout, re.MULTILINE) == TARGETS


def test_the_lab_prefers_the_kernel_of_the_environment_and_serves_what_notebooks_link_to(checkout):
    shown = make(checkout, "-n", "lab").stdout
    assert f'JUPYTER_PATH="{checkout.resolve()}/.venv/share/jupyter${{JUPYTER_PATH:+:$JUPYTER_PATH}}"' in shown
    assert ".venv/bin/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks" in shown
    settings = json.loads((paths.ROOT / "docs/jupyter/labconfig/default_setting_overrides.json").read_text())
    assert settings["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"] == {"markdown": "Markdown Preview"}


def test_make_all_runs_the_notebooks_in_order(checkout):
    assert planned(checkout, "all") == SOONEST
    assert planned(checkout, "figures") == list(NAMES)
    assert planned(checkout, "build/tiny/02_score.ipynb") == ["01_threshold", "02_score"]
    for name in ("04_more", "05_ablations"):
        save_notebook(checkout / "notebooks" / f"{name}.ipynb")
    order = planned(checkout, "figures")
    assert sorted(order) == sorted([*NAMES, "04_more", "05_ablations"])
    assert order.index("03_neurons") < order.index("04_more") < order.index("06_figures")
    assert planned(checkout, "all") == [*SOONEST[:3], "05_ablations", "04_more", "06_figures"]


def test_notebooks_run_side_by_side_and_share_the_cores(checkout):
    stand_in = (
        '#!/bin/sh\n[ "$2" != tools.runner ] || { touch "$6"; echo "threads: $OMP_NUM_THREADS of $MAKEFLAGS"; }\n'
    )
    (checkout / ".venv" / "bin" / "python").write_text(stand_in)
    cores = os.cpu_count()
    for arguments, jobs, threads in [
        ((), 2, -(-cores // 2)),
        (("JOBS=999",), 999, 1),
        (("JOBS=1",), 1, cores),
        (("-j3", "OMP_NUM_THREADS=7"), 3, 7),
    ]:
        shown = make(checkout, "all", *arguments)
        assert shown.returncode == 0, shown.stderr
        found = re.findall(r"threads: (\d+) of .*-j(\d+)", shown.stdout)
        assert set(found) == {(str(threads), str(jobs))}, shown.stdout
        shutil.rmtree(checkout / "build")
    # A make that make runs takes its jobs from it.
    assert "jobserver" not in make(checkout, "-n", "test").stderr


def test_a_page_to_move_by_hand_comes_after_the_search(checkout):
    save_notebook(checkout / "notebooks" / "explore.ipynb")
    assert planned(checkout, "explore") == ["03_neurons", "explore"]
    assert "explore" in planned(checkout, "all")
    assert "open in a browser: figures/mine/explore.html" in make(checkout, "-n", "explore", "PROFILE=mine.yaml").stdout


def test_what_came_after_the_paper_is_a_target_of_its_own(checkout):
    save_notebook(checkout / "notebooks" / "beyond" / "07_more.ipynb")
    assert planned(checkout, "beyond") == ["01_threshold", "02_score", "03_neurons", "beyond/07_more"]
    assert planned(checkout, "all") == SOONEST
    assert "--verify" in (lint := make(checkout, "-n", "lint").stdout)
    assert "notebooks/beyond/07_more.ipynb" in lint


def test_only_what_is_older_than_its_sources_runs_again(checkout):
    (checkout / "build" / "tiny").mkdir(parents=True)
    for position, name in enumerate(NAMES):
        _set_age(checkout / "build" / "tiny" / f"{name}.ipynb", 800 - position)
    assert planned(checkout, "all") == []
    _set_age(checkout / "notebooks" / "03_neurons.ipynb", 100)
    assert planned(checkout, "all") == ["03_neurons", "06_figures"]
    _set_age(checkout / "nemolib" / "code.py", 100)
    assert planned(checkout, "all") == SOONEST


@pytest.mark.parametrize(
    ("profile", "folder"), [("tiny-full", "tiny-full"), ("mine.yaml", "mine"), ("~/my worlds/a b.yaml", "a_b")]
)
def test_another_profile_has_its_own_folder(checkout, profile, folder):
    shown = make(checkout, "-n", "all", f"PROFILE={profile}").stdout
    assert f'--profile "{profile}"' in shown
    assert f"build/{folder}/01_threshold.partial.ipynb" in shown
    shown = make(checkout, "-n", "published", f"PROFILE={profile}", "RUN=~/my results.csv").stdout
    assert '-p "published_run=~/my results.csv" notebooks/06_figures.ipynb' in shown


def test_tests_and_training_need_the_environment(checkout):
    (checkout / ".venv" / ".installed").unlink()
    for target in ("test", "train", "lab", "lint", "notebooks"):
        assert "pip install" in make(checkout, "-n", target).stdout
    shutil.rmtree(checkout / ".venv")
    assert "Python 3.11 or later is needed" in make(checkout, "env", "PYTHON=").stderr


@pytest.mark.slow
def test_a_failed_notebook_leaves_nothing_finished_and_names_the_cell(checkout):
    target = checkout / "build" / "tiny" / "01_threshold.ipynb"
    save_notebook(checkout / "notebooks" / "01_threshold.ipynb", "a = 1\nraise ValueError('too warm')")
    shown = make(checkout, "-j2", "all")
    assert shown.returncode != 0
    assert "01_threshold.ipynb: cell 2 (a = 1) failed: ValueError: too warm" in shown.stderr
    assert not target.exists()
    assert target.with_suffix(".partial.ipynb").exists()
    assert not (checkout / "build" / "tiny" / "02_score.ipynb").exists()

    save_notebook(checkout / "notebooks" / "01_threshold.ipynb", "print(profile)")
    shown = make(checkout, "build/tiny/01_threshold.ipynb")
    assert shown.returncode == 0, shown.stderr
    assert "01_threshold.ipynb: done in" in shown.stderr
    assert target.exists()
    assert not target.with_suffix(".partial.ipynb").exists()
    assert make(checkout, "-q", "build/tiny/01_threshold.ipynb").returncode == 0


def test_students_get_no_solutions(alone):
    save_notebook(
        alone / "notebooks" / "beyond" / "07_more.ipynb",
        "'[words](../../docs/notation.md) [01](../01_threshold.ipynb)'",
    )
    path = save_notebook(alone / "notebooks" / "01_threshold.ipynb", "question = 1", "answer = 2")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata["tags"] = ["solution"]
    nbformat.write(notebook, path)
    before = path.read_bytes()
    assert make(alone, "student").returncode == 0
    text = (alone / "build" / "student" / "01_threshold.ipynb").read_text()
    assert "question" in text
    assert "answer" not in text
    deeper = (alone / "build" / "student" / "beyond" / "07_more.ipynb").read_text()
    assert "(../../../docs/notation.md) [01](../01_threshold.ipynb)" in deeper
    assert [file.name for file in (alone / "build" / "student").iterdir() if file.is_file()] == ["01_threshold.ipynb"]
    assert path.read_bytes() == before


@pytest.mark.slow
def test_refreshed_notebooks_keep_outputs_and_nothing_of_the_run(alone):
    shown = make(alone, "refresh", "PROFILE=tiny-full")
    assert shown.returncode == 0, shown.stderr
    notebook = nbformat.read(alone / "notebooks" / "01_threshold.ipynb", as_version=4)
    last = notebook.cells[-1]
    assert last.outputs[0].text == "tiny\n"
    assert last.execution_count == 2
    assert "papermill" not in notebook.metadata
    assert not any({"papermill", "execution"} & set(cell.metadata) for cell in notebook.cells)
    assert make(alone, "-n", "lint").stdout.count("--verify notebooks/01_threshold.ipynb") == 1


def test_clean_keeps_figures_and_environment(checkout):
    for folder in ("build/tiny", "figures/tiny", "tests/__pycache__", "tools/__pycache__", "notebooks/__pycache__"):
        (checkout / folder).mkdir(parents=True)
    assert make(checkout, "clean").returncode == 0
    kept = [
        folder for folder in ("build", "tests/__pycache__", "figures/tiny", ".venv") if (checkout / folder).exists()
    ]
    assert kept == ["figures/tiny", ".venv"]
