"""What all figures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib


@contextmanager
def literal_text() -> Iterator[None]:
    """Has figures that are made and drawn inside show names as they are, also as a decorator.

    matplotlib would take what stands between two dollar signs for a formula.
    """
    with matplotlib.rc_context({"text.parse_math": False}):
        yield
