"""Output that never fails: results are in files, and what is shown of them may be lost.

A terminal, or whatever reads a pipe, may not have the characters (``±`` becomes ``+/-`` there,
others ``?``), be closed, or write to a full disk.
"""

import contextlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["Output", "console", "progress_bar"]

_PLAIN = str.maketrans({"±": "+/-", "−": "-", "…": "...", "·": "*", "→": "->", "\u00a0": " "})


class Output:
    """Standard output, or error, whichever stream that is at the time of writing.

    Args:
        name: ``stdout`` or ``stderr``.
    """

    def __init__(self, name: str = "stdout"):
        self.name = name

    @property
    def stream(self) -> Any:
        return getattr(sys, self.name)

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, none at all
            try:
                text.encode(self.encoding)
            except UnicodeEncodeError:
                plain = text.translate(_PLAIN).encode(self.encoding, "replace")
                self.stream.write(plain.decode(self.encoding))
            else:
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        try:
            return self.stream.isatty()
        except (ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return self.stream.fileno()


def console() -> "Console":
    """A console for tables."""
    from rich.console import Console

    return Console(file=Output())  # type: ignore[arg-type]


def progress_bar(quiet: bool = False) -> "Progress":
    """A bar whose tasks have a field ``figures``, shown at the right; hidden where ``quiet``."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console(),
        disable=quiet,
    )
