"""Bounds from both sides on the model's own samples, against exact answers.

Stochastic tests are seeded.  Under fresh seeds a mean within 4 standard errors fails at 6e-5 a
comparison, one no more than 3 beyond its bound at 1.3e-3.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain, kernels
from pyrodiff.decoders import (
    CategoricalDecoder,
    Decoder,
    DiscretizedGaussianDecoder,
    GaussianDecoder,
)
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.likelihood.estimator import Batch
from pyrodiff.likelihood.paths.sandwich import Sandwich, SandwichBound
from pyrodiff.likelihood.paths.weights import path_weights
from pyrodiff.likelihood.statistics import log_mean_exp, log_mean_of_weights
from pyrodiff.networks import ResidualMLP
from pyrodiff.oracles import Gaussian, GridOracle, linear_bound, linear_log_prob
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.streams import NoiseStreams, derived_seed
from pyrodiff.variances import FixedLarge, FixedSmall, LearnedRange

F64 = torch.float64
COUNT = 3000
DECODERS = {
    "gaussian": GaussianDecoder(),
    "discretized": DiscretizedGaussianDecoder(0.25),
    "categorical": CategoricalDecoder(9),
}


class Scaled(nn.Module):
    """A share of the optimum's ε̂: affine still, and no posterior, so that weights vary."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, *rest: Tensor | None) -> Tensor:
        return 0.8 * self.network(x_t, *rest)


def affine_chain(start: float = -1.0, **parts) -> ReverseChain:
    mean = torch.tensor([0.5, -0.3], dtype=F64)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.61]], dtype=F64)
    denoiser = NoiseDenoiser(Scaled(Gaussian(mean, covariance).network()))
    return ReverseChain(denoiser, ForwardChain(LogSNRSchedule(start, -5.0), 6), (2,), **parts)


def mlp_chain(shape: tuple[int, ...] = (1,), **options) -> ReverseChain:
    torch.manual_seed(0)
    parts = {name: options.pop(name) for name in ("variance", "decoder") if name in options}
    network = ResidualMLP(shape, width=16, blocks=1, **options).double()
    with torch.no_grad():  # the last layer starts at zero
        for parameter in network.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    forward = ForwardChain(LogSNRSchedule(0.0, -3.0), 5)
    return ReverseChain(DataDenoiser(network), forward, shape, **parts)


@pytest.fixture(scope="module")
def sandwiches() -> dict[int, Sandwich]:
    """By K, of the same samples."""
    reverse = affine_chain()
    return {k: SandwichBound(k).estimate(reverse, COUNT, batch_size=COUNT) for k in (1, 4, 16)}


# -- the generating path -------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge(), LearnedRange()], ids=repr)
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_generating_weight_is_that_of_its_trajectory(variance: object, decoder: Decoder) -> None:
    """Evaluated in denoising order, through the posteriors, on the stored trajectory."""
    learned = variance.learned
    reverse = mlp_chain((2, 1), variance=variance, decoder=decoder, learned_variance=learned)
    result = SandwichBound(1).estimate(reverse, 50, seed=4)
    chain, states = reverse.forward_chain, reverse.sample(50, seed=4, trajectory=True)
    x_0, last = states[0], chain.num_steps
    expected = reverse.prior(x_0).log_prob(states[last])
    expected = expected - chain.marginal(x_0, last).log_prob(states[last])
    for t in range(last, 1, -1):
        q = kernels.posterior(states[t], x_0, chain.log_snr[t - 2], chain.log_snr[t - 1], 2)
        p = reverse.transition(states[t], t)
        expected = expected + p.log_prob(states[t - 1]) - q.log_prob(states[t - 1])
    expected = expected + reverse.decode(states[1]).log_prob(x_0)
    torch.testing.assert_close(result.upper.value, expected.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(result.x_0, x_0)


def test_generating_weight_in_single_precision() -> None:
    """Over 400 steps from a log-SNR of 8 no more than 5e-4 of some 50 nats is lost (1e-5 each)."""
    values = []
    for dtype in (F64, torch.float32):
        torch.manual_seed(0)
        network = ResidualMLP((16,), width=8, blocks=1).to(dtype)
        forward = ForwardChain(LogSNRSchedule(8.0, -6.0), 400)
        reverse = ReverseChain(DataDenoiser(network), forward, (16,))
        sandwich = SandwichBound(1).estimate(reverse, 20)
        assert sandwich.x_0.dtype == dtype and sandwich.upper.value.dtype == F64
        values.append(sandwich.upper.value)
    assert float((values[0] - values[1]).abs().max()) < 5e-4


# -- laws ----------------------------------------------------------------------------------------


def test_bounds_hold_an_affine_chain(sandwiches: dict[int, Sandwich]) -> None:
    for sandwich in sandwiches.values():
        exact = linear_log_prob(affine_chain(), sandwich.x_0)
        for bound, sign in ((sandwich.lower, 1), (sandwich.upper, -1)):
            slack = sign * (exact - bound.value)
            assert float(slack.mean()) > -3 * float(slack.std()) / math.sqrt(COUNT)


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_bounds_hold_a_grid(decoder: Decoder) -> None:
    reverse = mlp_chain(decoder=decoder, variance=LearnedRange(), learned_variance=True)
    sandwich = SandwichBound(4).estimate(reverse, COUNT, batch_size=COUNT)
    exact = GridOracle(reverse, -10, 10, 801).log_prob(sandwich.x_0)
    check_inverses(sandwich, exact)
    for bound, sign in ((sandwich.lower, 1), (sandwich.upper, -1)):
        slack = sign * (exact - bound.value)
        assert float(slack.mean()) > -3 * float(slack.std()) / math.sqrt(COUNT)


def check_inverses(sandwich: Sandwich, exact: Tensor) -> None:
    """The two laws that make them bounds: E Ẑ = p from below, E 1/Ẑ = 1/p from above."""
    for ratio in ((sandwich.lower.value - exact).exp(), (exact - sandwich.upper.value).exp()):
        error = float(ratio.std()) / math.sqrt(len(ratio))
        assert abs(float(ratio.mean()) - 1) < 4 * error < 0.12


def test_mean_weights_and_inverse_mean_weights_are_unbiased(
    sandwiches: dict[int, Sandwich],
) -> None:
    for sandwich in sandwiches.values():
        check_inverses(sandwich, linear_log_prob(affine_chain(), sandwich.x_0))


def test_gap_closes_with_particles(sandwiches: dict[int, Sandwich]) -> None:
    gaps = [sandwich.gap() for sandwich in sandwiches.values()]
    for wider, narrower in zip(gaps, gaps[1:], strict=False):
        error = math.hypot(wider.between_samples, narrower.between_samples)
        assert wider.value > narrower.value + 4 * error
    assert gaps[-1].value < 0.2 * gaps[0].value


def test_gap_is_above_the_looseness(sandwiches: dict[int, Sandwich]) -> None:
    for sandwich in sandwiches.values():
        exact = linear_log_prob(affine_chain(), sandwich.x_0)
        gap, looseness = sandwich.gap(), float((exact - sandwich.lower.value).mean())
        assert looseness < gap.value + 3 * gap.between_samples
        difference = sandwich.upper.value - sandwich.lower.value
        assert gap.value == pytest.approx(float(difference.mean()))
        assert gap.between_samples == pytest.approx(float(difference.std()) / math.sqrt(COUNT))
        assert math.isnan(gap.monte_carlo)


def test_one_path_is_the_bound_of_a_sample(sandwiches: dict[int, Sandwich]) -> None:
    sandwich = sandwiches[1]
    difference = sandwich.lower.value - linear_bound(affine_chain(), sandwich.x_0).elbo
    error = float(difference.std()) / math.sqrt(COUNT)
    assert abs(float(difference.mean())) < 4 * error
    single = SandwichBound(1).estimate(affine_chain(), 1)
    assert math.isnan(single.gap().between_samples)


# -- what a sample and its bounds depend on ------------------------------------------------------


def test_samples_are_those_of_the_chain_and_the_lower_bound_that_of_importance() -> None:
    reverse = mlp_chain((2,), context_size=3, dropout=0.5)
    context = torch.randn(20, 3, dtype=F64)
    reverse.train()
    result = SandwichBound(9).estimate(reverse, 20, seed=3, context=context)
    assert reverse.training
    reverse.eval()
    assert torch.equal(result.x_0, reverse.sample(20, seed=3, context=context))
    batch = Batch(result.x_0, context, range(20), derived_seed(3, 1), 64)
    with torch.no_grad():
        log_w = path_weights(reverse, batch, 9)
    lower = result.lower
    torch.testing.assert_close(lower.log_weights, log_w, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lower.value, log_mean_exp(log_w), rtol=1e-10, atol=1e-10)
    expected = log_mean_of_weights(log_w)
    options = {"rtol": 1e-8, "atol": 1e-10, "equal_nan": True}
    torch.testing.assert_close(lower.std_error, expected.std_error, **options)
    torch.testing.assert_close(lower.degrees_of_freedom, expected.degrees_of_freedom, **options)


def test_upper_bound_shares_all_paths_but_one() -> None:
    result = SandwichBound(5).estimate(affine_chain(), 7)
    assert torch.equal(result.upper.log_weights[:, 1:], result.lower.log_weights[:, :-1])
    assert result.lower.kind == "lower bound" and result.upper.kind == "upper bound"
    assert bool(result.upper.std_error.isnan().all())
    assert result.lower.network_evaluations == result.upper.network_evaluations == 5 * 6
    assert result.upper.estimator == repr(SandwichBound(5)) and result.upper.dimensions == 2


def test_values_do_not_depend_on_batches() -> None:
    reverse, context = mlp_chain((2,), context_size=3), torch.randn(20, 3, dtype=F64)
    reported: list[int] = []
    bound = SandwichBound(5)
    whole = bound.estimate(reverse, 20, seed=3, context=context, batch_size=64)
    for size in (1, 7):
        parts = bound.estimate(
            reverse,
            20,
            seed=3,
            context=context,
            batch_size=size,
            progress=lambda done, values: reported.append(done - len(values)),
        )
        for name in ("lower", "upper"):
            torch.testing.assert_close(
                getattr(parts, name).log_weights,
                getattr(whole, name).log_weights,
                rtol=1e-9,
                atol=1e-9,
            )
        torch.testing.assert_close(parts.x_0, whole.x_0, rtol=1e-10, atol=1e-10)
    assert reported == [0] * 23
    few = bound.estimate(reverse, 4, seed=3, context=context[:4])
    torch.testing.assert_close(few.upper.value, whole.upper.value[:4], rtol=1e-9, atol=1e-9)
    other = bound.estimate(reverse, 4, seed=4, context=context[:4])
    assert not bool((other.upper.value == few.upper.value).any())


def test_paths_are_independent_of_what_made_the_sample() -> None:
    """The noise of x_T in the generating path and in the first path from q is uncorrelated.

    A correlation of 3000 pairs has standard error 0.018; with the samples' own seed it is 1.
    """
    noise = [
        NoiseStreams(seed, range(COUNT), torch.Size([1])).normal(torch.empty(0)).flatten()
        for seed in (0, derived_seed(0, 1))
    ]
    assert abs(float(torch.corrcoef(torch.stack(noise))[0, 1])) < 0.073


def test_sandwich_refuses() -> None:
    with pytest.raises(ValueError, match="Expected particles to be an integer >= 1; got 0"):
        SandwichBound(0)
    bound, reverse = SandwichBound(2), affine_chain()
    with pytest.raises(ValueError, match="Expected num_samples to be an integer >= 1; got 0"):
        bound.estimate(reverse, 0)
    with pytest.raises(ValueError, match="Expected batch_size to be an integer >= 1; got 0"):
        bound.estimate(reverse, 2, batch_size=0)
    with pytest.raises(ValueError, match="Expected 2 contexts; got 3"):
        bound.estimate(reverse, 2, context=torch.zeros(3, 1))
