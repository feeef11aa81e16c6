"""Notebooks 01 to 05, and those on what came after, run for a profile that is not the tiny one: random weights in half precision, one image per prompt.

The profile is the dry run of Stable Diffusion with narrow layers. Cells are run in this process, one after the other.
"""

import inspect
import io

import matplotlib as mpl
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure

from nemolib import exhibits, explore, paths, plots
from nemolib.run import Run
from nemolib.settings import load_profile
from tests.narrow_architecture import save_narrow_architecture

pytestmark = pytest.mark.slow

NOTEBOOKS = [
    path for names in ("0[1-5]_*", "explore", "beyond/*") for path in sorted(paths.NOTEBOOKS.glob(f"{names}.ipynb"))
]

FEWER = {"explore": "samples = steps = 2"}
"""Parameters of a notebook that are smaller here."""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Write the profile, and let what is computed stay in a temporary folder, shared by the notebooks."""
    folder = tmp_path_factory.mktemp("dry")
    (folder / "architecture").mkdir()
    # The smallest latents that the window of the paper fits on three scales.
    save_narrow_architecture(folder / "architecture", side=48)
    path = folder / "narrow.yaml"
    path.write_text(f"extends: sd14-dryrun\nmodel: random:{folder / 'architecture'}\ngeneration: {{side: 64}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "BUILD", folder / "build")
        patch.setattr(paths, "FIGURES", folder / "figures")
        patch.setattr(explore, "POINTS", 2)
        patch.setattr(explore, "FACTORS", (1.0, 0.0, -1.0))
        # Drawn as for readers, but hardly larger than a stamp.
        patch.setattr(plots, "SCREEN_DPI", 20)
        patch.setattr(plots, "SCREEN_IMAGES_DPI", 20)
        with mpl.rc_context({"savefig.dpi": 20}):
            yield path


def code_of(path, profile):
    """Return the code of the cells, without magic and solutions (as the profile asks), with a profile in place of the default."""
    assert not load_profile("sd14-dryrun").solutions
    for cell in nbformat.read(path, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and "solution" not in tags:
            lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
            chosen = [f"profile = {str(profile)!r}", FEWER.get(path.stem, "")] if "parameters" in tags else []
            yield "\n".join(lines + chosen)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_it_runs(path, profile, capsys):
    shell = InteractiveShell()
    for code in code_of(path, profile):
        result = shell.run_cell(code)
        assert result.success, f"{path.stem}: {result.error_before_exec or result.error_in_exec!r} in\n{code}"
        if isinstance(result.result, Figure):
            result.result.savefig(io.BytesIO())
    assert path.stem != "explore" or not capsys.readouterr().err, "bars of progress under the sliders"
    capsys.readouterr()
    run = Run(load_profile(profile), None)
    for item in exhibits.exhibits():
        if item.notebook.endswith(path.stem):
            for name in inspect.signature(item.draw).parameters:
                # With rows or without: what is there is said by the exhibit.
                run.load(name)
