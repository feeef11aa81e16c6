"""The metrics of Table 1 and of image quality: pure functions of feature matrices.

Features are NumPy arrays or tensors on the CPU (`nemolib.encoders`); everything is computed and returned as float64 NumPy
arrays, axes prompt, seed, feature. Each similarity function returns one value per seed or pair of seeds, `over_seeds`
makes one value per prompt of them, `summarize` one per table cell.

What the median of an even number of values is: NumPy, pandas and the usual definition take the *midpoint* of the two
values in the middle, and so do all tables here. The authors' code takes torch's median, the *lower* of the two (the 5th
of 10 seeds, and the same over prompts), which reads a little lower. ``median="lower"`` gives the authors' numbers.

SSCD_Orig has two readings, and the authors' code prints both: median or largest similarity over the seeds of a prompt.
Tables show the median, since the paper's must be that: its 0.04 for TM prompts lies below the median of the authors'
own maxima (0.125). The maximum belongs to the split of prompts (VM: above 0.7) and to `memorization_rate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

Median = Literal["midpoint", "lower"]
Reduction = Literal["median", "max", "mean"]

MEMORIZED_ABOVE = 0.7
"""Copy similarity above which an image counts as a copy (App. C.1)."""

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""Number and size of the subsets of KID in clean-fid."""


def sscd_orig(generated: Any, originals: Any) -> np.ndarray:
    """Return the copy similarity of generated images to the training image of their prompt.

    Source: Sec. 4 (SSCD_Orig); authors' code, metrics/compute_sscd_orig.py.

    Args:
        generated: Unit-norm features of copy detection [prompt, seed, feature].
        originals: Those of the training images [prompt, feature]; a row of NaN where there is none.

    Returns:
        Cosine [prompt, seed], in [-1, 1]; NaN where there is no training image.

    Raises:
        ValueError: Shapes do not belong together, or features are not of unit norm.
    """
    generated, originals = _features(generated, 3), _features(originals, 2)
    _same(generated, originals, generated.shape[::2], originals.shape)
    return np.einsum("psf,pf->ps", generated, originals)


def sscd_gen(generated: Any, reference: Any) -> np.ndarray:
    """Return the copy similarity of images with and without a mitigation, seed by seed.

    Source: Sec. 4 (SSCD_Gen); authors' code, metrics/compute_sscd_gen.py.

    Args:
        generated: Unit-norm features of copy detection [prompt, seed, feature].
        reference: Those of the images of the same prompts and seeds from the untouched model.

    Returns:
        Cosine [prompt, seed], in [-1, 1].

    Raises:
        ValueError: Shapes differ, or features are not of unit norm.
    """
    generated, reference = _features(generated, 3), _features(reference, 3)
    _same(generated, reference, generated.shape, reference.shape)
    return np.einsum("psf,psf->ps", generated, reference)


def d_sscd(features: Any) -> np.ndarray:
    """Return the copy similarity of the images of a prompt to each other; low means diverse.

    Source: Sec. 4 (D_SSCD); authors' code, metrics/compute_diversity.py.

    Args:
        features: Unit-norm features of copy detection [prompt, seed, feature].

    Returns:
        Cosine [prompt, pair], in [-1, 1], pairs (0, 1), (0, 2), ..., (1, 2), ...; 45 for 10 seeds, none for one.

    Raises:
        ValueError: The features have another shape, or are not of unit norm.
    """
    features = _features(features, 3)
    first, second = np.triu_indices(features.shape[1], k=1)
    return np.einsum("psf,ptf->pst", features, features)[:, first, second]


def a_clip(images: Any, texts: Any) -> np.ndarray:
    """Return the alignment of generated images with their prompt.

    Source: Sec. 4 (A_CLIP); authors' code, metrics/compute_prompt_alignment.py.

    Args:
        images: Unit-norm CLIP features of images [prompt, seed, feature].
        texts: Those of the prompts [prompt, feature].

    Returns:
        Cosine [prompt, seed], in [-1, 1].

    Raises:
        ValueError: Shapes do not belong together, or features are not of unit norm.
    """
    return sscd_orig(images, texts)


def over_seeds(values: Any, reduction: Reduction = "median", *, median: Median = "midpoint") -> np.ndarray:
    """Return one value per prompt from those of its seeds or pairs.

    Args:
        values: Values [prompt, seed] or [prompt, pair].
        reduction: ``median`` (as in the paper's tables), ``max`` or ``mean``.
        median: Definition of the median, see the module's text.

    Returns:
        Values [prompt]; NaN for a prompt that has a missing value, or no value at all (pairs of one seed).

    Raises:
        ValueError: The values have another shape, or a word is unknown.
    """
    values = _array(values)
    if values.ndim != 2:
        raise ValueError(f"values of shape {list(values.shape)}; expected [prompt, seed]")
    _known(reduction, Reduction, "reduction")
    if not values.shape[1]:
        return np.full(len(values), np.nan)
    if reduction == "median":
        return median_over(values, median=median)
    return values.max(axis=1) if reduction == "max" else values.mean(axis=1)


def median_over(values: Any, *, median: Median = "midpoint") -> np.ndarray:
    """Return the median over the last axis; NaN where a value is missing.

    Args:
        values: Values [..., item], at least one item.
        median: ``midpoint`` of the two values in the middle, or the ``lower`` of them, as torch does it.

    Raises:
        ValueError: There is no item, or the definition is unknown.
    """
    values = _array(values)
    _known(median, Median, "median")
    if not values.ndim or not values.shape[-1]:
        raise ValueError("a median needs at least one value")
    if median == "midpoint":
        return np.median(values, axis=-1)
    lower = np.sort(values, axis=-1)[..., (values.shape[-1] - 1) // 2]
    return np.where(np.isnan(values).any(axis=-1), np.nan, lower)


def memorization_rate(largest: Any, *, threshold: float = MEMORIZED_ABOVE) -> float:
    """Return the share of prompts that give a copy: whose SSCD_Orig is above a threshold.

    Source: App. C.1 (the rule that splits VM from TM prompts: largest similarity of 10 images above 0.7).

    Args:
        largest: SSCD_Orig [prompt], of `over_seeds` with reduction ``max``; missing values (no training image) are left
            out.
        threshold: Similarity above which an image is a copy. It belongs to SSCD: another descriptor has another scale.

    Returns:
        Share, in [0, 1].

    Raises:
        ValueError: There is no value.
    """
    return float((_present(largest) > threshold).mean())


def fid(real: Any, generated: Any) -> float:
    """Return the Fréchet distance of two sets of features: FID with Inception features, CLIP-FID with those of CLIP.

    Source: Heusel et al. (NeurIPS 2017), through torchmetrics, in double precision.

    It is biased upwards for few images: compare only values of equally many images, and features of the same encoder.

    Args:
        real: Raw features of the reference images [image, feature].
        generated: Raw features of the generated images [image, feature].

    Returns:
        Squared distance; 0 for equal mean and covariance, up to rounding.

    Raises:
        ValueError: A set has fewer than 2 images, or the features do not belong together.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, generated = _two_sets(real, generated, least=2)
    metric = FrechetInceptionDistance(feature=_as_it_is(real.shape[1])).set_dtype(real.dtype)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def kid(
    real: Any, generated: Any, *, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """Return the kernel distance of two sets of features: mean and standard deviation over random subsets.

    Source: Bińkowski et al. (ICLR 2018), kernel (x y / features + 1)^3, unbiased; through torchmetrics, in double
    precision.
    Deviates: clean-fid takes smaller subsets without a word if there are fewer images; here that is an error.

    Args:
        real: Raw features of the reference images [image, feature].
        generated: Raw features of the generated images [image, feature].
        subsets: How many subsets are drawn.
        subset_size: Images of a subset, from each set, without replacement.
        seed: Seed of the draws; the global generator is left as it was.

    Returns:
        Mean and standard deviation; the mean may be a little below 0.

    Raises:
        ValueError: A set has fewer images than a subset, a number is too small, or the features do not belong together.
    """
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    if subset_size < 2 or subsets < 1:
        raise ValueError(f"KID with {subsets} subsets of {subset_size}; it needs at least 1 subset of 2 images")
    real, generated = _two_sets(real, generated, least=subset_size)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_as_it_is(real.shape[1]), subsets=subsets, subset_size=subset_size
        ).set_dtype(real.dtype)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def median_mad(values: Any, *, median: Median = "midpoint") -> tuple[float, float]:
    """Return the median and the median absolute deviation of values; missing values are left out.

    Source: Sec. 4 (all metrics of the paper are given so).
    Deviates: the authors' code takes the lower of the two values in the middle; so does ``median="lower"``.

    Args:
        values: Values [prompt].
        median: Definition of both medians, see the module's text.

    Raises:
        ValueError: There is no value.
    """
    values = _present(values)
    middle = median_over(values, median=median)
    return float(middle), float(median_over(np.abs(values - middle), median=median))


def bootstrap_interval(
    values: Any, *, level: float = 0.95, resamples: int = 1000, seed: int = 0, median: Median = "midpoint"
) -> tuple[float, float]:
    """Return a bootstrap interval of the median: what other prompts of the same kind might have given.

    Args:
        values: Values [prompt]; missing ones are left out.
        level: Share of the resamples inside.
        resamples: How often the prompts are drawn anew, with replacement.
        seed: Seed of the draws.
        median: Definition of the median.

    Returns:
        Lower and upper end (percentiles).

    Raises:
        ValueError: There is no value.
    """
    values = _present(values)
    draws = np.random.default_rng(seed).choice(values, (resamples, len(values)))
    low, high = np.quantile(median_over(draws, median=median), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Summary:
    """One cell of a table of metrics.

    Attributes:
        prompts: Number of prompts with a value.
        median: Median over prompts.
        mad: Median absolute deviation over prompts.
        low: Lower end of the bootstrap interval of the median.
        high: Its upper end.
    """

    prompts: int
    median: float
    mad: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ± {self.mad:.2f}"


def summarize(
    values: Any, *, level: float = 0.95, resamples: int = 1000, seed: int = 0, median: Median = "midpoint"
) -> Summary:
    """Return median ± median absolute deviation over prompts, with a bootstrap interval of the median.

    Args:
        values: Values [prompt]; missing ones are left out.
        level: Share of the resamples inside the interval.
        resamples: How often the prompts are drawn anew.
        seed: Seed of the draws.
        median: Definition of the median, see the module's text.

    Raises:
        ValueError: There is no value.
    """
    low, high = bootstrap_interval(values, level=level, resamples=resamples, seed=seed, median=median)
    return Summary(len(_present(values)), *median_mad(values, median=median), low, high)


def summary_table(
    table: pd.DataFrame, quantities: Sequence[str], *, by: Sequence[str] = ("kind",), **options: Any
) -> pd.DataFrame:
    """Return the summary of several quantities for each group of prompts.

    Args:
        table: One row per prompt.
        quantities: Columns to summarize.
        by: Columns that name the group; groups keep the order of the table.
        options: As for `summarize`.

    Returns:
        Columns of ``by``, quantity, prompts, median, mad, low, high; a group without a value has 0 prompts and missing
        numbers.
    """
    rows = []
    for group, part in table.groupby(list(by), sort=False):
        for name in quantities:
            known = part[name].notna().any()
            cell = summarize(part[name], **options) if known else Summary(0, np.nan, np.nan, np.nan, np.nan)
            rows.append((*group, name, cell.prompts, cell.median, cell.mad, cell.low, cell.high))
    return pd.DataFrame(rows, columns=[*by, "quantity", "prompts", "median", "mad", "low", "high"])


def _array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _present(values: Any) -> np.ndarray:
    """Return the values that are not missing, at least one."""
    values = _array(values).ravel()
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("a median or a share needs at least one value")
    return values


def _known(word: str, allowed: Any, key: str) -> None:
    if word not in get_args(allowed):
        raise ValueError(f"{key} is {word!r}; it must be one of {', '.join(get_args(allowed))}")


def _features(features: Any, axes: int) -> np.ndarray:
    """Return features of unit norm as float64; rows of NaN stay."""
    features = _array(features)
    if features.ndim != axes:
        expected = "[prompt, seed, feature]" if axes == 3 else "[prompt, feature]"
        raise ValueError(f"features of shape {list(features.shape)}; expected {expected}")
    off = np.abs(np.linalg.norm(features, axis=-1) - 1)
    if (off > 1e-2).any():
        raise ValueError(
            f"features of norm 1 ± {np.nanmax(off):.2g}; a cosine needs unit norm (raw features are for FID and KID)"
        )
    return features


def _same(first: np.ndarray, second: np.ndarray, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    if one != other:
        raise ValueError(f"features of shapes {list(first.shape)} and {list(second.shape)} do not belong together")


def _two_sets(real: Any, generated: Any, *, least: int) -> tuple[Any, Any]:
    """Return two feature matrices as float64 tensors."""
    import torch

    real, generated = _array(real), _array(generated)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features of shapes {list(real.shape)} and {list(generated.shape)}; expected twice [image, feature]"
        )
    if min(len(real), len(generated)) < least:
        raise ValueError(
            f"{len(real)} real and {len(generated)} generated images, but at least {least} of each are needed; give "
            "more images, or for KID a smaller subset_size"
        )
    return torch.from_numpy(real), torch.from_numpy(generated)


def _as_it_is(features: int) -> Any:
    """Return a network that hands features through, so that torchmetrics takes ours and needs no Inception of its own."""
    from torch import nn

    network = nn.Identity()
    network.num_features = features
    return network
