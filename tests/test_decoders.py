"""Decoders: exact masses and tails, sums to one, sampling from noise, checks on data."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from pyrodiff import ForwardChain
from pyrodiff.decoders import CategoricalDecoder, DiscretizedGaussianDecoder, GaussianDecoder
from pyrodiff.distributions import DiscretizedNormal, GridCategorical
from pyrodiff.kernels import Step
from pyrodiff.schedules import LogSNRSchedule

F64 = torch.float64
FORWARD = ForwardChain(LogSNRSchedule(6.0, -5.0), 8)
LOW, HIGH, WIDTH = -1.0, 1.0, 0.125
GRID = torch.linspace(LOW, HIGH, 17, dtype=F64)
mpmath.mp.dps = 60


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def discretized(loc: float | Tensor, scale: float | Tensor) -> DiscretizedNormal:
    loc, scale = torch.as_tensor(loc, dtype=F64), torch.as_tensor(scale, dtype=F64)
    return DiscretizedNormal(loc, scale, WIDTH, LOW, HIGH)


def exact_log_mass(value: float, loc: float, scale: float) -> float:
    """log of the normal mass in the bin around ``value``, to sixty digits."""
    loc_, scale_ = mpmath.mpf(loc), mpmath.mpf(scale)
    upper = (value + mpmath.mpf(WIDTH) / 2 - loc_) / scale_
    lower = (value - mpmath.mpf(WIDTH) / 2 - loc_) / scale_
    upper = mpmath.inf if value == HIGH else upper
    lower = -mpmath.inf if value == LOW else lower
    if lower + upper > 0:
        lower, upper = -upper, -lower

    def cdf(z: mpmath.mpf) -> mpmath.mpf:
        return mpmath.erfc(-z / mpmath.sqrt(2)) / 2

    return float(mpmath.log(cdf(upper) - (0 if mpmath.isinf(lower) else cdf(lower))))


# -- Gaussian ------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, 0.3])
def test_gaussian_decoder_is_the_density(own: float | None) -> None:
    x_0, x0_hat, log_variance = draws(4, 3), draws(4, 3, seed=1), draws(4, 1, seed=2)
    law = GaussianDecoder(own).distribution(x0_hat, x0_hat, log_variance, FORWARD.step(1, x_0, 1))
    scale = (0.5 * log_variance).exp() if own is None else torch.tensor(own, dtype=F64)
    expected = -0.5 * ((x_0 - x0_hat) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(law.log_prob(x_0), expected, rtol=1e-12, atol=1e-12)
    noise = draws(4, 3, seed=3)
    torch.testing.assert_close(law.from_noise(noise), x0_hat + scale * noise)


# -- discretized Gaussian ------------------------------------------------------------------------


@pytest.mark.parametrize("loc", [0.0, 0.0625, -0.99, 1.0, 3.0, -50.0])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.02, 0.1, 1.0, 1e3, 1e6])
def test_bin_masses_sum_to_one(loc: float, scale: float) -> None:
    log_mass = discretized(loc, scale).log_prob(GRID)
    assert bool(log_mass.isfinite().all()) and bool((log_mass <= 0).all())
    assert float(log_mass.logsumexp(0)) == pytest.approx(0.0, abs=1e-11)


@pytest.mark.parametrize("sigmas", [0.0, 0.7, 5.0, 8.0, 12.0, 20.0, 30.0])
@pytest.mark.parametrize("value", [LOW, -0.5, 0.25, HIGH])
@pytest.mark.parametrize("side", [-1, 1])
def test_masses_in_the_tails(sigmas: float, value: float, side: int) -> None:
    """The tanh approximation is 1.4 nats off at 5σ, and clamps are wrong from 8σ on."""
    scale = 0.05
    loc = value + side * sigmas * scale
    actual = float(discretized(loc, scale).log_prob(torch.tensor(value, dtype=F64)))
    assert actual == pytest.approx(exact_log_mass(value, loc, scale), rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("scale", [1e-4, 10.0, 1e4])
def test_masses_of_narrow_and_wide_normals(scale: float) -> None:
    for value in (LOW, 0.25, HIGH):
        actual = float(discretized(0.31, scale).log_prob(torch.tensor(value, dtype=F64)))
        # a wide normal's bin is a small difference of CDFs: WIDTH/scale of relative size
        expected = exact_log_mass(value, 0.31, scale)
        assert actual == pytest.approx(expected, rel=1e-10, abs=1e-11)


@pytest.mark.parametrize("sigmas", [0.3, 5.0, 8.0, 30.0, 300.0])
@pytest.mark.parametrize("value", [LOW, 0.25, HIGH])
def test_gradients_in_the_tails_are_those_of_the_exact_mass(sigmas: float, value: float) -> None:
    """Where a clamp has none: a far mean must be pulled to the data."""
    scale, at = 0.05, 0.1 + sigmas * 0.05
    loc = torch.tensor(at, dtype=F64, requires_grad=True)
    log_scale = torch.tensor(math.log(scale), dtype=F64, requires_grad=True)
    law = DiscretizedNormal(loc, log_scale.exp(), WIDTH, LOW, HIGH)
    law.log_prob(torch.tensor(value, dtype=F64)).backward()
    assert loc.grad is not None and log_scale.grad is not None
    h = mpmath.mpf(10) ** -20

    def tail(edge: float, shift: mpmath.mpf) -> mpmath.mpf:
        z = (mpmath.mpf(edge) - at - shift) / mpmath.exp(mpmath.mpf(math.log(scale)))
        return mpmath.erfc(-z / mpmath.sqrt(2)) / 2

    def log_mass(shift: mpmath.mpf) -> mpmath.mpf:
        upper = mpmath.mpf(1) if value == HIGH else tail(value + WIDTH / 2, shift)
        return mpmath.log(upper - (0 if value == LOW else tail(value - WIDTH / 2, shift)))

    with mpmath.workdps(100):
        slope = float((log_mass(h) - log_mass(-h)) / (2 * h))
    # a saturated open bin has nothing left to gain: the gradient is zero, and not NaN
    assert float(loc.grad) == pytest.approx(slope, rel=1e-5, abs=1e-13)
    assert (abs(slope) > 0.1) == (value != HIGH or sigmas < 30)
    assert math.isfinite(float(log_scale.grad))


@pytest.mark.parametrize("scale", [1e-3, 0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_values_and_gradients_are_finite_for_every_mean(scale: float, dtype: torch.dtype) -> None:
    """Also where an open bin holds all the mass: means at and beyond the edge, small scales."""
    loc = torch.linspace(-2.5, 2.5, 41, dtype=dtype)[:, None].requires_grad_()
    spread = torch.tensor(scale, dtype=dtype, requires_grad=True)
    log_mass = DiscretizedNormal(loc, spread, WIDTH, LOW, HIGH).log_prob(
        GRID.to(dtype).expand(41, 17)
    )
    log_mass.sum().backward()
    assert bool(log_mass.isfinite().all())
    assert loc.grad is not None and bool(loc.grad.isfinite().all())
    assert spread.grad is not None and bool(spread.grad.isfinite())


def test_end_bins_are_open() -> None:
    law = discretized(torch.tensor([-5.0, 5.0]), 0.1)
    torch.testing.assert_close(
        law.log_prob(torch.tensor([LOW, HIGH], dtype=F64)), torch.zeros(2, dtype=F64)
    )


def test_scale_and_width_come_from_the_decoder_or_the_chain() -> None:
    x, step = draws(3, 2), FORWARD.step(1, draws(1, 2), 1)
    log_variance = torch.tensor(math.log(0.04), dtype=F64)
    law = DiscretizedGaussianDecoder(WIDTH).distribution(x, x, log_variance, step)
    own = DiscretizedGaussianDecoder(WIDTH, scale=0.2).distribution(x, x, log_variance * 9, step)
    value = GRID[torch.tensor([3, 7])].expand(3, 2)
    torch.testing.assert_close(law.log_prob(value), own.log_prob(value), rtol=1e-12, atol=0.0)
    wide = DiscretizedGaussianDecoder(2 * WIDTH, scale=0.2).distribution(x, x, log_variance, step)
    assert bool((wide.log_prob(value) > own.log_prob(value)).all())


# -- categorical ---------------------------------------------------------------------------------


def categorical(x_1: Tensor, levels: int = 5) -> GridCategorical:
    step = FORWARD.step(1, x_1, x_1.dim() - 1)
    nothing = torch.full_like(x_1, math.nan)  # it reads x_1 alone
    return CategoricalDecoder(levels).distribution(x_1, nothing, nothing, step)


def test_categorical_is_the_posterior_under_a_flat_prior() -> None:
    """By brute force: N(x_1; α_1 v, σ_1²) for each level v, normalised by their sum."""
    x_1 = draws(4, 3)
    alpha = math.sqrt(1 / (1 + math.exp(-6.0)))
    sigma = math.sqrt(1 / (1 + math.exp(6.0)))
    values = [-1.0, -0.5, 0.0, 0.5, 1.0]
    law = categorical(x_1)
    for i in range(4):
        for j in range(3):
            density = [
                mpmath.exp(-((mpmath.mpf(float(x_1[i, j])) - alpha * v) ** 2) / (2 * sigma**2))
                for v in values
            ]
            for v, p in zip(values, density, strict=True):
                x_0 = torch.full((4, 3), v, dtype=F64)
                expected = float(mpmath.log(p / mpmath.fsum(density)))
                assert float(law.log_prob(x_0)[i, j]) == pytest.approx(
                    expected, rel=1e-9, abs=1e-12
                )


@pytest.mark.parametrize("far", [1.0, 100.0])
def test_categorical_probabilities_sum_to_one(far: float) -> None:
    law = categorical(far * draws(6, 3), levels=17)
    total = torch.stack([law.log_prob(v.expand(6, 3)) for v in GRID]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(6, 3, dtype=F64), rtol=0.0, atol=1e-12)


def test_categorical_with_one_time_per_sample_and_particles() -> None:
    x_1 = draws(7, 4, 3)  # particles on the left share the coefficients
    step = FORWARD.step(torch.ones(4, dtype=torch.long), x_1[0], 1)
    law = CategoricalDecoder(5).distribution(x_1, x_1, x_1, step)
    x_0 = torch.tensor([-1.0, 0.0, 0.5], dtype=F64).expand(4, 3)
    assert law.log_prob(x_0).shape == (7, 4, 3)
    torch.testing.assert_close(law.log_prob(x_0)[2], categorical(x_1[2]).log_prob(x_0))


# -- sampling ------------------------------------------------------------------------------------

LAWS: dict[str, Callable[[], DiscretizedNormal | GridCategorical]] = {
    "discretized": lambda: discretized(0.23, 0.17),
    "discretized-edge": lambda: discretized(0.95, 0.4),
    "categorical": lambda: GridCategorical(draws(17), LOW, HIGH),
}
every_law = pytest.mark.parametrize("build", LAWS.values(), ids=LAWS.keys())


def counts(values: Tensor) -> Tensor:
    """How often each grid value occurs; every value must be one."""
    hits = (values.flatten().unsqueeze(-1) - GRID).abs() < 1e-9
    assert bool(hits.any(-1).all())
    return hits.sum(0)


@every_law
def test_noise_is_turned_into_levels_with_their_probabilities(
    build: Callable[[], DiscretizedNormal | GridCategorical],
) -> None:
    """At the noise's quantiles (i + ½)/n each level, an interval of them, occurs n p ± 1 times."""
    law, n = build(), 100_000
    noise = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)
    found = counts(law.expand(torch.Size((n,))).from_noise(noise)).double()
    expected = n * law.log_prob(GRID).exp()
    assert int((expected > 100).sum()) >= 5
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1.001)


@every_law
def test_samples_follow_log_prob(build: Callable[[], DiscretizedNormal | GridCategorical]) -> None:
    """Pearson's statistic, levels with n p < 10 pooled, below χ²'s 1e-5 quantile; fixed seed."""
    torch.manual_seed(0)
    law, n = build(), 50_000
    found = counts(law.sample(torch.Size((n,)))).double()
    expected = n * law.log_prob(GRID).exp()
    rare = expected < 10
    found = torch.cat([found[~rare], found[rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    if float(expected[-1]) < 10:  # too few for the approximation even together
        found, expected = found[:-1], expected[:-1]
    statistic = float(((found - expected) ** 2 / expected).sum())
    quantile = float(mpmath.gammainc((len(found) - 1) / 2, statistic / 2, regularized=True))
    assert quantile > 1e-5


# -- checks --------------------------------------------------------------------------------------


def test_discretized_decoder_checks_the_range() -> None:
    decoder = DiscretizedGaussianDecoder(WIDTH)
    decoder.check(GRID)
    decoder.check(torch.tensor([0.01234]))  # dequantised or off-centre data has a bin, too
    for value in (1.1, -1.01):
        with pytest.raises(ValueError, match=r"within \[-1, 1\].*got values from"):
            decoder.check(torch.tensor([0.0, value]))


def test_categorical_decoder_checks_the_grid() -> None:
    decoder = CategoricalDecoder(5)
    decoder.check(torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]))
    for value in (0.25, 1.5, -2.0):
        with pytest.raises(
            ValueError, match=f"5 levels from -1 to 1; got 1 values.*first {value:g}"
        ):
            decoder.check(torch.tensor([[0.0, value]]))


def test_bad_decoders_are_refused() -> None:
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale to be positive and finite"):
            GaussianDecoder(scale)
        with pytest.raises(ValueError, match="scale to be positive and finite"):
            DiscretizedGaussianDecoder(WIDTH, scale=scale)
    for width in (0.3, 0.0, -0.125, math.nan, 2 / 254.5):
        with pytest.raises(ValueError, match="bin_width to divide"):
            DiscretizedGaussianDecoder(width)
    for width in (2 / 255, 2 / 256):  # both conventions, each stated
        DiscretizedGaussianDecoder(width)
    with pytest.raises(ValueError, match="low < high"):
        DiscretizedGaussianDecoder(WIDTH, low=1.0, high=-1.0)
    with pytest.raises(ValueError, match="low < high"):
        CategoricalDecoder(4, low=0.0, high=0.0)
    for levels in (1, 0, -3):
        with pytest.raises(ValueError, match="levels to be an integer >= 2"):
            CategoricalDecoder(levels)


# -- what is known without a network -------------------------------------------------------------


def one_step(log_snr: float, x: Tensor) -> Step:
    return ForwardChain(LogSNRSchedule(log_snr, -8.0), 2).step(1, x, x.dim() - 1)


def quadrature(decoder: CategoricalDecoder, value: float, step: Step) -> float:
    """E log p(v | x_1) from the decoder's own law, by a rule ten times finer over ±12 σ."""
    noise = torch.linspace(-12.0, 12.0, 4801, dtype=F64)
    weight = torch.exp(-0.5 * noise.square()) * (noise[1] - noise[0]) / math.sqrt(2 * math.pi)
    x_1 = step.alpha * value + step.sigma * noise
    law = decoder.distribution(x_1, x_1, x_1, step)
    return float(weight @ law.log_prob(torch.full_like(x_1, value)))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("log_snr", [-6.0, 0.0, 5.0, 9.0, 13.0])
def test_expected_log_prob_is_the_integral(levels: int, log_snr: float) -> None:
    decoder = CategoricalDecoder(levels, low=-0.5, high=1.0)
    which = torch.tensor([0, 1, levels // 2, levels - 1])
    x_0 = decoder.values[which].reshape(1, 2, 2)
    step = one_step(log_snr, x_0)
    found = decoder.expected_log_prob(x_0, step)
    assert found.shape == x_0.shape and found.dtype == F64
    for value, one in zip(x_0.flatten().tolist(), found.flatten().tolist(), strict=True):
        assert one == pytest.approx(quadrature(decoder, value, step), rel=1e-11, abs=1e-13)


@pytest.mark.parametrize(
    ("levels", "log_snr"), [(2, -3.0), (2, 0.5), (17, -3.0), (17, 5.0), (256, -3.0), (256, 9.0)]
)
def test_expected_log_prob_is_the_mean_over_noise(levels: int, log_snr: float) -> None:
    """Within 4 standard errors (6e-5 a comparison under fresh seeds), where errors are not rare."""
    decoder = CategoricalDecoder(levels)
    x_0 = decoder.values[torch.tensor([0, levels // 2])].reshape(1, 2)
    step = one_step(log_snr, x_0)
    x_1 = step.alpha * x_0 + step.sigma * draws(4000, 2)
    terms = decoder.distribution(x_1, x_1, x_1, step).log_prob(x_0.expand(4000, 2))
    error = terms.std(0) / math.sqrt(4000)
    found = decoder.expected_log_prob(x_0, step)[0]
    assert bool(((terms.mean(0) - found).abs() <= 4 * error + 1e-12).all())


def test_expected_log_prob_at_the_ends_of_the_noise() -> None:
    """Pure noise knows nothing: log 1/levels; without noise every level is certain."""
    decoder = CategoricalDecoder(17)
    noisy = decoder.expected_log_prob(GRID[None], one_step(-7.9, GRID[None]))
    torch.testing.assert_close(
        noisy, torch.full((1, 17), -math.log(17), dtype=F64), rtol=0, atol=1e-3
    )
    clean = decoder.expected_log_prob(GRID[None], one_step(20.0, GRID[None]))
    assert float(clean.abs().max()) < 1e-14
    torch.testing.assert_close(noisy, noisy.flip(1), rtol=0, atol=1e-12)  # as the grid is even


def test_expected_log_prob_of_single_precision_data() -> None:
    decoder, step = CategoricalDecoder(17), one_step(5.0, GRID[None])
    exact = decoder.expected_log_prob(GRID[None], step)
    x_0 = GRID[None].float()
    found = decoder.expected_log_prob(x_0, one_step(5.0, x_0))
    assert found.dtype == F64
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


def test_decoders_that_read_the_network_know_nothing_before() -> None:
    x_0 = GRID[None]
    for decoder in (GaussianDecoder(), DiscretizedGaussianDecoder(WIDTH)):
        assert decoder.expected_log_prob(x_0, one_step(5.0, x_0)) is None
