import math
import typing

import pytest

from nemolib import paper


def test_a_number_shows_its_confidence():
    assert str(paper.reported("threshold")) == "0.428"
    assert str(paper.reported("prompts.vm")) == "112 (code)"
    assert str(paper.reported("neurons.tm")) == "21 ± 18"


def test_every_number_has_a_source_and_a_known_confidence():
    known = set(typing.get_args(paper.Confidence))
    for name, number in paper.REPORTED.items():
        assert number.source, name
        assert number.confidence in known, name
        assert math.isfinite(number.value), name
    assert set(paper.detection()["confidence"]) <= known


def test_an_unknown_number_is_named():
    with pytest.raises(KeyError, match=r"unknown number 'tau'; known: prompts\.memorized"):
        paper.reported("tau")


def test_the_numbers_agree_with_each_other():
    thresholds = paper.thresholds().set_index("multiplier")["paper"]
    mean, sd = paper.reported("threshold.mean").value, paper.reported("threshold.sd").value
    for multiplier, value in thresholds.items():
        assert value == pytest.approx(mean + multiplier * sd, abs=1e-9)
    assert paper.reported("prompts.vm").value + paper.reported("prompts.tm").value == 500
    times = paper.table_2().pivot_table(index="kind", columns="algorithm", values="seconds")
    # The total of VM prompts is 0.02 s above the sum: rounding in the paper.
    assert (times[["A1", "A2", "A3", "A4"]].sum(axis=1) - times["total"]).abs().max() < 0.03


def test_tables_1_and_4_have_both_kinds_of_every_setting():
    for table, settings in ((paper.table_1(), 8), (paper.table_4(), 14)):
        assert len(table) == 2 * settings
        assert (table.groupby("setting")["kind"].agg(set).map(sorted) == [["tm", "vm"]] * settings).all()
        assert not table.isna().any().any()
    found = paper.table_1().set_index(["setting", "kind"]).loc[("NeMo", "vm")]
    assert found["neurons"] == paper.reported("neurons.vm").value
    assert found["sscd_orig_mad"] == 0.06
