r"""The part of a mean's error that comes from the noise of the estimators.

It is contained in the errors of ``errors``.  On its own it is known from draws k = 1 … K that the
results keep.  With φ_ik the influence of draw k on value i,

    (lw_ik − mean_k lw_ik)/K       for a mean of log weights,
    w_ik/Σ_k w_ik − 1/K            for the log of a mean weight (delta method),

Φ = mean_s φ^A − mean_s φ^B has Var d̄ = Σ_i K/(K − 1) Σ_k Φ_ik² / N², whether the models were given
the same noise or not.  Without draws, the models' own errors add up only if their noise is
independent.
"""

import math

from torch import Tensor

from pyrodiff.comparison.model_results import ModelResults

__all__ = ["difference_error", "mean_error"]


def difference_error(a: ModelResults, b: ModelResults, common: bool | None) -> tuple[float, float]:
    """Monte Carlo standard errors of d̄: with the noise as it was, and for independent noise.

    Args:
        a, b: two models' results.
        common: whether they were given the same noise, where their draws do not tell.
    """
    influences = [a.influences, b.influences]
    own = (_mean_error(model, phi) for model, phi in zip((a, b), influences, strict=True))
    independent = math.hypot(*own)
    one, other = influences
    if one is not None and other is not None and one.shape == other.shape:
        return _influence_error(one - other), independent
    is_independent = common is False or independent == 0
    return (independent if is_independent else math.nan), independent


def mean_error(model: ModelResults) -> float:
    """The Monte Carlo standard error of a model's mean; without draws, for independent results."""
    return _mean_error(model, model.influences)


def _mean_error(model: ModelResults, influences: Tensor | None) -> float:
    if influences is not None:
        return _influence_error(influences)
    variance = model.std_errors.square()
    return float(variance.sum().sqrt() / variance.numel())


def _influence_error(influences: Tensor) -> float:
    """√(Σ_i K/(K − 1) Σ_k φ_ik²) / N."""
    samples, count = influences.shape
    return float((influences.square().sum() * count / (count - 1)).sqrt() / samples)
