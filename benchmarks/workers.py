"""What more processes bring: seconds for the localization of prompts of the tiny world on 1, 2, ... workers.

    python benchmarks/workers.py                          # 6 VM and 6 TM prompts, 1 and 2 workers
    python benchmarks/workers.py --prompts 20 --workers 1 2 4

Every worker has one thread. What a local cluster and the workers' models need to start is shown apart. All results
must be equal, bit by bit. A table is printed, and written to ``build/benchmarks/workers.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nemolib import paths, workers
from nemolib.paths import write_atomic
from nemolib.prompts import MEMORIZED
from nemolib.run import Run, open_run
from nemolib.store import Store


def measure(number: int, run: Run, prompts: list[str], **chosen: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return what a number of workers took, and the records that they gave; 0 is this process."""
    os.environ[workers.VARIABLE] = f"local:{number}" if number else "off"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, workers.cluster(run.profile) as client:
        fresh = Run(run.profile, run.pipe, store=Store(Path(folder)), progress=False)
        if client is not None:
            client.wait_for_workers(number)
            # Every worker loads its model with its first prompt; here it does before the clock starts.
            fresh.search(prompts[:number], gate=0.999, **chosen)
        ready = time.perf_counter()
        found = fresh.search(prompts, **chosen)
        done = time.perf_counter()
    records = [item.to_record() | {"seconds": None} for item in found]
    return {"workers": number, "start": ready - started, "seconds": done - ready}, records


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=6, help="prompts per kind")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ[workers.VARIABLE] = "off"
    run = open_run("tiny", progress=False)
    prompts = run.prompts(*MEMORIZED).groupby("kind").head(arguments.prompts)["caption"].tolist()
    chosen = {"statistics": run.statistics, "threshold": run.threshold}
    found = [measure(number, run, prompts, **chosen) for number in [0, *arguments.workers]]
    assert all(records == found[0][1] for _, records in found), "workers found other neurons"
    rows = pd.DataFrame([row for row, _ in found])
    rows["speedup"] = rows["seconds"].iloc[0] / rows["seconds"]
    print(f"{len(prompts)} prompts; 0 workers is this process alone\n{rows.round(2).to_string(index=False)}")
    report = {"prompts": len(prompts), "cores": os.cpu_count(), "rows": rows.round(3).to_dict("records")}
    write_atomic(paths.BUILD / "benchmarks" / "workers.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
