"""What a user can get wrong: each gives one clear error that names it, and loses nothing."""

import os
import shutil

import pytest

from nemolib.paths import write_atomic
from nemolib.pipeline import PipelineError, load_pipeline
from nemolib.prompts import PromptTableError, load_prompts
from nemolib.store import StoreError, read_table

HEADER = b"caption,kind,group,copies,image\n"
ROW = b"a fox,vm,report,64,a.png\n"

RELEASED = b";Caption;URL;type\n"

TABLES = {
    "empty file": (b"", "column 'caption' is missing; the header has nothing"),
    "no prompt": (HEADER, "no prompt below the header"),
    "missing column": (b"caption,kind,group,image\na,vm,x,\n", "column 'copies' is missing; .* caption, kind, group"),
    "semicolons": (b"caption;kind;group;copies;image\na;vm;x;1;\n", "column 'caption' is missing"),
    "too few fields": (HEADER + ROW + b"a cat,vm\n", "row 2: 2 fields instead of 5"),
    "a comma too many": (HEADER + b"a fox, red,vm,report,64,a.png\n", "row 1: 6 fields instead of 5.*quotation"),
    "empty caption": (HEADER + ROW + b" ,vm,report,1,\n", "row 2: column 'caption' is empty"),
    "same caption": (HEADER + ROW + b"a cat,vm,x,1,\n" + ROW, "row 3: column 'caption': 'a fox' appears in row 1"),
    "unknown kind": (HEADER + b"a fox,dm,report,64,a.png\n", "row 1: column 'kind': 'dm' is unknown; allowed: vm, tm"),
    "copies negative": (HEADER + b"a fox,vm,report,-1,\n", "row 1: column 'copies': '-1' is no count"),
    "copies exotic": (HEADER + "a fox,vm,report,²,\n".encode(), "row 1: column 'copies': '²'"),
    "latin-1": (HEADER + "ein Bär,vm,report,1,\n".encode("latin-1"), "not UTF-8"),
    "released: unknown type": (RELEASED + b"0;a;u;XM\n", "row 1: column 'kind': 'xm' is unknown; allowed: vm, tm"),
    "released: a semicolon too many": (RELEASED + b"0;a;b;u;VM\n", "row 1: 5 fields instead of 4; captions with"),
    "open quotation": (RELEASED + b'0;a;u;VM\n1;"b;u;VM\n2;c;u;TM\n', "row 2: a quotation mark is opened and never"),
    "single quotation": (RELEASED + b'1;"b;u;VM\n2;"c";u;TM\n', "row 1: a quotation mark is opened and never"),
    "open header": (b';"Caption;URL;type\n' + b"0;a long caption;u;VM\n" * 9999, "row 0: a quotation mark is opened"),
    "released with commas": (b'"Caption","URL","type"\n"a","u","VM"\n', "'caption' is missing; .* Caption, URL"),
    "no caption": (b";Text;URL;type\n0;a;u;VM\n", "column 'caption' is missing; the header has ;Text;URL;type"),
    "no object.jsonl": (b'{"caption": "a"}\n["b"]\n', "row 2: no JSON object"),
    "cut object.jsonl": (b'{"caption": "a"}\n{"caption": \n', "row 2: no JSON object"),
    "no caption.jsonl": (b'{"text": "a"}\n', "column 'caption' is missing; there are text"),
    "missing caption.jsonl": (b'{"caption": "a", "kind": "vm"}\n{"kind": "vm"}\n', "row 2: column 'caption' is empty"),
    "nothing.jsonl": (b"\n", "there is no prompt"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_bad_prompt_table(tmp_path, name):
    content, words = TABLES[name]
    path = tmp_path / (name if name.endswith(".jsonl") else "memorized.csv")
    path.write_bytes(content)
    with pytest.raises(PromptTableError, match=words) as error:
        load_prompts(path, kind="holdout" if name.endswith(".jsonl") else None)
    assert str(path) in str(error.value)
    assert path.read_bytes() == content


def test_a_missing_prompt_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompt table .*none\.csv; it needs the columns caption, kind"):
        load_prompts(tmp_path / "none.csv")


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "windows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (HEADER + ROW).replace(b"\n", b"\r\n"))
    assert load_prompts(path)["image"].tolist() == ["a.png"]


def _without(part):
    return lambda folder: (folder / part).unlink()


def _unsafe(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def _cut(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


FOLDERS = {
    "empty folder": (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "has no model_index.json"),
    "no index": (_without("model_index.json"), "has no model_index.json; give the folder that"),
    "broken index": (lambda folder: (folder / "model_index.json").write_text("{"), "not readable as JSON"),
    "no unet": (lambda folder: shutil.rmtree(folder / "unet"), "unet has no safetensors file"),
    "pickled weights": (_unsafe, "unet has no safetensors file; other formats are not read"),
    "cut weights": (_cut, "could not be loaded; say which variant.*, or copy the model again"),
    "no configuration": (_without("unet/config.json"), "could not be loaded; say which variant"),
}


@pytest.mark.parametrize(("damage", "words"), FOLDERS.values(), ids=FOLDERS)
def test_a_bad_model_folder(random_model_folder, tmp_path, damage, words):
    folder = tmp_path / "model"
    shutil.copytree(random_model_folder, folder)
    damage(folder)
    with pytest.raises(PipelineError, match=words) as error:
        load_pipeline(folder)
    assert str(folder) in str(error.value)


def test_a_model_without_value_layers(blind_model_folder):
    with pytest.raises(PipelineError, match=r"blind.*no cross-attention value layers"):
        load_pipeline(blind_model_folder)


REQUESTS = {
    "missing absolute folder": ({"source": "/no/such/folder"}, "no such folder"),
    "missing folder of ours": ({"source": "data/nothing"}, "no such folder .*nothing.*profile .*tiny.* nor a hub id"),
    "neither": ({"source": "tinny"}, "neither a profile .*tiny, tiny-full"),
    "a file": ({"source": "README.md"}, "is a file; give the folder"),
    "dtype": ({"dtype": "float8"}, "dtype 'float8' is unknown; allowed: auto, float32, float16, bfloat16"),
    "device": ({"device": "gpu"}, "device 'gpu' is unknown; allowed: auto, cpu, cuda, mps"),
    "missing device": ({"device": "cuda"}, "device 'cuda' is not available on this machine; use 'auto' or 'cpu'"),
}


@pytest.mark.parametrize(("chosen", "words"), REQUESTS.values(), ids=REQUESTS)
def test_a_model_type_or_device_that_is_not_there(random_model_folder, monkeypatch, chosen, words):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    with pytest.raises(PipelineError, match=words):
        load_pipeline(**{"source": random_model_folder} | chosen)


def test_a_hub_model_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        PipelineError, match=r"'CompVis/stable-diffusion-v1-4' could not be loaded from the hub: no network"
    ):
        load_pipeline("CompVis/stable-diffusion-v1-4")


RESULTS = {
    "no end": (b"a,b\n1,2\n3", "was cut"),
    "short row": (b"a,b\n1,2\n3\n", "row 2: 1 fields instead of 2"),
    "long row": (b"a,b\n1,2,3\n", "row 1: 3 fields instead of 2"),
    "empty": (b"", "was cut"),
    "missing column": (b"a,c\n1,2\n", "column 'b' is missing; there are a, c"),
}


@pytest.mark.parametrize(("content", "words"), RESULTS.values(), ids=RESULTS)
def test_a_cut_result_table(tmp_path, content, words):
    path = tmp_path / "scores.csv"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=words) as error:
        read_table(path, columns=("a", "b"))
    assert str(path) in str(error.value)


FULL = OSError(28, "No space left on device")
WORDS = "No space left on device; the file that was there is unchanged; free some space"


@pytest.mark.parametrize(("error", "words"), [(KeyboardInterrupt(), None), (FULL, WORDS)])
def test_an_interruption_or_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, error, words):
    path = tmp_path / "x.txt"
    write_atomic(path, "old")

    def interrupted(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(type(error), match=words):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="no file was left behind"):
        write_atomic(tmp_path / "file" / "x.txt", "text")


def test_new_files_have_the_usual_rights(tmp_path):
    write_atomic(tmp_path / "x", b"1")
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode
