#!/usr/bin/env python
"""Feed random batches and options to every contrast method and loss: numbers have to stay finite.

Usage:
    python tools/fuzz.py --examples 5000 --seed 0 --output results/reliability_fuzz.json
    python tools/fuzz.py --examples 200 --seed 7 pne contextrast

The cases and what is checked are those of tests/contrast/fuzzing.py and tests/losses/fuzzing.py. A
case that fails is made as small as it gets and printed, to be kept as an example of the tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
sys.path.insert(0, str(Path(__file__).parents[1]))

# ruff: noqa: E402
import hypothesis
import torch
from bench.machine import note
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from tests.contrast import fuzzing as contrast
from tests.losses import fuzzing as losses

SUBJECTS: dict[str, tuple[SearchStrategy, Callable[[Any], bool]]] = {
    **{name: (cases, contrast.run_case) for name, cases in contrast.STRATEGIES.items()},
    "losses": (losses.cases(), losses.run_case),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 1 for a mistake, 2 where a case fails.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "subjects",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(SUBJECTS)} (default: all)",
    )
    parser.add_argument("--examples", type=int, default=1000, help="of each (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write a JSON file")
    options = parser.parse_args(arguments)
    for name in options.subjects:
        if name not in SUBJECTS:
            print(f"error: {name}: choose of {', '.join(SUBJECTS)}.", file=sys.stderr)
            return 1
    if options.examples < 1:
        print(f"error: --examples {options.examples}: needs at least 1.", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    rows = {
        name: fuzz(name, options.examples, options.seed) for name in options.subjects or SUBJECTS
    }
    if options.output:
        report = {
            **note(torch.device("cpu")),
            "hypothesis": hypothesis.__version__,
            "seed": options.seed,
            "subjects": rows,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 2 if any(row["failed"] for row in rows.values()) else 0


def fuzz(name: str, examples: int, seed: int) -> dict[str, Any]:
    """Runs the cases of one subject.

    Returns:
        How many cases there were, in how many of them a loss was above 0, whether one failed, and
        the seconds that they took.
    """
    cases, run_case = SUBJECTS[name]
    counts = {"cases": 0, "with_loss": 0, "failed": False}

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Any) -> None:
        counts["cases"] += 1
        counts["with_loss"] += run_case(case)

    start = time.perf_counter()
    try:
        run()
    except Exception:  # whatever a method raises is what is looked for
        counts["failed"] = True
        traceback.print_exc()
    counts["seconds"] = round(time.perf_counter() - start, 1)
    print(f"{name}: {counts}", flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(main())
