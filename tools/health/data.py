"""The package itself, and the datasets that it finds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from .finding import ERROR, NOTE, OK, ROOT, Answer, Finding, pip, python

# Lists every dataset that is registered, and folders with a dataset.json; opens no image but for
# those whose sizes the records need.
PROBE = """
import json, os, sys
os.environ["DETECTRON2_DATASETS"] = root = sys.argv[1]
import contrast_d2.engine
from contrast_d2.data import DATASETS, register_folder
from contrast_d2.data.datasets import read_records
found, failed = {}, {}
names = [row.name for row in DATASETS]
for folder in sorted(os.listdir(root)) if os.path.isdir(root) else []:
    if os.path.isfile(os.path.join(root, folder, "dataset.json")):
        try:
            names += register_folder(os.path.join(root, folder))
        except Exception as error:
            failed[folder] = str(error)
for name in names:
    try:
        found[name] = len(read_records(name))
    except Exception as error:
        failed[name] = str(error)
print(json.dumps({"found": found, "failed": failed, "file": contrast_d2.__file__}))
"""


def datasets_root() -> str:
    """The folder that holds the datasets, as `contrast_d2.data` has it, absolute."""
    return os.path.abspath(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))


def check_package(answer: Answer) -> Iterator[Finding]:
    """Whether contrast_d2 can be imported.

    Args:
        answer: of `PROBE`.
    """
    if answer.error is None:
        folder = os.path.dirname(answer.values["file"])
        yield Finding("contrast_d2", OK, f"contrast_d2 at {folder} works.")
    elif "No module named 'contrast_d2'" in answer.error:
        command = pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
        yield Finding("contrast_d2", ERROR, "contrast_d2 is not installed.", command)
    else:
        text = f"contrast_d2 cannot be imported: {answer.error}; the errors above may be why."
        yield Finding("contrast_d2", ERROR, text, python("-c", "import contrast_d2.engine"))


def check_datasets(answer: Answer, root: str) -> Iterator[Finding]:
    """Which datasets are there, with their numbers of images.

    Args:
        answer: of `PROBE`.
        root: the folder of all datasets.
    """
    if answer.error is not None:
        return
    found, failed = answer.values["found"], answer.values["failed"]
    if not os.path.isdir(root):
        text = f"the datasets' folder {root} does not exist; the built-in shapes need none."
        yield Finding("datasets", NOTE, text, "export DETECTRON2_DATASETS=FOLDER")
        return
    absent = []
    for dataset in dict.fromkeys(map(_dataset, [*found, *failed])):
        present = [
            f"{name.partition('_sem_seg_')[2]} {count:,}"
            for name, count in found.items()
            if _dataset(name) == dataset
        ]
        problems = [text for name, text in failed.items() if _dataset(name) == dataset]
        if present:
            yield Finding("datasets", OK, f"{dataset}: images of {', '.join(present)}.")
        if not problems:
            continue
        if not present and not _is_begun(problems, root):
            absent.append(dataset)
            continue
        sentence = problems[0].rstrip(".").replace("Set DETECTRON2_DATASETS", "set it")
        more = f" ({len(problems)} of its splits)" if len(problems) > 1 else ""
        yield Finding(
            "datasets",
            NOTE,
            f"{dataset} is incomplete{more}: {sentence}.",
            _command(problems[0]) or python(str(ROOT / "tools/check_dataset.py"), dataset),
        )
    if absent:
        text = f"not in {root}: {', '.join(absent)}; docs/datasets.md says where they come from."
        yield Finding("datasets", NOTE, text)


def _dataset(name: str) -> str:
    return name.partition("_sem_seg_")[0]


def _is_begun(problems: list[str], root: str) -> bool:
    """Whether the folder of a dataset is there, of which something is said to be missing."""
    folders = [re.search(re.escape(root + os.sep) + r"([^/\\\s]+)", text) for text in problems]
    return any(match is None or os.path.isdir(os.path.join(root, match[1])) for match in folders)


def _command(problem: str) -> str | None:
    """The command that a message names."""
    match = re.search(r"run python (tools/prepare_dataset\.py \w+)", problem, re.IGNORECASE)
    if match is None:
        return None
    script, dataset = match[1].split()
    return python(str(ROOT / script), dataset)
