"""The search of the tiny world on two processes gives the table that one gives."""

import pandas as pd
import pytest
import torch

from nemolib import workers
from nemolib.holdout import activation_statistics
from nemolib.pipeline import load_pipeline
from nemolib.prompts import select
from nemolib.run import localize_many
from nemolib.settings import load_profile
from nemolib.store import Store

pytestmark = [pytest.mark.world, pytest.mark.slow]


def test_two_processes_find_the_same_neurons(monkeypatch, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        profile = load_profile("tiny")
        pipe = load_pipeline(profile)
        monkeypatch.setenv(workers.VARIABLE, "off")
        normal = activation_statistics(pipe, select(profile, "holdout")["caption"].head(200).tolist(), progress=False)
        prompts = [caption for kind in ("vm", "tm") for caption in select(profile, kind)["caption"].head(2)]
        tables = {}
        for choice in ("off", "local:2"):
            monkeypatch.setenv(workers.VARIABLE, choice)
            store = Store(tmp_path / choice.partition(":")[0])
            tables[choice] = localize_many(pipe, prompts, normal, threshold=0.45, store=store, progress=False)
    finally:
        torch.set_num_threads(before)
    pd.testing.assert_frame_equal(tables["off"], tables["local:2"], check_exact=True)
    assert tables["off"]["memorized"].all()
