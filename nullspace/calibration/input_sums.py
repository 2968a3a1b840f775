"""`InputSums`: the second moments of the inputs of linear layers while the model runs, and which layers share an input.

A layer that gets the same tensor object as another layer in one batch joins that layer's site. It must then get that layer's input
in every batch, since one sum serves both.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from nullspace.calibration.expert_sums import ExpertSums
from nullspace.errors import InputError
from nullspace.model.experts import expert_of
from nullspace.model.linear import unlike_linear, weight_shape
from nullspace.model.padding import Padding
from nullspace.model.routing import Routed
from nullspace.model.sharded_tensors import version_of
from nullspace.model.sites import Site, Targets
from nullspace.moments.covariance import Covariance
from nullspace.moments.finite import FiniteCheck
from nullspace.moments.pool import Pool
from nullspace.moments.precision import precision_of
from nullspace.moments.sums import TokenMask
from nullspace.moments.triangle import memory_size


class Rows(Protocol):
    """Which rows of an input count, as `TokenRows` says it."""

    def begin(self, batch: int, padding: Padding) -> None: ...

    def of(self, name: str, x: torch.Tensor) -> TokenMask | None: ...

    def reading_masks(self) -> contextlib.AbstractContextManager[None]: ...


class _SiteSum:
    """One site while the model runs."""

    def __init__(self, members: Iterable[str], covariance: Covariance, *, joinable: bool = True) -> None:
        self.members = list(members)
        self.covariance = covariance
        self.joinable = joinable  # during its first input only
        self._input: weakref.ref[torch.Tensor] | None = None
        self._version: int | None = None
        self._received: set[str] = set()

    def is_current(self, x: torch.Tensor) -> bool:
        """Whether x is the site's current input: the same object, not written to since."""
        return self._input is not None and self._input() is x and self._version == version_of(x)

    def begin_input(self, name: str, x: torch.Tensor, summed: torch.Tensor, mask: TokenMask | None) -> None:
        self.covariance.update(summed, mask)
        # A weak reference holds no memory. After x is freed it gives None, where an id could be reused by another tensor.
        self._input, self._version, self._received = weakref.ref(x), version_of(x), {name}

    def note(self, name: str) -> None:
        self._received.add(name)

    def has_received(self, name: str) -> bool:
        return name in self._received

    def remove(self, name: str) -> None:
        self.members.remove(name)
        self._received.discard(name)

    def end_input(self) -> str | None:
        """End the current input; returns a member that did not get it, if there is one."""
        missing = next((m for m in self.members if m not in self._received), None) if self._received else None
        self._input, self._received, self.joinable = None, set(), False
        return missing


class InputSums:
    """The sums of all sites of some targets while the model runs. Which layers share an input is checked at every call.

    Args:
        targets: module name → linear layer.
        precision: as in `stream_covariances`.
        rows: which rows of an input count; by default all.
        pooled: one sum for what all experts of a layer receive (`ExpertSums`).
        weigh: (name of the first member, input) → the tensor that is summed in its place; not of what experts receive.

    Attributes:
        paused: True between two batches; inputs are then ignored.
        left_out: target whose output is not W x + b → the reason. Its inputs are no longer summed.
    """

    MASKED = "everything is masked as padding"

    def __init__(
        self,
        targets: Mapping[str, nn.Module],
        precision: str | Mapping[str, str],
        rows: Rows | None = None,
        *,
        pooled: bool = False,
        weigh: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.paused = True
        self._rows = rows
        self.left_out: dict[str, str] = {}
        self._targets = targets
        self._precision = precision
        self._pooled, self._weigh = pooled, weigh
        self._experts: dict[str, ExpertSums] = {}
        self._sums: list[_SiteSum] = []
        self._of: dict[str, _SiteSum] = {}
        self._batch = 0
        self._check: tuple[int, FiniteCheck] | None = None  # the last batch, and what was begun at its end

    @property
    def uncalled(self) -> dict[str, nn.Module]:
        """The targets that have not been called."""
        return {name: m for name, m in self._targets.items() if name not in self._of and name not in self.left_out}

    def reading_masks(self) -> contextlib.AbstractContextManager[None]:
        """Context manager: the masks that the model hands to its parts are read while it runs."""
        return contextlib.nullcontext() if self._rows is None else self._rows.reading_masks()

    def begin_batch(self, batch: int, padding: Padding) -> None:
        """Begin a batch with this padding."""
        self._batch, self.paused = batch, False
        if self._rows is not None:
            self._rows.begin(batch, padding)

    def receive(self, name: str, x: torch.Tensor) -> None:
        """Add the input of a target that is about to be called."""
        if self.paused or name in self.left_out:
            return
        member_of = self._of.get(name)
        if member_of is None:
            joined = next((s for s in self._sums if s.joinable and s.is_current(x)), None)
            if joined is None:
                joined = _SiteSum([name], self._new_covariance(name, x.device))
                self._begin_input(joined, name, x)
                self._sums.append(joined)
            else:
                joined.members.append(name)
                joined.note(name)
            self._of[name] = joined
        elif member_of.is_current(x) and not member_of.has_received(name):
            member_of.note(name)
        else:  # another call of the layer in this batch, or its first one
            self._end_input(member_of)
            self._begin_input(member_of, name, x)

    def receive_routed(self, routed: Routed) -> None:
        """Add what a parameter of fused experts is about to compute with."""
        if self.paused:
            return
        stack = f"{routed.experts}.{routed.parameter}"
        if stack not in self._experts:
            names = {e: f"{stack}[{e}]" for e in range(len(routed.counts)) if f"{stack}[{e}]" in self._targets}
            if not names:
                return
            precision = precision_of(next(iter(names.values())), self._precision)
            self._experts[stack] = ExpertSums(routed, names, pooled=self._pooled, precision=precision)
            for site, covariance in self._experts[stack].sites:
                each = _SiteSum(site.members, covariance, joinable=False)
                self._sums.append(each)
                self._of.update(dict.fromkeys(site.members, each))
        try:
            mask = None if self._rows is None else self._rows.of(stack, routed.hidden)
            self._experts[stack].add(routed, mask)
        except ValueError as error:
            raise InputError(f"batch {self._batch}: {error}") from error

    def check_output(self, name: str, x: Any, output: Any) -> None:
        """Leave a target out if its output is not W x + b."""
        why = unlike_linear(self._targets[name], x, output)
        if why is not None:
            self.leave_out(name, why)

    def leave_out(self, name: str, why: str) -> None:
        """Stop summing a target's inputs.

        Raises:
            ValueError: naming it, if the caller listed it by name.
        """
        if name in self.left_out or name not in self._targets:
            return
        if not isinstance(self._targets, Targets):
            raise InputError(f"target {name!r} {why}. Leave it out of targets")
        self._targets.leave_out(name, why)
        self.left_out[name] = why
        each = self._of.pop(name, None)
        if each is not None:
            each.remove(name)
            self._sums = [one for one in self._sums if one.members]

    def end_batch(self) -> None:
        """End a batch.

        Raises:
            ValueError: naming the layer, if a member of a site did not get the site's input; naming the layer and the batch, if an
                input of the batch before held NaN or Inf. The last batch's are raised by `partial`, `release` and `flush`.
        """
        self.paused = True
        for each in self._sums:
            self._end_input(each)
        check = FiniteCheck({each.members[0]: each.covariance for each in self._sums})
        self._refuse_nonfinite()  # of the batch before: the device computes on meanwhile
        self._check = self._batch, check

    def _refuse_nonfinite(self) -> None:
        if self._check is None:
            return
        (batch, check), self._check = self._check, None
        failure = check.failure()
        if failure is not None:
            name, text = failure
            raise InputError(f"{name}, batch {batch}: {text}")

    def size(self) -> int:
        """Bytes of the sums, and of the rows that are staged on a GPU, at most as much again (`launch_tokens`)."""
        return sum(2 * 8 * memory_size(each.covariance.d_in) for each in self._sums)

    def partial(self) -> list[tuple[Site, Covariance]]:
        """The sites and their sums so far. Call this between two batches; later batches change the sums.

        Raises:
            ValueError: as `end_batch`.
        """
        self._refuse_nonfinite()
        return [(Site(tuple(each.members), each.covariance.d_in), each.covariance) for each in self._sums]

    def release(self) -> Iterator[tuple[Site, Covariance]]:
        """Yields the sites and their sums in the order of their first calls, and drops its reference to each.

        Raises:
            ValueError: as `end_batch`; naming a site without tokens; of experts, if none of a layer's has any.
        """
        self._refuse_nonfinite()
        refuse_empty([(s.members[0], s.covariance.tokens) for s in self._sums], self.MASKED)
        for experts in self._experts.values():
            experts.attach_pool()
        self._of.clear()
        self._experts.clear()
        while self._sums:
            each = self._sums.pop(0)
            site, covariance = Site(tuple(each.members), each.covariance.d_in), each.covariance
            del each
            covariance.launch()
            yield site, covariance
            del covariance

    def flush(self) -> None:
        """Add the staged rows to all sums.

        Raises:
            ValueError: naming the layer, for NaN or Inf; and the batch, as `end_batch`.
        """
        self._refuse_nonfinite()
        for each in self._sums:
            try:
                each.covariance.flush()
            except ValueError as error:
                raise InputError(f"{each.members[0]}: {error}") from error

    def absorb(self, site: Site, covariance: Covariance) -> None:
        """Add the sums of earlier batches of a site, not of routed experts, between two batches.

        Raises:
            ValueError: if other layers share its input now.
        """
        each = next((one for one in self._sums if site.name in one.members), None)
        if each is None:
            self._sums.append(_SiteSum(site.members, covariance, joinable=False))
            self._of.update(dict.fromkeys(site.members, self._sums[-1]))
        elif tuple(each.members) == site.members:
            each.covariance.merge(covariance)
        else:
            raise InputError(
                f"{' and '.join(map(repr, site.members))} shared an input in the batches before, and "
                f"{' and '.join(map(repr, each.members))} do now: one sum cannot serve both. Calibrate them in separate runs"
            )

    def pool(self, stack: str) -> Pool | None:
        """The sums of all experts of one parameter; None if this process had none of its inputs."""
        return self._experts[stack].pool() if stack in self._experts else None

    def take(self, site: Site, device: torch.device) -> Covariance:
        """Remove and return the sums of one site; empty sums on `device` if this process had none of its inputs."""
        index = next((i for i, each in enumerate(self._sums) if each.members[0] == site.name), None)
        if index is None:
            return self._new_covariance(site.name, device)
        for name in site.members:
            del self._of[name]
        return self._sums.pop(index).covariance

    def _new_covariance(self, name: str, device: torch.device) -> Covariance:
        device = device if device.type in ("cpu", "cuda") else torch.device("cpu")  # elsewhere there is no float64
        return Covariance(weight_shape(self._targets[name])[1], device=device, precision=precision_of(name, self._precision))

    def _begin_input(self, each: _SiteSum, name: str, x: torch.Tensor) -> None:
        mask = None if self._rows is None else self._rows.of(name, x)
        try:
            summed = x if self._weigh is None else self._weigh(each.members[0], x)
            each.begin_input(name, x, summed, mask)
        except ValueError as error:
            raise InputError(f"{name}, batch {self._batch}: {error}") from error

    def _end_input(self, each: _SiteSum) -> None:
        missing = each.end_input()
        if missing is not None:
            other = next(m for m in each.members if m != missing)
            raise InputError(
                f"{missing!r} shared its input with {other!r} in the batch in which they were first called, but not in batch "
                f"{self._batch}: one sum cannot serve both. Calibrate them in separate runs (targets=[{missing!r}], …)."
            )


def refuse_empty(sites: Sequence[tuple[str, int]], why: str) -> None:
    """Raise `ValueError`, naming the site, if one has no tokens. An expert may have none, if another one of its layer has.

    Args:
        sites: name and tokens.
        why: there may be none.
    """
    stacks = {expert.stack for name, tokens in sites if tokens for expert in [expert_of(name)] if expert is not None}
    for name, tokens in sites:
        expert = expert_of(name)
        if tokens == 0 and (expert is None or expert.stack not in stacks):
            raise InputError(f"no tokens at {name!r}: {why}")


def leave_out_uncalled(uncalled: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> None:
    """Remove targets that were never called from `targets`; `ValueError`, naming the first, if the caller listed them by name."""
    if not uncalled:
        return
    if isinstance(targets, Targets) and targets.optional:
        for name in uncalled:
            targets.leave_out(name, "was never called: these data do not reach it")
        return
    more = f" and {len(uncalled) - 1} more" if len(uncalled) > 1 else ""
    raise InputError(
        f"target {next(iter(uncalled))!r}{more} was never called: these data do not reach it. Leave it out of targets, or add "
        "data that do."
    )
