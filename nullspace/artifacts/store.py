"""Directories of safetensors, written whole or not at all, and checked when they are read.

A directory `OUT` is filled in a temporary directory beside it and renamed when everything in it is on the disk: what is found by
the name `OUT` is complete. The temporary directory, `OUT.<8 hexadecimal digits>.part`, holds the file `nullspace-part.json`, by
which the next run knows it, `new`, and while `OUT` is being replaced `old`. What a crash has left is deleted by the next run that
writes to `OUT`, and `old` gets its name back if it has lost it. All of this happens under the lock of `OUT` (`nullspace.locks`), so
that no living process is at work there. Links are followed: what they point to is replaced, not the link.

`nullspace.json` in a directory names its kind, its format version, and the size and SHA-256 of every file that it vouches for, and
carries a digest of itself. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from nullspace.artifacts.locks import locked, naming, parents
from nullspace.artifacts.records import MANIFEST, files_in, kind_of, read_json

PART = "nullspace-part.json"  # marks a temporary directory of ours


@contextlib.contextmanager
def new_directory(out: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Context manager: a directory to fill, which becomes `out` when the block ends and vanishes if it raises.

    Args:
        out: must not exist yet, or be an empty directory.
        overwrite: replace `out` if it is a directory of ours: it has a `nullspace.json`, and nothing was added to it.

    Yields:
        The path to write to, on the same file system as `out`.

    Raises:
        FileExistsError: if `out` is in the way, before the block or after it; or if another run is writing to it.
        OSError: naming `out`, if it cannot be created.
    """
    with reserved(out, overwrite=overwrite) as place, _part(place) as part:
        new = part / "new"
        new.mkdir()
        yield new
        for folder, _, names in os.walk(new):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        _replace(place, new, part / "old", _is_directory_of_ours, overwrite=overwrite)


@contextlib.contextmanager
def new_file(out: str | os.PathLike[str], *, overwritable: Callable[[Path], bool], overwrite: bool = False) -> Iterator[Path]:
    """Context manager: a path to write a file to, which becomes `out` when the block ends and vanishes if it raises.

    Args:
        out: must not exist yet.
        overwritable: whether a file may be overwritten.
        overwrite: replace `out` if it is such a file.

    Raises:
        FileExistsError, OSError: as `new_directory`.
    """
    with reserved(out, overwritable, overwrite=overwrite) as place, _part(place) as part:
        new = part / "new"
        yield new
        sync(new)
        _replace(place, new, part / "old", overwritable, overwrite=overwrite)


@contextlib.contextmanager
def reserved(
    out: str | os.PathLike[str], overwritable: Callable[[Path], bool] | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Context manager: nobody else writes to `out` inside, and it can be written; to be entered before hours of work.

    Yields:
        The absolute path of `out`, without links.

    Raises:
        FileExistsError, OSError: as `new_directory`.
    """
    place = resolved(out)
    with locked(place):
        _tidy(place)
        check_free(out, overwritable, overwrite=overwrite)
        yield place


def check_free(out: str | os.PathLike[str], overwritable: Callable[[Path], bool] | None = None, *, overwrite: bool = False) -> None:
    """Whether `new_directory` (or `new_file`, with its `overwritable`) could write `out`, which is tried.

    Raises:
        FileExistsError: if `out` is in the way.
        OSError: naming `out`, if it cannot be created, or not be replaced since it is a mount point.
    """
    place = resolved(out)
    _check_in_the_way(Path(out), place, overwritable, overwrite=overwrite)
    with parents(place), naming(place):
        probe = _part_of(place)
        probe.mkdir()
        probe.rmdir()


def resolved(out: str | os.PathLike[str]) -> Path:
    """The absolute path of `out`, without links.

    Raises:
        OSError: if it is a mount point, which cannot be renamed.
    """
    place = Path(os.path.realpath(out))
    if _is_mount_point(place):
        raise OSError(f"{out} is a mount point, which cannot be replaced; choose a place in it: {Path(out) / 'result'}")
    return place


def _check_in_the_way(out: Path, place: Path, overwritable: Callable[[Path], bool] | None, *, overwrite: bool) -> None:
    if place.is_symlink():
        raise FileExistsError(f"{out} is a link that leads in a circle; choose another place")
    if not place.exists() or (overwritable is None and place.is_dir() and not any(place.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists; choose another place or ask for it to be overwritten")
    if not (overwritable or _is_directory_of_ours)(place):
        lacks = f" (it has no {MANIFEST} of ours)" if overwritable is None else ""
        foreign = _find_foreign(place) if overwritable is None else None
        if foreign is not None:
            raise FileExistsError(f"{out} holds {foreign!r}, which nullspace did not write: move it, or choose another place")
        raise FileExistsError(f"{out} was not written by nullspace{lacks} and is not overwritten")


def _is_directory_of_ours(place: Path) -> bool:
    return place.is_dir() and (place / MANIFEST).is_file() and kind_of(place) is not None and _find_foreign(place) is None


def _find_foreign(place: Path) -> str | None:
    """A file in a directory with a manifest that was put there later, if there is one."""
    try:
        known = {MANIFEST, *read_json(place / MANIFEST)["contents"]}
    except (OSError, ValueError, TypeError, KeyError):  # another kind of file; or written before manifests listed all files
        return None
    return next((name for name in files_in(place) if name not in known), None)


def _is_mount_point(place: Path) -> bool:
    if os.path.ismount(place):
        return True
    try:  # where a part of the same file system is mounted, only the table says so
        table = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = {re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), line.split(b" ")[4]) for line in table}
    return os.fsencode(place) in points


@contextlib.contextmanager
def _part(place: Path) -> Iterator[Path]:
    """Context manager: the temporary directory beside a place. On an error, what was at the place before is put back."""
    part = _part_of(place)
    with naming(place):
        part.mkdir()
    try:
        about = {"nullspace": "part", "out": str(place), "process": os.getpid(), "host": socket.gethostname()}
        with writing(place):
            (part / PART).write_text(json.dumps(about), encoding="utf-8")
            yield part
    finally:
        _remove_part(place, part)


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Context manager: an `OSError` inside that names no file names this one. A write to an open file names none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error


def _part_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.{secrets.token_hex(4)}.part")


def _remove_part(place: Path, part: Path) -> None:
    old = part / "old"
    if os.path.lexists(old) and not os.path.lexists(place):
        old.rename(place)
    elif os.path.lexists(old) and (part / "new").exists():
        return  # somebody else's has the name: what had it before is not deleted
    shutil.rmtree(part, ignore_errors=True)


def delete_directory(out: str | os.PathLike[str]) -> None:
    """Delete a directory of ours, and what killed runs have left beside it. What is not ours stays."""
    place = resolved(out)
    if place.parent.is_dir():
        with locked(place):
            _tidy(place)
            if _is_directory_of_ours(place):
                shutil.rmtree(place)


def _tidy(place: Path) -> None:
    """Delete what killed runs have left beside a place that is locked. What they have not made is left alone."""
    own = re.compile(re.escape(place.name) + r"\.[0-9a-f]{8}\.part")
    for part in place.parent.iterdir():
        if not own.fullmatch(part.name) or part.is_symlink() or not part.is_dir():
            continue
        names = set(os.listdir(part))
        if PART in names and names <= {PART, "new", "old"}:
            _remove_part(place, part)
        elif not names:
            part.rmdir()


def _replace(place: Path, new: Path, old: Path, overwritable: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Rename `new` to `place`, and what is there to `old`, where it is looked at: it may have come after the block began."""
    if place.is_symlink() or place.exists():
        place.rename(old)
        free = not old.is_symlink() and new.is_dir() and old.is_dir() and not any(old.iterdir())
        if not free and not (overwrite and not old.is_symlink() and overwritable(old)):
            old.rename(place)
            raise FileExistsError(f"{place} has come into being while its content was computed, and is not overwritten")
    try:
        if new.is_dir():
            new.rename(place)  # refused if a file or a directory with content has come to be there
        else:
            _link(new, place)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise FileExistsError(f"{place} has come into being while its content was computed, and is not overwritten") from error
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise FileExistsError(f"{place} has come into being while its content was computed, and is not overwritten") from error
    sync(place.parent)


def _link(new: Path, place: Path) -> None:
    """Give a file its name, unless another has it."""
    try:
        os.link(new, place)
        new.unlink()
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(place):
            raise FileExistsError(place) from None
        new.rename(place)


def sync(path: Path) -> None:
    """See to it that a file or a directory is on the disk, not only on its way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
