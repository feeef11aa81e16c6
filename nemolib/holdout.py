"""What is normal: activation statistics and the memorization threshold, both from holdout prompts.

Holdout prompts are not memorized. Neurons that are far from their activation there are candidates for memorization
neurons; similarity between seeds above that of holdout prompts means memorization.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nemolib.batching import batches, check_prompts
from nemolib.defaults import default_protocol, default_settings
from nemolib.evaluations import Evaluations
from nemolib.files import write_atomic
from nemolib.first_step import FirstStep, first_step
from nemolib.pipeline import embed
from nemolib.protocols import Protocol, load_protocol
from nemolib.settings import DetectionSettings, SimilaritySettings
from nemolib.similarity import pair_similarities
from nemolib.value_layers import value_activations, value_layer_hash, value_layers, widths
from nemolib.workers import map_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True, slots=True, eq=False)
class ActivationStatistics:
    """Mean and standard deviation of each neuron's activation over holdout prompts.

    Attributes:
        mean: For each layer the means [neuron], float32.
        std: For each layer the unbiased standard deviations [neuron], float32.
        count: Number of prompts; 0 if it is not known.
        model_hash: Hash of the model's value layers; empty if it is not known.
    """

    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]
    count: int = 0
    model_hash: str = ""

    def __post_init__(self) -> None:
        """Check that means and standard deviations belong together."""
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (self.mean, self.std)]
        if shapes[0] != shapes[1] or not all(len(shape) == 1 for shape in shapes[0]):
            raise ValueError(f"means of shapes {shapes[0]} and standard deviations of shapes {shapes[1]} do not fit")

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of neurons of each layer."""
        return tuple(len(mean) for mean in self.mean)

    def check(self, unet: nn.Module) -> None:
        """Check that these are statistics of a model.

        Raises:
            ValueError: The value layers of the model are others.
        """
        advice = "compute them with nemolib.activation_statistics(pipe, holdout_prompts)"
        if self.widths != widths(unet):
            raise ValueError(
                f"statistics of another model: layers of {list(self.widths)} neurons, the model has "
                f"{list(widths(unet))}; {advice}"
            )
        if self.model_hash and self.model_hash != value_layer_hash(unet):
            raise ValueError(
                f"statistics of another model: value layers {self.model_hash[:12]}, the model has "
                f"{value_layer_hash(unet)[:12]}; {advice}"
            )

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file, all of it or nothing."""
        from safetensors.torch import save

        tensors = {f"mean.{i}": tensor.contiguous() for i, tensor in enumerate(self.mean)}
        tensors |= {f"std.{i}": tensor.contiguous() for i, tensor in enumerate(self.std)}
        header = json.dumps({"count": self.count, "model_hash": self.model_hash})
        write_atomic(path, save(tensors, metadata={"activation_statistics": header}))

    @classmethod
    def load(cls, path: str | Path) -> ActivationStatistics:
        """Return the statistics that `save` wrote.

        Raises:
            ValueError: The file holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["activation_statistics"])
                layers = range(len(list(file.keys())) // 2)
                mean = tuple(file.get_tensor(f"mean.{i}") for i in layers)
                std = tuple(file.get_tensor(f"std.{i}") for i in layers)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} holds no activation statistics; compute and save them again") from error
        return cls(mean, std, header["count"], header["model_hash"])


def load_released(path: str | Path, *, widths: Sequence[int] | None = None) -> ActivationStatistics:
    """Return activation statistics as the authors' code stores them; nothing but tensors is unpickled.

    Source: authors' code, 1_compute_activations_statistics.py (a pair of lists of tensors).

    Args:
        path: A ``.pt`` file.
        widths: Neurons of each layer that are expected, such as
            `nemolib.value_layers.STABLE_DIFFUSION_WIDTHS`; None: any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else, or statistics of other layers.
    """
    expected = "expected a pair of lists of tensors (means, deviations)"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is not readable: it was cut, or is another file; {expected} ({error!s:.200})"
        ) from error
    is_pair = isinstance(content, (tuple, list)) and len(content) == 2 and all(isinstance(x, list) for x in content)
    if not is_pair or not all(isinstance(tensor, Tensor) for tensors in content for tensor in tensors):
        raise ValueError(f"{path} holds no released statistics; {expected}")
    mean, std = (tuple(tensor.float() for tensor in tensors) for tensors in content)
    found = ActivationStatistics(mean, std)
    if widths is not None and found.widths != tuple(widths):
        raise ValueError(f"{path}: layers of {list(found.widths)} neurons, expected {list(widths)}: another model")
    if not all(tensor.isfinite().all() and (tensor >= 0).all() for tensor in (*mean, *std)):
        raise ValueError(f"{path}: a mean or a deviation is negative or not finite; the file is damaged")
    return found


def load_statistics(path: str | Path, *, widths: Sequence[int] | None = None) -> ActivationStatistics:
    """Return activation statistics from a file: safetensors of `ActivationStatistics.save`, or ``.pt`` of the authors.

    Args:
        path: The file.
        widths: Neurons of each layer that are expected; None: any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else, or statistics of other layers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no activation statistics {path}; fetch them with `make data`")
    if path.suffix == ".pt":
        return load_released(path, widths=widths)
    found = ActivationStatistics.load(path)
    if widths is not None and found.widths != tuple(widths):
        raise ValueError(f"{path}: layers of {list(found.widths)} neurons, expected {list(widths)}: another model")
    return found


class Moments:
    """Mean and variance of batches that come one after the other, in constant memory and double precision.

    Source: Chan, Golub and LeVeque (1979), pairwise update.

    Attributes:
        count: Number of rows so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    @classmethod
    def of(cls, batch: Tensor) -> Moments:
        """Return the moments of one batch [row, column], on the CPU."""
        rows = batch.cpu().double()
        found = cls()
        found.count, found._mean = len(rows), rows.mean(dim=0)
        found._squares = (rows - found._mean).square().sum(dim=0)
        return found

    def update(self, batch: Tensor) -> None:
        """Take in a batch [row, column]."""
        self.merge(Moments.of(batch))

    def merge(self, other: Moments) -> None:
        """Take in the moments of other rows; the order in which this is done has a part in the last digits."""
        if other._mean is None:
            return
        if self._mean is None:
            self.count, self._mean, self._squares = other.count, other._mean, other._squares
            return
        total = self.count + other.count
        shift = other._mean - self._mean
        self._squares = self._squares + other._squares + shift.square() * (self.count * other.count / total)
        self._mean = self._mean + shift * (other.count / total)
        self.count = total

    def mean(self) -> Tensor:
        """Return the mean [column].

        Raises:
            ValueError: There were no rows.
        """
        if self._mean is None:
            raise ValueError("no prompts were given; a mean needs at least one")
        return self._mean

    def std(self) -> Tensor:
        """Return the unbiased standard deviation [column].

        Raises:
            ValueError: There were fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} prompts were given; a standard deviation needs at least two")
        return (self._squares / (self.count - 1)).sqrt()


def activation_statistics(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> ActivationStatistics:
    """Return mean and standard deviation of each neuron's activation over holdout prompts, in one pass.

    Source: Sec. 3.2; authors' code, 1_get_statistics.py.
    Deviates: constant memory, where the authors' code keeps the activations of all prompts.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: Holdout prompts, at least two.
        batch_size: Prompts per pass of the text encoder; the result does not depend on it.
        progress: Whether to show a progress bar.

    Returns:
        The statistics, on the CPU.

    Raises:
        ValueError: Fewer than two prompts, or the model has no value layers.
        FailedPrompts: Prompts raised.
    """
    prompts = check_prompts(prompts)
    moments = [Moments() for _ in value_layers(pipe.unet)]
    found = map_prompts(
        _moments,
        [tuple(batch) for batch in batches(prompts, batch_size)],
        pipe=pipe,
        common={},
        label="activation statistics",
        ordered=True,
        progress=progress,
    )
    for _, parts in found:
        _merge(moments, parts)
    return _statistics(pipe.unet, moments)


def _moments(pipe: StableDiffusionPipeline) -> Callable[[Sequence[str]], list[Moments]]:
    """Return what computes the moments of each layer for a batch of prompts."""
    return lambda batch: _moments_of(pipe.unet, embed(pipe, batch))


def _moments_of(unet: nn.Module, embeddings: Tensor) -> list[Moments]:
    return [Moments.of(activations) for activations in value_activations(unet, embeddings)]


def _merge(moments: Sequence[Moments], parts: Sequence[Moments]) -> None:
    """Take the moments of each layer for a batch into those of all batches."""
    for layer, part in zip(moments, parts, strict=True):
        layer.merge(part)


def statistics_of(unet: nn.Module, embeddings: Iterable[Tensor]) -> ActivationStatistics:
    """Return activation statistics from batches of prompt embeddings; see `activation_statistics`.

    Args:
        unet: A conditional UNet of diffusers.
        embeddings: Batches [prompt, token, feature].

    Raises:
        ValueError: Fewer than two prompts, or the model has no value layers.
    """
    moments = [Moments() for _ in value_layers(unet)]
    for batch in embeddings:
        _merge(moments, _moments_of(unet, batch))
    return _statistics(unet, moments)


def _statistics(unet: nn.Module, moments: Sequence[Moments]) -> ActivationStatistics:
    mean = tuple(layer.mean().float().cpu() for layer in moments)
    std = tuple(layer.std().float().cpu() for layer in moments)
    return ActivationStatistics(mean, std, moments[0].count, value_layer_hash(unet))


def z_scores(statistics: ActivationStatistics, activations: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return how many standard deviations each activation is from its mean over holdout prompts.

    Source: Sec. 3.2, Eq. for z.

    Args:
        statistics: Statistics of the same model.
        activations: For each layer the activations [..., neuron] of `nemolib.value_layers.value_activations`.

    Returns:
        For each layer the z-scores [..., neuron], dimensionless. A neuron that is constant over the holdout prompts
        has 0 at its constant and an infinite score elsewhere.

    Raises:
        ValueError: The activations are those of another model.
    """
    found = tuple(layer.shape[-1] for layer in activations)
    if found != statistics.widths:
        raise ValueError(f"activations of layers of {list(found)} neurons, statistics of {list(statistics.widths)}")
    layers = zip(activations, statistics.mean, statistics.std, strict=True)
    scores = ((values - mean.to(values)) / std.to(values) for values, mean, std in layers)
    return tuple(torch.nan_to_num(score, nan=0.0, posinf=math.inf, neginf=-math.inf) for score in scores)


def holdout_scores(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    settings: DetectionSettings | None = None,
    similarity: SimilaritySettings | None = None,
    protocol: str | Protocol | None = None,
    evaluations: Evaluations | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Return the similarity of every pair of seeds of prompts: what the memorization threshold is made from.

    Source: Sec. 3.1; authors' code, 2_compute_ssim.py.
    Deviates: uses the guidance of the settings, where the code computes the threshold with 7 and detects with 0.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: The prompts, at least one.
        settings: Seed, samples, steps and guidance; None means those of the pipeline's profile, else the paper's.
        similarity: Window and exponents; None as above.
        protocol: `released` or `paper`, or a protocol of your own; None as above.
        evaluations: Counts the UNet sample-evaluations.
        progress: Whether to show a progress bar.

    Returns:
        Similarity [prompt, pair], float64.

    Raises:
        ValueError: No prompts were given.
        FailedPrompts: Prompts raised.
    """
    prompts, defaults = check_prompts(prompts), default_settings(pipe)
    common = {
        "settings": settings or defaults.detection,
        "similarity": similarity or defaults.similarity,
        "protocol": default_protocol(pipe, protocol),
    }
    rows: dict[str, np.ndarray] = {}
    jobs = [(prompt,) for prompt in dict.fromkeys(prompts)]
    found = map_prompts(_pair_scores, jobs, pipe=pipe, common=common, label="noise differences", progress=progress)
    for (prompt,), (row, samples) in found:
        rows[prompt] = row
        if evaluations is not None:
            evaluations.add(samples)
    return np.stack([rows[prompt] for prompt in prompts])


def _pair_scores(
    pipe: StableDiffusionPipeline, *, settings: DetectionSettings, similarity: SimilaritySettings, protocol: Protocol
) -> Callable[[tuple[str]], tuple[np.ndarray, int]]:
    """Return what computes the pair similarities of a prompt, and its UNet sample-evaluations."""
    step = first_step(pipe, settings=settings, protocol=protocol)

    def scores(batch: tuple[str]) -> tuple[np.ndarray, int]:
        counted = Evaluations()
        return pair_scores(step, embed(pipe, batch), similarity, protocol, counted), counted.total

    return scores


def pair_scores(
    step: FirstStep,
    embedding: Tensor,
    similarity: SimilaritySettings,
    protocol: Protocol,
    evaluations: Evaluations | None = None,
) -> np.ndarray:
    """Return the similarity of every pair of seeds of one prompt, [pair], float64; see `holdout_scores`."""
    differences = step(embedding, evaluations=evaluations)
    return pair_similarities(differences, settings=similarity, protocol=protocol).double().cpu().numpy()


def memorization_threshold(
    scores: np.ndarray, *, multiplier: float = 1.0, protocol: str | Protocol = "released"
) -> float:
    """Return the memorization threshold: mean plus a multiple of the standard deviation of holdout scores.

    Source: Sec. 3.1, Sec. 4 (0.428 = mean + 1 standard deviation), Table 4 (-1, 0, 2).

    Args:
        scores: Similarity [prompt, pair] of `holdout_scores`.
        multiplier: How many (unbiased) standard deviations above the mean.
        protocol: Over all pairs (`released`) or over each prompt's largest (`paper`).

    Returns:
        Threshold, in units of similarity.

    Raises:
        ValueError: There are fewer than two values, or the shape is not [prompt, pair].
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {scores.shape}; expected [prompt, pair]")
    values = scores.ravel() if load_protocol(protocol).threshold_pairs == "all" else scores.max(axis=1)
    if values.size < 2:
        raise ValueError(f"{values.size} scores were given; a threshold needs at least two")
    return float(values.mean() + multiplier * values.std(ddof=1))
