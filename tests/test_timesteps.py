"""The rules that choose t: marginal laws, weights 1/p(t), spread, memory, errors.

Every chi-square test here uses a fixed seed; with a random one it would fail once in 10^4 runs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyrodiff.timesteps import (
    AllTimesteps,
    LossAwareTimesteps,
    LowDiscrepancyTimesteps,
    Timesteps,
    UniformTimesteps,
)

CHI_SQUARE_9 = 33.72  # exceeded with probability 10^-4 at 9 degrees of freedom


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one(rule: Timesteps, *args: object) -> tuple[Tensor, Tensor]:
    (pair,) = rule.draw(*args)  # type: ignore[arg-type]
    return pair


def chi_square(t: Tensor, probabilities: Tensor) -> float:
    observed = torch.bincount(t - 1, minlength=len(probabilities)).double()
    expected = probabilities * len(t)
    return float(((observed - expected).square() / expected).sum())


def filled(losses: Tensor, **options: float) -> LossAwareTimesteps:
    """A loss-aware rule that has seen the row of losses of every t."""
    rule = LossAwareTimesteps(len(losses), history=losses.shape[1], **options)  # type: ignore[arg-type]
    for column in losses.T:
        rule.update(torch.arange(1, len(losses) + 1), column)
    return rule


def test_all_timesteps_visits_each_step_once_with_weight_one() -> None:
    pairs = list(AllTimesteps().draw(3, 4))
    assert [t.tolist() for t, _ in pairs] == [[k] * 3 for k in (1, 2, 3, 4)]
    assert all(torch.equal(w, torch.ones(3, dtype=torch.float64)) for _, w in pairs)


@pytest.mark.parametrize(
    "rule", [UniformTimesteps(), LowDiscrepancyTimesteps()], ids=["uniform", "low-discrepancy"]
)
def test_weights_are_one_over_p(rule: Timesteps) -> None:
    t, w = one(rule, 1000, 7)
    assert t.dtype == torch.int64 and w.dtype == torch.float64
    assert set(t.tolist()) == set(range(1, 8))
    assert torch.equal(w, torch.full((1000,), 7.0, dtype=torch.float64))


def test_uniform_timesteps_are_uniform() -> None:
    t, _ = one(UniformTimesteps(), 20_000, 10, seeded())
    assert chi_square(t, torch.full((10,), 0.1, dtype=torch.float64)) < CHI_SQUARE_9


@pytest.mark.parametrize("position", [0, 3, 6])
def test_low_discrepancy_is_uniform_for_each_sample(position: int) -> None:
    generator = seeded(position)
    draws = [one(LowDiscrepancyTimesteps(), 7, 10, generator)[0][position] for _ in range(5000)]
    assert chi_square(torch.stack(draws), torch.full((10,), 0.1)) < CHI_SQUARE_9


@pytest.mark.parametrize(("num_samples", "num_steps"), [(64, 10), (10, 10), (7, 50), (100, 7)])
def test_low_discrepancy_spreads_the_batch(num_samples: int, num_steps: int) -> None:
    """An interval of length 1/T holds floor(N/T) or ceil(N/T) of N points 1/N apart."""
    generator = seeded()
    low, high = num_samples // num_steps, -(-num_samples // num_steps)
    for _ in range(50):
        t, _ = one(LowDiscrepancyTimesteps(), num_samples, num_steps, generator)
        counts = torch.bincount(t - 1, minlength=num_steps)
        assert low <= int(counts.min()) and int(counts.max()) <= high


def test_low_discrepancy_goes_round_the_whole_chain() -> None:
    """Seven samples of 50 steps are 7 or 8 steps apart, the last and the first as well."""
    generator = seeded()
    for _ in range(50):
        t = one(LowDiscrepancyTimesteps(), 7, 50, generator)[0].sort().values
        gaps = torch.cat([t, t[:1] + 50]).diff()
        assert 7 <= int(gaps.min()) and int(gaps.max()) <= 8


def test_low_discrepancy_spreads_where_uniform_does_not() -> None:
    t, _ = one(UniformTimesteps(), 64, 10, seeded())
    assert int(torch.bincount(t - 1, minlength=10).max()) > 7


@pytest.mark.parametrize(
    "rule", [UniformTimesteps(), LowDiscrepancyTimesteps(), LossAwareTimesteps(50)]
)
def test_the_generator_decides(rule: Timesteps) -> None:
    first, again, other = (one(rule, 20, 50, seeded(s))[0] for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_loss_aware_is_uniform_until_its_history_is_full() -> None:
    rule = LossAwareTimesteps(3, history=2)
    even = torch.full((3,), 1 / 3, dtype=torch.float64)
    losses = torch.tensor([1.0, 2.0, 4.0])
    rule.update(torch.tensor([1, 2, 3]), losses)
    rule.update(torch.tensor([1, 2]), losses[:2])
    assert torch.equal(rule.probabilities(), even)
    rule.update(torch.tensor([3]), losses[2:])
    assert not torch.allclose(rule.probabilities(), even)


def test_loss_aware_probabilities_follow_the_root_mean_square() -> None:
    losses = torch.tensor([[3.0, -4.0], [1.0, 7.0], [0.5, 0.5], [0.0, 0.0]], dtype=torch.float64)
    p = filled(losses, uniform=0.2).probabilities()
    root = torch.tensor([12.5, 25.0, 0.25, 0.0], dtype=torch.float64).sqrt()
    torch.testing.assert_close(p, 0.8 * root / root.sum() + 0.2 / 4, rtol=1e-12, atol=0)


def test_loss_aware_forgets_all_but_the_last_losses() -> None:
    rule = filled(torch.tensor([[100.0, 100.0], [1.0, 1.0]]), uniform=1e-9)
    for loss in (3.0, 3.0):
        rule.update(torch.tensor([1]), torch.tensor([loss]))
    expected = torch.tensor([0.75, 0.25], dtype=torch.float64)
    torch.testing.assert_close(rule.probabilities(), expected, rtol=1e-6, atol=0)


def test_loss_aware_takes_several_losses_of_one_step_in_one_update() -> None:
    rule = LossAwareTimesteps(2, history=2, uniform=1e-9)
    rule.update(torch.tensor([1, 2, 1, 2]), torch.tensor([3.0, 1.0, 5.0, 1.0]))
    root = torch.tensor([17.0**0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(rule.probabilities(), root / root.sum(), rtol=1e-6, atol=0)


def test_loss_aware_draws_from_its_probabilities_with_weight_one_over_p() -> None:
    rule = filled(torch.arange(1.0, 11.0).unsqueeze(1), uniform=0.1)
    t, w = one(rule, 20_000, 10, seeded())
    p = rule.probabilities()
    assert chi_square(t, p) < CHI_SQUARE_9
    torch.testing.assert_close(w, 1 / p[t - 1], rtol=1e-12, atol=0)


def test_the_share_of_uniform_draws_bounds_the_weights() -> None:
    rule = filled(torch.tensor([[1e9], [1e-9]]), uniform=0.01)
    assert float((1 / rule.probabilities()).max()) <= 2 / 0.01 * (1 + 1e-12)


def test_loss_aware_with_losses_all_zero_stays_uniform() -> None:
    p = filled(torch.zeros(4, 2)).probabilities()
    assert torch.equal(p, torch.full((4,), 0.25, dtype=torch.float64))


def test_loss_aware_state_goes_round_trip() -> None:
    rule, other = filled(torch.rand(5, 3)), LossAwareTimesteps(5, history=3)
    assert not torch.equal(rule.probabilities(), other.probabilities())
    other.load_state_dict(rule.state_dict())
    assert torch.equal(rule.probabilities(), other.probabilities())
    for either in (rule, other):  # the place of the next loss is part of the state
        either.update(torch.tensor([2]), torch.tensor([9.0]))
    assert torch.equal(rule.losses, other.losses)


@pytest.mark.parametrize(
    "arguments", [(0, 1, 0.1), (3, 0, 0.1), (3, 1, 0.0), (3, 1, 1.5), (3, 1, float("nan"))]
)
def test_loss_aware_refuses(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="Expected num_steps >= 1, history >= 1"):
        LossAwareTimesteps(*arguments)


def test_loss_aware_refuses_a_chain_of_another_length() -> None:
    with pytest.raises(ValueError, match="Expected a chain of 5 steps; got 6"):
        one(LossAwareTimesteps(5), 2, 6)
