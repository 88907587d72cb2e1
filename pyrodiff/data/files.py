"""The size limit of files, and the errors of those that cannot be read.

Files are not trusted. Nothing in one is ever executed: arrays of objects, which are pickles, are
refused by their header, before their content is read. Every reader compares the size that a file
*declares* with ``MAX_BYTES`` before it allocates memory, so that a small file cannot ask for a
large array.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pyrodiff.checks import reason

__all__ = ["MAX_BYTES", "Array", "Context", "FileSizeError", "check_bytes", "unreadable"]

Array = NDArray[Any]
Context = str | int | Sequence[str | int]

MAX_BYTES = 16 * 2**30
"""The most bytes that a file may declare, 16 GiB."""


class FileSizeError(ValueError):
    """A file declares more than ``MAX_BYTES``."""


def check_bytes(declared: int, what: object) -> None:
    """Refuse more than ``MAX_BYTES``.

    Raises:
        FileSizeError: that says both sizes.
    """
    if declared > MAX_BYTES:
        raise FileSizeError(
            f"Expected at most {MAX_BYTES / 2**30:g} GiB; "
            f"got {what}, which declares {declared / 2**30:.3g} GiB."
        )


def unreadable(path: Path, expected: str, error: Exception) -> ValueError:
    """The error for a file that the library of its format refuses."""
    got = reason(error).removesuffix(".")
    return ValueError(f"Expected {expected}; got {path}, which cannot be read ({got}).")
