"""Rows of data files and hub data sets, and their texts. Errors are `ValueError`s that name file and row."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nullspace.checks import missing_package, shown
from nullspace.errors import InputError, MissingFileError

Row = Mapping[str, Any]
TEXTS, JSON = (".txt", ".md"), (".jsonl", ".json")
# Fields that are joined into one text if `field` is not given: the first entry whose fields are all present.
KNOWN_FIELDS = (
    ("text",),
    ("question", "answer"),
    ("instruction", "input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("query", "response"),
    ("instruction", "context", "response"),
    ("problem", "solution"),
    ("content",),
    ("chosen",),
)
# Fields of chat messages, in both common forms.
_MESSAGE_FIELDS = (("role", "content"), ("from", "value"))


def check_is_there(path: Path) -> None:
    """Raise `FileNotFoundError` if a path with a known ending is no regular file, `ValueError` for a file with another ending."""
    kind = path.suffix.lower()
    if kind in ENDINGS:
        if not path.is_file():
            raise MissingFileError(f"{path} is not a file")
    elif path.exists() and not path.is_dir():
        raise InputError(f"{path}: data are read from files that end in {', '.join(ENDINGS)}")


def rows_of(data: str | os.PathLike[str], split: str) -> Iterator[Row]:
    """The rows of a file, or of a hub data set (`name` or `name:configuration`)."""
    path = Path(data)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        yield from reader(path)
        return
    try:
        import datasets
    except ImportError as error:
        raise missing_package(f"the data set {data} of the hub", "cli", error) from error
    name, _, configuration = str(data).partition(":")
    yield from datasets.load_dataset(name, configuration or None, split=split, streaming=True)


def paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a text file, separated by blank lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    return iter(text.replace("\r\n", "\n").split("\n\n"))


def parts_of(row: Row, field: str | None, where: str) -> list[str]:
    """The texts of a row's fields: of those that are named, or by default of the first of `KNOWN_FIELDS` that are all present.

    Args:
        row: its fields hold text, lists of texts (of which the first is taken), or None (no text).
        field: names separated by commas, or None.
        where: file and row number, for messages.

    Raises:
        ValueError: listing the fields, if one is missing; naming it, if it is not text.
    """
    names = text_fields(row) if field is None else split_names(field)
    missing = next((name for name in names if name not in row), None)
    if not names or missing is not None:
        what = f"no field {missing!r}" if missing else "no field that is known to be text"
        raise InputError(f"{where} has {what}; its fields are {fields_of(row)} (choose with field / --field)")
    return [as_text(row, name, where) for name in names]


def split_names(field: str) -> tuple[str, ...]:
    """The names in a `field` argument."""
    return tuple(name.strip() for name in field.split(","))


def text_fields(row: Row) -> tuple[str, ...]:
    """The first of `KNOWN_FIELDS` that are all present; empty if none are."""
    return next((known for known in KNOWN_FIELDS if all(name in row for name in known)), ())


def as_text(row: Row, name: str, where: str) -> str:
    """One field: its text, the first of a list of texts, or an empty string for None.

    Raises:
        ValueError: naming it, if it holds something else: numbers, objects and messages are not converted to text.
    """
    value = row[name]
    if is_chat(value):
        raise InputError(
            f"{where}: the field {name!r} holds chat messages, and a text is needed: choose another field (field / --field)"
        )
    first = value
    if isinstance(value, (list, tuple)):
        first = value[0] if value else ""
    if first is None:
        return ""
    if not isinstance(first, str):
        kind = "a list of" if first is not value else "a value of type"
        raise InputError(
            f"{where}: the field {name!r} holds {kind} {type(first).__name__} ({shown(value)}), which is no text: "
            "write it as a string, or choose another field (field / --field)"
        )
    return checked_text(first, f"{where}: the field {name!r}")


def checked_text(value: Any, what: str) -> str:
    """`value`, if it is a text that has a UTF-8 form; `ValueError` beginning with `what` for anything else."""
    if not isinstance(value, str):
        raise InputError(f"{what} is {shown(value)} ({type(value).__name__}), which is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is no valid Unicode: {error}") from error
    return value


def fields_of(row: Row) -> str:
    """The names of a row's fields, for error messages."""
    return ", ".join(map(str, row))


def is_chat(value: Any) -> bool:
    """Whether this is a message or a list of messages: objects with role and content (or from and value)."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, Mapping) and any(all(name in first for name in names) for names in _MESSAGE_FIELDS)


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
                yield row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text, behind line {number}: {error}") from error


def _json(path: Path) -> Iterator[Row]:
    """A list of objects (or of texts), one object, or several objects, one per line or concatenated."""
    if _begins_with_an_object(path):
        yield from _json_lines(path)
        return
    try:
        rows = _values(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as json: {error}") from error
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = [{"text": row} if isinstance(row, str) else row for row in rows[0] if row is not None]
    odd = [row for row in rows if not isinstance(row, dict)]
    if odd:
        raise InputError(f"{path} holds {shown(odd[0])}: a list of objects, or one object a line, is needed")
    names = dict.fromkeys(name for row in rows for name in row)
    yield from ({name: row.get(name) for name in names} for row in rows)


def _begins_with_an_object(path: Path) -> bool:
    """Whether the first line that is not blank is a complete JSON object: the file is then read as JSON Lines."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            return first.lstrip().startswith("{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _values(text: str) -> list[Any]:
    """The concatenated JSON values of a text."""
    values, decoder, blank = [], json.JSONDecoder(), re.compile(r"\s*")
    at = blank.match(text).end()  # type: ignore[union-attr]
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        values.append(value)
    return values


def _csv(path: Path) -> Iterator[Row]:
    """All values are strings, as in the file."""
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KiB that are allowed by default
    number = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, strict=True):
                if None in row:
                    raise InputError("it has more values than the first line has names")
                yield row
                number += 1
    except (csv.Error, ValueError) as error:
        raise InputError(f"{path} cannot be read as csv, row {number}: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise missing_package(str(path), "cli", error) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except Exception as error:  # pyarrow raises exceptions of many kinds for damaged files, and none of them names the file
        raise InputError(f"{path} cannot be read as parquet: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}
ENDINGS = (*TEXTS, *_READERS)
"""Of the names of files that data are read from."""
