"""Output directories and files that appear completely or not at all.

An output `OUT` is written in a temporary directory beside it, synced, and renamed: `OUT` is always complete. The temporary
directory, `OUT.<8 hexadecimal digits>.part`, holds a marker file `nullspace-part.json`, the output as `new`, and during a
replacement the previous output as `old`. The next run that writes to `OUT` deletes what a crash has left, and renames `old` back if
`OUT` is missing. All of this happens under the lock of `OUT` (`nullspace.artifacts.locks`). Links are followed: their target is
replaced, not the link.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from nullspace.artifacts.locks import locked, naming, parents
from nullspace.artifacts.records import MANIFEST, files_in, kind_of, read_json
from nullspace.errors import OutputError, OutputExistsError

logger = logging.getLogger(__name__)

PART = "nullspace-part.json"  # marks a temporary directory of nullspace


@contextlib.contextmanager
def new_directory(out: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Context manager: a directory to fill. It becomes `out` when the block ends, and is deleted if the block raises.

    Args:
        out: must not exist yet, or be an empty directory.
        overwrite: replace `out` if nullspace wrote it (it has a `nullspace.json`) and nothing was added to it.

    Yields:
        The path to write to, on the same file system as `out`.

    Raises:
        FileExistsError: if `out` exists and may not be replaced, before the block or after it; or if another run is writing to it.
        OSError: naming `out`, if it cannot be created.
    """
    with reserved(out, overwrite=overwrite) as path, _part(path) as part:
        new = part / "new"
        new.mkdir()
        yield new
        for folder, _, names in os.walk(new):
            for name in names:
                _give_permissions(part, Path(folder, name))
                sync(Path(folder, name))
            sync(Path(folder))
        _replace(path, new, part / "old", _is_written_by_nullspace, overwrite=overwrite)
    logger.info("wrote %s", out)


@contextlib.contextmanager
def new_file(out: str | os.PathLike[str], *, overwritable: Callable[[Path], bool], overwrite: bool = False) -> Iterator[Path]:
    """Context manager: a path to write a file to. It becomes `out` when the block ends, and is deleted if the block raises.

    Args:
        out: must not exist yet.
        overwritable: whether an existing file may be replaced.
        overwrite: replace `out` if it is such a file.

    Raises:
        FileExistsError, OSError: as `new_directory`.
    """
    with reserved(out, overwritable, overwrite=overwrite) as path, _part(path) as part:
        new = part / "new"
        yield new
        _give_permissions(part, new)
        sync(new)
        _replace(path, new, part / "old", overwritable, overwrite=overwrite)


@contextlib.contextmanager
def reserved(
    out: str | os.PathLike[str], overwritable: Callable[[Path], bool] | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Context manager: locks `out` and checks that it can be written. Enter it before hours of work.

    Yields:
        The absolute path of `out`, without links.

    Raises:
        FileExistsError, OSError: as `new_directory`.
    """
    path = resolved(out)
    with locked(path):
        _tidy(path)
        check_free(out, overwritable, overwrite=overwrite)
        yield path


def check_free(out: str | os.PathLike[str], overwritable: Callable[[Path], bool] | None = None, *, overwrite: bool = False) -> None:
    """Check that `new_directory` (or `new_file`, with its `overwritable`) can write `out`, by creating a directory beside it.

    Raises:
        FileExistsError: if `out` exists and may not be replaced.
        OSError: naming `out`, if it cannot be created, or is a mount point.
    """
    path = resolved(out)
    _check_replaceable(Path(out), path, overwritable, overwrite=overwrite)
    with parents(path), naming(path):
        probe = _part_of(path)
        probe.mkdir()
        probe.rmdir()


def resolved(out: str | os.PathLike[str]) -> Path:
    """The absolute path of `out`, without links.

    Raises:
        OSError: if it is a mount point, which cannot be renamed.
    """
    path = Path(os.path.realpath(out))
    if _is_mount_point(path):
        raise OutputError(f"{out} is a mount point, which cannot be replaced; choose a place in it: {Path(out) / 'result'}")
    return path


def _check_replaceable(out: Path, path: Path, overwritable: Callable[[Path], bool] | None, *, overwrite: bool) -> None:
    if path.is_symlink():
        raise OutputExistsError(f"{out} is a link that leads in a circle; choose another place")
    if not path.exists() or (overwritable is None and path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists; choose another place or ask for it to be overwritten")
    if not (overwritable or _is_written_by_nullspace)(path):
        lacks = f" (it has no {MANIFEST} of ours)" if overwritable is None else ""
        foreign = _find_foreign(path) if overwritable is None else None
        if foreign is not None:
            raise OutputExistsError(f"{out} holds {foreign!r}, which nullspace did not write: move it, or choose another place")
        raise OutputExistsError(f"{out} was not written by nullspace{lacks} and is not overwritten")


def _is_written_by_nullspace(path: Path) -> bool:
    return path.is_dir() and (path / MANIFEST).is_file() and kind_of(path) is not None and _find_foreign(path) is None


def _find_foreign(path: Path) -> str | None:
    """A file that the manifest of a directory does not list, if there is one."""
    try:
        listed = {MANIFEST, *read_json(path / MANIFEST)["contents"]}
    except (OSError, ValueError, TypeError, KeyError):  # another kind of file; or written before manifests listed all files
        return None
    return next((name for name in files_in(path) if name not in listed), None)


def _is_mount_point(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # `ismount` misses bind mounts of the same file system
        table = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = {re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), line.split(b" ")[4]) for line in table}
    return os.fsencode(path) in points


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    """Context manager: the temporary directory beside an output. On an error, the previous output is put back."""
    part = _part_of(path)
    with naming(path):
        part.mkdir()
    try:
        about = {"nullspace": "part", "out": str(path), "process": os.getpid(), "host": socket.gethostname()}
        with writing(path):
            (part / PART).write_text(json.dumps(about), encoding="utf-8")
            yield part
    finally:
        _remove_part(path, part)


def _give_permissions(part: Path, file: Path) -> None:
    """Give a file the permissions of an ordinary new one here, which umask and default ACLs have given to the marker file.

    Other libraries write to a temporary file first, which only its owner can read (safetensors, from 0.8 on).
    """
    mode = stat.S_IMODE((part / PART).stat().st_mode)
    if not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager: adds this file name to an `OSError` that has none, as one of a write to an open file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def _remove_part(path: Path, part: Path) -> None:
    old = part / "old"
    if os.path.lexists(old) and not os.path.lexists(path):
        old.rename(path)
    elif os.path.lexists(old) and (part / "new").exists():
        return  # another program has taken the name: the previous output is not deleted
    shutil.rmtree(part, ignore_errors=True)


def delete_directory(out: str | os.PathLike[str]) -> None:
    """Delete a directory that nullspace wrote, and what killed runs have left beside it. Other files stay."""
    path = resolved(out)
    if path.parent.is_dir():
        with locked(path):
            _tidy(path)
            if _is_written_by_nullspace(path):
                shutil.rmtree(path)


def _tidy(path: Path) -> None:
    """Delete what killed runs have left beside a locked path. Files of other origin are left alone."""
    own = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.part")
    for part in path.parent.iterdir():
        if not own.fullmatch(part.name) or part.is_symlink() or not part.is_dir():
            continue
        names = set(os.listdir(part))
        if PART in names and names <= {PART, "new", "old"}:
            _remove_part(path, part)
        elif not names:
            part.rmdir()


def _replace(path: Path, new: Path, old: Path, overwritable: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Rename `path` to `old`, check it there (it may be newer than the block), and rename `new` to `path`."""
    appeared = f"{path} has come into being while its content was computed, and is not overwritten"
    if path.is_symlink() or path.exists():
        path.rename(old)
        free = not old.is_symlink() and new.is_dir() and old.is_dir() and not any(old.iterdir())
        if not free and not (overwrite and not old.is_symlink() and overwritable(old)):
            old.rename(path)
            raise OutputExistsError(appeared)
    try:
        if new.is_dir():
            new.rename(path)  # fails if a file or a directory with content has appeared there
        else:
            _link(new, path)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise OutputExistsError(appeared) from error
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise OutputExistsError(appeared) from error
    sync(path.parent)


def _link(new: Path, path: Path) -> None:
    """Rename a file; `FileExistsError` if the name is taken."""
    try:
        os.link(new, path)
        new.unlink()
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise OutputExistsError(path) from None
        new.rename(path)


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
