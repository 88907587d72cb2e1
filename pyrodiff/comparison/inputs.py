"""What is compared: results are read, and checked to belong together."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyrodiff.comparison.model_results import ModelResults
from pyrodiff.likelihood import LogLikelihood
from pyrodiff.likelihood.result import read_result
from pyrodiff.likelihood.samples import check_samples, same_model

__all__ = ["Inputs", "Runs", "check_request", "cluster_labels", "count_seeds", "read_inputs"]

Result: TypeAlias = LogLikelihood | str | Path
Runs: TypeAlias = Result | Sequence[Result | Sequence[Result]]
"""A model's result, or a list of one per training seed, each of which may be a list of repeats."""

_IDENTITY = ("data", "split", "samples_checksum")  # attributes of files that have to agree


class Inputs(NamedTuple):
    """Models by name, and what is known of all their results together.

    Args:
        models: each one's results by training seed.
        common_noise: whether files say that the noise was the same, or different; None: unknown.
        notes: on samples that cannot be checked.
    """

    models: dict[str, ModelResults]
    common_noise: bool | None
    notes: tuple[str, ...]

    @property
    def samples(self) -> int:
        """N, the same for all results."""
        return len(next(iter(self.models.values())).results[0].value)


class _Entry(NamedTuple):
    """A result and the attributes of its file; none for one in memory."""

    result: LogLikelihood
    attributes: Mapping[str, object]


def _as_list(runs: Runs | Result | Sequence[Result]) -> list[Result | Sequence[Result]]:
    return [runs] if isinstance(runs, LogLikelihood | str | Path) else list(runs)


def count_seeds(results: Mapping[str, Runs]) -> dict[str, int]:
    """The number of training seeds of each model."""
    return {name: len(_as_list(runs)) for name, runs in results.items()}


def check_request(
    counts: Mapping[str, int], reference: str | None, paired_seeds: bool, level: float
) -> None:
    """Raise ValueError for an impossible comparison, before anything is evaluated.

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


def read_inputs(results: Mapping[str, Runs]) -> Inputs:
    """Read what is stored in files, and check that all results can be compared.

    Raises:
        ValueError: a model without results or with unsuitable ones, results of other samples.
        FileNotFoundError: a path where there is no result.
    """
    entries = {
        name: [[_read(result) for result in _as_list(run)] for run in _as_list(runs)]
        for name, runs in results.items()
    }
    for name, by_seed in entries.items():
        if not all(by_seed):
            raise ValueError(f"Expected at least one result of {name!r}; got none.")
    named = [(name, entry) for name, runs in entries.items() for run in runs for entry in run]
    attributes = [entry.attributes for _, entry in named]
    for key in _IDENTITY:
        _check_equal(key, [values[key] for values in attributes if key in values])
    notes = check_samples([(name, entry.result) for name, entry in named])
    models = {
        name: ModelResults.of([[entry.result for entry in run] for run in by_seed])
        for name, by_seed in entries.items()
    }
    for name, model in models.items():
        _check_model(name, model)
    return Inputs(models, _common_noise(attributes), notes)


def _read(result: Result | Sequence[Result]) -> _Entry:
    if isinstance(result, LogLikelihood):
        return _Entry(result, {})
    assert isinstance(result, str | Path)
    return _Entry(*read_result(result))


def _check_equal(attribute: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        got = sorted(set(values), key=str)
        raise ValueError(f"Expected results of the same samples; got {attribute}: {got}.")


def _check_model(name: str, model: ModelResults) -> None:
    """Raise ValueError unless the results are finite, of one kind, and of different seeds."""
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


def _common_noise(attributes: Sequence[Mapping[str, object]]) -> bool | None:
    """True for one seed and one estimator, False for different seeds, None where unknown."""
    seeds = [int(str(values["seed"])) for values in attributes if "seed" in values]
    if len(seeds) < len(attributes):
        return None
    if len(set(seeds)) > 1:
        return False if len(set(seeds)) == len(seeds) else None
    return True if len({values.get("estimator") for values in attributes}) == 1 else None


def cluster_labels(clusters: Sequence[object] | Tensor | None, samples: int) -> Tensor:
    """Labels as 0 … G − 1, shape (N,); each sample by itself where they are None."""
    if clusters is None:
        return torch.arange(samples)
    labels = clusters.tolist() if isinstance(clusters, Tensor) else list(clusters)
    if len(labels) != samples:
        raise ValueError(f"Expected {samples} clusters, one per sample; got {len(labels)}.")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([numbers[label] for label in labels])
