"""Locks of what is being written, and temporary folders that a killed process does not leave for ever.

A place `OUT` is locked by a lock file `OUT.nullspace-lock` beside it: the runs that would write there see it, on whichever machine
they are, if the file system carries locks from one to the other (NFS and Lustre do). The operating system releases the lock of a
process that is killed; where a file system has no locks, `filelock` falls back to the existence of the file. The file is deleted by
the process that holds it, before it is released. Another process may have opened the deleted file in the meantime, so whoever
acquires a lock compares the file that is locked with the one that has the name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from nullspace.errors import Busy

SUFFIX = ".nullspace-lock"
PREFIX = "nullspace-"
# How often a lock file that vanishes while it is being opened is tried again, each time after a few milliseconds.
ATTEMPTS = 200
_held: dict[Path, tuple[int, int]] = {}  # place → process and thread


@contextlib.contextmanager
def locked(out: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Context manager: holds the lock of a place, which need not exist. Nested uses of one thread share the lock.

    Args:
        out: the place.
        wait: until the lock is released, instead of raising `Busy`.

    Missing parent directories are made, and removed at the end if they are empty then.

    Raises:
        Busy: naming the place, and the process that holds the lock if it can be known.
        FileExistsError: if something else has the name of the lock file.
        OSError: naming the place, if nothing can be created beside it.
    """
    place = Path(os.path.realpath(out))
    owner = (os.getpid(), threading.get_ident())
    if _held.get(place) == owner:
        yield
        return
    with parents(place):
        lock = _acquire(place, wait)
        _held[place] = owner
        try:
            yield
        finally:
            del _held[place]
            _release(lock)


@contextlib.contextmanager
def parents(place: Path) -> Iterator[None]:
    """Context manager: makes the missing parent directories of a place, and at the end removes those that have stayed empty."""
    missing = [folder for folder in place.parents if not folder.exists()]
    try:
        with naming(place):
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place.parent)) from error
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def naming(place: Path) -> Iterator[None]:
    """Context manager: an `OSError` inside is raised again with the place that cannot be created."""
    try:
        yield
    except (FileExistsError, filelock.Timeout):
        raise
    except OSError as error:
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        raise type(error)(f"{place} cannot be created ({what}); choose another place") from error


def _acquire(place: Path, wait: bool) -> filelock.BaseFileLock:
    path = place.with_name(place.name + SUFFIX)
    lock = filelock.FileLock(path)
    for _ in range(ATTEMPTS):
        try:
            with naming(place):
                _check_ours(path)
                place.parent.mkdir(parents=True, exist_ok=True)  # another run may have removed it as empty
                lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            raise Busy(f"{place} is being written by {_holder(path)}; wait for its end, or choose another place") from None
        except FileNotFoundError:
            continue
        if _has_name(lock, path):
            if not isinstance(lock, filelock.SoftFileLock):  # whose file says more, by which it is known to be stale
                path.write_text(json.dumps({"nullspace": "lock", "process": os.getpid(), "host": socket.gethostname()}))
            return lock
        lock.release()
        time.sleep(0.005)
    raise Busy(f"{place} is being written by other runs; wait for their end, or choose another place")


def _release(lock: filelock.BaseFileLock) -> None:
    with contextlib.suppress(OSError):  # Windows deletes no open file; filelock does it after the release
        os.unlink(lock.lock_file)
    lock.release()


def _has_name(lock: filelock.BaseFileLock, path: Path) -> bool:
    """Whether the file that is locked is still the one that is found under its name."""
    descriptor = lock._context.lock_file_fd
    if descriptor is None or os.name == "nt":
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check_ours(path: Path) -> None:
    """Raise `FileExistsError` if something else has the name of a lock file. A lock file may be empty, or `filelock`'s own."""
    if not os.path.lexists(path):
        return
    plain = path.is_file() and not path.is_symlink()  # reading a pipe may never end
    try:
        ours = plain and re.match(rb'$|\{"nullspace": "lock"|\d+\n', path.read_bytes())
    except FileNotFoundError:  # by now
        return
    if not ours:
        raise FileExistsError(f"{path} is in the way: it is no lock file of nullspace")


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"another run (process {held['process']} on {held['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


@contextlib.contextmanager
def temporary_folder(inside: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Context manager: a folder for what is not kept, deleted at the end.

    Folders of processes that were killed are deleted too. That a folder is in use is known by a locked file in it.

    Args:
        inside: the directory to make it in; the system's directory for temporary files by default.
    """
    folder = TemporaryFolder(inside)
    try:
        yield folder.path
    finally:
        folder.delete()


class TemporaryFolder:
    """The folder of `temporary_folder`, for owners that are no block of code.

    Attributes:
        path: of the folder to write to.
    """

    def __init__(self, inside: str | os.PathLike[str] | None = None) -> None:
        parent = Path(inside or tempfile.gettempdir()).absolute()
        _sweep(parent)
        for _ in range(ATTEMPTS):
            self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock = filelock.FileLock(self._folder / f"own{SUFFIX}", thread_local=False)
            # Between the two lines above and here, another process may have taken the folder for a dead one's.
            with contextlib.suppress(filelock.Timeout, FileNotFoundError):
                self._lock.acquire(timeout=0)
                if _has_name(self._lock, Path(self._lock.lock_file)):
                    break
                self._lock.release()
        self.path = self._folder / "content"
        self.path.mkdir()

    def delete(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()


def _sweep(parent: Path) -> None:
    """Delete temporary folders that no living process holds. Other folders of such names are left alone, unless they are empty."""
    for folder in parent.glob(f"{PREFIX}????????"):
        path = folder / f"own{SUFFIX}"
        if folder.is_symlink() or path.is_symlink():
            continue
        if not path.is_file():
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty: its process was killed before it made the lock file
            continue
        lock = filelock.FileLock(path)
        with contextlib.suppress(OSError):  # another user's, or in use
            lock.acquire(timeout=0)
            try:
                if _has_name(lock, path):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                lock.release()
