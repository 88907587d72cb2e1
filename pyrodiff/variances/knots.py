"""Tables over λ: values at a few log-SNRs, linear between them and constant beyond."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_knots", "interpolate", "knots_of"]


def check_knots(log_snrs: Sequence[float]) -> None:
    """Raise ValueError unless the log-SNRs are finite and decrease strictly."""
    falling = all(a > b for a, b in zip(log_snrs[:-1], log_snrs[1:], strict=True))
    if not falling or not all(map(math.isfinite, log_snrs)):
        raise ValueError(
            f"Expected finite log-SNRs that decrease strictly; got {tuple(log_snrs)[:5]}."
        )


def knots_of(log_snrs: Tensor, count: int) -> Tensor:
    """``count`` log-SNRs even between the ends of a chain with λ_1 … λ_T, float64, decreasing."""
    return torch.linspace(float(log_snrs[0]), float(log_snrs[-1]), count, dtype=torch.float64)


def interpolate(log_snrs: Sequence[float], table: Tensor, at: Tensor) -> Tensor:
    """Rows of a table with one row per log-SNR, (K, m), at λ of any shape: (n, m), float64."""
    knots = torch.tensor(log_snrs, dtype=torch.float64, device=at.device)
    position = at.reshape(-1).double()
    right = torch.searchsorted(-knots, -position).clamp(1, max(1, len(knots) - 1))
    right = right.clamp(max=len(knots) - 1)
    left = (right - 1).clamp(min=0)
    gap = (knots[left] - knots[right]).clamp(min=1e-12)
    share = ((knots[left] - position) / gap).clamp(0, 1).unsqueeze(-1)
    return torch.lerp(table[left], table[right], share)
