"""What the README and the pages of docs/ say can be done can be done."""

import dataclasses
import re
import subprocess

import pytest

import nemolib
from nemolib import paths
from nemolib.settings import load_profile
from tests.notebook_files import notebooks
from tools import estimate, readme

README = readme.README.read_text(encoding="utf-8")

DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((paths.ROOT / "docs").glob("*.md"))}

ALL = "\n".join([README, *DOCS.values()])


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_what_it_states_from_other_files_is_what_they_say(monkeypatch):
    # The table as it is committed: a run on another machine, whose seconds differ, writes it anew.
    committed = ["git", "show", "HEAD:figures/tiny/claims.md"]
    claims = subprocess.run(committed, cwd=paths.ROOT, capture_output=True, text=True, check=True).stdout
    known = readme.sources() | {"claims": claims}
    monkeypatch.setattr(readme, "sources", lambda: known)
    assert readme.written(README) == README, "make readme"


@pytest.mark.parametrize("broken", ["", "<!-- claims -->", "<!-- claims -->" * 2 + "<!-- end of claims -->"])
def test_a_text_without_its_place_is_named(broken):
    with pytest.raises(ValueError, match="claims"):
        readme.written(broken)


@pytest.mark.slow
@pytest.mark.world
def test_the_five_lines_run_as_they_stand():
    (example,), scope = blocks(README, "python"), {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["image"].size == (64, 64)
    assert scope["found"].memorized
    assert scope["found"].neurons


def test_the_lines_for_a_model_of_ones_own_run(random_model_folder, monkeypatch):
    tiny = load_profile("tiny")
    fewer = dataclasses.replace(tiny.detection, samples=3)
    search = dataclasses.replace(tiny.search, theta_min=4.0)
    profile = dataclasses.replace(tiny, model=str(random_model_folder), detection=fewer, search=search)
    load = nemolib.load_pipeline
    monkeypatch.setitem(vars(nemolib), "load_pipeline", lambda name: load(profile))
    example, mitigated = blocks(DOCS["own_model.md"], "python")
    scope = {"holdout_prompts": [f"prompt {number}" for number in range(8)], "prompt": "a fox"}
    exec(compile(example, "own_model.md", "exec"), scope)
    assert scope["image"].size == (64, 64)
    assert isinstance(scope["found"].neurons, nemolib.NeuronSet)
    assert scope["found"].evaluations["A1"] == fewer.samples, "what is not given is the profile's"
    exec(compile(mitigated, "own_model.md", "exec"), scope)
    assert [image.size for image in scope["images"]] == 4 * [(64, 64)]


def test_the_profile_of_the_reader_loads(tmp_path):
    (example,) = blocks(DOCS["own_model.md"], "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(example)
    assert load_profile(path).generation.samples == 10


def test_every_command_is_a_target():
    targets = set(re.findall(r"^([a-z-]+):", (paths.ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^|\w=\S+ )make ([a-z-]+)", ALL, re.MULTILINE))
    assert {"all", "test", "env", "site"} <= named <= targets


def test_the_table_lists_every_notebook():
    listed = re.findall(r"^\| \[`(\d\d_\w+)`\]", README, re.MULTILINE)
    assert listed == [path.stem for path in notebooks()]
    routes = re.findall(
        r"^\| \[\d\d · [\w ]+\]\(\.\./notebooks/(?:beyond/)?(\w+)\.ipynb\)", DOCS["index.md"], re.MULTILINE
    )
    assert routes == listed


NAMED = re.findall(r"(?:`|\.venv/bin/python )((?:nemolib|data|tests|tools|benchmarks|examples)/[\w./-]+)", ALL)


@pytest.mark.parametrize("path", sorted(set(NAMED)))
def test_every_path_is_there(path):
    assert (paths.ROOT / path).exists()


def linked():
    """Yield each page with each relative link in it."""
    for page, text in {"README.md": README, **{f"docs/{name}": text for name, text in DOCS.items()}}.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"https?:", target):
                yield page, target


@pytest.mark.parametrize(("page", "target"), sorted(set(linked())))
def test_every_link_leads_to_a_file_and_a_heading(page, target):
    name, _, heading = target.partition("#")
    path = (paths.ROOT / page).parent / name if name else paths.ROOT / page
    assert path.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


def test_the_costs_are_those_of_the_estimate():
    costs = estimate.cost_table(estimate.stages(load_profile("sd14")), per_second=40.0)
    assert costs in DOCS["stable_diffusion.md"]


def test_the_limits_are_those_of_the_world():
    profile = load_profile("tiny")
    assert profile.groups == "report"
    assert profile.encoders.quality.path == profile.encoders.alignment.path
    assert 100 <= sum(nemolib.load_pipeline(profile).unet.config.block_out_channels) * 2 < 2000


def test_the_citation_is_the_same_everywhere():
    (bibtex,) = blocks(README, "bibtex")
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
    files = {
        path.relative_to(paths.ROOT / "tests"): path.read_text(encoding="utf-8")
        for path in paths.ROOT.glob("tests/**/*.py")
    }
    there = {name for text in files.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    there |= {path.stem for path in files} | {str(path.with_suffix("")) for path in files} | {"faults/"}
    named = re.findall(r"`((?:unit/|faults/)?test_\w+|faults/)`", DOCS["models.md"])
    assert len(named) > 30
    assert set(named) <= there
