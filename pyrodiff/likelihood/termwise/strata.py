r"""Where network calls go: strata of steps t, and how t is drawn within them.

Calls are spread over the chain with a density μ_t, Σ μ_t = 1.  Steps are cut into strata of about
equal mass μ(s), each gets n_s of the n draws in proportion to it, and with t ~ μ_t/μ(s) in s

    Σ_{t∈s} L_t = E[L_t μ(s)/μ_t].

A step that stands apart (t = 1, and any to which λ jumps) has a stratum of its own, as its term is
unlike those of its neighbours.  Without a pilot μ is a mixture of

    1/T                    whatever the model, no step is rarer than four times every t once
    SNR_{t−1}/SNR_t − 1    the terms of a network whose error in ε is the same at every t
    w_t/(1 + SNR_t)        those of standard normal data with their optimal denoiser

and of a share for the jumps.  A stratum has three or four draws, enough to estimate its spread and
skewness; with fewer than 32 calls it has two.  Once there are as many strata as steps, three
quarters of the calls are spread evenly over the steps: the estimate must not be worse than every t
once, which costs as much then.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.likelihood.jumps import jumps

__all__ = ["Allocation", "Layout", "apart", "every_step", "typical_allocation", "typical_density"]

_SHARES = (0.25, 0.35, 0.4)  # of the three parts
_JUMP_SHARE = 0.15
_EVEN = 0.75  # of the calls, once every step has a stratum
_MOST = 4.0  # of the second and third part per step: what is beyond belongs to a jump


class Layout(NamedTuple):
    """Strata of consecutive steps: the first step, the width and the draws of each, (S,) int64."""

    first: Tensor
    width: Tensor
    draws: Tensor

    @property
    def total(self) -> int:
        """Network calls per sample."""
        return int(self.draws.sum())

    @property
    def middle(self) -> Tensor:
        """The mean t of each stratum, shape (S,), float64."""
        return self.first + (self.width - 1).double() / 2

    @property
    def stratum(self) -> Tensor:
        """The stratum of each draw, shape (n,)."""
        return torch.arange(len(self.draws)).repeat_interleave(self.draws)

    def sums(self, curve: Tensor) -> Tensor:
        """Sums of curves over t, (…, T), over the steps of each stratum, (…, S)."""
        whole = torch.nn.functional.pad(curve.cumsum(-1), (1, 0))
        last = self.first + self.width - 1
        return whole[..., last] - whole[..., self.first - 1]


def every_step(start: int, num_steps: int) -> Layout:
    """Each of start … T once, as published codes do; the error is unknown."""
    first = torch.arange(start, num_steps + 1)
    return Layout(first, torch.ones_like(first), torch.ones_like(first))


def apart(log_snr: Tensor) -> Tensor:
    """Steps that have a stratum of their own, (T,) bool: t = 1 and jumps."""
    alone = jumps(log_snr)
    alone[0] = True
    return alone


def typical_density(log_snr: Tensor, unit: Tensor) -> Tensor:
    """μ where only the chain is known, shape (T,), of sum 1.

    Args:
        log_snr: λ_1 … λ_T.
        unit: w_t/(1 + SNR_t), see ``known``.
    """
    ratios = torch.cat([log_snr.new_ones(1), torch.expm1(-log_snr.diff())])
    parts = (torch.ones_like(log_snr), ratios.clamp(max=_MOST), unit.clamp(max=_MOST))
    density = sum(share * part / part.sum() for share, part in zip(_SHARES, parts, strict=True))
    assert isinstance(density, Tensor)
    jumped = jumps(log_snr).double()
    if not bool(jumped.any()):
        return density
    return (1 - _JUMP_SHARE) * density + _JUMP_SHARE * jumped / jumped.sum()


@lru_cache(maxsize=8)
def typical_allocation(
    log_snr: tuple[float, ...], unit: tuple[float, ...], start: int
) -> "Allocation":
    """The layouts of a chain from what ``typical_density`` takes."""
    table = torch.tensor(log_snr, dtype=torch.float64)
    density = typical_density(table, torch.tensor(unit, dtype=torch.float64))
    return Allocation(density, apart(table), start)


class Allocation:
    """The layouts of a chain, for any number of calls.

    Args:
        density: μ_t > 0 for t = 1 … T, shape (T,).
        alone: steps that have a stratum of their own, shape (T,) bool.
        start: the first step that is drawn: 1, or 2 where t = 1 needs no network.
    """

    def __init__(self, density: Tensor, alone: Tensor, start: int = 1):
        self.start = start
        drawn, self._alone = density[start - 1 :].double().cpu(), alone[start - 1 :].cpu()
        self.num_steps = len(drawn)
        self.density = torch.cat([drawn.new_zeros(start - 1), drawn / drawn.sum()])
        self._whole = torch.nn.functional.pad(self.density.cumsum(0), (1, 0))
        self._cache: dict[int, Layout] = {}

    def layout(self, calls: int) -> Layout:
        """The strata and draws of ``calls`` network calls, at least 2."""
        if calls not in self._cache:
            self._cache[calls] = self._best(calls)
        return self._cache[calls]

    def _best(self, calls: int) -> Layout:
        if self.num_steps == 0:  # T = 1, and it needs no network
            return every_step(self.start, self.start - 1)
        per_stratum = 2 if calls < 32 else 3 if calls < 48 else 4
        strata = max(1, calls // per_stratum)
        if strata >= self.num_steps:
            mass = self.density[self.start - 1 :]
            even = torch.full_like(mass, 1 / self.num_steps)
            steps = every_step(self.start, self.start + self.num_steps - 1)
            return steps._replace(draws=_draws(_EVEN * even + (1 - _EVEN) * mass, calls))
        edges = torch.tensor(self._edges(min(strata, calls // 2)))
        mass = self._mass(edges)
        return Layout(self.start + edges[:-1], edges.diff(), _draws(mass, calls))

    def _mass(self, edges: Tensor) -> Tensor:
        """μ(s) of strata between edges, which count from ``start`` − 1."""
        return self._whole[edges + self.start - 1].diff()

    def _edges(self, strata: int) -> list[int]:
        """0 = e_0 < e_1 < … = T of at most ``strata`` strata whose largest mass is least."""
        low, high = 0.0, 2.0
        best = self._cut(high, strata)
        for _ in range(50):
            middle = 0.5 * (low + high)
            edges = self._cut(middle, strata)
            if len(edges) - 1 > strata:
                low = middle
            else:
                high, best = middle, edges
        return best

    def _cut(self, most: float, strata: int) -> list[int]:
        """Edges of strata that are as long as a mass of ``most`` allows."""
        whole = self._whole[self.start - 1 :]
        borders = self._borders if len(self._borders) <= strata else [self.num_steps]
        edges = [0]
        for border in borders:
            while edges[-1] < border and len(edges) <= strata + 1:
                end = int(torch.searchsorted(whole, whole[edges[-1]] + most, right=True)) - 1
                edges.append(min(max(end, edges[-1] + 1), border))
        return edges

    @property
    def _borders(self) -> list[int]:
        """Where a stratum has to end: before and after each step that stands apart."""
        alone = self._alone.nonzero().flatten()
        return sorted({*alone.tolist(), *(alone + 1).tolist(), self.num_steps} - {0})

    def draw(self, layout: Layout, block: slice, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Steps t ~ μ_t/μ(s), and μ(s)/μ_t, of a block of a layout's draws, (n, c) each.

        Args:
            layout: from this allocation.
            block: which draws, in the order of the strata.
            uniform: in [0, 1], shape (n, c), float64 on the CPU.
        """
        stratum = layout.stratum[block]
        first, width = layout.first[stratum], layout.width[stratum]
        low, high = self._whole[first - 1], self._whole[first - 1 + width]
        t = torch.searchsorted(self._whole, low + (high - low) * uniform, right=True)
        t = t.maximum(first).minimum(first + width - 1)
        factor = (high - low) / (self._whole[t] - self._whole[t - 1])
        return t, torch.where(width == 1, 1.0, factor)


def _draws(mass: Tensor, calls: int) -> Tensor:
    """n_s in proportion to the masses, two at least, ``calls`` in all."""
    draws, free = torch.full(mass.shape, 2), torch.ones_like(mass, dtype=torch.bool)
    while True:
        spare = calls - 2 * int((~free).sum())
        share = spare * mass / mass[free].sum()
        low = free & (share < 2)
        if not bool(low.any()) or bool(low[free].all()):
            break
        free &= ~low
    draws[free] = share[free].floor().long().clamp(min=2)
    rest = calls - int(draws.sum())
    order = (share - draws).masked_fill(~free, -torch.inf).argsort(descending=True, stable=True)
    draws[order[:rest]] += 1
    return draws
