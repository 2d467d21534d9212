"""Random numbers that depend only on the seed, the stream, the iteration and the row.

The same configuration therefore gives the same samples on one process and on eight, for any batching of the rows, and
after a resume, without storing the state of a generator.
"""

import os
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """The purpose of a random number; the numbers of different streams are independent."""

    DATA_ORDER = 0
    ROLLOUT = 1
    MINIBATCHES = 2
    VALIDATION = 3
    PREDICTION = 4
    ADAPTERS = 5
    TRAINING_SAMPLE = 6
    REWARDS = 7


def global_seed() -> int:
    """Return the seed that ``seed_everything`` set in this process, or 0 if it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def uniforms(stream: Stream, iteration: int, rows: Tensor, width: int) -> Tensor:
    """Return ``width`` uniform random numbers for each row of a batch.

    A row's numbers do not depend on the other rows. A larger ``width`` only adds numbers at the end of a row.

    Args:
        stream: The purpose of the numbers.
        iteration: The training iteration or, in validation and prediction, the index of the batch.
        rows: [B] int64, the index of each row in the global batch.
        width: The number of random numbers in a row, such as one for each token to sample.

    Returns:
        [B, width] float32 in [0, 1), multiples of 2⁻²⁴, on the device of ``rows``.

    >>> numbers = uniforms(Stream.ROLLOUT, iteration=0, rows=torch.arange(8), width=4)
    >>> torch.equal(numbers[5:], uniforms(Stream.ROLLOUT, iteration=0, rows=torch.tensor([5, 6, 7]), width=4))
    True
    """
    seed = global_seed()
    numbers = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, iteration, row]))).random(
            width, dtype=np.float32
        )
        for row in rows.tolist()
    ]
    return torch.from_numpy(np.stack(numbers)).to(rows.device)


def row_seeds(stream: Stream, iteration: int, rows: Tensor) -> list[int]:
    """Return a seed for each row of a batch, for a generator outside this package, such as a server's.

    Args:
        stream: The purpose of the numbers that are drawn with the seeds.
        iteration: The training iteration or, in validation and prediction, the index of the batch.
        rows: [B] int64, the index of each row in the global batch.

    Returns:
        B integers in [0, 2⁶³); the integer for a row does not depend on the other rows.

    >>> seeds = row_seeds(Stream.ROLLOUT, iteration=0, rows=torch.arange(8))
    >>> seeds[5:] == row_seeds(Stream.ROLLOUT, iteration=0, rows=torch.tensor([5, 6, 7])), len(set(seeds))
    (True, 8)
    """
    seed = global_seed()
    states = [
        np.random.SeedSequence([seed, stream, iteration, row]).generate_state(1, np.uint64) for row in rows.tolist()
    ]
    return [int(state[0]) % 2**63 for state in states]


def generator(stream: Stream, *key: int) -> torch.Generator:
    """Return a CPU generator that is seeded from the global seed, the stream and the key.

    Args:
        stream: The purpose of the numbers.
        key: Integers that identify the generator within the stream, such as the iteration.

    Returns:
        A new generator.

    >>> first, second = (torch.randperm(10, generator=generator(Stream.MINIBATCHES, 3)) for _ in range(2))
    >>> torch.equal(first, second)
    True
    """
    state = np.random.SeedSequence([global_seed(), stream, *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)
