"""What is wrong with the labels of a dataset: how they are stored, and which values they hold."""

# The rules get pairs that have what they look at.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..classes import Color
from ..labels import IGNORE_LABEL, LABEL_MODES
from .facts import LabelFacts, PairFacts
from .findings import Finding, counted, error, listed, note, warning

_GUIDE = "docs/custom_data.md"


class LabelScheme(NamedTuple):
    """What the values of a dataset's label files are said to mean."""

    names: Sequence[str]
    """Of the K classes."""
    colors: Sequence[Color]
    """RGB of the classes."""
    id_to_class: Mapping[int, int]
    """Value to class."""
    void_ids: Sequence[int]
    fix_in: str
    """The file or the command that fixes a value which means something else."""
    is_folder: bool
    """Whether that is a ``dataset.json``."""

    def is_legal(self, value: int) -> bool:
        """Whether a value is a class or void."""
        return value in self.id_to_class or value in self.void_ids


def label_findings(pairs: Sequence[PairFacts], scheme: LabelScheme) -> Iterator[Finding]:
    """Judges the label files.

    Args:
        pairs: of all splits.
        scheme: what the values are said to mean.
    """
    pairs = [pair for pair in pairs if pair.label and not pair.label.error]
    yield from _modes(pairs, scheme)
    yield from _palettes(pairs, scheme)
    yield from _values(pairs, scheme)
    yield from _void(pairs, scheme)
    yield from _absent(pairs, scheme)


def value_counts(pairs: Sequence[PairFacts]) -> tuple[Counter[int], Counter[int]]:
    """Pixels of each value in the label files, and files that hold it."""
    pixels, files = Counter(), Counter()
    for pair in pairs:
        if pair.label:
            pixels.update(pair.label.counts)
            files.update(pair.label.counts.keys())
    return pixels, files


def _modes(pairs: Sequence[PairFacts], scheme: LabelScheme) -> Iterator[Finding]:
    coded = [pair for pair in pairs if pair.label.mode not in LABEL_MODES]
    gray = [pair for pair in coded if _is_gray(pair.label)]
    colored = [pair for pair in coded if not _is_gray(pair.label)]
    if gray:
        yield error(
            f"{counted(len(gray), 'label file')} have several equal channels (mode "
            f"{gray[0].label.mode}) where one channel of class ids is read.",
            'Store one of them: Image.open(path).convert("RGB").getchannel(0).save(path).',
            [pair.label_file for pair in gray],
        )
    if colored:
        yield _colored(colored, scheme)


def _is_gray(label: LabelFacts) -> bool:
    return all(r == g == b for r, g, b in label.colors)


def _colored(pairs: Sequence[PairFacts], scheme: LabelScheme) -> Finding:
    pixels = Counter()
    for pair in pairs:
        pixels.update(pair.label.colors)
    known = {tuple(color): k for k, color in enumerate(scheme.colors)}
    rows = [
        f"{_hex(color)} {scheme.names[known[color]] if color in known else '?'} ({share:.1%})"
        for color, share in _shares(pixels)
    ]
    lossy = max(pair.label.num_colors for pair in pairs) >= 256
    text = (
        f"{counted(len(pairs), 'label file')} hold colours (mode {pairs[0].label.mode}) instead of "
        f"class ids. {counted(len(pixels), 'colour')}, by their share: {listed(rows)}."
    )
    if lossy:
        text += " So many colours come from a lossy format or from smoothed edges."
    fix = f'Turn colours into ids, see "Labels in colours" of {_GUIDE}.'
    return error(text, fix, [pair.label_file for pair in pairs])


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _shares(pixels: Counter) -> list[tuple]:
    """Each key with its share of all, the most frequent first."""
    total = max(1, sum(pixels.values()))
    return [(key, count / total) for key, count in pixels.most_common()]


def _palettes(pairs: Sequence[PairFacts], scheme: LabelScheme) -> Iterator[Finding]:
    """Palette images are read as indices: are these the ids, or are the colours?"""
    painted = [pair for pair in pairs if pair.label.palette]
    colors_of = defaultdict(set)
    for pair in painted:
        for index, color in pair.label.palette.items():
            colors_of[index].add(color)
    files = [pair.label_file for pair in painted]
    if several := sorted(index for index, colors in colors_of.items() if len(colors) > 1):
        yield error(
            "The palettes of the label files differ: the indices "
            f"{listed(several)} have one colour in one file and another in another. So the "
            "indices, which are read as class ids, mean something else from file to file.",
            f'Turn colours into ids, see "Labels in colours" of {_GUIDE}.',
            files,
        )
        return
    colors = {index: next(iter(each)) for index, each in colors_of.items()}
    if colors and all(r == g == b for r, g, b in colors.values()):
        shades = {index: color[0] for index, color in colors.items()}
        if any(i != v for i, v in shades.items()) and all(map(scheme.is_legal, shades.values())):
            yield error(
                "The palettes of the label files hold shades of grey that are class ids themselves "
                f"(index {_pairs(shades)}), but indices are read.",
                'Store the shades: Image.open(path).convert("L").save(path).',
                files,
            )
        return
    known = {tuple(color): k for k, color in enumerate(scheme.colors)}
    wrong = {
        index: scheme.names[known[color]]
        for index, color in colors.items()
        if color in known and scheme.id_to_class.get(index) not in (None, known[color])
    }
    if wrong:
        yield warning(
            "By their palette, indices of the label files are other classes than by their value: "
            f"{_pairs(wrong)}. The value counts.",
            f"Correct the ids or the colours in {scheme.fix_in}, if the colours are right."
            if scheme.is_folder
            else "",
            files,
        )


def _pairs(mapping: Mapping[int, object]) -> str:
    return listed(f"{a} -> {b}" for a, b in sorted(mapping.items()))


def _values(pairs: Sequence[PairFacts], scheme: LabelScheme) -> Iterator[Finding]:
    pixels, in_files = value_counts(pairs)
    illegal = sorted(value for value in pixels if not scheme.is_legal(value))
    if not illegal:
        return
    rows = [f"{v} ({pixels[v]:,} pixels in {counted(in_files[v], 'file')})" for v in illegal]
    text = f"The label files hold {_count_of_values(illegal)} that no class has: {listed(rows)}."
    guess, entries = _guess(pixels, illegal, scheme)
    if scheme.is_folder:
        fix = f"In {scheme.fix_in}: {entries}"
    else:
        fix = f"These are other label files than the dataset's: {scheme.fix_in}"
    bad = set(illegal)
    files = [pair.label_file for pair in pairs if not bad.isdisjoint(pair.label.counts)]
    yield error(f"{text} {guess}".strip(), fix, files)


def _count_of_values(values: Sequence[int]) -> str:
    return "a value" if len(values) == 1 else f"{len(values):,} values"


def _guess(pixels: Counter[int], illegal: Sequence[int], scheme: LabelScheme) -> tuple[str, str]:
    """What the values seem to be, from which there are and how frequent, and what to write."""
    count = len(scheme.names)
    plain = dict(scheme.id_to_class) == {k: k for k in range(count)}
    if illegal == [IGNORE_LABEL]:
        return "255 is usually void.", f'"void_ids": {sorted({*scheme.void_ids, IGNORE_LABEL})}.'
    if plain and illegal == [count] and not pixels[0]:
        return (
            f"0 never occurs: the classes are counted from 1 to {count}, and 0 is void.",
            f'give the k-th class "ids": [k] and write "void_ids": [0, {IGNORE_LABEL}].',
        )
    if plain and illegal == [count]:
        void = count if pixels[count] <= pixels[0] else 0
        shares = f"0 has {_share(pixels, 0)} of the pixels and {count} has {_share(pixels, count)}"
        guess = (
            f"There is one value more than classes, so one is void: {shares}, so {void} is the "
            "likelier one; look at a label file."
        )
        if void:
            return guess, f'"void_ids": {sorted({*scheme.void_ids, count})}.'
        return guess, f'give the k-th class "ids": [k] and write "void_ids": [0, {IGNORE_LABEL}].'
    return (
        "",
        f'add a class for each, or add them to "ids" of a class or to "void_ids" '
        f"({sorted({*scheme.void_ids, *illegal})[:20]}).",
    )


def _share(pixels: Counter[int], value: int) -> str:
    return f"{pixels[value] / max(1, sum(pixels.values())):.1%}"


def _void(pairs: Sequence[PairFacts], scheme: LabelScheme) -> Iterator[Finding]:
    pixels, _ = value_counts(pairs)
    classes = [v for v in pixels if v in scheme.id_to_class]
    if IGNORE_LABEL in scheme.void_ids and set(pixels) == {0, IGNORE_LABEL} and len(classes) == 1:
        yield warning(
            f"The only values are 0 and 255, which is void: nothing but "
            f"{scheme.names[scheme.id_to_class[0]]!r} is ever learnt. Is 255 the foreground?",
            f'In {scheme.fix_in}: give its class "ids": [255] and write "void_ids": [].'
            if scheme.is_folder
            else "",
        )
    empty = [
        p.label_file
        for p in pairs
        if p.label.counts and all(value in scheme.void_ids for value in p.label.counts)
    ]
    if empty:
        yield warning(
            f"{counted(len(empty), 'label file')} are void all over: nothing is learnt from them.",
            "Remove the pairs from the training split, or label them.",
            empty,
        )


def _absent(pairs: Sequence[PairFacts], scheme: LabelScheme) -> Iterator[Finding]:
    by_split = defaultdict(list)
    for pair in pairs:
        by_split[pair.split].append(pair)
    present = {
        split: {scheme.id_to_class.get(value) for value in value_counts(members)[0]}
        for split, members in by_split.items()
    }
    everywhere = set().union(*present.values())
    ids = range(len(scheme.names))
    if not everywhere - {None}:
        return
    if nowhere := [scheme.names[k] for k in ids if k not in everywhere]:
        yield warning(
            f"{counted(len(nowhere), 'class', 'classes')} of {len(scheme.names)} never occur: "
            f"{listed(nowhere)}.",
            f"Remove them from {scheme.fix_in}, or correct their ids." if scheme.is_folder else "",
        )
    for split, classes in present.items():
        if missing := [scheme.names[k] for k in ids if k in everywhere and k not in classes]:
            text = (
                f"{split} has no pixel of {counted(len(missing), 'class', 'classes')} that other "
                f"splits have: {listed(missing)}."
            )
            if "train" in split.rpartition("_")[2]:
                yield warning(f"{text} They cannot be learnt.", "Deal the images out anew.")
            else:
                yield note(f"{text} Their scores are undefined there.")
