"""netCDF files with a checksum at their end, read without trust.

HDF5, which netCDF-4 is made of, allows bytes after its content.  There pyrodiff writes the SHA-256
of all that precedes, so that damage is noticed before HDF5 sees the file; other programs ignore it.
A file without a checksum, which another program wrote, is read as it is.  No file can ask for more
memory than its own size: its arrays are neither compressed nor stored elsewhere.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrodiff.checks import reason, short

__all__ = ["checksummed", "netcdf_content", "read_netcdf"]

_MARK = b"\npyrodiff sha256 "
_END = len(_MARK) + 64
_HEAP = b"GCOL\x01"
_MAX_ATTRIBUTE = 2**16  # bytes


def checksummed(content: bytes) -> bytes:
    """The content of a file with its checksum behind it."""
    return content + _MARK + hashlib.sha256(content).hexdigest().encode()


def read_netcdf(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The numeric variables of a netCDF-4 file, and its attributes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file whose checksum is another, or that HDF5 cannot read; arrays that the
            file's size does not hold.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file {path}; got nothing there.")
    content = path.read_bytes()
    end = content[-_END:]
    if end.startswith(_MARK) and checksummed(content[:-_END]) != content:
        raise ValueError(
            f"Expected {path} as it was written; got content that differs from its checksum."
        )
    try:
        _check_heaps(content)
        return _read(content)
    except Exception as error:  # h5py passes on whatever a damaged file makes HDF5 say
        raise ValueError(f"Expected a whole netCDF file in {path}; got {reason(error)}.") from error


def _check_heaps(content: bytes) -> None:
    """Refuse a damaged heap of strings: HDF5 goes round for ever where an object has no size.

    A heap ("GCOL", version 1, at byte 8 its size) is a row of objects: a number of two bytes, at
    byte 8 the size, and where the number is not 0 behind these 16 bytes so many, padded to eights.
    """
    start = content.find(_HEAP)
    while start >= 0:
        end = min(start + _number(content, start + 8), len(content))
        offset = start + 16
        while offset + 16 <= end:
            size = _number(content, offset + 8)
            if content[offset : offset + 2] != b"\0\0":
                size = 16 + (size + 7) // 8 * 8
            if size < 16 or offset + size > end:
                raise ValueError("a heap of strings that is damaged")
            offset += size
        start = content.find(_HEAP, start + 1)


def _number(content: bytes, offset: int) -> int:
    return int.from_bytes(content[offset : offset + 8], "little")


def _read(content: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    import h5py

    with h5py.File(io.BytesIO(content), "r") as file:
        variables = {}
        for name in file:
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"a link to elsewhere, {short(name)}")
            dataset = file[name]
            if isinstance(dataset, h5py.Dataset) and dataset.dtype.kind in "biuf":
                _check_storage(name, dataset, len(content))
                variables[name] = np.asarray(dataset[()])
        attributes = {}
        for name in file.attrs:
            kind = file.attrs.get_id(name)
            if kind.get_storage_size() > _MAX_ATTRIBUTE:
                raise ValueError(f"an attribute {short(name)} of {kind.get_storage_size()} bytes")
            attributes[name] = _plain(file.attrs[name])
        return variables, attributes


def _check_storage(name: str, dataset: Any, size: int) -> None:
    """Refuse what would need more memory than the file has bytes, before it is read."""
    if dataset.external or dataset.is_virtual or dataset.compression:
        raise ValueError(f"{short(name)} stored elsewhere or compressed")
    if dataset.nbytes > size:
        raise ValueError(f"{short(name)} of {dataset.nbytes} bytes in a file of {size}")


def _plain(value: Any) -> Any:
    """An attribute as netCDF means it: arrays of one value are that value, bytes are text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.item() if value.size == 1 else tuple(value.ravel().tolist())
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def netcdf_content(dataset: Any) -> bytes:
    """An ``xarray.Dataset`` as the content of a netCDF file.

    It is made in memory: HDF5 ends the process where a disk is full.
    """
    import h5netcdf
    from xarray.backends import H5NetCDFStore

    content = io.BytesIO()
    with h5netcdf.File(content, "w") as file:
        dataset.dump_to_store(H5NetCDFStore(file))
    return content.getvalue()
