"""Locks on output paths, and temporary folders that are deleted even if their process is killed.

A path `OUT` is locked by a lock file `OUT.nullspace-lock` beside it. Runs on other machines see the lock if the file system shares
locks between machines (NFS and Lustre do). The operating system releases the lock of a killed process; where a file system has no
locks, `filelock` falls back to the existence of the file. The holder deletes the file before it releases the lock. Another process
may have opened the deleted file in the meantime, so `_acquire` compares the locked file with the file that has the name.
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

from nullspace.errors import Busy, OutputExistsError

SUFFIX = ".nullspace-lock"
PREFIX = "nullspace-"
# Attempts to lock a file that another process deletes while it is opened, a few milliseconds apart.
ATTEMPTS = 200
_held: dict[Path, tuple[int, int]] = {}  # locked path → process and thread


@contextlib.contextmanager
def locked(out: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Context manager: holds the lock of a path, which need not exist. Nested uses in one thread share the lock.

    Creates missing parent directories, and removes them at the end if they are empty.

    Args:
        out: path of the output.
        wait: wait until the lock is released, instead of raising `Busy`.

    Raises:
        Busy: naming the path, and the process that holds the lock if the lock file names it.
        FileExistsError: if something else has the name of the lock file.
        OSError: naming the path, if nothing can be created beside it.
    """
    output = Path(os.path.realpath(out))
    owner = (os.getpid(), threading.get_ident())
    if _held.get(output) == owner:
        yield
        return
    with parents(output):
        lock = _acquire(output, wait)
        _held[output] = owner
        try:
            yield
        finally:
            del _held[output]
            _release(lock)


@contextlib.contextmanager
def parents(output: Path) -> Iterator[None]:
    """Context manager: creates the missing parent directories of a path, and at the end removes those that are empty."""
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        with naming(output):
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(output.parent)) from error
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def naming(output: Path) -> Iterator[None]:
    """Context manager: an `OSError` inside is raised again, naming the path that cannot be created."""
    try:
        yield
    except (FileExistsError, filelock.Timeout):
        raise
    except OSError as error:
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        raise type(error)(f"{output} cannot be created ({what}); choose another place") from error


def _acquire(output: Path, wait: bool) -> filelock.BaseFileLock:
    path = output.with_name(output.name + SUFFIX)
    lock = filelock.FileLock(path)
    for _ in range(ATTEMPTS):
        try:
            with naming(output):
                _check_ours(path)
                output.parent.mkdir(parents=True, exist_ok=True)  # another run may have removed it as empty
                lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            raise Busy(f"{output} is being written by {_holder(path)}; wait for its end, or choose another place") from None
        except OutputExistsError:
            raise
        except (FileNotFoundError, FileExistsError):  # the directory was removed, maybe while mkdir found it there
            continue
        if _has_name(lock, path):
            if not isinstance(lock, filelock.SoftFileLock):  # filelock's own text there serves to detect stale locks
                path.write_text(json.dumps({"nullspace": "lock", "process": os.getpid(), "host": socket.gethostname()}))
            return lock
        lock.release()
        time.sleep(0.005)
    raise Busy(f"{output} is being written by other runs; wait for their end, or choose another place")


def _release(lock: filelock.BaseFileLock) -> None:
    with contextlib.suppress(OSError):  # Windows does not delete open files; filelock deletes it after the release
        os.unlink(lock.lock_file)
    lock.release()


def _has_name(lock: filelock.BaseFileLock, path: Path) -> bool:
    """Whether the locked file still has its name."""
    descriptor = lock._context.lock_file_fd
    if descriptor is None or os.name == "nt":
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check_ours(path: Path) -> None:
    """Raise `FileExistsError` if something else has the name of a lock file. A lock file may be empty, or written by `filelock`."""
    if not os.path.lexists(path):
        return
    plain = path.is_file() and not path.is_symlink()  # reading a pipe may never end
    try:
        ours = plain and re.match(rb'$|\{"nullspace": "lock"|\d+\n', path.read_bytes())
    except FileNotFoundError:  # deleted in the meantime
        return
    if not ours:
        raise OutputExistsError(f"{path} is in the way: it is no lock file of nullspace")


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"another run (process {held['process']} on {held['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


@contextlib.contextmanager
def temporary_folder(inside: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Context manager: a temporary folder, deleted at the end.

    Folders of killed processes are deleted too: a folder in use holds a locked file.

    Args:
        inside: the parent directory; the system's directory for temporary files by default.
    """
    folder = TemporaryFolder(inside)
    try:
        yield folder.path
    finally:
        folder.delete()


class TemporaryFolder:
    """The folder of `temporary_folder`, for objects that delete it themselves.

    Attributes:
        path: the folder to write to.
    """

    def __init__(self, inside: str | os.PathLike[str] | None = None) -> None:
        parent = Path(inside or tempfile.gettempdir()).absolute()
        _sweep(parent)
        for _ in range(ATTEMPTS):
            self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock = filelock.FileLock(self._folder / f"own{SUFFIX}", thread_local=False)
            # Before the lock is acquired, another process may sweep the folder as abandoned.
            with contextlib.suppress(filelock.Timeout, FileNotFoundError, FileExistsError):
                self._lock.acquire(timeout=0)
                if _has_name(self._lock, Path(self._lock.lock_file)):
                    break
                self._lock.release()
        self.path = self._folder / "content"
        self.path.mkdir()

    def delete(self) -> None:
        """Delete the folder and its content."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()


def _sweep(parent: Path) -> None:
    """Delete temporary folders that no process holds, and empty folders of such names. Other folders are left alone."""
    for folder in parent.glob(f"{PREFIX}????????"):
        path = folder / f"own{SUFFIX}"
        if folder.is_symlink() or path.is_symlink():
            continue
        if not path.is_file():
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty: its process was killed before it created the lock file
            continue
        lock = filelock.FileLock(path)
        with contextlib.suppress(OSError):  # in use, or of another user
            lock.acquire(timeout=0)
            try:
                if _has_name(lock, path):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                lock.release()
