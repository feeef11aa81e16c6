"""Settings: what the algorithms, the protocols and the worlds leave open, as frozen dataclasses that check their values.

The defaults are those of the paper's experiment with Stable Diffusion v1-4. A `Profile` holds all settings of a world
(the tiny one, Stable Diffusion v1-4). It is one YAML file in ``nemolib/profiles/``; ``extends: <other>`` takes every key
that is not given from the other profile, so that a number is written down once. A wrong value fails when it is set,
before any computation.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, model_validator
from pydantic.dataclasses import dataclass

from nemolib import paths

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Whole = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
AtLeastTwo = Annotated[int, Field(strict=True, ge=2)]
Multiplier = Annotated[float, Field(strict=True, ge=-10, le=10)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

Mask = Literal["padding", "summary", "none"]

validated = dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
"""Make a class a frozen dataclass that refuses values of another type or range, and names that it does not have."""


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the key, the value and what is allowed."""


# --- Algorithms ---------------------------------------------------------------------------------------------------------


@validated
class DetectionSettings:
    """How noise differences are computed (Alg. 1 of the paper).

    Attributes:
        seed: Seed of the initial latents.
        samples: Initial latents per prompt, at least 2 (a score compares pairs of them).
        steps: Denoising steps of the schedule whose first steps are used.
        guidance: Classifier-free guidance scale; 0 means the text-conditional prediction alone, at half the cost.
    """

    seed: Whole = 1
    samples: AtLeastTwo = 10
    steps: AtLeastTwo = 50
    guidance: NotNegative = 0.0


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise ValueError(f"{size} is even; it must be odd")
    return size


@validated
class SimilaritySettings:
    """Window and scales of the structural similarity of two noise differences.

    Attributes:
        kernel_size: Side of the window in latent pixels, odd. A Gaussian window takes its side from ``sigma``; the
            kernel size only bounds how small the coarsest scale may be.
        sigma: Standard deviation of the Gaussian window, in latent pixels.
        betas: Exponent of each scale, finest first; their number is the number of scales (MS-SSIM only).
    """

    kernel_size: Annotated[Count, AfterValidator(_odd)] = 11
    sigma: Positive = 1.5
    betas: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.33, 0.33, 0.33)


@validated
class SearchSettings:
    """Course of the neuron search: the initial selection (Alg. 3 of the paper) and the method.

    Attributes:
        theta_start: First threshold on a neuron's z-score.
        theta_step: How much the threshold falls in each step.
        theta_min: Smallest threshold; at it the search ends (whether it is itself tried is a protocol switch).
        k_start: Neurons per layer taken for their activation alone, at the first step.
        k_step: How much this number grows in each step.
        k_max: Largest such number; beyond it the search ends.
        method: Course of the whole search (Alg. 3 and 4). ``sequential``: all kept seeds, one candidate at a time, as in
            the authors' code. ``fast``: the seeds first that are likely to decide, candidates in groups.
    """

    theta_start: NotNegative = 5.0
    theta_step: Positive = 0.25
    theta_min: NotNegative = 1.0
    k_start: Whole = 0
    k_step: Whole = 1
    k_max: Whole = 1280
    method: Literal["fast", "sequential"] = "fast"

    @model_validator(mode="after")
    def _ends_after_the_start(self) -> SearchSettings:
        if self.theta_start < self.theta_min:
            raise ValueError(f"theta_start is {self.theta_start:g}; it must be at least theta_min ({self.theta_min:g})")
        if self.k_max < self.k_start:
            raise ValueError(f"k_max is {self.k_max}; it must be at least k_start ({self.k_start})")
        return self


def search_settings(search: SearchSettings | str | None, default: SearchSettings) -> SearchSettings:
    """Return search settings: as given; or the default with the method that is named; or the default.

    Raises:
        ValueError: The name is not that of a method.
    """
    return replace(default, method=search) if isinstance(search, str) else search or default


@validated
class GenerationSettings:
    """How images are generated.

    Attributes:
        seed: Base seed; sample ``i`` of every prompt uses its own generator made from it and ``i``.
        samples: Images per prompt.
        steps: Denoising steps.
        solver: ``own``: the pipeline's scheduler; ``dpm++``: DPM-Solver++(2M) on Karras' noise levels (Lu et al., 2022;
            Karras et al., 2022), which needs about half of the steps of DDIM.
        guidance: Classifier-free guidance scale.
        batch_size: Images per pipeline call; it has no part in an image, so neither in what settings are equal.
        side: Side of the images in pixels, a multiple of 8; None: that of the model. Smaller ones are worse and cost less.
    """

    seed: Whole = 2
    samples: Count = 10
    steps: Count = 50
    solver: Literal["own", "dpm++"] = "own"
    guidance: NotNegative = 7.0
    batch_size: Count = field(default=10, compare=False)
    side: Annotated[int, Field(strict=True, ge=8, multiple_of=8)] | None = None


@validated
class WenSettings:
    """Prompt embedding adjustment (Wen et al., ICLR 2024).

    Attributes:
        target: The adjustment ends when the mean norm of the difference that the text makes to the noise prediction is
            not above this. None: set by a rule (`nemolib.mitigation.wen_target`). The authors' code takes one norm over
            the latents of all four images of a prompt and stops at 3: that is 3 / sqrt(4) = 1.5 for one.
        multiplier: The rule: how many standard deviations above the mean of unmemorized prompts the target lies.
        learning_rate: Step size of AdamW.
        iterations: Largest number of steps.
        steps: Denoising steps of the schedule.
        step: Position in the schedule of the denoising step that is looked at; 0 is the first.
        latents: Initial latents over which the norm is averaged.
        seed: Seed of these latents, another than that of the generated images.
    """

    target: NotNegative | None = 1.5
    multiplier: Multiplier = 1.0
    learning_rate: Positive = 0.05
    iterations: Count = 10
    steps: Count = 50
    step: Whole = 0
    latents: Count = 4
    seed: Whole = 4

    @model_validator(mode="after")
    def _looks_at_a_step_of_the_schedule(self) -> WenSettings:
        if self.step >= self.steps:
            raise ValueError(f"step is {self.step}; it must be below steps ({self.steps})")
        return self


@validated
class RenSettings:
    """Attention scaling (Ren et al., ECCV 2024).

    Attributes:
        c1: What the attention logit of the begin token is multiplied by.
        mask: Tokens that get no attention: ``padding`` (all after the end token), ``summary`` (these and the end
            token, whose embeddings sum up the prompt), ``none``.
    """

    c1: NotNegative = 1.25
    mask: Mask = "padding"


@validated
class SomepalliSettings:
    """Random tokens in the prompt (Somepalli et al., NeurIPS 2023).

    Attributes:
        numbers: How many tokens are inserted: one row of Table 1 for each.
        seed: Seed of tokens and places; each prompt has its own.
    """

    numbers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 4, 10)
    seed: Whole = 5


@validated
class RandomNeuronSettings:
    """Random neurons in place of the found ones (Sec. 4 of the paper).

    Attributes:
        seed: Seed; each repeat, layer and neuron set has its own random numbers.
        repeats: How often they are drawn.
    """

    seed: Whole = 3
    repeats: Count = 5


@validated
class MitigationSettings:
    """The rows of Table 1 that deactivated memorization neurons are compared with."""

    wen: WenSettings = WenSettings()
    ren: RenSettings = RenSettings()
    somepalli: SomepalliSettings = SomepalliSettings()
    random: RandomNeuronSettings = RandomNeuronSettings()


# --- Methods after NeMo -------------------------------------------------------------------------------------------------


@validated
class PruningSettings:
    """What notebook 07 takes out of a model, and how many images of it are looked at.

    Attributes:
        unions: Of how many prompts, VM and TM in turn, the neurons are pruned together.
        sparsities: Shares of each row of the feed-forward weights that Wanda looks at.
        first: Denoising steps that Wanda looks at.
        measured: Memorized prompts whose images are measured, VM and TM in turn; Wanda is given all of them.
        others: Unmemorized prompts whose images are measured.
        samples: Images of each prompt.
    """

    unions: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 10, 50, 100, 500)
    sparsities: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.01, 0.02, 0.05, 0.1)
    first: Count = 10
    measured: Count = 50
    others: Count = 100
    samples: Count = 4


@validated
class AttackSettings:
    """The Dori attack of notebook 08, as published.

    Attributes:
        steps: After how many steps of Adam the embedding is looked at.
        batch: Noisy latents in each step.
        images: Images of each kind that are attacked; None: all.
    """

    steps: tuple[Count, ...] = (50,)
    batch: Count = 8
    images: Count | None = None


@validated
class TriggerSettings:
    """The search for triggers of notebook 09: so many evaluations as the vocabulary has words, by each strategy.

    Attributes:
        words: Words of the vocabulary, drawn from those of the tokenizer; None: all.
        length: Words of a sentence.
        chains: Searches that begin from other sentences.
        proposals: Words that are tried for a position.
        temperature: Of the draw among them, in units of the squared guidance norm.
        drawn: Prompts that each strategy may draw an image of.
    """

    words: Count | None = None
    length: Count = 8
    chains: Count = 1
    proposals: Count = 200
    temperature: Positive = 0.1
    drawn: Count = 50


@validated
class DetectorSettings:
    """What notebook 09 asks detectors and the search for triggers.

    Attributes:
        memorized: Verbatim and template prompts that are tested, of each; None: all.
        unmemorized: Unmemorized prompts; None: all.
        samples: Initial latents of a prompt.
        similarity_samples: The same for the similarity of noise differences, which compares them.
        sampling_samples: The same for detectors that look at a whole sampling.
        steps: Denoising steps of that.
        triggers: The search for triggers.
    """

    memorized: Count | None = None
    unmemorized: Count | None = None
    samples: Count = 4
    similarity_samples: AtLeastTwo = 10
    sampling_samples: Count = 4
    steps: AtLeastTwo = 50
    triggers: TriggerSettings = TriggerSettings()


@validated
class RegionSettings:
    """The maps and mitigations of notebook 10.

    Attributes:
        prompts: Prompts of each kind whose maps are made; None: all.
        samples: Initial latents of each of them.
        steps: Denoising steps of these.
        indices: Positions of the steps that maps are made of, in order, the first one (0) and the last one among them.
        probes: Random vectors of a curvature.
        mitigated: Prompts of each kind, of the mitigations; None: all.
        noise_target: Norm to which the search for an initial noise goes; None: the target of Wen's adjustment.
        noise_rate: Its learning rate.
        noise_iterations: Its largest number of steps.
    """

    prompts: Count | None = None
    samples: Count = 4
    steps: AtLeastTwo = 50
    indices: tuple[Whole, ...] = (0, 25, 49)
    probes: Count = 16
    mitigated: Count | None = None
    noise_target: Positive | None = 0.9
    noise_rate: Positive = 0.01
    noise_iterations: Whole = 1000


@validated
class BeyondSettings:
    """The notebooks on methods after NeMo."""

    pruning: PruningSettings = PruningSettings()
    attack: AttackSettings = AttackSettings()
    detectors: DetectorSettings = DetectorSettings()
    regions: RegionSettings = RegionSettings()


# --- Protocols ----------------------------------------------------------------------------------------------------------


@validated
class Protocol:
    """The known differences between the paper's text and the authors' code.

    `RELEASED` reproduces the code, `PAPER` follows the text. Take one and change a single switch with
    `dataclasses.replace` to see what that difference alone does.

    Attributes:
        name: Name of the protocol, for tables and figures.
        timestep_index: Which timestep of the schedule conditions the UNet in Alg. 1. The text says the first (0);
            the code never calls the scheduler's step and so evaluates the *initial latents* at the second (1).
        similarity: Structural similarity on several scales (code) or on one (text).
        swap_guidance: Whether the halves of classifier-free guidance change places, as in the code's noise
            difference: eps(text) + g (eps(empty) - eps(text)). Only matters where the guidance is not 0.
        evaluate_limits: Whether the initial selection still tries the smallest threshold and the largest number of
            neurons per layer. The code stops when it reaches either, before trying it.
        double_entries: Whether a candidate that is found both by its z-score and among the largest activations is
            entered twice, as in the code: refinement then tests it at the place of its last entry. No neuron set ever
            holds a neuron twice; this is about the order of the tests.
        threshold_pairs: Whether the memorization threshold is taken over all pairs of seeds of all holdout prompts
            (code, Sec. 4) or over each prompt's largest pair (Sec. 3.1).
    """

    name: str
    timestep_index: Whole = 1
    similarity: Literal["ms_ssim", "ssim"] = "ms_ssim"
    swap_guidance: StrictBool = True
    evaluate_limits: StrictBool = False
    double_entries: StrictBool = True
    threshold_pairs: Literal["all", "max"] = "all"


RELEASED = Protocol("released")
"""The authors' code, commit f952ede."""

PAPER = Protocol(
    "paper", 0, "ssim", swap_guidance=False, evaluate_limits=True, double_entries=False, threshold_pairs="max"
)
"""The paper's text."""

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (RELEASED, PAPER)}


def load_protocol(protocol: str | Protocol) -> Protocol:
    """Return the protocol of a name; a protocol is returned as it is.

    Raises:
        ValueError: The name is not that of a known protocol.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in tuple(PROTOCOLS):
        raise ValueError(f"unknown protocol {protocol!r}; known protocols: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


# --- Profiles -----------------------------------------------------------------------------------------------------------


@validated
class PromptTables:
    """Paths of the prompt tables, relative to the repository or absolute.

    Attributes:
        memorized: Memorized prompts.
        unmemorized: Prompts that are not memorized.
        holdout: Prompts of the holdout set.
        quality: Prompts whose images are compared with real ones (COCO); None: not available.
    """

    memorized: str
    unmemorized: str
    holdout: str
    quality: str | None = None


@validated
class Limits:
    """How many prompts of each kind are used, from the top of the table; None: all."""

    vm: Whole | None = None
    tm: Whole | None = None
    ladder: Whole | None = None
    unmemorized: Whole | None = None


@validated
class Extent:
    """How many prompts the notebooks take of those that the profile has, from the top of the table; None: all.

    Attributes:
        drawn: Unmemorized prompts whose images notebooks 02 and 04 look at.
        searched: Unmemorized prompts whose neurons are searched.
        mitigated: VM and as many TM prompts of Table 1.
        ablated: VM and as many TM prompts of Table 4, and of Fig. 5b, 14 and 15.
        layers: VM prompts of Fig. 16 to 20.
        blocks: Prompts of Table 3.
        quality: Prompts of Fig. 5a and 8.
        quality_samples: Images of each of them; None: as many as are generated anyway.
    """

    drawn: Whole | None = None
    searched: Whole | None = None
    mitigated: Count | None = None
    ablated: Count | None = None
    layers: Count | None = None
    blocks: Whole | None = None
    quality: Whole | None = None
    quality_samples: Count | None = None


@validated
class ThresholdSettings:
    """The memorization threshold: mean + ``multiplier`` standard deviations of the holdout scores, or ``value``."""

    multiplier: Multiplier = 1.0
    value: Annotated[float, Field(strict=True, ge=-1, le=1)] | None = None


@validated
class EncoderSettings:
    """A network that turns images or texts into features, and where it is.

    Attributes:
        kind: ``descriptor`` (the tiny world's copy detection), ``sscd``, ``clip`` or ``inception``.
        path: Folder (descriptor, clip), TorchScript file (sscd, inception), relative to the repository or absolute, or
            hub id (clip).
        sha256: Of the file, which must be stated for TorchScript, or of ``model.safetensors`` in the folder; None: not
            checked.
        revision: Commit or branch of a hub model; None: its default.
        name: What tables call it; None: a name after its kind.
    """

    kind: Literal["descriptor", "sscd", "clip", "inception"]
    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    revision: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _has_a_revision_only_on_a_hub(self) -> EncoderSettings:
        if self.revision is not None and self.kind != "clip":
            raise ValueError(f"revision is {self.revision!r}, but kind {self.kind!r} is no hub model; only clip can be")
        return self


def _one_of(*kinds: str) -> AfterValidator:
    """Return a check that an encoder, if there is one, is of one of these kinds."""

    def checked(encoder: EncoderSettings | None) -> EncoderSettings | None:
        if encoder is not None and encoder.kind not in kinds:
            raise ValueError(f"its kind is {encoder.kind!r}; it must be one of {', '.join(kinds)}")
        return encoder

    return AfterValidator(checked)


@validated
class Encoders:
    """The encoders of the metrics; None: not available.

    ::

        encoders:
          copy: {kind: sscd, path: models/sscd_disc_mixup.torchscript.pt}
          alignment: {kind: clip, path: openai/clip-vit-base-patch32}
          quality: {kind: inception, path: models/inception-2015-12-05.pt}
          clip_quality: {kind: clip, path: openai/clip-vit-base-patch32}

    Attributes:
        copy: Copy detection: SSCD_Orig, SSCD_Gen, D_SSCD.
        alignment: A_CLIP.
        quality: FID and KID.
        clip_quality: CLIP-FID.
    """

    copy: Annotated[EncoderSettings | None, _one_of("descriptor", "sscd")] = None
    alignment: Annotated[EncoderSettings | None, _one_of("clip")] = None
    quality: Annotated[EncoderSettings | None, _one_of("inception", "clip")] = None
    clip_quality: Annotated[EncoderSettings | None, _one_of("clip")] = None


@validated
class Profile:
    """Everything that differs between one world and another.

    Attributes:
        name: The profile's name, also the name of its folders in ``build/`` and ``figures/``.
        model: Folder (relative to the repository, or absolute) or hub id of a Stable Diffusion pipeline; or
            ``random:`` and an architecture of ``nemolib/architectures``: random weights.
        prompts: The prompt tables.
        revision: Commit or branch of a hub model; None: its default.
        variant: Variant of the files of weights, such as ``fp16``; None: those without one.
        dtype: Floating-point type of the weights in memory; ``auto``: float16 with CUDA, else float32.
        device: Where the model runs; ``auto``: CUDA if there is one, else MPS, else the CPU.
        protocol: ``released`` (the authors' code) or ``paper`` (the paper's text); a Protocol of one's own in Python.
        groups: Keep only memorized prompts of this group; None: all.
        limits: How many prompts of each kind are used.
        extent: How many of them each experiment takes.
        holdout_size: Number of holdout prompts for the activation statistics; None: all.
        threshold_prompts: Number of holdout prompts for the memorization threshold; None: all.
        detection: Seeds and sampler settings of the noise differences.
        similarity: Settings of the structural similarity.
        thresholds: How the memorization threshold is found.
        search: Settings of the neuron search.
        generation: Settings of the generated images.
        mitigation: Settings of the mitigations that deactivated neurons are compared with.
        encoders: The encoders of copy detection, alignment and image quality.
        beyond: Settings of the notebooks on methods after NeMo.
        statistics: File of activation statistics (safetensors), relative to the repository or absolute; None: computed
            from the holdout prompts.
        downloads: Manifest with the files that `make data` fetches; None: nothing to fetch.
        solutions: Whether a run of a notebook includes the solutions of its exercises.
        workers: Number of processes on this machine that share the prompts, see `nemolib.workers`; None: this one alone.
        published_run: Table of results of a run of the authors' code, relative to the repository or absolute; notebook
            06 draws it beside what was computed here. None: the one in ``data/sd14``.
    """

    name: str
    model: str
    prompts: PromptTables
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    protocol: Annotated[Protocol, BeforeValidator(load_protocol)] = RELEASED
    groups: str | None = None
    limits: Limits = Limits()
    extent: Extent = Extent()
    holdout_size: AtLeastTwo | None = 1000
    threshold_prompts: AtLeastTwo | None = 200
    detection: DetectionSettings = DetectionSettings()
    similarity: SimilaritySettings = SimilaritySettings()
    thresholds: ThresholdSettings = ThresholdSettings()
    search: SearchSettings = SearchSettings()
    generation: GenerationSettings = GenerationSettings()
    mitigation: MitigationSettings = MitigationSettings()
    encoders: Encoders = Encoders()
    beyond: BeyondSettings = BeyondSettings()
    statistics: str | None = None
    downloads: str | None = None
    solutions: StrictBool = True
    workers: Count | None = None
    published_run: str | None = None


def known_profiles() -> list[str]:
    """Return the names of the profiles that come with the package, sorted."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def load_profile(profile: str | Path | Profile) -> Profile:
    """Return a profile.

    Args:
        profile: Name of a profile (``"tiny"``), path of a YAML file, or a Profile, which is returned as it is.

    Raises:
        ProfileError: Unknown profile; unknown, missing or ill-typed keys; impossible values. The message names the file
            and all these keys, each with its value and the allowed ones.
    """
    if isinstance(profile, Profile):
        return profile
    path = _profile_path(profile)
    try:
        return pydantic.TypeAdapter(Profile).validate_python({"name": path.stem} | _read(path, seen=()))
    except pydantic.ValidationError as error:
        raise ProfileError(f"{path}: {'; '.join(map(_told, error.errors()))}") from error


def _told(error: Mapping[str, Any]) -> str:
    """Return one error of pydantic as key, value and what is allowed."""
    location, value = error["loc"], error["input"]
    key = ".".join(map(str, location))
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown key {key} = {value!r}; allowed: {_keys(location[:-1])}"
    if error["type"] == "missing":
        return f"key {key!r} is missing; needed: {_keys(location[:-1])}"
    if error["type"] == "dataclass_type":
        return f"key {key!r}: expected the keys {_keys(location)}, got {value!r}"
    if error["type"] == "value_error":  # ours, which name the value
        return f"key {key!r}: {error['ctx']['error']}"
    return f"key {key!r} is {value!r}: {error['msg']}"


def _keys(location: tuple[int | str, ...]) -> str:
    """Return the keys that a profile has at a place."""
    owner: Any = Profile
    for key in location:
        annotation = owner.__pydantic_fields__[key].annotation
        owner = next(kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind))
    return ", ".join(sorted(field.name for field in fields(owner)))


def _profile_path(profile: str | Path) -> Path:
    """Return the YAML file of a profile name or path; a relative path starts where the caller is, or at the repository."""
    path = Path(profile).expanduser()
    places = [path, paths.resolve(path)] if path.suffix in (".yaml", ".yml") else [paths.PROFILES / f"{profile}.yaml"]
    found = next(filter(Path.is_file, places), None)
    if found is None:
        known = f"known: {', '.join(known_profiles())}; or give the path of a .yaml file"
        raise ProfileError(f"unknown profile {str(profile)!r}: {places[-1]} does not exist; {known}")
    return found


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
    # A file is looked for beside the one that names it.
    parent = _profile_path(path.parent / base if str(base).endswith((".yaml", ".yml")) else str(base))
    if parent.resolve() in (path.resolve(), *seen):
        raise ProfileError(f"{path}: key 'extends': {base!r} extends this profile again; remove one of the two")
    return _merge(_read(parent, seen=(*seen, path.resolve())), values)


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``values`` over it, key by key in nested mappings; one that states its kind replaces all."""
    merged = dict(base)
    for key, value in values.items():
        # Another encoder has another name and another hash.
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping) and "kind" not in value
        merged[key] = _merge(base[key], value) if both else value
    return merged


# --- Settings of a pipeline ---------------------------------------------------------------------------------------------

_PROFILES: weakref.WeakKeyDictionary[object, Profile] = weakref.WeakKeyDictionary()

PUBLISHED = Profile("published settings", "", PromptTables("", "", ""))
"""The settings of the paper, without a model and prompts."""


def note_profile(profile: Profile, pipe: StableDiffusionPipeline) -> None:
    """Note the profile that a pipeline was loaded from."""
    _PROFILES[pipe] = profile


def profile_of(pipe: StableDiffusionPipeline) -> Profile | None:
    """Return the profile that a pipeline was loaded from; None if it came from a folder or a hub."""
    return _PROFILES.get(pipe)


def settings_of(pipe: StableDiffusionPipeline) -> Profile:
    """Return the settings that hold for a pipeline where nothing is said: its profile's, else those of the paper."""
    return profile_of(pipe) or PUBLISHED


def protocol_of(pipe: StableDiffusionPipeline, protocol: str | Protocol | None = None) -> Protocol:
    """Return the given protocol; None means that of the pipeline's profile, else `RELEASED`.

    Raises:
        ValueError: The name is not that of a known protocol.
    """
    return settings_of(pipe).protocol if protocol is None else load_protocol(protocol)
