r"""The standard error of a difference of two models on the same samples, and where it comes from.

Model A has S_A training seeds (often one), B has S_B; v_is is the value of sample i under seed s.

    d_i = mean_s v^A_is − mean_s v^B_is,   d̄ = mean_i d_i

    se² = G/(G − 1) Σ_g (Σ_{i∈g} (d_i − d̄))² / N²                      samples, in clusters g
        + Σ_{A,B} [ s²(v̄_s)/S − Σ_is r_is² / ((N − 1)(S − 1) N S) ]₊   training seeds
        r_is = v_is − v̄_i − v̄_s + v̄

If seed s is common to both models (the same first weights and batches), the sum has one term, with
v_is = v^A_is − v^B_is: the effects that a seed has on both models cancel in their difference.

The first line is s²(d)/N where every sample is a cluster of its own.  Both lines contain the
interaction of sample and seed, which is therefore subtracted from one of them: two-way clustering
(Cameron, Gelbach and Miller, 2011; for balanced data the analysis of variance of crossed random
effects).  With U and W the terms of samples and seeds, W before the interaction is subtracted, and
t_ν Student's quantile, the interval is

    ± √(t_{G−1}² U + t_ν² Σ W),   ν = (Σ W)²/Σ (W²/(S − 1)),

each source with its own degrees of freedom (as Cochran's for two means): two seeds may agree by
chance, so a small variance between them is no evidence of a small variance, and t_1 = 12.7 accounts
for that.  Where no model has several seeds it is Student's interval.  The degrees of freedom
reported are those of Satterthwaite (1946) for the whole, se⁴/(U²/(G − 1) + Σ W²/(S − 1)).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Error", "number_of_clusters", "skewed_quantile", "skewness", "standard_error"]


class Error(NamedTuple):
    """Standard errors of a mean, and the degrees of freedom of the whole and of its parts.

    Args:
        std_error, between_samples, between_seeds: the whole and its two parts; the last is NaN
            where no model has several seeds.
        degrees_of_freedom: of the whole.
        clusters: G.
        seeds: √ΣW, which includes the interaction of samples and seeds.
        seeds_freedom: ν of ΣW.
    """

    std_error: float
    between_samples: float
    between_seeds: float
    degrees_of_freedom: float
    clusters: int
    seeds: float = 0.0
    seeds_freedom: float = 1.0

    def half_width(self, level: float, skewness: float = 0.0) -> float:
        """Half the interval; ``skewness`` as of ``skewed_quantile``."""
        if not self.std_error > 0:
            return self.std_error
        quantile = skewed_quantile(0.5 + level / 2, self.clusters, skewness)
        if not self.seeds > 0:
            return quantile * self.between_samples
        return math.hypot(
            quantile * self.between_samples,
            _student_quantile(0.5 + level / 2, self.seeds_freedom) * self.seeds,
        )

    def probability(self, value: float) -> float:
        """The probability that the expectation of ``value`` is positive, for a flat prior."""
        from scipy import optimize, special

        if not self.std_error > 0:
            return math.nan if value == 0 or math.isnan(self.std_error) else float(value > 0)
        if not self.seeds > 0:
            return float(special.stdtr(self.clusters - 1, value / self.std_error))
        # the level at which the interval ends at zero
        highest = 1 - 1e-12
        if self.half_width(highest) <= abs(value):
            return float(value > 0)
        level = optimize.brentq(lambda p: self.half_width(p) - abs(value), 0.0, highest)
        return 0.5 + math.copysign(level / 2, value)


def _student_quantile(probability: float, freedom: float) -> float:
    from scipy import special

    return float(special.stdtrit(freedom, probability))


def skewed_quantile(probability: float, count: int, skewness: float) -> float:
    """The quantile of a t statistic of ``count`` values, raised where their skewness requires it.

    Hall (1992) transforms t to a statistic without skewness,

        h(t) = t + γ t²/(3 √n) + γ² t³/(27 n) + γ/(6 √n),

    which grows with t.  This is its inverse at Student's quantile, and never below that.

    Args:
        probability: of being below, above ½.
        count: n.
        skewness: γ, with the sign that makes a mean seem too high where it is negative.
    """
    student = _student_quantile(probability, count - 1)
    x = skewness / math.sqrt(count)
    if not x < 0:
        return student
    cube = 1 + x * (student - x / 6)
    return max(student, 3 / x * (math.copysign(abs(cube) ** (1 / 3), cube) - 1))


def number_of_clusters(clusters: Tensor) -> int:
    """G, for labels 0 … G − 1, shape (N,)."""
    return int(clusters.max()) + 1


def _cluster_sums(d: Tensor, clusters: Tensor) -> Tensor:
    """Σ_{i∈g} (d_i − d̄) of each cluster g, shape (G,)."""
    sums = torch.zeros(number_of_clusters(clusters), dtype=d.dtype)
    return sums.index_add(0, clusters, d - d.mean())


def _sample_variance(d: Tensor, clusters: Tensor) -> float:
    """U, the first line of se²; clusters: 0 … G − 1, shape (N,)."""
    count = number_of_clusters(clusters)
    if count < 2:
        return math.nan
    sums = _cluster_sums(d, clusters)
    return float(sums.square().sum()) * count / (count - 1) / len(d) ** 2


class _SeedVariance(NamedTuple):
    """W = s²(v̄_s)/S of one model, the interaction that it includes, and its S − 1."""

    total: float
    interaction: float
    freedom: int


def _seed_variance(values: Tensor) -> _SeedVariance:
    """The terms of the second line of se²; values (S, N), S ≥ 2."""
    seeds, samples = values.shape
    total = float(values.mean(1).var()) / seeds
    if samples < 2:
        return _SeedVariance(total, 0.0, seeds - 1)
    residual = values - values.mean(0) - values.mean(1, keepdim=True) + values.mean()
    square = float(residual.square().sum()) / ((samples - 1) * (seeds - 1))
    return _SeedVariance(total, square / (samples * seeds), seeds - 1)


def standard_error(d: Tensor, models: Sequence[Tensor], clusters: Tensor) -> Error:
    """The error of the mean of d, shape (N,).

    Args:
        d: differences, or values.
        models: the values that d is made of, (S, N) each.
        clusters: 0 … G − 1 of each sample, shape (N,).
    """
    samples, count = _sample_variance(d, clusters), number_of_clusters(clusters)
    seeds = [_seed_variance(values) for values in models if len(values) > 1]
    # with the interaction, which lowers the degrees of freedom if anything
    squares = sum(seed.total**2 / seed.freedom for seed in seeds)
    between_seeds = sum(max(0.0, seed.total - seed.interaction) for seed in seeds)
    sum_of_totals = sum(seed.total for seed in seeds)
    variance = samples + between_seeds
    denominator = squares + (samples**2 / (count - 1) if count > 1 else 0)
    freedom = variance**2 / denominator if denominator > 0 else float(max(1, len(d) - 1))
    lowest = min((f for f in (count - 1, *(seed.freedom for seed in seeds)) if f), default=1)
    return Error(
        std_error=math.sqrt(variance),
        between_samples=math.sqrt(samples),
        between_seeds=math.sqrt(between_seeds) if seeds else math.nan,
        degrees_of_freedom=max(float(lowest), freedom),
        clusters=count,
        seeds=math.sqrt(sum_of_totals),
        seeds_freedom=sum_of_totals**2 / squares if squares > 0 else 1.0,
    )


def skewness(d: Tensor, clusters: Tensor) -> float:
    """γ of the clusters' sums of d, shape (N,), corrected for their number; 0 where unknown."""
    count = number_of_clusters(clusters)
    sums = _cluster_sums(d, clusters)
    sums = sums - sums.mean()
    variance = float(sums.square().mean())
    if count < 3 or not variance > (1e-12 * float(d.abs().max())) ** 2:
        return 0.0
    moment = float(sums.pow(3).mean()) / variance**1.5
    return moment * math.sqrt(count * (count - 1)) / (count - 2)
