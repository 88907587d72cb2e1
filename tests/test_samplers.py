"""DDIM and the probability flow's sampler: their laws, orders and noise, on Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import DDIM, ForwardChain, ProbabilityFlowSampler, ReverseChain
from pyrodiff.decoders import CategoricalDecoder, DiscretizedGaussianDecoder
from pyrodiff.denoisers import DataDenoiser, MeanDenoiser, NoiseDenoiser
from pyrodiff.kernels import marginal_coefficients
from pyrodiff.networks import ResidualMLP
from pyrodiff.oracles import GaussianMixture
from pyrodiff.samplers import Sampler
from pyrodiff.schedules import CosineSchedule, LogSNRSchedule
from pyrodiff.variances import FixedLarge, FixedSmall, PosteriorCovariance, Variance

F64 = torch.float64
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=F64)
SAMPLERS = {"ddim": DDIM(), "half": DDIM(0.5), "one": DDIM(1.0), "heun": ProbabilityFlowSampler()}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def covariance() -> Tensor:
    root = torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(20))
    return root @ root.mT / 3 + 0.1 * torch.eye(3, dtype=F64)


def chain(num_steps: int, variance: Variance | None = None) -> ReverseChain:
    """The exact denoiser of a Gaussian, in float64."""
    law = GaussianMixture(torch.ones(1), MEAN[None], covariance()[None])
    forward = ForwardChain(LogSNRSchedule(5.0, -6.0), num_steps)
    reverse = ReverseChain(NoiseDenoiser(law.network()), forward, (3,), variance=variance).double()
    assert reverse.prototype().dtype == F64
    return reverse


def flow(x_T: Tensor, log_snr_T: Tensor, log_snr: Tensor) -> Tensor:
    """The exact map of the flow, which keeps the standardized x in each eigenvector of the data."""
    values, basis = torch.linalg.eigh(covariance())
    (alpha_T, sigma_T), (alpha, sigma) = map(marginal_coefficients, (log_snr_T, log_snr))
    scale = (alpha**2 * values + sigma**2).sqrt() / (alpha_T**2 * values + sigma_T**2).sqrt()
    return alpha * MEAN + ((x_T - alpha_T * MEAN) @ basis * scale) @ basis.T


def errors(sampler: Sampler) -> list[float]:
    """The root mean square error of x_1 for T = 20, 40, 80, 160, from the same x_T."""
    found = []
    for num_steps in (20, 40, 80, 160):
        reverse = chain(num_steps)
        states = sampler.sample(reverse, 50, seed=0, trajectory=True)
        exact = flow(states[-1], reverse.log_snrs[-1], reverse.log_snrs[0])
        found.append(float((states[1] - exact).square().mean().sqrt()))
        decoded = reverse.predict(exact, reverse.step(1, exact)).x0_hat
        assert float((states[0] - decoded).square().mean().sqrt()) < 2 * found[-1]
    return found


@pytest.mark.parametrize(
    ("sampler", "order", "tolerance"),
    [(DDIM(), 1, 0.1), (ProbabilityFlowSampler(), 2, 0.2)],
    ids=["ddim", "heun"],
)
def test_orders_of_convergence(sampler: Sampler, order: int, tolerance: float) -> None:
    """log2 of ratios of errors, the last two within the tolerance; nothing is random but x_T."""
    found = errors(sampler)
    orders = [math.log2(a / b) for a, b in zip(found[:-1], found[1:], strict=True)]
    for value in orders[1:]:
        assert value == pytest.approx(order, abs=tolerance)
    assert found[-1] < 0.05 / 10 ** (order - 1)


@every_sampler
def test_the_same_seed_has_the_same_first_noise(sampler: Sampler) -> None:
    reverse = chain(6)
    ancestral = reverse.sample(4, seed=3, trajectory=True)
    states = sampler.sample(reverse, 4, seed=3, trajectory=True)
    assert states.shape == ancestral.shape and torch.equal(states[-1], ancestral[-1])
    assert torch.equal(sampler.sample(reverse, 4, seed=3), states[0])
    assert not torch.equal(sampler.sample(reverse, 4, seed=4)[0], states[0, 0])


def test_ddim_with_all_noise_is_ancestral_sampling() -> None:
    """With the small variance, path by path, as the noise is the same."""
    reverse = chain(7, FixedSmall())
    ancestral = reverse.sample(4, seed=3, trajectory=True)
    states = DDIM(1.0).sample(reverse, 4, seed=3, trajectory=True)
    torch.testing.assert_close(states, ancestral, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_are_those_of_the_paper(eta: float) -> None:
    """Equations 12 and 16 with ᾱ = α², for the first step, by other expressions than the code's.

    The noise is found by the difference from the step without it.
    """
    reverse = chain(5)
    states = DDIM(eta).sample(reverse, 2000, seed=1, trajectory=True)
    x_t = states[-1]
    a_t, a_s = (float(v.sigmoid()) for v in (reverse.log_snrs[-1], reverse.log_snrs[-2]))
    x0_hat = reverse.predict(x_t, reverse.step(5, x_t)).x0_hat
    noise_hat = (x_t - math.sqrt(a_t) * x0_hat) / math.sqrt(1 - a_t)
    scale = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
    mean = math.sqrt(a_s) * x0_hat + math.sqrt(1 - a_s - scale**2) * noise_hat
    rest = states[-2] - mean
    assert float(rest.std()) == pytest.approx(scale, rel=5 / math.sqrt(2 * rest.numel()), abs=1e-9)
    assert float(rest.mean().abs()) < 5 * scale / math.sqrt(rest.numel()) + 1e-9


@every_sampler
def test_marginals_of_a_gaussian(sampler: Sampler) -> None:
    """Moments of x_1 at T = 300; 4000 samples, 5 standard errors and the discretization's 1 %."""
    reverse = chain(300)
    x = sampler.sample(reverse, 4000, seed=5, batch_size=4000, trajectory=True)[1]
    alpha, sigma = marginal_coefficients(reverse.log_snrs[0])
    exact = alpha**2 * covariance() + sigma**2 * torch.eye(3)
    error = (exact.diagonal() / 4000).sqrt()
    assert bool(((x.mean(0) - alpha * MEAN).abs() < 5 * error + 0.01).all())
    ratio = x.var(0) / exact.diagonal()
    assert bool(((ratio - 1).abs() < 5 * math.sqrt(2 / 4000) + 0.01).all())


@every_sampler
def test_samples_do_not_depend_on_batches(sampler: Sampler) -> None:
    reverse = chain(6).respaced(4, grid="quadratic")
    whole = sampler.sample(reverse, 7, seed=2)
    torch.testing.assert_close(sampler.sample(reverse, 7, seed=2, batch_size=2), whole)
    torch.testing.assert_close(sampler.sample(reverse, 3, seed=2), whole[:3])


@every_sampler
@pytest.mark.parametrize("num_steps", [1, 2])
def test_chains_of_one_and_two_steps(sampler: Sampler, num_steps: int) -> None:
    assert sampler.sample(chain(num_steps), seed=0).shape == (1, 3)


class Counted(nn.Module):
    """Calls, contexts, and NaN for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        if context is None:
            return 0.5 * x
        late = (time > 0) & (context > 2)  # the last levels, for context 3
        return (0.5 * x + 0.1 * context[:, None]).masked_fill(late[:, None], torch.nan)


def counted(num_steps: int, variance: Variance | None = None) -> tuple[Counted, ReverseChain]:
    network, forward = Counted(), ForwardChain(LogSNRSchedule(4.0, -4.0), num_steps)
    return network, ReverseChain(DataDenoiser(network), forward, (3,), variance=variance)


def test_calls() -> None:
    for variance in (FixedLarge(), PosteriorCovariance("isotropic")):
        for sampler, calls in ((DDIM(), 9), (DDIM(0.3), 9), (ProbabilityFlowSampler(), 17)):
            network, reverse = counted(9, variance)
            sampler.sample(reverse, 2, seed=0)
            assert network.calls == calls


@every_sampler
def test_samples_that_failed_are_nan(sampler: Sampler) -> None:
    _, reverse = counted(5)
    context = torch.tensor([0.0, 3.0, 1.0])
    with pytest.warns(UserWarning, match=r"1 of 3 samples, with the index 1 \(t = \d\)\. They are"):
        states = sampler.sample(reverse, context=context, seed=0, trajectory=True)
    assert states[0].isnan().all(1).tolist() == [False, True, False]
    assert not bool(states[-1].isnan().any())
    with pytest.raises(ValueError, match="Expected finite contexts"):
        sampler.sample(reverse, context=torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="Expected 2 contexts; got 3"):
        sampler.sample(reverse, 2, context=context)


@pytest.mark.parametrize(
    "decoder",
    [CategoricalDecoder(5), DiscretizedGaussianDecoder(0.5)],
    ids=["levels", "bins"],
)
@every_sampler
def test_discrete_decoders_give_levels(sampler: Sampler, decoder: object) -> None:
    network = ResidualMLP((1, 2, 2), width=8, blocks=1)
    forward = ForwardChain(CosineSchedule(), 30)
    reverse = ReverseChain(NoiseDenoiser(network), forward, (1, 2, 2), decoder=decoder)
    x = sampler.sample(reverse.respaced(5), 6, seed=0)
    assert x.shape == (6, 1, 2, 2) and torch.equal((2 * x).round() / 2, x)


@every_sampler
def test_a_mean_denoiser_knows_its_own_steps_alone(sampler: Sampler) -> None:
    """At these it is the denoiser whose mean it is; on another grid it would be wrong unseen."""

    class MeanOf(nn.Module):
        def __init__(self, reverse: ReverseChain):
            super().__init__()
            self.__dict__["reverse"] = reverse

        def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
            t = (self.reverse.log_snrs.to(time) - time[0]).abs().argmin() + 1
            step = self.reverse.step(int(t), x)
            return step.mean(self.reverse.predict(x, step).x0_hat, x)

    data = chain(6)
    forward = ForwardChain(LogSNRSchedule(5.0, -6.0), 6)
    reverse = ReverseChain(MeanDenoiser(MeanOf(data)), forward, (3,))
    samples: Callable[[ReverseChain], Tensor] = lambda r: sampler.sample(r, 3, seed=0)  # noqa: E731
    torch.testing.assert_close(samples(reverse), samples(data).float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Expected a denoiser that serves any step.*MeanDenoiser"):
        reverse.respaced(4)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_bad_etas_are_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta between 0 and 1; got"):
        DDIM(eta)
