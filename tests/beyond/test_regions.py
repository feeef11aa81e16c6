import numpy as np
import pytest
import torch

from nemolib.beyond.denoising import Denoising, text_of
from nemolib.beyond.regions import MAPS, best_iou, curvature_map, on_grid, pixel_auroc, region_maps
from tests.beyond import by_hand

OPTIONS = {"samples": 2, "steps": 5, "guidance": 3.0, "probes": 2}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_maps_of_several_steps(kind):
    pipe = by_hand.small_pipeline(kind)
    before, prompt = by_hand.traces(pipe), text_of(pipe, "a b")
    steps = list(by_hand.sampled(pipe, by_hand.start(pipe), "a b", 5, by_hand.follow))
    with torch.inference_mode():
        found = region_maps(pipe, "a b", indices=(4, 0, 4), **OPTIONS)
    assert {name: tuple(maps.shape) for name, maps in found.items()} == dict.fromkeys(MAPS, (3, 2, 16, 16))
    for place, index in enumerate((4, 0, 4)):
        timestep, x, empty, text = steps[index]
        torch.testing.assert_close(found[MAPS[0]][place], ((text - empty) ** 2).sum(dim=1), rtol=1e-2, atol=1e-4)
        layers = list(by_hand.attention(pipe, x, timestep, "a b").values())[:2]
        bright = sum(weights[..., prompt.end].mean(dim=1) for weights in layers) / 2
        torch.testing.assert_close(found[MAPS[1]][place].flatten(1), bright, rtol=1e-3, atol=1e-5)
        curved = curvature_map(Denoising(pipe), x, timestep, prompt, probes=2, seed=1)
        torch.testing.assert_close(found[MAPS[2]][place], curved, rtol=1e-2, atol=1e-3)
    for wrong, message in (({"maps": ("x",)}, "unknown maps"), ({"indices": (5,)}, "from 0 to 4")):
        with pytest.raises(ValueError, match=message):
            region_maps(pipe, "a b", **(OPTIONS | wrong))
    assert by_hand.traces(pipe) == before


def test_curvature_by_the_jacobian_of_finite_differences():
    pipe, h = by_hand.small_pipeline(side=4), 0.05
    x, model, text = by_hand.start(pipe, 1), Denoising(pipe), text_of(pipe, "a b")
    units = torch.eye(64).view(64, 4, 4, 4)
    up, down = (by_hand.difference(pipe, x + step * units, 801, "a b") for step in (h, -h))
    jacobian = ((up - down) / (2 * h)).flatten(1).T  # [output, input]
    signs = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(7)) * 2.0 - 1
    estimates = signs * (jacobian.T @ signs), jacobian.diagonal()
    one, exact = (each.view(4, 4, 4).sum(dim=0).clamp(min=0) for each in estimates)
    found = curvature_map(model, x, 801, text, probes=1, seed=7)[0]
    torch.testing.assert_close(found, one, rtol=5e-2, atol=2e-3 * float(one.max()))
    many = curvature_map(model, x, 801, text, probes=300, seed=7)[0]
    assert (many - exact).abs().max() < (jacobian + jacobian.T).norm() / 300**0.5
    assert model.evaluations == 2 * 3 + 2 * (3 + 2 * 299)


def test_agreement_by_loops_over_pixels():
    numbers, best = np.random.default_rng(0), 0.0
    maps = numbers.choice([0.5, 5.0, 5000.0], (3, 4, 4))
    masks = (maps > 1) ^ (numbers.random(maps.shape) < 0.1)
    for image, mask, found in zip(maps, masks, pixel_auroc(maps, masks), strict=True):
        assert found == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a in image[mask] for b in image[~mask]]))
    found, _ = best_iou(maps, masks)
    scaled = np.log(1 + maps) - np.log(1 + maps.min())
    scaled /= scaled.max()
    for level in np.linspace(0, 1, 101):
        inside = scaled >= level
        best = max(best, np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(inside, masks, strict=True)]))
    assert found == pytest.approx(best)
    assert found >= masks.mean()
    assert best_iou(masks * 3.0, masks)[0] == best_iou(np.zeros(masks.shape), np.ones(masks.shape))[0] == 1
    fine = np.kron(masks, np.ones((4, 4), dtype=bool))
    fine[~fine] = numbers.random((~fine).sum()) < 0.1  # less than half of a cell does not count
    np.testing.assert_array_equal(on_grid(fine, (4, 4)), masks)
    with pytest.raises(ValueError, match="mask 0 has no pixel inside"):
        best_iou(maps, np.zeros(masks.shape))
    with pytest.raises(ValueError, match="maps of shape"):
        pixel_auroc(maps[0], masks)
