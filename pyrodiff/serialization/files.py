"""Files that are complete or absent, whatever happens while they are written.

A file is written under a temporary name beside its target, flushed to disk, and then moved over the
target in one step; the folder is flushed after it.  Whoever reads sees the old file or the new one,
also after a power cut.  What a killed process left under a temporary name is removed by the next
write of the same file; names in use are locked and left alone.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

if os.name == "posix":
    import fcntl

__all__ = ["fsync_folder", "named", "sweep", "temporaries", "write_atomically", "write_bytes"]


def write_bytes(path: Path, content: bytes) -> None:
    """Make ``content`` the content of ``path``, at once.

    Permissions are those of the process's umask.

    Args:
        path: the target; its folder is made where it is missing.
        content: not empty.

    Raises:
        OSError: the disk is full or broken (the error names the file); the old file, if any, is
            left as it was.
    """
    with _replaced(path) as (handle, _):
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(handle, rest) :]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """As ``write_bytes``, for content that ``write`` writes to the name that it gets.

    The name is ``.NAME.<16 hexadecimal digits>.tmp`` and has no suffix of ``path``'s.
    """
    with _replaced(path) as (_, temporary):
        write(temporary)


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[tuple[int, Path]]:
    """A new file beside ``path``, its handle and name, which takes ``path``'s place at the end."""
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        handle, temporary = _create(path)
        try:
            yield handle, temporary
            _flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # swept later
                temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        fsync_folder(path.parent)
    except OSError as error:
        raise named(error, path) from error


def named(error: OSError, path: Path) -> OSError:
    """The error with a file's name in it: ``write`` and ``fsync`` say none."""
    if error.filename is not None:
        return error
    if error.errno is None:
        return OSError(f"{error} ({path})")
    return OSError(error.errno, error.strerror, str(path))


def temporaries(path: Path) -> list[Path]:
    """The temporary files that were, or are, to become ``path``."""
    if not path.parent.is_dir():
        return []
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.tmp")
    return [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]


def sweep(path: Path) -> None:
    """Remove what killed processes left of ``path`` under temporary names."""
    for temporary in temporaries(path):
        try:
            handle = os.open(temporary, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError:  # gone, or a link, which is not ours
            continue
        try:
            if _lock(handle):
                temporary.unlink(missing_ok=True)
        finally:
            os.close(handle)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # no such thing on this file system
            raise named(error, folder) from error
    finally:
        os.close(handle)


def _create(path: Path) -> tuple[int, Path]:
    """A new, locked file beside ``path``, and its handle."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock(handle) and temporary.exists():  # not swept between the two lines
            return handle, temporary
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether nobody else has locked the file; systems without such locks say yes."""
    if os.name != "posix":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        if os.fstat(handle).st_size == 0:
            raise OSError(f"Expected something to be written to {path}; got nothing")
        os.fsync(handle)
    finally:
        os.close(handle)
