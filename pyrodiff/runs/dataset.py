"""The data of a run: loaded again as its configuration says, and recognised by their transform."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyrodiff import data
from pyrodiff.data import DataSet

__all__ = ["describe", "load_source", "own_data"]


def load_source(source: Mapping[str, Any]) -> DataSet:
    """Load data from plain values: the arguments of ``pyrodiff.data.load``, None for a default."""
    names = ("source", "seed", "context", "key", "levels")
    options = {name: source[name] for name in names if source.get(name) is not None}
    return data.load(options.pop("source"), **options)


def own_data(folder: Path, section: Mapping[str, Any], source: str | None = None) -> DataSet:
    """A run's data, or other data with the same transform.

    Args:
        folder: of the run, for the message.
        section: ``data`` of its configuration.
        source: of other data.

    Raises:
        ValueError: data whose transform is not the run's.
    """
    dataset = load_source(section if source is None else {**section, "source": source})
    description = describe(dataset)
    if description != {name: section[name] for name in description}:
        raise ValueError(
            f"Expected the data that {folder} was fitted on, or data with the same transform; "
            f"got {dataset!r} with another one."
        )
    return dataset


def describe(dataset: DataSet) -> dict[str, Any]:
    """What a run has to know of its data to give samples and likelihoods in their units."""
    context = dataset.train_context
    return {
        "levels_found": dataset.levels,
        "shift": dataset.transform.shift.tolist(),
        "scale": dataset.transform.scale.tolist(),
        "context_shape": None if context is None else list(context.shape[1:]),
    }
