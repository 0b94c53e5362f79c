"""The pages for users, taken apart: fenced blocks, the commands in them, and those in the text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "contrast-d2", "torchrun", "make", "pip")

_BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPOKEN_OF = re.compile(
    r"(python (train_net\.py|tools/)|contrast-d2 [a-z]|make [a-z]|pip install )"
)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: relative to the root.
        number: among the blocks of the page.
        language: what stands behind the opening fence.
        text: what is inside.
    """

    page: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}[{self.number}]"


class Command(NamedTuple):
    """A command line of a page: where it stands, and its words."""

    place: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.words)[:60]}"


def blocks_of(path: Path) -> Iterator[Block]:
    page = path.relative_to(ROOT).as_posix()
    for number, (language, text) in enumerate(_BLOCK.findall(path.read_text())):
        yield Block(page, number, language, text)


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a block: its lines that begin with one of `PROGRAMS`."""
    for line in block.text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\(machine \d\) ", "", line)
        if line.startswith(tuple(f"{program} " for program in PROGRAMS)):
            yield Command(str(block), shlex.split(line, comments=True))


def commands_in_text(path: Path) -> Iterator[Command]:
    """Commands between single backticks, and in them alone."""
    text = _BLOCK.sub("", path.read_text())
    for code in _INLINE.findall(text):
        words = " ".join(code.split())
        if _SPOKEN_OF.match(words):
            try:
                yield Command(path.relative_to(ROOT).as_posix(), shlex.split(words))
            except ValueError as error:
                raise ValueError(f"{path}: {words}") from error
