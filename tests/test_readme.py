"""What the README says can be done can be done."""

import dataclasses
import re
import subprocess

import pytest

import nemolib
import nemolib.pipeline
from nemolib import paths
from nemolib.settings import load_profile
from tools import estimate

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_five_lines_run(random_model_folder, monkeypatch):
    load = nemolib.pipeline.load_pipeline
    tiny = load_profile("tiny")
    fewer = dataclasses.replace(tiny.detection, samples=3)
    search = dataclasses.replace(tiny.search, theta_min=4.0)
    profile = dataclasses.replace(tiny, model=str(random_model_folder), detection=fewer, search=search)
    monkeypatch.setattr(nemolib.pipeline, "load_pipeline", lambda name: load(profile if name == "tiny" else name))
    example, mitigated = blocks("python")
    scope = {"holdout_prompts": [f"prompt {number}" for number in range(8)], "prompt": "a fox", "tau": 0.5}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["image"].size == (64, 64)
    assert isinstance(scope["found"].neurons, nemolib.NeuronSet)
    exec(compile(mitigated, "README.md", "exec"), scope)
    assert [image.size for image in scope["images"]] == 4 * [(64, 64)]


def test_the_profile_of_the_reader_loads(tmp_path):
    (example,) = blocks("yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(example)
    assert load_profile(path).generation.samples == 10


def test_every_command_is_a_target():
    targets = set(re.findall(r"^([a-z-]+):", (paths.ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README))
    assert {"all", "test"} <= named <= targets


def test_the_table_lists_every_notebook():
    listed = re.findall(r"^\| `(\d\d_\w+)` \|", README, re.MULTILINE)
    assert listed == sorted(path.stem for path in paths.NOTEBOOKS.glob("[0-9]*.ipynb"))


NAMED = re.findall(r"(?:`|\.venv/bin/python )((?:nemolib|data|tests|tools|benchmarks)/[\w./-]+)", README)


@pytest.mark.parametrize("path", sorted(set(NAMED)))
def test_every_path_is_there(path):
    assert (paths.ROOT / path).exists()


def test_the_costs_are_those_of_the_estimate():
    assert estimate.cost_table(estimate.stages(load_profile("sd14")), per_second=40.0) in README


def test_the_citation_is_the_same_everywhere():
    (bibtex,) = blocks("bibtex")
    citation = (paths.ROOT / "CITATION.cff").read_text()
    title = re.sub(r"[{}]", "", re.search(r"title += {(.*)},", bibtex)[1])
    assert f'"{title}"' in citation
    for name in re.findall(r"(\w+), \w+", re.search(r"author += {(.*)},", bibtex)[1]):
        assert f"family-names: {name}" in citation


def test_git_ignores_what_a_run_writes():
    written = ["build/tiny/x.ipynb", ".venv/bin/python", "nemolib/__pycache__/x.pyc"]
    kept = ["figures/tiny/figure_3.pdf", "data/tiny/model/model_index.json", "requirements.lock"]
    shown = subprocess.run(
        ["git", "check-ignore", "--no-index", *written, *kept], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert shown.stdout.split() == written


def test_each_test_that_the_page_of_models_names_is_there():
    page = (paths.ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    files = {
        path.relative_to(paths.ROOT / "tests"): path.read_text(encoding="utf-8")
        for path in paths.ROOT.glob("tests/**/*.py")
    }
    there = {name for text in files.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    there |= {path.stem for path in files} | {str(path.with_suffix("")) for path in files} | {"faults/"}
    named = re.findall(r"`((?:unit/|faults/)?test_\w+|faults/)`", page)
    assert len(named) > 30
    assert set(named) <= there
