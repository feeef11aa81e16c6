"""How notebooks are compared: what is forgiven, and that computed numbers never are."""

import configparser
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from nemolib import paths
from tests.notebook_files import save_notebook

SANITIZERS = paths.ROOT / "tests" / "notebooks" / "sanitize.cfg"


def sanitized(text):
    """Return a text as nbval compares it."""
    parser = configparser.RawConfigParser()
    parser.read(SANITIZERS)
    for name in parser.sections():
        text = re.sub(parser[name]["regex"], parser[name]["replace"], text)
    return text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("made 2026-01-02 03:04:05.678", "made 2027-11-12T13:14:15"),
        ("took 12.3 s", "took 7 s"),
        ("took 1:02:03", "took 0:00:59"),
        ("3.5 prompts/s", "12 prompts/s"),
        ("<object at 0x7f12ab34cd56>", "<object at 0x55aa00ff1122>"),
        ("device: cpu", "device: cuda:0"),
        ("saved /home/ada/nemo/figures/tiny/a.pdf", "saved /srv/x/figures/tiny/a.pdf"),
    ],
)
def test_what_differs_between_equal_runs_is_forgiven(one, other):
    assert sanitized(one) == sanitized(other)


@pytest.mark.parametrize(
    "text",
    [
        "score 0.431 +- 0.070 over 3 seeds",
        "median 6 neurons, min 0.5 max 17",
        "vm 0.77 sd 0.06\ntm 0.67 sd 0.15",
        "layer 3: 507, 517",
        "1e-05 -0.25 [0:10] 12:30",
        "figures/tiny/figure_3.pdf",
    ],
)
def test_computed_numbers_are_never_forgiven(text):
    assert sanitized(text) == text


def run_nbval(folder):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    shown = subprocess.run(
        [sys.executable, *command, "--nbval-sanitize-with", str(SANITIZERS), "."],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return shown.returncode, shown.stdout


@pytest.mark.slow
def test_changed_numbers_fail_and_changed_pages_do_not(tmp_path):
    shutil.copy(paths.ROOT / "conftest.py", tmp_path)
    code = "import random\ndisplay({'text/plain': 'n = 3, 1.5 s', 'text/html': str(random.random())}, raw=True)"
    path = save_notebook(tmp_path / "x.ipynb", code)
    notebook = nbformat.read(path, as_version=4)
    cell = notebook.cells[-1]
    cell.metadata["tags"] = ["nbval-check-output"]
    data = {"text/plain": "n = 3, 9.9 s", "text/html": "0.123"}
    cell.outputs = [nbformat.v4.new_output("display_data", data=data)]
    notebook.cells[1].execution_count, cell.execution_count = 1, 2
    nbformat.write(notebook, path)
    assert run_nbval(tmp_path)[0] == 0

    cell.outputs[0]["data"]["text/plain"] = "n = 4, 9.9 s"
    nbformat.write(notebook, path)
    status, shown = run_nbval(tmp_path)
    assert status == 1
    assert "n = 4" in shown
