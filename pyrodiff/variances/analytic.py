r"""The best variance that depends on t alone, from data (Bao, Li, Zhu and Zhang, 2022).

For a mean c_0 x̂_0 + c_t x_t the KL to q is least, over all variances that are functions of t, at

    Σ*_t = β̃_t + c_0² v(λ_t),     v = E ‖x_0 − x̂_0(x_t)‖²/d      or, for each dimension, E (…)²_i,

which for the exact denoiser is the theorem of Bao et al. (section 3), v = E tr Cov[x_0 | x_t]/d.
As v is a function of the noise level and not of the steps, one v serves every grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrodiff.checks import check_count
from pyrodiff.denoisers import Prediction
from pyrodiff.kernels import Level, Step
from pyrodiff.streams import NoiseStreams, derived_seed
from pyrodiff.variances.knots import check_knots, interpolate, knots_of
from pyrodiff.variances.variance import Variance, widened

__all__ = ["AnalyticVariance"]


_LEAST = 1e-12  # of an error
_NOISE = 4  # neither that of samples nor of estimates nor of a pilot


@runtime_checkable
class Denoising(Protocol):
    """What a reverse chain is asked for by those who learn from its errors."""

    event_shape: torch.Size

    @property
    def log_snrs(self) -> Tensor:
        """λ_1 … λ_T."""

    def level(self, log_snr: Tensor, x: Tensor) -> Level:
        """The level of any log-SNR, cast and shaped like ``x``."""

    def predict(
        self, x_t: Tensor, level: Level, context: Tensor | None, *, mean_only: bool
    ) -> Prediction:
        """The denoiser at x_t."""


@torch.no_grad()
def predictions(
    reverse: Denoising,
    x_0: Tensor,
    log_snrs: Tensor,
    *,
    context: Tensor | None,
    seed: int,
    batch_size: int,
    mean_only: bool = False,
    variance: Variance | None = None,
    same_noise: bool = False,
) -> Iterator[tuple[int, slice, Tensor, Prediction]]:
    """The denoiser at every λ for every sample: the index of λ, the rows, x_t and the prediction.

    With a ``variance``, the prediction is what that one needs, and not the chain's own.  Sample
    i's noise at λ_j is a function of (seed, i, j) alone.  With ``same_noise`` it is the same at
    every λ, so that what is measured is smooth in λ, and scaled to a mean square of 1 over all
    samples, as an error of the mean square would have the same sign at every λ.
    """
    scale = 1.0
    if same_noise:
        streams = NoiseStreams(derived_seed(seed, _NOISE, 0), range(len(x_0)), reverse.event_shape)
        scale = float(streams.normal(x_0).double().square().mean().rsqrt())
    for index, log_snr in enumerate(log_snrs):
        for start in range(0, len(x_0), batch_size):
            rows = slice(start, min(start + batch_size, len(x_0)))
            x = x_0[rows]
            key = derived_seed(seed, _NOISE, 0 if same_noise else index)
            noise = NoiseStreams(key, range(rows.start, rows.stop), reverse.event_shape).normal(x)
            noise = noise * scale
            level = reverse.level(log_snr, x)
            part = None if context is None else context[rows]
            x_t = level.noised(x, noise)
            if variance is None:
                prediction = reverse.predict(x_t, level, part, mean_only=mean_only)
            else:
                prediction = _predict_with(variance, reverse, x_t, level, part)
            yield index, rows, x_t, prediction


def _predict_with(
    variance: Variance, reverse: Denoising, x_t: Tensor, level: Level, context: Tensor | None
) -> Prediction:
    """What another variance than the chain's own needs of the denoiser at x_t."""
    with torch.inference_mode(False):  # what is made in inference mode has no gradient
        x, level = x_t.clone(), level.map(Tensor.clone)
        rows = None if context is None else context.clone()
    return variance.predict(lambda y: reverse.predict(y, level, rows, mean_only=True), x, level)


@dataclass(frozen=True)
class AnalyticVariance(Variance):
    """β̃_t + c_0² v(λ_t), with log v linear in λ between knots; at t = 1, v itself.

    Args:
        log_snrs: λ of the knots, decreasing.
        errors: v at each of them: one number, or one for each value of an event, flattened.
        event_shape: of an event, where there is one v for each of its values; else empty.

    ``fit`` makes one from a model and data.

    Raises:
        ValueError: knots and errors that do not belong together.
    """

    learned: ClassVar[bool] = False

    log_snrs: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]
    event_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_count("the number of log-SNRs", len(self.log_snrs))
        check_knots(self.log_snrs)
        size = max(1, torch.Size(self.event_shape).numel() if self.event_shape else 1)
        if len(self.errors) != len(self.log_snrs) or any(len(row) != size for row in self.errors):
            raise ValueError(
                f"Expected {len(self.log_snrs)} rows of {size} errors; got {len(self.errors)} rows."
            )
        if not all(value > 0 for row in self.errors for value in row):
            raise ValueError("Expected errors above 0; got others.")

    @classmethod
    def fit(
        cls,
        reverse: Denoising,
        x_0: Tensor,
        *,
        diagonal: bool = False,
        knots: int = 50,
        context: Tensor | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> "AnalyticVariance":
        """The errors of a model on data, at log-SNRs even between the ends of its chain.

        Args:
            reverse: the model, in evaluation mode.
            x_0: other data than is to be judged, shape (N, *event_shape).
            diagonal: a variance for each value of an event.
            knots: how many log-SNRs; N network calls each.
            context: shape (N, …) or None.
            seed: of the noise.
            batch_size: rows per network call.
        """
        check_count("knots", knots, 2)
        check_count("batch_size", batch_size)
        log_snrs = knots_of(reverse.log_snrs, knots)
        total = torch.zeros(knots, *reverse.event_shape, dtype=torch.float64)
        for index, rows, _, prediction in predictions(
            reverse,
            x_0,
            log_snrs,
            context=context,
            seed=seed,
            batch_size=batch_size,
            mean_only=True,
        ):
            total[index] += (x_0[rows] - prediction.x0_hat).square().double().sum(0).cpu()
        errors = (total / len(x_0)).flatten(1)
        if not diagonal:
            errors = errors.mean(1, keepdim=True)
        errors = errors.clamp(min=_LEAST)
        shape = tuple(reverse.event_shape) if diagonal else ()
        rows_of_errors = tuple(tuple(row) for row in errors.tolist())
        return cls(tuple(log_snrs.tolist()), rows_of_errors, shape)

    def log_variance(self, step: Step, raw: Tensor | None) -> Tensor:
        return widened(step, self.error(step.log_snr, step.c_0))

    @cached_property
    def _log_errors(self) -> Tensor:
        with torch.inference_mode(False):  # what is stored must serve training, too
            return torch.tensor(self.errors, dtype=torch.float64).log()

    def error(self, log_snr: Tensor, like: Tensor) -> Tensor:
        """v at λ of shape () or (N, 1, …), broadcastable to x, in the dtype of ``like``."""
        values = (
            interpolate(self.log_snrs, self._log_errors.to(log_snr.device), log_snr)
            .exp()
            .to(like.dtype)
        )
        event = self.event_shape or (1,) * max(0, log_snr.dim() - 1)
        if log_snr.dim() == 0:
            return values.reshape(self.event_shape)
        return values.reshape(len(log_snr), *event)
