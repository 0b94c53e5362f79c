import itertools
import math
import random

import numpy as np
import pytest
import torch

from contrast_d2.data import ResumableTrainingSampler, sample_rng


def take(count, size=10, seed=3, **arguments):
    return list(itertools.islice(ResumableTrainingSampler(size, seed=seed, **arguments), count))


def test_every_epoch_is_a_new_permutation():
    stream = take(30)
    assert [position for position, _ in stream] == list(range(30))
    epochs = [[index for _, index in stream[e : e + 10]] for e in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_depends_on_the_seed_and_nothing_else():
    torch.manual_seed(0)
    first = take(25)
    torch.manual_seed(1)
    assert take(25) == first
    assert take(25, seed=4) != first


def test_neighbouring_seeds_share_no_epochs():
    """seed + epoch as the epoch's seed would make the second epoch of 3 the first of 4."""
    assert [i for _, i in take(20)[10:]] != [i for _, i in take(10, seed=4)]


def test_without_shuffling_the_order_is_kept():
    assert [index for _, index in take(7, size=3, shuffle=False)] == [0, 1, 2, 0, 1, 2, 0]


def test_start_continues_the_stream(subtests: pytest.Subtests) -> None:
    for factors in [None, [1, 2, 1.5, 3.25, 1, 1, 1.1, 1, 1, 1]]:
        for start in [1, 9, 10, 11, 37]:
            with subtests.test(factors=factors, start=start):
                whole = take(60, repeat_factors=factors)
                assert take(20, start=start, repeat_factors=factors) == whole[start : start + 20]


def test_repeat_factors_are_met_on_average():
    factors = [1, 2, 1.5, 3.25]
    sampler = ResumableTrainingSampler(4, seed=0, repeat_factors=factors)
    epochs = [np.bincount(sampler.epoch_indices(epoch), minlength=4) for epoch in range(2000)]
    counts = np.stack(epochs)
    assert set(counts[:, 0]) == {1} and set(counts[:, 1]) == {2}
    assert set(counts[:, 2]) == {1, 2} and set(counts[:, 3]) == {3, 4}
    # Standard errors of the means: 0.011 and 0.010.
    assert counts.mean(0) == pytest.approx(factors, abs=0.05)
    # The two roundings are drawn apart: together they are up in an eighth of the epochs.
    assert (counts.sum(1) == 9).mean() == pytest.approx(1 / 8, abs=0.04)


def test_repeated_samples_are_shuffled():
    sampler = ResumableTrainingSampler(3, seed=0, repeat_factors=[4, 4, 4])
    orders = {tuple(sampler.epoch_indices(epoch)) for epoch in range(5)}
    assert len(orders) == 5
    sampler = ResumableTrainingSampler(3, seed=0, repeat_factors=[1, 2, 1], shuffle=False)
    assert sampler.epoch_indices(0) == sampler.epoch_indices(1) == [0, 1, 1, 2]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_partition_the_stream(world_size):
    parts = [take(8, start=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    merged = [sample for step in zip(*parts, strict=True) for sample in step]
    assert merged == take(5 + 8 * world_size)[5:]


def test_arguments_are_checked(subtests: pytest.Subtests) -> None:
    for arguments, message in [
        ({"size": 0}, "size 0"),
        ({"seed": -1}, "-1"),
        ({"start": -2}, "-2"),
        ({"size": 2, "repeat_factors": [1.0]}, r"2 numbers, .* got shape \(1,\)"),
        ({"size": 2, "repeat_factors": [1.0, 0.5]}, "1 or more, got 0.5 for sample 1"),
        ({"size": 2, "repeat_factors": [1.0, math.nan]}, "got nan for sample 1"),
        ({"rank": 2, "world_size": 2}, "rank must lie in 0..1, got 2"),
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(ValueError, match=message):
                take(1, **arguments)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_sample_rng_seeds_and_restores():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    draw()
    before = states()
    with sample_rng(1, 7):
        first = draw()
    assert states() == before
    draw()
    with sample_rng(1, 7):
        assert draw() == first
    for other in ((1, 8), (2, 7), (7, 1)):
        with sample_rng(*other):
            assert not set(draw()) & set(first)


def test_sample_rng_restores_after_an_error():
    before = np.random.get_state()[1].tolist()
    with pytest.raises(RuntimeError), sample_rng(0, 0):
        np.random.rand(1000)
        raise RuntimeError
    assert np.random.get_state()[1].tolist() == before
