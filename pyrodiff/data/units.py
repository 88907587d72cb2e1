"""From the units of the data as given to those of the model.

Continuous data are standardised with the mean and the standard deviation of the *train* split, per
column or pixel.  Discrete data, integers k ∈ {0, …, L − 1}, go to the grid z = −1 + 2k/(L − 1).
Everything is float64 until the last step, which casts to float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyrodiff.checks import short
from pyrodiff.data.dataset import Affine
from pyrodiff.data.files import Array

__all__ = ["name_position", "to_float32", "to_grid", "to_standard"]


def to_grid(splits: dict[str, Array], levels: int) -> tuple[Affine, dict[str, Tensor]]:
    """Integers k to the float32 values of ``linspace(-1, 1, levels)``, by look-up."""
    grid = torch.linspace(-1, 1, levels, dtype=torch.float64).to(torch.float32).numpy()
    half = torch.tensor((levels - 1) / 2, dtype=torch.float64)
    tensors = {}
    for split, array in splits.items():
        index = array if array.dtype.kind in "iu" else array.astype(np.int64)
        tensors[split] = torch.from_numpy(np.ascontiguousarray(grid[index]))
    return Affine(shift=half, scale=half), tensors


def to_standard(
    splits: dict[str, Array], standardize: bool, columns: Sequence[str] | None
) -> tuple[Affine, dict[str, Tensor]]:
    """Standardise with the train split's moments, or leave the data as they are."""
    shape = splits["train"].shape[1:]
    shift, scale = np.zeros(shape), np.ones(shape)
    if standardize:
        train = splits["train"].astype(np.float64)
        constant = train.min(axis=0) == train.max(axis=0)
        if constant.any():
            index = tuple(int(i) for i in np.unravel_index(int(constant.argmax()), shape))
            raise ValueError(
                "Expected values that vary; got a constant "
                + name_position(index, columns)
                + f" ({train[0][index]:g} in all of train): leave it out, "
                "or give standardize=False, or levels= if the data are discrete."
            )
        with np.errstate(over="ignore", invalid="ignore"):
            shift, scale = train.mean(axis=0), train.std(axis=0)
        if not (np.isfinite(shift).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError("Expected a mean and a variance that fit float64; got none.")
    transform = Affine(shift=torch.from_numpy(shift), scale=torch.from_numpy(scale))
    with np.errstate(over="ignore"):
        return transform, {
            split: to_float32((array.astype(np.float64) - shift) / scale, split)
            for split, array in splits.items()
        }


def name_position(index: tuple[int, ...], columns: Sequence[str] | None) -> str:
    """A position in an event in words: a column by name or number, a pixel by (c, i, j)."""
    if len(index) == 1:
        return f"column {short(columns[index[0]])}" if columns else f"column {index[0]}"
    return f"pixel {index}"


def to_float32(array: Array, what: str) -> Tensor:
    """The final cast; refuses values that float32 cannot hold."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(cast).all():
        raise ValueError(f"Expected values that fit float32; got larger ones in {what}.")
    return torch.from_numpy(cast)
