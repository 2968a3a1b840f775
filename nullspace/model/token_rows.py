"""Which rows of a layer's input are tokens that count: `TokenRows`.

A mask has one entry a token; the inputs of layers come in many shapes. With B sequences of T tokens, axes of length 1 left out:

    (B, T, d), (B·T, d)         one row a token                       masked
    (T, B, d)                   the same, tokens first                masked; if B = T, the batch is taken to come first until
                                                                      another batch shows that it does not
    (B, …, T, d), (B, T, …, d)  several rows a token, as of heads     masked, if only one axis has T entries
    (B, d)                      one row a sequence, if it is a view   a row counts if its sequence has a token
                                of (B, T, d) or outside all blocks
    any, in a tower beside      patches, frames of audio              all rows count
    the text's
    (n, d), in a list of        the rows that a router chose          unclear, also for n = B and n = B·T
    modules inside a block
    anything else               windows, merged tokens                unclear

All rows of an unclear input count as long as no batch has padding. If one has, the layer is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nullspace.errors import InputError
from nullspace.model.blocks import beside_text, is_encoder_decoder, marked_blocks, text_root
from nullspace.model.padding import Padding
from nullspace.model.wrappers import named_modules
from nullspace.moments.sums import TokenMask


class TokenRows:
    """Which rows of a layer's input are tokens that count, batch by batch; the same for equal shapes in every batch.

    Args:
        model: layers' names are those of its `named_modules`.
        padded: returns the number of a batch that has padding, or None, as far as it is known before the batches are read. It is
            called where an input is unclear, so that a layer is refused early and not in the last batch.
    """

    def __init__(self, model: nn.Module, padded: Callable[[], int | None] = lambda: None) -> None:
        self._regions = _Regions(model)
        self._encoder_decoder = is_encoder_decoder(model)
        self._padded = padded
        self._batch, self._padding = 0, Padding()
        self._masks: dict[tuple[Any, ...], TokenMask] = {}  # made once a batch, not once a layer
        self._square: set[str] = set()  # layers whose input was masked where either axis could have been the batch
        self._tokens_first = False

    def begin(self, batch: int, padding: Padding) -> None:
        """The inputs that follow are those of this batch."""
        self._batch, self._padding = batch, padding
        self._masks.clear()

    def of(self, name: str, x: torch.Tensor) -> TokenMask | None:
        """The rows of an input (…, d_in) that count; None if all do.

        Raises:
            ValueError: naming the layer and a batch that has padding, if it is unclear which rows these are.
        """
        padding, rows = self._padding, tuple(x.shape[:-1])
        if padding.mixed and self._regions.is_beside_text(name):
            return None
        if self._encoder_decoder:
            self._refuse(name, "cannot tell padding from tokens with an encoder–decoder model: give batches without padding")
        elif padding.obstacle is not None:
            self._refuse(name, f"cannot tell padding from tokens with {padding.obstacle}: give attention_mask as (batch, tokens)")
        if padding.shape is None or self._encoder_decoder:
            return None
        kind = self._kind(name, x, *padding.shape)
        # Layers that get another modality: in the text's part of the model they attend to it, elsewhere they project it.
        elsewhere = padding.mixed and not self._regions.is_routed(name) and (len(rows) > 1 or not self._regions.is_text(name))
        if kind is None and not elsewhere:
            self._refuse(
                name,
                f"its input {tuple(x.shape)} cannot be lined up with the attention_mask {padding.shape}, which has padding: give "
                "batches without padding (packed, or one sample each)",
            )
        if kind is None or padding.mask is None:
            return None
        key = (kind, *rows)
        if key not in self._masks:
            self._masks[key] = TokenMask(_spread(padding.mask, kind, rows))
        if kind == "tokens" and rows == padding.shape == padding.shape[::-1]:
            self._square.add(name)
        return self._masks[key]

    def _kind(self, name: str, x: torch.Tensor, batch: int, tokens: int) -> str | None:
        """How the rows of an input lie: "tokens", "tokens first", "sequences", or None if that is unclear."""
        rows = tuple(x.shape[:-1])
        kept = [n for n in rows if n != 1]
        if len(rows) == 1 and self._regions.is_routed(name):
            return None
        if kept == [tokens, batch] and batch > 1 and tokens > 1 and (batch != tokens or self._tokens_first):
            self._tokens_first = True
            if name in self._square and batch != tokens:
                raise InputError(
                    f"{name}, batch {self._batch}: its input has the tokens first, which an earlier batch of as many sequences as "
                    "tokens did not show: give batches of another size, or without padding"
                )
            return "tokens first"
        if math.prod(rows) == batch and len(kept) <= 1 and tokens > 1:
            d = x.shape[-1]
            sliced = x.stride(0) == tokens * d and x.stride(-1) == 1  # hidden_states[:, 0]
            return "sequences" if sliced or self._regions.is_outside_blocks(name) else None
        return None if _axes(rows, batch, tokens) is None else "tokens"

    def _refuse(self, name: str, why: str) -> None:
        number = self._batch if self._padding.hides else self._padded()
        if number is not None:
            raise InputError(f"{name}, batch {number}: {why}")


def _axes(rows: tuple[int, ...], batch: int, tokens: int) -> list[int] | None:
    """The shape to which a mask (batch, tokens) is to be brought so that it can be expanded to `rows`; None if that is unclear."""
    kept = [axis for axis, n in enumerate(rows) if n != 1]
    sizes = [rows[axis] for axis in kept]
    if sizes in ([n for n in (batch, tokens) if n != 1], [batch * tokens]):
        return list(rows)
    view = [1] * len(rows)
    if sizes and sizes[0] == batch * tokens and sizes.count(batch * tokens) == 1:
        view[kept[0]] = batch * tokens
        return view
    if batch > 1:
        if not sizes or sizes[0] != batch:
            return None
        view[kept[0]] = batch
        kept = kept[1:]
    if tokens > 1:
        of_tokens = [axis for axis in kept if rows[axis] == tokens]
        if len(of_tokens) != 1:
            return None
        view[of_tokens[0]] = tokens
    return view


def _spread(mask: torch.Tensor, kind: str, rows: tuple[int, ...]) -> torch.Tensor:
    """(sequences, tokens) bool → one entry a row."""
    if kind == "sequences":
        return mask.any(dim=1)
    if kind == "tokens first":
        return mask.mT
    view = _axes(rows, *mask.shape)
    assert view is not None
    return mask.reshape(view).expand(rows)


class _Regions:
    """Where in a model a layer is, by its name: in another tower than the text's, in a list of experts, outside of all blocks."""

    def __init__(self, model: nn.Module) -> None:
        blocks = marked_blocks(model)
        self._blocks = [tuple(name.split(".")) for name in blocks]
        self._text = text_root(model, blocks)
        self._beside = set(beside_text(model, blocks).values())
        self._lists = {
            tuple(name.split("."))
            for name, module in named_modules(model).items()
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1
        }

    def is_text(self, name: str) -> bool:
        """Whether a layer is in the part of the model that the token embeddings and their blocks share."""
        return not self._text or name.startswith(f"{self._text}.")

    def is_beside_text(self, name: str) -> bool:
        """Whether a layer is in another tower than the text's: one with blocks of its own."""
        return any(name == tower or name.startswith(f"{tower}.") for tower in self._beside)

    def is_outside_blocks(self, name: str) -> bool:
        """Whether a model has blocks, and a layer is in none of them."""
        path = tuple(name.split("."))
        return bool(self._blocks) and not any(path[: len(block)] == block for block in self._blocks)

    def is_routed(self, name: str) -> bool:
        """Whether a layer may be one of several of which each gets some of the rows: it is in a list of modules below its block."""
        path = tuple(name.split("."))
        block = next((block for block in self._blocks if path[: len(block)] == block), ())
        return any(path[:end] in self._lists for end in range(len(block) + 1, len(path)))
