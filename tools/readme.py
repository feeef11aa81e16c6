"""Write what README.md states from other files: the table of claims, and what was built into the tiny world.

    python -m tools.readme

Each text stands between two comments, such as ``<!-- claims -->`` and ``<!-- end of claims -->``.
"""

from nemolib import paths

README = paths.ROOT / "README.md"


def sources() -> dict[str, str]:
    """Return the texts: the claims that notebook 06 wrote, and a section of the model card."""
    card = (paths.DATA / "tiny" / "README.md").read_text(encoding="utf-8")
    claims = (paths.FIGURES / "tiny" / "claims.md").read_text(encoding="utf-8")
    return {"claims": claims, "built in": card.partition("## What we built in\n")[2].partition("\n## ")[0]}


def written(text: str) -> str:
    """Return the README with these texts in their places.

    Raises:
        ValueError: A text is empty, or the README has no place for it.
    """
    for name, block in sources().items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if not block.strip() or text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{name}: nothing to say, or README.md does not have {begin} and {end} once each")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n{block.strip()}\n{end}{after}"
    return text


def main() -> None:
    """Write the README."""
    paths.write_atomic(README, written(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
