import numpy as np
import pytest
import torch

from nemolib.first_step import normalize
from nemolib.settings import SimilaritySettings
from nemolib.similarity import max_pairwise, memorization_score, ms_ssim, pair_similarities, pairwise, similarity, ssim

SMALL = SimilaritySettings(kernel_size=3, sigma=0.5)


def maps(seeds=4, size=16, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 4, size, size, generator=generator)
    return normalize(common + noise * torch.randn(seeds, 4, size, size, generator=generator))


@pytest.mark.parametrize("measure", [ms_ssim, ssim])
def test_similarity_falls_with_noise_and_is_symmetric(measure):
    clean = maps(noise=0.0)
    torch.testing.assert_close(measure(clean, clean, settings=SMALL), torch.ones(4), atol=1e-5, rtol=0)
    values = [measure(clean, maps(noise=noise), settings=SMALL).mean() for noise in (0.1, 0.3, 1.0)]
    assert 1 > values[0] > values[1] > values[2]
    first, second = maps()[:2], maps()[2:]
    torch.testing.assert_close(measure(first, second, settings=SMALL), measure(second, first, settings=SMALL))


def test_the_group_of_a_call_matters_on_several_scales_only():
    first = maps(2)
    second = maps(2, noise=1.0)
    together, alone = (ms_ssim(first[:n], second[:n], settings=SMALL)[0] for n in (2, 1))
    assert 0 < (together - alone).abs() < 0.05
    together, alone = (ssim(first[:n], second[:n], settings=SMALL)[0] for n in (2, 1))
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("protocol", ["released", "paper"])
def test_pairs_and_matrix_agree(protocol):
    differences = maps()
    pairs = pair_similarities(differences, settings=SMALL, protocol=protocol)
    matrix = pairwise(differences, settings=SMALL, protocol=protocol)
    assert pairs.shape == (6,)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.ones(4))
    assert torch.equal(matrix[tuple(torch.triu_indices(4, 4, 1))], pairs)
    score = memorization_score(differences, settings=SMALL, protocol=protocol)
    assert score == float(pairs.max()) == float(max_pairwise(matrix).max())


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (SimilaritySettings(), 16, "sigma 1.5 gives a window that reaches 5 pixels.*the coarsest of 3 scales"),
        (SimilaritySettings(kernel_size=3, sigma=0.9, betas=(0.3,) * 2), 6, "reaches 3 pixels"),
        (SimilaritySettings(kernel_size=3, sigma=0.1), 16, "reaches 0 pixels.*needed are 1 at least .sigma 0.15"),
    ],
)
def test_a_window_that_does_not_fit(settings, size, message):
    with pytest.raises(ValueError, match=f"similarity of {size} x {size} maps: .*({message})"):
        ms_ssim(maps(size=size), maps(size=size), settings=settings)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.8, 1.2, 1.5])
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_what_passes_the_check_gives_finite_numbers(sigma, scales, size):
    settings = SimilaritySettings(kernel_size=1, sigma=sigma, betas=(0.3,) * scales)
    try:
        values = ms_ssim(maps(size=size), maps(size=size, noise=1.0), settings=settings)
    except ValueError as error:
        words = (f"similarity of {size} x {size} maps: sigma", "For a given number of `betas`")
        assert str(error).startswith(words)  # noqa: PT017 - either is right
    else:
        assert values.isfinite().all()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"cannot compare shapes \(4, 4, 16, 16\) and \(3, 4, 16, 16\)"):
        similarity(maps(), maps(3), settings=SMALL)
    with pytest.raises(ValueError, match="at least two seeds"):
        pairwise(maps(1), settings=SMALL)
    with pytest.raises(ValueError, match="at least two seeds"):
        max_pairwise(torch.ones(1, 1))


@pytest.mark.parametrize("sigma", [0.9, 1.5])
def test_ssim_agrees_with_scikit_image(sigma):
    """Same Gaussian window (cut at 3.5 sigma) and constants; scikit-image leaves out the border, ours mirrors it.

    So its input is mirrored beforehand. Ours is float32: a variance is the difference of two numbers up to 1, known to
    1e-7, and stands beside a constant of 9e-4, hence the tolerance.
    """
    from skimage.metrics import structural_similarity

    reach = int(3.5 * sigma + 0.5)
    first, second = maps(4, size=24), maps(4, size=24, noise=1.0)
    mirrored = [
        np.pad(item.double().numpy(), [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="reflect")
        for item in (first, second)
    ]
    options = {"data_range": 1.0, "channel_axis": 0, "gaussian_weights": True, "use_sample_covariance": False}
    expected = [structural_similarity(*pair, sigma=sigma, **options) for pair in zip(*mirrored, strict=True)]
    found = ssim(first, second, settings=SimilaritySettings(kernel_size=3, sigma=sigma))
    assert found.tolist() == pytest.approx(expected, abs=2e-6)
