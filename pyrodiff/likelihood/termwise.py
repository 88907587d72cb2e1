r"""The bound, term by term: −KL_T − Σ_t L_t with the sum over t taken in strata.

    Σ_{t=1}^T L_t = Σ_s Σ_{t∈s} L_t ≈ Σ_s |s| · mean of L_t over draws t ~ U(s), ε ~ N(0, I)

The strata s partition 1 … T, so the estimate is unbiased at any budget.  t = 1, the reconstruction,
is a stratum of its own, and widths grow linearly with t from there: most of the variance lies in
the smallest t.  With two draws in each stratum the variance is Σ_s |s|² (L − L′)²/4, unbiased too;
with one draw each it is unknown, and said to be NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrodiff.chains import ForwardChain, ReverseChain
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.objectives import variational_term
from pyrodiff.streams import NoiseStreams

__all__ = ["TermwiseBound"]


@dataclass(frozen=True)
class TermwiseBound(Estimator):
    """A lower bound on log p_θ(x_0) from ``evaluations`` network calls per sample.

    Args:
        evaluations: network calls per sample, an even number of at least 2 and at most 2T (two
            draws in each of ``evaluations``/2 strata); None for every t once, as published codes
            do, whose error is unknown.

    Raises:
        ValueError: an odd or non-positive number, or one above 2T (on ``estimate``).
    """

    evaluations: int | None = None

    def __post_init__(self) -> None:
        n = self.evaluations
        if n is not None and (not isinstance(n, int) or n < 2 or n % 2):
            raise ValueError(f"Expected evaluations to be even and at least 2, or None; got {n!r}.")

    def _check(self, reverse: ReverseChain) -> None:
        self._strata(reverse.num_steps)

    def _strata(self, num_steps: int) -> tuple[Tensor, int]:
        """Edges e_0 = 1 < e_1 < … = T + 1 of the strata [e_s, e_{s+1}), and draws in each."""
        if self.evaluations is None:
            return torch.arange(1, num_steps + 2), 1
        strata = self.evaluations // 2
        if strata > num_steps:
            raise ValueError(
                f"Expected at most 2T = {2 * num_steps} evaluations; got {self.evaluations}."
            )
        if strata == 1:
            return torch.tensor([1, num_steps + 1]), 2
        # 1 | 2 … T cut at quadratic places, each stratum at least one step wide.
        place = torch.arange(strata, dtype=torch.float64) / (strata - 1)
        edges = 2 + ((num_steps - 1) * place.square()).round().long()
        edges = torch.maximum(edges, 2 + torch.arange(strata))
        edges = torch.minimum(edges, num_steps + 2 - torch.arange(strata, 0, -1))
        return torch.cat([torch.ones(1, dtype=torch.int64), edges]), 2

    def _batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        edges, draws = self._strata(reverse.num_steps)
        x_0 = batch.x_0
        # One normal more than the event has: its quantile is the place of t in the stratum.
        size = reverse.event_shape.numel()
        streams = NoiseStreams(batch.seed, batch.indices, torch.Size([size + 1]))
        template = torch.empty((), dtype=torch.float64)
        widths = edges.diff()
        terms = torch.empty(len(x_0), len(widths), draws, dtype=torch.float64)
        for stratum, width in enumerate(widths.tolist()):
            for draw in range(draws):
                normal = streams.normal(template)
                place = (torch.special.ndtr(normal[:, 0]) * width).long().clamp(max=width - 1)
                noise = normal[:, 1:].reshape(x_0.shape).to(x_0)
                t = int(edges[stratum]) + place
                term = variational_term(reverse, x_0, t, noise, batch.context)
                terms[:, stratum, draw] = term.double().cpu()
        chain: ForwardChain = reverse.forward_chain
        prior = chain.prior_kl(x_0).double().cpu()
        value = -prior - (terms.mean(2) * widths).sum(1)
        if draws == 1:
            std_error = torch.full_like(value, torch.nan)
        else:
            difference = (terms[:, :, 0] - terms[:, :, 1]) * widths / 2
            std_error = difference.square().sum(1).sqrt()
        return LogLikelihood(
            value,
            std_error,
            "lower bound",
            torch.full(value.shape, draws * (len(edges) - 1)),
            size,
            repr(self),
            -terms.mean(2),
            (edges[:-1] + edges[1:] - 1).double() / 2,
        )
