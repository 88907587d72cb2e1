"""Several runs as the models of one comparison: of the same data, named, grouped by training seed.

A model is what a configuration says beside its training seed, and runs that differ in that seed
alone are draws of it: the spread between them belongs to the error of its mean.  Values are
comparable where the samples are the same in the units of the data as given, and were held out from
the training of every run; both follow from equal splits and equal transforms, which are compared by
their content, not by where they came from.
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

_NOT_TRAINING = {"seed", "evaluations", "samples"}  # settings of fit that make no other model
_SEED = re.compile(r"[-_. /=]*(?:seeds?)?[-_. /=]*\d*$")  # what names of seeds end in


class Model(NamedTuple):
    """Runs that differ in their training seed alone.

    Args:
        name: of the model.
        runs: their places among the runs given.
        seeds: their training seeds.
    """

    name: str
    runs: tuple[int, ...]
    seeds: tuple[int, ...]


def unique_names(folders: Sequence[str]) -> list[str]:
    """The last part of each path, with as many parts before it as tell it from the others.

    Raises:
        ValueError: the same folder twice.
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    twice = sorted({folders[i] for i, each in enumerate(parts) if each in parts[:i]})
    if twice:
        raise ValueError(f"Expected every run once; got {', '.join(twice)} again.")
    names = []
    for each in parts:
        count, others = 1, [other for other in parts if other != each]
        while count < len(each) and any(other[-count:] == each[-count:] for other in others):
            count += 1
        names.append("/".join(each[-count:]))
    return names


def group(names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[Model]:
    """The models in the order of their first runs.

    A copy of a run, with the same seed, is no other draw of its model but a model of its own.
    """
    models: list[tuple[Any, dict[int, int]]] = []
    for place, config in enumerate(configs):
        fit = serialization.entry(config, "fit")
        seed = int(fit["seed"])
        own = {key: value for key, value in fit.items() if key not in _NOT_TRAINING}
        key = (serialization.entry(config, "model"), own)
        for known, runs in models:
            if known == key and seed not in runs:
                runs[seed] = place
                break
        else:
            models.append((key, {seed: place}))
    found, taken = [], set[str]()
    for _, runs in models:
        places = tuple(runs.values())
        name = _common_name([names[place] for place in places])
        if name in taken or (name in names and len(places) > 1):
            name = names[places[0]] if len(places) == 1 else f"{names[places[0]]} and others"
        taken.add(name)
        found.append(Model(name, places, tuple(runs)))
    return found


def in_order_of_seeds(models: Sequence[Model]) -> list[Model]:
    """The models with their runs by training seed, the same seeds for all.

    Raises:
        ValueError: models of other seeds, or of one.
    """
    found = []
    for model in models:
        pairs = sorted(zip(model.seeds, model.runs, strict=True))
        seeds, runs = zip(*pairs, strict=True)
        found.append(Model(model.name, runs, seeds))
    if len({model.seeds for model in found}) > 1 or len(found[0].seeds) < 2:
        told = "; ".join(f"{model.name}: {', '.join(map(str, model.seeds))}" for model in found)
        raise ValueError(
            "Expected for paired seeds the same training seeds of all models, at least two; "
            f"got {told}."
        )
    return found


def _common_name(names: Sequence[str]) -> str:
    """What the names begin with, without a seed; the first where they have nothing in common."""
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
    for place in range(1, len(names)):
        for what in facts[0]:
            one, other = facts[0][what], facts[place][what]
            if not _equal(one, other):
                raise ValueError(
                    f"Expected runs of the same data in the same units; got another {what}: "
                    f"{_said(one, seeds[0])} in {names[0]}, "
                    f"{_said(other, seeds[place])} in {names[place]}."
                    + (_HINT if isinstance(one, torch.Tensor) and seeds[0] != seeds[place] else "")
                )


_HINT = (
    " Samples held out from the one may have trained the other: fit runs that are to be compared "
    "with one --data-seed."
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


def _said(value: Any, seed: int) -> str:
    if not isinstance(value, torch.Tensor):
        return "none" if value is None else str(value)
    figures = ", ".join(f"{x:.4g}" for x in value.flatten()[:3].tolist())
    return f"{figures}{', …' if value.numel() > 3 else ''} (data seed {seed})"
