"""What a result was made from: content hashes, versions, and the sidecar file beside each figure."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import io
import json
import pickle
import platform
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemolib import paths

INFRASTRUCTURE = frozenset(
    {"", "exhibits", "paper", "paths", "plots", "prompts", "provenance", "run", "settings", "store", "workers"}
)
"""Modules that hold settings, read prompts, or place, keep or draw results: each result's key has settings and prompt
itself ("" is nemolib)."""

PACKAGES = ("nemolib", "torch", "diffusers", "transformers", "torchmetrics", "numpy", "pandas", "matplotlib", "seaborn")
"""Packages whose versions a sidecar lists."""

COMPUTING = PACKAGES[1:5]
"""Packages that compute results, so that their versions belong to what determines one."""

_NO_PART = frozenset(
    {
        "name_or_path",
        "_name_or_path",
        "_diffusers_version",
        "transformers_version",
        "_use_default_values",
        "use_slicing",
        "dtype",
    }
)
"""What modules and configurations hold that has no part in a result: where they came from, how memory is saved.

A configuration's type is that of the weights, which count themselves; saving a pipeline turns it into text.
"""

_SAME_ATTENTION = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""Processors of diffusers that compute one attention in several ways, chosen by the memory that there is."""

_FEW = 4096
"""Values of a tensor that are looked at to see whether it changed."""

_VERSIONED = frozenset({*COMPUTING, *sys.stdlib_module_names})

_SETTINGS = (str, bool, int, float, tuple, torch.dtype, torch.device)

_PLAIN = frozenset({str, type(None), bool, int, float, tuple})

_EMPTY = frozenset({dict, OrderedDict, set, type(None)})

_HASHES: weakref.WeakKeyDictionary[Any, tuple[bytes, str]] = weakref.WeakKeyDictionary()
"""For each pipeline how it looked at a glance when it was hashed last, and the hash."""


def content_hash(value: Any) -> str:
    """Return a hash of a value's content, the same in every process and on every machine.

    Values of different type differ (``1``, ``1.0``, ``True`` and ``"1"``); a list and a tuple do not. The order of a
    mapping does not matter.

    Args:
        value: None, bool, int, float, text, bytes, a tensor or an array (dtype, shape, bytes), a table, a dataclass, or a
            mapping or sequence of these.

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
    plain = next((kind for kind in (bool, int, float, str, bytes, type(None)) if isinstance(value, kind)), None)
    if plain is not None:
        yield plain.__name__.encode()
        yield (str(value) if plain is str else plain.__repr__(value)).encode()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (b"dataclass", type(value).__name__.encode())
        # The code of a task tells of a class of nemolib, but for those of nemolib.beyond, of which it knows the base alone.
        if not type(value).__module__.startswith("nemolib.") or type(value).__module__.startswith("nemolib.beyond."):
            yield from map(str.encode, _unversioned_code(type(value)))
        # What has no part in equality, such as the size of a batch, has none in the content.
        compared = [field.name for field in dataclasses.fields(value) if field.compare]
        yield from _pieces({name: getattr(value, name) for name in compared})
    elif isinstance(value, Mapping):
        yield from (b"mapping", str(len(value)).encode())
        yield from (bytes.fromhex(item) for item in sorted(content_hash([key, value[key]]) for key in value))
    elif isinstance(value, list | tuple):
        yield from (b"sequence", str(len(value)).encode())
        yield from (bytes.fromhex(content_hash(item)) for item in value)
    else:
        yield from _array_pieces(value)


def _array_pieces(value: Any) -> Iterable[bytes | memoryview]:
    """Yield dtype, shape and bytes of a tensor or an array (a number of NumPy has no axes), or a table as CSV."""
    if isinstance(value, Tensor):
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
    """Return a hash of everything in a StableDiffusionPipeline that determines a result; quick where nothing changed.

    Raises:
        ValueError: Something in the pipeline changes results and cannot be described, such as a hook.
    """
    # What a pipeline itself holds is left from its last call, but for its parts.
    parts = {name: part for name, part in vars(pipe).items() if not isinstance(part, (*_PLAIN, list, Mapping, Tensor))}
    casts = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda", "mps")]
    numerics = [casts, torch.get_default_dtype(), torch.get_float32_matmul_precision()]
    whole = [type(pipe), parts, numerics]
    state = _description(whole, glance=True)
    if _HASHES.get(pipe, (b"", ""))[0] != state:
        _HASHES[pipe] = (state, content_hash(_description(whole, glance=False)))
    return _HASHES[pipe][1]


def _description(value: Any, *, glance: bool) -> bytes:
    """Return what something is and holds, all of it or, at a glance, enough to see a change."""
    stream = io.BytesIO()
    describer = _Describer(stream, protocol=5)
    describer.glance = glance
    # Equal values are written alike whether they are one object or two.
    describer.fast = True
    try:
        describer.dump(value)
    except Exception as error:
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise ValueError(
            f"results cannot be kept, since nothing tells what the model does ({reason}); take off hooks and what else "
            "changes it, or leave the context that does"
        ) from error
    return stream.getvalue()


class _Describer(pickle.Pickler):
    """Writes an object with everything in it, equal ones equally; what has no name, such as a hook, cannot be written.

    Nothing is ever read back.

    Attributes:
        glance: Whether tensors are looked at in a few places alone.
    """

    glance: bool

    def persistent_id(self, value: Any) -> Any:
        """Return what is written in place of an object; None: the object itself."""
        kind = type(value)
        if kind in _PLAIN:
            return None
        if isinstance(value, dict):  # first, since most are
            if kind is dict and "_forward_hooks" in value:
                return _held(value)
            return {key: value[key] for key in value if key not in _NO_PART} if _NO_PART & value.keys() else None
        if isinstance(value, Tensor):
            return _glance(value) if self.glance else content_hash(value)
        if isinstance(value, type | types.FunctionType):
            code = _unversioned_code(value)
            return [value.__qualname__, code] if code else None
        if kind.__module__.startswith("diffusers.hooks"):
            # A registry of hooks, such as those that cast layers: each with its settings.
            hooks = getattr(value, "hooks", {"": value}).values()
            return [
                [type(hook), [str(item) for item in vars(hook).values() if type(item) in _SETTINGS]] for hook in hooks
            ]
        if isinstance(value, set | frozenset):
            return sorted(map(str, value))
        if kind.__module__.startswith("diffusers.") and kind.__name__ in _SAME_ATTENTION:
            return "attention"
        if kind.__name__.startswith("FusedAttn"):
            raise ValueError("fused projections pass the value layers by; call pipe.unfuse_qkv_projections()")
        if hasattr(value, "get_vocab"):
            tokens = (id(value), len(value)) if self.glance else content_hash(dict(value.get_vocab()))
            special = [value.special_tokens_map, value.added_tokens_encoder]
            return [kind, tokens, special, value.model_max_length, value.padding_side]
        if hasattr(value, "set_timesteps"):
            return [kind, value.config]
        return None


def _held(module: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a module holds, without what is empty or has no part in a result."""
    left_out = _NO_PART | ({"forward"} if "_diffusers_hook" in module else set())
    if type(module.get("_hf_hook")).__module__.startswith("accelerate."):
        # It moves weights to the device and back.
        left_out |= {"_hf_hook", "_old_forward", "forward"}
    return {key: value for key, value in module.items() if key not in left_out and (type(value) not in _EMPTY or value)}


def _glance(tensor: Tensor) -> list[Any]:
    """Return what changes when a tensor does: its place, how often it was changed, and the sum of a few values."""
    # PyTorch does not count changes that are made through Tensor.data; values from all over a tensor tell of one that
    # scales or replaces it. All of them would be a second for Stable Diffusion, at every call.
    some = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _FEW)]
    changes = 0 if tensor.is_inference() else tensor._version
    return [tensor.data_ptr(), changes, float(some.sum(dtype=torch.float32))]


@functools.cache
def _unversioned_code(root: Any) -> tuple[str, ...]:
    """Return hashes of the code of a class and its bases, or of a function, but for those of `COMPUTING` and Python."""
    kinds = root.__mro__ if isinstance(root, type) else (root,)
    return tuple(code_hash(kind) for kind in kinds if str(kind.__module__).partition(".")[0] not in _VERSIONED)


@functools.cache
def code_hash(root: Callable[..., Any] | type | str) -> str:
    """Return a hash of the code that determines results, with the versions of `COMPUTING`.

    Comments, docstrings and layout do not count.

    Args:
        root: A function or class, with its module (in a notebook, alone); or the name of a module of nemolib, such as
            ``"selection"``. And from there on all modules of nemolib that are imported, directly or not, but for
            `INFRASTRUCTURE`.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: nemolib has no such module.
        ValueError: The code of a function or class cannot be read, or it is defined inside of another.
    """
    waiting, found = [root], {}
    while waiting:
        part = waiting.pop()
        if part not in found and (part == root or part not in INFRASTRUCTURE):
            tree = _Undocumented().visit(ast.parse(_source(part)))
            found[part] = ast.unparse(tree)
            waiting.extend(_imported(tree))
    return content_hash([*found.values(), *(versions()[package] for package in COMPUTING)])


def _source(part: Callable[..., Any] | type | str) -> str:
    if isinstance(part, str):
        return _path(part).read_text(encoding="utf-8")
    if "<" in part.__qualname__:
        raise ValueError(f"{part.__name__} is not defined at the top of its module, so that nothing tells what it does")
    try:
        module = sys.modules[part.__module__]
        # A function of a notebook has no file: it is taken alone.
        return inspect.getsource(module if getattr(module, "__file__", None) else part)
    except (KeyError, OSError, TypeError) as error:
        raise ValueError(
            f"the code of {part.__qualname__} cannot be read; define it in a module with a file"
        ) from error


class _Undocumented(ast.NodeTransformer):
    """Takes docstrings out."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:  # noqa: N802, D102
        return None if isinstance(node.value, ast.Constant) else node


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of nemolib that a module imports, at any place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            inside = [name.removeprefix("nemolib.") for name in names if name.startswith("nemolib.")]
            yield from (name for name in inside if _path(name).is_file())


def _path(module: str) -> Path:
    """Return the file of a module of nemolib, whether it is there or not."""
    return paths.PACKAGE / f"{module.replace('.', '/')}.py"


@functools.cache
def versions() -> Mapping[str, str]:
    """Return name -> version of Python and of `PACKAGES`, without build labels (``+cpu``)."""
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
