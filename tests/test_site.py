"""The site: built without a warning, every link leads somewhere, and no page asks another machine for anything."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from nemolib import paths
from tests.notebook_files import notebooks

NOTEBOOKS = notebooks("*")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "html"
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--conf-dir", "docs"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ".", folder], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@cache
def page(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def pages(site):
    return sorted(path for path in site.rglob("*.html") if path.name != "explore.html")


def addresses(path):
    """Yield the attribute and the address of everything that a page loads or links to."""
    for element in page(path).find_all(True):
        for attribute in ("src", "href", "data", "poster"):
            if element.get(attribute):
                yield element.name, attribute, element[attribute]


def test_there_is_a_page_of_each_notebook_and_of_each_text(site):
    sources = [*NOTEBOOKS, *(paths.ROOT / "docs").glob("*.md"), *paths.FIGURES.glob("*/index.md")]
    for source in sources:
        assert (site / source.relative_to(paths.ROOT).with_suffix(".html")).is_file()
    assert urlsplit(page(site / "index.html").meta["content"].partition("url=")[2]).path == "docs/index.html"


def test_every_link_within_the_site_leads_somewhere(site):
    checked = 0
    for path in pages(site):
        for _, _, address in addresses(path):
            parts = urlsplit(address)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {address}"
            if parts.fragment and target.suffix == ".html":
                assert page(target).find(id=unquote(parts.fragment)), f"{path.name}: {address}"
            checked += 1
    assert checked > 1000


def test_nothing_comes_from_another_machine(site):
    for path in pages(site):
        loaded = [address for name, attribute, address in addresses(path) if attribute == "src" or name == "link"]
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path.name


def test_formulas_are_drawn_by_the_browser_itself(site):
    formulas = [formula for path in pages(site) for formula in page(path).find_all("math")]
    assert len(formulas) > 20
    assert not [formula for formula in formulas if "\\" in formula.get_text()]


def test_pictures_are_shown_in_their_size_and_described(site):
    (opening,) = page(site / "docs/index.html").article.find_all("img")
    assert opening["style"] == "width: 704px;"  # 5.5 inches
    for path in pages(site):
        for picture in page(path).article.find_all("img") if page(path).article else ():
            assert re.search(r"\w \w|\w{3}", picture.get("alt", "")), f"{path.name}: {picture}"
            assert not picture["alt"].endswith(".png"), f"{path.name}: {picture}"


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_solutions_are_folded(site, source):
    solutions = page(site / source.relative_to(paths.ROOT).with_suffix(".html")).select(".tag_solution")
    assert all(solution.find("details") for solution in solutions)


def test_each_profile_has_its_page_of_figures(site):
    article = page(site / "figures/tiny/index.html").article
    small = article.select(".gallery a")
    assert len(small) > 10
    assert [link.img["src"] for link in small] == [picture["src"] for picture in article.find_all("img")[len(small) :]]
    assert {"pdf", "csv"} <= {link.get_text() for link in article.select("a.download")}
