"""Neurons moved by hand: frames are what the library computes, and a page shows them in a real browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from nemolib import explore
from nemolib.generation import generate
from nemolib.localization import localize
from nemolib.mitigation import DeactivatedNeurons
from nemolib.neurons import NeuronSet
from nemolib.run import Run

CAPTIONS = {"red fox card": "vm", "odd <b> & pin": "tm"}


@pytest.fixture(scope="module")
def run(random_run):
    search = {"theta_start": 3.0, "theta_step": 1.0, "theta_min": 1.0, "k_max": 3, "method": "sequential"}
    return random_run(CAPTIONS, thresholds={"value": 0.0}, search=search)


@pytest.fixture(scope="module")
def found(run):
    return explore.prompts_with_neurons(run, 1)


@pytest.fixture(scope="module")
def page(run, found):
    return explore.write_page(run, found, run.profile.generation)


def neurons_of(item, off=None):
    return NeuronSet.of(item.order[:off], layers=len(item.z))


def test_the_order_is_that_in_which_the_refinement_kept_the_neurons(run, found):
    assert [item.prompt for item in found] == list(CAPTIONS)
    for item in found:
        search = localize(run.pipe, item.prompt, run.statistics, threshold=run.threshold)
        stayed = [(test.layer, test.neuron) for test in search.tests if test.neuron is not None and not test.removed]
        # A neuron with two entries is decided at the last of them.
        assert item.order == tuple(dict.fromkeys(stayed[::-1]))[::-1]
        assert neurons_of(item) == search.neurons
        assert item.seeds == search.seeds


def test_without_neurons_there_is_nothing_to_move(run):
    strict = Run(replace(run.profile, thresholds={"value": 0.9}), run.pipe, progress=False)
    with pytest.raises(ValueError, match="none of 2 prompts has memorization neurons"):
        explore.prompts_with_neurons(strict, 1)


def pixels(source, number):
    """Return the images of a data URL, [image, height, width, 3]."""
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    width = (strip.shape[1] + 4) // number
    return np.stack([strip[:, place * width : (place + 1) * width - 4] for place in range(number)])


@pytest.mark.parametrize(("share", "factor"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, -1.0), (1.0, 0.5)])
def test_a_frame_shows_what_the_library_computes(run, found, share, factor):
    item, settings = found[0], run.profile.generation
    off = int(share * len(item.order))
    shown = explore.frame(run, item, off, factor, settings=settings)
    changed = DeactivatedNeurons(neurons_of(item, off), factor)
    (images,) = generate(run.pipe, [item.prompt], settings=settings, mitigation=changed, progress=False)
    # What is lost in compression is small: noise is hard to compress.
    assert np.abs(pixels(shown.source, settings.samples) - images.astype(float)).mean() < 25
    assert shown.numbers["copy similarity"] == run.measure(item.row, changed)["sscd_orig"].item()
    done = "off" if factor == 0 else f"times {factor:g}".replace("-", "\N{MINUS SIGN}")
    assert shown.text.startswith(f"{off} of {len(item.order)} neurons {done}, score ")
    assert shown.text.count(",") == len(shown.numbers) == 3


def test_scores_are_those_of_the_search(run, found):
    item, settings = found[0], run.profile.generation
    search = localize(run.pipe, item.prompt, run.statistics, threshold=run.threshold)
    none, every = (explore.frame(run, item, off, settings=settings).numbers for off in (0, len(item.order)))
    assert none["score"] == pytest.approx(1, abs=1e-5)
    assert none["memorization score"] == pytest.approx(search.unblocked_score, abs=1e-5)
    assert every["score"] == pytest.approx(search.refined_score, abs=1e-4)
    unchanged = explore.frame(run, item, len(item.order), 1.0, settings=settings).numbers
    assert unchanged == pytest.approx(none, abs=1e-5)


def test_it_works_without_a_planted_image_and_says_what_there_is_not(run, found):
    bare, settings = replace(found[0], planted=None), run.profile.generation
    assert "copy" not in explore.frame(run, bare, 1, settings=settings).text
    with pytest.raises(ValueError, match=r"off is 99; the prompt has \d+ neurons"):
        explore.frame(run, bare, 99, settings=settings)


def test_large_images_are_made_smaller():
    assert pixels(explore.picture(np.zeros((3, 512, 256, 3), dtype=np.uint8)), 3).shape == (3, 128, 64, 3)


def test_sliders_of_a_notebook_change_what_is_shown(run, found):
    box = explore.panel(run, found, run.profile.generation)
    prompt, off, number, factor, times, seed, samples, shown = box.children
    first, most = shown.value, len(found[0].order)
    assert f"0 of {most} neurons off" in first
    # What a viewer shows that knows no widgets, and trusts no SVG.
    still = box._repr_mimebundle_()["text/html"]
    assert f"0 of {most} neurons off" in still
    assert "<svg" not in still
    assert still.count("<img") == still.count('alt="') == 3
    # Handles get the names of their labels, by a script that only what a kernel shows has.
    assert "aria-label" in shown.value
    assert "onload" not in still

    number.value = off.max
    assert f"{most} of {most} neurons off" in shown.value
    assert shown.value.count('class="off"') == most
    times.value = -0.5
    assert factor.value == -0.5
    assert f"{most} of {most} neurons times \N{MINUS SIGN}0.5" in shown.value
    before = shown.value
    seed.value += 1
    assert shown.value != before
    samples.value = 1
    prompt.value = min(found, key=lambda item: len(item.order))
    assert off.value == off.max == number.max == len(prompt.value.order)
    assert shown.value.count('class="off"') == off.max
    for item in box.children[:-1]:
        assert item.description


def test_the_map_has_every_neuron_with_its_z(run, found):
    shown = explore.rendered("frame.html", frame=explore.frame(run, found[0], 0, settings=run.profile.generation))
    titles = re.findall(r"<title>layer (\d), neuron (\d+): z (\S+)</title>", shown)
    assert len(titles) == sum(map(len, found[0].z))
    for layer, neuron, z in titles:
        value = found[0].z[int(layer) - 1][int(neuron)]
        assert float(z.replace("\N{MINUS SIGN}", "-")) == pytest.approx(value, abs=0.051)


def test_a_page_is_one_file_that_asks_for_nothing(page, run, found, monkeypatch):
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < explore.LARGEST_PAGE
    assert not re.findall(r"https?:(?!//www.w3.org/2000/svg)|<link|@import|src=\"(?!data:)", text)
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", text))
    assert re.findall(r'<label for="(\w+)">.*\n?<(?:select|input) id="(\w+)"', text) == [
        (name, name) for name in ("prompt", "off", "factor")
    ]
    assert "odd &lt;b&gt; &amp; pin" in text
    assert "<b> &" not in text
    monkeypatch.setattr(explore, "LARGEST_PAGE", 1000)
    with pytest.raises(ValueError, match="give fewer prompts or samples"):
        explore.write_page(run, found[:1], run.profile.generation)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

MOVED = """<script>
const shown = [], note = () => {
  const section = document.querySelector('section:not([hidden])'), image = section.querySelector('.frame');
  const spoken = Array.from(document.querySelectorAll('input'), slider => slider.ariaValueText);
  shown.push([image.src, image.alt, section.querySelector('.text').textContent, section.querySelectorAll('span.off').length,
              spoken, location.hash]);
};
const move = (name, value) => {
  const item = document.getElementById(name);
  item.value = value;
  item.dispatchEvent(new Event('input'));
  note();
};
note();
move('off', 0); move('off', 1); move('off', 99); move('factor', factors.indexOf(-0.25)); move('prompt', 1);
history.replaceState(null, '', '#prompt=1&off=2'); fromAddress(); note();
document.body.dataset.shown = JSON.stringify(shown);
</script>"""
"""What is done in a browser; it leaves in the page what was seen after each step."""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.slow
def test_in_a_browser_sliders_and_addresses_choose_the_frame(page, run, found, tmp_path):
    (tmp_path / "page.html").write_text(page.read_text(encoding="utf-8") + MOVED, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    address = f"{(tmp_path / 'page.html').as_uri()}#prompt=0&factor=-1"
    done = subprocess.run([CHROMIUM, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, "an error of the page"
    shown = iter(json.loads(BeautifulSoup(done.stdout, "html.parser").body["data-shown"]))
    item, other = found
    most = len(item.order)
    for one, off, factor in (
        (item, most, -1.0), (item, 0, 0.0), (item, 1, 0.0), (item, most, 0.0), (item, most, -0.25), (other, 0, 0.0),
        (other, 2, 0.0),
    ):  # fmt: skip
        frame = explore.frame(run, one, off, factor, settings=run.profile.generation)
        spoken = [f"{off} of {len(one.order)}", f"{factor:g}".replace("-", "\N{MINUS SIGN}")]
        hash = f"#prompt={found.index(one)}&off={off}&factor={factor:g}"
        assert next(shown) == [frame.source, frame.text, frame.text, off, spoken, hash]
