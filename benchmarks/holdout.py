"""What the activation statistics cost: time and peak memory against the number of holdout prompts.

    python benchmarks/holdout.py                        # 1,000, 10,000 and 50,000 prompts
    python benchmarks/holdout.py --prompts 500 1000     # others

Texts are made of words of the tiny world's holdout captions, short and all different. Each number of prompts runs in a
process of its own, so that peaks can be compared; what the process needs before (libraries, model) is given beside it.
A table is printed and written to ``build/benchmarks/holdout.json``. Time should be linear and memory constant: seconds
per prompt and the peak should hardly change from row to row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import pandas as pd

import nemolib
from nemolib import paths
from nemolib.paths import write_atomic
from nemolib.prompts import select

OUTPUT = paths.BUILD / "benchmarks" / "holdout.json"


def texts(number: int) -> list[str]:
    """Return so many short texts, all different, of words of the tiny world's holdout captions."""
    captions = select(nemolib.load_profile("tiny"), "holdout")["caption"]
    words = list(dict.fromkeys(" ".join(captions).split()))
    size = len(words)
    triples = ((i, (i + shift) % size, (i + 2 * shift) % size) for shift in range(1, size) for i in range(size))
    return [" ".join(words[i] for i in triple) for triple in itertools.islice(triples, number)]


def peak() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def measure(number: int) -> dict[str, float]:
    """Return the cost of the statistics of a number of prompts, measured in this process.

    Returns:
        prompts, seconds, peak_mib (largest resident memory) and model_mib (the same before the statistics).
    """
    pipe, prompts = nemolib.load_pipeline("tiny"), texts(number)
    # The first pass allocates what every later one uses again.
    nemolib.activation_statistics(pipe, prompts[:128], progress=False)
    before = peak()
    start = time.perf_counter()
    statistics = nemolib.activation_statistics(pipe, prompts, progress=False)
    seconds = time.perf_counter() - start
    assert statistics.count == number, "there are too few words for so many texts"
    return {"prompts": number, "seconds": seconds, "peak_mib": peak(), "model_mib": before}


def measure_apart(number: int) -> dict[str, float]:
    """Return what `measure` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, number).result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print a table, and write ``build/benchmarks/holdout.json``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    options = parser.parse_args(arguments)
    if min(options.prompts) < 2:
        parser.error("statistics need at least two prompts")
    rows = []
    for number in options.prompts:
        rows.append(measure_apart(number))
        print(f"  {number} prompts: {rows[-1]['seconds']:.1f} s, {rows[-1]['peak_mib']:.0f} MiB", flush=True)
    table = pd.DataFrame(rows)
    table["ms_per_prompt"] = 1000 * table["seconds"] / table["prompts"]
    print("\n" + table.round(2).to_string(index=False))
    write_atomic(OUTPUT, json.dumps({"statistics": table.round(4).to_dict(orient="records")}, indent=2) + "\n")
    print(f"\nwritten: {OUTPUT}")


if __name__ == "__main__":
    main()
