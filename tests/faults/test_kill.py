"""A process that is killed while it fills a store, again and again, ends with the file of one that was not."""

import subprocess
import sys
import time

import pytest

from nemolib.store import Store

WORKER = """
import sys, time
from nemolib.store import Store
store = Store(sys.argv[1])
for number in range(60):
    key = f"prompt {number}"
    if key not in store:
        with open(sys.argv[2], "a") as log:
            log.write(key + "\\n")
        time.sleep(0.005)
        store.put(key, {"number": number, "text": "ä" * 2000})
"""


def _start(path, log):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(path), str(log)])


@pytest.mark.slow
def test_killed_runs_continue(tmp_path):
    _start(tmp_path / "whole.jsonl", tmp_path / "whole.log").wait()
    path, log = tmp_path / "killed.jsonl", tmp_path / "killed.log"
    kills = 0
    for pause in (0.02, 0.05, 0.11, 0.03, 0.07):
        before = len(Store(path))
        process = _start(path, log)
        while len(Store(path)) <= before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(pause)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 2
    assert _start(path, log).wait() == 0
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    # Only what was under way when a run was killed is done twice.
    assert len(log.read_text().splitlines()) <= 60 + kills
