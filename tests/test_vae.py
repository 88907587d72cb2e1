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

from pyrodiff.comparison import compare, to_elpd
from pyrodiff.data import load
from pyrodiff.decoders import CategoricalDecoder, DiscretizedGaussianDecoder, GaussianDecoder
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.samples import sample_checksums
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
    result = vae.bound(x_0, particles=5)
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
    result = vae.bound(x_0, particles=4000)
    # 4.5 standard errors: 6 comparisons, each fails once in 150,000 seeds
    assert bool(((result.value - expected).abs() < 4.5 * result.std_error).all())
    assert float(result.std_error.max()) < 0.05


def test_trace_and_mean_field_elbo_have_one_value():
    vae, x_0 = linear_gaussian(0.3), torch.randn(1, 3, dtype=torch.float64)
    wide = x_0.expand(4000, 3).contiguous()
    bound = vae.bound(wide, particles=2).value
    se = float(bound.std()) / math.sqrt(len(wide))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        value = -elbo.loss(vae.model, vae.guide, wide) / len(wide)
        assert abs(value - float(bound.mean())) < 8 * se  # own error up to √2 se, and ours


def test_value_of_a_sample_does_not_depend_on_its_batch():
    vae, x_0 = VAE((2, 3), latent_size=4, hidden=(8,)).double(), torch.randn(7, 2, 3).double()
    whole, parts = vae.bound(x_0, 4, seed=3), vae.bound(x_0, 4, seed=3, batch_size=2)
    for name in ("value", "std_error"):
        torch.testing.assert_close(
            getattr(whole, name), getattr(parts, name), rtol=1e-12, atol=1e-12
        )
    assert math.isnan(float(vae.bound(x_0, 1).std_error[0]))


def test_result_says_what_it_is_and_what_it_cost(tmp_path):
    vae, x_0 = linear_gaussian(0.3), torch.randn(5, 3, dtype=torch.float64)
    result = vae.bound(x_0, particles=4, seed=2)
    assert result.kind == "lower bound"
    assert result.estimator == "VAE.bound(particles=4)"
    assert result.dimensions == 3
    assert result.calls.tolist() == [5] * 5  # the encoder once, the decoder for every draw
    assert result.remarks == ""
    assert not result.unbiased_weights
    torch.testing.assert_close(result.indices, torch.arange(5))
    torch.testing.assert_close(result.checksums, sample_checksums(x_0))
    assert result.log_weights is not None
    torch.testing.assert_close(result.value, result.log_weights.mean(1))
    torch.testing.assert_close(result.std_error, result.log_weights.std(1) / 2)
    low, high = result.interval()
    assert bool((low < result.value).all() and (result.value < high).all())
    result.save(tmp_path / "vae.nc")
    torch.testing.assert_close(LogLikelihood.load(tmp_path / "vae.nc").value, result.value)


def test_former_name_of_the_number_of_particles_is_accepted():
    vae, x_0 = linear_gaussian(0.3), torch.randn(2, 3, dtype=torch.float64)
    new, former = vae.bound(x_0, particles=3), vae.bound(x_0, num_particles=3)
    assert torch.equal(new.value, former.value)
    assert new.estimator == former.estimator


def test_error_of_one_particle_is_unknown_and_the_result_says_why():
    vae, x_0 = linear_gaussian(0.3), torch.randn(2, 3, dtype=torch.float64)
    result = vae.bound(x_0, particles=1)
    assert bool(result.std_error.isnan().all())
    assert "one draw" in result.remarks
    assert result.unbiased_weights  # one weight is
    assert bool(vae.bound(x_0, particles=4, importance=True).std_error.isnan().all())


def test_model_is_recognised_by_its_fingerprint():
    x_0 = torch.randn(2, 3)
    one, other = VAE((3,), 2, (8,)), VAE((3,), 2, (8,))
    assert one.bound(x_0).model == one.bound(x_0, seed=1).model != ""
    assert one.bound(x_0).model == copy.deepcopy(one).bound(x_0).model
    assert one.bound(x_0).model != other.bound(x_0).model  # other first weights


def test_importance_weights_tighten_the_bound_to_the_evidence():
    vae, x_0 = linear_gaussian(0.1), torch.randn(6, 3, dtype=torch.float64)
    mean, importance = (vae.bound(x_0, 4000, importance=i) for i in (False, True))
    assert mean.log_weights is not None and importance.log_weights is not None
    assert torch.equal(mean.log_weights, importance.log_weights)
    assert bool((mean.value < importance.value).all())
    # the bias, of order 1/4000 nats, is far below the error; 4.5 standard errors as above
    error = (importance.value - log_evidence(x_0)).abs()
    assert bool((error < 4.5 * importance.std_error).all())
    assert importance.unbiased_weights


def test_results_are_compared_and_averaged_like_those_of_a_chain():
    """The guide of the second loses by its shift alone; both have the density of the first."""
    x_0 = torch.randn(40, 3, dtype=torch.float64)
    exact, shifted = linear_gaussian().bound(x_0, 64), linear_gaussian(0.3).bound(x_0, 64)
    comparison = compare({"exact": exact, "shifted": shifted})
    assert comparison.reference == "exact"
    assert comparison.notes[0].startswith("One training run per model")
    assert not any("which samples" in note for note in comparison.notes)
    assert math.isfinite(comparison["shifted"].monte_carlo)
    elpd = to_elpd(linear_gaussian(0.3).bound(x_0, 64, importance=True))
    assert math.isfinite(float(elpd.elpd if hasattr(elpd, "elpd") else elpd.elpd_loo))
    with pytest.raises(ValueError, match="same samples"):
        compare({"exact": exact, "other": linear_gaussian().bound(x_0.flip(0), 64)})


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
    with pytest.raises(ValueError, match="particles to be an integer >= 1"):
        VAE((3,)).bound(torch.zeros(1, 3), 0)
