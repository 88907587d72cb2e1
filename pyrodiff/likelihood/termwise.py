r"""The bound, term by term: −KL_T − Σ_t L_t with the sum over t taken in strata.

    Σ_{t=1}^T L_t = Σ_s Σ_{t∈s} L_t ≈ Σ_s |s| · mean of L_t over draws t ~ U(s), ε ~ N(0, I)

The strata s partition 1 … T, so the estimate is unbiased at any budget.  t = 1, the reconstruction,
is a stratum of its own, and widths grow linearly with t from there: most of the variance lies in
the smallest t.  With two draws in each stratum the variance is Σ_s |s|² (L − L′)²/4, unbiased too;
with one draw each it is unknown, and said to be NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrodiff.chains import ForwardChain, ReverseChain
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.objectives import variational_term
from pyrodiff.streams import NoiseStreams

__all__ = ["TermwiseBound"]


@dataclass(frozen=True)
class TermwiseBound:
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

    @torch.no_grad()
    def estimate(
        self,
        reverse: ReverseChain,
        x_0: Tensor,
        *,
        seed: int = 0,
        batch_size: int = 256,
        context: Tensor | None = None,
        progress: Callable[[int, Tensor], object] | None = None,
    ) -> LogLikelihood:
        """The bound of each sample; the value of sample i depends on (seed, i) and x_0[i] alone.

        Args:
            reverse: the model; dropout and the like are switched off while it is asked.
            x_0: data, shape (N, *event_shape), N ≥ 1.
            seed: of the noise streams.
            batch_size: samples per network call.
            context: shape (N, …) or None.
            progress: called after each batch with the number of samples done and their values.

        Raises:
            ValueError: no data, data that the model cannot explain, more evaluations than 2T.
        """
        reverse.check_data(x_0, context)
        if len(x_0) == 0:
            raise ValueError("Expected at least one sample; got none.")
        if batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1; got {batch_size}.")
        edges, draws = self._strata(reverse.num_steps)
        training = reverse.training
        reverse.eval()
        try:
            rows = []
            for start in range(0, len(x_0), batch_size):
                batch = slice(start, min(start + batch_size, len(x_0)))
                part = context if context is None else context[batch]
                rows.append(self._batch(reverse, x_0[batch], batch, part, seed, edges, draws))
                if progress is not None:
                    progress(batch.stop, torch.cat([row[0] for row in rows]))
        finally:
            reverse.train(training)
        value, std_error, terms = (torch.cat(column) for column in zip(*rows, strict=True))
        middle = (edges[:-1] + edges[1:] - 1).double() / 2
        return LogLikelihood(
            value,
            std_error,
            "lower bound",
            draws * (len(edges) - 1),
            reverse.event_shape.numel(),
            repr(self),
            -terms,
            middle,
        )

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

    def _batch(
        self,
        reverse: ReverseChain,
        x_0: Tensor,
        indices: slice,
        context: Tensor | None,
        seed: int,
        edges: Tensor,
        draws: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values and standard errors (n,), and mean terms per stratum (n, S); float64, CPU."""
        # One normal more than the event has: its quantile is the place of t in the stratum.
        size = reverse.event_shape.numel()
        streams = NoiseStreams(seed, range(indices.start, indices.stop), torch.Size([size + 1]))
        template = torch.empty((), dtype=torch.float64)
        widths = edges.diff()
        terms = torch.empty(len(x_0), len(widths), draws, dtype=torch.float64)
        for stratum, width in enumerate(widths.tolist()):
            for draw in range(draws):
                normal = streams.normal(template)
                place = (torch.special.ndtr(normal[:, 0]) * width).long().clamp(max=width - 1)
                noise = normal[:, 1:].reshape(x_0.shape).to(x_0)
                t = int(edges[stratum]) + place
                term = variational_term(reverse, x_0, t, noise, context)
                terms[:, stratum, draw] = term.double().cpu()
        chain: ForwardChain = reverse.forward_chain
        prior = chain.prior_kl(x_0).double().cpu()
        value = -prior - (terms.mean(2) * widths).sum(1)
        if draws == 1:
            std_error = torch.full_like(value, torch.nan)
        else:
            difference = (terms[:, :, 0] - terms[:, :, 1]) * widths / 2
            std_error = difference.square().sum(1).sqrt()
        return value, std_error, terms.mean(2)
