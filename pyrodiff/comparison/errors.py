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
effects).  With U and W the terms of samples and seeds, W not less its share of that spread, and t_ν
Student's quantile, the interval is

    ± √(t_{G−1}² U + t_ν² Σ W),   ν = (Σ W)²/Σ (W²/(S − 1)),

each source with its own degrees of freedom (as Cochran's for two means): a seed variance that two
seeds show as small by chance is no evidence that it is, and t_1 = 12.7 says so.  Where no model has
several seeds it is Student's interval.  The degrees of freedom reported are those of Satterthwaite
(1946) for the whole, se⁴/(U²/(G − 1) + Σ W²/(S − 1)).

M models have several differences, whose intervals cover all of them together: the level of each is
1 − (1 − level)/m (Bonferroni), with m = M − 1 for a reference that was named beforehand, and
M(M − 1)/2 for the best of them, as which one that is depends on all pairs.

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
    "Advice",
    "Design",
    "Difference",
    "Error",
    "mean_error",
    "monte_carlo",
    "own_error",
    "skewed_quantile",
    "skewness",
]


class Advice(NamedTuple):
    """What would decide an open verdict; both None where nothing is known to.

    Args:
        samples: how many, at least.
        particles: of an importance bound, at least.
    """

    samples: int | None = None
    particles: int | None = None

    def __str__(self) -> str:
        what = [] if self.samples is None else [f"{self.samples} samples or more"]
        if self.particles is not None:
            bound = f"ImportanceBound(particles={self.particles})"
            what.append(f"compare_models(models, x_0, {bound})")
        return f"to decide: {', '.join(what)}" if what else ""


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
        low, high: ends of the interval; those of all differences hold together.
        probability: that the expected difference is positive, given d̄ and a flat prior.
        status: of the order of log p, ``"decided"``, ``"likely"`` or ``"not decided"``.
        verdict: a sentence that says so.
        per_sample: d_i, shape (N,).
        advice: what would decide, where the verdict is open.
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
    advice: Advice = Advice()

    @property
    def variance_reduction(self) -> float:
        """Monte Carlo variance with independent noise over that found; 1 without common noise."""
        if self.monte_carlo == 0:
            return math.nan if self.independent == 0 else math.inf
        return (self.independent / self.monte_carlo) ** 2


class Error(NamedTuple):
    """Standard errors of a mean, and the degrees of freedom of the whole and of its parts."""

    std_error: float
    between_samples: float
    between_seeds: float
    degrees_of_freedom: float
    clusters: int
    seeds: float = 0.0  # √ΣW, with what samples and seeds have together
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
            _student(0.5 + level / 2, self.seeds_freedom) * self.seeds,
        )

    def probability(self, value: float) -> float:
        """That the expectation of ``value`` is positive."""
        from scipy import optimize, special

        if not self.std_error > 0:
            return math.nan if value == 0 or math.isnan(self.std_error) else float(value > 0)
        if not self.seeds > 0:
            return float(special.stdtr(self.clusters - 1, value / self.std_error))
        # the level at which the interval ends at zero
        most = 1 - 1e-12
        if self.half_width(most) <= abs(value):
            return float(value > 0)
        level = optimize.brentq(lambda p: self.half_width(p) - abs(value), 0.0, most)
        return 0.5 + math.copysign(level / 2, value)


def _student(probability: float, freedom: float) -> float:
    from scipy import special

    return float(special.stdtrit(freedom, probability))


def skewed_quantile(probability: float, count: int, skewness: float) -> float:
    """The quantile of a t statistic of ``count`` values, for their skewness where that raises it.

    Hall (1992) transforms t to a statistic without skewness,

        h(t) = t + γ t²/(3 √n) + γ² t³/(27 n) + γ/(6 √n),

    which grows with t; here its inverse at Student's quantile, and never below that.

    Args:
        probability: of being below, above ½.
        count: n.
        skewness: γ, turned so that a negative one makes a mean seem too high.
    """
    plain = _student(probability, count - 1)
    x = skewness / math.sqrt(count)
    if not x < 0:
        return plain
    cube = 1 + x * (plain - x / 6)
    return max(plain, 3 / x * (math.copysign(abs(cube) ** (1 / 3), cube) - 1))


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
    samples, count = _sample_variance(d, clusters), int(clusters.max()) + 1
    several = [(*_seed_variances(values), len(values) - 1) for values in models if len(values) > 1]
    # as the squares, with what is counted twice: fewer degrees of freedom, if anything
    squares = sum(whole**2 / freedom for whole, _, freedom in several)
    total = sum(max(0.0, whole - within) for whole, within, _ in several)
    parts = [(samples, count - 1), *((whole, freedom) for whole, _, freedom in several)]
    least = min((freedom for _, freedom in parts if freedom), default=1)
    variance = samples + total
    below = squares + (samples**2 / (count - 1) if count > 1 else 0)
    freedom = variance**2 / below if below > 0 else float(max(1, len(d) - 1))
    seeds = sum(whole for whole, _, _ in several)
    return Error(
        math.sqrt(variance),
        math.sqrt(samples),
        math.sqrt(total) if several else math.nan,
        max(float(least), freedom),
        count,
        math.sqrt(seeds),
        seeds**2 / squares if squares > 0 else 1.0,
    )


def skewness(d: Tensor, clusters: Tensor) -> float:
    """γ of the clusters' sums of d, shape (N,), corrected for their number; 0 where unknown."""
    count = int(clusters.max()) + 1
    sums = torch.zeros(count, dtype=d.dtype).index_add(0, clusters, d - d.mean())
    sums = sums - sums.mean()
    variance = float(sums.square().mean())
    if count < 3 or not variance > (1e-12 * float(d.abs().max())) ** 2:
        return 0.0
    plain = float(sums.pow(3).mean()) / variance**1.5
    return plain * math.sqrt(count * (count - 1)) / (count - 2)


class Design(NamedTuple):
    """What belongs together, and the level of the intervals.

    Args:
        clusters: 0 … G − 1 of each sample, shape (N,).
        paired_seeds: whether seed s of one model and seed s of another are one seed.
        common: whether the models were given the same noise; None: unknown.
        level: of all intervals together.
        pairs: m, how many differences are looked at.
    """

    clusters: Tensor
    paired_seeds: bool
    common: bool | None
    level: float
    pairs: int = 1

    @property
    def interval_level(self) -> float:
        """Of each interval by itself."""
        return 1 - (1 - self.level) / self.pairs

    @property
    def verdict_level(self) -> float:
        """Of the interval of which one end decides, so that wrong verdicts of either side have a
        probability of (1 − level)/2 together."""
        return 1 - (1 - self.level) / (2 * self.pairs)

    def error(self, d: Tensor, a: Evaluated, b: Evaluated) -> Error:
        """The error of the mean of d, shape (N,), made of the values of A and B."""
        models = [a.values - b.values] if self.paired_seeds else [a.values, b.values]
        return mean_error(d, models, self.clusters)
