"""Pilots as files: safetensors, and nothing is made of a file before its tensors are checked."""

from pathlib import Path

import torch
from torch import Tensor

from pyrodiff import serialization

__all__ = ["CONTROLS", "TABLES", "read_pilot", "write_pilot"]

# Tensors of a pilot and its controls, and the sizes of their axes, a letter each.
TABLES = {
    "nodes": "J",
    "unit": "T",
    "density": "T",
    "baseline": "JK",
    "coefficients": "JF",
    "scale": "J",
    "spread": "J",
    "kurtosis": "J",
    "misfit": "J",
}
CONTROLS = {"log_snr": "T", "knots": "RH", "mean": "d", "eigenvalues": "r", "basis": "dr"}
_SPREADS = ("unit", "density", "scale", "spread", "misfit", "eigenvalues")


def _check_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse a file whose tensors are no pilot's: axes of equal letters have equal sizes."""
    sizes: dict[str, int] = {}
    for name, axes in ({"calls": ""} | TABLES | CONTROLS).items():
        value = tensors[name]
        fits = value.dim() == len(axes) and all(
            sizes.setdefault(axis, n) == n > 0 for axis, n in zip(axes, value.shape, strict=True)
        )
        integer = name in ("calls", "nodes")
        if not fits or value.dtype != (torch.int64 if integer else torch.float64):
            raise ValueError(
                f"Expected a pilot in {path}; got {name!r} of shape {tuple(value.shape)} and type "
                f"{value.dtype}."
            )
        finite = value.isfinite() | (value.isnan() & (name == "knots"))
        if not bool(finite.all()) or (name in _SPREADS and bool((value < 0).any())):
            raise ValueError(f"Expected a pilot in {path}; got a {name} that is out of range.")
    nodes, log_snr = tensors["nodes"], tensors["log_snr"]
    ends = (int(nodes[0]), int(nodes[-1])) == (1, len(log_snr))
    if not ends or not bool((nodes.diff() > 0).all()) or not bool((log_snr.diff() < 0).all()):
        raise ValueError(
            f"Expected steps of the pilot in {path} to grow from 1 to {len(log_snr)}, and log-SNRs "
            "to fall; got others."
        )


def write_pilot(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of a pilot, atomically."""
    serialization.write_weights(path, tensors)


def read_pilot(path: Path) -> dict[str, Tensor]:
    """The tensors of a pilot, checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a pilot.
    """
    tensors = serialization.read_weights(path)
    missing = sorted({*TABLES, *CONTROLS, "calls"} - tensors.keys())
    if missing:
        raise ValueError(f"Expected a pilot in {path}; got a file without {missing[0]!r}.")
    _check_tensors(tensors, path)
    return tensors
