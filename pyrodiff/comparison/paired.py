r"""The difference of two models on the same samples, and where its error comes from.

Model A has S_A training seeds (often one), B has S_B; v_is is the value of sample i under seed s.

    d_i = mean_s v^A_is − mean_s v^B_is,   d̄ = mean_i d_i

    se² = G/(G − 1) Σ_g (Σ_{i∈g} (d_i − d̄))² / N²                      samples, in clusters g
        + Σ_{A,B} [ s²(v̄_s)/S − Σ_is r_is² / ((N − 1)(S − 1) N S) ]₊   training seeds
        r_is = v_is − v̄_i − v̄_s + v̄

    where seed s is common to both (the same first weights and batches), the sum has one term, with
    v_is = v^A_is − v^B_is: what they owe to the seed alike is no error of the difference.

The first is s²(d)/N where every sample is a cluster of its own.  Both hold the spread that belongs
to sample and seed together, which is therefore taken from one of them: clustering in two ways
(Cameron, Gelbach and Miller, 2011; for balanced data the analysis of variance of crossed random
effects).  The law is Student's with the degrees of freedom of Satterthwaite (1946),

    ν = se⁴ / (U²/(G − 1) + Σ W²/(S − 1)),   U, W: the terms,

so that a difference of which one model's seeds have all the say has S − 1.

The Monte Carlo error is within these.  Alone it is known from draws k = 1 … K that the results
hold: with φ_ik the share of draw k in the error of sample i,

    (lw_ik − mean_k lw_ik)/K       of a mean of log weights,
    w_ik/Σ_k w_ik − 1/K            of the log of a mean weight (delta method),

Φ = mean_s φ^A − mean_s φ^B has Var d̄ = Σ_i K/(K − 1) Σ_k Φ_ik² / N², whether the models were given
the same noise or not.  Without draws it is the sum of the models' own for independent noise only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.comparison.evaluated import Evaluated

__all__ = [
    "Design",
    "Difference",
    "Error",
    "mean_error",
    "monte_carlo",
    "own_error",
]


@dataclass(frozen=True, eq=False)
class Difference:
    """Model minus reference, the mean over samples, nats.

    Args:
        model, reference: names.
        value: d̄.
        std_error: of d̄, all of it.
        between_samples, between_seeds: the two parts of it; NaN where neither model has several
            seeds, as then the difference is that of these trained models.
        monte_carlo: the part within ``std_error`` that more network calls would remove; NaN where
            the results do not tell.
        independent: what that part would be without common random numbers, or NaN.
        degrees_of_freedom: ν.
        low, high: ends of the interval.
        probability: that the expected difference is positive, given d̄ and a flat prior.
        status: of the order of log p, ``"decided"``, ``"likely"`` or ``"not decided"``.
        verdict: a sentence that says so.
        per_sample: d_i, shape (N,).
    """

    model: str
    reference: str
    value: float
    std_error: float
    between_samples: float
    between_seeds: float
    monte_carlo: float
    independent: float
    degrees_of_freedom: float
    low: float
    high: float
    probability: float
    status: str
    verdict: str
    per_sample: Tensor = field(repr=False)

    @property
    def variance_reduction(self) -> float:
        """Monte Carlo variance with independent noise over that found; 1 without common noise."""
        if self.monte_carlo == 0:
            return math.nan if self.independent == 0 else math.inf
        return (self.independent / self.monte_carlo) ** 2


class Error(NamedTuple):
    """Standard errors of a mean and the degrees of freedom of the whole."""

    std_error: float
    between_samples: float
    between_seeds: float
    degrees_of_freedom: float

    def half_width(self, level: float) -> float:
        """Half the interval."""
        from scipy import stats

        if not self.std_error > 0:
            return self.std_error
        return self.std_error * float(stats.t.ppf(0.5 + level / 2, self.degrees_of_freedom))

    def probability(self, value: float) -> float:
        """That the expectation of ``value`` is positive."""
        from scipy import stats

        if not self.std_error > 0:
            return math.nan if value == 0 or math.isnan(self.std_error) else float(value > 0)
        return float(stats.t.cdf(value / self.std_error, self.degrees_of_freedom))


def _shares_error(shares: Tensor) -> float:
    """Σ_i K/(K − 1) Σ_k φ², its root over N."""
    samples, count = shares.shape
    return float((shares.square().sum() * count / (count - 1)).sqrt() / samples)


def monte_carlo(a: Evaluated, b: Evaluated, common: bool | None) -> tuple[float, float]:
    """Standard errors of d̄ from the noise alone: as it was, and for independent noise."""
    shares = [a.shares, b.shares]
    independent = math.hypot(*(own_error(*pair) for pair in zip((a, b), shares, strict=True)))
    if shares[0] is not None and shares[1] is not None and shares[0].shape == shares[1].shape:
        return _shares_error(shares[0] - shares[1]), independent
    known = common is False or independent == 0
    return (independent if known else math.nan), independent


def own_error(model: Evaluated, shares: Tensor | None) -> float:
    """The Monte Carlo error of one model's mean; without draws, that of independent results."""
    if shares is not None:
        return _shares_error(shares)
    variance = model.std_errors.square()
    return float(variance.sum().sqrt() / variance.numel())


def _sample_variance(d: Tensor, clusters: Tensor) -> float:
    """The first line of the module's docstring; clusters: 0 … G − 1, shape (N,)."""
    count = int(clusters.max()) + 1
    if count < 2:
        return math.nan
    sums = torch.zeros(count, dtype=d.dtype).index_add(0, clusters, d - d.mean())
    return float(sums.square().sum()) * count / (count - 1) / len(d) ** 2


def _seed_variances(values: Tensor) -> tuple[float, float]:
    """s²(v̄_s)/S, and what of it the spread within cells accounts for; values (S, N), S ≥ 2."""
    seeds, samples = values.shape
    whole = float(values.mean(1).var()) / seeds
    if samples < 2:
        return whole, 0.0
    rest = values - values.mean(0) - values.mean(1, keepdim=True) + values.mean()
    square = float(rest.square().sum()) / ((samples - 1) * (seeds - 1))
    return whole, square / (samples * seeds)


def mean_error(d: Tensor, models: Sequence[Tensor], clusters: Tensor) -> Error:
    """The error of the mean of d, shape (N,), made of models' values, (S, N) each."""
    samples = _sample_variance(d, clusters)
    spread, total, several = [(samples, int(clusters.max()))], 0.0, False
    for values in models:
        if len(values) > 1:
            whole, within = _seed_variances(values)
            several, total = True, total + max(0.0, whole - within)
            spread.append((whole, len(values) - 1))
    squares = sum(part**2 / freedom for part, freedom in spread if freedom)
    # as the squares, with what is counted twice: fewer degrees of freedom, if anything
    variance = samples + total
    freedom = variance**2 / squares if squares > 0 else float(max(1, len(d) - 1))
    least = min((freedom for _, freedom in spread if freedom), default=1)
    between = math.sqrt(total) if several else math.nan
    parts = math.sqrt(variance), math.sqrt(samples), between
    return Error(*parts, max(float(least), freedom))


class Design(NamedTuple):
    """What belongs together, and the level of the intervals.

    Args:
        clusters: 0 … G − 1 of each sample, shape (N,).
        paired_seeds: whether seed s of one model and seed s of another are one seed.
        common: whether the models were given the same noise; None: unknown.
        level: of the intervals.
    """

    clusters: Tensor
    paired_seeds: bool
    common: bool | None
    level: float

    def error(self, d: Tensor, a: Evaluated, b: Evaluated) -> Error:
        """The error of the mean of d, shape (N,), made of the values of A and B."""
        models = [a.values - b.values] if self.paired_seeds else [a.values, b.values]
        return mean_error(d, models, self.clusters)
