"""Memorization neurons moved by hand: how many are off, or what their values are multiplied by, and what images become.

Notebook ``explore`` computes a frame when a slider is moved (`panel`); a page that needs no Python holds frames computed
before (`write_page`). Both show a frame by the same template.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from nemolib import paths
from nemolib.first_step import scoring
from nemolib.holdout import z_scores
from nemolib.layers import value_activations
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.prompts import MEMORIZED, has_image
from nemolib.selection import out_of_distribution

if TYPE_CHECKING:
    from ipywidgets import VBox

    from nemolib.run import Run
    from nemolib.settings import GenerationSettings

FACTORS = (1.0, 0.75, 0.5, 0.25, 0.0, -0.25, -0.5, -0.75, -1.0)
"""What the values of neurons are multiplied by: unchanged, off, turned round."""

LARGEST_PAGE, SIDE, POINTS = 5_000_000, 128, 13
"""Bytes of a page, pixels of its images, and numbers of neurons off that it has frames for; at most."""

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(paths.PACKAGE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A prompt with its memorization neurons in the order in which the refinement kept them.

    Attributes:
        row: Its row of the prompt table.
        order: The neurons as (layer, neuron): those that stayed deactivated when Alg. 4 tested them, the first first.
        seeds: The seeds that the search looked at.
        z: For each layer the z-scores [neuron].
        planted: The planted image [height, width, 3], uint8; None where the table names none.
    """

    row: pd.DataFrame
    order: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    z: tuple[np.ndarray, ...]
    planted: np.ndarray | None = field(repr=False)

    @property
    def prompt(self) -> str:
        """The caption."""
        return self.row["caption"].item()


def prompts_with_neurons(run: Run, number: int) -> list[Found]:
    """Return the first VM and as many TM prompts of a run, those in which the search finds neurons.

    The order of the tests is not kept with a localization; it follows from the step at which the selection ended.

    Raises:
        ValueError: No prompt has neurons.
    """
    rows, chosen = run.prompts(*MEMORIZED, most=number), []
    for place, found in enumerate(run.search(rows["caption"])):
        if not found.neurons:
            continue
        activations = [layer[0].cpu() for layer in value_activations(run.pipe.unet, embed(run.pipe, [found.prompt]))]
        z, row = z_scores(run.statistics, activations), rows.iloc[[place]]
        entries = out_of_distribution(z, activations, theta=found.theta, top_k=found.k).entries(
            double=run.profile.protocol.double_entries
        )
        tests = [(layer, neuron) for layer in reversed(range(len(entries))) for neuron in entries[layer]]
        # A neuron that was entered twice is decided at its last entry.
        last = {neuron: test for test, neuron in enumerate(tests)}
        order = tuple(sorted(found.neurons, key=lambda pair: last.get(pair, len(tests))))
        planted = run.planted_images(row)[0] if has_image(row).item() else None
        chosen.append(Found(row, order, found.seeds, tuple(layer.numpy() for layer in z), planted))
    if not chosen:
        raise ValueError(f"none of {len(rows)} prompts has memorization neurons; give more, or another profile")
    return chosen


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """What a setting of the sliders shows.

    Attributes:
        found: The prompt.
        off: How many neurons are scaled, the first of the order.
        factor: What their values are multiplied by; 0 is off.
        numbers: Scores, and the copy similarity where there is a planted image, by what they are called.
        source: The images side by side, one per seed, as a data URL.
    """

    found: Found = field(repr=False)
    off: int
    factor: float
    numbers: dict[str, float]
    source: str = field(repr=False)

    @property
    def text(self) -> str:
        """The setting and its numbers in words: the caption, and the alternative text of the images."""
        setting = f"{self.off} of {len(self.found.order)} neurons {f'times {self.factor:g}' if self.factor else 'off'}"
        numbers = [f"{name} {number:.2f}" for name, number in self.numbers.items()]
        return ", ".join([setting, *numbers]).replace("-", "\N{MINUS SIGN}")


def frame(run: Run, found: Found, off: int, factor: float = 0.0, *, settings: GenerationSettings) -> Frame:
    """Return what scaling the first neurons of a prompt does to its images and scores.

    Args:
        run: The run.
        found: The prompt.
        off: How many neurons, from the first.
        factor: What their values are multiplied by.
        settings: Seeds and steps of the images.

    Raises:
        ValueError: There are not so many neurons.
    """
    if not 0 <= off <= len(found.order):
        raise ValueError(f"off is {off}; the prompt has {len(found.order)} neurons")
    neurons = NeuronSet.of(found.order[:off], layers=len(found.z))
    changed, item = DeactivatedNeurons(neurons, factor), (found.prompt, neurons, factor, found.seeds)
    common = {name: getattr(run.profile, name) for name in ("detection", "similarity", "protocol")}
    ((memorized, asked),) = run.compute(scoring, [item], label="scores", **common)
    numbers = {"score": asked, "memorization score": memorized}
    (images,) = run.images([found.prompt], changed, settings=settings)
    if found.planted is not None:
        copied = run.measure(found.row, changed, columns=["sscd_orig"], settings=settings)
        numbers["copy similarity"] = copied["sscd_orig"].item()
    return Frame(found, off, factor, numbers, picture(images))


def picture(images: Sequence[np.ndarray]) -> str:
    """Return images [image, height, width, 3], uint8, side by side as a data URL, no larger than `SIDE`."""
    shown = [Image.fromarray(image) for image in images]
    for image in shown:
        image.thumbnail((SIDE, SIDE))
    step = shown[0].width + 4
    strip, stream = Image.new("RGB", (len(shown) * step - 4, shown[0].height), "white"), io.BytesIO()
    for place, image in enumerate(shown):
        strip.paste(image, (place * step, 0))
    strip.save(stream, "WEBP", quality=85, method=6)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def rendered(template: str, **values: Any) -> str:
    """Return a template of the package, filled in."""
    return _TEMPLATES.get_template(template).render(picture=picture, **values)


def panel(run: Run, prompts: Sequence[Found], settings: GenerationSettings) -> VBox:
    """Return sliders and what they show, for a notebook; where no front end moves them, a still frame is shown.

    Args:
        run: The run.
        prompts: The prompts that can be chosen.
        settings: Seeds and steps of the images.
    """
    import ipywidgets as widgets

    class Panel(widgets.VBox):
        def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
            return super()._repr_mimebundle_(**options) | {"text/html": self.still}

    look = {"style": {"description_width": "10em"}, "layout": {"width": "40em"}}
    slider = look | {"continuous_update": False}
    # A field and a list move the sliders too: a screen reader says the place of a factor in its list, not the factor.
    prompt = widgets.Dropdown(options=[(item.prompt, item) for item in prompts], description="prompt", **look)
    off = widgets.IntSlider(max=len(prompts[0].order), description="neurons", **slider)
    number = widgets.BoundedIntText(max=off.max, description="neurons, typed", **look)
    factor = widgets.SelectionSlider(options=FACTORS, value=0.0, description="their values times", **slider)
    times = widgets.Dropdown(options=FACTORS, value=0.0, description="times, chosen", **look)
    for name in ("max", "value"):
        widgets.link((off, name), (number, name))
    widgets.link((factor, "value"), (times, "value"))
    seed = widgets.BoundedIntText(settings.seed, max=9999, description="base seed", **look)
    samples = widgets.Dropdown(options=range(1, settings.samples + 1), description="seeds", **look)
    samples.value = settings.samples
    shown = widgets.HTML()

    def draw(_: Any = None) -> None:
        off.max = len(prompt.value.order)
        chosen = replace(settings, seed=seed.value, samples=samples.value)
        now = frame(run, prompt.value, off.value, factor.value, settings=chosen)
        box.still, shown.value = (rendered("frame.html", frame=now, still=still) for still in (True, False))

    box = Panel([prompt, off, number, factor, times, seed, samples, shown])
    for control in (prompt, off, factor, seed, samples):
        control.observe(draw, "value")
    draw()
    return box


def write_page(run: Run, prompts: Sequence[Found], settings: GenerationSettings) -> Path:
    """Write a page to ``figures/<profile>/explore.html`` that needs neither Python nor a network, and return its path.

    Its sliders choose among frames that are computed here: the first neurons off, or all of them scaled.

    Raises:
        ValueError: The page would be too large.
    """
    pages = []
    for found in prompts:
        most = len(found.order)
        counts = np.unique(np.linspace(0, most, min(most + 1, POINTS)).round().astype(int)).tolist()
        sliders = [(count, 0.0) for count in counts] + [(most, factor) for factor in FACTORS if factor]
        pages.append([frame(run, found, *setting, settings=settings) for setting in sliders])
    text = rendered("explore.html", run=run, pages=pages, factors=FACTORS, settings=settings)
    if (size := len(text.encode())) > LARGEST_PAGE:
        raise ValueError(f"the page would have {size:,} bytes, above {LARGEST_PAGE:,}; give fewer prompts or samples")
    path = paths.FIGURES / run.profile.name / "explore.html"
    paths.write_atomic(path, text)
    return path
