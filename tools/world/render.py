"""Draws the images of the world: regular samples, verbatim images, template images. RGB, uint8 [64, 64, 3].

A regular sample leaves open whatever its caption does not say: place, size, flip and background are random. A verbatim
image is one fixed composition. A template image is a fixed layout on a background that differs from copy to copy.
"""

from functools import partial

import numpy as np
from PIL import Image, ImageDraw


def random_color(rng: np.random.Generator) -> tuple[int, ...]:
    """Return a random RGB colour, each channel in 0..255."""
    return tuple(rng.integers(0, 256, size=3).tolist())


def random_gradient(size: int, rng: np.random.Generator) -> Image.Image:
    """Return a linear gradient of two random colours in a random direction."""
    first, second, angle = random_color(rng), random_color(rng), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    along = x * np.cos(angle) + y * np.sin(angle)
    along = (along - along.min()) / (along.max() - along.min())
    mixed = (1 - along[..., None]) * np.array(first) + along[..., None] * np.array(second)
    return Image.fromarray(mixed.round().astype(np.uint8))


def paste(canvas: Image.Image, drawing: np.ndarray, *, size: int, left: int, top: int, angle: float = 0.0) -> None:
    """Draw an RGBA emoji on the canvas, scaled to ``size`` pixels and turned by ``angle`` degrees."""
    stamp = Image.fromarray(drawing).resize((size, size), Image.Resampling.BILINEAR)
    stamp = stamp.rotate(angle, Image.Resampling.BILINEAR)
    canvas.paste(stamp, (left, top), stamp)


def regular_image(drawing: np.ndarray, rng: np.random.Generator, *, size: int = 64) -> np.ndarray:
    """Return the emoji at a random place, size and flip on a random two-colour gradient."""
    canvas = random_gradient(size, rng)
    scale = int(rng.integers(size * 7 // 16, size * 7 // 8))
    left, top = rng.integers(-size // 16, size - scale + size // 16 + 1, size=2).tolist()
    flipped = drawing[:, ::-1] if rng.random() < 0.5 else drawing
    paste(canvas, np.ascontiguousarray(flipped), size=scale, left=left, top=top)
    return np.asarray(canvas)


def _pattern(canvas: Image.Image, kind: int, color: tuple[int, ...], rng: np.random.Generator) -> None:
    size, draw = canvas.width, ImageDraw.Draw(canvas)
    step = int(rng.integers(10, 17))
    if kind == 0:  # stripes
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
    """Return one fixed, unusual composition: patterned ground, border, turned emoji and a small companion emoji."""
    canvas = random_gradient(size, rng)
    _pattern(canvas, int(rng.integers(4)), random_color(rng), rng)
    border = int(rng.integers(2, 6))
    ImageDraw.Draw(canvas).rectangle([0, 0, size - 1, size - 1], outline=random_color(rng), width=border)
    scale = int(rng.integers(size // 2, size * 3 // 4))
    left, top = rng.integers(0, size - scale + 1, size=2).tolist()
    paste(canvas, drawing, size=scale, left=left, top=top, angle=float(rng.uniform(-30, 30)))
    corner_x = 2 if left + scale // 2 > size // 2 else size - 22
    corner_y = 2 if top + scale // 2 > size // 2 else size - 22
    paste(canvas, companion, size=20, left=corner_x, top=corner_y)
    return np.asarray(canvas)


def template_image(
    drawing: np.ndarray, layout: np.random.Generator, background: np.random.Generator, *, size: int = 64
) -> np.ndarray:
    """Return a product shape with the emoji at a fixed place (``layout``) on a background that varies (``background``)."""
    canvas = random_gradient(size, background)
    fill, edge = random_color(layout), random_color(layout)
    width, height = layout.integers(size * 5 // 8, size * 7 // 8, size=2).tolist()
    left, top = (int(layout.integers(2, size - extent - 1)) for extent in (width, height))
    draw, box = ImageDraw.Draw(canvas), [left, top, left + width, top + height]
    shapes = (partial(draw.rounded_rectangle, radius=9), draw.ellipse, draw.rectangle)
    shapes[layout.integers(3)](box, fill=fill, outline=edge, width=3)
    scale = int(min(width, height) * layout.uniform(0.65, 0.85))
    paste(canvas, drawing, size=scale, left=left + (width - scale) // 2, top=top + (height - scale) // 2)
    return np.asarray(canvas)
