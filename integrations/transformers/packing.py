"""Texts, conversations and token ids, packed into batches of one length; mixtures of data sets, interleaved by tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nullspace.checks import check_integer, check_real
from nullspace.errors import DataWarning, InputError, InputTypeError
from nullspace.integrations.transformers.chat import Conversation, TokenIds
from nullspace.integrations.transformers.template import ChatTemplate

_SEEN = 256  # characters of a text, enough to see which special tokens are around it: a text may be as long as a file
Text = str | Conversation | TokenIds
"""What `load_texts` reads: a text, a conversation that a chat template makes tokens of, or tokens."""


@dataclass(frozen=True)
class Mixture:
    """Several data sets that are packed together: the next text is always of the one that has most tokens to come.

    Attributes:
        parts: name → texts.
        weights: their shares of the tokens, up to a common factor, in the order of `parts`; None for equal shares.

    Raises:
        ValueError: if there is no data set, or the weights are not one a data set, each a positive number.
    """

    parts: Mapping[str, Iterable[Text]]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("a mixture needs at least one data set")
        if self.weights is not None:
            check_weights(self.weights, len(self.parts))

    def shares(self) -> list[float]:
        """Of each data set, the share of all tokens that it should have."""
        weights = [1.0] * len(self.parts) if self.weights is None else [float(each) for each in self.weights]
        return [each / sum(weights) for each in weights]


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raise `TypeError` or `ValueError` unless there is a positive weight for each of `count` data sets."""
    if len(weights) != count:
        raise InputError(f"weights must be one a data set: {len(weights)} for {count}")
    for each in weights:
        check_real("weights", each)


class PackedBatches(Sequence[dict[str, torch.Tensor]]):
    """Batches of token ids, all of one length: concatenated texts after the tokenizer's leading special tokens.

    Every sample begins with the special tokens that the tokenizer puts before a text (`<bos>`, `[CLS]`; none with GPT-2's): models
    are used with them at position 0, where many have their massive activations. Within a sample, texts are separated by what the
    tokenizer puts after a text (`[SEP]`), or else by its end-of-text token. A last sequence that the texts do not fill is padded on
    the right and masked.

    A conversation is exactly the tokens that the tokenizer's chat template gives. The next one follows at once, unless the template
    leaves the last turn open (the last token that is not white space is no special one): then the separator of texts lies between.
    Behind a prompt for which the template has opened the assistant's turn nothing is added. A sample that begins within a
    conversation begins with the tokenizer's leading special tokens if the template writes them, once. Token ids are packed as they
    are.

    Args:
        texts: of `load_texts`, in this order, or a `Mixture`.
        tokenizer: transformers'.
        samples: at most this many sequences (the paper takes 256).
        length: tokens a sequence (the paper: 1024), special tokens included.
        batch_size: sequences a batch.
        special_tokens: False packs the texts with end-of-text tokens between them and no others.
        template: chat template in the place of the tokenizer's own: Jinja, or a file with it.
        system: system message of conversations that have none.

    Attributes:
        tokens: in all samples, with special tokens, without padding.

    Raises:
        FileNotFoundError: if `template` is neither Jinja nor a file.
        ValueError: if a size is smaller than 1, `length` leaves no room after the special tokens, or the texts hold no token;
            naming the row, for a conversation that the chat template refuses, if there is no template, or for token ids that are
            not the tokenizer's; for `template` or `system` without a conversation.

    Warns:
        UserWarning: if the texts fill fewer than `samples` sequences, or a data set of a mixture ends before it has its share.
    """

    def __init__(
        self,
        texts: Iterable[Text] | Mixture,
        tokenizer: Any,
        *,
        samples: int = 256,
        length: int = 1024,
        batch_size: int = 4,
        special_tokens: bool = True,
        template: str | None = None,
        system: str | None = None,
    ) -> None:
        for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
            check_integer(name, value)
        mixture = texts if isinstance(texts, Mixture) else Mixture({"the texts": texts})
        pieces = _Pieces(tokenizer, ChatTemplate(tokenizer, template, system), special_tokens)
        rows = _filled(_drawn(mixture, pieces), samples, length)
        if not rows:
            raise InputError("the texts hold no token")
        given = [name for name, value in (("template", template), ("system", system)) if value is not None]
        if given and not pieces.conversations:
            raise InputError(
                f"{given[0]} belongs to conversations, and the texts hold none: leave it out, or read the texts as conversations "
                "(as_chat=True, on the command line --as-chat)"
            )
        if len(rows) < samples:
            warnings.warn(f"the texts fill {len(rows)} of {samples} samples of {length} tokens", DataWarning, stacklevel=2)
        self.tokens = sum(map(len, rows))
        pad = length - len(rows[-1])
        rows[-1] = rows[-1] + [rows[-1][-1]] * pad
        self._ids = torch.tensor(rows)
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


class _Piece(NamedTuple):
    """The tokens of one text, with what follows it, and those that begin a sample within it."""

    ids: list[int]
    start: list[int]


class _Pieces:
    """Texts, conversations and token ids as pieces.

    Attributes:
        conversations: how many there were.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, special: bool) -> None:
        self._tokenizer, self._template, self._special = tokenizer, template, special
        self._marks: tuple[list[int], list[int]] | None = None
        self.conversations = 0

    def of(self, text: Text) -> _Piece:
        """The piece of a text; without tokens if the text has none."""
        if isinstance(text, str):
            ids = self._own(text)
            if not ids:
                return _Piece([], [])
            start, between = self._around(text.lstrip()[:_SEEN])
            return _Piece(ids + between, start)
        if isinstance(text, TokenIds):
            ids = list(text.ids)
            most = max(ids, default=0)
            if most >= len(self._tokenizer):
                raise InputError(f"{text.where}: the tokenizer has {len(self._tokenizer)} tokens, and there is a token id {most}")
            start, _ = self._around()
            return _Piece(ids, start if ids[: len(start)] == start else [])
        if not isinstance(text, Conversation):
            raise InputTypeError(f"texts must be what load_texts reads, not {type(text).__name__}: read rows with load_texts(rows)")
        if not text.messages:
            return _Piece([], [])
        self.conversations += 1
        ids = self._template.ids(text)
        start, between = self._around()
        closed = text.asks or self._template.ends_turn(ids)
        return _Piece(ids if closed else ids + between, start if ids[: len(start)] == start else [])

    def _own(self, text: str) -> list[int]:
        # Texts are cut into samples, so the tokenizer's warning about texts longer than the model's window does not apply.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _around(self, text: str = "text") -> tuple[list[int], list[int]]:
        """The tokens that begin a sample, and those between two texts: the same with every text, so that the first one decides."""
        if self._marks is None:
            marks = self._tokenizer.eos_token_id, self._tokenizer.sep_token_id
            between = next(([i] for i in marks if i is not None), [])
            start, end = _around(self._own(text), self._tokenizer(text, verbose=False)["input_ids"]) if self._special else ([], [])
            self._marks = start, end or between
        return self._marks


def _drawn(mixture: Mixture, pieces: _Pieces) -> Iterator[_Piece]:
    """The pieces of a mixture: at each step, of the data set that is furthest behind its share of the tokens (ties: the first).

    Warns:
        UserWarning: naming the data sets that have ended, if another one goes on in their place.
    """
    parts = {name: iter(texts) for name, texts in mixture.parts.items()}
    share = dict(zip(parts, mixture.shares(), strict=True))
    tokens, warned = dict.fromkeys(parts, 0), False
    while parts:
        name = min(parts, key=lambda each: tokens[each] / share[each])
        try:
            piece = pieces.of(next(parts[name]))
        except StopIteration:
            del parts[name]
            continue
        if len(parts) < len(share) and not warned:
            ended = ", ".join(f"{each} has {tokens[each]} tokens" for each in share if each not in parts)
            warnings.warn(f"the mixture goes on without what has ended, and its shares change: {ended}", DataWarning, stacklevel=4)
            warned = True
        if piece.ids:
            tokens[name] += len(piece.ids)
            yield piece


def _filled(pieces: Iterable[_Piece], samples: int, length: int) -> list[list[int]]:
    """At most `samples` sequences of `length` tokens, the last one perhaps shorter, of the pieces one behind the other."""
    rows: list[list[int]] = []
    row: list[int] = []
    for ids, start in pieces:
        if len(start) >= length:
            raise InputError(f"length must exceed the {len(start)} special tokens that begin a sample, not {length}")
        at = 0
        while at < len(ids):
            if not row and ids[at : at + len(start)] != start:
                row = list(start)
            taken = ids[at : at + length - len(row)]
            at += len(taken)
            row = row + taken
            if len(row) == length:
                rows.append(row)
                row = []
                if len(rows) == samples:
                    return rows
    return [*rows, row] if row else rows


def _around(own: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text's own tokens."""
    for begin in range(len(whole) - len(own) + 1):
        if whole[begin : begin + len(own)] == own:
            return whole[:begin], whole[begin + len(own) :]
    raise InputError(
        "the tokenizer gives a text other tokens with special tokens than without, so it cannot be seen which are special: pack "
        "without them (special_tokens=False)"
    )
