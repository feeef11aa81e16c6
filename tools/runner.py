"""Running a notebook with parameters, from any folder: ``python -m tools.runner IN.ipynb OUT.ipynb -p key=value``.

The notebook runs in its own folder, as it does in JupyterLab and under nbval. A parameter that the notebook does not
have is refused before anything runs. Profiles may leave out the solutions of the exercises. A notebook that fails names
the cell, leaves its output as far as it came, and ends the process with status 1.
"""

import argparse
import ast
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import filelock
import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from nemolib import paths, workers
from nemolib.settings import Profile, ProfileError, load_profile

BAR = re.compile(r"\d%\|[ #\u2588-\u258f]*\|")
"""What a progress bar leaves in an output."""


class RunnerError(Exception):
    """A notebook that cannot be run or that failed; the message names notebook and parameter or cell."""


class ThisPython(AsyncKernelManager):
    """Starts kernels with the Python that runs this, whatever kernel a site may have put under the name python3."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The kernel of this environment."""
        return KernelSpec(**get_kernel_dict())


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Return the parameters of a notebook with their defaults, from its one cell tagged ``parameters``.

    Raises:
        RunnerError: The file is missing or no notebook; it has no or several such cells; a default is no literal.
    """
    notebook = _read(path)
    tagged = sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
    if tagged != 1:
        raise RunnerError(f"{path}: {tagged} cells are tagged 'parameters'; there must be one")
    found = {}
    for name, parameter in papermill.inspect_notebook(notebook).items():
        found[name] = _literal(parameter["default"])
        if found[name] == parameter["default"]:
            raise RunnerError(f"{path}: the default of parameter {name!r} is {found[name]!r}; it must be a literal")
    return found


def check_parameters(path: Path, parameters: Mapping[str, Any]) -> None:
    """Raise RunnerError unless a notebook has all of these parameters and the values are of the types of their defaults.

    A default of None says nothing, an integer may stand for a float.
    """
    allowed = notebook_parameters(path)
    for name, value in parameters.items():
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise RunnerError(f"{path}: unknown parameter {name!r} = {value!r}; allowed: {known}")
        kind = type(allowed[name])
        if None not in (value, allowed[name]) and type(value) not in ({float, int} if kind is float else {kind}):
            raise RunnerError(f"{path}: parameter {name!r}: {value!r} is no {kind.__name__}")


def run_notebook(source: Path, output: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a notebook in its own folder and write it with its outputs, after each cell.

    Args:
        source: The notebook; it is not changed.
        output: The executed notebook.
        parameters: name -> value, in place of the defaults; ``profile`` is checked too.

    Raises:
        RunnerError: See `check_parameters`; or a cell failed (the message names notebook, cell and error).
        ProfileError: There is no such profile, or it cannot be used.
    """
    source, output = source.resolve(), output.resolve()
    check_parameters(source, parameters)
    notebook = _read(source)
    turn: AbstractContextManager[Any] = nullcontext()
    if profile := parameters.get("profile"):
        chosen = load_profile(profile)
        turn = _turn(chosen)
        if not chosen.solutions:
            notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
        if Path(profile).suffix and Path(profile).is_file():  # the notebook runs in another folder
            parameters = {**parameters, "profile": str(Path(profile).resolve())}
    output.parent.mkdir(parents=True, exist_ok=True)
    # A bar that is not on a terminal becomes a line per update: then one in ten seconds is enough.
    os.environ.setdefault("TQDM_MININTERVAL", "0.1" if sys.stderr.isatty() else "10")
    sources = [cell.source for cell in notebook.cells]
    # Two notebooks may run side by side: each bar says whose it is.
    kernel = {"cwd": source.parent, "kernel_manager_class": ThisPython, "progress_bar": {"desc": source.stem}}
    try:
        with turn:
            papermill.execute_notebook(notebook, output, dict(parameters), **kernel)
    except Exception as error:
        # A cell failed, or the kernel died or did not start. The last cell that was begun is the one.
        begun = [cell.source for cell in _read(output).cells if cell.metadata.get("papermill", {}).get("start_time")]
        last = next((code for code in reversed(begun) if code in sources), None)
        where = f"cell {sources.index(last)} ({last.splitlines()[0]})" if last else "the first cell"
        traceback = "".join(f"{line}\n" for line in getattr(error, "traceback", []))
        what = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        raise RunnerError(f"{traceback}{source.name}: {where} failed: {what}") from error
    executed = _read(output)
    for cell in executed.cells:
        # A progress bar that has ended is of use to nobody.
        if "outputs" in cell:
            cell.outputs = [item for item in cell.outputs if not BAR.search(str(item.get("data", item.get("text"))))]
    nbformat.write(executed, output)


def _turn(profile: Profile) -> AbstractContextManager[Any]:
    """Return what lets notebooks run one at a time if they would share a GPU or workers, whatever make begins."""
    shared = profile.device != "cpu" or workers.distributed(profile)
    return filelock.FileLock(paths.BUILD / "turn.lock") if shared else nullcontext()


def _read(path: Path) -> nbformat.NotebookNode:
    """Return a notebook, whose language is Python even where it does not say so."""
    if not path.is_file():
        raise RunnerError(f"{path}: there is no such notebook")
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:
        raise RunnerError(f"{path}: not a notebook ({type(error).__name__}: {error})") from error
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3 (ipykernel)"}
    return notebook


def _literal(text: str) -> Any:
    """Return a value as Python writes it, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return name, _literal(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one notebook from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.runner", description="Run a notebook with parameters.")
    parser.add_argument("notebook", type=Path, help="the notebook to run")
    parser.add_argument("output", type=Path, help="where to write it with its outputs")
    parser.add_argument("-p", "--parameter", type=_pair, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--profile", default=os.environ.get("PROFILE"), help="default: $PROFILE, else the notebook's")
    arguments = parser.parse_args(argv)
    parameters = ({"profile": arguments.profile} if arguments.profile else {}) | dict(arguments.parameter)
    name, started = arguments.notebook.name, time.perf_counter()
    sys.stderr.write(f"{name}: start {parameters or ''}\n")
    try:
        run_notebook(arguments.notebook, arguments.output, parameters)
    except (RunnerError, ProfileError, workers.WorkersError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        return 130
    sys.stderr.write(f"{name}: done in {time.perf_counter() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
