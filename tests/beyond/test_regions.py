import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nemolib.beyond.denoising import Denoising, text_of
from nemolib.beyond.regions import MAPS, best_iou, bright_ending, curvature_map, on_grid, pixel_auroc, region_maps
from tests.beyond import by_hand

OPTIONS = {"samples": 2, "steps": 5, "guidance": 3.0, "probes": 2}
PROMPT = "a b"


def course(pipe):
    return list(
        by_hand.sampled(pipe, by_hand.start(pipe), PROMPT, 5, lambda i, t, empty, text: empty + 3 * (text - empty))
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_maps_of_several_steps(kind):
    pipe = by_hand.small_pipeline(kind)
    before, steps, end = by_hand.traces(pipe), course(pipe), text_of(pipe, PROMPT).end
    found = region_maps(pipe, PROMPT, indices=(4, 0, 4), **OPTIONS)
    assert {name: tuple(maps.shape) for name, maps in found.items()} == dict.fromkeys(MAPS, (3, 2, 16, 16))
    for place, index in enumerate((4, 0, 4)):
        timestep, x, empty, text = steps[index]
        torch.testing.assert_close(found[MAPS[0]][place], ((text - empty) ** 2).sum(dim=1), rtol=1e-2, atol=1e-4)
        layers = by_hand.attention(pipe, x, timestep, PROMPT).items()
        bright = [each[..., end].mean(dim=1) for name, each in layers if name.startswith("down_blocks.0.")]
        torch.testing.assert_close(found[MAPS[1]][place].flatten(1), sum(bright) / 2, rtol=1e-3, atol=1e-5)
        curved = curvature_map(Denoising(pipe), x, timestep, text_of(pipe, PROMPT), probes=2, seed=1)
        torch.testing.assert_close(found[MAPS[2]][place], curved, rtol=1e-2, atol=1e-3)
    ended = bright_ending(Denoising(pipe, steps=5, guidance=3.0), by_hand.start(pipe), text_of(pipe, PROMPT))
    torch.testing.assert_close(ended, found[MAPS[1]][0], rtol=1e-3, atol=1e-5)
    assert list(region_maps(pipe, PROMPT, indices=(0,), maps=(MAPS[2],), **OPTIONS)) == [MAPS[2]]
    assert by_hand.traces(pipe) == before


def test_curvature_by_the_jacobian_of_finite_differences():
    pipe, h = by_hand.small_pipeline(side=4), 0.05
    x, probes = by_hand.start(pipe, 1), 3
    units = torch.eye(64).view(64, 4, 4, 4)
    up, down = (by_hand.difference(pipe, x + sign * h * units, 801, PROMPT) for sign in (1, -1))
    jacobian = ((up - down) / (2 * h)).flatten(1).T  # [output, input]
    draws, diagonal = torch.Generator().manual_seed(7), torch.zeros(64)
    for _ in range(probes):
        signs = (torch.randint(0, 2, (4, 4, 4), generator=draws) * 2 - 1).float().flatten()
        diagonal += signs * (jacobian.T @ signs) / probes
    expected = diagonal.view(4, 4, 4).sum(dim=0).clamp(min=0)
    model = Denoising(pipe)
    found = curvature_map(model, x, 801, text_of(pipe, PROMPT), probes=probes, seed=7)[0]
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=2e-3 * float(expected.max()))
    assert model.evaluations == 2 * 3 + 2 * 2 * (probes - 1)
    # Many probes come to the diagonal itself.
    many = curvature_map(model, x, 801, text_of(pipe, PROMPT), probes=1500, seed=7)[0]
    exact = jacobian.diagonal().view(4, 4, 4).sum(dim=0).clamp(min=0)
    spread = (jacobian + jacobian.T).norm() / 1500**0.5
    assert (many - exact).abs().max() < spread


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": ("attention",)}, r"unknown maps \['attention'\]"),
        ({"indices": (50,)}, r"indices \[50\].*from 0 to 49"),
    ],
)
def test_bad_maps(options, message):
    with pytest.raises(ValueError, match=message):
        region_maps(by_hand.small_pipeline(), PROMPT, **options)


MASKS = np.array([[[1, 0], [0, 0]], [[1, 1], [1, 0]]], dtype=bool)


@given(arrays(float, (2, 2, 2), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0])))
def test_agreement_by_loops_over_pixels(maps):
    for image, mask, found in zip(maps, MASKS, pixel_auroc(maps, MASKS), strict=True):
        wins = [(a > b) + 0.5 * (a == b) for a in image[mask] for b in image[~mask]]
        assert found == pytest.approx(np.mean(wins))
    logs = np.log(1 + maps)
    spread = logs.max() - logs.min()
    scaled = (logs - logs.min()) / spread if spread else np.zeros_like(logs)
    found, level = best_iou(maps, MASKS)
    best = 0.0
    for step in range(101):
        ious = []
        for image, mask in zip(scaled >= np.linspace(0, 1, 101)[step], MASKS, strict=True):
            both = sum(a and b for a, b in zip(image.flat, mask.flat, strict=True))
            ious.append(both / sum(a or b for a, b in zip(image.flat, mask.flat, strict=True)))
        best = max(best, np.mean(ious))
    assert found == pytest.approx(best)
    assert found >= MASKS.mean()
    assert 0 <= level <= 1


def test_perfect_maps_are_perfect_and_masks_come_to_the_grid():
    assert best_iou(MASKS * 3.0, MASKS)[0] == 1
    assert pixel_auroc(MASKS * 3.0, MASKS).tolist() == [1, 1]
    fine = np.kron(MASKS, np.ones((4, 4), dtype=bool))
    fine[0, 0, 4:7] = True  # three pixels of sixteen are not half of a cell
    np.testing.assert_array_equal(on_grid(fine, (2, 2)), MASKS)
    with pytest.raises(ValueError, match="mask 1 has no pixel inside"):
        best_iou(np.ones((2, 2, 2)), MASKS & [[[True]], [[False]]])
    with pytest.raises(ValueError, match="maps of shape"):
        pixel_auroc(np.ones((2, 3, 2)), MASKS)
