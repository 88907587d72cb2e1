r"""Random streams that belong to samples, not to batches.

The noise of sample i is a function of (seed, i, path) alone: its own counter-based generator
(Philox; Salmon et al., 2011) with (seed, i) as the key and ``path`` as the highest word of the
counter.  Batch size, order and the number of processes or devices therefore never change a value.

A draw of m words of 64 bits, read as 2m signed integers a_1 … a_m, b_1 … b_m, gives m pairs,

    √(−2 log u) (cos θ, sin θ),   u = (|a| + ½)/2³¹,   θ = π b/2³¹

(Box and Muller, 1958).  A batch is transformed at once.  A rejection method is cheaper for a single
value, but would cost several times as much for a batch as everything else up to the network.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["NoiseStreams", "derived_seed"]

_BLOCK_VALUES = 2**18  # normals per block for a batch: they fit into a processor's cache
_BLOCK_DRAWS = 32  # draws per block, at most: the rest might never be used


def _generator(seed: int, index: int, path: int) -> np.random.Philox:
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, path], dtype=np.uint64))


class NoiseStreams:
    """Standard normal noise for a batch of samples, each from its own stream.

    Args:
        seed: the seed common to the whole run, a non-negative integer below 2⁶⁴.
        indices: the index of each sample of the batch in the whole run.
        event_shape: the shape of one draw.
        paths: the number of each row's path, where a sample has several; default 0.

    Raises:
        ValueError: a seed or an index out of range, or paths that are not one per index.
    """

    def __init__(
        self,
        seed: int,
        indices: Iterable[int],
        event_shape: torch.Size,
        paths: Sequence[int] | None = None,
    ):
        if not 0 <= seed < 2**64:
            raise ValueError(f"Expected a seed in [0, 2**64); got {seed}.")
        indices = list(indices)
        if indices and not (0 <= min(indices) and max(indices) < 2**64):
            raise ValueError(
                f"Expected indices in [0, 2**64); got {min(indices)} to {max(indices)}."
            )
        paths = [0] * len(indices) if paths is None else paths
        if len(paths) != len(indices):
            raise ValueError(f"Expected {len(indices)} paths, one per index; got {len(paths)}.")
        rows = zip(indices, paths, strict=True)
        self._generators = [_generator(seed, index, path) for index, path in rows]
        self._event_shape = event_shape
        self._half = -(-event_shape.numel() // 2)  # words, each worth two values
        self._block: list[Tensor] = []

    def normal(self, like: Tensor) -> Tensor:
        """The next draw of every stream, shape (N, *event_shape), in the dtype of ``like``.

        Draws are made in blocks, on the CPU: one draw from each of a thousand generators would cost
        more than the network.
        """
        if not self._block:
            values = 2 * self._half * max(1, len(self._generators))
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._block = self._draw(min(_BLOCK_DRAWS, max(1, _BLOCK_VALUES // values)), dtype)
        noise = self._block.pop()[:, : self._event_shape.numel()]
        return noise.reshape(-1, *self._event_shape).to(like)

    def _draw(self, length: int, dtype: torch.dtype) -> list[Tensor]:
        """The next ``length`` draws of every stream, the last one first, (N, 2m) each."""
        words = np.empty((len(self._generators), length * self._half), dtype=np.uint64)
        for row, generator in zip(words, self._generators, strict=True):
            row[:] = generator.random_raw(len(row))
        pairs = torch.from_numpy(words.view(np.int32)).reshape(len(words), length, 2, self._half)
        a, b = pairs.permute(2, 1, 0, 3).to(dtype, memory_format=torch.contiguous_format)
        u = a.abs_().add_(0.5).mul_(2.0**-31).clamp_(max=1.0)
        radius, angle = u.log_().mul_(-2.0).sqrt_(), b.mul_(math.pi * 2.0**-31)
        values = torch.empty(length, len(words), 2, self._half, dtype=dtype)
        torch.cos(angle, out=values[:, :, 0]).mul_(radius)
        torch.sin(angle, out=values[:, :, 1]).mul_(radius)
        return list(values.flatten(2).unbind(0))[::-1]


def derived_seed(*words: int) -> int:
    """A seed that is a function of the words, unrelated for words that differ anywhere."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
