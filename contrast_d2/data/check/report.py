"""What a check found, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .facts import PairFacts
from .findings import Finding, Severity, counted
from .run import CheckedDataset

_MOST_FILES = 3


def text_report(checked: CheckedDataset) -> str:
    """Writes what was found for a terminal.

    Args:
        checked: by `check_dataset`.

    Returns:
        Lines: the splits, the findings, and how many there are of each severity.
    """
    lines = [split_line(split, of_split(checked, split)) for split in checked.splits]
    for finding in checked.findings:
        lines.append(f"{finding.severity.value}: {finding.text}")
        lines += [f"    {path}" for path in finding.files[:_MOST_FILES]]
        if len(finding.files) > _MOST_FILES:
            lines.append(f"    and {len(finding.files) - _MOST_FILES:,} more")
        if finding.fix:
            lines.append(f"    -> {finding.fix}")
    lines.append(totals(checked.findings))
    return "\n".join(lines)


def of_split(checked: CheckedDataset, split: str) -> list[PairFacts]:
    """What was read of one split."""
    return [pair for pair in checked.pairs if pair.split == split]


def split_line(split: str, pairs: Sequence[PairFacts]) -> str:
    """How many images a split has, and of what size most of them are."""
    sizes = Counter(pair.image.size for pair in pairs if not pair.image.error)
    if not sizes:
        return f"{split}: {counted(len(pairs), 'image')}"
    height, width = sizes.most_common(1)[0][0]
    others = f" and {counted(len(sizes) - 1, 'other size')}" if len(sizes) > 1 else ""
    return f"{split}: {counted(len(pairs), 'image')}, {width}x{height}{others}"


def totals(findings: Sequence[Finding]) -> str:
    """How many findings there are of each severity."""
    counts = Counter(finding.severity for finding in findings)
    return ", ".join(counted(counts[severity], severity.value) for severity in Severity)
