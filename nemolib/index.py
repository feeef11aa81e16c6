"""The index page of ``figures/<profile>/``: all figures and tables with caption, reading, and the paper's value."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from nemolib import paths, tables
from nemolib.exhibits import NOTEBOOK, VERDICTS, Exhibit, Rendered, command
from nemolib.files import write_atomic
from nemolib.profiles import Profile, load_profile

_STYLE = """
body { font: 16px/1.45 Georgia, 'Times New Roman', serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; font-size: 1.2rem; } img { max-width: 100%; } table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.2rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
dt { font-weight: bold; } dd { margin: 0 0 0.4rem 1rem; } code { font-size: 0.85rem; }
.agrees { color: #006d4f; } .differs { color: #a34700; } .beside { color: #555; }
"""


def write_index(rendered: Sequence[Rendered], profile: Profile | str) -> dict[str, Path]:
    """Write ``index.html`` and ``index.md`` beside the files of the exhibits.

    Both are made from the exhibits alone: the same exhibits give the same bytes.

    Args:
        rendered: The exhibits, in the order of the page; at least one.
        profile: A profile or its name.

    Returns:
        The files: ``html``, ``md``.

    Raises:
        ValueError: There is no exhibit, or two have the same name.
        FileNotFoundError: A file that the page would link to is missing.
    """
    name = load_profile(profile).name
    check_exhibits([item.exhibit for item in rendered])
    for item in rendered:
        for path in item.files.values():
            if not path.is_file():
                raise FileNotFoundError(f"{item.exhibit.heading}: {path} is missing; render it again")
    folder = paths.figures_dir(name)
    written = {"html": folder / "index.html", "md": folder / "index.md"}
    write_atomic(written["html"], html_page(rendered, profile=name))
    write_atomic(written["md"], markdown_page(rendered, profile=name))
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


def html_page(rendered: Sequence[Rendered], *, profile: str) -> str:
    """Return the index page as HTML, one file without anything from elsewhere but the figures beside it."""
    sections = "\n".join(_html_section(item, profile) for item in rendered)
    contents = "\n".join(
        f'<li><a href="#{item.exhibit.name}">{html.escape(item.exhibit.heading)}</a> '
        f'<span class="{item.reading.verdict}">({VERDICTS[item.reading.verdict]})</span></li>'
        for item in rendered
    )
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
<p>{html.escape(_summary(rendered))}</p>
<ul>
{contents}
</ul>
{sections}
</body>
</html>
"""


def markdown_page(rendered: Sequence[Rendered], *, profile: str) -> str:
    """Return the index page as Markdown, as it is shown where the repository is."""
    parts = [f"# Figures and tables: profile {profile}", _summary(rendered)]
    parts += [_markdown_section(item, profile) for item in rendered]
    return "\n\n".join(parts) + "\n"


def _summary(rendered: Sequence[Rendered]) -> str:
    counted = Counter(item.reading.verdict for item in rendered)
    verdicts = "; ".join(f"{counted[verdict]}: {text}" for verdict, text in VERDICTS.items() if counted[verdict])
    return (
        f"{len(rendered)} figures and tables ({verdicts}), made by notebook {NOTEBOOK} from the tables of the others."
    )


def _rows(item: Rendered, profile: str) -> list[tuple[str, str]]:
    """Return what is said of an exhibit: (word, text), texts that are empty left out."""
    reading, exhibit = item.reading, item.exhibit
    rows = [
        ("Ours", reading.ours),
        ("Paper", reading.paper),
        ("Verdict", VERDICTS[reading.verdict]),
        ("In what sense", reading.reason),
        ("Computed by", f"notebooks/{exhibit.notebook}.ipynb"),
        ("Command", f"{command(exhibit, profile)} && make figures PROFILE={profile}"),
    ]
    return [(word, text) for word, text in rows if text]


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
