r"""V calibrated on data, V ← a (w V + (1 − w) diag V), with a and w by noise level.

At each of a few λ the mean of KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)) over data and over steps of
several sizes is minimised over w in [0, 1] and log a.  The KL depends on the step only through
κ = e^{λ_s} − e^{λ_t}, and on a through κ a, so that nearby steps have nearby minima: what is fitted
for a few serves all.

The search (Hooke and Jeeves, 1961) starts at w = a = 1 and moves only to what is better: on the
data that it is fitted to, a calibration is never worse than none.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrodiff.checks import short
from pyrodiff.denoisers import Prediction
from pyrodiff.kernels import Step, jump
from pyrodiff.variances.knots import check_knots, interpolate
from pyrodiff.variances.variance import Variance

__all__ = ["JUMPS", "calibration_at", "check_calibration", "fit_calibration"]

JUMPS = (0.25, 0.5, 1.0)
"""Steps in λ: those of 50, 25 and 12 over a range of 12."""

_FIRST_MOVE, _LAST_MOVE = 0.5, 0.005  # in log a; half of it in w
_MOST = 5.0  # of |log a|

PredictionAt = tuple[int, slice, Tensor, Prediction]


@runtime_checkable
class Calibration(Protocol):
    """Values at a few λ."""

    @property
    def log_snrs(self) -> tuple[float, ...]:
        """λ, decreasing."""

    @property
    def weights(self) -> tuple[float, ...]:
        """w at each λ."""

    @property
    def scales(self) -> tuple[float, ...]:
        """a at each λ."""


def check_calibration(
    log_snrs: Sequence[float], weights: Sequence[float], scales: Sequence[float]
) -> None:
    """Raise ValueError unless these are a weight in [0, 1] and a positive scale for each λ."""
    check_knots(log_snrs)
    if not len(log_snrs) == len(weights) == len(scales):
        raise ValueError(
            f"Expected {len(log_snrs)} weights and scales, one for each log-SNR; "
            f"got {len(weights)} and {len(scales)}."
        )
    if not all(0 <= weight <= 1 for weight in weights):
        raise ValueError(f"Expected weights between 0 and 1; got {short(tuple(weights))}.")
    if not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"Expected positive finite scales; got {short(tuple(scales))}.")


def calibration_at(
    calibration: Calibration, log_snr: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """w and a at λ of shape () or (N, 1, …), of shape (1,) or (N,), in the dtype of ``like``."""
    rows = torch.tensor([calibration.weights, calibration.scales], dtype=torch.float64)
    table = torch.stack([rows[0], rows[1].log()], 1).to(log_snr.device)
    weight, log_scale = interpolate(calibration.log_snrs, table, log_snr).unbind(1)
    return weight.to(like), log_scale.exp().to(like)


def fit_calibration(
    variance: Variance,
    x_0: Tensor,
    log_snrs: Tensor,
    predicted: Iterable[PredictionAt],
    jumps: Sequence[float],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """w and a of least mean KL at each λ.

    Args:
        variance: the covariance, not calibrated.
        x_0: data.
        log_snrs: λ, shape (K,).
        predicted: the predictions at each λ in turn, the index of λ first, and the rows of x_0.
        jumps: steps in λ.
    """
    weights, scales = [], []
    for index, group in itertools.groupby(predicted, key=lambda one: one[0]):
        batches = list(group)
        rows = torch.cat([x_0[rows] for _, rows, _, _ in batches])
        prediction = Prediction.concatenate([prediction for *_, prediction in batches])
        steps = [_step(log_snrs[index], size, rows) for size in jumps]
        knot = _Knot(variance, rows - prediction.x0_hat, prediction, steps)
        weight, log_scale = _search(knot.mean_kl, knot.has_directions)
        weights.append(weight)
        scales.append(math.exp(log_scale))
    return tuple(weights), tuple(scales)


def _step(log_snr: Tensor, size: float, like: Tensor) -> Step:
    """The step from λ to λ + ``size``, in the dtype of ``like``."""
    return jump(log_snr + size, log_snr, log_snr).map(lambda value: value.to(like))


@dataclass(frozen=True, eq=False)
class _Knot:
    """One λ: x_0 − x̂_0 and the prediction for all samples, and steps from there."""

    variance: Variance
    error: Tensor
    prediction: Prediction
    steps: list[Step]

    @property
    def has_directions(self) -> bool:
        assert self.prediction.spread is not None
        return self.prediction.spread.directions is not None

    def mean_kl(self, weight: float, log_scale: float) -> float:
        """The mean KL over samples and steps, nats."""
        assert self.prediction.spread is not None
        values = self.error.new_tensor([[weight], [math.exp(log_scale)]])
        shape = tuple(self.error.shape[1:])
        spread = self.prediction.spread.calibrated(values[0], values[1], shape)
        prediction = self.prediction._replace(spread=spread)
        total = 0.0
        for step in self.steps:
            kl = self.variance.kl(step, self.error, prediction, len(shape))
            total += float(kl.double().mean())
        return total / len(self.steps)


def _search(loss: Callable[[float, float], float], both: bool) -> tuple[float, float]:
    """The w and log a of least loss, or the log a alone for w = 1."""
    loss = functools.cache(loss)
    best, move = (1.0, 0.0), _FIRST_MOVE
    while move > _LAST_MOVE:
        weight, log_scale = best
        near = [(weight, log_scale + move), (weight, log_scale - move)]
        if both:
            near += [
                (min(1.0, weight + move / 2), log_scale),
                (max(0.0, weight - move / 2), log_scale),
            ]
        near = [point for point in near if abs(point[1]) <= _MOST]
        nearest = min(near, key=lambda point: loss(*point))
        if loss(*nearest) < loss(*best):
            best = nearest
        else:
            move /= 2
    return best
