r"""Whether one model's log p is above another's: what follows from a difference of bounds.

With D = v^A − v^B and limits l ≤ log p − v ≤ u of each model (``looseness``),

    D + l_A − u_B ≤ log p_A − log p_B ≤ D + u_A − l_B,

so the order of two lower bounds decides nothing unless an upper limit of the lower one's gap is
known.  Where limits follow from the kinds of the bounds, a verdict is "decided"; where they are
measured, it is "likely".  ``benchmarks/verdicts.py`` counts how often that is wrong.

The limit of a difference is that of a mean of per-sample values, so that uncertainty about the gap
widens it.  A verdict takes at least 20 samples (clusters).  Skewed values whose tail lies on the
unfavourable side make a mean look too good: the quantile is corrected for their skewness γ (Hall,
1992), and with n < 25 γ² (Cochran, 1977, section 2.15) there is no verdict unless the difference is
four times the half width of its interval.
"""

import math
from typing import NamedTuple

from torch import Tensor

from pyrodiff.comparison.design import Design
from pyrodiff.comparison.difference import Advice
from pyrodiff.comparison.errors import number_of_clusters, skewness
from pyrodiff.comparison.looseness import Limit, lower_limit, upper_limit
from pyrodiff.comparison.model_results import ModelResults
from pyrodiff.likelihood import LogLikelihood

__all__ = ["FEWEST_SAMPLES", "Verdict", "judge"]

FEWEST_SAMPLES = 20  # independent ones; with fewer a skewness is not seen
_COCHRAN = 25.0
_CLEAR = 4.0  # half widths, beyond which no skewness that is seen matters
_MOST = 100  # times the present number of samples, up to which more are advised


class Verdict(NamedTuple):
    """``"decided"``, ``"likely"`` or ``"not decided"``, why, and what would decide."""

    status: str
    text: str
    advice: Advice = Advice()


class _Claim(NamedTuple):
    """The claim that one model has the higher log p, and the evidence for it.

    Args:
        lower: the limit of the better model's log p from below.
        upper: the limit of the other's from above.
        least_difference: the mean of log p of the better less that of the other, at these limits.
        half_width: half its interval.
        skewed_half_width: the same, for the skewness of the differences.
        clusters_needed: for that skewness, by Cochran's rule.
        clusters: that there are.
    """

    lower: Limit
    upper: Limit
    least_difference: float
    half_width: float
    skewed_half_width: float
    clusters_needed: int
    clusters: int

    @property
    def unknown(self) -> bool:
        return bool(self.lower.unknown or self.upper.unknown)

    @property
    def holds(self) -> bool:
        """Whether the least difference is positive beyond its error."""
        if self.unknown or math.isnan(self.skewed_half_width):
            return False
        factor = _CLEAR if self.clusters_needed > self.clusters else 1.0
        return self.least_difference > factor * self.skewed_half_width


def _claim(better: ModelResults, worse: ModelResults, d: Tensor, design: Design) -> _Claim:
    lower, upper = lower_limit(better), upper_limit(worse)
    least = d + lower.value - upper.value
    error, gamma = design.error(least, better, worse), skewness(least, design.clusters)
    return _Claim(
        lower=lower,
        upper=upper,
        least_difference=float(least.mean()),
        half_width=error.half_width(design.verdict_level),
        skewed_half_width=error.half_width(design.verdict_level, gamma),
        clusters_needed=math.ceil(_COCHRAN * min(0.0, gamma) ** 2),
        clusters=error.clusters,
    )


def judge(a: ModelResults, b: ModelResults, d: Tensor, design: Design) -> Verdict:
    """Whether the order of the mean log p of A and B follows from their results.

    Args:
        a, b: their results; the text calls them ``{a}`` and ``{b}``.
        d: d_i, shape (N,).
        design: with the probability that a verdict is wrong.
    """
    claims = [_claim(a, b, d, design), _claim(b, a, -d, design)]
    names = [("{a}", "{b}"), ("{b}", "{a}")]
    enough = number_of_clusters(design.clusters) >= FEWEST_SAMPLES
    for claim, worse, (better_name, worse_name) in zip(claims, (b, a), names, strict=True):
        if enough and claim.holds:
            certain = claim.lower.certain and claim.upper.certain
            status = "decided" if certain else "likely"
            order = f"{better_name} has the higher log p than {worse_name}"
            return Verdict(status, f"{status}: {order}: {_reason(worse.results[0], certain)}")
    ahead = 0 if float(d.mean()) >= 0 else 1
    text, advice = _undecided(claims[ahead], d, (a, b), design)
    kinds = f"{{a}} ({a.results[0].kind}) and {{b}} ({b.results[0].kind})"
    better_name, worse_name = names[ahead]
    text = text.replace("{better}", better_name).replace("{worse}", worse_name)
    return Verdict("not decided", f"not decided: {kinds} {text}", advice)


def _reason(worse: LogLikelihood, certain: bool) -> str:
    if certain:
        return "its lower bound is above the other's upper bound"
    if worse.log_weights is not None:
        return "the difference exceeds what the other's bound seems to lack by its trend in K"
    return "as far as the estimates have no bias"


def _undecided(
    claim: _Claim, d: Tensor, models: tuple[ModelResults, ModelResults], design: Design
) -> tuple[str, Advice]:
    """Why there is no verdict for the model that is ahead, and what would give one."""
    clusters, samples = number_of_clusters(design.clusters), len(d)
    half_width = design.error(d, *models).half_width(design.verdict_level)
    mean = abs(float(d.mean()))
    if half_width >= mean:
        return "differ by no more than the error", _more_samples(mean, half_width, samples)
    if clusters < FEWEST_SAMPLES:
        few = f"have {clusters} independent samples, where a verdict takes {FEWEST_SAMPLES}"
        return few, Advice(samples=FEWEST_SAMPLES)
    loose = "differ by what may be looseness of the bounds alone"
    if claim.unknown:
        limit, name = (claim.lower, "{better}") if claim.lower.unknown else (claim.upper, "{worse}")
        reason = limit.unknown.replace("{name}", name)
        return f"{loose}: {reason}", Advice(particles=limit.particles)
    if claim.least_difference > claim.half_width:
        needed = max(claim.clusters_needed, 2 * clusters)
        skewed = f"have differences too skewed for {clusters} samples"
        return skewed, Advice(samples=math.ceil(needed * samples / clusters))
    if claim.upper.particles is not None:
        return loose, Advice(particles=claim.upper.particles)
    return loose, _more_samples(claim.least_difference, claim.skewed_half_width, samples)


def _more_samples(mean: float, half_width: float, samples: int) -> Advice:
    """How many samples would make this mean exceed its half width, unless they are too many."""
    if not mean > 0 or math.isnan(half_width):
        return Advice()
    needed = math.ceil(1.2 * samples * (half_width / mean) ** 2)  # with a margin for its own error
    needed = max(FEWEST_SAMPLES, needed)
    return Advice(samples=needed) if needed <= _MOST * samples else Advice()
