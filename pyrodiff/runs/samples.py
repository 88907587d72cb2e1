"""Samples of a run as files: an array in the units of the data as given, and a picture of it.

The picture holds the array's checksum.  By it the two are known as ours, and no other file is ever
replaced.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrodiff import serialization
from pyrodiff.checks import short
from pyrodiff.data import Affine
from pyrodiff.data.prepare import MAX_CLASSES
from pyrodiff.runs.evaluation import load_model
from pyrodiff.runs.folder import read_run
from pyrodiff.runs.pictures import png_mark, samples_png
from pyrodiff.training.progress import say

__all__ = ["check_output", "draw"]


def draw(
    folder: Path,
    config: dict[str, Any],
    path: Path,
    num_samples: int,
    seed: int,
    batch_size: int,
    label: int | None,
) -> Tensor:
    """Draw samples and write them to ``path``; returns them in units of the data as given.

    Args:
        folder, config: the run.
        path: the ``.npy`` file.
        num_samples, seed, batch_size, label: see ``runs.sample``.
    """
    held = serialization.entry(config, "data")
    reverse = load_model(folder)
    if read_run(folder) != config:
        raise ValueError(f"Expected {folder} to stay as it is; got a run that was replaced.")
    context = _one_hot(label, held, num_samples)
    x = reverse.sample(num_samples, seed=seed, batch_size=batch_size, context=context)
    values = _affine(held, reverse.event_shape).inverse(x).numpy()
    _write(x, values, held["levels_found"] is not None, path)
    return torch.as_tensor(values)


def _write(x: Tensor, values: np.ndarray, discrete: bool, path: Path) -> None:
    """Write the samples, then their picture, which says whose picture it is."""
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    picture = samples_png(x, discrete, of=_mark(content.getvalue()))
    serialization.write_bytes(path, content.getvalue())
    serialization.write_bytes(path.with_suffix(".png"), picture)
    say(f"{len(x)} samples -> {path}, {path.with_suffix('.png')}")


def _mark(samples: bytes) -> str:
    return f"pyrodiff samples {hashlib.sha256(samples).hexdigest()}"


def check_output(path: Path) -> None:
    """Refuse to replace what ``draw`` did not write, and names that say another format."""
    if path.suffix != ".npy":
        raise ValueError(f"Expected a name of samples to end in .npy; got {path}.")
    picture = path.with_suffix(".png")
    mark = png_mark(picture)
    if not mark.startswith("pyrodiff samples ") and _is_there(picture):
        raise FileExistsError(
            f"Expected no file {picture}, where the picture of the samples is to lie; got one that "
            "pyrodiff sample did not write. Nothing was changed: choose another --output."
        )
    if _is_there(path) and (path.is_symlink() or mark != _mark(path.read_bytes())):
        raise FileExistsError(
            f"Expected no file {path}; got one that pyrodiff sample did not write, or did not "
            "finish. Nothing was changed: remove it, or choose another --output."
        )


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _affine(held: dict[str, Any], event_shape: torch.Size) -> Affine:
    """The transform that a run keeps, for events of this shape."""
    parts = []
    for name in ("shift", "scale"):
        try:
            part = torch.tensor(serialization.entry(held, name), dtype=torch.float64)
            part.expand(event_shape)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"Expected a {name} of the data for events of shape {tuple(event_shape)}; "
                f"got {short(held.get(name))}."
            ) from error
        parts.append(part)
    return Affine(*parts)


def _one_hot(label: int | None, held: dict[str, Any], num_samples: int) -> Tensor | None:
    shape = held.get("context_shape")
    if (label is None) != (shape is None):
        got = "none" if label is None else f"label {label}"
        expected = "no label (the run is unconditional)" if shape is None else "a label"
        raise ValueError(f"Expected {expected}; got {got}.")
    if label is None or shape is None:
        return None
    if len(shape) != 1 or not 0 <= label < shape[0] <= MAX_CLASSES:
        raise ValueError(f"Expected a label from 0 to {shape[0] - 1}; got {label}.")
    unit = torch.zeros(shape[0])
    unit[label] = 1.0
    return unit.expand(num_samples, -1)
