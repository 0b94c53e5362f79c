"""What a check finds, and how it looks at packages that may be broken."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

OK, NOTE, ERROR = "ok", "note", "error"

# Importing torch from a cold network disk takes minutes.
_PATIENCE = 600


class Finding(NamedTuple):
    """One sentence about one thing."""

    topic: str
    state: str
    """OK; NOTE, where something is slower, smaller or missing without harm; or ERROR, where
    training or evaluating fails."""
    text: str
    command: str | None = None
    """What fixes it, to be pasted into a shell."""


class Answer(NamedTuple):
    """What a probe gave: `values`, or else why it has none."""

    values: dict
    error: str | None


def probe(code: str, *arguments: str) -> Answer:
    """Runs Python code in a process of its own, which an import may take down.

    Args:
        code: prints a JSON object as its last line.
        arguments: its `sys.argv[1:]`.
    """
    # python -c looks in the current folder first, where a checkout of detectron2 may lie.
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired:
            return Answer({}, f"no answer within {_PATIENCE} s")
    if done.returncode < 0:
        return Answer({}, f"the interpreter was ended by signal {-done.returncode}")
    try:
        return Answer(json.loads(done.stdout.splitlines()[-1]), None)
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines() or [f"it ends with status {done.returncode}"]
        return Answer({}, one_line(lines[-1]))


def one_line(text: str) -> str:
    """The text without line breaks, cut where it is long, and without a full stop."""
    return " ".join(text.split())[:300].rstrip(".")


def pip(*arguments: str) -> str:
    """The command that runs pip for this interpreter."""
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def python(*arguments: str) -> str:
    """The command that runs this interpreter."""
    return shlex.join([sys.executable, *arguments])


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, read without importing it."""
    try:
        return metadata.version(distribution)
    except Exception:  # also of metadata that a killed installation left torn
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 14, 1) of "2.14.1+cu130"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version lies within the bounds of a requirement, such as ">=1.0,<2"."""
    found = release(version)
    for sign, bound in re.findall(r"(>=|<)\s*([\d.]+)", requirement):
        least = release(bound)
        length = max(len(found), len(least))
        a, b = (numbers + (0,) * (length - len(numbers)) for numbers in (found, least))
        if (a < b) == (sign == ">="):
            return False
    return True


def pinned(*names: str) -> list[str]:
    """The versions of requirements/pinned.txt, as pip takes them."""
    try:
        lines = (ROOT / "requirements/pinned.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return [f"{name}=={pins[name]}" if name in pins else name for name in names]
