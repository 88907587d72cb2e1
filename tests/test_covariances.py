"""The posterior covariance in the reverse step, against dense matrices and exact answers."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.covariances import Covariance, Spread
from pyrodiff.decoders import CategoricalDecoder, DiscretizedGaussianDecoder, GaussianDecoder
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.distributions import StructuredNormal
from pyrodiff.kernels import posterior
from pyrodiff.likelihood import ImportanceBound, PathBound
from pyrodiff.likelihood.estimator import Batch
from pyrodiff.likelihood.paths.weights import path_weights
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import VariationalBound, variational_term
from pyrodiff.oracles import GaussianMixture, GridOracle
from pyrodiff.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule
from pyrodiff.streams import NoiseStreams
from pyrodiff.timesteps import AllTimesteps
from pyrodiff.variances import FixedSmall, PosteriorCovariance, Variance
from pyrodiff.variances.jacobian import random_signs

F64 = torch.float64
KINDS: dict[str, Variance] = {
    "isotropic": PosteriorCovariance("isotropic"),
    "isotropic, probes": PosteriorCovariance("isotropic", probes=2),
    "diagonal": PosteriorCovariance("diagonal"),
    "diagonal, probes": PosteriorCovariance("diagonal", probes=3),
    "low rank": PosteriorCovariance("diagonal", rank=2),
    "low rank, probes": PosteriorCovariance("diagonal", rank=1, probes=2),
    "full": PosteriorCovariance("full"),
}
every_kind = pytest.mark.parametrize("variance", KINDS.values(), ids=KINDS.keys())


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def random_spread(kind: str, count: int, shape: tuple[int, ...]) -> Spread:
    size = math.prod(shape)
    isotropic = draws(count, *(1 for _ in shape), seed=1).square()
    if kind == "isotropic":
        return Spread(isotropic)
    diagonal = draws(count, *shape, seed=2).square()
    if kind == "diagonal":
        return Spread(diagonal)
    rank = size if kind == "full" else 2
    directions, _ = torch.linalg.qr(draws(count, size, rank, seed=3))
    values = draws(count, rank, seed=4).square()
    return Spread(isotropic if kind == "full" else diagonal, directions, values)


def dense(spread: Spread, shape: tuple[int, ...]) -> Tensor:
    """V as matrices, (N, d, d)."""
    diagonal = spread.diagonal.expand(len(spread.diagonal), *shape).flatten(1)
    total = torch.diag_embed(diagonal)
    if spread.directions is not None and spread.values is not None:
        total = total + (spread.directions * spread.values.unsqueeze(1)) @ spread.directions.mT
    return total


# -- the structure, against dense matrices -------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3)])
@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "low rank", "full"])
def test_structured_normals_are_dense_normals(kind: str, shape: tuple[int, ...]) -> None:
    count, size, event_dim = 5, math.prod(shape), len(shape)
    ones = (1,) * event_dim
    floor, scale = draws(count, *ones, seed=5).exp(), draws(count, *ones, seed=6)
    spread = random_spread(kind, count, shape)
    covariance = Covariance.of(floor, scale, spread, event_dim)
    matrix = floor.reshape(-1, 1, 1) * torch.eye(size, dtype=F64)
    matrix = matrix + scale.reshape(-1, 1, 1).square() * dense(spread, shape)
    mean, x = draws(count, *shape, seed=7), draws(count, *shape, seed=8)
    exact = torch.distributions.MultivariateNormal(mean.flatten(1), matrix)
    law = StructuredNormal(mean, covariance, event_dim)

    torch.testing.assert_close(law.log_prob(x), exact.log_prob(x.flatten(1)), rtol=1e-10, atol=0)
    units = torch.eye(size, dtype=F64).reshape(size, 1, *shape).expand(size, count, *shape)
    columns = [covariance.color(unit, event_dim).flatten(1) for unit in units]
    root = torch.stack(columns, -1)
    torch.testing.assert_close(root @ root.mT, matrix, rtol=1e-10, atol=1e-12)
    norm = covariance.squared_norm(covariance.color(x, event_dim), event_dim)
    torch.testing.assert_close(norm, x.flatten(1).square().sum(1), rtol=1e-10, atol=1e-12)
    marginal = covariance.log_marginal(event_dim).exp()
    marginal = marginal.reshape(count, -1).expand(count, size).reshape(count, *shape)
    diagonal = matrix.diagonal(dim1=1, dim2=2).reshape(count, *shape)
    torch.testing.assert_close(marginal, diagonal, rtol=1e-10, atol=0)

    columns = draws(count, size, 3, seed=10)
    for product, expected in (
        (spread.multiply(columns), dense(spread, shape) @ columns),
        (covariance.multiply(columns, event_dim), matrix @ columns),
        (covariance.solve(columns, event_dim), torch.linalg.solve(matrix, columns)),
        (covariance.map(torch.clone).multiply(columns, event_dim), matrix @ columns),
    ):
        torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-11)

    log_s = draws(count, *ones, seed=9)
    narrow = torch.distributions.MultivariateNormal(
        x.flatten(1), log_s.exp().reshape(-1, 1, 1) * torch.eye(size, dtype=F64)
    )
    kl = covariance.kl_from_isotropic(log_s, x - mean, event_dim)
    expected = torch.distributions.kl_divergence(narrow, exact)
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-12)
    posterior = dist.Normal(x, (0.5 * log_s).exp().expand(x.shape)).to_event(event_dim)
    torch.testing.assert_close(
        torch.distributions.kl_divergence(posterior, law), expected, rtol=1e-10, atol=1e-12
    )
    noise = draws(count, *shape, seed=10)
    y = x + (0.5 * log_s).exp() * noise
    ratio = covariance.log_ratio(noise, y - mean, log_s, event_dim)
    expected = exact.log_prob(y.flatten(1)) - narrow.log_prob(y.flatten(1))
    torch.testing.assert_close(ratio, expected, rtol=1e-9, atol=1e-10)


def test_kl_of_several_scales_is_refused() -> None:
    law = StructuredNormal(draws(2, 3), Covariance(torch.zeros(2, 1, dtype=F64)), 1)
    wide = dist.Normal(draws(2, 3), draws(2, 3, seed=1).exp()).to_event(1)
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(wide, law)


def splitmix(number: int) -> int:
    mask = 2**64 - 1
    mixed = number * 0x9E3779B97F4A7C15 & mask
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
    return mixed ^ mixed >> 31


def test_signs_are_those_of_the_published_generator() -> None:
    t, count, size = torch.tensor([1.0, 7.0, 1000.0]), 3, 5
    signs = random_signs(t, count, size)
    for i, step in enumerate((1, 7, 1000)):
        for probe in range(count):
            for place in range(size):
                number = (step * count + probe) * size + place + 1
                assert int(signs[i, probe, place]) == (-1 if splitmix(number) >> 63 else 1)


def test_signs_are_fair_and_uncorrelated() -> None:
    """Means of 64,000 fair signs: 5 standard errors, 1 in 2 million for each of some 30."""
    signs = random_signs(torch.arange(1.0, 1001.0), 4, 64).double()
    assert float(signs.mean().abs()) < 5 / math.sqrt(signs.numel())
    for shift in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        product = signs * signs.roll(shift, (0, 1, 2))
        assert float(product.mean().abs()) < 5 / math.sqrt(signs.numel())


# -- exact answers -------------------------------------------------------------------------------


def gaussian_matrix(size: int) -> Tensor:
    root = draws(size, size, seed=20)
    return root @ root.mT / size + 0.1 * torch.eye(size, dtype=F64)


def gaussian_law(size: int) -> GaussianMixture:
    return GaussianMixture(torch.ones(1), draws(1, size, seed=21), gaussian_matrix(size)[None])


def exact_chain(
    law: GaussianMixture, schedule: Any, num_steps: int, variance: Variance
) -> ReverseChain:
    forward = ForwardChain(schedule, num_steps)
    size = law.sample(1, seed=0).shape[1]
    return ReverseChain(NoiseDenoiser(law.network()), forward, (size,), variance=variance)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 40])
@pytest.mark.parametrize("schedule", [LogSNRSchedule(6.0, -5.0), CosineSchedule()], ids=repr)
@pytest.mark.parametrize("size", [1, 4])
def test_full_covariance_is_exact_for_gaussian_data(
    size: int, schedule: Any, num_steps: int
) -> None:
    """log w = log p(x_0) + log N(x_T; 0, I) − log q(x_T) on every path: only the prior is off."""
    law = gaussian_law(size)
    reverse = exact_chain(law, schedule, num_steps, PosteriorCovariance("full"))
    x_0 = law.sample(6, seed=1)
    batch = Batch(x_0, None, range(6), seed=3, rows=100)
    log_w = path_weights(reverse, batch, 2)
    # E over x_T of the prior's ratio is what is left on average; along a path it is a function of
    # x_T alone, so that with the ends taken out nothing is
    marginal = law.noised(reverse.log_snrs[-1])
    for path in range(2):
        noise = NoiseStreams(3, range(6), reverse.event_shape, [path] * 6).normal(x_0)
        x_T = reverse.forward_chain.sample(x_0, num_steps, noise)
        ends = reverse.prior(x_T).log_prob(x_T) - marginal.log_prob(x_T)
        expected = law.log_prob(x_0) + ends
        torch.testing.assert_close(log_w[:, path], expected, rtol=1e-7, atol=1e-7)


def test_samples_of_a_gaussian_have_its_moments_at_two_steps() -> None:
    """Up to the prior's difference; 20,000 samples, 5 standard errors of each moment."""
    law = gaussian_law(3)
    reverse = exact_chain(law, LogSNRSchedule(6.0, -9.0), 2, PosteriorCovariance("full"))
    x, data = reverse.sample(20_000, seed=0).double(), law.sample(400_000, seed=5)
    for power in (1, 2):
        ours, theirs = (v.pow(power).mean(0) for v in (x, data))
        error = x.pow(power).std(0) / math.sqrt(len(x))
        assert bool(((ours - theirs).abs() < 5 * error + 5e-3).all())
    coarse = exact_chain(law, LogSNRSchedule(6.0, -9.0), 2, FixedSmall())
    spread = coarse.sample(2000, seed=0).double().var(0)
    assert bool((spread < 0.5 * data.var(0)).all())  # what the covariance puts right


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
def test_the_spread_is_the_covariance_of_the_posterior(kind: str) -> None:
    law = gaussian_law(4)
    reverse = exact_chain(law, LogSNRSchedule(4.0, -4.0), 7, PosteriorCovariance(kind))
    x_0 = law.sample(3, seed=2)
    for t in (1, 4, 7):
        step = reverse.step(t, x_0)
        x_t = step.noised(x_0, draws(3, 4, seed=t))
        spread = reverse.predict(x_t, step).spread
        assert spread is not None
        data = gaussian_matrix(4)
        alpha, sigma = step.alpha, step.sigma
        exact = torch.linalg.inv(torch.linalg.inv(data) + alpha**2 / sigma**2 * torch.eye(4))
        if kind == "isotropic":
            exact = exact.trace() / 4 * torch.eye(4, dtype=F64)
        if kind == "diagonal":
            exact = exact.diagonal().diag()
        torch.testing.assert_close(dense(spread, (4,))[0], exact, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
def test_mean_weight_is_the_models_density(kind: str) -> None:
    """Of 4 samples by 20,000 paths each, against quadrature; 5 standard errors."""
    law = GaussianMixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.0], [0.8]]), 0.3)
    forward = ForwardChain(LogSNRSchedule(3.0, -4.0), 4)
    variance = PosteriorCovariance(kind)
    reverse = ReverseChain(NoiseDenoiser(law.network()), forward, (1,), variance=variance).double()
    x_0 = torch.tensor([[-1.3], [-0.2], [0.7], [2.0]], dtype=F64)
    batch = Batch(x_0, None, range(4), seed=5, rows=100_000)
    weights = path_weights(reverse, batch, 20_000).exp()
    exact = GridOracle(reverse, -9.0, 9.0, 2001).log_prob(x_0).exp()
    error = weights.std(1) / math.sqrt(20_000)
    assert bool(((weights.mean(1) - exact).abs() < 5 * error).all())


# -- any network ---------------------------------------------------------------------------------


class Rough(nn.Module):
    """A network whose Jacobian is not symmetric and, without the ``slope``, not positive."""

    def __init__(self, slope: float = 0.0):
        super().__init__()
        self.mix, self.slope = nn.Parameter(draws(3, 3, seed=30)), slope

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        return self.slope * x + 0.5 * torch.tanh(x @ self.mix.to(x))


def rough_chain(
    variance: Variance, num_steps: int = 6, slope: float = 0.0, **options: Any
) -> ReverseChain:
    forward = ForwardChain(LogSNRSchedule(4.0, -4.0), num_steps)
    return ReverseChain(DataDenoiser(Rough(slope)), forward, (3,), variance=variance, **options)


@every_kind
def test_steps_are_positive_definite_whatever_the_network(variance: Variance) -> None:
    reverse, x = rough_chain(variance), 2 * draws(20, 3)
    reverse.requires_grad_(False)
    for t in range(1, 7):
        step = reverse.step(t, x)
        covariance = variance.covariance(step, reverse.predict(x, step), 1)
        least = torch.inf
        for row in range(3):  # of a root
            unit = torch.eye(3, dtype=F64)[row].expand(20, 3)
            least = min(least, covariance.color(unit, 1).detach().square().sum(1).min().item())
        assert least > 0 and bool(covariance.log_marginal(1).isfinite().all())
        small = math.exp(float(step.log_small)) if t > 1 else 0.0
        assert least >= small * (1 - 1e-9)


@every_kind
def test_terms_of_the_bound_are_kls_of_the_programs(variance: Variance) -> None:
    """Monte Carlo over q(x_{t−1} | x_t, x_0): 40,000 draws, 5 standard errors."""
    reverse, x_0, noise = rough_chain(variance), draws(1, 3), draws(1, 3, seed=1)
    for t in (2, 4, 6):
        term = variational_term(reverse, x_0, t, noise).item()
        x_t = reverse.forward_chain.sample(x_0, t, noise)
        knots = reverse.log_snrs[t - 2], reverse.log_snrs[t - 1]
        q, p = posterior(x_t, x_0, *knots, 1), reverse.transition(x_t, t)
        torch.manual_seed(t)
        x = q.sample((40_000,))
        ratio = q.log_prob(x) - p.log_prob(x)
        assert abs(term - ratio.mean().item()) < 5 * ratio.std().item() / 200 + 1e-9
    torch.testing.assert_close(
        variational_term(reverse, x_0, 1, noise),
        -reverse.decode(reverse.forward_chain.sample(x_0, 1, noise)).log_prob(x_0),
    )


@every_kind
def test_log_weights_are_the_programs_traces(variance: Variance) -> None:
    reverse, x_0 = rough_chain(variance), draws(4, 3)
    batch = Batch(x_0, None, range(4), seed=0, rows=100)
    log_w = path_weights(reverse, batch, 1)[:, 0]
    streams = NoiseStreams(0, range(4), reverse.event_shape)
    chain, x = reverse.forward_chain, {}
    x[6] = chain.sample(x_0, 6, streams.normal(x_0))
    for t in range(6, 1, -1):
        step = reverse.step(t, x_0)
        x[t - 1] = step.mean(x_0, x[t]) + (0.5 * step.log_small).exp() * streams.normal(x_0)
    values = {f"x_{t}": value for t, value in x.items()}
    model = poutine.trace(poutine.condition(reverse, data=values)).get_trace(x_0)
    guide = poutine.trace(poutine.condition(chain, data=values)).get_trace(x_0)
    for trace in (model, guide):
        trace.compute_log_prob()
    total = sum(site["log_prob"] for name, site in model.nodes.items() if name.startswith("x_"))
    total = total - sum(s["log_prob"] for n, s in guide.nodes.items() if n.startswith("x_"))
    torch.testing.assert_close(log_w, total.detach(), rtol=1e-9, atol=1e-9)


def test_pyros_own_bounds_agree_with_ours() -> None:
    """Means over 4000 draws each; 5 standard errors of a difference of two."""
    decoder = GaussianDecoder(0.5)  # without it t = 1 alone has heavy tails
    reverse = rough_chain(PosteriorCovariance("full"), 4, slope=1.0, decoder=decoder)
    x_0 = draws(1, 3)
    chain = reverse.forward_chain
    pyro.set_rng_seed(0)
    with torch.no_grad():
        wide = x_0.expand(4000, 3)
        log_w = path_weights(reverse, Batch(wide, None, range(4000), seed=7, rows=4000), 1)
        error = math.sqrt(2 / 4000) * float(log_w.std())
        ours = VariationalBound(AllTimesteps(), seed=1).loss(reverse, chain, wide) / 4000
        losses = {
            kind: kind().loss(reverse, chain, wide) / 4000
            for kind in (Trace_ELBO, TraceMeanField_ELBO)
        }
    for value in losses.values():
        assert value == pytest.approx(ours, abs=5 * error)


@every_kind
def test_mean_weight_does_not_depend_on_batches(variance: Variance) -> None:
    reverse, x_0 = rough_chain(variance), draws(7, 3)
    whole = PathBound(2).estimate(reverse, x_0, seed=4)
    small = PathBound(2).estimate(reverse, x_0, seed=4, batch_size=2)
    torch.testing.assert_close(whole.value, small.value, rtol=1e-10, atol=1e-10)
    alone = PathBound(2).estimate(reverse, x_0[5:6], seed=4, indices=[5])
    torch.testing.assert_close(whole.value[5:6], alone.value, rtol=1e-10, atol=1e-10)
    at_once, one = reverse.sample(5, seed=2), reverse.sample(5, seed=2, batch_size=1)
    torch.testing.assert_close(at_once, one, rtol=1e-10, atol=1e-10)


@every_kind
def test_products_are_counted_as_calls(variance: Variance) -> None:
    """Against the backward passes that the network really made."""
    reverse, x_0 = rough_chain(variance), draws(2, 3)
    forwards, backwards = [], []
    network = reverse.denoiser.network

    def count(module: nn.Module, arguments: Any, output: Tensor) -> None:
        forwards.append(len(output))
        if output.requires_grad:
            output.register_hook(lambda _: backwards.append(1))

    handle = network.register_forward_hook(count)
    result = ImportanceBound(4).estimate(reverse, x_0, seed=0)
    handle.remove()
    steps = reverse.num_steps
    assert len(forwards) == steps and forwards[0] == 8
    assert len(backwards) == steps * variance.products(3)
    assert result.calls.tolist() == [4 * steps * (1 + variance.products(3))] * 2


@every_kind
def test_gradients_reach_the_network(variance: Variance) -> None:
    """Against finite differences in a random direction."""
    reverse, x_0 = rough_chain(variance, slope=1.5), draws(5, 3)
    noise = draws(5, 3, seed=1)
    weight, direction = reverse.denoiser.network.mix, draws(3, 3, seed=2)
    t = torch.tensor([1, 2, 3, 5, 6])

    def loss() -> Tensor:
        return variational_term(reverse, x_0, t, noise).sum()

    loss().backward()
    slope = float((weight.grad * direction).sum())
    values = []
    for shift in (1e-6, -1e-6):
        with torch.no_grad():
            weight += shift * direction
            values.append(float(loss()))
            weight -= shift * direction
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "decoder", [DiscretizedGaussianDecoder(0.5), CategoricalDecoder(5)], ids=["bins", "levels"]
)
@every_kind
def test_discrete_decoders_read_the_diagonal(variance: Variance, decoder: Any) -> None:
    reverse = rough_chain(variance, decoder=decoder)
    x_0 = (2 * draws(4, 3)).round().clamp(-2, 2) / 2
    result = PathBound(2).estimate(reverse, x_0, seed=0)
    assert bool(result.value.isfinite().all())
    assert reverse.sample(3, seed=0).shape == (3, 3)


def test_images_and_particles_on_the_left() -> None:
    forward = ForwardChain(LinearSchedule(), 30)
    network = ResidualMLP((1, 2, 2), width=8, blocks=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for variance in KINDS.values():
        reverse = ReverseChain(NoiseDenoiser(network), forward, (1, 2, 2), variance=variance)
        x = torch.randn(3, 5, 1, 2, 2)  # (particles, N, *event)
        for t in (1, 2, 30):
            law = reverse.transition(x, t) if t > 1 else reverse.decode(x)
            each = [reverse.transition(v, t) if t > 1 else reverse.decode(v) for v in x]
            values = torch.stack([one.log_prob(x[0]) for one in each])
            torch.testing.assert_close(law.log_prob(x[:1]), values, rtol=1e-3, atol=1e-3)


@every_kind
def test_a_network_that_does_not_read_its_input_has_no_spread(variance: Variance) -> None:
    """x̂_0 = 0: Σ is the fixed small variance, and at t = 1 the least there is."""

    class Zero(nn.Module):
        def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.zeros_like(x)

    forward = ForwardChain(LogSNRSchedule(4.0, -4.0), 5)
    chains = [
        ReverseChain(DataDenoiser(Zero()), forward, (3,), variance=v, decoder=GaussianDecoder(1.0))
        for v in (variance, FixedSmall())
    ]
    values = [PathBound(2).estimate(chain, draws(4, 3), seed=0).value for chain in chains]
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-10)
    step = chains[0].step(1, draws(4, 3))
    covariance = variance.covariance(step, chains[0].predict(draws(4, 3), step), 1)
    least = covariance.log_marginal(1).exp() / step.sigma.square()
    torch.testing.assert_close(least, torch.full_like(least, 0.01))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="kind to be one of .*got 'ful'; did you mean 'full'"):
        PosteriorCovariance("ful")
    with pytest.raises(ValueError, match="rank with kind 'diagonal'; got it with 'full'"):
        PosteriorCovariance("full", rank=2)
    with pytest.raises(ValueError, match="no probes for kind 'full'"):
        PosteriorCovariance("full", probes=2)
    with pytest.raises(ValueError, match="probes to be an integer >= 1"):
        PosteriorCovariance("diagonal", probes=0)
