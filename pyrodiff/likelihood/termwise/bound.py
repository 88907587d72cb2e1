r"""The bound, term by term: −KL_T − Σ_t L_t with the sum over t taken in strata.

    Σ_{t∈s} L_t ≈ Σ_{t∈s} b_t + mean over draws t ~ μ/μ(s) in s, ε ~ N(0, I), of
                                μ(s)/μ_t (L_t − b_t − γ_t·c)

The strata s partition 1 … T, so the estimate is unbiased at any budget.  They and the density μ
follow from the chain alone (``strata``), or from a pilot on other data.  The pilot also says what
to subtract: control variates c of mean zero, and a baseline b whose sum is known (``controls``).
What follows of every term without the network is always subtracted (``known``), and so is what
half of the draws predict of the other half (``baseline``).  The variance of the estimate,
Σ_s s_s²/n_s, is estimated from n_s ≥ 2 draws.  A reconstruction that the decoder explains without
the network is computed, not drawn.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count, check_positive, renamed
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.result import LogLikelihood
from pyrodiff.likelihood.statistics import Summary
from pyrodiff.likelihood.termwise.known import known_terms
from pyrodiff.likelihood.termwise.pilot import Pilot
from pyrodiff.likelihood.termwise.scorer import Score, Scorer
from pyrodiff.likelihood.termwise.strata import every_step

__all__ = ["FEWEST_CALLS", "TermwiseBound"]

_FIRST_STAGE = 32  # calls that fix a sample's budget
_GRID = 2**0.25  # budgets are powers of it, so that samples of equal budgets share network calls
_MOST = 64  # passes over the whole chain that a sample's budget may amount to
_CAUTION = 0.25  # the chance that the first stage underestimates the variance
FEWEST_CALLS = 32  # for an interval of one sample
_FEWEST_EXPECTED = (
    1.3  # degrees of freedom, from a pilot: chosen by its own draws, an interval misses
)

_NO_ERROR = "Standard errors are NaN: one draw of each step does not tell its spread."
_FEW_CALLS = (
    f"Intervals are NaN below {FEWEST_CALLS} network calls per sample: so few draws know the mean "
    "square of the errors, not how they are distributed."
)
_HEAVY = (
    "Intervals are NaN: what the pilot leaves has tails that so few draws cannot know. More "
    "network calls would tell, or no pilot."
)


@renamed(evaluations="calls")
@dataclass(frozen=True)
class TermwiseBound(Estimator):
    """A lower bound on log p_θ(x_0), unbiased for the ELBO, from a budget of network calls.

    Args:
        calls: network calls per sample, at least 2; None for every t once, as published
            codes do, whose error is unknown.
        std_error: instead of a budget, the standard error in nats that each sample is to reach.
            A first stage of ``calls`` (default 32) fixes a sample's budget, and fresh
            draws alone give its value, so that stopping does not bias it; about three samples in
            four end at or below.  A budget never exceeds 64 passes over the chain.
        pilot: what was learned on other data (``Pilot.fit``).

    Intervals follow the skewness of the draws.  Below 32 calls, and where a pilot saw tails too
    heavy for so few draws, they are NaN (``remarks``): the standard error is right in mean square
    over samples there, but says little of a single one.

    Raises:
        ValueError: fewer than 2 calls, a standard error that is not positive; on
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
        >>> bound = TermwiseBound(calls=50).estimate(reverse, x_0, seed=0)
        >>> value, between_samples, monte_carlo = bound.mean()  # nats
        >>> bool(value < law.log_prob(x_0).mean() + 2 * monte_carlo), bound.kind
        (True, 'lower bound')
    """

    calls: int | None = None
    std_error: float | None = None
    pilot: Pilot | None = None

    def __post_init__(self) -> None:
        if self.calls is not None:
            check_count("calls", self.calls, 2)
        if self.std_error is not None:
            check_positive("std_error", self.std_error)

    def check(self, reverse: ReverseChain) -> None:
        if self.pilot is not None:
            self.pilot.check(reverse)

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        scorer = Scorer(reverse, batch, self.pilot, known_terms(reverse))
        if self.std_error is not None:
            return self._two_stages(scorer)
        if self.calls is None:
            layout = every_step(scorer.start, reverse.num_steps)
        else:
            layout = scorer.layout(_draws(self.calls, reverse))
        score = scorer.score(layout, path=0)
        terms, timesteps = score.terms, layout.middle
        if scorer.reconstruction is not None:
            terms = torch.cat([scorer.reconstruction[:, None], terms], 1)
            timesteps = torch.cat([torch.ones(1), timesteps])
        calls = torch.full(score.value.shape, layout.total)
        result = self._result(scorer, score, calls, calls)
        return replace(result, terms=-terms, timesteps=timesteps)

    def _two_stages(self, scorer: Scorer) -> LogLikelihood:
        """Budgets from a first stage, values from fresh draws."""
        assert self.std_error is not None
        first = self.calls or _FIRST_STAGE
        if self.calls is not None:
            first = _draws(self.calls, scorer.reverse)
        layout = scorer.layout(first)
        stage = scorer.score(layout, path=0)
        budgets = _budgets(first, stage, self.std_error, scorer.reverse.num_steps)
        columns = torch.empty(5, len(budgets), dtype=torch.float64)
        spent = torch.zeros_like(budgets)
        for budget in budgets.unique().tolist():
            rows = (budgets == budget).nonzero().flatten()
            fresh = scorer.layout(budget)
            spent[rows] = fresh.total
            columns[:, rows] = torch.stack(scorer.take(rows).score(fresh, path=1)[:5])
        score = Score._make([*columns.unbind(), stage.terms])
        return self._result(scorer, score, layout.total + spent, spent)

    def _result(self, scorer: Scorer, score: Score, calls: Tensor, spent: Tensor) -> LogLikelihood:
        """The result but for its terms; values were made of ``spent`` draws of ``calls`` in all."""
        few = (spent > 0) & (spent < FEWEST_CALLS)
        heavy = (spent > 0) & ~few & (score.expected < _FEWEST_EXPECTED)
        remarks = []
        if self.std_error is None and self.calls is None:
            remarks.append(_NO_ERROR)
        elif bool(few.any()):
            remarks.append(_FEW_CALLS)
        if bool(heavy.any()):
            remarks.append(_HEAVY)
        per_draw = scorer.reverse.calls_per_step
        freedom = score.freedom.masked_fill(few | heavy, torch.nan)
        summary = Summary(score.value, score.variance.sqrt(), freedom, "\n".join(remarks))
        return replace(
            self.result(scorer.reverse, summary, kind="lower bound", calls=calls * per_draw),
            skewness=score.skewness,
            shared_calls=0 if self.pilot is None else self.pilot.calls,
        )


def _draws(calls: int, reverse: ReverseChain) -> int:
    """How many terms so many network calls pay for.

    Raises:
        ValueError: fewer than two.
    """
    draws = calls // reverse.calls_per_step
    if draws < 2:
        raise ValueError(
            f"Expected calls to be an integer >= {2 * reverse.calls_per_step}, as a term takes "
            f"{reverse.calls_per_step} under {reverse.variance!r}; got {calls}."
        )
    return draws


def _budgets(first: int, stage: Score, target: float, num_steps: int) -> Tensor:
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
