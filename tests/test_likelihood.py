"""The bound, term by term, against the closed form; the result type and its file.

Stochastic tests are seeded.  Under fresh seeds a mean within 4 standard errors fails at 6e-5 a
comparison.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.decoders import CategoricalDecoder
from pyrodiff.denoisers import DataDenoiser, NoiseDenoiser
from pyrodiff.likelihood import LogLikelihood, TermwiseBound
from pyrodiff.networks import ResidualMLP
from pyrodiff.oracles import Gaussian, LinearBound, linear_bound
from pyrodiff.schedules import LogSNRSchedule

F64 = torch.float64
STEPS = 12


class Scaled(nn.Module):
    """Half of the optimum's ε̂: affine still, and no posterior, so that no term is constant."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, *rest: Tensor | None) -> Tensor:
        return 0.5 * self.network(x_t, *rest)


def affine_chain(steps: int = STEPS) -> ReverseChain:
    mean = torch.tensor([0.5, -0.3, 0.1], dtype=F64)
    root = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.4, 0.2, 0.3]], dtype=F64)
    network = Scaled(Gaussian(mean, root @ root.T).network())
    forward = ForwardChain(LogSNRSchedule(5.0, -5.0), steps)
    return ReverseChain(NoiseDenoiser(network), forward, (3,))


def mlp_chain(**options: object) -> ReverseChain:
    network = ResidualMLP((2,), width=8, blocks=1, **options).double()
    with torch.no_grad():  # the last layer starts at zero
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    forward = ForwardChain(LogSNRSchedule(5.0, -5.0), STEPS)
    return ReverseChain(DataDenoiser(network), forward, (2,))


@pytest.fixture(scope="module")
def point() -> Tensor:
    return torch.tensor([[0.7, -1.1, 0.4]], dtype=F64)


@pytest.fixture(scope="module")
def exact(point: Tensor) -> LinearBound:
    return linear_bound(affine_chain(), point)


# -- the estimate against the closed form --------------------------------------------------------


@pytest.mark.parametrize("evaluations", [None, 2, 4, 6, 10, 2 * STEPS])
def test_mean_is_the_closed_form(
    evaluations: int | None, point: Tensor, exact: LinearBound
) -> None:
    # copies of one sample: rows have noise of their own
    copies = 6000
    x_0 = point.expand(copies, -1)
    found = TermwiseBound(evaluations).estimate(affine_chain(), x_0, batch_size=copies)
    error = float(found.value.std()) / math.sqrt(copies)
    assert abs(float(found.value.mean() - exact.elbo)) < 4 * error
    assert error < 0.05 * abs(float(exact.elbo))
    assert found.network_evaluations == (STEPS if evaluations is None else evaluations)
    assert found.kind == "lower bound" and found.dimensions == 3


@pytest.mark.parametrize("evaluations", [None, 2 * STEPS])
def test_every_term_is_the_closed_form(
    evaluations: int | None, point: Tensor, exact: LinearBound
) -> None:
    copies = 6000
    x_0 = point.expand(copies, -1)
    found = TermwiseBound(evaluations).estimate(affine_chain(), x_0, batch_size=copies)
    assert found.terms is not None and found.timesteps is not None
    assert found.timesteps.tolist() == list(range(1, STEPS + 1))
    errors = found.terms.std(0) / math.sqrt(copies)
    assert bool(((-found.terms.mean(0) - exact.terms[0]).abs() < 4 * errors).all())
    # value = −KL_T − Σ_t L_t, exactly
    torch.testing.assert_close(found.value, found.terms.sum(1) - exact.prior)


@pytest.mark.parametrize("evaluations", [4, 8, 2 * STEPS])
def test_std_error_is_the_spread_over_repeats(evaluations: int, point: Tensor) -> None:
    """The mean square of the reported errors estimates the variance, without bias.

    With R = 6000 repeats both mean squares have relative standard deviations of about
    √(kurtosis/R) < 4 %, which is measured: 4 of them are allowed.
    """
    copies = 6000
    x_0 = point.expand(copies, -1)
    found = TermwiseBound(evaluations).estimate(affine_chain(), x_0, batch_size=copies)
    centred = (found.value - found.value.mean()).square()
    difference = centred - found.std_error.square()
    error = float(difference.std()) / math.sqrt(copies)
    assert abs(float(difference.mean())) < 4 * error
    assert error < 0.04 * float(centred.mean())


def test_error_is_not_known_with_one_draw(point: Tensor) -> None:
    found = TermwiseBound().estimate(affine_chain(), point.expand(3, -1))
    assert bool(found.std_error.isnan().all()) and bool(found.value.isfinite().all())
    assert math.isnan(found.mean().monte_carlo) and math.isfinite(found.mean().between_samples)


# -- strata --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12, 50, 999, 1000])
def test_strata_partition_the_steps(steps: int) -> None:
    for strata in {1, 2, 3, 4, 7, 8, 49, steps // 2, steps - 1, steps}:
        if not 1 <= strata <= steps:
            continue
        edges, draws = TermwiseBound(2 * strata)._strata(steps)
        assert draws == 2 and len(edges) == strata + 1
        assert int(edges[0]) == 1 and int(edges[-1]) == steps + 1
        assert bool((edges.diff() >= 1).all()), (steps, strata)
        assert strata == 1 or int(edges[1]) == 2  # the reconstruction alone


def test_strata_grow_with_t() -> None:
    widths = TermwiseBound(128)._strata(1000)[0].diff()
    assert bool((widths.diff() >= -1).all()) and int(widths[-1]) > 20  # −1: rounding


def test_strata_of_every_step() -> None:
    edges, draws = TermwiseBound()._strata(7)
    assert edges.tolist() == list(range(1, 9)) and draws == 1
    assert TermwiseBound(14)._strata(7)[0].tolist() == edges.tolist()


# -- what a value depends on ---------------------------------------------------------------------


@pytest.mark.parametrize("evaluations", [None, 8])
def test_batches_change_nothing(evaluations: int | None) -> None:
    reverse, x_0 = mlp_chain(), torch.randn(20, 2, dtype=F64)
    bound = TermwiseBound(evaluations)
    whole = bound.estimate(reverse, x_0, seed=3, batch_size=64)
    for size in (1, 7):
        parts = bound.estimate(reverse, x_0, seed=3, batch_size=size)
        torch.testing.assert_close(parts.value, whole.value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            parts.std_error, whole.std_error, rtol=1e-8, atol=1e-10, equal_nan=True
        )
    few = bound.estimate(reverse, x_0[:5], seed=3)
    torch.testing.assert_close(few.value, whole.value[:5], rtol=1e-10, atol=1e-10)


def test_seed_decides_and_global_generator_does_not() -> None:
    reverse, x_0 = mlp_chain(), torch.randn(4, 2, dtype=F64)
    bound = TermwiseBound(8)
    first = bound.estimate(reverse, x_0, seed=1).value
    torch.manual_seed(99)
    assert torch.equal(bound.estimate(reverse, x_0, seed=1).value, first)
    other = bound.estimate(reverse, x_0, seed=2).value
    assert not bool((other == first).any())


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    reverse, x_0 = mlp_chain(dropout=0.5), torch.randn(4, 2, dtype=F64)
    reverse.train()
    value = TermwiseBound(8).estimate(reverse, x_0).value
    assert reverse.training
    reverse.eval()
    assert torch.equal(TermwiseBound(8).estimate(reverse, x_0).value, value)
    assert not reverse.training


def test_context_goes_with_its_sample() -> None:
    reverse = mlp_chain(context_size=3)
    x_0, context = torch.randn(9, 2, dtype=F64), torch.randn(9, 3, dtype=F64)
    bound = TermwiseBound(8)
    whole = bound.estimate(reverse, x_0, context=context).value
    parts = bound.estimate(reverse, x_0, context=context, batch_size=4).value
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)
    moved = bound.estimate(reverse, x_0, context=context.roll(1, 0)).value
    assert float((moved - whole).abs().min()) > 1e-6


def test_progress_is_told_of_every_batch() -> None:
    told: list[tuple[int, Tensor]] = []
    found = TermwiseBound(4).estimate(
        mlp_chain(),
        torch.randn(10, 2, dtype=F64),
        batch_size=4,
        progress=lambda done, values: told.append((done, values)),
    )
    assert [done for done, _ in told] == [4, 8, 10]
    for done, values in told:
        assert torch.equal(values, found.value[:done])


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluations", [0, 1, 3, -2])
def test_evaluations_are_even(evaluations: int) -> None:
    with pytest.raises(ValueError, match=r"Expected evaluations to be even and at least 2, or N"):
        TermwiseBound(evaluations)


def test_estimate_refuses() -> None:
    reverse, x_0 = affine_chain(), torch.zeros(2, 3, dtype=F64)
    bound = TermwiseBound(4)
    with pytest.raises(ValueError, match=f"Expected at most 2T = {2 * STEPS} evaluations; got 26"):
        TermwiseBound(26).estimate(reverse, x_0)
    with pytest.raises(ValueError, match="Expected at least one sample; got none"):
        bound.estimate(reverse, x_0[:0])
    with pytest.raises(ValueError, match="Expected batch_size >= 1; got 0"):
        bound.estimate(reverse, x_0, batch_size=0)
    with pytest.raises(ValueError, match=r"Expected data of shape \(N, 3\); got \(2, 2\)"):
        bound.estimate(reverse, x_0[:, :2])
    with pytest.raises(ValueError, match="Expected finite data; got NaN or infinity in 1 of 2"):
        bound.estimate(reverse, torch.tensor([[0.0, 0, 0], [0, math.nan, 0]], dtype=F64))
    with pytest.raises(ValueError, match="Expected 2 contexts, one per sample; got 3"):
        bound.estimate(reverse, x_0, context=torch.zeros(3, 1))


def test_data_off_the_grid_are_refused() -> None:
    network = ResidualMLP((2,), width=8, blocks=1).double()
    forward = ForwardChain(LogSNRSchedule(5.0, -5.0), STEPS)
    reverse = ReverseChain(DataDenoiser(network), forward, (2,), decoder=CategoricalDecoder(3))
    TermwiseBound(4).estimate(reverse, torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64))
    with pytest.raises(ValueError, match="Expected"):
        TermwiseBound(4).estimate(reverse, torch.tensor([[-1.0, 0.3]], dtype=F64))


# -- the result ----------------------------------------------------------------------------------


def by_hand(terms: bool = True) -> LogLikelihood:
    value = torch.tensor([-3.0, -5.0, -7.0], dtype=F64)
    error = torch.tensor([0.3, 0.0, 0.4], dtype=F64)
    parts = (-torch.arange(6.0, dtype=F64).reshape(3, 2), torch.tensor([1.0, 2.5], dtype=F64))
    calls = torch.full((3,), 8)
    return LogLikelihood(
        value, error, "lower bound", calls, 4, "by hand", *(parts if terms else ())
    )


def test_mean_and_bits_by_hand() -> None:
    value, between, monte_carlo = by_hand().mean()
    assert value == -5.0
    assert between == pytest.approx(2 / math.sqrt(3), rel=1e-12)
    assert monte_carlo == pytest.approx(0.5 / 3, rel=1e-12)
    unit = 4 * math.log(2)
    assert tuple(by_hand().bits_per_dim()) == pytest.approx(
        (5 / unit, between / unit, monte_carlo / unit), rel=1e-12
    )


def test_one_sample_has_no_spread() -> None:
    one = LogLikelihood(
        torch.tensor([-2.0]), torch.tensor([0.1]), "estimate", torch.ones(1), 1, "by hand"
    )
    assert math.isnan(one.mean().between_samples)
    assert one.mean().monte_carlo == pytest.approx(0.1)


def test_offset_moves_values_alone() -> None:
    moved = by_hand() + 2.5
    assert torch.equal(moved.value, by_hand().value + 2.5)
    assert torch.equal(moved.std_error, by_hand().std_error)
    assert moved.terms is not None and torch.equal(moved.terms, by_hand().terms)


@pytest.mark.parametrize("terms", [True, False])
def test_file_round_trip(tmp_path: Path, terms: bool) -> None:
    path, result = tmp_path / "result.nc", by_hand(terms)
    result.save(path, split="test", seed=3)
    back = LogLikelihood.load(path)
    for name in ("kind", "network_evaluations", "dimensions", "estimator"):
        assert getattr(back, name) == getattr(result, name)
    for name in ("value", "std_error", "terms", "timesteps"):
        old, new = getattr(result, name), getattr(back, name)
        assert (old is None and new is None) or torch.equal(old, new)
    assert (back.terms is None) == (not terms)
    assert [file.name for file in tmp_path.iterdir()] == ["result.nc"]
    held = result.to_dataset(split="test").attrs
    assert held["split"] == "test" and held["units"] == "nats"


def test_unknown_errors_stay_unknown_in_a_file(tmp_path: Path, point: Tensor) -> None:
    found = TermwiseBound().estimate(affine_chain(), point.expand(3, -1))
    found.save(tmp_path / "result.nc")
    back = LogLikelihood.load(tmp_path / "result.nc")
    assert bool(back.std_error.isnan().all()) and torch.equal(back.value, found.value)


def test_load_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected a file .*none.nc; got nothing there"):
        LogLikelihood.load(tmp_path / "none.nc")
