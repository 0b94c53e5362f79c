"""No batch and no options make a method's loss or gradients other than finite, or leave a parameter
without one. `tools/fuzz.py` looks longer."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from .fuzzing import BUILDERS, STRATEGIES, Batch, Case, run_case

# What has failed once.
FOUND = [
    # Rows that pad a draw, far from its two equal vectors: infinite in fp16, and gradients nan.
    Case(
        "multi_scale",
        Batch(
            seed=0,
            num_classes=2,
            height=24,
            width=24,
            layout="noise",
            ignored=0.99,
            exponent=3,
            precision="fp16",
        ),
        {
            "embed_dim": 1,
            "num_hidden": 1,
            "norm": "batch",
            "order": "relu_norm",
            "projection": "sampled",
        },
        {
            "scale_weights": {"res2": 0.001},
            "cross_scale": [("res2", "res3", 0.001), ("res2", "res4", 0.001)],
            "temperature": 0.01,
        },
        {"sampler": {"max_anchors": 4, "min_per_class": 0}},
    ),
]


@pytest.mark.parametrize("name", BUILDERS)
def test_every_method_stays_finite(name: str) -> None:
    counted = [0, 0]

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(STRATEGIES[name])
    def run(case: Case) -> None:
        counted[run_case(case)] += 1

    run()
    # Cases without anything to contrast are part of it, and not all of it.
    assert min(counted) >= 3


def test_what_was_found_stays_fixed() -> None:
    for case in FOUND:
        assert run_case(case)
