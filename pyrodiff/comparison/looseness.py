r"""How far log p may be from a result's value: by its kind, and by its importance weights.

The mean of log p_θ lies between the value and the value plus its gap g for a lower bound, below the
value for an upper bound, at it for an estimate.  Importance weights limit g by how their bound
grows with K.  For weights with a variance the bias falls as c/K (Burda et al., 2016; Nowozin,
2018), so that log p − L_K = L_K − L_{K/2}; where the bound grows more slowly, the gap is larger.
Here

    g ≤ 4 (L_K − L_{K/2})    where a sample has at least 5 effective weights on average.

The factor is measured, not derived: over chains with exact log p (Gaussians and mixtures in 1 to 32
dimensions, 4 to 24 steps, small and large variances, K = 8 to 32) the ratio is 0.2 to 2.9 with at
least 5 effective weights, and up to 3.6 with 2 to 5.  Near 1 no factor is enough.  With fewer than
5 the gap therefore counts as unknown.  Weights with another law may behave otherwise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.comparison.model_results import ModelResults, draws_of
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_exp

__all__ = ["Limit", "gap", "lower_limit", "upper_limit"]

_FEWEST_WEIGHTS = 8
_FEWEST_EFFECTIVE = 5.0  # weights of a sample, on average
_DOUBLINGS = 4.0  # a bound lacks at most as much as so many times its last doubling


class Limit(NamedTuple):
    """The least, or the greatest, that log p minus the value may be.

    Args:
        value: nats, shape (N,), or the same number for all samples.
        certain: whether it follows from the kind of the bound.
        unknown: why there is no limit, or empty; ``{name}`` stands for the model.
        particles: of an importance bound that would give a limit, or a lower one; or None.
    """

    value: Tensor | float
    certain: bool = False
    unknown: str = ""
    particles: int | None = None


def lower_limit(model: ModelResults) -> Limit:
    """Of the mean over training seeds: how far log p may be below the value."""
    return _mean([_lower_limit(result) for result in model.results])


def upper_limit(model: ModelResults) -> Limit:
    """Of the mean over training seeds: how far log p may be above the value."""
    return _mean([_upper_limit(result) for result in model.results])


def gap(model: ModelResults) -> Tensor | None:
    """The most that a lower bound lacks, (N,) or a number, where weights limit it; else None."""
    if model.results[0].kind != "lower bound":
        return None
    limit = upper_limit(model)
    return None if limit.unknown else torch.as_tensor(limit.value)


def _mean(limits: list[Limit]) -> Limit:
    for limit in limits:
        if limit.unknown:
            return limit
    values = [torch.as_tensor(limit.value, dtype=torch.float64) for limit in limits]
    return limits[0]._replace(value=torch.stack(torch.broadcast_tensors(*values)).mean(0))


def _lower_limit(result: LogLikelihood) -> Limit:
    if result.kind == "lower bound":
        return Limit(0.0, certain=True)
    if result.kind == "upper bound":
        return Limit(0.0, unknown="nothing tells how far {name} is below its upper bound")
    return _weights_limit(result, doublings=0.0)


def _upper_limit(result: LogLikelihood) -> Limit:
    if result.kind == "upper bound":
        return Limit(0.0, certain=True)
    return _weights_limit(result, doublings=_DOUBLINGS)


def _weights_limit(result: LogLikelihood, doublings: float) -> Limit:
    """L_K and ``doublings`` times its last doubling, less the value."""
    if result.kind == "estimate" and result.log_weights is None:
        return Limit(0.0)
    log_w, reason = _usable_weights(result)
    if log_w is None:
        count = 0 if result.log_weights is None else result.log_weights.shape[1]
        return Limit(0.0, unknown=reason, particles=max(64, 8 * count))
    bound, doubling = _trend(log_w)
    value = bound + doublings * doubling if doublings > 0 else bound
    return Limit(value - result.value.double(), particles=4 * log_w.shape[1])


def _trend(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """L_K of each sample and its last doubling L_K − L_{K/2}, from K weights, K even."""
    bound = log_mean_exp(log_w)
    halves = log_mean_exp(log_w.unflatten(1, (2, -1)))
    return bound, bound - halves.mean(1)


def _usable_weights(result: LogLikelihood) -> tuple[Tensor | None, str]:
    """The independent weights of the value, an even number; or None, and the reason."""
    log_w = result.log_weights
    is_jackknife = result.kind == "estimate" and log_w is not None
    if log_w is None or not (is_jackknife or draws_of(result)):
        return None, "nothing tells how much the bound of {name} lacks"
    if not bool(log_w.isfinite().all()):
        return None, "some weights of {name} are zero"
    log_w = log_w[:, : log_w.shape[1] - log_w.shape[1] % 2].double()
    if log_w.shape[1] < _FEWEST_WEIGHTS:
        return None, f"{{name}} has {log_w.shape[1]} weights a sample, fewer than {_FEWEST_WEIGHTS}"
    effective = float((1 / log_w.softmax(1).square().sum(1)).mean())
    if not effective >= _FEWEST_EFFECTIVE:
        few = f"{effective:.1f} of {log_w.shape[1]}"
        return None, f"the weights of {{name}} are too unequal ({few} count)"
    return log_w, ""
