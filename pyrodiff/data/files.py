"""What the readers of files share: the size limit, and the errors of files that cannot be read.

Files are not trusted. Nothing in one is ever executed: arrays of objects, which are pickles, are
refused by their header, before their content is read. Every reader compares the size that a file
*declares* with :data:`MAX_BYTES` before it allocates memory, so that a small file cannot ask for a
large array.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyrodiff.checks import reason

__all__ = ["MAX_BYTES", "Context", "FileSizeError", "check_bytes", "unreadable"]

Context = str | int | Sequence[str | int]

MAX_BYTES = 16 * 2**30
"""The most bytes that a file may declare, 16 GiB."""


class FileSizeError(ValueError):
    """A file declares more than :data:`MAX_BYTES`."""


def check_bytes(declared: int, what: object) -> None:
    """Refuse more than :data:`MAX_BYTES`.

    Raises:
        FileSizeError: that says both sizes.
    """
    if declared > MAX_BYTES:
        raise FileSizeError(
            f"Expected at most {MAX_BYTES / 2**30:g} GiB; "
            f"got {what}, which declares {declared / 2**30:.3g} GiB"
        )


def unreadable(path: Path, expected: str, error: Exception) -> ValueError:
    """The error for a file that its format's library gave up on."""
    return ValueError(f"Expected {expected}; got {path}, which cannot be read ({reason(error)})")
