"""Folders of pyrodiff: recognised by a mark, locked while written, cleared of its own files only.

The mark is the settings file, which such a folder holds from the first moment to the last.  A
folder without the mark that is not empty belongs to somebody else, and nothing is written into it.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pyrodiff.serialization.files import sweep

__all__ = ["check_free", "check_links", "locked", "remove"]

_LOCK = ".pyrodiff.lock"
_OURS = re.compile(rf"{re.escape(_LOCK)}|\..+\.[0-9a-f]{{16}}\.tmp")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made where it is missing.

    It ends with the process, however that ends.

    Raises:
        BlockingIOError: another process, or thread, holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"Expected {folder} to be unlocked; got a folder that another command is "
            "writing to. Wait until it has finished, or stop it."
        ) from None
    try:
        yield
    finally:
        try:
            # Removed while it is held: whoever has opened it notices, and takes a new one.
            (folder / _LOCK).unlink(missing_ok=True)
        finally:
            lock.release()


def check_free(folder: Path, what: str) -> None:
    """Raise FileExistsError where ``folder`` holds anything but traces of pyrodiff.

    Args:
        folder: without the mark; it need not exist.
        what: what is to be written there, for the message.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"Expected a folder for {what}; got the file {folder}.")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    names = [name for name in names if not _OURS.fullmatch(name)]
    if names:
        raise FileExistsError(
            f"Expected a new or empty folder for {what}; got {folder}, which holds {names[0]!r} "
            "and was not written by pyrodiff. Nothing was changed: choose another --output."
        )


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raise FileExistsError where one of these names is a link: nothing is written through it."""
    for name in names:
        if (path := folder / name).is_symlink():
            raise FileExistsError(
                f"Expected {path} to be pyrodiff's own; got a link to {path.readlink()}. "
                "Nothing was changed: remove the link."
            )


def remove(folder: Path, ours: Callable[[str], object]) -> None:
    """Remove pyrodiff's files from ``folder``, by name, and the folder where nothing is left.

    Args:
        folder: need not exist; a link to a folder is refused.
        ours: whether a file of this name is pyrodiff's.

    Raises:
        OSError: a file that cannot be removed.
    """
    check_links(folder.parent, [folder.name])
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        name = path.name
        if ours(name) and not path.is_dir():
            path.unlink()
        elif _OURS.fullmatch(name) and name != _LOCK and ours(target := name[1:-21]):
            sweep(folder / target)
    if not any(folder.iterdir()):
        folder.rmdir()
