"""Probabilities of discrete data, by enumeration: bins integrated exactly, sums over all values.

Stochastic tests are seeded.  Under fresh seeds a mean within 4 standard errors fails at 6e-5 a
comparison, one no more than 3 beyond its bound at 1.3e-3.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.decoders import (
    CategoricalDecoder,
    Decoder,
    DiscretizedGaussianDecoder,
    GaussianDecoder,
)
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.likelihood import ImportanceBound, LogLikelihood, PathBound, TermwiseBound
from pyrodiff.likelihood.dequantization import Dequantized
from pyrodiff.likelihood.dequantizers import (
    Dequantizer,
    UniformDequantizer,
    VariationalDequantizer,
)
from pyrodiff.networks import ResidualMLP
from pyrodiff.oracles import Gaussian, GridOracle, ProductNetwork, linear_log_prob
from pyrodiff.schedules import LogSNRSchedule

F64 = torch.float64
WIDTH = 0.5  # wide bins, over which the density is far from constant


def affine_chain(size: int) -> ReverseChain:
    """A model whose density is N(m, C), known exactly, and whose weights have a variance."""
    covariance = 0.036 * torch.eye(size, dtype=F64) + 0.054
    network = Gaussian(torch.full((size,), 0.1, dtype=F64), covariance).network()
    forward = ForwardChain(LogSNRSchedule(-1.0, -5.0), 4)
    return ReverseChain(NoiseDenoiser(network), forward, (size,), decoder=GaussianDecoder(0.25))


def perturbed(size: int = 1, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    network = ResidualMLP((size,), width=16, blocks=1, **options).double()
    with torch.no_grad():  # the last layer starts at zero
        for parameter in network.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return network.eval()


def all_values(size: int, width: float, low: float = -1.0, high: float = 1.0) -> Tensor:
    axis = torch.linspace(low, high, round((high - low) / width) + 1, dtype=F64)
    return torch.cartesian_prod(*[axis] * size).reshape(-1, size)


def bin_log_probs(reverse: ReverseChain, v: Tensor, width: float) -> Tensor:
    """log ∫ p over the bin of each v, by 20-point Gauss-Legendre quadrature in each dimension."""
    nodes, weights = (width / 2 * torch.tensor(a) for a in np.polynomial.legendre.leggauss(20))
    size = v.shape[1]
    offsets = torch.cartesian_prod(*[nodes] * size).reshape(-1, size)
    log_weights = torch.cartesian_prod(*[weights] * size).reshape(-1, size).log().sum(1)
    points = (v.unsqueeze(1) + offsets).reshape(-1, size)
    return (linear_log_prob(reverse, points).reshape(len(v), -1) + log_weights).logsumexp(1)


def fitted(size: int) -> VariationalDequantizer:
    torch.manual_seed(0)
    reverse, v = affine_chain(size), all_values(size, WIDTH)
    places = bin_log_probs(reverse, v, WIDTH).exp().multinomial(4000, replacement=True)
    return VariationalDequantizer((size,), WIDTH).double().fit(reverse, v[places], 300)


@pytest.fixture(scope="module", params=[1, 2])
def variational(request: pytest.FixtureRequest) -> VariationalDequantizer:
    return fitted(request.param)


def skewed(size: int = 2) -> VariationalDequantizer:
    """A dequantizer with a random network."""
    torch.manual_seed(1)
    made = VariationalDequantizer((size,), WIDTH, width=8).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


# -- the dequantizers ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: UniformDequantizer(WIDTH), skewed])
def test_density_is_that_of_the_draw(make: object) -> None:
    """log q(x|v) = log N(ε; 0, I) − log |∂x/∂ε|, the Jacobian by autograd."""
    dequantizer: Dequantizer = make()
    v, noise = all_values(2, WIDTH)[:7], torch.randn(7, 2, dtype=F64)
    x, log_density = dequantizer.draw(v, noise)
    assert bool(((x - v).abs() < WIDTH / 2).all()) and log_density.shape == (7,)
    for i in range(7):
        jacobian = torch.autograd.functional.jacobian(
            lambda e, i=i: dequantizer.draw(v[i : i + 1], e[None]).x[0], noise[i]
        )
        normal = -0.5 * (noise[i].square() + math.log(2 * math.pi)).sum()
        torch.testing.assert_close(
            log_density[i], normal - jacobian.det().abs().log(), rtol=1e-9, atol=1e-9
        )


def test_untrained_variational_is_uniform() -> None:
    v, noise = all_values(2, WIDTH), torch.randn(25, 2, dtype=F64)
    result = VariationalDequantizer((2,), WIDTH).double().draw(v, noise)
    expected = UniformDequantizer(WIDTH).draw(v, noise)
    torch.testing.assert_close(result.x, expected.x, rtol=1e-12, atol=1e-12)
    assert torch.equal(result.log_density, expected.log_density)


def test_far_tails_of_the_noise_stay_in_the_bin() -> None:
    noise = torch.tensor([[-9.0], [9.0], [0.0]])
    for dequantizer in (UniformDequantizer(WIDTH), skewed(1).float()):
        x, log_density = dequantizer.draw(torch.zeros(3, 1), noise)
        assert bool((x.abs() <= WIDTH / 2).all()) and bool(log_density.isfinite().all())


def test_events_keep_their_axes() -> None:
    dequantizer = VariationalDequantizer((3, 2, 2), 0.1)
    x, log_density = dequantizer.draw(torch.zeros(5, 3, 2, 2), torch.randn(5, 3, 2, 2))
    assert x.shape == (5, 3, 2, 2) and x.dtype == torch.float32
    assert log_density.shape == (5,) and log_density.dtype == F64
    assert repr(dequantizer) == "VariationalDequantizer((3, 2, 2), bin_width=0.1)"


def test_fit_trains_the_dequantizer_alone() -> None:
    reverse = ReverseChain(
        DataDenoiser(perturbed(2, context_size=3, dropout=0.5).train()),
        ForwardChain(LogSNRSchedule(3.0, -4.0), 5),
        (2,),
    ).train()
    before = {name: value.clone() for name, value in reverse.state_dict().items()}
    v, context = all_values(2, WIDTH), torch.randn(25, 3, dtype=F64)
    result, reported = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        made = VariationalDequantizer((2,), WIDTH).double()
        made.fit(
            reverse, v, 3, seed=seed, context=context, progress=lambda n, loss: reported.append(n)
        )
        assert reverse.training
        result.append(torch.cat([p.detach().flatten() for p in made.parameters()]))
        assert all(p.grad is None for p in (*reverse.parameters(), *made.parameters()))
    assert reported == 3 * [1, 2, 3]
    assert torch.equal(result[0], result[1]) and not torch.equal(result[0], result[2])
    assert all(torch.equal(value, before[name]) for name, value in reverse.state_dict().items())


# -- laws, by enumeration ------------------------------------------------------------------------


def test_bin_probabilities_are_differences_of_the_normal_cdf() -> None:
    reverse, v = affine_chain(1), all_values(1, WIDTH)
    ends = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)
    low, middle, high = linear_log_prob(reverse, ends).tolist()
    variance = -1 / (low + high - 2 * middle)
    mean, scale = variance * (high - low) / 2, math.sqrt(variance)
    upper, lower = (torch.special.ndtr((v + s * WIDTH / 2 - mean) / scale) for s in (1, -1))
    exact = bin_log_probs(reverse, v, WIDTH).exp()
    torch.testing.assert_close(exact, (upper - lower).squeeze(1), rtol=1e-9, atol=1e-12)


def repeats(result: LogLikelihood, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values less the exact ones, (V, copies); the sum of exp over values, and its error."""
    value = result.value.reshape(len(exact), -1)
    total = value.exp().mean(1).sum()
    return value - exact.unsqueeze(1), total, (value.exp().var(1) / value.shape[1]).sum().sqrt()


def test_bounds_are_ordered_and_sum_to_no_more_than_one(
    variational: VariationalDequantizer,
) -> None:
    """uniform < variational < importance-weighted ≤ exact, the mean over v ~ P."""
    size = variational.event_shape.numel()
    reverse, v = affine_chain(size), all_values(size, WIDTH)
    exact = bin_log_probs(reverse, v, WIDTH)
    weight = exact.softmax(0)
    assert 0.9999 < float(exact.exp().sum()) < 1
    means, errors, copies = [0.0], [0.0], 500 // size**2
    for estimator in (
        Dequantized(PathBound(1), variational, 8, importance=True),
        Dequantized(PathBound(1), variational, 4),
        Dequantized(PathBound(1), UniformDequantizer(WIDTH), 4),
    ):
        x_0 = v.repeat_interleave(copies, 0)
        result = estimator.estimate(reverse, x_0, batch_size=10000)
        gaps, total, error = repeats(result, exact)
        assert float(total) < float(exact.exp().sum()) + 3 * float(error)
        means.append(float(weight @ gaps.mean(1)))
        errors.append(float((weight.square() @ gaps.var(1) / copies).sqrt()))
    assert means[1] < 3 * errors[1]
    assert means[2] < means[1] - 4 * math.hypot(errors[1], errors[2])
    assert means[3] < means[2] - 4 * math.hypot(errors[2], errors[3])


@pytest.mark.parametrize("inner", [PathBound(1), ImportanceBound(3)], ids=repr)
@pytest.mark.parametrize("make", [lambda: UniformDequantizer(WIDTH), lambda: skewed(1)])
def test_importance_weights_are_unbiased_for_every_value(
    inner: PathBound | ImportanceBound, make: object
) -> None:
    reverse, v, copies = affine_chain(1), all_values(1, WIDTH), 500
    exact = bin_log_probs(reverse, v, WIDTH)
    estimator = Dequantized(inner, make(), 2, importance=True)
    result = estimator.estimate(reverse, v.repeat_interleave(copies, 0), batch_size=20000)
    ratio = repeats(result, exact)[0].exp()
    error = ratio.std(1) / math.sqrt(copies)
    assert bool(((ratio.mean(1) - 1).abs() < 4 * error).all())


def test_importance_weights_sum_to_one_in_two_dimensions() -> None:
    reverse, v = affine_chain(2), all_values(2, WIDTH)
    exact = bin_log_probs(reverse, v, WIDTH)
    estimator = Dequantized(PathBound(1), UniformDequantizer(WIDTH), 4, importance=True)
    result = estimator.estimate(reverse, v.repeat_interleave(200, 0), batch_size=10000)
    _, total, error = repeats(result, exact)
    assert abs(float(total - exact.exp().sum())) < 4 * float(error) < 0.1


def test_mass_beyond_the_end_bins_belongs_to_no_value() -> None:
    """Closed bins: over a grid that ends within the density, Σ P is the mass within."""
    reverse, v = affine_chain(1), all_values(1, 0.25, -0.25, 0.25)
    estimator = Dequantized(PathBound(1), UniformDequantizer(0.25), 4, importance=True)
    result = estimator.estimate(reverse, v.repeat_interleave(600, 0), batch_size=10000)
    exact = bin_log_probs(reverse, v, 0.25)
    _, total, error = repeats(result, exact)
    assert abs(float(total - exact.exp().sum())) < 4 * float(error)
    assert float(total) < 0.9


DISCRETE = {
    "discretized": DiscretizedGaussianDecoder(0.25),
    "categorical": CategoricalDecoder(9),
}


@pytest.mark.parametrize("decoder", DISCRETE.values(), ids=DISCRETE)
def test_discrete_decoders_sum_to_one(decoder: Decoder) -> None:
    forward = ForwardChain(LogSNRSchedule(0.0, -3.0), 5)
    first, second = perturbed(1, 0), perturbed(1, 1)
    one = ReverseChain(DataDenoiser(first), forward, (1,), decoder=decoder)
    grid = GridOracle(one, -10, 10, 801).log_prob(all_values(1, 0.25))
    assert float(grid.exp().sum()) == pytest.approx(1, abs=1e-9)
    network = ProductNetwork([first, second])
    two = ReverseChain(DataDenoiser(network), forward, (2,), decoder=decoder)
    for reverse, copies in ((one, 300), (two, 30)):
        v = all_values(reverse.event_shape.numel(), 0.25)
        result = ImportanceBound(4).estimate(
            reverse, v.repeat_interleave(copies, 0), batch_size=36000
        )
        total, error = repeats(result, torch.zeros(len(v), dtype=F64))[1:]
        assert abs(float(total) - 1) < 4 * float(error) < 0.1


# -- the result ----------------------------------------------------------------------------------


def test_value_is_made_of_its_draws() -> None:
    """By hand, with an inner estimate that is exact: log p(x) − log q(x|v)."""
    reverse, v = affine_chain(2), all_values(2, WIDTH)
    plain = Dequantized(PathBound(3), skewed(), 5).estimate(reverse, v, seed=7)
    weighted = Dequantized(ImportanceBound(3), skewed(), 5, importance=True).estimate(
        reverse, v, seed=7
    )
    log_w = weighted.log_weights
    assert log_w is not None and log_w.shape == (25, 5) and plain.log_weights is None
    torch.testing.assert_close(weighted.value, log_w.logsumexp(1) - math.log(5))
    again = Dequantized(ImportanceBound(3), skewed(), 5).estimate(reverse, v, seed=7)
    torch.testing.assert_close(again.value, log_w.mean(1))
    torch.testing.assert_close(again.std_error, log_w.std(1) / math.sqrt(5))
    assert bool((again.value < weighted.value).all())
    assert again.network_evaluations == weighted.network_evaluations == 5 * 3 * 4
    assert plain.kind == weighted.kind == again.kind == "lower bound"
    assert plain.degrees_of_freedom is not None and bool((plain.degrees_of_freedom <= 4).all())
    assert bool(weighted.std_error.isnan().all())  # of 5 weights
    assert plain.dimensions == 2 and "bin_width=0.5" in plain.estimator


def test_width_of_the_bins_is_counted_once() -> None:
    """Where the density is all but constant over a bin, log P = log p + d log h."""
    reverse, v = affine_chain(2), torch.zeros(2000, 2, dtype=F64)
    width = 1e-3
    result = Dequantized(PathBound(1), UniformDequantizer(width), 2).estimate(
        reverse, v, batch_size=2000
    )
    inner = PathBound(2).estimate(reverse, v, batch_size=4000)
    error = math.hypot(float(result.value.std()), float(inner.value.std())) / math.sqrt(2000)
    difference = float(result.value.mean() - inner.value.mean())
    assert abs(difference - 2 * math.log(width)) < 4 * error < 0.1


def test_std_error_is_the_spread_over_repeats() -> None:
    """An unbiased variance of the mean, noise of the draws and of the inner estimate together."""
    v = torch.full((1000, 1), 0.5, dtype=F64)
    estimator = Dequantized(PathBound(1), UniformDequantizer(WIDTH), 4)
    result = estimator.estimate(affine_chain(1), v, batch_size=3000)
    centred = (result.value - result.value.mean()).square()
    difference = centred - result.std_error.square()
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(len(v))
    one = Dequantized(PathBound(4), UniformDequantizer(WIDTH), 1).estimate(affine_chain(1), v[:3])
    assert bool(one.std_error.isnan().all()) and bool(one.interval()[0].isnan().all())


def test_upper_bounds_and_estimates_give_no_bound() -> None:
    estimator = Dequantized(ImportanceBound(4, jackknife=True), UniformDequantizer(WIDTH))
    assert estimator.estimate(affine_chain(1), all_values(1, WIDTH)).kind == "estimate"
    assert estimator._kind("upper bound") == "estimate"


# -- what a value depends on ---------------------------------------------------------------------


@pytest.mark.parametrize("importance", [False, True])
def test_values_do_not_depend_on_batches(importance: bool) -> None:
    network = perturbed(2, context_size=3)
    reverse = ReverseChain(DataDenoiser(network), ForwardChain(LogSNRSchedule(0.0, -3.0), 5), (2,))
    v, context = all_values(2, WIDTH)[:12], torch.randn(12, 3, dtype=F64)
    estimator = Dequantized(ImportanceBound(2), skewed(), 9, importance)
    whole = estimator.estimate(reverse, v, seed=3, context=context)
    for size in (1, 7, 64):
        parts = estimator.estimate(reverse, v, seed=3, context=context, batch_size=size)
        torch.testing.assert_close(parts.value, whole.value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(parts.std_error, whole.std_error, rtol=1e-8, atol=1e-10)
    some = [11, 2, 9]
    split = estimator.estimate(reverse, v[some], seed=3, context=context[some], indices=some)
    torch.testing.assert_close(split.value, whole.value[some], rtol=1e-10, atol=1e-10)
    other = estimator.estimate(reverse, v, seed=4, context=context)
    assert not bool((other.value == whole.value).any())
    moved = estimator.estimate(reverse, v, seed=3, context=context.roll(1, 0))
    assert float((moved.value - whole.value).abs().min()) > 1e-6


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner", [PathBound(2), TermwiseBound(), ImportanceBound(4, jackknife=True)], ids=repr
)
def test_importance_weights_need_an_unbiased_estimate(inner: PathBound) -> None:
    with pytest.raises(ValueError, match="Expected an estimator whose exponential is unbiased"):
        Dequantized(inner, UniformDequantizer(WIDTH), importance=True)


def test_dequantization_refuses() -> None:
    for width in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="Expected bin_width to be positive and finite; got"):
            UniformDequantizer(width)
        with pytest.raises(ValueError, match="Expected bin_width to be positive and finite; got"):
            VariationalDequantizer((1,), width)
    with pytest.raises(ValueError, match="Expected draws to be an integer >= 1; got 0"):
        Dequantized(PathBound(), UniformDequantizer(WIDTH), 0)
    forward = ForwardChain(LogSNRSchedule(0.0, -3.0), 5)
    reverse = ReverseChain(DataDenoiser(perturbed()), forward, (1,), decoder=CategoricalDecoder(5))
    v = all_values(1, WIDTH)
    with pytest.raises(ValueError, match="Expected a decoder with a density, whose bins"):
        Dequantized(PathBound(), UniformDequantizer(WIDTH)).estimate(reverse, v)
    with pytest.raises(ValueError, match="Expected a decoder with a density, whose bins"):
        VariationalDequantizer((1,), WIDTH).double().fit(reverse, v, 1)
    wrong = VariationalDequantizer((1,), WIDTH, nn.Identity())
    with pytest.raises(ValueError, match=r"Expected network output of shape \(5, 2\)"):
        wrong.draw(v, v)
