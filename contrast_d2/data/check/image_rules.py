"""What is wrong with the images of a dataset, and with its files as such."""

# The rules get pairs that have what they look at.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence

from .alignment import misaligned
from .facts import PairFacts
from .findings import Finding, counted, error, listed, note, warning

# Of a pixel's modes in Pillow, those that detectron2 turns into RGB without loss of what matters.
_PLAIN = ("RGB", "P")
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")


def image_findings(pairs: Sequence[PairFacts]) -> Iterator[Finding]:
    """Judges the image files, and how images and labels go together.

    Args:
        pairs: of all splits.
    """
    yield from _unreadable(pairs)
    yield from _modes(pairs)
    yield from _sizes(pairs)
    yield from _duplicates(pairs)
    yield from _misaligned(pairs)


def _unreadable(pairs: Sequence[PairFacts]) -> Iterator[Finding]:
    broken = [(p.image_file, p.image.error) for p in pairs if p.image.error]
    broken += [(p.label_file, p.label.error) for p in pairs if p.label and p.label.error]
    if broken:
        yield error(
            f"{counted(len(broken), 'file')} cannot be read to the end. The first says: "
            f"{broken[0][1]}.",
            "Copy or download them again, or remove the pairs.",
            [path for path, _ in broken],
        )


def _modes(pairs: Sequence[PairFacts]) -> Iterator[Finding]:
    by_mode = defaultdict(list)
    for pair in pairs:
        if not pair.image.error:
            by_mode[pair.image.mode].append(pair.image_file)
    for mode, files in sorted(by_mode.items()):
        count = f"{counted(len(files), 'image')} of {len(pairs):,}"
        if mode in _DEEP:
            yield error(
                f"{count} with 16 or more bits per pixel (mode {mode}). They are cut off at 255, "
                "which turns most of them white.",
                "Scale them to 8 bits.",
                files,
            )
        elif mode == "CMYK":
            yield warning(
                f"{count} in the colours of print (CMYK), which are turned into RGB without "
                "their colour profile.",
                "Convert them to RGB.",
                files,
            )
        elif mode in _ALPHA:
            yield warning(
                f"{count} with an alpha channel ({mode}). It is dropped: what is transparent shows "
                "the colour stored beneath it.",
                "Paint them on a background and store them as RGB, if anything is transparent.",
                files,
            )
        elif mode not in _PLAIN and len(by_mode) > 1:
            yield note(f"{count} with the mode {mode}, others without; all become RGB.", "", files)
        elif mode not in _PLAIN:
            yield note(f"All images have the mode {mode}; they become RGB of equal channels.")


def _sizes(pairs: Sequence[PairFacts]) -> Iterator[Finding]:
    differ = [
        p
        for p in pairs
        if p.label and not p.image.error and not p.label.error and p.label.size != p.image.size
    ]
    if not differ:
        return
    first = differ[0]
    turned = [p for p in differ if p.image.turned and p.label.size == p.image.size[::-1]]
    yield error(
        f"The labels of {counted(len(differ), 'image')} are of another size. The first: "
        f"{_size(first.image.size)} pixels with labels of {_size(first.label.size)}"
        + (f"; turned by their EXIF: {counted(len(turned), 'image')}." if turned else "."),
        "Turn the images' pixels and remove their EXIF orientation."
        if len(turned) == len(differ)
        else "Export them again, or resize the labels with the nearest neighbour (never with "
        "interpolation).",
        [p.image_file for p in differ],
    )


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _duplicates(pairs: Sequence[PairFacts]) -> Iterator[Finding]:
    by_digest = defaultdict(list)
    for pair in pairs:
        if not pair.image.error:
            by_digest[pair.image.digest].append(pair)
    groups = [group for group in by_digest.values() if len(group) > 1]
    across = [group for group in groups if len({pair.split for pair in group}) > 1]
    within = [group for group in groups if len({pair.split for pair in group}) == 1]
    if across:
        splits = sorted({pair.split for group in across for pair in group})
        yield warning(
            f"Several splits share {counted(len(across), 'image')}, equal pixel by pixel "
            f"({listed(splits)}): scores on them show what was learnt by heart.",
            "Remove them from all splits but one.",
            [pair.image_file for group in across for pair in group],
        )
    if within:
        yield note(
            f"{counted(len(within), 'image')} several times within a split.",
            "Keep one of each.",
            [pair.image_file for group in within for pair in group],
        )


def _misaligned(pairs: Sequence[PairFacts]) -> Iterator[Finding]:
    measured = [pair for pair in pairs if pair.alignment]
    flags = misaligned([pair.alignment for pair in measured])
    flagged = [pair for pair, flag in zip(measured, flags, strict=True) if flag]
    if not flagged:
        return
    where = [
        f"{os.path.basename(pair.label_file)} {_shift(pair.alignment.shift)}" for pair in flagged
    ]
    yield warning(
        f"The labels of {counted(len(flagged), 'image')} of {len(measured):,} do not lie on their "
        f"image: their boundaries fit it far better after a move: {listed(where, 3)}.",
        "Look at them (--html report.html shows them); export them again or remove the pairs.",
        [pair.label_file for pair in flagged],
    )


def _shift(shift: tuple[int, int]) -> str:
    """ "by 3 pixels down and 87 pixels right"."""
    down, right = shift
    parts = []
    if down:
        parts.append(f"{abs(down)} pixels {'down' if down > 0 else 'up'}")
    if right:
        parts.append(f"{abs(right)} pixels {'right' if right > 0 else 'left'}")
    return f"by {' and '.join(parts)}"
