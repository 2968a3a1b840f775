"""Files with digests: JSON documents, manifests of directories, and tensors.

The manifest `nullspace.json` of a directory holds its kind, its format version, the size and SHA-256 of its files, and a digest of
itself. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nullspace.checks import Field, an_object, check_fields, is_plain_name, list_of, optional, text, whole
from nullspace.errors import DamagedFileError, InputError, MissingFileError, OutputError

MANIFEST = "nullspace.json"

FORMAT_VERSION = 1

# safetensors' dtype names, in the order in which its files sort tensors.
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

# Fields of every manifest.
_MANIFEST_FIELDS = {"kind": text(), "format_version": whole(), "files": an_object(), "contents": optional(list_of(text()))}

_FILE_FIELDS = {"bytes": whole(), "sha256": text()}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, with the permissions that the umask gives. Errors of the file system are raised as `OSError`."""
    path.touch()
    mode = path.stat().st_mode  # safetensors replaces the file by a temporary one, which only its owner can read
    try:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    path.chmod(stat.S_IMODE(mode))


class TensorFile:
    """A safetensors file whose tensors are written one at a time, in any order. `save_file` needs all of them in memory at once.

    The file equals that of `save_file` byte for byte. Use as a context manager.

    Args:
        path: of the file; an existing one is replaced.
        tensors: name → a tensor with the shape and dtype of the one to be written, for instance on the meta device.
        metadata: text for the header.

    Raises:
        OSError: if the file cannot be written.
        ValueError: for a dtype that the format does not have, a tensor of another shape or dtype than announced, or a missing one.
    """

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
        odd = next((f"{name!r} is {t.dtype}" for name, t in tensors.items() if t.dtype not in _DTYPES), None)
        if odd is not None:
            raise InputError(f"{odd}, which {path} cannot hold")
        order = list(_DTYPES)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._missing: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        end = 0
        for name, t in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0].encode())):
            begin, end = end, end + t.numel() * t.element_size()
            header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
            self._missing[name] = (begin, t.dtype, t.shape)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # aligns the data
        self._data = 8 + len(text)
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, from any device, at its offset."""
        begin, dtype, shape = self._missing.pop(name)
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise InputError(f"{name!r} in {self._path} should be {dtype} {tuple(shape)}, not {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.numel() > 0:
            self._file.seek(self._data + begin)
            self._file.write(_bytes(tensor))

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise InputError(f"{next(iter(self._missing))!r} was never written to {self._path}")


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: name → `dtype` (safetensors' name), `shape`, and `data_offsets` from the file's start."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: {**entry, "data_offsets": [8 + size + at for at in entry["data_offsets"]]} for name, entry in header.items()}


def read_shapes(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file on the meta device, by name, and the text in its header.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is damaged; naming the tensor, for a dtype that PyTorch or this package does not have.
    """
    check_regular(path)
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    try:
        with safe_open(path, framework="pt") as file:
            text = dict(file.metadata() or {})
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is not a safetensors file: {error}") from error
    header = read_header(path)
    odd = next((name for name, entry in header.items() if entry["dtype"] not in dtypes), None)
    if odd is not None:
        raise InputError(f"{odd!r} in {path} is {header[odd]['dtype']}, which cannot be read here")
    shapes = {name: torch.empty(entry["shape"], dtype=dtypes[entry["dtype"]], device="meta") for name, entry in header.items()}
    return shapes, text


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file.

    Raises:
        ValueError: naming the file, if it is damaged or has no such tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise DamagedFileError(f"{path}: {name!r} cannot be read: {error}") from error
    return tensor


def fits(entry: Mapping[str, Any], tensor: torch.Tensor) -> bool:
    """Whether an entry of `read_header` has a tensor's dtype and shape."""
    return (entry["dtype"], entry["shape"]) == (_DTYPES.get(tensor.dtype), list(tensor.shape))


def replace_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Overwrite one tensor of a safetensors file, which must have its dtype and shape, in place."""
    entry = read_header(path)[name]
    if not fits(entry, tensor):
        raise DamagedFileError(f"{name!r} in {path} is {entry['dtype']} {entry['shape']}, not {tensor.dtype} {list(tensor.shape)}")
    if tensor.numel() > 0:
        with open(path, "r+b") as file:
            file.seek(entry["data_offsets"][0])
            file.write(_bytes(tensor))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def looks_of(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name → size and SHA-256 of each file, as a manifest holds them."""
    return {name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)} for name in names}


def write_manifest(
    directory: Path, kind: str, content: Mapping[str, Any], files: tuple[str, ...] | Mapping[str, Mapping[str, Any]] = ()
) -> None:
    """Write `nullspace.json`. Call this after all other files are written: it lists them, so that added files are noticed later.

    Args:
        directory: that the manifest describes.
        kind: of the directory.
        content: more fields.
        files: their names, or their sizes and digests (`looks_of`).
    """
    known = files if isinstance(files, Mapping) else looks_of(directory, files)
    body = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        **content,
        "files": {name: known[name] for name in sorted(known)},
        "contents": files_in(directory),
    }
    (directory / MANIFEST).write_text(sealed(body), encoding="utf-8")


def sealed(body: Mapping[str, Any]) -> str:
    """A JSON document with a digest of itself, which `read_sealed` checks."""
    return json.dumps({**body, "digest": _digest(body)}, indent=1, ensure_ascii=False) + "\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a `sealed` document; returns it without its digest.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is damaged, altered, or has no digest.
    """
    body = read_json(path)
    if not isinstance(body, dict) or "digest" not in body:
        raise DamagedFileError(f"{path} was not written by nullspace")
    if body.pop("digest") != _digest(body):
        raise DamagedFileError(f"{path} was altered: its digest does not fit")
    return body


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is not a regular file (reading a pipe may never end), not UTF-8, not JSON, nested too
            deeply, or has a repeated field, half of a surrogate pair, or an integer of thousands of digits.
    """
    check_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    return value


def check_regular(path: Path) -> None:
    """Raise `FileNotFoundError` if there is no such file, `ValueError` if it is a directory, a pipe or a device."""
    if not path.is_file():
        if path.exists():
            raise DamagedFileError(f"{path} is {'a directory' if path.is_dir() else 'a pipe or a device'}, not a file")
        raise MissingFileError(f"{path} is missing")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise DamagedFileError(f"it has two fields {next(name for name in names if names.count(name) > 1)!r}")
    return fields


def read_manifest(directory: str | os.PathLike[str], kind: str, fields: Mapping[str, Field] | None = None) -> dict[str, Any]:
    """The checked content of a directory's `nullspace.json`.

    Args:
        directory: with a manifest (`write_manifest`).
        kind: required kind.
        fields: more fields of manifests of this kind (`nullspace.checks`).

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: naming the manifest, if it is missing, altered, not written by nullspace, of another kind or version, or if a
            field has a wrong value.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise MissingFileError(f"{directory} is not a directory")
    if not path.exists():
        raise DamagedFileError(f"{path} is missing: {directory} was not written by nullspace, or not completely copied")
    body = read_sealed(path)
    check_fields(body, _MANIFEST_FIELDS, path)
    if body["kind"] != kind:
        raise DamagedFileError(f"{path} describes {body['kind']!r}, not {kind!r}")
    if body["format_version"] != FORMAT_VERSION:
        raise DamagedFileError(f"{path} has format version {body['format_version']}; this nullspace reads {FORMAT_VERSION}")
    for name, look in body["files"].items():
        if not is_plain_name(name):
            raise DamagedFileError(f"{path}: {name!r} in 'files' is not the plain name of a file")
        check_fields(look, _FILE_FIELDS, f"{path}: {name!r} in 'files'")
    check_fields(body, fields or {}, path)
    return body


def kind_of(directory: str | os.PathLike[str]) -> str | None:
    """The kind in a directory's manifest, unchecked; None if it has none."""
    try:
        body = read_json(Path(directory) / MANIFEST)
    except (OSError, ValueError):
        return None
    kind = body.get("kind") if isinstance(body, dict) else None
    return kind if isinstance(kind, str) else None


def check_file(directory: str | os.PathLike[str], name: str, manifest: Mapping[str, Any]) -> Path:
    """Compare the size and SHA-256 of one file with the manifest's; returns its path.

    Raises:
        ValueError: naming the file, if it is missing, truncated, altered or not in the manifest.
    """
    path = Path(directory) / name
    expected = manifest["files"].get(name)
    if expected is None:
        raise DamagedFileError(f"{path} is not listed in {MANIFEST}")
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise DamagedFileError(f"{path} has {path.stat().st_size} bytes and should have {expected['bytes']}: truncated or altered")
    if _sha256(path) != expected["sha256"]:
        raise DamagedFileError(f"{path} was altered: its SHA-256 does not fit")
    return path


def read_tensors(directory: str | os.PathLike[str], name: str, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of one file, after `check_file`, which raises `ValueError`."""
    return load_tensors(check_file(directory, name, manifest))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, without a manifest.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is truncated, in another format, a directory or a pipe.
    """
    check_regular(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is not a safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def files_in(directory: Path) -> list[str]:
    """The paths of all files, relative to the directory, with forward slashes, sorted."""
    paths = (Path(folder, name).relative_to(directory) for folder, _, names in os.walk(directory) for name in names)
    return sorted(path.as_posix() for path in paths)
