"""Lists the splits of a dataset, reads their files in parallel, and judges them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ..datasets import check_registered, read_records, register_folder
from ..files import BrokenFilesError, Record, datasets_root
from ..folder import FILE_NAME, load_folder_split
from ..labels import LabelMap
from ..preparations import PREPARATIONS
from .facts import PairFacts, read_pair
from .findings import Finding, Severity, counted, error, note, warning
from .image_rules import image_findings
from .label_rules import LabelScheme, label_findings

_SEPARATOR = "_sem_seg_"


class CheckedDataset(NamedTuple):
    """All that was read and found."""

    splits: tuple[str, ...]
    """Names of the datasets, those that could be listed."""
    scheme: LabelScheme
    pairs: tuple[PairFacts, ...]
    findings: tuple[Finding, ...]
    """The worst first."""

    @property
    def has_errors(self) -> bool:
        """Whether training on it would fail or learn something wrong."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)


def check_dataset(target: str, workers: int = 1) -> CheckedDataset:
    """Reads every file of a dataset and says what is wrong with it.

    Args:
        target: name of a registered dataset with its split (``camvid_sem_seg_train``), or without
            (``camvid``), which takes all its splits together; or a folder with a
            ``dataset.json``.
        workers: threads that read, at least 1.

    Returns:
        What the files hold and what is found.

    Raises:
        ValueError: if there is no such dataset, or its description is wrong.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    names = _split_names(target)
    label_map = LabelMap.from_metadata(MetadataCatalog.get(names[0]))
    scheme = _scheme(names[0], label_map)
    records, findings = _list_splits(names)
    findings += _strays(records)
    jobs = [(name, record) for name, of_split in records.items() for record in of_split]
    pairs = _read_all(jobs, label_map, workers)
    findings += [*image_findings(pairs), *label_findings(pairs, scheme)]
    order = list(Severity)
    findings.sort(key=lambda finding: order.index(finding.severity))
    return CheckedDataset(tuple(records), scheme, tuple(pairs), tuple(findings))


def _split_names(target: str) -> list[str]:
    """Names of the datasets that a name or a folder stands for."""
    if target in DatasetCatalog:
        return [target]
    splits = [name for name in DatasetCatalog.list() if name.startswith(target + _SEPARATOR)]
    if splits:
        return splits
    for folder in (os.path.join(datasets_root(), target), target):
        if PathManager.isfile(os.path.join(folder, FILE_NAME)):
            return register_folder(folder)
    if PathManager.isdir(target):
        return register_folder(target)  # which says what is missing
    check_registered(target)
    return [target]


def _list_splits(names: Sequence[str]) -> tuple[dict[str, list[Record]], list[Finding]]:
    """The records of each split that brings any which the ones before lack, and what fails."""
    records: dict[str, list[Record]] = {}
    findings = []
    seen: set[str] = set()
    for name in names:
        try:
            of_split = read_records(name)
        except BrokenFilesError as broken:
            of_split = broken.records
            findings += _broken(name, broken)
        except ValueError as failure:
            findings.append(error(f"{name} cannot be listed. {failure}."))
            continue
        files = {record["file_name"] for record in of_split}
        if files <= seen and len(names) > 1:  # trainval
            continue
        seen |= files
        records[name] = of_split
        if of_split and "sem_seg_file_name" not in of_split[0]:
            findings.append(note(f"{name} has no labels; its images are checked."))
    return records, findings


def _broken(name: str, broken: BrokenFilesError) -> Iterator[Finding]:
    yield error(
        f"{name}: {counted(len(broken.problems), 'image')} cannot be used. {broken.problems[0]}.",
        "Complete the files, or remove what is left over.",
        broken.problems[1:],
    )


def _strays(records: dict[str, list[Record]]) -> Iterator[Finding]:
    """Label files beside those of the splits that belong to no image."""
    used, suffixes, image_folders = set(), {}, set()
    for record in (record for of_split in records.values() for record in of_split):
        image_folders.add(os.path.dirname(record["file_name"]))
        if label := record.get("sem_seg_file_name"):
            used.add(label)
            folder, base = os.path.split(label)
            stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
            name = record.get("image_id", stem)
            if isinstance(name, str) and base.startswith(name):
                suffixes.setdefault(folder, base[len(name) :])
    images = _names_in(image_folders)
    strays = []
    for folder, suffix in suffixes.items():
        strays += [
            path
            for base in _list_folder(folder)
            if base.endswith(suffix) and not base.startswith(".")
            if (path := os.path.join(folder, base)) not in used
            # An image that cannot be used is told of elsewhere.
            and base[: len(base) - len(suffix)] not in images
        ]
    if strays:
        yield warning(
            f"{counted(len(strays), 'label file')} beside those of the dataset have no image in "
            "any split that was checked.",
            "Add the images or remove the files; nothing is to be done if another split has them.",
            strays,
        )


def _names_in(folders: Iterable[str]) -> set[str]:
    """NAME of each file in folders."""
    return {os.path.splitext(base)[0] for folder in folders for base in _list_folder(folder)}


def _list_folder(path: str) -> list[str]:
    """Names in a folder, sorted; none where files are made on demand, as those of `shapes`."""
    try:
        return sorted(PathManager.ls(path)) if PathManager.isdir(path) else []
    except NotImplementedError:
        return []


def _read_all(
    jobs: Sequence[tuple[str, Record]], label_map: LabelMap, workers: int
) -> list[PairFacts]:
    """Reads the files of all records, in their order."""
    read = partial(_read_job, label_map=label_map)
    # Threads: reading, decoding and most of numpy release Python's lock.
    with ThreadPoolExecutor(workers) as pool:
        try:
            results = pool.map(read, jobs)
            # disable=None: no bar where standard error is no terminal
            return list(tqdm(results, "reading", len(jobs), unit="pair", disable=None))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read_job(job: tuple[str, Record], label_map: LabelMap) -> PairFacts:
    return read_pair(*job, label_map.id_to_class)


def _scheme(name: str, label_map: LabelMap) -> LabelScheme:
    metadata = MetadataCatalog.get(name)
    folder = _folder_of(name)
    return LabelScheme(
        names=tuple(metadata.stuff_classes),
        colors=tuple(tuple(color) for color in metadata.get("stuff_colors", ())),
        id_to_class=dict(label_map.id_to_class),
        void_ids=tuple(label_map.void_ids),
        fix_in=os.path.join(folder, FILE_NAME) if folder else _prepare_hint(name),
        is_folder=bool(folder),
    )


def _folder_of(name: str) -> str | None:
    """The folder whose ``dataset.json`` describes a dataset, if one does."""
    load = DatasetCatalog[name]
    if isinstance(load, partial) and load.func is load_folder_split:
        return load.args[0]
    return None


def _prepare_hint(name: str) -> str:
    """How the label files of a dataset of the table come about."""
    known = [key for key in PREPARATIONS if name.startswith(key)]
    if known:
        return f"run python tools/prepare_dataset.py {max(known, key=len)}, see docs/datasets.md"
    return f"correct them or MetadataCatalog.get({name!r})"
