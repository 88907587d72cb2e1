"""SIGTERM as an exception, as Python has it for SIGINT.

A cluster ends a job with SIGTERM.  By default that ends the process where it stands, with no word;
as an exception it closes files, sweeps temporaries, and can be answered with a message.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Terminated", "terminable"]


class Terminated(SystemExit):
    """SIGTERM came; where nobody catches it the process ends with the usual status 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises ``Terminated`` within.

    A handler that somebody else installed stays, and so do those of other threads than the main
    one, which alone can install any.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
