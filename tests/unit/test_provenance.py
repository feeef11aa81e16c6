import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemolib import paths, provenance
from nemolib.profiles import load_profile
from nemolib.provenance import content_hash, science_hash, versions, write_sidecar

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def described(value):
    """Return a value as text in which only equal values of equal type agree."""
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{key!r}:{described(value[key])}" for key in value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(described, value)) + "]"
    return f"{type(value).__name__}{value!r}"


@given(PLAIN, PLAIN)
def test_hashes_agree_exactly_where_values_do(one, other):
    assert (content_hash(one) == content_hash(other)) == (described(one) == described(other))


def test_values_of_different_type_or_shape_differ():
    values = [1, 1.0, True, "1", b"1", None, "None", [1], [[1]], {1}, {"1": 1}, torch.ones(1), np.ones(1)]
    values += [torch.ones(1, dtype=torch.float16), torch.ones(1, 1), ["ab", "c"], ["a", "bc"]]
    assert len({content_hash(value) for value in values}) == len(values)


def test_order_counts_in_lists_and_not_in_mappings():
    assert content_hash([1, 2]) != content_hash([2, 1])
    assert content_hash([1, 2]) == content_hash((1, 2))
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash({1, 2}) == content_hash({2, 1})


def test_a_view_of_a_tensor_hashes_like_its_copy():
    tensor = torch.arange(6).reshape(2, 3)
    assert content_hash(tensor.T) == content_hash(tensor.T.contiguous())
    assert content_hash(torch.ones(2, dtype=torch.bfloat16)) != content_hash(torch.zeros(2, dtype=torch.bfloat16))


def test_files_and_folders_hash_by_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    before = content_hash(tmp_path / "a")
    (tmp_path / "a" / ".hidden").write_text("not counted")
    assert content_hash(tmp_path / "a") == before
    (tmp_path / "a" / "x.txt").write_text("two")
    assert content_hash(tmp_path / "a") != before
    with pytest.raises(FileNotFoundError, match="none"):
        content_hash(tmp_path / "none")


def test_what_cannot_be_hashed_is_an_error():
    with pytest.raises(TypeError, match="object"):
        content_hash({"key": object()})
    with pytest.raises(TypeError, match="ndarray"):
        content_hash(np.array([object()]))


def test_the_hash_is_the_same_in_another_process():
    profile = load_profile("tiny")
    code = (
        "from nemolib.profiles import load_profile; from nemolib.provenance import content_hash;"
        "print(content_hash(load_profile('tiny')))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == content_hash(profile)
    assert content_hash(dataclasses.replace(profile, holdout_size=7)) != content_hash(profile)


SOURCE = '''"""What it does."""

import math  # for the root


def root(x):
    """Return the root."""
    # why
    return math.sqrt(x)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a folder that stands for the package."""
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    (tmp_path / "science.py").write_text(SOURCE)
    (tmp_path / "user.py").write_text("from nemolib.science import root\nfrom nemolib import store\n")
    (tmp_path / "store.py").write_text("x = 1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("What it does", "What it did", True),
        ("# why", "# because", True),
        ("\n\n\n", "\n\n", True),
        ("  # for the root", "", True),
        ("math.sqrt(x)", "math.sqrt(abs(x))", False),
    ],
)
def test_only_code_counts(package, old, new, same):
    before = science_hash("science")
    assert old in SOURCE
    (package / "science.py").write_text(SOURCE.replace(old, new))
    assert (science_hash("science") == before) is same


def test_imported_modules_count_but_infrastructure_does_not(package):
    before = science_hash("user"), science_hash()
    (package / "store.py").write_text("x = 2\n")
    assert (science_hash("user"), science_hash()) == before
    (package / "science.py").write_text("def root(x):\n    return x\n")
    assert science_hash("user") != before[0]
    assert science_hash() != before[1]
    with pytest.raises(FileNotFoundError, match="no module 'nothing'"):
        science_hash("nothing")


def test_a_package_counts_as_one_module(package):
    (package / "parts").mkdir()
    (package / "parts" / "__init__.py").write_text("from nemolib.parts.first import x\n")
    (package / "parts" / "first.py").write_text("from nemolib.science import root\nx = 1\n")
    (package / "user.py").write_text("from nemolib.parts.first import x\n")
    before = science_hash("user"), science_hash("parts"), science_hash()
    (package / "parts" / "first.py").write_text("from nemolib.science import root\nx = 2\n")
    changed = science_hash("user"), science_hash("parts"), science_hash()
    assert not set(before) & set(changed)
    (package / "science.py").write_text("def root(x):\n    return x\n")
    assert science_hash("user") != changed[0]


def test_infrastructure_names_modules_and_science_is_hashed():
    assert {"paths", "store", "runner"} <= provenance.INFRASTRUCTURE
    assert len(science_hash()) == 64


def test_versions_leave_out_build_labels():
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert not any("+" in version for version in found.values())


def test_a_sidecar_says_what_went_in_and_is_the_same_twice(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("a\n1\n")
    arguments = {"notebook": "06_figures", "profile": "tiny", "seeds": {"detection": 1}}
    path = write_sidecar(tmp_path / "figure_3.pdf", inputs={"table": table, "tau": 0.4}, **arguments)
    first = path.read_bytes()
    write_sidecar(tmp_path / "figure_3.pdf", inputs={"tau": 0.4, "table": table}, **arguments)
    assert path.read_bytes() == first
    content = json.loads(first)
    assert path == tmp_path / "figure_3.json"
    assert content["inputs"] == {"table": content_hash(table), "tau": content_hash(0.4)}
    assert content["versions"] == versions()
    with pytest.raises(FileNotFoundError, match="gone"):
        write_sidecar(tmp_path / "figure_3.pdf", inputs={"gone": Path(tmp_path / "gone.csv")}, **arguments)
    assert path.read_bytes() == first
