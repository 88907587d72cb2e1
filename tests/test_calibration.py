"""The posterior covariance calibrated on other data, and what was clipped of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, PathBound, ReverseChain
from pyrodiff.covariances import Spread
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.kernels import Level
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import variational_term
from pyrodiff.oracles import GaussianMixture
from pyrodiff.schedules import LogSNRSchedule
from pyrodiff.serialization.descriptions import build, describe
from pyrodiff.variances import FixedSmall, PosteriorCovariance

F64 = torch.float64
CALIBRATED = PosteriorCovariance("full", 0, None, (2.0, -2.0), (0.25, 0.75), (0.5, 2.0))
KINDS = {
    "isotropic": PosteriorCovariance("isotropic"),
    "diagonal": PosteriorCovariance("diagonal"),
    "probes": PosteriorCovariance("diagonal", probes=2),
    "low rank": PosteriorCovariance("diagonal", rank=2),
    "full": PosteriorCovariance("full"),
}
every_kind = pytest.mark.parametrize("variance", KINDS.values(), ids=KINDS.keys())


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def correlated(size: int = 4) -> GaussianMixture:
    """A Gaussian whose covariance is far from its diagonal at every λ of the chain below."""
    matrix = 0.1 * torch.eye(size, dtype=F64) + 0.9
    return GaussianMixture(torch.ones(1), torch.zeros(1, size), matrix[None])


class Scaled(nn.Module):
    """The right x̂_0 with a Jacobian that is ``factor`` times too large."""

    def __init__(self, network: nn.Module, factor: float):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        still = x.detach()
        return self.network(still + self.factor * (x - still), time)


def chain(
    variance: PosteriorCovariance | FixedSmall, factor: float = 1.0, num_steps: int = 12
) -> tuple[GaussianMixture, ReverseChain]:
    law = correlated()
    network = Scaled(law.network("data"), factor)
    forward = ForwardChain(LogSNRSchedule(3.0, -3.0), num_steps)
    return law, ReverseChain(DataDenoiser(network), forward, (4,), variance=variance)


def dense(spread: Spread, shape: tuple[int, ...]) -> Tensor:
    diagonal = spread.diagonal.expand(len(spread.diagonal), *shape).flatten(1)
    total = torch.diag_embed(diagonal)
    if spread.directions is not None and spread.values is not None:
        total = total + (spread.directions * spread.values.unsqueeze(1)) @ spread.directions.mT
    return total


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
@every_kind
def test_a_calibrated_spread_is_the_formulas(
    variance: PosteriorCovariance, shape: tuple[int, ...]
) -> None:
    """a (w V + (1 − w) diag V), with w and log a linear in λ, also for one λ per sample."""
    network = ResidualMLP(shape, width=8, blocks=1).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    forward = ForwardChain(LogSNRSchedule(3.0, -3.0), 7)
    bare = ReverseChain(DataDenoiser(network), forward, shape, variance=variance)
    fitted = replace(variance, log_snrs=(2.0, -2.0), weights=(0.25, 0.75), scales=(0.5, 2.0))
    reverse = bare.respaced(7, variance=fitted)
    x = draws(5, *shape)
    for t in (torch.tensor([1, 2, 4, 5, 7]), 3):
        before, after = (r.predict(x, r.step(t, x)) for r in (bare, reverse))
        assert before.spread is not None and after.spread is not None
        whole, result = dense(before.spread, shape), dense(after.spread, shape)
        share = ((2.0 - reverse.step(t, x).log_snr.double().reshape(-1, 1, 1)) / 4).clamp(0, 1)
        w, a = 0.25 + 0.5 * share, 0.5 * 4.0**share
        diagonal = torch.diag_embed(whole.diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(result, a * (w * whole + (1 - w) * diagonal))
        torch.testing.assert_close(before.x0_hat, after.x0_hat)


@every_kind
def test_weight_and_scale_of_one_change_nothing(variance: PosteriorCovariance) -> None:
    law, reverse = chain(variance)
    neutral = replace(variance, log_snrs=(0.0,), weights=(1.0,), scales=(1.0,))
    x_0 = law.sample(5, seed=0)
    values = [
        PathBound(2).estimate(reverse.respaced(12, variance=v), x_0, seed=0).value
        for v in (variance, neutral)
    ]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
def test_the_scale_of_the_jacobian_is_found(kind: str, factor: float) -> None:
    """With the exact x̂_0 of a Gaussian, a = 1/factor and w = 1, up to Monte Carlo.

    log a has at most the standard error of log ‖x_0 − x̂_0‖² over 2000 samples in about one
    dimension, (2/2000)^½ = 0.032; 4 of them, and the search's last move.
    """
    law, reverse = chain(FixedSmall(), factor)
    fitted = PosteriorCovariance(kind).fit(reverse, law.sample(2000, seed=0), knots=5)
    assert fitted.log_snrs == (3.0, 1.5, 0.0, -1.5, -3.0)
    for scale in fitted.scales:
        assert math.log(scale) == pytest.approx(-math.log(factor), abs=0.14)
    if kind == "full":
        assert min(fitted.weights) > 0.9
    else:
        assert fitted.weights == (1.0,) * 5


def mean_bound(reverse: ReverseChain, variance: PosteriorCovariance, x_0: Tensor) -> Tensor:
    """Sums of terms t = 2 … T for one noise per term, by sample."""
    model = reverse.respaced(12, variance=variance)
    with torch.no_grad():
        terms = [variational_term(model, x_0, t, draws(*x_0.shape, seed=t)) for t in range(2, 13)]
    return torch.stack(terms).sum(0)


@every_kind
def test_a_wrong_jacobian_is_put_right_on_other_data(variance: PosteriorCovariance) -> None:
    """Paired on 400 other samples: better by 5 standard errors, whatever the kind."""
    law, reverse = chain(FixedSmall(), factor=3.0)
    fitted = variance.fit(reverse, law.sample(300, seed=0), knots=7)
    x_0 = law.sample(400, seed=1)
    gain = mean_bound(reverse, variance, x_0) - mean_bound(reverse, fitted, x_0)
    assert float(gain.mean()) > 5 * float(gain.std()) / 20


@every_kind
def test_a_good_jacobian_is_not_made_worse(variance: PosteriorCovariance) -> None:
    law, reverse = chain(FixedSmall())
    fitted = variance.fit(reverse, law.sample(300, seed=0), knots=7)
    x_0 = law.sample(400, seed=1)
    gain = mean_bound(reverse, variance, x_0) - mean_bound(reverse, fitted, x_0)
    assert float(gain.mean()) > -5 * float(gain.std()) / 20 - 0.02


def test_a_fit_is_a_function_of_its_arguments_alone() -> None:
    law, reverse = chain(FixedSmall(), factor=3.0)
    x_0 = law.sample(40, seed=0)
    other = reverse.respaced(12, variance=CALIBRATED)  # whose own variance is not used
    first = PosteriorCovariance("full").fit(reverse, x_0, knots=3)
    assert first == PosteriorCovariance("full").fit(other, x_0, knots=3)
    assert first == CALIBRATED.fit(reverse, x_0, knots=3)
    with torch.inference_mode():
        assert first == PosteriorCovariance("full").fit(reverse, x_0.clone(), knots=3)
    batched = PosteriorCovariance("full").fit(reverse, x_0, knots=3, batch_size=7)
    assert batched.scales == pytest.approx(first.scales) and batched.weights == first.weights
    assert first != PosteriorCovariance("full").fit(reverse, x_0, knots=3, seed=1)


def test_calibrations_are_saved_and_loaded(tmp_path: Path) -> None:
    forward = ForwardChain(LogSNRSchedule(3.0, -3.0), 4)
    network = ResidualMLP((3,), width=8, blocks=1)
    reverse = ReverseChain(NoiseDenoiser(network), forward, (3,), variance=CALIBRATED)
    reverse.save(tmp_path / "model")
    back = ReverseChain.load(tmp_path / "model")
    assert back.variance == CALIBRATED and hash(back.variance) == hash(CALIBRATED)
    x_0 = torch.randn(4, 3)
    values = [PathBound(2).estimate(r, x_0, seed=0).value for r in (reverse, back)]
    assert torch.equal(*values)


def test_uncalibrated_covariances_read_as_before() -> None:
    variance = PosteriorCovariance("diagonal", rank=2)
    assert repr(variance) == "PosteriorCovariance(kind='diagonal', rank=2, probes=None)"
    assert repr(CALIBRATED).endswith("probes=None, calibrated at 2 log-SNRs)")


def test_negative_eigenvalues_are_counted() -> None:
    """Of V with the eigenvalues c · (−1, −1, 2, 3) whatever x: half are clipped."""
    basis, _ = torch.linalg.qr(draws(4, 4))
    matrix = (basis * torch.tensor([-1.0, -1.0, 2.0, 3.0])) @ basis.T

    class Linear(nn.Module):
        def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
            return x @ matrix.to(x)

    forward = ForwardChain(LogSNRSchedule(3.0, -3.0), 5)
    reverse = ReverseChain(DataDenoiser(Linear()), forward, (4,))
    log_snrs, shares = PosteriorCovariance("full").clipped(reverse, draws(6, 4), knots=3)
    assert log_snrs.tolist() == [3.0, 0.0, -3.0] and shares.tolist() == [0.5] * 3
    share = float((matrix.diagonal() < 0).double().mean())
    _, shares = PosteriorCovariance("diagonal").clipped(reverse, draws(6, 4), knots=3)
    assert shares.tolist() == [share] * 3
    _, shares = PosteriorCovariance("isotropic").clipped(reverse, draws(6, 4), knots=3)
    assert shares.tolist() == [0.0] * 3  # the trace is positive
    step = reverse.step(3, draws(6, 4))
    assert isinstance(step, Level)
    low = reverse.respaced(5, variance=PosteriorCovariance("diagonal", rank=2))
    spread = low.predict(draws(6, 4), low.step(3, draws(6, 4))).spread
    assert spread is not None and spread.clipped is not None and spread.clipped.shape == (6,)


def test_bad_calibrations_are_refused() -> None:
    for values, message in (
        (((1.0, 2.0), (1.0, 1.0), (1.0, 1.0)), "decrease strictly"),
        (((1.0,), (), (1.0,)), "1 weights and scales, one for each log-SNR; got 0 and 1"),
        (((1.0,), (1.5,), (1.0,)), "weights between 0 and 1"),
        (((1.0,), (0.5,), (0.0,)), "positive finite scales"),
    ):
        with pytest.raises(ValueError, match=message):
            PosteriorCovariance("full", 0, None, *values)
    law, reverse = chain(FixedSmall())
    with pytest.raises(ValueError, match="jumps to be positive"):
        PosteriorCovariance("full").fit(reverse, law.sample(2, seed=0), jumps=(0.0,))


def test_descriptions_without_a_calibration_are_read() -> None:
    """As models saved before there was one have them."""
    described = describe(PosteriorCovariance("diagonal", probes=2))
    for name in ("log_snrs", "weights", "scales"):
        assert described.pop(name) == []
    classes = {"PosteriorCovariance": PosteriorCovariance}
    assert build("variance", classes, described) == PosteriorCovariance("diagonal", probes=2)
