"""The objectives against exact values: reference terms, a Gaussian's closed form, direct formulas.

Stochastic tests have fixed seeds and state how many standard errors they allow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.decoders import (
    CategoricalDecoder,
    Decoder,
    DiscretizedGaussianDecoder,
    GaussianDecoder,
)
from pyrodiff.denoisers import (
    DataDenoiser,
    Denoiser,
    MeanDenoiser,
    NoiseDenoiser,
    VelocityDenoiser,
)
from pyrodiff.kernels import Step, posterior
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import (
    HybridLoss,
    MeanLoss,
    MinSNR,
    NoiseLoss,
    Objective,
    SigmoidWeighting,
    VariationalBound,
    WeightedLoss,
    variational_term,
)
from pyrodiff.oracles import linear_bound
from pyrodiff.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule
from pyrodiff.timesteps import (
    AllTimesteps,
    LossAwareTimesteps,
    LowDiscrepancyTimesteps,
    Timesteps,
    UniformTimesteps,
)
from pyrodiff.variances import FixedLarge, FixedSmall, LearnedDiagonal, LearnedRange, Variance

REFERENCE = json.loads((Path(__file__).parent / "reference" / "vb_terms.json").read_text())
SCHEDULES = {"linear": LinearSchedule(), "cosine": CosineSchedule()}
VARIANCES: dict[str, Variance] = {
    "fixed_small": FixedSmall(),
    "fixed_large": FixedLarge(),
    "learned_range": LearnedRange(),
    "learned_diagonal": LearnedDiagonal(),
}
DENOISERS: dict[str, type[Denoiser]] = {"noise": NoiseDenoiser, "x_start": DataDenoiser}
SMALL = CosineSchedule()


@pytest.fixture(autouse=True)
def double_precision(clean_state: None) -> None:
    """float64 here; ``clean_state`` puts the default back."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def user_errors() -> Iterator[None]:
    """The errors a user gets: without the shape checks, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class FixedTimesteps(Timesteps):
    """The given t with the given weight: a draw that the test chooses."""

    def __init__(self, t: Tensor, weight: float):
        self.t, self.weight = t, weight

    def draw(
        self, num_samples: int, num_steps: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.t, torch.full((num_samples,), self.weight)


class SmallNet(nn.Module):
    """A nonlinear network on (N, d), with a second head where the variance is learned."""

    def __init__(self, size: int = 3, learned: bool = False, hidden: int = 16):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(size + 1, hidden), nn.Tanh())
        self.mean = nn.Linear(hidden, size)
        # no layer in common with the mean, so that gradients tell the two halves apart
        self.raw = nn.Sequential(nn.Linear(size + 1, hidden), nn.Tanh(), nn.Linear(hidden, size))
        self.learned = learned
        self.calls = 0

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        h = torch.cat([x, 0.1 * time.unsqueeze(1)], 1)
        mean = self.mean(self.body(h))
        if context is not None:
            mean = mean + context
        return torch.cat([mean, self.raw(h)], 1) if self.learned else mean


def chain(
    variance: Variance | None = None,
    num_steps: int = 6,
    kind: type[Denoiser] = NoiseDenoiser,
    decoder: Decoder | None = None,
    size: int = 3,
) -> ReverseChain:
    variance = FixedLarge() if variance is None else variance
    forward = ForwardChain(SMALL, num_steps)
    network = SmallNet(size, variance.learned)
    return ReverseChain(kind(network), forward, (size,), variance=variance, decoder=decoder)


def network_of(reverse: ReverseChain) -> SmallNet:
    return reverse.denoiser.network


def gradients(reverse: ReverseChain, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*network_of(reverse).named_parameters(), strict=True)
    values = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if value is None else value
        for name, p, value in zip(names, parameters, values, strict=True)
    }


def replay(
    rule: Timesteps, x_0: Tensor, num_steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The t and the noise that an objective draws for one pass: t first, then the noise."""
    ((t, _),) = rule.draw(len(x_0), num_steps, generator)
    return t, torch.randn(x_0.shape, generator=generator)


# -- one term of the bound ---------------------------------------------------------------------


class ReferenceNet(nn.Module):
    """The network of ``vb_terms.json``."""

    def __init__(self, learned: bool):
        super().__init__()
        self.learned = learned

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        c, s = torch.arange(3.0).view(1, 3, 1, 1), time.view(-1, 1, 1, 1)
        out = torch.sin(0.7 * x + 0.3 * c + 0.001 * s)
        return torch.cat([out, torch.cos(0.5 * x + 0.002 * s)], 1) if self.learned else out


def reference_batch(t: int) -> tuple[Tensor, Tensor]:
    n, c, h, w = torch.meshgrid(*(torch.arange(float(k)) for k in (2, 3, 4, 4)), indexing="ij")
    levels = ((torch.cos(1 + 7 * n + 3 * c + 2 * h + w) + 1) * 127.5).round()
    noise = 1.5 * torch.sin(2 + 5 * n + 11 * c + 3 * h + 7 * w + t)
    return -1 + 2 * levels / 255, noise


def case_id(case: dict[str, Any]) -> str:
    return "-".join(str(case[k]) for k in ("betas", "num_steps", "prediction", "variance", "t"))


def singular(case: dict[str, Any]) -> bool:
    return case["betas"] == "linear" and case["num_steps"] == 20  # beta_20 = 1


REGULAR = [case for case in REFERENCE["cases"] if not singular(case)]


def test_the_reference_covers_both_schedules_and_all_published_variances() -> None:
    kinds = {(c["betas"], c["num_steps"], c["prediction"], c["variance"]) for c in REGULAR}
    assert len(kinds) == 3 * 2 * 3 and len(REGULAR) >= 80


@pytest.mark.parametrize("case", REGULAR, ids=case_id)
def test_term_equals_the_published_code(case: dict[str, Any]) -> None:
    """The network rounds x_t, so the two agree to the tenth digit, not the last."""
    variance = VARIANCES[case["variance"]]
    denoiser = DENOISERS[case["prediction"]](ReferenceNet(variance.learned), time="timestep")
    forward = ForwardChain(SCHEDULES[case["betas"]], case["num_steps"])
    reverse = ReverseChain(denoiser, forward, (3, 4, 4), variance=variance)
    x_0, noise = reference_batch(case["t"])
    value = variational_term(reverse, x_0, case["t"], noise)
    torch.testing.assert_close(value, torch.tensor(case["value"]), rtol=1e-8, atol=0)


def test_the_schedule_refuses_the_reference_case_whose_last_beta_is_one() -> None:
    with pytest.raises(ValueError, match="Expected num_steps > 20 for betas below 1"):
        ForwardChain(LinearSchedule(), 20)


@pytest.mark.parametrize("variance", VARIANCES.values(), ids=VARIANCES.keys())
@pytest.mark.parametrize(
    "decoder",
    [
        GaussianDecoder(),
        GaussianDecoder(0.3),
        DiscretizedGaussianDecoder(0.5),
        CategoricalDecoder(5),
    ],
    ids=["gaussian", "gaussian-scale", "discretized", "categorical"],
)
def test_first_term_is_the_negative_log_probability_of_the_decoder(
    variance: Variance, decoder: Decoder
) -> None:
    reverse = chain(variance, decoder=decoder)
    x_0, noise = torch.randint(5, (7, 3)) / 2 - 1.0, torch.randn(7, 3)
    x_1 = reverse.forward_chain.sample(x_0, 1, noise)
    value = variational_term(reverse, x_0, 1, noise)
    torch.testing.assert_close(value, -reverse.decode(x_1).log_prob(x_0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", VARIANCES.values(), ids=VARIANCES.keys())
@pytest.mark.parametrize(
    "kind", [NoiseDenoiser, DataDenoiser, VelocityDenoiser, MeanDenoiser], ids=lambda k: k.__name__
)
def test_later_terms_are_the_divergence_between_the_two_programs(
    variance: Variance, kind: type[Denoiser]
) -> None:
    """Pyro's own KL between q(x_{t-1} | x_t, x_0) and p(x_{t-1} | x_t)."""
    reverse = chain(variance, kind=kind)
    forward, x_0, noise = reverse.forward_chain, torch.randn(7, 3), torch.randn(7, 3)
    for t in range(2, 7):
        x_t = forward.sample(x_0, t, noise)
        q = posterior(x_t, x_0, forward.log_snr[t - 2], forward.log_snr[t - 1], 1)
        expected = torch.distributions.kl_divergence(q, reverse.transition(x_t, t))
        value = variational_term(reverse, x_0, t, noise)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", VARIANCES.values(), ids=VARIANCES.keys())
def test_a_batch_of_several_t_gives_each_sample_its_own_term(variance: Variance) -> None:
    reverse = chain(variance)
    x_0, noise, t = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([3, 1, 6, 1, 2])
    alone = [
        variational_term(reverse, x_0[i : i + 1], int(t[i]), noise[i : i + 1]) for i in range(5)
    ]
    together = variational_term(reverse, x_0, t, noise)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)


def test_first_term_alone_sends_no_stray_gradient_into_other_samples() -> None:
    """index_put replaces the KL at t = 1; its gradient must go with it."""
    reverse = chain()
    x_0, noise = torch.randn(1, 3), torch.randn(1, 3)
    x_1 = reverse.forward_chain.sample(x_0, 1, noise)
    value = gradients(reverse, variational_term(reverse, x_0, 1, noise).sum())
    expected = gradients(reverse, -reverse.decode(x_1).log_prob(x_0).sum())
    for name, gradient in expected.items():
        torch.testing.assert_close(value[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [0, 7, -1, torch.tensor([1, 2, 7]), torch.tensor([0, 2, 3])])
def test_term_refuses_t_out_of_range(t: int | Tensor) -> None:
    reverse = chain()
    with pytest.raises(ValueError, match="Expected t in 1 … 6; got"):
        variational_term(reverse, torch.zeros(3, 3), t, torch.zeros(3, 3))
    assert network_of(reverse).calls == 0


@pytest.mark.parametrize(
    "t",
    [torch.tensor([1, 2]), torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([1.0, 2.0, 3.0])],
    ids=["too-few", "too-many", "floats"],
)
def test_term_refuses_t_of_another_length_or_kind(t: Tensor) -> None:
    reverse = chain()
    with pytest.raises(
        ValueError, match=r"Expected t to be an integer or integers of shape \(3,\); got"
    ):
        variational_term(reverse, torch.zeros(3, 3), t, torch.zeros(3, 3))
    assert network_of(reverse).calls == 0


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (3,), (3, 3, 1)])
@pytest.mark.usefixtures("user_errors")
def test_term_refuses_noise_of_another_shape(shape: tuple[int, ...]) -> None:
    reverse = chain()
    with pytest.raises(ValueError, match=r"Expected noise of shape \(3, 3\); got"):
        variational_term(reverse, torch.zeros(3, 3), 2, torch.zeros(shape))
    assert network_of(reverse).calls == 0


def test_term_refuses_data_that_is_not_finite() -> None:
    reverse, x_0 = chain(), torch.zeros(3, 3)
    x_0[1, 2] = math.nan
    with pytest.raises(ValueError, match="in 1 of 3 samples, the first at index 1"):
        variational_term(reverse, x_0, 2, torch.zeros(3, 3))
    assert network_of(reverse).calls == 0


# -- the Gaussian: every route to one closed form ----------------------------------------------

DIMENSION, STEPS = 8, 50
# From SNR 1 down in wide steps: single draws of the bound then have deviations of 1 to 3 nats.
GAUSSIAN_SCHEDULE = LogSNRSchedule(0.0, -16.0)


class LinearNet(nn.Module):
    r"""ε̂ = σ (x − α μ' + α W x)/(α²/4 + σ²): near the exact noise prediction for N(μ', I/4).

    x̂_0 = A x_t + b with A = (α I/4 − σ² W)/(α²/4 + σ²), b = σ² μ'/(α²/4 + σ²).
    """

    def __init__(self) -> None:
        super().__init__()
        i, j = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        self.register_buffer("W", 0.1 * torch.sin(1 + 3 * i + 5 * j))
        self.register_buffer("center", 0.3 * torch.cos(torch.arange(8.0)))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        alpha = torch.sigmoid(time).sqrt().unsqueeze(1)
        sigma = torch.sigmoid(-time).sqrt().unsqueeze(1)
        shifted = x + alpha * (x @ self.W.T - self.center)
        return sigma / (alpha**2 / 4 + sigma**2) * shifted


def gaussian() -> tuple[Tensor, Tensor]:
    """m and C of the data."""
    i, j = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    root = 0.1 * torch.cos(2 + 3 * i + 7 * j) + 0.4 * torch.eye(8)
    return 0.3 * torch.sin(torch.arange(8.0)), root @ root.T


def sigma_points() -> Tensor:
    """m ± √d L e_i, (16, 8): mean m and covariance C exactly.

    With a linear network every term of the bound is, in expectation over the noise, quadratic in
    x_0; so its mean over these points is its mean over N(m, C), without sampling error.
    """
    mean, covariance = gaussian()
    offsets = math.sqrt(DIMENSION) * torch.linalg.cholesky(covariance).T
    return torch.cat([mean + offsets, mean - offsets])


def gaussian_chain(variance: Variance) -> ReverseChain:
    forward = ForwardChain(GAUSSIAN_SCHEDULE, STEPS)
    return ReverseChain(NoiseDenoiser(LinearNet()), forward, (DIMENSION,), variance=variance)


def closed_form(log_snr: Tensor, large: bool) -> float:
    r"""The bound of ``LinearNet`` for x_0 ~ N(m, C), in nats per sample, from Ho's betas.

    x_0 − x̂_0 = (I − αA) x_0 − b − σ A ε, hence E‖x_0 − x̂_0‖² =
    ‖(I − αA) m − b‖² + tr (I − αA) C (I − αA)ᵀ + σ² tr A Aᵀ.
    """
    (mean, covariance), net, eye = gaussian(), LinearNet(), torch.eye(DIMENSION)
    bar = torch.sigmoid(log_snr)
    before = torch.cat([torch.ones(1), bar[:-1]])
    beta = 1 - bar / before
    small = beta * (1 - before) / (1 - bar)
    small = torch.cat([small[1:2], small[1:]])
    total = 0.0
    for k in range(STEPS):
        alpha, square = bar[k].sqrt(), 1 - bar[k]
        spread = bar[k] / 4 + square
        a, b = (alpha / 4 * eye - square * net.W) / spread, square * net.center / spread
        rest = eye - alpha * a
        error = (rest @ mean - b).square().sum()
        error = error + (rest @ covariance @ rest.T).trace() + square * (a @ a.T).trace()
        v = beta[k] if large else small[k]
        if k == 0:
            total += float(DIMENSION / 2 * torch.log(2 * math.pi * v) + error / (2 * v))
            continue
        c_0 = before[k].sqrt() * beta[k] / (1 - bar[k])
        ratio = small[k] / v
        total += float(DIMENSION / 2 * (ratio - 1 - ratio.log()) + c_0**2 * error / (2 * v))
    second = mean.square().sum() + covariance.trace()
    prior = DIMENSION * (-bar[-1] - torch.log1p(-bar[-1])) + bar[-1] * second
    return total + float(prior) / 2


def estimate(
    elbo: ELBO, reverse: ReverseChain, guide: ForwardChain, calls: int, repeats: int
) -> tuple[float, float]:
    """The bound per sample over the sigma points and its standard error, from single losses."""
    x_0 = sigma_points().repeat(repeats, 1)
    losses = torch.tensor([elbo.loss(reverse, guide, x_0) / len(x_0) for _ in range(calls)])
    return float(losses.mean()), float(losses.std()) / math.sqrt(calls)


ROUTES: dict[str, tuple[Callable[[], ELBO], str]] = {
    "all-terms": (lambda: VariationalBound(AllTimesteps()), "denoising"),
    "trace-denoising": (Trace_ELBO, "denoising"),
    "trace-noising": (Trace_ELBO, "noising"),
    "mean-field": (TraceMeanField_ELBO, "denoising"),
}


@pytest.mark.parametrize("large", [False, True], ids=["fixed_small", "fixed_large"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_closed_form_of_the_gaussian(route: str, large: bool) -> None:
    """Within 3 standard errors of 24 means, each below 0.01 nats per sample.

    Student's t with 23 degrees of freedom passes 3 with probability 0.0064: over these 8 cases
    a random seed would fail 5 % of the time; the seed is fixed, so a failure is a change.
    """
    build, order = ROUTES[route]
    reverse = gaussian_chain(FixedLarge() if large else FixedSmall())
    guide = ForwardChain(GAUSSIAN_SCHEDULE, STEPS, order=order)
    exact = closed_form(guide.log_snr, large)
    value, error = estimate(build(), reverse, guide, calls=24, repeats=60 if large else 200)
    assert error < 0.01
    assert abs(value - exact) < 3 * error


def test_the_gaussian_test_can_tell_the_two_variances_apart() -> None:
    """The closed forms are many standard errors apart, and the bound is not trivially tight."""
    log_snr = GAUSSIAN_SCHEDULE.table(STEPS)
    assert abs(closed_form(log_snr, True) - closed_form(log_snr, False)) > 0.1


@pytest.mark.parametrize("large", [False, True], ids=["fixed_small", "fixed_large"])
def test_the_closed_form_equals_that_of_the_oracles(large: bool) -> None:
    reverse = gaussian_chain(FixedLarge() if large else FixedSmall())
    value = -float(linear_bound(reverse, sigma_points()).elbo.mean())
    exact = closed_form(reverse.forward_chain.log_snr, large)
    assert value == pytest.approx(exact, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Failed to verify mean field")  # Pyro's, ahead of our error
def test_mean_field_elbo_refuses_the_noising_order() -> None:
    reverse = gaussian_chain(FixedLarge())
    guide = ForwardChain(GAUSSIAN_SCHEDULE, STEPS, order="noising")
    with pytest.raises(ValueError, match="order='denoising'"):
        TraceMeanField_ELBO().loss(reverse, guide, sigma_points())


# -- subsampled t ------------------------------------------------------------------------------


def filled_loss_aware(reverse: ReverseChain) -> LossAwareTimesteps:
    rule = LossAwareTimesteps(STEPS, history=4, uniform=0.05)
    bound, x_0 = VariationalBound(rule), sigma_points().repeat(20, 1)
    with torch.no_grad():
        while int(rule.counts.min()) < rule.history:
            bound.loss(reverse, reverse.forward_chain, x_0)
    return rule


@pytest.mark.parametrize("kind", ["uniform", "low-discrepancy", "loss-aware"])
def test_subsampled_bound_is_unbiased(kind: str) -> None:
    """Within 4 standard errors of 200 means: a random seed would fail once in 10^4 runs."""
    reverse = gaussian_chain(FixedLarge())
    rules: dict[str, Callable[[], Timesteps]] = {
        "uniform": UniformTimesteps,
        "low-discrepancy": LowDiscrepancyTimesteps,
        "loss-aware": lambda: filled_loss_aware(reverse),
    }
    rule = rules[kind]()
    if isinstance(rule, LossAwareTimesteps):  # it does draw unevenly
        assert float(rule.probabilities().max()) > 2 / STEPS
    exact = closed_form(reverse.forward_chain.log_snr, True)
    repeats = 20 if kind == "loss-aware" else 100
    bound, guide = VariationalBound(rule), reverse.forward_chain
    value, error = estimate(bound, reverse, guide, calls=200, repeats=repeats)
    assert error < 0.1
    assert abs(value - exact) < 4 * error


def test_loss_aware_bound_learns_the_terms_themselves() -> None:
    """What the rule remembers is L_t, not the weighted L_t that enters the loss."""
    rule, reverse, x_0 = LossAwareTimesteps(6, history=1), chain(), torch.randn(1, 3)
    VariationalBound(rule, generator=seeded(5)).loss(reverse, reverse.forward_chain, x_0)
    t, noise = replay(LossAwareTimesteps(6, history=1), x_0, 6, seeded(5))
    term = variational_term(reverse, x_0, t, noise)
    torch.testing.assert_close(rule.losses[t - 1, 0], term.detach(), rtol=1e-10, atol=0)


# -- the other losses against direct formulas --------------------------------------------------


def fixed_draw(reverse: ReverseChain, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t, ε, x_t and the network's output for the draw of seed 11, from Ho's ᾱ."""
    t, noise = replay(UniformTimesteps(), x_0, reverse.num_steps, seeded(11))
    log_snr = reverse.forward_chain.log_snr[t - 1]
    bar = torch.sigmoid(log_snr).unsqueeze(1)
    x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * noise
    return t, noise, x_t, network_of(reverse)(x_t, log_snr)


def seeded_loss(
    objective: Callable[..., Objective], reverse: ReverseChain, x_0: Tensor, **options: Any
) -> Tensor:
    rule = options.pop("timesteps", UniformTimesteps())
    loss = objective(timesteps=rule, generator=seeded(11), **options)
    return loss.differentiable_loss(reverse, reverse.forward_chain, x_0)


def test_noise_loss_is_the_squared_error_of_the_noise() -> None:
    reverse, x_0 = chain(), torch.randn(20, 3)
    _, noise, _, output = fixed_draw(reverse, x_0)
    expected = (noise - output).square().sum()
    torch.testing.assert_close(seeded_loss(NoiseLoss, reverse, x_0), expected, rtol=1e-8, atol=0)


def test_noise_loss_of_another_parametrization_is_the_error_of_the_implied_noise() -> None:
    reverse, x_0 = chain(kind=DataDenoiser), torch.randn(20, 3)
    t, noise, x_t, output = fixed_draw(reverse, x_0)
    bar = torch.sigmoid(reverse.forward_chain.log_snr[t - 1]).unsqueeze(1)
    implied = (x_t - bar.sqrt() * output) / (1 - bar).sqrt()
    expected = (noise - implied).square().sum()
    torch.testing.assert_close(seeded_loss(NoiseLoss, reverse, x_0), expected, rtol=1e-8, atol=0)


def test_mean_loss_is_the_squared_error_of_the_posterior_mean() -> None:
    """Ho et al., 2020, equations 7 and 11, from the betas of the schedule."""
    reverse, x_0 = chain(), torch.randn(20, 3)
    t, _, x_t, output = fixed_draw(reverse, x_0)
    betas = SMALL.betas(6)
    bars = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])
    beta, bar, before = (v.unsqueeze(1) for v in (betas[t - 1], bars[t], bars[t - 1]))
    target = before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x_t
    mean = (x_t - beta / (1 - bar).sqrt() * output) / (1 - beta).sqrt()
    expected = (target / (1 - bar) - mean).square().sum()
    assert 1 in t.tolist()
    torch.testing.assert_close(seeded_loss(MeanLoss, reverse, x_0), expected, rtol=1e-8, atol=0)


def test_weighted_loss_with_unit_weights_is_the_noise_loss() -> None:
    reverse, x_0 = chain(), torch.randn(20, 3)

    def ones(**options: Any) -> Objective:
        return WeightedLoss(lambda step: torch.ones_like(step.log_snr), **options)

    expected = seeded_loss(NoiseLoss, reverse, x_0)
    torch.testing.assert_close(seeded_loss(ones, reverse, x_0), expected, rtol=1e-12, atol=0)


def test_weighted_loss_gives_each_sample_the_weight_of_its_step() -> None:
    reverse, x_0 = chain(), torch.randn(20, 3)
    t, noise, _, output = fixed_draw(reverse, x_0)
    weights = torch.exp(0.3 * reverse.forward_chain.log_snr[t - 1])
    expected = (weights * (noise - output).square().sum(1)).sum()

    def weighted(**options: Any) -> Objective:
        return WeightedLoss(lambda step: torch.exp(0.3 * step.log_snr), **options)

    torch.testing.assert_close(seeded_loss(weighted, reverse, x_0), expected, rtol=1e-8, atol=0)


def test_weighted_loss_has_one_expectation_under_every_rule() -> None:
    """AllTimesteps sums what the others average; the losses divide by T."""
    reverse, x_0 = chain(), torch.randn(1, 3)
    every = [
        seeded_loss(objective, reverse, x_0, timesteps=AllTimesteps())
        for objective in (NoiseLoss, lambda **o: WeightedLoss(lambda s: 0 * s.alpha + 1, **o))
    ]
    generator, total = seeded(11), 0.0
    for t in range(1, 7):
        noise = torch.randn(x_0.shape, generator=generator)
        x_t = reverse.forward_chain.sample(x_0, t, noise)
        output = network_of(reverse)(x_t, reverse.forward_chain.log_snr[t - 1 : t])
        total = total + (noise - output).square().sum() / 6
    for value in every:
        torch.testing.assert_close(value, total, rtol=1e-8, atol=0)


def test_weightings_have_the_published_values() -> None:
    log_snr = torch.tensor([10.0, 5.0, 2.0, 0.1]).log()
    step = Step(*(log_snr,) * 8)
    expected = torch.tensor([0.5, 1.0, 1.0, 1.0])
    torch.testing.assert_close(MinSNR(5.0)(step), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(MinSNR(1.0)(step)[:3], torch.tensor([0.1, 0.2, 0.5]))
    # sigmoid(b − λ) = e^b / (e^b + SNR)
    scale = math.exp(1.5)
    expected = scale / (scale + torch.tensor([10.0, 5.0, 2.0, 0.1]))
    torch.testing.assert_close(SigmoidWeighting(1.5)(step), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", [VariationalBound, NoiseLoss, MeanLoss])
def test_one_seed_gives_one_loss(objective: type[Objective]) -> None:
    reverse, x_0 = chain(), torch.randn(20, 3)
    values = []
    for seed in (1, 1, 2):
        torch.randn(3)  # the global generator has no say
        loss = objective(generator=seeded(seed))
        values.append(loss.loss(reverse, reverse.forward_chain, x_0))
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("large", [False, True], ids=["fixed_small", "fixed_large"])
def test_the_bound_weights_the_noise_error_by_the_published_weight(large: bool) -> None:
    """The gradient of the bound at t ≥ 2 is that of T c_0² σ²/(2 α² σ_θ²) ‖ε − ε̂‖²."""
    reverse, x_0 = chain(FixedLarge() if large else FixedSmall()), torch.randn(20, 3)

    def weight(step: Step) -> Tensor:
        log_variance = step.log_large if large else step.log_small
        return 6 * step.c_0**2 * step.sigma**2 / (2 * step.alpha**2 * log_variance.exp())

    def weighted(**options: Any) -> Objective:
        return WeightedLoss(weight, **options)

    rule = FixedTimesteps(2 + torch.arange(20) % 5, 6.0)
    bound = gradients(reverse, seeded_loss(VariationalBound, reverse, x_0, timesteps=rule))
    direct = gradients(reverse, seeded_loss(weighted, reverse, x_0, timesteps=rule))
    assert float(bound["mean.weight"].abs().max()) > 1e-3
    for name, gradient in direct.items():
        torch.testing.assert_close(bound[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variance", [LearnedRange(), LearnedDiagonal()], ids=["range", "diagonal"])
def test_hybrid_loss_trains_the_mean_by_noise_and_the_variance_by_the_bound(
    variance: Variance,
) -> None:
    reverse, x_0 = chain(variance), torch.randn(20, 3)
    omega = 0.07
    hybrid = gradients(reverse, seeded_loss(HybridLoss, reverse, x_0, vlb_weight=omega))
    noise = gradients(reverse, seeded_loss(NoiseLoss, reverse, x_0))
    bound = gradients(reverse, seeded_loss(VariationalBound, reverse, x_0))
    for name, gradient in hybrid.items():
        part = omega * bound[name] if name.startswith("raw") else noise[name]
        assert float(gradient.abs().max()) > 1e-6
        torch.testing.assert_close(gradient, part, rtol=1e-9, atol=1e-12)
    # the bound alone would also move the mean
    assert not torch.allclose(bound["mean.weight"], torch.zeros(()))


def test_hybrid_loss_is_the_noise_loss_plus_a_share_of_the_bound() -> None:
    reverse, x_0 = chain(LearnedRange()), torch.randn(20, 3)
    hybrid = seeded_loss(HybridLoss, reverse, x_0, vlb_weight=0.07)
    expected = seeded_loss(NoiseLoss, reverse, x_0)
    expected = expected + 0.07 * seeded_loss(VariationalBound, reverse, x_0)
    torch.testing.assert_close(hybrid, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()], ids=["small", "large"])
def test_hybrid_loss_refuses_a_fixed_variance(variance: Variance) -> None:
    reverse = chain(variance)
    with pytest.raises(
        ValueError, match="Expected a learned variance .* for HybridLoss; got Fixed"
    ):
        HybridLoss().loss(reverse, reverse.forward_chain, torch.zeros(2, 3))
    assert network_of(reverse).calls == 0


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_hybrid_loss_refuses_a_weight_that_is_not_positive(weight: float) -> None:
    with pytest.raises(ValueError, match="Expected vlb_weight to be positive"):
        HybridLoss(weight)


# -- routes to training ------------------------------------------------------------------------

OBJECTIVES: dict[str, tuple[Callable[..., Objective], Variance]] = {
    "bound": (VariationalBound, FixedLarge()),
    "bound-learned": (VariationalBound, LearnedDiagonal()),
    "bound-all": (lambda **o: VariationalBound(AllTimesteps(), **o), FixedSmall()),
    "noise": (NoiseLoss, FixedLarge()),
    "mean": (MeanLoss, FixedLarge()),
    "weighted": (lambda **o: WeightedLoss(MinSNR(), **o), FixedLarge()),
    "sigmoid": (lambda **o: WeightedLoss(SigmoidWeighting(), **o), FixedLarge()),
    "hybrid": (HybridLoss, LearnedRange()),
}
every_objective = pytest.mark.parametrize(
    ("build", "variance"), OBJECTIVES.values(), ids=OBJECTIVES.keys()
)


def training_data() -> Tensor:
    """Two narrow clusters in the plane."""
    signs = torch.tensor([1.0, -1.0]).repeat(32).unsqueeze(1)
    return signs * torch.tensor([0.9, -0.6]) + 0.05 * torch.randn(64, 2, generator=seeded(4))


def held(build: Callable[..., Objective], reverse: ReverseChain, x_0: Tensor) -> float:
    """The loss per sample on draws that are the same before and after training."""
    total = build(num_particles=32, generator=seeded(99)).loss(reverse, reverse.forward_chain, x_0)
    return total / len(x_0)


def fit(build: Callable[..., Objective], reverse: ReverseChain, x_0: Tensor, steps: int) -> None:
    adam = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(reverse, reverse.forward_chain, adam, loss=build(generator=seeded(1)))
    for _ in range(steps):
        svi.step(x_0)


@every_objective
def test_svi_trains_a_plain_module(build: Callable[..., Objective], variance: Variance) -> None:
    reverse, x_0 = chain(variance, size=2), training_data()
    start = [p.detach().clone() for p in network_of(reverse).parameters()]
    before = held(build, reverse, x_0)
    fit(build, reverse, x_0, 60)
    after = held(build, reverse, x_0)
    assert after < before - 0.1 * abs(before)
    used = [
        n for n, _ in network_of(reverse).named_parameters() if variance.learned or "raw" not in n
    ]
    moved = {
        name
        for (name, p), old in zip(network_of(reverse).named_parameters(), start, strict=True)
        if not torch.equal(p, old)
    }
    assert moved == set(used)


def test_two_models_in_one_process_both_learn_with_parameters_of_their_own() -> None:
    x_0 = training_data()
    first, second = chain(size=2), chain(size=2)
    fit(NoiseLoss, first, x_0, 1)
    first_names = set(pyro.get_param_store())
    start = held(NoiseLoss, first, x_0), held(NoiseLoss, second, x_0)
    fit(NoiseLoss, second, x_0, 60)
    second_names = set(pyro.get_param_store()) - first_names
    untouched = held(NoiseLoss, first, x_0)
    assert len(first_names) == len(second_names) == len(list(network_of(first).parameters()))
    assert untouched == start[0]
    fit(NoiseLoss, first, x_0, 60)
    assert set(pyro.get_param_store()) == first_names | second_names
    assert held(NoiseLoss, first, x_0) < 0.9 * start[0]
    assert held(NoiseLoss, second, x_0) < 0.9 * start[1]


@every_objective
def test_elbo_module_and_svi_give_one_loss_and_one_gradient(
    build: Callable[..., Objective], variance: Variance
) -> None:
    """AllTimesteps among them: its step-by-step backward adds up to the gradient of the sum."""
    reverse, x_0 = chain(variance, size=2), training_data()
    network = network_of(reverse)
    module = build(generator=seeded(3))(reverse, reverse.forward_chain)
    parameters = {id(p) for p in module.parameters()}
    assert all(id(p) in parameters for p in network.parameters())
    loss = module(x_0)
    loss.backward()
    expected = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    value = build(generator=seeded(3)).loss_and_grads(reverse, reverse.forward_chain, x_0)
    assert value == pytest.approx(float(loss.detach()), rel=1e-12)
    for p, gradient in zip(network.parameters(), expected, strict=True):
        if gradient is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
    assert any(g is not None and float(g.abs().max()) > 1e-6 for g in expected)


@every_objective
def test_loss_is_a_number_and_needs_no_gradient(
    build: Callable[..., Objective], variance: Variance
) -> None:
    reverse, x_0 = chain(variance, size=2), training_data()
    value = build(generator=seeded(3)).loss(reverse, reverse.forward_chain, x_0)
    differentiable = build(generator=seeded(3)).differentiable_loss(
        reverse, reverse.forward_chain, x_0
    )
    assert type(value) is float
    assert value == pytest.approx(float(differentiable.detach()), rel=1e-12)
    assert all(p.grad is None for p in network_of(reverse).parameters())
    with torch.no_grad():
        evaluated = build(generator=seeded(3)).loss_and_grads(reverse, reverse.forward_chain, x_0)
    assert evaluated == pytest.approx(value, rel=1e-12)
    svi = SVI(reverse, reverse.forward_chain, pyro.optim.Adam({}), loss=build(generator=seeded(3)))
    assert svi.evaluate_loss(x_0) == pytest.approx(value, rel=1e-12)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, and its deprecations
def test_lightning_trains_an_elbo_module() -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, reverse: ReverseChain):
            super().__init__()
            self.loss = NoiseLoss(generator=seeded(2))(reverse, reverse.forward_chain)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.loss(batch) / len(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    reverse, x_0 = chain(size=2), training_data()
    before = held(NoiseLoss, reverse, x_0)
    trainer = lightning.Trainer(
        max_epochs=30,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(reverse), torch.utils.data.DataLoader(x_0, batch_size=32))
    assert trainer.global_step == 60
    assert held(NoiseLoss, reverse, x_0) < 0.9 * before


# -- context and particles ---------------------------------------------------------------------


class Baked(nn.Module):
    """A network that knows its contexts by heart: the reference for passing them."""

    def __init__(self, network: nn.Module, context: Tensor):
        super().__init__()
        self.inner, self.context = network, context

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.inner(x, time, self.context)


@every_objective
def test_each_sample_and_particle_has_its_own_context(
    build: Callable[..., Objective], variance: Variance
) -> None:
    reverse, x_0, context = chain(variance, size=2), training_data()[:5], torch.randn(5, 2)
    baked = ReverseChain(
        NoiseDenoiser(Baked(network_of(reverse), context.repeat(3, 1))),
        reverse.forward_chain,
        (2,),
        variance=variance,
    )

    def value(model: ReverseChain, *arguments: Tensor) -> float:
        loss = build(num_particles=3, generator=seeded(8))
        return loss.loss(model, model.forward_chain, x_0, *arguments)

    expected = value(baked)
    assert value(reverse, context) == pytest.approx(expected, rel=1e-10)
    assert value(reverse, context.flip(0)) != pytest.approx(expected, rel=1e-4)
    value_of_grads = build(num_particles=3, generator=seeded(8)).loss_and_grads(
        reverse, reverse.forward_chain, x_0, context=context
    )
    assert value_of_grads == pytest.approx(expected, rel=1e-10)


@every_objective
def test_particles_are_averaged(build: Callable[..., Objective], variance: Variance) -> None:
    reverse, x_0 = chain(variance, size=2), training_data()
    together = build(num_particles=3, generator=seeded(8))
    repeated = build(generator=seeded(8))
    value = together.loss(reverse, reverse.forward_chain, x_0)
    expected = repeated.loss(reverse, reverse.forward_chain, x_0.repeat(3, 1)) / 3
    assert value == pytest.approx(expected, rel=1e-12)


def test_particles_lower_the_variance() -> None:
    reverse, x_0 = chain(), torch.randn(4, 3)

    def spread(particles: int) -> float:
        loss = NoiseLoss(num_particles=particles)
        return float(
            torch.tensor([loss.loss(reverse, reverse.forward_chain, x_0) for _ in range(200)]).std()
        )

    assert 3.0 < spread(1) / spread(16) < 5.5  # 4 in expectation; 5 % error in each deviation


# -- refusals ----------------------------------------------------------------------------------


def entry_points() -> list[str]:
    return ["loss", "differentiable_loss", "loss_and_grads"]


@pytest.mark.parametrize("method", entry_points())
@pytest.mark.parametrize(
    "pair",
    [
        lambda r, f: (f, r),
        lambda r, f: (poutine.block(r), f),
        lambda r, f: (r, poutine.block(f)),
        lambda r, f: (r.denoiser, f),
    ],
    ids=["swapped", "wrapped-model", "wrapped-guide", "a-part"],
)
@pytest.mark.usefixtures("user_errors")
def test_objectives_refuse_what_is_not_the_pair(method: str, pair: Callable[..., Any]) -> None:
    reverse = chain()
    model, guide = pair(reverse, reverse.forward_chain)
    with pytest.raises(TypeError, match="Expected a ReverseChain as the model and a ForwardChain"):
        getattr(VariationalBound(), method)(model, guide, torch.zeros(2, 3))
    assert network_of(reverse).calls == 0


@pytest.mark.parametrize("method", entry_points())
@pytest.mark.parametrize(
    "other",
    [lambda: ForwardChain(SMALL, 7), lambda: ForwardChain(LogSNRSchedule(), 6)],
    ids=["steps", "schedule"],
)
def test_objectives_refuse_another_forward_chain(
    method: str, other: Callable[[], ForwardChain]
) -> None:
    reverse = chain()
    with pytest.raises(ValueError, match="Expected as the guide the forward chain that"):
        getattr(NoiseLoss(), method)(reverse, other(), torch.zeros(2, 3))
    assert network_of(reverse).calls == 0


def test_objectives_take_an_equal_chain_in_either_order() -> None:
    """Both orders are one joint, and the objectives visit steps, not sites."""
    reverse, x_0 = chain(), torch.randn(4, 3)
    values = [
        VariationalBound(generator=seeded()).loss(reverse, guide, x_0)
        for guide in (reverse.forward_chain, ForwardChain(SMALL, 6, order="noising"))
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("particles", [0, -1])
def test_objectives_refuse_less_than_one_particle(particles: int) -> None:
    message = f"Expected num_particles to be an integer >= 1; got {particles}"
    with pytest.raises(ValueError, match=message):
        NoiseLoss(num_particles=particles)


@pytest.mark.usefixtures("user_errors")
def test_objectives_refuse_what_is_not_a_rule_for_t() -> None:
    with pytest.raises(TypeError, match="Expected timesteps to be a Timesteps; got 'all'"):
        VariationalBound("all")  # type: ignore[arg-type]


def with_value(value: float) -> Tensor:
    x_0 = torch.zeros(4, 3)
    x_0[2, 1] = value
    return x_0


@pytest.mark.parametrize("method", entry_points())
@every_objective
@pytest.mark.parametrize(
    ("x_0", "message"),
    [
        (with_value(math.nan), "Expected finite data; got NaN or infinity in 1 of 4"),
        (with_value(math.inf), "Expected finite data; got NaN or infinity in 1 of 4"),
        (torch.zeros(4, 2), r"Expected data of shape \(N, 3\); got \(4, 2\)"),
        (torch.zeros(3), r"Expected data of shape \(N, 3\); got \(3,\)"),
        (torch.zeros(4, 3, dtype=torch.int64), "Expected floating-point data; got torch.int64"),
        (with_value(1.5), "Expected data within"),
    ],
    ids=["nan", "infinite", "event", "no-batch", "integer", "range"],
)
def test_bad_data_is_refused_before_the_network_is_called(
    method: str, build: Callable[..., Objective], variance: Variance, x_0: Tensor, message: str
) -> None:
    reverse = chain(variance, decoder=DiscretizedGaussianDecoder(0.5))
    with pytest.raises(ValueError, match=message):
        getattr(build(), method)(reverse, reverse.forward_chain, x_0)
    assert network_of(reverse).calls == 0


def test_contexts_of_another_number_are_refused_before_the_network_is_called() -> None:
    reverse = chain()
    with pytest.raises(ValueError, match="Expected 4 contexts, one per sample; got 3"):
        NoiseLoss().loss(reverse, reverse.forward_chain, torch.zeros(4, 3), torch.zeros(3, 3))
    assert network_of(reverse).calls == 0


def test_the_bound_holds_the_prior_term_once() -> None:
    """On a chain that ends at SNR 1/e, where KL(q(x_T | x_0) ‖ N(0, I)) is no rounding error."""
    forward = ForwardChain(LogSNRSchedule(2.0, -1.0), 6)
    reverse, x_0 = ReverseChain(NoiseDenoiser(SmallNet()), forward, (3,)), torch.randn(5, 3)
    normal = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    total = torch.distributions.kl_divergence(forward.marginal(x_0, 6).base_dist, normal).sum()
    assert float(total) > 0.5
    generator = seeded(11)
    for t in range(1, 7):
        noise = torch.randn(x_0.shape, generator=generator)
        total = total + variational_term(reverse, x_0, t, noise).sum()
    value = seeded_loss(VariationalBound, reverse, x_0, timesteps=AllTimesteps())
    torch.testing.assert_close(value, total, rtol=1e-10, atol=0)


# -- torch.func ----------------------------------------------------------------------------------


class Term(nn.Module):
    """The term of one sample, as a module whose parameters are the chain's."""

    def __init__(self, reverse: ReverseChain):
        super().__init__()
        self.reverse = reverse

    def forward(self, x_0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        return variational_term(self.reverse, x_0[None], t, noise[None])[0]


FUNC_DECODERS = [GaussianDecoder(), DiscretizedGaussianDecoder(0.25), CategoricalDecoder(9)]


# PyTorch maps the normal CDF's logarithm sample by sample, and says so
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("decoder", FUNC_DECODERS, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("variance", [FixedSmall(), LearnedRange()], ids=lambda v: type(v).__name__)
def test_vmap_gives_the_gradient_of_each_sample(variance: Variance, decoder: Decoder) -> None:
    """By torch.func, t mapped with its sample, against one backward pass after the other."""
    torch.manual_seed(0)
    network = ResidualMLP((3,), width=8, blocks=1, learned_variance=variance.learned).double()
    with torch.no_grad():  # the last layer starts at zero
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    reverse = ReverseChain(
        NoiseDenoiser(network), ForwardChain(LogSNRSchedule(4.0, -4.0), 5), (3,), variance, decoder
    )
    x_0 = (torch.randn(6, 3, dtype=torch.float64) * 4).round().clamp(-4, 4) / 4
    t, noise = torch.tensor([1, 2, 5, 1, 3, 4]), torch.randn(6, 3, dtype=torch.float64)
    module = Term(reverse)
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, sample)

    each = torch.func.grad_and_value(loss)
    gradients, values = torch.func.vmap(each, (None, 0, 0, 0))(parameters, x_0, t, noise)
    torch.testing.assert_close(
        values, variational_term(reverse, x_0, t, noise), rtol=1e-12, atol=1e-12
    )
    for i in range(6):
        term = variational_term(reverse, x_0[i : i + 1], int(t[i]), noise[i : i + 1])
        expected = torch.autograd.grad(
            term.sum(), list(module.parameters()), allow_unused=True, materialize_grads=True
        )
        for value, name in zip(expected, parameters, strict=True):
            torch.testing.assert_close(gradients[name][i], value, rtol=1e-10, atol=1e-12)
    # one t for all samples, and the gradient with respect to the data
    slope = torch.func.vmap(torch.func.grad(lambda x, e: module(x, 2, e)), in_dims=(0, 0))(
        x_0, noise
    )
    moved = x_0.clone().requires_grad_()
    (expected_slope,) = torch.autograd.grad(variational_term(reverse, moved, 2, noise).sum(), moved)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-10, atol=1e-12)


def test_vmap_still_checks_what_needs_no_look_at_numbers() -> None:
    reverse = ReverseChain(
        NoiseDenoiser(ResidualMLP((3,), width=8, blocks=1)), ForwardChain(LogSNRSchedule(), 5), (3,)
    )
    with pytest.raises(ValueError, match=r"Expected data of shape \(N, 3\); got \(1, 2\)"):
        torch.func.vmap(Term(reverse), (0, None, 0))(torch.zeros(4, 2), 1, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="Expected t in 1 … 5; got 6 to 6"):
        torch.func.vmap(Term(reverse), (0, None, 0))(torch.zeros(4, 3), 6, torch.zeros(4, 3))


@every_objective
def test_a_seed_is_a_generator_of_its_own(
    build: Callable[..., Objective], variance: Variance
) -> None:
    """By its former name, too; without one torch's global generator is drawn from."""
    reverse, x_0 = chain(variance), torch.randn(6, 3, generator=seeded(9))

    def value(**options: Any) -> float:
        return build(**options).loss(reverse, reverse.forward_chain, x_0)

    assert value(seed=3) == value(seed=seeded(3)) == value(generator=seeded(3)) != value(seed=4)
    torch.manual_seed(3)
    first = value()
    assert first != value()
