"""Figures and tables for readers: drawn from saved tables and grids, with a caption and what they claim.

An exhibit is a function of an experiment's module. Its arguments are the names of the tables and image grids that it is
drawn from, and it returns a figure, or a table as it is to be shown:

    @exhibit("Figure 7", "neurons of the initial selection and after refinement", read=read_7)
    def figure_7(localization):
        "Histograms over prompts."

What was found is said in one way: `read` yields claims, with the paper's numbers beside. Notebooks show one exhibit
(`show`) and the claims of their module (`check`); notebook 06 and the index page show all of the paper (`render_all`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nemolib import metrics, paper, paths, plots
from nemolib.paths import write_atomic
from nemolib.prompts import MEMORIZED
from nemolib.provenance import code_hash, sidecar
from nemolib.store import Grid

if TYPE_CHECKING:
    from nemolib.run import Run

KINDS = {"vm": "VM", "tm": "TM", "unmemorized": "unmemorized"}
"""Kinds of prompts that are compared, and what claims and tables call them."""

Load = Callable[[str], "pd.DataFrame | Grid"]
"""Returns a saved table or image grid by its name; raises FileNotFoundError where there is none."""


class NotEnough(ValueError):  # noqa: N818
    """What a profile computed holds too little for an exhibit; the message says what is missing."""


class ClaimError(AssertionError):
    """Claims that must hold and do not; the message names each with the value found and the one allowed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that was found, and what the paper says of it.

    Attributes:
        text: What is claimed or compared, in words.
        ours: What was found here, as text with its numbers.
        paper: What the paper reports; empty if nothing is known.
        holds: Whether it holds; None: there is nothing to compare, or too little to decide.
        rule: What decides, stated before, or why the numbers may differ.
        must: Whether it holds for any model if the computation is right: a notebook fails where it does not.
        n: How many prompts (or what else) it rests on. A claim of the paper that has a rule and n counts in the table of
            claims (`claim_table`).
        interval: Of what was found: 95 %, unless it says what else.
    """

    text: str
    ours: str
    paper: str = ""
    holds: bool | None = None
    rule: str = ""
    must: bool = False
    n: str = ""
    interval: str = ""

    @property
    def verdict(self) -> str:
        """``holds``, ``does not hold``, ``not decided``, or nothing where there is nothing to decide."""
        if self.holds is None:
            return "not decided" if self.n else ""
        return "holds" if self.holds else "does not hold"

    def __str__(self) -> str:
        """Return it as a sentence, with the paper's number and the verdict where there are any."""
        interval = f" (interval: {self.interval})" if self.interval else ""
        parts = [f"{self.text}: {self.ours}{interval}"]
        parts += [f"{name}{value}" for name, value in (("paper: ", self.paper), ("n = ", self.n)) if value]
        if self.holds is not None:
            parts.append(f"**{self.verdict}** ({self.rule})" if self.rule else f"**{self.verdict}**")
        return plots.minus("; ".join(parts))


def must(
    text: str,
    value: float | bool,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    equals: float | None = None,
    reason: str = "",
) -> Claim:
    """Return a claim that must hold, for a number with a bound; a missing number (NaN) never holds.

    Args:
        text: The claim in words.
        value: What was found here; without bounds it must be True, which stands for 1.
        at_least: Smallest allowed value.
        at_most: Largest allowed value.
        equals: Expected value.
        reason: Why this bound, or where the tolerance comes from.
    """
    if equals is None and at_least == -math.inf and at_most == math.inf:
        equals = 1.0
    low, high = (at_least, at_most) if equals is None else (equals, equals)
    ends = [f">= {low:.4g}"] * math.isfinite(low) + [f"<= {high:.4g}"] * math.isfinite(high)
    bound = f"{low:.4g}" if low == high else " and ".join(ends)
    rule = f"must be {bound}; {reason}" if reason else f"must be {bound}"
    shown = f"{float(value):.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return Claim(text, shown, holds=bool(low <= value <= high), rule=rule, must=True)


def effect(
    text: str,
    value: float,
    of: str,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    ours: str,
    paper: str,
    n: str,
    interval: str = "",
) -> Claim:
    """Return a claim of the paper, decided by the size of an effect: a number and one bound, fixed before it is known.

    Args:
        text: The claim in words.
        value: The effect that was found; a missing number (NaN) decides nothing.
        of: What the number is, as in "share of the similarity that stays".
        at_least: The smallest value with which it holds; or instead
        at_most: the largest.
        ours: The numbers that it was made of.
        paper: What the paper reports.
        n: As of `Claim`; so is interval.
    """
    rule = f"{of}: at most {at_most:g}" if math.isinf(at_least) else f"{of}: at least {at_least:g}"
    if math.isnan(value):
        return Claim(text, ours, paper, None, rule, n=n, interval=interval)
    holds = bool(at_least <= value <= at_most)
    return Claim(text, f"{value:.2f} ({ours})", paper, holds, rule, n=n, interval=interval)


def share_interval(hits: Any) -> str:
    """Return the 95 % interval (Wilson) of the share of prompts that fulfil something, as text."""
    from scipy.stats import binomtest

    return "{:.2f} to {:.2f}".format(*binomtest(int(np.sum(hits)), len(hits)).proportion_ci(method="wilson"))


def median_interval(values: Any) -> str:
    """Return the 95 % bootstrap interval of a median over prompts, as text; nothing if no value is known."""
    known = pd.Series(values).dropna()
    return "" if known.empty else "{:.2f} to {:.2f}".format(*metrics.bootstrap_interval(known))


def drawn_interval(number: Callable[..., float], *samples: Any) -> str:
    """Return the 95 % bootstrap interval of a number made of samples of prompts, as text; see `metrics.interval`."""
    ends = metrics.interval(number, *samples, resamples=500)
    return "" if np.isnan(ends).any() else "{:.2f} to {:.2f}".format(*ends)


def rounding(dtype: Any, *, at_least: float = 1e-4) -> float:
    """Return how far two ways to the same numbers of about 1 may differ in a floating-point type of PyTorch.

    At least what is allowed in any case; the types with few digits allow more: eight units in the last place of 1.
    """
    import torch

    return max(at_least, 8 * torch.finfo(dtype).eps)


def of_kinds(table: pd.DataFrame, name: str, *kinds: str, column: str = "") -> dict[str, pd.DataFrame]:
    """Return the rows of each of these kinds of prompts, those with a value if a column is given.

    Args:
        table: A table with the column kind.
        name: What it is saved as.
        kinds: Kinds of prompts, each of which is needed.
        column: Rows where it is missing do not count.

    Raises:
        NotEnough: There are none of a kind.
    """
    parts = dict(list((table.dropna(subset=column) if column else table).groupby("kind")))
    if missing := [kind for kind in kinds if kind not in parts]:
        what = f"values of {column}" if column else "rows"
        raise NotEnough(f"table {name!r} has no {what} with kind {missing[0]!r}")
    return {kind: parts[kind] for kind in kinds}


def each_kind(describe: Callable[[str], object], kinds: Iterable[str] = MEMORIZED) -> str:
    """Return what is said of each kind of prompts, such as ``"VM 4 ± 3, TM 21 ± 18"``."""
    return ", ".join(f"{KINDS[kind]} {describe(kind)}" for kind in kinds)


def counted(hits: pd.Series, kinds: pd.Series) -> str:
    """Return for how many prompts of each kind something is so, such as ``"VM 14 of 20, TM 3 of 20"``."""
    found = hits.groupby(kinds, sort=False).agg(["sum", "size"])
    return each_kind(lambda kind: "{} of {}".format(*found.loc[kind]), found.index)


def median_mad(values: Any, *, digits: int = 2) -> str:
    """Return median ± median absolute deviation as text, such as ``"0.83 ± 0.16"``; nothing if no value is known."""
    known = pd.Series(values).dropna()
    return "" if known.empty else "{:.{d}f} ± {:.{d}f}".format(*metrics.median_mad(known), d=digits)


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A figure or table of an experiment.

    Attributes:
        name: Stem of its files (see `exhibit`).
        label: Its number in the paper, or empty for one of our own.
        title: What it shows, in a few words.
        caption: How to read it.
        draw: Returns the figure or the table from what is saved under the names of its arguments.
        read: Yields claims from what is saved under the names of its arguments.
    """

    name: str
    label: str
    title: str
    caption: str
    draw: Callable[..., Figure | pd.DataFrame]
    read: Callable[..., Iterable[Claim]] | None = None

    @property
    def heading(self) -> str:
        """The label and the title."""
        return f"{self.label}: {self.title}" if self.label else f"{self.title[0].upper()}{self.title[1:]}"

    @property
    def notebook(self) -> str:
        """The notebook that computes its tables and grids."""
        return self.draw.__globals__["NOTEBOOK"]

    @property
    def module(self) -> str:
        """The module of `nemolib.experiments` that it is written in."""
        return self.draw.__module__.rpartition(".")[2]

    @property
    def place(self) -> str:
        """The function that draws it, and the file that this is in."""
        draw = inspect.unwrap(self.draw)
        return f"`{draw.__name__}` in `{draw.__module__.replace('.', '/')}.py`"


_EXHIBITS: dict[str, Exhibit] = {}
"""All exhibits of the modules that were imported, by name."""


def exhibit(
    label: str, title: str, caption: str = "", *, read: Callable[..., Iterable[Claim]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that makes an exhibit of a function, which itself stays as it is; see `Exhibit`.

    Its name is that of the function, without ``show_`` where the bare name is that of what computes the table. Its caption is
    the docstring of the function, unless one is given, as for several that share it.
    """

    def register(draw: Callable[..., Any]) -> Callable[..., Any]:
        said = caption or " ".join((draw.__doc__ or "").split())
        item = Exhibit(draw.__name__.removeprefix("show_"), label, title, said, draw, read)
        if _EXHIBITS.get(item.name, item).place != item.place:
            raise ValueError(f"two exhibits have the name {item.name!r}; their files would overwrite each other")
        _EXHIBITS[item.name] = item
        return draw

    return register


def exhibit_of(draw: Callable[..., Any]) -> Exhibit:
    """Return the exhibit that a function draws."""
    return next(item for item in _EXHIBITS.values() if item.draw is draw)


def experiments() -> list[ModuleType]:
    """Return the modules of `nemolib.experiments`, by name."""
    names = sorted(path.stem for path in (paths.PACKAGE / "experiments").glob("[a-z]*.py"))
    return [import_module(f"nemolib.experiments.{name}") for name in names]


def exhibits() -> list[Exhibit]:
    """Return all exhibits: those of the paper in its order (`nemolib.paper.PLACES`), ours after them."""
    experiments()
    # One of ours has its place behind all of the paper's.
    return sorted(_EXHIBITS.values(), key=lambda item: ([*paper.PLACES, item.name].index(item.name), item.notebook))


def _sources(function: Callable[..., Any], load: Load) -> dict[str, pd.DataFrame | Grid]:
    """Return the saved tables and grids that the arguments of a function name.

    Raises:
        FileNotFoundError: One of them was never saved.
        NotEnough: One of them is empty.
    """
    sources = {name: load(name) for name in inspect.signature(function).parameters}
    for name, value in sources.items():
        if not (value.images.size if isinstance(value, Grid) else len(value)):
            raise NotEnough(f"{'image grid' if isinstance(value, Grid) else 'table'} {name!r} is empty")
    return sources


def claims(item: Exhibit, load: Load) -> list[Claim]:
    """Return what an exhibit claims."""
    return [] if item.read is None else list(item.read(**_sources(item.read, load)))


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """An exhibit that was drawn, or the reason why not.

    Attributes:
        exhibit: The exhibit.
        content: The figure or table; None: it was not drawn.
        claims: What it claims.
        files: Its files by suffix; none if they were not written.
        reason: Why it was not drawn.
    """

    exhibit: Exhibit
    content: Figure | pd.DataFrame | None
    claims: Sequence[Claim] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    reason: str = ""

    @property
    def said(self) -> list[Claim]:
        """The claims that are for readers; those that must hold are for `check`."""
        return [claim for claim in self.claims if not claim.must]


def render(item: Exhibit, run: Run, *, load: Load | None = None, write: bool = True) -> Rendered:
    """Draw an exhibit and write its files to ``figures/<profile>/``, or return why it cannot be drawn.

    The same sources give the same bytes.

    Args:
        item: The exhibit.
        run: The run whose profile it belongs to.
        load: Where saved tables and grids come from; None: those of the run.
        write: Whether files are written.
    """
    load = load or run.load
    try:
        sources, said = _sources(item.draw, load), claims(item, load)
        content = item.draw(**sources)
    except (NotEnough, FileNotFoundError) as error:
        return Rendered(item, None, reason=str(error))
    return Rendered(item, content, said, _write(item, content, run, sources) if write else {})


def render_all(run: Run, *modules: str, load: Load | None = None, write: bool = True) -> list[Rendered]:
    """Return exhibits, drawn (and written) where there is enough for them; see `render`.

    Args:
        run: The run.
        modules: Modules of `nemolib.experiments` whose exhibits they are; without any those of notebooks 01 to 06.
        load: As in `render`; so is write.
    """
    return [
        render(item, run, load=load, write=write)
        for item in exhibits()
        if (item.module in modules if modules else not item.notebook.startswith("beyond/"))
    ]


def _write(item: Exhibit, content: Figure | pd.DataFrame, run: Run, sources: Mapping[str, Any]) -> dict[str, Path]:
    """Write the files of an exhibit: PDF and PNG, or CSV, Markdown and LaTeX; and where it comes from, as JSON."""
    if isinstance(content, Figure):
        contents = plots.files_of(content)
    else:
        csv = content.to_csv(index=False, lineterminator="\n")
        contents = {"csv": csv, "md": markdown(content) + "\n", "tex": latex(content)}
    contents["json"] = sidecar(
        f"{item.name}.{next(iter(contents))}",
        profile=run.profile,
        notebook=item.notebook,
        inputs=sources,
        code=code_hash(inspect.unwrap(item.draw)),
        device=run.device,
    )
    return _written(run, item.name, contents)


def _written(run: Run, name: str, contents: Mapping[str, bytes | str]) -> dict[str, Path]:
    """Write contents by suffix to ``figures/<profile>/``, and return their files."""
    files = {suffix: paths.FIGURES / run.profile.name / f"{name}.{suffix}" for suffix in contents}
    for suffix, content in contents.items():
        write_atomic(files[suffix], content)
    return files


_ESCAPED = str.maketrans({"|": "\\|", "$": "\\$", "\n": " ", "\r": " "})
"""What would end a cell of a Markdown table, or begin a formula."""


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown; numbers stand as they are, so round before."""
    shown = table.map(lambda value: "" if pd.isna(value) else plots.minus(str(value)).translate(_ESCAPED))
    return shown.to_markdown(index=False, disable_numparse=True)


_SYMBOLS = {"±": r"$\pm$", "≥": r"$\ge$", "≤": r"$\le$", "τ": r"$\tau$", "µ": r"$\mu$", "σ": r"$\sigma$", "−": "$-$"}
"""What LaTeX has no letter for."""


def latex(table: pd.DataFrame) -> str:
    """Return a table in LaTeX for the package booktabs; numbers stand as they are, so round before."""
    text = table.style.hide(axis="index").format(escape="latex", na_rep="", precision=6).format_index(
        escape="latex", axis="columns"
    ).to_latex(hrules=True)  # fmt: skip
    return "".join(_SYMBOLS.get(letter, letter) for letter in text)


# What notebooks and readers see


def show(run: Run, name: str) -> None:
    """Show an exhibit in a notebook: the figure or table, its caption, what it claims, and where it is written.

    Raises:
        KeyError: There is no such exhibit; the message names those known.
    """
    from IPython.display import Markdown, display

    known = {item.name: item for item in exhibits()}
    if name not in known:
        raise KeyError(f"unknown exhibit {name!r}; known: {', '.join(known)}")
    drawn = render(known[name], run, write=False)
    if drawn.content is None:
        display(Markdown(f"*{drawn.exhibit.heading}* is not shown: {drawn.reason}."))
        return
    as_table(drawn.content) if isinstance(drawn.content, pd.DataFrame) else display(drawn.content)
    item, said = drawn.exhibit, "\n".join(f"- {claim}" for claim in drawn.said)
    parts = (f"**{item.heading}.** {item.caption}", said, f"*Drawn by {item.place}.*")
    display(Markdown("\n\n".join(filter(None, parts))))


def as_table(table: pd.DataFrame, **names: str) -> None:
    """Show a table in a notebook: no index, text on the left, numbers with three digits, no missing values, kinds by name.

    Args:
        table: The table.
        names: Columns that are shown, in this order, and what readers call them; without any all, as they are.
    """
    from IPython.display import display

    def text(value: Any) -> str:
        if pd.isna(value):
            return ""
        return plots.minus(f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value}")

    table = table.assign(kind=table["kind"].replace(KINDS)) if "kind" in table else table
    shown = (table[list(names)].rename(columns=names) if names else table).map(text)
    # Nothing in it is read as a formula.
    classes = ["shown", "tex2jax_ignore", "mathjax_ignore"]
    html = shown.to_html(index=False, border=0, classes=classes, justify="left")
    # Notebooks have a style of their own for tables: numbers, and what stands above them, on the right.
    for cell, style in (("th", "text-align: left"), ("td", "text-align: left; vertical-align: top")):
        html = html.replace(f"<{cell}>", f'<{cell} style="{style}">')
    display({"text/html": html, "text/plain": shown.to_string(index=False)}, raw=True)


def check(run: Run, *modules: str, extra: Sequence[Claim] = ()) -> pd.DataFrame:
    """Return the claims of a notebook as a table, and raise if one that must hold does not.

    Args:
        run: The run.
        modules: Modules of `nemolib.experiments`, whose exhibits' claims are taken as far as they can be drawn.
        extra: Claims about values of the notebook alone; they come first.

    Returns:
        Columns claim, ours, paper, verdict and rule.

    Raises:
        ClaimError: Claims that must hold do not; the message names each with its value and bound.
        ValueError: There are no claims.
    """
    found = list(extra)
    for item in exhibits():
        if item.module in modules:
            with suppress(NotEnough, FileNotFoundError):
                # Two exhibits of one table may claim the same.
                found += [claim for claim in claims(item, run.load) if claim not in found]
    if not found:
        raise ValueError(f"there are no claims of {', '.join(modules) or 'nothing'} to check")
    failed = [f"{claim.text}: {claim.ours}, {claim.rule}" for claim in found if claim.must and claim.holds is False]
    if failed:
        raise ClaimError("; ".join(failed))
    return claim_rows(found)[["claim", "ours", "paper", "verdict", "rule"]]


def claim_rows(found: Iterable[Claim]) -> pd.DataFrame:
    """Return claims as a table: columns claim, verdict, paper, ours, n, interval, rule."""
    rows = [(item.text, item.verdict, item.paper, item.ours, item.n, item.interval, item.rule) for item in found]
    return pd.DataFrame(rows, columns=["claim", "verdict", "paper", "ours", "n", "interval", "rule"])


def claim_table(page: Sequence[Rendered]) -> pd.DataFrame:
    """Return each claim of the paper that has a rule, once, in the paper's order: columns as of `claim_rows`.

    What notebook 06 draws of runs that were computed elsewhere does not count.
    """
    counted = {
        claim.text: replace(claim, paper=f"{item.exhibit.label}: {claim.paper}" if item.exhibit.label else claim.paper)
        for item in reversed(page)
        for claim in reversed(item.said)
        if claim.n and item.exhibit.notebook != "06_figures"
    }
    return claim_rows(reversed(counted.values()))


def summary(table: pd.DataFrame) -> str:
    """Return how many of a table of claims hold, in words."""
    counts = table["verdict"].value_counts()
    words = {
        "does not hold": "do not hold" if counts.get("does not hold", 0) > 1 else "does not hold",
        "not decided": "not decided",
    }
    others = ", ".join(f"{counts[name]} {text}" for name, text in words.items() if name in counts)
    return f"{counts.get('holds', 0)} of {len(table)} claims of the paper hold here" + f" ({others})" * bool(others)


def missing_table(page: Sequence[Rendered]) -> pd.DataFrame:
    """Return what a page does not show, and why: columns exhibit, reason."""
    rows = [(item.exhibit.heading, item.reason) for item in page if item.content is None]
    return pd.DataFrame(rows, columns=["exhibit", "reason"])


def write_page(page: Sequence[Rendered], run: Run) -> dict[str, Path]:
    """Write the table of claims (``claims.csv``, ``.md``), and the page ``index.md`` that it opens (``make site`` shows it).

    Raises:
        ValueError: No exhibit was drawn.
    """
    title, table = f"Figures and tables: profile {run.profile.name}", claim_table(page)
    said = f"{summary(table)}:\n\n{markdown(table)}\n"
    _written(run, "claims", {"csv": table.to_csv(index=False, lineterminator="\n"), "md": said})
    return _written(run, "index", {"md": "\n\n".join([f"# {title}", *_sections(page, run.profile.name)]) + "\n"})


def _sections(page: Sequence[Rendered], profile: str) -> Iterator[str]:
    """Yield the paragraphs of the index page."""
    drawn = [item for item in page if item.content is not None]
    if not drawn:
        raise ValueError("no exhibit was drawn; run the other notebooks first (make notebooks)")
    claims, missing = claim_table(page), missing_table(page)
    yield f"{len(drawn)} figures and tables, made by notebook 06_figures from the tables of the others. {summary(claims)}:"
    yield markdown(claims)
    for item in drawn:
        heading, notebook = item.exhibit.heading, item.exhibit.notebook
        yield f"## {heading}"
        yield f"![{heading}]({item.exhibit.name}.png)" if isinstance(item.content, Figure) else markdown(item.content)
        yield item.exhibit.caption
        command = f"make build/{profile}/{notebook}.ipynb PROFILE={profile} && make figures PROFILE={profile}"
        where = f"Drawn by {item.exhibit.place}, computed by `{command}`"
        yield "\n".join(f"- {fact}" for fact in (*item.said, where))
        # The table itself is shown.
        yield " · ".join(f"[{suffix}]({path.name})" for suffix, path in item.files.items() if suffix != "md")
    if len(missing):
        yield f"## What is not here, and why\n\n{markdown(missing)}"
