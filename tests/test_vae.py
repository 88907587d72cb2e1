"""Laws of the VAE: exact answers for a linear Gaussian one, and that it learns."""

from __future__ import annotations

import copy
import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyrodiff.data import load
from pyrodiff.decoders import CategoricalDecoder, DiscretizedGaussianDecoder, GaussianDecoder
from pyrodiff.vae import VAE

SCALE = 0.5
# x_0 = W z + b + SCALE ε with orthogonal columns of W, so that the posterior is diagonal.
W = torch.tensor([[1.0, 2.0], [1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
B = torch.tensor([0.3, -0.1, 1.0], dtype=torch.float64)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def linear_gaussian(shift: float = 0.0) -> VAE:
    """The exact posterior as the guide, its mean and log variance off by ``shift``."""
    variance = 1 / (1 + (W.T @ W).diagonal() / SCALE**2)
    to_mean = variance[:, None] * W.T / SCALE**2
    weight = torch.cat([to_mean, torch.zeros_like(to_mean)])
    bias = torch.cat([-to_mean @ B, variance.log()]) + shift
    return VAE(
        (3,),
        latent_size=2,
        decoder=GaussianDecoder(scale=SCALE),
        encoder_network=linear(weight, bias),
        decoder_network=linear(W, B),
    )


def log_evidence(x_0: Tensor) -> Tensor:
    covariance = W @ W.T + SCALE**2 * torch.eye(3, dtype=torch.float64)
    return MultivariateNormal(B, covariance).log_prob(x_0)


def test_bound_is_the_evidence_under_the_exact_posterior():
    vae, x_0 = linear_gaussian(), torch.randn(6, 3, dtype=torch.float64)
    result = vae.bound(x_0, num_particles=5)
    torch.testing.assert_close(result.value, log_evidence(x_0), rtol=1e-10, atol=1e-10)
    assert float(result.std_error.max()) < 1e-10
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True).loss(vae.model, vae.guide, x_0)
    assert loss == pytest.approx(-float(log_evidence(x_0).sum()), rel=1e-10)


def test_bound_falls_short_of_the_evidence_by_the_kl_of_the_guide():
    shift, x_0 = 0.3, torch.randn(6, 3, dtype=torch.float64)
    vae = linear_gaussian(shift)
    exact = linear_gaussian()
    q = vae.posterior(vae.guide.network, x_0).base_dist
    p = exact.posterior(exact.guide.network, x_0).base_dist
    gap = kl_divergence(Normal(q.loc, q.scale), Normal(p.loc, p.scale)).sum(-1)
    expected = log_evidence(x_0) - gap
    assert bool((expected < log_evidence(x_0) - 0.01).all())
    result = vae.bound(x_0, num_particles=4000)
    # 4.5 standard errors: 6 comparisons, each fails once in 150,000 seeds
    assert bool(((result.value - expected).abs() < 4.5 * result.std_error).all())
    assert float(result.std_error.max()) < 0.05


def test_trace_and_mean_field_elbo_have_one_value():
    vae, x_0 = linear_gaussian(0.3), torch.randn(1, 3, dtype=torch.float64)
    wide = x_0.expand(4000, 3).contiguous()
    bound = vae.bound(wide, num_particles=2).value
    se = float(bound.std()) / math.sqrt(len(wide))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        value = -elbo.loss(vae.model, vae.guide, wide) / len(wide)
        assert abs(value - float(bound.mean())) < 8 * se  # own error up to √2 se, and ours


def test_value_of_a_sample_does_not_depend_on_its_batch():
    vae, x_0 = VAE((2, 3), latent_size=4, hidden=(8,)).double(), torch.randn(7, 2, 3).double()
    whole, parts = vae.bound(x_0, 4, seed=3), vae.bound(x_0, 4, seed=3, batch_size=2)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    assert math.isnan(float(vae.bound(x_0, 1).std_error[0]))


@pytest.mark.parametrize("route", ["svi-trace", "svi-mean-field", "module"])
def test_learns_the_digits(route):
    data = load("digits")
    x_0 = data.train[:256]
    decoder = CategoricalDecoder(17, float(data.train.min()), float(data.train.max()))
    vaes = [VAE(data.event_shape, 8, (64,), decoder) for _ in range(2)]
    before = [vae.bound(x_0, 2).value.mean() for vae in vaes]
    for vae in vaes:
        if route == "module":
            loss = TraceMeanField_ELBO()(vae.model, vae.guide)
            optimizer = torch.optim.Adam(loss.parameters(), 5e-3)
            assert len(list(loss.parameters())) == len(list(vae.parameters()))
            for _ in range(60):
                optimizer.zero_grad()
                (loss(x_0) / len(x_0)).backward()
                optimizer.step()
        else:
            elbo = Trace_ELBO() if route == "svi-trace" else TraceMeanField_ELBO()
            svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 5e-3}), elbo)
            for _ in range(60):
                svi.step(x_0)
    # Uniform levels: 64 log 17 = 181 nats.  Both VAEs of the process have to gain 50 of them.
    for vae, start in zip(vaes, before, strict=True):
        assert float(vae.bound(x_0, 2).value.mean() - start) > 50.0


def test_every_parameter_gets_a_gradient_and_a_name_of_its_own():
    vaes = [VAE((3,), 2, (8,)) for _ in range(2)]
    for vae in vaes:
        Trace_ELBO().loss_and_grads(vae.model, vae.guide, torch.randn(5, 3))
        assert all(float(p.grad.abs().max()) > 0 for p in vae.parameters())
    assert len(pyro.get_param_store()) == sum(len(list(v.parameters())) for v in vaes)
    clone = copy.deepcopy(vaes[0])
    Trace_ELBO().loss(clone.model, clone.guide, torch.randn(5, 3))
    assert len(pyro.get_param_store()) == 3 * len(list(clone.parameters()))


@pytest.mark.parametrize(
    "decoder",
    [
        GaussianDecoder(),
        GaussianDecoder(0.1),
        DiscretizedGaussianDecoder(0.5),
        CategoricalDecoder(5),
    ],
    ids=repr,
)
def test_generates_what_its_decoder_explains(decoder):
    vae = VAE((2, 3), 4, (8,), decoder)
    x = Predictive(vae.model, num_samples=3, return_sites=["x_0"])(num_samples=4)["x_0"]
    assert x.shape == (3, 4, 2, 3)
    assert vae.bound(x[0], 2).value.shape == (4,)
    assert vae.bound(x[0], 2).value.isfinite().all()
    if decoder.discrete:  # the levels' probabilities add up to one
        law = vae.likelihood(vae.model.network, torch.randn(1, 4)).base_dist
        levels = torch.linspace(-1, 1, 5)
        total = sum(law.log_prob(level.expand(1, 2, 3)).exp() for level in levels)
        torch.testing.assert_close(total, torch.ones(1, 2, 3))


@pytest.mark.parametrize(
    ("x_0", "message"),
    [
        (torch.zeros(2, 4), r"Expected data of shape \(N, 3\); got \(2, 4\)"),
        (torch.full((2, 3), math.nan), "Expected finite data"),
        (torch.full((2, 3), 0.1), "Expected data on the 5 levels"),
    ],
)
def test_bad_data_is_refused(x_0, message):
    vae = VAE((3,), 2, (8,), CategoricalDecoder(5))
    with pytest.raises(ValueError, match=message):
        vae.bound(x_0)
    with pytest.raises(ValueError, match=message):
        Trace_ELBO().loss(vae.model, vae.guide, x_0)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="non-empty event_shape"):
        VAE(())
    with pytest.raises(ValueError, match="latent_size >= 1"):
        VAE((3,), 0)
    with pytest.raises(ValueError, match="num_particles >= 1"):
        VAE((3,)).bound(torch.zeros(1, 3), 0)
