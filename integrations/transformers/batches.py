"""Data in any form as batches of tokens: texts and rows are packed, batches are checked and passed on."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from nullspace.distributed.loaders import length as count_of
from nullspace.errors import InputError, InputTypeError, NullspaceError
from nullspace.integrations.transformers.chat import Conversation, TokenIds
from nullspace.integrations.transformers.data import Reading
from nullspace.integrations.transformers.load import positions
from nullspace.integrations.transformers.packing import Mixture, PackedBatches
from nullspace.integrations.transformers.rows import ENDINGS
from nullspace.model.batches import check_batch
from nullspace.model.sharded_tensors import shape_of

# The paper's, where the model has so many positions.
LENGTH = 1024


def token_batches(
    data: Any, tokenizer: Any, model: nn.Module, *, samples: int, length: int | None, batch_size: int, name: str = "data"
) -> Iterable[Any]:
    """A loader of token batches for `model`, checked as far as that is possible without running it.

    Args:
        data: what `load_texts` reads (a file, the name of a hub data set, rows: a list of mappings, a `datasets.Dataset`, an
            iterable one, a `DatasetDict` with a split "train") or returns (texts, conversations, token ids, a `Mixture`), a list of
            file names; or batches: a `DataLoader`, another iterable of what the model takes, or one such batch. A list of strings
            holds texts, unless all of them end as names of data files do.
        tokenizer: transformers' tokenizer, or a processor that has one. None for batches.
        model: that is to be run.
        samples, batch_size: as in `PackedBatches`; of batches they are not used.
        length: the same; None for 1024, or the model's positions if they are fewer.
        name: of the argument, for messages.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `load_texts` and `PackedBatches`; for data that are none of these; without a
            tokenizer, for texts; for sequences longer than the model's positions, tokens that it has no embedding for, and a first
            batch that it does not take.
    """
    data, texts = _sorted_out(data, name)
    if texts is None:
        if count_of(data) == 0:
            raise InputError(f"{name} is empty")
        with _naming(name):
            check_batch(model, _first(data))
        return data
    sizes: dict[str, Any] = {"samples": samples, "length": checked_length(model, length), "batch_size": batch_size}
    packed = PackedBatches(texts, _checked_tokenizer(tokenizer, name), **sizes)
    _check_embeddings(packed, model, name)
    return packed


def checked_length(model: nn.Module, length: int | None) -> int:
    """Tokens a sequence, for `length` as in `token_batches`. `ValueError` for more than the model has positions."""
    config = getattr(model, "config", None)
    limit = positions(config) if hasattr(config, "get_text_config") else None
    if length is None:
        return LENGTH if limit is None else min(LENGTH, limit)
    if isinstance(length, int) and limit is not None and length > limit:
        raise InputError(f"length must be at most {limit}, the positions that {type(model).__name__} has, not {length}")
    return length


def _sorted_out(data: Any, name: str) -> tuple[Any, Any]:
    """Data of any form as `(batches, None)`, or as `(None, texts)` for `PackedBatches`."""
    if isinstance(data, torch.Tensor) or _is_batch(data):
        return [data], None
    if isinstance(data, DataLoader):
        return data, None
    if isinstance(data, Mixture):
        return None, data
    if isinstance(data, (str, os.PathLike)):
        return None, Reading().texts(_checked_name(data, name))
    if isinstance(data, bytes) or not isinstance(data, Iterable) or hasattr(data, "iloc"):  # a DataFrame yields names of columns
        raise InputTypeError(
            f"{name} must be data (texts, rows, a file, the name of a hub data set, batches of tokens) or second moments "
            f"(Covariances, a folder of them), not {type(data).__name__}"
        )
    if isinstance(data, Mapping):  # a `DatasetDict`
        return None, Reading().texts(data, name)
    first = None
    if isinstance(data, Iterator):
        first = next(data, None)
        data = itertools.chain([] if first is None else [first], data)
    else:
        first = _first(data)
    if first is None:
        raise InputError(f"{name} is empty")
    if isinstance(first, (torch.Tensor, tuple)) or _is_batch(first) or (isinstance(first, list) and _are_tensors(first)):
        return data, None
    if isinstance(first, (str, os.PathLike)):
        return None, _of_strings(list(data), name)
    return None, data if isinstance(first, (Conversation, TokenIds)) else Reading().texts(data, name)


def _is_batch(value: Any) -> bool:
    """Whether this is a mapping of what a model takes, and not a row, whose tensors have no dimension of samples."""
    if not isinstance(value, Mapping):
        return False
    tensors = {key: each for key, each in value.items() if isinstance(each, torch.Tensor)}
    known = tensors.get("input_ids")
    return any(each.ndim > 1 for each in (tensors.values() if known is None else [known]))


def _are_tensors(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(each, torch.Tensor) for each in values)


def _first(loader: Any) -> Any:
    """The first element of what can be read again; None if there is none. Random numbers stay as they were.

    A `DataLoader` with workers would start them, so that of one nothing is read.
    """
    if isinstance(loader, Iterator) or getattr(loader, "num_workers", None):
        return None
    with torch.random.fork_rng(devices=[]):
        return next(iter(loader), None)


def _checked_name(data: str | os.PathLike[str], name: str) -> str | os.PathLike[str]:
    """The name of a file or of a hub data set; a text is an error."""
    text = os.fspath(data)
    if isinstance(data, str) and not _is_name(text) and not os.path.exists(text):
        raise InputError(f"{name} is the name of a file or of a hub data set; give texts as a list: {name}=[{text[:40]!r}, …]")
    return data


def _is_name(text: str) -> bool:
    """Whether a string without line breaks ends as the name of a data file, or is one word."""
    return (text[-8:].lower().endswith(ENDINGS) and "\n" not in text) or len(text.split()) == 1


def _of_strings(strings: list[Any], name: str) -> Any:
    """Texts, or the data of several files."""
    other = next((number for number, each in enumerate(strings, 1) if not isinstance(each, (str, os.PathLike))), None)
    if other is not None:
        raise InputTypeError(f"{name}: entry {other} is {type(strings[other - 1]).__name__}, and those before it are texts")
    if all(isinstance(each, os.PathLike) or (each.lower().endswith(ENDINGS) and _is_name(each)) for each in strings):
        return Reading().mixture(strings)
    if any(isinstance(each, os.PathLike) for each in strings):
        raise InputTypeError(f"{name} holds names of files and texts: read the files (load_texts), or give the files alone")
    return strings


def _checked_tokenizer(tokenizer: Any, name: str) -> Any:
    if tokenizer is None:
        raise InputError(f"{name} holds texts, and tokenizer is None: give the model's tokenizer, or batches of tokens")
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise InputTypeError(f"tokenizer must be transformers' tokenizer of the model, not {type(tokenizer).__name__}")
    return tokenizer


def _check_embeddings(packed: PackedBatches, model: nn.Module, name: str) -> None:
    """Raise `ValueError` for tokens that the model has no embedding for. On a GPU its own error would end the process."""
    get = getattr(model, "get_input_embeddings", None)
    with contextlib.suppress(NotImplementedError):
        weight = getattr(get() if callable(get) else None, "weight", None)
        rows = shape_of(weight)[0] if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None
        most = max(int(batch["input_ids"].max()) for batch in packed)
        if rows is not None and most >= rows:
            raise InputError(
                f"{name}: the tokenizer gives token {most}, and {type(model).__name__} has embeddings for {rows}: give the model's "
                "own tokenizer"
            )


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Context manager: errors name the argument."""
    try:
        yield
    except NullspaceError as error:
        raise type(error)(f"{name}: {error}") from None
