"""``python -m tools.world``: train the tiny world, export it to ``data/tiny``, write its model card."""

import argparse
from pathlib import Path

from nemolib import paths
from tools.world import build, card
from tools.world.dataset import build_dataset
from tools.world.settings import WorldSettings


def main() -> None:
    """Train what is not trained yet, export it, measure it."""
    parser = argparse.ArgumentParser(prog="python -m tools.world", description=__doc__)
    parser.add_argument("--work", type=Path, default=paths.BUILD / "train", help="checkpoints, logs, variants")
    parser.add_argument("--out", type=Path, default=paths.DATA / "tiny", help="what is shipped")
    chosen, settings = parser.parse_args(), WorldSettings()
    data = build_dataset(settings.data)
    for stage in build.STAGES:
        build.run_stage(stage, settings, data, chosen.work)
    build.export(settings, data, chosen.work, chosen.out)
    for name, folder in build.folders(chosen.work, chosen.out).items():
        build.assemble(chosen.work, folder, name=name)
    card.write_results(settings, chosen.work, chosen.out)


if __name__ == "__main__":
    main()
