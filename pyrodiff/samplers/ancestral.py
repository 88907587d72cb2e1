r"""Ancestral sampling from a reverse chain: x_T ~ N(0, I), x_{t−1} ~ p_θ(x_{t−1} | x_t), x_0 last.

(Ho et al., 2020, algorithm 2.)  Row i is made of the normals of the stream (seed, i) alone, so that
it depends neither on the number of samples nor on the batch size.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrodiff.checks import check_count
from pyrodiff.distributions import Law, from_noise
from pyrodiff.finite import NOTHING_FAILED, Failures, failed_at
from pyrodiff.streams import NoiseStreams

__all__ = ["SampledChain", "States", "ancestral", "count_samples", "sample"]


@runtime_checkable
class SampledChain(Protocol):
    """What sampling asks of a reverse chain."""

    event_shape: torch.Size
    num_steps: int

    def prototype(self) -> Tensor:
        """An empty tensor with the dtype and on the device that samples are drawn in."""

    def transition(self, x_t: Tensor, t: int, context: Tensor | None) -> Law:
        """p_θ(x_{t−1} | x_t), which has ``from_noise``."""

    def decode(self, x_1: Tensor, context: Tensor | None) -> Law:
        """p_θ(x_0 | x_1), which has ``from_noise``."""


def count_samples(num_samples: int | None, context: Tensor | None) -> int:
    """How many samples are asked for: so many, or one per context, or one.

    Raises:
        ValueError: no integer of at least 1, contexts that are not one per sample.
    """
    if num_samples is None:
        num_samples = 1 if context is None else len(context)
    check_count("num_samples", num_samples)
    if context is not None and len(context) != num_samples:
        raise ValueError(f"Expected {num_samples} contexts; got {len(context)}.")
    return num_samples


def ancestral(
    chain: SampledChain, streams: NoiseStreams, context: Tensor | None = None
) -> Iterator[Tensor]:
    """x_T, …, x_1, x_0 in turn, of shape (N, *event_shape), in T network calls.

    Args:
        chain: the model.
        streams: one per sample.
        context: shape (N, …) or None.
    """
    x_t = streams.normal(chain.prototype())
    yield x_t
    for t in range(chain.num_steps, 1, -1):
        x_t = from_noise(chain.transition(x_t, t, context), streams.normal(x_t))
        yield x_t
    yield from_noise(chain.decode(x_t, context), streams.normal(x_t))


States = Callable[[Any, NoiseStreams, Tensor | None], Iterator[Tensor]]
"""A way from noise to data: x_T, …, x_0 in turn from a chain, streams and a context."""


def sample(
    chain: SampledChain,
    num_samples: int,
    *,
    context: Tensor | None,
    seed: int,
    batch_size: int,
    trajectory: bool,
    states: States = ancestral,
) -> Tensor:
    """x_0 of the samples 0 … N − 1, or x_0, …, x_T, stacked: (1 or T + 1, N, *event_shape).

    Args:
        chain: the model.
        num_samples: N.
        context: shape (N, …) or None.
        seed: of the noise streams.
        batch_size: samples per network call.
        trajectory: whether all states are returned.
        states: the way from x_T to x_0.

    Warns:
        UserWarning: a network that returned NaN or infinity: such samples are NaN.
    """
    batches, failures = [], Failures()
    for start in range(0, num_samples, batch_size):
        batch = range(start, min(start + batch_size, num_samples))
        streams = NoiseStreams(seed, batch, chain.event_shape)
        rows = None if context is None else context[batch.start : batch.stop]
        rows_of_states, failed = _sample_batch(states(chain, streams, rows), chain, trajectory)
        batches.append(rows_of_states)
        failures.add(batch, failed)
    failures.warn(num_samples, "They are NaN.", stacklevel=5)
    return torch.cat(batches, dim=1)


def _sample_batch(
    states: Iterator[Tensor], chain: SampledChain, trajectory: bool
) -> tuple[Tensor, Tensor]:
    """x_0, or x_0 … x_T, stacked, NaN from the step on at which a sample failed, and that step."""
    returned: deque[Tensor] = deque(maxlen=None if trajectory else 1)
    failed, steps = NOTHING_FAILED, range(chain.num_steps + 1, 0, -1)
    for t, x in zip(steps, states, strict=True):
        failed = failed_at(failed, t, x)  # x_{t−1}
        lost = (failed > 0).reshape(-1, *(1 for _ in chain.event_shape))
        returned.appendleft(x.masked_fill(lost, torch.nan))
    return torch.stack(list(returned)), failed
