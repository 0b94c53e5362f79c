"""What a check finds, and how it is said."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple


class Severity(enum.Enum):
    """How bad a finding is; in the order in which findings are told."""

    ERROR = "error"
    """Training stops at it, or learns something else than what is meant."""
    WARNING = "warning"
    """Training runs, and its result may suffer."""
    NOTE = "note"
    """Good to know."""


class Finding(NamedTuple):
    """One thing that is wrong or odd, with all files that show it."""

    severity: Severity
    text: str
    """What is found, in sentences."""
    fix: str = ""
    """What fixes it: an entry of a file, a command, or what to do by hand."""
    files: tuple[str, ...] = ()
    """The files that show it, all of them."""


def error(text: str, fix: str = "", files: Iterable[str] = ()) -> Finding:
    """A finding that training cannot do with."""
    return Finding(Severity.ERROR, text, fix, tuple(files))


def warning(text: str, fix: str = "", files: Iterable[str] = ()) -> Finding:
    """A finding that training survives, at a price."""
    return Finding(Severity.WARNING, text, fix, tuple(files))


def note(text: str, fix: str = "", files: Iterable[str] = ()) -> Finding:
    """A finding that is only good to know."""
    return Finding(Severity.NOTE, text, fix, tuple(files))


def counted(count: int, singular: str, plural: str = "") -> str:
    """ "1 image", "2,000 images"."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def listed(items: Iterable[object], most: int = 8) -> str:
    """Items with commas; of many, the first ones and how many there are besides."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
