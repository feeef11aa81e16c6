"""Profiles: what differs between worlds (the tiny one, Stable Diffusion v1-4) is data, read into frozen dataclasses.

A profile is one YAML file in ``nemolib/profiles/``. ``extends: <other>`` takes every key that is not given from the
other profile, so that a number is written down once.
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from nemolib import paths
from nemolib.settings import (
    DetectionSettings,
    GenerationSettings,
    MitigationSettings,
    SearchSettings,
    SimilaritySettings,
)

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
ProtocolName = Literal["released", "paper"]
EncoderKind = Literal["descriptor", "sscd", "clip", "inception"]


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the key, the value and what is allowed."""


@dataclasses.dataclass(frozen=True)
class PromptTables:
    """Paths of the prompt tables, relative to the repository or absolute.

    Attributes:
        memorized: memorized prompts.
        unmemorized: prompts that are not memorized.
        holdout: prompts of the holdout set.
        quality: prompts whose images are compared with real ones (COCO); None: not available.
    """

    memorized: str
    unmemorized: str
    holdout: str
    quality: str | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many prompts of each kind are used, from the top of the table; None: all."""

    vm: int | None = None
    tm: int | None = None
    ladder: int | None = None
    unmemorized: int | None = None


@dataclasses.dataclass(frozen=True)
class Extent:
    """How many prompts the notebooks take of those that the profile has, from the top of the table; None: all.

    Attributes:
        drawn: unmemorized prompts whose images notebooks 02 and 04 look at.
        searched: unmemorized prompts whose neurons are searched.
        mitigated: VM and as many TM prompts of Table 1.
        ablated: VM and as many TM prompts of Table 4, and of Fig. 5b, 14 and 15.
        layers: VM prompts of Fig. 16 to 20.
        blocks: prompts of Table 3.
        quality: prompts of Fig. 5a and 8.
        quality_samples: images of each of them; None: as many as are generated anyway.
    """

    drawn: int | None = None
    searched: int | None = None
    mitigated: int | None = None
    ablated: int | None = None
    layers: int | None = None
    blocks: int | None = None
    quality: int | None = None
    quality_samples: int | None = None


@dataclasses.dataclass(frozen=True)
class ThresholdSettings:
    """The memorization threshold: mean + ``multiplier`` standard deviations of the holdout scores, or ``value``."""

    multiplier: float = 1.0
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class EncoderSettings:
    """A network that turns images or texts into features, and where it is.

    Attributes:
        kind: ``descriptor`` (the tiny world's copy detection), ``sscd``, ``clip`` or ``inception``.
        path: folder (descriptor, clip), TorchScript file (sscd, inception), relative to the repository or absolute, or
            hub id (clip).
        sha256: of the file, or of ``model.safetensors`` in the folder; None: not checked, and for a TorchScript file
            noted at its first use.
        revision: commit or branch of a hub model; None: its default.
        name: what tables call it; None: a name after its kind.
    """

    kind: EncoderKind
    path: str
    sha256: str | None = None
    revision: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Reject what cannot be meant."""
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ValueError(f"sha256 is {self.sha256!r}; it must be 64 hexadecimal digits")
        if self.revision is not None and self.kind != "clip":
            raise ValueError(f"revision is {self.revision!r}, but kind {self.kind!r} is no hub model; only clip can be")


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The encoders of the metrics; None: not available.

    ::

        encoders:
          copy: {kind: sscd, path: models/sscd_disc_mixup.torchscript.pt}
          alignment: {kind: clip, path: openai/clip-vit-base-patch32}
          quality: {kind: inception, path: models/inception-2015-12-05.pt}
          clip_quality: {kind: clip, path: openai/clip-vit-base-patch32}

    Attributes:
        copy: copy detection: SSCD_Orig, SSCD_Gen, D_SSCD.
        alignment: A_CLIP.
        quality: FID and KID.
        clip_quality: CLIP-FID.
    """

    copy: EncoderSettings | None = None
    alignment: EncoderSettings | None = None
    quality: EncoderSettings | None = None
    clip_quality: EncoderSettings | None = None

    def __post_init__(self) -> None:
        """Reject an encoder that cannot do what it is named for."""
        for role, allowed in _ROLES.items():
            chosen = getattr(self, role)
            if chosen is not None and chosen.kind not in allowed:
                raise ValueError(f"{role} has kind {chosen.kind!r}; it must be one of {', '.join(allowed)}")


_ROLES: dict[str, tuple[str, ...]] = {
    "copy": ("descriptor", "sscd"),
    "alignment": ("clip",),
    "quality": ("inception", "clip"),
    "clip_quality": ("clip",),
}
"""Kinds of encoders that can play each role."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """Everything that differs between one world and another.

    Attributes:
        name: the profile's name, also the name of its folders in ``build/`` and ``figures/``.
        model: folder (relative to the repository, or absolute) or hub id of a Stable Diffusion pipeline; or
            ``random:`` and an architecture of `nemolib.architectures`: random weights.
        prompts: the prompt tables.
        revision: commit or branch of a hub model; None: its default.
        dtype: floating-point type of the weights in memory; ``auto``: float16 with CUDA, else float32.
        device: where the model runs; ``auto``: CUDA if there is one, else MPS, else the CPU.
        protocol: ``released`` (the authors' code) or ``paper`` (the paper's text).
        groups: keep only memorized prompts of this group; None: all.
        limits: how many prompts of each kind are used.
        extent: how many of them each experiment takes.
        holdout_size: number of holdout prompts for the activation statistics; None: all.
        threshold_prompts: number of holdout prompts for the memorization threshold; None: all.
        detection: seeds and sampler settings of the noise differences.
        similarity: settings of the structural similarity.
        thresholds: how the memorization threshold is found.
        search: settings of the neuron search.
        generation: settings of the generated images.
        mitigation: settings of the mitigations that deactivated neurons are compared with.
        encoders: the encoders of copy detection, alignment and image quality.
        statistics: file of activation statistics, relative to the repository or absolute (safetensors, or ``.pt`` of
            the authors); None: computed from the holdout prompts.
        downloads: manifest of `nemolib.downloads` with the files that `make data` fetches; None: nothing to fetch.
        solutions: whether a run of a notebook includes the solutions of its exercises.
        workers: number of processes on this machine that share the prompts, see `nemolib.workers`; None: this one alone.
        published_run: table of results of a run of the authors' code (see `nemolib.published_runs`), relative to the
            repository or absolute; notebook 06 draws it beside what was computed here. None: there is none.
    """

    name: str
    model: str
    prompts: PromptTables
    revision: str | None = None
    dtype: Dtype = "float32"
    device: Device = "auto"
    protocol: ProtocolName = "released"
    groups: str | None = None
    limits: Limits = Limits()
    extent: Extent = Extent()
    holdout_size: int | None = 1000
    threshold_prompts: int | None = 200
    detection: DetectionSettings = dataclasses.field(default_factory=DetectionSettings)
    similarity: SimilaritySettings = dataclasses.field(default_factory=SimilaritySettings)
    thresholds: ThresholdSettings = ThresholdSettings()
    search: SearchSettings = dataclasses.field(default_factory=SearchSettings)
    generation: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)
    mitigation: MitigationSettings = dataclasses.field(default_factory=MitigationSettings)
    encoders: Encoders = Encoders()
    statistics: str | None = None
    downloads: str | None = None
    solutions: bool = True
    workers: int | None = None
    published_run: str | None = None


_RANGES: dict[str, tuple[float, float]] = {
    "limits.vm": (0, math.inf),
    "limits.tm": (0, math.inf),
    "limits.ladder": (0, math.inf),
    "limits.unmemorized": (0, math.inf),
    "extent.drawn": (0, math.inf),
    "extent.searched": (0, math.inf),
    "extent.mitigated": (1, math.inf),
    "extent.ablated": (1, math.inf),
    "extent.layers": (1, math.inf),
    "extent.blocks": (0, math.inf),
    "extent.quality": (0, math.inf),
    "extent.quality_samples": (1, math.inf),
    "holdout_size": (2, math.inf),
    "threshold_prompts": (2, math.inf),
    "thresholds.multiplier": (-10, 10),
    "thresholds.value": (-1, 1),
    "workers": (1, math.inf),
}
"""Allowed values, both ends included, of the keys that no settings class of `nemolib.settings` checks itself."""


def known_profiles() -> list[str]:
    """Return the names of the profiles that come with the package, sorted."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def load_profile(profile: str | Path | Profile) -> Profile:
    """Return a validated profile.

    Args:
        profile: name of a profile (``"tiny"``), path of a YAML file, or a Profile, which is returned as it is.

    Returns:
        The frozen profile.

    Raises:
        ProfileError: unknown profile; unknown, missing or ill-typed key; impossible value. The message names the
            key, the value and the allowed ones.
    """
    if isinstance(profile, Profile):
        return profile
    path = _profile_path(profile)
    return profile_from_mapping({"name": path.stem} | _read(path, seen=()), where=str(path))


def profile_from_mapping(values: Mapping[str, Any], *, where: str = "profile") -> Profile:
    """Return a validated profile made from nested mappings, as they stand in a YAML file.

    Args:
        values: keys of `Profile`; nested settings are mappings of their own.
        where: what an error message calls the source of the values.

    Returns:
        The frozen profile.

    Raises:
        ProfileError: see `load_profile`.
    """
    return _build(Profile, values, where=where, prefix="")


def profile_to_mapping(profile: Profile) -> dict[str, Any]:
    """Return the profile as nested mappings of plain values, the inverse of `profile_from_mapping`."""
    return dataclasses.asdict(profile)


def _profile_path(profile: str | Path) -> Path:
    """Return the YAML file of a profile name or path; raise ProfileError with the known names."""
    path = Path(profile)
    if path.suffix in {".yaml", ".yml"}:
        path = path.expanduser()
        if not path.is_file():
            raise ProfileError(f"profile file {str(profile)!r} does not exist; give a YAML file or one of {_known()}")
        return path
    path = paths.PROFILES / f"{profile}.yaml"
    if str(profile) not in known_profiles():
        raise ProfileError(f"unknown profile {str(profile)!r}; known: {_known()}; or give the path of a .yaml file")
    return path


def _known() -> str:
    return ", ".join(known_profiles())


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return the keys of one YAML file, merged over those of the profile that it extends."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ProfileError(f"{path}: expected keys and values, got {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    parent = path.parent / base if str(base).endswith((".yaml", ".yml")) else _profile_path(str(base))
    if parent.resolve() in (path.resolve(), *seen):
        raise ProfileError(f"{path}: key 'extends': {base!r} extends this profile again; remove one of the two")
    if not parent.is_file():
        raise ProfileError(f"{path}: key 'extends': file {str(parent)!r} does not exist; known profiles: {_known()}")
    return _merge(_read(parent, seen=(*seen, path.resolve())), values)


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``values`` over it, key by key in nested mappings; one that states its kind replaces all."""
    merged = dict(base)
    for key, value in values.items():
        # Another encoder has another name and another hash.
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping) and "kind" not in value
        merged[key] = _merge(base[key], value) if both else value
    return merged


@functools.cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Return name -> (type, has a default) of the fields of a dataclass."""
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is not missing or field.default_factory is not missing)
        for field in dataclasses.fields(kind)
    }


def _build(kind: type, values: Any, *, where: str, prefix: str) -> Any:
    """Return an instance of a settings dataclass; raise ProfileError for a key or value that does not fit."""
    allowed = _fields(kind)
    if not isinstance(values, Mapping):
        raise ProfileError(f"{where}: key {prefix[:-1]!r}: expected the keys {_names(allowed)}, got {values!r}")
    for key in values:
        if key not in allowed:
            raise ProfileError(f"{where}: unknown key {prefix}{key!s} = {values[key]!r}; allowed: {_names(allowed)}")
    for key, (_, has_default) in allowed.items():
        if key not in values and not has_default:
            raise ProfileError(f"{where}: key {prefix + key!r} is missing; needed: {_names(allowed)}")
    arguments = {key: _value(allowed[key][0], value, where=where, key=prefix + key) for key, value in values.items()}
    try:
        return kind(**arguments)
    except ProfileError:
        raise
    except ValueError as error:
        raise ProfileError(f"{where}: key {prefix[:-1] or 'profile'!r}: {error}") from error


def _names(allowed: Mapping[str, Any]) -> str:
    return ", ".join(sorted(allowed))


def _value(kind: Any, value: Any, *, where: str, key: str) -> Any:
    """Return a value of a key, converted to its declared type and checked against its range."""
    nested = next((option for option in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(option)), None)
    if nested is not None and not (value is None and types.NoneType in typing.get_args(kind)):
        return _build(nested, value, where=where, prefix=f"{key}.")
    converted = _convert(kind, value)
    if converted is _REFUSED:
        raise ProfileError(f"{where}: key {key!r}: expected {_describe(kind)}, got {value!r}")
    _check_range(converted, where=where, key=key)
    return converted


_REFUSED = object()


def _convert(kind: Any, value: Any) -> Any:
    """Return the value as the declared type, or the mark that it does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        candidates = (_convert(option, value) for option in arguments)
        return next((candidate for candidate in candidates if candidate is not _REFUSED), _REFUSED)
    if origin is Literal:
        return value if value in arguments else _REFUSED
    if origin is tuple:
        items = [_convert(arguments[0], item) for item in value] if isinstance(value, list | tuple) else []
        return _REFUSED if not items or _REFUSED in items else tuple(items)
    if kind is type(None):
        return None if value is None else _REFUSED
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and kind is not bool:
        return _REFUSED
    return value if isinstance(value, kind) else _REFUSED


def _describe(kind: Any) -> str:
    """Return a declared type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "nothing (null)"}
    return words.get(kind, str(kind))


def _check_range(value: Any, *, where: str, key: str) -> None:
    """Raise ProfileError if a number is outside the range of its key."""
    if value is None or key not in _RANGES:
        return
    low, high = _RANGES[key]
    if not low <= value <= high:
        raise ProfileError(f"{where}: key {key!r}: {value!r} is impossible; allowed: {low:g} to {high:g}")
