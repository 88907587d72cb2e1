"""The equations and algorithms of the four lecture notes, each written out by hand once.

``docs/notes_to_code.md`` has the table; these are its rows that no other file holds.  Float64
throughout; a Monte Carlo comparison allows 4.5 standard errors of the paired difference, which
one seed in 150,000 exceeds.
"""

from __future__ import annotations

import ast
import importlib
import math
import re
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import Normal

from pyrodiff import ForwardChain, ReverseChain, kernels
from pyrodiff.decoders import GaussianDecoder
from pyrodiff.denoisers import DataDenoiser, MeanDenoiser, NoiseDenoiser
from pyrodiff.objectives import (
    MeanLoss,
    NoiseLoss,
    VariationalBound,
    WeightedLoss,
    variational_term,
)
from pyrodiff.schedules import (
    BetaSchedule,
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    Schedule,
)
from pyrodiff.streams import NoiseStreams
from pyrodiff.timesteps import AllTimesteps, UniformTimesteps
from pyrodiff.variances import FixedLarge, FixedSmall, LearnedDiagonal

ROOT = Path(__file__).parents[1]
T, D = 6, 3
BETAS = torch.linspace(0.05, 0.7, T, dtype=torch.float64)
ALPHA_BAR = (1 - BETAS).cumprod(0)
SCHEDULE = BetaSchedule(BETAS)
STANDARD_ERRORS = 4.5

SCHEDULES: dict[str, tuple[Schedule, int]] = {
    "linear": (LinearSchedule(), 1000),
    "cosine": (CosineSchedule(), 1000),
    "log-snr": (LogSNRSchedule(), 1000),
    "betas": (BetaSchedule(torch.linspace(1e-3, 0.5, 50)), 50),
}
every_schedule = pytest.mark.parametrize(
    ("schedule", "num_steps"), SCHEDULES.values(), ids=SCHEDULES.keys()
)


class Net(nn.Module):
    """A small smooth network of x and time, with ``outputs`` values per dimension."""

    def __init__(self, size: int = D, outputs: int = 1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size + 1, 16), nn.Tanh(), nn.Linear(16, outputs * size)
        ).double()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layers(torch.cat([x, 0.3 * time[:, None]], dim=1))


def chain(
    kind: type = NoiseDenoiser, variance: object = None, outputs: int = 1, **options: object
) -> ReverseChain:
    forward = ForwardChain(SCHEDULE, T)
    return ReverseChain(kind(Net(outputs=outputs), **options), forward, (D,), variance)


def normal_log_prob(x: Tensor, mean: Tensor, variance: Tensor | float) -> Tensor:
    """log N(x; mean, variance I) summed over the last axis, by hand."""
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return -0.5 * ((x - mean) ** 2 / variance + (2 * math.pi * variance).log()).sum(-1)


def close_in_mean(difference: Tensor) -> bool:
    """Whether the mean of paired differences is zero within the allowed standard errors."""
    return float(difference.mean().abs()) < STANDARD_ERRORS * float(
        difference.std() / math.sqrt(len(difference))
    )


# -- the forward chain -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["noising", "denoising"])
def test_joint_of_the_forward_chain_is_the_product_of_its_transitions(order):
    forward = ForwardChain(SCHEDULE, T, order=order)
    x_0 = torch.randn(4, D, dtype=torch.float64)
    trace = poutine.trace(forward).get_trace(x_0)
    product, previous = torch.zeros(4, dtype=torch.float64), x_0
    for t in range(1, T + 1):
        x_t, beta = trace.nodes[f"x_{t}"]["value"], BETAS[t - 1]
        product = product + normal_log_prob(x_t, (1 - beta).sqrt() * previous, beta)
        previous = x_t
    torch.testing.assert_close(trace.log_prob_sum(), product.sum(), rtol=1e-10, atol=1e-10)


@every_schedule
def test_repeated_transitions_are_the_kernel_from_the_data(schedule, num_steps):
    log_snr = schedule.table(num_steps)
    knots = torch.cat([log_snr.new_full((1,), torch.inf), log_snr])
    scale, log_variance = kernels.transition_coefficients(knots[:-1], knots[1:])
    alpha, sigma = kernels.marginal_coefficients(log_snr)
    mean, variance = log_snr.new_ones(()), log_snr.new_zeros(())
    for t in range(num_steps):  # x_t = a x_{t−1} + b ε: the mean scales, the variance a² v + b²
        mean, variance = scale[t] * mean, scale[t] ** 2 * variance + log_variance[t].exp()
        torch.testing.assert_close(mean, alpha[t], rtol=1e-9, atol=0.0)
        torch.testing.assert_close(variance, sigma[t] ** 2, rtol=1e-9, atol=0.0)


@every_schedule
def test_alpha_bar_falls_with_t_to_zero(schedule, num_steps):
    alpha_bar = torch.sigmoid(ForwardChain(schedule, num_steps).log_snr)
    assert bool((alpha_bar.diff() < 0).all())
    assert alpha_bar[0] < 1.0
    assert alpha_bar[-1] < 0.01


def test_last_latent_forgets_the_data():
    forward, x_0 = ForwardChain(CosineSchedule(), 1000), torch.full((4, D), 10.0).double()
    assert float(forward.prior_kl(x_0).max()) < 1e-4  # KL(q(x_T|x_0) ‖ N(0, I)), nats


def test_posterior_of_the_forward_chain_is_bayes_rule():
    forward, x_0 = ForwardChain(SCHEDULE, T), torch.randn(5, D, dtype=torch.float64)
    knots = [torch.tensor(torch.inf, dtype=torch.float64), *forward.log_snr]
    for t in range(2, T + 1):
        x_s, x_t = torch.randn(2, 5, D, dtype=torch.float64)
        posterior = kernels.posterior(x_t, x_0, knots[t - 1], knots[t], 1).log_prob(x_s)
        likelihood = normal_log_prob(x_t, (1 - BETAS[t - 1]).sqrt() * x_s, BETAS[t - 1])
        before, after = ALPHA_BAR[t - 2], ALPHA_BAR[t - 1]
        prior = normal_log_prob(x_s, before.sqrt() * x_0, 1 - before)
        evidence = normal_log_prob(x_t, after.sqrt() * x_0, 1 - after)
        torch.testing.assert_close(posterior, likelihood + prior - evidence, rtol=1e-9, atol=1e-9)


# -- the reverse chain -----------------------------------------------------------------------------


def test_mean_of_the_posterior_and_of_the_model_in_noise_form():
    reverse = chain(NoiseDenoiser)
    x_0, noise = torch.randn(2, 5, D, dtype=torch.float64)
    for t in range(2, T + 1):
        beta, alpha_bar = BETAS[t - 1], ALPHA_BAR[t - 1]
        x_t = reverse.forward_chain.sample(x_0, t, noise)

        def mean(eps: Tensor, x_t=x_t, beta=beta, alpha_bar=alpha_bar) -> Tensor:
            return (x_t - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt()

        knots = reverse.forward_chain.log_snr
        posterior = kernels.posterior(x_t, x_0, knots[t - 2], knots[t - 1], 1)
        torch.testing.assert_close(posterior.mean, mean(noise), rtol=1e-9, atol=1e-9)
        predicted = reverse.denoiser.network(x_t, knots[t - 1].expand(5))
        torch.testing.assert_close(
            reverse.transition(x_t, t).mean, mean(predicted), rtol=1e-9, atol=1e-9
        )


def test_reverse_step_is_the_network_itself_with_variance_beta():
    reverse = chain(MeanDenoiser, FixedLarge())
    x_t = torch.randn(5, D, dtype=torch.float64)
    for t in range(1, T + 1):
        f = reverse.denoiser.network(x_t, reverse.forward_chain.log_snr[t - 1].expand(5))
        law = reverse.transition(x_t, t) if t > 1 else reverse.decode(x_t)
        torch.testing.assert_close(law.base_dist.loc, f, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            law.base_dist.scale**2, BETAS[t - 1].expand(5, D), rtol=1e-12, atol=0.0
        )


def test_mean_and_variance_of_the_reverse_step_from_one_network():
    reverse = chain(MeanDenoiser, LearnedDiagonal(), outputs=2)
    x_t = torch.randn(5, D, dtype=torch.float64)
    for t in range(1, T + 1):
        output = reverse.denoiser.network(x_t, reverse.forward_chain.log_snr[t - 1].expand(5))
        mean, raw = output[:, :D], output[:, D:]
        law = (reverse.transition(x_t, t) if t > 1 else reverse.decode(x_t)).base_dist
        torch.testing.assert_close(law.loc, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(law.scale**2, BETAS[t - 1] * raw.exp(), rtol=1e-12, atol=0.0)
        assert float(law.scale.detach().std()) > 0  # not isotropic


def test_mean_and_variance_of_the_reverse_step_from_a_unet():
    pytest.importorskip("diffusers")
    from pyrodiff.networks import UNet

    network = UNet(
        (2, 4, 4), channels=(8, 16), layers=1, head_size=8, norm_groups=4, learned_variance=True
    ).double()
    with torch.no_grad():
        for parameter in network.parameters():  # the last layer starts at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    forward = ForwardChain(SCHEDULE, T)
    reverse = ReverseChain(MeanDenoiser(network), forward, (2, 4, 4), LearnedDiagonal())
    x_t = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    mean, raw = network(x_t, forward.log_snr[2].expand(3)).chunk(2, dim=1)
    law = reverse.transition(x_t, 3).base_dist
    torch.testing.assert_close(law.loc, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(law.scale**2, BETAS[2] * raw.exp(), rtol=1e-10, atol=0.0)
    assert VariationalBound(AllTimesteps()).loss(reverse, forward, x_t) > 0


def test_joint_of_the_reverse_chain_is_the_product_of_its_factors():
    reverse, x_0 = chain(NoiseDenoiser, FixedSmall()), torch.randn(4, D, dtype=torch.float64)
    trace = poutine.trace(poutine.condition(reverse, data={"x_0": x_0})).get_trace(num_samples=4)
    x = [x_0, *(trace.nodes[f"x_{t}"]["value"] for t in range(1, T + 1))]
    total = normal_log_prob(x[T], torch.zeros_like(x_0), 1.0)
    for t in range(1, T + 1):
        beta, alpha_bar = BETAS[t - 1], ALPHA_BAR[t - 1]
        eps = reverse.denoiser.network(x[t], torch.logit(alpha_bar).expand(4))
        mean = (x[t] - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt()
        s = max(t, 2)  # β̃_1 = 0: β̃_2 stands in
        variance = BETAS[s - 1] * (1 - ALPHA_BAR[s - 2]) / (1 - ALPHA_BAR[s - 1])
        total = total + normal_log_prob(x[t - 1], mean, variance)
    torch.testing.assert_close(trace.log_prob_sum(), total.sum(), rtol=1e-9, atol=1e-9)


# -- the bound -------------------------------------------------------------------------------------


def log_weights(
    reverse: ReverseChain, forward: ForwardChain, x_0: Tensor
) -> tuple[list[Tensor], Tensor]:
    """A path x_0 … x_T of the forward chain and log p_θ(x_0:T) − log q(x_1:T | x_0) along it."""
    q = poutine.trace(forward).get_trace(x_0)
    p = poutine.trace(poutine.replay(reverse, trace=q)).get_trace(x_0)
    q.compute_log_prob()
    p.compute_log_prob()
    names = [f"x_{t}" for t in range(1, forward.num_steps + 1)]
    weights = p.nodes["x_0"]["log_prob"]
    for name in names:
        weights = weights + p.nodes[name]["log_prob"] - q.nodes[name]["log_prob"]
    return [x_0, *(q.nodes[name]["value"] for name in names)], weights


@pytest.mark.parametrize("order", ["noising", "denoising"])
@torch.no_grad()
def test_trajectory_bound_is_the_three_part_decomposition(order):
    reverse = chain(NoiseDenoiser, FixedLarge())
    x_0 = torch.randn(1, D, dtype=torch.float64).expand(4000, D).contiguous()
    guide = ForwardChain(SCHEDULE, T, order=order)
    states, weights = log_weights(reverse, guide, x_0)
    parts = reverse.forward_chain.prior_kl(x_0)
    for t in range(1, T + 1):
        alpha_bar = ALPHA_BAR[t - 1]
        noise = (states[t] - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        parts = parts + variational_term(reverse, x_0, t, noise)
    assert float(weights.std()) < 30
    assert close_in_mean(weights + parts)
    pyro.set_rng_seed(5)
    loss = Trace_ELBO().loss(reverse, guide, x_0)
    pyro.set_rng_seed(5)
    assert loss == pytest.approx(-float(log_weights(reverse, guide, x_0)[1].sum()), rel=1e-9)


@torch.no_grad()
def test_one_term_needs_the_marginal_of_one_latent_alone():
    reverse, n = chain(NoiseDenoiser, FixedLarge()), 4000
    x_0 = torch.randn(1, D, dtype=torch.float64).expand(n, D).contiguous()
    forward = ForwardChain(SCHEDULE, T, order="noising")
    states, _ = log_weights(reverse, forward, x_0)
    for t in range(1, T + 1):
        alpha_bar = ALPHA_BAR[t - 1]
        along = (states[t] - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        alone = torch.randn_like(x_0)
        terms = [variational_term(reverse, x_0, t, noise) for noise in (along, alone)]
        assert close_in_mean(terms[0] - terms[1])  # independent draws in pairs


@pytest.mark.parametrize("kind", [NoiseDenoiser, MeanDenoiser, DataDenoiser])
def test_terms_of_the_bound_match_means_and_match_noises(kind):
    reverse = chain(kind, FixedLarge())
    x_0, noise = torch.randn(2, 5, D, dtype=torch.float64)
    for t in range(2, T + 1):
        beta, alpha_bar, before = BETAS[t - 1], ALPHA_BAR[t - 1], ALPHA_BAR[t - 2]
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        small = beta * (1 - before) / (1 - alpha_bar)
        mu_tilde = (
            before.sqrt() * beta / (1 - alpha_bar) * x_0
            + (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar) * x_t
        )
        mu = reverse.transition(x_t, t).mean
        eps = (x_t - (1 - beta).sqrt() * mu) * (1 - alpha_bar).sqrt() / beta
        constant = 0.5 * D * (small / beta - 1 - (small / beta).log())
        matching = {
            "means": ((mu_tilde - mu) ** 2).sum(-1) / (2 * beta),
            "noises": beta / (2 * (1 - beta) * (1 - alpha_bar)) * ((noise - eps) ** 2).sum(-1),
        }
        term = variational_term(reverse, x_0, t, noise)
        for value in matching.values():
            torch.testing.assert_close(term, value + constant, rtol=1e-8, atol=1e-10)


def test_noise_loss_with_the_weights_of_the_bound_has_the_gradient_of_the_bound():
    reverse, x_0 = chain(NoiseDenoiser, FixedLarge()), torch.randn(8, D, dtype=torch.float64)

    def weight(step: kernels.Step) -> Tensor:  # T β_t²/(2 σ_t² α_t (1 − ᾱ_t)), σ_t² = β_t
        beta = step.log_large.exp()
        return T * beta / (2 * (1 - beta) * step.sigma**2)

    grads = []
    for objective in (VariationalBound(AllTimesteps()), WeightedLoss(weight, AllTimesteps())):
        objective.generator = torch.Generator().manual_seed(3)
        loss = objective.differentiable_loss(reverse, reverse.forward_chain, x_0)
        grads.append(torch.autograd.grad(loss, list(reverse.denoiser.network.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


# -- the two algorithms ----------------------------------------------------------------------------


def test_training_algorithm_line_by_line():
    reverse, x_0 = chain(NoiseDenoiser), torch.randn(8, D, dtype=torch.float64)
    network = reverse.denoiser.network

    generator = torch.Generator().manual_seed(3)
    t = torch.randint(1, T + 1, (8,), generator=generator)  # t ~ Uniform(1 … T)
    eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)  # ε ~ N(0, I)
    alpha_bar = ALPHA_BAR[t - 1][:, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    loss = (eps - network(x_t, torch.logit(alpha_bar[:, 0]))).square().sum()
    by_hand = torch.autograd.grad(loss, list(network.parameters()))  # ∇ ‖ε − ε_θ(x_t, t)‖²

    objective = NoiseLoss(UniformTimesteps(), generator=torch.Generator().manual_seed(3))
    ours = objective.differentiable_loss(reverse, reverse.forward_chain, x_0)
    torch.testing.assert_close(ours, loss, rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad(ours, list(network.parameters()))
    torch.testing.assert_close(grads, by_hand, rtol=1e-8, atol=1e-8)


def test_training_algorithm_through_svi_takes_the_same_step():
    reverse, x_0 = chain(NoiseDenoiser), torch.randn(8, D, dtype=torch.float64)
    objective = NoiseLoss(UniformTimesteps(), generator=torch.Generator().manual_seed(3))
    loss = objective.differentiable_loss(reverse, reverse.forward_chain, x_0)
    parameters = list(reverse.denoiser.network.parameters())
    grads = torch.autograd.grad(loss, parameters)
    expected = [p.detach() - 0.01 * g for p, g in zip(parameters, grads, strict=True)]
    objective.generator = torch.Generator().manual_seed(3)
    svi = SVI(reverse, reverse.forward_chain, pyro.optim.SGD({"lr": 0.01}), objective)
    assert svi.step(x_0) == pytest.approx(float(loss.detach()), rel=1e-9)
    torch.testing.assert_close([p.detach() for p in parameters], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", [FixedLarge(), FixedSmall()], ids=repr)
@torch.no_grad()
def test_sampling_algorithm_line_by_line(variance):
    reverse = chain(NoiseDenoiser, variance)
    beta_tilde = BETAS[1:] * (1 - ALPHA_BAR[:-1]) / (1 - ALPHA_BAR[1:])  # β̃_2 … β̃_T
    small = torch.cat([beta_tilde[:1], beta_tilde])  # β̃_1 = 0: β̃_2 stands in
    sigma = (BETAS if isinstance(variance, FixedLarge) else small).sqrt()
    network, streams = reverse.denoiser.network, NoiseStreams(7, range(5), torch.Size([D]))
    like = torch.empty((), dtype=torch.float64)

    states = [streams.normal(like)]  # x_T ~ N(0, I)
    for t in range(T, 0, -1):  # for t = T, …, 1
        x, beta, alpha_bar = states[-1], BETAS[t - 1], ALPHA_BAR[t - 1]
        eps = network(x, torch.logit(alpha_bar).expand(5))
        mean = (x - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt()
        states.append(mean + sigma[t - 1] * streams.normal(like))  # x_{t−1} = μ + σ_t z

    ours = reverse.sample(5, seed=7, trajectory=True)
    torch.testing.assert_close(ours, torch.stack(states[::-1]), rtol=1e-6, atol=1e-6)
    # Ho's algorithm has z = 0 at t = 1: that is the mean of the decoder, x_0 is drawn around it.
    torch.testing.assert_close(reverse.decode(ours[1]).mean, mean, rtol=1e-6, atol=1e-6)


def test_mean_loss_is_the_square_of_the_means():
    reverse, x_0 = chain(MeanDenoiser), torch.randn(8, D, dtype=torch.float64)
    loss = MeanLoss(AllTimesteps(), generator=torch.Generator().manual_seed(3))
    generator, total = torch.Generator().manual_seed(3), 0.0
    for t in range(1, T + 1):
        eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
        beta, alpha_bar = BETAS[t - 1], ALPHA_BAR[t - 1]
        before = ALPHA_BAR[t - 2] if t > 1 else torch.ones((), dtype=torch.float64)
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
        mu_tilde = (before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x_t) / (
            1 - alpha_bar
        )
        mu = reverse.denoiser.network(x_t, torch.logit(alpha_bar).expand(8))
        total += float((mu_tilde - mu).detach().square().sum()) / T
    assert loss.loss(reverse, reverse.forward_chain, x_0) == pytest.approx(total, rel=1e-8)


# -- maximum likelihood ----------------------------------------------------------------------------

CENTRES, SPREAD = torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.4


def mixture_log_prob(x: Tensor, centres: Tensor = CENTRES, spread: float = SPREAD) -> Tensor:
    parts = Normal(centres, spread).log_prob(x[..., None])
    return parts.logsumexp(-1) - math.log(len(centres))


def mixture_draws(n: int) -> Tensor:
    return CENTRES[torch.randint(2, (n,))] + SPREAD * torch.randn(n, dtype=torch.float64)


class ExactDenoiser(nn.Module):
    """E[x_0 | x_t] under the mixture."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        alpha_sq, sigma_sq = torch.sigmoid(time)[:, None], torch.sigmoid(-time)[:, None]
        variance = alpha_sq * SPREAD**2 + sigma_sq
        error = x - alpha_sq.sqrt() * CENTRES  # (N, 2), one column per component
        share = (-0.5 * error**2 / variance).softmax(-1)
        mean = CENTRES + alpha_sq.sqrt() * SPREAD**2 / variance * error
        return (share * mean).sum(-1, keepdim=True)


def test_maximum_likelihood_minimises_the_divergence_from_the_data():
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    log_p = mixture_log_prob(grid)
    entropy = -torch.trapezoid(log_p.exp() * log_p, grid)
    data = mixture_draws(20_000)
    fits = []
    for shift, spread in [(0.0, 0.4), (0.1, 0.4), (0.0, 0.7), (0.5, 0.5)]:
        log_q = mixture_log_prob(grid, CENTRES + shift, spread)
        cross_entropy = -torch.trapezoid(log_p.exp() * log_q, grid)
        kl = torch.trapezoid(log_p.exp() * (log_p - log_q), grid)
        torch.testing.assert_close(kl, cross_entropy - entropy, rtol=1e-9, atol=1e-12)
        of_data = mixture_log_prob(data, CENTRES + shift, spread)
        # KL(P_data ‖ P_θ) = −E log p_θ(x) − H(P_data)
        assert close_in_mean(mixture_log_prob(data) - of_data - kl + 1e-12 * data)
        fits.append((float(of_data.mean()), float(kl)))
    by_likelihood = sorted(fits, reverse=True)
    assert [kl for _, kl in by_likelihood] == sorted(kl for _, kl in fits)
    assert fits[0][1] == pytest.approx(0.0, abs=1e-12)
    assert all(kl > 0.01 for _, kl in fits[1:])


@torch.no_grad()
def test_bound_of_a_diffusion_model_bounds_the_divergence_and_tightens_with_its_steps():
    data = mixture_draws(8000)
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    entropy = -torch.trapezoid(mixture_log_prob(grid).exp() * mixture_log_prob(grid), grid)
    divergences = []
    for num_steps in (8, 32, 128):
        forward = ForwardChain(LogSNRSchedule(10.0, -9.0), num_steps)
        reverse = ReverseChain(
            DataDenoiser(ExactDenoiser()), forward, (1,), FixedLarge(), GaussianDecoder()
        )
        bound = log_weights(reverse, forward, data[:, None])[1]
        excess = mixture_log_prob(data) - bound  # its mean bounds KL(P_data ‖ P_θ) from above
        error = float(excess.std()) / math.sqrt(len(data))
        assert float(-bound.mean() - entropy) > -STANDARD_ERRORS * float(bound.std()) / math.sqrt(
            len(data)
        )
        # The objective estimates the same mean, term by term: standard error below 0.02.
        loss = VariationalBound(AllTimesteps()).loss(reverse, forward, data[:, None])
        assert loss / len(data) == pytest.approx(-float(bound.mean()), abs=0.1)
        divergences.append((float(excess.mean()), error))
    for kl, error in divergences:
        assert kl > -STANDARD_ERRORS * error
    for (coarse, error), (fine, other) in zip(divergences, divergences[1:], strict=False):
        assert coarse - fine > STANDARD_ERRORS * math.hypot(error, other)
    assert divergences[-1][0] < 0.1


# -- the page --------------------------------------------------------------------------------------


def resolve(name: str) -> object:
    """The object of a dotted name: the longest module in it, then attributes."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            target: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for attribute in parts[end:]:
            target = getattr(target, attribute)
        return target
    raise ImportError(name)


def test_docs_page_names_exist():
    page = (ROOT / "docs" / "notes_to_code.md").read_text(encoding="utf-8")
    cited = set(re.findall(r"(tests/\w+\.py)::(\w+)", page))
    names = set(re.findall(r"`(pyrodiff(?:\.\w+)+)", page))
    assert len(cited) > 15 and len(names) > 15
    for file in {file for file, _ in cited}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        missing = {name for path, name in cited if path == file} - tests
        assert not missing, f"{file} has no {sorted(missing)}"
    for name in sorted(names):
        resolve(name)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    body = [row for row in rows if not re.match(r"\|( equation| line|\s*-)", row)]
    assert all("`pyro" in row and "tests/" in row for row in body)
