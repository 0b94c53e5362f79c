#!/usr/bin/env python
"""Examine the environment: what is installed, what is broken, and the command that fixes it.

Usage:
    python tools/doctor.py
    python tools/doctor.py --json > environment.json
    python tools/doctor.py --ops     # a missing compiled detectron2 is an error

It runs with any Python that is 3.8 or newer, whatever else is broken. The exit status is 1 where
something fails that training or evaluating needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import chain

from health import data, machine, software
from health.finding import ERROR, Finding, probe, version_of

_DISTRIBUTIONS = (
    "torch",
    "torchvision",
    "detectron2",
    "timm",
    "numpy",
    "Pillow",
    "setuptools",
    "pip",
    "fvcore",
    "iopath",
    "omegaconf",
    "hydra-core",
    "tensorboard",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--ops", action="store_true", help="take missing compiled operators for an error"
    )
    options = parser.parse_args(arguments)
    environment = describe()
    findings = []
    if not options.json:
        width = max(map(len, environment))
        for name, value in environment.items():
            print(f"{name:<{width}}  {value}")
        print()
    for finding in examine(options.ops):
        findings.append(finding)
        if not options.json:
            print(_lines(finding), flush=True)
    errors = sum(finding.state == ERROR for finding in findings)
    if options.json:
        checks = [finding._asdict() for finding in findings]
        print(
            json.dumps({"ok": not errors, "environment": environment, "checks": checks}, indent=2)
        )
    else:
        print(
            "\n" + ("all is well" if not errors else f"errors: {errors}; fix the first one first")
        )
    return int(errors > 0)


def examine(needs_operators: bool) -> Iterator[Finding]:
    """Runs all checks, in the order in which what they find is to be fixed.

    Args:
        needs_operators: whether detectron2's compiled operators are asked for.
    """
    yield from software.check_python()
    torch = probe(software.PROBE)
    yield from software.check_torch(torch)
    yield from software.check_packages()
    yield from software.check_detectron2(needs_operators)
    yield from machine.check_gpus(torch, machine.nvidia_gpus())
    root = data.datasets_root()
    package = probe(data.PROBE, root)
    yield from chain(data.check_package(package), machine.check_disks("."))
    yield from data.check_datasets(package, root)


def describe() -> dict[str, str]:
    """Versions and facts of the machine, by name; nothing is imported for them."""
    versions = {name: version_of(name) or "not installed" for name in _DISTRIBUTIONS}
    return {
        "python": f"{sys.version.split()[0]}, {sys.executable}",
        **versions,
        "driver": "; ".join(machine.nvidia_gpus()) or "no NVIDIA GPU",
        **machine.describe(),
        "datasets": data.datasets_root(),
    }


def _lines(finding: Finding) -> str:
    text = f"{finding.state:<5}  {finding.topic:<12} {finding.text}"
    return text if finding.command is None else f"{text}\n{'':20}$ {finding.command}"


if __name__ == "__main__":
    sys.exit(main())
