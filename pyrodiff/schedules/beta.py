"""Schedules that come from betas, or from their limit in continuous time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrodiff.checks import check_count
from pyrodiff.schedules.schedule import Schedule

__all__ = ["BetaSchedule", "CosineSchedule", "LinearSchedule"]


def _log_snr_from_log_alpha_bar(log_alpha_bar: Tensor) -> Tensor:
    """λ = log ᾱ − log(1 − ᾱ), accurate when ᾱ is close to 1; +∞ at ᾱ = 1, −∞ at ᾱ = 0."""
    log_alpha_bar = log_alpha_bar.clamp(max=0.0)  # a rounding above 0 is no ᾱ
    return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))


def _log_snr_from_betas(betas: Tensor) -> Tensor:
    """λ_1 … λ_T of the betas: logit of ᾱ_t = ∏_{s≤t} (1 − β_s)."""
    return _log_snr_from_log_alpha_bar(torch.log1p(-betas).cumsum(0))


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    r"""Betas that grow linearly with t (Ho et al., 2020, section 4).

    For T steps β_t runs linearly from ``beta_start`` · 1000/T to ``beta_end`` · 1000/T, the
    rescaling that keeps ᾱ_T at any T (Nichol and Dhariwal, 2021).  The limit is the
    variance-preserving SDE of Song et al. (2021, appendix C):

        log ᾱ(u) = −1000 (β_start u + (β_end − β_start) u²/2).

    Raises:
        ValueError: ``table(T)`` where T is so small that a beta reaches 1 (T ≤ 20 by default).
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(
                "Expected 0 < beta_start <= beta_end < 1; "
                f"got beta_start={self.beta_start}, beta_end={self.beta_end}."
            )

    def log_snr(self, u: Tensor) -> Tensor:
        u = u.double()
        slope = self.beta_end - self.beta_start
        return _log_snr_from_log_alpha_bar(-1000 * (self.beta_start * u + slope * u**2 / 2))

    def betas(self, num_steps: int) -> Tensor:
        """β_1 … β_T, shape (T,), float64."""
        check_count("num_steps", num_steps)
        scale = 1000 / num_steps
        if scale * self.beta_end >= 1.0:
            raise ValueError(
                f"Expected num_steps > {1000 * self.beta_end:g} for betas below 1 in "
                f"{self!r}; got {num_steps}. CosineSchedule and LogSNRSchedule allow any number."
            )
        start, end = scale * self.beta_start, scale * self.beta_end
        return torch.linspace(start, end, num_steps, dtype=torch.float64)

    def table(self, num_steps: int) -> Tensor:
        return _log_snr_from_betas(self.betas(num_steps))


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    r"""The cosine schedule (Nichol and Dhariwal, 2021, equation 17).

        ᾱ(u) = f(u) / f(0),    f(u) = cos²((u + s) / (1 + s) · π/2),
        β_t = min(1 − ᾱ(t/T) / ᾱ((t−1)/T), max_beta),

    with s = ``offset``.  The clipped β_T keeps λ_T finite although ᾱ(1) = 0 and λ(1) = −∞.

    With r = π/2 / (1 + s) the quotient of cosines is 1 − g near the data, and one of sines near
    the noise, so that λ is accurate to both ends, and ᾱ(0) = 1 and ᾱ(1) = 0 are exact:

        √ᾱ(u) = sin(r (1 − u)) / cos(r s) = 1 − g,   g = 2 sin(r u/2) sin(r (s + u/2)) / cos(r s)
    """

    offset: float = 0.008
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        if self.offset < 0 or not 0.0 < self.max_beta < 1.0:
            raise ValueError(
                "Expected offset >= 0 and 0 < max_beta < 1; "
                f"got offset={self.offset}, max_beta={self.max_beta}."
            )

    def _log_alpha_bar(self, u: Tensor) -> Tensor:
        u, s, r = u.double(), self.offset, math.pi / 2 / (1 + self.offset)
        near, far = u.clamp(max=0.5), u.clamp(min=0.5)  # each formula sees its own half alone
        fall = 2 * torch.sin(r * near / 2) * torch.sin(r * (s + near / 2)) / math.cos(r * s)
        rest = torch.sin(r * (1 - far)) / math.cos(r * s)
        return 2 * torch.where(u < 0.5, torch.log1p(-fall), rest.log())

    def log_snr(self, u: Tensor) -> Tensor:
        return _log_snr_from_log_alpha_bar(self._log_alpha_bar(u))

    def betas(self, num_steps: int) -> Tensor:
        """β_1 … β_T, shape (T,), float64."""
        check_count("num_steps", num_steps)
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        return (-torch.expm1(self._log_alpha_bar(u).diff())).clamp(max=self.max_beta)

    def table(self, num_steps: int) -> Tensor:
        return _log_snr_from_betas(self.betas(num_steps))


class BetaSchedule(Schedule):
    r"""A schedule given by its betas (Ho et al., 2020, equation 2).

    Between the knots u = t/T log ᾱ is interpolated linearly, from log ᾱ(0) = 0.

    Args:
        betas: β_1 … β_T, each in (0, 1), nowhere decreasing; kept in float64.

    Raises:
        ValueError: betas outside (0, 1) or decreasing somewhere, or a table asked for another
            number of steps than there are betas.
    """

    def __init__(self, betas: Sequence[float] | Tensor):
        dtype = None if isinstance(betas, Tensor) else torch.float64  # a list is not float32
        values = torch.as_tensor(betas, dtype=dtype).detach().to("cpu", torch.float64)
        if values.dim() != 1 or len(values) == 0:
            raise ValueError(f"Expected betas of shape (T,); got shape {tuple(values.shape)}.")
        if not bool(((values > 0) & (values < 1)).all()):
            raise ValueError(
                "Expected every beta in (0, 1); "
                f"got values from {values.min():g} to {values.max():g}."
            )
        falls = (values.diff() < 0).nonzero()
        if len(falls):
            t = int(falls[0]) + 1
            raise ValueError(
                "Expected betas that never decrease (noise grows with t); got "
                f"beta_{t} = {values[t - 1]:g} > beta_{t + 1} = {values[t]:g}."
            )
        self.betas = tuple(values.tolist())

    def __repr__(self) -> str:
        return f"BetaSchedule({len(self.betas)} betas, {self.betas[0]:g} to {self.betas[-1]:g})"

    def log_snr(self, u: Tensor) -> Tensor:
        betas = torch.tensor(self.betas, dtype=torch.float64, device=u.device)
        knots = torch.log1p(-betas).cumsum(0)
        knots = torch.cat([knots.new_zeros(1), knots])
        position = u.double() * len(self.betas)
        left = position.floor().clamp(0, len(self.betas) - 1).long()
        return _log_snr_from_log_alpha_bar(
            torch.lerp(knots[left], knots[left + 1], position - left)
        )

    def table(self, num_steps: int) -> Tensor:
        check_count("num_steps", num_steps)
        if num_steps != len(self.betas):
            raise ValueError(
                f"Expected num_steps = {len(self.betas)}, the number of betas; got {num_steps}."
            )
        return _log_snr_from_betas(torch.tensor(self.betas, dtype=torch.float64))
