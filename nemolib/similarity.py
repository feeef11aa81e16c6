"""Structural similarity of noise differences, and the memorization score made from it.

`ms_ssim` and `ssim` are those of torchmetrics. A trap for whoever compares scores: the authors' code lets torchmetrics
take the data range from its input. Noise differences span [0, 1], but after each halving of the resolution the range is
smaller, and it is that of the *whole batch* of one call. So a multi-scale score depends on which other samples are
compared in the same call (by up to 0.05). The functions here keep that: one call is one group.

Where nothing is given, window and exponents are those of the paper, and the protocol is `released`. A window that does
not fit the maps raises a ValueError, which says what to change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from nemolib.settings import Protocol, SimilaritySettings, load_protocol


def ssim(a: Tensor, b: Tensor, *, settings: SimilaritySettings | None = None) -> Tensor:
    """Return the structural similarity of pairs of noise differences on one scale.

    Source: Sec. 3.1.

    Args:
        a: Noise differences [pair, channel, height, width], in [0, 1].
        b: What they are compared with, same shape.
        settings: Window; the exponents are not used.

    Returns:
        SSIM [pair], float32, dimensionless, in (-1, 1].

    Raises:
        ValueError: Shapes differ, or the window does not fit.
    """
    return _measured(structural_similarity_index_measure, a, b, settings, data_range=1.0)


def ms_ssim(a: Tensor, b: Tensor, *, settings: SimilaritySettings | None = None) -> Tensor:
    """Return the multi-scale structural similarity of pairs of noise differences.

    Source: authors' code, utils/activation_detection.py (the paper's text says SSIM).

    Args:
        a: Noise differences [pair, channel, height, width], in [0, 1].
        b: What they are compared with, same shape. All pairs are one group (see the module's text).
        settings: Window and exponents, one for each scale.

    Returns:
        MS-SSIM [pair], float32, dimensionless, in [0, 1] (negative contrast terms count as 0).

    Raises:
        ValueError: Shapes differ, or the window does not fit the coarsest scale.
    """
    settings = settings or SimilaritySettings()
    return _measured(multiscale_structural_similarity_index_measure, a, b, settings, betas=settings.betas)


def similarity(
    a: Tensor, b: Tensor, *, settings: SimilaritySettings | None = None, protocol: str | Protocol = "released"
) -> Tensor:
    """Return the similarity of pairs of noise differences as the protocol measures it: `ms_ssim` or `ssim`."""
    measures = {"ms_ssim": ms_ssim, "ssim": ssim}
    return measures[load_protocol(protocol).similarity](a, b, settings=settings)


def pair_similarities(
    differences: Tensor, *, settings: SimilaritySettings | None = None, protocol: str | Protocol = "released"
) -> Tensor:
    """Return the similarity of every pair of seeds, in one batched call.

    Source: Sec. 3.1; authors' code, 2_compute_pairwise_ssim.py.

    Args:
        differences: Noise differences [seed, channel, height, width], in [0, 1]; at least two.
        settings: Window and exponents.
        protocol: Which similarity.

    Returns:
        Similarity [pair], pairs (0, 1), (0, 2), ..., (1, 2), ...; 45 for 10 seeds.

    Raises:
        ValueError: There is no pair, or the window does not fit.
    """
    first, second = _pairs(differences)
    return similarity(differences[first], differences[second], settings=settings, protocol=protocol)


def pairwise(
    differences: Tensor, *, settings: SimilaritySettings | None = None, protocol: str | Protocol = "released"
) -> Tensor:
    """Return `pair_similarities` as a symmetric matrix [seed, seed] with ones on its diagonal."""
    values = pair_similarities(differences, settings=settings, protocol=protocol)
    matrix = torch.eye(len(differences), dtype=values.dtype, device=values.device)
    first, second = _pairs(differences)
    matrix[first, second] = values
    matrix[second, first] = values
    return matrix


def max_pairwise(matrix: Tensor) -> Tensor:
    """Return for each seed its largest similarity with another seed, [seed].

    Source: Alg. 1.

    Args:
        matrix: Similarity [seed, seed] of `pairwise`.

    Raises:
        ValueError: The matrix is not square, or has one seed only.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] < 2:
        raise ValueError(f"similarity of shape {tuple(matrix.shape)}; expected [seed, seed] with at least two seeds")
    diagonal = torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(diagonal, -torch.inf).amax(dim=1)


def memorization_score(
    differences: Tensor, *, settings: SimilaritySettings | None = None, protocol: str | Protocol = "released"
) -> float:
    """Return the memorization score of a prompt: the largest of its `pair_similarities`, high for memorized prompts.

    Source: Sec. 3.1.
    """
    return float(pair_similarities(differences, settings=settings, protocol=protocol).max())


def _measured(
    measure: Callable[..., Tensor], a: Tensor, b: Tensor, settings: SimilaritySettings | None, **options: Any
) -> Tensor:
    """Return what a measure of torchmetrics says of each pair, after a look at their shapes."""
    settings = settings or SimilaritySettings()
    if a.shape != b.shape or a.ndim != 4 or not len(a):
        raise ValueError(
            f"cannot compare shapes {tuple(a.shape)} and {tuple(b.shape)}; expected twice [pair, channel, height, width]"
        )
    # A Gaussian window reaches that many pixels to each side, and maps are mirrored at their borders that far. Sides halve
    # from scale to scale. What torchmetrics checks itself is left to it: the number of scales and, though it takes the
    # window from sigma alone, the kernel size.
    sigma, scales, reach = settings.sigma, len(options.get("betas", (1.0,))), int(3.5 * settings.sigma + 0.5)
    if not 1 <= reach < min(a.shape[-2:]) >> (scales - 1):
        raise ValueError(
            f"similarity of {a.shape[-2]} x {a.shape[-1]} maps: sigma {sigma:g} gives a window that reaches {reach} pixels "
            f"to each side; needed are 1 at least (sigma 0.15), and less than the side of the coarsest of {scales} scales"
        )
    window = {"sigma": sigma, "kernel_size": settings.kernel_size}
    before = torch.get_default_dtype()
    try:
        # torchmetrics makes the exponents in the default type of the session.
        torch.set_default_dtype(torch.float32)
        return measure(a.float(), b.float(), **window, **options, reduction="none").reshape(-1)
    finally:
        torch.set_default_dtype(before)


def _pairs(differences: Tensor) -> tuple[Tensor, Tensor]:
    if differences.ndim != 4 or len(differences) < 2:
        raise ValueError(
            f"noise differences of shape {tuple(differences.shape)}; expected [seed, channel, height, width] with at "
            "least two seeds"
        )
    first, second = torch.triu_indices(len(differences), len(differences), offset=1, device=differences.device)
    return first, second
