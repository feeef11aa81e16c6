"""Tasks for `nemolib.workers.map_prompts` that other processes can import."""


def lengths(pipe, *, add):
    """Return what counts the letters of each prompt; the prompt ``bad`` raises."""

    def count(batch):
        if "bad" in batch:
            raise ValueError("no such prompt")
        return [len(prompt) + add for prompt in batch]

    return count


def captions(pipe):
    """Return what gives captions back."""
    return lambda batch: list(batch)


def unfit(pipe):
    """Raise before anything is computed."""
    raise RuntimeError("no such setting")
