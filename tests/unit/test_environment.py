"""The lock file, pyproject.toml and environment.yml describe one environment, the one that the tests run in."""

import importlib.metadata
import platform
import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from nemolib import paths
from tools.lock import OF_CUDA

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]

LOCK_LINES = [
    line for line in (paths.ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")
]

LOCK = dict(line.split("==") for line in LOCK_LINES)


def test_every_line_pins_one_version_without_a_build_label_and_none_of_cuda():
    for line in LOCK_LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line
    assert list(LOCK) == sorted(LOCK)
    assert len(LOCK) == len(LOCK_LINES)
    assert not [name for name in LOCK if name.startswith(OF_CUDA)]


def test_the_lock_satisfies_the_project():
    for text in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]):
        wanted = Requirement(text)
        assert wanted.specifier.contains(LOCK[canonicalize_name(wanted.name)], prereleases=True), text


def test_this_environment_is_that_of_the_lock():
    assert SpecifierSet(PROJECT["requires-python"]).contains(platform.python_version())
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in LOCK}
    assert installed == LOCK


ENVIRONMENT = yaml.safe_load((paths.ROOT / "environment.yml").read_text())["dependencies"]

NAMED = dict(line.split("==") for line in ENVIRONMENT[-1]["pip"] if "==" in line)


def test_conda_gives_the_same_environment():
    python, pip, by_pip = ENVIRONMENT
    assert pip == "pip"
    assert by_pip["pip"][len(NAMED) :] == ["-r requirements.lock", "-e ."]
    assert {name: LOCK[name] for name in NAMED} == NAMED
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))


def test_data_of_the_package_is_part_of_it():
    tool = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = tool["package-data"]["nemolib"]
    shipped = {file for pattern in patterns for file in paths.PACKAGE.glob(pattern)}
    there = [file for suffix in ("csv", "html", "json", "yaml") for file in paths.PACKAGE.rglob(f"*.{suffix}")]
    assert set(there) == shipped


def test_the_hooks_use_the_locked_tools_and_strip_what_the_makefile_strips():
    hooks = yaml.safe_load((paths.ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {hook["repo"].rsplit("/", 1)[1]: hook["rev"].removeprefix("v") for hook in hooks}
    assert revisions["ruff-pre-commit"] == LOCK["ruff"]
    assert revisions["nbstripout"] == LOCK["nbstripout"]
    (hook,) = (hook for repo in hooks for hook in repo["hooks"] if hook["id"] == "nbstripout")
    makefile = (paths.ROOT / "Makefile").read_text()
    assert hook["args"][:4] == ["--keep-output", "--keep-count", "--keep-id", "--extra-keys"]
    assert f'--extra-keys "{hook["args"][4]}"' in makefile
