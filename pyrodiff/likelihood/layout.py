r"""Where network calls go: strata of steps t and the draws in each.

With D_t the spread of L_t over the noise and m_t that of its mean over samples, the sum over a
stratum s from n_s draws of t ~ U(s) and ε has variance V_s/n_s,

    V_s = |s|² (mean D_t² + mean m_t² − (mean m_t)²),

if a sample's curve runs in proportion to m_t.  The least Σ V_s/n_s for n calls is (Σ √V_s)²/n, at
n_s ∝ √V_s (Neyman, 1934).  So strata are cut for the least Σ √V_s, by dynamic programming; each
gets two draws at least, the fewest that know their own spread, and as many strata are taken as
that constraint makes worth while.
"""

from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Allocation", "Layout", "every_step", "typical_allocation"]

_STRATA = 256  # at most; finer ones gain nothing
_EVERY = 64  # steps that may each be a stratum of their own
_PLACES = 256  # even, and evenly spread over log t, places where strata may end beyond


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


def every_step(start: int, num_steps: int) -> Layout:
    """Each of start … T once, as published codes do: the error is not known."""
    first = torch.arange(start, num_steps + 1)
    return Layout(first, torch.ones_like(first), torch.ones_like(first))


def _typical_terms(log_snr: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """D_t and m_t to go by when nothing is known but the schedule, nats, (T,) each.

    For x_0 ~ N(0, I) and its optimal denoiser, L_t is about d/2 (SNR_{t−1} − SNR_t)/(1 + SNR_t)
    for t ≥ 2 and ½ ‖x_0 − x̂_0‖²/s² for t = 1, d/2 where s² is β_1; either varies with the noise
    by √(2/d) of itself.  A fifth of the mean spread is added: where a model is poor this may say
    nearly nothing of its spread, and a stratum that is thought not to vary gets two draws only.
    """
    steps = torch.expm1(-log_snr.diff()) * torch.sigmoid(log_snr[1:])
    curve = 0.5 * dimensions * torch.cat([torch.ones_like(log_snr[:1]), steps])
    noise = curve * (2 / dimensions) ** 0.5
    return noise + 0.2 * noise.mean(), curve


@lru_cache(maxsize=8)
def typical_allocation(log_snr: tuple[float, ...], dimensions: int, start: int) -> "Allocation":
    """The layouts of a chain of which nothing is known but its log-SNRs λ_1 … λ_T."""
    return Allocation(
        *_typical_terms(torch.tensor(log_snr, dtype=torch.float64), dimensions), start
    )


class Allocation:
    """The layouts of a chain, for any number of calls.

    Args:
        noise: D_t, nats, for t = 1 … T, shape (T,).
        curve: m_t, shape (T,).
        start: the first step that is drawn: 1, or 2 where t = 1 needs no network.
    """

    def __init__(self, noise: Tensor, curve: Tensor, start: int = 1):
        self.start = start
        noise, curve = (v[start - 1 :].double().cpu() for v in (noise, curve))
        noise = noise + 1e-6 * noise.mean() + 1e-30  # a step without spread is a step still
        self.num_steps = len(noise)
        self._sums = [
            torch.cat([torch.zeros(1, dtype=torch.float64), v.cumsum(0)])
            for v in (noise.square() + curve.square(), curve)
        ]
        self._cache: dict[int, Layout] = {}

    def layout(self, calls: int) -> Layout:
        """The strata and draws of ``calls`` network calls, at least 2."""
        if calls not in self._cache:
            self._cache[calls] = self._best(calls)
        return self._cache[calls]

    def _best(self, calls: int) -> Layout:
        if self.num_steps == 0:  # T = 1, and it needs no network
            return every_step(self.start, self.start - 1)
        most = min(calls // 2, len(self._table) - 1)
        options = {most, *(round(most * share) for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2))}
        found: list[tuple[float, Layout]] = []
        for strata in sorted(max(1, option) for option in options):
            edges = self._edges(strata)
            root = self._root(edges[:-1], edges[1:])
            draws = _draws(root, calls)
            layout = Layout(self.start + edges[:-1], edges.diff(), draws)
            found.append((float((root.square() / draws).sum()), layout))
        return min(found, key=lambda pair: pair[0])[1]

    def _root(self, left: Tensor, right: Tensor) -> Tensor:
        """√V of steps left < t ≤ right (counted from ``start`` − 1)."""
        squares, curve = (s[right] - s[left] for s in self._sums)
        return ((right - left) * squares - curve.square()).clamp(min=0).sqrt()

    @cached_property
    def _places(self) -> Tensor:
        """Where strata may end, from 0 to T."""
        n = self.num_steps
        even = torch.linspace(0, n, min(n, _PLACES) + 1, dtype=torch.float64)
        log = torch.logspace(0, 1, _PLACES, base=float(max(n, 2)), dtype=torch.float64)
        places = torch.cat([torch.arange(min(n, _EVERY) + 1), even.round(), log.round()])
        return places.long().clamp(max=n).unique()

    @cached_property
    def _table(self) -> list[Tensor]:
        """For k = 0, 1, … strata, the place before each place on the best way to it."""
        places = self._places
        left, right = places[:, None], places[None, :]
        costs = self._root(left, right).masked_fill(left >= right, torch.inf)
        if self.start == 1:  # the reconstruction is of another kind than the KL terms
            costs[0, 2:-1] = torch.inf
        total = torch.full((len(places),), torch.inf, dtype=torch.float64)
        total[0] = 0.0
        table = [torch.zeros(len(places), dtype=torch.int64)]
        for _ in range(min(_STRATA, len(places) - 1)):
            total, before = (total[:, None] + costs).min(0)
            table.append(before)
        return table

    def _edges(self, strata: int) -> Tensor:
        """0 = e_0 < e_1 < … = T of the best ``strata`` strata."""
        place, edges = len(self._places) - 1, [self.num_steps]
        for k in range(strata, 0, -1):
            place = int(self._table[k][place])
            edges.append(int(self._places[place]))
        return torch.tensor(edges[::-1])


def _draws(root: Tensor, calls: int) -> Tensor:
    """n_s in proportion to √V_s, two at least, ``calls`` in all."""
    root = root.clamp(min=1e-9 * float(root.max()) + 1e-200)  # rounding may leave none: share all
    draws, free = torch.full(root.shape, 2), torch.ones_like(root, dtype=torch.bool)
    while True:
        spare = calls - 2 * int((~free).sum())
        wanted = spare * root / root[free].sum()
        low = free & (wanted < 2)
        if not bool(low.any()) or bool(low[free].all()):
            break
        free &= ~low
    draws[free] = wanted[free].floor().long().clamp(min=2)
    rest = calls - int(draws.sum())
    order = (wanted - draws).masked_fill(~free, -torch.inf).argsort(descending=True)
    draws[order[:rest]] += 1
    return draws
