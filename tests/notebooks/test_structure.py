"""Every notebook has the structure that readers, papermill and nbval rely on."""

import ast
import re

import nbformat
import pytest

from nemolib import paths
from nemolib.settings import load_profile
from tests.notebook_files import notebooks
from tools.runner import notebook_parameters

NOTEBOOKS = notebooks()

LONGEST_CELL, LONGEST_NAME = 8, 100
"""Lines of a cell, and letters of the line that a folded cell shows: so many fit beside the files on a small screen."""

KNOWN_TAGS = {
    "parameters", "setup", "saving", "checking", "hide-input", "exercise", "solution", "definition",
    "nbval-check-output",
}  # fmt: skip
"""``setup``: the one longer cell of imports; ``definition``: a definition that is the lesson itself."""

LABELS = ["Question.", "Goals.", "Minutes.", "You should know."]
"""What the first cell says, in this order."""

HEADINGS = ["Method", "Check", "What we saw", "Exercises", "Solutions"]
"""Sections that every notebook has, in this order; others may stand between them."""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def tags(cell):
    return set(cell.metadata.get("tags", []))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def folded(cell):
    return cell.metadata.get("jupyter", {}).get("source_hidden", False)


def text(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_it_is_a_valid_notebook_and_small_enough_for_git(path, notebook):
    assert path.stat().st_size < 5_000_000
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_the_title_is_a_question(notebook):
    title = notebook.cells[0].source.splitlines()[0]
    assert re.fullmatch(r"# .*\?", title), f"the title {title!r} is no question"


def test_parameters_are_a_profile_and_at_most_three_overrides(path):
    parameters = notebook_parameters(path)
    assert parameters["profile"] == "tiny"
    assert len(parameters) <= 4
    assert load_profile(parameters["profile"]).device == "cpu"


def test_tags_are_known(notebook):
    assert set().union(*map(tags, notebook.cells)) <= KNOWN_TAGS


def test_one_set_up_cell_and_no_other_is_long(notebook):
    assert sum("setup" in tags(cell) for cell in code_cells(notebook)) == 1
    for cell in code_cells(notebook):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        lines = lines[folded(cell) and lines[0].startswith("#") :]  # the name of a folded cell
        if not tags(cell) & {"setup", "definition"}:
            assert len(lines) <= LONGEST_CELL, f"{len(lines)} lines: {lines[0]}"


def test_definitions_are_exercises_or_lessons(notebook):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for cell in code_cells(notebook):
        defined = [node.name for node in ast.walk(ast.parse(plain_python(cell.source))) if isinstance(node, kinds)]
        assert not defined or tags(cell) & {"solution", "exercise", "definition"}, defined


def plain_python(source):
    """Return a cell's source without the lines that only IPython understands."""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def test_the_first_cell_says_what_to_expect(path, notebook):
    first = notebook.cells[0].source
    assert re.findall(r"^\*\*(.*?)\*\*", first, re.MULTILINE) == LABELS
    neighbours = [NOTEBOOKS[place] for place in range(len(NOTEBOOKS)) if abs(place - NOTEBOOKS.index(path)) == 1]
    linked = re.findall(r"\]\(([^)#]+)", first.split("**")[0])
    known = [paths.ROOT / "docs" / "notation.md", *neighbours]
    assert {(path.parent / link).resolve() for link in linked} == {*known}


def test_links_lead_somewhere(path, notebook):
    headings = {heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text(notebook), re.MULTILINE)}
    for file, place in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text(notebook)):
        assert file or place in headings, place
        assert (path.parent / file).exists(), file


def test_it_has_the_sections_of_all(notebook):
    found = re.findall(r"^## (.*)", text(notebook), re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS


def test_what_is_no_lesson_is_folded(notebook):
    for cell in code_cells(notebook):
        assert folded(cell) == bool(tags(cell) & {"hide-input", "solution"}), cell.source
        assert folded(cell) or not tags(cell) & {"saving", "checking"}
        is_text = re.search(r"^Markdown\($", cell.source, re.MULTILINE)
        assert folded(cell) or not is_text, cell.source
        # What JupyterLab shows of a folded cell is its first line, in one line.
        assert not folded(cell) or len(cell.source.splitlines()[0]) <= LONGEST_NAME, cell.source


def test_solutions_are_folded_cell_by_cell(notebook):
    """Not by their heading: that JupyterLab keeps folded too, but other viewers don't."""
    for cell in notebook.cells:
        if "solution" in tags(cell) and cell.source != "## Solutions":
            named = (
                r"# Solution \d\d\.\d\n"
                if cell.cell_type == "code"
                else r"<details><summary>Solution \d\d\.\d</summary>\n\n"
            )
            assert re.match(named, cell.source), cell.source
            assert not cell.get("outputs") or cell.metadata["jupyter"]["outputs_hidden"]


def test_appendices_are_folded_by_their_heading_and_nothing_else_is(notebook):
    for cell in notebook.cells:
        assert cell.metadata.get("jp-MarkdownHeadingCollapsed", False) == cell.source.startswith("## Appendix")


def test_figures_are_read(path, notebook):
    if path.stem == "06_figures":
        pytest.skip("it shows the figures of the others again, each with its caption and claims")
    section, drawn, read = "", set(), set()
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            section = cell.source.splitlines()[0]
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            drawn |= {section}
        if "**You should see**" in cell.source or "solution" in tags(cell):
            read |= {section}
    assert drawn <= read


def test_exercises_have_time_hint_answer_check_and_solution(path, notebook):
    exercises = [i for i, cell in enumerate(notebook.cells) if cell.source.startswith("### Exercise ")]
    assert len(exercises) >= 3
    solutions = "\n".join(cell.source for cell in notebook.cells if "solution" in tags(cell))
    for number, place in enumerate(exercises, start=1):
        question, answer = notebook.cells[place : place + 2]
        name = f"{path.name[:2]}.{number}"
        assert re.match(rf"### Exercise {re.escape(name)} · .* \(\d+ min\)\n", question.source), question.source[:80]
        assert "<details><summary>Hint</summary>\n\n" in question.source
        assert tags(question) == tags(answer) == {"exercise"}
        assert answer.source.startswith("answer = None  # ")
        assert answer.source.endswith(f'exercises.check("{name}", answer, run)')
        assert f'assert exercises.check("{name}", answer, run)' in solutions


def test_solutions_stand_at_the_end(notebook):
    first = min(index for index, cell in enumerate(notebook.cells) if "solution" in tags(cell))
    for cell in notebook.cells[first:]:
        assert cell.cell_type != "code" or tags(cell) & {"solution", "exercise"}, "a lesson that students would lose"


def test_every_cell_was_run_in_order_and_none_failed(notebook):
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def test_checked_outputs_are_text(notebook):
    for cell in code_cells(notebook):
        if "nbval-check-output" in tags(cell):
            shown = [output for output in cell.outputs if "text" in output or "text/plain" in output.get("data", {})]
            assert shown, f"nothing to compare: {cell.source[:60]}"


def test_nothing_of_one_run_is_kept(notebook):
    assert "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
    assert str(paths.ROOT) not in nbformat.writes(notebook), "an output holds the path of a machine"


def test_no_notebook_overwrites_a_table_of_another():
    saved = {}
    for path in NOTEBOOKS:
        for cell in code_cells(nbformat.read(path, as_version=4)):
            for name in re.findall(r"run\.save\(.*, \"(\w+)\"\)", cell.source):
                saved.setdefault(name, set()).add(path.stem)
    # These two are made by the same function in both.
    assert {name for name, where in saved.items() if len(where) > 1} == {"thresholds", "deactivation"}
