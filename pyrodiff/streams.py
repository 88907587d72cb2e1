"""Random streams that belong to samples, not to batches.

The noise of sample i is a function of (seed, i) alone: its own counter-based generator (Philox;
Salmon et al., 2011) with that pair as the key.  Batch size, order and the number of processes or
devices therefore never change a value.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["NoiseStreams"]

_BLOCK_VALUES = 2**20  # normals held at a time for a batch: 8 MiB


class NoiseStreams:
    """Standard normal noise for a batch of samples, each from its own stream.

    Args:
        seed: the seed common to the whole run, a non-negative integer below 2⁶⁴.
        indices: the index of each sample of the batch in the whole run.
        event_shape: the shape of one draw.

    Raises:
        ValueError: a seed out of range.
    """

    def __init__(self, seed: int, indices: Iterable[int], event_shape: torch.Size):
        if not 0 <= seed < 2**64:
            raise ValueError(f"Expected a seed in [0, 2**64); got {seed}.")
        self._generators = [
            np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
            for index in indices
        ]
        self._event_shape = event_shape
        self._block = np.empty((len(self._generators), 0, event_shape.numel()))
        self._next = 0

    def normal(self, like: Tensor) -> Tensor:
        """The next draw of every stream, shape (N, *event_shape), in the dtype of ``like``.

        Draws are made in float64 on the CPU, many at a time: asking a thousand generators for
        one draw each would cost more than the network.
        """
        if self._next == self._block.shape[1]:
            size = self._event_shape.numel()
            length = max(1, _BLOCK_VALUES // (size * max(1, len(self._generators))))
            draws = [g.standard_normal((length, size)) for g in self._generators]
            self._block, self._next = np.stack(draws), 0
        noise = torch.from_numpy(self._block[:, self._next].copy())
        self._next += 1
        return noise.reshape(-1, *self._event_shape).to(like)
