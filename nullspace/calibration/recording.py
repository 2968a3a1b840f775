"""`recording`: while a model runs, the inputs of some of its layers are handed to a receiver."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from nullspace.errors import InputError
from nullspace.model.experts import ExpertMatrix, fused_of
from nullspace.model.linear import weight_of
from nullspace.model.routing import Routed, routing
from nullspace.model.sharded import layer_input
from nullspace.model.sharded_tensors import is_sharded


class Receiver(Protocol):
    """What `recording` hands the inputs of targets to, as `InputSums` takes them."""

    @property
    def paused(self) -> bool: ...

    def receive(self, name: str, x: torch.Tensor) -> None: ...

    def receive_routed(self, routed: Routed) -> None: ...

    def check_output(self, name: str, x: Any, output: Any) -> None: ...

    def reading_masks(self) -> contextlib.AbstractContextManager[None]: ...


class _Hooks:
    """The hooks of one target."""

    def __init__(self, name: str, sums: Receiver, later: list[Exception] | None) -> None:
        self._name, self._sums, self._later = name, sums, later
        self._handed: Any = None
        self._is_checked = False

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the call: sum the input."""
        if not self._later:
            with _keeping(self._later):
                self._sums.receive(self._name, _first(args, kwargs))

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the hooks that gather a sharded weight: keep the input."""
        self._handed = _first(args, kwargs)

    def read_through(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After those hooks: sum the input that was kept, or its conversion by them."""
        handed, self._handed = self._handed, None
        if not self._later:
            with _keeping(self._later):
                self._sums.receive(self._name, layer_input(self._name, handed, _first(args, kwargs)))

    def check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the first call in a batch that counts: check the output."""
        if not (self._is_checked or self._sums.paused or self._later):
            self._is_checked = True
            with _keeping(self._later):
                self._sums.check_output(self._name, _first(args, kwargs), output)


@contextlib.contextmanager
def recording(
    model: nn.Module, targets: Mapping[str, nn.Module], sums: Receiver, *, later: list[Exception] | None = None
) -> Iterator[None]:
    """Context manager: adds the inputs of targets to `sums`, by hooks.

    Args:
        model: contains the targets.
        targets: module name → linear layer.
        sums: gets the inputs.
        later: collects the first exception of `sums`, after which inputs are ignored; for a forward pass that must not stop half
            way because it gathers weights by collectives (`nullspace.model.sharded`).

    Raises:
        ValueError: at the end, naming the layer, if the model has removed the hook or replaced the layer.
    """

    outputs: list[Any] = []
    handles: list[tuple[str, nn.Module, Any]] = []
    for name, module in list(targets.items()):
        if isinstance(module, ExpertMatrix):
            continue  # below
        hooks = _Hooks(name, sums, later)
        sharded = is_sharded(weight_of(module))
        if sharded:
            handles.append((name, module, module.register_forward_pre_hook(hooks.keep, with_kwargs=True, prepend=True)))
        read = hooks.read_through if sharded else hooks.read
        handles.append((name, module, module.register_forward_pre_hook(read, with_kwargs=True)))
        outputs.append(module.register_forward_hook(hooks.check, with_kwargs=True, prepend=True))
    experts = fused_of(targets.values())
    try:
        with sums.reading_masks(), routing(experts, functools.partial(_hand_over, sums, later)):
            yield
        _check_standing(model, handles)
    finally:
        for handle in (*outputs, *(handle for _, _, handle in handles)):
            handle.remove()


def _check_standing(model: nn.Module, handles: list[tuple[str, nn.Module, Any]]) -> None:
    there = {id(module) for module in model.modules()}
    for name, module, handle in handles:
        if handle.id not in module._forward_pre_hooks or id(module) not in there:
            what = "was replaced" if id(module) not in there else "lost the hook that reads its inputs"
            raise InputError(
                f"{name!r} {what} while the model ran: not all of its inputs were summed. Something in the model's forward pass "
                "does that: switch it off, or leave the layer out of targets."
            )


def _hand_over(sums: Receiver, later: list[Exception] | None, routed: Routed) -> None:
    if not later:
        with _keeping(later):
            sums.receive_routed(routed)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


@contextlib.contextmanager
def _keeping(later: list[Exception] | None) -> Iterator[None]:
    """Context manager: appends an exception to `later` instead of raising it, if `later` is a list."""
    try:
        yield
    except Exception as error:
        if later is None:
            raise
        later.append(error)
