"""A training loop that resumes at the step where it was interrupted, and gives the same weights as if it had not been.

All randomness of a step comes from generators seeded by (stage seed, step), so there is no random state to save.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm


@dataclass
class Stage:
    """What one training stage needs.

    Attributes:
        name: file name of the checkpoint and of the loss log.
        settings: steps, seed and (peak) learning_rate; see ``schedule``.
        modules: by name; parameters that require a gradient are trained, the others kept (moving averages).
        loss: (step, generators) -> named losses; "loss" is minimized, the others are logged.
        fingerprint: hash of the settings; a checkpoint of other settings is refused.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        after_step: called after each optimizer step.
    """

    name: str
    settings: Any
    modules: dict[str, nn.Module]
    loss: Callable[[int, "Generators"], dict[str, torch.Tensor]]
    fingerprint: str
    weight_decay: float = 0.0
    warmup: int = 100
    after_step: Callable[[int], None] = lambda step: None

    def __post_init__(self) -> None:
        """Make the optimizer."""
        parameters = (parameter for module in self.modules.values() for parameter in module.parameters())
        self.trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.settings.learning_rate, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Generators:
    """The random generators of one step, for numpy and for torch."""

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> "Generators":
        """Return the generators of a step; they depend on nothing else."""
        sequence = np.random.SeedSequence([seed, step])
        return cls(np.random.default_rng(sequence), torch.Generator().manual_seed(int(sequence.generate_state(1)[0])))


def schedule(step: int, *, steps: int, warmup: int) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def run(stage: Stage, folder: Path, *, save_every: float = 60.0, log_every: int = 20) -> Path:
    """Train the stage to its end, from its checkpoint in ``folder`` if there is one.

    Args:
        stage: the stage.
        folder: where ``<name>.checkpoint.pt`` and ``<name>.log.jsonl`` live.
        save_every: seconds between checkpoints.
        log_every: steps between lines of the log.

    Returns:
        The log file: one JSON object a line with the step, the seconds since the start and the mean losses.

    Raises:
        ValueError: the checkpoint belongs to other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{stage.name}.checkpoint.pt", folder / f"{stage.name}.log.jsonl"
    start, spent = _restore(stage, checkpoint)
    _cut_log(log, start)
    began, saved, sums, steps = time.monotonic() - spent, time.monotonic(), {}, stage.settings.steps
    bar = tqdm(range(start, steps), desc=stage.name, unit="step", initial=start, total=steps, mininterval=5)
    for step in bar:
        for name, value in _step(stage, step).items():
            sums.setdefault(name, []).append(value)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            means = {name: float(np.mean(values)) for name, values in sums.items()}
            _append(log, {"step": step + 1, "seconds": round(time.monotonic() - began, 1), **means})
            bar.set_postfix(loss=f"{means['loss']:.4f}")
            sums = {}
            # Only where the log is written: a resumed run then continues both at the same step.
            if time.monotonic() - saved > save_every or step + 1 == steps:
                _save(stage, checkpoint, step + 1, time.monotonic() - began)
                saved = time.monotonic()
    return log


def _step(stage: Stage, step: int) -> dict[str, float]:
    settings = stage.settings
    rate = settings.learning_rate * schedule(step, steps=settings.steps, warmup=stage.warmup)
    for group in stage.optimizer.param_groups:
        group["lr"] = rate
    losses = stage.loss(step, Generators.of(settings.seed, step))
    stage.optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    nn.utils.clip_grad_norm_(stage.trained, 1.0)
    stage.optimizer.step()
    stage.after_step(step)
    return {name: float(value.detach()) for name, value in losses.items()}


def _save(stage: Stage, path: Path, step: int, seconds: float) -> None:
    state = {
        "fingerprint": stage.fingerprint,
        "step": step,
        "seconds": seconds,
        "optimizer": stage.optimizer.state_dict(),
        "modules": {name: module.state_dict() for name, module in stage.modules.items()},
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _restore(stage: Stage, path: Path) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    if state["fingerprint"] != stage.fingerprint:
        raise ValueError(f"{path} was trained with other settings; delete it to train stage {stage.name!r} anew")
    for name, module in stage.modules.items():
        module.load_state_dict(state["modules"][name])
    stage.optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _cut_log(log: Path, step: int) -> None:
    """Drop the lines after the checkpoint: they are written again."""
    if log.exists():
        kept = [line for line in log.read_text().splitlines() if _log_step(line) <= step]
        log.write_text("".join(line + "\n" for line in kept))


def _log_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # the line that an interruption cut
        return math.inf


def _append(log: Path, record: dict) -> None:
    with log.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(log: Path) -> Iterator[dict]:
    """Yield the records of a loss log."""
    return (json.loads(line) for line in log.read_text().splitlines())
