"""Requests to stop: Ctrl-C (SIGINT) and a cluster's or a service manager's SIGTERM.

Both end the work in the same way, by an exception, so that files are closed and locks released.  A
second request while the first is answered changes nothing.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Terminated", "stoppable"]


class Terminated(KeyboardInterrupt):
    """SIGTERM; the command line ends with status 143 where Ctrl-C ends with 130."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, SIGTERM raises ``Terminated``, as SIGINT raises ``KeyboardInterrupt``.

    A signal that the process was started to ignore (``nohup``, a background job) stays ignored, and
    a handler that the user installed stays in place.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
