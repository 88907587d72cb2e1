r"""The bound ladder: how an importance-weighted bound grows with its number of particles.

From M weights of each sample i, the rungs K = 1, 2, 4, … ≤ M are

    L_K = (1/N) Σ_i mean_g log (1/K) Σ_{k in g} w_ik

over the ⌊M/K⌋ disjoint groups g of K weights (Burda et al., 2016, equation 8): E L_K grows with K
up to log p_θ, and L_1 is the ELBO.  All rungs are of the same samples, so the error of comparing
them, with one another or with the exact value, is the Monte Carlo error alone.  With V_K the
variance of one group's bound, summed over samples, the squared error of the mean over G groups is
V_K/(G N²).  A rung with one group takes V_K from the largest K' with several, extrapolated at the
rate at which it fell there,

    V_K = V_K' ρ^{log₂(K/K')},   ρ = V_K'/V_{K'/2} between ½, the law of weights with a variance,
                                 and 1,

because heavy weights fall more slowly.  The delta method, applied to the weights of one group, does
not see that and often reports half the true error.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_exp
from pyrodiff.plots.style import Axes, named, new_axes, show_legend, style

__all__ = ["Ladder", "bound_ladder", "ladder"]

_BARS: dict[str, Any] = {"capsize": 2.5, "elinewidth": 1, "markersize": 5}


class Ladder(NamedTuple):
    """K, the mean bound of K particles and its Monte Carlo standard error; shape (R,) each."""

    particles: Tensor
    value: Tensor
    std_error: Tensor


def ladder(result: LogLikelihood) -> Ladder:
    """The rungs K = 1, 2, 4, … of a result's weights (formula above), nats, float64.

    Raises:
        ValueError: a result without weights, or with weights that are not those of independent
            paths from the guide (resampled particles, an upper bound).
    """
    log_w = _independent_weights(result)
    count = log_w.shape[1]
    rungs = [1 << i for i in range(count.bit_length())]
    if rungs[-1] != count:
        rungs.append(count)
    bounds = [_group_bounds(log_w, k) for k in rungs]
    errors = [
        math.sqrt(variance / bound.shape[1]) / len(log_w)
        for variance, bound in zip(_variances(rungs, bounds), bounds, strict=True)
    ]
    values = torch.stack([bound.mean() for bound in bounds])
    return Ladder(torch.tensor(rungs), values, torch.tensor(errors, dtype=torch.float64))


def _group_bounds(log_w: Tensor, k: int) -> Tensor:
    """The bound of each group of k weights, (N, ⌊M/k⌋)."""
    groups = log_w.shape[1] // k
    return log_mean_exp(log_w[:, : groups * k].unflatten(1, (groups, k)))


def _variances(rungs: Sequence[int], bounds: Sequence[Tensor]) -> list[float]:
    """V_K of each rung (formula above); NaN where no rung has two groups."""
    measured = [float(bound.var(1).sum()) for bound in bounds if bound.shape[1] > 1]
    if not measured:
        return [math.nan] * len(rungs)
    rate = 0.5
    if len(measured) > 1 and measured[-2] > 0:
        rate = min(1.0, max(0.5, measured[-1] / measured[-2]))
    last = rungs[len(measured) - 1]
    beyond = [measured[-1] * rate ** math.log2(k / last) for k in rungs[len(measured) :]]
    return measured + beyond


def _independent_weights(result: LogLikelihood) -> Tensor:
    """The log weights of a result, (N, M), float64, checked to be of independent paths."""
    if result.log_weights is None:
        raise ValueError(f"Expected a result with log_weights; got none from {result.estimator}.")
    if result.kind == "upper bound" or not bool(result.log_weights.isfinite().all()):
        raise ValueError(
            "Expected the weights of independent paths, as of ImportanceBound or PathBound; "
            f"got those of {result.estimator} ({result.kind})."
        )
    return result.log_weights.double()


def bound_ladder(
    results: LogLikelihood | Mapping[str, LogLikelihood],
    *,
    exact: Tensor | float | Mapping[str, Tensor | float] | None = None,
    others: Mapping[str, LogLikelihood] | None = None,
    axes: Axes = None,
) -> Axes:
    """The mean bound against the number of particles K, with bars of two Monte Carlo errors.

    Another estimator is drawn at the K whose paths take as many network calls as it does.

    Args:
        results: of ``ImportanceBound``, ``PathBound`` or ``VAE.bound``: one, or several by name.
        exact: log p of each sample, shape (N,), or its mean, nats: a line; or several by name.
        others: results of other estimators on the same samples, by name: points.
        axes: matplotlib axes, or None for new ones.

    Raises:
        ValueError: what ``ladder`` raises; results of different numbers of samples.
    """
    by_name, points = named(results, "importance bound"), others or {}
    sizes = {len(result.value) for result in (*by_name.values(), *points.values())}
    if len(sizes) > 1:
        raise ValueError(f"Expected results on the same samples; got {sorted(sizes)} of them.")
    rungs = {name: ladder(result) for name, result in by_name.items()}
    lines = {} if exact is None else named(exact, "exact")
    # a legend of more than four entries stands beside the axes
    crowded = len(rungs) + len(points) + len(lines) > 4
    axes = new_axes(axes, (8.5 if crowded else 6.5, 4.2))
    for index, (name, (particles, value, error)) in enumerate(rungs.items()):
        look = _BARS | style(index)._asdict()
        axes.errorbar(particles, value, 2 * error, label=name, **look)
    _draw_points(axes, points, next(iter(by_name.values())), first=len(rungs))
    for index, (name, line) in enumerate(lines.items()):
        mean = float(torch.as_tensor(line, dtype=torch.float64).mean())
        axes.axhline(mean, color="black", linestyle=style(index).linestyle, label=name)
    _finish(axes)
    return axes


def _finish(axes: Axes) -> None:
    """Scale, labels and legend of a ladder."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("particles K (or as many network calls)")
    axes.set_ylabel("mean over samples (nats)")
    axes.grid(alpha=0.25)
    show_legend(axes, "± 2 Monte Carlo errors")


def _draw_points(
    axes: Axes, others: Mapping[str, LogLikelihood], result: LogLikelihood, first: int
) -> None:
    """Other estimators as hollow markers, in the looks from number ``first`` on."""
    for index, (name, other) in enumerate(others.items(), first):
        look = _BARS | style(index)._asdict() | {"linestyle": "none", "markerfacecolor": "white"}
        value, _, monte_carlo = other.mean()
        error = None if math.isnan(monte_carlo) else 2 * monte_carlo
        axes.errorbar(_equal_paths(other, result), value, error, label=name, zorder=3, **look)


def _equal_paths(other: LogLikelihood, result: LogLikelihood) -> float:
    """How many paths of ``result`` take as many network calls as ``other``; 1 where it has none."""
    assert result.log_weights is not None
    calls_per_path = result.network_evaluations / result.log_weights.shape[1]
    calls = other.network_evaluations
    return calls / calls_per_path if calls > 0 and calls_per_path > 0 else 1.0
