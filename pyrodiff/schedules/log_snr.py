"""Schedules that are given by their log-SNRs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrodiff.checks import check_count
from pyrodiff.schedules.schedule import Schedule

__all__ = ["LogSNRSchedule", "TabulatedSchedule"]


@dataclass(frozen=True)
class LogSNRSchedule(Schedule):
    r"""Linear log-SNR: λ(u) = λ_max + u (λ_min − λ_max) (Kingma et al., 2021, section 3.2).

    The table holds λ at u = (t − 1)/(T − 1), so that x_1 has λ_max and x_T has λ_min: x_1 is
    z_0 of Kingma et al., the least noisy latent.  With T = 1 the one latent has λ_min.

    Examples:
        >>> LogSNRSchedule(10.0, -5.0).table(4)
        tensor([10.,  5.,  0., -5.], dtype=torch.float64)
    """

    maximum: float = 13.3
    minimum: float = -5.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.maximum) and math.isfinite(self.minimum)) or (
            self.maximum <= self.minimum
        ):
            raise ValueError(
                "Expected finite maximum > minimum; "
                f"got maximum={self.maximum}, minimum={self.minimum}."
            )

    def log_snr(self, u: Tensor) -> Tensor:
        ends = torch.tensor([self.maximum, self.minimum], dtype=torch.float64, device=u.device)
        return torch.lerp(ends[0], ends[1], u.double())

    def table(self, num_steps: int) -> Tensor:
        check_count("num_steps", num_steps)
        if num_steps == 1:
            return torch.tensor([self.minimum], dtype=torch.float64)
        return torch.linspace(self.maximum, self.minimum, num_steps, dtype=torch.float64)


class TabulatedSchedule(Schedule):
    """A schedule given by its log-SNRs, and by what the network is told there.

    A respaced chain has one: it visits some levels of another chain and keeps their time, so that a
    network that was trained on the timesteps of that chain receives those that it knows.  Between
    the knots u = t/T, λ is linear; λ(0) = +∞ is the data.

    Args:
        log_snrs: λ_1 … λ_T, finite and strictly decreasing.
        timesteps: the network's time at each, strictly increasing; default 1 … T.

    Raises:
        ValueError: log-SNRs or timesteps that are not as said, or a table asked for another number
            of steps than there are.
    """

    def __init__(
        self,
        log_snrs: Sequence[float] | Tensor,
        timesteps: Sequence[float] | Tensor | None = None,
    ):
        values = torch.as_tensor(log_snrs, dtype=torch.float64).detach().cpu()
        if values.dim() != 1 or len(values) == 0 or not bool(values.isfinite().all()):
            raise ValueError(
                f"Expected finite log-SNRs of shape (T,); got shape {tuple(values.shape)}."
            )
        if not bool((values.diff() < 0).all()):
            raise ValueError("Expected log-SNRs that decrease strictly; got others.")
        times = torch.arange(1.0, len(values) + 1) if timesteps is None else timesteps
        times = torch.as_tensor(times, dtype=torch.float64).detach().cpu()
        if times.shape != values.shape or not bool((times.diff() > 0).all()):
            raise ValueError(
                f"Expected {len(values)} timesteps that increase strictly; got "
                f"{tuple(times.shape)} of them."
            )
        self.log_snrs, self.timesteps = tuple(values.tolist()), tuple(times.tolist())

    def __repr__(self) -> str:
        first, last = self.log_snrs[0], self.log_snrs[-1]
        return f"TabulatedSchedule({len(self.log_snrs)} log-SNRs, {first:g} to {last:g})"

    def log_snr(self, u: Tensor) -> Tensor:
        knots = torch.tensor(self.log_snrs, dtype=torch.float64, device=u.device)
        knots = torch.cat([knots.new_full((1,), torch.inf), knots])
        position = u.double() * len(self.log_snrs)
        left = position.floor().clamp(0, len(self.log_snrs) - 1).long()
        share = position - left
        inner = torch.lerp(knots[left.clamp(min=1)], knots[left + 1], share)
        # from +∞ at the data to λ_1 as noise that grows linearly: σ²/α² ∝ u
        first = knots[1] - share.log()
        return torch.where(left > 0, inner, first)

    def table(self, num_steps: int) -> Tensor:
        self._check(num_steps)
        return torch.tensor(self.log_snrs, dtype=torch.float64)

    def times(self, num_steps: int) -> Tensor:
        self._check(num_steps)
        return torch.tensor(self.timesteps, dtype=torch.float64)

    def _check(self, num_steps: int) -> None:
        check_count("num_steps", num_steps)
        if num_steps != len(self.log_snrs):
            raise ValueError(
                f"Expected num_steps = {len(self.log_snrs)}, the number of log-SNRs; "
                f"got {num_steps}."
            )
