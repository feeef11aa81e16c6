import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemolib.store import Grid, Store, StoreError, read_grid, read_table, write_grid, write_table

VALUES = [
    {"score": 0.1 + 0.2, "neurons": [(0, 1)], "text": "Ünïcode\n"},
    [1e-300, None, True],
    "x",
    np.arange(6, dtype=np.uint8).reshape(2, 3).T,
]


@pytest.mark.parametrize("value", VALUES, ids=type)
def test_a_result_comes_back_bit_by_bit(tmp_path, value):
    store = Store(tmp_path / "store")
    assert store.get("task", "abc") is None
    assert not store.folder.exists()
    kept = store.put("task", "abc", value)
    again = Store(tmp_path / "store").get("task", "abc")
    for found in (kept, again):
        assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == json.loads(json.dumps(value))
    assert store.get("other", "abc") is None
    assert store.get("task", "abd") is None


@pytest.mark.parametrize("value", [VALUES[0], VALUES[3]], ids=["json", "array"])
def test_a_file_cut_or_changed_at_any_byte_is_never_taken_for_a_result(tmp_path, value):
    store = Store(tmp_path)
    store.put("task", "a", value)
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    content = file.read_bytes()
    for length in range(0, len(content), 7):
        changed = content[:length] + bytes([content[length] ^ 1]) + content[length + 1 :]
        for damaged in (content[:length], changed):
            file.write_bytes(damaged)
            with pytest.warns(UserWarning, match="was damaged; this result is computed again"):
                assert store.get("task", "a") is None
    store.put("task", "a", value)
    assert file.read_bytes() == content


def test_two_write_one_store_at_once(tmp_path):
    store = Store(tmp_path)

    def write(name):
        for number in range(40):
            store.put("task", f"shared{number}", {"number": number, "text": "x" * 500})
            store.put("task", f"{name}{number}", name)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, "ab"))
    assert [store.get("task", f"shared{number}")["number"] for number in range(40)] == list(range(40))
    assert {store.get("task", f"{name}{number}") for name in "ab" for number in range(40)} == {"a", "b"}
    assert not list(tmp_path.rglob("*.tmp"))


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False), min_size=4))
def test_a_table_is_read_as_it_was_written_bit_by_bit(tmp_path_factory, values):
    captions = ["null", "NA", 'a "quoted", text', "two\nlines"] + ["a"] * (len(values) - 4)
    table = pd.DataFrame({"caption": captions, "score": [None, *values[1:]], "x": values, "n": range(len(values))})
    path = tmp_path_factory.mktemp("tables") / "t.csv"
    write_table(table, path)
    again = read_table(path, columns=("caption", "score"))
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert [value.hex() for value in again["x"]] == [value.hex() for value in values]


def test_a_grid_comes_back(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 5, 3), dtype=np.uint8)
    path = tmp_path / "grid.safetensors"
    write_grid(Grid(images, ("a", "ü"), ("x", "y", "z")), path)
    grid, first = read_grid(path), path.read_bytes()
    assert np.array_equal(grid.images, images)
    assert (grid.rows, grid.columns) == (("a", "ü"), ("x", "y", "z"))
    write_grid(grid, path)
    assert path.read_bytes() == first
    path.write_bytes(json.dumps({}).encode())
    with pytest.raises(StoreError, match="holds no image grid"):
        read_grid(path)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3)])
def test_a_grid_needs_a_label_for_each_row_and_column(shape):
    with pytest.raises(ValueError, match="1 row and 3 column labels"):
        Grid(np.zeros(shape), ("a",), ("x", "y", "z"))
