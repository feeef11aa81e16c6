import json
import multiprocessing

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemolib.store import Store, StoreError, read_table, write_table


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "localization.jsonl"


def test_an_empty_store_writes_nothing(path):
    store = Store(path)
    assert len(store) == 0
    assert store.get("a") is None
    assert store.get("a", 3) == 3
    assert not path.exists()


def test_records_are_kept_in_order_and_read_again(path):
    store = Store(path)
    store.put("b", {"score": 0.1 + 0.2, "neurons": [[0, 1]]})
    store.put("a", "Ünïcode\n, and a line end")
    assert "a" in store
    assert "c" not in store
    again = Store(path)
    assert list(again.done.items()) == list(store.done.items())
    assert list(again.done) == ["b", "a"]
    assert again.get("b")["score"] == 0.1 + 0.2
    assert len(path.read_bytes().splitlines()) == 2


def test_a_new_record_is_returned_as_a_later_run_reads_it(path):
    record = Store(path).put("a", {"pair": (1, 2), 3: None})
    assert record == {"pair": [1, 2], "3": None} == Store(path).get("a")


def test_what_was_finished_first_stays(path):
    one, other = Store(path), Store(path)
    assert one.put("a", 1) == 1
    assert other.put("a", 2) == 1
    assert other.put("b", 3) == 3
    assert one.put("c", 4) == 4
    assert dict(one.done) == dict(Store(path).done) == {"a": 1, "b": 3, "c": 4}


def test_compute_computes_once(path):
    calls = []
    for _ in range(2):
        assert Store(path).compute("a", lambda: calls.append(1) or 7) == 7
    assert calls == [1]


def test_done_cannot_be_changed(path):
    with pytest.raises(TypeError):
        Store(path).done["a"] = 1


def test_what_json_cannot_hold_leaves_the_file_alone(path):
    store = Store(path)
    store.put("a", 1)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.put("b", {"x": object()})
    assert path.read_bytes() == before
    assert "b" not in store


def test_a_store_cut_at_any_byte_keeps_all_complete_records(path):
    store = Store(path)
    for number in range(3):
        store.put(str(number), {"caption": "fünf", "score": number / 7})
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        cut = Store(path)
        complete = content[:length].count(b"\n")
        assert list(cut.done) == [str(number) for number in range(complete)]
        assert path.read_bytes() == content[:length]
        for number in range(3):
            cut.put(str(number), {"caption": "fünf", "score": number / 7})
        assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["{", '{"key": "x"}', "[]", "", '{"record": 1}'])
def test_a_broken_line_in_the_middle_is_named(path, line):
    store = Store(path)
    store.put("a", 1)
    with path.open("a") as file:
        file.write(line + "\n" + json.dumps({"key": "b", "record": 2}) + "\n")
    with pytest.raises(StoreError, match=r"localization\.jsonl, line 2: not a record"):
        Store(path)


def test_a_store_that_became_shorter_is_noticed(path):
    store = Store(path)
    store.put("a", 1)
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="became shorter"):
        store.put("b", 2)


def _write_many(path, name):
    store = Store(path)
    for number in range(50):
        store.put(f"{name}{number}", {"by": name, "text": "x" * 500})
        store.put(f"shared{number}", {"by": name})


def test_two_processes_write_one_store(path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(path.read_bytes().splitlines()) == 150
    assert {record["by"] for record in Store(path).done.values()} <= {"a", "b"}
    assert len(Store(path)) == 150


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = pd.DataFrame(
        {
            "caption": ["null", "NA", 'a "quoted", text', "two\nlines"],
            "score": [0.1 + 0.2, None, 1e-300, -0.0],
            "n": range(4),
        }
    )
    write_table(table, tmp_path / "t.csv")
    again = read_table(tmp_path / "t.csv", columns=("caption", "score"))
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    before = (tmp_path / "t.csv").read_bytes()
    write_table(again, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]


@given(st.lists(st.floats(allow_nan=False), min_size=1))
def test_floats_keep_every_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("floats") / "t.csv"
    write_table(pd.DataFrame({"x": values}), path)
    assert [float(value).hex() for value in read_table(path)["x"]] == [float(value).hex() for value in values]


def test_a_table_lacking_a_column_or_itself_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no table .*t\.csv"):
        read_table(tmp_path / "t.csv")
    write_table(pd.DataFrame({"a": [1]}), tmp_path / "t.csv")
    with pytest.raises(StoreError, match="column 'b' is missing; there are a"):
        read_table(tmp_path / "t.csv", columns=("a", "b"))
