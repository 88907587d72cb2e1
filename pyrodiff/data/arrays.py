"""``.npy`` and ``.npz`` files, read without NumPy's loader: a header is parsed, a buffer filled."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import numpy as np

from pyrodiff.checks import listed, reason, short
from pyrodiff.data.files import Array, Context, check_bytes, unreadable
from pyrodiff.data.prepare import Source, take_columns

__all__ = ["MAX_HEADER", "read_npy", "read_npz"]

MAX_HEADER = 10_000
"""The most bytes that the header of a NumPy array may have (NumPy's own limit)."""

_CHUNK = 2**24
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    struct.error,
    UnicodeDecodeError,
)


def read_npy(path: Path, context: Context | None = None) -> Source:
    """One array from a ``.npy`` file; ``context`` takes columns of a table out of the data.

    Raises:
        ValueError: for anything but one numeric array, whole, within the size limit.
    """
    with path.open("rb") as stream:
        array = _read_array(stream, path.stat().st_size, str(path))
    source = Source(name=path.stem, arrays={"all": array})
    return source if context is None else take_columns(source, context)


def read_npz(path: Path, context: Context | None = None, key: str | None = None) -> Source:
    """Arrays from a ``.npz`` file: its only one, the one at ``key``, or its splits.

    Splits are the keys train, test and perhaps validation (or valid, val), bare or after ``x_`` or
    ``X_``. A ``context`` that is a string names other arrays: "y" is y_train, y_test, ... beside
    splits, and the array y beside a single array. Otherwise it is columns of a table, by position.

    Raises:
        ValueError: for other keys (the message lists them), for anything but whole numeric arrays,
            and above the size limit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            groups = _choose_keys(members, context if isinstance(context, str) else None, key)
            chosen = {name for group in groups for name in group.values()}
            check_bytes(sum(members[name].file_size for name in chosen), path)
            arrays, contexts = (
                {split: _read_member(archive, members[name], path) for split, name in group.items()}
                for group in groups
            )
    except _BROKEN_ZIP as error:
        raise unreadable(path, "a .npz file that is whole", error) from error
    name = path.stem if key is None else f"{path.stem}:{key}"
    source = Source(name=name, arrays=arrays, contexts=contexts or None)
    if context is None or isinstance(context, str):
        return source
    return take_columns(source, context)


def _read_array(stream: IO[bytes], size: int, label: str) -> Array:
    """One array of the .npy format from a stream of ``size`` bytes; refuses pickles unread."""
    head = stream.read(MAX_HEADER + 12)
    start, shape, fortran, dtype = _read_array_header(head, label)
    if dtype.hasobject:
        raise ValueError(
            f"Expected an array of numbers; got objects in {label}: they are pickles, "
            "which run code when loaded, so they are never loaded."
        )
    if dtype.kind not in "biuf":
        raise ValueError(
            f"Expected an array of numbers; got dtype {short(str(dtype))[1:-1]} in {label}."
        )
    declared = math.prod(shape) * dtype.itemsize
    check_bytes(declared, label)
    if min(shape, default=0) < 0 or declared != size - start:
        raise ValueError(
            f"Expected {declared} bytes of data for shape {short(shape)} and dtype {dtype}; "
            f"got {size - start} in {label} (is it truncated?)."
        )
    data = np.empty(declared, dtype=np.uint8)
    view, filled = data.data, min(len(head) - start, declared)
    view[:filled] = head[start : start + filled]
    while chunk := stream.read(_CHUNK):
        if filled + len(chunk) > declared:
            break
        view[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    if filled != declared:
        raise ValueError(f"Expected {declared} bytes of data; got {filled} in {label}.")
    return data.view(dtype).reshape(shape, order="F" if fortran else "C")


def _read_array_header(head: bytes, label: str) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
    """Where the data start, shape, Fortran order and dtype; NumPy parses it as a literal."""
    buffer = io.BytesIO(head)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(buffer)
        if version not in readers:
            raise ValueError(f"format version {version}.")
        shape, fortran, dtype = readers[version](buffer, max_header_size=MAX_HEADER)
    except Exception as error:  # a hostile literal can raise nearly anything
        raise ValueError(
            f"Expected a NumPy array with a header of at most {MAX_HEADER} bytes; got {label}, "
            f"which has none or a broken one ({reason(error)}); pickles are never loaded."
        ) from error
    return buffer.tell(), shape, fortran, dtype


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Array:
    """One array of a .npz archive; zipfile stops at the declared size and checks the CRC."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"Expected members stored or deflated, as NumPy writes them; got {info.filename} of "
            f"{path} compressed in another way."
        )
    with archive.open(info) as stream:
        return _read_array(stream, info.file_size, f"{path}:{info.filename}")


def _choose_keys(
    keys: Mapping[str, object], context: str | None, key: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """The keys of the data and of the context, per split ("all" if the file has no splits)."""
    names = listed(keys) or "none"
    if key is not None and key not in keys:
        near = get_close_matches(key, list(keys), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"Expected a key among {names}; got {short(key)}{hint}")
    chosen = {} if key is not None else _split_keys(keys, ("", "x_", "X_"))
    contexts: dict[str, str] = {}
    if not chosen:
        data = [name for name in keys if name == key or (key is None and name != context)]
        if len(data) != 1:
            raise ValueError(
                "Expected a single array, or keys train and test, or x_train and x_test; "
                f"got the keys {names}: choose one with key=."
            )
        chosen = {"all": data[0]}
        contexts = {"all": context} if context is not None and context in keys else {}
    elif context is not None:
        contexts = _split_keys(keys, (f"{context}_",))
    if context is not None and set(contexts) != set(chosen):
        raise ValueError(
            f"Expected the context {short(context)} beside {listed(chosen.values())}; "
            f"got the keys {names}."
        )
    return chosen, contexts


def _split_keys(keys: Mapping[str, object], prefixes: Sequence[str]) -> dict[str, str]:
    """The keys of train, test and perhaps validation after the first prefix that has both."""
    for prefix in prefixes:
        names = {
            split: prefix + name
            for split, spellings in {
                "train": ("train",),
                "validation": ("validation", "valid", "val"),
                "test": ("test",),
            }.items()
            for name in spellings
            if prefix + name in keys
        }
        if "train" in names and "test" in names:
            return names
    return {}
