r"""Bounds from both sides for samples of the model itself (Grosse, Ghahramani and Adams, 2015).

Where (x_0, x_1:T) is drawn from the model, the path x_1:T is a draw from the exact posterior
p_θ(x_1:T | x_0).  Put among K − 1 paths drawn from q it gives an upper bound, and K paths from q
the lower bound of Burda et al. (2016, equation 8):

    E log (1/K) Σ_{k≤K} w_k  ≤  log p_θ(x_0)  ≤  E log (1/K)(w* + Σ_{k<K} w_k)

with w = p_θ(x_0:T)/q(x_1:T | x_0) along each path, w* along the one that made x_0.  The upper one
holds as the inverse of its mean weight is unbiased for 1/p_θ(x_0).  Both tighten with K, so that
their distance limits how loose the lower bound is on such samples (not on data: a model may be
easier to bound at its own samples).

w* takes one pass and keeps no trajectory, as in noising order only one factor of

    q(x_1:T | x_0) = q(x_1 | x_0) ∏_{t=2}^T q(x_t | x_{t−1})

waits for x_0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from pyrodiff import kernels
from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.distributions import from_noise
from pyrodiff.finite import NOTHING_FAILED, Failures, check_finite, failed_at
from pyrodiff.likelihood.estimator import Batch, Estimator, noise_seed
from pyrodiff.likelihood.paths.weights import Move, path_weights
from pyrodiff.likelihood.result import LogLikelihood, Mean
from pyrodiff.likelihood.samples import sample_checksums
from pyrodiff.likelihood.statistics import Summary, log_mean_exp, log_mean_of_weights
from pyrodiff.streams import NoiseStreams

__all__ = ["Sandwich", "SandwichBound", "generate"]

UNKNOWN = (
    "Standard errors of the upper bound are NaN: one draw from the posterior does not tell its "
    "spread."
)


@dataclass(frozen=True, eq=False)
class Sandwich:
    """Samples of a model and the bounds on their log p_θ(x_0).

    Args:
        x_0: shape (N, *event_shape).
        lower: the importance bound of K paths from q.
        upper: the bound of the generating path and K − 1 of the same paths; its ``std_error`` is
            NaN, as one draw from the posterior says nothing of its spread.
    """

    x_0: Tensor
    lower: LogLikelihood
    upper: LogLikelihood

    def gap(self) -> Mean:
        """The mean of upper − lower over samples, nats, each sample paired with itself.

        Its expectation is above that of log p_θ(x_0) − lower, the looseness of the lower bound.
        ``between_samples`` holds all of the error; ``monte_carlo`` alone is unknown (NaN).
        """
        difference = self.upper.value - self.lower.value
        n = len(difference)
        between = float(difference.std() / math.sqrt(n)) if n > 1 else math.nan
        return Mean(float(difference.mean()), between, math.nan)


def generate(
    reverse: ReverseChain, streams: NoiseStreams, context: Tensor | None
) -> tuple[Move, Tensor]:
    """x_0 from the model, and log w of the path that led to it, nats, float64, shape (n,).

    The path is float64, x_0 rounded to what ``reverse.sample`` gives; log w is that of the rounded
    one.  The last entry is the step at which a row failed, (n,), 0 where it did not.
    """
    chain, event_dim, like = reverse.forward_chain, len(reverse.event_shape), reverse.prototype()
    x_t, failed = streams.normal(chain.carry(like, exact=True)), NOTHING_FAILED
    total = reverse.prior(x_t).log_prob(x_t).double()
    for t in range(reverse.num_steps, 1, -1):
        p = reverse.transition(x_t, t, context)
        x_s = from_noise(p, streams.normal(x_t))
        knots = chain.log_snr[t - 2], chain.log_snr[t - 1]
        q = kernels.transition(x_s.double(), *knots, event_dim)
        total += p.log_prob(x_s).double() - q.log_prob(x_t.double())
        x_t, failed = x_s, failed_at(failed, t, total)
    decoder = reverse.decode(x_t, context)
    x_0 = from_noise(decoder, streams.normal(x_t)).to(like)
    total += decoder.log_prob(x_0).double()
    total -= chain.marginal(x_0.double(), 1).log_prob(x_t.double())
    failed = failed_at(failed, 1, total)
    return Move(x_0, total.masked_fill(failed > 0, torch.nan)), failed


@dataclass(frozen=True)
class SandwichBound(Estimator):
    """Samples of a model with a lower and an upper bound, from (K + 1) · T network calls each.

    ``estimate(reverse, 64)`` draws 64 samples and bounds them from both sides.  Data come without
    the path that made them: ``estimate(reverse, x_0)`` gives them the lower bound alone.

    Args:
        particles: K.

    Raises:
        ValueError: ``particles`` < 1.
    """

    particles: int = 32

    def __post_init__(self) -> None:
        check_count("particles", self.particles)

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        """The lower bound, with its K weights."""
        log_w = path_weights(reverse, batch, self.particles)
        calls = self.particles * reverse.calls_per_path
        summary = log_mean_of_weights(log_w)
        return self.result(reverse, summary, kind="lower bound", calls=calls, log_weights=log_w)

    @overload
    def estimate(
        self,
        reverse: ReverseChain,
        x_0: Tensor,
        *,
        seed: int = 0,
        batch_size: int = 256,
        context: Tensor | None = None,
        indices: Sequence[int] | None = None,
        progress: Callable[[int, Tensor], object] | None = None,
    ) -> LogLikelihood: ...

    @overload
    def estimate(
        self,
        reverse: ReverseChain,
        x_0: int,
        *,
        seed: int = 0,
        batch_size: int = 256,
        context: Tensor | None = None,
        progress: Callable[[int, Tensor], object] | None = None,
    ) -> Sandwich: ...

    def estimate(
        self, reverse: ReverseChain, x_0: Tensor | int, **options: Any
    ) -> LogLikelihood | Sandwich:
        """Bounds for the samples that ``reverse.sample(N, seed=seed)`` gives, or for data.

        Args:
            reverse: the model; dropout and the like are switched off meanwhile.
            x_0: N ≥ 1, how many samples to draw; or data, shape (N, *event_shape).
            options: ``seed``, ``batch_size``, ``context`` and ``progress`` (told the lower bounds)
                as of every estimator; a sample depends on (seed, its index) and its context alone.

        Raises:
            ValueError: N or ``batch_size`` < 1, contexts that are not one per sample.
        """
        if isinstance(x_0, Tensor):
            return super().estimate(reverse, x_0, **options)
        return self._of_samples(reverse, x_0, **options)

    @torch.no_grad()
    def _of_samples(
        self,
        reverse: ReverseChain,
        num_samples: int,
        *,
        seed: int = 0,
        batch_size: int = 256,
        context: Tensor | None = None,
        progress: Callable[[int, Tensor], object] | None = None,
    ) -> Sandwich:
        """The samples, and their bounds from both sides."""
        check_count("num_samples", num_samples)
        if context is not None:
            if len(context) != num_samples:
                raise ValueError(f"Expected {num_samples} contexts; got {len(context)}.")
            check_finite(context, "contexts")
        samples, above = [], []

        def estimate_rows(rows: slice, failures: Failures) -> LogLikelihood:
            indices = range(rows.start, rows.stop)
            rows_context = None if context is None else context[rows]
            streams = NoiseStreams(seed, indices, reverse.event_shape)
            (x_0, log_w), failed = generate(reverse, streams, rows_context)
            failures.add(indices, failed)
            exact = reverse.forward_chain.carry(x_0, exact=True)
            batch = Batch(
                exact, rows_context, indices, noise_seed(seed), rows=batch_size, failures=failures
            )
            lower = self.estimate_batch(reverse, batch)
            samples.append(x_0)
            above.append(self._upper(reverse, lower, log_w.cpu()))
            return lower

        lower = self.over_batches(
            reverse, estimate_rows, count=num_samples, batch_size=batch_size, progress=progress
        )
        x_0 = torch.cat(samples)
        upper, checksums = LogLikelihood.concatenate(above), sample_checksums(x_0, context)
        return Sandwich(
            x_0,
            replace(lower, checksums=checksums),
            replace(upper, checksums=checksums, model=lower.model),
        )

    def _upper(self, reverse: ReverseChain, lower: LogLikelihood, log_w: Tensor) -> LogLikelihood:
        """The bound from the weights of the generating paths, (n,), and K − 1 of the others."""
        assert lower.log_weights is not None
        mixed = torch.cat([log_w.unsqueeze(1), lower.log_weights[:, :-1]], 1)
        value = log_mean_exp(mixed)
        unknown = torch.full_like(value, torch.nan)
        summary = Summary(value, unknown, torch.zeros_like(value), UNKNOWN)
        calls = self.particles * reverse.calls_per_path
        return self.result(reverse, summary, kind="upper bound", calls=calls, log_weights=mixed)
