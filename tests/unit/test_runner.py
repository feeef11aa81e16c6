import nbformat
import pytest

from nemolib import runner
from nemolib.runner import RunnerError, check_parameters, notebook_parameters, run_notebook
from tests.notebook_files import save_notebook


@pytest.fixture
def notebook(tmp_path):
    return save_notebook(tmp_path / "notebooks" / "01_x.ipynb", "import os\nprint(profile, samples, os.getcwd())")


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.text for cell in cells if cell.cell_type == "code" for output in cell.outputs)


def test_parameters_and_defaults_are_read(notebook):
    assert notebook_parameters(notebook) == {"profile": "tiny", "samples": 2}


def test_a_notebook_runs_in_its_own_folder_with_its_parameters(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    output = tmp_path / "build" / "x.ipynb"
    seconds = run_notebook(notebook, output, parameters={"samples": 5}, progress=False)
    assert printed(output) == f"tiny 5 {notebook.parent}\n"
    assert seconds > 0


def test_a_profile_may_leave_the_solutions_out(notebook, tmp_path):
    read = nbformat.read(notebook, as_version=4)
    read.cells.append(nbformat.v4.new_code_cell("print('solved')", metadata={"tags": ["solution"]}))
    nbformat.write(read, notebook)
    output, profile = tmp_path / "x.ipynb", tmp_path / "p.yaml"
    for solutions, expected in (("true", "solved\n"), ("false", "")):
        profile.write_text(f"extends: tiny\nsolutions: {solutions}\n")
        run_notebook(notebook, output, parameters={"profile": str(profile)}, progress=False)
        assert printed(output) == f"{profile} 2 {notebook.parent}\n{expected}"
    assert "solved" in notebook.read_text()


def test_without_parameters_no_cell_is_added(notebook, tmp_path):
    output = tmp_path / "x.ipynb"
    run_notebook(notebook, output, progress=False)
    ours, original = (nbformat.read(path, as_version=4).cells for path in (output, notebook))
    assert [cell.source for cell in ours] == [cell.source for cell in original]


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
    with pytest.raises(RunnerError, match=words):
        run_notebook(notebook, tmp_path / "x.ipynb", parameters=parameters, progress=False)
    assert not (tmp_path / "x.ipynb").exists()


def test_an_integer_may_stand_for_a_float_and_anything_for_none(tmp_path):
    path = save_notebook(tmp_path / "x.ipynb", parameters="tau = 0.5\nlimit = None")
    check_parameters(path, {"tau": 1, "limit": 3})
    with pytest.raises(RunnerError, match="'tau': 'high' is no float"):
        check_parameters(path, {"tau": "high"})


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (None, "0 cells are tagged 'parameters'"),
        ("import os", "'import os'; only 'name = literal'"),
        ("a = 1\nb = a + 1", "'b = a \\+ 1'; only 'name = literal'"),
        ("a = b = 1", "only 'name = literal'"),
    ],
)
def test_a_parameters_cell_holds_literals_only(tmp_path, parameters, words):
    with pytest.raises(RunnerError, match=words):
        notebook_parameters(save_notebook(tmp_path / "x.ipynb", parameters=parameters))


def test_what_is_no_notebook_is_named(tmp_path):
    with pytest.raises(RunnerError, match=r"none\.ipynb: there is no such notebook"):
        notebook_parameters(tmp_path / "none.ipynb")
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(RunnerError, match=r"broken\.ipynb: not a notebook"):
        notebook_parameters(tmp_path / "broken.ipynb")


def test_a_failing_cell_is_named(tmp_path):
    path = save_notebook(tmp_path / "01_x.ipynb", "a = 1", "b = 2\nraise ValueError('too warm')", "c = 3")
    with pytest.raises(RunnerError, match=r"01_x\.ipynb: cell 3 \(b = 2\) failed: ValueError: too warm"):
        run_notebook(path, tmp_path / "out.ipynb", parameters={"samples": 3}, progress=False)


def test_a_dying_kernel_is_named(tmp_path):
    path = save_notebook(tmp_path / "01_x.ipynb", "import os\nos._exit(1)")
    with pytest.raises(RunnerError, match=r"01_x\.ipynb: cell 2 \(import os\) failed: DeadKernelError"):
        run_notebook(path, tmp_path / "out.ipynb", progress=False)


def test_the_command_line_reads_values_and_the_environment(notebook, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(runner, "_execute", lambda source, output, parameters, **_: seen.append(parameters))
    output = str(tmp_path / "x.ipynb")
    monkeypatch.delenv("PROFILE", raising=False)
    assert runner.main([str(notebook), output]) == 0
    monkeypatch.setenv("PROFILE", "tiny-full")
    assert runner.main([str(notebook), output, "-p", "samples=7"]) == 0
    assert runner.main([str(notebook), output, "--profile", "tiny"]) == 0
    assert seen == [{}, {"profile": "tiny-full", "samples": 7}, {"profile": "tiny"}]
    assert "01_x.ipynb: done in 0 s" in capsys.readouterr().err


def test_the_command_line_ends_with_status_1_and_names_the_parameter(notebook, tmp_path, capsys):
    assert runner.main([str(notebook), str(tmp_path / "x.ipynb"), "-p", "theta=2"]) == 1
    assert "unknown parameter 'theta' = 2; allowed: profile, samples" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runner.main([str(notebook), str(tmp_path / "x.ipynb"), "-p", "theta"])
    assert "'theta' is not key=value" in capsys.readouterr().err
