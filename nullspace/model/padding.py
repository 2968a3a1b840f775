"""Padding: which tokens of a batch count (`PaddingReader`), and which rows of a layer's input these are (`TokenRows`).

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

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from nullspace.model.blocks import is_encoder_decoder, marked_blocks
from nullspace.model.sharded_tensors import is_sharded
from nullspace.model.wrappers import named_modules
from nullspace.moments.sums import TokenMask

# Of additive masks: an entry below this hides a token whatever its score is; one between it and zero is a bias.
HIDDEN_BELOW = -1e3
# Words in the names of masks that say something else than what is padding.
OTHER_MASKS = ("special", "loss", "label", "assistant", "global")


class Padding(NamedTuple):
    """What one batch says of its tokens.

    Attributes:
        shape: (sequences, tokens), or None if the batch does not show it.
        mask: (sequences, tokens) bool, True where a token counts; None if all do.
        tokens: how many count.
        obstacle: why padding cannot be located in this batch, or None.
        mixed: whether the batch holds inputs of another modality beside its tokens.
    """

    shape: tuple[int, int] | None = None
    mask: torch.Tensor | None = None
    tokens: int = 0
    obstacle: str | None = None
    mixed: bool = False

    @property
    def hides(self) -> bool:
        """Whether some tokens do not count, or may not."""
        return self.mask is not None or self.obstacle is not None

    def keep(self, counts: torch.Tensor) -> Padding:
        """The same with fewer tokens: those that `counts`, (sequences, tokens) bool, keeps too."""
        counts = counts if self.mask is None else counts & self.mask.to(counts.device)
        return self._replace(mask=None if bool(counts.all()) else counts, tokens=int(counts.sum()))


class PaddingReader:
    """Reads the padding of batch after batch. Warns once of tokens that look like padding where there is no `attention_mask`.

    Args:
        model: whose configuration names the padding token.
    """

    def __init__(self, model: nn.Module) -> None:
        self._encoder_decoder = is_encoder_decoder(model)
        config: Any = getattr(model, "config", None)
        of_text = getattr(config, "get_text_config", None)
        pad = getattr(of_text() if callable(of_text) else config, "pad_token_id", None)
        self._pad = pad if isinstance(pad, int) else None
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
        try:
            found = self.padding_of(inputs)
        except ValueError as error:
            raise ValueError(f"batch {number}: {error}") from error
        if not self._has_warned and all(inputs.get(name) is None for name in ("attention_mask", "decoder_attention_mask")):
            suspicion = _suspicion(inputs, self._pad)
            if suspicion is not None:
                self._has_warned = True
                warnings.warn(
                    f"batch {number}: {suspicion}: all tokens are counted. Give 'attention_mask' (batch, tokens) with the batches: "
                    "0 where a token is padding, 1 elsewhere.",
                    stacklevel=2,
                )
        return found

    def check_positions(self, model: nn.Module, inputs: Mapping[str, Any], padding: Padding) -> None:
        """Warn once if this batch is padded on the left and the model's positions do not allow for that.

        Args:
            model: in eval mode, with gradients off, and with nobody looking at the inputs of its layers: it may run a little.
            inputs: of the batch, as the model takes them.
            padding: what `read` said.
        """
        mask = padding.mask
        if self._has_tried or mask is None or not bool((~mask[:, 0] & mask.any(dim=1)).any()):
            return
        self._has_tried = True
        if _positions_move(model, inputs, mask):
            takes = "position_ids" in inspect.signature(model.forward).parameters
            way = "Give position_ids with the batches, or pad" if takes else "Pad"
            warnings.warn(
                f"the batches are padded on the left, and {type(model).__name__} counts positions from the padding on: its layers "
                f"get other inputs than for texts alone. {way} on the right.",
                stacklevel=2,
            )

    def padding_of(self, inputs: Mapping[str, Any]) -> Padding:
        """As `read`, without a warning."""
        ids = inputs.get("input_ids")
        shape = _token_shape(inputs)
        mask, obstacle = _token_mask(inputs.get("attention_mask"), shape)
        tokens = math.prod(shape or (0,)) if mask is None else int(mask.sum())
        if mask is not None:
            shape = tuple(mask.shape)
            mask = None if tokens == mask.numel() else mask
        if mask is None and self._encoder_decoder:
            mask = _decoder_mask(inputs)
        mixed = isinstance(ids, torch.Tensor) and any(
            isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
            for name, value in inputs.items()
            if name not in ("attention_mask", "labels")
        )
        sizes = None if shape is None or len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])
        return Padding(sizes, mask, tokens, obstacle, mixed)


def _token_shape(inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of a batch's tokens: of its ids, or of its vectors without their width."""
    found = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if found is None:
        found = next(iter(inputs.values()), None)
    if not isinstance(found, torch.Tensor):
        return None
    return tuple(found.shape[:-1] if found.is_floating_point() else found.shape)


def _token_mask(given: Any, shape: tuple[int, ...] | None) -> tuple[torch.Tensor | None, str | None]:
    """What an `attention_mask` says: (sequences, tokens) bool or None for all tokens; and why it cannot be understood, or None."""
    if given is None:
        return None, None
    if isinstance(given, Mapping):
        return _agreed([_token_mask(each, shape) for each in given.values()])
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"attention_mask is {type(given).__name__}, not a tensor (batch, tokens)")
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


def _agreed(found: Sequence[tuple[torch.Tensor | None, str | None]]) -> tuple[torch.Tensor | None, str | None]:
    """One answer for several masks, as a model takes that has several kinds of attention."""
    obstacle = next((text for _, text in found if text is not None), None)
    masks = [None if mask is None or bool(mask.all()) else mask for mask, _ in found]
    first = masks[0] if masks else None
    if obstacle is None and any((mask is None) != (first is None) for mask in masks):
        obstacle = "masks of which one hides tokens, and another one none"
    elif obstacle is None and first is not None and not all(mask is not None and torch.equal(mask, first) for mask in masks):
        obstacle = "masks that hide different tokens"
    return (None, obstacle) if obstacle is not None else (first, None)


def _decoder_mask(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The mask of a decoder's tokens, if some of them are padding: its inputs may come from the labels."""
    mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    masks = (mask, labels != -100 if isinstance(labels, torch.Tensor) else None)
    return next((m != 0 for m in masks if isinstance(m, torch.Tensor) and not bool((m != 0).all())), None)


def looks_like_mask(value: Any, ids: torch.Tensor) -> bool:
    """Whether a tensor has an entry for every one of the ids, zeros and ones, and not only zeros."""
    if not isinstance(value, torch.Tensor) or value.shape != ids.shape:
        return False
    return bool(((value == 0) | (value == 1)).all()) and bool((value != 0).any())


def _suspicion(inputs: Mapping[str, Any], pad: int | None) -> str | None:
    """What looks like padding in a batch without an `attention_mask`."""
    ids = inputs.get("input_ids", next(iter(inputs.values()), None))
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2 or not ids.numel():
        return None
    for name, value in inputs.items():
        is_mask = "mask" in name.lower() and not any(word in name.lower() for word in OTHER_MASKS) and looks_like_mask(value, ids)
        if is_mask and bool((value == 0).any()):
            zeros = int((value == 0).sum())
            return f"{name!r} has {zeros} zeros and {ids.numel() - zeros} ones, and only 'attention_mask' is taken for padding"
    count = _padding_at_ends(ids, pad, inputs.get("labels"))
    what = "equal ones with labels of -100 at the ends of rows" if pad is None else f"pad_token_id = {pad} at the ends of rows"
    return f"{count} of {ids.numel()} tokens look like padding ({what}), and there is no 'attention_mask'" if count else None


def _padding_at_ends(ids: torch.Tensor, pad: int | None, labels: Any) -> int:
    """How many tokens at the ends of rows look like padding.

    Runs of two or more padding tokens, as a single one may be an end-of-text token; a single one, if its label is -100. If there is
    no padding token, runs of two or more equal tokens whose labels are -100.
    """
    ignored = labels == -100 if isinstance(labels, torch.Tensor) and labels.shape == ids.shape else torch.zeros_like(ids) > 0
    found = torch.zeros_like(ignored)
    for turn in (lambda t: t, lambda t: t.flip(1)):
        row, unlabelled = turn(ids), turn(ignored)
        run = (row == pad if pad is not None else (row == row[:, :1]) & unlabelled).cumprod(dim=1) > 0
        single = unlabelled[:, 0] if pad is not None else torch.zeros_like(unlabelled[:, 0])
        found |= turn(run & ((run.sum(dim=1) > 1) | single)[:, None])
    return int(found.sum())


def _positions_move(model: nn.Module, inputs: Mapping[str, Any], mask: torch.Tensor) -> bool:
    """Whether padding on the left moves the positions of the tokens behind it: absolute ones, counted from the padding on.

    Found by a trial: what the first block is handed for one padded text, and for the same text alone. The model runs no further.

    Args:
        model: in eval mode; gradients are off.
        inputs: of one batch, as the model takes them.
        mask: (sequences, tokens) bool, with padding on the left in at least one sequence.
    """
    ids, kinds = inputs.get("input_ids"), inputs.get("token_type_ids")
    others = set(inputs) - {"input_ids", "attention_mask", "token_type_ids", "labels"}
    if not isinstance(ids, torch.Tensor) or ids.shape != mask.shape or others or any(map(is_sharded, model.parameters())):
        return False
    row = int(((~mask[:, 0]) & mask.any(dim=1)).to(torch.int8).argmax())
    counts = mask[row].to(ids.device)
    padded = {"input_ids": ids[row][None], "attention_mask": counts[None].to(ids.dtype)}
    if isinstance(kinds, torch.Tensor):
        padded["token_type_ids"] = kinds[row][None]
    alone = {name: value[:, counts] for name, value in padded.items()}
    with_padding, without = _first_hidden_states(model, padded), _first_hidden_states(model, alone)
    if with_padding is None or without is None or with_padding.shape[:2] != (1, len(counts)):
        return False
    with_padding, scale = with_padding[:, counts], float(without.abs().max())
    return with_padding.shape == without.shape and not torch.allclose(with_padding, without, rtol=1e-2, atol=1e-2 * scale)


def _first_hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """What a model hands the first of its blocks, (sequences, tokens, d)."""
    found: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, *kwargs.values())
        found.extend(value for value in values[:1] if isinstance(value, torch.Tensor) and value.ndim == 3)
        raise _Reached

    handles = [block.register_forward_pre_hook(stop, with_kwargs=True) for block in marked_blocks(model).values()]
    try:
        if handles:
            model(**inputs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


class _Reached(BaseException):
    """The first block was called. Not an `Exception`: nobody is to catch it on the way."""


class TokenRows:
    """Which rows of a layer's input are tokens that count, batch by batch; the same answer for a shape in every batch.

    Args:
        model: whose `named_modules` the layers' names are of.
        padded: the number of a batch that has padding, or None, as far as can be known ahead: it is asked for where an input is
            unclear, so that a layer is refused before the work and not in the last batch.
    """

    def __init__(self, model: nn.Module, padded: Callable[[], int | None] = lambda: None) -> None:
        self._parts = _Parts(model)
        self._encoder_decoder = is_encoder_decoder(model)
        self._padded = padded
        self._batch, self._padding = 0, Padding()
        self._masks: dict[tuple[Any, ...], TokenMask] = {}  # looked at once a batch, not once a layer
        self._square: set[str] = set()  # layers whose input was masked where either axis could have been the batch
        self._tokens_first = False

    def begin(self, batch: int, padding: Padding) -> None:
        """From here on, inputs are those of another batch."""
        self._batch, self._padding = batch, padding
        self._masks.clear()

    def of(self, name: str, x: torch.Tensor) -> TokenMask | None:
        """The rows of an input (…, d_in) that count; None if all do.

        Raises:
            ValueError: naming the layer and a batch that has padding, if it is unclear which rows these are.
        """
        padding, rows = self._padding, tuple(x.shape[:-1])
        if padding.mixed and self._parts.is_beside_text(name):
            return None
        if self._encoder_decoder:
            self._refuse(name, "cannot tell padding from tokens with an encoder–decoder model: give batches without padding")
        elif padding.obstacle is not None:
            self._refuse(name, f"cannot tell padding from tokens with {padding.obstacle}: give attention_mask as (batch, tokens)")
        if padding.shape is None or self._encoder_decoder:
            return None
        kind = self._kind(name, x, *padding.shape)
        # In a text's part of the model, what attends to another modality; elsewhere, what projects it.
        elsewhere = padding.mixed and not self._parts.is_routed(name) and (len(rows) > 1 or not self._parts.is_text(name))
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
        if len(rows) == 1 and self._parts.is_routed(name):
            return None
        if kept == [tokens, batch] and batch > 1 and tokens > 1 and (batch != tokens or self._tokens_first):
            self._tokens_first = True
            if name in self._square and batch != tokens:
                raise ValueError(
                    f"{name}, batch {self._batch}: its input has the tokens first, which an earlier batch of as many sequences as "
                    "tokens did not show: give batches of another size, or without padding"
                )
            return "tokens first"
        if math.prod(rows) == batch and len(kept) <= 1 and tokens > 1:
            d = x.shape[-1]
            sliced = x.stride(0) == tokens * d and x.stride(-1) == 1  # hidden_states[:, 0]
            return "sequences" if sliced or self._parts.is_outside_blocks(name) else None
        return None if _axes(rows, batch, tokens) is None else "tokens"

    def _refuse(self, name: str, why: str) -> None:
        number = self._batch if self._padding.hides else self._padded()
        if number is not None:
            raise ValueError(f"{name}, batch {number}: {why}")


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


class _Parts:
    """Where in a model a layer is, by its name: in a tower beside the text's, in a list of experts, outside of all blocks."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = [tuple(name.split(".")) for name in marked_blocks(model)]
        embedding = _embedding_name(model)
        shared = {block: _common(block, embedding) for block in self._blocks}
        depth = max(shared.values(), default=0)
        self._text = embedding[:depth]
        self._beside = {block[: common + 1] for block, common in shared.items() if common < depth}
        self._lists = {
            tuple(name.split("."))
            for name, module in named_modules(model).items()
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1
        }

    def is_text(self, name: str) -> bool:
        """Whether a layer is in the part of the model that the token embeddings and their blocks share."""
        return tuple(name.split("."))[: len(self._text)] == self._text

    def is_beside_text(self, name: str) -> bool:
        """Whether a layer is in another tower than the text's: one with blocks of its own."""
        path = tuple(name.split("."))
        return any(path[: len(root)] == root for root in self._beside)

    def is_outside_blocks(self, name: str) -> bool:
        """Whether a model has blocks, and a layer is in none of them."""
        path = tuple(name.split("."))
        return bool(self._blocks) and not any(path[: len(block)] == block for block in self._blocks)

    def is_routed(self, name: str) -> bool:
        """Whether a layer may be one of several of which each gets some of the rows: it is in a list of modules below its block."""
        path = tuple(name.split("."))
        block = next((block for block in self._blocks if path[: len(block)] == block), ())
        return any(path[:end] in self._lists for end in range(len(block) + 1, len(path)))


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _embedding_name(model: nn.Module) -> tuple[str, ...]:
    """The path of the token embeddings: those that the model names, else its largest ones; () if it has none."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        named = get() if callable(get) else None
    except NotImplementedError:
        named = None
    found = {name: m for name, m in named_modules(model).items() if m is named or isinstance(m, nn.Embedding)}
    name = max(found, key=lambda n: (found[n] is named, getattr(found[n], "num_embeddings", 0)), default="")
    return tuple(name.split(".")) if name else ()
