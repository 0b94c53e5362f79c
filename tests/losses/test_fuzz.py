"""No batch makes a segmentation loss other than finite. `tools/fuzz.py` looks longer."""

from __future__ import annotations

from hypothesis import given, settings

from .fuzzing import Case, cases, run_case


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(cases())
def test_every_loss_stays_finite(case: Case) -> None:
    run_case(case)
