"""What the terminal shows of long work.  Showing never fails: results are in files.

A terminal, or what a pipe leads to, may not know the characters (``±`` becomes ``+/-`` there,
others ``?``), be closed, or lie on a full disk.
"""

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["console", "let_go", "make_forgiving", "progress_bar", "say"]

_PLAIN = str.maketrans({"±": "+/-", "−": "-", "…": "...", "·": "*", "→": "->", "\u00a0": " "})


class _Output:
    """Standard output, or error, as it is when something is written to it."""

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


def say(*lines: str, name: str = "stdout") -> None:
    """Print lines."""
    output = _Output(name)
    for line in lines:
        output.write(f"{line}\n")
    output.flush()


def console() -> "Console":
    """A console for tables."""
    from rich.console import Console

    return Console(file=_Output())  # type: ignore[arg-type]


def make_forgiving() -> None:
    """Let no character fail on this process's output, whoever writes it (help, other libraries)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # none, or closed
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def let_go() -> None:
    """Print what is left, or drop it where nobody reads any more, before the interpreter ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (AttributeError, ValueError):  # none, or closed
            pass


def progress_bar(quiet: bool = False) -> "Progress":
    """A bar whose tasks have a field ``figures``, shown at the right; nothing where ``quiet``."""
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
