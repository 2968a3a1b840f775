"""Texts, conversations and rows from files, hub data sets and Python."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, overload

from nullspace.checks import check_integer
from nullspace.errors import InputError, InputTypeError
from nullspace.integrations.transformers.chat import as_conversation, conversation, token_ids, without_nulls
from nullspace.integrations.transformers.packing import Mixture, Text, check_weights
from nullspace.integrations.transformers.rows import (
    JSON,
    KNOWN_FIELDS,
    TEXTS,
    Row,
    as_text,
    check_is_there,
    fields_of,
    paragraphs,
    parts_of,
    rows_of,
    split_names,
)

WHOLE = 2**26
Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""The name of a file or of a hub data set, or rows: a list of them, a `datasets.Dataset`."""


@overload
def load_texts(
    data: str | os.PathLike[str],
    *,
    field: str | None = None,
    split: str = "train",
    limit: int | None = None,
    skip: int = 0,
    shuffle: int | None = None,
    as_chat: bool = False,
) -> list[Any]: ...


@overload
def load_texts(
    data: Any,
    *,
    weights: Sequence[float] | None = None,
    field: str | None = None,
    split: str = "train",
    limit: int | None = None,
    skip: int = 0,
    shuffle: int | None = None,
    as_chat: bool = False,
) -> Any: ...


def load_texts(
    data: Source | Sequence[Source],
    *,
    weights: Sequence[float] | None = None,
    field: str | None = None,
    split: str = "train",
    limit: int | None = None,
    skip: int = 0,
    shuffle: int | None = None,
    as_chat: bool = False,
) -> list[Text] | Mixture:
    """Texts and conversations from a file, a hub data set or rows; of several, a mixture.

    Args:
        data: `.txt` or `.md` (paragraphs, divided at blank lines), `.jsonl`, `.json`, `.parquet` or `.csv`; the name of a hub
            data set, with `name:configuration` for one of its configurations; rows (a list of mappings, a `datasets.Dataset`); or
            a list of several of these.
        weights: of several, each one's share of the tokens, up to a common factor; equal by default.
        field: the field with the text, or several, separated by commas, which line breaks join: `"question,answer"`. By default
            token ids (`input_ids`), a conversation, `text`, or the first known pair (question/answer, instruction/input/output,
            prompt/completion, …). Of a list of answers the first one is taken.
        split: of a hub data set.
        limit: read at most this many texts, of each.
        skip: leave out the first rows or paragraphs, of each.
        shuffle: the seed of a random order, into which each is brought before `limit` counts; None for the order of the rows.
        as_chat: make conversations of texts too: a text is a user's message, a known pair a user's and an assistant's.

    Returns:
        What `PackedBatches` takes: `str` for texts, `Conversation` for chat data (`messages`, ShareGPT's `conversations`, prompt
        and completion as messages, the `chosen` side of preferences, with tools and system column), `TokenIds` for rows with
        `input_ids`. Blank texts and conversations without messages are left out. Of several data sets, a `Mixture`.

    Raises:
        FileNotFoundError: if a path with a known ending does not exist.
        TypeError: if the data are of another kind.
        ValueError: naming the file, if its content does not fit its ending, or if it is empty; naming the row too, if it lacks the
            field (its fields are listed), or if the field is not text: numbers are not converted. For wrong weights, and a `skip`
            that leaves nothing.
    """
    reading = Reading(field=field, split=split, limit=limit, skip=skip, shuffle=shuffle, as_chat=as_chat)
    if not _are_several(data):
        if weights is not None:
            raise InputError("weights belong to several data sets, and there is one: leave them out")
        return list(reading.texts(data))
    mixture = reading.mixture(data, weights)
    return Mixture({name: list(texts) for name, texts in mixture.parts.items()}, mixture.weights)


@dataclass(frozen=True)
class Reading:
    """The arguments of `load_texts`, for data that are read when they are needed: a hub data set may be larger than the work.

    Files of up to `WHOLE` bytes are read, and thereby checked, to their end all the same.
    """

    field: str | None = None
    split: str = "train"
    limit: int | None = None
    skip: int = 0
    shuffle: int | None = None
    as_chat: bool = False

    def __post_init__(self) -> None:
        check_integer("skip", self.skip, least=0)
        if self.shuffle is not None:
            check_integer("shuffle", self.shuffle, least=0)

    def mixture(self, data: Sequence[Any], weights: Sequence[float] | None = None) -> Mixture:
        """Several data sets as a `Mixture`, without reading them. Errors as `load_texts`."""
        if weights is not None:
            check_weights(weights, len(data))
        parts: dict[str, Iterator[Text]] = {}
        for number, each in enumerate(data, start=1):
            name = _name(each) or f"data set {number}"
            if name in parts:
                raise InputError(f"{name} is given twice: leave one out, and give it a weight if it is to count more")
            parts[name] = self.texts(each, name)
        return Mixture(parts, weights)

    def texts(self, data: Any, name: str | None = None) -> Iterator[Text]:
        """The texts of one data set. Errors as `load_texts`; a missing file is one before the first text is asked for."""
        if _name(data) is not None:
            check_is_there(Path(data))
        elif isinstance(data, bytes) or not isinstance(data, Iterable):
            raise InputTypeError(f"data must be a file, the name of a hub data set, or rows, not {type(data).__name__}")
        return self._texts(data, name or _name(data) or "the data")

    def _texts(self, data: Any, name: str) -> Iterator[Text]:
        counted = itertools.count()
        read: Iterator[Text] = (text for text in self._all(data, name, counted) if not _is_blank(text))
        if self.shuffle is not None or _is_small_file(data):
            texts = list(read)
            if self.shuffle is not None:
                random.Random(self.shuffle).shuffle(texts)
            read = iter(texts)
        empty = True
        for text in itertools.islice(read, self.limit):
            empty = False
            yield text
        if empty and self.limit != 0:
            rows = next(counted)
            if 0 < rows <= self.skip:
                raise InputError(f"skip={self.skip} (--skip) leaves nothing of {name}, which has {rows} rows")
            raise InputError(f"{name} holds no text")

    def _all(self, data: Any, name: str, counted: Iterator[int]) -> Iterator[Text]:
        path = _name(data)
        if path is not None and Path(path).suffix.lower() in TEXTS:
            for text in (each for each in paragraphs(Path(path)) if each.strip()):
                if next(counted) >= self.skip:
                    yield as_conversation([text], {}, name) if self.as_chat else text
            return
        for row in _rows(data, self.split):
            number = next(counted)
            if number >= self.skip:
                yield self._text(row, f"{name}, row {number + 1}")

    def _text(self, row: Any, where: str) -> Text:
        if not isinstance(row, Mapping):
            raise InputTypeError(f"{where} is {type(row).__name__}: rows must be mappings, field name → value")
        names = None if self.field is None else split_names(self.field)
        if names in (None, ("input_ids",)):
            tokens = token_ids(row, where)
            if tokens is not None:
                return tokens
        chat = conversation(row, names, where)
        if chat is not None:
            return chat
        parts = parts_of(row, self.field, where)
        return as_conversation(parts, row, where) if self.as_chat else "\n".join(part for part in parts if part)


def _are_several(data: Any) -> TypeGuard[Sequence[Any]]:
    """Whether this is a list of data sets, and not one: a list of mappings holds rows."""
    return isinstance(data, (list, tuple)) and bool(data) and not any(isinstance(each, Mapping) for each in data)


def _name(data: Any) -> str | None:
    """The name of a file or a hub data set; None for rows."""
    return os.fspath(data) if isinstance(data, (str, os.PathLike)) else None


def _is_small_file(data: Any) -> bool:
    name = _name(data)
    return name is not None and Path(name).is_file() and Path(name).stat().st_size <= WHOLE


def _rows(data: Any, split: str) -> Iterator[Row]:
    """The rows of a data set of any kind. Objects of Arrow data have no keys without values."""
    name = _name(data)
    if name is not None:
        rows = rows_of(name, split)
        return rows if Path(name).suffix.lower() in JSON else map(without_nulls, rows)
    if isinstance(data, Mapping):  # a `datasets.DatasetDict`
        if split not in data:
            raise InputError(f"the data have no split {split!r}, but {fields_of(data)}")
        data = data[split]
    return (without_nulls(row) if isinstance(row, Mapping) else row for row in data)


def _is_blank(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return not (text.messages if hasattr(text, "messages") else text.ids)


def load_rows(data: str | os.PathLike[str], *, split: str = "train", limit: int | None = None) -> list[Mapping[str, Any]]:
    """Rows of a JSON Lines, JSON, Parquet or CSV file, or of a hub data set, as they are.

    Args:
        data: as in `load_texts`, without `.txt` and `.md`.
        split: of a hub data set.
        limit: read at most this many.

    Raises:
        FileNotFoundError: if a path with a known ending does not exist.
        ValueError: naming the file, if it is a text, does not fit its ending, or is empty.
    """
    path = Path(data)
    if path.suffix.lower() in TEXTS:
        raise InputError(f"{path} is a text, which has no rows: JSON Lines, JSON, CSV or Parquet is needed")
    check_is_there(path)
    rows = list(itertools.islice(rows_of(data, split), limit))
    if not rows:
        raise InputError(f"{data} is empty")
    return rows


def prompt_and_response(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and response of a row of a task.

    Of the first known fields (question/answer, instruction/input/output, prompt/completion, text/code, …) the last is the response
    (of a list, its first entry); the others, joined by line breaks, are the prompt.

    Raises:
        ValueError: listing the row's fields, if none of them are known or one is empty; naming the field, if it is not text.
    """
    pairs = [names for names in KNOWN_FIELDS if len(names) > 1]
    more = [("text", "code"), ("prompt", "canonical_solution")]
    names = next((known for known in [*pairs, *more] if all(name in row for name in known)), ())
    parts = [as_text(row, name, "a row") for name in names]
    if len(parts) < 2 or not parts[0].strip() or not parts[-1].strip():
        raise InputError(f"a row has no known prompt and response; its fields are {fields_of(row)}")
    return "\n".join(part for part in parts[:-1] if part), parts[-1]
