"""Lines in the terminal, and how it is left behind."""

import contextlib
import os
import sys

from pyrodiff.training.output import Output, console, progress_bar

__all__ = ["complain", "console", "let_go", "make_forgiving", "progress_bar", "say"]


def say(*lines: str, name: str = "stdout") -> None:
    """Print lines."""
    output = Output(name)
    for line in lines:
        output.write(f"{line}\n")
    output.flush()


def complain(line: str) -> None:
    """Print a line to standard error."""
    say(line, name="stderr")


def make_forgiving() -> None:
    """Replace characters that the terminal does not have, whoever writes them (argparse, say)."""
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
