"""What a result was made from: content hashes, versions, and the sidecar file beside each figure."""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import platform
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemolib import paths
from nemolib.files import write_atomic

INFRASTRUCTURE = frozenset(
    {
        "__init__",
        "checks",
        "downloads",
        "estimate",
        "exhibits",
        "figures",
        "files",
        "index",
        "paper",
        "paths",
        "profiles",
        "provenance",
        "runner",
        "store",
        "tables",
        "theme",
        "workers",
        "world",
    }  # fmt: skip
)
"""Modules that read settings, or place, store or draw results, but do not determine them; all others are science modules.

A package counts as one module. ``world`` makes weights, and weights are hashed themselves.
"""

PACKAGES = ("nemolib", "torch", "diffusers", "transformers", "torchmetrics", "numpy", "pandas", "matplotlib")
"""Packages whose versions a sidecar lists."""


def content_hash(value: Any) -> str:
    """Return a hash of a value's content, the same in every process and on every machine.

    Values of different type differ (``1``, ``1.0``, ``True`` and ``"1"``); a list and a tuple do not. The order of a
    mapping or a set does not matter.

    Args:
        value: None, bool, int, float, text, bytes, a Path (content of the file, or names and contents of all files of
            the folder), a tensor or an array (dtype, shape, bytes), a dataclass, or a mapping, sequence or set of
            these.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        TypeError: a value of another type.
        FileNotFoundError: a Path that does not exist.
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
    elif isinstance(value, Path):
        yield from _path_pieces(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (b"dataclass", type(value).__name__.encode())
        yield from _pieces({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        yield from (b"mapping", str(len(value)).encode())
        yield from (bytes.fromhex(item) for item in sorted(content_hash([key, value[key]]) for key in value))
    elif isinstance(value, set | frozenset):
        yield from (b"set", str(len(value)).encode())
        yield from (bytes.fromhex(item) for item in sorted(content_hash(item) for item in value))
    elif isinstance(value, list | tuple):
        yield from (b"sequence", str(len(value)).encode())
        yield from (bytes.fromhex(content_hash(item)) for item in value)
    else:
        yield from _array_pieces(value)


def _path_pieces(path: Path) -> Iterable[bytes]:
    """Yield the content of a file, or the names and contents of the files of a folder, hidden ones excepted."""
    if path.is_file():
        yield from (b"file", path.read_bytes())
        return
    if not path.is_dir():
        raise FileNotFoundError(f"cannot hash {path}: there is no such file or folder")
    yield b"folder"
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield from (relative.as_posix().encode(), hashlib.sha256(file.read_bytes()).digest())


def _array_pieces(value: Any) -> Iterable[bytes | memoryview]:
    """Yield dtype, shape and bytes of a tensor or an array; a number of NumPy is an array without axes."""
    if hasattr(value, "detach"):
        import torch

        tensor = value.detach().cpu().contiguous()
        yield from (b"tensor", str(tensor.dtype).encode(), repr(tuple(tensor.shape)).encode())
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    elif hasattr(value, "tobytes") and hasattr(value, "dtype") and not value.dtype.hasobject:
        yield from (b"array", str(value.dtype).encode(), repr(tuple(value.shape)).encode(), value.tobytes())
    else:
        raise TypeError(f"cannot hash a value of type {type(value).__name__}: {value!r:.80}")


def model_hash(pipe: Any) -> str:
    """Return a hash of everything in a StableDiffusionPipeline that determines a result: weights, tokens, scheduler."""
    parts = {name: dict(getattr(pipe, name).state_dict()) for name in ("unet", "text_encoder", "vae")}
    scheduler = {name: repr(value) for name, value in pipe.scheduler.config.items() if name[0] != "_"}
    return content_hash([parts, dict(pipe.tokenizer.get_vocab()), scheduler])


def science_hash(*modules: str) -> str:
    """Return a hash of the code that determines results; comments, docstrings and blank lines do not count.

    Args:
        modules: names of nemolib modules or packages (``"localization"``): these and every science module that they
            import, directly or not. Without any: all science modules, that is, all but `INFRASTRUCTURE`.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: nemolib has no such module.
    """
    names = _closure(modules) if modules else _modules() - INFRASTRUCTURE
    return content_hash(
        {name: {path.name: _bare_source(source) for path, source in _sources(name).items()} for name in sorted(names)}
    )


def _modules() -> set[str]:
    """Return the names of nemolib's modules and packages."""
    packages = {path.parent.name for path in paths.PACKAGE.glob("*/__init__.py")}
    return {path.stem for path in paths.PACKAGE.glob("*.py")} | packages


def _sources(name: str) -> dict[Path, str]:
    """Return the source of a module, or those of all modules of a package."""
    package = paths.PACKAGE / name
    files = sorted(package.glob("*.py")) if (package / "__init__.py").is_file() else [paths.PACKAGE / f"{name}.py"]
    if not files[0].is_file():
        raise FileNotFoundError(f"nemolib has no module {name!r} ({files[0]})")
    return {path: path.read_text(encoding="utf-8") for path in files}


def _closure(modules: Iterable[str]) -> set[str]:
    """Return the modules and all science modules that they import, directly or not."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(set().union(*map(_imports, _sources(name).values())) - INFRASTRUCTURE)
    return found


def _imports(source: str) -> set[str]:
    """Return the names of the modules of nemolib that a source imports, at any place."""
    return _imported_names(source) & _modules()


# Sources are parsed once in a process: the hash of a module is asked for with every image and every prompt.
@functools.cache
def _imported_names(source: str) -> frozenset[str]:
    """Return what a source imports from nemolib, modules or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "nemolib":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemolib."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("nemolib."))
    return frozenset(names)


@functools.cache
def _bare_source(source: str) -> str:
    """Return a source without comments, docstrings and blank lines."""
    lines: list[str] = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str):
                for row in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                    lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def versions() -> dict[str, str]:
    """Return name -> version of Python and of the packages that results depend on.

    Build labels (``+cpu``) are left out, so that two machines with the same versions write the same.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_sidecar(
    path: str | Path,
    *,
    notebook: str,
    profile: str,
    seeds: Mapping[str, int],
    inputs: Mapping[str, Any],
    device: str = "cpu",
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write what a figure or table was made from as JSON beside it.

    Neither time nor commit is written, so that making it again without a change gives the same bytes.

    Args:
        path: the figure or table; the sidecar has the same name with suffix ``.json``.
        notebook: name of the notebook that made it.
        profile: name of the profile.
        seeds: name -> seed.
        inputs: name -> Path (its content is hashed), or any value that `content_hash` takes.
        device: type of device that computed it.
        notes: further plain values.

    Returns:
        Path of the sidecar.

    Raises:
        FileNotFoundError: an input file is missing.
        OSError: the disk is full; an older sidecar is unchanged.
    """
    sidecar = Path(path).with_suffix(".json")
    content = {
        "file": Path(path).name,
        "notebook": notebook,
        "profile": profile,
        "seeds": dict(seeds),
        "inputs": {name: content_hash(value) for name, value in inputs.items()},
        "code": science_hash(),
        "versions": versions(),
        "device": device,
        **(notes or {}),
    }
    write_atomic(sidecar, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return sidecar
