"""Which rows of a layer's input are tokens that count: `TokenRows`.

A mask has one entry a token; the inputs of layers come in many shapes. With B sequences of T tokens, axes of length 1 left out:

    (B, T, d), (B·T, d)         one row a token                       masked
    (T, B, d)                   the same, tokens first                masked; if B = T, the batch is taken to come first until
                                                                      another batch shows that it does not
    (B, …, T, d), (B, T, …, d)  several rows a token, as of heads     masked, if only one axis has T entries
    (B, d)                      one row a sequence, if it is a view   a row counts if its sequence has a token
                                of (B, T, d) or outside all blocks
    (n, d), in a list of        the rows that a router chose          unclear, also for n = B and n = B·T
    modules inside a block
    anything else               windows, merged tokens                unclear

All rows of an unclear input count as long as no batch has padding. If one has, the layer is refused by name.

An encoder–decoder model has two texts, each with its mask. The layers of the encoder, and those of the decoder that receive the
encoder's output, are masked by the encoder's.

In a tower beside the text's (patches of images, frames of sounds) all rows count but those that the tower's own masks hide, as its
blocks receive them (`nullspace.model.towers`). If the batch has a mask that hides a part of an image or a sound, and the tower's
masks do not show where, the layer is refused by name. Between such a tower and the text, the rows that count are as many as the
tokens that stand for them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nullspace.errors import InputError
from nullspace.model.padding import Padding, Part
from nullspace.model.towers import TEXT, HandedMasks, Regions
from nullspace.moments.sums import TokenMask


class TokenRows:
    """Which rows of a layer's input are tokens that count, batch by batch; the same for equal shapes in every batch.

    Args:
        model: layers' names are those of its `named_modules`.
        padded: returns the number of a batch that has padding in a part, or None, as far as it is known before the batches are
            read. It is called where an input is unclear, so that a layer is refused early and not in the last batch.
    """

    def __init__(self, model: nn.Module, padded: Callable[[Part], int | None] = lambda part: None) -> None:
        self._regions = Regions(model)
        self._handed = HandedMasks(model, self._regions)
        self._padded = padded
        self._batch, self._padding = 0, Padding()
        self._masks: dict[tuple[Any, ...], TokenMask | None] = {}  # made once a batch, not once a layer
        self._square: set[str] = set()  # layers whose input was masked where either axis could have been the batch
        self._tokens_first = False

    def begin(self, batch: int, padding: Padding) -> None:
        """The inputs that follow are those of this batch."""
        self._batch, self._padding = batch, padding
        self._masks.clear()
        self._handed.clear()

    def reading_masks(self) -> contextlib.AbstractContextManager[None]:
        """Context manager: the masks that the model hands to its parts are read while it runs."""
        return self._handed.reading()

    def of(self, name: str, x: torch.Tensor) -> TokenMask | None:
        """The rows of an input (…, d_in) that count; None if all do.

        Raises:
            ValueError: naming the layer and a batch that has padding, if it is unclear which rows these are.
        """
        padding, regions = self._padding, self._regions
        tower, is_source = regions.tower(name), self._handed.is_source(x)
        if tower is not None or is_source:
            if padding.decoder is not None and padding.shape is not None:
                return self._of_tokens(name, x, padding, "tokens")
            if padding.decoder is not None or padding.mixed:
                return self._of_source(name, x) if tower is None else self._of_tower(name, x, tower)
        if padding.mixed and not regions.is_text(name):
            return self._of_projection(name, x)
        if padding.decoder is not None:
            return self._of_tokens(name, x, padding.decoder, "decoder")
        return self._of_tokens(name, x, padding, "tokens")

    def _of_tokens(self, name: str, x: torch.Tensor, padding: Padding, part: Part) -> TokenMask | None:
        """The rows of an input with rows of tokens."""
        mask_name = "decoder_attention_mask" if part == "decoder" else "attention_mask"
        if padding.obstacle is not None:
            self._refuse(
                name, part, f"cannot tell padding from tokens with {padding.obstacle}: give {mask_name} as (batch, tokens)"
            )
        if padding.shape is None:
            return None
        rows = tuple(x.shape[:-1])
        kind = self._kind(name, x, *padding.shape)
        if kind is None:  # a model may pad its input itself, to a multiple of its window
            for mask in self._handed.of_tower(self._regions.tower(name) or TEXT):
                if (kind := self._kind(name, x, *mask.shape)) is not None:
                    return self._mask(kind, mask, x)
        # Layers of the text's part that get another modality attend to it.
        if kind is None and not (self._padding.mixed and len(rows) > 1 and not self._regions.is_routed(name)):
            self._refuse(
                name,
                part,
                f"its input {tuple(x.shape)} cannot be lined up with the {mask_name} {padding.shape}, which has padding: give "
                "batches without padding (packed, or one sample each)",
            )
        if kind is None or padding.mask is None:
            return None
        if kind == "tokens" and rows == padding.shape == padding.shape[::-1]:
            self._square.add(name)
        return self._mask(kind, padding.mask, x)

    def _of_tower(self, name: str, x: torch.Tensor, tower: str) -> TokenMask | None:
        """The rows of an input in another tower than the text's, by the masks that this tower's modules received."""
        own = self._handed.of_tower(tower)
        for mask in (*own, *self._handed.around_tower(tower)):
            if (kind := self._kind(name, x, *mask.shape)) is not None:
                return self._mask(kind, mask, x)
        self._refuse_hidden(name, x, own)
        return None

    def _of_source(self, name: str, x: torch.Tensor) -> TokenMask | None:
        """The rows of another tower's output where the text's blocks attend to it, by the mask that came with it."""
        masks = [mask for mask in self._handed.of_source(x) if not bool(mask.all())]
        for mask in masks:
            if (kind := self._kind(name, x, *mask.shape)) is not None:
                return self._mask(kind, mask, x)
        self._refuse_hidden(name, x, masks)
        return None

    def _of_projection(self, name: str, x: torch.Tensor) -> TokenMask | None:
        """The rows of an input between a tower and the text: as many count as there are tokens that stand for them."""
        rows, padding = tuple(x.shape[:-1]), self._padding
        masks = [mask for mask in self._handed.of_all_towers() if not bool(mask.all())]
        if math.prod(rows) in padding.placeholders or not (padding.beside or masks):
            return None
        for mask in masks:
            merged = mask.numel() // max(math.prod(rows), 1)
            if len(rows) > 1 and rows[0] == len(mask) and merged * math.prod(rows) == mask.numel():
                groups = mask.reshape(len(mask), -1, merged)
                for counts in (groups.all(dim=-1), groups.any(dim=-1)):
                    if merged == 1 or int(counts.sum()) in padding.placeholders:  # or these rows will be resampled
                        return TokenMask(counts.reshape(rows))
        self._refuse_hidden(name, x, masks)
        return None

    def _mask(self, kind: str, mask: torch.Tensor, x: torch.Tensor) -> TokenMask | None:
        """Which rows of an input a mask (sequences, tokens) keeps, given how they lie; None if it keeps all."""
        rows = tuple(x.shape[:-1])
        key = (id(mask), kind, *rows)
        if key not in self._masks:
            self._masks[key] = None if bool(mask.all()) else TokenMask(_spread(mask, kind, rows))
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

    def _refuse(self, name: str, part: Part, why: str) -> None:
        number = self._batch if self._padding.hides(part) else self._padded(part)
        if number is not None:
            raise InputError(f"{name}, batch {number}: {why}")

    def _refuse_hidden(self, name: str, x: torch.Tensor, masks: list[torch.Tensor]) -> None:
        """Refuse a layer whose input holds rows of images or sounds, if some are hidden and it is unclear which."""
        if self._padding.beside is None and all(bool(mask.all()) for mask in masks):
            return
        hidden = "the masks of these images or sounds" if self._padding.beside is None else repr(self._padding.beside)
        raise InputError(
            f"{name}, batch {self._batch}: its input {tuple(x.shape)} cannot be lined up with {hidden}, by which a part of it is "
            "padding: give batches in which nothing of the kind is padded, or leave the layer out of targets"
        )


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
