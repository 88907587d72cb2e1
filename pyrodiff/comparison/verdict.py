r"""What a difference of bounds says of the difference of log p.

The mean of log p_θ lies between the value and the value plus its gap g for a lower bound, below the
value for an upper bound, at it for an estimate.  So with D = v^A − v^B,

    D − g_B ≤ log p_A − log p_B ≤ D + g_A

and the order of two lower bounds decides nothing unless an upper limit of g is known.  Importance
weights give one by how the bound grows with K.  Where it lacks c/K, as it does for weights with a
variance (Burda et al., 2016; Nowozin, 2018), log p − L_K = L_K − L_{K/2}; where it grows more
slowly, it lacks more.  Here

    g ≤ 4 (L_K − L_{K/2})    where a sample has at least 5 effective weights on average.

The factor is measured, not derived: over chains with exact log p (Gaussians and mixtures in 1 to 32
dimensions, 4 to 24 steps, small and large variances, K = 8 to 32) the ratio is 0.2 to 2.9 with at
least 5 effective weights, up to 3.6 with 2 to 5, and beyond any factor near 1: there nothing is
said.  Weights from another law may lie otherwise, hence "likely", never "decided".
``benchmarks/verdicts.py`` counts how often that is wrong.

A limit is that of a mean of per-sample values, so that what is uncertain in the gap widens it.  It
takes at least 20 samples (clusters).  Skewed values whose tail lies on the wrong side make a mean
look too good: the quantile is corrected for their skewness γ (Hall, 1992), and nothing is said for
n < 25 γ² (Cochran, 1977, section 2.15) unless the limit is passed four times over.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.comparison.evaluated import Evaluated, draws_of
from pyrodiff.comparison.paired import Advice, Design, Difference, skewness
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_exp

__all__ = ["FEWEST_SAMPLES", "Verdict", "gap", "judge", "sentence"]

FEWEST_SAMPLES = 20  # independent ones; with fewer a skewness is not seen
_FEWEST_WEIGHTS = 8
_EFFECTIVE = 5.0  # weights of a sample, on average
_DOUBLINGS = 4.0  # of the last one, that a bound lacks at most
_COCHRAN = 25.0
_CLEAR = 4.0  # times the limit, beyond which no skewness that is seen matters
_MOST = 100  # times the samples at hand, up to which more are advised


class Verdict(NamedTuple):
    """``"decided"``, ``"likely"`` or ``"not decided"``, why, and what would decide."""

    status: str
    text: str
    advice: Advice = Advice()


class _Reach(NamedTuple):
    """How far log p may be from the value on one side, nats; unknown with a reason.

    ``certain`` where it must be within, by the kind of the bound.
    """

    shift: Tensor | float
    certain: bool = False
    unknown: str = ""
    particles: int | None = None


class _Side(NamedTuple):
    """One model as the better one: least log p difference, its limit, and what stands against."""

    lower: _Reach
    upper: _Reach
    mean: float
    plain: float  # half the interval
    half: float  # the same for the skewness at hand
    needed: int  # clusters for that
    clusters: int

    @property
    def unknown(self) -> bool:
        return bool(self.lower.unknown or self.upper.unknown)

    @property
    def clear(self) -> bool:
        if self.unknown or math.isnan(self.half):
            return False
        skewed = self.needed > self.clusters
        return self.mean > (_CLEAR * self.half if skewed else self.half)


# -- how much a bound lacks ------------------------------------------------------------------------


def _trend(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """L_K of each sample and its last doubling L_K − L_{K/2}, from K weights, K even."""
    whole = log_mean_exp(log_w)
    halves = log_mean_exp(log_w.unflatten(1, (2, -1)))
    return whole, whole - halves.mean(1)


def _usable(result: LogLikelihood) -> tuple[Tensor | None, str]:
    """Independent weights of the value, an even number, or why there are none."""
    log_w = result.log_weights
    jackknife = result.kind == "estimate" and log_w is not None
    if log_w is None or not (jackknife or draws_of(result)):
        return None, "nothing tells how much the bound of {name} lacks"
    if not bool(log_w.isfinite().all()):
        return None, "some weights of {name} are zero"
    log_w = log_w[:, : log_w.shape[1] - log_w.shape[1] % 2].double()
    if log_w.shape[1] < _FEWEST_WEIGHTS:
        return None, f"{{name}} has {log_w.shape[1]} weights a sample, fewer than {_FEWEST_WEIGHTS}"
    effective = float((1 / log_w.softmax(1).square().sum(1)).mean())
    if not effective >= _EFFECTIVE:
        few = f"{effective:.1f} of {log_w.shape[1]}"
        return None, f"the weights of {{name}} are too unequal ({few} count)"
    return log_w, ""


def _reach(result: LogLikelihood, side: int) -> _Reach:
    """How far log p may be below (side −1) or above (+1) the value of one result."""
    if result.kind == "estimate" and result.log_weights is None:
        return _Reach(0.0)
    if result.kind != "estimate" and (result.kind == "lower bound") == (side < 0):
        return _Reach(0.0, certain=True)
    if result.kind == "upper bound":
        return _Reach(0.0, unknown="nothing tells how far {name} is below its upper bound")
    log_w, why = _usable(result)
    if log_w is None:
        held = 0 if result.log_weights is None else result.log_weights.shape[1]
        return _Reach(0.0, unknown=why, particles=max(64, 8 * held))
    whole, last = _trend(log_w)
    top = whole + _DOUBLINGS * last if side > 0 else whole
    return _Reach(top - result.value.double(), particles=4 * log_w.shape[1])


def _mean_reach(model: Evaluated, side: int) -> _Reach:
    """The same of the mean over training seeds."""
    each = [_reach(result, side) for result in model.results]
    for one in each:
        if one.unknown:
            return one
    shifts = [torch.as_tensor(one.shift, dtype=torch.float64) for one in each]
    return each[0]._replace(shift=torch.stack(torch.broadcast_tensors(*shifts)).mean(0))


def gap(model: Evaluated) -> Tensor | None:
    """What a lower bound lacks at most, (N,) or a number, where weights tell; else None."""
    if model.results[0].kind != "lower bound":
        return None
    found = _mean_reach(model, 1)
    return None if found.unknown else torch.as_tensor(found.shift)


# -- the verdict -----------------------------------------------------------------------------------


def judge(a: Evaluated, b: Evaluated, d: Tensor, design: Design) -> Verdict:
    """Whether the order of the mean log p of A and B follows from their results.

    Args:
        a, b: with the names taken out; the text speaks of ``{a}`` and ``{b}``.
        d: d_i, shape (N,).
        design: with the probability that a verdict is wrong.
    """
    clusters = int(design.clusters.max()) + 1
    sides = [_side(a, b, d, design), _side(b, a, -d, design)]
    for side, names in zip(sides, (("{a}", "{b}"), ("{b}", "{a}")), strict=True):
        if clusters >= FEWEST_SAMPLES and side.clear:
            certain = side.lower.certain and side.upper.certain
            status = "decided" if certain else "likely"
            worse = b if names[0] == "{a}" else a
            why = _reason(worse.results[0], certain)
            return Verdict(
                status, f"{status}: {names[0]} has the higher log p than {names[1]}: {why}"
            )
    ahead = 0 if float(d.mean()) >= 0 else 1
    text, advice = _undecided(sides[ahead], d, (a, b), design)
    kinds = f"{{a}} ({a.results[0].kind}) and {{b}} ({b.results[0].kind})"
    names = ("{a}", "{b}") if ahead == 0 else ("{b}", "{a}")
    return Verdict("not decided", f"not decided: {kinds} {_named(text, names)}", advice)


def _named(text: str, names: tuple[str, str]) -> str:
    """The side's model and the other one by the names that they have in the verdict."""
    return text.replace("{better}", names[0]).replace("{worse}", names[1])


def _side(better: Evaluated, worse: Evaluated, d: Tensor, design: Design) -> _Side:
    lower, upper = _mean_reach(better, -1), _mean_reach(worse, 1)
    least = d + lower.shift - upper.shift
    error, gamma = design.error(least, better, worse), skewness(least, design.clusters)
    plain = error.half_width(design.verdict_level)
    half = error.half_width(design.verdict_level, gamma)
    needed = math.ceil(_COCHRAN * min(0.0, gamma) ** 2)
    return _Side(lower, upper, float(least.mean()), plain, half, needed, error.clusters)


def _reason(worse: LogLikelihood, certain: bool) -> str:
    if certain:
        return "its lower bound is above the other's upper bound"
    if worse.log_weights is not None:
        return "the difference exceeds what the other's bound seems to lack by its trend in K"
    return "as far as the estimates have no bias"


def _undecided(
    side: _Side, d: Tensor, models: tuple[Evaluated, Evaluated], design: Design
) -> tuple[str, Advice]:
    """What stands against a verdict for the model that is ahead, and what would remove it."""
    clusters, samples = int(design.clusters.max()) + 1, len(d)
    plain = design.error(d, *models).half_width(design.verdict_level)
    if plain >= abs(float(d.mean())):
        return "differ by no more than the error", _more(abs(float(d.mean())), plain, samples)
    if clusters < FEWEST_SAMPLES:
        few = f"have {clusters} independent samples, where a verdict takes {FEWEST_SAMPLES}"
        return few, Advice(samples=FEWEST_SAMPLES)
    if side.unknown:
        reach, name = (side.lower, "better") if side.lower.unknown else (side.upper, "worse")
        why = reach.unknown.replace("{name}", f"{{{name}}}")
        text = f"differ by what may be looseness of the bounds alone: {why}"
        return text, Advice(particles=reach.particles)
    if side.mean > side.plain:
        text = f"have differences too skewed for {clusters} samples"
        needed = max(side.needed, 2 * clusters)
        return text, Advice(samples=math.ceil(needed * samples / clusters))
    text = "differ by what may be looseness of the bounds alone"
    if side.upper.particles is not None:
        return text, Advice(particles=side.upper.particles)
    return text, _more(side.mean, side.half, samples)


def _more(mean: float, half: float, samples: int) -> Advice:
    """How many samples would make this mean pass its limit, where the number is sensible."""
    if not mean > 0 or math.isnan(half):
        return Advice()
    needed = math.ceil(1.2 * samples * (half / mean) ** 2)  # with a margin for its own error
    needed = max(FEWEST_SAMPLES, needed)
    return Advice(samples=needed) if needed <= _MOST * samples else Advice()


def sentence(found: Difference) -> str:
    """The figures of a difference and its verdict, on one line."""
    side = "above" if found.value >= 0 else "below"
    figures = f"{abs(found.value):.4g} ± {found.std_error:.2g} nats per sample"
    ends = f"{found.low:.4g} to {found.high:.4g}"
    advice = f" ({found.advice})" if str(found.advice) else ""
    line = f"{found.model} {side} {found.reference} by {figures} ({ends}); {found.verdict}"
    return line + advice
