"""Which sample comes when, and the random numbers that augment it: functions of the seed alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import Sampler


class ResumableTrainingSampler(Sampler):
    """An infinite, shuffled stream of samples that can start anywhere.

    All processes see one global stream, epoch after epoch, whose order depends only on the seed and
    the epoch. Rank r of N takes the positions ``start + r``, ``start + r + N``, ...

    Args:
        size: number of samples in the dataset.
        seed: not negative, the same in every process.
        repeat_factors: how often an epoch holds each sample, 1 or more on average: the whole part
            always, and once more with the fractional part as probability. None for once each.
        shuffle: whether each epoch has an order of its own; otherwise indices ascend.
        start: first position of the global stream to draw.
        rank: this process, default: detectron2's.
        world_size: number of processes, default: detectron2's.

    Raises:
        ValueError: if an argument lies outside its range.

    Reference: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR
        2019, appendix B.2 (repeat factors).
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        repeat_factors: Sequence[float] | np.ndarray | None = None,
        shuffle: bool = True,
        start: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.rank = comm.get_rank() if rank is None else rank
        self.world_size = comm.get_world_size() if world_size is None else world_size
        if size < 1:
            raise ValueError(f"The sampler needs at least one sample, got size {size}")
        if seed < 0 or start < 0:
            raise ValueError(f"seed and start must not be negative, got {seed} and {start}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in 0..{self.world_size - 1}, got {self.rank}")
        factors = None if repeat_factors is None else np.asarray(repeat_factors, dtype=np.float64)
        if factors is not None:
            if factors.shape != (size,):
                raise ValueError(
                    f"repeat_factors must be {size} numbers, one per sample, got shape "
                    f"{factors.shape}"
                )
            if not (factors >= 1).all():
                first = int(np.argmin(factors >= 1))
                raise ValueError(
                    "repeat_factors must be numbers of 1 or more, got "
                    f"{factors[first]} for sample {first}"
                )
        self.size = size
        self.seed = seed
        self.repeat_factors = factors
        self.shuffle = shuffle
        self.start = start

    def epoch_indices(self, epoch: int) -> list[int]:
        """The dataset indices of one epoch, in order. With repeat factors epochs vary in length."""
        generator = self._generator(epoch)
        indices = np.arange(self.size)
        if self.repeat_factors is not None:
            indices = np.repeat(indices, self._repeats(generator))
        if self.shuffle:
            indices = indices[torch.randperm(len(indices), generator=generator).numpy()]
        return indices.tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields (position in the global stream, dataset index)."""
        return itertools.islice(self._stream(), self.rank, None, self.world_size)

    def _stream(self) -> Iterator[tuple[int, int]]:
        """The global stream from ``start`` on."""
        start_epoch, first = self._start_epoch()
        for epoch in itertools.count(start_epoch):
            indices = self.epoch_indices(epoch)
            for offset in range(max(0, self.start - first), len(indices)):
                yield first + offset, indices[offset]
            first += len(indices)

    def _start_epoch(self) -> tuple[int, int]:
        """The epoch that holds ``start``, and the position of its first sample.

        The order of earlier epochs is not drawn: a run of many epochs resumes at once.
        """
        if self.repeat_factors is None:
            epoch = self.start // self.size
            return epoch, epoch * self.size
        epoch, first = 0, 0
        while self.start >= (end := first + int(self._repeats(self._generator(epoch)).sum())):
            epoch, first = epoch + 1, end
        return epoch, first

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(_mix(self.seed, epoch))

    def _repeats(self, generator: torch.Generator) -> np.ndarray:
        """(size,) int64, how often an epoch holds each sample; the epoch's first random numbers."""
        assert self.repeat_factors is not None
        whole = np.floor(self.repeat_factors)
        chance = torch.rand(self.size, generator=generator, dtype=torch.float64).numpy()
        return (whole + (chance < self.repeat_factors - whole)).astype(np.int64)


@contextmanager
def sample_rng(seed: int, position: int) -> Iterator[None]:
    """Seeds the random numbers of one sample, and restores the previous state afterwards.

    Inside, the states of ``random``, ``numpy.random`` and torch's CPU generator depend on the
    arguments alone: neither on the worker nor on the samples before this one.

    Args:
        seed: the run's seed, not negative.
        position: the sample's position in the stream, not negative.
    """
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    mixed = _mix(seed, position)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    # Not torch.manual_seed, which would reseed the GPU of a run without workers, for good.
    torch.default_generator.manual_seed(mixed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def _mix(seed: int, number: int) -> int:
    """Hashes two integers to 63 bits, so that neighbouring seeds share no samples."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) >> 1
