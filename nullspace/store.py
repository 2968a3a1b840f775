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
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nullspace.locks import locked, naming, parents
from nullspace.parts import entries, is_sharded, shape_of
from nullspace.schema import Field, an_object, check_fields, is_plain_name, list_of, optional, text, whole

MANIFEST = "nullspace.json"
FORMAT_VERSION = 1
PART = "nullspace-part.json"  # marks a temporary directory of ours

# safetensors' names, in the order in which its files hold them.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# What every manifest says.
_MANIFEST_FIELDS = {"kind": text(), "format_version": whole(), "files": an_object(), "contents": optional(list_of(text()))}
_FILE_FIELDS = {"bytes": whole(), "sha256": text()}

# A fingerprint is this many entries of a weight, evenly spaced.
FINGERPRINT_ENTRIES = 64
# Two roundings of one number to bf16 (8 bits) differ by less than this, relatively.
FINGERPRINT_TOLERANCE = 2.0**-7


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
    return next((name for name in _files_in(place) if name not in known), None)


def _files_in(directory: Path) -> list[str]:
    """The paths of all files, relative to the directory and with forward slashes."""
    found = (Path(folder, name).relative_to(directory) for folder, _, names in os.walk(directory) for name in names)
    return sorted(path.as_posix() for path in found)


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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file; errors of the file system come as `OSError`."""
    try:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


class TensorFile:
    """A safetensors file whose tensors are written one at a time, in any order: `save_file` wants them all in memory at once.

    The file is laid out as `save_file` would do it, byte for byte. Use as a context manager.

    Args:
        path: of the file; replaced if it is there.
        tensors: name → a tensor of the shape and dtype that are to come, on the meta device for instance.
        metadata: text for the header.

    Raises:
        OSError: if it cannot be written.
        ValueError: for a dtype that the format does not have, a tensor that is not the announced one, or one that never came.
    """

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
        odd = next((f"{name!r} is {t.dtype}" for name, t in tensors.items() if t.dtype not in _DTYPES), None)
        if odd is not None:
            raise ValueError(f"{odd}, which {path} cannot hold")
        order = list(_DTYPES)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._missing: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        end = 0
        for name, t in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0].encode())):
            begin, end = end, end + t.numel() * t.element_size()
            header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
            self._missing[name] = (begin, t.dtype, t.shape)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # so that the data are aligned
        self._data = 8 + len(text)
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor, from any device, in its place."""
        begin, dtype, shape = self._missing.pop(name)
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ValueError(f"{name!r} in {self._path} should be {dtype} {tuple(shape)}, not {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.numel() > 0:
            self._file.seek(self._data + begin)
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{next(iter(self._missing))!r} was never written to {self._path}")


def looks_of(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name → size and SHA-256 of files, as a manifest has them."""
    return {name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)} for name in names}


def write_manifest(
    directory: Path, kind: str, content: Mapping[str, Any], files: tuple[str, ...] | Mapping[str, Mapping[str, Any]] = ()
) -> None:
    """`nullspace.json`: what the directory is, and what its files (their names, or what `looks_of` says of them) must look like.

    To be called when all files are written: it lists them, so that a file that somebody adds is not overwritten later.
    """
    known = files if isinstance(files, Mapping) else looks_of(directory, files)
    body = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        **content,
        "files": {name: known[name] for name in sorted(known)},
        "contents": _files_in(directory),
    }
    (directory / MANIFEST).write_text(sealed(body), encoding="utf-8")


def sealed(body: Mapping[str, Any]) -> str:
    """A JSON document with a digest of itself, by which `read_sealed` notices any change."""
    return json.dumps({**body, "digest": _digest(body)}, indent=1, ensure_ascii=False) + "\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """What was `sealed`, without its digest.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming it, if it is damaged, was altered, or never had a digest.
    """
    body = read_json(path)
    if not isinstance(body, dict) or "digest" not in body:
        raise ValueError(f"{path} was not written by nullspace")
    if body.pop("digest") != _digest(body):
        raise ValueError(f"{path} was altered: its digest does not fit")
    return body


def read_json(path: Path) -> Any:
    """The value that a file of JSON holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming it, if it is no regular file (reading a pipe may never end), not UTF-8, not JSON, nested too deeply, or
            has two fields of one name, half of a surrogate pair, or an integer of thousands of digits.
    """
    check_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return value


def check_regular(path: Path) -> None:
    """Raise `FileNotFoundError` if there is no such file, `ValueError` for a directory, a pipe or a device in its place."""
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} is {'a directory' if path.is_dir() else 'a pipe or a device'}, not a file")
        raise FileNotFoundError(f"{path} is missing")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has two fields {next(name for name in names if names.count(name) > 1)!r}")
    return found


def read_manifest(directory: str | os.PathLike[str], kind: str, fields: Mapping[str, Field] | None = None) -> dict[str, Any]:
    """The checked content of a directory's `nullspace.json`.

    Args:
        directory: which was written by `write_manifest`.
        kind: that it must be of.
        fields: what else the manifest of this kind has to say (`nullspace.schema`).

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: naming the file, if it is missing, not ours, of another kind or version, altered, or says what it cannot say.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    if not path.exists():
        raise ValueError(f"{path} is missing: {directory} was not written by nullspace, or not completely copied")
    body = read_sealed(path)
    check_fields(body, _MANIFEST_FIELDS, path)
    if body["kind"] != kind:
        raise ValueError(f"{path} describes {body['kind']!r}, not {kind!r}")
    if body["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {body['format_version']}; this nullspace reads {FORMAT_VERSION}")
    for name, look in body["files"].items():
        if not is_plain_name(name):
            raise ValueError(f"{path}: {name!r} in 'files' is not the plain name of a file")
        check_fields(look, _FILE_FIELDS, f"{path}: {name!r} in 'files'")
    check_fields(body, fields or {}, path)
    return body


def kind_of(directory: str | os.PathLike[str]) -> str | None:
    """What a directory says it is, unchecked; None if it says nothing."""
    try:
        body = read_json(Path(directory) / MANIFEST)
    except (OSError, ValueError):
        return None
    kind = body.get("kind") if isinstance(body, dict) else None
    return kind if isinstance(kind, str) else None


def check_file(directory: str | os.PathLike[str], name: str, manifest: Mapping[str, Any]) -> Path:
    """The path of one file, after its size and SHA-256 were compared with the manifest's.

    Raises:
        ValueError: naming the file, if it is missing, truncated, altered or unknown to the manifest.
    """
    path = Path(directory) / name
    expected = manifest["files"].get(name)
    if expected is None:
        raise ValueError(f"{path} is not listed in {MANIFEST}")
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes and should have {expected['bytes']}: truncated or altered")
    if _sha256(path) != expected["sha256"]:
        raise ValueError(f"{path} was altered: its SHA-256 does not fit")
    return path


def read_tensors(directory: str | os.PathLike[str], name: str, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of one file, after `check_file`.

    Raises:
        ValueError: naming the file, if it is missing, truncated, altered or unknown to the manifest.
    """
    return load_tensors(check_file(directory, name, manifest))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file that no manifest vouches for.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming it, if it is truncated or something else, a directory or a pipe.
    """
    check_regular(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def fingerprint(weight: torch.Tensor) -> torch.Tensor | None:
    """A few entries of a weight, by which it is known again in any floating dtype: (≤ 64,) float32.

    None if the weight is not a plain floating-point tensor with its values at hand (quantised or offloaded). Tensors of another
    type are none: bitsandbytes packs 4-bit weights into whatever dtype it is asked to (`bnb_4bit_quant_storage`). Nor are those of
    8 bits, whose scales are elsewhere. Of a weight that is spread over ranks it is that of the whole, and a collective.
    """
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) or is_sharded(weight)
    plain = plain and weight.is_floating_point() and weight.element_size() > 1
    if not plain or weight.device.type == "meta" or shape_of(weight).numel() == 0:
        return None
    return some_entries(weight).to("cpu", torch.float32)


def some_entries(tensor: torch.Tensor) -> torch.Tensor:
    """At most 64 of a tensor's entries, evenly spread: (≤ 64,)."""
    return entries(tensor, sampled_positions(shape_of(tensor).numel()))


def sampled_positions(total: int) -> torch.Tensor:
    """Which of so many entries a fingerprint has: (≤ 64,) int64."""
    return torch.linspace(0, total - 1, min(FINGERPRINT_ENTRIES, total), dtype=torch.float64).long()


def same_fingerprint(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fingerprints are of one weight, up to rounding to a 16-bit dtype."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=FINGERPRINT_TOLERANCE, atol=1e-6)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sync(path: Path) -> None:
    """See to it that a file or a directory is on the disk, not only on its way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
