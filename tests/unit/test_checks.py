import math

import pytest
import torch

from nemolib.checks import ClaimError, check_table, claim, comparison, lacking, rounding


def test_claims_and_comparisons_stand_in_one_table():
    table = check_table(
        [
            claim("AUROC", 0.9912, at_least=0.98, paper=0.9964, reason="bound"),
            claim("between", 0.4, at_least=0, at_most=1),
            claim("equal", 2.0, equals=2.001, atol=0.01),
            claim("small", 3e-7, at_most=1e-5),
            claim("true", True),
            comparison("threshold", 0.39, paper="0.428"),
        ]
    )
    assert table["claim"].tolist() == ["AUROC", "between", "equal", "small", "true", "threshold"]
    assert table["ours"].tolist() == ["0.991", "0.4", "2", "3e-07", "1", "0.39"]
    assert table["bound"].tolist() == [">= 0.98", "0 to 1", "1.991 to 2.011", "<= 1e-05", "1 to 1", ""]
    assert table["result"].tolist() == ["holds"] * 5 + ["beside"]
    assert table["paper"].tolist() == ["0.9964", "", "", "", "", "0.428"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (claim("AUROC of VM", 0.97, at_least=0.98), r"AUROC of VM: 0\.97, must be >= 0\.98"),
        (claim("difference", 0.1, at_most=0.01), r"difference: 0\.1, must be <= 0\.01"),
        (claim("tau", 0.4, equals=0.5, atol=0.01), r"tau: 0\.4, must be 0\.49 to 0\.51"),
        (claim("same bytes", False), "same bytes: 0"),
        (claim("missing", math.nan, at_least=0), "missing: nan"),
    ],
)
def test_a_claim_that_does_not_hold_is_named(row, message):
    with pytest.raises(ClaimError, match=message):
        check_table([claim("fine", 1, equals=1), row])


def test_all_that_fail_are_named():
    with pytest.raises(ClaimError, match="first: 0.*second: 0"):
        check_table([claim("first", False), claim("second", False)])


def test_a_comparison_never_fails():
    assert check_table([comparison("x", math.nan, paper=1)])["result"].tolist() == ["beside"]


def test_a_claim_needs_one_kind_of_bound():
    with pytest.raises(ValueError, match="'x' has the value 0.5 and no bound"):
        claim("x", 0.5)
    with pytest.raises(ValueError, match="both equals=1 and a bound"):
        claim("x", 0.5, equals=1, at_least=0)
    with pytest.raises(ValueError, match="no claims"):
        check_table([])


def test_a_row_without_what_it_takes_is_shown_and_not_checked():
    table = check_table(
        [
            claim("AUROC", 0.5, at_least=0.98, missing="1 VM prompt, 10 needed"),
            claim("rank", math.nan, at_least=0.3, missing=lacking(0, "ladder prompt", needed=2)),
            claim("median", 0.9, at_least=0.8, missing=lacking(12, "VM prompt", needed=10)),
            comparison("FID", math.nan, paper=1, missing="one image per prompt"),
        ]
    )
    assert table["result"].tolist() == [
        "not checked: 1 VM prompt, 10 needed",
        "not checked: no ladder prompts, 2 needed",
        "holds",
        "not checked: one image per prompt",
    ]
    assert table["ours"].tolist() == ["0.5", "", "0.9", ""]
    assert table["bound"].tolist() == [">= 0.98", ">= 0.3", ">= 0.8", ""]


def test_a_claim_that_could_be_checked_still_fails():
    with pytest.raises(ClaimError, match="AUROC: 0.5"):
        check_table([claim("AUROC", 0.5, at_least=0.98, missing=lacking(10, "VM prompt", needed=10))])


def test_rounding_follows_from_the_type():
    assert rounding(torch.float32) == 1e-4
    assert rounding(torch.float32, at_least=1e-3) == 1e-3
    assert rounding(torch.float16) == pytest.approx(8 / 1024)
    assert rounding(torch.bfloat16) == pytest.approx(8 / 128)
