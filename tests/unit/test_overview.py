"""Fig. 1: the figure and its exhibit."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nemolib import exhibits, paths, tables
from nemolib.exhibits.overview import FIGURE_1, _run
from nemolib.figures.overview import HEIGHT, NAMED, figure_1
from nemolib.neurons import NeuronSet
from nemolib.theme import TEXT_WIDTH

PROMPT, OTHER = "a planted fox", "another owl"
INITIAL = NeuronSet(((1, 2), (0,), (3, 4, 5)))
REFINED = NeuronSet(((2,), (), (3, 4, 5)))


def save(*, seeds=2, detected=3, prompt=PROMPT, scores=(0.9, 0.2)):
    generator = np.random.default_rng(0)
    neurons = [(layer, neuron, 4.5 * generator.standard_normal()) for layer in (1, 2, 3) for neuron in range(6)]
    contents = {
        "overview": pd.DataFrame(neurons, columns=["layer", "neuron", "z"]).assign(prompt=prompt),
        "localization": pd.DataFrame({"prompt": [PROMPT], "kind": "vm", "theta": 4.25, "initial": INITIAL.to_json(), "neurons": REFINED.to_json()}),
        "scores": pd.DataFrame({"caption": [PROMPT, "a phone case", OTHER], "kind": ["vm", "tm", "unmemorized"], "score": [scores[0], 0.5, scores[1]]}),
        "search_steps": pd.DataFrame({"threshold": [0.4], "prompt": [PROMPT]}),
    }  # fmt: skip
    for name, content in contents.items():
        tables.save_table(content, name, profile="tiny")
    rows = [PROMPT, "a phone case", OTHER]
    shapes = {
        "samples": (rows, ["planted", *(f"seed {i}" for i in range(seeds))], 8),
        "noise_differences": (rows, [f"seed {i}" for i in range(detected)], 4),
        "overview_images": ([PROMPT], [f"seed {i}" for i in range(seeds)] * 2, 8),
    }
    for name, (labels, columns, side) in shapes.items():
        images = generator.integers(0, 255, (len(labels), len(columns), side, side, 3), dtype=np.uint8)
        tables.save_grid(images, name, rows=labels, columns=columns, profile="tiny")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    save()


def run():
    return _run(exhibits.load_sources(FIGURE_1, "tiny"))


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    return found + [text.get_text() for axes in figure.axes for text in axes.texts]


def pictures(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def test_the_run_is_that_of_the_prompt():
    found, samples = run(), tables.read_grid("samples", profile="tiny")
    pair = tables.read_grid("overview_images", profile="tiny")
    assert (found.prompt, found.other, found.scores, found.threshold, found.theta) == (
        PROMPT,
        OTHER,
        (0.9, 0.2),
        0.4,
        4.25,
    )
    marked = found.neurons.set_index(["layer", "neuron"])
    assert set(marked.index[marked["initial"]]) == {(layer + 1, neuron) for layer, neuron in INITIAL}
    assert set(marked.index[marked["refined"]]) == {(layer + 1, neuron) for layer, neuron in REFINED}
    assert (found.images[1] == samples.images[2, 1]).all(), "an image of the unmemorized prompt, not a planted one"
    assert (found.before == pair.images[0, :2]).all()
    assert (found.after == pair.images[0, 2:]).all()


def test_everything_is_drawn_within_the_width_of_the_text():
    figure = figure_1(run())
    figure.draw_without_rendering()
    assert figure.get_size_inches() == pytest.approx([TEXT_WIDTH, HEIGHT])
    # Two prompts: an image and three noise differences each; two images with all neurons active and two without.
    assert len(pictures(figure)) == 2 * (1 + 3) + 2 * 2
    for axes in figure.axes:
        box = axes.get_position()
        assert box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1  # noqa: PT018 (one box, four sides)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert box.x1 <= figure.bbox.x1, text.get_text()


def test_numbers_and_names_of_neurons():
    shown = texts(figure_1(run()))
    assert "6 of 18 neurons, unusual or most active" in shown
    assert "6 → 4 neurons" in shown
    assert "4 neurons off, same seeds" in shown
    assert "#2" in shown
    assert NAMED == 2
    assert "3 neurons" in shown, "three of one layer are counted, not listed"
    assert r"most similar pair $0.90 > \tau = 0.40$" in shown
    assert r"most similar pair $0.20 \leq \tau = 0.40$" in shown


@pytest.mark.parametrize(("seeds", "detected"), [(1, 2), (10, 10)])
def test_few_and_many_seeds(seeds, detected):
    save(seeds=seeds, detected=detected)
    figure = figure_1(run())
    assert len(pictures(figure)) == 2 * (1 + min(4, detected)) + 2 * min(3, seeds)


def test_a_prompt_without_neurons_is_drawn_too():
    found = run()
    nothing = replace(found, neurons=found.neurons.assign(initial=False, refined=False), theta=None)
    assert "0 → 0 neurons" in texts(figure_1(nothing))
    with pytest.raises(ValueError, match="1 images with and 2 without the neurons"):
        figure_1(replace(found, before=found.before[:1]))
    with pytest.raises(ValueError, match="no neurons or no noise differences"):
        figure_1(replace(found, neurons=found.neurons.head(0)))


@pytest.mark.parametrize(
    ("scores", "verdict"), [((0.9, 0.2), "agrees"), ((0.9, 0.5), "differs"), ((0.3, 0.2), "differs")]
)
def test_the_reading(scores, verdict):
    save(scores=scores)
    item = exhibits.render(FIGURE_1, "tiny")
    assert item.reading.verdict == verdict
    assert "of 18 neurons 6 are candidates and 4 stay" in item.reading.ours


def test_another_prompt_than_that_of_the_noise_differences_is_not_drawn():
    save(prompt="somebody else")
    reason = exhibits.render_or_say_why(FIGURE_1, "tiny").reason
    assert reason.startswith("image grid 'noise_differences' does not have the prompt 'somebody else'")
