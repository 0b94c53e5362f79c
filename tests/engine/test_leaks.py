"""Repeating what a long run repeats leaves nothing behind: objects, open files, processes.

tools/soak.py watches whole runs for as long as one likes.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from torch import Tensor, nn

from contrast_d2.data import SemSegMapper, build_test_loader, build_train_loader
from contrast_d2.evaluation import SemSegEvaluator

from .test_trainer import make

ROOT = Path(__file__).parents[2]
METHODS = ("ms_cs", "pixel", "pixel_memory", "contextrast", "pne")
CLASSES = 4
STEPS = 20
SOME = 3 * STEPS
TIMES = 15
CHANNELS = {"res2": 64, "res3": 128, "res4": 256, "res5": 512}
DECODED = ("p2", "pre_logits")
VAL = "shapes_sem_seg_val"


def growth(step: Callable[[], object]) -> tuple[int, int]:
    """Blocks of Python's memory, and tensors, that STEPS calls leave behind.

    What a step leaks grows every time; torch and NumPy also keep memory of each size they meet,
    less and less of it as no new sizes come. So the least growth counts, of as many times as it
    takes until next to nothing is left, TIMES at most.
    """

    def count() -> tuple[int, int]:
        gc.collect()
        tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        return sys.getallocatedblocks(), tensors

    def repeat() -> tuple[int, int]:
        for _ in range(STEPS):
            step()
        return count()

    repeat()
    before = count()
    blocks = tensors = sys.maxsize
    for _ in range(TIMES):
        after = repeat()
        blocks = min(blocks, after[0] - before[0])
        tensors = min(tensors, after[1] - before[1])
        if blocks < SOME and tensors <= 0:
            break
        before = after
    return blocks, tensors


@pytest.mark.slow
def test_growth_is_seen() -> None:
    kept: list = []
    blocks, tensors = growth(lambda: kept.append([object(), torch.zeros(1)]))
    assert blocks >= SOME and tensors == STEPS


def test_a_cache_that_fills_is_no_growth() -> None:
    cache: dict[int, list] = {}
    calls = itertools.count()
    blocks, tensors = growth(lambda: cache.setdefault(next(calls) % (4 * STEPS), [[], [], []]))
    assert len(cache) == 4 * STEPS and tensors <= 0 and blocks < SOME


def contrast_step(method: str) -> Callable[[], object]:
    """A step of a method with all its parts, on small random maps."""
    cfg = LazyConfig.load(str(ROOT / f"configs/camvid/semfpn_r18_{method}_cpu.py"))
    cfg.dataset.num_classes = CLASSES
    if "memory" in method:
        cfg.model.contrast.warmup_iters = 0
    contrast: nn.Module = instantiate(cfg.model.contrast)
    features = {
        name: torch.randn(2, channels, 16 >> i, 16 >> i)
        for i, (name, channels) in enumerate(CHANNELS.items())
    }

    def step() -> None:
        maps = {name: x.clone().requires_grad_() for name, x in features.items()}
        maps |= {name: torch.randn(2, 64, 16, 16, requires_grad=True) for name in DECODED}
        labels = torch.randint(0, CLASSES, (2, 4, 4)).repeat_interleave(16, 1)
        scores = torch.randn(2, CLASSES, 16, 16)
        out = contrast(maps, labels.repeat_interleave(16, 2), scores)
        sum(out.losses.values()).backward()
        contrast.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize("method", METHODS)
def test_contrast_steps_leave_nothing(method: str) -> None:
    blocks, tensors = growth(contrast_step(method))
    assert tensors <= 0 and blocks < SOME


def test_training_remembers_few_values_of_a_metric() -> None:
    trainer = make(batch_size=2)
    trainer.train(0, 1100)
    histories = trainer.storage.histories()
    assert {"loss_sem_seg", "total_loss"} <= histories.keys()
    for name, history in histories.items():
        assert len(history.values()) == 1000, name
        assert history.latest() == history.values()[-1][0] and history.values()[-1][1] == 1099


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_dropped_loaders_leave_no_worker_and_no_file() -> None:
    mapper = SemSegMapper(dataset_name=VAL, is_train=True)

    def use(loader) -> None:
        next(iter(loader))  # in the midst of an epoch, with batches on their way

    def both() -> None:
        use(
            build_train_loader(
                dataset=VAL, mapper=mapper, total_batch_size=2, seed=0, num_workers=2
            )
        )
        use(build_test_loader(dataset=VAL, mapper=mapper, num_workers=1))

    both()  # the first one starts the process that tracks shared memory
    gc.collect()
    files = open_files()
    for _ in range(10):
        both()
    gc.collect()
    assert multiprocessing.active_children() == []
    assert open_files() == files


def test_an_evaluation_keeps_nothing_of_an_image() -> None:
    evaluator = SemSegEvaluator(VAL, distributed=False)
    evaluator.reset()
    mapper = SemSegMapper(dataset_name=VAL, is_train=False)
    samples = [mapper(record) for record in DatasetCatalog.get(VAL)[:3]]
    scores = torch.randn(9, *samples[0]["image"].shape[1:])

    def step() -> None:
        for sample in samples:
            evaluator.process([sample], [{"sem_seg": scores}])

    blocks, tensors = growth(step)
    assert tensors <= 0 and blocks < SOME
