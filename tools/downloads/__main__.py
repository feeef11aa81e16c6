"""``python -m nemolib.downloads --profile sd14``: fetch what a profile needs; ``make data PROFILE=sd14`` calls it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from nemolib.downloads.fetch import PARTS, Outcome, fetch_data
from nemolib.downloads.manifest import ManifestError
from nemolib.profiles import ProfileError, load_profile


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the data of a profile from the command line; return the exit status, 1 if something needed is missing."""
    parser = argparse.ArgumentParser(prog="python -m nemolib.downloads", description=__doc__)
    parser.add_argument("--profile", default=os.environ.get("PROFILE") or "sd14", help="default: $PROFILE, else sd14")
    parser.add_argument("--only", choices=PARTS, action="append", help="fetch only this; may be given again")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    try:
        profile = load_profile(arguments.profile)
        outcomes = fetch_data(
            profile, parts=arguments.only or PARTS, progress=not arguments.no_progress, report=_say
        )  # fmt: skip
    except (ProfileError, ManifestError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was fetched stays, run again to go on\n")
        return 130
    if not outcomes:
        sys.stdout.write(f"profile {profile.name}: nothing to fetch, everything is in the repository\n")
    failed = [item for item in outcomes if item.status == "failed"]
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(outcomes)} failed: {', '.join(item.thing for item in failed)}\n")
    return 1 if failed else 0


def _say(outcome: Outcome) -> None:
    stream = sys.stderr if outcome.status == "failed" else sys.stdout
    note = outcome.note.removeprefix(f"{outcome.thing}: ")
    stream.write(f"{outcome.status:>10}  {outcome.thing}: {note}\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
