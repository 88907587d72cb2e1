"""One case in a forked child: 10 seconds, 500 MiB, and what became of it.

A child inherits all imports, so that a case costs little more than the fork; a crash in native code
ends the child alone.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pyrodiff

SECONDS, MEBIBYTES, MESSAGE = 10, 500, 1500
PACKAGE = str(Path(pyrodiff.__file__).parent)
Files = Mapping[str, bytes]


class Outcome(NamedTuple):
    """How a case ended.

    Args:
        kind: "right", "ValueError", "OSError", or what is never allowed: another exception's name,
            "foreign ValueError", "long message", "hang", "crash".
        detail: the message, or the traceback of what is not allowed.
    """

    kind: str
    detail: str

    @property
    def allowed(self) -> bool:
        return self.kind in ("right", "ValueError", "OSError")


def run(read: Callable[[Path], object], files: Files) -> Outcome:
    """Write ``files`` into a folder of their own and read it in a child process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            _child(read, folder, send)
        os.close(send)
        with os.fdopen(receive, "rb") as stream:
            answer = stream.read()
        _, status = os.waitpid(child, 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Outcome("hang" if number == signal.SIGALRM else "crash", f"signal {number}")
    return Outcome(*json.loads(answer)) if answer else Outcome("crash", f"status {status}")


def _child(read: Callable[[Path], object], folder: Path, send: int) -> None:
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        limit = _address_space() + MEBIBYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(folder)
        warnings.simplefilter("ignore")
        nowhere = io.StringIO()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            outcome = _outcome(read, folder)
        os.write(send, json.dumps(outcome).encode())
    finally:
        os._exit(0)


def _outcome(read: Callable[[Path], object], folder: Path) -> Outcome:
    try:
        read(folder)
    except Exception as error:
        kind = _kind(error)
        known = Outcome(kind, str(error)[:MESSAGE])
        return known if known.allowed else Outcome(kind, traceback.format_exc()[-4000:])
    return Outcome("right", "")


def _kind(error: Exception) -> str:
    if isinstance(error, OSError):
        return "OSError"
    if not isinstance(error, ValueError):
        return type(error).__name__
    if len(str(error)) > MESSAGE:
        return "long message"
    return "ValueError" if _is_ours(error.__traceback__) else "foreign ValueError"


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether the package itself raised, not a library that it calls."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(PACKAGE)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def supported() -> bool:
    """Whether this system has what the harness needs."""
    return sys.platform.startswith("linux")
