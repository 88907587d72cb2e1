"""Which steps t of the chain an objective visits.

A sum over t = 1 … T of terms L_t is estimated without bias by w L_t with t ~ p and w = 1/p(t).

    AllTimesteps             every t, w = 1
    UniformTimesteps         independent, p = 1/T
    LowDiscrepancyTimesteps  (U + i/N) mod 1 for the i-th of N samples: each t is uniform, the
                             batch spread evenly              (Kingma et al., 2021, appendix I.1)
    LossAwareTimesteps       p ∝ √E[L_t²] from past losses    (Nichol and Dhariwal, 2021, eq. 18)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "AllTimesteps",
    "LossAwareTimesteps",
    "LowDiscrepancyTimesteps",
    "Timesteps",
    "UniformTimesteps",
]


class Timesteps(ABC):
    """A rule that gives each sample of a batch its t and the weight 1/p(t).

    ``learns`` says whether ``update`` is to be called with the terms of its draws.
    """

    learns: ClassVar[bool] = False

    @abstractmethod
    def draw(
        self, num_samples: int, num_steps: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (t, w) whose weighted terms are to be added up; one pair unless it is every t.

        t has shape (N,), int64, 1 … T; w has shape (N,), float64.  Both on the CPU.
        """

    def update(self, t: Tensor, terms: Tensor) -> None:  # noqa: B027  (most rules learn nothing)
        """Learn from the terms L_t, shape (N,), at the steps of a draw."""


class AllTimesteps(Timesteps):
    """Every t for every sample: T network calls, no variance from the choice of t."""

    def draw(
        self, num_samples: int, num_steps: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        weight = torch.ones(num_samples, dtype=torch.float64)
        for t in range(1, num_steps + 1):
            yield torch.full((num_samples,), t), weight


class UniformTimesteps(Timesteps):
    """t uniform on 1 … T, independent between samples."""

    def draw(
        self, num_samples: int, num_steps: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        t = torch.randint(1, num_steps + 1, (num_samples,), generator=generator)
        yield t, torch.full((num_samples,), float(num_steps), dtype=torch.float64)


class LowDiscrepancyTimesteps(Timesteps):
    """t uniform on 1 … T for each sample, evenly spread over the batch by one shared offset."""

    def draw(
        self, num_samples: int, num_steps: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        offset = torch.rand((), dtype=torch.float64, generator=generator)
        u = (offset + torch.arange(num_samples, dtype=torch.float64) / num_samples) % 1.0
        t = (u * num_steps).long().clamp(max=num_steps - 1) + 1
        yield t, torch.full((num_samples,), float(num_steps), dtype=torch.float64)


class LossAwareTimesteps(Timesteps, torch.nn.Module):
    """t drawn in proportion to the root mean square of its last losses, uniform until known.

    Args:
        num_steps: T.
        history: how many losses are kept for each t; uniform until each t has so many.
        uniform: the share of uniform draws mixed in, which bounds the weights by T / uniform.

    Raises:
        ValueError: ``history`` < 1, ``uniform`` outside (0, 1], or a chain of another length.
    """

    learns: ClassVar[bool] = True
    losses: Tensor
    counts: Tensor

    def __init__(self, num_steps: int, history: int = 10, uniform: float = 0.001):
        super().__init__()
        if num_steps < 1 or history < 1 or not 0.0 < uniform <= 1.0:
            raise ValueError(
                "Expected num_steps >= 1, history >= 1 and 0 < uniform <= 1; "
                f"got {num_steps}, {history}, {uniform}."
            )
        self.num_steps = num_steps
        self.history = history
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(num_steps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_steps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """p(t) for t = 1 … T, shape (T,)."""
        even = torch.full((self.num_steps,), 1 / self.num_steps, dtype=torch.float64)
        root = self.losses.cpu().square().mean(1).sqrt()
        if int(self.counts.min()) < self.history or not float(root.sum()) > 0:
            return even
        return (1 - self.uniform) * root / root.sum() + self.uniform * even

    def draw(
        self, num_samples: int, num_steps: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if num_steps != self.num_steps:
            raise ValueError(f"Expected a chain of {self.num_steps} steps; got {num_steps}.")
        p = self.probabilities()
        index = torch.multinomial(p, num_samples, replacement=True, generator=generator)
        yield index + 1, 1 / p[index]

    @torch.no_grad()
    def update(self, t: Tensor, terms: Tensor) -> None:
        losses, counts = self.losses.cpu().numpy(), self.counts.cpu().numpy()
        for step, loss in zip((t - 1).tolist(), terms.tolist(), strict=True):
            losses[step, counts[step] % self.history] = loss
            counts[step] += 1
        self.losses.copy_(torch.from_numpy(losses))
        self.counts.copy_(torch.from_numpy(counts))
