"""Places that are written by one run at a time, and what stands there already; temporary folders of processes that are gone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nullspace.artifacts import locks, records, store
from nullspace.artifacts.locks import TemporaryFolder, locked, temporary_folder

pytestmark = pytest.mark.processes

# Holds a lock and a temporary folder until it is killed.
HOLDER = """
import sys
from nullspace.artifacts.locks import TemporaryFolder, locked
with locked(sys.argv[1]):
    folder = TemporaryFolder(sys.argv[2])
    (folder.path / "large").write_text("data")
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holding(place: Path, temporary: Path) -> Iterator[int]:
    """Another process holds the lock of a place; its id. It is killed at the end."""
    command = [sys.executable, "-c", HOLDER, str(place), str(temporary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(out: Path, text: str = "new", **options: Any) -> None:
    with store.new_directory(out, **options) as part:
        (part / "file").write_text(text)
        records.write_manifest(part, "test", {}, files=("file",))


# ---- locks


def test_what_another_process_holds_is_refused_by_name_and_free_when_it_is_killed(tmp_path: Path) -> None:
    out, temporary = tmp_path / "new" / "out", tmp_path / "temporary"
    temporary.mkdir()
    with holding(out, temporary) as pid:
        with pytest.raises(FileExistsError, match=rf"{out} is being written by another run \(process {pid} on "):
            write(out)
        link = tmp_path / "link"
        link.symlink_to(out)
        with pytest.raises(FileExistsError, match=f"process {pid}"):  # the same place by another name
            write(link)
        (kept,) = temporary.iterdir()
        with temporary_folder(temporary):
            assert (kept / "content" / "large").exists()
    write(out)
    assert names(out.parent) == ["out"]
    with temporary_folder(temporary) as folder:
        assert names(temporary) == [folder.parent.name]
    assert not any(temporary.iterdir())


def test_a_thread_shares_its_own_locks_and_no_other_threads(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            write(tmp_path / "deep" / "out")
        except FileExistsError as error:
            refused.append(str(error))

    with locked(tmp_path / "deep" / "out"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with locked(tmp_path / "deep" / "out"):
            pass
        assert (tmp_path / "deep" / f"out{locks.SUFFIX}").exists()
    assert str(os.getpid()) in refused[0]
    assert not any(tmp_path.iterdir())  # directories that were made for nothing are gone too


def test_a_lock_file_that_was_deleted_while_it_was_opened_protects_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder deletes the file before it releases the lock; a process that then locks the deleted file must try again."""
    path = tmp_path / f"out{locks.SUFFIX}"
    has_name, seen = locks._has_name, []

    def deleted_once(lock: Any, path: Path) -> bool:
        if not seen:
            path.unlink()
        seen.append(has_name(lock, path))
        return seen[-1]

    monkeypatch.setattr(locks, "_has_name", deleted_once)
    with locked(tmp_path / "out"):
        assert seen == [False, True]
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("there", ["a file", "a directory", "a link"])
def test_a_file_of_the_lock_s_name_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, there: str) -> None:
    path, other = tmp_path / f"out{locks.SUFFIX}", tmp_path / "other"
    other.write_text("")
    if there == "a link":
        path.symlink_to(other)
    elif there == "a directory":
        path.mkdir()
    else:
        path.write_text("[[package]]\n")
    with pytest.raises(OSError, match=rf"out\{locks.SUFFIX}|out cannot be created"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["other", path.name]
    assert there != "a file" or path.read_text() == "[[package]]\n"


def test_temporary_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "nullspace-thesis00" / "content").mkdir(parents=True)
    (tmp_path / "nullspace-thesis00" / "content" / "thesis.txt").write_text("…")
    (tmp_path / "nullspace-abcdefgh").mkdir()  # of a process that was killed before it made the lock file
    folder = TemporaryFolder(tmp_path)
    assert names(tmp_path) == sorted(["nullspace-thesis00", folder.path.parent.name])
    folder.delete()
    assert names(tmp_path) == ["nullspace-thesis00"]


# ---- what stands at the place


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name, target in (("to nothing", "disk/new"), ("to an empty directory", "disk/empty"), ("to ours", "disk/ours")):
        out, place = tmp_path / name, tmp_path / target
        if name == "to an empty directory":
            place.mkdir()
        out.symlink_to(place)
        write(out, "first")
        for text in ("second", "third"):
            with pytest.raises(FileExistsError, match=name):
                store.check_free(out)
            write(out, text, overwrite=True)
            assert out.is_symlink()
            assert (place / "file").read_text() == text
    assert names(tmp_path / "disk") == ["empty", "new", "ours"]
    assert names(tmp_path) == ["disk", "to an empty directory", "to nothing", "to ours"]


def _mounted(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place.mkdir()
    known = Path.read_bytes
    line = b"36 35 98:0 /sub " + os.fsencode(place).replace(b" ", rb"\040") + b" rw,noatime - ext4 /dev/root rw"
    monkeypatch.setattr(Path, "read_bytes", lambda self: line if str(self) == "/proc/self/mountinfo" else known(self))
    return place


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("below a file", NotADirectoryError, "out cannot be created"),
        ("below a file's directory", NotADirectoryError, "out cannot be created"),
        ("a circle", FileExistsError, "circle"),
        ("a long name", OSError, "xxx cannot be created"),
        ("a file system", OSError, "mount point.*result"),
        ("a part of one", OSError, "mount point.*result"),
        ("read-only", OSError, "out cannot be created"),
    ],
)
def test_a_place_that_cannot_be_written_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, kind: type[OSError], says: str, overwrite: bool
) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    outs = {
        "below a file": lambda: tmp_path / "file" / "out",
        "below a file's directory": lambda: tmp_path / "file" / "deep" / "out",
        "a circle": lambda: tmp_path / "circle",
        "a long name": lambda: tmp_path / ("x" * 250),
        "a file system": lambda: Path("/proc"),
        "a part of one": lambda: _mounted(tmp_path / "a disk", monkeypatch),
        "read-only": lambda: Path("/proc/none/out"),
    }
    out = outs[what]()
    before = names(tmp_path)
    doors = (store.check_free, lambda *args, **options: store.new_directory(*args, **options).__enter__())
    for door in doors:
        with pytest.raises(kind, match=says):
            door(out, overwrite=overwrite)
    assert names(tmp_path) == before


@pytest.mark.parametrize("what", ["a directory", "a file", "a link", "an empty directory", "ours"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_has_come_while_the_content_was_made_is_not_replaced(tmp_path: Path, what: str, overwrite: bool) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if overwrite:
        write(out, "old")
    elsewhere.mkdir()
    refused = what != "an empty directory" and not (overwrite and what == "ours")
    with pytest.raises(FileExistsError, match="out") if refused else contextlib.nullcontext():  # noqa: SIM117
        with store.new_directory(out, overwrite=overwrite) as part:
            (part / "file").write_text("new")
            if overwrite:
                out.rename(tmp_path / "away")
            if what == "a file":
                out.write_text("theirs")
            elif what == "a link":
                out.symlink_to(elsewhere)
            else:
                out.mkdir()
            if what in ("a directory", "ours"):
                (out / "file").write_text("theirs")
            if what == "ours":
                records.write_manifest(out, "test", {}, files=("file",))
    assert names(tmp_path) == sorted(["elsewhere", "out", *(["away"] if overwrite else [])])
    if what == "a link":
        assert out.is_symlink()
    else:
        assert (out if what == "a file" else out / "file").read_text() == ("theirs" if refused else "new")


def test_a_new_file_is_never_put_in_the_place_of_another(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    for text in ("first", "second"):
        with store.new_file(out, overwritable=lambda path: path.read_text() == "first", overwrite=True) as part:
            part.write_text(text)
        assert out.read_text() == text
    with pytest.raises(FileExistsError, match="not written by nullspace"):
        store.check_free(out, lambda path: path.read_text() == "first", overwrite=True)
    new = store.new_file(tmp_path / "other.html", overwritable=lambda _: False)
    new.__enter__().write_text("ours")
    (tmp_path / "other.html").write_text("theirs")
    with pytest.raises(FileExistsError, match="come into being"):
        new.__exit__(None, None, None)
    assert (tmp_path / "other.html").read_text() == "theirs"
    assert names(tmp_path) == ["other.html", "page.html"]


def test_a_relative_place_stays_where_it_was_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with store.new_directory("out") as part:
        (part / "file").write_text("content")
        os.chdir("other")
    assert names(tmp_path) == ["other", "out"]
    assert not any((tmp_path / "other").iterdir())


@pytest.mark.parametrize("kind", ["output", "temporary"])
def test_a_directory_that_is_removed_while_it_is_asked_for_is_made_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = os.mkdir, list[str]()

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        try:
            real(path, *arguments, **options)
        except FileExistsError:
            if tmp_path in Path(path).parents and not removed:  # as by another process, before mkdir checks what is there
                removed.append(str(path))
                os.rmdir(path)
            raise

    monkeypatch.setattr(os, "mkdir", mkdir)
    if kind == "temporary":
        with temporary_folder(tmp_path) as folder:
            assert folder.is_dir()
    else:
        with locked(tmp_path / "folder" / "out"):
            assert (tmp_path / "folder" / f"out{locks.SUFFIX}").is_file()
    assert removed
