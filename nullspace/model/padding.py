"""Padding: which tokens of a batch count (`PaddingReader`)."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from nullspace.devices import on_host
from nullspace.errors import DataWarning, InputError
from nullspace.model.blocks import is_encoder_decoder
from nullspace.model.positions import positions_move

# Of additive masks: an entry below this hides a token whatever its score is; one between it and zero is a bias.
HIDDEN_BELOW = -1e3
# transformers' label of a token that does not count.
IGNORED = -100
# Words in the names of masks that say something else than what is padding.
OTHER_MASKS = ("special", "loss", "label", "assistant", "global")
# Where configurations name the tokens in whose places other modalities' vectors are put.
PLACEHOLDERS = (
    *("image_token_id", "video_token_id", "audio_token_id"),
    *("image_token_index", "video_token_index", "audio_token_index"),
)
# Masks of the text's tokens.
TEXT_MASKS = ("attention_mask", "decoder_attention_mask")

Part = Literal["tokens", "decoder"]
"""A model's tokens (of an encoder–decoder model, its encoder's), or a decoder's."""


class Padding(NamedTuple):
    """Which tokens of one batch count.

    Attributes:
        shape: (sequences, tokens), or None if the batch does not show it.
        mask: (sequences, tokens) bool, True where a token counts; None if all do.
        tokens: how many count.
        obstacle: why padding cannot be located in this batch, or None.
        mixed: whether the batch holds inputs of another modality beside its tokens.
        beside: the name of a mask that hides parts of these inputs, or None.
        placeholders: how many tokens stand for inputs of another modality: of each kind, and of all.
        decoder: of the tokens of an encoder–decoder model's decoder; the rest is then of its encoder's.
    """

    shape: tuple[int, int] | None = None
    mask: torch.Tensor | None = None
    tokens: int = 0
    obstacle: str | None = None
    mixed: bool = False
    beside: str | None = None
    placeholders: frozenset[int] = frozenset()
    decoder: Padding | None = None

    def hides(self, part: Part) -> bool:
        """Whether some tokens of a part do not count, or may not."""
        own = self.decoder if part == "decoder" else self
        return own is not None and (own.mask is not None or own.obstacle is not None)

    def keep(self, counts: torch.Tensor) -> Padding:
        """The same with fewer tokens: those that `counts`, (sequences, tokens) bool, keeps too; of the decoder, if there is one."""
        if self.decoder is not None:
            return self._replace(decoder=self.decoder.keep(counts))
        counts = on_host(counts)
        counts = counts if self.mask is None else counts & self.mask
        return self._replace(mask=None if bool(counts.all()) else counts, tokens=int(counts.sum()))


class PaddingReader:
    """Reads the padding of batch after batch. Warns once of tokens that look like padding where there is no `attention_mask`.

    Masks are looked at on the host. Of inputs that are on a GPU, the host waits once for what must be read.

    Args:
        model: whose configuration names the padding token.
    """

    def __init__(self, model: nn.Module) -> None:
        self._encoder_decoder = is_encoder_decoder(model)
        config: Any = getattr(model, "config", None)
        of_text = getattr(config, "get_text_config", None)
        pad = getattr(of_text() if callable(of_text) else config, "pad_token_id", None)
        self._pad = pad if isinstance(pad, int) else None
        self._placeholders = {i for name in PLACEHOLDERS if isinstance(i := getattr(config, name, None), int)}
        self._has_warned = self._has_tried = False

    def read(self, number: int, inputs: Mapping[str, Any]) -> Padding:
        """The padding of one batch.

        Args:
            number: of the batch, from 1.
            inputs: argument name → value, labels among them.

        Raises:
            ValueError: if `attention_mask` is neither a tensor nor a mapping to tensors.

        Warns:
            UserWarning: once, for tokens that look like padding but are counted.
        """
        inputs = _on_host(inputs)
        try:
            padding = self.padding_of(inputs)
        except ValueError as error:
            raise InputError(f"batch {number}: {error}") from error
        if not self._has_warned and all(inputs.get(name) is None for name in TEXT_MASKS):
            suspicion = _suspicion(inputs, self._pad)
            if suspicion is not None:
                self._has_warned = True
                warnings.warn(
                    f"batch {number}: {suspicion}: all tokens are counted. Give 'attention_mask' (batch, tokens) with the batches: "
                    "0 where a token is padding, 1 elsewhere.",
                    DataWarning,
                    stacklevel=2,
                )
        return padding

    def check_positions(self, model: nn.Module, inputs: Mapping[str, Any], padding: Padding) -> None:
        """Warn once if this batch is padded on the left and the model's positions do not allow for that.

        Args:
            model: in eval mode, with gradients off, and without hooks that read inputs: it may run up to its first block.
            inputs: of the batch, as the model takes them.
            padding: the result of `read`.
        """
        mask = padding.mask
        if self._has_tried or mask is None or not bool((~mask[:, 0] & mask.any(dim=1)).any()):
            return
        self._has_tried = True
        if positions_move(model, inputs, mask):
            takes = "position_ids" in inspect.signature(model.forward).parameters
            way = "Give position_ids with the batches, or pad" if takes else "Pad"
            warnings.warn(
                f"the batches are padded on the left, and {type(model).__name__} counts positions from the padding on: its layers "
                f"get other inputs than for texts alone. {way} on the right.",
                DataWarning,
                stacklevel=2,
            )

    def padding_of(self, inputs: Mapping[str, Any]) -> Padding:
        """As `read`, without a warning."""
        inputs = _on_host(inputs)
        tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
        if self._encoder_decoder:
            # An encoder of sounds or images hands its blocks masks of their own.
            encoder = Padding() if tokens is None else _padding(inputs.get("attention_mask"), _token_shape(tokens))
            padding = encoder._replace(decoder=_of_decoder(inputs, encoder))
        else:
            first = next(iter(inputs.values()), None) if tokens is None else tokens
            padding = _padding(inputs.get("attention_mask"), _token_shape(first))
        ids = inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor):
            return padding
        mixed = any(
            isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
            for name, value in inputs.items()
            if name not in (*TEXT_MASKS, "labels")
        )
        if not mixed:
            return padding
        counts = [int((ids == each).sum()) for each in self._placeholders]
        return padding._replace(mixed=True, beside=_hiding_mask(inputs, ids), placeholders=frozenset({*counts, sum(counts)} - {0}))


def _on_host(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, with ids, labels and masks on the host."""
    read = {n: v for n, v in inputs.items() if "mask" in n or not (isinstance(v, torch.Tensor) and v.is_floating_point())}
    return {**inputs, **on_host(read)}


def _padding(given: Any, shape: tuple[int, ...] | None) -> Padding:
    """The padding of tokens of a shape, by their `attention_mask`."""
    mask, obstacle = token_mask(given, shape)
    tokens = math.prod(shape or (0,)) if mask is None else int(mask.sum())
    if mask is not None:
        shape = tuple(mask.shape)
        mask = None if tokens == mask.numel() else mask
    sizes = None if shape is None or len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])
    return Padding(sizes, mask, tokens, obstacle)


def _of_decoder(inputs: Mapping[str, Any], encoder: Padding) -> Padding:
    """The padding of a decoder's tokens: by their mask, or by the labels that they are made of, or as the encoder's.

    From labels, models make the decoder's inputs by a shift to the right by one place: a text of n labels has n tokens. Without
    labels, some make them of the encoder's tokens.
    """
    given = {name: inputs.get(f"decoder_{name}") for name in ("input_ids", "inputs_embeds", "attention_mask")}
    own = next((value for value in given.values() if isinstance(value, torch.Tensor)), None)
    labels = inputs.get("labels")
    labels = labels if isinstance(labels, torch.Tensor) and labels.ndim == 2 else None
    shape = _token_shape(own if labels is None else labels)
    if given["attention_mask"] is not None:
        return _padding(given["attention_mask"], _token_shape(own))
    if labels is not None:
        unlabelled = labels == IGNORED
        behind = unlabelled.flip(1).cumprod(1).flip(1) > 0
        padding = _padding(~behind, shape)
        if own is None and bool((unlabelled & ~behind)[:, 0].any()):
            return padding._replace(obstacle=f"labels that begin with {IGNORED}")
        return padding
    if own is not None:
        return _padding(None, shape)
    if encoder.mask is not None and bool((encoder.mask[:, 1:] & ~encoder.mask[:, :-1]).any()):
        return encoder._replace(obstacle="inputs of the decoder that are made of tokens with padding on the left")
    return encoder


def _hiding_mask(inputs: Mapping[str, Any], ids: torch.Tensor) -> str | None:
    """The name of a mask that hides a part of an image or a sound: zeros in it, beside ones. None if there is none.

    A mask of zeros alone belongs to what is not there: as many images as in another row. One with an entry for each token says
    which tokens attend to which image.
    """
    for name, value in inputs.items():
        if name in TEXT_MASKS or "mask" not in name or any(word in name for word in OTHER_MASKS):
            continue
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[:2] == ids.shape:
            continue
        seen = (value != 0).reshape(-1, value[0].numel() if value.ndim < 4 else math.prod(value.shape[-2:]))
        if bool((seen.any(dim=1) & ~seen.all(dim=1)).any()):
            return name
    return None


def _token_shape(tokens: Any) -> tuple[int, ...] | None:
    """The shape of tokens: of their ids, or of their vectors without the width."""
    if not isinstance(tokens, torch.Tensor):
        return None
    return tuple(tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape)


def token_mask(given: Any, shape: tuple[int, ...] | None) -> tuple[torch.Tensor | None, str | None]:
    """Which tokens an `attention_mask` keeps, (sequences, tokens) bool or None for all; and why it cannot be read, or None."""
    if given is None:
        return None, None
    if isinstance(given, Mapping):
        return _agreed([token_mask(each, shape) for each in given.values()])
    if not isinstance(given, torch.Tensor):
        raise InputError(f"attention_mask is {type(given).__name__}, not a tensor (batch, tokens)")
    if given.ndim == 2 or tuple(given.shape) == shape:
        return (given != 0).reshape(-1, given.shape[-1]), None
    obstacle = f"an attention_mask of shape {tuple(given.shape)}"
    square = shape is not None and len(shape) == 2 and tuple(given.shape[-2:]) == (shape[1], shape[1])
    if shape is None or not square or given.ndim not in (3, 4) or given.shape[0] not in (1, shape[0]):
        return None, obstacle
    allowed = _allowed_pairs(given)
    if allowed is None:
        return None, f"{obstacle} with biases in it"
    if allowed.ndim == 4:
        allowed = allowed.any(dim=1)
    counts = _seen_tokens(allowed.expand(shape[0], -1, -1))
    return counts, obstacle if counts is None else None


def seen_rows(mask: torch.Tensor, *, of_source: bool) -> torch.Tensor | None:
    """Of a mask that a part of a model was handed, the rows that count, (sequences, rows) bool; None if that would be a guess.

    Args:
        mask: (sequences, rows), (images, height, width), (sequences, heads, queries, keys).
        of_source: whether the keys are the output of another part of the model.
    """
    if mask.ndim == 4 and (of_source or mask.shape[-2] != mask.shape[-1]):
        allowed = _allowed_pairs(mask)
        return None if allowed is None else allowed.any(dim=2).any(dim=1)
    if mask.ndim == 4:
        return token_mask(mask, (mask.shape[0], mask.shape[-1]))[0]
    if mask.ndim not in (2, 3):
        return None
    is_added = mask.is_floating_point() and (bool((mask < HIDDEN_BELOW).any()) or not bool((mask != 0).any()))
    return (mask > HIDDEN_BELOW if is_added else mask != 0).reshape(len(mask), -1)


def _allowed_pairs(mask: torch.Tensor) -> torch.Tensor | None:
    """Which pairs of tokens a mask lets through, whether it is added to scores or not; None if it is added and holds biases."""
    if not mask.is_floating_point() or not bool((mask < 0).any()):
        # Zeros alone, added, hide nothing. Ones beside them are a mask by which to multiply.
        return mask != 0 if not mask.is_floating_point() or bool((mask != 0).any()) else torch.ones_like(mask, dtype=torch.bool)
    hidden = mask < HIDDEN_BELOW
    return ~hidden if bool((hidden | (mask == 0)).all()) else None


def _seen_tokens(allowed: torch.Tensor) -> torch.Tensor | None:
    """Of (sequences, queries, keys) bool the tokens that count, (sequences, tokens): those that some query sees.

    None where this would be a guess: a token that is seen but does not see itself; one that sees and is seen by itself alone
    (padding that sees itself, or a text of one token); and one in the midst that sees all others, which do not (some kernels want
    this of padding).
    """
    seen = allowed.any(dim=1)
    sees_itself = allowed.diagonal(dim1=1, dim2=2)
    alone = (allowed.sum(dim=1) == 1) & (allowed.sum(dim=2) == 1) & (seen.sum(dim=1, keepdim=True) > 1)
    sees_all = (allowed | ~seen[:, None, :]).all(dim=2)
    # The last of the tokens that count sees all of them under a causal mask, too.
    last = seen & (seen.flip(1).cumsum(dim=1).flip(1) == 1)
    odd = (sees_all & seen & ~last).any(dim=1) & ~(sees_all | ~seen).all(dim=1)
    if bool((seen & (~sees_itself | alone)).any()) or bool(odd.any()):
        return None
    return seen


def _agreed(answers: Sequence[tuple[torch.Tensor | None, str | None]]) -> tuple[torch.Tensor | None, str | None]:
    """The common result of several masks, which a model with several kinds of attention takes."""
    obstacle = next((text for _, text in answers if text is not None), None)
    masks = [None if mask is None or bool(mask.all()) else mask for mask, _ in answers]
    first = masks[0] if masks else None
    if obstacle is None and any((mask is None) != (first is None) for mask in masks):
        obstacle = "masks of which one hides tokens, and another one none"
    elif obstacle is None and first is not None and not all(mask is not None and torch.equal(mask, first) for mask in masks):
        obstacle = "masks that hide different tokens"
    return (None, obstacle) if obstacle is not None else (first, None)


def looks_like_mask(value: Any, ids: torch.Tensor) -> bool:
    """Whether a tensor has an entry for every one of the ids, zeros and ones, and not only zeros."""
    if not isinstance(value, torch.Tensor) or value.shape != ids.shape:
        return False
    return bool(((value == 0) | (value == 1)).all()) and bool((value != 0).any())


def _suspicion(inputs: Mapping[str, Any], pad: int | None) -> str | None:
    """A description of what looks like padding in a batch without an `attention_mask`; None if nothing does."""
    ids = inputs.get("input_ids", next(iter(inputs.values()), None))
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2 or not ids.numel():
        return None
    for name, value in inputs.items():
        is_mask = "mask" in name.lower() and not any(word in name.lower() for word in OTHER_MASKS) and looks_like_mask(value, ids)
        if is_mask and bool((value == 0).any()):
            zeros = int((value == 0).sum())
            return f"{name!r} has {zeros} zeros and {ids.numel() - zeros} ones, and only 'attention_mask' is taken for padding"
    count = _padding_at_ends(ids, pad, inputs.get("labels"))
    what = (
        f"equal ones with labels of {IGNORED} at the ends of rows" if pad is None else f"pad_token_id = {pad} at the ends of rows"
    )
    return f"{count} of {ids.numel()} tokens look like padding ({what}), and there is no 'attention_mask'" if count else None


def _padding_at_ends(ids: torch.Tensor, pad: int | None, labels: Any) -> int:
    """How many tokens at the ends of rows look like padding.

    Runs of two or more padding tokens, as a single one may be an end-of-text token; a single one, if its label is -100. If there is
    no padding token, runs of two or more equal tokens whose labels are -100.
    """
    ignored = labels == IGNORED if isinstance(labels, torch.Tensor) and labels.shape == ids.shape else torch.zeros_like(ids) > 0
    padding = torch.zeros_like(ignored)
    for turn in (lambda t: t, lambda t: t.flip(1)):
        row, unlabelled = turn(ids), turn(ignored)
        run = (row == pad if pad is not None else (row == row[:, :1]) & unlabelled).cumprod(dim=1) > 0
        single = unlabelled[:, 0] if pad is not None else torch.zeros_like(unlabelled[:, 0])
        padding |= turn(run & ((run.sum(dim=1) > 1) | single)[:, None])
    return int(padding.sum())
