"""Programs conditioned by particles, against exact evidences and posteriors.

Stochastic tests compare means over independent runs with exact values at five standard errors and
fail with probability 6e-7 each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyrodiff import ForwardChain, ReverseChain, plots
from pyrodiff.chains.calls import AnsweredChain
from pyrodiff.conditioning import (
    Blind,
    Gradient,
    Likelihood,
    LinearGaussian,
    Moments,
    Posterior,
    TwistedSMC,
)
from pyrodiff.conditioning.likelihoods import found
from pyrodiff.conditioning.programs import Program
from pyrodiff.conditioning.proposals import TwistedProposal
from pyrodiff.decoders import DiscretizedGaussianDecoder, GaussianDecoder
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.likelihood.particles.smc import ParticleFilter
from pyrodiff.likelihood.statistics import log_mean_exp
from pyrodiff.networks import ResidualMLP
from pyrodiff.oracles import Gaussian, GaussianMixture, GridOracle
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.variances import FixedLarge, FixedSmall, PosteriorCovariance, Variance

F64 = torch.float64
FULL = PosteriorCovariance("full")
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.5, 0.2]), torch.tensor([[-1.5, 1.0], [0.5, -1.0], [1.5, 1.5]]), 0.4
)


def chain_of(
    law: Gaussian | GaussianMixture, num_steps: int, variance: Variance, **options: Any
) -> ReverseChain:
    forward = ForwardChain(LogSNRSchedule(maximum=6.0, minimum=-9.0), num_steps=num_steps)
    shape = tuple(law.event_shape)
    return ReverseChain(NoiseDenoiser(law.network()), forward, shape, variance, **options).eval()


def measured(reverse: ReverseChain, matrix: Tensor, scale: float) -> Callable[..., Any]:
    """A program that measures the chain's x_0."""

    def program(y: Tensor | None = None) -> Tensor:
        x = reverse(num_samples=1)
        law = dist.Normal(x.to(matrix) @ matrix.mT, scale).to_event(1)
        return pyro.sample("y", law, obs=y)

    return program


MATRIX = torch.tensor([[0.6, -0.4]], dtype=F64)
Y = torch.tensor([[0.9]], dtype=F64)


# -- exact answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_weights_are_alike_on_gaussian_data(num_steps: int) -> None:
    covariance = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
    law = Gaussian(torch.tensor([1.0, -2.0, 0.5]), covariance)
    matrix = torch.tensor([[1.0, 0.5, -1.0], [0.0, 2.0, 0.3]], dtype=F64)
    y = torch.tensor([[0.3, -1.0]], dtype=F64)
    reverse = chain_of(law, num_steps, FULL)
    posterior = TwistedSMC(measured(reverse, matrix, 0.3), reverse, particles=64).run(y, seed=0)
    noise = 0.09 * torch.eye(2, dtype=F64)
    exact = torch.distributions.MultivariateNormal(
        matrix @ law.mean, matrix @ law.covariance @ matrix.mT + noise
    )
    assert float(posterior.log_weights.std()) < 1e-5
    assert posterior.effective_samples == pytest.approx(64, rel=1e-6)
    # the chain starts from N(0, I), not from q(x_T): so much is left
    assert posterior.log_evidence == pytest.approx(float(exact.log_prob(y)), abs=2e-3)
    assert isinstance(posterior.likelihood, LinearGaussian)


@pytest.mark.parametrize("size", [1, 3])
def test_other_variances_stand_for_a_covariance(size: int) -> None:
    """β_t is that of N(0, I), where it makes the weights alike, too."""
    law = Gaussian(torch.zeros(size), torch.eye(size))
    reverse = chain_of(law, 10, FixedLarge(), decoder=GaussianDecoder())
    matrix, y = torch.ones(1, size, dtype=F64), torch.tensor([[0.7]], dtype=F64)
    posterior = TwistedSMC(measured(reverse, matrix, 0.5), reverse, particles=32).run(y, seed=0)
    exact = torch.distributions.Normal(0.0, math.sqrt(size + 0.25)).log_prob(y)
    assert float(posterior.log_weights.std()) < 2e-3  # x_0 given x_1 is the decoder's
    assert posterior.log_evidence == pytest.approx(float(exact), abs=5e-3)


def test_evidence_and_mean_of_a_mixture() -> None:
    reverse = chain_of(MIXTURE, 30, FULL)
    posterior = TwistedSMC(measured(reverse, MATRIX, 0.3), reverse, particles=2000).run(Y, seed=1)
    exact = MIXTURE.posterior(MATRIX, Y[0], 0.3)
    total = MIXTURE.means @ MATRIX.mT
    spread = MATRIX @ MIXTURE.covariances @ MATRIX.mT + 0.09
    parts = torch.distributions.MultivariateNormal(total, spread).log_prob(Y)
    log_evidence = float((MIXTURE.weights.log() + parts).logsumexp(0))
    # 0.01 for 30 steps; weights are nearly alike, so that the error is below 0.02
    assert 0 < posterior.std_error < 0.02
    assert abs(posterior.log_evidence - log_evidence) < 5 * posterior.std_error + 0.01
    mean = exact.weights @ exact.means
    assert torch.allclose(posterior.mean(), mean, atol=5 * 1.5 / math.sqrt(2000) + 0.03)
    low, high = posterior.interval(0.95)
    assert low < posterior.log_evidence < high
    assert posterior.pareto_k < 0.7
    assert posterior.calls == 2000 * 30 * 3 + 3


def log_estimates(
    program: Program, likelihood: Likelihood, runs: int, particles: int, widening: float = 1.0
) -> Tensor:
    """log Ẑ of independent runs, resampled at every step."""
    reverse = program.reverse
    proposal = TwistedProposal(reverse, program, likelihood, widening)
    engine = ParticleFilter(particles, threshold=1.0, rows=8192)
    with torch.no_grad():
        population = engine.run(reverse, proposal, proposal.potential, seed=3, indices=range(runs))
    if not isinstance(likelihood, Blind):  # whose weights stay alike until the end
        assert float(population.resamplings.float().mean()) > 3
    return log_mean_exp(population.log_weights)


def gaussian(x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(0.8 * x - 0.1, 0.5).to_event(1), obs=y)


def student(x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.StudentT(4.0, x**2, 0.5).to_event(1), obs=y)


def counts(x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Poisson((0.5 * x).exp()).to_event(1), obs=y)


def labels(x: Tensor, y: Tensor | None) -> Tensor:
    logits = torch.cat([x, -x, 0.5 * x], -1)
    return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


OBSERVED = {
    "linear": (gaussian, torch.tensor([[0.7]])),
    "student": (student, torch.tensor([[1.2]])),
    "counts": (counts, torch.tensor([[2.0]])),
    "labels": (labels, torch.tensor([1])),
}
WRONG = LinearGaussian(torch.tensor([[-0.3]]), torch.tensor(0.8), torch.tensor([1.5]))


@pytest.mark.numeric
@pytest.mark.parametrize("observed", OBSERVED)
@pytest.mark.parametrize(
    ("likelihood", "variance", "widening"),
    [
        (None, FULL, 1.0),
        (None, FixedSmall(), 1.0),
        (None, FixedLarge(), 1.5),
        (Gradient(), PosteriorCovariance("diagonal", probes=1), 1.0),
        (Blind(), FULL, 1.0),
        (WRONG, FULL, 2.0),
    ],
    ids=["found", "found, fixed small", "found, widened", "gradient", "blind", "wrong"],
)
@pytest.mark.parametrize("decoder", [None, DiscretizedGaussianDecoder(0.5, -4.0, 4.0)])
def test_the_evidence_is_unbiased(
    observed: str,
    likelihood: Likelihood | None,
    variance: Variance,
    widening: float,
    decoder: Any,
) -> None:
    """E Ẑ = ∫ p_θ(x) p(y | x) dx of five steps and four particles, by quadrature."""
    torch.manual_seed(0)
    network = ResidualMLP((1,), width=8, blocks=1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    forward = ForwardChain(LogSNRSchedule(maximum=2.0, minimum=-4.0), num_steps=5)
    reverse = ReverseChain(DataDenoiser(network.double()), forward, (1,), variance, decoder)
    reverse.eval()
    site, y = OBSERVED[observed]

    def program(y: Tensor) -> Tensor:
        return site(reverse(num_samples=1), y)

    conditioned = Program(program, reverse, (y,))
    assert conditioned.at_once
    if decoder is None:
        points = torch.linspace(-9, 9, 4001, dtype=F64).unsqueeze(1)
        spacing = math.log(float(points[1] - points[0]))
    else:
        points = torch.linspace(-4, 4, 17, dtype=F64).unsqueeze(1)
        spacing = 0.0
    density = GridOracle(reverse, -12, 12, 1001).log_prob(points)
    exact = (density + conditioned.log_likelihood(points)).logsumexp(0) + spacing

    kind = found(conditioned, reverse) if likelihood is None else likelihood
    ratios = (log_estimates(conditioned, kind, 2000, 4, widening) - exact).exp()
    std_error = float(ratios.std()) / math.sqrt(len(ratios))
    assert std_error < 0.1
    assert abs(float(ratios.mean()) - 1) < 5 * std_error


def test_contexts_reach_the_network() -> None:
    """The evidence under one context, by quadrature (5 standard errors, 6e-7)."""
    torch.manual_seed(1)
    network = ResidualMLP((1,), width=8, blocks=1, context_size=1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    forward = ForwardChain(LogSNRSchedule(maximum=2.0, minimum=-4.0), num_steps=5)
    reverse = ReverseChain(DataDenoiser(network.double()), forward, (1,), FULL).eval()
    points = torch.linspace(-9, 9, 4001, dtype=F64).unsqueeze(1)
    spacing = math.log(float(points[1] - points[0]))
    values = []
    for value in (-3.0, 3.0):
        context = torch.tensor([[value]], dtype=F64)

        def program(y: Tensor, context: Tensor = context) -> Tensor:
            return gaussian(reverse(None, context), y)

        y = torch.tensor([[0.7]])
        conditioned = Program(program, reverse, (y,))
        density = GridOracle(reverse, -12, 12, 1001, context=context[0]).log_prob(points)
        exact = float((density + conditioned.log_likelihood(points)).logsumexp(0) + spacing)
        posterior = TwistedSMC(program, reverse, particles=2000).run(y, seed=0)
        assert abs(posterior.log_evidence - exact) < 5 * posterior.std_error
        values.append(exact)
    assert abs(values[0] - values[1]) > 1e-2  # the context matters


# -- what a program says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observed", "kind"),
    [("linear", LinearGaussian), ("student", Moments), ("counts", Moments), ("labels", Gradient)],
)
def test_the_sharpest_expansion_is_found(observed: str, kind: type[Likelihood]) -> None:
    reverse = chain_of(Gaussian(torch.zeros(1), torch.eye(1)), 5, FULL)
    site, y = OBSERVED[observed]
    program = Program(lambda: site(reverse(num_samples=1), y), reverse)
    assert isinstance(found(program, reverse), kind)


def test_what_is_found_is_the_program() -> None:
    """A linear program with an offset, correlated noise, and two sites."""
    reverse = chain_of(MIXTURE, 5, FULL)
    noise = torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=F64)
    matrix = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=F64)

    def program() -> None:
        x = reverse(num_samples=1).double()
        mean = x @ matrix.mT + 0.7
        pyro.sample("y", dist.MultivariateNormal(mean, noise), obs=torch.ones(1, 2, dtype=F64))
        pyro.sample("z", dist.Normal(x[:, 0], 0.3), obs=torch.full((1,), 2.0, dtype=F64))

    conditioned = Program(program, reverse)
    likelihood = found(conditioned, reverse)
    assert isinstance(likelihood, LinearGaussian)
    x = MIXTURE.sample(4, seed=0).float()
    matrix_found, residual, covariance, constant = likelihood.expand(conditioned, x)
    law = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=F64), covariance[0])
    expected = conditioned.log_likelihood(x)
    torch.testing.assert_close(law.log_prob(residual) + constant, expected, rtol=1e-4, atol=1e-4)
    assert matrix_found.shape == (1, 3, 2)


def test_programs_with_control_flow_run_one_particle_at_a_time() -> None:
    reverse = chain_of(MIXTURE, 5, FULL)

    def program(y: Tensor) -> None:
        x = reverse(num_samples=1)
        scale = 0.3 if float(x[0, 0].detach()) > 0 else 0.6
        pyro.sample("y", dist.Normal(x[:, 1], scale), obs=y)

    conditioned = Program(program, reverse, (torch.tensor([0.5]),))
    assert not conditioned.at_once
    x = MIXTURE.sample(6, seed=0).float()
    scales = torch.where(x[:, 0] > 0, 0.3, 0.6)
    expected = torch.distributions.Normal(x[:, 1], scales).log_prob(torch.tensor(0.5)).double()
    torch.testing.assert_close(conditioned.log_likelihood(x), expected)
    assert (
        TwistedSMC(program, reverse, particles=16).run(torch.tensor([0.5])).samples.shape[0] == 16
    )


def test_masks_and_scales_count() -> None:
    reverse = chain_of(MIXTURE, 5, FULL)
    y = torch.tensor([[0.5, 0.7]])

    def program() -> None:
        x = reverse(num_samples=1)
        with poutine.mask(mask=torch.tensor([[True, False]])), poutine.scale(scale=2.0):
            pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    conditioned = Program(program, reverse)
    x = MIXTURE.sample(3, seed=0).float()
    expected = 2 * torch.distributions.Normal(x[:, 0], 0.5).log_prob(y[0, 0]).double()
    torch.testing.assert_close(conditioned.log_likelihood(x), expected)
    assert isinstance(found(conditioned, reverse), Gradient)


def test_answered_chains_visit_no_sites() -> None:
    reverse = chain_of(MIXTURE, 5, FULL)
    value = torch.ones(1, 2)
    with AnsweredChain(reverse, value) as answered:
        trace = poutine.trace(lambda: reverse(num_samples=1)).get_trace()
    assert trace.nodes["_RETURN"]["value"] is value
    assert not trace.stochastic_nodes
    assert answered.calls == [(None, None, 1)]
    assert "x_5" in poutine.trace(reverse).get_trace(num_samples=1).stochastic_nodes


def no_call(reverse: ReverseChain) -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(()))


def two_calls(reverse: ReverseChain) -> None:
    pyro.sample("y", dist.Normal(reverse() + reverse(), 1.0), obs=torch.zeros(1, 2))


def with_data(reverse: ReverseChain) -> None:
    pyro.sample("y", dist.Normal(reverse(torch.zeros(1, 2)), 1.0), obs=torch.zeros(1, 2))


def several(reverse: ReverseChain) -> None:
    pyro.sample("y", dist.Normal(reverse(num_samples=3), 1.0), obs=torch.zeros(3, 2))


def in_a_plate(reverse: ReverseChain) -> None:
    with pyro.plate("images", 3):
        pyro.sample("y", dist.Normal(reverse(), 1.0).to_event(1), obs=torch.zeros(3, 2))


def nothing_seen(reverse: ReverseChain) -> None:
    reverse()


def latent(reverse: ReverseChain) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(reverse(), scale), obs=torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (no_call, "calls the chain once; got 0 calls"),
        (two_calls, "calls the chain once; got 2 calls"),
        (with_data, "without data; got x_0"),
        (several, "for one sample; got 3"),
        (in_a_plate, "for one sample; got 3"),
        (nothing_seen, "an observed site; got none"),
        (latent, "no latent sites beside the chain's; got scale"),
    ],
)
def test_programs_that_cannot_be_conditioned(program: Any, message: str) -> None:
    reverse = chain_of(MIXTURE, 5, FULL)
    with pytest.raises(ValueError, match=message):
        TwistedSMC(program, reverse, particles=4).run(reverse)


def test_bad_settings() -> None:
    reverse = chain_of(MIXTURE, 5, FULL)
    program = measured(reverse, MATRIX, 0.3)
    with pytest.raises(TypeError):
        TwistedSMC(3, reverse)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        TwistedSMC(program, program)  # type: ignore[arg-type]
    for options in ({"particles": 0}, {"threshold": 2.0}, {"widening": 0.5}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"Expected {next(iter(options))}"):
            TwistedSMC(program, reverse, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected matrix to fit 1 observations"):
        LinearGaussian(torch.ones(2, 2), torch.tensor(1.0), torch.ones(1))
    short = LinearGaussian(torch.ones(1, 3), torch.tensor(1.0), torch.ones(1))
    with pytest.raises(ValueError, match="for events of 2 values; got 3"):
        TwistedSMC(program, reverse, particles=4, likelihood=short).run(Y)


# -- the result ------------------------------------------------------------------------------------


def run(seed: int = 0, particles: int = 200, **options: Any) -> Posterior:
    reverse = chain_of(MIXTURE, 10, FULL, decoder=GaussianDecoder())
    smc = TwistedSMC(measured(reverse, MATRIX, 0.3), reverse, particles=particles, **options)
    return smc.run(Y, seed=seed)


def test_a_run_is_a_function_of_its_seed() -> None:
    first, second, other = run(), run(batch_size=37), run(seed=1)
    assert torch.allclose(first.samples, second.samples, atol=1e-4)
    assert first.log_evidence == pytest.approx(second.log_evidence, abs=1e-4)
    assert first.log_evidence != other.log_evidence
    state = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), state)


def test_results_resample_and_show_themselves() -> None:
    posterior = run()
    draws = posterior.resample(50, seed=0)
    assert draws.shape == (50, 2)
    assert torch.equal(draws, posterior.resample(50, seed=0))
    assert float(posterior.weights.sum()) == pytest.approx(1)
    assert posterior.log_evidence == pytest.approx(float(log_mean_exp(posterior.log_weights)))
    assert "200 particles" in repr(posterior)
    history = posterior.history
    assert history.timesteps == [*range(10, -1, -1)]
    assert len(history.effective_samples) == len(history.ancestors) == len(history.resampled) == 11
    with pytest.raises(ValueError, match="level between 0 and 1"):
        posterior.interval(1.5)


def test_results_become_inference_data() -> None:
    posterior = run()
    data = posterior.to_inference_data(50, seed=0)
    group = data["posterior"]
    assert group["x_0"].dims == ("chain", "draw", "x_0_dim_0")
    assert torch.equal(torch.from_numpy(group["x_0"].values[0]), posterior.resample(50, seed=0))
    assert group.attrs["log_evidence"] == posterior.log_evidence
    assert posterior.to_inference_data()["posterior"].sizes["draw"] == 200


def test_particles_are_drawn() -> None:
    posterior = run(threshold=0.9)
    left, right = plots.particles(posterior)
    effective, ancestors, resampled = left.get_lines()
    assert list(effective.get_ydata()) == posterior.history.effective_samples
    assert list(ancestors.get_ydata()) == posterior.history.ancestors
    assert len(resampled.get_xdata()) == sum(posterior.history.resampled) > 0
    weights = right.get_lines()[0].get_ydata()
    assert float(sum(weights)) == pytest.approx(200)
    with pytest.raises(ValueError, match="2"):
        plots.particles(posterior, axes=[left])


def test_errors_that_cannot_be_known_are_nan() -> None:
    few = run(particles=4)
    assert math.isnan(few.std_error)
    assert "fewer than 8" in few.remarks
    reverse = chain_of(MIXTURE, 10, FULL)
    program = measured(reverse, MATRIX, 0.02)  # few draws of the prior come near
    poor = TwistedSMC(program, reverse, particles=100, likelihood=Blind()).run(Y, seed=0)
    assert poor.pareto_k > 0.7
    assert math.isnan(poor.std_error)
    assert "k̂ of the weights is 0.7 or more" in poor.remarks


def test_the_chain_is_left_as_it_was() -> None:
    reverse = chain_of(MIXTURE, 5, FULL).train()
    TwistedSMC(measured(reverse, MATRIX, 0.3), reverse, particles=8).run(Y)
    assert reverse.training
