"""From arrays to a ``DataSet``: check, split, put into model units (``units``)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pyrodiff.checks import listed, short
from pyrodiff.data.dataset import DataSet
from pyrodiff.data.files import Array
from pyrodiff.data.units import name_position, to_float32, to_grid, to_standard

__all__ = ["MAX_CLASSES", "MIN_ROWS", "Source", "prepare", "take_columns"]

MIN_ROWS = 10
MAX_CLASSES = 1_000
MAX_LEVELS = 2**16
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """Data as given.

    Args:
        name: of the data set.
        arrays: one array under "all", or one under "train", "test" and perhaps "validation".
        contexts: with the keys of ``arrays``.
        columns: the names of the columns of a table.
    """

    name: str
    arrays: dict[str, Array]
    contexts: dict[str, Array] | None = None
    columns: tuple[str, ...] | None = None


def take_columns(source: Source, context: str | int | Sequence[str | int]) -> Source:
    """Move columns of a table, given by name or position, from the data to the context.

    Raises:
        ValueError: for data that are no table, an unknown column, or if no column is left.
    """
    width = next(iter(source.arrays.values())).shape[1:]
    if len(width) != 1:
        raise ValueError(
            f"Expected a table (N, d) to take context columns from; got shape (N, *{width})."
        )
    names = source.columns or tuple(str(i) for i in range(width[0]))
    chosen = [context] if isinstance(context, str | int) else list(context)
    positions = [_position(column, names) for column in chosen]
    others = [i for i in range(len(names)) if i not in positions]
    if not others or not positions:
        raise ValueError(
            "Expected some columns as context and some as data; "
            f"got {short(chosen)} of {len(names)}."
        )
    return replace(
        source,
        arrays={split: array[:, others] for split, array in source.arrays.items()},
        contexts={s: a[:, positions].astype(np.float64) for s, a in source.arrays.items()},
        columns=tuple(names[i] for i in others),
    )


def prepare(
    source: Source,
    *,
    seed: int = 0,
    standardize: bool = True,
    levels: int | None = None,
    log_prob: Callable[[Tensor], Tensor] | None = None,
) -> DataSet:
    """Check ``source``, split it by ``seed`` where it has no splits, and put it into model units.

    Warns (``UserWarning``) of columns of whole numbers in continuous data.

    Raises:
        ValueError: for data that are not numbers, not finite, too few, of an unknown layout, off
            the grid of ``levels``, or constant in a column that is to be standardised.
    """
    levels = _check_values(source, levels)
    events = {split: _to_events(array) for split, array in source.arrays.items()}
    _check_rows(events, source.contexts)
    if levels is None:
        _warn_of_atoms(events, source)
    rows = _split_rows({split: len(array) for split, array in events.items()}, seed)
    splits = {split: events[key][index] for split, (key, index) in rows.items()}
    contexts: dict[str, Tensor] = {}
    if source.contexts is not None:
        encoded = _encode_context(source.contexts)
        contexts = {f"{s}_context": encoded[key][index] for s, (key, index) in rows.items()}
    if levels is not None:
        transform, tensors = to_grid(splits, levels)
    else:
        transform, tensors = to_standard(splits, standardize, source.columns)
    return DataSet(
        name=source.name,
        transform=transform,
        levels=levels,
        log_prob=log_prob,
        **tensors,
        **contexts,
    )


def _position(column: str | int, names: Sequence[str]) -> int:
    """The position of a column that is given by name or, as an integer, by position."""
    if isinstance(column, int) and 0 <= column < len(names):
        return column
    if isinstance(column, str) and column in names:
        return names.index(column)
    raise ValueError(f"Expected a column among {listed(names)}; got {short(column)}.")


def _check_values(source: Source, levels: int | None) -> int | None:
    """Refuse values that are not numbers or not on the grid; returns the number of levels."""
    for split, array in source.arrays.items():
        _check_numbers(array, split, source.columns)
    levels = _default_levels(source.arrays) if levels is None else levels
    if levels is not None:
        for array in source.arrays.values():
            _check_grid(array, levels)
    return levels


def _check_numbers(array: Array, split: str, columns: Sequence[str] | None = None) -> None:
    """Refuse values that are not finite real numbers, and say where the first one is."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"Expected real numbers; got an array of dtype {array.dtype}.")
    if array.dtype.kind != "f":
        return
    bad = ~np.isfinite(array)
    count = int(bad.sum())
    if count:
        index = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), array.shape))
        raise ValueError(
            f"Expected finite values; got {count} NaN or infinite"
            f"{'' if split == 'all' else f' in {split}'}, the first ({array[index]}) at "
            + (
                f"row {index[0]}, column {short(columns[index[1]])}."
                if columns
                else f"index {index}."
            )
        )


def _default_levels(arrays: dict[str, Array]) -> int | None:
    """None for floats and tables, 2 for Boolean images, 256 for integer ones."""
    array = next(iter(arrays.values()))
    if array.ndim < 3 or array.dtype.kind == "f":
        return None
    return 2 if array.dtype.kind == "b" else 256


def _check_grid(array: Array, levels: int) -> None:
    """Refuse values that are not integers 0 … levels − 1."""
    if levels < 2:
        raise ValueError(f"Expected at least 2 levels; got {levels}.")
    if levels > MAX_LEVELS:
        raise ValueError(f"Expected at most {MAX_LEVELS} levels; got {levels}.")
    if not array.size:
        return
    low, high = array.min(), array.max()
    if low < 0 or high > levels - 1:
        raise ValueError(
            f"Expected integers 0 to {levels - 1} for levels={levels}; got values from {low} "
            f"to {high}."
        )
    if array.dtype.kind == "f" and (array != np.floor(array)).any():
        fraction = array[array != np.floor(array)][0]
        raise ValueError(
            f"Expected integers 0 to {levels - 1} for levels={levels}; got {fraction}."
        )


def _warn_of_atoms(events: dict[str, Array], source: Source) -> None:
    """Warn of columns of continuous data that hold only whole numbers, and of such images."""
    every = [(array == np.floor(array)).all(axis=0) for array in events.values()]
    whole: Array = np.asarray(np.all(every, axis=0))
    if whole.ndim > 1:
        names = ["all pixels"] if whole.all() else []
    else:
        names = [name_position((int(i),), source.columns) for i in np.flatnonzero(whole)]
    if names:
        count = f" ({len(names)} of {len(whole)} columns)" if whole.ndim == 1 else ""
        warnings.warn(
            f"Expected continuous values in {source.name}; got whole numbers alone in "
            f"{listed(names)}{count}. A value that repeats is "
            "an atom, which has no density: a density learned there grows without limit, and its "
            "likelihood says nothing. Give levels= if all of the data are discrete, take such "
            "columns as context= or leave them out, or add noise of their spacing.",
            UserWarning,
            stacklevel=2,
        )


def _to_events(array: Array) -> Array:
    """(N,) to (N, 1); (N, H, W) to (N, 1, H, W); (N, H, W, C) with C in {1, 3} to (N, C, H, W)."""
    if array.ndim in (1, 3):
        return array[:, None]
    if array.ndim == 2:
        return array
    if array.ndim == 4 and array.shape[3] in (1, 3):
        return np.moveaxis(array, 3, 1)
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array
    raise ValueError(
        "Expected an array (N,), (N, d), (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 "
        f"channels C; got shape {short(array.shape)}."
    )


def _check_rows(events: dict[str, Array], contexts: dict[str, Array] | None) -> None:
    """Refuse empty events, differing splits, too few rows, and contexts of another length."""
    first = next(iter(events.values())).shape[1:]
    for split, array in events.items():
        least = MIN_ROWS if split in ("all", "train") else 1
        if len(array) < least:
            raise ValueError(
                f"Expected at least {least} rows{'' if split == 'all' else f' in {split}'}; "
                f"got {len(array)}."
            )
        if 0 in array.shape or array.shape[1:] != first:
            raise ValueError(
                "Expected splits of one event shape, none of it empty; "
                f"got {first} and {array.shape[1:]}."
            )
        if contexts is not None and contexts[split].shape[:1] != (len(array),):
            raise ValueError(
                f"Expected as many rows of context as of data ({len(array)}); "
                f"got {contexts[split].shape[0] if contexts[split].ndim else 'a single value'}."
            )


def _split_rows(lengths: dict[str, int], seed: int) -> dict[str, tuple[str, Array | slice]]:
    """For each split, the key of the array to take it from, and which rows.

    Without splits 80/10/10; with train and test alone, a tenth of train becomes the validation set.
    ``RandomState``, unlike ``default_rng``, promises the same permutation in every NumPy.
    """
    if set(lengths) == set(SPLITS):
        return {split: (split, slice(None)) for split in SPLITS}
    key = "all" if "all" in lengths else "train"
    order = np.random.RandomState(seed).permutation(lengths[key])
    tenth = lengths[key] // 10
    rows: dict[str, tuple[str, Array | slice]] = {"validation": (key, order[:tenth])}
    if key == "all":
        rows["test"] = (key, order[tenth : 2 * tenth])
        rows["train"] = (key, order[2 * tenth :])
    else:
        rows["test"] = ("test", slice(None))
        rows["train"] = (key, order[tenth:])
    return rows


def _encode_context(contexts: dict[str, Array]) -> dict[str, Tensor]:
    """Integer labels (N,) one-hot, (N, classes), counted over all splits; others as they are."""
    for split, array in contexts.items():
        _check_numbers(array, f"the context of {split}")
    if all(a.ndim == 1 and a.dtype.kind in "iub" for a in contexts.values()):
        low = min(int(a.min()) for a in contexts.values())
        classes = max(int(a.max()) for a in contexts.values()) + 1
        if low < 0 or classes > MAX_CLASSES:
            raise ValueError(
                f"Expected labels 0 to at most {MAX_CLASSES - 1}; got {low} to {classes - 1}."
            )
        unit = torch.eye(classes)
        return {s: unit[torch.from_numpy(a.astype(np.int64))] for s, a in contexts.items()}
    return {
        split: to_float32(a[:, None] if a.ndim == 1 else a, "the context")
        for split, a in contexts.items()
    }
