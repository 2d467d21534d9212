"""Random numbers as a function of (seed, stream, iteration, row), and of nothing else.

So the same configuration gives the same samples on one rank and on eight, in any batching of the rows, and after a
resume, without saving a generator's state.
"""

import os
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a random number is for; numbers of different streams have nothing to do with each other."""

    DATA_ORDER = 0
    ROLLOUT = 1
    MINIBATCHES = 2
    VALIDATION = 3
    PREDICTION = 4


def global_seed() -> int:
    """The seed that ``seed_everything`` set in this process, 0 if none."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def uniforms(stream: Stream, iteration: int, rows: Tensor, width: int) -> Tensor:
    """One uniform number a token, each row from a stream of its own.

    Args:
        stream: What the numbers are for.
        iteration: Which iteration, or which validation batch.
        rows: [B] int64, each row's place in the global batch.
        width: Numbers a row.

    Returns:
        [B, width] float64 in [0, 1), multiples of 2⁻²⁴, on the device of ``rows``.
    """
    seed = global_seed()
    draws = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, iteration, row]))).random(
            width, dtype=np.float32
        )
        for row in rows.tolist()
    ]
    return torch.from_numpy(np.stack(draws)).double().to(rows.device)


def generator(stream: Stream, *key: int) -> torch.Generator:
    """A CPU generator seeded by (seed, stream, key)."""
    state = np.random.SeedSequence([global_seed(), stream, *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)
