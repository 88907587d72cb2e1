"""Models evaluated together, with the same noise for all: common random numbers.

A sample's noise is a function of (seed, index, path), so that one seed gives every model the same,
and what the noise adds to one value it adds to the other: their difference varies less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.comparison.comparing import compare_evaluated
from pyrodiff.comparison.paired import Evaluated
from pyrodiff.comparison.summary import Comparison
from pyrodiff.likelihood import Estimator, LogLikelihood
from pyrodiff.likelihood.path import check_count
from pyrodiff.streams import derived_seed

__all__ = ["compare_models", "evaluated", "repeat_seeds"]


def compare_models(
    models: Mapping[str, ReverseChain | Sequence[ReverseChain]],
    x_0: Tensor,
    estimator: Estimator | Mapping[str, Estimator],
    *,
    seed: int = 0,
    repeats: int = 1,
    batch_size: int = 256,
    context: Tensor | None = None,
    reference: str | None = None,
    clusters: Sequence[object] | Tensor | None = None,
    paired_seeds: bool = False,
    level: float = 0.95,
) -> Comparison:
    """Evaluate models on the same samples with the same noise, and compare them.

    Args:
        models: for each name a model, or several that differ in their training seed alone.
        x_0: held-out data, shape (N, *event_shape).
        estimator: one for all, or one per name (each model's own pilot).
        seed: of the noise streams.
        repeats: R, evaluations with noise of their own, whose mean is taken, at R times the calls.
            Their spread tells the Monte Carlo error of a difference where the estimator keeps no
            weights (``TermwiseBound``); path and importance bounds need no repeats for that.
        batch_size: rows per network call, at most.
        context: shape (N, …) or None.
        reference, clusters, paired_seeds, level: as of ``compare``.

    Raises:
        ValueError: ``repeats`` < 1, names without an estimator; what ``compare`` and the estimator
            raise.
    """
    check_count("repeats", repeats)
    if not isinstance(estimator, Estimator) and (missing := sorted(set(models) - set(estimator))):
        raise ValueError(f"Expected an estimator for every model; got none for {missing}.")
    seeds = repeat_seeds(seed, repeats)
    options: dict[str, Any] = {"batch_size": batch_size, "context": context}
    found = {}
    for name, given in models.items():
        own = estimator if isinstance(estimator, Estimator) else estimator[name]
        several = [given] if isinstance(given, ReverseChain) else list(given)
        if not several:
            raise ValueError(f"Expected at least one model of {name!r}; got none.")
        runs = [[own.estimate(m, x_0, seed=s, **options) for s in seeds] for m in several]
        found[name] = evaluated(runs)
    # without draws it is not known how much of the noise the models have in common
    return compare_evaluated(found, reference, clusters, paired_seeds, None, level)


def repeat_seeds(seed: int, repeats: int) -> list[int]:
    """A seed for each repeat of an evaluation; ``seed`` itself where there is one."""
    return [seed] if repeats == 1 else [derived_seed(seed, word) for word in range(repeats)]


def evaluated(runs: Sequence[Sequence[LogLikelihood]]) -> Evaluated:
    """From the repeats of each training seed."""
    if len(runs[0]) == 1:
        return Evaluated([repeats[0] for repeats in runs])
    values = [torch.stack([result.value for result in repeats], 1).double() for repeats in runs]
    return Evaluated([_mean(repeats) for repeats in runs], values)


def _mean(repeats: Sequence[LogLikelihood]) -> LogLikelihood:
    """The mean of evaluations with independent noise, a result that keeps no draws."""
    first, count = repeats[0], len(repeats)
    values = torch.stack([result.value for result in repeats], 1)
    errors = torch.stack([result.std_error for result in repeats], 1)
    freedom = [result.degrees_of_freedom for result in repeats]
    known = [each for each in freedom if each is not None]
    return replace(
        first,
        value=values.mean(1),
        std_error=errors.square().sum(1).sqrt() / count,
        calls=torch.stack([result.calls for result in repeats]).sum(0),
        degrees_of_freedom=torch.stack(known).sum(0) if len(known) == count else None,
        terms=None,
        timesteps=None,
        log_weights=None,
        reference=None,
        estimator=f"mean of {count} × {first.estimator}",
    )
