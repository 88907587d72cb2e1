"""Figures of a chain: its noise schedule, and the terms of its bound."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.kernels import marginal_coefficients
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.plots.style import (
    Axes,
    legend_above,
    named,
    new_axes,
    panels,
    plain_ticks,
    plus_minus,
    show_legend,
    style,
)
from pyrodiff.schedules import Schedule

__all__ = ["schedule", "terms"]


class _Curve(NamedTuple):
    """L_t of a result: t, the mean over samples and its standard error, (S,) each.

    The error is NaN for one sample.
    """

    label: str
    t: Tensor
    mean: Tensor
    error: Tensor


def terms(results: LogLikelihood | Mapping[str, LogLikelihood], axes: Axes = None) -> Axes:
    """L_t against t in nats, mean over samples with a band of two standard errors.

    Both axes are logarithmic.  L_1, which may be negative where it is the −log p(x_0 | x_1) of a
    density, stands in the legend if it is the only term that is not positive; otherwise it is
    drawn, and the axis is linear around zero.

    Args:
        results: one, or several by name.
        axes: matplotlib axes, or None for new ones.

    Raises:
        ValueError: no result, or one without terms.
    """
    several = isinstance(results, Mapping) and len(results) > 1
    curves = [_curve(*item) for item in named(results, "mean over samples").items()]
    shortened = [_without_first(curve) for curve in curves]
    if all(bool((curve.mean > 0).all()) for curve in shortened):
        curves = shortened
    axes = new_axes(axes, (6.5, 4))
    for index, (label, t, mean, error) in enumerate(curves):
        look = style(index)._asdict()
        marks = {"markersize": 3.5, "markevery": _marker_indices(t), "linewidth": 1.2}
        axes.plot(t.numpy(), mean.numpy(), label=label, **look, **marks)
        low, high = (mean - 2 * error).numpy(), (mean + 2 * error).numpy()
        band = {"color": look["color"], "alpha": 0.3, "linewidth": 0}
        band["label"] = None if several else "± 2 standard errors"
        axes.fill_between(t.numpy(), low, high, **band)
    _scales(axes, torch.cat([curve.mean for curve in curves]))
    axes.set_xlabel("timestep t (1: data, T: noise)")
    axes.set_ylabel("term of the bound $L_t$ (nats)")
    axes.grid(alpha=0.25)
    show_legend(axes, "mean ± 2 standard errors" if several else None)
    return axes


def _curve(name: str, result: LogLikelihood) -> _Curve:
    if result.terms is None or result.timesteps is None:
        raise ValueError(f"Expected a result with terms; got none from {result.estimator}.")
    mean, count = -result.terms.mean(0), len(result.terms)
    error = result.terms.std(0) / math.sqrt(count) if count > 1 else mean * math.nan
    return _Curve(name, result.timesteps, mean, error)


def _without_first(curve: _Curve) -> _Curve:
    """The curve; if its L_1 is not positive, from t = 2 on with L_1 in the label."""
    if float(curve.mean[0]) > 0 or float(curve.t[0]) != 1 or len(curve.t) == 1:
        return curve
    first = plus_minus(float(curve.mean[0]), 2 * float(curve.error[0]))
    rest = (values[1:] for values in curve[1:])
    return _Curve(f"{curve.label}; $L_1$ = {first}, not drawn", *rest)


def _marker_indices(t: Tensor) -> list[int]:
    """The indices of some 25 points, evenly spread over log t."""
    logs = t.double().log()
    grid = torch.linspace(float(logs[0]), float(logs[-1]), 25, dtype=torch.float64)
    indices = torch.searchsorted(logs.contiguous(), grid).clamp(max=len(t) - 1)
    return sorted(set(indices.tolist()))


def _scales(axes: Axes, values: Tensor) -> None:
    """Logarithmic axes, or a vertical one that is linear around zero for values below it."""
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    positive = values[values > 0]
    if len(positive) == len(values):
        axes.set_yscale("log")
        if float(positive.max() / positive.min()) < 100:
            plain_ticks(axes.yaxis)
    elif len(positive):
        least = float(values[values != 0].abs().quantile(0.05))
        axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(least)))


def schedule(
    schedules: Schedule | Mapping[str, Schedule], axes: Iterable[Axes] | None = None
) -> list[Axes]:
    """λ(u), and the scales α and σ of data and noise, against time u.

    Times are u = (i + ½)/1000, without the ends 0 and 1, where λ may be infinite.

    Args:
        schedules: one, or several by name.
        axes: two matplotlib axes, or None for new ones.

    Returns:
        The axes of λ and of the scales.

    Raises:
        ValueError: no schedule; another number of axes than two.
    """
    by_name = named(schedules, type(schedules).__name__)
    left, right = panels(axes, 2, (9.5, 3.8))
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for index, (name, curve) in enumerate(by_name.items()):
        log_snr, look = curve.log_snr(u).detach(), style(index)
        marks = {"marker": look.marker, "markersize": 4.5, "color": look.color}
        marks["markevery"] = (40 + 30 * index, 120)
        left.plot(u.numpy(), log_snr.numpy(), label=name, linestyle=look.linestyle, **marks)
        alpha, sigma = marginal_coefficients(log_snr)
        right.plot(u.numpy(), alpha.numpy(), linestyle="-", **marks)
        right.plot(u.numpy(), sigma.numpy(), linestyle="--", **marks)
    legend_above(left)
    right.plot([], [], color="0.3", linestyle="-", label=r"$\alpha$, of the data")
    right.plot([], [], color="0.3", linestyle="--", label=r"$\sigma$, of the noise")
    legend_above(right)
    left.set_ylabel(r"log-SNR $\lambda(u)$")
    right.set_ylabel(r"scales $\alpha$, $\sigma$")
    for panel in (left, right):
        panel.set_xlabel("time u (0: data, 1: noise)")
        panel.grid(alpha=0.25)
    return [left, right]
