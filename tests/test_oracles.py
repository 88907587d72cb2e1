"""Laws of the oracles: each exact answer against another way of getting it.

Monte Carlo comparisons allow 4 standard errors: a right answer fails one with probability 6e-5
under fresh seeds (two-sided normal), and never under the fixed ones.
"""

from __future__ import annotations

import math
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain, kernels
from pyrodiff.decoders import CategoricalDecoder, DiscretizedGaussianDecoder, GaussianDecoder
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser, VelocityDenoiser
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import VariationalBound
from pyrodiff.oracles import (
    Gaussian,
    GaussianMixture,
    GridOracle,
    Product,
    ProductNetwork,
    linear_bound,
    linear_log_prob,
)
from pyrodiff.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule
from pyrodiff.variances import FixedLarge, FixedSmall, LearnedRange

F64 = torch.float64
DENOISERS = {"noise": NoiseDenoiser, "data": DataDenoiser, "velocity": VelocityDenoiser}


def random_covariance(size: int, seed: int = 0) -> Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return root @ root.T / size + 0.1 * torch.eye(size, dtype=F64)


def random_gaussian(size: int, seed: int = 0) -> Gaussian:
    mean = torch.randn(size, generator=torch.Generator().manual_seed(seed + 100), dtype=F64)
    return Gaussian(mean, random_covariance(size, seed))


def mixture_1d() -> GaussianMixture:
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=F64)
    means = torch.tensor([[-1.5], [0.2], [1.0]], dtype=F64)
    return GaussianMixture(weights, means, torch.tensor([0.2, 0.5, 0.1], dtype=F64))


def mixture_2d() -> GaussianMixture:
    covariances = torch.stack([random_covariance(2, seed) for seed in range(3)])
    means = torch.tensor([[-1.5, 0.3], [0.2, -1.0], [1.0, 1.0]], dtype=F64)
    return GaussianMixture(torch.tensor([0.3, 0.5, 0.2], dtype=F64), means, covariances)


def perturbed_mlp(seed: int = 0, learned_variance: bool = False) -> ResidualMLP:
    torch.manual_seed(seed)
    network = ResidualMLP((1,), width=16, blocks=2, learned_variance=learned_variance).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return network.eval()


class AffineNetwork(nn.Module):
    """A random affine map of x whose coefficients move with the log-SNR."""

    def __init__(self, size: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("matrix", torch.randn(size, size, generator=generator, dtype=F64))
        self.register_buffer("offset", torch.randn(size, generator=generator, dtype=F64))

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        gate = torch.sigmoid(0.3 * log_snr)[:, None]
        mapped = 0.4 * x.flatten(1) @ self.matrix.T / math.sqrt(self.matrix.shape[0])
        return (gate * mapped + 0.3 * self.offset * (1 - gate)).reshape(x.shape)


def chain(network: nn.Module, steps: int, shape: tuple[int, ...] = (1,), **options) -> ReverseChain:
    kind = DENOISERS[options.pop("prediction", "noise")]
    schedule = options.pop("schedule", LogSNRSchedule(5.0, -5.0))
    return ReverseChain(kind(network), ForwardChain(schedule, steps), shape, **options).eval()


def mlp_chain(steps: int, seed: int = 0, learned: bool = False, **options) -> ReverseChain:
    schedule = options.pop("schedule", LogSNRSchedule(3.0, -4.0))
    network = perturbed_mlp(seed, learned)
    return chain(network, steps, prediction="data", schedule=schedule, **options)


def path_log_weights(reverse: ReverseChain, x_0: Tensor) -> Tensor:
    """log p_θ(x_0:T) − log q(x_1:T | x_0) of one path per row, from Pyro's own traces."""
    with torch.no_grad():
        guide = poutine.trace(reverse.forward_chain).get_trace(x_0)
        model = poutine.trace(poutine.replay(reverse, trace=guide)).get_trace(x_0)
        return sum(
            sign * site["fn"].log_prob(site["value"])
            for sign, trace in ((1, model), (-1, guide))
            for name, site in trace.nodes.items()
            if name.startswith("x_")
        )


# -- data laws ---------------------------------------------------------------------------------


def test_densities_integrate_to_one() -> None:
    axis = torch.linspace(-9, 9, 601, dtype=F64)
    area = (axis[1] - axis[0]) ** 2
    plane = torch.cartesian_prod(axis, axis)
    for law in (random_gaussian(2), mixture_2d(), Product(mixture_1d(), random_gaussian(1))):
        assert float(law.log_prob(plane).exp().sum() * area) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("law", [random_gaussian(3), mixture_2d(), mixture_1d()])
def test_samples_have_the_density_they_claim(law: Gaussian | GaussianMixture) -> None:
    # E log p over samples of p is minus the entropy, and E p(x)^(−1) q(x) = 1 for any density q
    x = law.sample(20000, seed=1)
    size = x.shape[1]
    q = torch.distributions.MultivariateNormal(x.mean(0), 0.3 * torch.cov(x.T).reshape(size, size))
    ratio = (q.log_prob(x) - law.log_prob(x)).exp()
    error = float(ratio.std()) / math.sqrt(len(x))
    assert abs(float(ratio.mean()) - 1) < 4 * error < 0.12
    before = torch.get_rng_state()
    assert torch.equal(law.sample(5, seed=3), law.sample(5, seed=3))
    assert not torch.equal(law.sample(5, seed=3), law.sample(5, seed=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_gaussian_is_torchs_and_a_mixture_of_one() -> None:
    law = random_gaussian(4)
    x = law.sample(50, seed=0)
    torch.testing.assert_close(
        law.log_prob(x),
        torch.distributions.MultivariateNormal(law.mean, law.covariance).log_prob(x),
    )
    one = GaussianMixture(torch.ones(1), law.mean[None], law.covariance[None])
    torch.testing.assert_close(one.log_prob(x), law.log_prob(x))
    log_snr = torch.linspace(-9, 9, 50, dtype=F64)
    for prediction in DENOISERS:
        torch.testing.assert_close(
            one.network(prediction)(x, log_snr), law.network(prediction)(x, log_snr)
        )


def test_scales_are_covariances() -> None:
    means = torch.randn(3, 2, dtype=F64)
    weights = torch.full((3,), 1 / 3, dtype=F64)
    scales = torch.tensor([[0.5, 1.0], [2.0, 0.3], [1.0, 1.0]], dtype=F64)
    diagonal = GaussianMixture(weights, means, scales)
    full = GaussianMixture(weights, means, torch.diag_embed(scales.square()))
    x = diagonal.sample(40, seed=0)
    torch.testing.assert_close(diagonal.log_prob(x), full.log_prob(x))
    torch.testing.assert_close(diagonal.network()(x, x[:, 0]), full.network()(x, x[:, 0]))
    torch.testing.assert_close(diagonal.covariances, full.covariances)
    single = GaussianMixture(weights, means, 0.7)
    torch.testing.assert_close(
        single.log_prob(x), GaussianMixture(weights, means, torch.full((3,), 0.7)).log_prob(x)
    )


@pytest.mark.parametrize("log_snr", [-12.0, -2.0, 0.0, 3.0, 7.0])
@pytest.mark.parametrize("prediction", DENOISERS)
def test_network_is_the_conditional_mean(prediction: str, log_snr: float) -> None:
    # E[target | x_t] by quadrature over x_0 in two dimensions
    law = mixture_2d()
    lam = torch.tensor(log_snr, dtype=F64)
    alpha, sigma = torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt()
    x_t = alpha * law.sample(6, seed=0) + sigma * torch.randn(6, 2, dtype=F64)
    # around the prior where x_t says little, around x_t / α where it says much
    width, follow = (12.0, 0.0) if log_snr <= 0 else (10 * float(sigma / alpha), 1.0)
    axis = torch.linspace(-width, width, 401, dtype=F64)
    for x, output in zip(x_t, law.network(prediction)(x_t, lam.expand(6)), strict=True):
        x_0 = torch.cartesian_prod(axis, axis) + follow * x / alpha
        prior = law.log_prob(x_0)
        noise = (x - alpha * x_0) / sigma
        weight = (prior - 0.5 * noise.square().sum(1)).softmax(0)
        target = {"noise": noise, "data": x_0, "velocity": alpha * noise - sigma * x_0}[prediction]
        torch.testing.assert_close(output, weight @ target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", [random_gaussian(3), mixture_2d()])
def test_predictions_give_one_denoiser(law: Gaussian | GaussianMixture) -> None:
    size = law.event_shape[0]
    data = []
    for prediction in DENOISERS:
        reverse = chain(
            law.network(prediction),
            8,
            (size,),
            prediction=prediction,
            schedule=LogSNRSchedule(14.0, -14.0),
        )
        x = 3 * torch.randn(20, size, generator=torch.Generator().manual_seed(0), dtype=F64)
        data.append([reverse.predict(x, reverse.step(t, x)).x0_hat for t in range(1, 9)])
    for other in data[1:]:
        torch.testing.assert_close(other, data[0], rtol=1e-8, atol=1e-8)


def test_network_is_stable_far_away_and_keeps_dtype() -> None:
    network = mixture_2d().network("data")
    far = torch.tensor([[1e4, -1e4], [0.0, 0.0]], dtype=torch.float32)
    for log_snr in (-30.0, 0.0, 30.0):
        output = network(far, torch.tensor(log_snr), torch.zeros(2, 3))
        assert output.dtype == torch.float32 and bool(output.isfinite().all())


def test_mixture_posterior_is_bayes_rule() -> None:
    # normalised prior × likelihood on a grid is the posterior density, everywhere
    law = mixture_2d()
    A, y, scale = torch.tensor([[0.8, -0.5]], dtype=F64), torch.tensor([0.4], dtype=F64), 0.3
    posterior = law.posterior(A, y, scale)
    axis = torch.linspace(-8, 8, 801, dtype=F64)
    x = torch.cartesian_prod(axis, axis)
    area = (axis[1] - axis[0]) ** 2
    log_joint = law.log_prob(x) - 0.5 * ((y - x @ A.T) / scale).square().sum(1)
    exact = log_joint - (log_joint.logsumexp(0) + area.log())
    near = exact > -30
    torch.testing.assert_close(posterior.log_prob(x)[near], exact[near], rtol=1e-7, atol=1e-7)


def test_mixture_posterior_at_size() -> None:
    # K = 10, d = 64: a nearly noiseless measurement of every axis returns the measured point,
    # in the component that it came from
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(10, 64, generator=generator, dtype=F64)
    law = GaussianMixture(torch.full((10,), 0.1, dtype=F64), means, 0.2)
    x = law.sample(1, seed=0)[0]
    posterior = law.posterior(torch.eye(64, dtype=F64), x, 1e-4)
    torch.testing.assert_close((posterior.weights @ posterior.means), x, rtol=1e-5, atol=1e-5)
    nearest = int((means - x).norm(dim=1).argmin())
    assert float(posterior.weights[nearest]) == pytest.approx(1, abs=1e-9)
    # and one that says nothing returns the prior
    loose = law.posterior(torch.eye(64, dtype=F64), x, 1e6)
    torch.testing.assert_close(loose.log_prob(x[None]), law.log_prob(x[None]), rtol=1e-6, atol=1e-6)


# -- affine chains -----------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [FixedLarge(), FixedSmall()])
@pytest.mark.parametrize("prediction", DENOISERS)
def test_linear_log_prob_is_the_grids(variance: FixedLarge | FixedSmall, prediction: str) -> None:
    options = dict(prediction=prediction, variance=variance, schedule=LogSNRSchedule(5.0, -2.0))
    reverse = chain(AffineNetwork(1, seed=3), 10, **options)
    x = torch.linspace(-2, 2, 17, dtype=F64)[:, None]
    exact = linear_log_prob(reverse, x)
    grid = GridOracle(reverse, -24, 24, 1501).log_prob(x)
    torch.testing.assert_close(grid, exact, rtol=1e-9, atol=1e-9)


def test_linear_log_prob_converges_to_the_data_law() -> None:
    # the exact denoiser leaves only the error of the discretisation, of first order in 1/T
    law = random_gaussian(3)
    x = law.sample(20, seed=0)
    errors = []
    for steps in (128, 256, 512):
        reverse = chain(law.network(), steps, (3,), schedule=LogSNRSchedule(18.0, -18.0))
        errors.append(float((linear_log_prob(reverse, x) - law.log_prob(x)).abs().max()))
    assert errors[-1] < 0.2
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.6 < ratio < 2.5 for ratio in ratios), (errors, ratios)


@pytest.mark.parametrize("schedule", [CosineSchedule(), LinearSchedule(), LogSNRSchedule()])
@pytest.mark.parametrize("decoder", [GaussianDecoder(), GaussianDecoder(scale=0.3)])
def test_linear_bound_is_below_linear_log_prob(schedule, decoder: GaussianDecoder) -> None:
    for network in (AffineNetwork(4), random_gaussian(4).network()):
        for variance in (FixedLarge(), FixedSmall()):
            reverse = chain(
                network, 30, (4,), schedule=schedule, decoder=decoder, variance=variance
            )
            x = torch.randn(10, 4, dtype=F64)
            bound = linear_bound(reverse, x)
            assert bound.prior.shape == (10,) and bound.terms.shape == (10, 30)
            assert bool((bound.prior > 0).all()) and bool((bound.terms[:, 1:] >= 0).all())
            torch.testing.assert_close(bound.elbo, -bound.prior - bound.terms.sum(1))
            assert bool((bound.elbo <= linear_log_prob(reverse, x)).all())


@pytest.mark.parametrize("decoder", [GaussianDecoder(), GaussianDecoder(scale=0.3)])
def test_linear_bound_is_the_mean_path_weight(decoder: GaussianDecoder) -> None:
    law = random_gaussian(8)
    reverse = chain(law.network(), 50, (8,), decoder=decoder)
    x, paths = law.sample(3, seed=0), 3000
    weights = path_log_weights(reverse, x.repeat_interleave(paths, 0)).reshape(3, paths)
    error = weights.std(1) / math.sqrt(paths)
    assert bool(((weights.mean(1) - linear_bound(reverse, x).elbo).abs() < 4 * error).all())
    assert bool((error < 0.2).all())


def test_linear_bound_is_pyros_elbo() -> None:
    # an event of two axes, a network that is not the optimum: Trace_ELBO sums over the batch
    reverse = chain(AffineNetwork(6), 20, (2, 3), variance=FixedSmall())
    x = torch.randn(5, 2, 3, dtype=F64)
    copies, bound = 400, linear_bound(reverse, x)
    elbo = Trace_ELBO()
    with torch.no_grad():
        losses = torch.tensor(
            [elbo.loss(reverse, reverse.forward_chain, x.repeat(copies, 1, 1)) for _ in range(12)]
        )
    error = float(losses.std()) / math.sqrt(12) / copies
    # 12 values give a Student t of 11 degrees of freedom: 4 SE fail at 2e-3 under fresh seeds
    assert abs(float(losses.mean()) / copies + float(bound.elbo.sum())) < 4 * error
    assert error < 0.02 * abs(float(bound.elbo.sum()))


def test_linear_terms_are_expected_divergences() -> None:
    # each term alone, against the mean over noise of the KL that Pyro's distributions give
    reverse = chain(AffineNetwork(3), 6, (3,))
    x, draws = torch.randn(1, 3, dtype=F64), 20000
    bound, forward = linear_bound(reverse, x), reverse.forward_chain
    many = x.expand(draws, 3)
    for t in range(1, 7):
        x_t = forward.sample(many, t, torch.randn(draws, 3, dtype=F64))
        with torch.no_grad():
            if t == 1:
                values = -reverse.decode(x_t).log_prob(many)
            else:
                q = kernels.posterior(x_t, many, forward.log_snr[t - 2], forward.log_snr[t - 1], 1)
                values = torch.distributions.kl_divergence(q, reverse.transition(x_t, t))
        error = float(values.std()) / math.sqrt(draws)
        assert abs(float(values.mean() - bound.terms[0, t - 1])) < 4 * error


def test_linear_refuses() -> None:
    x = torch.zeros(2, 1, dtype=F64)
    for call in (linear_log_prob, linear_bound):
        with pytest.raises(ValueError, match="Expected a denoiser that is affine in x_t; got"):
            call(chain(mixture_1d().network(), 5), x)
        with pytest.raises(ValueError, match="Expected a fixed variance; got LearnedRange"):
            call(chain(perturbed_mlp(learned_variance=True), 5, variance=LearnedRange()), x)
        with pytest.raises(TypeError, match="Expected a chain with a GaussianDecoder; got Categ"):
            call(chain(random_gaussian(1).network(), 5, decoder=CategoricalDecoder(5)), x)
        with pytest.raises(ValueError, match=r"Expected data of shape \(N, 1\); got \(2, 2\)"):
            call(chain(random_gaussian(1).network(), 5), torch.zeros(2, 2, dtype=F64))
        with pytest.raises(ValueError, match=r"affine in x_t; got clip=\(-9.0, 9.0\)"):
            denoiser = DataDenoiser(random_gaussian(1).network("data"), clip=(-9.0, 9.0))
            call(ReverseChain(denoiser, ForwardChain(LogSNRSchedule(5.0, -5.0), 5), (1,)), x)


def test_linear_accepts_float32_networks() -> None:
    reverse = chain(nn.Sequential(), 1, (2,))  # no parameters: probed in float64
    network = AffineNetwork(2)
    x = torch.randn(4, 2, dtype=F64)
    double = linear_log_prob(chain(network, 20, (2,)), x)
    single = linear_log_prob(chain(AffineNetwork(2).float(), 20, (2,)), x.float())
    assert single.dtype == F64 and reverse.num_steps == 1
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-3)


# -- grids -------------------------------------------------------------------------------------


GRID_CHAINS = {
    "fixed-large": dict(variance=FixedLarge()),
    "fixed-small": dict(variance=FixedSmall()),
    "learned-range": dict(variance=LearnedRange()),
    "discretized": dict(decoder=DiscretizedGaussianDecoder(bin_width=0.25)),
    "categorical": dict(decoder=CategoricalDecoder(9)),
}


@pytest.mark.parametrize("options", GRID_CHAINS.values(), ids=GRID_CHAINS)
def test_grid_is_the_mean_of_path_weights(options: dict) -> None:
    learned = isinstance(options.get("variance"), LearnedRange)
    # noisy latents, where the weights of a network that denoises nothing still have a variance
    reverse = mlp_chain(5, 0, learned, schedule=LogSNRSchedule(0.0, -3.0), **options)
    x, paths = torch.tensor([[-0.75], [0.0], [0.5]], dtype=F64), 20000
    weights = path_log_weights(reverse, x.repeat_interleave(paths, 0)).reshape(3, paths).exp()
    error = weights.std(1) / math.sqrt(paths)
    exact = GridOracle(reverse, -10, 10, 1001).log_prob(x).exp()
    assert bool(((weights.mean(1) - exact).abs() < 4 * error).all())
    assert bool((error < 0.03 * exact).all())


def test_grid_is_the_mean_of_path_weights_of_a_trained_network() -> None:
    """E_q[w] = p_θ(x_0) after training through SVI, at 3 standard errors.

    Three comparisons: a fresh seed fails with probability 0.8 %; the seed is fixed.
    """
    law = mixture_1d()
    network = ResidualMLP((1,), width=32, blocks=2).double()
    reverse = ReverseChain(
        NoiseDenoiser(network), ForwardChain(LogSNRSchedule(4.0, -5.0), 25), (1,)
    )
    svi = SVI(reverse, reverse.forward_chain, Adam({"lr": 3e-3}), loss=VariationalBound())
    data = law.sample(256 * 400, seed=1).reshape(400, 256, 1)
    losses = [svi.step(batch) / 256 for batch in data]
    assert sum(losses[-50:]) < 0.8 * sum(losses[:50])
    x, paths = torch.tensor([[-1.0], [0.2], [1.5]], dtype=torch.float64), 4000
    oracle = GridOracle(reverse, -12.0, 12.0, 3001)
    held_out = law.sample(1000, seed=2)
    divergence = (law.log_prob(held_out) - oracle.log_prob(held_out)).mean()
    assert float(divergence) < 0.1  # it did learn the law: KL(data ‖ model) in nats
    exact = oracle.log_prob(x)
    weights = path_log_weights(reverse, x.repeat_interleave(paths, 0)).reshape(3, paths).exp()
    error = weights.std(1) / math.sqrt(paths)
    assert bool((error < 0.05 * exact.exp()).all())
    assert bool(((weights.mean(1) - exact.exp()).abs() < 3 * error).all())


@pytest.mark.parametrize("options", GRID_CHAINS.values(), ids=GRID_CHAINS)
def test_grid_is_normalised_and_converged(options: dict) -> None:
    learned = isinstance(options.get("variance"), LearnedRange)
    reverse = mlp_chain(8, 1, learned, **options)
    coarse, fine = GridOracle(reverse, -10, 10, 501), GridOracle(reverse, -12, 12, 1501)
    torch.testing.assert_close(
        fine.densities.sum(1) * fine.spacing, torch.ones(8, dtype=F64), rtol=0, atol=1e-7
    )
    if reverse.decoder.discrete:
        x, width = torch.linspace(-1, 1, 9, dtype=F64)[:, None], 1.0
    else:
        x = torch.linspace(-9, 9, 901, dtype=F64)[:, None]
        width = 0.02
    assert float(fine.log_prob(x).exp().sum()) * width == pytest.approx(1, abs=1e-6)
    near = fine.log_prob(x) > -15  # the quadrature's error is absolute
    torch.testing.assert_close(coarse.log_prob(x)[near], fine.log_prob(x)[near], rtol=0, atol=1e-6)
    shuffled = torch.randperm(len(x))
    torch.testing.assert_close(fine.log_prob(x[shuffled]), fine.log_prob(x)[shuffled])


def test_grid_samples_its_chain() -> None:
    reverse = mlp_chain(6)
    oracle = GridOracle(reverse, -10, 10, 501)
    axis = torch.linspace(-9, 9, 1801, dtype=F64)
    density = oracle.log_prob(axis[:, None]).exp() * 0.01
    x = oracle.sample(4000, seed=0).squeeze(1)
    for f in (torch.sin, torch.cos, torch.tanh):
        error = float(f(x).std()) / math.sqrt(len(x))
        assert abs(float(f(x).mean()) - float(f(axis) @ density)) < 4 * error


def test_grid_with_a_context() -> None:
    torch.manual_seed(0)
    network = ResidualMLP((1,), width=8, blocks=1, context_size=2).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reverse = chain(network, 5, prediction="data", schedule=LogSNRSchedule(3.0, -4.0))
    x = torch.tensor([[0.3]], dtype=F64)
    values = []
    for context in torch.tensor([[0.0, 0.0], [2.0, -2.0]], dtype=F64):
        oracle = GridOracle(reverse, -10, 10, 501, context=context)
        values.append(float(oracle.log_prob(x)))
        assert oracle.sample(3, seed=0).shape == (3, 1)
    assert abs(values[0] - values[1]) > 1e-3


def test_grid_refuses_or_warns() -> None:
    network = random_gaussian(1).network()
    with pytest.raises(ValueError, match=r"Expected a chain with event_shape \(1,\); got \(2,\)"):
        GridOracle(chain(AffineNetwork(2), 5, (2,)), -5, 5, 100)
    with pytest.raises(ValueError, match="Expected finite low < high and points >= 2; got 5, 5"):
        GridOracle(chain(network, 5), 5, 5, 100)
    with pytest.raises(ValueError, match=r"Expected a grid that holds all of p\(x_5\); got mass 0"):
        GridOracle(chain(network, 5), -2, 2, 500)
    # the prior fits, the data law around 12 does not
    moved = Gaussian(torch.tensor([12.0]), torch.tensor([[1.0]])).network()
    with pytest.raises(ValueError, match=r"Expected a grid that holds all of p\(x_\d\); got mass"):
        GridOracle(chain(moved, 5), -8, 8, 2000)
    sharp = chain(network, 5, schedule=LogSNRSchedule(9.0, -5.0), variance=FixedSmall())
    with pytest.raises(ValueError, match="Expected a grid spacing below the width of the tran"):
        GridOracle(sharp, -8, 8, 100)
    with pytest.raises(ValueError, match="width of the decoder; got 400 points, where about"):
        GridOracle(chain(network, 5, decoder=GaussianDecoder(scale=0.005)), -8, 8, 400)
    with pytest.raises(ValueError, match=r"Expected data of shape \(N, 1\); got \(3,\)"):
        GridOracle(chain(network, 5), -8, 8, 500).log_prob(torch.zeros(3, dtype=F64))


def test_grid_rather_coarse_warns_and_loses_no_mass() -> None:
    reverse = chain(random_gaussian(1).network(), 10, decoder=GaussianDecoder(scale=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = GridOracle(reverse, -10, 10, 2001)
    # the narrowest transition has r between ½ and 1 on the coarse grid
    least = min(
        float(reverse.transition(torch.zeros(1, 1, dtype=F64), t).base_dist.scale)
        for t in range(2, 11)
    )
    points = round(20 / (1.25 * least)) + 1
    with pytest.warns(UserWarning, match="Expected a grid spacing below the width"):
        coarse = GridOracle(reverse, -10, 10, points)
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    assert float(coarse.densities[0].sum() * coarse.spacing) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(coarse.log_prob(x), fine.log_prob(x), rtol=0, atol=0.01)


# -- products ----------------------------------------------------------------------------------


def test_product_is_the_block_diagonal_gaussian() -> None:
    a, b = random_gaussian(2, 0), random_gaussian(3, 1)
    product = Product(a, b)
    whole = Gaussian(torch.cat([a.mean, b.mean]), torch.block_diag(a.covariance, b.covariance))
    x = product.sample(30, seed=0)
    torch.testing.assert_close(product.log_prob(x), whole.log_prob(x))
    log_snr = torch.linspace(-8, 8, 30, dtype=F64)
    for prediction in DENOISERS:
        torch.testing.assert_close(
            product.network(prediction)(x, log_snr), whole.network(prediction)(x, log_snr)
        )
    assert product.event_shape == (5,)
    assert torch.equal(x, product.sample(30, seed=0))
    twins = Product(mixture_1d(), mixture_1d()).sample(30, seed=0)
    assert not torch.equal(twins[:, 0], twins[:, 1])


@pytest.mark.parametrize("learned", [False, True])
def test_product_of_grids_is_the_factorised_chain(learned: bool) -> None:
    a, b = perturbed_mlp(1, learned), perturbed_mlp(2, learned)
    variance = LearnedRange() if learned else FixedLarge()
    options = dict(schedule=LogSNRSchedule(0.0, -3.0), variance=variance, prediction="data")
    product = Product(*(GridOracle(chain(n, 5, **options), -10, 10, 501) for n in (a, b, a)))
    reverse = chain(ProductNetwork([a, b, a]), 5, (3,), **options)
    x, paths = torch.tensor([[0.4, -0.3, 0.1]], dtype=F64), 20000
    weights = path_log_weights(reverse, x.expand(paths, 3)).exp()
    error = float(weights.std()) / math.sqrt(paths)
    exact = float(product.log_prob(x).exp())
    assert abs(float(weights.mean()) - exact) < 4 * error < 0.2 * exact
    assert product.sample(2, seed=0).shape == (2, 3)


def test_product_shares_parameters_of_a_repeated_network() -> None:
    network = perturbed_mlp()
    both = ProductNetwork([network, network])
    assert sum(p.numel() for p in both.parameters()) == sum(p.numel() for p in network.parameters())
    assert len(both.state_dict()) == len(network.state_dict())


# -- errors ------------------------------------------------------------------------------------


def test_errors_show_both_sides() -> None:
    eye, ones = torch.eye(2, dtype=F64), torch.ones(2, dtype=F64)
    half = torch.full((2,), 0.5, dtype=F64)
    with pytest.raises(ValueError, match=r"Expected mean of shape \(d,\) and .*got \(2,\) and \(3"):
        Gaussian(ones, torch.eye(3))
    with pytest.raises(ValueError, match="Expected a symmetric covariance; got asymmetry 1"):
        Gaussian(ones, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="Expected a positive definite covariance; got eigenvalue"):
        Gaussian(ones, -eye)
    law = Gaussian(ones, eye)
    with pytest.raises(ValueError, match=r"Expected x of shape \(N, 2\); got \(4, 3\)"):
        law.log_prob(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"Expected x of shape \(N, 2\); got \(4, 1\)"):
        law.network()(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match="Expected prediction to be one of .*; got 'score'"):
        law.network("score")
    with pytest.raises(ValueError, match=r"Expected weights of shape \(K,\) .*got \(3,\) and \(2,"):
        GaussianMixture(torch.ones(3) / 3, eye, 1.0)
    with pytest.raises(ValueError, match=r"Expected non-negative weights that sum to 1; got \[1.0"):
        GaussianMixture(ones, eye, 1.0)
    with pytest.raises(ValueError, match=r"Expected scales of shape \(\), .*; got \(5,\)"):
        GaussianMixture(half, eye, torch.ones(5))
    with pytest.raises(ValueError, match="Expected positive scales; got -1"):
        GaussianMixture(half, eye, -1.0)
    mixture = GaussianMixture(half, eye, 1.0)
    with pytest.raises(ValueError, match=r"Expected A of shape \(m, 2\) and .*got \(1, 3\) and"):
        mixture.posterior(torch.ones(1, 3), torch.ones(1), 1.0)
    with pytest.raises(ValueError, match="Expected noise_scale > 0; got 0"):
        mixture.posterior(torch.ones(1, 2), torch.ones(1), 0.0)


def test_product_errors() -> None:
    with pytest.raises(ValueError, match="Expected at least one oracle; got none"):
        Product()
    with pytest.raises(ValueError, match=r"Expected x of shape \(N, 2\); got \(1, 3\)"):
        Product(random_gaussian(2)).log_prob(torch.zeros(1, 3))
    grid = GridOracle(chain(random_gaussian(1).network(), 3), -8, 8, 500)
    with pytest.raises(TypeError, match="Expected oracles that have a network; got"):
        Product(grid).network()
    with pytest.raises(ValueError, match=r"one size >= 1 for each; got 1 networks and sizes"):
        ProductNetwork([nn.Identity()], [1, 1])
    plain, doubled = perturbed_mlp(), perturbed_mlp(learned_variance=True)
    with pytest.raises(ValueError, match=r"double their output, or none; got outputs of \[1, 2\]"):
        ProductNetwork([plain, doubled])(torch.zeros(1, 2, dtype=F64), torch.zeros(1, dtype=F64))


def test_pyro_store_is_left_alone() -> None:
    GridOracle(mlp_chain(3), -10, 10, 501)
    assert len(pyro.get_param_store()) == 0
