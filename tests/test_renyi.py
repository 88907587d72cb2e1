"""Rényi's bound of each datum: closed forms of Gaussian chains, gradients, and Pyro's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

from pyrodiff import ForwardChain, ImportanceBound, RenyiBound, ReverseChain
from pyrodiff.denoisers import DataDenoiser
from pyrodiff.oracles import linear_bound, linear_log_prob
from pyrodiff.schedules import LogSNRSchedule

F64 = torch.float64
T = 3
DATA = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.6, 0.9]], dtype=F64)
ORDERS = [0.0, 0.5, 1.0, -0.3]
every_alpha = pytest.mark.parametrize("alpha", ORDERS)
every_way = pytest.mark.parametrize("vectorized", [True, False], ids=["vectorized", "sequential"])


class Linear(nn.Module):
    """x̂_0 = k x_t at every t: with it the whole model is Gaussian."""

    def __init__(self, gain: float = 0.6):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=F64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.gain * x


def pair(gain: float = 0.6) -> tuple[ReverseChain, ForwardChain]:
    forward = ForwardChain(LogSNRSchedule(2.0, -3.0), T)
    reverse = ReverseChain(DataDenoiser(Linear(gain)), forward, (2,))
    return reverse, reverse.forward_chain


def moment(x_0: Tensor, order: float) -> float:
    """E_q w^order = ∫ p^order q^(1 − order), by the Hessian of a quadratic exponent."""
    reverse, forward = pair()

    def exponent(x: Tensor) -> Tensor:
        data = {forward.site(t): x[None, t - 1] for t in range(1, T + 1)}
        log_p, log_q = (
            poutine.trace(pyro.condition(program, data)).get_trace(x_0[None]).log_prob_sum()
            for program in (reverse, forward)
        )
        return order * log_p + (1 - order) * log_q

    zero = torch.zeros(T, 2, dtype=F64)
    hessian = torch.autograd.functional.hessian(exponent, zero).reshape(2 * T, 2 * T)
    gradient = torch.autograd.functional.jacobian(exponent, zero).flatten()
    top = exponent(zero) - 0.5 * gradient @ torch.linalg.solve(hessian, gradient)
    return float((top + T * math.log(2 * math.pi) - 0.5 * (-hessian).logdet()).detach().exp())


# -- exact values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1.0, 0.5, -0.3])
@pytest.mark.parametrize("particles", [1, 5])
def test_mean_of_powers_is_the_closed_form(order: float, particles: int) -> None:
    """E exp((1 − α) L̂_n) = E_q w_n^{1−α} for any K; 3 data, 6 standard errors: 6e-9 failures."""
    copies = 4000
    elbo = RenyiBound(1 - order, particles, vectorize_particles=True)
    with torch.no_grad():
        bounds = elbo.bounds(*pair(), DATA.repeat_interleave(copies, 0)).reshape(3, copies)
    powers = (order * bounds).exp()
    error = powers.std(1) / math.sqrt(copies)
    expected = torch.tensor([moment(x, order) for x in DATA], dtype=F64)
    assert bool((error < 0.2 * expected).all())  # the comparison means something
    assert bool(((powers.mean(1) - expected).abs() < 6 * error).all())


def test_the_moments_of_the_tests_hold_the_likelihood() -> None:
    exact = linear_log_prob(pair()[0], DATA)
    assert [moment(x, 1.0) for x in DATA] == pytest.approx(exact.exp().tolist(), rel=1e-9)
    assert [moment(x, 0.0) for x in DATA] == pytest.approx([1.0] * 3, rel=1e-9)


@pytest.mark.parametrize(("alpha", "particles"), [(1.0, 4), (0.0, 1), (0.5, 1)])
def test_one_particle_or_alpha_one_is_the_elbo(alpha: float, particles: int) -> None:
    """3 data within 6 standard errors of the closed form: 6e-9 failures if unseeded."""
    copies = 3000
    with torch.no_grad():
        elbo = RenyiBound(alpha, particles, vectorize_particles=True)
        bounds = elbo.bounds(*pair(), DATA.repeat_interleave(copies, 0)).reshape(3, copies)
    error = bounds.std(1) / math.sqrt(copies)
    difference = bounds.mean(1) - linear_bound(pair()[0], DATA).elbo
    assert bool((difference.abs() < 6 * error).all()) and float(error.max()) < 0.1


@every_way
def test_importance_weighted_bound_is_the_estimators(vectorized: bool) -> None:
    """α = 0 and ``ImportanceBound`` of as many particles: 3 means, 6 standard errors: 6e-9."""
    copies, particles = 1000, 4
    x_0 = DATA.repeat_interleave(copies, 0)
    with torch.no_grad():
        ours = RenyiBound(0.0, particles, vectorized).bounds(*pair(), x_0).reshape(3, copies)
    theirs = ImportanceBound(particles).estimate(pair()[0], x_0, seed=1).value.reshape(3, copies)
    error = ((ours.var(1) + theirs.var(1)) / copies).sqrt()
    assert bool(((ours.mean(1) - theirs.mean(1)).abs() < 6 * error).all())


# -- Pyro's own ------------------------------------------------------------------------------------


def loss_and_gradient(elbo: Any, *arguments: Tensor) -> tuple[float, float]:
    reverse, forward = pair()
    torch.manual_seed(0)
    loss = elbo.loss_and_grads(reverse, forward, *arguments)
    return loss, float(reverse.denoiser.network.gain.grad)


@every_way
@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.3])
def test_a_chain_and_its_data_have_pyros_bound(alpha: float, vectorized: bool) -> None:
    """The same noise, the same loss and gradient: all sites stand in one plate."""
    options = dict(num_particles=5, vectorize_particles=vectorized)
    ours, theirs = (
        loss_and_gradient(kind(alpha, **options, max_plate_nesting=1), DATA)
        for kind in (RenyiBound, RenyiELBO)
    )
    assert ours == pytest.approx(theirs, rel=1e-10)


@every_way
def test_each_datum_has_weights_of_its_own(vectorized: bool) -> None:
    """From Pyro's traces of the same noise: log-mean-exp over particles, then the sum over data."""
    reverse, forward = pair()
    torch.manual_seed(0)
    log_w = []
    for _ in range(1 if vectorized else 5):
        with pyro.plate("particles", 5 if vectorized else 1, dim=-2):
            guide = poutine.trace(forward).get_trace(DATA)
            model = poutine.trace(poutine.replay(reverse, trace=guide)).get_trace(DATA)
        guide.compute_log_prob()
        model.compute_log_prob()
        log_w.append(
            sum(model.nodes[reverse.site(t)]["log_prob"] for t in range(T + 1))
            - sum(guide.nodes[reverse.site(t)]["log_prob"] for t in range(1, T + 1))
        )
    expected = torch.cat(log_w).logsumexp(0) - math.log(5)
    torch.manual_seed(0)
    elbo = RenyiBound(0.0, 5, vectorized, max_plate_nesting=1)
    torch.testing.assert_close(elbo.bounds(reverse, forward, DATA), expected)
    torch.manual_seed(0)
    assert elbo.loss(reverse, forward, DATA) == pytest.approx(-float(expected.detach().sum()))


def test_a_deterministic_site_costs_pyros_bound_its_gain() -> None:
    """300 data, 20 particles: the share of the ELBO's gap that is left, ours and Pyro's.

    Outside the plate of the data, the site makes Pyro's one weight of the whole batch.
    """
    reverse, forward = pair()
    x_0 = DATA.repeat(100, 1)

    def noted(x_0: Tensor) -> None:
        pyro.deterministic("total", x_0.sum())
        reverse(x_0)

    exact, elbo = linear_log_prob(reverse, x_0).sum(), linear_bound(reverse, x_0).elbo.sum()
    options = dict(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    left = []
    for kind in (RenyiBound, RenyiELBO):
        loss = sum(kind(0.0, **options).loss(noted, forward, x_0) for _ in range(10)) / 10
        left.append((loss + float(exact)) / float(exact - elbo))
    assert left[0] < 0.35 and left[1] > 0.7


# -- gradients -------------------------------------------------------------------------------------


@every_way
@every_alpha
def test_gradient_is_the_derivative_of_the_loss(alpha: float, vectorized: bool) -> None:
    """Against central differences, the noise held fixed."""
    elbo, h = RenyiBound(alpha, 4, vectorized, max_plate_nesting=1), 1e-5
    values = []
    for gain in (0.6 + h, 0.6 - h):
        torch.manual_seed(0)
        values.append(elbo.loss(*pair(gain), DATA))
    loss, gradient = loss_and_gradient(elbo, DATA)
    assert gradient == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)
    assert loss == pytest.approx(sum(values) / 2, rel=1e-6)


@every_way
def test_gradient_of_a_guide_that_draws_x_0(vectorized: bool) -> None:
    reverse, forward = pair()
    mean = torch.tensor([0.2, -0.4], dtype=F64, requires_grad=True)
    y = torch.tensor([0.5, -0.5, 1.0], dtype=F64)

    def model() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(reverse().sum(-1), 0.5), obs=y)

    def guide(loc: Tensor) -> Callable[[], None]:
        def program() -> None:
            with pyro.plate("rows", 3):
                forward(pyro.sample("x_0", dist.Normal(loc, 0.3).to_event(1)))

        return program

    elbo, h = RenyiBound(0.0, 4, vectorized, max_plate_nesting=1), 1e-5
    torch.manual_seed(0)
    elbo.loss_and_grads(model, guide(mean))
    for i in range(2):
        values = []
        for sign in (1, -1):
            moved = mean.detach().clone()
            moved[i] += sign * h
            torch.manual_seed(0)
            values.append(elbo.loss(model, guide(moved)))
        difference = (values[0] - values[1]) / (2 * h)
        assert float(mean.grad[i]) == pytest.approx(difference, rel=1e-6)


def test_training_by_svi_and_as_a_module() -> None:
    """Both take the gain to where the data are likelier."""
    for route in ("svi", "module"):
        reverse, forward = pair(0.1)
        before = float(linear_log_prob(reverse, DATA).sum())
        elbo = RenyiBound(0.0, 8, vectorize_particles=True)
        if route == "svi":
            svi = SVI(reverse, forward, pyro.optim.Adam({"lr": 0.05}), loss=elbo)
            for _ in range(40):
                svi.step(DATA)
        else:
            loss = elbo(reverse, forward)
            optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
            for _ in range(40):
                optimizer.zero_grad()
                loss(DATA).backward()
                optimizer.step()
        assert float(linear_log_prob(reverse, DATA).sum()) > before + 0.5


# -- plates, scales and errors ---------------------------------------------------------------------


@every_way
def test_a_subsampled_plate_scales_the_sum(vectorized: bool) -> None:
    reverse, forward = pair()
    chosen = torch.tensor([2, 0])

    def within(chain: Any) -> Callable[[], None]:
        def program() -> None:
            with pyro.plate("rows", 3, subsample=chosen):
                chain(DATA[chosen])

        return program

    elbo = RenyiBound(0.3, 4, vectorized, max_plate_nesting=1)
    torch.manual_seed(0)
    subsampled = elbo.loss(within(reverse), within(forward))
    torch.manual_seed(0)
    assert subsampled == pytest.approx(1.5 * elbo.loss(reverse, forward, DATA[chosen]), rel=1e-12)
    torch.manual_seed(0)
    pyros = RenyiELBO(0.3, 4, vectorize_particles=vectorized, max_plate_nesting=1)
    powers = pyros.loss(within(reverse), within(forward))
    torch.manual_seed(0)  # w^{N/n} in the mean: the bound of another α, and too high
    other = RenyiBound(1 - 0.7 * 1.5, 4, vectorized, max_plate_nesting=1)
    expected = 1.5 * other.loss(reverse, forward, DATA[chosen])
    assert powers == pytest.approx(expected, rel=1e-12) and powers < subsampled


@every_way
def test_a_global_latent_makes_one_datum(vectorized: bool) -> None:
    """Then nothing can be taken apart, and the bound is Pyro's."""
    reverse, forward = pair()

    def model(x_0: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("rows", 3):
            x = reverse(x_0)
            pyro.sample("y", dist.Normal(x[..., 0], scale), obs=x_0[:, 1])

    def guide(x_0: Tensor) -> None:
        pyro.sample("scale", dist.LogNormal(0.1, 0.3))
        with pyro.plate("rows", 3):
            forward(x_0)

    losses = []
    for kind in (RenyiBound, RenyiELBO):
        torch.manual_seed(0)
        options = dict(num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
        losses.append(kind(0.2, **options).loss(model, guide, DATA))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # some numbers are float32


def test_deterministic_sites_and_scales_within_a_datum() -> None:
    """``pyro.deterministic`` changes nothing; ``poutine.scale`` is a part of the weight."""
    reverse, forward = pair()

    def noted(x_0: Tensor) -> None:
        pyro.deterministic("total", x_0.sum())
        reverse(x_0)

    elbo = RenyiBound(0.0, 4)
    losses = []
    for model, guide in (
        (reverse, forward),
        (noted, forward),
        (poutine.scale(reverse, 0.5), poutine.scale(forward, 0.5)),
    ):
        torch.manual_seed(0)
        losses.append(elbo.bounds(model, guide, DATA).detach())
    torch.testing.assert_close(losses[0], losses[1])
    torch.manual_seed(0)
    log_w = torch.stack([RenyiBound(0.0, 1).bounds(reverse, forward, DATA) for _ in range(4)])
    halved = (0.5 * log_w).logsumexp(0) - math.log(4)
    torch.testing.assert_close(losses[2], halved.detach(), rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_refused() -> None:
    for alpha in (math.inf, math.nan):
        with pytest.raises(ValueError, match="finite alpha"):
            RenyiBound(alpha)
    with pytest.raises(ValueError, match="num_particles to be an integer >= 1"):
        RenyiBound(num_particles=0)


def test_guides_without_reparametrized_sites_are_refused() -> None:
    logit = torch.zeros((), requires_grad=True)

    def model() -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(0.2))

    def guide() -> None:
        pyro.sample("k", dist.Bernoulli(logits=logit))

    with pytest.raises(NotImplementedError, match=r"reparametrized.*'k'"):
        RenyiBound().loss_and_grads(model, guide)
    with torch.no_grad():
        assert RenyiBound(1.0, 1).loss(model, guide) > 0
    assert Trace_ELBO().loss(model, guide) > 0
