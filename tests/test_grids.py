"""Respaced chains: the same network on other levels, and the choice of these levels."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.decoders import GaussianDecoder
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.grids import GRIDS, Grid, OptimalGrid
from pyrodiff.likelihood import PathBound
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import VariationalBound
from pyrodiff.oracles import GaussianMixture
from pyrodiff.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule, TabulatedSchedule
from pyrodiff.timesteps import AllTimesteps
from pyrodiff.variances import (
    AnalyticVariance,
    FixedLarge,
    FixedSmall,
    PosteriorCovariance,
    Variance,
)

F64 = torch.float64


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mixture(size: int = 2) -> GaussianMixture:
    return GaussianMixture(torch.ones(5) / 5, draws(5, size, seed=3), 0.3)


def exact_chain(law: GaussianMixture, num_steps: int, variance: Variance) -> ReverseChain:
    forward = ForwardChain(LogSNRSchedule(7.0, -6.0), num_steps)
    return ReverseChain(NoiseDenoiser(law.network()), forward, (2,), variance=variance)


class Recorder(nn.Module):
    """Keeps the times that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.times.append(float(time[0]))
        return 0.1 * x


# -- respacing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(), LogSNRSchedule(8, -6)])
@pytest.mark.parametrize("grid", GRIDS)
def test_respaced_chains_keep_network_and_ends(grid: str, schedule: LinearSchedule) -> None:
    network = Recorder()
    long = ReverseChain(NoiseDenoiser(network, time="timestep"), ForwardChain(schedule, 200), (3,))
    short = long.respaced(7, grid=grid, variance=FixedSmall())
    assert short.denoiser is long.denoiser and isinstance(short.variance, FixedSmall)
    log_snrs = short.log_snrs
    assert log_snrs[0] == long.log_snrs[0] and log_snrs[-1] == long.log_snrs[-1]
    assert bool((log_snrs.diff() < 0).all()) and len(log_snrs) == 7
    short.sample(1, seed=0)
    # the network hears the long chain's time, from T − 1 down to 0
    assert network.times[0] == 199 and network.times[-1] == 0
    u = torch.linspace(0, 1, 7, dtype=F64)
    expected = {"uniform": 199 * u, "quadratic": 199 * u.square()}
    if grid in expected:
        assert network.times[::-1] == pytest.approx(expected[grid].tolist(), abs=1e-3)
    else:
        torch.testing.assert_close(log_snrs.diff(), log_snrs.diff()[:1].expand(6))


def test_all_steps_of_a_chain_are_the_chain() -> None:
    law = mixture()
    long, x_0 = exact_chain(law, 12, FixedLarge()), law.sample(5, seed=1)
    again = long.respaced(12, grid="uniform")
    torch.testing.assert_close(again.log_snrs, long.log_snrs, rtol=1e-12, atol=1e-12)
    for name in ("value", "std_error"):
        torch.testing.assert_close(
            getattr(PathBound(8).estimate(again, x_0, seed=2), name),
            getattr(PathBound(8).estimate(long, x_0, seed=2), name),
            rtol=1e-8,
            atol=1e-8,
        )


def test_one_step_is_the_noisiest() -> None:
    long = exact_chain(mixture(), 12, FixedLarge())
    for grid in GRIDS:
        assert torch.equal(long.respaced(1, grid=grid).log_snrs, long.log_snrs[-1:])


def test_bad_grids_are_refused() -> None:
    long = exact_chain(mixture(), 12, FixedLarge())
    with pytest.raises(ValueError, match="grid to be one of .*got 'unifrom'; did you mean"):
        long.respaced(5, grid="unifrom")
    with pytest.raises(ValueError, match="num_steps to be an integer >= 1; got 0"):
        long.respaced(0)


@pytest.mark.parametrize("variance", ["posterior", "analytic", "fixed"])
def test_respaced_chains_are_saved_and_loaded(variance: str, tmp_path: Path) -> None:
    network = ResidualMLP((2,), width=8, blocks=1)
    long = ReverseChain(
        NoiseDenoiser(network, time="timestep"), ForwardChain(CosineSchedule(), 50), (2,)
    )
    x_0 = torch.randn(6, 2)
    kinds: dict[str, Variance] = {
        "posterior": PosteriorCovariance("diagonal", rank=1, probes=2),
        "analytic": AnalyticVariance.fit(long, x_0, diagonal=True, knots=4),
        "fixed": FixedSmall(),
    }
    short = long.respaced(5, variance=kinds[variance], grid="quadratic")
    short.save(tmp_path)
    back = ReverseChain.load(tmp_path)
    assert back.variance == short.variance and torch.equal(back.log_snrs, short.log_snrs)
    values = [PathBound(8).estimate(chain, x_0, seed=0).value for chain in (short, back)]
    assert torch.equal(*values)


# -- tabulated schedules -------------------------------------------------------------------------


def test_tabulated_schedules_interpolate_their_table() -> None:
    schedule = TabulatedSchedule([5.0, 2.0, -1.0], [1.0, 4.0, 9.5])
    assert schedule.table(3).tolist() == [5.0, 2.0, -1.0]
    assert schedule.times(3).tolist() == [1.0, 4.0, 9.5]
    u = torch.tensor([0.0, 1 / 6, 1 / 3, 0.5, 2 / 3, 1.0], dtype=F64)
    values = schedule.log_snr(u)
    assert values[0] == torch.inf
    torch.testing.assert_close(values[2:], torch.tensor([5.0, 3.5, 2.0, -1.0], dtype=F64))
    fine = schedule.log_snr(torch.linspace(1e-6, 1, 1000, dtype=F64))
    assert bool((fine.diff() < 0).all())
    with pytest.raises(ValueError, match="num_steps = 3, the number of log-SNRs; got 4"):
        schedule.table(4)
    with pytest.raises(ValueError, match="decrease strictly"):
        TabulatedSchedule([1.0, 1.0])
    with pytest.raises(ValueError, match="2 timesteps that increase"):
        TabulatedSchedule([1.0, 0.0], [2.0, 2.0])
    with pytest.raises(ValueError, match="finite log-SNRs"):
        TabulatedSchedule([float("nan")])


# -- the optimal grid ----------------------------------------------------------------------------


def test_dynamic_programming_finds_the_least_sum() -> None:
    """Against every grid of the candidates there is."""
    costs = draws(8, 8, seed=5).square()
    candidates = torch.linspace(4, -4, 8, dtype=F64)
    grid = OptimalGrid(candidates, costs)
    for count in range(2, 9):
        chosen = grid.log_snrs(candidates, count)
        places = [int((candidates == value).nonzero()) for value in chosen]
        assert places == sorted(set(places)) and places[0] == 0 and places[-1] == 7
        every = ((0, *inner, 7) for inner in itertools.combinations(range(1, 7), count - 2))
        least = min(sum(float(costs[b, a]) for a, b in itertools.pairwise(p)) for p in every)
        total = sum(float(costs[b, a]) for a, b in itertools.pairwise(places))
        assert total == pytest.approx(least, rel=1e-12)
    with pytest.raises(ValueError, match="at most 8 steps, the candidates; got 9"):
        grid.log_snrs(candidates, 9)


@pytest.mark.parametrize(
    "variance",
    [FixedSmall(), FixedLarge(), PosteriorCovariance("full")],
    ids=["small", "large", "full"],
)
def test_costs_add_up_to_the_bound(variance: Variance) -> None:
    """The bound of a grid of candidates is the sum of its costs and the prior's KL."""
    law = mixture()
    long, x_0 = exact_chain(law, 30, variance), law.sample(4000, seed=1)
    grid = OptimalGrid.fit(long, x_0, candidates=7)
    places = [0, 2, 5, 6]

    class Chosen(Grid):
        def log_snrs(self, table: Tensor, num_steps: int) -> Tensor:
            return grid.candidates[places]

    short = long.respaced(4, grid=Chosen())
    total = sum(float(grid.costs[b, a]) for a, b in itertools.pairwise(places))
    total += float(short.forward_chain.prior_kl(x_0).mean())
    chain = short.forward_chain
    values = [
        VariationalBound(AllTimesteps(), seed=s).loss(short, chain, x_0) / 4000 for s in range(6)
    ]
    value = torch.tensor(values)
    error = float(value.std()) * (1 + 1 / 6) ** 0.5  # of the difference: the costs are one more
    assert total == pytest.approx(float(value.mean()), abs=6 * error)


def test_costs_are_smooth_in_the_level() -> None:
    """They rise and fall once or twice, where errors of their own would make them jump.

    (With other noise at each level the variation is above 6 times the range for these seeds.)
    """
    law = mixture()
    long = exact_chain(law, 10, FixedSmall())
    for seed in range(4):
        grid = OptimalGrid.fit(long, law.sample(5, seed=10 + seed), candidates=60)
        costs = grid.costs.diagonal(-1)[1:]  # of the shortest steps, the reconstruction left out
        variation = float(costs.diff().abs().sum())
        assert variation < 2 * float(costs.max() - costs.min())


def test_optimal_grids_beat_the_others_on_other_data() -> None:
    """By 0.1 nats on average over three fits."""
    law = mixture()
    long, x_0 = exact_chain(law, 100, PosteriorCovariance("diagonal")), law.sample(400, seed=2)

    def bound(grid: Grid) -> float:
        return float(PathBound(8).estimate(long.respaced(6, grid=grid), x_0, seed=0).value.mean())

    train = law.sample(200, seed=1)
    fits = [OptimalGrid.fit(long, train, candidates=40, seed=seed) for seed in range(3)]
    best = sum(bound(grid) for grid in fits) / len(fits)
    assert best > max(bound(grid) for grid in GRIDS.values()) + 0.1


def test_optimal_grids_are_saved_and_loaded(tmp_path: Path) -> None:
    grid = OptimalGrid(torch.linspace(4, -4, 5, dtype=F64), draws(5, 5).square())
    grid.save(tmp_path / "grid.safetensors")
    back = OptimalGrid.load(tmp_path / "grid.safetensors")
    assert torch.equal(back.costs, grid.costs) and torch.equal(back.candidates, grid.candidates)
    from pyrodiff.serialization import write_weights

    write_weights(tmp_path / "other.safetensors", {"costs": torch.zeros(2)})
    with pytest.raises(ValueError, match="Expected an optimal grid in .*; got \\['costs'\\]"):
        OptimalGrid.load(tmp_path / "other.safetensors")


# -- analytic variances --------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [False, True])
def test_analytic_variance_of_a_gaussian_is_its_posteriors(diagonal: bool) -> None:
    """v = s² σ²/(α² s² + σ²) for each dimension; 20,000 draws, 5 standard errors of χ²."""
    scales = torch.tensor([0.5, 1.5], dtype=F64)
    law = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.diag(scales.square())[None])
    reverse = exact_chain(law, 20, FixedLarge())
    fitted = AnalyticVariance.fit(reverse, law.sample(20_000, seed=0), diagonal=diagonal, knots=14)
    x = torch.zeros(3, 2, dtype=F64)
    for t in (2, 11, 20):
        step = reverse.step(t, x)
        exact = scales.square() * step.sigma**2
        exact = exact / (step.alpha**2 * scales.square() + step.sigma**2)
        exact = exact if diagonal else exact.mean()
        value = (fitted.log_variance(step, None).exp() - step.log_small.exp()) / step.c_0**2
        torch.testing.assert_close(value, exact.expand(value.shape), rtol=0.06, atol=0)
        several = reverse.step(torch.tensor([t, 3, 1]), x)
        first = fitted.log_variance(several, None)[0].flatten()
        torch.testing.assert_close(first, fitted.log_variance(step, None).flatten())


def test_analytic_variance_is_better_than_the_fixed_ones() -> None:
    """By at least 4 standard errors of the mean difference of 300 samples."""
    law = mixture()
    long, x_0 = exact_chain(law, 6, FixedLarge()), law.sample(300, seed=2)
    fitted = AnalyticVariance.fit(long, law.sample(500, seed=1))
    ours, small, large = (
        PathBound(8).estimate(long.respaced(6, variance=v), x_0, seed=0).value
        for v in (fitted, FixedSmall(), FixedLarge())
    )
    for other in (small, large):
        gain = ours - other
        assert float(gain.mean()) > 4 * float(gain.std()) / 300**0.5


def test_bad_analytic_variances_are_refused() -> None:
    for arguments, message in (
        (((1.0, 2.0), ((1.0,), (1.0,))), "decrease strictly"),
        (((2.0, 1.0), ((1.0,),)), "2 rows of 1 errors; got 1"),
        (((2.0,), ((0.0,),)), "errors above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AnalyticVariance(*arguments)


def test_own_scale_of_the_decoder_is_kept() -> None:
    long = exact_chain(mixture(), 12, FixedLarge())
    decoder = GaussianDecoder(0.2)
    assert long.respaced(4, decoder=decoder).decoder is decoder
