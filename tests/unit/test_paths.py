import subprocess
import sys

from nemolib import paths


def test_relative_paths_start_at_the_root_and_absolute_ones_stay(tmp_path):
    assert (paths.ROOT / "pyproject.toml").is_file()
    assert paths.resolve("data/tiny") == paths.DATA / "tiny"
    assert paths.resolve(tmp_path) == tmp_path


def test_root_does_not_depend_on_the_working_folder_and_can_be_set(tmp_path):
    code = "import nemolib.paths; print(nemolib.paths.ROOT)"
    here = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert here.stdout.strip() == str(paths.ROOT)
    chosen = subprocess.run(
        [sys.executable, "-c", code], env={"NEMO_ROOT": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert chosen.stdout.strip() == str(tmp_path.resolve())
