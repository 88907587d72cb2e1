"""Cases in a forked child: 10 seconds of its processor, 500 MiB each, and what became of them.

A crash in native code ends the child alone.
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import pyrodiff

SECONDS, MEBIBYTES = 10, 500
MESSAGE = 1500  # characters
RECYCLED = 500  # cases, after which a child makes room for another
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


class Worker:
    """A forked child that reads one folder after the other; another takes its place when it dies.

    Args:
        read: reads a folder; what it raises, or that it returns, is the outcome.
    """

    def __init__(self, read: Callable[[Path], object]):
        self.read, self.child, self.cases = read, 0, 0

    def run(self, files: Files) -> Outcome:
        """Write ``files`` into a folder of their own and have the child read it."""
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            if not self.child:
                self._start()
            self.requests.write(f"{folder}\n".encode())
            self.requests.flush()
            answer = self.answers.readline()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        outcome = Outcome(*json.loads(answer)) if answer else None
        self.cases += 1
        if outcome is None or not outcome.allowed or self.cases >= RECYCLED:
            ended = self.close()
        return outcome or ended

    def close(self) -> Outcome:
        """End the child, and say how it ended."""
        if not self.child:
            return Outcome("right", "")
        self.requests.close()
        self.answers.close()
        _, status = os.waitpid(self.child, 0)
        self.child = self.cases = 0
        if not os.WIFSIGNALED(status):
            return Outcome("crash", f"status {status}")
        number = os.WTERMSIG(status)
        slow = number in (signal.SIGALRM, signal.SIGPROF)
        return Outcome("hang" if slow else "crash", f"signal {number}")

    def _start(self) -> None:
        (request_end, self_requests), (self_answers, answer_end) = os.pipe(), os.pipe()
        self.child = os.fork()
        if self.child == 0:
            os.close(self_requests)
            os.close(self_answers)
            _serve(self.read, os.fdopen(request_end, "rb"), os.fdopen(answer_end, "wb"))
        os.close(request_end)
        os.close(answer_end)
        self.requests, self.answers = os.fdopen(self_requests, "wb"), os.fdopen(self_answers, "rb")


def _serve(read: Callable[[Path], object], requests: IO[bytes], answers: IO[bytes]) -> None:
    """What the child does, until there are no more requests."""
    try:
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        warnings.simplefilter("ignore")
        nowhere = io.StringIO()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            for line in requests:
                folder = Path(line.decode().rstrip("\n"))
                os.chdir(folder)
                with _limits():
                    outcome = _outcome(read, folder)
                os.chdir("/")
                answers.write(json.dumps(outcome).encode() + b"\n")
                answers.flush()
    finally:
        os._exit(0)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Time and memory of one case; the first of its own processor, as machines may be busy."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEBIBYTES * 2**20, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(30 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _outcome(read: Callable[[Path], object], folder: Path) -> Outcome:
    try:
        read(folder)
    except Exception as error:
        kind = _kind(error)
        outcome = Outcome(kind, str(error)[:MESSAGE])
        return outcome if outcome.allowed else Outcome(kind, traceback.format_exc()[-4000:])
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
