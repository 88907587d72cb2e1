"""The non-centred form: the same joint, on which NUTS mixes and Pyro's automatic guides run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, autoguide
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.chains import NoiseReparam, NonCentered
from pyrodiff.covariances import Covariance, Spread
from pyrodiff.decoders import CategoricalDecoder, DiscretizedGaussianDecoder
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.networks import ResidualMLP
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.variances import (
    FixedLarge,
    FixedSmall,
    LearnedDiagonal,
    LearnedPosterior,
    LearnedRange,
    PosteriorCovariance,
    Variance,
)

F64 = torch.float64
T = 3

VARIANCES: dict[str, Callable[[], Variance]] = {
    "small": FixedSmall,
    "large": FixedLarge,
    "range": LearnedRange,
    "learned": LearnedDiagonal,
    "learned posterior": LearnedPosterior,
    "diagonal": lambda: PosteriorCovariance("diagonal"),
    "low rank": lambda: PosteriorCovariance("diagonal", rank=1),
    "full": lambda: PosteriorCovariance("full"),
}
every_variance = pytest.mark.parametrize("build", VARIANCES.values(), ids=VARIANCES.keys())


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mlp_chain(variance: Variance, event: tuple[int, ...] = (3,), **options: Any) -> ReverseChain:
    torch.manual_seed(0)
    network = ResidualMLP(event, width=8, blocks=1, learned_variance=variance.learned)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    forward = ForwardChain(LogSNRSchedule(3.0, -3.0), T)
    return ReverseChain(NoiseDenoiser(network.double()), forward, event, variance, **options).eval()


def noise_sites(reverse: ReverseChain) -> list[str]:
    return [reverse.site(T), *(f"{reverse.site(t)}_noise" for t in range(T - 1, -1, -1))]


def state(reverse: ReverseChain, noises: Tensor) -> Tensor:
    """x_T, …, x_0 of given noises, both of shape (T + 1, d)."""
    data = {n: e[None] for n, e in zip(noise_sites(reverse), noises, strict=True)}
    trace = poutine.trace(pyro.condition(NonCentered()(reverse), data)).get_trace()
    return torch.cat([trace.nodes[reverse.site(t)]["value"] for t in range(T, -1, -1)])


# -- the same joint --------------------------------------------------------------------------------


@every_variance
def test_density_is_the_centred_one_in_other_coordinates(build: Callable[[], Variance]) -> None:
    """log p(ε) = log p(x) + log |∂x/∂ε|, by automatic differentiation; the event is flattened."""
    reverse = mlp_chain(build())
    model, names = NonCentered()(reverse), noise_sites(reverse)
    noises = draws(len(names), 3)

    x = state(reverse, noises)
    data = {reverse.site(t): x[T - t][None] for t in range(T + 1)}
    centred = poutine.trace(pyro.condition(reverse, data)).get_trace().log_prob_sum()
    jacobian = torch.autograd.functional.jacobian(partial(state, reverse), noises)
    jacobian = jacobian.reshape(noises.numel(), -1)
    expected = -0.5 * (noises.square() + math.log(2 * math.pi)).sum()
    torch.testing.assert_close(centred + jacobian.slogdet()[1], expected, rtol=1e-9, atol=1e-9)
    data = dict(zip(names, noises[:, None], strict=True))
    own = poutine.trace(pyro.condition(model, data)).get_trace().log_prob_sum()
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


@every_variance
def test_states_and_noises_are_each_others(build: Callable[[], Variance]) -> None:
    """Given the states (an initial value of Pyro's, say), the noises are those that make them."""
    reverse = mlp_chain(build(), event=(2, 2))
    centred = poutine.trace(reverse).get_trace(num_samples=5)
    data = {reverse.site(t): centred.nodes[reverse.site(t)]["value"] for t in range(T + 1)}
    initial = autoguide.initialization.InitMessenger(
        autoguide.init_to_value(values=data, fallback=None)
    )
    with initial:
        trace = poutine.trace(NonCentered()(reverse)).get_trace(num_samples=5)
    for t in range(T):
        site, name = trace.nodes[reverse.site(t)], f"{reverse.site(t)}_noise"
        torch.testing.assert_close(site["value"], data[reverse.site(t)])
        law, noise = centred.nodes[reverse.site(t)]["fn"], trace.nodes[name]["value"]
        made = (
            law.from_noise(noise) if hasattr(law, "from_noise") else law.mean + noise * law.stddev
        )
        torch.testing.assert_close(made, data[reverse.site(t)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_whitening_is_the_inverse_of_colouring(rank: int) -> None:
    factor = None if rank == 0 else draws(4, 3, rank, seed=1)
    covariance, noise = Covariance(0.3 * draws(4, 3), factor), draws(2, 4, 3, seed=2)
    covariances = [covariance]
    if rank:  # orthonormal directions beside an isotropic diagonal
        directions, values = torch.linalg.qr(draws(4, 3, 3, seed=3))[0], draws(4, 3).exp()
        spread = Spread(draws(4, 1, seed=4).exp(), directions[..., :rank], values[..., :rank])
        one = torch.ones(4, 1, dtype=F64)
        covariances.append(Covariance.of(0.2 * one, 0.7 * one, spread, 1))
    for each in covariances:
        whitened = each.whiten(each.color(noise, 1), 1)
        torch.testing.assert_close(whitened, noise, rtol=1e-10, atol=1e-10)


# -- as a handler ----------------------------------------------------------------------------------


def test_sites_of_the_non_centred_form() -> None:
    reverse = mlp_chain(FixedLarge(), name="prior")
    with pyro.plate("outer", 4, dim=-2):
        trace = poutine.trace(NonCentered()(reverse)).get_trace(num_samples=2)
    trace.compute_log_prob()
    latent = [n for n in trace.stochastic_nodes if n.startswith("prior.x")]
    assert latent == noise_sites(reverse)
    for name in latent:
        site = trace.nodes[name]
        assert site["value"].shape == (4, 2, 3) and site["log_prob"].shape == (4, 2)
        assert site["fn"].mean.eq(0).all() and site["fn"].variance.eq(1).all()
    for t in range(T):
        site = trace.nodes[reverse.site(t)]
        assert site["is_observed"] and site["log_prob"].eq(0).all()


def test_an_observed_x_0_stays_observed() -> None:
    reverse, x_0 = mlp_chain(FixedLarge()), draws(2, 3)
    for model, arguments in (
        (reverse, {"x_0": x_0}),
        (pyro.condition(reverse, {"x_0": x_0}), {"num_samples": 2}),
    ):
        torch.manual_seed(0)
        trace = poutine.trace(NonCentered()(model)).get_trace(**arguments)
        assert "x_0_noise" not in trace and trace.nodes["x_0"]["is_observed"]
        x_1 = trace.nodes["x_1"]["value"]
        torch.testing.assert_close(
            trace.nodes["x_0"]["fn"].log_prob(x_0), reverse.decode(x_1).log_prob(x_0)
        )


def test_pyros_own_handler_takes_single_sites_and_the_strategy() -> None:
    reverse = mlp_chain(FixedLarge())
    one = poutine.reparam(reverse, config={"x_2": NoiseReparam()})
    assert [n for n in poutine.trace(one).get_trace().stochastic_nodes if n[0] == "x"] == [
        *("x_3", "x_2_noise", "x_1", "x_0")
    ]
    every = poutine.reparam(reverse, config=NonCentered())
    assert [n for n in poutine.trace(every).get_trace().stochastic_nodes if n[0] == "x"] == (
        noise_sites(reverse)
    )


@pytest.mark.parametrize(
    "decoder", [CategoricalDecoder(5), DiscretizedGaussianDecoder(0.25, scale=0.3)], ids=str
)
def test_a_latent_x_0_over_discrete_values_is_refused(decoder: Any) -> None:
    reverse = mlp_chain(FixedLarge(), decoder=decoder)
    with pytest.raises(TypeError, match=r"Expected a normal distribution at the site 'x_0'.*got"):
        NonCentered()(reverse)(num_samples=1)
    NonCentered()(reverse)(x_0=torch.ones(1, 3, dtype=F64))  # observed, it stays as it is


# -- inference on it -------------------------------------------------------------------------------


class Shrinkage(nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(0, Q diag(v) Qᵀ)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor([0.3, 1.6], dtype=F64))
        self.register_buffer("basis", torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=F64))

    def gains(self, log_snr: Tensor) -> Tensor:
        square = torch.sigmoid(log_snr)[..., None]
        return square.sqrt() * self.values / (square * self.values + 1 - square)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return (x @ self.basis) * self.gains(log_snr) @ self.basis.T


def gaussian_prior(num_steps: int) -> tuple[ReverseChain, Tensor]:
    """A chain whose x_0 is Gaussian with mean 0, and its covariance."""
    network, forward = Shrinkage(), ForwardChain(LogSNRSchedule(5.0, -4.0), num_steps)
    reverse = ReverseChain(DataDenoiser(network), forward, (2,)).eval()
    values, like = torch.ones(2, dtype=F64), torch.zeros(1, 2, dtype=F64)
    for t in range(num_steps, 0, -1):
        step = reverse.step(t, like)
        gains = network.gains(forward.log_snr[t - 1])
        slope, noise = (
            (gains, step.log_large) if t == 1 else (step.c_0 * gains + step.c_t, step.log_large)
        )
        values = slope.square() * values + noise.exp()
    return reverse, network.basis @ values.diag() @ network.basis.T


A = torch.tensor([[1.0, 0.6]], dtype=F64)
NOISE = 0.5


def inverse_problem(reverse: ReverseChain) -> Callable[[Tensor], Tensor]:
    def program(y: Tensor) -> Tensor:
        with pyro.plate("rows", len(y)):
            x_0 = reverse()
            pyro.sample("y", dist.Normal(x_0 @ A.T, NOISE).to_event(1), obs=y)
            return x_0

    return program


def posterior(covariance: Tensor, y: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0 given y (Kalman's update)."""
    gain = covariance @ A.T / (A @ covariance @ A.T + NOISE**2)
    return gain[:, 0] * y, covariance - gain @ A @ covariance


def test_prior_of_the_tests_is_that_of_the_chain() -> None:
    """20,000 samples, 3 entries of the covariance within 5 standard errors: 2e-6 failures."""
    reverse, covariance = gaussian_prior(5)
    samples = reverse.sample(20_000, seed=0, batch_size=20_000).double()
    expected = covariance.diagonal().outer(covariance.diagonal()) + covariance.square()
    error = (expected / len(samples)).sqrt()
    assert bool(((samples.T @ samples / len(samples) - covariance).abs() < 5 * error).all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*")
def test_nuts_on_the_non_centred_form() -> None:
    """T = 20 in two dimensions: eight chains at once, the rows of one program.

    R-hat below 1.02; mean and covariance within 5 standard errors by the effective number of
    draws, 5 numbers: 3e-6 failures if unseeded, were that number known.
    """
    reverse, prior = gaussian_prior(20)
    program, y = NonCentered()(inverse_problem(reverse)), torch.full((8, 1), 0.9, dtype=F64)
    kernel = NUTS(program, jit_compile=True, ignore_jit_warnings=True, adapt_mass_matrix=False)
    mcmc = MCMC(kernel, num_samples=100, warmup_steps=50, disable_progbar=True)
    mcmc.run(y)
    noises = mcmc.get_samples()
    x_0 = Predictive(program, noises, return_sites=["x_0"], parallel=True)(y)["x_0"]
    assert x_0.shape == (100, 8, 2)
    x_0 = x_0.transpose(0, 1).detach()
    mean, covariance = posterior(prior, 0.9)
    assert float(split_gelman_rubin(x_0).max()) < 1.02
    centred = x_0 - mean
    products = torch.stack([centred[..., i] * centred[..., j] for i, j in ((0, 0), (0, 1), (1, 1))])
    for values, expected in (
        *zip(x_0.movedim(-1, 0), mean, strict=True),
        *zip(products, covariance[[0, 0, 1], [0, 1, 1]], strict=True),
    ):
        number = float(effective_sample_size(values))
        assert number > 200
        error = float(values.std()) / number**0.5
        assert abs(float(values.mean() - expected)) < 5 * error


@pytest.mark.parametrize("kind", ["AutoNormal", "AutoMultivariateNormal"])
def test_automatic_guides_on_the_non_centred_form(kind: str) -> None:
    """The posterior over noises is N(·, (I + c cᵀ/s²)⁻¹), c the derivative of A x_0.

    A full normal guide can be that; independent normals leave ½ (Σ log Λ_ii − log |Λ|) nats.  By
    4000 particles, to 0.05 nats: the guides are fitted to within 0.02, the rest is 4 standard
    errors.
    """
    reverse, prior = gaussian_prior(T)
    y = torch.full((1, 1), 0.9, dtype=F64)
    program = NonCentered()(inverse_problem(reverse))
    guide = getattr(autoguide, kind)(program, init_loc_fn=autoguide.init_to_mean)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    rates = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.98}
    )
    svi = SVI(program, guide, rates, elbo)
    for _ in range(200):
        svi.step(y)
        rates.step()
    noises = torch.zeros(T + 1, 2, dtype=F64)
    c = torch.autograd.functional.jacobian(lambda e: A @ state(reverse, e)[-1], noises).flatten()
    assert float(c.square().sum()) == pytest.approx(float(A @ prior @ A.T), rel=1e-9)
    evidence = dist.Normal(0.0, float((A @ prior @ A.T + NOISE**2) ** 0.5)).log_prob(y).sum()
    precision = torch.eye(len(c), dtype=F64) + c.outer(c) / NOISE**2
    gap = 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    expected = -float(evidence) + (gap if kind == "AutoNormal" else 0.0)
    assert gap > 0.5 and many.loss(program, guide, y) == pytest.approx(expected, abs=0.05)
    samples = Predictive(program, guide=guide, num_samples=500, return_sites=["x_0"], parallel=True)
    x_0, (mean, _) = samples(y)["x_0"].reshape(500, 2), posterior(prior, 0.9)
    assert float((x_0.mean(0) - mean).detach().abs().max()) < 0.2
