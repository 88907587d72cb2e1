"""The difference of two models, with its errors, its interval and the verdict on it."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

__all__ = ["Advice", "Difference", "sentence"]


class Advice(NamedTuple):
    """What would decide an open verdict; both None where that is not known.

    Args:
        samples: how many, at least.
        particles: of an importance bound, at least.
    """

    samples: int | None = None
    particles: int | None = None

    def __str__(self) -> str:
        remedies = [] if self.samples is None else [f"{self.samples} samples or more"]
        if self.particles is not None:
            bound = f"ImportanceBound(particles={self.particles})"
            remedies.append(f"compare_models(models, x_0, {bound})")
        return f"to decide: {', '.join(remedies)}" if remedies else ""


@dataclass(frozen=True, eq=False)
class Difference:
    """Model minus reference, the mean over samples, nats.

    Args:
        model, reference: names.
        value: d̄.
        std_error: of d̄, all of it.
        between_samples, between_seeds: the two parts of it; the second is NaN where neither model
            has several seeds: the difference is then that of these trained models.
        monte_carlo: the part within ``std_error`` that more network calls would remove; NaN where
            the results do not tell.
        independent: what that part would be without common random numbers, or NaN.
        degrees_of_freedom: ν.
        low, high: ends of the interval; those of all differences hold together.
        probability: that the expected difference is positive, given d̄ and a flat prior.
        status: of the order of log p, ``"decided"``, ``"likely"`` or ``"not decided"``.
        verdict: a sentence that says so.
        per_sample: d_i, shape (N,).
        advice: what would decide, where the verdict is open.
    """

    model: str
    reference: str
    value: float
    std_error: float
    between_samples: float
    between_seeds: float
    monte_carlo: float
    independent: float
    degrees_of_freedom: float
    low: float
    high: float
    probability: float
    status: str
    verdict: str
    per_sample: Tensor = field(repr=False)
    advice: Advice = Advice()

    @property
    def variance_reduction(self) -> float:
        """Monte Carlo variance with independent noise over that found; 1 without common noise."""
        if self.monte_carlo == 0:
            return math.nan if self.independent == 0 else math.inf
        return (self.independent / self.monte_carlo) ** 2


def sentence(difference: Difference) -> str:
    """The figures of a difference and its verdict, on one line."""
    side = "above" if difference.value >= 0 else "below"
    figures = f"{abs(difference.value):.4g} ± {difference.std_error:.2g} nats per sample"
    ends = f"{difference.low:.4g} to {difference.high:.4g}"
    names = f"{difference.model} {side} {difference.reference}"
    advice = f" ({difference.advice})" if str(difference.advice) else ""
    return f"{names} by {figures} ({ends}); {difference.verdict}{advice}"
