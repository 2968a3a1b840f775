"""What a loader yields, and what a model is handed of it: arguments, padding, tokens."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from nullspace.parts import device_of
from nullspace.sites import output_head

if TYPE_CHECKING:
    from nullspace.shares import Share


class Call(NamedTuple):
    """One forward pass.

    Attributes:
        number: of the batch, from 1.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model, without labels (a loss is not wanted).
        mask: which entries of (batch, tokens) count, or None if all do.
        tokens: how many count.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Any
    tokens: int


def calls(model: nn.Module, share: Share, device: torch.device | None = None) -> Iterator[Call]:
    """What to call the model with, batch by batch.

    Args:
        model: to see which arguments it takes.
        share: of a loader of mappings, tensors or tuples of tensors.
        device: where the arguments go; by default where the model's embeddings are.

    Raises:
        TypeError: for a batch that is none of these.
        ValueError: at the end, if there were fewer batches than the loader announced.
    """
    for number, batch in share:
        args, kwargs = _arguments(batch, number, device or input_device(model), model)
        mask = _decoder_padding(kwargs) if is_encoder_decoder(model) else None
        yield Call(number, args, kwargs, kwargs.get("attention_mask") if mask is None else mask, _count_tokens(args, kwargs))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode that it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def forward_options(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, Any]:
    """What spares work that no site hears: the key-value cache, and the logits of all tokens but the last."""
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "use_cache" in takes:
        options["use_cache"] = False
    head = output_head(model)
    if "logits_to_keep" in takes and head is not None and all(m is not head for m in targets.values()):
        options["logits_to_keep"] = 1
    return options


def _arguments(batch: Any, number: int, device: torch.device | None, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) and device is not None else value

    if isinstance(batch, Mapping):
        kwargs = {str(key): move(value) for key, value in batch.items()}
        if hasattr(model, "config") and not is_encoder_decoder(model):
            kwargs.pop("labels", None)  # no loss is wanted; encoder–decoder models make their decoder's inputs of them
        return (), kwargs
    if isinstance(batch, torch.Tensor):
        return (move(batch),), {}
    if isinstance(batch, (tuple, list)) and batch and all(isinstance(value, torch.Tensor) for value in batch):
        names = list(inspect.signature(model.forward).parameters)[: len(batch)]
        if "attention_mask" in names:  # by its name, or its padding would be counted
            return _arguments(dict(zip(names, batch, strict=True)), number, device, model)
        return tuple(move(value) for value in batch), {}
    raise TypeError(f"batch {number} is {type(batch).__name__}; expected a mapping, a tensor or a tuple of tensors")


def length(loader: Iterable[Any]) -> int | None:
    """How many batches a loader announces, if it does."""
    with contextlib.suppress(TypeError):  # a DataLoader has `__len__`, but its dataset may have none
        return len(loader) if isinstance(loader, Sized) else None
    return None


def example_of(loader: Iterable[Any]) -> Any:
    """A loader's first batch where a look at it costs nothing; else None."""
    return loader[0] if isinstance(loader, Sequence) and len(loader) else None


def _decoder_padding(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The mask of the decoder's tokens, if some of them are padding: its inputs may come from the labels."""
    mask, labels = kwargs.get("decoder_attention_mask"), kwargs.get("labels")
    masks = (mask, labels != -100 if isinstance(labels, torch.Tensor) else None)
    return next((m for m in masks if isinstance(m, torch.Tensor) and not bool(m.all())), None)


def input_device(model: nn.Module) -> torch.device | None:
    """Where a model's embeddings are."""
    get = getattr(model, "get_input_embeddings", None)
    with contextlib.suppress(NotImplementedError):
        embeddings = get() if callable(get) else None
        weight = getattr(embeddings, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.device.type != "meta":
            return device_of(weight)
    return next((device_of(p) for p in model.parameters() if p.device.type != "meta"), None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has two inputs, of which one is generated."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _count_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return int((mask != 0).sum())
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, torch.Tensor):
        return 0
    return ids.shape[:-1].numel() if ids.is_floating_point() else ids.numel()
