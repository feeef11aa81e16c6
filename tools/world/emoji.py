"""The subjects of the world: drawings of Microsoft's Fluent Emoji Flat (MIT), kept as SVG in ``data/tiny/emoji``."""

import io

import numpy as np
from PIL import Image

from nemolib import paths

FOLDER = paths.DATA / "tiny" / "emoji"


def draw_subject(name: str, *, size: int = 192) -> np.ndarray:
    """Return the drawing of a subject as RGBA, uint8 [size, size, 4].

    Raises:
        ModuleNotFoundError: ``resvg-py``, which only training needs, is missing.
    """
    import resvg_py

    svg = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
