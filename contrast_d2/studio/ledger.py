"""The ledger: what papers publish, with what settings, and which experiment file stands for it.

`configs/ledger.yaml` is the data; from it come the heads of the experiment files and the tables of
`docs/reproducing.md`.
"""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_WIDTH = 100
_COUNTS = {1: "One GPU", 2: "Two GPUs", 4: "Four GPUs"}
# What a group of settings holds beside settings.
_WORDS = ("paper", "says", "preset", "where", "multi_scale")
# Before the tables of the page, which the tool writes anew.
MARK = "<!-- Below: tools/reproducing.py writes it from configs/ledger.yaml. -->\n"


class Setting(NamedTuple):
    """What a config has to say.

    Attributes:
        value: as it stands in the config.
        source: "paper", "release", "follows", "author" or "third-party" with the place, or "ours".
        remark: what other sources have, or the reason for a choice of ours.
    """

    value: Any
    source: str
    remark: str = ""


class Row(NamedTuple):
    """The numbers of one file in one table.

    Attributes:
        paper: whose table it is, a key of `papers`.
        table: its name.
        cited: the source of numbers that the paper did not train, else empty.
        text: the numbers with their columns.
    """

    paper: str
    table: str
    cited: str
    text: str


class Ledger:
    """The content of `configs/ledger.yaml`.

    Args:
        path: of the file.

    Raises:
        ValueError: a name that the file does not define.
    """

    def __init__(self, path: Path) -> None:
        content = yaml.load(
            path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        self.papers: dict[str, Any] = content["papers"]
        self.experiments = {file: groups.split() for file, groups in content["experiments"].items()}
        self.readings: dict[str, str] = content["readings"]
        self._groups: dict[str, Any] = content["settings"]
        self._notes: dict[str, str] = content["notes"]
        self._words: dict[str, dict[str, str]] = content["words"]
        self._rows: dict[str, list[Row]] = {}
        for paper, table, cited, files, columns in self._tables():
            for file, values in files.items():
                row = Row(paper, table, cited, _numbers(columns, values))
                self._rows.setdefault(file, []).append(row)
        groups = itertools.chain.from_iterable(self.experiments.values())
        files = {*self._rows, *self.lost(), *self.readings, *self.readings.values(), *self._notes}
        for kind, unknown in (
            ("settings", set(groups) - self._groups.keys()),
            ("experiments", files - self.experiments.keys()),
        ):
            if unknown:
                raise ValueError(f"{path}: {', '.join(sorted(unknown))}: not under `{kind}`.")

    def _tables(self) -> Iterator[tuple[str, str, str, dict[str, list], list[tuple[str, int]]]]:
        """Paper, table, source, numbers by file, and columns with their decimals."""
        for paper, entry in self.papers.items():
            for table, content in entry["tables"].items():
                parts = {"": content.get("own", {}), **content.get("cited", {})}
                rows = [row for files in parts.values() for row in files.values()]
                columns = [
                    (name, max(_decimals(row[i]) for row in rows))
                    for i, name in enumerate(content["columns"])
                ]
                for cited, files in parts.items():
                    yield paper, table, cited, files, columns

    def lost(self) -> dict[str, tuple[str, str]]:
        """Paper and table of files whose number our copy of the paper does not show."""
        return {
            file: (paper, table)
            for paper, entry in self.papers.items()
            for table, content in entry["tables"].items()
            for file in content.get("lost", ())
        }

    def rows(self, file: str) -> list[Row]:
        """The published numbers that are bound to a file."""
        return self._rows.get(self.readings.get(file, file), [])

    def settings(self, file: str) -> dict[str, Setting]:
        """What the config of a file has to say, by name."""
        return {
            name: Setting(*entry)
            for group in self.experiments[file]
            for name, entry in self._groups[group].items()
            if name not in _WORDS
        }

    def _said(self, file: str, word: str) -> list[str]:
        """What the groups of a file say of something, without repetition."""
        found = [self._groups[group].get(word) for group in self.experiments[file]]
        return list(dict.fromkeys(text for text in found if text))

    def paper(self, file: str) -> str:
        """The paper whose experiment a file is, a key of `papers`."""
        return self._said(file, "paper")[-1]

    def title(self, file: str) -> str:
        """Model and method, in words."""
        name = file.partition("/")[2]
        found = re.fullmatch(
            rf"({'|'.join(self._words['models'])})_(\w+?)_(?:task(\d)_)?\d+(?:k|ep)(?:_520|(_trainval))?",
            name,
        )
        if found is None or found[2] not in self._words["methods"]:
            raise ValueError(f"{file}: its model or method is not under `words` of the ledger.")
        where = [f" on {place}" for place in self._said(file, "where")[-1:]]
        return "".join(
            [
                f"task {found[3]}, " if found[3] else "",
                f"{self._words['models'][found[1]]}, {self._words['methods'][found[2]]}",
                *where,
                ", trained on both splits" if found[4] else "",
            ]
        )

    def published(self, file: str, home: str = "") -> str:
        """The numbers of a file and whose they are; those of the paper `home` without its name."""
        parts: list[str] = []
        last = home
        tables: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows(file):
            tables.setdefault((row.paper, row.cited, row.text), []).append(row.table)
        for (paper, cited, text), names in tables.items():
            of = "" if paper == last else f" of {self.papers[paper]['cite']}"
            source = f"{cited}, as cited in " if cited else ""
            parts.append(f"{text} ({source}{_listed(names)}{of})")
            last = paper
        lost = self.lost().get(file)
        if lost:
            paper, table = lost
            of = "" if paper == home else f" of {self.papers[paper]['cite']}"
            parts.append(f"a number that our copy of {table}{of} does not show")
        return "; ".join(parts) or "no number known"

    def head(self, file: str) -> str:
        """The docstring of an experiment file."""
        dataset = self._words["datasets"][file.partition("/")[0]]
        gpus = self.settings(file)["gpus"]
        hardware = _COUNTS[gpus.value] + (f"; {gpus.remark}." if gpus.source == "ours" else ".")
        command = f"python train_net.py --config-file configs/{file}.py"
        option = f"--num-gpus {gpus.value}"
        fits = len(command) + len(option) < _WIDTH
        paragraphs = [
            _filled(f"{dataset}, {self.title(file)}: {self.published(file)}. {hardware}", first=4),
            f"{command} {option}" if fits else f"{command} \\\n    {option}",
        ]
        overrides = self._said(file, "multi_scale")
        if overrides:
            paragraphs.append(
                "Tested at several scales, its weights go with\n"
                + _filled(f"--eval-only train.init_checkpoint=FILE {overrides[-1]}")
            )
        remarks = [*self._said(file, "preset")[-1:], *self._said(file, "says")]
        remarks += [self._notes[file]] if file in self._notes else []
        if remarks:
            paragraphs.append(_filled(" ".join(remarks)))
        return "\n\n".join(paragraphs) + "\n"

    def with_head(self, file: str, source: str) -> str:
        """The source of an experiment file, with the head that it has to have."""
        head = self.head(file)
        first = ast.parse(source).body[0]
        assert first.end_lineno is not None
        rest = "".join(source.splitlines(keepends=True)[first.end_lineno :])
        prefix = "r" if "\\" in head else ""
        return f'{prefix}"""{head}"""\n{rest}'

    def page(self, measured: str = "") -> str:
        """The tables of docs/reproducing.md.

        Args:
            measured: the text of all results, which names the files that have been trained.
        """
        trained = set(re.findall(r"train_net\.py[^\"]*?configs/(\S+?)\.py", measured))
        lines: list[str] = []
        for paper, entry in self.papers.items():
            files = [file for file in self.experiments if self.paper(file) == paper]
            if not files:
                continue
            lines += ["", f"## {entry['cite']}", "", entry["title"]]
            for folder, dataset in self._words["datasets"].items():
                rows = [file for file in files if file.startswith(f"{folder}/")]
                if not rows:
                    continue
                lines += ["", f"### {dataset}", ""]
                lines += [f"| file in `configs/{folder}/` | experiment | published | ours |"]
                lines += ["| --- | --- | --- | --- |"]
                for file in rows:
                    ours = "see results" if file in trained else "not measured"
                    name = file.partition("/")[2]
                    published = self.published(file, home=paper)
                    lines += [f"| `{name}.py` | {self.title(file)} | {published} | {ours} |"]
        return "\n".join(lines) + "\n"


def _decimals(value: float | None) -> int:
    return len(str(value).partition(".")[2])


def _numbers(columns: list[tuple[str, int]], values: list[float | None]) -> str:
    text = ""
    for (name, decimals), value in zip(columns, values, strict=True):
        if value is None:
            continue
        if name == "±":
            number, _, column = text.partition(" ")
            text = f"{number} ± {value:.{decimals}f} {column}"
        else:
            text += f"{', ' if text else ''}{value:.{decimals}f} {name}"
    return text


def _listed(tables: list[str]) -> str:
    """`Table 2`, or `Tables 2 and 7(b)`."""
    if len(tables) == 1:
        return tables[0]
    numbers = [table.removeprefix("Table ") for table in tables]
    return f"Tables {', '.join(numbers[:-1])} and {numbers[-1]}"


def _filled(text: str, first: int = 0) -> str:
    """In lines of 100 characters, the first shorter by some."""
    filled = textwrap.fill(
        "x" * first + text, _WIDTH, break_long_words=False, break_on_hyphens=False
    )
    return filled[first:]


def generated(ledger: Ledger, root: Path) -> dict[Path, str]:
    """What is written from the ledger: the experiment files and the page, by path.

    Args:
        ledger: of the repository.
        root: of the repository.

    Raises:
        ValueError: the page has no place for the tables.
        OSError: an experiment of the ledger has no file.
    """
    files = {root / f"configs/{file}.py": file for file in ledger.experiments}
    texts = {
        path: ledger.with_head(file, path.read_text(encoding="utf-8"))
        for path, file in files.items()
    }
    page = root / "docs/reproducing.md"
    before, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise ValueError(f"{page}: has no line {MARK.strip()!r} before its tables.")
    results = "".join(path.read_text(encoding="utf-8") for path in root.glob("results/*.json"))
    texts[page] = before + mark + ledger.page(results)
    return texts
