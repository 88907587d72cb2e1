r"""The particle bound: log of an unbiased estimate of p_θ(x_0) by sequential Monte Carlo.

Particles go from x_T to x_1 by q(x_{t−1} | x_t, x_0), and by resampling in proportion to

    p_θ(x_t:T)/q(x_t:T | x_0) · ψ_t(x_t)                                   (``smc``, ``twists``)

particles that will explain x_0 badly are replaced by copies of those that will do so well.  With
E Ẑ = p_θ(x_0) for any twist, K and threshold, E log Ẑ ≤ log p_θ(x_0) (Maddison et al., 2017).
Without resampling Ẑ is the mean of K path weights, the importance bound.

The standard error is read off the genealogy: the jackknife's (``statistics``) over the K first
particles, each with the share W_e of Ẑ that descends from it, which to first order is

    se² = K/(K − 1) Σ_e (W_e − 1/K)²      (Chan and Lai, 2013; Lee and Whiteley, 2018)

and without resampling is the importance bound's.  That holds for multinomial resampling.  Here it
is systematic, which varies less: the error is overestimated, and by too much to be of use where
half of the first particles or more have no descendants.
"""

import warnings
from dataclasses import dataclass, field, replace

from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.denoisers import Prediction
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.particles.smc import (
    ParticleFilter,
    Population,
    Proposal,
    eve_weights,
    evidence,
)
from pyrodiff.likelihood.particles.twists import DenoisedTwist, Twist
from pyrodiff.likelihood.paths.weights import Move, first, last, move, path_weights
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_exp
from pyrodiff.streams import NoiseStreams

__all__ = ["ParticleBound"]


@dataclass(frozen=True)
class _Guide(Proposal):
    """q(x_1:T | x_0), for x_0 of shape (rows, *event_shape)."""

    reverse: ReverseChain
    x_0: Tensor
    last_draw = 2

    def first(self, streams: NoiseStreams) -> Move:
        return first(self.reverse, self.x_0, streams.normal(self.x_0))

    def move(self, x_t: Tensor, t: int, prediction: Prediction, streams: NoiseStreams) -> Move:
        if t == 1:
            return Move(self.x_0, last(self.reverse, x_t, self.x_0, prediction))
        noise = streams.normal(x_t)
        return move(self.reverse, x_t, self.x_0, t, noise=noise, prediction=prediction)


@dataclass(frozen=True)
class ParticleBound(Estimator):
    """A lower bound on log p_θ(x_0) from K · T network calls, or twice that where compared.

    ``log_weights`` of the result are sums over the descendants of each first particle, −∞ where
    there are none: their log mean is the value, and their effective number is that of independent
    particles, which resampling brings down to a few over a long chain however good the value.
    The standard error is NaN where half of them or fewer are left, as it then cannot be known from
    one run, and for fewer than 8 particles or weights too heavy; ``remarks`` says which.

    Args:
        particles: K.
        twist: ψ; default ``DenoisedTwist()``.
        threshold: resample where the effective number of particles is below this share of K.
        compare: also compute the importance bound on the same K particles, the result's
            ``reference``, for each sample that was resampled (for the others it is the value),
            and warn where the particle bound is looser on average.  Without it nothing tells a
            bound that resampling has improved from one that it has ruined.

    Raises:
        ValueError: ``particles`` < 1, a threshold outside [0, 1].

    Warns:
        UserWarning: a mean value below the mean of the importance bound (``compare``).
    """

    particles: int = 32
    twist: Twist = field(default_factory=DenoisedTwist)
    threshold: float = 0.5
    compare: bool = True

    def __post_init__(self) -> None:
        check_count("particles", self.particles)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"Expected threshold to be in [0, 1]; got {self.threshold!r}.")

    @property
    def unbiased_weights(self) -> bool:
        return True

    def samples_per_batch(self, batch_size: int) -> int:
        return max(1, batch_size // self.particles)

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        population = self._propagate(reverse, batch)
        batch.failures.add(batch.indices, population.failed)
        log_w, calls = eve_weights(population), self.particles * reverse.calls_per_path
        result = self.result(
            reverse, evidence(log_w), kind="lower bound", calls=calls, log_weights=log_w
        )
        if not self.compare:
            return result
        resampled = population.resamplings > 0
        reference = result.value.clone()
        if bool(resampled.any()):
            rows = resampled.nonzero().flatten().tolist()
            log_w = path_weights(reverse, batch.select(rows), self.particles)
            reference[resampled] = log_mean_exp(log_w)
        return replace(result, calls=calls * (1 + resampled.long()), reference=reference)

    def review(self, result: LogLikelihood) -> None:
        _warn_where_looser(result)

    def _propagate(self, reverse: ReverseChain, batch: Batch) -> Population:
        x_0 = batch.x_0.repeat_interleave(self.particles, 0)

        def potential(x_t: Tensor, t: int, prediction: Prediction) -> Tensor:
            return self.twist.log_value(reverse, x_t, x_0, t, prediction)

        engine = ParticleFilter(self.particles, self.threshold, batch.rows)
        guide = _Guide(reverse, x_0)
        population = engine.run(
            reverse,
            guide,
            potential,
            seed=batch.seed,
            indices=batch.indices,
            context=batch.context,
        )
        return population.cpu()


def _warn_where_looser(result: LogLikelihood) -> None:
    if result.reference is None or result.looser is None:
        return
    both = result.value.isfinite() & result.reference.isfinite()
    value, reference = (float(v[both].mean()) for v in (result.value, result.reference))
    if value < reference:
        warnings.warn(
            "Expected the particle bound to be no looser than the importance bound on as many "
            f"particles; got {value:.3f} and {reference:.3f} nats on average, looser for "
            f"{int(result.looser.sum())} of {len(result.value)} samples. Report the importance "
            "bound (`reference`), or try another twist or a lower threshold.",
            UserWarning,
            stacklevel=5,  # whoever called estimate
        )
