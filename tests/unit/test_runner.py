from dataclasses import replace

import filelock
import nbformat
import pytest

from nemolib.settings import ProfileError, load_profile
from tests.notebook_files import save_notebook
from tools import runner
from tools.runner import RunnerError, check_parameters, notebook_parameters, run_notebook


@pytest.fixture
def notebook(tmp_path):
    """Return a notebook with a solution and a progress bar, which names no kernel."""
    bar = "from tqdm.auto import tqdm\nfor _ in tqdm(range(2)): pass"
    cells = ("import os\nprint(profile, samples, os.getcwd())", bar, "print('solved')")
    path = save_notebook(tmp_path / "notebooks" / "01_x.ipynb", *cells)
    read = nbformat.read(path, as_version=4)
    read.cells[-1].metadata["tags"] = ["solution"]
    del read.metadata["kernelspec"]
    nbformat.write(read, path)
    return path


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Give another Python the name of our kernel, as JUPYTER_PATH of a site may."""
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text('{"argv": ["/no/python"], "display_name": "site", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.text for cell in cells if cell.cell_type == "code" for output in cell.outputs)


def test_a_notebook_runs_here_in_its_own_folder_with_its_parameters_and_bars_are_not_kept(
    notebook, site, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path.parent)
    output = tmp_path / "build" / "x.ipynb"
    assert notebook_parameters(notebook) == {"profile": "tiny", "samples": 2}
    run_notebook(notebook, output, {"samples": 5})
    assert printed(output) == f"tiny 5 {notebook.parent}\nsolved\n"


def test_a_profile_may_leave_the_solutions_out(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text("extends: tiny\nsolutions: false\n")
    run_notebook(notebook, tmp_path / "x.ipynb", {"profile": "p.yaml"})
    assert printed(tmp_path / "x.ipynb") == f"{tmp_path / 'p.yaml'} 2 {notebook.parent}\n"
    assert "solved" in notebook.read_text()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"sample": 3}, "unknown parameter 'sample' = 3; allowed: profile, samples"),
        ({"samples": "3x"}, "parameter 'samples': '3x' is no int"),
        ({"samples": True}, "parameter 'samples': True is no int"),
        ({"profile": 3}, "parameter 'profile': 3 is no str"),
        ({"profile": "tny"}, "unknown profile 'tny'"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(notebook, tmp_path, parameters, words):
    with pytest.raises((RunnerError, ProfileError), match=words):
        run_notebook(notebook, tmp_path / "x.ipynb", parameters)
    assert not (tmp_path / "x.ipynb").exists()


def test_an_integer_may_stand_for_a_float_and_anything_for_none(tmp_path):
    path = save_notebook(tmp_path / "x.ipynb", parameters="tau = 0.5\nlimit = None")
    check_parameters(path, {"tau": 1, "limit": 3})
    with pytest.raises(RunnerError, match="'tau': 'high' is no float"):
        check_parameters(path, {"tau": "high"})


def test_what_has_no_parameters_is_named(tmp_path):
    save_notebook(tmp_path / "untagged.ipynb", parameters=None)
    save_notebook(tmp_path / "computed.ipynb", parameters="a = 1\nb = a + 1")
    (tmp_path / "broken.ipynb").write_text("{")
    for name, words in {
        "untagged": "0 cells are tagged",
        "computed": "the default of parameter 'b' is 'a \\+ 1'; it must be a literal",
        "broken": "not a notebook",
        "none": "there is no such notebook",
    }.items():
        with pytest.raises(RunnerError, match=rf"{name}\.ipynb: {words}"):
            notebook_parameters(tmp_path / f"{name}.ipynb")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("b = 2\nraise ValueError('too warm')", r"cell 3 \(b = 2\) failed: ValueError: too warm"),
        ("import os\nos._exit(1)", r"cell 3 \(import os\) failed: DeadKernelError"),
    ],
)
def test_a_failing_cell_and_a_dying_kernel_are_named(tmp_path, code, words):
    path = save_notebook(tmp_path / "01_x.ipynb", "a = 1", code, "c = 3")
    with pytest.raises(RunnerError, match=rf"01_x\.ipynb: {words}"):
        run_notebook(path, tmp_path / "out.ipynb", {"samples": 3})


def test_notebooks_that_share_a_gpu_or_workers_take_turns(monkeypatch, tmp_path):
    monkeypatch.setattr(runner.paths, "BUILD", tmp_path)
    monkeypatch.delenv("NEMO_DASK", raising=False)
    alone = load_profile("tiny")
    for profile in (replace(alone, device="auto"), replace(alone, workers=2)):
        with runner._turn(profile), pytest.raises(filelock.Timeout):
            runner._turn(profile).acquire(timeout=0)
    with runner._turn(alone), runner._turn(alone):
        pass
    monkeypatch.setenv("NEMO_DASK", "local:2")
    with runner._turn(alone), pytest.raises(filelock.Timeout):
        runner._turn(alone).acquire(timeout=0)


def test_the_command_line_reads_values_and_the_environment(notebook, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(runner, "run_notebook", lambda source, output, parameters: seen.append(parameters))
    for profile, arguments in (("", []), ("tiny-full", ["-p", "samples=7"]), ("tiny-full", ["--profile", "tiny"])):
        monkeypatch.setenv("PROFILE", profile)
        assert runner.main([str(notebook), str(tmp_path / "x.ipynb"), *arguments]) == 0
    assert seen == [{}, {"profile": "tiny-full", "samples": 7}, {"profile": "tiny"}]
    assert "01_x.ipynb: done in 0 s" in capsys.readouterr().err


def test_the_command_line_ends_with_status_1_and_names_the_parameter(notebook, tmp_path, capsys):
    assert runner.main([str(notebook), str(tmp_path / "x.ipynb"), "-p", "theta=2"]) == 1
    assert "unknown parameter 'theta' = 2; allowed: profile, samples" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runner.main([str(notebook), str(tmp_path / "x.ipynb"), "-p", "theta"])
    assert "'theta' is not key=value" in capsys.readouterr().err
