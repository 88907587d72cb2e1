"""Runs as the models of one comparison: of the same data, named, grouped by training seed.

A model is a configuration without its training seed.  Runs that differ in that seed alone are draws
of one model, and the spread between them is part of the error of its mean.  Values are comparable
if the samples are the same in the units of the data as given, and were held out from the training
of every run.  Both follow from equal splits and equal transforms; their contents are compared, not
where they came from.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyrodiff import serialization
from pyrodiff.data import DataSet

__all__ = ["Model", "check_same_data", "group", "in_order_of_seeds", "unique_names"]

_NOT_TRAINING = {"seed", "calls", "samples"}  # settings of fit that do not change the model
_SEED = re.compile(r"[-_. /=]*(?:seeds?)?[-_. /=]*\d*$")  # the end of a name with a seed


class Model(NamedTuple):
    """Runs that differ in their training seed alone.

    Args:
        name: of the model.
        runs: their indices among the runs of the comparison.
        seeds: their training seeds.
    """

    name: str
    runs: tuple[int, ...]
    seeds: tuple[int, ...]


def unique_names(folders: Sequence[str]) -> list[str]:
    """The last part of each path, and as many parts before it as make it unique.

    Raises:
        ValueError: the same folder twice.
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    twice = sorted({folders[i] for i, path in enumerate(parts) if path in parts[:i]})
    if twice:
        raise ValueError(f"Expected every run once; got {', '.join(twice)} again.")
    names = []
    for path in parts:
        count, others = 1, [other for other in parts if other != path]
        while count < len(path) and any(other[-count:] == path[-count:] for other in others):
            count += 1
        names.append("/".join(path[-count:]))
    return names


def group(names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[Model]:
    """The models in the order of their first runs.

    A copy of a run, with the same seed, is not another draw of its model but a model of its own.
    """
    models: list[tuple[Any, dict[int, int]]] = []
    for index, config in enumerate(configs):
        fit = serialization.entry(config, "fit")
        seed = int(fit["seed"])
        training = {key: value for key, value in fit.items() if key not in _NOT_TRAINING}
        model = (serialization.entry(config, "model"), training)
        for other, runs in models:
            if other == model and seed not in runs:
                runs[seed] = index
                break
        else:
            models.append((model, {seed: index}))
    grouped, taken = [], set[str]()
    for _, runs in models:
        indices = tuple(runs.values())
        name = _common_name([names[index] for index in indices])
        if name in taken or (name in names and len(indices) > 1):
            first = names[indices[0]]
            name = first if len(indices) == 1 else f"{first} and others"
        taken.add(name)
        grouped.append(Model(name, indices, tuple(runs)))
    return grouped


def in_order_of_seeds(models: Sequence[Model]) -> list[Model]:
    """The models with their runs in the order of the training seeds, the same for all.

    Raises:
        ValueError: models of different seeds, or of a single one.
    """
    ordered = []
    for model in models:
        pairs = sorted(zip(model.seeds, model.runs, strict=True))
        seeds, runs = zip(*pairs, strict=True)
        ordered.append(Model(model.name, runs, seeds))
    if len({model.seeds for model in ordered}) > 1 or len(ordered[0].seeds) < 2:
        seeds_of = "; ".join(
            f"{model.name}: {', '.join(map(str, model.seeds))}" for model in ordered
        )
        raise ValueError(
            "Expected for paired seeds the same training seeds of all models, at least two; "
            f"got {seeds_of}."
        )
    return ordered


def _common_name(names: Sequence[str]) -> str:
    """The common beginning of the names, without a seed; the first name where there is none."""
    if len(names) == 1:
        return names[0]
    return _SEED.sub("", os.path.commonprefix(list(names))) or f"{names[0]} and others"


def check_same_data(
    names: Sequence[str],
    datasets: Sequence[DataSet],
    seeds: Sequence[int],
    split: str,
    limit: int | None,
) -> None:
    """Refuse runs of other data, in other units, or of another split of the same data.

    Args:
        names: of the runs.
        datasets: with each run's own transform.
        seeds: of the draw or split of the data, for the message.
        split, limit: what is to be evaluated.

    Raises:
        ValueError: naming the first two runs that differ, and in what.
    """
    facts = [_facts(dataset, split, limit) for dataset in datasets]
    for index in range(1, len(names)):
        for fact, first in facts[0].items():
            other = facts[index][fact]
            if not _equal(first, other):
                hint = isinstance(first, torch.Tensor) and seeds[0] != seeds[index]
                raise ValueError(
                    f"Expected runs of the same data in the same units; got another {fact}: "
                    f"{_quoted(first, seeds[0])} in {names[0]}, "
                    f"{_quoted(other, seeds[index])} in {names[index]}.{_HINT if hint else ''}"
                )


_HINT = (
    " Samples held out from one run may have been trained on by the other: fit runs that are to be "
    "compared with one --data-seed."
)


def _facts(dataset: DataSet, split: str, limit: int | None) -> dict[str, Any]:
    context = getattr(dataset, f"{split}_context")
    return {
        "event shape": dataset.event_shape,
        "number of levels": dataset.levels,
        "context": None if context is None else tuple(context.shape[1:]),
        f"number of {split} samples": len(getattr(dataset, split)),
        "shift of the transform": dataset.transform.shift,
        "scale of the transform": dataset.transform.scale,
        f"{split} split": getattr(dataset, split)[:limit],
        "context of the samples": None if context is None else context[:limit],
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _quoted(value: Any, seed: int) -> str:
    if not isinstance(value, torch.Tensor):
        return "none" if value is None else str(value)
    figures = ", ".join(f"{x:.4g}" for x in value.flatten()[:3].tolist())
    return f"{figures}{', …' if value.numel() > 3 else ''} (data seed {seed})"
