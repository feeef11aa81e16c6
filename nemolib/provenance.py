"""What a result was made from: content hashes, versions, and the sidecar file beside each figure."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemolib import paths

INFRASTRUCTURE = frozenset(
    {"", "exhibits", "paper", "paths", "plots", "provenance", "run", "settings", "store", "workers"}
)
"""Modules that hold settings, or place, keep or draw results, but do not determine them ("" is nemolib itself)."""

PACKAGES = ("nemolib", "torch", "diffusers", "transformers", "torchmetrics", "numpy", "pandas", "matplotlib", "seaborn")
"""Packages whose versions a sidecar lists."""


def content_hash(value: Any) -> str:
    """Return a hash of a value's content, the same in every process and on every machine.

    Values of different type differ (``1``, ``1.0``, ``True`` and ``"1"``); a list and a tuple do not. The order of a
    mapping or a set does not matter.

    Args:
        value: None, bool, int, float, text, bytes, a tensor or an array (dtype, shape, bytes), a table, a dataclass, or a
            mapping, sequence or set of these.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        TypeError: A value of another type.
    """
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterable[bytes | memoryview]:
    """Yield a value's content as byte strings, each group opened by its kind."""
    plain = next((kind for kind in (bool, int, float, str, type(None)) if isinstance(value, kind)), None)
    if plain is not None:
        yield plain.__name__.encode()
        yield (str(value) if plain is str else plain.__repr__(value)).encode()
    elif isinstance(value, bytes):
        yield from (b"bytes", value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (b"dataclass", type(value).__name__.encode())
        # What has no part in equality, such as the size of a batch, has none in the content.
        compared = [field.name for field in dataclasses.fields(value) if field.compare]
        yield from _pieces({name: getattr(value, name) for name in compared})
    elif isinstance(value, Mapping):
        yield from (b"mapping", str(len(value)).encode())
        yield from (bytes.fromhex(item) for item in sorted(content_hash([key, value[key]]) for key in value))
    elif isinstance(value, set | frozenset):
        yield from (b"set", str(len(value)).encode())
        yield from (bytes.fromhex(item) for item in sorted(map(content_hash, value)))
    elif isinstance(value, list | tuple):
        yield from (b"sequence", str(len(value)).encode())
        yield from (bytes.fromhex(content_hash(item)) for item in value)
    else:
        yield from _array_pieces(value)


def _array_pieces(value: Any) -> Iterable[bytes | memoryview]:
    """Yield dtype, shape and bytes of a tensor or an array (a number of NumPy has no axes), or a table as CSV."""
    if hasattr(value, "detach"):
        import torch

        tensor = value.detach().cpu().contiguous()
        yield from (b"tensor", str(tensor.dtype).encode(), repr(tuple(tensor.shape)).encode())
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    elif hasattr(value, "tobytes") and hasattr(value, "dtype") and not value.dtype.hasobject:
        yield from (b"array", str(value.dtype).encode(), repr(tuple(value.shape)).encode(), value.tobytes())
    elif hasattr(value, "to_csv"):
        yield from (b"table", value.to_csv(index=False).encode())
    else:
        raise TypeError(f"cannot hash a value of type {type(value).__name__}: {value!r:.80}")


def model_hash(pipe: Any) -> str:
    """Return a hash of everything in a StableDiffusionPipeline that determines a result: weights, tokens, scheduler."""
    parts = {name: dict(getattr(pipe, name).state_dict()) for name in ("unet", "text_encoder", "vae")}
    scheduler = {name: repr(value) for name, value in pipe.scheduler.config.items() if name[0] != "_"}
    return content_hash([parts, dict(pipe.tokenizer.get_vocab()), scheduler])


@functools.cache
def code_hash(root: Callable[..., Any] | str) -> str:
    """Return a hash of the code that determines results; comments, docstrings and layout do not count.

    Args:
        root: A function of a module, with what it uses of its module; or the name of a module of nemolib, such as
            ``"selection"``, as a whole. And from there on all modules of nemolib that are imported, directly or not, but
            for `INFRASTRUCTURE`.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: nemolib has no such module.
    """
    own, modules = ([], {root}) if isinstance(root, str) else _used(_tree(_source_of(root)), root.__name__)
    waiting, found = list(modules), {}
    while waiting:
        name = waiting.pop()
        if name not in found and (name == root or name not in INFRASTRUCTURE):
            tree = _tree(_path(name).read_text(encoding="utf-8"))
            found[name] = ast.unparse(tree)
            waiting.extend(module for node in ast.walk(tree) for _, module in _imported(node))
    return content_hash([own, found])


def _source_of(function: Callable[..., Any]) -> str:
    module = sys.modules[function.__module__]
    # A function of a notebook has no file: it is taken alone.
    return inspect.getsource(module if getattr(module, "__file__", None) else function)


def _tree(source: str) -> ast.Module:
    """Return a source parsed, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
            node.body = kept or [ast.Pass()] * isinstance(node, ast.FunctionDef | ast.ClassDef)
    return tree


def _used(tree: ast.Module, name: str) -> tuple[list[str], set[str]]:
    """Return the definitions of a module that one of them uses, directly or not, and the modules that they import."""
    definitions, imports = {}, {}
    for node in tree.body:
        for defined in _defined(node):
            definitions[defined] = node
        for local, module in _imported(node):
            imports[local] = module
    waiting, pieces, modules = [name], {}, set()
    while waiting:
        name = waiting.pop()
        if name in imports:
            modules.add(imports[name])
        elif name in definitions and name not in pieces:
            pieces[name] = ast.unparse(definitions[name])
            inside = list(ast.walk(definitions[name]))
            waiting.extend(node.id for node in inside if isinstance(node, ast.Name))
            modules.update(module for node in inside for _, module in _imported(node))
    return [pieces[name] for name in sorted(pieces)], modules


def _defined(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the local name and the module of nemolib of each import."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "nemolib":
        inside = node.module.partition(".")[2]
        for alias in node.names:
            whole = f"{inside}.{alias.name}".strip(".")
            yield alias.asname or alias.name, whole if _path(whole).is_file() else inside
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.partition(".")[0] == "nemolib":
                yield alias.asname or "nemolib", alias.name.partition(".")[2]


def _path(module: str) -> Path:
    """Return the file of a module of nemolib, whether it is there or not."""
    return paths.PACKAGE / f"{module.replace('.', '/')}.py"


def versions() -> dict[str, str]:
    """Return name -> version of Python and of the packages that results depend on, without build labels (``+cpu``)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def sidecar(file: str, *, profile: Any, notebook: str, inputs: Mapping[str, Any], code: str, device: str) -> str:
    """Return what a figure or table was made from, as JSON.

    Neither time nor commit is in it, so that making it again without a change gives the same bytes.

    Args:
        file: Name of the figure or table.
        profile: The profile; its name and seeds are written.
        notebook: Name of the notebook that computed it.
        inputs: Name -> anything that `content_hash` takes.
        code: Hash of the code (`code_hash`).
        device: Type of device that computed it.
    """
    content = {
        "file": file,
        "notebook": notebook,
        "profile": profile.name,
        "seeds": {"detection": profile.detection.seed, "generation": profile.generation.seed},
        "inputs": {name: content_hash(value) for name, value in inputs.items()},
        "code": code,
        "versions": versions(),
        "device": device,
    }
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
