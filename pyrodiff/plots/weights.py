"""Whether importance weights can be trusted: Pareto k̂ and the effective sample size."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.estimates import FEWEST_WEIGHTS
from pyrodiff.plots.style import Axes, named, panels, plain_ticks, style

__all__ = ["pareto_k"]

_LIMIT = 0.7  # k̂ up to which a mean of weights converges at practical K (Vehtari et al., 2024)


def pareto_k(
    results: LogLikelihood | Mapping[str, LogLikelihood], axes: Iterable[Axes] | None = None
) -> list[Axes]:
    """k̂ of each sample's weights, and their effective number.

    On the left k̂ in ascending order, with the line 0.7 above which a mean of weights should not be
    trusted (Vehtari et al., 2024); on the right (Σ w)² / Σ w² over K against k̂.  Samples whose k̂
    is unknown (equal weights) are counted in the legend and not drawn.

    Args:
        results: one, or several by name, with at least 30 weights a sample.
        axes: two matplotlib axes, or None for new ones.

    Returns:
        The two axes.

    Raises:
        ValueError: a result without weights or with too few; another number of axes than two.
    """
    diagnoses = {name: _diagnose(result) for name, result in named(results, "weights").items()}
    left, right = panels(axes, 2, (9.5, 3.8))
    for index, (name, (k_hat, share)) in enumerate(diagnoses.items()):
        look, order = style(index), k_hat.argsort()
        finite = order[: int(k_hat.isfinite().sum())]  # NaN comes last
        marks = {"color": look.color, "marker": look.marker, "linestyle": "none", "markersize": 4}
        rank = (torch.arange(len(finite)) + 1) / len(finite)
        left.plot(rank, k_hat[finite], label=f"{name}: {_count(k_hat)}", alpha=0.8, **marks)
        right.plot(k_hat[finite], share[finite], alpha=0.6, **marks)
    left.axhline(_LIMIT, color="black", linestyle="--", linewidth=1, label=f"{_LIMIT}: the limit")
    right.axvline(_LIMIT, color="black", linestyle="--", linewidth=1)
    left.set(xlabel="share of the samples", ylabel=r"Pareto $\hat k$ of the weights")
    right.set(xlabel=r"Pareto $\hat k$", ylabel="effective sample size / K")
    right.set_yscale("log")
    plain_ticks(right.yaxis)
    left.legend(frameon=False)
    for panel in (left, right):
        panel.grid(alpha=0.25)
    return [left, right]


def _diagnose(result: LogLikelihood) -> tuple[Tensor, Tensor]:
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
    """How many samples are above the limit, and how many unknown, for the legend."""
    above, unknown = int((k_hat > _LIMIT).sum()), int(k_hat.isnan().sum())
    return f"{above} of {len(k_hat)} above {_LIMIT}" + (f", {unknown} unknown" if unknown else "")
