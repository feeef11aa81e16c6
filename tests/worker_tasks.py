"""Tasks for `nemolib.workers.map_prompts` that other processes can import."""

import os
import signal
from pathlib import Path


def lengths(pipe, *, add):
    """Return what counts the letters of each prompt; the prompt ``bad`` raises."""

    def count(batch):
        if "bad" in batch:
            raise ValueError("no such prompt")
        return [len(prompt) + add for prompt in batch]

    return count


def deadly(pipe, *, marker):
    """Return what counts letters, and kills its own process the first time that it sees the prompt ``deadly``."""

    def count(batch):
        if "deadly" in batch and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [len(prompt) for prompt in batch]

    return count
