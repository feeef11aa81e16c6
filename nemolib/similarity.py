"""Structural similarity of noise differences, and the memorization score made from it.

`ms_ssim` and `ssim` are those of torchmetrics. A trap for whoever compares scores: the authors' code lets torchmetrics
take the data range from its input. Noise differences span [0, 1], but after each halving of the resolution the range is
smaller, and it is that of the *whole batch* of one call. So a multi-scale score depends on which other samples are
compared in the same call (by up to 0.05). The functions here keep that: one call is one group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from nemolib.protocols import Protocol, Similarity, load_protocol
from nemolib.settings import SimilaritySettings


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
    settings = settings or SimilaritySettings()
    _check(a, b, settings, "ssim")
    result = structural_similarity_index_measure(
        a.float(), b.float(), sigma=settings.sigma, kernel_size=settings.kernel_size, reduction="none", data_range=1.0
    )
    return result.reshape(-1)


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
    _check(a, b, settings, "ms_ssim")
    result = multiscale_structural_similarity_index_measure(
        a.float(),
        b.float(),
        sigma=settings.sigma,
        kernel_size=settings.kernel_size,
        betas=settings.betas,
        reduction="none",
    )
    return result.reshape(-1)


def similarity(
    a: Tensor,
    b: Tensor,
    *,
    settings: SimilaritySettings | None = None,
    protocol: str | Protocol = "released",
) -> Tensor:
    """Return the similarity of pairs of noise differences, as the protocol measures it.

    Args:
        a: Noise differences [pair, channel, height, width], in [0, 1].
        b: What they are compared with, same shape.
        settings: Window and exponents; None means those of the paper.
        protocol: `released` (MS-SSIM) or `paper` (SSIM), or a protocol of your own.

    Returns:
        Similarity [pair], float32, dimensionless, at most 1.

    Raises:
        ValueError: Shapes differ, or the window does not fit.
    """
    measures = {"ms_ssim": ms_ssim, "ssim": ssim}
    return measures[load_protocol(protocol).similarity](a, b, settings=settings)


def pair_similarities(
    differences: Tensor,
    *,
    settings: SimilaritySettings | None = None,
    protocol: str | Protocol = "released",
) -> Tensor:
    """Return the similarity of every pair of seeds, in one batched call.

    Source: Sec. 3.1; authors' code, 2_compute_ssim.py.

    Args:
        differences: Noise differences [seed, channel, height, width], in [0, 1]; at least two.
        settings: Window and exponents; None means those of the paper.
        protocol: See `similarity`.

    Returns:
        Similarity [pair], pairs (0, 1), (0, 2), ..., (1, 2), ...; 45 for 10 seeds.

    Raises:
        ValueError: There is no pair, or the window does not fit.
    """
    first, second = _pairs(differences)
    return similarity(differences[first], differences[second], settings=settings, protocol=protocol)


def pairwise(
    differences: Tensor,
    *,
    settings: SimilaritySettings | None = None,
    protocol: str | Protocol = "released",
) -> Tensor:
    """Return the similarity of every seed with every other as a symmetric matrix with ones on its diagonal.

    Args:
        differences: Noise differences [seed, channel, height, width], in [0, 1]; at least two.
        settings: Window and exponents; None means those of the paper.
        protocol: See `similarity`.

    Returns:
        Similarity [seed, seed].

    Raises:
        ValueError: There is no pair, or the window does not fit.
    """
    first, second = _pairs(differences)
    values = similarity(differences[first], differences[second], settings=settings, protocol=protocol)
    matrix = torch.eye(len(differences), dtype=values.dtype, device=values.device)
    matrix[first, second] = values
    matrix[second, first] = values
    return matrix


def max_pairwise(matrix: Tensor) -> Tensor:
    """Return for each seed its largest similarity with another seed.

    Source: Alg. 1.

    Args:
        matrix: Similarity [seed, seed] of `pairwise`.

    Returns:
        Similarity [seed].

    Raises:
        ValueError: The matrix is not square, or has one seed only.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] < 2:
        raise ValueError(f"similarity of shape {tuple(matrix.shape)}; expected [seed, seed] with at least two seeds")
    diagonal = torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(diagonal, -torch.inf).amax(dim=1)


def memorization_score(
    differences: Tensor,
    *,
    settings: SimilaritySettings | None = None,
    protocol: str | Protocol = "released",
) -> float:
    """Return the memorization score of a prompt: the largest similarity of a pair of seeds.

    Source: Sec. 3.1.

    Args:
        differences: Noise differences [seed, channel, height, width], in [0, 1]; at least two.
        settings: Window and exponents; None means those of the paper.
        protocol: See `similarity`.

    Returns:
        Similarity, dimensionless, at most 1; high for memorized prompts.

    Raises:
        ValueError: There is no pair, or the window does not fit.
    """
    return float(pair_similarities(differences, settings=settings, protocol=protocol).max())


def window_problem(height: int, width: int, settings: SimilaritySettings, measure: Similarity) -> str | None:
    """Return why the window does not fit maps of a size, or None if it fits.

    A Gaussian window reaches int(3.5 sigma + 0.5) pixels to each side, and maps are mirrored at their borders that far.
    Sides halve from scale to scale. torchmetrics takes the window from sigma alone, but checks ``kernel_size`` too.
    """
    scales = len(settings.betas) if measure == "ms_ssim" else 1
    side, reach = min(height, width), int(3.5 * settings.sigma + 0.5)
    if reach < 1:
        return f"sigma {settings.sigma:g} gives a window of a single pixel; take at least 0.15"
    if (side >> (scales - 1)) <= reach:
        return f"sigma {settings.sigma:g} reaches {reach} pixels, the coarsest of {scales} scales is too small for it; take a smaller one"
    allowed = side // max(1, scales - 1) ** 2
    if measure == "ms_ssim" and side < 2**scales:
        return f"{scales} scales need at least {2**scales} pixels; take fewer betas"
    if measure == "ms_ssim" and settings.kernel_size > allowed:
        return f"kernel_size {settings.kernel_size} is too large for {scales} scales; take at most {allowed}"
    return None


def _check(a: Tensor, b: Tensor, settings: SimilaritySettings, measure: Similarity) -> None:
    if a.shape != b.shape or a.ndim != 4 or not len(a):
        raise ValueError(
            f"cannot compare shapes {tuple(a.shape)} and {tuple(b.shape)}; expected twice [pair, channel, height, width]"
        )
    problem = window_problem(a.shape[-2], a.shape[-1], settings, measure)
    if problem:
        raise ValueError(f"similarity of {a.shape[-2]} x {a.shape[-1]} maps: {problem}")


def _pairs(differences: Tensor) -> tuple[Tensor, Tensor]:
    if differences.ndim != 4 or len(differences) < 2:
        raise ValueError(
            f"noise differences of shape {tuple(differences.shape)}; expected [seed, channel, height, width] with at "
            "least two seeds"
        )
    first, second = torch.triu_indices(len(differences), len(differences), offset=1, device=differences.device)
    return first, second
