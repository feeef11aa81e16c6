"""Captions, images, pipelines and clusters as people have them."""

import io

import dask
import distributed.config  # noqa: F401 - brings Dask's settings with it
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from matplotlib.text import Text
from PIL import Image
from transformers import CLIPImageProcessor

from nemolib import exhibits, plots, workers
from nemolib.batching import check_prompts
from nemolib.generation import generate
from nemolib.pipeline import PipelineError, embed
from nemolib.run import Run
from nemolib.settings import GenerationSettings, load_profile
from nemolib.store import Grid, read_table, write_table

CAPTIONS = ["Was $40, now $20 only", r"poster $\frac$ print", "$$", "two\nlines", "a | b", "007", "True", "NA"]


def test_captions_are_drawn_as_they_stand():
    figure = plots.image_grid(Grid(np.zeros((8, 3, 16, 16, 3), np.uint8), tuple(CAPTIONS), tuple(CAPTIONS[:3])))
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert len(texts) == 11
    assert not any(text._preprocess_math(text.get_text())[1] for text in texts)
    figure.savefig(io.BytesIO(), format="png")


def test_a_caption_is_one_cell_of_a_table_in_markdown():
    lines = exhibits.markdown(pd.DataFrame({"prompt": CAPTIONS, "neurons": 3})).splitlines()
    assert len(lines) == 10
    assert {line.replace(r"\|", "").count("|") for line in lines} == {3}
    assert "$" not in "".join(lines).replace(r"\$", "")


@pytest.mark.parametrize(
    "kept", [CAPTIONS, ["a carriage\rreturn", "a cat"], ["007", "1984"], ["True", "False"], ["1e3", "nan"]]
)
def test_captions_are_read_as_they_were_written(tmp_path, kept):
    table = pd.DataFrame({"caption": kept, "prompt": kept, "score": np.linspace(0.1, 0.7, len(kept))})
    write_table(table, tmp_path / "scores.csv")
    found = read_table(tmp_path / "scores.csv")
    pd.testing.assert_frame_equal(found, table, check_exact=True)
    assert check_prompts(found["caption"]) == kept


@pytest.mark.parametrize(
    ("image", "corner"),
    [
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 255),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 255)), 0),
        (Image.new("LA", (8, 8), (0, 0)), 255),
        (Image.new("RGB", (8, 8), (9, 9, 9)), 9),
        (Image.fromarray(np.full((8, 8), 51400, np.uint16)), 200),
        (Image.new("1", (8, 8), 1), 255),
    ],
    ids=["transparent", "opaque", "grey and transparent", "plain", "16 bits", "1 bit"],
)
def test_a_planted_image_is_seen_as_a_browser_shows_it(tmp_path, monkeypatch, image, corner):
    image.save(tmp_path / "planted.png")
    monkeypatch.setattr("nemolib.run.prompts.image_paths", lambda rows, profile: [tmp_path / "planted.png"])
    (pixels,) = Run(load_profile("tiny"), pipe=None).planted_images(pd.DataFrame({"image": ["planted.png"]}))
    assert pixels.shape == (8, 8, 3)
    assert pixels[0, 0].tolist() == [corner] * 3


@pytest.fixture
def pipe(random_model_folder):
    return StableDiffusionPipeline.from_pretrained(random_model_folder, safety_checker=None)


class _Checker(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, flags):
        super().__init__()
        self.flags = flags

    def forward(self, clip_input, images):
        return images * 0, self.flags


def test_blackened_images_are_an_error_that_names_the_prompt(pipe):
    pipe.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    settings = GenerationSettings(seed=2, samples=1, steps=2, guidance=3.0)
    pipe.safety_checker = _Checker([False, True])
    with pytest.raises(ValueError, match=r"safety checker blackened an image of prompt 'a cat'.*safety_checker = None"):
        generate(pipe, ["a fox", "a cat"], settings=settings, progress=False)
    pipe.safety_checker = _Checker([False, False])
    assert generate(pipe, ["a fox", "a cat"], settings=settings, progress=False).shape[:2] == (2, 1)


def test_text_goes_through_the_pipelines_own_encoder(pipe):
    """A learnt token of two vectors is two tokens."""
    width = pipe.text_encoder.config.hidden_size
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<thing>": vectors}, token="<thing>")
    ours, theirs = embed(pipe, ["a <thing>"]), pipe.encode_prompt("a <thing>", "cpu", 1, False)[0]
    assert torch.equal(ours, theirs)
    once = pipe.tokenizer("a <thing>", padding="max_length", return_tensors="pt").input_ids
    assert not torch.equal(ours, pipe.text_encoder(once)[0])


def test_a_text_encoder_that_is_offloaded_is_named(pipe):
    """Diffusers itself fails then, without a word of why."""
    cpu_offload(pipe.text_encoder, execution_device=torch.device("cpu"))
    with pytest.raises(PipelineError, match="text encoder cannot be used where its weights are offloaded"):
        embed(pipe, ["a fox"])


@pytest.mark.parametrize(
    ("choice", "required"), [("tls://127.0.0.1:8786", False), ("tcp://127.0.0.1:8786", True)], ids=["tls", "required"]
)
def test_encryption_that_does_not_fit_is_named(monkeypatch, choice, required):
    monkeypatch.setenv(workers.VARIABLE, choice)
    with (
        dask.config.set({"distributed.comm.require-encryption": required}),
        pytest.raises(workers.WorkersError, match=r"encryption.*distributed\.comm\.tls"),
        workers.cluster(load_profile("tiny")),
    ):
        pass
