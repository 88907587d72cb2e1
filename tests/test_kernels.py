"""Kernels: Chapman–Kolmogorov, Bayes' rule, Ho et al.'s formulas, and accuracy at extreme λ."""

from __future__ import annotations

import math
from fractions import Fraction

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyrodiff import kernels
from pyrodiff.schedules import LinearSchedule

F64 = torch.float64
# λ_s > λ_t: neighbours, far apart, very little noise, very little signal
PAIRS = [(5.0, 4.9), (3.0, -2.0), (13.3, 12.0), (20.0, -8.0), (-4.0, -4.001), (0.1, -12.0)]
pairs = pytest.mark.parametrize(("s", "t"), PAIRS)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=F64)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pairs
def test_transition_after_marginal_is_marginal(s: float, t: float) -> None:
    """Chapman–Kolmogorov: scales multiply, variances propagate."""
    x_0 = draws(3, 2, 2)
    first = kernels.marginal(x_0, tensor(s), 2).base_dist
    second = kernels.transition(first.mean, tensor(s), tensor(t), 2).base_dist
    scale, _ = kernels.transition_coefficients(tensor(s), tensor(t))
    direct = kernels.marginal(x_0, tensor(t), 2).base_dist
    torch.testing.assert_close(second.mean, direct.mean, rtol=1e-12, atol=0.0)
    variance = scale**2 * first.variance + second.variance
    torch.testing.assert_close(variance, direct.variance, rtol=1e-12, atol=0.0)


def test_transitions_compose() -> None:
    """q(x_t|x_r) q(x_r|x_s) is q(x_t|x_s), on log-SNRs that are no chain's neighbours."""
    s, r, t = tensor(6.0), tensor(1.3), tensor(-3.0)
    (a, u), (b, v) = (kernels.transition_coefficients(*p) for p in ((s, r), (r, t)))
    scale, log_variance = kernels.transition_coefficients(s, t)
    torch.testing.assert_close(a * b, scale, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(b**2 * u.exp() + v.exp(), log_variance.exp(), rtol=1e-13, atol=0.0)


@pairs
def test_posterior_is_bayes_rule(s: float, t: float) -> None:
    """log q(x_s|x_t,x_0) = log q(x_t|x_s) + log q(x_s|x_0) − log q(x_t|x_0), at any point."""
    s_, t_ = tensor(s), tensor(t)
    x_0 = draws(5, 3)
    x_s = kernels.marginal(x_0, s_, 1).base_dist.mean + math.exp(-0.5 * s) * draws(5, 3, seed=1)
    scale, log_variance = kernels.transition_coefficients(s_, t_)
    x_t = scale * x_s + (0.5 * log_variance).exp() * draws(5, 3, seed=2)
    left = kernels.posterior(x_t, x_0, s_, t_, 1).log_prob(x_s)
    likelihood = kernels.transition(x_s, s_, t_, 1).log_prob(x_t)
    prior = kernels.marginal(x_0, s_, 1).log_prob(x_s)
    evidence = kernels.marginal(x_0, t_, 1).log_prob(x_t)
    # squares of quotients by σ: forming x_s − mean cancels α_s/σ_s units in the last place
    tolerance = max(1e-10, 1e-14 * math.exp(0.5 * max(s, 0.0)))
    torch.testing.assert_close(left, likelihood + prior - evidence, rtol=0.0, atol=tolerance)


def test_posterior_mean_in_terms_of_the_noise() -> None:
    """Ho et al. (2020), equation 11: (x_t − β_t/√(1−ᾱ_t) ε)/√(1−β_t), and β̃_t of equation 7."""
    table, betas = LinearSchedule().table(100), LinearSchedule().betas(100)
    alpha_bar = torch.cumprod(1 - betas, 0)
    x_0, noise = draws(4, 3), draws(4, 3, seed=1)
    for t in (2, 17, 100):
        beta, bar, previous = betas[t - 1], alpha_bar[t - 1], alpha_bar[t - 2]
        x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * noise
        law = kernels.posterior(x_t, x_0, table[t - 2], table[t - 1], 1).base_dist
        expected = (x_t - beta / (1 - bar).sqrt() * noise) / (1 - beta).sqrt()
        torch.testing.assert_close(law.mean, expected, rtol=0.0, atol=1e-11)
        small = (beta * (1 - previous) / (1 - bar)).expand(4, 3)
        torch.testing.assert_close(law.variance, small, rtol=1e-11, atol=0.0)


def test_data_end_of_the_kernels() -> None:
    """λ_s = +∞ is x_0: the transition is the marginal, the posterior the point x_0."""
    infinity, t = tensor(math.inf), tensor(2.0)
    scale, log_variance = kernels.transition_coefficients(infinity, t)
    alpha, sigma = kernels.marginal_coefficients(t)
    torch.testing.assert_close(scale, alpha, rtol=1e-15, atol=0.0)
    torch.testing.assert_close(log_variance, 2 * sigma.log(), rtol=1e-14, atol=0.0)
    c_0, c_t, log_small = kernels.posterior_coefficients(infinity, t)
    assert (float(c_0), float(c_t), float(log_small)) == (1.0, 0.0, -math.inf)


def test_coefficients_at_extreme_log_snr() -> None:
    """1 − ᾱ to 1e-12 where 1 − (1 − β) in floating point has lost most digits."""
    betas = [1e-10, 2e-10, 5e-10, 1e-6]
    alpha_bar, expected = Fraction(1), []
    for beta in betas:
        alpha_bar *= 1 - Fraction(beta)
        expected.append((1 - alpha_bar, alpha_bar))
    log_snr = tensor(*(math.log(a) - math.log(v) for v, a in expected))
    alpha, sigma = kernels.marginal_coefficients(log_snr)
    for i, (variance, signal) in enumerate(expected):
        assert float(sigma[i]) ** 2 == pytest.approx(float(variance), rel=1e-12, abs=0.0)
        assert float(alpha[i]) ** 2 == pytest.approx(float(signal), rel=1e-14, abs=0.0)


@pytest.mark.parametrize("base", [-30.0, -5.0, 0.0, 10.0, 30.0])
@pytest.mark.parametrize("gap", [2.0**-30, 2.0**-10, 1.0])
def test_transition_variance_over_tiny_steps(base: float, gap: float) -> None:
    """σ²_{t|s} = sigmoid(−λ_t)(1 − e^{−gap}); 1 − e^{−gap} by its series where gap is tiny."""
    _, log_variance = kernels.transition_coefficients(tensor(base + gap), tensor(base))
    loss = gap - gap**2 / 2 + gap**3 / 6 if gap < 1e-2 else 1 - math.exp(-gap)
    sigma2 = math.exp(-base) / (1 + math.exp(-base))
    assert math.exp(float(log_variance)) == pytest.approx(sigma2 * loss, rel=1e-9, abs=0.0)


def test_steps_holds_the_coefficients_of_every_pair() -> None:
    table = LinearSchedule().table(30)
    step = kernels.steps(table)
    c_0, c_t, log_small = kernels.posterior_coefficients(table[:-1], table[1:])
    assert torch.equal(step.c_0[1:], c_0) and torch.equal(step.c_t[1:], c_t)
    assert torch.equal(step.log_small[1:], log_small)
    assert float(step.c_0[0]) == 1.0 and float(step.c_t[0]) == 0.0
    betas = LinearSchedule().betas(30)
    torch.testing.assert_close(step.log_large.exp(), betas, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(step.alpha**2 + step.sigma**2, torch.ones(30, dtype=F64))
    assert bool((step.log_small[1:] < step.log_large[1:]).all())


# -- distributions -------------------------------------------------------------------------------


def test_one_time_per_sample() -> None:
    """Coefficients of shape (N,) belong to the batch axis, event axes stay on the right."""
    x_0, t = draws(3, 2, 4), tensor(3.0, 0.0, -2.0)
    law = kernels.marginal(x_0, t, 2)
    assert law.batch_shape == (3,) and law.event_shape == (2, 4)
    for i in range(3):
        one = kernels.marginal(x_0[i : i + 1], t[i], 2)
        assert torch.equal(law.base_dist.loc[i], one.base_dist.loc[0])
        assert torch.equal(law.base_dist.scale[i], one.base_dist.scale[0])


def test_only_the_last_coefficients_are_cast() -> None:
    """In float32 every coefficient is the rounded float64 one, not one computed in float32."""
    x = draws(2, 3)
    s, t = tensor(9.0), tensor(8.9999)
    wide, narrow = (kernels.posterior(v, v, s, t, 1).base_dist for v in (x, x.float()))
    assert narrow.scale.dtype == torch.float32
    assert torch.equal(narrow.scale, wide.scale.float())


# -- KL ------------------------------------------------------------------------------------------


def test_gaussian_kl_isotropic_and_diagonal() -> None:
    mean_q, mean_p = draws(5, 2, 3), draws(5, 2, 3, seed=1)
    log_q, log_p = draws(5, 1, 1, seed=2), draws(5, 1, 1, seed=3)
    diagonal = draws(5, 2, 3, seed=4)

    def reference(q: Tensor, p: Tensor) -> Tensor:
        scales = ((0.5 * v).exp().expand(5, 2, 3) for v in (q, p))
        laws = [
            torch.distributions.Normal(m, v) for m, v in zip((mean_q, mean_p), scales, strict=True)
        ]
        return kl_divergence(*laws).sum((-2, -1))

    for q, p in ((log_q, log_p), (log_q, diagonal), (diagonal, diagonal + 0.5)):
        actual = kernels.gaussian_kl(mean_q - mean_p, q, p, 2)
        assert actual.shape == (5,)
        torch.testing.assert_close(actual, reference(q, p), rtol=1e-12, atol=0.0)
    scalar = kernels.gaussian_kl(mean_q - mean_p, tensor(0.3), tensor(-0.2), 2)
    torch.testing.assert_close(
        scalar,
        reference(tensor(0.3).view(1, 1, 1), tensor(-0.2).view(1, 1, 1)),
        rtol=1e-12,
        atol=0.0,
    )


def test_gaussian_kl_of_nearly_equal_variances() -> None:
    """½(e^r − 1 − r) = r²/4 + r³/12 + …: exactly zero at r = 0, no cancellation to speak of."""
    zero = torch.zeros(1, 2, dtype=F64)
    assert float(kernels.gaussian_kl(zero, tensor(-3.0), tensor(-3.0), 1)) == 0.0
    r = 1e-4
    value = float(kernels.gaussian_kl(zero, tensor(r), tensor(0.0), 1))
    assert value == pytest.approx(2 * (r**2 / 4 + r**3 / 12), rel=1e-7, abs=0.0)


@pytest.mark.parametrize("family", [dist.Normal, torch.distributions.Normal], ids=["pyro", "torch"])
def test_kl_of_a_noising_site_is_refused(family: type) -> None:
    """Its sum over sites is silently not the bound (110.7 against a true 17.7 nats)."""
    site = kernels.transition(draws(2, 3), tensor(1.0), tensor(0.0), 1, kernels.NoisingNormal)
    target = family(torch.zeros(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64))
    with pytest.raises(ValueError, match="order='denoising'"):
        kl_divergence(site.base_dist, target)
    with pytest.raises(ValueError, match="order='denoising'"):
        kl_divergence(site.expand([4, 2]).base_dist, target)
    plain = kernels.transition(draws(2, 3), tensor(1.0), tensor(0.0), 1)
    assert bool((kl_divergence(plain.base_dist, target) > 0).all())


def test_levels_and_steps_are_the_kernels_means() -> None:
    """x_t of given noise, and the posterior's mean, against the distributions themselves."""
    log_snr = torch.linspace(4.0, -3.0, 6, dtype=F64)
    table, x_0, noise = kernels.StepTable(log_snr), draws(5, 3), draws(5, 3, seed=1)
    t = torch.tensor([2, 6, 3, 4, 2])
    step = table.at(t, x_0, 1)
    x_t = step.noised(x_0, noise)
    for row, number in enumerate(t.tolist()):
        before, at = log_snr[number - 2], log_snr[number - 1]
        marginal = kernels.marginal(x_0[row], at, 1).base_dist
        expected = marginal.loc + marginal.scale * noise[row]
        torch.testing.assert_close(x_t[row], expected, rtol=1e-13, atol=1e-13)
        mean = kernels.posterior(x_t[row], x_0[row], before, at, 1).base_dist.loc
        torch.testing.assert_close(step.mean(x_0, x_t)[row], mean, rtol=1e-13, atol=1e-13)
    one = step.map(lambda value: value[[1]])
    assert one.t.flatten().tolist() == [6.0] and torch.equal(one.c_0, step.c_0[[1]])


def test_times_are_linear_between_the_steps() -> None:
    table = kernels.StepTable(torch.tensor([3.0, 1.0, 0.0, -4.0], dtype=F64))
    times = table.times(torch.tensor([3.0, 2.0, 1.0, 0.25, -2.0, -4.0], dtype=F64))
    assert times.tolist() == [1.0, 1.5, 2.0, 2.75, 3.5, 4.0]
    alone = kernels.StepTable(torch.tensor([3.0], dtype=F64))
    assert alone.times(torch.tensor([0.0], dtype=F64)).tolist() == [1.0]
