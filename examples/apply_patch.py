"""Repair a Stable Diffusion pipeline with a patch that nemolib wrote; nemolib itself is not needed.

    python apply_patch.py MODEL neurons.safetensors REPAIRED

MODEL is a folder or a hub id, REPAIRED the folder that is written. A patch says which weights
it fits: another model, and one that it was applied to already, is refused. In your own program:
`apply_patch(pipe.unet, "neurons.safetensors")`.
"""

import hashlib
import json
import sys

import safetensors
from diffusers import StableDiffusionPipeline


def apply_patch(unet, path):
    """Write the rows of a patch into a UNet; raise a ValueError if the patch fits another one."""
    with safetensors.safe_open(path, "pt") as file:
        about, digest = file.metadata(), hashlib.sha256()
        for name in json.loads(about["layers"]):
            weight = unet.get_submodule(name).weight.detach().cpu()
            digest.update(f"{name}:{len(weight)}".encode() + weight.half().numpy().tobytes())
        if digest.hexdigest() != about["fits"]:
            raise ValueError("the patch belongs to another model, or is applied already")
        for name in json.loads(about["parameters"]):
            parameter = unet.get_parameter(name).data
            parameter[file.get_tensor(f"{name}:rows")] = file.get_tensor(name).to(parameter)


if __name__ == "__main__":
    model, patch, repaired = sys.argv[1:]
    pipe = StableDiffusionPipeline.from_pretrained(model, use_safetensors=True)
    apply_patch(pipe.unet, patch)
    pipe.save_pretrained(repaired)
