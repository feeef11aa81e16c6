"""Fig. 1: the prompt that is followed, and what is drawn of it."""

from operator import itemgetter

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nemolib.exhibits import NotEnough
from nemolib.experiments import overview
from nemolib.plots import TEXT_WIDTH
from nemolib.store import WITH_AND_WITHOUT, Grid

PROMPT, OTHER = "a planted fox", "another owl"
INITIAL, REFINED = {(1, 1), (1, 2), (2, 0), (3, 3), (3, 4), (3, 5)}, {(1, 2), (3, 3), (3, 4), (3, 5)}

COMPARED = itemgetter("overview", "scores", "noise_differences", "samples")


def sources(*, seeds=2, detected=3, prompt=PROMPT, initial=INITIAL, refined=REFINED):
    generator, rows = np.random.default_rng(0), [PROMPT, "a phone case", OTHER]

    def grid(rows, columns, side):
        images = generator.integers(0, 255, (len(rows), len(columns), side, side, 3), dtype=np.uint8)
        return Grid(images, tuple(rows), tuple(columns))

    pairs = [(layer, neuron) for layer in (1, 2, 3) for neuron in range(6)]
    neurons = pd.DataFrame(pairs, columns=["layer", "neuron"]).assign(prompt=prompt, z=generator.standard_normal(18))
    names = [f"seed {i}" for i in range(seeds)]
    return {
        "overview": neurons.assign(
            initial=[pair in initial for pair in pairs], refined=[pair in refined for pair in pairs]
        ),
        "scores": pd.DataFrame({"caption": rows, "kind": ["vm", "tm", "unmemorized"], "score": [0.9, 0.5, 0.2]}),
        "search_steps": pd.DataFrame({"threshold": [0.4, 0.4], "theta": [5.0, 4.25]}),
        "overview_images": grid([PROMPT], [name for name in WITH_AND_WITHOUT for _ in names], 8),
        "noise_differences": grid(rows, [f"seed {i}" for i in range(detected)], 4),
        "samples": grid(rows, ["planted", *names], 8),
    }


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    return found + [text.get_text() for axes in figure.axes for text in axes.texts]


def pictures(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def test_the_prompt_is_compared_with_an_unmemorized_one():
    assert overview.compared(*COMPARED(sources())).to_dict() == {PROMPT: 0.9, OTHER: 0.2}


def test_everything_is_drawn_within_the_width_of_the_text():
    given = sources()
    figure = overview.figure_1(**given)
    figure.draw_without_rendering()
    assert figure.get_size_inches() == pytest.approx([TEXT_WIDTH, overview.HEIGHT])
    shown = pictures(figure)
    # Two prompts: an image and three noise differences each; two images with all neurons active and two without.
    assert len(shown) == 2 * (1 + 3) + 2 * 2
    assert (shown[4] == given["samples"].images[2, 1]).all(), "an image of the unmemorized prompt, not a planted one"
    assert (np.stack(shown[8:]) == given["overview_images"].images[0]).all()
    corners = np.array([axes.get_position().get_points() for axes in figure.axes])
    assert ((corners >= 0) & (corners <= 1)).all()
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert all(text.get_window_extent(renderer).x1 <= figure.bbox.x1 for text in figure.texts)


def test_numbers_and_names_of_neurons():
    shown = texts(overview.figure_1(**sources()))
    for text in (
        "6 of 18 neurons, unusual or most active",
        "6 → 4 neurons",
        r"dotted: $\theta = 4.25$",
        "4 neurons off, same seeds",
        "#2",
        "3 neurons",  # of one layer: counted, not listed
        "noise differences of 3 seeds",
        r"most similar pair $0.90 > \tau = 0.40$",
        r"most similar pair $0.20 \leq \tau = 0.40$",
    ):
        assert text in shown, text


@pytest.mark.parametrize(("seeds", "detected"), [(1, 2), (10, 10)])
def test_few_and_many_seeds(seeds, detected):
    figure = overview.figure_1(**sources(seeds=seeds, detected=detected))
    assert len(pictures(figure)) == 2 * (1 + min(4, detected)) + 2 * min(3, seeds)


def test_a_prompt_without_neurons_is_drawn_too():
    assert "0 → 0 neurons" in texts(overview.figure_1(**sources(initial=(), refined=())))


def test_what_notebook_02_did_not_save_is_named():
    with pytest.raises(NotEnough, match="'noise_differences' does not have 'somebody else'"):
        overview.compared(*COMPARED(sources(prompt="somebody else")))
    given = sources()
    with pytest.raises(NotEnough, match="'noise_differences' has no unmemorized prompt"):
        overview.compared(*COMPARED(given | {"scores": given["scores"].assign(kind="vm")}))


def apart(other):
    """Return a change of the scores: those of unmemorized prompts, where those of all others are high."""
    return lambda table: table.assign(score=np.where(table["kind"] == "unmemorized", other, 0.95))


TURNS = [("figure_1", "scores", apart(0.0), apart(0.95), "most similar seeds of the prompt and of an unmemorized one")]
