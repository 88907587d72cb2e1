r"""How tight a bound is, and whether its weights are to be trusted.

The bound ladder shows, from M weights of each sample i, for K = 1, 2, 4, … ≤ M

    L_K = (1/N) Σ_i mean_g log (1/K) Σ_{k in g} w_ik

over the ⌊M/K⌋ disjoint groups g of K weights (Burda et al., 2016, equation 8): E L_K grows with K
up to log p_θ, and L_1 is the ELBO.  All rungs are of the same samples, so that the error of what
is compared (rung with rung, or with the exact value) is the Monte Carlo error alone.  With V_K the
variance of one group's bound, summed over samples, the squared error of the mean over G groups is
V_K/(G N²).  Where there is one group, V_K is that of the largest K' with several, carried on at the
rate at which it fell there,

    V_K = V_K' ρ^{log₂(K/K')},   ρ = V_K'/V_{K'/2} between ½, the law of weights with a variance,
                                 and 1,

as heavy weights fall more slowly, and the delta method, from one group's own weights, does not see
it (half the true error is common).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.estimates import FEWEST_WEIGHTS
from pyrodiff.likelihood.statistics import log_mean_exp
from pyrodiff.plots.style import named, new_axes, panels, plain_ticks, show_legend, style

__all__ = ["Ladder", "bound_ladder", "ladder", "pareto_k"]

_TRUSTED = 0.7  # k̂ up to which a mean of weights converges at practical K (Vehtari et al., 2024)

_BARS: dict[str, Any] = {"capsize": 2.5, "elinewidth": 1, "markersize": 5}


class Ladder(NamedTuple):
    """K, the mean bound of K particles and its Monte Carlo standard error; shape (R,) each."""

    particles: Tensor
    value: Tensor
    std_error: Tensor


def ladder(result: LogLikelihood) -> Ladder:
    """The rungs K = 1, 2, 4, … of a result's weights (formula above), nats, float64.

    Raises:
        ValueError: a result without weights; weights that are not those of independent paths from
            the guide (resampled particles, an upper bound).
    """
    log_w = _independent(result)
    count = log_w.shape[1]
    rungs = [1 << i for i in range(count.bit_length())]
    if rungs[-1] != count:
        rungs.append(count)
    bounds = [_groups(log_w, k) for k in rungs]
    variances = _variances(rungs, bounds)
    errors = [
        math.sqrt(variance / each.shape[1]) / len(log_w)
        for variance, each in zip(variances, bounds, strict=True)
    ]
    values = torch.stack([each.mean() for each in bounds])
    return Ladder(torch.tensor(rungs), values, torch.tensor(errors, dtype=torch.float64))


def _groups(log_w: Tensor, k: int) -> Tensor:
    """The bound of each group of k weights, (N, ⌊M/k⌋)."""
    groups = log_w.shape[1] // k
    return log_mean_exp(log_w[:, : groups * k].unflatten(1, (groups, k)))


def _variances(rungs: Sequence[int], bounds: Sequence[Tensor]) -> list[float]:
    """V_K of each rung (formula above); NaN where no rung has two groups."""
    known = [float(each.var(1).sum()) for each in bounds if each.shape[1] > 1]
    if not known:
        return [math.nan] * len(rungs)
    rate = 0.5
    if len(known) > 1 and known[-2] > 0:
        rate = min(1.0, max(0.5, known[-1] / known[-2]))
    last = rungs[len(known) - 1]
    return known + [known[-1] * rate ** math.log2(k / last) for k in rungs[len(known) :]]


def _independent(result: LogLikelihood) -> Tensor:
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
    axes: Any = None,
) -> Any:
    """The mean bound against the number of particles K, with bars of two Monte Carlo errors.

    Other estimators stand where their network calls are those of K paths.

    Args:
        results: of ``ImportanceBound`` or ``PathBound``, one, or several by name.
        exact: log p of each sample, shape (N,), or its mean, nats: a line; or several by name.
        others: results of other estimators on the same samples, by name: points.
        axes: matplotlib axes, or None for new ones.

    Raises:
        ValueError: what ``ladder`` raises; results of different numbers of samples.
    """
    several = named(results, "importance bound")
    sizes = {len(result.value) for result in (*several.values(), *(others or {}).values())}
    if len(sizes) > 1:
        raise ValueError(f"Expected results on the same samples; got {sorted(sizes)} of them.")
    rungs = {name: ladder(result) for name, result in several.items()}
    lines = {} if exact is None else named(exact, "exact")
    # a legend of more than four entries stands beside the axes
    crowded = len(rungs) + len(others or {}) + len(lines) > 4
    axes = new_axes(axes, (8.5 if crowded else 6.5, 4.2))
    for index, (name, (particles, value, error)) in enumerate(rungs.items()):
        look = _BARS | style(index)._asdict()
        axes.errorbar(particles, value, 2 * error, label=name, **look)
    _points(axes, others or {}, next(iter(several.values())), len(rungs))
    for index, (name, line) in enumerate(lines.items()):
        mean = float(torch.as_tensor(line, dtype=torch.float64).mean())
        axes.axhline(mean, color="black", linestyle=style(index).linestyle, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("particles K (or as many network calls)")
    axes.set_ylabel("mean over samples (nats)")
    axes.grid(alpha=0.25)
    show_legend(axes, "± 2 Monte Carlo errors")
    return axes


def _points(
    axes: Any, others: Mapping[str, LogLikelihood], result: LogLikelihood, taken: int
) -> None:
    """Other estimators as hollow markers; ``taken`` looks are in use."""
    for index, (name, other) in enumerate(others.items(), taken):
        look = _BARS | style(index)._asdict() | {"linestyle": "none", "markerfacecolor": "white"}
        value, _, monte_carlo = other.mean()
        error = None if math.isnan(monte_carlo) else 2 * monte_carlo
        axes.errorbar(_paths(other, result), value, error, label=name, zorder=3, **look)


def _paths(other: LogLikelihood, result: LogLikelihood) -> float:
    """How many paths of ``result`` take as many network calls as ``other`` does; 1 for none."""
    assert result.log_weights is not None
    a_path = result.network_evaluations / result.log_weights.shape[1]
    calls = other.network_evaluations
    return calls / a_path if calls > 0 and a_path > 0 else 1.0


def pareto_k(
    results: LogLikelihood | Mapping[str, LogLikelihood], axes: Iterable[Any] | None = None
) -> list[Any]:
    """Whether importance weights are to be trusted: k̂ of each sample, and their effective number.

    On the left k̂ in ascending order, with the line 0.7 above which a mean of weights is not to be
    trusted (Vehtari et al., 2024); on the right (Σ w)² / Σ w² over K against k̂.  Samples whose k̂
    is unknown (equal weights) are counted in the legend and not drawn.

    Args:
        results: one, or several by name, with at least 30 weights a sample.
        axes: two matplotlib axes, or None for new ones.

    Returns:
        The two axes.

    Raises:
        ValueError: a result without weights or with too few; another number of axes.
    """
    several = {name: _fit(one) for name, one in named(results, "weights").items()}
    left, right = panels(axes, 2, (9.5, 3.8))
    for index, (name, (k_hat, share)) in enumerate(several.items()):
        look, order = style(index), k_hat.argsort()
        known = order[: int(k_hat.isfinite().sum())]  # NaN comes last
        marks = {"color": look.color, "marker": look.marker, "linestyle": "none", "markersize": 4}
        rank = (torch.arange(len(known)) + 1) / len(known)
        left.plot(rank, k_hat[known], label=f"{name}: {_count(k_hat)}", alpha=0.8, **marks)
        right.plot(k_hat[known], share[known], alpha=0.6, **marks)
    left.axhline(
        _TRUSTED, color="black", linestyle="--", linewidth=1, label=f"{_TRUSTED}: the limit"
    )
    right.axvline(_TRUSTED, color="black", linestyle="--", linewidth=1)
    left.set(xlabel="share of the samples", ylabel=r"Pareto $\hat k$ of the weights")
    right.set(xlabel=r"Pareto $\hat k$", ylabel="effective sample size / K")
    right.set_yscale("log")
    plain_ticks(right.yaxis)
    left.legend(frameon=False)
    for panel in (left, right):
        panel.grid(alpha=0.25)
    return [left, right]


def _fit(result: LogLikelihood) -> tuple[Tensor, Tensor]:
    """k̂ and the relative effective sample size, (N,) each."""
    k_hat, size = result.pareto_k, result.effective_sample_size
    if result.log_weights is None or k_hat is None or size is None:
        raise ValueError(f"Expected a result with log_weights; got none from {result.estimator}.")
    count = result.log_weights.shape[1]
    if count < FEWEST_WEIGHTS:
        raise ValueError(
            f"Expected at least {FEWEST_WEIGHTS} weights a sample to fit k̂; got {count}."
        )
    return k_hat, size / count


def _count(k_hat: Tensor) -> str:
    above, unknown = int((k_hat > _TRUSTED).sum()), int(k_hat.isnan().sum())
    return f"{above} of {len(k_hat)} above {_TRUSTED}" + (f", {unknown} unknown" if unknown else "")
