r"""The error of a sum over strata, estimated from their draws.

The sum of stratum means z̄_s of n_s draws has, without bias,

    variance        V  = Σ_s v_s,   v_s = s_s²/n_s
    third moment    M₃ = Σ_s n_s/((n_s − 1)(n_s − 2)) Σ_i (z_i − z̄_s)³ / n_s²     (n_s ≥ 3)

The degrees of freedom are those of a sum of variances (Satterthwaite, 1946),

    ν = 2 (E V)²/Var V ≈ 2 V²/U − 2,   U = Σ_s v_s² r_s/(1 + r_s),   r_s = 2/(n_s − 1) + κ/n_s,

where r_s is the squared relative error of v_s for draws of excess kurtosis κ: U is unbiased for
Var V, and V² − U for (E V)².  One stratum of normal draws has n − 1.  κ comes from a
pilot, and is at least 2, that of a χ² with six degrees of freedom, as terms are nearly sums of few
squares.  Small samples underestimate a skewness: M₃/V^{3/2} is raised by half.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.likelihood.termwise.strata import Layout

__all__ = ["TYPICAL_KURTOSIS", "Moments", "relative_error"]

TYPICAL_KURTOSIS = 2.0
_RAISED = 1.5


def relative_error(draws: Tensor, kurtosis: Tensor) -> Tensor:
    """r_s, of n_s draws of excess kurtosis κ, shape (S,)."""
    count = draws.double()  # of integers the quotient would be single
    return 2 / (count - 1).clamp(min=1) + kurtosis / count


class Moments(NamedTuple):
    """Of each stratum's mean: value, variance and third moment, (n, S); draws and κ, (S,)."""

    mean: Tensor
    variance: Tensor
    third: Tensor
    draws: Tensor
    kurtosis: Tensor

    @classmethod
    def of(cls, draws: Tensor, layout: Layout, kurtosis: Tensor | None = None) -> "Moments":
        """Of draws (n, c) in the order of the strata; a stratum of one draw has variance NaN.

        Args:
            draws: shape (n, c).
            layout: with c draws.
            kurtosis: κ of each stratum's draws, shape (S,), or None where unknown.
        """
        stratum, count = layout.stratum, layout.draws.double()

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(len(values), len(count)).index_add(1, stratum, values)

        mean = total(draws) / count
        deviation = draws - mean[:, stratum]
        variance = total(deviation.square()) / (count - 1) / count
        third = total(deviation**3) / ((count - 1) * (count - 2) * count)
        expected = torch.full_like(count, TYPICAL_KURTOSIS)
        if kurtosis is not None:
            expected = expected.maximum(kurtosis)
        return cls(mean, variance, torch.where(count > 2, third, 0.0), layout.draws, expected)

    @property
    def freedom(self) -> Tensor:
        """ν, shape (n,); n − S where there is no spread."""
        count, relative = self.draws.double(), relative_error(self.draws, self.kurtosis)
        errors = (self.variance.square() * relative / (1 + relative)).sum(1)
        none = max(1.0, float((count - 1).sum()))
        freedom = 2 * self.variance.sum(1).square() / errors - 2
        return torch.where(errors > 0, freedom.clamp(max=none), none)

    @property
    def skewness(self) -> Tensor:
        """That of the sum, shape (n,)."""
        spread = self.variance.sum(1)
        return torch.where(spread > 0, _RAISED * self.third.sum(1) / spread**1.5, 0.0)
