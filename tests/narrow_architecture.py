"""Stable Diffusion v1's architecture, narrow: the same blocks and layers, a hundredth of the work."""

import json
from pathlib import Path

from nemolib.pipeline import ARCHITECTURES, PARTS

WIDTHS = (16, 16, 32, 32, 32, 32, 32)
"""Neurons of the value layers."""

_CHANGES = {
    "unet": {
        "block_out_channels": [16, 32, 32, 32],
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "projection_dim": 32}
    | {"num_attention_heads": 4},
    "scheduler": {},
}


def save_narrow_architecture(folder: Path, *, side: int = 16) -> Path:
    """Write the files of a narrow architecture with latents of a side; what is not changed is the real one's."""
    sides = {"unet": {"sample_size": side}, "vae": {"sample_size": 8 * side}}
    for part in PARTS:
        config = json.loads((ARCHITECTURES / "sd14" / f"{part}.json").read_text())
        changed = config | _CHANGES[part] | sides.get(part, {})
        (folder / f"{part}.json").write_text(json.dumps(changed))
    return folder
