"""`stream_covariances`: runs the model, yields `(site, covariance)`, and frees it.

The generator is the hinge of the engine: whoever needs second moments is a loop over it and decides what to keep. How the model
was run, and how much was in memory at once, is the generator's business (its *strategy*).

Sites are found while the model runs. A layer that is handed the very tensor object that another layer was handed in the same
batch joins that layer's site; from then on it must be so in every batch, or the sum would not be the layer's own.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import nn

from nullspace.covariance import PRECISIONS, Covariance, find_nonfinite
from nullspace.progress import Progress, reporter
from nullspace.sites import Site, find_targets, output_head, weight_shape
from nullspace.sums import TokenMask

STRATEGIES = ("auto", "resident")


def stream_covariances(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    targets: str | Iterable[str] = "all-linear",
    strategy: str = "auto",
    precision: str | Mapping[str, str] = "auto",
    progress: bool | Progress = True,
) -> Iterator[tuple[Site, Covariance]]:
    """Run the model over the loader and yield the second moment of every site's input, one at a time.

    Args:
        model: any module; it is run in eval mode, without gradients, and left as it was found.
        loader: an iterable of mappings that the model takes as keyword arguments (`input_ids`, `attention_mask`, …), or of tensors
            or tuples of tensors that it takes as positional ones. Where `attention_mask` (batch, tokens) is zero, a token is
            padding and is not counted.
        targets: which linear layers: see `nullspace.sites.find_targets`.
        strategy: `"resident"`: one ordinary forward pass a batch, all sums in memory at once (4 · d_in² bytes a site; on a
            GPU up to as much again for tokens on their way).
            `"auto"` is the same for now.
        precision: `"auto"`, `"fp64"` or `"qr"`: see `Covariance`. Or a mapping from regular expressions to these: the first one
            that matches a layer's whole name counts, `"auto"` where none does. A shared input is summed as its first layer says.
        progress: True for a bar, False for none, or a callable (`nullspace.progress.Progress`).

    Yields:
        `(Site, Covariance)`, in the order in which the sites were first called. Nothing else holds the covariance any more.

    Raises:
        ValueError: before the forward pass for a bad argument; during it, naming the layer and the batch, for NaN or Inf, an input
            that is shared in one batch and not in the next, or padding that cannot be located in a layer's input; after it
            for a target that was never called, and for a loader that is empty, ends early or holds padding only.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, not {strategy!r}")
    for value in precision.values() if isinstance(precision, Mapping) else [precision]:
        if value not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, not {value!r}")
    return _resident(model, loader, find_targets(model, targets), precision, reporter(progress))


def precision_of(name: str, precision: str | Mapping[str, str]) -> str:
    """What a precision says of one layer."""
    if isinstance(precision, str):
        return precision
    return next((value for pattern, value in precision.items() if re.fullmatch(pattern, name)), "auto")


def _resident(
    model: nn.Module,
    loader: Iterable[Any],
    targets: dict[str, nn.Module],
    precision: str | Mapping[str, str],
    report: Progress,
) -> Iterator[tuple[Site, Covariance]]:
    sums = _Sums(targets, precision)
    total = _length(loader)
    tokens = batches = 0
    options = _forward_options(model, targets)
    report("forward", 0, total, 0)
    # Inference mode, if the caller is in it, would hide writes to an input and tie the sums to that mode.
    with _listening(targets, sums), _evaluating(model), torch.inference_mode(False), torch.no_grad():
        for batches, batch in enumerate(loader, start=1):
            args, kwargs = _arguments(batch, batches, _input_device(model), model)
            encoder_decoder = _is_encoder_decoder(model)
            mask = _decoder_padding(kwargs) if encoder_decoder else None
            sums.begin_batch(batches, kwargs.get("attention_mask") if mask is None else mask, encoder_decoder=encoder_decoder)
            model(*args, **{**options, **kwargs})
            sums.end_batch()
            tokens += _count_tokens(args, kwargs)
            report("forward", batches, total, tokens)
    if batches == 0:
        raise ValueError("the loader is empty: there is nothing to calibrate on")
    if total is not None and batches < total:
        raise ValueError(f"the loader ended early: it announced {total} batches and gave {batches}")
    yield from sums.release()


class _Sum:
    """One site while the model runs."""

    def __init__(self, name: str, covariance: Covariance) -> None:
        self.members = [name]
        self.covariance = covariance
        self.joinable = True  # until its first input has passed
        self._input: weakref.ref[torch.Tensor] | None = None
        self._version: int | None = None
        self._heard: set[str] = set()

    def hears(self, x: torch.Tensor) -> bool:
        """Whether x is the input at hand: the same object, and not written to since."""
        return self._input is not None and self._input() is x and self._version == _version(x)

    def begin_input(self, name: str, x: torch.Tensor, mask: TokenMask | None) -> None:
        self.covariance.update(x, mask)
        # A weak reference holds no memory, and answers None (not another tensor at the same address) when x is gone.
        self._input, self._version, self._heard = weakref.ref(x), _version(x), {name}

    def hear(self, name: str) -> None:
        self._heard.add(name)

    def has_heard(self, name: str) -> bool:
        return name in self._heard

    def end_input(self) -> str | None:
        """Forget the input at hand; the name of a member that was not handed it, if there is one."""
        missing = next((m for m in self.members if m not in self._heard), None) if self._heard else None
        self._input, self._heard, self.joinable = None, set(), False
        return missing


class _Sums:
    """All sites while the model runs: which layer hears which input, checked at every call."""

    def __init__(self, targets: dict[str, nn.Module], precision: str | Mapping[str, str]) -> None:
        self._targets = targets
        self._precision = precision
        self._sums: list[_Sum] = []
        self._of: dict[str, _Sum] = {}
        self._batch = 0
        self._mask: torch.Tensor | None = None
        # What the mask says of one vector a token, and of one vector a sequence: looked at once a batch, not once a layer.
        self._tokens: TokenMask | None = None
        self._sequences: TokenMask | None = None
        self._encoder_decoder = False

    def begin_batch(self, batch: int, mask: torch.Tensor | None, *, encoder_decoder: bool) -> None:
        self._batch = batch
        self._encoder_decoder = encoder_decoder
        self._mask = mask if isinstance(mask, torch.Tensor) and not bool((mask != 0).all()) else None
        self._tokens = self._sequences = None
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise ValueError(f"batch {batch}: attention_mask is {type(mask).__name__}, not a tensor (batch, tokens)")

    def hear(self, name: str, x: torch.Tensor) -> None:
        """A target is about to be called with x."""
        member_of = self._of.get(name)
        if member_of is None:
            joined = next((s for s in self._sums if s.joinable and s.hears(x)), None)
            if joined is None:
                joined = _Sum(name, self._new_covariance(name, x))
                self._begin_input(joined, name, x)
                self._sums.append(joined)
            else:
                joined.members.append(name)
                joined.hear(name)
            self._of[name] = joined
        elif member_of.hears(x) and not member_of.has_heard(name):
            member_of.hear(name)
        else:  # the next input of a layer that is called several times a batch, or the first one of this batch
            self._end_input(member_of)
            self._begin_input(member_of, name, x)

    def end_batch(self) -> None:
        for each in self._sums:
            self._end_input(each)
        found = find_nonfinite([each.covariance for each in self._sums])
        if found is not None:
            name = next(each.members[0] for each in self._sums if each.covariance is found[0])
            raise ValueError(f"{name}, batch {self._batch}: {found[1]}")

    def release(self) -> Iterator[tuple[Site, Covariance]]:
        silent = [name for name in self._targets if name not in self._of]
        if silent:
            more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
            raise ValueError(
                f"target {silent[0]!r}{more} was never called: these data do not reach it. Leave it out of targets, or add data "
                "that do."
            )
        deaf = next((s for s in self._sums if s.covariance.tokens == 0), None)
        if deaf is not None:
            raise ValueError(f"no tokens at {deaf.members[0]!r}: everything is masked as padding")
        self._of.clear()
        while self._sums:
            each = self._sums.pop(0)
            site, covariance = Site(tuple(each.members), each.covariance.d_in), each.covariance
            del each
            yield site, covariance
            del covariance

    def _new_covariance(self, name: str, x: torch.Tensor) -> Covariance:
        device = x.device if x.device.type in ("cpu", "cuda") else "cpu"  # elsewhere there is no float64
        return Covariance(weight_shape(self._targets[name])[1], device=device, precision=precision_of(name, self._precision))

    def _begin_input(self, each: _Sum, name: str, x: torch.Tensor) -> None:
        try:
            each.begin_input(name, x, self._rows_that_count(x))
        except ValueError as error:
            raise ValueError(f"{name}, batch {self._batch}: {error}") from error

    def _end_input(self, each: _Sum) -> None:
        missing = each.end_input()
        if missing is not None:
            other = next(m for m in each.members if m != missing)
            raise ValueError(
                f"{missing!r} shared its input with {other!r} in the batch in which they were first called, but not in batch "
                f"{self._batch}: one sum cannot serve both. Calibrate them in separate runs (targets=[{missing!r}], …)."
            )

    def _rows_that_count(self, x: torch.Tensor) -> TokenMask | None:
        mask = self._mask
        if mask is None:
            return None
        if self._encoder_decoder or mask.ndim != 2:
            what = "an encoder–decoder model" if self._encoder_decoder else f"an attention_mask of shape {tuple(mask.shape)}"
            raise ValueError(f"cannot tell padding from tokens with {what}: give batches without padding")
        tokens = x.shape[:-1]
        if tokens == mask.shape or tokens == (mask.numel(),) or tokens == (1, mask.numel()):
            self._tokens = self._tokens or TokenMask(mask)
            return self._tokens
        if tokens == mask.shape[:1]:  # one vector a sequence, such as a pooler's input
            self._sequences = self._sequences or TokenMask(mask.any(dim=1))
            return self._sequences
        raise ValueError(
            f"its input {tuple(x.shape)} cannot be lined up with the attention_mask {tuple(mask.shape)}, which has padding: "
            "give batches without padding (packed, or one sample each)"
        )


def _version(x: torch.Tensor) -> int | None:
    return None if x.is_inference() else x._version


@contextlib.contextmanager
def _listening(targets: dict[str, nn.Module], sums: _Sums) -> Iterator[None]:
    def listener(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sums.hear(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [m.register_forward_pre_hook(listener(name), with_kwargs=True) for name, m in targets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _forward_options(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, Any]:
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
        if hasattr(model, "config") and not _is_encoder_decoder(model):
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


def _length(loader: Iterable[Any]) -> int | None:
    with contextlib.suppress(TypeError):  # a DataLoader has `__len__`, but its dataset may have none
        return len(loader) if isinstance(loader, Sized) else None
    return None


def _decoder_padding(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The mask of the decoder's tokens, if some of them are padding: its inputs may come from the labels."""
    mask, labels = kwargs.get("decoder_attention_mask"), kwargs.get("labels")
    masks = (mask, labels != -100 if isinstance(labels, torch.Tensor) else None)
    return next((m for m in masks if isinstance(m, torch.Tensor) and not bool(m.all())), None)


def _input_device(model: nn.Module) -> torch.device | None:
    get = getattr(model, "get_input_embeddings", None)
    with contextlib.suppress(NotImplementedError):
        embeddings = get() if callable(get) else None
        weight = getattr(embeddings, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.device.type != "meta":
            return weight.device
    return next((p.device for p in model.parameters() if p.device.type != "meta"), None)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _count_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return int((mask != 0).sum())
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, torch.Tensor):
        return 0
    return ids.shape[:-1].numel() if ids.is_floating_point() else ids.numel()
