"""Which layer hears which input: `Listener` sums the inputs of its targets while the model runs.

A layer that is handed the very tensor object that another layer was handed in the same batch joins that layer's site; from then on
it must be so in every batch, or the sum would not be the layer's own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nullspace.model.linear import is_conv1d, weight_of, weight_shape
from nullspace.model.padding import Padding, TokenRows
from nullspace.model.sharded import input_of
from nullspace.model.sharded_tensors import is_sharded, version_of
from nullspace.model.sites import Site, Targets
from nullspace.moments.covariance import Covariance, find_nonfinite, precision_of
from nullspace.moments.sums import TokenMask


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
        return self._input is not None and self._input() is x and self._version == version_of(x)

    def begin_input(self, name: str, x: torch.Tensor, summed: torch.Tensor, mask: TokenMask | None) -> None:
        self.covariance.update(summed, mask)
        # A weak reference holds no memory, and answers None (not another tensor at the same address) when x is gone.
        self._input, self._version, self._heard = weakref.ref(x), version_of(x), {name}

    def hear(self, name: str) -> None:
        self._heard.add(name)

    def has_heard(self, name: str) -> bool:
        return name in self._heard

    def forget(self, name: str) -> None:
        self.members.remove(name)
        self._heard.discard(name)

    def end_input(self) -> str | None:
        """Forget the input at hand; the name of a member that was not handed it, if there is one."""
        missing = next((m for m in self.members if m not in self._heard), None) if self._heard else None
        self._input, self._heard, self.joinable = None, set(), False
        return missing


class Listener:
    """All sites of some targets while the model runs: which layer hears which input, checked at every call.

    Args:
        targets: module name → linear layer.
        precision: as in `stream_covariances`.
        rows: which rows of an input count; by default all.
        weigh: (name of the first member, input) → what is summed in the input's place.

    Attributes:
        deaf: True while what the targets are called with does not count: between two batches.
        left_out: targets whose output is not W x + b → what is wrong with it. They are not listened to any more.
    """

    MASKED = "everything is masked as padding"

    def __init__(
        self,
        targets: Mapping[str, nn.Module],
        precision: str | Mapping[str, str],
        rows: TokenRows | None = None,
        *,
        weigh: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.deaf = True
        self._rows = rows
        self.left_out: dict[str, str] = {}
        self._targets = targets
        self._precision = precision
        self._weigh = weigh
        self._sums: list[_Sum] = []
        self._of: dict[str, _Sum] = {}
        self._batch = 0

    @property
    def silent(self) -> dict[str, nn.Module]:
        """The targets that have not been called so far."""
        return {name: m for name, m in self._targets.items() if name not in self._of and name not in self.left_out}

    def begin_batch(self, batch: int, padding: Padding) -> None:
        """From here on, inputs are those of another batch, with this padding."""
        self._batch, self.deaf = batch, False
        if self._rows is not None:
            self._rows.begin(batch, padding)

    def hear(self, name: str, x: torch.Tensor) -> None:
        """A target is about to be called with x."""
        if self.deaf or name in self.left_out:
            return
        member_of = self._of.get(name)
        if member_of is None:
            joined = next((s for s in self._sums if s.joinable and s.hears(x)), None)
            if joined is None:
                joined = _Sum(name, self._new_covariance(name, x.device))
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

    def look_at_output(self, name: str, x: Any, output: Any) -> None:
        """A target has returned an output: it is left out if that is not W x + b."""
        why = unlike_linear(self._targets[name], x, output)
        if why is not None:
            self.leave_out(name, why)

    def leave_out(self, name: str, why: str) -> None:
        """Forget a target: `ValueError` if the user has asked for it."""
        if name in self.left_out or name not in self._targets:
            return
        if not isinstance(self._targets, Targets):
            raise ValueError(f"target {name!r} {why}. Leave it out of targets")
        self._targets.leave_out(name, why)
        self.left_out[name] = why
        each = self._of.pop(name, None)
        if each is not None:
            each.forget(name)
            self._sums = [one for one in self._sums if one.members]

    def end_batch(self) -> None:
        """Whether every member was handed its site's input, and no input held NaN or Inf: `ValueError` otherwise."""
        self.deaf = True
        for each in self._sums:
            self._end_input(each)
        found = find_nonfinite([each.covariance for each in self._sums])
        if found is not None:
            name = next(each.members[0] for each in self._sums if each.covariance is found[0])
            raise ValueError(f"{name}, batch {self._batch}: {found[1]}")

    def peek(self) -> list[tuple[Site, Covariance]]:
        """The sites and their sums so far, between two batches; both go on growing."""
        return [(Site(tuple(each.members), each.covariance.d_in), each.covariance) for each in self._sums]

    def release(self) -> Iterator[tuple[Site, Covariance]]:
        """The sites and their sums, in the order in which they were first called, each given out of hand."""
        deaf = next((s for s in self._sums if s.covariance.tokens == 0), None)
        if deaf is not None:
            raise ValueError(f"no tokens at {deaf.members[0]!r}: {self.MASKED}")
        self._of.clear()
        while self._sums:
            each = self._sums.pop(0)
            site, covariance = Site(tuple(each.members), each.covariance.d_in), each.covariance
            del each
            yield site, covariance
            del covariance

    def flush(self) -> None:
        """Bring all sums up to date: `ValueError`, naming the layer, for NaN or Inf that no end of a batch has found."""
        for each in self._sums:
            try:
                each.covariance.flush()
            except ValueError as error:
                raise ValueError(f"{each.members[0]}: {error}") from error

    def take(self, site: Site, device: torch.device) -> Covariance:
        """The sums of one site, given out of hand; empty ones, on the device, if none of its inputs came by."""
        index = next((i for i, each in enumerate(self._sums) if each.members[0] == site.name), None)
        if index is None:
            return self._new_covariance(site.name, device)
        for name in site.members:
            del self._of[name]
        return self._sums.pop(index).covariance

    def _new_covariance(self, name: str, device: torch.device) -> Covariance:
        device = device if device.type in ("cpu", "cuda") else torch.device("cpu")  # elsewhere there is no float64
        return Covariance(weight_shape(self._targets[name])[1], device=device, precision=precision_of(name, self._precision))

    def _begin_input(self, each: _Sum, name: str, x: torch.Tensor) -> None:
        mask = None if self._rows is None else self._rows.of(name, x)
        try:
            summed = x if self._weigh is None else self._weigh(each.members[0], x)
            each.begin_input(name, x, summed, mask)
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


def leave_out_silent(silent: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> None:
    """Leave targets that were never called out of `targets`, or raise `ValueError`, naming the first, if they were asked for."""
    if not silent:
        return
    if isinstance(targets, Targets) and targets.optional:
        for name in silent:
            targets.leave_out(name, "was never called: these data do not reach it")
        return
    more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
    raise ValueError(
        f"target {next(iter(silent))!r}{more} was never called: these data do not reach it. Leave it out of targets, or add "
        "data that do."
    )


@torch.no_grad()
def unlike_linear(layer: nn.Module, x: Any, output: Any) -> str | None:
    """What is wrong with the output of a layer, if it is not W x + b; None if nothing is.

    The shape is looked at, and where the weight's values are at hand a few entries: of some rows, in some columns, computed in
    float64. They may differ by the rounding of the inputs' and the output's dtype.
    """
    kind, (d_out, d_in) = type(layer).__name__, weight_shape(layer)
    advice = "an adapter adds B A x to the output of W x + b"
    if not isinstance(output, torch.Tensor):
        return f"({kind}) returns {type(output).__name__}, not a tensor: {advice}"
    stored = weight_of(layer)
    if not isinstance(x, torch.Tensor) or is_sharded(stored):
        return None
    if output.shape != (*x.shape[:-1], d_out):
        return f"({kind}, {d_out} × {d_in}) turns {tuple(x.shape)} into {tuple(output.shape)}: {advice}"
    if type(stored) is not nn.Parameter or stored.dtype not in _EXACT or stored.device.type == "meta" or output.numel() == 0:
        return None
    weight = stored.T if is_conv1d(layer) else stored
    if weight.shape != (d_out, d_in) or not output.is_floating_point() or not x.is_floating_point():
        return None
    rows = _some(x.numel() // d_in, x.device)
    columns = _some(d_out, weight.device)
    x_nd, w_od = x.reshape(-1, d_in)[rows].double(), weight[columns].double()
    seen_no = output.reshape(-1, d_out)[rows][:, columns.to(output.device)].double()
    bias = getattr(layer, "bias", None)
    wanted_no = x_nd @ w_od.T.to(x_nd.device)
    spread = (x_nd.square() @ w_od.T.to(x_nd.device).square()).sum()
    if isinstance(bias, torch.Tensor):
        wanted_no = wanted_no + bias[columns].double().to(x_nd.device)
    eps = max(torch.finfo(t.dtype).eps for t in (x, stored, output))
    if x.is_cuda:
        eps = max(eps, torch.finfo(torch.float16).eps)  # TF32 has as many digits
    allowed = (4 * eps + SUMMATION) * (wanted_no.square().sum() + spread).sqrt()
    if bool((seen_no.to(wanted_no.device) - wanted_no).norm() > allowed):  # not if anything is NaN, which is refused elsewhere
        return f"({kind}) does not return W x + b: {advice}"
    return None


# What the summation over d_in may lose in any dtype, relative to the norm of the products.
SUMMATION = 1e-4
_EXACT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _some(count: int, device: torch.device) -> torch.Tensor:
    """Up to eight indices below `count`, spread evenly."""
    return torch.linspace(0, count - 1, min(count, 8), device=device).long()


@contextlib.contextmanager
def listening(
    model: nn.Module, targets: Mapping[str, nn.Module], sums: Listener, *, later: list[Exception] | None = None
) -> Iterator[None]:
    """Inside, the listener hears whatever the targets are called with.

    Args:
        model: that the targets are parts of.
        targets: module name → linear layer.
        sums: the listener.
        later: takes the first exception that the listener raises, from which on it hears nothing: for a forward pass that must not
            end in the midst (`nullspace.sharded`).

    Raises:
        ValueError: at the end, naming the layer, if the model has removed its hook or put something else in its place.
    """

    def listener(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not later:
                with _keeping(later):
                    sums.hear(name, _first(args, kwargs))

        return hook

    def listeners(name: str) -> tuple[Any, Any]:
        handed: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            handed[:] = [_first(args, kwargs)]

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not later:
                with _keeping(later):
                    sums.hear(name, input_of(name, handed.pop(), _first(args, kwargs)))

        return before, after

    def once(name: str) -> Any:
        seen = False

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal seen
            if not (seen or sums.deaf or later):
                seen = True
                with _keeping(later):
                    sums.look_at_output(name, _first(args, kwargs), output)

        return hook

    outputs: list[Any] = []
    handles: list[tuple[str, nn.Module, Any]] = []
    for name, module in list(targets.items()):
        if is_sharded(weight_of(module)):  # whose input may come through hooks of others
            before, hook = listeners(name)
            handles.append((name, module, module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)))
        else:
            hook = listener(name)
        handles.append((name, module, module.register_forward_pre_hook(hook, with_kwargs=True)))
        outputs.append(module.register_forward_hook(once(name), with_kwargs=True, prepend=True))
    try:
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
            raise ValueError(
                f"{name!r} {what} while the model ran: not all of its inputs were summed. Something in the model's forward pass "
                "does that: switch it off, or leave the layer out of targets."
            )


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


@contextlib.contextmanager
def _keeping(later: list[Exception] | None) -> Iterator[None]:
    """Inside, an exception is kept for later, if there is a list for it."""
    try:
        yield
    except Exception as error:
        if later is None:
            raise
        later.append(error)
