"""The house stays small: lines, files and floors of the package, and which way imports go."""

import ast
from functools import cache
from pathlib import Path

import pytest

from nemolib import paths

FILES = {".".join(path.relative_to(paths.PACKAGE).with_suffix("").parts): path for path in paths.PACKAGE.rglob("*.py")}
LARGEST_PACKAGE, LARGEST_MODULE, MOST_FILES, MOST_FLOORS = 6554, 450, 40, 9
BEYOND = {"prune_and_export", "is_it_gone", "who_finds_it", "where_is_it"}
"""Experiments of the methods after NeMo, which are in `nemolib.beyond`."""
LARGEST_BEYOND, LARGEST_EXPERIMENT = 900, 250


def code_lines(path: Path) -> int:
    """Return the number of lines that are neither blank, comment nor docstring."""
    source = path.read_text(encoding="utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and ast.get_docstring(node)]
    docs = {row for node in documented for row in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and row not in docs for row, line in lines)


def statements(node: ast.AST):
    """Yield what is executed: not what type checkers alone see."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


@cache
def imported(name: str) -> frozenset[str]:
    """Return the modules of the package that a module imports, at any place."""
    found = set()
    for node in statements(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "nemolib":
            inside = node.module.partition(".")[2]
            found |= {inside, *(f"{inside}.{alias.name}".strip(".") for alias in node.names)}
    return frozenset(found & set(FILES))


def floor(name: str, below: tuple[str, ...] = ()) -> int:
    """Return how many floors there are up to a module; raise where imports go in a circle."""
    assert name not in below, f"a circle: {' -> '.join((*below, name))}"
    return 1 + max((floor(other, (*below, name)) for other in imported(name)), default=0)


def test_the_package_is_small():
    lines = {name: code_lines(path) for name, path in FILES.items()}
    beyond = {name for name in lines if name.split(".")[0] == "beyond"}
    experiments = {name for name in lines if name.split(".")[-1] in BEYOND}
    assert sum(number for name, number in lines.items() if name not in beyond | experiments) <= LARGEST_PACKAGE
    assert len([name for name in lines.keys() - beyond - experiments if lines[name]]) <= MOST_FILES
    assert {name: number for name, number in lines.items() if number > LARGEST_MODULE} == {}
    assert sum(lines[name] for name in beyond) <= LARGEST_BEYOND
    assert {name: lines[name] for name in experiments if lines[name] > LARGEST_EXPERIMENT} == {}


def test_imports_go_one_way_over_few_floors():
    floors = {name: floor(name) for name in FILES}
    assert max(floors.values()) <= MOST_FLOORS, sorted(floors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_module_hands_the_parts_of_a_run_around_or_asks_a_tool(name):
    source = FILES[name].read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert [argument.arg for argument in node.args.args[:2]] != ["pipe", "profile"], node.name
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] != "tools"


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("experiments.")))
def test_what_is_kept_is_computed_by_modules_that_draw_nothing(name):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.compute"]
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not own & {ast.unparse(call.args[0]) for call in calls}, "its key would change with a figure"
