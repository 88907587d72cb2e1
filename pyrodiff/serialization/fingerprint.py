"""A checksum by which a model is recognised."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]


def fingerprint(model: Any) -> str:
    """A checksum of a model's configuration and weights, by which it is known again.

    Of parts that are the user's own it sees the class's name, the weights, and attributes that are
    plain values.  It is empty, for unknown, where a part is the user's own and nothing was trained,
    and where a configuration or a state is not made of plain values and dense tensors.

    Args:
        model: a module with ``config()``.
    """
    try:
        config = model.config()
    except TypeError:  # such a model cannot be saved, either
        return ""
    if "'external': True" in repr(config) and not any(True for _ in model.parameters()):
        return ""
    digest = hashlib.sha256(repr(_canonical(config)).encode())
    for name, part in model.named_modules():
        digest.update(repr((name, type(part).__name__, _canonical(_attributes(part)))).encode())
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return ""
        plain = value.detach().cpu().resolve_conj().contiguous().flatten()
        digest.update(name.encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _canonical(value: Any) -> Any:
    """The same for 4 and 4.0, for tuples and lists."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in sorted(value.items())}
    if isinstance(value, tuple | list):
        return [_canonical(item) for item in value]
    return float(value) if isinstance(value, int | float) else value


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps in public attributes as plain values."""
    plain = bool | int | float | str | tuple | list
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, plain)
    }
