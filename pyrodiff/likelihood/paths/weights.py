r"""Weights of whole paths: log w = log p_θ(x_0:T) − log q(x_1:T | x_0), one step at a time.

With x_T = α_T x_0 + σ_T ε and x_{t−1} = c_0 x_0 + c_t x_t + σ̃_t z drawn from q,

    log w = ½ (‖ε‖² − ‖x_T‖²) + d log σ_T                                    first
          + Σ_{t≥2} Σ_i ½ (log ρ + (1 − ρ) z²) − g (σ̃ z + ½ g)/Σ_θ           step
          + log p_θ(x_0 | x_1)                                               last

    ρ = σ̃_t²/Σ_θ,   g = c_0 (x_0 − x̂_0(x_t))

so that nothing cancels where the model's transition is close to q's.  E[w] = p_θ(x_0), and
E[log w] is the variational bound.  Sums over the path are kept in float64; where a number in one
is not finite, the path's weight is NaN.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.denoisers import Prediction
from pyrodiff.finite import NOTHING_FAILED, failed_at
from pyrodiff.kernels import Step
from pyrodiff.likelihood.estimator import Batch
from pyrodiff.streams import NoiseStreams

__all__ = [
    "Move",
    "first",
    "last",
    "log_ratios",
    "move",
    "path_rows",
    "path_weights",
    "predict",
    "weights_and_summand",
]


class Move(NamedTuple):
    """A draw from q and its log p_θ/q, nats, float64, shape (rows,).

    It is NaN, never ±∞, where the model's numbers are not finite.
    """

    x: Tensor
    log_ratio: Tensor


def _finite_or_nan(log_ratio: Tensor) -> Tensor:
    """−∞ would be a weight of 0, which no mean of weights shows."""
    return torch.where(log_ratio.isfinite(), log_ratio, torch.nan)


def _axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim()))


def first(reverse: ReverseChain, x_0: Tensor, noise: Tensor) -> Move:
    """x_T ~ q(x_T | x_0) for given noise, and log p(x_T) − log q(x_T | x_0)."""
    chain, size = reverse.forward_chain, reverse.event_shape.numel()
    x_T = chain.sample(x_0, chain.num_steps, noise)
    squares = (noise.square() - x_T.square()).sum(_axes(x_0))
    log_sigma = 0.5 * torch.nn.functional.logsigmoid(-chain.log_snr[-1])
    return Move(x_T, 0.5 * squares.double() + size * float(log_sigma))


def move(
    reverse: ReverseChain,
    x_t: Tensor,
    x_0: Tensor,
    t: int,
    noise: Tensor,
    prediction: Prediction,
) -> Move:
    """x_{t−1} ~ q(x_{t−1} | x_t, x_0) for given noise, and its log p_θ/q; t ≥ 2.

    Args:
        x_t, x_0, noise: shape (rows, *event_shape).
        prediction: of the denoiser at (x_t, t).
    """
    step = reverse.forward_chain.exact_step(t)
    shift = noise * math.exp(0.5 * float(step.log_small))
    x = torch.add(shift, x_0, alpha=float(step.c_0)).add_(x_t, alpha=float(step.c_t))
    gap = x_0 - prediction.x0_hat
    if reverse.variance.differentiates:
        wide = reverse.step(t, x_t)
        covariance = reverse.variance.covariance(wide, prediction, reverse.event_dim)
        difference = shift + wide.c_0 * gap
        log_ratio = covariance.log_ratio(noise, difference, wide.log_small, reverse.event_dim)
        return Move(x, _finite_or_nan(log_ratio.double()))
    if not reverse.variance.depends_on_x:
        fixed = reverse.variance.log_variance(step, None)
        if fixed.numel() == 1:
            log_ratio = _fixed_log_ratio(reverse, gap, step, shift, float(fixed))
            return Move(x, _finite_or_nan(log_ratio))
    wide = reverse.step(t, x_t)
    log_variance = reverse.log_variance(wide, prediction)
    log_rho, gap = wide.log_small - log_variance, gap * wide.c_0
    log_ratio = 0.5 * (log_rho - torch.expm1(log_rho) * noise.square())
    log_ratio -= gap * torch.add(shift, gap, alpha=0.5) * (-log_variance).exp()
    return Move(x, _finite_or_nan(log_ratio.sum(_axes(x)).double()))


def _fixed_log_ratio(
    reverse: ReverseChain, gap: Tensor, step: Step, shift: Tensor, log_variance: float
) -> Tensor:
    """log p_θ/q where Σ_θ is one number; gap = x_0 − x̂_0, g = c_0 · gap, shift = σ̃ z."""
    c_0, log_small, axes = float(step.c_0), float(step.log_small), _axes(gap)
    cross = torch.add(shift, gap, alpha=0.5 * c_0).mul_(gap).sum(axes)
    total = (-c_0 * math.exp(-log_variance)) * cross.double()
    log_rho = log_small - log_variance
    if log_rho != 0:
        squares = shift.square().sum(axes).double() * math.exp(-log_small)
        total += 0.5 * (reverse.event_shape.numel() * log_rho - math.expm1(log_rho) * squares)
    return total


def last(reverse: ReverseChain, x_1: Tensor, x_0: Tensor, prediction: Prediction) -> Tensor:
    """log p_θ(x_0 | x_1), nats, float64, shape (rows,); NaN where it is not finite."""
    law = reverse.decode(x_1, prediction=prediction)
    return _finite_or_nan(law.log_prob(x_0).double())


def predict(reverse: ReverseChain, x_t: Tensor, t: int, context: Tensor | None) -> Prediction:
    """One network call at (x_t, t)."""
    return reverse.predict(x_t, reverse.step(t, x_t), context)


def log_ratios(
    reverse: ReverseChain, x_0: Tensor, context: Tensor | None, streams: NoiseStreams
) -> Iterator[Tensor]:
    """The T + 1 summands of log w of one path per row, shape (rows,) each, in T network calls.

    The n-th after the first is that of x_{T−n} given x_{T−n+1}.
    """
    x, log_ratio = first(reverse, x_0, streams.normal(x_0))
    yield log_ratio
    for t in range(reverse.num_steps, 1, -1):
        prediction = predict(reverse, x, t, context)
        x, log_ratio = move(reverse, x, x_0, t, noise=streams.normal(x), prediction=prediction)
        yield log_ratio
    yield last(reverse, x, x_0, predict(reverse, x, 1, context))


def _path(
    reverse: ReverseChain,
    x_0: Tensor,
    context: Tensor | None,
    streams: NoiseStreams,
    number: int | None,
) -> Tensor:
    """log w of one path per row, one of its summands, and the step where it failed; (3, rows).

    All are float64; the step is 0 where nothing failed.
    """
    total, failed = x_0.new_zeros(len(x_0), dtype=torch.float64), NOTHING_FAILED
    summand = torch.zeros_like(total)
    steps = itertools.chain([reverse.num_steps], range(reverse.num_steps, 0, -1))
    for n, (t, log_ratio) in enumerate(
        zip(steps, log_ratios(reverse, x_0, context, streams), strict=True)
    ):
        total += log_ratio
        failed = failed_at(failed, t, total)
        if n == number:
            summand += log_ratio
    return torch.stack([total.masked_fill(failed > 0, torch.nan), summand, failed.to(total)])


def path_weights(reverse: ReverseChain, batch: Batch, particles: int) -> Tensor:
    """log w of each sample's paths, nats, float64 on the CPU, shape (n, K).

    At most ``batch.rows`` paths are in memory at once, of one sample or of several.
    """
    return weights_and_summand(reverse, batch, particles, None)[0]


def weights_and_summand(
    reverse: ReverseChain, batch: Batch, particles: int, number: int | None
) -> tuple[Tensor, Tensor]:
    """``path_weights``, and one summand of each, by its number in ``log_ratios``; 0 for None."""
    calls = path_rows(batch, particles, reverse.event_shape)
    blocks = [_path(reverse, *call, number=number).cpu() for call in calls]
    log_w, summand, failed = torch.cat(blocks, 1).reshape(3, len(batch), particles)
    batch.failures.add(batch.indices, failed.amax(1).long())
    return log_w, summand


def path_rows(
    batch: Batch, particles: int, event_shape: torch.Size
) -> Iterator[tuple[Tensor, Tensor | None, NoiseStreams]]:
    """x_0, context and noise streams of each block of rows, a network call's worth at a time.

    Row r of all is path r mod K of the batch's sample r // K, for K particles.
    """
    total = len(batch) * particles
    for start in range(0, total, batch.rows):
        rows = range(start, min(start + batch.rows, total))
        sample = [row // particles for row in rows]
        indices, numbers = [batch.indices[i] for i in sample], [row % particles for row in rows]
        streams = NoiseStreams(batch.seed, indices, event_shape, numbers)
        context = None if batch.context is None else batch.context[sample]
        yield batch.x_0[sample], context, streams
