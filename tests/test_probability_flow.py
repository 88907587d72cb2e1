"""The probability flow against exact log p, and its solver's order and row-wise steps.

Stochastic tests are seeded.  Under fresh seeds a mean within 4 standard errors fails at 6e-5 a
comparison.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.decoders import CategoricalDecoder, Decoder, DiscretizedGaussianDecoder
from pyrodiff.denoisers import DataDenoiser, MeanDenoiser, NoiseDenoiser, VelocityDenoiser
from pyrodiff.likelihood.flow.density import ProbabilityFlow, divergence
from pyrodiff.likelihood.flow.solver import solve, step
from pyrodiff.networks import ResidualMLP
from pyrodiff.oracles import Gaussian, GaussianMixture, Product
from pyrodiff.schedules import LogSNRSchedule, Schedule

F64 = torch.float64
DENOISERS = {"noise": NoiseDenoiser, "data": DataDenoiser, "velocity": VelocityDenoiser}


def gaussian() -> Gaussian:
    root = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.4, 0.2, 0.7]], dtype=F64)
    return Gaussian(torch.tensor([0.5, -0.3, 0.1], dtype=F64), root @ root.T)


def mixture(size: int) -> GaussianMixture:
    means = torch.linspace(-1.5, 1.5, 3 * size, dtype=F64).reshape(size, 3).T.contiguous()
    means[:, ::2] *= -1
    weights, scales = torch.tensor([[0.3, 0.5, 0.2], [0.4, 0.3, 0.6]], dtype=F64)
    return GaussianMixture(weights, means, scales)


LAWS = {
    "gaussian 3": gaussian(),
    "mixture 1": mixture(1),
    "mixture 2": mixture(2),
    "product 4": Product(mixture(1), gaussian()),
}


def exact_chain(
    law: Gaussian | GaussianMixture | Product,
    prediction: str = "noise",
    schedule: Schedule | None = None,
    steps: int = 8,
) -> ReverseChain:
    """The chain whose denoiser is optimal; λ_T = −36 leaves x_T without a trace of the data."""
    forward = ForwardChain(LogSNRSchedule(18.0, -36.0) if schedule is None else schedule, steps)
    return ReverseChain(DENOISERS[prediction](law.network(prediction)), forward, law.event_shape)


def mlp_chain(
    size: int = 2,
    decoder: Decoder | None = None,
    maximum: float = 8.0,
    clip: tuple[float, float] | None = None,
    **options: int,
) -> ReverseChain:
    network = ResidualMLP((size,), width=16, blocks=1, **options).double()
    with torch.no_grad():  # the last layer starts at zero
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    forward = ForwardChain(LogSNRSchedule(maximum, -6.0), 10)
    return ReverseChain(VelocityDenoiser(network, clip=clip), forward, (size,), decoder=decoder)


# -- the solver ----------------------------------------------------------------------------------


def pendulum(t: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
    """dy/dt = (y_2 + sin t, −sin y_1), neither linear nor autonomous."""
    return torch.stack([y[:, 1] + t.sin(), -y[:, 0].sin()], 1)


def states(n: int) -> Tensor:
    return torch.linspace(-1, 2, 2 * n, dtype=F64).reshape(n, 2)


def test_steps_have_order_five() -> None:
    reference = solve(pendulum, states(3), 0.0, 2.0, 1e-13, 1e-13, 10_000).y
    errors, estimates = [], []
    for count in (32, 64, 128):
        y, h = states(3), torch.full((3,), 2.0 / count, dtype=F64)
        first = pendulum(0 * h, y)
        for i in range(count):
            y, first, estimate = step(pendulum, i * h, y, first, h)
            if i == 0:
                estimates.append(float(estimate.abs().max()))
        errors.append(float((y - reference).abs().max()))
        torch.testing.assert_close(first, pendulum(count * h, y))
    for result in (errors, estimates):  # those after one step are of the fourth-order member
        assert math.log2(result[0] / result[1]) == pytest.approx(5, abs=0.5)
        assert math.log2(result[1] / result[2]) == pytest.approx(5, abs=0.3)


def test_error_is_proportional_to_the_tolerance() -> None:
    exact = solve(pendulum, states(3), 0.0, 5.0, 1e-13, 1e-13, 10_000).y
    errors = []
    for tolerance in (1e-5, 1e-7, 1e-9):
        result = solve(pendulum, states(3), 0.0, 5.0, tolerance, tolerance, 1000).y
        errors.append(float((result - exact).abs().max()))
        assert errors[-1] < 10 * tolerance
    slope = math.log10(errors[0] / errors[-1]) / 4
    assert slope == pytest.approx(1, abs=0.15)


def test_rows_take_their_own_steps() -> None:
    """y' = −r y for r of 0.1 to 100: a row's answer and cost are those that it has alone."""
    rate = torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=F64)
    y = torch.ones(4, 1, dtype=F64)
    sizes = []

    def decay(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return -rate[rows, None] * y

    result = solve(decay, y, 0.0, 2.0, 1e-8, 1e-10, 1000)
    torch.testing.assert_close(result.y[:, 0], (-2 * rate).exp(), rtol=1e-6, atol=1e-8)
    assert sum(sizes) == int(result.calls.sum()) and bool((result.calls.diff() > 0).all())
    assert bool((result.calls % 6 == 1).all())
    assert sizes[0] == 4 and sizes[-1] == 1  # those that have arrived are not asked for again
    for i in range(4):
        alone = solve(lambda t, y, rows, i=i: -rate[i] * y, y[:1], 0.0, 2.0, 1e-8, 1e-10, 1000)
        torch.testing.assert_close(alone.y[0], result.y[i], rtol=1e-12, atol=1e-12)
        assert int(alone.calls) == int(result.calls[i])


def test_solver_runs_backwards_and_stands_still() -> None:
    y = solve(pendulum, states(2), 0.0, 3.0, 1e-10, 1e-10, 1000).y
    back = solve(pendulum, y, 3.0, 0.0, 1e-10, 1e-10, 1000).y
    torch.testing.assert_close(back, states(2), rtol=0, atol=1e-8)
    still = solve(pendulum, y, 3.0, 3.0, 1e-10, 1e-10, 1000)
    assert torch.equal(still.y, y) and still.calls.tolist() == [0, 0]


def test_solver_says_where_it_stopped() -> None:
    with pytest.raises(ValueError, match=r"every sample to arrive at 3 within max_steps=2; got 2 "):
        solve(pendulum, states(2), 0.0, 3.0, 1e-10, 1e-10, 2)
    with pytest.raises(ValueError, match=r"got 1 on their way, the first at .* with steps of"):
        # the first row is easy and arrives
        rate = torch.tensor([[0.0], [-1e4]], dtype=F64)
        solve(lambda t, y, rows: rate[rows] * y, states(2)[:, :1], 0.0, 1.0, 1e-3, 1e-3, 50)


# -- divergences ---------------------------------------------------------------------------------


def test_divergence_is_the_trace_of_the_jacobian() -> None:
    """Exact; and the mean of 4000 random ones within 4 standard errors, with signs alone."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 4)).double()

    def function(x: Tensor) -> Tensor:
        return network(x).reshape(x.shape)

    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    exact = divergence(function(x), x, None)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(function, x[i : i + 1].detach())
        torch.testing.assert_close(exact[i], jacobian.reshape(4, 4).trace())
    copies = x[:1].detach().expand(4000, 2, 2).clone().requires_grad_()
    probe = torch.randint(0, 2, copies.shape).to(F64) * 2 - 1
    result = divergence(function(copies), copies, probe)
    error = float(result.std()) / math.sqrt(len(result))
    assert 0 < error < 0.1 and abs(float(result.mean() - exact[0])) < 4 * error


# -- the estimate against the exact log p --------------------------------------------------------


@pytest.mark.parametrize("prediction", DENOISERS)
@pytest.mark.parametrize("law", LAWS)
def test_scaled_value_is_the_exact_log_p(law: str, prediction: str) -> None:
    """Up to the solver's error and the blur of e^{−18} ε: (d² log p)/2 e^{−18} < 1e-6."""
    oracle = LAWS[law]
    x_0 = oracle.sample(16, seed=1)
    flow = ProbabilityFlow("scaled", rtol=1e-7, atol=1e-7)
    result = flow.estimate(exact_chain(oracle, prediction), x_0)
    torch.testing.assert_close(result.value, oracle.log_prob(x_0), rtol=0, atol=3e-6)
    assert result.kind == "estimate" and result.dimensions == x_0.shape[1]
    assert torch.equal(result.std_error, torch.zeros(16, dtype=F64))
    assert result.log_weights is None and result.degrees_of_freedom is None
    low, high = result.interval()
    assert torch.equal(low, result.value) and torch.equal(high, result.value)


def test_a_deterministic_value_takes_one_solve() -> None:
    x_0 = gaussian().sample(3, seed=1)
    result = [
        ProbabilityFlow("scaled", particles=draws).estimate(exact_chain(gaussian()), x_0)
        for draws in (1, 5)
    ]
    assert torch.equal(result[0].calls, result[1].calls)
    assert torch.equal(result[0].value, result[1].value)


def test_error_falls_with_the_tolerance() -> None:
    oracle = mixture(2)
    x_0, errors = oracle.sample(16, seed=1), []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6):
        flow = ProbabilityFlow("scaled", rtol=tolerance, atol=tolerance)
        result = flow.estimate(exact_chain(oracle), x_0).value
        errors.append(float((result - oracle.log_prob(x_0)).abs().mean()))
        assert errors[-1] < 30 * tolerance
    assert all(fine < coarse / 4 for coarse, fine in itertools.pairwise(errors))


def test_scaled_bias_is_of_the_order_of_the_first_variance() -> None:
    """The law blurred with e^{−λ_1/2} ε has log p known exactly: a Gaussian of larger variance."""
    oracle, tight = gaussian(), {"rtol": 1e-7, "atol": 1e-7}
    x_0 = oracle.sample(8, seed=1)
    for first in (2.0, 6.0):
        reverse = exact_chain(oracle, schedule=LogSNRSchedule(first, -36.0))
        blurred = oracle.covariance + math.exp(-first) * torch.eye(3, dtype=F64)
        expected = Gaussian(oracle.mean, blurred).log_prob(x_0)
        result = ProbabilityFlow("scaled", **tight).estimate(reverse, x_0).value
        torch.testing.assert_close(result, expected, rtol=0, atol=3e-6)


def test_variational_value_is_the_exact_log_p() -> None:
    """λ_1 = 8: no higher than log p, and lower by O(e^{−8}), within 4 standard errors.

    Where the exact posterior of x_0 given x_1 has a variance of σ_1² (1 + O(σ_1²)), so has the
    decoder; the gap of the bound is of second order in their difference.
    """
    oracle = mixture(2)
    x_0 = oracle.sample(24, seed=1)
    reverse = exact_chain(oracle, schedule=LogSNRSchedule(8.0, -36.0))
    result = ProbabilityFlow(particles=16, rtol=1e-6, atol=1e-6).estimate(reverse, x_0)
    difference = result.value - oracle.log_prob(x_0)
    error = result.mean().monte_carlo
    assert -4 * error - 2e-4 < float(difference.mean()) < 4 * error + 1e-5
    # Student's t with 15 degrees of freedom: 8 standard errors are passed at 1e-6 a sample
    assert bool((difference.abs() < 8 * result.std_error + 1e-4).all())
    assert result.degrees_of_freedom is not None and bool((result.degrees_of_freedom <= 15).all())
    assert result.log_weights is not None and result.log_weights.shape == (24, 16)
    torch.testing.assert_close(result.value, result.log_weights.mean(1))
    torch.testing.assert_close(result.std_error, result.log_weights.std(1) / 4)


def test_random_divergence_has_the_exact_mean() -> None:
    """Within 4 standard errors, over 300 probes; the scaled offset has no other noise."""
    torch.manual_seed(3)
    reverse, x_0 = mlp_chain(4), torch.randn(3, 4, dtype=F64)
    exact = ProbabilityFlow("scaled").estimate(reverse, x_0).value
    result = ProbabilityFlow("scaled", particles=300, exact_up_to=3).estimate(reverse, x_0)
    assert bool((result.std_error > 1e-4).all()) and bool((result.std_error < 0.1).all())
    assert bool(((result.value - exact).abs() < 4 * result.std_error).all())
    assert result.degrees_of_freedom is not None and 200 < result.degrees_of_freedom[0] <= 299


# -- laws of any network -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "maximum", "tolerance"), [(None, 14.0, 2e-5), ((-0.7, 0.9), 6.0, 0.01)]
)
def test_density_of_any_network_integrates_to_one(
    clip: tuple[float, float] | None, maximum: float, tolerance: float
) -> None:
    """Where x̂_0 is clipped the density jumps, and peaks over σ_1 at the bounds.

    Each jump, of up to 1.3, costs the trapezoids up to half a spacing, 0.005 times its height;
    with 16201 points instead of 1801 the error is 1e-5.
    """
    reverse = mlp_chain(1, maximum=maximum, clip=clip)
    grid = torch.linspace(-9, 9, 1801, dtype=F64)
    flow = ProbabilityFlow("scaled", rtol=1e-6, atol=1e-6)
    density = flow.estimate(reverse, grid[:, None], batch_size=2000).value.exp()
    assert float(density[[0, -1]].max()) < 1e-9
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize(
    "decoder", [CategoricalDecoder(4), DiscretizedGaussianDecoder(2 / 3, scale=0.3)]
)
def test_probabilities_sum_to_one(decoder: Decoder) -> None:
    """The mean weights, without bias, within 4 standard errors; the bounds to no more.

    x̂_0 is kept among the levels and λ_1 = 1, so that q(x_1 | x_0) reaches wherever the model puts
    x_1: else the few largest weights, which 300 draws do not find, carry the mean.
    """
    reverse = mlp_chain(1, decoder, maximum=1.0, clip=(-1.0, 1.0))
    levels = torch.linspace(-1, 1, 4, dtype=F64)[:, None]
    result = ProbabilityFlow(particles=300, importance=True).estimate(
        reverse, levels, batch_size=1200
    )
    mass = result.value.exp()
    error = float((mass * result.std_error).square().sum().sqrt())
    assert error < 0.05 and abs(float(mass.sum()) - 1) < 4 * error
    bound = ProbabilityFlow(particles=300).estimate(reverse, levels, batch_size=1200)
    assert result.log_weights is not None and bound.log_weights is not None
    assert torch.equal(bound.log_weights, result.log_weights)
    assert bool((bound.value <= result.value).all())
    error = float((bound.value.exp() * bound.std_error).square().sum().sqrt())
    assert float(bound.value.exp().sum()) < 1 + 4 * error


# -- what a value depends on ---------------------------------------------------------------------


@pytest.mark.parametrize("exact_up_to", [0, 16])
@pytest.mark.parametrize("offset", ["variational", "scaled"])
def test_values_do_not_depend_on_batches(offset: str, exact_up_to: int) -> None:
    reverse, x_0 = mlp_chain(), torch.randn(8, 2, dtype=F64)
    flow = ProbabilityFlow(offset, exact_up_to=exact_up_to, rtol=1e-3, atol=1e-3)
    whole = flow.estimate(reverse, x_0, seed=3, batch_size=64)
    for size in (1, 7):
        parts = flow.estimate(reverse, x_0, seed=3, batch_size=size)
        torch.testing.assert_close(parts.value, whole.value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(parts.std_error, whole.std_error, rtol=1e-8, atol=1e-10)
        assert torch.equal(parts.calls, whole.calls)
    few = flow.estimate(reverse, x_0[5:], seed=3, indices=range(5, 8))
    torch.testing.assert_close(few.value, whole.value[5:], rtol=1e-10, atol=1e-10)


def test_a_hard_sample_does_not_change_its_batch_mates() -> None:
    """A sample 5 standard deviations from a narrow component takes twice the steps."""
    weights, means = torch.tensor([0.5, 0.5], dtype=F64), torch.tensor([[-2.0], [2.0]], dtype=F64)
    reverse = exact_chain(GaussianMixture(weights, means, torch.tensor([0.01, 1.0], dtype=F64)))
    easy, hard = torch.tensor([[2.5], [1.0]], dtype=F64), torch.tensor([[-1.95]], dtype=F64)
    flow = ProbabilityFlow("scaled")
    alone = flow.estimate(reverse, easy)
    together = flow.estimate(reverse, torch.cat([easy, hard]))
    torch.testing.assert_close(together.value[:2], alone.value, rtol=1e-11, atol=1e-11)
    assert torch.equal(together.calls[:2], alone.calls)
    assert int(together.calls[2]) > 1.5 * int(alone.calls.max())


def test_values_depend_on_draws_and_seed_and_not_on_the_global_generator() -> None:
    reverse, x_0 = mlp_chain(), torch.randn(4, 2, dtype=F64)
    one = ProbabilityFlow(particles=1).estimate(reverse, x_0, seed=1)
    assert bool(one.std_error.isnan().all())
    torch.manual_seed(99)
    three = ProbabilityFlow(particles=3).estimate(reverse, x_0, seed=1)
    assert three.log_weights is not None
    torch.testing.assert_close(three.log_weights[:, 0], one.value, rtol=1e-10, atol=1e-10)
    other = ProbabilityFlow(particles=1).estimate(reverse, x_0, seed=2)
    assert not bool((other.value == one.value).any())


def test_each_sample_keeps_its_context() -> None:
    reverse = mlp_chain(context_size=3)
    x_0, context = torch.randn(9, 2, dtype=F64), torch.randn(9, 3, dtype=F64)
    flow = ProbabilityFlow()
    whole = flow.estimate(reverse, x_0, context=context).value
    parts = flow.estimate(reverse, x_0, context=context, batch_size=4).value
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)
    moved = flow.estimate(reverse, x_0, context=context.roll(1, 0)).value
    assert float((moved - whole).abs().min()) > 1e-6


class Timed(nn.Module):
    """The optimal network, told t − 1; it looks λ up between the knots of the table."""

    def __init__(self, network: nn.Module, table: Tensor):
        super().__init__()
        self.network, self.table = network, table

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        left = time.floor().long().clamp(0, len(self.table) - 2)
        log_snr = torch.lerp(self.table[left], self.table[left + 1], time - left)
        return self.network(x, log_snr)


def test_timesteps_are_interpolated() -> None:
    oracle = mixture(2)
    reverse, x_0 = exact_chain(oracle), oracle.sample(8, seed=1)
    timed = Timed(oracle.network(), reverse.forward_chain.log_snr)
    denoiser = NoiseDenoiser(timed, time="timestep")
    other = ReverseChain(denoiser, reverse.forward_chain, reverse.event_shape)
    flow = ProbabilityFlow("scaled")
    expected = flow.estimate(reverse, x_0)
    result = flow.estimate(other, x_0)
    torch.testing.assert_close(result.value, expected.value, rtol=1e-8, atol=1e-8)
    assert torch.equal(result.calls, expected.calls)


class Counted(nn.Module):
    """A network that counts the rows of its calls, for events of any shape."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.rows, self.largest = network, 0, 0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.rows, self.largest = self.rows + len(x), max(self.largest, len(x))
        return self.network(x.flatten(1), time).reshape(x.shape)


@pytest.mark.parametrize("exact_up_to", [0, 16])
def test_calls_are_counted_and_no_batch_is_larger_than_asked(exact_up_to: int) -> None:
    flat, x_0 = mlp_chain(4), torch.randn(3, 4, dtype=F64)
    network = Counted(flat.denoiser.network)
    forward = ForwardChain(LogSNRSchedule(8.0, -6.0), 10)
    square = ReverseChain(VelocityDenoiser(network), forward, (1, 2, 2))
    flow = ProbabilityFlow(particles=3, exact_up_to=exact_up_to, rtol=1e-3, atol=1e-3)
    result = flow.estimate(square, x_0.reshape(3, 1, 2, 2), batch_size=2)
    assert int(result.calls.sum()) == network.rows and network.largest == 2
    expected = flow.estimate(flat, x_0)
    torch.testing.assert_close(result.value, expected.value, rtol=1e-10, atol=1e-10)
    assert all(parameter.grad is None for parameter in square.parameters())


def test_single_precision_serves_small_tolerances() -> None:
    reverse, x_0 = mlp_chain(), torch.randn(16, 2, dtype=F64)
    flow = ProbabilityFlow("scaled", rtol=1e-6, atol=1e-6)
    exact = flow.estimate(reverse, x_0)
    result = flow.estimate(reverse.float(), x_0.float())
    assert (
        result.value.dtype == F64 and result.network_evaluations < 1.2 * exact.network_evaluations
    )
    torch.testing.assert_close(result.value, exact.value, rtol=0, atol=1e-3)


def test_chain_of_one_step_has_nothing_to_integrate() -> None:
    reverse = exact_chain(gaussian(), schedule=LogSNRSchedule(18.0, -1.0), steps=1)
    x_0 = gaussian().sample(3, seed=1)
    result = ProbabilityFlow("scaled").estimate(reverse, x_0)
    alpha = torch.tensor(-1.0, dtype=F64).sigmoid().sqrt()
    unit = Gaussian(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64))
    torch.testing.assert_close(result.value, unit.log_prob(alpha * x_0) + 3 * alpha.log())
    assert result.network_evaluations == 0


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": "none"}, r"Expected offset to be one of \('variational', 'scaled'\); got 'no"),
        ({"particles": 0}, "Expected particles to be an integer >= 1; got 0"),
        ({"exact_up_to": -1}, "Expected exact_up_to to be an integer >= 0; got -1"),
        ({"max_steps": 0}, "Expected max_steps to be an integer >= 1; got 0"),
        ({"rtol": 0.0}, r"Expected rtol to be positive and finite; got 0\.0"),
        ({"atol": math.nan}, "Expected atol to be positive and finite; got nan"),
        ({"offset": "scaled", "importance": True}, "Expected offset='variational' for importance"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbabilityFlow(**options)


def test_estimate_refuses() -> None:
    x_0, forward = torch.zeros(2, 3, dtype=F64), ForwardChain(LogSNRSchedule(8.0, -6.0), 10)
    mean = ReverseChain(MeanDenoiser(gaussian().network()), forward, (3,))
    with pytest.raises(ValueError, match="Expected a denoiser with a meaning at every log-SNR"):
        ProbabilityFlow().estimate(mean, x_0)
    with pytest.raises(ValueError, match="Expected a decoder with a density for offset='scaled'"):
        ProbabilityFlow("scaled").estimate(mlp_chain(3, CategoricalDecoder(3)), x_0)
    with pytest.raises(ValueError, match="Expected at most exact_up_to=2 dimensions for import"):
        ProbabilityFlow(importance=True, exact_up_to=2).estimate(exact_chain(gaussian()), x_0)
    with pytest.raises(ValueError, match="Expected every sample to arrive at -36 within max_step"):
        ProbabilityFlow(max_steps=3).estimate(exact_chain(gaussian()), x_0)
