"""The results of one model: one per training seed, with the draws that their values are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.statistics import log_mean_exp

__all__ = ["ModelResults", "draws_of"]


@dataclass(frozen=True, eq=False)
class ModelResults:
    """One model's results, one per training seed.

    Args:
        results: of the same samples.
        repeats: for each result, the values of which it is the mean, (N, R); or None.
    """

    results: Sequence[LogLikelihood]
    repeats: Sequence[Tensor] | None = None

    @classmethod
    def of(cls, runs: Sequence[Sequence[LogLikelihood]]) -> "ModelResults":
        """From the repeated evaluations of each training seed.

        Raises:
            ValueError: different numbers of repeats; repeats of several models or estimators, or
                with the same noise.
        """
        counts = [len(repeats) for repeats in runs]
        if len(set(counts)) > 1:
            raise ValueError(f"Expected as many repeats of every training seed; got {counts}.")
        for repeats in runs:
            _check_repeats(repeats)
        if counts[0] == 1:
            return cls([repeats[0] for repeats in runs])
        values = [torch.stack([result.value for result in repeats], 1).double() for repeats in runs]
        return cls([_mean(repeats) for repeats in runs], values)

    @property
    def values(self) -> Tensor:
        """v, nats, shape (S, N), float64."""
        return torch.stack([result.value.double() for result in self.results])

    @property
    def std_errors(self) -> Tensor:
        """The Monte Carlo standard errors, nats, shape (S, N), float64."""
        return torch.stack([result.std_error.double() for result in self.results])

    @property
    def influences(self) -> Tensor | None:
        """mean_s φ, shape (N, K), or None where the results do not keep their draws."""
        if self.repeats is not None:
            per_seed: list[Tensor | None] = [_centered(values) for values in self.repeats]
        else:
            per_seed = [_influences(result) for result in self.results]
        influences = [influence for influence in per_seed if influence is not None]
        if len(influences) < len(per_seed) or len({each.shape for each in influences}) > 1:
            return None
        return torch.stack(influences).mean(0)


def _check_repeats(repeats: Sequence[LogLikelihood]) -> None:
    """Raise ValueError unless these evaluate one model repeatedly, with different noise."""
    attributes: dict[str, set[str]] = {
        "models": {result.model for result in repeats if result.model},
        "kinds": {str(result.kind) for result in repeats},
        "estimators": {result.estimator.partition("(")[0] for result in repeats},
    }
    for attribute, values in attributes.items():
        if len(values) > 1:
            got = ", ".join(sorted(values))
            raise ValueError(f"Expected repeats of one model and estimator; got {attribute} {got}.")
    for one, other in combinations(repeats, 2):
        if torch.equal(one.value, other.value) and bool((one.std_error != 0).any()):
            raise ValueError("Expected repeats with other noise; got the same values twice.")


def _mean(repeats: Sequence[LogLikelihood]) -> LogLikelihood:
    """The mean of evaluations with independent noise: a result without draws."""
    first, count = repeats[0], len(repeats)
    values = torch.stack([result.value for result in repeats], 1)
    errors = torch.stack([result.std_error for result in repeats], 1)
    freedom = [r.degrees_of_freedom for r in repeats if r.degrees_of_freedom is not None]
    return replace(
        first,
        value=values.mean(1),
        std_error=errors.square().sum(1).sqrt() / count,
        calls=torch.stack([result.calls for result in repeats]).sum(0),
        degrees_of_freedom=torch.stack(freedom).sum(0) if len(freedom) == count else None,
        terms=None,
        timesteps=None,
        log_weights=None,
        reference=None,
        estimator=f"mean of {count} × {first.estimator}",
        unbiased_weights=False,
    )


def _centered(values: Tensor) -> Tensor | None:
    """φ of a mean over the last axis; None for one draw."""
    count = values.shape[1]
    return (values - values.mean(1, keepdim=True)) / count if count > 1 else None


def draws_of(result: LogLikelihood) -> str | None:
    """What the value is of the result's log weights: ``"mean"``, ``"log mean"`` or None."""
    log_w = result.log_weights
    # one weight of an upper bound is a posterior path's, and not distributed like the others
    if log_w is None or result.kind == "upper bound" or not bool(log_w.isfinite().all()):
        return None
    log_w = log_w.double()
    for name, value in (("mean", log_w.mean(1)), ("log mean", log_mean_exp(log_w))):
        if torch.allclose(value, result.value.double(), rtol=1e-6, atol=1e-6):
            return name
    return None


def _influences(result: LogLikelihood) -> Tensor | None:
    """φ of one result, shape (N, K); None where it does not keep its draws."""
    kind, log_w = draws_of(result), result.log_weights
    if kind is None or log_w is None or log_w.shape[1] < 2:
        return None
    log_w = log_w.double()
    return _centered(log_w) if kind == "mean" else log_w.softmax(1) - 1 / log_w.shape[1]
