r"""Variances of the reverse step p_θ(x_{t−1} | x_t) = N(μ_θ, Σ_θ).

    FixedSmall           β̃_t, the posterior's                 (Ho et al., 2020, section 3.2)
    FixedLarge           β_t = σ²_{t|t−1}, the transition's   (ibid.)
    AnalyticVariance     β̃_t + c_0² v_t, v_t from data        (Bao et al., 2022, section 3)
    LearnedRange         exp(v log β_t + (1 − v) log β̃_t)     (Nichol and Dhariwal, 2021, eq. 15)
    LearnedDiagonal      any positive σ²_θ = β_t exp(raw)
    LearnedPosterior     β̃_t + c_0² v, v = σ_t² exp(raw)      (Bao et al., 2022)
    PosteriorCovariance  β̃_t I + c_0² V(x_t), V from the denoiser's Jacobian

β_t is the best variance for x_0 ~ N(0, I), β̃_t for a single point x_0; the truth lies between.
At t = 1, where β̃_1 = 0, β̃_2 stands in for it (β_1 in a chain of one step).
"""

from pyrodiff.variances.analytic import AnalyticVariance
from pyrodiff.variances.learned import LearnedPosterior
from pyrodiff.variances.posterior import PosteriorCovariance
from pyrodiff.variances.variance import (
    FixedLarge,
    FixedSmall,
    LearnedDiagonal,
    LearnedRange,
    Variance,
)

__all__ = [
    "AnalyticVariance",
    "FixedLarge",
    "FixedSmall",
    "LearnedDiagonal",
    "LearnedPosterior",
    "LearnedRange",
    "PosteriorCovariance",
    "Variance",
]
