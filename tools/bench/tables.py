"""The tables of docs/{performance,models,evaluation}.md, made from the results.

A table stands between two comments, of which the first names its results and its kind:

    <!-- performance_cpu.json: steps -->
    ...
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .workloads import OURS

# In the folder docs/, without suffix.
DOCUMENTS = ("performance", "models", "evaluation")

_MIB = 1 << 20
_SECTION = re.compile(r"(<!-- ([\w.]+): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: Path) -> str:
    """Rewrites all tables of a document.

    Args:
        text: of the document.
        results: folder of the results.

    Raises:
        ValueError: there is no such kind of table.
    """

    def table(match: re.Match[str]) -> str:
        begin, file, kind, end = match.groups()
        if kind not in _TABLES:
            raise ValueError(f"no kind of table {kind!r}: choose from {sorted(_TABLES)}.")
        path = results / file
        if not path.is_file():
            return f"{begin}Not measured yet.\n{end}"
        return f"{begin}{_TABLES[kind](json.loads(path.read_text()))}\n{end}"

    return _SECTION.sub(table, text)


def _shortened(commit: str | None) -> str:
    """A commit's first digits, and whether the tree had changes that were not committed."""
    digits, dash, dirty = (commit or "unknown").partition("-")
    return digits[:12] + dash + dirty


def _machine(found: Mapping[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    lines = [
        f"{device}{machine['processor']}, {machine['cores']} cores, threads: {machine['threads']}, "
        f"torch {versions['torch']}, Python {versions['python']}, {found['date']}, commit "
        f"{_shortened(found['commit'])}."
    ]
    if "peaks" in found:
        peaks = found["peaks"]
        drift = peaks["after"]["fp32"] / peaks["before"]["fp32"]
        emulated = peaks["before"]["bf16"] is None
        bf16 = "none" if emulated else _giga(peaks, "bf16", 0)
        lines.append(
            f"Peaks: {_giga(peaks, 'fp32', 0)} GFLOP/s in fp32 and {bf16} in "
            f"bf16, {_giga(peaks, 'write', 1)} GB/s written and {_giga(peaks, 'copy', 1)} copied; "
            f"at the end, products in fp32 ran {drift:.0%} as fast as at the beginning."
        )
    lines.append(f"Command: `{found['command']}`")
    return "\n".join(lines)


def _giga(peaks: Mapping[str, Any], name: str, digits: int) -> str:
    return f"{peaks['before'][name] / 1e9:.{digits}f}"


def _steps(found: Mapping[str, Any]) -> str:
    rows = []
    for name, case in found["cases"].items():
        if "drawn" not in case:
            continue
        for contender, row in case["contenders"].items():
            first = contender == OURS
            rows.append(
                [
                    f"`{name}`" if first else "",
                    "/".join(map(str, case["drawn"])) if first else "",
                    f"{case['limit_ms']['median']:.0f}" if first else "",
                    contender,
                    _time(row),
                    f"{row['times_limit']['median']:.2f}",
                    _relative(row, first),
                    f"{row['peak_mib'] + case['cost']['written'] / _MIB:,.0f}",
                ]
            )
    head = "case|anchors|limit, ms|who|ms|times limit|times ours|peak, MiB"
    return _table(head.split("|"), rows)


def _losses(found: Mapping[str, Any]) -> str:
    rows = []
    for name, case in found["cases"].items():
        if "drawn" in case:
            continue
        for contender, row in case["contenders"].items():
            first = contender == OURS
            rows.append(
                [
                    f"`{name}`" if first else "",
                    f"{case['limit_ms']['median']:.0f}" if first else "",
                    contender,
                    _time(row),
                    f"{row['times_limit']['median']:.2f}",
                    _relative(row, first),
                    f"{row['peak_mib']:,.0f}",
                ]
            )
    head = "case|limit, ms|who|ms|times limit|times ours|peak, MiB"
    return _table(head.split("|"), rows)


def _heaps(found: Mapping[str, Any]) -> str:
    rows = [
        [f"`{name}`", contender, _time(row), f"{row['default_heap_ms']:.0f}"]
        for name, case in found["cases"].items()
        for contender, row in case["contenders"].items()
        if "default_heap_ms" in row
    ]
    return _table(["case", "who", "kept heap, ms", "the system's heap, ms"], rows)


def _errors(found: Mapping[str, Any]) -> str:
    rows = [
        [dtype.removeprefix("torch."), contender, f"{row['value']:.1e}", f"{row['gradient']:.1e}"]
        for dtype, errors in found["errors"].items()
        for contender, row in errors.items()
    ]
    return _table(["input", "who", "error of the value", "error of the gradient"], rows)


def _projections(found: Mapping[str, Any]) -> str:
    rows = []
    for part, variants in found["parts"].items():
        for number, (name, row) in enumerate(variants.items()):
            rows.append(
                [
                    _PARTS[part] if number == 0 else "",
                    name,
                    f"{row['ms']['median']:,.0f}",
                    f"{row['times_dense']['median']:.3f}",
                    f"{row['peak_mib']:,.0f}",
                ]
            )
    return _table(["part", "projection", "ms", "times dense", "peak, MiB"], rows)


def _loading(found: Mapping[str, Any]) -> str:
    rows = []
    for name, kind in found["kinds"].items():
        for number, (contender, row) in enumerate(kind["contenders"].items()):
            peers, ours = (
                f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
                for ratio in (row["times_detectron2"], row["times_ours"])
            )
            rows.append(
                [
                    f"{name}, {kind['image_mb']:.2f} MB" if number == 0 else "",
                    contender,
                    f"{row['ms']['median']:.1f}",
                    f"{row['images_per_second']['median']:.1f}",
                    "" if number == 0 else peers,
                    "" if contender == OURS else ours,
                ]
            )
    head = "images|who|ms of a sample|samples per second and core|times detectron2's|times our ms"
    return _table(head.split("|"), rows)


def _evaluations(found: Mapping[str, Any]) -> str:
    rows = []
    for layout, contenders in found["layouts"].items():
        for number, (contender, row) in enumerate(contenders.items()):
            ratio = row["times_detectron2"]
            rows.append(
                [
                    layout if number == 0 else "",
                    contender,
                    _time(row),
                    ""
                    if number == 0
                    else f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})",
                ]
            )
    return _table(["scores in memory", "evaluator", "ms", "times as fast as detectron2's"], rows)


def _training_steps(found: Mapping[str, Any]) -> str:
    rows = []
    for case in found["cases"].values():
        scene = case["scene"]
        baseline = next(iter(case["methods"].values()))
        for name, row in case["methods"].items():
            first, ratio = row is baseline, row["times_baseline"]
            rows.append(
                [
                    f"{scene['batch']} x {scene['height']}x{scene['width']}" if first else "",
                    f"{case['precision']}, {'compiled' if case['compiled'] else 'eager'}"
                    if first
                    else "",
                    f"`{name}`",
                    _time(row),
                    ""
                    if first
                    else f"{ratio['median']:.3f} ({ratio['p10']:.3f} to {ratio['p90']:.3f})",
                    f"{row['peak_mib']:,.0f}",
                    "" if first else f"{row['peak_mib'] / baseline['peak_mib']:.3f}",
                ]
            )
    head = "images|mode|experiment|ms|times baseline|peak, MiB|times baseline's"
    return _table(head.split("|"), rows)


def _models(found: Mapping[str, Any]) -> str:
    rows = []
    for name, model in found["models"].items():
        parts, extra = model["inference"], model["training_only"]
        auxiliary, contrast = extra.get("auxiliary head"), extra.get("contrast")
        backbone = (model["backbone"] or "").partition(".")[0]  # without the tag of its weights
        paper = _PAPER_PARAMETERS.get((backbone, model["decoder"]))
        rows.append(
            [
                f"`{name}`",
                _millions(sum(part["parameters"] for part in parts.values())),
                "" if paper is None else str(paper),
                "" if auxiliary is None else _millions(auxiliary["parameters"]),
                "" if contrast is None else _millions(contrast["parameters"]),
                "{}x{}".format(*model["size"]),
                f"{sum(part['flops'] for part in parts.values()) / 1e9:.1f}",
                "" if contrast is None else f"{contrast['flops'] / 1e9:.1f}",
                _VERDICTS[model["inference_differences"] == []] if contrast is not None else "",
            ]
        )
    head = (
        "experiment|parameters, M|in the paper, M|auxiliary head, M|projectors, M|image|GFLOPs|"
        "of the projectors|inference without contrast"
    )
    return _table(head.split("|"), rows)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _exponents(found: Mapping[str, Any]) -> str:
    rows = [
        [
            sweep["label"],
            f"{sweep['sizes'][0]:,} to {sweep['sizes'][-1]:,}",
            contender,
            f"{line['ms_exponent']:.2f}",
            f"{line['mib_exponent']:.2f}",
        ]
        for sweep in found["sweeps"].values()
        for contender, line in sweep["lines"].items()
    ]
    return _table(["what grows", "from, to", "who", "exponent of time", "of memory"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _time(row: Mapping[str, Any]) -> str:
    return f"{row['ms']['median']:,.0f}"


def _relative(row: Mapping[str, Any], is_ours: bool) -> str:
    ratio = row["times_ours"]
    return "" if is_ours else f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"


# Of the networks without projectors, in millions, by timm's name of the backbone and our decoder;
# as Pissas et al., ECCV 2022, print them.
_PAPER_PARAMETERS = {
    ("hrnet_w48", "OCRDecoder"): 71,
    ("resnet101", "DeepLabV3Decoder"): 63,
    ("swin_tiny_patch4_window7_224", "UPerNetDecoder"): 60,
    ("swin_small_patch4_window7_224", "UPerNetDecoder"): 81,
    ("swin_base_patch4_window7_224", "UPerNetDecoder"): 121,
    ("swin_large_patch4_window7_224", "UPerNetDecoder"): 234,
}
_VERDICTS = {True: "the same", False: "another"}
_PARTS = {"contrast": "contrastive part", "step": "whole step"}
_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "machine": _machine,
    "steps": _steps,
    "losses": _losses,
    "heaps": _heaps,
    "errors": _errors,
    "projections": _projections,
    "models": _models,
    "training": _training_steps,
    "exponents": _exponents,
    "loading": _loading,
    "evaluations": _evaluations,
}
