"""Block by block: all batches go through one block before any goes through the next.

The model's own forward runs up to the blocks, once a batch, with stand-ins in their place: what it hands them is kept (hidden
states, masks, rotary embeddings). Then every block is called by hand. So a block's weights, and the sums of its sites, are in
memory only while it is at work.

That is right only for a chain: every block is called once, in order, with what the one before it returned, untouched. It is not
taken on trust. The stand-ins return NaN, and the tensor object that one returned must be what the next one is handed, with no NaN
anywhere else among its arguments; what a block really returns must look like what its stand-in returned.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nullspace.batches import Call, calls, evaluating, forward_options, naming_batch, padded_batch
from nullspace.blocks import refuse_chain
from nullspace.covariance import Covariance
from nullspace.distributed import Job, Totals
from nullspace.hidden import Arguments, Shelf, choose_place
from nullspace.listening import Listener, listening, refuse_silent
from nullspace.padding import Padding, TokenRows
from nullspace.progress import Progress
from nullspace.sharded import aside, is_spread
from nullspace.sites import Site, output_head
from nullspace.weights import Loaded, execution_device

logger = logging.getLogger(__name__)


def stream_by_block(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    precision: str | Mapping[str, str],
    report: Progress,
    *,
    device: torch.device | None = None,
    hidden_states: str = "auto",
    folder: str | None = None,
    job: Job | None = None,
) -> Iterator[tuple[Site, Covariance]]:
    """The layerwise strategy of `stream_covariances`.

    Args:
        blocks: `nullspace.blocks.find_blocks`.
        device: where the blocks compute; by default where their weights are, or where accelerate would bring them.
        hidden_states: `"device"`, `"host"`, `"disk"`, or `"auto"`: the first of these with room for them.
        folder: where hidden states on disk go.
        job: the processes that work together: all are in the same block at the same time. This one alone by default.
        others: as in `stream_covariances`.
    """
    chain = _Chain(model, blocks, device)
    outside, inside = _divide(targets, blocks)
    paddings: dict[int, Padding] = {}
    later = functools.cache(lambda: padded_batch(model, loader))
    rows = TokenRows(model, lambda: next((n for n, each in paddings.items() if each.hides), None) or later())
    ahead = Listener(outside, precision, rows)
    shelf: Shelf | None = None
    arguments: Arguments | None = None  # None if all batches are other processes'
    job = job or Job.alone()
    tokens = 0
    head = output_head(model)
    options = forward_options(model, dict(targets))
    unused = tuple(chain.blocks) + (() if head is None or any(m is head for m in outside.values()) else (head,))
    spread = is_spread(model)
    first = Loaded(chain.blocks[0], chain.device_of(0), within=model)
    ready: Loaded | None = first
    try:
        share = job.share(loader)
        total = share.length
        around = Loaded(model, chain.device_of(0), but=unused)
        if spread:  # before weights are gathered, whoever has failed must have told it
            job.exchange(None)
            first.gather()
        with (
            contextlib.closing(around),
            around,
            aside(model),
            listening(outside, ahead),
            evaluating(model),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            for call in calls(model, share, device):
                ahead.begin_batch(call.number, call.padding)
                leaves = chain.prepare(call, options, first)
                ahead.end_batch()
                if shelf is None or arguments is None:
                    place = choose_place(hidden_states, leaves.bytes() * (total or 1), chain.device_of(0))
                    shelf = Shelf(place, folder)
                    arguments = Arguments(shelf)
                arguments.keep(call.number, leaves.blocks, leaves.hidden)
                paddings[call.number] = call.padding
                tokens += call.padding.tokens
                del leaves
        job.check_share(share)
        behind = job.silent(ahead)
        totals = Totals(job)
        yield from totals.add(ahead)
        needed = len(chain.blocks) if behind else 1 + max((i for i, own in enumerate(inside) if own), default=-1)
        steps = needed * len(paddings)
        report("forward", 0, steps, 0)
        for index in range(needed):
            began = time.perf_counter()
            job.at(f"the forward pass of {chain.names[index]!r}")
            sums = Listener(inside[index], precision, rows)
            loaded = ready or Loaded(chain.blocks[index], chain.device_of(index), within=model)
            ready = Loaded(chain.blocks[index + 1], chain.device_of(index + 1), within=model) if index + 1 < needed else None
            if spread:
                job.exchange(None)
            with (
                contextlib.closing(loaded),
                loaded,
                aside(chain.blocks[index]),
                listening(inside[index], sums),
                evaluating(model),
                torch.inference_mode(False),
                torch.no_grad(),
            ):
                for done, (number, padding) in enumerate(paddings.items(), start=1):
                    assert arguments is not None
                    sums.begin_batch(number, padding)
                    chain.advance(index, number, arguments)
                    sums.end_batch()
                    step = index * len(paddings) + done
                    report("forward", step, steps, tokens * step // steps)
            refuse_silent(job.silent(sums))
            _log(chain.names[index], time.perf_counter() - began, tokens, chain.device_of(index))
            yield from totals.add(sums)
        if behind:
            heard = {name: module for name, module in outside.items() if name not in behind}
            # The output head is called here: accelerate's hooks would load it, and those of sharded models stand aside.
            around = Loaded(model, chain.device_of(-1), but=tuple(chain.blocks) if spread else unused)
            if spread:
                job.exchange(None)
            with contextlib.closing(around):
                yield from _tail(model, chain, arguments, paddings, options, behind, heard, around, precision, rows, job, totals)
        yield from totals.rest()
    finally:
        if ready is not None:
            ready.close()
        if shelf is not None:
            shelf.close()


def _tail(
    model: nn.Module,
    chain: _Chain,
    arguments: Arguments | None,
    paddings: Mapping[int, Padding],
    options: Mapping[str, Any],
    behind: Mapping[str, nn.Module],
    heard: Mapping[str, nn.Module],
    weights: Loaded,
    precision: str | Mapping[str, str],
    rows: TokenRows,
    job: Job,
    totals: Totals,
) -> Iterator[tuple[Site, Covariance]]:
    """What the model does behind its blocks, for the targets that were not called ahead of them."""
    sums = Listener(behind, precision, rows)

    def trip(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if chain.is_behind:
                raise refuse_chain(model, f"calls {name!r} both ahead of its blocks and behind them")

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in heard.items():
            stack.callback(module.register_forward_pre_hook(trip(name)).remove)
        managers = (listening(behind, sums), evaluating(model), torch.inference_mode(False), torch.no_grad())
        for manager in (weights, aside(model), *managers):
            stack.enter_context(manager)
        for number, padding in paddings.items():
            assert arguments is not None
            sums.begin_batch(number, padding)
            chain.finish(number, arguments, options)
            sums.end_batch()
    refuse_silent(job.silent(sums))
    yield from totals.add(sums)


def _divide(
    targets: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], list[dict[str, nn.Module]]]:
    """The targets outside all blocks, and those inside each."""
    inside = [{n: m for n, m in targets.items() if n == block or n.startswith(f"{block}.")} for block in blocks]
    taken = {name for own in inside for name in own}
    return {name: m for name, m in targets.items() if name not in taken}, inside


class _Prepared:
    """What the blocks are to be called with, for one batch."""

    def __init__(self) -> None:
        self.blocks: list[tuple[list[Any], Any]] = []  # leaves of (args, kwargs), and their structure
        self.hidden: list[int] = []  # which leaf is the hidden states

    def bytes(self) -> int:
        """Of all that is to be kept: the first block's hidden states, and every mask and embedding once."""
        beside = [
            leaf
            for (leaves, _), place in zip(self.blocks, self.hidden, strict=True)
            for number, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and number != place
        ]
        kept = {id(t): t for t in (self.blocks[0][0][self.hidden[0]], *beside)}
        return sum(t.numel() * t.element_size() for t in kept.values())


class _Arrived(BaseException):
    """The model's forward has called its last block, and need not go on. Not an `Exception`: nobody is to catch it on the way."""


class _Chain:
    """The blocks, called by hand or stood in for."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], device: torch.device | None) -> None:
        self._model = model
        self.names = list(blocks)
        self.blocks = list(blocks.values())
        self._devices = [device or execution_device(block) or torch.device("cpu") for block in self.blocks]
        # What a block returns: a tensor, or leaves around one, and their structure. Known after the first call of the first block.
        self._around: tuple[list[Any], Any] | None = None
        self._calls: dict[int, Call] = {}
        self.is_behind = False

    def device_of(self, index: int) -> torch.device:
        return self._devices[index]

    def prepare(self, call: Call, options: Mapping[str, Any], first: Loaded) -> _Prepared:
        """Run the model's forward up to its last block, whose stand-in ends it."""
        found = _Prepared()
        poison: torch.Tensor | None = None
        check = self._around is None

        def stand_in(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal poison
            if index != len(found.blocks):
                what = "more than once" if index < len(found.blocks) else "out of order"
                raise refuse_chain(self._model, f"calls its block {self.names[index]!r} {what}")
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if index == 0:
                place = _guess_hidden(leaves, kwargs)
            else:
                place = next((i for i, leaf in enumerate(leaves) if leaf is poison), None)
            if place is None:
                raise refuse_chain(
                    self._model,
                    f"does not hand {self.names[index]!r} the hidden states that {self.names[index - 1]!r} returned"
                    if index
                    else f"hands {self.names[index]!r} nothing that could be hidden states",
                )
            if check and index:
                self._check_arguments(index, leaves, place)
            found.blocks.append((leaves, spec))
            found.hidden.append(place)
            if index + 1 == len(self.blocks):
                raise _Arrived
            if self._around is None:
                self._learn_output(first, args, kwargs)
            poison = _poison(leaves[place])
            return self._wrap(poison)

        with self._standing_in(stand_in), contextlib.suppress(_Arrived), naming_batch(call):
            self._model(*call.args, **{**options, **call.kwargs})
        if len(found.blocks) < len(self.blocks):
            missing = self.names[len(found.blocks)]
            raise refuse_chain(self._model, f"does not call its block {missing!r} in batch {call.number}")
        self._calls[call.number] = call
        return found

    def advance(self, index: int, batch: int, arguments: Arguments) -> None:
        """One block, one batch: from its hidden states to the next one's."""
        device = self._devices[index]
        args, kwargs = arguments.take(batch, index, device)
        before = arguments.hidden(batch, device)
        after = self._unwrap(index, self.blocks[index](*args, **kwargs))
        if after.shape != before.shape or after.dtype != before.dtype:
            raise refuse_chain(
                self._model,
                f"has a block {self.names[index]!r} that turns {before.dtype} {tuple(before.shape)} into {after.dtype} "
                f"{tuple(after.shape)}",
            )
        arguments.put(batch, after)

    def finish(self, batch: int, arguments: Arguments, options: Mapping[str, Any]) -> None:
        """Run the model's forward with the last block's stand-in returning what the chain came to."""
        call, hidden = self._calls[batch], arguments.hidden(batch, self._devices[-1])
        self.is_behind = False

        def stand_in(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.is_behind = index + 1 == len(self.blocks)
            return self._wrap(hidden if self.is_behind else _poison(hidden))

        with self._standing_in(stand_in):
            self._model(*call.args, **{**options, **call.kwargs})

    @contextlib.contextmanager
    def _standing_in(self, stand_in: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """Exchange the blocks' `forward`, whose own entry (accelerate sets one) is put back afterwards."""

        def bound(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: stand_in(index, args, kwargs)

        own = [block.__dict__.get("forward") for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.__dict__["forward"] = bound(index)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward

    def _learn_output(self, first: Loaded, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a block returns, by calling the first one."""
        block = self.blocks[0]
        stand_in = block.__dict__.pop("forward")
        try:
            with first:
                output = block(*_on(args, self._devices[0]), **_on(kwargs, self._devices[0]))
        finally:
            block.__dict__["forward"] = stand_in
        leaves, spec = pytree.tree_flatten(output)
        if not leaves or not isinstance(leaves[0], torch.Tensor):
            raise refuse_chain(self._model, f"has a block {self.names[0]!r} that returns {type(output).__name__}")
        self._around = ([None, *leaves[1:]], spec)

    def _wrap(self, hidden: torch.Tensor) -> Any:
        assert self._around is not None
        leaves, spec = self._around
        return pytree.tree_unflatten([hidden, *leaves[1:]], spec)

    def _unwrap(self, index: int, output: Any) -> torch.Tensor:
        leaves, spec = pytree.tree_flatten(output)
        if self._around is not None and spec != self._around[1]:
            raise refuse_chain(self._model, f"has a block {self.names[index]!r} that returns something else than the first one")
        hidden: torch.Tensor = leaves[0]
        return hidden

    def _check_arguments(self, index: int, leaves: list[Any], place: int) -> None:
        """Nothing but the hidden states may depend on the hidden states."""
        for number, leaf in enumerate(leaves):
            if number != place and isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
                raise refuse_chain(
                    self._model,
                    f"hands {self.names[index]!r} more than what {self.names[index - 1]!r} returned (argument {number} depends "
                    "on hidden states too)",
                )


def _poison(like: torch.Tensor) -> torch.Tensor:
    """NaN in the shape of a tensor, without its memory; a new object every time."""
    return like.new_full((1,), float("nan")).expand(like.shape)


def _guess_hidden(leaves: list[Any], kwargs: Mapping[str, Any]) -> int | None:
    named = kwargs.get("hidden_states")
    if isinstance(named, torch.Tensor):
        return next(i for i, leaf in enumerate(leaves) if leaf is named)
    floating = (i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1)
    return next(floating, None)


def _on(value: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)


def _log(name: str, seconds: float, tokens: int, device: torch.device) -> None:
    memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB at most" if device.type == "cuda" else ""
    logger.info("%s: %.1f s, %s tokens/s%s", name, seconds, f"{tokens / max(seconds, 1e-9):,.0f}", memory)
