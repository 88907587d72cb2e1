r"""Weights of a mixture of models that predicts held-out samples best (Yao et al., 2018).

    max over the simplex of  Σ_i log Σ_m w_m p_m(x_i)

Only ratios of densities matter.  Every sample's largest log p is subtracted before exp is taken: at
−2000 nats exp gives 0, and a score that is log 0 everywhere leaves the weights where they started.
The problem is concave, so its first-order conditions say when it is solved: with

    g_m = mean_i p_m(x_i) / Σ_k w_k p_k(x_i),

max_m g_m − 1 is at least the distance of the score, divided by N, from its maximum.

Noise in the values, of standard deviation σ, raises log p of a mixture by up to σ²/2 a sample, but
not that of a single model, because a mixture averages it away.  Weights of noisy values are thus
drawn to 1/M, even where exp of each value is unbiased.  Noisy values are refused unless the sum of
σ²/2 is below a tenth of the standard error of the models' difference.
"""

import math
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.densities import SHARE, excess, total_error
from pyrodiff.likelihood.samples import check_samples

__all__ = ["stacking_weights"]

_TOLERANCE = 1e-10  # nats per sample
_PASSES = 200


def stacking_weights(results: Mapping[str, LogLikelihood | Tensor]) -> dict[str, float]:
    """Stacking weights of models, which sum to 1.

    Args:
        results: for each model its result, or log p of the same samples without noise, nats,
            shape (N,).

    Raises:
        ValueError: no model, different numbers of samples, different samples, NaN or +∞ among the
            values, a sample to which every model gives density 0, noise that is not negligible
            (see above).
    """
    values = {name: _log_densities(result) for name, result in results.items()}
    shapes = sorted({tuple(value.shape) for value in values.values()})
    if len(shapes) != 1 or len(shapes[0]) != 1 or shapes[0][0] == 0:
        raise ValueError(f"Expected values of shape (N,), one N for all; got {shapes}.")
    estimates = {name: r for name, r in results.items() if isinstance(r, LogLikelihood)}
    check_samples(list(estimates.items()))
    _check_noise(estimates, values)
    log_p = torch.stack(list(values.values()), 1)
    if not bool((log_p < torch.inf).all()):
        raise ValueError("Expected log-likelihoods; got NaN or infinity among them.")
    highest = log_p.amax(1, keepdim=True)
    if not bool(highest.isfinite().all()):
        raise ValueError("Expected each sample to have a density under some model; got none.")
    weights = _solve((log_p - highest).exp())
    return dict(zip(values, weights.tolist(), strict=True))


def _log_densities(result: LogLikelihood | Tensor) -> Tensor:
    """log p of each sample, float64 on the CPU."""
    values = result.value if isinstance(result, LogLikelihood) else result
    return values.detach().double().cpu()


def _check_noise(results: Mapping[str, LogLikelihood], values: Mapping[str, Tensor]) -> None:
    """Raise ValueError where noise may raise a mixture's score noticeably (see above)."""
    noise = {n: excess(r) for n, r in results.items() if bool((r.std_error != 0).any())}
    errors = [total_error(values[a] - values[b]) for a, b in combinations(values, 2)]
    error = min(errors, default=math.inf)
    for name, gain in noise.items():
        if not gain <= SHARE * error:
            raise ValueError(
                f"Expected values whose noise is negligible; got {name!r}, where noise may raise a "
                f"mixture by {gain:.3g} nats in all, and the error of a difference is {error:.3g} "
                "(a tenth of it is negligible). Use more calls; compare() needs no exp."
            )


def _solve(p: Tensor) -> Tensor:
    """The weights, (M,), for densities p, (N, M), known up to a factor per sample."""
    from scipy import optimize

    count = p.shape[1]
    weights = p.new_full((count,), 1 / count)
    if count == 1:
        return weights

    def objective(w: object) -> tuple[float, object]:
        mixed = (p @ torch.as_tensor(w)).clamp(min=1e-300)
        return -float(mixed.log().mean()), -(p / mixed[:, None]).mean(0).numpy()

    solution = optimize.minimize(
        objective,
        weights.numpy(),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: w * 0 + 1},
        options={"ftol": 1e-14, "maxiter": _PASSES},
    )
    start = torch.as_tensor(solution.x).clamp(min=1e-12)  # a weight of 0 would stay 0
    return _ascend(p, start / start.sum())


def _ascend(p: Tensor, weights: Tensor) -> Tensor:
    """Expectation maximisation, w_m ← w_m g_m, which never lowers the score."""
    for _ in range(_PASSES):
        g = (p / (p @ weights).unsqueeze(1)).mean(0)
        if float(g.max()) - 1 < _TOLERANCE:
            break
        weights = weights * g
    return weights / weights.sum()
