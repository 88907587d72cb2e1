"""Models evaluated together, with the same noise for all: common random numbers.

A sample's noise is a function of (seed, index, path), so that one seed gives every model the same,
and what the noise adds to one value it adds to the other: their difference varies less.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.comparison.comparing import check_request, compare
from pyrodiff.comparison.summary import Comparison
from pyrodiff.likelihood import Estimator
from pyrodiff.streams import derived_seed

__all__ = ["compare_models", "repeat_seeds"]


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
    listed = {
        name: [given] if isinstance(given, ReverseChain) else list(given)
        for name, given in models.items()
    }
    counts = {name: len(several) for name, several in listed.items()}
    check_request(counts, reference, paired_seeds, level)
    options: dict[str, Any] = {"batch_size": batch_size, "context": context}
    found = {}
    for name, several in listed.items():
        own = estimator if isinstance(estimator, Estimator) else estimator[name]
        found[name] = [
            [own.estimate(model, x_0, seed=each, **options) for each in repeat_seeds(seed, repeats)]
            for model in several
        ]
    return compare(
        found, reference=reference, clusters=clusters, paired_seeds=paired_seeds, level=level
    )


def repeat_seeds(seed: int, repeats: int) -> list[int]:
    """A seed for each repeat of an evaluation; ``seed`` itself where there is one."""
    return [seed] if repeats == 1 else [derived_seed(seed, word) for word in range(repeats)]
