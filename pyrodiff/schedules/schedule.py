"""What every schedule is."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["Schedule"]


class Schedule(ABC):
    """A strictly decreasing log-SNR λ(u), u ∈ [0, 1], in float64."""

    @abstractmethod
    def log_snr(self, u: Tensor) -> Tensor:
        """λ(u), of the shape of ``u``; λ(0) may be +∞ (x at u = 0 is the data), λ(1) −∞."""

    @abstractmethod
    def table(self, num_steps: int) -> Tensor:
        """λ_1 … λ_T for a chain of T = ``num_steps`` steps, shape (T,), float64."""

    def times(self, num_steps: int) -> Tensor:
        """What a network is told as time at each step, 1 … T, shape (T,), float64."""
        return torch.arange(1, num_steps + 1, dtype=torch.float64)
