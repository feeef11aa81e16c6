"""A localization of a few prompts with a store, to be run here or in a process that ends in the middle.

Run as ``python localization_run.py <model folder> <run folder>`` with the repository on the path: it is killed once the
results of two prompts are kept.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

PROMPTS = [f"prompt {number}" for number in range(6)]


def run(model_folder, folder):
    """Write ``store`` and ``table.csv`` into the folder, and each prompt that is computed into ``log``."""
    from unittest.mock import patch

    from nemolib import localization
    from nemolib.holdout import activation_statistics
    from nemolib.pipeline import load_pipeline
    from nemolib.run import localize_many
    from nemolib.settings import PUBLISHED, DetectionSettings, GenerationSettings, SearchSettings, SimilaritySettings
    from nemolib.store import Store, write_table

    original = localization.embed

    def logged(pipe, prompts, **settings):
        with (folder / "log").open("a") as file:
            file.writelines(f"{prompt}\n" for prompt in prompts)
        return original(pipe, prompts, **settings)

    # Two searches at once.
    own = dataclasses.replace(PUBLISHED, model=str(model_folder), generation=GenerationSettings(batch_size=2))
    pipe = load_pipeline(own, device="cpu")
    statistics = activation_statistics(pipe, [f"{a} {b}" for a in "abcd" for b in "efg"], progress=False)
    with patch.object(localization, "embed", logged):
        table = localize_many(
            pipe,
            PROMPTS,
            statistics,
            threshold=0.5,
            gate=-0.9,
            detection=DetectionSettings(samples=2),
            similarity=SimilaritySettings(kernel_size=3, sigma=0.5),
            search=SearchSettings(theta_start=2.5, theta_step=1.0, theta_min=1.5),
            store=Store(folder / "store"),
            progress=False,
        )
    write_table(table, folder / "table.csv")


if __name__ == "__main__":
    from nemolib.store import Store

    keep, kept = Store.put, []

    def put(*args):
        kept.append(keep(*args))
        if len(kept) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Store.put = put
    run(*map(Path, sys.argv[1:]))
