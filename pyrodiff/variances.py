r"""Variances of the reverse step p_θ(x_{t−1} | x_t) = N(μ_θ, Σ_θ), always diagonal.

    FixedSmall       β̃_t, the posterior's                   (Ho et al., 2020, section 3.2)
    FixedLarge       β_t = σ²_{t|t−1}, the transition's     (ibid.)
    LearnedRange     exp(v log β_t + (1 − v) log β̃_t)       (Nichol and Dhariwal, 2021, eq. 15)
    LearnedDiagonal  any positive σ²_θ = β_t exp(raw)

β_t is the best variance for x_0 ~ N(0, I), β̃_t for a single point x_0; the truth lies between.
At t = 1, where β̃_1 = 0, β̃_2 stands in for it (β_1 in a chain of one step).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pyrodiff.kernels import Step

__all__ = ["FixedLarge", "FixedSmall", "LearnedDiagonal", "LearnedRange", "Variance"]


class Variance(ABC):
    """Σ of p_θ(x_{t−1} | x_t); ``learned`` says whether the network has an output for it."""

    learned: ClassVar[bool]

    @abstractmethod
    def log_variance(self, step: Step, raw: Tensor | None) -> Tensor:
        """log Σ, isotropic (broadcastable to x_t) or of the shape of x_t.

        Args:
            step: the chain's coefficients at t.
            raw: the network's output for the variance, of the shape of x_t; None where fixed.
        """


@dataclass(frozen=True)
class FixedSmall(Variance):
    """β̃_t, the variance of q(x_{t−1} | x_t, x_0)."""

    learned: ClassVar[bool] = False

    def log_variance(self, step: Step, raw: Tensor | None) -> Tensor:
        return step.log_small


@dataclass(frozen=True)
class FixedLarge(Variance):
    """β_t, the variance of q(x_t | x_{t−1})."""

    learned: ClassVar[bool] = False

    def log_variance(self, step: Step, raw: Tensor | None) -> Tensor:
        return step.log_large


@dataclass(frozen=True)
class LearnedRange(Variance):
    """Between β̃_t (raw = −1) and β_t (raw = 1) in the log, raw itself unbounded."""

    learned: ClassVar[bool] = True

    def log_variance(self, step: Step, raw: Tensor | None) -> Tensor:
        assert raw is not None
        return step.log_small + 0.5 * (raw + 1) * (step.log_large - step.log_small)


@dataclass(frozen=True)
class LearnedDiagonal(Variance):
    """Any positive diagonal variance β_t exp(raw); raw = 0, a fresh network's output, is β_t."""

    learned: ClassVar[bool] = True

    def log_variance(self, step: Step, raw: Tensor | None) -> Tensor:
        assert raw is not None
        return step.log_large + raw
