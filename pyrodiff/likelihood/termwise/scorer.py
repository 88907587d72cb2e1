r"""The bound of a batch of samples from the draws of one layout.

Every draw (t, ε) of a sample gives μ(s)/μ_t (L_t − k_t − γ_t·c), of which a baseline is subtracted;
the means of the strata add up to Σ_t (L_t − k_t), and their moments say how well (``moments``).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood.estimator import Batch
from pyrodiff.likelihood.termwise.baseline import baseline_curves, shared_error, subtract_baseline
from pyrodiff.likelihood.termwise.controls import Prepared
from pyrodiff.likelihood.termwise.known import KnownTerms
from pyrodiff.likelihood.termwise.moments import Moments
from pyrodiff.likelihood.termwise.pilot import Pilot
from pyrodiff.likelihood.termwise.strata import Allocation, Layout, typical_allocation
from pyrodiff.objectives import unchecked_term
from pyrodiff.streams import NoiseStreams

__all__ = ["Score", "Scorer"]

_BLOCK_VALUES = 2**17  # of noise in memory at a time: they fit a processor's cache


class Score(NamedTuple):
    """The estimates of n samples, (n,) each but for ``terms``."""

    value: Tensor
    variance: Tensor
    freedom: Tensor
    skewness: Tensor
    expected: Tensor
    """The degrees of freedom that a pilot expects."""
    terms: Tensor
    """Per step, shape (n, S)."""


@dataclass(frozen=True, eq=False)
class Scorer:
    """The estimates of a batch of samples, for any layout of the network calls.

    Args:
        reverse: the model.
        batch: the samples.
        pilot: what was learned on other data, or None.
        known: k, w and λ at every t.
    """

    reverse: ReverseChain
    batch: Batch
    pilot: Pilot | None
    known: KnownTerms

    @cached_property
    def reconstruction(self) -> Tensor | None:
        """−E log p(x_0 | x_1) where the decoder explains x_0 without the network, (n,), nats."""
        x_0 = self.batch.x_0
        step = self.reverse.step(1, x_0)
        log_prob = self.reverse.decoder.expected_log_prob(x_0, step)
        return None if log_prob is None else -log_prob.flatten(1).sum(1)

    @cached_property
    def prior(self) -> Tensor:
        """KL_T, shape (n,), nats."""
        prior: Tensor = self.reverse.forward_chain.prior_kl(self.batch.x_0)
        return prior.double().cpu()

    @cached_property
    def prepared(self) -> Prepared:
        """What the pilot's controls need of the samples."""
        assert self.pilot is not None
        return self.pilot.controls.prepare(self.batch.x_0)

    @cached_property
    def baseline(self) -> Tensor | None:
        """b at every t, shape (n, T), nats."""
        return None if self.pilot is None else self.pilot.baseline_at(self.prepared)

    @cached_property
    def curves(self) -> Tensor:
        """What a baseline is made of, (p, T) or (n, p, T)."""
        curves = baseline_curves(self.known.weight, self.known.log_snr)
        if self.baseline is None:
            return curves
        typical = curves.expand(len(self.batch), *curves.shape)
        return torch.cat([typical, self.baseline[:, None]], 1)

    @property
    def start(self) -> int:
        """The first step that is drawn."""
        return 1 if self.reconstruction is None else 2

    @property
    def allocation(self) -> Allocation:
        """Where calls go: by the pilot, or else by the chain alone."""
        if self.pilot is not None:
            return self.pilot.allocation(self.start)
        log_snr, unit = (tuple(v.tolist()) for v in (self.known.log_snr, self.known.unit))
        return typical_allocation(log_snr, unit, self.start)

    def layout(self, calls: int) -> Layout:
        """The strata and draws for this number of network calls."""
        return self.allocation.layout(calls)

    def take(self, rows: Tensor) -> "Scorer":
        """The scorer of some of the samples, by their positions."""
        return replace(self, batch=self.batch.select(rows.tolist()))

    def score(self, layout: Layout, path: int) -> Score:
        """The estimate from one layout's draws, which are those of the stream ``path``."""
        none = torch.empty(3, len(self.batch), 0, dtype=torch.float64)
        values, t, factor = torch.cat([none, *self._draws(layout, path)], 2)
        pilot = self.pilot
        as_it_is = pilot is not None and pilot.knows_curves(self.start)
        draws = subtract_baseline(
            values,
            t=t.long(),
            factor=factor,
            layout=layout,
            curves=self.curves,
            as_it_is=as_it_is,
        )
        tails, expected_freedom = None, math.inf
        if pilot is not None:
            tails, expected_freedom = pilot.tails(layout, self.start)
        moments = Moments.of(draws, layout, tails)
        moments = moments._replace(
            variance=moments.variance * shared_error(layout, self.curves, as_it_is)
        )
        sums = moments.mean + layout.sums(self.known.constant)
        value = -self.prior - sums.sum(1)
        if self.reconstruction is not None:
            value = value - self.reconstruction
        return Score(
            value=value,
            variance=moments.variance.sum(1),
            freedom=moments.freedom,
            skewness=-moments.skewness,
            expected=torch.full_like(value, expected_freedom),
            terms=sums / layout.width,
        )

    def _draws(self, layout: Layout, path: int) -> Iterator[Tensor]:
        """f (L − k − γ·c), t and f of the draws, in the order of the strata; (3, n, c)."""
        batch, size = self.batch, self.reverse.event_shape.numel()
        # One normal beside the event's: its quantile says where in the stratum t is.
        event, count = torch.Size([size + 1]), len(batch)
        streams = NoiseStreams(batch.seed, batch.indices, event, [path] * count)
        together = max(1, _BLOCK_VALUES // (count * size), batch.rows // count)
        for start in range(0, layout.total, together):
            block = slice(start, min(start + together, layout.total))
            normal = torch.stack([streams.normal(batch.x_0) for _ in layout.stratum[block]], 1)
            uniform = torch.special.ndtr(normal[..., size].double().cpu())
            t, factor = self.allocation.draw(layout, block, uniform)
            noise = normal[..., :size].unflatten(2, self.reverse.event_shape)
            terms = self._terms(t, noise) - self.known.constant[t - 1]
            if self.pilot is not None:
                controls = self.pilot.controls.noise(self.prepared, t, noise).double().cpu()
                terms -= (controls * self.pilot.gamma[t - 1]).sum(2)
            yield torch.stack([terms * factor, t.double(), factor])

    def _terms(self, t: Tensor, noise: Tensor) -> Tensor:
        """L_t of each sample and draw, (n, c), float64 on the CPU."""
        batch, result = self.batch, torch.empty(t.shape, dtype=torch.float64)
        calls = max(1, batch.rows // len(batch))
        for start in range(0, t.shape[1], calls):
            draws = slice(start, min(start + calls, t.shape[1]))
            repeats = draws.stop - start
            x_0, context = batch.x_0, batch.context
            if repeats > 1:
                x_0 = x_0.repeat_interleave(repeats, 0)
                context = None if context is None else context.repeat_interleave(repeats, 0)
            rows = noise[:, draws].flatten(0, 1)
            terms = unchecked_term(self.reverse, x_0, t[:, draws].flatten(), rows, context)
            result[:, draws] = terms.double().cpu().reshape(len(batch), repeats)
        batch.failures.add_terms(batch.indices, t, result)
        return result
