r"""Which levels a chain of few steps visits: λ_1 > … > λ_n between the ends of a longer one.

    UniformGrid    t even on the steps of the longer chain
    QuadraticGrid  √(t − 1) even: more steps near the data
    LogSNRGrid     λ even
    OptimalGrid    the least sum of costs of single steps          (Watson, Ho, Norouzi, Chan, 2021)

The first and the last level are those of the longer chain.  The cost of a step from λ_t to λ_s
is the mean of KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)) over data, with the variance in use; where it
depends on x_t, with each sample's own, as the mean of a logarithm is not the logarithm of a
mean.  To the step that ends in λ_1 belongs the reconstruction, whose variance may be that step's.
The bound of a grid is a sum of costs of neighbours, and dynamic programming over n and the last
level visited finds the best grid of n levels.  A sample's noise is the same at all levels: a search
among costs with errors of their own prefers levels whose errors are favourable.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrodiff.checks import check_count
from pyrodiff.denoisers import Prediction
from pyrodiff.distributions import Law
from pyrodiff.kernels import Step, jump, steps
from pyrodiff.serialization.weights import read_weights, write_weights
from pyrodiff.variances.analytic import Denoising, predictions
from pyrodiff.variances.knots import knots_of
from pyrodiff.variances.variance import Variance

__all__ = ["GRIDS", "Grid", "LogSNRGrid", "OptimalGrid", "QuadraticGrid", "UniformGrid"]


class Grid(ABC):
    """A rule that chooses the levels of a chain of few steps."""

    @abstractmethod
    def log_snrs(self, table: Tensor, num_steps: int) -> Tensor:
        """λ_1 … λ_n for n = ``num_steps``, shape (n,), float64, strictly decreasing.

        Args:
            table: λ_1 … λ_T of the longer chain.
            num_steps: n ≥ 1; the one level of n = 1 is λ_T.
        """


def _at(table: Tensor, share: Tensor) -> Tensor:
    """λ at shares 0 … 1 of the way from t = 1 to t = T, linear between steps."""
    position = share * (len(table) - 1)
    left = position.floor().long().clamp(0, max(0, len(table) - 2))
    right = (left + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[left], table[right], position - left)


def _even(num_steps: int) -> Tensor:
    check_count("num_steps", num_steps)
    if num_steps == 1:
        return torch.ones(1, dtype=torch.float64)
    return torch.linspace(0, 1, num_steps, dtype=torch.float64)


@dataclass(frozen=True)
class UniformGrid(Grid):
    """t even."""

    def log_snrs(self, table: Tensor, num_steps: int) -> Tensor:
        return _at(table, _even(num_steps))


@dataclass(frozen=True)
class QuadraticGrid(Grid):
    """√(t − 1) even."""

    def log_snrs(self, table: Tensor, num_steps: int) -> Tensor:
        return _at(table, _even(num_steps).square())


@dataclass(frozen=True)
class LogSNRGrid(Grid):
    """λ even."""

    def log_snrs(self, table: Tensor, num_steps: int) -> Tensor:
        return torch.lerp(table[0], table[-1], _even(num_steps))


GRIDS: dict[str, Grid] = {
    "uniform": UniformGrid(),
    "quadratic": QuadraticGrid(),
    "log-snr": LogSNRGrid(),
}
"""The grids that need no fit, by name."""


@runtime_checkable
class DenoisingWithVariance(Denoising, Protocol):
    """What a reverse chain is asked for by an optimal grid."""

    variance: Variance

    def reconstruction(self, x_1: Tensor, step: Step, prediction: Prediction) -> Law:
        """p_θ(x_0 | x_1) from the denoiser's prediction there."""


def _cast(step: Step, x: Tensor) -> Step:
    return step.map(lambda value: value.to(x))


@dataclass(frozen=True, eq=False)
class OptimalGrid(Grid):
    """The levels whose costs have the least sum; ``fit`` makes one.

    Args:
        candidates: λ of the levels to choose from, decreasing, shape (M,).
        costs: nats, shape (M, M): of the step from candidate i to candidate j < i.
    """

    candidates: Tensor
    costs: Tensor

    def __repr__(self) -> str:
        return f"OptimalGrid({len(self.candidates)} candidates)"

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        reverse: DenoisingWithVariance,
        x_0: Tensor,
        *,
        candidates: int = 160,
        context: Tensor | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> "OptimalGrid":
        """Costs on other data than is to be judged.

        Args:
            reverse: the model, in evaluation mode, with the variance that is to be used.
            x_0: data, shape (N, *event_shape).
            candidates: M, levels even in λ.
            context: shape (N, …) or None.
            seed: of the noise.
            batch_size: rows per network call.
        """
        check_count("candidates", candidates, 2)
        log_snrs, event_dim = knots_of(reverse.log_snrs, candidates), len(reverse.event_shape)
        costs = torch.zeros(candidates, candidates, dtype=torch.float64)
        for i, rows, x_t, prediction in predictions(
            reverse,
            x_0,
            log_snrs,
            context=context,
            seed=seed,
            batch_size=batch_size,
            same_noise=True,
        ):
            for j in range(i):
                step = _cast(jump(log_snrs[j], log_snrs[i], log_snrs[i]), x_t)
                kl = reverse.variance.kl(step, x_0[rows] - prediction.x0_hat, prediction, event_dim)
                costs[i, j] += kl.double().sum().cpu()
            if i == 0:
                for before in range(1, candidates):
                    first = steps(log_snrs[[0, before]]).map(lambda value: value[0])
                    law = reverse.reconstruction(x_t, _cast(first, x_t), prediction)
                    costs[before, 0] -= law.log_prob(x_0[rows]).double().sum().cpu()
        return cls(log_snrs, costs / len(x_0))

    def log_snrs(self, table: Tensor, num_steps: int) -> Tensor:
        check_count("num_steps", num_steps)
        count = len(self.candidates)
        if num_steps > count:
            raise ValueError(f"Expected at most {count} steps, the candidates; got {num_steps}.")
        if num_steps == 1:
            return table[-1:].clone()
        # only to less noise
        allowed = self.costs.masked_fill(torch.ones_like(self.costs).tril(-1) == 0, torch.inf)
        # least[j]: of the way from the last candidate to j in so many steps
        least = torch.full((count,), torch.inf, dtype=torch.float64)
        least[-1] = 0.0
        choices = []
        for _ in range(num_steps - 1):
            totals = least.unsqueeze(1) + allowed
            least, choice = totals.min(0)
            choices.append(choice)
        place, places = 0, [0]
        for choice in reversed(choices):
            place = int(choice[place])
            places.append(place)
        values = self.candidates[torch.tensor(places)]
        values[0], values[-1] = table[0], table[-1]
        return values

    def save(self, path: str | Path) -> None:
        """Write the candidates and costs as safetensors, atomically."""
        write_weights(Path(path), {"candidates": self.candidates, "costs": self.costs})

    @classmethod
    def load(cls, path: str | Path) -> "OptimalGrid":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a grid.
        """
        tensors = read_weights(Path(path))
        candidates, costs = tensors.get("candidates"), tensors.get("costs")
        if candidates is None or costs is None or costs.shape != (len(candidates),) * 2:
            raise ValueError(f"Expected an optimal grid in {path}; got {sorted(tensors)[:5]}.")
        return cls(candidates, costs)
