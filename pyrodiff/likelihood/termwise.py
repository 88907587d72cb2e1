r"""The bound, term by term: −KL_T − Σ_t L_t with the sum over t taken in strata.

    Σ_{t∈s} L_t ≈ Σ_{t∈s} b_t + |s| · mean over draws t ~ U(s), ε ~ N(0, I) of  L_t − b_t − γ_t·c

The strata s partition 1 … T, so the estimate is unbiased at any budget.  Where a pilot on other
data is given it says how wide strata are and how many draws they get (``layout``), and what is
subtracted: control variates c of mean zero, and a baseline b whose sum is known (``controls``).
The variance Σ_s |s|² s_s²/n_s of the estimate is known from n_s ≥ 2 draws.  A reconstruction that
the decoder explains without the network is computed, not drawn.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood.controls import Prepared
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.layout import Layout, every_step, typical_allocation
from pyrodiff.likelihood.pilot import Pilot
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.objectives import unchecked_term
from pyrodiff.streams import NoiseStreams

__all__ = ["TermwiseBound"]

_FIRST_STAGE = 32  # calls that fix a sample's budget
_GRID = 2**0.25  # budgets are powers of it, so that samples of equal budgets work together
_MOST = 64  # passes over the whole chain that a sample's budget may amount to
_BLOCK_VALUES = 2**17  # noise that is worked on at a time: it fits a processor's cache
_CAUTION = 0.25  # chance that the first stage underrates the variance that it plans for


@dataclass(frozen=True)
class TermwiseBound(Estimator):
    """A lower bound on log p_θ(x_0), unbiased for the ELBO, from a budget of network calls.

    Args:
        evaluations: network calls per sample, at least 2; None for every t once, as published
            codes do, whose error is unknown.
        std_error: instead of a budget, the standard error in nats that each sample is to reach.
            A first stage of ``evaluations`` (default 32) calls fixes a sample's budget, and fresh
            draws alone give its value, so that stopping does not bias it; about three samples in
            four end at or below.  A budget never exceeds 64 passes over the chain.
        pilot: what was learned on other data (``Pilot.run``); without it strata grow with t and
            nothing is subtracted.

    Raises:
        ValueError: fewer than 2 evaluations, a standard error that is not positive; on
            ``estimate``, a pilot of another model.

    Examples:
        >>> from pyrodiff import ForwardChain, ReverseChain
        >>> from pyrodiff.denoisers import NoiseDenoiser
        >>> from pyrodiff.oracles import GaussianMixture
        >>> from pyrodiff.schedules import LogSNRSchedule
        >>> law = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.3)
        >>> forward = ForwardChain(LogSNRSchedule(5.0, -6.0), num_steps=100)
        >>> reverse = ReverseChain(NoiseDenoiser(law.network()), forward, (1,))  # exact denoiser
        >>> x_0 = law.sample(500, seed=1)
        >>> bound = TermwiseBound(evaluations=50).estimate(reverse, x_0, seed=0)
        >>> value, between_samples, monte_carlo = bound.mean()  # nats
        >>> bool(value < law.log_prob(x_0).mean() + 2 * monte_carlo), bound.kind
        (True, 'lower bound')
    """

    evaluations: int | None = None
    std_error: float | None = None
    pilot: Pilot | None = None

    def __post_init__(self) -> None:
        n, error = self.evaluations, self.std_error
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 2):
            raise ValueError(
                f"Expected evaluations to be an integer of at least 2, or None; got {n!r}."
            )
        if error is not None and not (error > 0 and math.isfinite(error)):
            raise ValueError(f"Expected std_error > 0, in nats, or None; got {error!r}.")

    def _check(self, reverse: ReverseChain) -> None:
        if self.pilot is not None:
            self.pilot.check(reverse)

    def _batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        scorer = _Scorer(reverse, batch, self.pilot)
        if self.std_error is not None:
            return self._two_stages(scorer)
        if self.evaluations is None:
            layout = every_step(scorer.start, reverse.num_steps)
        else:
            layout = scorer.layout(self.evaluations)
        value, variance, freedom, terms = scorer.score(layout, path=0)
        if scorer.reconstruction is not None:
            terms = torch.cat([scorer.reconstruction[:, None], terms], 1)
        return LogLikelihood(
            value,
            variance.sqrt(),
            "lower bound",
            torch.full(value.shape, layout.total),
            reverse.event_shape.numel(),
            repr(self),
            -terms,
            torch.cat([torch.ones(scorer.start - 1), layout.middle]),
            degrees_of_freedom=freedom,
            shared_calls=0 if self.pilot is None else self.pilot.calls,
        )

    def _two_stages(self, scorer: "_Scorer") -> LogLikelihood:
        """Budgets from a first stage; values from fresh draws."""
        assert self.std_error is not None
        first = self.evaluations or _FIRST_STAGE
        layout = scorer.layout(first)
        _, variance, freedom, _ = scorer.score(layout, path=0)
        budgets = _budgets(first, variance, freedom, self.std_error, scorer.reverse.num_steps)
        value, spread, dof = (torch.empty_like(variance) for _ in range(3))
        calls = torch.full(value.shape, layout.total)
        for budget in budgets.unique().tolist():
            some = (budgets == budget).nonzero().flatten()
            layout = scorer.layout(budget)
            found = scorer.take(some).score(layout, path=1)
            calls[some] += layout.total
            value[some], spread[some], dof[some] = found[:3]
        return LogLikelihood(
            value,
            spread.sqrt(),
            "lower bound",
            calls,
            scorer.reverse.event_shape.numel(),
            repr(self),
            degrees_of_freedom=dof,
            shared_calls=0 if self.pilot is None else self.pilot.calls,
        )


def _budgets(
    first: int, variance: Tensor, freedom: Tensor, target: float, num_steps: int
) -> Tensor:
    """Calls for the standard error ``target``, (n,): variance falls as 1/calls.

    Not fewer than the first stage's, whose strata may be finer than those of fewer calls.
    """
    from scipy import stats

    dof = freedom.numpy().clip(1.0)
    cautious = variance * torch.as_tensor(dof / stats.chi2.ppf(_CAUTION, dof))
    cautious = cautious.nan_to_num(nan=0.0, posinf=0.0)  # such a sample has failed: no calls for it
    wanted = (cautious * first / target**2).clamp(min=max(8, first))
    power = (wanted.log() / math.log(_GRID) - 1e-9).ceil()
    return (_GRID**power).round().clamp(max=_MOST * num_steps).long()


@dataclass(frozen=True, eq=False)
class _Scorer:
    """The estimate for some samples of a batch, once it is fixed where the calls go."""

    reverse: ReverseChain
    batch: Batch
    pilot: Pilot | None

    @cached_property
    def reconstruction(self) -> Tensor | None:
        """−E log p(x_0 | x_1) where the decoder explains x_0 without the network, (n,), nats."""
        x_0 = self.batch.x_0
        step = self.reverse.forward_chain.step(1, x_0, len(self.reverse.event_shape))
        known = self.reverse.decoder.expected_log_prob(x_0, step)
        return None if known is None else -known.flatten(1).sum(1)

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

    @property
    def start(self) -> int:
        """The first step that is drawn."""
        return 1 if self.reconstruction is None else 2

    def layout(self, calls: int) -> Layout:
        """Strata and draws by what the pilot knows, or else by the schedule alone."""
        if self.pilot is not None:
            return self.pilot.allocation(self.start).layout(calls)
        log_snr, size = self.reverse.forward_chain.log_snr, self.reverse.event_shape.numel()
        return typical_allocation(tuple(log_snr.tolist()), size, self.start).layout(calls)

    def take(self, some: Tensor) -> "_Scorer":
        """The scorer of some of the samples."""
        batch, context = self.batch, self.batch.context
        indices = [batch.indices[i] for i in some.tolist()]
        context = None if context is None else context[some]
        part = replace(batch, x_0=batch.x_0[some], context=context, indices=indices)
        return _Scorer(self.reverse, part, self.pilot)

    def score(self, layout: Layout, path: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, their variances, degrees of freedom, (n,), and mean terms per stratum, (n, S)."""
        none = torch.empty(len(self.batch), 0, dtype=torch.float64)
        draws = torch.cat([none, *self._draws(layout, path)], 1)
        mean, variance = _by_stratum(draws, layout)
        fixed = self.prior
        if self.reconstruction is not None:
            fixed = fixed + self.reconstruction
        if self.baseline is not None:
            mean = mean + _means(self.baseline, layout)
        value = -fixed - (mean * layout.width).sum(1)
        return value, variance.sum(1), _freedom(variance, layout.draws), mean

    def _draws(self, layout: Layout, path: int) -> Iterator[Tensor]:
        """L − b − γ·c for each sample and draw, in the order of the strata; blocks (n, c)."""
        batch, size = self.batch, self.reverse.event_shape.numel()
        # One normal beside the event's: its quantile is the place of t in the stratum.
        event, count = torch.Size([size + 1]), len(batch)
        streams = NoiseStreams(batch.seed, batch.indices, event, [path] * count)
        firsts = layout.first.repeat_interleave(layout.draws)
        widths = layout.width.repeat_interleave(layout.draws)
        together = max(1, _BLOCK_VALUES // (count * size), batch.rows // count)
        for start in range(0, len(firsts), together):
            first, width = (v[start : start + together] for v in (firsts, widths))
            normal = torch.stack([streams.normal(batch.x_0) for _ in first], 1)
            place = torch.special.ndtr(normal[..., size].double().cpu()) * width
            t = first + place.long().minimum(width - 1)
            noise = normal[..., :size].unflatten(2, self.reverse.event_shape)
            terms = self._terms(t, noise)
            if self.pilot is not None and self.baseline is not None:
                controls = self.pilot.controls.noise(self.prepared, t, noise).double().cpu()
                terms -= (controls * self.pilot.gamma[t - 1]).sum(2)
                terms -= self.baseline.gather(1, t - 1)
            yield terms

    def _terms(self, t: Tensor, noise: Tensor) -> Tensor:
        """L_t of each sample and draw, (n, c), float64 on the CPU."""
        batch, result = self.batch, torch.empty(t.shape, dtype=torch.float64)
        calls = max(1, batch.rows // len(batch))
        for start in range(0, t.shape[1], calls):
            some = slice(start, min(start + calls, t.shape[1]))
            repeats = some.stop - start
            x_0, context = batch.x_0, batch.context
            if repeats > 1:
                x_0 = x_0.repeat_interleave(repeats, 0)
                context = None if context is None else context.repeat_interleave(repeats, 0)
            part = noise[:, some].flatten(0, 1)
            terms = unchecked_term(self.reverse, x_0, t[:, some].flatten(), part, context)
            result[:, some] = terms.double().cpu().reshape(len(batch), repeats)
        batch.failures.add_terms(batch.indices, t, result)
        return result


def _means(curve: Tensor, layout: Layout) -> Tensor:
    """The mean of a curve over t, (n, T), in each stratum, (n, S)."""
    whole = torch.nn.functional.pad(curve.cumsum(1), (1, 0))
    last = layout.first + layout.width - 1
    return (whole[:, last] - whole[:, layout.first - 1]) / layout.width


def _by_stratum(draws: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean terms of the strata, and the variances of |s| times them, (n, S) each."""
    stratum = torch.arange(len(layout.draws)).repeat_interleave(layout.draws)
    mean = draws.new_zeros(len(draws), len(layout.draws)).index_add(1, stratum, draws)
    mean = mean / layout.draws
    squares = torch.zeros_like(mean).index_add(1, stratum, (draws - mean[:, stratum]).square())
    # one draw knows nothing of its spread: 0/0
    variance = squares / (layout.draws - 1) / layout.draws
    return mean, variance * layout.width.square()


def _freedom(variance: Tensor, draws: Tensor) -> Tensor:
    """Degrees of freedom of a sum of estimated variances, (n, S) to (n,).

    Satterthwaite (1946), with E of the squared estimates, σ⁴ (1 + 2/ν), corrected for.
    """
    freedom = (draws - 1).clamp(min=1)
    fourth = (variance.square() / (freedom + 2)).sum(1)
    return torch.where(
        fourth > 0, variance.sum(1).square() / fourth, max(1.0, float(freedom.sum()))
    )
