"""A localization of many prompts that is killed ends with the table of one that was not."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from nemolib import paths
from nemolib.store import read_table
from tests.faults import localization_run


def computed(folder):
    return (folder / "log").read_text().splitlines()


@pytest.mark.slow
def test_a_killed_localization_continues(random_model_folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    localization_run.run(random_model_folder, whole)
    assert sorted(computed(whole)) == localization_run.PROMPTS
    command = [sys.executable, localization_run.__file__, random_model_folder, killed]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(paths.ROOT)}).returncode == -9
    assert not (killed / "table.csv").exists()
    assert len(list((killed / "store").glob("localizing/*/*.json"))) == 2
    before = len(computed(killed))
    # Only what was under way when the run was killed is done twice.
    assert before <= 2 + 2
    localization_run.run(random_model_folder, killed)
    assert len(computed(killed)) == before + len(localization_run.PROMPTS) - 2
    tables = (read_table(folder / "table.csv") for folder in (killed, whole))
    # Other prompts in one batch may change the last digits of scores.
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-5)
