"""How figures look: sizes and fonts of the NeurIPS style as plain data, fixed colours of roles, saving with provenance."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemolib import paths
from nemolib.files import write_atomic
from nemolib.provenance import write_sidecar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT_WIDTH = 5.5
"""Width of the text in the NeurIPS style, in inches."""

LABEL_SIZE, TICK_SIZE = 9, 7
"""Sizes of labels and of ticks and legends, in points."""

LINE = 0.6
"""Width of axes and ticks, in points; all other widths are multiples of it."""

GOLDEN = 0.618

SCREEN = 110
"""Dots per inch of a figure in a notebook that shows all of them; files are written with 300."""

FONTS = ["STIXGeneral", "DejaVu Serif"]
"""A Times-like font that comes with matplotlib, so that a figure has the same bytes on every machine."""


@dataclass(frozen=True, slots=True)
class Role:
    """How one kind of prompt or condition looks: a colour, and a second cue for those who cannot tell the colours.

    Attributes:
        label: What a legend calls it.
        color: One of Okabe and Ito's eight colours, or grey.
        marker: Marker of its points.
        line: Style of its line.
        hatch: Hatch of its bars.
    """

    label: str
    color: str
    marker: str
    line: str
    hatch: str


ROLES: dict[str, Role] = {
    "vm": Role("verbatim (VM)", "#D55E00", "o", "-", ""),
    "tm": Role("template (TM)", "#0072B2", "s", "--", "////"),
    "unmemorized": Role("unmemorized", "#009E73", "^", ":", "...."),
    "ladder": Role("duplication ladder", "#CC79A7", "D", "-.", "xxxx"),
    "deactivated": Role("neurons deactivated", "#56B4E9", "v", (0, (1, 1)), "----"),
    "holdout": Role("holdout", "#7F7F7F", "x", (0, (4, 1, 1, 1)), "\\\\\\\\"),
}
"""The look of each role, the same in every figure."""

ROLE_COLORS: dict[str, str] = {name: role.color for name, role in ROLES.items()}
"""The colour of each role."""

SEQUENTIAL = "viridis"
"""Colour map of quantities."""


def role(name: str) -> Role:
    """Return the look of a role.

    Raises:
        KeyError: The role is unknown; the message names those known.
    """
    if name not in ROLES:
        raise KeyError(f"unknown role {name!r}; known roles: {', '.join(ROLES)}")
    return ROLES[name]


def neurips(fraction: float = 1.0, *, aspect: float = GOLDEN) -> dict[str, Any]:
    """Return matplotlib's settings for a figure of the NeurIPS style, to be used in ``matplotlib.rc_context``.

    Args:
        fraction: Width as a share of the text width, in (0, 1].
        aspect: Height divided by width.

    Returns:
        Names and values of rcParams; nothing is changed.

    Raises:
        ValueError: The fraction is outside (0, 1], or the aspect is not positive.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; a share of the text width is in (0, 1]")
    if aspect <= 0:
        raise ValueError(f"aspect is {aspect}; height divided by width must be positive")
    width = TEXT_WIDTH * fraction
    return {
        "figure.figsize": (width, width * aspect),
        "figure.constrained_layout.use": True,
        "figure.dpi": 150,
        "font.size": LABEL_SIZE,
        # The family itself and not "serif": that name would be looked up when the figure is drawn, outside the context.
        "font.family": FONTS,
        "mathtext.fontset": "cm",
        "text.usetex": False,
        "axes.labelsize": LABEL_SIZE,
        "axes.titlesize": LABEL_SIZE,
        "xtick.labelsize": TICK_SIZE,
        "ytick.labelsize": TICK_SIZE,
        "legend.fontsize": TICK_SIZE,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": LINE,
        "xtick.major.width": LINE,
        "ytick.major.width": LINE,
        "xtick.minor.width": LINE / 2,
        "ytick.minor.width": LINE / 2,
        "lines.linewidth": 2 * LINE,
        "lines.markersize": 5 * LINE,
        "patch.linewidth": LINE,
        "hatch.linewidth": LINE / 2,
        "grid.linewidth": LINE / 2,
        "image.interpolation": "nearest",
        "image.cmap": SEQUENTIAL,
        "savefig.bbox": None,
        "pdf.fonttype": 42,
    }


def save_figure(
    figure: Figure,
    stem: str | Path,
    *,
    profile: str,
    notebook: str,
    inputs: Mapping[str, Any] | None = None,
    seeds: Mapping[str, int] | None = None,
    device: str = "cpu",
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write a figure as PDF and as PNG of 300 dpi, and beside them a JSON file that says what it was made from.

    Neither time nor machine is written: saving again without a change gives the same bytes.

    Args:
        figure: The figure.
        stem: Name without suffix in ``figures/<profile>/``, or a path without suffix.
        profile: Name of the profile.
        notebook: Name of the notebook that made the figure.
        inputs: What was drawn: name -> DataFrame, Path, array or plain value; hashes go to the JSON file.
        seeds: Name -> seed.
        device: Type of device that computed the data.
        notes: Further plain values for the JSON file.

    Returns:
        The files: ``pdf``, ``png``, ``json``.

    Raises:
        OSError: The disk is full; older files are unchanged.
    """
    import matplotlib

    path = Path(stem) if Path(stem).is_absolute() else paths.figures_dir(profile) / stem
    metadata = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
    files = {}
    with _quiet_fonts(), matplotlib.rc_context({"pdf.fonttype": 42, "savefig.bbox": None}):
        for suffix, values in metadata.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=300, metadata=values)
            files[suffix] = path.with_name(f"{path.name}.{suffix}")
            write_atomic(files[suffix], buffer.getvalue())
    files["json"] = write_sidecar(
        files["pdf"],
        notebook=notebook,
        profile=profile,
        seeds=seeds or {},
        inputs={name: _hashable(value) for name, value in (inputs or {}).items()},
        device=device,
        notes=notes,
    )
    return files


def screen_png(figure: Figure, *, dpi: int = SCREEN) -> bytes:
    """Return a figure as a small PNG for the screen: few dots, and a palette of 256 colours.

    Lines and text look the same, images of smooth colours nearly so; the file is a quarter of what it would be.

    Args:
        figure: The figure; it is not changed.
        dpi: Dots per inch.

    Returns:
        The bytes of the file; the same figure gives the same.
    """
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return small.getvalue()


@contextlib.contextmanager
def _quiet_fonts() -> Iterator[None]:
    """Let fontTools speak of errors only: it wonders about the date of the font that comes with matplotlib."""
    logger = logging.getLogger("fontTools")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _hashable(value: Any) -> Any:
    """Return a table as text, everything else as it is."""
    return value.to_csv(index=False) if hasattr(value, "to_csv") else value
