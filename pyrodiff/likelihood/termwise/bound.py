r"""The bound, term by term: −KL_T − Σ_t L_t with the sum over t taken in strata.

    Σ_{t∈s} L_t ≈ Σ_{t∈s} b_t + mean over draws t ~ μ/μ(s) in s, ε ~ N(0, I), of
                                μ(s)/μ_t (L_t − b_t − γ_t·c)

The strata s partition 1 … T, so the estimate is unbiased at any budget.  They and the density μ
follow the chain (``layout``), or what a pilot found on other data, which also says what is
subtracted: control variates c of mean zero, and a baseline b whose sum is known (``controls``).
What is known of every term without the network is subtracted always (``known``), as is what half
of the draws say of the other half (``baseline``).  The variance Σ_s s_s²/n_s of the estimate is
known from n_s ≥ 2 draws.  A reconstruction that the decoder explains without the network is
computed, not drawn.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.termwise.baseline import baseline_curves, shared_error, subtract_baseline
from pyrodiff.likelihood.termwise.controls import Prepared
from pyrodiff.likelihood.termwise.known import KnownTerms, known_terms
from pyrodiff.likelihood.termwise.moments import Moments
from pyrodiff.likelihood.termwise.pilot import Pilot
from pyrodiff.likelihood.termwise.strata import Allocation, Layout, every_step, typical_allocation
from pyrodiff.objectives import unchecked_term
from pyrodiff.streams import NoiseStreams

__all__ = ["FEWEST_CALLS", "TermwiseBound"]

_FIRST_STAGE = 32  # calls that fix a sample's budget
_GRID = 2**0.25  # budgets are powers of it, so that samples of equal budgets work together
_MOST = 64  # passes over the whole chain that a sample's budget may amount to
_BLOCK_VALUES = 2**17  # noise that is worked on at a time: it fits a processor's cache
_CAUTION = 0.25  # chance that the first stage underrates the variance that it plans for
FEWEST_CALLS = 32  # for an interval of one sample
_FEWEST_EXPECTED = 1.3  # degrees of freedom, by a pilot: a sample's own draws may not choose

_NO_ERROR = "Standard errors are NaN: one draw of each step does not know its spread."
_FEW_CALLS = (
    f"Intervals are NaN below {FEWEST_CALLS} network calls per sample: so few draws know the mean "
    "square of the errors, not how they are distributed."
)
_HEAVY = (
    "Intervals are NaN: what the pilot leaves has tails that so few draws cannot know. More "
    "network calls would tell, or no pilot."
)


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
        pilot: what was learned on other data (``Pilot.run``).

    Intervals are skewed as the draws are.  Below 32 calls, and where a pilot saw tails that so few
    draws cannot know, they are NaN (``remarks``): the error itself, right in mean square over
    samples, says little of one sample there.

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
        score = scorer.score(layout, path=0)
        terms, timesteps = score.terms, layout.middle
        if scorer.reconstruction is not None:
            terms = torch.cat([scorer.reconstruction[:, None], terms], 1)
            timesteps = torch.cat([torch.ones(1), timesteps])
        calls = torch.full(score.value.shape, layout.total)
        result = self._result(scorer, score, calls, calls)
        return replace(result, terms=-terms, timesteps=timesteps)

    def _two_stages(self, scorer: "_Scorer") -> LogLikelihood:
        """Budgets from a first stage; values from fresh draws."""
        assert self.std_error is not None
        first = self.evaluations or _FIRST_STAGE
        layout = scorer.layout(first)
        stage = scorer.score(layout, path=0)
        budgets = _budgets(first, stage, self.std_error, scorer.reverse.num_steps)
        columns = torch.empty(5, len(budgets), dtype=torch.float64)
        spent = torch.zeros_like(budgets)
        for budget in budgets.unique().tolist():
            some = (budgets == budget).nonzero().flatten()
            fresh = scorer.layout(budget)
            spent[some] = fresh.total
            columns[:, some] = torch.stack(scorer.take(some).score(fresh, path=1)[:5])
        value, variance, freedom, skewness, expected = columns.unbind()
        score = _Score(value, variance, freedom, skewness, expected, stage.terms)
        return self._result(scorer, score, layout.total + spent, spent)

    def _result(
        self, scorer: "_Scorer", score: "_Score", calls: Tensor, spent: Tensor
    ) -> LogLikelihood:
        """The result but for its terms; ``spent`` are the calls that the values were made of."""
        std_error, freedom = score.variance.sqrt(), score.freedom
        few = (spent > 0) & (spent < FEWEST_CALLS)
        heavy = (spent > 0) & ~few & (score.expected < _FEWEST_EXPECTED)
        remarks = []
        if self.std_error is None and self.evaluations is None:
            remarks.append(_NO_ERROR)
        elif bool(few.any()):
            remarks.append(_FEW_CALLS)
        if bool(heavy.any()):
            remarks.append(_HEAVY)
        return LogLikelihood(
            score.value,
            std_error,
            "lower bound",
            calls,
            scorer.reverse.event_shape.numel(),
            repr(self),
            degrees_of_freedom=freedom.masked_fill(few | heavy, torch.nan),
            skewness=score.skewness,
            shared_calls=0 if self.pilot is None else self.pilot.calls,
            remarks="\n".join(remarks),
        )


def _budgets(first: int, stage: "_Score", target: float, num_steps: int) -> Tensor:
    """Calls for the standard error ``target``, (n,): variance falls as 1/calls.

    Not fewer than the first stage's, whose strata may be finer than those of fewer calls.
    """
    from scipy import stats

    dof = stage.freedom.numpy().clip(2.0)  # with fewer, chance alone would ask for the most
    cautious = stage.variance * torch.as_tensor(dof / stats.chi2.ppf(_CAUTION, dof))
    cautious = cautious.nan_to_num(nan=0.0, posinf=0.0)  # such a sample has failed: no calls for it
    needed = (cautious * first / target**2).clamp(min=max(8, first))
    power = (needed.log() / math.log(_GRID) - 1e-9).ceil()
    return (_GRID**power).round().clamp(max=_MOST * num_steps).long()


class _Score(NamedTuple):
    """Of n samples, (n,) each but for the last."""

    value: Tensor
    variance: Tensor
    freedom: Tensor
    skewness: Tensor
    expected: Tensor
    """The degrees of freedom that a pilot expects."""
    terms: Tensor
    """Per step, shape (n, S)."""


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
        step = self.reverse.step(1, x_0)
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

    @cached_property
    def known(self) -> KnownTerms:
        """k, w and λ at every t."""
        return known_terms(self.reverse)

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
        """Where calls go, by what the pilot knows, or else by the chain alone."""
        if self.pilot is not None:
            return self.pilot.allocation(self.start)
        log_snr, unit = (tuple(v.tolist()) for v in (self.known.log_snr, self.known.unit))
        return typical_allocation(log_snr, unit, self.start)

    def layout(self, calls: int) -> Layout:
        """Strata and draws of so many network calls."""
        return self.allocation.layout(calls)

    def take(self, some: Tensor) -> "_Scorer":
        """The scorer of some of the samples."""
        batch, context = self.batch, self.batch.context
        indices = [batch.indices[i] for i in some.tolist()]
        context = None if context is None else context[some]
        part = replace(batch, x_0=batch.x_0[some], context=context, indices=indices)
        return _Scorer(self.reverse, part, self.pilot)

    def score(self, layout: Layout, path: int) -> _Score:
        """The estimate from one layout's draws, which are those of the stream ``path``."""
        none = torch.empty(3, len(self.batch), 0, dtype=torch.float64)
        values, t, factor = torch.cat([none, *self._draws(layout, path)], 2)
        pilot, drawn = self.pilot, (values, t.long(), factor)
        as_it_is = pilot is not None and pilot.knows_curves(self.start)
        draws = subtract_baseline(*drawn, layout, self.curves, as_it_is)
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
        variance, freedom = moments.variance.sum(1), moments.freedom
        expected = torch.full_like(value, expected_freedom)
        return _Score(value, variance, freedom, -moments.skewness, expected, sums / layout.width)

    def _draws(self, layout: Layout, path: int) -> Iterator[Tensor]:
        """f (L − k − γ·c), t and f of the draws, in the order of the strata; (3, n, c)."""
        batch, size = self.batch, self.reverse.event_shape.numel()
        # One normal beside the event's: its quantile is the place of t in the stratum.
        event, count = torch.Size([size + 1]), len(batch)
        streams = NoiseStreams(batch.seed, batch.indices, event, [path] * count)
        together = max(1, _BLOCK_VALUES // (count * size), batch.rows // count)
        for start in range(0, layout.total, together):
            some = slice(start, min(start + together, layout.total))
            normal = torch.stack([streams.normal(batch.x_0) for _ in layout.stratum[some]], 1)
            place = torch.special.ndtr(normal[..., size].double().cpu())
            t, factor = self.allocation.draw(layout, some, place)
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
