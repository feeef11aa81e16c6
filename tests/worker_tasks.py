"""Tasks for `nemolib.workers.map_prompts` that other processes can import."""


def captions(pipe):
    """Return what gives captions back."""
    return lambda batch: list(batch)


def unfit(pipe):
    """Raise before anything is computed."""
    raise RuntimeError("no such setting")
