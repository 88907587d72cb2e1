"""Variances of the reverse step that are fixed, or that the network has an output for."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyrodiff.covariances import Covariance, Spread
from pyrodiff.denoisers import Prediction
from pyrodiff.kernels import Level, Step, gaussian_kl

__all__ = ["FixedLarge", "FixedSmall", "LearnedDiagonal", "LearnedRange", "Variance", "widened"]


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

    @property
    def depends_on_x(self) -> bool:
        """Whether Σ is a function of x_t, and not of t alone."""
        return self.learned

    differentiates: ClassVar[bool] = False
    """Whether ``predict`` takes products with the denoiser's Jacobian."""

    def products(self, size: int) -> int:
        """Products with the denoiser's Jacobian in a step, for events of ``size`` values."""
        return 0

    def predict(
        self, denoise: Callable[[Tensor], Prediction], x_t: Tensor, level: Level
    ) -> Prediction:
        """What is needed of the denoiser at x_t, shape (N, *event_shape)."""
        return denoise(x_t)

    def kl(self, step: Step, error: Tensor, prediction: Prediction, event_dim: int) -> Tensor:
        """KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)) of a step from t to s, nats, shape (N,).

        Args:
            step: from t to s.
            error: x_0 − x̂_0, shape (N, *event_shape).
            prediction: the denoiser's at (x_t, t).
            event_dim: how many axes an event has.
        """
        log_variance = self.log_variance(step, prediction.raw_variance)
        return gaussian_kl(error, step.log_small, log_variance, event_dim, step.c_0)

    def covariance(self, step: Step, prediction: Prediction, event_dim: int) -> Covariance:
        """Σ of the step at ``step``, where the denoiser gave ``prediction``."""
        return Covariance(self.log_variance(step, prediction.raw_variance))

    def spread(self, step: Step, prediction: Prediction) -> Spread:
        """The V that Σ = β̃_t I + c_0² V stands for at ``step``, float64."""
        if prediction.spread is not None:
            return prediction.spread.map(lambda value: value.double())
        wide = step.map(lambda value: value.double())
        total = self.log_variance(step, prediction.raw_variance).double().exp()
        known = ((total - floor(wide)) / wide.c_0.square()).clamp(min=0.0)
        return _for_each_sample(known, prediction)


def _for_each_sample(variance: Tensor, prediction: Prediction) -> Spread:
    """A diagonal V, float64, that may be one number for all samples."""
    x = prediction.x0_hat
    zero = x.new_zeros(len(x), *(1,) * (x.dim() - 1), dtype=torch.float64)
    return Spread(variance.double() + zero)


def floor(step: Step) -> Tensor:
    """What Σ has in every direction: β̃_t, and 0 at t = 1, where β̃_1 = 0."""
    return torch.where(step.c_t == 0, 0.0, step.log_small.exp())


def widened(step: Step, spread: Tensor) -> Tensor:
    """log(β̃_t + c_0² v), and log(c_0² v) at t = 1, where β̃_1 = 0.

    Args:
        step: the chain's coefficients at t.
        spread: v, a diagonal of Cov[x_0 | x_t], broadcastable to x_t.
    """
    return (floor(step) + step.c_0.square() * spread).log()


@dataclass(frozen=True)
class FixedSmall(Variance):
    """β̃_t, the variance of q(x_{t−1} | x_t, x_0)."""

    learned: ClassVar[bool] = False

    def log_variance(self, step: Step, raw: Tensor | None) -> Tensor:
        return step.log_small

    def spread(self, step: Step, prediction: Prediction) -> Spread:
        """σ_t² I, right for x_0 ~ N(0, I): β̃_t itself says nothing of V."""
        return _for_each_sample(step.sigma.double().square(), prediction)


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
