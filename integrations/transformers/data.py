"""Texts and rows from files and hub data sets, and texts packed into batches of one length."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nullspace.checks import check_integer
from nullspace.errors import DataWarning, InputError
from nullspace.integrations.transformers.rows import (
    KNOWN_FIELDS,
    TEXTS,
    as_text,
    check_is_there,
    fields_of,
    paragraphs,
    rows_of,
    text_of,
)


def load_texts(
    data: str | os.PathLike[str], *, field: str | None = None, split: str = "train", limit: int | None = None
) -> list[str]:
    """Texts from a file or a hub data set.

    Args:
        data: `.txt` or `.md` (paragraphs, divided at blank lines), `.jsonl`, `.json`, `.parquet` or `.csv`, or the name of a hub
            data set, with `name:configuration` for one of its configurations.
        field: the field with the text, or several, separated by commas, which line breaks join: `"question,answer"`. By default
            `text`, or the first known pair (question/answer, instruction/input/output, prompt/completion, …). Of a list of answers
            the first one is taken. Chat data (lists of messages) are not supported.
        split: of a hub data set.
        limit: read at most this many rows.

    Raises:
        FileNotFoundError: if a path with a known ending does not exist.
        ValueError: naming the file, if its content does not fit its ending, or if it is empty; naming the row too, if it lacks the
            field (its fields are listed), or if the field is not text: numbers are not converted.
    """
    path = Path(data)
    check_is_there(path)
    texts: Iterable[str]
    if path.suffix.lower() in TEXTS:
        texts = paragraphs(path)
    else:
        texts = (text_of(row, field, f"{data}, row {number}") for number, row in enumerate(rows_of(data, split), start=1))
    kept = list(itertools.islice((text for text in texts if text.strip()), limit))
    if not kept:
        raise InputError(f"{data} holds no text")
    return kept


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
    more = [("query", "response"), ("text", "code"), ("prompt", "canonical_solution")]
    names = next((known for known in [*pairs, *more] if all(name in row for name in known)), ())
    parts = [as_text(row, name, "a row") for name in names]
    if len(parts) < 2 or not parts[0].strip() or not parts[-1].strip():
        raise InputError(f"a row has no known prompt and response; its fields are {fields_of(row)}")
    return "\n".join(part for part in parts[:-1] if part), parts[-1]


class PackedBatches(Sequence[dict[str, torch.Tensor]]):
    """Batches of token ids, all of one length: concatenated texts after the tokenizer's leading special tokens.

    Every sample begins with the special tokens that the tokenizer puts before a text (`<bos>`, `[CLS]`; none with GPT-2's): models
    are used with them at position 0, where many have their massive activations. Within a sample, texts are separated by what the
    tokenizer puts after a text (`[SEP]`), or else by its end-of-text token. A last sequence that the texts do not fill is padded on
    the right and masked.

    Args:
        texts: in this order.
        tokenizer: transformers'.
        samples: at most this many sequences (the paper takes 256).
        length: tokens a sequence (the paper: 1024), special tokens included.
        batch_size: sequences a batch.
        special_tokens: False packs the texts with end-of-text tokens between them and no others.

    Attributes:
        tokens: in all samples, with special tokens, without padding.

    Raises:
        ValueError: if a size is smaller than 1, `length` leaves no room after the special tokens, or the texts hold no token.

    Warns:
        UserWarning: if the texts fill fewer than `samples` sequences.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Any,
        *,
        samples: int = 256,
        length: int = 1024,
        batch_size: int = 4,
        special_tokens: bool = True,
    ) -> None:
        for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
            check_integer(name, value)
        start, ids = _token_stream(texts, tokenizer, samples, length, special_tokens)
        if not ids:
            raise InputError("the texts hold no token")
        room = length - len(start)
        rows = -(-len(ids) // room)
        if rows < samples:
            warnings.warn(f"the texts fill {rows} of {samples} samples of {length} tokens", DataWarning, stacklevel=2)
        pad = -len(ids) % room
        self.tokens = len(ids) + rows * len(start)
        packed = torch.tensor(ids + [ids[-1]] * pad).reshape(rows, room)
        self._ids = torch.cat([torch.tensor(start, dtype=packed.dtype).expand(rows, -1), packed], dim=1)
        self._mask = torch.ones_like(self._ids)
        if pad:
            self._mask[-1, -pad:] = 0
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._ids) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = slice(index * self._batch_size, (index + 1) * self._batch_size)
        return {"input_ids": self._ids[rows], "attention_mask": self._mask[rows]}


def _token_stream(texts: Iterable[str], tokenizer: Any, samples: int, length: int, special: bool) -> tuple[list[int], list[int]]:
    """The tokens that begin every sample, and those that fill the samples."""
    ids: list[int] = []
    start: list[int] = []
    between = next(([i] for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), [])
    known = not special
    for text in texts:
        # Texts are cut into samples, so the tokenizer's warning about texts longer than the model's window does not apply.
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not own:
            continue
        if not known:
            start, end = _around(own, tokenizer(text, verbose=False)["input_ids"])
            between, known = end or between, True
            if len(start) >= length:
                raise InputError(f"length must exceed the {len(start)} special tokens that begin a sample, not {length}")
        ids += own + between
        if len(ids) >= samples * (length - len(start)):
            break
    return start, ids[: samples * (length - len(start))]


def _around(own: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text's own tokens."""
    for begin in range(len(whole) - len(own) + 1):
        if whole[begin : begin + len(own)] == own:
            return whole[:begin], whole[begin + len(own) :]
    raise InputError(
        "the tokenizer gives a text other tokens with special tokens than without, so it cannot be seen which are special: pack "
        "without them (special_tokens=False)"
    )
