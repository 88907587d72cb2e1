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
from pyrodiff.schedules import beta as from_betas

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


# -- the ends of time ------------------------------------------------------------------------------

BETAS = BetaSchedule([0.001, 0.01, 0.2, 0.7])
TO_ONE = [s for s in (*CONTINUOUS.values(), CosineSchedule(0.0), BETAS) if "LogSNR" not in repr(s)]


def start_rates() -> dict[Schedule, tuple[float, int]]:
    """c and k of 1 − ᾱ(u) = c uᵏ + … at the data, from each definition's derivative."""
    r = math.pi / 2 / 1.008
    return {
        CONTINUOUS["linear"]: (1000 * 1e-4, 1),
        CONTINUOUS["linear-gentle"]: (1000 * 1e-5, 1),
        CONTINUOUS["cosine"]: (2 * r * math.tan(0.008 * r), 1),
        CosineSchedule(0.0): (math.pi**2 / 4, 2),
        BETAS: (-4 * math.log1p(-0.001), 1),
    }


@pytest.mark.parametrize("schedule", start_rates(), ids=repr)
def test_start_is_the_limit_of_what_comes_after(schedule: Schedule) -> None:
    """λ(u) + log(c uᵏ) → 0 as u → 0, and λ(0) = +∞, at any u that float64 can write."""
    assert float(schedule.log_snr(torch.zeros((), dtype=F64))) == math.inf
    rate, power = start_rates()[schedule]
    u = torch.tensor([1e-9, 1e-12, 1e-20, 1e-100], dtype=F64)
    expected = -math.log(rate) - power * u.log()
    # the next order in u is below 250 u (the linear slope over twice β_start), rounding 1e-13 of λ
    torch.testing.assert_close(schedule.log_snr(u), expected, rtol=1e-13, atol=2.5e-7)
    torch.testing.assert_close(schedule.log_snr(u[1:]), expected[1:], rtol=1e-13, atol=2.5e-10)


@pytest.mark.parametrize("offset", [0.0, 0.008, 0.5])
def test_cosine_ends_in_pure_noise(offset: float) -> None:
    """λ(u) − 2 log(r (1 − u)/cos(r s)) → 0 as u → 1, and λ(1) = −∞."""
    schedule, r = CosineSchedule(offset), math.pi / 2 / (1 + offset)
    assert float(schedule.log_snr(torch.ones((), dtype=F64))) == -math.inf
    left = torch.tensor([2.0**-30, 2.0**-40, 2.0**-52], dtype=F64)
    expected = 2 * (r * left / math.cos(r * offset)).log()
    torch.testing.assert_close(schedule.log_snr(1 - left), expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("schedule", [s for s in TO_ONE if "Cosine" not in repr(s)], ids=repr)
def test_other_schedules_end_where_their_tables_do(schedule: Schedule) -> None:
    """λ(1) is finite, the limit from below, and the λ_T of a fine chain."""
    one = torch.ones((), dtype=F64)
    end = schedule.log_snr(one)
    torch.testing.assert_close(schedule.log_snr(one - 1e-12), end, rtol=0.0, atol=1e-9)
    if schedule is BETAS:
        torch.testing.assert_close(end, schedule.table(4)[-1], rtol=1e-14, atol=0.0)
    else:
        # λ_T is off by ½ Σ β_t² or so: less than 1e-3 β_end · 1000 for 10⁶ steps
        torch.testing.assert_close(end, schedule.table(10**6)[-1], rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("ends", [(13.3, -5.0), (0.1, -0.2), (7.7, 1.1)])
def test_log_snr_schedule_has_its_very_ends(ends: tuple[float, float]) -> None:
    values = LogSNRSchedule(*ends).log_snr(torch.tensor([0.0, 1.0]))
    assert tuple(values.tolist()) == ends


@pytest.mark.parametrize("schedule", TO_ONE, ids=repr)
@pytest.mark.parametrize("direction", [-math.inf, math.inf], ids=["down", "up"])
def test_no_log_snr_hangs_on_a_last_bit(
    schedule: Schedule, direction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log ᾱ, sines and cosines one rounding off move λ by roundings: processors differ so."""
    u = torch.tensor([0.0, 1e-12, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-9, 1.0], dtype=F64)
    values, toward = schedule.log_snr(u), torch.tensor(direction, dtype=F64)

    def nudge(value: Tensor) -> Tensor:
        return torch.where(value == 0, value, value.nextafter(toward))

    with monkeypatch.context() as patch:
        for name in ("sin", "cos"):
            exact, scalar = getattr(torch, name), getattr(math, name)
            patch.setattr(torch, name, lambda x, f=exact: nudge(f(x)))
            patch.setattr(math, name, lambda x, f=scalar: math.nextafter(f(x), direction))
        torch.testing.assert_close(schedule.log_snr(u), values, rtol=1e-13, atol=1e-13)
    convert = from_betas._log_snr_from_log_alpha_bar
    monkeypatch.setattr(
        from_betas, "_log_snr_from_log_alpha_bar", lambda v: convert(v.nextafter(toward))
    )
    nudged = schedule.log_snr(u)
    # not −∞: that is nextafter's own end, −1.8e308, and ᾱ = 0 either way
    assert float(nudged[0]) > 700 and float(nudged[-1]) < 0
    torch.testing.assert_close(nudged[1:-1], values[1:-1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("offset", [0.0, 0.008])
def test_cosine_falls_across_the_seam_of_its_two_formulas(offset: float) -> None:
    u = 0.5 + torch.arange(-50, 51, dtype=F64) * 1e-12
    assert bool((CosineSchedule(offset).log_snr(u).diff() < 0).all())


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
    with pytest.raises(ValueError, match="an integer >= 1; got"):
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
