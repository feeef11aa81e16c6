import numpy as np
import pytest

from nemolib.figures.images import figure_3, image_grid
from nemolib.tables import Grid
from nemolib.theme import TEXT_WIDTH


@pytest.fixture
def grid():
    images = np.arange(2 * 4 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 4, 8, 8, 3)
    return Grid(images, ("limited edition rocket trading card", "b"), ("1", "2", "1", "2"))


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_figure_3_shows_every_image(grid):
    figure = figure_3(grid, [3, 17])
    assert figure.get_figwidth() == pytest.approx(TEXT_WIDTH)
    assert len(figure.axes) == 8
    for axes, image in zip(figure.axes, grid.images.reshape(8, 8, 8, 3), strict=True):
        assert np.array_equal(axes.images[0].get_array(), image)


def test_figure_3_says_how_many_neurons(grid):
    figure = figure_3(grid, [3, 17])
    boxes = [text for axes in figure.axes for text in axes.texts if text.get_bbox_patch() is not None]
    assert [box.get_text() for box in boxes] == ["3", "17"]
    assert {"all neurons active", "neurons deactivated", "b"} <= set(texts(figure))
    assert any(text.replace("\n", " ") == grid.rows[0] for text in texts(figure))


def test_the_halves_of_figure_3_stand_apart(grid):
    axes = figure_3(grid, [3, 17]).axes[:4]
    left = [item.get_position().x0 for item in axes]
    gaps = np.diff(left)
    assert gaps[0] == pytest.approx(gaps[2])
    assert gaps[1] > 1.2 * gaps[0]
    assert axes[-1].get_position().x1 < 1


def test_images_are_square_and_inside(grid):
    figure = figure_3(grid, [3, 17])
    width, height = figure.get_size_inches()
    for axes in figure.axes:
        place = axes.get_position()
        assert place.width * width == pytest.approx(place.height * height)
        assert place.y0 > 0
        assert place.y1 < 1


def test_figure_3_refuses_what_does_not_fit(grid):
    with pytest.raises(ValueError, match="3 counts for 2 prompts"):
        figure_3(grid, [1, 2, 3])
    odd = Grid(grid.images[:, :3], grid.rows, grid.columns[:3])
    with pytest.raises(ValueError, match="3 images per prompt"):
        figure_3(odd, [1, 2])


def test_image_grid_labels_rows_and_columns(grid):
    figure = image_grid(grid, fraction=0.8)
    assert figure.get_figwidth() == pytest.approx(0.8 * TEXT_WIDTH)
    assert texts(figure).count("1") == 2
    assert "b" in texts(figure)


def test_maps_without_colour_share_a_scale():
    grid = Grid(np.full((1, 2, 4, 4), 0.5), ("",), ("", ""))
    figure = image_grid(grid)
    assert all(axes.images[0].get_clim() == (0, 1) for axes in figure.axes)


def test_labels_of_small_images_do_not_overlap():
    images = np.zeros((3, 20, 8, 8, 3), dtype=np.uint8)
    figure = image_grid(Grid(images, ("limited edition rocket trading card",) * 3, tuple(map(str, range(20)))))
    figure.draw_without_rendering()
    labels = [text for axes in figure.axes for text in axes.texts if "\n" in text.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) == 3
    assert all(upper.y0 >= lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))
