"""The comparison of several models: results are read, checked to be of the same samples, paired."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrodiff.comparison.evaluated import Evaluated
from pyrodiff.comparison.paired import Design, Difference, mean_error, monte_carlo, own_error
from pyrodiff.comparison.summary import Comparison, Summary
from pyrodiff.comparison.verdict import gap, judge
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.result import read_result
from pyrodiff.likelihood.samples import check_samples, same_model

__all__ = ["check_request", "compare"]

Result = LogLikelihood | str | Path
_SAME = ("data", "split", "samples_checksum")  # attributes of files that must agree


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, LogLikelihood | str | Path) else list(given)


def _read(path: Result) -> tuple[LogLikelihood, dict[str, Any]]:
    """A result and what its file says of it beside."""
    if isinstance(path, LogLikelihood):
        return path, {}
    return read_result(path)


def _check_same(name: str, values: Sequence[object], what: str) -> None:
    if len(set(values)) > 1:
        raise ValueError(
            f"Expected results of the same {what}; got {name}: {sorted(set(values), key=str)}."
        )


def _read_all(
    results: Mapping[str, Result | Sequence[Result | Sequence[Result]]],
) -> tuple[dict[str, Evaluated], list[dict[str, Any]], tuple[str, ...]]:
    """The models, what files say of their results, and notes on whether samples are the same."""
    held = {
        name: [[_read(each) for each in _listed(run)] for run in _listed(given)]
        for name, given in results.items()
    }
    for name, runs in held.items():
        if not all(runs):
            raise ValueError(f"Expected at least one result of {name!r}; got none.")
    every = [pair for runs in held.values() for run in runs for pair in run]
    for key in _SAME:
        _check_same(key, [told[key] for _, told in every if key in told], "samples")
    named = [(name, result) for name, runs in held.items() for run in runs for result, _ in run]
    notes = check_samples(named)
    models = {
        name: Evaluated.of([[result for result, _ in run] for run in runs])
        for name, runs in held.items()
    }
    _check(models)
    return models, [told for _, told in every], notes


def _check(models: Mapping[str, Evaluated]) -> None:
    """Refuse what has no mean, or is no other training seed."""
    for name, model in models.items():
        kinds = sorted({result.kind for result in model.results})
        if len(kinds) > 1:
            raise ValueError(f"Expected results of {name!r} to be of one kind; got {kinds}.")
        if any(same_model(*pair) for pair in combinations(model.results, 2)):
            raise ValueError(
                f"Expected results of {name!r} from different training seeds; got one trained "
                "model twice. Evaluations with other noise go into a list of their own: [[a, b]]."
            )
        finite = model.values.isfinite()
        if not bool(finite.all()):
            count = int((~finite).sum())
            raise ValueError(f"Expected finite values; got {count} of {name!r} that are not.")


def check_request(
    counts: Mapping[str, int], reference: str | None, paired_seeds: bool, level: float
) -> None:
    """Raise ValueError for what no comparison can be; before anything is evaluated.

    Args:
        counts: training seeds of each model.
        reference, paired_seeds, level: as of ``compare``.
    """
    if len(counts) < 2:
        raise ValueError(f"Expected at least two models; got {len(counts)}.")
    if not 0 < level < 1:
        raise ValueError(f"Expected a level between 0 and 1; got {level}.")
    if reference is not None and reference not in counts:
        raise ValueError(f"Expected a reference among {list(counts)}; got {reference!r}.")
    for name, count in counts.items():
        if count == 0:
            raise ValueError(f"Expected at least one training seed of {name!r}; got none.")
    if paired_seeds and (len(set(counts.values())) > 1 or min(counts.values()) < 2):
        raise ValueError(
            "Expected for paired seeds the same number of training seeds of every model, at least "
            f"2; got {dict(counts)}."
        )


def _clusters(clusters: Sequence[object] | Tensor | None, samples: int) -> Tensor:
    """Labels as 0 … G − 1, shape (N,)."""
    if clusters is None:
        return torch.arange(samples)
    labels = clusters.tolist() if isinstance(clusters, Tensor) else list(clusters)
    if len(labels) != samples:
        raise ValueError(f"Expected {samples} clusters, one per sample; got {len(labels)}.")
    index = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([index[label] for label in labels])


def _common(held: Sequence[dict[str, Any]]) -> bool | None:
    """Whether files say that their noise was the same (one seed, one estimator), or not."""
    seeds = [int(each["seed"]) for each in held if "seed" in each]
    if len(seeds) < len(held):
        return None
    if len(set(seeds)) > 1:
        return False if len(set(seeds)) == len(seeds) else None
    return True if len({each.get("estimator") for each in held}) == 1 else None


# -- the comparison --------------------------------------------------------------------------------


def compare(
    results: Mapping[str, Result | Sequence[Result | Sequence[Result]]],
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
            all models with one noise, or all with noise of their own.
        reference: the model that the others are compared with, named before it is known how they
            come out; default the best, for which the intervals are wider (all pairs count).
        clusters: a label per sample, where samples of one label belong together (a patient's
            images): then the clusters are what is independent.
        paired_seeds: whether the lists are in one order of training seeds that mean the same to
            every model (the same first weights, the same batches): then what the models owe to a
            seed alike cancels in the difference.
        common_noise: whether the same noise streams were used (one ``seed``, one estimator), for
            results that do not hold their draws; None: what the files say, else unknown, and the
            Monte Carlo part of the error with it (not the error, which holds it).
        level: of all intervals together.  A verdict other than "not decided" is wrong with a
            probability of at most (1 − level)/2, over all of them.

    Raises:
        ValueError: fewer than two models, a model without results, results of different samples
            as far as they know them, values that are not finite, an unknown reference, clusters
            that are not one per sample, one trained model as two training seeds, repeats of
            different numbers or models, paired seeds of which the models have different numbers or
            one, a level outside (0, 1).
        FileNotFoundError: a path where there is no result.

    Examples:
        >>> def exact(log_p):  # an estimator would give this, and its Monte Carlo error
        ...     none = torch.zeros(len(log_p), dtype=torch.int64)
        ...     return LogLikelihood(log_p, 0 * log_p, "estimate", none, 1, "exact")
        >>> x = torch.linspace(-2, 2, 9, dtype=torch.float64)
        >>> wide, narrow = torch.distributions.Normal(0, 1.5), torch.distributions.Normal(0, 0.8)
        >>> found = compare({"wide": exact(wide.log_prob(x)), "narrow": exact(narrow.log_prob(x))})
        >>> list(found.models), round(found["narrow"].value, 3), round(found["narrow"].std_error, 3)
        (['wide', 'narrow'], -0.303, 0.289)
    """
    counts = {name: len(_listed(given)) for name, given in results.items()}
    check_request(counts, reference, paired_seeds, level)
    models, attributes, notes = _read_all(results)
    common = _common(attributes) if common_noise is None else common_noise
    samples = len(next(iter(models.values())).results[0].value)
    pairs = len(models) * (len(models) - 1) // 2 if reference is None else len(models) - 1
    design = Design(_clusters(clusters, samples), paired_seeds, common, level, pairs)
    summaries = {name: _summary(model, design.clusters) for name, model in models.items()}
    order = sorted(models, key=lambda name: summaries[name].value, reverse=True)
    reference = order[0] if reference is None else reference
    pair = (reference, models[reference])
    differences = tuple(
        _difference((name, models[name]), pair, design) for name in order if name != reference
    )
    return Comparison(
        {name: summaries[name] for name in order},
        reference,
        differences,
        samples,
        level,
        _notes(models, differences) + notes,
    )


def _summary(model: Evaluated, clusters: Tensor) -> Summary:
    values, lacking = model.values, gap(model)
    error = mean_error(values.mean(0), [values], clusters)
    calls = [result.network_evaluations for result in model.results]
    return Summary(
        float(values.mean()),
        error.std_error,
        own_error(model, model.shares),
        model.results[0].kind,
        len(values),
        sum(calls) / len(calls),
        math.nan if lacking is None else float(lacking.mean()),
    )


def _difference(
    model: tuple[str, Evaluated],
    reference: tuple[str, Evaluated],
    design: Design,
) -> Difference:
    (name, a), (other, b) = model, reference
    d = a.values.mean(0) - b.values.mean(0)
    error = design.error(d, a, b)
    value, half = float(d.mean()), error.half_width(design.interval_level)
    verdict = judge(a, b, d, design)
    text = verdict.text.replace("{a}", name).replace("{b}", other)
    return Difference(
        name,
        other,
        value,
        error.std_error,
        error.between_samples,
        error.between_seeds,
        *monte_carlo(a, b, design.common),
        error.degrees_of_freedom,
        value - half,
        value + half,
        error.probability(value),
        verdict.status,
        text,
        d,
        verdict.advice,
    )


def _notes(models: Mapping[str, Evaluated], found: Sequence[Difference]) -> tuple[str, ...]:
    seeds = {name: len(model.results) for name, model in models.items()}
    notes = []
    if max(seeds.values()) == 1:
        notes.append("One training run per model: the errors say nothing of other seeds.")
    elif min(seeds.values()) == 1:
        alone = ", ".join(name for name, count in seeds.items() if count == 1)
        notes.append(f"One training run of {alone}: the errors say nothing of its other seeds.")
    if any(math.isnan(each.monte_carlo) for each in found):
        notes.append(
            "The Monte Carlo part of a difference is unknown, as the results do not hold draws "
            "that pair up and may share their noise; the error holds it. (compare_models with "
            "repeats=2 tells.)"
        )
    return tuple(notes)
