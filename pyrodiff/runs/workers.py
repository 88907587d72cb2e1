"""Tasks shared among worker processes.

Each worker is a fresh interpreter (spawned) with its own pipe: it makes its function once, then
answers one task after the other.  A closed pipe tells the main process that a worker has died, and
the workers that the main process has, upon which they end.
"""

import contextlib
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["share"]


def _send(connection: Connection, value: Any) -> None:
    connection.send_bytes(pickle.dumps(value))  # by value: no shared memory, no open files


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _serve(connection: Connection) -> None:
    """Answer tasks with (result, None) or (None, exception) until there are no more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of them; the main process decides
        signal.signal(number, signal.SIG_IGN)
    work = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        make, arguments = _receive(connection)
        while (task := _receive(connection)) is not None:
            try:
                work = make(*arguments) if work is None else work
                answer: tuple[Any, Exception | None] = work(task), None
            except Exception as error:
                answer = None, error
            _send(connection, answer)


def _ask(connection: Connection, process: BaseProcess) -> Any:
    """The next answer of a worker that has one, or that has died."""
    try:
        result, error = _receive(connection)
    except (EOFError, ConnectionError) as lost:
        process.join(timeout=10)
        raise ChildProcessError(
            f"Expected every worker process to finish; got one that ended (exit code "
            f"{process.exitcode}), perhaps for lack of memory."
        ) from lost
    if error is not None:
        raise error
    return result


def share(
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    tasks: Iterable[Any],
    processes: int,
) -> Iterator[Any]:
    """The results of ``make(*arguments)(task)`` for all tasks, in order of arrival.

    Closing the iterator early ends the workers at once.

    Args:
        make: a function of a module, called once in each worker.
        arguments, tasks: anything that can be pickled, other than None.
        processes: the most workers.

    Raises:
        ChildProcessError: a worker that died.
        Exception: what ``make`` or its function raised there.
    """
    waiting = iter(tasks)
    firsts = list(islice(waiting, processes))
    with _workers(len(firsts)) as workers:
        for connection, task in zip(workers, firsts, strict=True):
            with contextlib.suppress(BrokenPipeError):  # noticed when it is asked
                _send(connection, (make, arguments))
                _send(connection, task)
        working = set(workers)
        while working:
            for connection in working & set(wait(list(working))):
                yield _ask(connection, workers[connection])
                with contextlib.suppress(BrokenPipeError):
                    _send(connection, task := next(waiting, None))
                if task is None:
                    working.remove(connection)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Worker processes by our ends of their pipes; they are ended at once in any case."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
        yield workers
    finally:
        for connection, process in workers.items():
            connection.close()
            process.kill()
            process.join()
