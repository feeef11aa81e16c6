"""What is normal: activation statistics and the memorization threshold, both from holdout prompts.

Holdout prompts are not memorized. Neurons that are far from their activation there are candidates for memorization
neurons; similarity between seeds above that of holdout prompts means memorization.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from nemolib.batching import batches, check_prompts, progress_bar
from nemolib.first_step import observing, pairs_measure
from nemolib.layers import finite, value_activations, value_layer_hash, widths
from nemolib.paths import write_atomic
from nemolib.pipeline import embed
from nemolib.settings import DetectionSettings, Protocol, SimilaritySettings, load_protocol, protocol_of, settings_of

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
        for tensor in (*self.mean, *self.std):
            finite(tensor, "activation statistics")

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of neurons of each layer."""
        return tuple(len(mean) for mean in self.mean)

    def check(self, unet: nn.Module) -> None:
        """Raise a ValueError if these are statistics of another model: one that has other value layers."""
        sizes, found = widths(unet), value_layer_hash(unet)
        if self.widths != sizes or self.model_hash not in ("", found):
            raise ValueError(
                f"statistics of another model: layers of {list(self.widths)} neurons ({self.model_hash[:12]}), the model has "
                f"{list(sizes)} ({found[:12]}); compute them with nemolib.activation_statistics(pipe, holdout_prompts)"
            )

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file, all of it or nothing."""
        from safetensors.torch import save

        parts = {"mean": self.mean, "std": self.std}
        tensors = {f"{name}.{i}": item.contiguous() for name, part in parts.items() for i, item in enumerate(part)}
        header = json.dumps({"count": self.count, "model_hash": self.model_hash})
        write_atomic(path, save(tensors, metadata={"activation_statistics": header}))


def load_statistics(path: str | Path) -> ActivationStatistics:
    """Return the activation statistics of a file that `ActivationStatistics.save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there are no activation statistics {path}; without a file a profile computes its own")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["activation_statistics"])
            layers = range(len(list(file.keys())) // 2)
            mean, std = (tuple(file.get_tensor(f"{name}.{i}") for i in layers) for name in ("mean", "std"))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no activation statistics; compute and save them again") from error
    return ActivationStatistics(mean, std, **header)


def activation_statistics(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], *, batch_size: int = 64, progress: bool = True
) -> ActivationStatistics:
    """Return mean and standard deviation of each neuron's activation over holdout prompts, in one pass.

    Source: Sec. 3.2; authors' code, 1_compute_activations_statistics.py.
    Deviates: constant memory (running moments, in double precision), where the authors' code keeps the activations of
        all prompts.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: Holdout prompts, at least two.
        batch_size: Prompts per pass of the text encoder; the result does not depend on it.
        progress: Whether to show a progress bar.

    Returns:
        The statistics, on the CPU.

    Raises:
        ValueError: Fewer than two prompts, or the model has no value layers.
    """
    prompts = check_prompts(prompts)
    with progress_bar(len(prompts), "activation statistics", enabled=progress) as bar:

        def embeddings() -> Iterator[Tensor]:
            for batch in batches(prompts, batch_size):
                yield finite(embed(pipe, batch), "text embedding", batch)
                bar.update(len(batch))

        return statistics_of(pipe.unet, embeddings())


def statistics_of(unet: nn.Module, embeddings: Iterable[Tensor]) -> ActivationStatistics:
    """Return `activation_statistics` of prompt embeddings [prompt, token, feature] that come one batch after the other."""
    moments = StandardScaler()
    for batch in embeddings:
        activations = torch.cat(value_activations(unet, batch), dim=1)
        moments.partial_fit(activations.cpu().double().numpy())
    count = int(moments.n_samples_seen_)
    if count < 2:
        raise ValueError(f"{count} prompts were given; a standard deviation needs at least two")
    # The variance of scikit-learn is that of a population.
    columns = moments.mean_, np.sqrt(moments.var_ * count / (count - 1))
    mean, std = (torch.from_numpy(values).float().split(widths(unet)) for values in columns)
    return ActivationStatistics(mean, std, count, value_layer_hash(unet))


def z_scores(statistics: ActivationStatistics, activations: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return how many standard deviations each activation is from its mean over holdout prompts.

    Source: Sec. 3.2, Eq. for z.

    Args:
        statistics: Statistics of the same model.
        activations: For each layer the activations [..., neuron] of `nemolib.layers.value_activations`.

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
    progress: bool = True,
) -> np.ndarray:
    """Return the similarity of every pair of seeds of prompts: what the memorization threshold is made from.

    What is not given is that of the profile that the pipeline was loaded from, else that of the paper.

    Source: Sec. 3.1; authors' code, 2_compute_pairwise_ssim.py.
    Deviates: uses the guidance of the settings, where the code computes the threshold with 7 and detects with 0.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: The prompts, at least one.
        settings: Seed, samples, steps and guidance.
        similarity: Window and exponents.
        protocol: `released` or `paper`, or a protocol of your own.
        progress: Whether to show a progress bar.

    Returns:
        Similarity [prompt, pair], float64.

    Raises:
        ValueError: No prompts were given.
    """
    defaults, prompts, rows = settings_of(pipe), check_prompts(prompts), []
    detection = settings or defaults.detection
    observe = observing(pipe, detection=detection, similarity=similarity or defaults.similarity)
    measure = pairs_measure(protocol_of(pipe, protocol), detection.guidance)
    with progress_bar(len(prompts), "noise differences", enabled=progress) as bar:
        for prompt in prompts:
            rows += observe([(prompt, measure)])
            bar.update()
    return np.array(rows)


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
    finite(scores, "holdout scores")
    return float(values.mean() + multiplier * values.std(ddof=1))
