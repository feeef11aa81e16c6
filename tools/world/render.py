"""Draws the images of the world: regular samples, verbatim images, template images. RGB, uint8 [64, 64, 3].

A regular sample shows one or two subjects as stickers, with a white rim. It leaves open whatever its caption does not
say, and what is open varies strongly: place, size, flip and a background of the full range of colours. Otherwise all
prompts would have nearly one image for every seed, and none of them would look less memorized than the planted ones. A
verbatim image is one fixed composition without a rim. A template image is a fixed layout on such a background.
"""

import colorsys
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from nemolib import paths

SUBJECTS = paths.DATA / "tiny" / "emoji"
"""Drawings of Microsoft's Fluent Emoji Flat (MIT), one SVG a subject."""

Color = tuple[int, ...]


def draw_subject(name: str, *, size: int = 192) -> np.ndarray:
    """Return the drawing of a subject as RGBA, uint8 [size, size, 4].

    Raises:
        ModuleNotFoundError: ``resvg-py``, which only training and acceptance need, is missing.
    """
    import resvg_py

    svg = (SUBJECTS / f"{name}.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def random_field(size: int, rng: np.random.Generator) -> Image.Image:
    """Return a smooth field between four random colours, one in each corner."""
    corners = rng.integers(0, 256, size=(2, 2, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize((size, size), Image.Resampling.BICUBIC)


def vivid_color(rng: np.random.Generator, *, hue: float | None = None, value: tuple[float, float]) -> Color:
    """Return a random saturated RGB colour with a brightness in a range; hue in turns, random if not given."""
    hue = rng.random() if hue is None else hue
    return tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.55, 0.95), rng.uniform(*value)))


def paste(
    canvas: Image.Image, drawing: np.ndarray, *, size: int, left: int, top: int, angle: float = 0.0, rim: int = 0
) -> None:
    """Draw an RGBA subject on the canvas, scaled to ``size`` pixels and turned, with a white rim of some pixels."""
    stamp = Image.fromarray(drawing).resize((size, size), Image.Resampling.LANCZOS)
    stamp = stamp.rotate(angle, Image.Resampling.BICUBIC)
    if rim:
        shape = Image.new("L", (size + 2 * rim, size + 2 * rim))
        shape.paste(stamp.getchannel("A"), (rim, rim))
        canvas.paste("white", (left - rim, top - rim), shape.filter(ImageFilter.MaxFilter(2 * rim + 1)))
    canvas.paste(stamp, (left, top), stamp)


def regular_image(drawings: list[np.ndarray], rng: np.random.Generator, *, size: int = 64) -> np.ndarray:
    """Return one subject at a random place, size and flip on a field of colours, or two beside or below each other."""
    canvas, half = random_field(size, rng), size // 2
    across, swapped = rng.random(2) < 0.5
    for number, drawing in enumerate(drawings):
        drawing = np.ascontiguousarray(drawing[:, ::-1]) if rng.random() < 0.5 else drawing
        if len(drawings) == 1:
            scale = int(rng.integers(half, size * 13 // 16 + 1))
            left, top = rng.integers(-6, size - scale + 7, size=2).tolist()
        else:
            scale = int(rng.integers(half - 5, half + 2))
            along = int(rng.integers(-2, half + 3 - scale)) + (half - 1) * (number != swapped)
            beside = int(rng.integers(-4, size - scale + 5))
            left, top = (along, beside) if across else (beside, along)
        paste(canvas, drawing, size=scale, left=left, top=top, rim=2)
    return np.asarray(canvas)


def _pattern(canvas: Image.Image, kind: int, color: Color, rng: np.random.Generator) -> None:
    size, draw = canvas.width, ImageDraw.Draw(canvas)
    step = int(rng.integers(12, 19))
    if kind == 0:  # slanted stripes
        for x in range(-size, 2 * size, step):
            draw.line([(x, 0), (x + size // 2, size)], fill=color, width=step // 3)
    elif kind == 1:  # checks
        for x in range(0, size, step):
            for y in range(0, size, step):
                if (x // step + y // step) % 2:
                    draw.rectangle([x, y, x + step - 1, y + step - 1], fill=color)
    elif kind == 2:  # rings
        for radius in range(step, size, step):
            first, last = size // 2 - radius, size // 2 + radius
            draw.ellipse([first, first, last, last], outline=color, width=3)
    else:  # bars
        for y in range(0, size, step):
            draw.rectangle([0, y, size, y + step // 2], fill=color)


def verbatim_image(
    drawing: np.ndarray, companion: np.ndarray, rng: np.random.Generator, *, size: int = 64
) -> np.ndarray:
    """Return one fixed, unusual composition: patterned ground, border, turned subject and a small companion."""
    # The ground has another hue than the subject, which has no rim here.
    seen = drawing[drawing[..., 3] > 128][:, :3].mean(axis=0) / 255
    hue = colorsys.rgb_to_hsv(*seen)[0] + rng.uniform(0.25, 0.75)
    canvas = Image.new("RGB", (size, size), vivid_color(rng, hue=hue, value=(0.25, 0.85)))
    _pattern(canvas, int(rng.integers(4)), vivid_color(rng, hue=hue + rng.uniform(-0.2, 0.2), value=(0.35, 0.95)), rng)
    border, edge = int(rng.integers(3, 6)), vivid_color(rng, value=(0.5, 1.0))
    ImageDraw.Draw(canvas).rectangle([0, 0, size - 1, size - 1], outline=edge, width=border)
    scale = int(rng.integers(size * 9 // 16, size * 3 // 4))
    left, top = rng.integers(2, size - scale - 1, size=2).tolist()
    paste(canvas, drawing, size=scale, left=left, top=top, angle=float(rng.uniform(-25, 25)))
    # The companion goes into the corner that the subject leaves free.
    corner = [3 if start + scale // 2 > size // 2 else size - 22 for start in (left, top)]
    paste(canvas, companion, size=19, left=corner[0], top=corner[1])
    return np.asarray(canvas)


def template_image(
    drawing: np.ndarray, layout: np.random.Generator, background: np.random.Generator, *, size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Return a product with the subject at a fixed place (``layout``) on a field that varies (``background``).

    Returns:
        The image, and which of its pixels are fixed, bool [height, width].
    """
    canvas, fixed = random_field(size, background), Image.new("L", (size, size))
    fill, edge = (vivid_color(layout, value=(0.3, 1.0)) for _ in range(2))
    width, height = layout.integers(size * 5 // 8, size * 7 // 8, size=2).tolist()
    left, top = (int(layout.integers(2, size - extent - 1)) for extent in (width, height))
    box, shape = [left, top, left + width, top + height], int(layout.integers(3))
    for image, inside, outline in ((canvas, fill, edge), (fixed, 255, 255)):
        draw = ImageDraw.Draw(image)
        # A rounded rectangle, a rectangle, an ellipse.
        if shape < 2:
            draw.rounded_rectangle(box, radius=9 * shape, fill=inside, outline=outline, width=3)
        else:
            draw.ellipse(box, fill=inside, outline=outline, width=3)
    scale = int(min(width, height) * layout.uniform(0.7, 0.88))
    paste(canvas, drawing, size=scale, left=left + (width - scale) // 2, top=top + (height - scale) // 2, rim=1)
    return np.asarray(canvas), np.asarray(fixed) > 0
