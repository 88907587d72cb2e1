"""Weights: tensors in safetensors files with their checksum, never pickle."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyrodiff.checks import reason, short
from pyrodiff.serialization.config import check_is_file
from pyrodiff.serialization.files import write_bytes

__all__ = ["check_shapes", "load_weights", "read_weights", "shapes", "write_weights"]

_CHECKSUM = "pyrodiff.sha256"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, with their checksum."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    write_bytes(path, save(tensors, {_CHECKSUM: _checksum(tensors)}))


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read safetensors; their header has to agree with the file's size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or not safetensors (a pickle, say), or other values than were
            written; files without a checksum are read as they are.
    """
    from safetensors import safe_open

    check_is_file(path)
    try:
        with safe_open(path, "pt") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        damaged = checksum is not None and checksum != _checksum(tensors)
    except OSError:
        raise
    except Exception as error:  # its own errors, and torch's for types and shapes that it lacks
        message = f"Expected safetensors in {path}; got {reason(error)}."
        raise ValueError(message) from error
    if damaged:
        raise ValueError(
            f"Expected {path} as it was written; got values that differ from its checksum. "
            "The file is damaged: write it anew, or take a copy."
        )
    return tensors


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Raise ValueError unless both have the same names and shapes of weights."""
    names = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
    if names:
        raise ValueError(
            f"Expected weights that fit the model in {source}; {len(names)} differ, the first "
            f"{short(names[0])}: expected {expected.get(names[0])}; got {got.get(names[0])}."
        )


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load a state dict whole; names, shapes or kinds of numbers that differ raise a ValueError."""
    state = module.state_dict()
    check_shapes(shapes(state), shapes(weights), source)
    for name, value in weights.items():
        floats = state[name].is_floating_point()
        if (value.dtype not in _DTYPES) if floats else (value.dtype != state[name].dtype):
            raise ValueError(
                f"Expected weights that fit the model in {source}; got {short(name)} of "
                f"{value.dtype}, where the model has {state[name].dtype}."
            )
    with torch.no_grad():
        module.load_state_dict(weights)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of weights by name."""
    return {name: tuple(value.shape) for name, value in state.items()}
