"""Fixtures of the tests of the tools."""

from __future__ import annotations

import runpy
from collections.abc import Callable

import pytest


@pytest.fixture
def main(request: pytest.FixtureRequest) -> Callable[[list[str]], int]:
    """`main` of the module's `TOOL`, a path, to be called in this process."""
    return runpy.run_path(str(request.module.TOOL))["main"]
