import subprocess
import sys

import pytest

import nemolib


@pytest.mark.parametrize("name", nemolib.__all__)
def test_every_public_name_is_there_and_described(name):
    value = getattr(nemolib, name)
    assert value.__doc__
    assert name in dir(nemolib)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'nemolib' has no attribute 'deactivat'"):
        nemolib.deactivat  # noqa: B018 - the access is the test


def test_import_loads_no_heavy_package():
    code = "import sys, nemolib; print([name for name in ('torch', 'diffusers', 'pandas') if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
