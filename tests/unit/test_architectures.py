import json
import shutil

import pytest
import torch

from nemolib.layers import STABLE_DIFFUSION_WIDTHS, widths
from nemolib.pipeline import ARCHITECTURES, PipelineError, is_hub_id, load_pipeline, random_pipeline
from tests.narrow_architecture import save_narrow_architecture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_narrow_architecture(tmp_path_factory.mktemp("architecture"))


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(f"random:{folder}", device="cpu")


def test_sd14_has_the_shapes_of_stable_diffusion():
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    read = {
        part: json.loads((ARCHITECTURES / "sd14" / f"{part}.json").read_text())
        for part in ("unet", "vae", "text_encoder")
    }
    with init_empty_weights():
        unet, vae = UNet2DConditionModel(**read["unet"]), AutoencoderKL(**read["vae"])
        text = CLIPTextModel(CLIPTextConfig(**read["text_encoder"]))
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in (unet, vae, text)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    assert widths(unet) == STABLE_DIFFUSION_WIDTHS
    assert sum("attn2.to_v" in name for name, _ in unet.named_modules()) == 16


def test_weights_are_drawn_in_the_type_of_the_profile_and_nothing_is_said(folder, capfd):
    pipe = load_pipeline(f"random:{folder}", device="cpu", dtype="bfloat16")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    # PyTorch draws weights of a layer uniformly, within one over the root of its inputs.
    bound = pipe.unet.conv_in.weight[0].numel() ** -0.5
    assert pipe.unet.conv_in.weight.float().std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert torch.get_default_dtype() == torch.float32
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_weights_are_always_the_same_and_random_numbers_stay(folder):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    one, same = (random_pipeline(folder).unet.state_dict()[name] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)


def test_letters_have_the_numbers_of_clip(pipe):
    # 320 is "a</w>" in CLIP's vocabulary, 49406 and 49407 begin and end a text.
    assert pipe.tokenizer("a")["input_ids"] == [49406, 320, 49407]
    assert len(pipe.tokenizer("word " * 99, truncation=True)["input_ids"]) == 77


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "Expecting property name"), ('{"channels": 3}', "unexpected keyword.*channels"), (None, "No such file")],
)
def test_a_broken_or_unknown_architecture_is_named(folder, tmp_path, text, words):
    with pytest.raises(PipelineError, match="no architecture 'sd15'; known: sd14; or give a folder with unet.json"):
        load_pipeline("random:sd15")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "vae.json").unlink()
    if text is not None:
        (broken / "vae.json").write_text(text)
    with pytest.raises(PipelineError, match=rf"broken: vae\.json does not describe its part .*{words}"):
        random_pipeline(broken)


def test_hub_ids_and_folders():
    assert is_hub_id("CompVis/stable-diffusion-v1-4")
    assert not any(map(is_hub_id, ("data/tiny", "random:sd14", "/a/folder", "folder")))
