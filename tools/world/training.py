"""A training loop that resumes at the step where it was interrupted, and gives the same weights as if it had not been.

All randomness of a step comes from generators seeded by (stage seed, step), so there is no random state to save.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where all stages are trained."""

WARMUP = 100
"""Steps in which the learning rate rises."""


@dataclass
class Stage:
    """What one training stage needs.

    Attributes:
        name: file name of the checkpoint and of the loss log.
        settings: steps, cooldown, seed and (peak) learning_rate; see ``schedule``.
        modules: by name; parameters that require a gradient are trained, the others kept (moving averages). They are
            moved to a GPU if there is one.
        loss: (step, generators) -> named losses; "loss" is minimized, the others are logged.
        fingerprint: hash of the settings; a checkpoint of other settings is refused.
        weight_decay: of AdamW.
        after_step: called after each optimizer step.
    """

    name: str
    settings: Any
    modules: dict[str, nn.Module]
    loss: Callable[[int, "Generators"], dict[str, torch.Tensor]]
    fingerprint: str
    weight_decay: float = 0.0
    after_step: Callable[[int], None] = lambda step: None

    def __post_init__(self) -> None:
        """Move the modules to the device and make the optimizer."""
        for module in self.modules.values():
            module.to(DEVICE)
        parameters = (parameter for module in self.modules.values() for parameter in module.parameters())
        self.trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.settings.learning_rate, weight_decay=self.weight_decay)


class Generators:
    """The random generators of one step, for numpy and for torch; they depend on nothing but seed and step."""

    def __init__(self, seed: int, step: int) -> None:
        sequence = np.random.SeedSequence([seed, step])
        self.numpy = np.random.default_rng(sequence)
        self.torch = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))


def schedule(step: int, *, steps: int, cooldown: int) -> float:
    """Return the factor on the peak learning rate: up, level, and linearly down to zero in the last ``cooldown`` steps.

    While the level lasts, a run can be made longer: nothing before depends on the number of steps.
    """
    return min(1.0, (step + 1) / WARMUP, (steps - step) / cooldown)


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
    records = _restore(stage, checkpoint)
    start, spent = (records[-1]["step"], records[-1]["seconds"]) if records else (0, 0.0)
    began, saved, sums, steps = time.monotonic() - spent, time.monotonic(), {}, stage.settings.steps
    bar = tqdm(range(start, steps), desc=stage.name, unit="step", initial=start, total=steps, mininterval=5)
    for step in bar:
        for name, value in _step(stage, step).items():
            sums.setdefault(name, []).append(value)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            means = {name: float(np.mean(values)) for name, values in sums.items()}
            records.append({"step": step + 1, "seconds": round(time.monotonic() - began, 1), **means})
            log.write_text("".join(json.dumps(record) + "\n" for record in records))
            bar.set_postfix(loss=f"{means['loss']:.4f}")
            sums = {}
            # Only where the log is written: a resumed run then continues both at the same step.
            if time.monotonic() - saved > save_every or step + 1 == steps:
                _save(stage, checkpoint, records)
                saved = time.monotonic()
    return log


def _step(stage: Stage, step: int) -> dict[str, float]:
    settings = stage.settings
    factor = schedule(step, steps=settings.steps, cooldown=settings.cooldown)
    rate = settings.learning_rate * factor
    for group in stage.optimizer.param_groups:
        group["lr"] = rate
    losses = stage.loss(step, Generators(settings.seed, step))
    stage.optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    nn.utils.clip_grad_norm_(stage.trained, 1.0)
    stage.optimizer.step()
    stage.after_step(step)
    return {name: float(value.detach()) for name, value in losses.items()}


def _save(stage: Stage, path: Path, records: list[dict[str, float]]) -> None:
    state = {
        "fingerprint": stage.fingerprint,
        "log": records,
        "optimizer": stage.optimizer.state_dict(),
        "modules": {name: module.state_dict() for name, module in stage.modules.items()},
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _restore(stage: Stage, path: Path) -> list[dict[str, float]]:
    """Put a stage where its checkpoint has it; return the records of the log up to there."""
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True, map_location=DEVICE)
    if state["fingerprint"] != stage.fingerprint:
        raise ValueError(
            f"{path} is of other settings, or from another model; delete it to train stage {stage.name!r} anew"
        )
    for name, module in stage.modules.items():
        module.load_state_dict(state["modules"][name])
    stage.optimizer.load_state_dict(state["optimizer"])
    return state["log"]
