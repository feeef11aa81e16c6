"""The metrics: pure functions of feature matrices (Table 1, image quality) and of scores (detection).

Features are NumPy arrays or tensors on the CPU (`nemolib.encoders`); everything is computed and returned as float64 NumPy
arrays, axes prompt, seed, feature. Each similarity function returns one value per seed or pair of seeds, `over_seeds`
makes one value per prompt of them, `summary_table` one row per table cell.

What the median of an even number of values is: NumPy, pandas and the usual definition take the *midpoint* of the two
values in the middle, and so do all tables here. The authors' code takes torch's median, the *lower* of the two (the 5th
of 10 seeds, and the same over prompts), which reads a little lower.

SSCD_Orig has two readings, and the authors' code prints both: median or largest similarity over the seeds of a prompt.
Tables show the median, since the paper's must be that: its 0.04 for TM prompts lies below the median of the authors'
own maxima (0.125). The maximum belongs to the split of prompts (VM: above 0.7) and to `memorization_rate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nemolib.layers import finite

MEMORIZED_ABOVE = 0.7
"""Copy similarity above which an image counts as a copy (App. C.1); it is SSCD's, another descriptor has another scale."""

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""Number and size of the subsets of KID in clean-fid."""

RESAMPLES, _ENDS = 2000, ((1 - 0.95) / 2, (1 + 0.95) / 2)
"""How often prompts are drawn anew for an interval of a median, and the quantiles at the ends of an interval (95 %)."""


# Similarities of images and texts


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
    generated, originals = _features(generated), _array(originals)
    finite(originals[~np.isnan(originals).all(axis=-1)], "features of originals")
    return np.einsum("psf,pf->ps", generated, _unit(originals, generated.shape[::2]))


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
    generated = _features(generated)
    return np.einsum("psf,psf->ps", generated, _features(reference, generated.shape))


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
    features = _features(features)
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
    return sscd_orig(images, finite(_array(texts), "features of texts"))


# Over seeds and prompts


def over_seeds(values: Any) -> np.ndarray:
    """Return one value per prompt, [prompt], from those of its seeds or pairs, [prompt, seed]: their median.

    A prompt that has a missing value, or no value at all (pairs of one seed), has NaN.

    Raises:
        ValueError: The values have another shape.
    """
    values = _array(values)
    if values.ndim != 2:
        raise ValueError(f"values of shape {list(values.shape)}; expected [prompt, seed]")
    return np.median(values, axis=1) if values.shape[1] else np.full(len(values), np.nan)


def median_mad(values: Any) -> tuple[float, float]:
    """Return median and median absolute deviation of values [prompt]; missing values are left out.

    Source: Sec. 4 (all metrics of the paper are given so).
    Deviates: the authors' code takes the lower of the two values in the middle, both times.

    Raises:
        ValueError: There is no value.
    """
    values = _present(values)
    middle = np.median(values)
    return float(middle), float(np.median(np.abs(values - middle)))


def bootstrap_interval(values: Any) -> tuple[float, float]:
    """Return the ends of a 95 % bootstrap interval of the median of values [prompt]; missing values are left out.

    It says what other prompts of the same kind might have given: they are drawn anew, with replacement.

    Raises:
        ValueError: There is no value.
    """
    values = _present(values)
    draws = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    return tuple(np.quantile(np.median(draws, axis=1), _ENDS).tolist())


def summary_table(table: pd.DataFrame, quantities: Sequence[str], *, by: Sequence[str]) -> pd.DataFrame:
    """Return median, median absolute deviation and interval of several quantities for each group of prompts.

    Args:
        table: One row per prompt.
        quantities: Columns to summarize.
        by: Columns that name the group; groups keep the order of the table.

    Returns:
        Columns of ``by``, quantity, prompts (with a value), median, mad, low, high; the numbers of a group without any
        value are missing.
    """
    rows = []
    for group, part in table.groupby(list(by), sort=False):
        for name in quantities:
            values = part[name].dropna()
            numbers = (*median_mad(values), *bootstrap_interval(values)) if len(values) else (np.nan,) * 4
            rows.append((*group, name, len(values), *numbers))
    return pd.DataFrame(rows, columns=[*by, "quantity", "prompts", "median", "mad", "low", "high"])


def memorization_rate(largest: Any) -> float:
    """Return the share of prompts that give a copy: whose SSCD_Orig is above `MEMORIZED_ABOVE`.

    Source: App. C.1 (the rule that splits VM from TM prompts: largest similarity of 10 images above 0.7).

    Args:
        largest: SSCD_Orig [prompt], largest over seeds; missing values (no training image) are left out.

    Raises:
        ValueError: There is no value.
    """
    return float((_present(largest) > MEMORIZED_ABOVE).mean())


# Image quality


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

    return float(_distance(FrechetInceptionDistance, real, generated, least=2))


def kid(real: Any, generated: Any, *, subset_size: int = KID_SUBSET_SIZE) -> tuple[float, float]:
    """Return the kernel distance of two sets of features: mean and standard deviation over random subsets.

    The mean may be a little below 0. The subsets are the same each time; the global generator is left as it was.

    Source: Bińkowski et al. (ICLR 2018), kernel (x y / features + 1)^3, unbiased; through torchmetrics, in double
    precision.
    Deviates: clean-fid takes smaller subsets without a word if there are fewer images; here that is an error.

    Args:
        real: Raw features of the reference images [image, feature].
        generated: Raw features of the generated images [image, feature].
        subset_size: Images of a subset, from each set, without replacement.

    Raises:
        ValueError: A set has fewer images than a subset, a subset fewer than 2, or the features do not belong together.
    """
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    if subset_size < 2:
        raise ValueError(f"KID with subsets of {subset_size}; it needs subsets of at least 2 images")
    sizes = {"subsets": KID_SUBSETS, "subset_size": subset_size}
    # It warns that it keeps all features.
    with warnings.catch_warnings(action="ignore", category=UserWarning), torch.random.fork_rng(devices=[]):
        # On the CPU alone: torch.manual_seed would set the generators of GPUs too.
        torch.default_generator.manual_seed(0)
        mean, deviation = _distance(KernelInceptionDistance, real, generated, least=subset_size, **sizes)
    return float(mean), float(deviation)


# Detection: scores of memorized and of unmemorized prompts, at least one of each, all finite (else a ValueError)


def auroc(memorized: Any, unmemorized: Any) -> float:
    """Return the area under the ROC curve: how often a memorized prompt scores above an unmemorized one; 0.5 by chance.

    Source: App. B.4. By ranks (Mann and Whitney), which is quick enough for a thousand draws of `interval`.
    """
    from scipy.stats import rankdata

    labels, scores = _labelled(memorized, unmemorized)
    number, ranks = labels.sum(), rankdata(scores)[labels == 1]
    # A rank also counts the memorized scores that are not above: 1, 2, ... of them.
    return float((ranks.sum() - number * (number + 1) / 2) / (number * (len(labels) - number)))


def tpr_at_fpr(memorized: Any, unmemorized: Any, *, fpr: float = 0.01) -> float:
    """Return the largest share of memorized prompts that is found while at most ``fpr`` of the others are taken for them.

    Source: App. B.4 (TPR@1%FPR).
    """
    from sklearn.metrics import roc_curve

    # Points on a line between two others count too: one of them may be the last that is allowed.
    false, true, _ = roc_curve(*_labelled(memorized, unmemorized), drop_intermediate=False)
    return float(true[false <= fpr].max())


def accuracy(memorized: Any, unmemorized: Any, *, threshold: float) -> float:
    """Return the share of prompts on the right side of a threshold (memorized: above), both kinds counting half.

    Source: App. B.4 (there the kinds are equally many, so that plain accuracy is the same).
    """
    labels, scores = _labelled(memorized, unmemorized)
    found = scores > threshold
    return float((found[labels == 1].mean() + (~found[labels == 0]).mean()) / 2)


def best_accuracy(memorized: Any, unmemorized: Any) -> tuple[float, float]:
    """Return the best `accuracy` of any threshold, and that threshold: scores above it mean memorized.

    A threshold chosen on the scores that it is judged by flatters a little.
    """
    from sklearn.metrics import roc_curve

    labels, scores = _labelled(memorized, unmemorized)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    best = int(np.argmax(true - false))
    # roc_curve goes through the distinct scores from above; between two of them lies a threshold that is none.
    distinct = np.unique(scores)[::-1]
    above = distinct[max(best, 1) - 1]
    below = distinct[best] if best < len(distinct) else np.nextafter(above, -np.inf)
    return float((true[best] + 1 - false[best]) / 2), float((above + below) / 2 if best else above)


def interval(metric: Callable[..., float], *samples: Any, resamples: int) -> tuple[float, float]:
    """Return the ends of a 95 % bootstrap interval of a number, such as `auroc` of two samples.

    Each sample [prompt, ...] is drawn anew each time; the ends are NaN where the number is not known for a draw.
    """
    generator, samples = np.random.default_rng(0), tuple(map(_array, samples))
    draws = [metric(*(generator.choice(values, len(values)) for values in samples)) for _ in range(resamples)]
    return tuple(np.quantile(draws, _ENDS).tolist())


def _array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _present(values: Any) -> np.ndarray:
    """Return the values that are not missing, at least one."""
    values = _array(values).ravel()
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("a median or a share needs at least one value")
    return values


def _features(features: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return finite features of unit norm as float64, of a given shape or else [prompt, seed, feature]."""
    return _unit(finite(_array(features), "features"), shape)


def _unit(features: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return features after a look at their shape and norm; rows of NaN stay."""
    if features.ndim != 3 if shape is None else features.shape != shape:
        expected = "[prompt, seed, feature]" if shape is None else list(shape)
        raise ValueError(f"features of shape {list(features.shape)}; expected {expected}")
    off = np.abs(np.linalg.norm(features, axis=-1) - 1)
    if (off > 1e-2).any():
        raise ValueError(
            f"features of norm 1 ± {np.nanmax(off):.2g}; a cosine needs unit norm (raw: FID and KID alone)"
        )
    return features


def _distance(metric: Any, real: Any, generated: Any, *, least: int, **options: int) -> Any:
    """Return what a metric of torchmetrics says of two feature matrices of at least so many images, as float64."""
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
    # Decompositions of matrices with NaN can end the process.
    for name, features in (("real", real), ("generated", generated)):
        finite(features, f"features of {name} images")
    # A network that hands features through: torchmetrics takes ours and needs no Inception of its own.
    network = torch.nn.Identity()
    network.num_features = real.shape[1]
    with torch.device("cpu"):
        distance = metric(feature=network, **options).set_dtype(torch.float64)
        distance.update(torch.from_numpy(real), real=True)
        distance.update(torch.from_numpy(generated), real=False)
        return distance.compute()


def _labelled(memorized: Any, unmemorized: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and scores of both kinds together."""
    kinds = [_array(values).ravel() for values in (memorized, unmemorized)]
    for name, values in zip(("memorized", "unmemorized"), kinds, strict=True):
        if not len(values):
            raise ValueError(f"there is no score of {name} prompts; both kinds are needed")
        finite(values, f"scores of {name} prompts")
    labels = np.repeat([1, 0], [len(values) for values in kinds])
    return labels, np.concatenate(kinds)
