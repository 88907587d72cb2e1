"""Models evaluated together, with the same noise for all: common random numbers.

A sample's noise is a function of (seed, index, path), so that one seed gives every model the same
noise.  What it adds to the value of one model it adds to that of the other, too, and their
difference varies less.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from pyrodiff.chains import ReverseChain
from pyrodiff.checks import check_count
from pyrodiff.comparison.comparing import compare
from pyrodiff.comparison.comparison import Comparison
from pyrodiff.comparison.inputs import check_request
from pyrodiff.likelihood import Estimator, LogLikelihood
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
        estimator: one for all, or one per name (where each model has its own pilot).
        seed: of the noise streams.
        repeats: R, evaluations with independent noise, whose mean is taken, at R times the calls.
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
    estimators = _by_name(models, estimator)
    by_seed = {
        name: [model] if isinstance(model, ReverseChain) else list(model)
        for name, model in models.items()
    }
    counts = {name: len(chains) for name, chains in by_seed.items()}
    check_request(counts, reference, paired_seeds, level)

    def evaluate(name: str, model: ReverseChain) -> list[LogLikelihood]:
        return [
            estimators[name].estimate(
                model, x_0, seed=noise, batch_size=batch_size, context=context
            )
            for noise in repeat_seeds(seed, repeats)
        ]

    results = {name: [evaluate(name, model) for model in by_seed[name]] for name in by_seed}
    return compare(
        results, reference=reference, clusters=clusters, paired_seeds=paired_seeds, level=level
    )


def _by_name(
    models: Mapping[str, object], estimator: Estimator | Mapping[str, Estimator]
) -> Mapping[str, Estimator]:
    """An estimator for every model."""
    if isinstance(estimator, Estimator):
        return dict.fromkeys(models, estimator)
    if missing := sorted(set(models) - set(estimator)):
        raise ValueError(f"Expected an estimator for every model; got none for {missing}.")
    return estimator


def repeat_seeds(seed: int, repeats: int) -> list[int]:
    """A seed for each repeat of an evaluation; ``seed`` itself where there is only one."""
    return [seed] if repeats == 1 else [derived_seed(seed, word) for word in range(repeats)]
