r"""What a difference of bounds says of the difference of log p.

The mean of log p_θ lies between the value and the value plus its gap g for a lower bound, below the
value for an upper bound, at it for an estimate.  So with D = v^A − v^B,

    D − g_B ≤ log p_A − log p_B ≤ D + g_A

and the order of two lower bounds decides nothing unless g is known.  Importance weights tell of it
by how the bound grows with K: where it lacks c/K, as it does for weights with a variance (Burda et
al., 2016; Nowozin, 2018), log p − L_K = L_K − L_{K/2}.  Where it grows more slowly,

    log p − L_K ≈ (L_K − L_{K/2}) r/(1 − r),   r = (L_K − L_{K/2})/(L_{K/2} − L_{K/4}) > ½.

Both are extrapolations, hence "likely", never "decided".  For log-normal weights they are right or
too large, by up to a third at K ≥ 16, while r ≤ 0.7 (sd of log w ≤ 2 nats); beyond, they fall short
(a third of the gap at sd 12), and nothing is said.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.comparison.evaluated import Evaluated, draws_of
from pyrodiff.comparison.paired import Design, Difference, Error
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.importance import log_mean_exp

__all__ = ["Verdict", "gap", "judge", "sentence"]

_SLOWEST = 0.7  # the ratio r above which the extrapolation falls short (see below)


class Verdict(NamedTuple):
    """``"decided"``, ``"likely"`` or ``"not decided"``, and why."""

    status: str
    text: str


def _bound(log_w: Tensor, count: int) -> Tensor:
    """L_count of each sample, the mean over disjoint groups of its K weights, (N,)."""
    return log_mean_exp(log_w.unflatten(1, (-1, count))).mean(1)


def _gap(result: LogLikelihood) -> Tensor | None:
    """An estimate of log p − value for each sample, (N,); right for the mean only."""
    if result.kind != "lower bound" or draws_of(result) is None or result.log_weights is None:
        return None
    log_w = result.log_weights.double()
    count = log_w.shape[1] - log_w.shape[1] % 4
    if count < 4:
        return None
    log_w = log_w[:, :count]
    whole, half, quarter = (_bound(log_w, count // part) for part in (1, 2, 4))
    last, before = whole - half, half - quarter
    if float(last.mean()) <= 1e-12:  # all weights alike: nothing is lacking
        return whole - result.value
    ratio = float(last.mean() / before.mean())
    if not ratio <= _SLOWEST:
        return None
    return whole - result.value + last * max(1.0, ratio / (1 - ratio))


def gap(model: Evaluated) -> Tensor | None:
    """g of each sample, averaged over training seeds, (N,), where weights tell; else None."""
    gaps = [_gap(result) for result in model.results]
    held = [values for values in gaps if values is not None]
    return torch.stack(held).mean(0) if len(held) == len(gaps) else None


def _shift(model: Evaluated, side: int) -> tuple[Tensor | float, bool] | None:
    """How far log p may be below (side −1) or above (+1) the value, and whether it must.

    None where nothing is known.
    """
    kind = model.results[0].kind
    if kind == "estimate":
        return 0.0, False
    if (kind == "lower bound") == (side < 0):
        return 0.0, True
    found = gap(model) if kind == "lower bound" else None
    return None if found is None else (found, False)


def judge(a: Evaluated, b: Evaluated, d: Tensor, design: Design) -> Verdict:
    """Whether the order of the mean log p of A and B follows from their results.

    Args:
        a, b: with the names taken out; the text speaks of ``{a}`` and ``{b}``.
        d: d_i, shape (N,).
        design: with the level of the interval that must lie on one side.
    """
    for better, worse, sign in ((a, b, 1.0), (b, a, -1.0)):
        low, high = _shift(better, -1), _shift(worse, 1)
        if low is None or high is None:
            continue
        least = sign * d + low[0] - high[0]
        error = design.error(least, a, b)
        if float(least.mean()) - _known(error, design.level) > 0:
            certain = low[1] and high[1]
            names = ("{a}", "{b}") if sign > 0 else ("{b}", "{a}")
            why = _reason(better, worse, certain)
            text = f"{names[0]} has the higher log p than {names[1]}: "
            status = "decided" if certain else "likely"
            return Verdict(status, f"{status}: {text}{why}")
    return Verdict("not decided", _undecided(a, b, d, design))


def _known(error: Error, level: float) -> float:
    half = error.half_width(level)
    return math.inf if math.isnan(half) else half


def _reason(better: Evaluated, worse: Evaluated, certain: bool) -> str:
    kinds = better.results[0].kind, worse.results[0].kind
    if certain:
        return "its lower bound is above the other's upper bound"
    if kinds[1] == "lower bound":
        return "the difference exceeds what the other's bound seems to lack by its trend in K"
    return "as far as the estimates have no bias"


def _undecided(a: Evaluated, b: Evaluated, d: Tensor, design: Design) -> str:
    error = design.error(d, a, b)
    what = f"not decided: {{a}} ({a.results[0].kind}) and {{b}} ({b.results[0].kind}) "
    if not abs(float(d.mean())) > _known(error, design.level):
        return what + "differ by no more than the error"
    return what + "differ by what may be looseness of the bounds alone"


def sentence(found: Difference) -> str:
    """The figures of a difference and its verdict, on one line."""
    side = "above" if found.value >= 0 else "below"
    figures = f"{abs(found.value):.4g} ± {found.std_error:.2g} nats per sample"
    ends = f"{found.low:.4g} to {found.high:.4g}"
    return f"{found.model} {side} {found.reference} by {figures} ({ends}); {found.verdict}"
