"""The page of symbols names what there is."""

import functools
import importlib
import re

import pytest

from nemolib import paths
from nemolib.run import Run
from nemolib.settings import load_profile

TEXT = (paths.ROOT / "docs" / "notation.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`([a-z_]+\.[\w.]+)`", TEXT)))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name):
    first, *rest = name.split(".")
    if first == "run":
        owner = load_profile("tiny") if rest[0] == "profile" else Run
        rest = rest[rest[0] == "profile" :]
        if rest == ["pipe", "unet"]:
            rest = ["pipe"]
    else:
        owner = importlib.import_module("nemolib" if first == "nemolib" else f"nemolib.{first}")
    functools.reduce(getattr, rest, owner)


def test_it_names_what_the_search_is_made_of():
    assert len(NAMES) > 30
    for symbol in (r"$\theta$", r"$\theta_\mathrm{min}$", "$k$", r"$\tau$", r"$\tau_\mathrm{ref}$"):
        assert sum(line.startswith(f"| {symbol}") for line in TEXT.splitlines()) >= 1, symbol
