"""What more processes bring: seconds for the localization of prompts of the tiny world on 1, 2, ... workers.

    python benchmarks/workers.py                          # 12 prompts, 1 and 2 workers
    python benchmarks/workers.py --prompts 40 --workers 1 2 4

Every worker has one thread. What a local cluster and the workers' models need to start is shown apart. All tables must
be equal, bit by bit. A table is printed, and written to ``build/benchmarks/workers.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import chain, islice, zip_longest

import pandas as pd
import torch

from nemolib import experiments, paths, tables, workers
from nemolib.files import write_atomic
from nemolib.holdout import ActivationStatistics
from nemolib.localization import localize_many
from nemolib.pipeline import load_pipeline
from nemolib.profiles import Profile, load_profile
from nemolib.prompts import MEMORIZED, select

OUTPUT = paths.BUILD / "benchmarks" / "workers.json"


def chosen_prompts(profile: Profile, number: int) -> list[str]:
    """Return the first memorized prompts, kinds in turn."""
    kinds = [select(profile, kind)["caption"] for kind in MEMORIZED]
    return list(islice((caption for caption in chain(*zip_longest(*kinds)) if caption), number))


def measure(
    number: int, profile: Profile, prompts: list[str], normal: ActivationStatistics, tau: float
) -> tuple[dict[str, float], pd.DataFrame]:
    """Return what a number of workers took, and the table that they gave; 0 is this process."""
    os.environ[workers.VARIABLE] = f"local:{number}" if number else "off"
    pipe, started = load_pipeline(profile), time.perf_counter()
    with workers.cluster(profile) as client:
        if client is not None:
            client.wait_for_workers(number)
            # Every worker loads its model with its first prompt; here it does before the clock starts.
            localize_many(pipe, prompts[:number], normal, threshold=tau, progress=False)
        ready = time.perf_counter()
        table = localize_many(pipe, prompts, normal, threshold=tau, progress=False)
        done = time.perf_counter()
    return {"workers": number, "start": ready - started, "seconds": done - ready}, table


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ[workers.VARIABLE] = "off"
    profile = load_profile("tiny")
    pipe = load_pipeline(profile)
    normal = experiments.statistics(pipe, profile, progress=False)
    tau = experiments.threshold(pipe, profile, progress=False)
    prompts = chosen_prompts(profile, arguments.prompts)
    found = [measure(number, profile, prompts, normal, tau) for number in [0, *arguments.workers]]
    for _, table in found[1:]:
        pd.testing.assert_frame_equal(found[0][1], table, check_exact=True)
    rows = pd.DataFrame([row for row, _ in found])
    rows = rows.assign(speedup=rows["seconds"].iloc[0] / rows["seconds"])
    sys.stdout.write(f"{len(prompts)} prompts; 0 workers is this process alone\n{tables.to_markdown(rows.round(2))}\n")
    report = {"prompts": len(prompts), "cores": os.cpu_count(), "rows": rows.round(3).to_dict("records")}
    write_atomic(OUTPUT, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
