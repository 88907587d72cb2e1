"""Schedules against their published definitions, typed again here, and published tables."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyrodiff import ForwardChain
from pyrodiff.schedules import (
    BetaSchedule,
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    Schedule,
)

F64 = torch.float64
TABLES = json.loads((Path(__file__).parent / "reference" / "vb_terms.json").read_text())["tables"]
CONTINUOUS = {
    "linear": LinearSchedule(),
    "linear-gentle": LinearSchedule(1e-5, 0.004),
    "cosine": CosineSchedule(),
    "log-snr": LogSNRSchedule(),
}
continuous = pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS.keys())


def exact_log_snr(betas: list[float]) -> list[float]:
    """logit ᾱ_t in rational arithmetic: no rounding before the last logarithm."""
    alpha_bar, values = Fraction(1), []
    for beta in betas:
        alpha_bar *= 1 - Fraction(beta)
        values.append(math.log(alpha_bar / (1 - alpha_bar)))
    return values


def close(actual: Tensor, expected: list[float], rtol: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=F64), rtol=rtol, atol=0.0)


# -- published definitions -----------------------------------------------------------------------


def test_linear_table_is_ho_et_al() -> None:
    steps = 60
    start, end = 1e-4 * 1000 / steps, 0.02 * 1000 / steps
    betas = [start + (end - start) * t / (steps - 1) for t in range(steps)]
    schedule = LinearSchedule()
    close(schedule.betas(steps), betas, 1e-14)
    # λ passes through 0 on the way, so the tolerance is absolute in the log of a ratio.
    expected = torch.tensor(exact_log_snr(betas), dtype=F64)
    torch.testing.assert_close(schedule.table(steps), expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_cosine_table_is_nichol_and_dhariwal(steps: int) -> None:
    def f(t: int) -> float:
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f(t) / f(t - 1), 0.999) for t in range(1, steps + 1)]
    schedule = CosineSchedule()
    close(schedule.betas(steps), betas, 1e-10)
    assert float(schedule.betas(steps)[-1]) == 0.999  # the last one is clipped, whatever T
    expected = torch.tensor(exact_log_snr(schedule.betas(steps).tolist()), dtype=F64)
    torch.testing.assert_close(schedule.table(steps), expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    "table",
    [t for t in TABLES if (t["betas"], t["num_steps"]) != ("linear", 20)],
    ids=lambda t: f"{t['betas']}-{t['num_steps']}",
)
def test_tables_are_those_of_improved_diffusion(table: dict) -> None:
    schedule = {"linear": LinearSchedule(), "cosine": CosineSchedule()}[table["betas"]]
    betas, log_snr = schedule.betas(table["num_steps"]), schedule.table(table["num_steps"])
    assert table["beta"] and table["alphas_cumprod"]
    for t, beta in table["beta"].items():
        assert float(betas[int(t) - 1]) == pytest.approx(beta, rel=1e-11, abs=0.0)
    for t, alpha_bar in table["alphas_cumprod"].items():
        value = float(torch.sigmoid(log_snr[int(t) - 1]))
        assert value == pytest.approx(alpha_bar, rel=1e-12, abs=0.0)


def test_log_snr_table_has_its_ends_and_is_even() -> None:
    table = LogSNRSchedule(7.5, -6.0).table(4)
    close(table, [7.5, 3.0, -1.5, -6.0], 1e-15)
    assert LogSNRSchedule(7.5, -6.0).table(1).tolist() == [-6.0]


def test_one_minus_alpha_bar_of_first_step_is_the_first_beta() -> None:
    """In float32 it is off by 1.7e-4; the smallest betas in use must come back."""
    for beta in (1e-4, 1e-6, 1e-9):
        sigma2 = torch.sigmoid(-BetaSchedule([beta, 0.5]).table(2)[0])
        assert float(sigma2) == pytest.approx(beta, rel=1e-12, abs=0.0)


# -- laws of every schedule ----------------------------------------------------------------------


@continuous
def test_log_snr_is_strictly_decreasing_and_float64(schedule: Schedule) -> None:
    u = torch.linspace(1e-4, 1.0, 3001)
    values = schedule.log_snr(u)
    assert values.dtype == F64 and values.shape == u.shape
    assert bool((values.diff() < 0).all())
    assert float(schedule.log_snr(torch.zeros((), dtype=F64))) > float(values[0])
    assert schedule.log_snr(u.reshape(3001, 1)).shape == (3001, 1)


@continuous
@pytest.mark.parametrize("steps", [25, 1000])
def test_table_is_strictly_decreasing_and_float64(schedule: Schedule, steps: int) -> None:
    table = schedule.table(steps)
    assert table.dtype == F64 and table.shape == (steps,)
    assert bool(table.isfinite().all()) and bool((table.diff() < 0).all())


def max_error(schedule: Schedule, steps: int) -> float:
    """Largest |table − λ(u)| over a fixed part of [0, 1] away from the clipped end."""
    u = torch.arange(1, steps + 1, dtype=F64) / steps
    inside = (u >= 0.1) & (u <= 0.9)
    return float((schedule.table(steps) - schedule.log_snr(u))[inside].abs().max())


@pytest.mark.parametrize("name", ["linear", "linear-gentle", "log-snr"])
def test_table_tends_to_log_snr_with_order_one(name: str) -> None:
    """Ten times the steps, a tenth of the error: log10 of the ratio is the order."""
    schedule = CONTINUOUS[name]
    coarse, fine = max_error(schedule, 1000), max_error(schedule, 10_000)
    assert math.log10(coarse / fine) == pytest.approx(1.0, abs=0.1)


def test_cosine_table_is_log_snr_before_the_clip() -> None:
    """Its betas are ratios of ᾱ itself, so the table has no discretization error."""
    assert max_error(CosineSchedule(), 200) < 1e-11


def test_linear_limit_is_the_sde_of_song_et_al() -> None:
    u = torch.tensor([0.25, 1.0], dtype=F64)
    # −∫ β(u) du with β(u) = 0.1 + 19.9 u, their β_min and β_max
    log_alpha_bar = [-(0.1 * x + 19.9 * x**2 / 2) for x in u.tolist()]
    expected = [v - math.log1p(-math.exp(v)) for v in log_alpha_bar]
    close(LinearSchedule().log_snr(u), expected, 1e-13)


# -- given betas ---------------------------------------------------------------------------------


def test_beta_schedule_is_exact_at_the_knots_and_decreasing_between() -> None:
    betas = [0.001, 0.01, 0.01, 0.2, 0.7]
    schedule = BetaSchedule(betas)
    table = schedule.table(5)
    torch.testing.assert_close(
        table, torch.tensor(exact_log_snr(betas), dtype=F64), rtol=0.0, atol=1e-13
    )
    u = torch.arange(1, 6, dtype=F64) / 5
    torch.testing.assert_close(schedule.log_snr(u), table, rtol=0.0, atol=1e-12)
    assert bool((schedule.log_snr(torch.linspace(0.001, 1, 997)).diff() < 0).all())
    assert float(schedule.log_snr(torch.zeros(()))) == math.inf
    # log ᾱ is linear between knots
    middle = math.log1p(-0.001) + 0.5 * math.log1p(-0.01)
    expected = middle - math.log(-math.expm1(middle))
    assert float(schedule.log_snr(torch.tensor(0.3, dtype=F64))) == pytest.approx(
        expected, rel=1e-12
    )


def test_beta_schedule_of_linear_betas_is_the_linear_table() -> None:
    linear = LinearSchedule()
    assert torch.equal(BetaSchedule(linear.betas(50)).table(50), linear.table(50))


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 0.3, 0.2], r"never decrease.*beta_2 = 0\.3 > beta_3 = 0\.2"),
        ([0.0, 0.1], r"every beta in \(0, 1\)"),
        ([0.1, 1.0], r"every beta in \(0, 1\)"),
        ([-0.1, 0.5], r"every beta in \(0, 1\)"),
        ([0.1, math.nan], r"every beta in \(0, 1\)"),
        ([], r"shape \(T,\)"),
    ],
)
def test_bad_betas_are_refused(betas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BetaSchedule(betas)
    with pytest.raises(ValueError, match=r"shape \(T,\)"):
        BetaSchedule(torch.full((2, 2), 0.1))


def test_beta_schedule_has_one_length() -> None:
    with pytest.raises(ValueError, match="num_steps = 2, the number of betas; got 3"):
        BetaSchedule([0.1, 0.2]).table(3)


@pytest.mark.parametrize("schedule", [*CONTINUOUS.values(), BetaSchedule([0.1])], ids=repr)
@pytest.mark.parametrize("steps", [0, -3])
def test_less_than_one_step_is_refused(schedule: Schedule, steps: int) -> None:
    with pytest.raises(ValueError, match="at least 1; got"):
        schedule.table(steps)


@pytest.mark.parametrize("steps", [1, 20])
def test_linear_with_too_few_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps > 20 .*got {steps}"):
        LinearSchedule().table(steps)
    assert len(LinearSchedule().table(21)) == 21


@pytest.mark.parametrize("ends", [(0.0, 0.1), (0.2, 0.1), (0.1, 1.0)])
def test_linear_bounds(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 < beta_start <= beta_end < 1"):
        LinearSchedule(*ends)


@pytest.mark.parametrize("arguments", [(-0.1, 0.9), (0.0, 0.0), (0.0, 1.0)])
def test_cosine_bounds(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="offset >= 0 and 0 < max_beta < 1"):
        CosineSchedule(*arguments)


@pytest.mark.parametrize("ends", [(-5.0, 5.0), (1.0, 1.0), (math.inf, 0.0), (3.0, math.nan)])
def test_log_snr_bounds(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite maximum > minimum"):
        LogSNRSchedule(*ends)


class FlatSchedule(Schedule):
    """Not strictly decreasing: what a chain must not be built from."""

    def __init__(self, value: float):
        self.value = value

    def log_snr(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.value, dtype=F64)

    def table(self, num_steps: int) -> Tensor:
        return torch.full((num_steps,), self.value, dtype=F64)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_chain_refuses_a_schedule_that_does_not_decrease(value: float) -> None:
    with pytest.raises(ValueError, match="finite and strictly decreasing"):
        ForwardChain(FlatSchedule(value), 3)
