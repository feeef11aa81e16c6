"""Running a notebook with parameters, from any folder: ``python -m nemolib.runner IN.ipynb OUT.ipynb -p key=value``.

The notebook runs in its own folder, as it does in JupyterLab and under nbval. A parameter that the notebook does not
have is refused before anything runs. Profiles may leave out the solutions of the exercises. A notebook that fails names
the cell, leaves its output as far as it came, and ends the process with status 1.
"""

import argparse
import ast
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat

from nemolib.profiles import ProfileError, load_profile

PARAMETERS_TAG = "parameters"
SOLUTION_TAG = "solution"


class RunnerError(Exception):
    """A notebook that cannot be run or that failed; the message names notebook and parameter or cell."""


def notebook_parameters(path: str | Path) -> dict[str, Any]:
    """Return the parameters of a notebook with their defaults, from its one cell tagged ``parameters``.

    Args:
        path: a notebook.

    Returns:
        name -> default, in the order of the cell.

    Raises:
        RunnerError: the file is missing or no notebook; it has no or several such cells; the cell holds anything but
            assignments of literals.
    """
    cells = [cell for cell in _read(Path(path)).cells if PARAMETERS_TAG in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise RunnerError(f"{path}: {len(cells)} cells are tagged {PARAMETERS_TAG!r}; there must be one")
    return dict(_assignment(statement, path) for statement in ast.parse(cells[0].source).body)


def _assignment(statement: ast.stmt, path: str | Path) -> tuple[str, Any]:
    """Return name and value of ``name = literal``."""
    simple = isinstance(statement, ast.Assign) and len(statement.targets) == 1
    if simple and isinstance(statement.targets[0], ast.Name):
        try:
            return statement.targets[0].id, ast.literal_eval(statement.value)
        except ValueError:
            pass
    line = ast.unparse(statement)
    raise RunnerError(
        f"{path}: the cell tagged {PARAMETERS_TAG!r} has {line!r}; only 'name = literal' is allowed there"
    )


def check_parameters(path: str | Path, parameters: Mapping[str, Any]) -> None:
    """Raise unless a notebook has all of these parameters and the values are of the types of their defaults.

    Args:
        path: a notebook.
        parameters: name -> value.

    Raises:
        RunnerError: unknown parameter (the message names those allowed), or a value of another type.
    """
    allowed = notebook_parameters(path)
    for name, value in parameters.items():
        if name not in allowed:
            names = ", ".join(allowed) or "none"
            raise RunnerError(f"{path}: unknown parameter {name!r} = {value!r}; allowed: {names}")
        if not _fits(value, allowed[name]):
            kind = type(allowed[name]).__name__
            raise RunnerError(f"{path}: parameter {name!r}: {value!r} is no {kind} (default {allowed[name]!r})")


def _fits(value: Any, default: Any) -> bool:
    """Return whether a value has the type of a default; a default None says nothing, an int may stand for a float."""
    if default is None or value is None or type(value) is type(default):
        return True
    return isinstance(default, float) and type(value) is int


def run_notebook(
    source: str | Path,
    output: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> float:
    """Execute a notebook in its own folder and write it with its outputs.

    Args:
        source: the notebook; it is not changed.
        output: the executed notebook; written after each cell.
        parameters: name -> value, in place of the defaults; ``profile`` is checked too.
        progress: show a progress bar on standard error.

    Returns:
        Seconds that the notebook took.

    Raises:
        RunnerError: see `check_parameters`; unknown profile; a cell failed (the message names notebook, cell and error).
    """
    source, output = Path(source).resolve(), Path(output).resolve()
    parameters = dict(parameters or {})
    check_parameters(source, parameters)
    solutions = _has_solutions(parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    _execute(source, output, parameters, solutions=solutions, progress=progress)
    return time.perf_counter() - started


def _has_solutions(parameters: Mapping[str, Any]) -> bool:
    """Return whether the solutions of exercises are run; raise RunnerError for a profile that cannot be used."""
    if "profile" not in parameters:
        return True
    try:
        return load_profile(parameters["profile"]).solutions
    except ProfileError as error:
        raise RunnerError(str(error)) from error


def _execute(source: Path, output: Path, parameters: Mapping[str, Any], *, solutions: bool, progress: bool) -> None:
    # A bar that is not on a terminal becomes a line per update: then one in ten seconds is enough.
    os.environ.setdefault("TQDM_MININTERVAL", "0.1" if sys.stderr.isatty() else "10")
    import papermill
    from papermill.exceptions import PapermillExecutionError

    notebook = _read(source)
    notebook.cells = [cell for cell in notebook.cells if solutions or SOLUTION_TAG not in cell.metadata.get("tags", [])]
    try:
        papermill.execute_notebook(
            notebook,
            output,
            parameters=dict(parameters),
            kernel_name="python3",
            progress_bar=progress,
            cwd=source.parent,
        )
    except PapermillExecutionError as error:
        traceback = "\n".join(error.traceback)
        message = f"{traceback}\n{_failed(source, error.source)}: {error.ename}: {error.evalue}"
        raise RunnerError(message) from error
    except Exception as error:
        # The kernel died or did not start: the cell that was running is the one that the output says so of.
        raise RunnerError(f"{_failed(source, _running(output))}: {type(error).__name__}: {error}") from error


def _failed(source: Path, code: str | None) -> str:
    """Return notebook, number and first line of the cell that failed."""
    cells = _read(source).cells
    number = next((index for index, cell in enumerate(cells) if cell.source == code), None)
    lines = (code or "").strip().splitlines()
    first = f" ({lines[0]})" if lines else ""
    where = "a cell" if number is None else f"cell {number}"
    return f"{source.name}: {where}{first} failed"


def _running(output: Path) -> str | None:
    """Return the source of the cell that was running when its kernel died."""
    if not output.is_file():
        return None
    started = [cell for cell in _read(output).cells if cell.metadata.get("papermill", {}).get("start_time")]
    return started[-1].source if started else None


def _read(path: Path) -> nbformat.NotebookNode:
    if not path.is_file():
        raise RunnerError(f"{path}: there is no such notebook")
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:
        raise RunnerError(f"{path}: not a notebook ({type(error).__name__}: {error})") from error


def _literal(text: str) -> Any:
    """Return a value from the command line: a Python literal, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return name, _literal(value)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nemolib.runner", description="Run a notebook with parameters.")
    parser.add_argument("notebook", type=Path, help="the notebook to run")
    parser.add_argument("output", type=Path, help="where to write it with its outputs")
    parser.add_argument("-p", "--parameter", type=_pair, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--profile", default=os.environ.get("PROFILE"), help="default: $PROFILE, else the notebook's")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one notebook from the command line; return the exit status."""
    arguments = _arguments(argv)
    parameters = ({"profile": arguments.profile} if arguments.profile else {}) | dict(arguments.parameter)
    name = arguments.notebook.name
    sys.stderr.write(f"{name}: start {parameters or ''}\n")
    try:
        seconds = run_notebook(
            arguments.notebook, arguments.output, parameters=parameters, progress=not arguments.no_progress
        )
    except RunnerError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        return 130
    sys.stderr.write(f"{name}: done in {seconds:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
