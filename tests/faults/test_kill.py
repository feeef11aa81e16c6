"""A localization of many prompts that is killed ends with the table of one that was not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from nemolib.store import read_table
from tests.faults import localization_run

ROOT = Path(__file__).parents[2]


def start(model_folder, folder):
    command = [sys.executable, localization_run.__file__, str(model_folder), str(folder)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})


def finished(folder):
    return len(list((folder / "store").glob("localizing/*/*.json")))


def computed(folder):
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.slow
def test_a_killed_localization_continues(random_model_folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    localization_run.run(random_model_folder, whole)
    assert sorted(computed(whole)) == localization_run.PROMPTS
    process = start(random_model_folder, killed)
    while finished(killed) < 2 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
    assert not (killed / "table.csv").exists()
    done, before = finished(killed), len(computed(killed))
    assert 2 <= done < len(localization_run.PROMPTS)
    # Only what was under way when the run was killed is done twice.
    assert before <= done + 2
    localization_run.run(random_model_folder, killed)
    assert len(computed(killed)) == before + len(localization_run.PROMPTS) - done
    tables = (read_table(folder / "table.csv") for folder in (killed, whole))
    # Other prompts in one batch may change the last digits of scores.
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-5)
