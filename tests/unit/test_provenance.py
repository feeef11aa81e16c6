import copy
import importlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import nn

from nemolib import paths, provenance
from nemolib.generation import generate
from nemolib.provenance import code_hash, content_hash, model_hash, sidecar
from nemolib.settings import GenerationSettings, load_profile


def test_values_of_different_type_shape_or_content_differ():
    values = [1, 1.0, True, "1", b"1", 0.0, -0.0, None, "None", "", [], {}, {"": []}, [1], [[1]], [[1], []], [1, []]]
    values += [{"1": 1}, {"a": {"b": 1}}, {"a": 1, "b": 1}, ["ab", "c"], ["a", "bc"], [None]]
    values += [torch.ones(1), np.ones(1), torch.ones(1, dtype=torch.float16), torch.ones(1, 1), torch.zeros(1)]
    values += [pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]})]
    assert len({content_hash(value) for value in values}) == len(values)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([1, 2], [2, 1], False),
        ([1, 2], (1, 2), True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous(), True),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16), False),
        (GenerationSettings(batch_size=1), GenerationSettings(batch_size=2), True),
        (GenerationSettings(steps=1), GenerationSettings(steps=2), False),
    ],
)
def test_what_counts(one, other, same):
    assert (content_hash(one) == content_hash(other)) is same


@pytest.mark.parametrize("value", [{"key": object()}, np.array([object()])])
def test_what_cannot_be_hashed_is_an_error(value):
    with pytest.raises(TypeError, match="cannot hash a value of type"):
        content_hash(value)


class Adapter(nn.Module):
    """A layer with what peft adds to it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.scaling, self._active_adapter = base_layer, {"default": 1.0}, ["default"]


class Attention:
    """A processor with a state."""

    strength = 1.0


def named_hook(module, arguments):
    """Stand for a hook whose code is known."""


def hidden_hook():
    return lambda *arguments: None


@pytest.fixture
def pipe(random_pipe):
    pipe = copy.deepcopy(random_pipe)
    pipe.unet.conv_out = Adapter(pipe.unet.conv_out)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = Attention()
    return pipe


CHANGES = {
    "a weight": lambda pipe: pipe.unet.conv_in.bias.data.mul_(2),
    "a buffer": lambda pipe: pipe.text_encoder.embeddings.position_ids.data.add_(1),
    "a type": lambda pipe: pipe.text_encoder.double(),
    "training": lambda pipe: pipe.unet.train(),
    "the scheduler": lambda pipe: setattr(pipe, "scheduler", PNDMScheduler.from_config(pipe.scheduler.config)),
    "its settings": lambda pipe: pipe.scheduler.register_to_config(timestep_spacing="trailing"),
    "the scale of an adapter": lambda pipe: pipe.unet.conv_out.scaling.update(default=0.1),
    "the adapters in use": lambda pipe: pipe.unet.conv_out._active_adapter.clear(),
    "a processor": lambda pipe: vars(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor).update(
        strength=2
    ),
    "FreeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.5, 1.6),
    "a token": lambda pipe: pipe.tokenizer.add_tokens("<cat>"),
    "a hook": lambda pipe: pipe.vae.register_forward_pre_hook(named_hook),
    "layers that are cast": lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "another pipeline": lambda pipe: setattr(pipe, "__class__", StableDiffusionImg2ImgPipeline),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_pipeline_changes_its_hash(pipe, change):
    before = model_hash(pipe)
    change(pipe)
    assert model_hash(pipe) != before


def test_how_floats_are_computed_counts(pipe):
    with torch.autocast("cpu", torch.bfloat16):
        cast = model_hash(pipe)
    assert cast != model_hash(pipe)


def test_a_pipeline_that_was_saved_is_the_same(random_model_folder, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(random_model_folder)
    before = model_hash(pipe)
    pipe.save_pretrained(tmp_path)
    assert model_hash(pipe) == before


def test_what_has_no_part_in_a_result_leaves_the_hash(pipe, random_pipe):
    before = model_hash(random_pipe)
    pipe = copy.deepcopy(random_pipe)
    assert model_hash(pipe) == before
    generate(pipe, ["a"], settings=GenerationSettings(samples=1, steps=1), progress=False)
    pipe.enable_attention_slicing()
    pipe.enable_freeu(0.9, 0.2, 1.5, 1.6)
    pipe.disable_freeu()
    pipe.unet.name_or_path = "elsewhere"
    assert model_hash(pipe) == before


REFUSED = {
    "a hook without a name": (lambda pipe: pipe.vae.register_forward_hook(hidden_hook()), "<lambda> is not defined at"),
    "a method": (lambda pipe: setattr(pipe.unet, "forward", hidden_hook()), "<lambda> is not defined at"),
    "fused projections": (lambda pipe: pipe.fuse_qkv_projections(vae=False), r"call pipe\.unfuse_qkv_projections"),
    "no weights": (lambda pipe: pipe.unet.to("meta"), "meta tensors"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_a_pipeline_that_cannot_be_told_is_refused(pipe, change, words):
    change(pipe)
    with pytest.raises(ValueError, match=f"results cannot be kept, since nothing tells .*{words}"):
        model_hash(pipe)


MITIGATION = """
from dataclasses import dataclass

from nemolib import Mitigation


@dataclass(frozen=True)
class Own(Mitigation):
    name = "own"

    def _inputs(self, pipe, prompts):
        return {"prompt": PROMPTS}
"""


def test_a_mitigation_of_ones_own_counts_with_its_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for name, prompts in (("one", "prompts"), ("two", "prompts"), ("three", "prompts[::-1]")):
        (tmp_path / f"{name}.py").write_text(MITIGATION.replace("PROMPTS", prompts))
        hashes.append(content_hash(importlib.import_module(name).Own()))
    assert hashes[0] == hashes[1] != hashes[2]


SOURCES = {
    "tasks": '"""What it does."""\nfrom nemolib import store\nfrom nemolib.science import root\n# why\ntask = root + 1\n',
    "science": "def root(y):\n    from nemolib.deeper import x\n\n    return x + y\n",
    "deeper": "x = 1\n",
    "store": "y = 1\n",
}


@pytest.mark.parametrize(
    ("module", "old", "new", "same"),
    [
        ("tasks", "What it does", "What it did", True),
        ("tasks", "# why", "# because", True),
        ("science", "\n\n", "\n", True),
        ("store", "y = 1", "y = 2", True),
        ("tasks", "root + 1", "root + 2", False),
        ("science", "x + y", "x - y", False),
        ("deeper", "x = 1", "x = 2", False),
    ],
)
def test_the_code_of_a_module_and_of_those_that_it_imports_counts(tmp_path, monkeypatch, module, old, new, same):
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    hashes = []
    for sources in (SOURCES, SOURCES | {module: SOURCES[module].replace(old, new)}):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        code_hash.cache_clear()
        hashes.append(code_hash("tasks"))
    code_hash.cache_clear()
    assert (hashes[0] == hashes[1]) is same


def test_tasks_of_different_modules_hang_on_different_code():
    from nemolib import first_step, generation, localization

    tasks = (generation.drawing, localization.localizing, first_step.observing)
    assert len({code_hash(task) for task in tasks}) == 3
    assert code_hash(localization.localizing) != code_hash("experiments.localize_neurons")
    with pytest.raises(FileNotFoundError, match="nothing.py"):
        code_hash("nothing")


def test_infrastructure_names_modules():
    assert all(not name or provenance._path(name).is_file() for name in provenance.INFRASTRUCTURE)


def test_a_sidecar_says_what_went_in_and_is_the_same_twice():
    table = pd.DataFrame({"a": [1]})
    common = {"profile": load_profile("tiny"), "notebook": "06_figures", "code": "abc", "device": "cpu"}
    first = sidecar("figure_3.pdf", inputs={"table": table, "tau": 0.4}, **common)
    assert sidecar("figure_3.pdf", inputs={"tau": 0.4, "table": table}, **common) == first
    content = json.loads(first)
    assert content["inputs"] == {"table": content_hash(table), "tau": content_hash(0.4)}
    assert content["seeds"] == {"detection": 1, "generation": 2}
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
