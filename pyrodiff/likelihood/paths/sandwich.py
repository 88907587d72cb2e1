r"""Bounds from both sides for samples of the model itself (Grosse, Ghahramani and Adams, 2015).

Where (x_0, x_1:T) is drawn from the model, the path x_1:T is a draw from the exact posterior
p_θ(x_1:T | x_0).  Put among K − 1 paths drawn from q it gives an upper bound, and K paths from q
the lower bound of Burda et al. (2016, equation 8):

    E log (1/K) Σ_{k≤K} w_k  ≤  log p_θ(x_0)  ≤  E log (1/K)(w* + Σ_{k<K} w_k)

with w = p_θ(x_0:T)/q(x_1:T | x_0) along each path, w* along the one that made x_0.  The upper one
holds as the inverse of its mean weight is unbiased for 1/p_θ(x_0).  Both tighten with K, so that
their distance says how loose the lower bound can be on such samples (not on data: a model may be
easier to bound where it samples than where it is asked).

w* takes one pass and keeps no trajectory, as in noising order only one factor of

    q(x_1:T | x_0) = q(x_1 | x_0) ∏_{t=2}^T q(x_t | x_{t−1})

waits for x_0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrodiff import kernels
from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.finite import NOTHING_FAILED, Failures, check_finite, failed_at
from pyrodiff.likelihood.estimator import Batch, noise_seed
from pyrodiff.likelihood.paths.weights import Move, path_weights
from pyrodiff.likelihood.result import Kind, LogLikelihood, Mean
from pyrodiff.likelihood.samples import sample_checksums
from pyrodiff.likelihood.statistics import Summary, log_mean_exp, log_mean_of_weights
from pyrodiff.networks.modes import evaluation_mode
from pyrodiff.serialization import fingerprint
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
        law = reverse.transition(x_t, t, context).base_dist
        x_s = law.loc + law.scale * streams.normal(x_t)
        p = dist.Normal(law.loc.double(), law.scale.double(), validate_args=False)
        knots = chain.log_snr[t - 2], chain.log_snr[t - 1]
        q = kernels.transition(x_s.double(), *knots, event_dim)
        total += p.to_event(event_dim).log_prob(x_s.double()) - q.log_prob(x_t.double())
        x_t, failed = x_s, failed_at(failed, t, total)
    decoder = reverse.decode(x_t, context)
    x_0 = decoder.base_dist.from_noise(streams.normal(x_t)).to(like)
    total += decoder.log_prob(x_0).double()
    total -= chain.marginal(x_0.double(), 1).log_prob(x_t.double())
    failed = failed_at(failed, 1, total)
    return Move(x_0, total.masked_fill(failed > 0, torch.nan)), failed


@dataclass(frozen=True)
class SandwichBound:
    """Samples of a model with a lower and an upper bound, from (K + 1) · T network calls each.

    Args:
        particles: K.

    Raises:
        ValueError: ``particles`` < 1.
    """

    particles: int = 32

    def __post_init__(self) -> None:
        check_count("particles", self.particles)

    @torch.no_grad()
    def estimate(
        self,
        reverse: ReverseChain,
        num_samples: int,
        *,
        seed: int = 0,
        batch_size: int = 256,
        context: Tensor | None = None,
        progress: Callable[[int, Tensor], object] | None = None,
    ) -> Sandwich:
        """Bounds for the samples that ``reverse.sample(num_samples, seed=seed)`` gives.

        Args:
            reverse: the model; dropout and the like are switched off while it is asked.
            num_samples: N ≥ 1.
            seed: of the noise streams; a sample depends on (seed, its index) and its context alone.
            batch_size: rows per network call, at most.
            context: shape (N, …) or None.
            progress: called after each batch with the number of samples done and their lower
                bounds.

        Raises:
            ValueError: ``num_samples`` or ``batch_size`` < 1, contexts that are not one per sample.
        """
        check_count("num_samples", num_samples)
        check_count("batch_size", batch_size)
        if context is not None and len(context) != num_samples:
            raise ValueError(f"Expected {num_samples} contexts; got {len(context)}.")
        if context is not None:
            check_finite(context, "contexts")
        parts, failures, model = [], Failures(), fingerprint(reverse)
        with evaluation_mode(reverse):
            for start in range(0, num_samples, batch_size):
                places = range(start, min(start + batch_size, num_samples))
                part = None if context is None else context[places.start : places.stop]
                parts.append(self._batch(reverse, places, part, seed, batch_size, failures))
                if progress is not None:
                    progress(places.stop, torch.cat([part.lower.value for part in parts]))
        failures.warn(num_samples, "Their bounds are NaN, and means leave them out.")
        x_0 = torch.cat([part.x_0 for part in parts])
        known: dict[str, Any] = {"model": model, "checksums": sample_checksums(x_0, context)}
        return Sandwich(
            x_0,
            replace(LogLikelihood.concatenate([part.lower for part in parts]), **known),
            replace(LogLikelihood.concatenate([part.upper for part in parts]), **known),
        )

    def _batch(
        self,
        reverse: ReverseChain,
        indices: range,
        context: Tensor | None,
        seed: int,
        rows: int,
        failures: Failures,
    ) -> Sandwich:
        streams = NoiseStreams(seed, indices, reverse.event_shape)
        (x_0, log_w_generating), failed = generate(reverse, streams, context)
        failures.add(indices, failed)
        exact = reverse.forward_chain.carry(x_0, exact=True)
        batch = Batch(exact, context, indices, noise_seed(seed), rows, failures)
        log_w = path_weights(reverse, batch, self.particles)
        mixed = torch.cat([log_w_generating.cpu().unsqueeze(1), log_w[:, :-1]], 1)
        above = log_mean_exp(mixed)
        unknown = torch.full_like(above, torch.nan)
        upper = Summary(above, unknown, torch.zeros_like(above), UNKNOWN)
        return Sandwich(
            x_0,
            self._result(reverse, log_w, log_mean_of_weights(log_w), "lower bound"),
            self._result(reverse, mixed, upper, "upper bound"),
        )

    def _result(
        self, reverse: ReverseChain, log_w: Tensor, summary: Summary, kind: Kind
    ) -> LogLikelihood:
        return LogLikelihood(
            summary.value,
            summary.std_error,
            kind,
            torch.full(summary.value.shape, self.particles * reverse.num_steps),
            reverse.event_shape.numel(),
            repr(self),
            degrees_of_freedom=summary.degrees_of_freedom,
            log_weights=log_w,
            remarks=summary.remarks,
        )
