"""The comparison of several models by their results for the same held-out samples."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from pyrodiff.comparison import monte_carlo
from pyrodiff.comparison.comparison import Comparison, Summary
from pyrodiff.comparison.design import Design
from pyrodiff.comparison.difference import Difference
from pyrodiff.comparison.errors import standard_error
from pyrodiff.comparison.inputs import (
    Inputs,
    Runs,
    check_request,
    cluster_labels,
    count_seeds,
    read_inputs,
)
from pyrodiff.comparison.looseness import gap
from pyrodiff.comparison.model_results import ModelResults
from pyrodiff.comparison.verdict import judge

__all__ = ["compare"]


class _Named(NamedTuple):
    """A model's name and results."""

    name: str
    results: ModelResults


def compare(
    results: Mapping[str, Runs],
    *,
    reference: str | None = None,
    clusters: Sequence[object] | Tensor | None = None,
    paired_seeds: bool = False,
    common_noise: bool | None = None,
    level: float = 0.95,
) -> Comparison:
    """Compare models by their results for the same held-out samples, in the same order.

    Args:
        results: for each model a result, the path of a saved one, or a list of them: one per
            training seed.  In the place of a result may stand a list of repeats with other noise,
            whose mean is taken and whose spread tells the Monte Carlo error: the n-th repeats of
            all models with the same noise, or all with independent noise.
        reference: the model that the others are compared with, named before the outcome is known;
            default the best, for which the intervals are wider (all pairs count).
        clusters: a label per sample, where samples of one label belong together (a patient's
            images): then the clusters are independent, not the samples.
        paired_seeds: whether the lists are in the same order of training seeds, and a seed means
            the same to every model (the same first weights, the same batches): then the effects
            that a seed has on all models cancel in the difference.
        common_noise: whether the same noise streams were used (one ``seed``, one estimator), for
            results that do not keep their draws; None: what the files say.  Where that is unknown,
            so is the Monte Carlo part of the error; the error itself includes it and is known.
        level: of all intervals together.  A verdict other than "not decided" is wrong with a
            probability of at most (1 − level)/2, over all of them.

    Raises:
        ValueError: fewer than two models, a model without results, results of different samples
            (as far as they identify them), values that are not finite, an unknown reference, a
            number of clusters that is not that of the samples, one trained model as two training
            seeds, repeats of different numbers or models, paired seeds where the models have
            different numbers of seeds or one, a level outside (0, 1).
        FileNotFoundError: a path where there is no result.

    Examples:
        >>> import torch
        >>> from pyrodiff.likelihood import LogLikelihood
        >>> def exact(log_p):  # an estimator would give this, and its Monte Carlo error
        ...     calls = torch.zeros(len(log_p), dtype=torch.int64)
        ...     return LogLikelihood(log_p, 0 * log_p, "estimate", calls, 1, "exact")
        >>> x = torch.linspace(-2, 2, 9, dtype=torch.float64)
        >>> wide, narrow = torch.distributions.Normal(0, 1.5), torch.distributions.Normal(0, 0.8)
        >>> log_p = {"wide": exact(wide.log_prob(x)), "narrow": exact(narrow.log_prob(x))}
        >>> comparison = compare(log_p)
        >>> list(comparison.models), round(comparison["narrow"].value, 3)
        (['wide', 'narrow'], -0.303)
        >>> round(comparison["narrow"].std_error, 3)
        0.289
    """
    check_request(count_seeds(results), reference, paired_seeds, level)
    inputs = read_inputs(results)
    design = Design(
        clusters=cluster_labels(clusters, inputs.samples),
        paired_seeds=paired_seeds,
        common_noise=inputs.common_noise if common_noise is None else common_noise,
        level=level,
        pairs=_number_of_pairs(len(inputs.models), reference),
    )
    return _comparison(inputs, design, reference)


def _number_of_pairs(models: int, reference: str | None) -> int:
    """m: all pairs of models, or those with a reference that was named."""
    return models * (models - 1) // 2 if reference is None else models - 1


def _comparison(inputs: Inputs, design: Design, reference: str | None) -> Comparison:
    """Means and differences, the best model first, which is the reference unless one is named."""
    models = inputs.models
    summaries = {name: _summary(model, design.clusters) for name, model in models.items()}
    order = sorted(models, key=lambda name: summaries[name].value, reverse=True)
    reference = order[0] if reference is None else reference
    base = _Named(reference, models[reference])
    others = [_Named(name, models[name]) for name in order if name != reference]
    differences = tuple(_difference(model, base, design) for model in others)
    return Comparison(
        models={name: summaries[name] for name in order},
        reference=reference,
        differences=differences,
        samples=inputs.samples,
        level=design.level,
        notes=_notes(models, differences) + inputs.notes,
    )


def _summary(model: ModelResults, clusters: Tensor) -> Summary:
    values, missing = model.values, gap(model)
    calls = [result.network_evaluations for result in model.results]
    return Summary(
        value=float(values.mean()),
        std_error=standard_error(values.mean(0), [values], clusters).std_error,
        monte_carlo=monte_carlo.mean_error(model),
        kind=model.results[0].kind,
        seeds=len(values),
        calls=sum(calls) / len(calls),
        gap=math.nan if missing is None else float(missing.mean()),
    )


def _difference(model: _Named, reference: _Named, design: Design) -> Difference:
    a, b = model.results, reference.results
    d = a.values.mean(0) - b.values.mean(0)
    error = design.error(d, a, b)
    value, half_width = float(d.mean()), error.half_width(design.interval_level)
    noise, independent = monte_carlo.difference_error(a, b, design.common_noise)
    verdict = judge(a, b, d, design)
    return Difference(
        model=model.name,
        reference=reference.name,
        value=value,
        std_error=error.std_error,
        between_samples=error.between_samples,
        between_seeds=error.between_seeds,
        monte_carlo=noise,
        independent=independent,
        degrees_of_freedom=error.degrees_of_freedom,
        low=value - half_width,
        high=value + half_width,
        probability=error.probability(value),
        status=verdict.status,
        verdict=verdict.text.replace("{a}", model.name).replace("{b}", reference.name),
        per_sample=d,
        advice=verdict.advice,
    )


def _notes(
    models: Mapping[str, ModelResults], differences: Sequence[Difference]
) -> tuple[str, ...]:
    """What a reader has to know about the errors."""
    seeds = {name: len(model.results) for name, model in models.items()}
    notes = []
    if max(seeds.values()) == 1:
        notes.append("One training run per model: the errors say nothing of other seeds.")
    elif min(seeds.values()) == 1:
        alone = ", ".join(name for name, count in seeds.items() if count == 1)
        notes.append(f"One training run of {alone}: the errors say nothing of its other seeds.")
    if any(math.isnan(difference.monte_carlo) for difference in differences):
        notes.append(
            "The Monte Carlo part of a difference is unknown: the results keep no draws that pair "
            "up, and may share their noise. The error includes it. (compare_models with repeats=2 "
            "measures it.)"
        )
    return tuple(notes)
