"""The interface of estimators: one of a user's own, their words, and their former words."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pyrodiff import ForwardChain, ReverseChain
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.likelihood import (
    Batch,
    Estimator,
    ImportanceBound,
    LogLikelihood,
    PathBound,
    Pilot,
    ProbabilityFlow,
    SandwichBound,
    TermwiseBound,
)
from pyrodiff.likelihood.paths.weights import path_weights
from pyrodiff.likelihood.statistics import mean_of_draws
from pyrodiff.oracles import GaussianMixture
from pyrodiff.schedules import LogSNRSchedule

F64 = torch.float64
LAW = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.3)
X_0 = LAW.sample(20, seed=1)


def chain(num_steps: int = 10) -> ReverseChain:
    forward = ForwardChain(LogSNRSchedule(3.0, -4.0), num_steps)
    return ReverseChain(NoiseDenoiser(LAW.network()), forward, (1,))


@dataclass(frozen=True)
class TrimmedBound(Estimator):
    """As in the docstring of ``pyrodiff.likelihood.estimator``."""

    particles: int = 8

    def estimate_batch(self, reverse: ReverseChain, batch: Batch) -> LogLikelihood:
        log_w = path_weights(reverse, batch, self.particles).sort(1).values[:, 1:]
        calls = self.particles * reverse.num_steps
        summary = mean_of_draws(log_w)
        return self.result(reverse, summary, kind="estimate", calls=calls, log_weights=log_w)


@dataclass(frozen=True)
class Picky(TrimmedBound):
    """Serves long chains alone, works on one sample at a time, and looks at the whole result."""

    def check(self, reverse: ReverseChain) -> None:
        if reverse.num_steps < 10:
            raise ValueError(f"Expected a long chain; got {reverse.num_steps} steps.")

    def samples_per_batch(self, batch_size: int) -> int:
        return 1

    def review(self, result: LogLikelihood) -> None:
        raise RuntimeError(f"{len(result.value)} samples of {result.estimator}")


def test_an_estimator_of_ones_own_is_one_method() -> None:
    result = TrimmedBound(5).estimate(chain(), X_0, seed=3)
    paths = PathBound(particles=5).estimate(chain(), X_0, seed=3)
    assert paths.log_weights is not None
    torch.testing.assert_close(result.value, paths.log_weights.sort(1).values[:, 1:].mean(1))
    assert result.estimator == "TrimmedBound(particles=5)" and result.kind == "estimate"
    assert result.network_evaluations == 50 and result.dimensions == 1
    assert result.model == paths.model and torch.equal(result.checksums, paths.checksums)
    split = TrimmedBound(5).estimate(chain(), X_0, seed=3, batch_size=3)
    torch.testing.assert_close(split.value, result.value, rtol=1e-12, atol=1e-12)


def test_the_other_hooks_are_called_with_what_they_are_for() -> None:
    progress: list[int] = []
    with pytest.raises(RuntimeError, match=r"^20 samples of Picky\(particles=8\)$"):
        Picky().estimate(chain(), X_0, progress=lambda done, _: progress.append(done))
    assert progress == list(range(1, 21))
    with pytest.raises(ValueError, match="Expected a long chain; got 9 steps"):
        Picky().estimate(chain(9), X_0)


def test_a_selected_batch_holds_what_belongs_to_its_samples() -> None:
    batch = Batch(X_0[:4], torch.arange(4.0), [7, 8, 9, 10], seed=1, rows=2)
    some = batch.select([3, 1])
    assert torch.equal(some.x_0, X_0[[3, 1]]) and some.indices == [10, 8] and len(some) == 2
    assert some.context is not None and some.context.tolist() == [3, 1]
    assert some.failures is batch.failures and (some.seed, some.rows) == (1, 2)


FORMER: dict[str, tuple[type[Estimator], str]] = {
    "evaluations": (TermwiseBound, "calls"),
    "paths": (PathBound, "particles"),
    "draws": (ProbabilityFlow, "particles"),
}


@pytest.mark.parametrize("former", FORMER)
def test_former_words_keep_working(former: str) -> None:
    estimator, present = FORMER[former]
    one, other = estimator(**{former: 3}), estimator(**{present: 3})
    assert one == other and getattr(one, former) == getattr(one, present) == 3
    assert repr(one) == repr(other) and f"{present}=3" in repr(one) and former not in repr(one)


def test_a_pilot_is_fitted_under_its_former_word_too() -> None:
    one, other = (make(chain(), X_0, calls=1000) for make in (Pilot.fit, Pilot.run))
    assert one.calls == other.calls and torch.equal(one.coefficients, other.coefficients)


def test_a_sandwich_of_data_is_its_lower_half() -> None:
    bound = SandwichBound(9)
    assert isinstance(bound, Estimator)
    result = bound.estimate(chain(), X_0, seed=4, indices=range(5, 25))
    expected = ImportanceBound(9).estimate(chain(), X_0, seed=4, indices=range(5, 25))
    torch.testing.assert_close(result.value, expected.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.std_error, expected.std_error, rtol=1e-9, atol=1e-12)
    assert result.kind == "lower bound" and torch.equal(result.calls, expected.calls)


def test_a_sandwich_of_its_own_samples_bounds_them_as_data_from_below() -> None:
    sandwich = SandwichBound(9).estimate(chain(), 6, seed=2)
    as_data: Tensor = SandwichBound(9).estimate(chain(), sandwich.x_0, seed=2).value
    torch.testing.assert_close(sandwich.lower.value, as_data, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sandwich.x_0, chain().sample(6, seed=2), rtol=1e-12, atol=1e-12)
