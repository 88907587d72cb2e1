"""Numbers that are not finite: one sample's value, named with its step, and no other's."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.decoders import CategoricalDecoder, Decoder, DiscretizedGaussianDecoder
from pyrodiff.denoisers import DataDenoiser
from pyrodiff.finite import NOTHING_FAILED, Failures, failed_at
from pyrodiff.likelihood import (
    Dequantized,
    ImportanceBound,
    LogLikelihood,
    ParticleBound,
    PathBound,
    ProbabilityFlow,
    SandwichBound,
    TermwiseBound,
    UniformDequantizer,
)
from pyrodiff.likelihood.estimator import Batch, Estimator
from pyrodiff.likelihood.flow.solver import solve
from pyrodiff.objectives import VariationalBound, variational_term
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.variances import LearnedDiagonal

F64 = torch.float64
STEPS, BAD_T, BAD = 10, 4, (3, 5)
CHAIN = ForwardChain(LogSNRSchedule(5.0, -5.0), STEPS)
ESTIMATORS: dict[str, Estimator] = {
    "termwise": TermwiseBound(),
    "two stages": TermwiseBound(std_error=5.0),
    "path": PathBound(2),
    "importance": ImportanceBound(3),
    "jackknife": ImportanceBound(3, jackknife=True),
    "particle": ParticleBound(3, threshold=1.0, compare=True),
    "flow": ProbabilityFlow("scaled"),
    "random flow": ProbabilityFlow(exact_up_to=0),
    "dequantized": Dequantized(PathBound(1), UniformDequantizer(0.1), draws=2),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


class Faulty(nn.Module):
    """0.5 x, but ``fault`` where a sample's context says so and the log-SNR is that of t = 4.

    With ``beyond`` also at smaller ones, lest a solver step over it.
    """

    def __init__(self, fault: float = math.nan, outputs: int = 1, beyond: bool = False):
        super().__init__()
        self.fault, self.outputs, self.beyond = fault, outputs, beyond

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        at = time < CHAIN.log_snr[BAD_T - 1] + 0.2
        if not self.beyond:
            at &= time > CHAIN.log_snr[BAD_T - 1] - 0.2
        bad = (at & (context[:, 0] > 0))[:, None]
        output = torch.where(bad, self.fault, 0.5 * x)
        if self.outputs == 1:
            return output
        return torch.cat([0.5 * x, torch.where(bad, self.fault, torch.zeros_like(x))], 1)


def data() -> tuple[Tensor, Tensor]:
    """Eight samples, of which those with the index 3 and 5 fail."""
    context = torch.zeros(8, 1, dtype=F64)
    context[list(BAD)] = 1.0
    return torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64), context


def model(fault: float = math.nan, beyond: bool = False, **parts: object) -> ReverseChain:
    return ReverseChain(DataDenoiser(Faulty(fault, beyond=beyond)), CHAIN, (2,), **parts)


# -- estimates -----------------------------------------------------------------------------------


@every_estimator
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf, 1e200])
def test_a_failure_is_named_and_no_other_value_changes(name: str, fault: float) -> None:
    """1e200 is finite, its square is not."""
    (x_0, context), bound = data(), ESTIMATORS[name]
    options = {"indices": range(100, 108), "seed": 1, "batch_size": 14}
    with pytest.warns(UserWarning) as caught:
        found = bound.estimate(model(fault, "flow" in name), x_0, context=context, **options)
    messages = [str(warning.message) for warning in caught]
    step = rf"\(t = {BAD_T}\)"
    expected = rf"for 2 of \d samples, with the index 103 {step}, 105 {step}\. Their values are NaN"
    assert any(re.search(expected, message) for message in messages), messages
    assert found.value.isnan().nonzero().flatten().tolist() == list(BAD)
    assert bool(found.std_error[list(BAD)].isnan().all())
    sound = bound.estimate(model(0.0), x_0, context=torch.zeros_like(context), **options)
    good = [i for i in range(8) if i not in BAD]
    torch.testing.assert_close(found.value[good], sound.value[good], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["termwise", "path", "importance", "particle"])
def test_a_variance_that_no_precision_holds_is_a_failure(name: str) -> None:
    """e⁻¹⁰⁰⁰⁰ is: its inverse is infinite.  e¹⁰⁰⁰⁰ only explains nothing, at ½ d 10⁴ nats."""
    (x_0, context), bound = data(), ESTIMATORS[name]
    wide = ReverseChain(DataDenoiser(Faulty(1e4, 2)), CHAIN, (2,), LearnedDiagonal())
    values = bound.estimate(wide, x_0, context=context).value[list(BAD)]
    assert bool(((values < -9_500) & (values > -10_500)).all())  # all else is some 100 nats
    reverse = ReverseChain(DataDenoiser(Faulty(-1e4, 2)), CHAIN, (2,), LearnedDiagonal())
    with pytest.warns(UserWarning, match=rf"2 of 8 samples, with the index 3 \(t = {BAD_T}\), 5 "):
        found = bound.estimate(reverse, x_0, context=context)
    assert found.value.isnan().nonzero().flatten().tolist() == list(BAD)


def test_data_whose_squares_single_precision_does_not_hold_have_a_value() -> None:
    x_0, context = data()
    large = x_0.float() * 1e25
    found = PathBound(2).estimate(model(), large, context=torch.zeros_like(context))
    assert bool(found.value.isfinite().all()) and float(found.value.max()) < -1e45


class Opaque(Estimator):
    """Values that are not finite, at steps that nobody knows."""

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        value = torch.tensor([1.0, math.inf, math.nan, -math.inf])
        return LogLikelihood(value, torch.ones(4), "estimate", torch.ones(4).long(), 2, "opaque")


def test_an_estimator_of_ones_own_fails_the_same_way() -> None:
    with pytest.warns(UserWarning, match=r"for 3 of 4 samples, with the index 1, 2, 3\. Their"):
        found = Opaque().estimate(model(), torch.zeros(4, 2))
    assert found.value.isnan().tolist() == found.std_error.isnan().tolist() == [False] + 3 * [True]


def test_contexts_must_be_finite() -> None:
    x_0, context = data()
    context[6] = math.nan
    expected = r"Expected finite contexts; got NaN or infinity in 1 of 8 .* first at index 6"
    reverse, noise = model(), torch.zeros_like(x_0)
    for refused in (
        lambda: PathBound(1).estimate(reverse, x_0, context=context),
        lambda: variational_term(reverse, x_0, 1, noise, context),
        lambda: VariationalBound()(reverse, CHAIN)(x_0, context),
        lambda: reverse(x_0, context),
        lambda: reverse.sample(context=context),
        lambda: SandwichBound(2).estimate(reverse, 8, context=context),
    ):
        with pytest.raises(ValueError, match=expected):
            refused()


# -- means ---------------------------------------------------------------------------------------


def result(*values: float) -> LogLikelihood:
    value = torch.tensor(values, dtype=F64)
    error = torch.full_like(value, 0.3).masked_fill(~value.isfinite(), torch.nan)
    return LogLikelihood(value, error, "lower bound", torch.ones(len(value)).long(), 4, "by hand")


def test_means_are_over_the_others_and_say_so() -> None:
    expected = result(-3.0, -5.0)
    broken = result(-3.0, math.nan, -5.0, math.inf)
    match = r"NaN or infinity for 2 of 4 samples, the first at position 1\. The mean is over the o"
    with pytest.warns(UserWarning, match=match):
        assert broken.mean() == expected.mean()
    with pytest.warns(UserWarning, match=match):
        assert broken.bits_per_dim() == expected.bits_per_dim()
    value, between, monte_carlo = expected.mean()
    assert (value, between) == (-4.0, 1.0)
    assert monte_carlo == pytest.approx(0.3 / math.sqrt(2), rel=1e-12)


def test_a_mean_over_none_is_unknown() -> None:
    with pytest.warns(UserWarning, match="for 2 of 2 samples"):
        assert all(math.isnan(part) for part in result(math.nan, math.nan).mean())


def test_an_unknown_error_of_a_known_value_is_no_failure() -> None:
    unknown = replace(result(-3.0, -5.0), std_error=torch.full((2,), math.nan))
    assert unknown.mean().value == -4.0 and math.isnan(unknown.mean().monte_carlo)


# -- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decoder", [None, DiscretizedGaussianDecoder(0.5), CategoricalDecoder(5)], ids=repr
)
def test_samples_that_failed_are_nan(decoder: Decoder | None) -> None:
    """Also where the decoder makes a level of anything."""
    _, context = data()
    parts = {} if decoder is None else {"decoder": decoder}
    match = rf"for 2 of 8 samples, with the index 3 \(t = {BAD_T}\), 5 \(t = {BAD_T}\)\. They are N"
    with pytest.warns(UserWarning, match=match):
        found = model(**parts).sample(context=context, seed=0, batch_size=3, trajectory=True)
    sound = model(**parts).sample(context=torch.zeros_like(context), seed=0, trajectory=True)
    bad = found.isnan().any(-1)
    assert bad[:BAD_T, list(BAD)].all() and int(bad.sum()) == BAD_T * len(BAD)
    assert torch.equal(found[~bad], sound[~bad])


def test_a_sandwich_names_samples_that_failed() -> None:
    _, context = data()
    match = rf"for 2 of 8 samples, with the index 3 \(t = {BAD_T}\), 5 "
    with pytest.warns(UserWarning, match=match):
        found = SandwichBound(3).estimate(model(), 8, context=context)
    for bound in (found.lower, found.upper):
        assert bound.value.isnan().nonzero().flatten().tolist() == list(BAD)


# -- the parts -----------------------------------------------------------------------------------


def test_the_first_step_counts() -> None:
    failed = failed_at(NOTHING_FAILED, 9, torch.tensor([1.0, math.nan, 2.0]))
    failed = failed_at(failed, 8, torch.tensor([[1.0, 2.0], [math.inf, 0.0], [-math.inf, 1.0]]))
    assert failed.tolist() == [0, 9, 8]


def test_many_failures_make_one_short_warning() -> None:
    failures = Failures()
    failures.add(range(20, 40), torch.arange(20) % 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failures.warn(100, "So it is.")
        Failures().warn(100, "Nothing.")
    (message,) = [str(warning.message) for warning in caught]
    assert "for 13 of 100 samples, with the index 21 (t = 1), 22 (t = 2), 24 " in message
    assert message.endswith("27 (t = 1), …. So it is.")


def test_a_solver_loses_rows_whose_slope_is_not_finite() -> None:
    """dy/dt = −1/y from 1 ends at t = ½, NaN beyond; a sound neighbour; a row lost at once."""

    def slope(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows[:, None] == 1, y, -y.log().exp().reciprocal())

    y = torch.tensor([[1.0], [1.0], [-1.0]], dtype=F64)
    found = solve(slope, y, 0.0, 2.0, 1e-6, 1e-6, 1000)
    assert found.y.isnan().flatten().tolist() == [True, False, True]
    assert float(found.y[1]) == pytest.approx(math.exp(2.0), rel=1e-4)
    assert float(found.lost_at[0]) == pytest.approx(0.5, abs=1e-4)
    assert float(found.lost_at[2]) == 0.0 and math.isnan(float(found.lost_at[1]))
