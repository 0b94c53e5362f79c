"""What all figures share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import matplotlib


def literal_text() -> AbstractContextManager[Any]:
    """Has figures that are made and drawn inside show names as they are, also as a decorator.

    matplotlib would take what stands between two dollar signs for a formula.
    """
    return matplotlib.rc_context({"text.parse_math": False})
