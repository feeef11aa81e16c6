"""The training loop: what it reaches does not depend on interruptions."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from tools.world.training import Stage, run, schedule


class Interrupted(Exception):
    """Stands for a killed process."""


def _stage(*, stop_at: int | None = None, fingerprint: str = "a", steps: int = 12) -> Stage:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(step, random):
        if step == stop_at:
            raise Interrupted
        inputs = torch.randn(4, 3, generator=random.torch) + float(random.numpy.normal())
        return {"loss": (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()}

    settings = SimpleNamespace(steps=steps, cooldown=4, seed=7, learning_rate=0.1)
    return Stage("line", settings, {"line": model}, loss, fingerprint, weight_decay=0.01)


def _run(stage, folder):
    log = pd.read_json(run(stage, folder, save_every=0.0, log_every=2), lines=True)
    return stage.modules["line"].state_dict(), log[["step", "loss"]].to_dict("records")


@pytest.mark.parametrize("stop_at", [1, 5, 6, 11])
def test_an_interrupted_run_ends_with_the_weights_and_the_log_of_an_uninterrupted_one(tmp_path, stop_at):
    weights, log = _run(_stage(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        _run(_stage(stop_at=stop_at), tmp_path / "cut")
    (tmp_path / "cut" / "line.log.jsonl").write_text('{"step": 8, "lo')  # cut as well
    for stage in (_stage(), _stage(stop_at=0)):  # a finished stage is not trained again
        resumed, resumed_log = _run(stage, tmp_path / "cut")
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)
        assert resumed_log == log
    assert [record["step"] for record in log] == [2, 4, 6, 8, 10, 12]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    _, log = _run(_stage(), tmp_path)
    with pytest.raises(ValueError, match="from another model; delete it"):
        _run(_stage(fingerprint="b"), tmp_path)
    assert _run(_stage(), tmp_path)[1] == log


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    factors = [schedule(step, steps=1000, cooldown=200) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[99:801] == [1.0] * 702
    assert factors[900] == pytest.approx(0.5)
    assert factors[1000] == 0.0


def test_before_it_falls_a_run_can_be_made_longer(tmp_path):
    weights, _ = _run(_stage(steps=20), tmp_path / "long")
    with pytest.raises(Interrupted):
        _run(_stage(stop_at=8), tmp_path / "cut")
    longer, _ = _run(_stage(steps=20), tmp_path / "cut")
    assert all(torch.equal(weights[name], longer[name]) for name in weights)
