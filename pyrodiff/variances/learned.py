r"""The diagonal of Cov[x_0 | x_t] from an output of the network.

    Σ = β̃_t I + c_0² v(x_t),    v = σ_t² exp(raw)

is the diagonal of the normal with the first two moments of x_{t−1} given x_t (Bao, Li, Sun, Zhu and
Zhang, 2022, "Estimating the optimal covariance with imperfect mean").  v belongs to the noise level
and not to the step: what was learned on one grid serves every other.  raw = 0, a fresh network's
output, is right for x_0 ~ N(0, I), of which Cov[x_0 | x_t] = σ_t² I.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyrodiff.kernels import Step
from pyrodiff.variances.variance import Variance, widened

__all__ = ["LearnedPosterior"]

_MOST = 20.0  # of |raw|
_LEAST = 1e-2  # of σ_1²: v at t = 1


@dataclass(frozen=True)
class LearnedPosterior(Variance):
    """β̃_t + c_0² σ_t² exp(raw): the diagonal of Cov[x_0 | x_t] is what the network has learned.

    At t = 1, where β̃_1 = 0, Σ is v itself, at least a hundredth of σ_1².
    """

    learned: ClassVar[bool] = True

    def log_variance(self, step: Step, raw: Tensor | None) -> Tensor:
        assert raw is not None
        share = raw.clamp(-_MOST, _MOST).exp()
        share = torch.where(step.c_t == 0, share.clamp(min=_LEAST), share)
        return widened(step, step.sigma.square() * share)
