"""Variances: values in terms of betas, t = 1, the ends of the learned range, T = 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyrodiff import ForwardChain
from pyrodiff.kernels import Step
from pyrodiff.schedules import BetaSchedule
from pyrodiff.variances import FixedLarge, FixedSmall, LearnedDiagonal, LearnedRange, Variance

F64 = torch.float64
BETAS = [0.01, 0.05, 0.2, 0.4]
FORWARD = ForwardChain(BetaSchedule(BETAS), len(BETAS))
ALPHA_BAR = torch.cumprod(1 - torch.tensor(BETAS, dtype=F64), 0).tolist()
X = torch.zeros(3, 2, dtype=F64)


def beta_tilde(t: int) -> float:
    """Ho et al. (2020), equation 7."""
    return (1 - ALPHA_BAR[t - 2]) / (1 - ALPHA_BAR[t - 1]) * BETAS[t - 1]


def at(t: Tensor | int, forward: ForwardChain = FORWARD) -> Step:
    return forward.step(t, X, 1)


def value(variance: Variance, t: int, raw: Tensor | None = None) -> Tensor:
    return variance.log_variance(at(t), raw).exp().expand(X.shape)


def close(actual: Tensor, expected: float) -> None:
    torch.testing.assert_close(actual, torch.full_like(actual, expected), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("t", [2, 3, 4])
def test_fixed_variances_are_the_betas(t: int) -> None:
    close(value(FixedLarge(), t), BETAS[t - 1])
    close(value(FixedSmall(), t), beta_tilde(t))


def test_first_step() -> None:
    """β_1 for fixed large, β̃_2 for fixed small, since β̃_1 = 0."""
    close(value(FixedLarge(), 1), BETAS[0])
    close(value(FixedSmall(), 1), beta_tilde(2))


@pytest.mark.parametrize("t", [1, 2, 4])
def test_learned_range_runs_from_small_to_large(t: int) -> None:
    small, large = value(FixedSmall(), t), value(FixedLarge(), t)
    variance, one = LearnedRange(), torch.ones_like(X)
    torch.testing.assert_close(value(variance, t, -one), small, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(value(variance, t, one), large, rtol=1e-13, atol=0.0)
    middle = value(variance, t, 0 * one)
    torch.testing.assert_close(middle, (small * large).sqrt(), rtol=1e-13, atol=0.0)
    outside = value(variance, t, 3 * one)  # unbounded: the raw output is not squashed
    torch.testing.assert_close(outside, large**2 / small, rtol=1e-12, atol=0.0)


def test_learned_diagonal_is_beta_times_exp() -> None:
    raw = torch.linspace(-3, 3, 6, dtype=F64).reshape(3, 2)
    expected = BETAS[2] * raw.exp()
    torch.testing.assert_close(value(LearnedDiagonal(), 3, raw), expected, rtol=1e-13, atol=0.0)
    assert torch.equal(value(LearnedDiagonal(), 1, 0 * raw), value(FixedLarge(), 1))


@pytest.mark.parametrize("variance", [LearnedRange(), LearnedDiagonal()], ids=repr)
def test_learned_variances_pass_gradients(variance: Variance) -> None:
    raw = torch.zeros(3, 2, dtype=F64, requires_grad=True)
    variance.log_variance(at(3), raw).sum().backward()
    slope = 1.0
    if isinstance(variance, LearnedRange):
        slope = 0.5 * float(at(3).log_large - at(3).log_small)
    assert raw.grad is not None
    close(raw.grad, slope)


@pytest.mark.parametrize(
    "variance", [FixedSmall(), FixedLarge(), LearnedRange(), LearnedDiagonal()], ids=repr
)
def test_chain_of_one_step_has_beta_1_everywhere(variance: Variance) -> None:
    forward = ForwardChain(BetaSchedule([0.3]), 1)
    raw = torch.zeros_like(X) if variance.learned else None
    close(variance.log_variance(at(1, forward), raw).exp().expand(X.shape), 0.3)


@pytest.mark.parametrize(
    "variance", [FixedSmall(), FixedLarge(), LearnedRange(), LearnedDiagonal()], ids=repr
)
def test_one_time_per_sample(variance: Variance) -> None:
    t = torch.tensor([1, 4, 2])
    raw = torch.full_like(X, 0.3) if variance.learned else None
    values = variance.log_variance(at(t), raw).exp().expand(X.shape)
    for i in range(3):
        assert torch.equal(values[i], value(variance, int(t[i]), raw)[i])
