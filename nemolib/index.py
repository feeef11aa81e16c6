"""The index page of ``figures/<profile>/``: all figures and tables with caption, reading, and the paper's value.

At its end stand what agrees and what differs in one table, and what the page does not show, with the reason.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from nemolib import paths, tables
from nemolib.exhibits import (
    NOTEBOOK,
    VERDICTS,
    Exhibit,
    NotDrawn,
    Rendered,
    command,
    comparison_table,
    missing_table,
)
from nemolib.files import write_atomic
from nemolib.profiles import Profile, load_profile

_STYLE = """
body { font: 16px/1.45 Georgia, 'Times New Roman', serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; font-size: 1.2rem; } img { max-width: 100%; } table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.2rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
dt { font-weight: bold; } dd { margin: 0 0 0.4rem 1rem; } code { font-size: 0.85rem; }
.agrees { color: #006d4f; } .differs { color: #a34700; } .beside { color: #555; }
"""


COMPARISON, MISSING = "What agrees, what differs, why", "What is not here, and why"
"""Headings of the two tables at the end of the page."""

_IN_TABLE = {"agrees": "agrees", "differs": "differs", "beside": "no value to compare"}
"""What the verdicts are called in a table."""


def write_index(items: Sequence[Rendered | NotDrawn], profile: Profile | str) -> dict[str, Path]:
    """Write ``index.html`` and ``index.md`` beside the files of the exhibits.

    Both are made from the exhibits alone: the same exhibits give the same bytes.

    Args:
        items: What `nemolib.exhibits.render_all` returned, in the order of the page; at least one of them drawn.
        profile: A profile or its name.

    Returns:
        The files: ``html``, ``md``.

    Raises:
        ValueError: No exhibit was drawn, or two have the same name.
        FileNotFoundError: A file that the page would link to is missing.
    """
    name = load_profile(profile).name
    rendered = [item for item in items if isinstance(item, Rendered)]
    check_exhibits([item.exhibit for item in rendered])
    for item in rendered:
        for path in item.files.values():
            if not path.is_file():
                raise FileNotFoundError(f"{item.exhibit.heading}: {path} is missing; render it again")
    folder = paths.figures_dir(name)
    written = {"html": folder / "index.html", "md": folder / "index.md"}
    write_atomic(written["html"], html_page(items, profile=name))
    write_atomic(written["md"], markdown_page(items, profile=name))
    return written


def check_exhibits(exhibits: Sequence[Exhibit]) -> None:
    """Check that a list of exhibits can be shown on one page.

    Raises:
        ValueError: The list is empty, or two exhibits have one name, so that one would overwrite the other's files.
    """
    if not exhibits:
        raise ValueError("there are no exhibits; render some first")
    twice = [name for name, number in Counter(item.name for item in exhibits).items() if number > 1]
    if twice:
        raise ValueError(f"two exhibits have the name {twice[0]!r}; their files would overwrite each other")


def links(page: str) -> list[str]:
    """Return the targets of all links and pictures of an HTML page."""
    finder = _Links()
    finder.feed(page)
    return finder.found


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what an element leads to."""
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def html_page(items: Sequence[Rendered | NotDrawn], *, profile: str) -> str:
    """Return the index page as HTML, one file without anything from elsewhere but the figures beside it."""
    rendered = [item for item in items if isinstance(item, Rendered)]
    sections = "\n".join(_html_section(item, profile) for item in rendered)
    contents = "\n".join(
        f'<li><a href="#{item.exhibit.name}">{html.escape(item.exhibit.heading)}</a> '
        f'<span class="{item.reading.verdict}">({VERDICTS[item.reading.verdict]})</span></li>'
        for item in rendered
    )
    ends = [(_anchor(heading), heading, table) for heading, table in _tables(items)]
    contents += "".join(f'\n<li><a href="#{anchor}">{heading}</a></li>' for anchor, heading, _ in ends)
    sections += "".join(f'\n<h2 id="{anchor}">{heading}</h2>\n{_html_table(table)}' for anchor, heading, table in ends)
    title = f"Figures and tables: profile {html.escape(profile)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>{html.escape(_summary(items))}</p>
<ul>
{contents}
</ul>
{sections}
</body>
</html>
"""


def markdown_page(items: Sequence[Rendered | NotDrawn], *, profile: str) -> str:
    """Return the index page as Markdown, as it is shown where the repository is."""
    parts = [f"# Figures and tables: profile {profile}", _summary(items)]
    parts += [_markdown_section(item, profile) for item in items if isinstance(item, Rendered)]
    parts += [f"## {heading}\n\n{tables.to_markdown(table).rstrip()}" for heading, table in _tables(items)]
    return "\n\n".join(parts) + "\n"


def _tables(items: Sequence[Rendered | NotDrawn]) -> list[tuple[str, pd.DataFrame]]:
    """Return the tables at the end of the page with their headings; one without rows is left out."""
    compared = comparison_table(items)
    compared["verdict"] = compared["verdict"].map(_IN_TABLE)
    compared = compared.rename(columns={"reason": "why, or in what sense"})
    return [
        (heading, table) for heading, table in ((COMPARISON, compared), (MISSING, missing_table(items))) if len(table)
    ]


def _anchor(heading: str) -> str:
    return heading.lower().replace(",", "").replace(" ", "-")


def _summary(items: Sequence[Rendered | NotDrawn]) -> str:
    rendered = [item for item in items if isinstance(item, Rendered)]
    counted = Counter(item.reading.verdict for item in rendered)
    verdicts = "; ".join(f"{counted[verdict]}: {text}" for verdict, text in VERDICTS.items() if counted[verdict])
    absent = len(missing_table(items))
    return (
        f"{len(rendered)} figures and tables ({verdicts}), made by notebook {NOTEBOOK} from the tables of the others."
        + (f" Not here: {absent}, listed at the end with the reason." if absent else "")
    )


def _rows(item: Rendered, profile: str) -> list[tuple[str, str]]:
    """Return what is said of an exhibit: (word, text), texts that are empty left out."""
    reading, exhibit = item.reading, item.exhibit
    rows = [
        ("Published run" if exhibit.published else "Ours", reading.ours),
        ("Paper", reading.paper),
        ("Verdict", VERDICTS[reading.verdict]),
        ("In what sense", reading.reason),
        ("Read by" if exhibit.published else "Computed by", f"notebooks/{exhibit.notebook}.ipynb"),
        ("Command", _commands(exhibit, profile)),
    ]
    return [(word, text) for word, text in rows if text]


def _commands(exhibit: Exhibit, profile: str) -> str:
    """Return the commands that make an exhibit."""
    if not exhibit.published:
        return f"{command(exhibit, profile)} && make figures PROFILE={profile}"
    return (
        f"python -m nemolib.runner notebooks/{NOTEBOOK}.ipynb build/{profile}/{NOTEBOOK}.ipynb --profile {profile} "
        "-p published_run=FILE"
    )


def _html_section(item: Rendered, profile: str) -> str:
    exhibit = item.exhibit
    content = _html_table(item.content) if isinstance(item.content, pd.DataFrame) else (
        f'<img src="{exhibit.name}.png" alt="{html.escape(exhibit.heading)}">'
    )  # fmt: skip
    facts = "\n".join(
        f"<dt>{word}</dt><dd{_verdict_class(word, item)}>{_html_text(word, text)}</dd>"
        for word, text in _rows(item, profile)
    )
    links = " · ".join(f'<a href="{path.name}">{suffix}</a>' for suffix, path in item.files.items())
    return f"""<h2 id="{exhibit.name}">{html.escape(exhibit.heading)}</h2>
{content}
<p>{html.escape(exhibit.caption)}</p>
<dl>
{facts}
</dl>
<p>{links}</p>"""


def _verdict_class(word: str, item: Rendered) -> str:
    return f' class="{item.reading.verdict}"' if word == "Verdict" else ""


def _html_text(word: str, text: str) -> str:
    return f"<code>{html.escape(text)}</code>" if word == "Command" else html.escape(text)


def _html_table(table: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table.columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape('' if pd.isna(value) else str(value))}</td>" for value in row) + "</tr>"
        for row in table.itertuples(index=False)
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _markdown_section(item: Rendered, profile: str) -> str:
    exhibit = item.exhibit
    content = tables.to_markdown(item.content).rstrip("\n") if isinstance(item.content, pd.DataFrame) else (
        f"![{exhibit.heading}]({exhibit.name}.png)"
    )  # fmt: skip
    facts = "\n".join(
        f"- **{word}**: {'`' + text + '`' if word == 'Command' else text}" for word, text in _rows(item, profile)
    )
    links = " · ".join(f"[{suffix}]({path.name})" for suffix, path in item.files.items())
    return f"## {exhibit.heading}\n\n{content}\n\n{exhibit.caption}\n\n{facts}\n\n{links}"
