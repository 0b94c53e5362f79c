"""The cells of an ablation: one training of a variant with a seed, in a process of its own.

A cell's folder is that of its run. Beside it lie `<cell>.log`, what the process said, and
`<cell>.lock`, which a process holds for as long as it trains the cell: several ablations may run at
a time, of one definition too, and none trains a cell that another one is at.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from detectron2.config import LazyConfig
from omegaconf import DictConfig

from ...evaluation.runs import RESOURCES_FILE, read_metrics
from .definition import Ablation

State = Literal["missing", "begun", "finished", "changed"]
# Seconds between two looks at the processes.
_POLL = 0.5
_TERMINATION = 10.0
# Of a log, to find what ended a process in; of metrics, to find the last iteration in.
_TAIL = 16_384


class Cell(NamedTuple):
    """A training of one variant with one seed.

    Attributes:
        variant: name of the variant.
        seed: of the training.
        folder: of its run.
        config_file: its experiment file.
        overrides: of the file, seed and folder among them.
        iterations: of the whole training.
        config: what its config.yaml has to say, but for the folder.
    """

    variant: str
    seed: int
    folder: Path
    config_file: str
    overrides: tuple[str, ...]
    iterations: int
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant} seed {self.seed}"

    def beside(self, suffix: str) -> Path:
        """A file that goes with the folder."""
        return self.folder.with_name(self.folder.name + suffix)


class Found(NamedTuple):
    """What there is of a cell.

    Attributes:
        state: "missing"; "begun", to be resumed; "finished", with its last evaluation; "changed", a
            run of other settings.
        folder: of the run; for a finished cell possibly that of an equal one of another ablation.
        differences: the settings in which a changed run differs.
    """

    state: State
    folder: Path
    differences: tuple[str, ...] = ()


class Failure(NamedTuple):
    """A cell whose process failed.

    Attributes:
        cell: which.
        reason: the last line that it left.
        log: the file with all of them.
    """

    cell: Cell
    reason: str
    log: Path


def plan_cells(
    ablation: Ablation, root: str | Path, load: Callable[[str, Sequence[str]], DictConfig]
) -> list[Cell]:
    """The cells of an ablation, seed by seed, so that a comparison is there early.

    Args:
        ablation: the definition.
        root: folder of all ablations.
        load: reads an experiment file with overrides, as `engine.load_config`.

    Raises:
        ValueError: a file is not there, an override is wrong, or variants are evaluated on
            different datasets.
    """
    cells = []
    datasets: dict[str, str] = {}
    for seed in ablation.seeds:
        for variant in ablation.variants:
            folder = Path(root, ablation.name, f"{variant.name}_seed{seed}")
            # Quotes are for hydra's grammar, and would look odd in the command of every run.
            quoted = folder if re.fullmatch(r"[\w./-]+", str(folder)) else f"'{folder}'"
            overrides = (*variant.overrides, f"train.seed={seed}", f"train.output_dir={quoted}")
            try:
                config = load(variant.config, overrides)
            except ValueError as error:
                raise ValueError(f"{ablation.name}: variant {variant.name}: {error}") from error
            datasets.setdefault(config.dataloader.test.dataset, variant.name)
            cells.append(
                Cell(
                    variant=variant.name,
                    seed=seed,
                    folder=folder,
                    config_file=variant.config,
                    overrides=overrides,
                    iterations=config.train.max_iter,
                    config=_as_saved(config),
                )
            )
    if len(datasets) > 1:
        (a, first), (b, second) = list(datasets.items())[:2]
        raise ValueError(
            f"{ablation.name}: variant {first} is evaluated on {a}, {second} on {b}: compare what "
            "has one dataset."
        )
    return cells


def examine(cells: Sequence[Cell], ignored: Sequence[str] = ()) -> list[Found]:
    """Looks for what there is of some cells.

    A finished cell of another ablation in the same root, with the same settings, is taken as it is.

    Args:
        cells: of one ablation.
        ignored: settings, or groups of them, in which a run may differ since they change nothing,
            such as one that a later version of the configs has added.
    """
    return [_examine(cell, tuple(ignored)) for cell in cells]


def _examine(cell: Cell, ignored: tuple[str, ...]) -> Found:
    found = _examine_folder(cell, cell.folder, ignored)
    if found.state == "missing":
        root, seed = cell.folder.parents[1], f"_seed{cell.seed}"
        for other in sorted(root.glob(f"*/*{seed}/config.yaml")):
            elsewhere = _examine_folder(cell, other.parent, ignored)
            if elsewhere.state == "finished":
                return elsewhere
    return found


def _examine_folder(cell: Cell, folder: Path, ignored: tuple[str, ...] = ()) -> Found:
    path = folder / "config.yaml"
    if not path.is_file():
        return Found("missing", folder)
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        saved = None
    if not isinstance(saved, dict):
        return Found("begun", folder)  # killed while it was written, before the first step
    prefixes = tuple(f"{name}." for name in ignored)
    differences = tuple(
        f"{key}: {_short(there)}, asked for {_short(asked)}"
        for key, there, asked in _differences(cell.config, _without_folder(saved))
        if not f"{key}.".startswith(prefixes)
    )
    if differences:
        return Found("changed", folder, differences)
    try:
        last = read_metrics(folder / "metrics.json").get(cell.iterations, {})
    except ValueError:
        last = {}
    is_evaluated = any(name.startswith("sem_seg/") for name in last)
    return Found("finished" if is_evaluated else "begun", folder)


def _as_saved(config: DictConfig) -> Mapping[str, Any]:
    """The config as a run writes it to its config.yaml, and as that is read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        LazyConfig.save(config, str(path))
        return _without_folder(yaml.safe_load(path.read_text(encoding="utf-8")))


def _without_folder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    train = {key: value for key, value in config.get("train", {}).items() if key != "output_dir"}
    return {**config, "train": train}


def _differences(asked: Any, saved: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys in which two trees differ, with what is saved and what is asked for."""
    if isinstance(asked, Mapping) and isinstance(saved, Mapping):
        for key in [*asked, *(key for key in saved if key not in asked)]:
            name = f"{path}.{key}" if path else str(key)
            yield from _differences(asked.get(key, "absent"), saved.get(key, "absent"), name)
    elif asked != saved:
        yield path, saved, asked


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


class _Training:
    """A process that trains a cell.

    Args:
        cell: which.
        program: `train_net.py`.
        options: more of its arguments.
        environment: variables of the process, besides those of this one.
        lock: descriptor of the cell's locked file, which is handed to the process.
    """

    def __init__(
        self,
        cell: Cell,
        program: Path,
        options: Sequence[str],
        environment: Mapping[str, str],
        lock: int,
    ) -> None:
        self.cell = cell
        command = [sys.executable, str(program), "--config-file", cell.config_file]
        command += ["--resume", *options, *cell.overrides]
        with cell.beside(".log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=[lock],
            )
        os.close(lock)  # the process holds it from here on, also when this one is killed
        self._peak_mib: float | None = None

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        return self._process.returncode

    def poll(self) -> bool:
        """Whether the process has ended; notes its memory in the folder of the run."""
        # What the kernel tells of a process that has ended counts in the memory of its parent.
        self._peak_mib = _peak_mib(self._process.pid) or self._peak_mib
        if self._process.poll() is None:
            return False
        _note_memory(self.cell.folder, self._peak_mib)
        return True

    def stop(self) -> None:
        """Ends the process; it can be resumed."""
        if not self.poll():
            self._process.terminate()
        end = time.monotonic() + _TERMINATION
        while not self.poll() and time.monotonic() < end:
            time.sleep(_POLL / 10)
        if not self.poll():
            self._process.kill()
            self._process.wait()


def _peak_mib(pid: int) -> float | None:
    """The most memory that a running process has had; None where Linux does not tell."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


def _note_memory(folder: Path, peak_mib: float | None) -> None:
    """Keeps the largest peak of the processes that have trained a cell."""
    if peak_mib is None or not folder.is_dir():
        return
    path = folder / RESOURCES_FILE
    before = json.loads(path.read_text())["peak_host_mib"] if path.is_file() else 0.0
    path.write_text(json.dumps({"peak_host_mib": max(before, round(peak_mib, 1))}) + "\n")


def train_cells(
    cells: Sequence[Cell],
    program: Path,
    *,
    parallel: int = 1,
    options: Sequence[str] = (),
    environments: Sequence[Mapping[str, str]] = ({},),
    progress: Callable[[Mapping[str, int], str], None],
) -> list[Failure]:
    """Trains cells, each in a process of its own, and continues those that were begun.

    A cell that fails does not keep the others from being trained. When this process is interrupted
    or terminated, it ends its trainings, to be continued by another call.

    Args:
        cells: those that are not finished.
        program: `train_net.py`.
        parallel: how many are trained at a time.
        options: more arguments of the program.
        environments: variables of the processes at each of the `parallel` places, in turn.
        progress: is told the iterations done by name of each cell that is being trained, and a line
            where a cell has begun or ended, else "".

    Returns:
        What failed.

    Raises:
        ValueError: no place to train at.
    """
    if parallel < 1:
        raise ValueError(f"--parallel {parallel}: needs at least 1.")
    waiting = list(cells)
    places: dict[int, _Training] = {}
    failures = []
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or places:
            while waiting and len(places) < parallel:
                cell = waiting.pop(0)
                lock = _lock(cell)
                if lock is None:
                    progress({}, f"{cell.name}: another process trains it")
                    continue
                place = min(set(range(parallel)) - set(places))
                environment = environments[place % len(environments)]
                places[place] = _Training(cell, program, options, environment, lock)
                progress({cell.name: _iterations_done(cell)}, f"{cell.name}: training")
            for place, training in list(places.items()):
                if training.poll():
                    del places[place]
                    failure = _failure(training)
                    failures += [failure] if failure else []
                    text = f"failed: {failure.reason}" if failure else "finished"
                    done = {training.cell.name: _iterations_done(training.cell)}
                    progress(done, f"{training.cell.name}: {text}")
            if places:
                time.sleep(_POLL)
                progress({t.cell.name: _iterations_done(t.cell) for t in places.values()}, "")
    finally:
        for training in places.values():
            training.stop()
        signal.signal(signal.SIGTERM, before)
    return failures


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _lock(cell: Cell) -> int | None:
    """A descriptor of the cell's lock, or None where another process has it."""
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(cell.beside(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _failure(training: _Training) -> Failure | None:
    cell, log = training.cell, training.cell.beside(".log")
    if training.status == 0 and _examine_folder(cell, cell.folder).state == "finished":
        return None
    lines = _tail(log).splitlines()
    if training.status and training.status < 0:
        reason = f"ended by {signal.Signals(-training.status).name}"
    elif training.status == 0:
        reason = "ended without a last evaluation"
    else:
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "said nothing")
    return Failure(cell, reason.removeprefix("error: "), log)


def _iterations_done(cell: Cell) -> int:
    found = re.findall(r'"iteration": (\d+)', _tail(cell.folder / "metrics.json"))
    # Those of a training are numbered from 0, a last evaluation by their number.
    return min(int(found[-1]) + 1, cell.iterations) if found else 0


def _tail(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read().decode(errors="replace")
