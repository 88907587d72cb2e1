"""A checksum by which a model is recognised, taken again only where the model has changed.

Every estimate asks for it, and the SHA-256 of 50 million weights takes 0.3 seconds.  Whether the
weights are still those that were hashed is decided by sums of their bits, at a fifth of that and on
the weights' own device.  Version counters and addresses would cost nothing, but they stay the same
where weights are written through ``.data``, NumPy or a replayed CUDA graph, and a result would then
name a model that it is not of.

A tensor's bits are read as 64-bit integers in a table of 4096 columns, of which the sums over rows
and over columns are compared, modulo 2⁶⁴.  One changed weight, or two exchanged ones, always change
a sum.  To leave all alike takes changes at the four corners of a rectangle that cancel to the bit.
"""

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]

_COLUMNS = 4096
_RECENT: "weakref.WeakKeyDictionary[nn.Module, tuple[bytes, str]]" = weakref.WeakKeyDictionary()


def fingerprint(model: Any) -> str:
    """A checksum of a model's configuration and weights, by which it is recognised.

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
    state = model.state_dict()
    if not all(isinstance(v, Tensor) and v.layout == torch.strided for v in state.values()):
        return ""
    digest = hashlib.sha256(repr(_canonical(config)).encode())
    for name, part in model.named_modules():
        digest.update(repr((name, type(part).__name__, _canonical(_attributes(part)))).encode())
    sums = digest.digest() + _sums(state)
    recent = _RECENT.get(model)
    if recent is None or recent[0] != sums:
        recent = _RECENT[model] = (sums, _finish(digest, state))
    return recent[1]


def _finish(digest: "hashlib._Hash", state: dict[str, Tensor]) -> str:
    """The checksum of what was hashed so far and of the weights."""
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(_bits(value.detach().cpu()).numpy().data)
    return digest.hexdigest()[:16]


def _bits(value: Tensor) -> Tensor:
    """The bytes of a tensor in the order of its entries, (n,), uint8; no copy where it is dense."""
    return value.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)


def _sums(state: dict[str, Tensor]) -> bytes:
    """A digest of names, types, shapes and sums of bits (see above)."""
    pieces: dict[torch.device, list[Tensor]] = {}
    for value in state.values():
        pieces.setdefault(value.device, []).extend(_sums_of_bits(_bits(value)))
    headers = [(name, value.dtype, value.shape) for name, value in state.items()]
    digest = hashlib.sha256(repr(headers).encode())
    for device in sorted(pieces, key=str):  # one transfer from each
        digest.update(torch.cat(pieces[device]).cpu().numpy().data)
    return digest.digest()


def _sums_of_bits(bits: Tensor) -> list[Tensor]:
    """Sums over rows and columns of 64-bit words, and what fills no row as it is; int64."""
    rows = len(bits) // (8 * _COLUMNS)
    size = 8 * _COLUMNS * rows
    rest = bits[size:].to(torch.int64)
    if rows == 0:
        return [rest]
    words = bits[:size]
    if words.storage_offset() % 8:
        words = words.clone()
    table = words.view(torch.int64).view(rows, _COLUMNS)
    return [table.sum(0), table.sum(1), rest]


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
