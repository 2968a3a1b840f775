"""The blocks of a model, called one at a time outside of its forward pass.

Blocks are a chain if each is called once, in order, with the hidden states that the one before it returned, and if no other
argument depends on hidden states. `nullspace.calibration.rehearsal` checks it on the first batch. Blocks that the first batch does
not reach, such as those that attend to images, are no part of the chain, and no later batch may call them.

In every batch, the model's forward pass runs with stand-ins for the blocks, which record the arguments and return NaN. Checked are
the order of the calls, that each stand-in gets the very tensor that the one before it returned, and that no other argument holds
NaN. When the blocks are then called, the first batch must give what the model's own forward pass gave.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nullspace.calibration.comparison import PLAIN, is_close, is_inexact, nan_like, projection, versions
from nullspace.calibration.hidden_states import Arguments
from nullspace.devices import on_host
from nullspace.model.batches import Call, naming_batch
from nullspace.model.blocks import refuse_chain
from nullspace.model.linear import output_head
from nullspace.model.sharded_tensors import version_of
from nullspace.model.weights import execution_device


class BlockCalls:
    """The calls of blocks in one forward pass of the model.

    Attributes:
        arguments: for every block called so far, the leaves of `(args, kwargs)`, and their structure.
        hidden: for each of them, the index of the leaf with the hidden states.
        indices: of these blocks in the chain.
        stopped: whether the forward pass was ended early.
    """

    def __init__(self) -> None:
        self.arguments: list[tuple[list[Any], Any]] = []
        self.hidden: list[int] = []
        self.indices: list[int] = []
        self.stopped = False
        self._returned: Any = None  # the hidden states that the last block returned
        self._version: int | None = None
        self._others: list[Any] = []  # what else blocks have returned
        self._searched: dict[int, tuple[torch.Tensor, int, int]] = {}  # by id: a tensor, its block's index, and its own

    def returns(self, output: Any) -> Any:
        """Record what a block returns; returns it."""
        self._returned, *others = pytree.tree_leaves(output)
        self._version = version_of(self._returned)
        given = {id(leaf) for leaves, _ in self.arguments for leaf in leaves}
        self._others += [leaf for leaf in others if not isinstance(leaf, PLAIN) and id(leaf) not in given]
        return output

    def find_returned(self, leaves: list[Any]) -> int | None:
        """The index of the hidden states that the block before returned: the same object, not written to since."""
        at = next((i for i, leaf in enumerate(leaves) if leaf is self._returned), None)
        return None if at is None or version_of(self._returned) != self._version else at

    def find_dependent(self, leaves: list[Any], hidden: int) -> int | None:
        """The index of another leaf that depends on hidden states as another output of a block; NaN is looked for by `find_nan`."""
        first = {id(leaf) for leaf in self.arguments[0][0]}  # given before there were any hidden states
        for number, leaf in enumerate(leaves):
            if number == hidden or id(leaf) in first:
                continue
            if any(leaf is other for other in self._others):
                return number
            if is_inexact(leaf):
                self._searched.setdefault(id(leaf), (leaf, self.indices[-1], number))
        return None

    def find_nan(self) -> tuple[int, int] | None:
        """The index of a block, and of a leaf with NaN among those that `find_dependent` was given; None if there is none.

        The host waits once, and only for tensors that the first block was not given.
        """
        searched = list(self._searched.values())
        found = on_host([tensor.isnan().any() for tensor, _, _ in searched])
        return next(((index, number) for (_, index, number), nan in zip(searched, found, strict=True) if bool(nan)), None)

    def bytes(self) -> int:
        """Size of what must be kept: the first block's hidden states, and every other tensor (masks, embeddings) once."""
        beside = [
            leaf
            for (leaves, _), hidden in zip(self.arguments, self.hidden, strict=True)
            for number, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and number != hidden
        ]
        kept = {id(t): t for t in (self.arguments[0][0][self.hidden[0]], *beside)}
        return sum(t.numel() * t.element_size() for t in kept.values())


# (calls so far, index of the block, leaves of its arguments, their structure, index of the hidden states) → output.
StandIn = Callable[[BlockCalls, int, list[Any], Any, int], Any]


class Output(NamedTuple):
    """The structure of what a block returns: hidden states, its first leaf, and maybe others."""

    others: list[Any]
    """Stand-ins for the others: NaN, or integers that the block did not return."""
    spec: Any


class _Stop(BaseException):
    """Ends the model's forward pass early. Not an `Exception`, so that the model's own code does not catch it."""


class Chain:
    """The blocks of a model, called one at a time or replaced by stand-ins.

    Args:
        model: any. Its weights outside of the blocks must be loaded when it runs.
        blocks: `nullspace.model.blocks.find_blocks`.
        outside: the targets outside of the blocks.
        device: where the blocks compute; by default where their weights are, or where accelerate would move them.

    Attributes:
        model, names, blocks: as given; the blocks as lists.
        devices: of every block.
        skipped: name → block that is not called (`leave_out`).
        may_skip: whether the model may leave out blocks in a forward pass.
        outputs: block → structure of its output; set by the rehearsal.
        reference: block → projection of what it returned in the model's own forward pass; set by the rehearsal.
        rehearsed: number of the batch that was rehearsed.
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, nn.Module], outside: Mapping[str, nn.Module], device: torch.device | None
    ) -> None:
        self.model = model
        self.names = list(blocks)
        self.blocks = list(blocks.values())
        self.devices = [device or execution_device(block) or torch.device("cpu") for block in self.blocks]
        self.skipped: dict[str, nn.Module] = {}
        self.may_skip = False
        self.outputs: dict[int, Output] = {}
        self.reference: dict[int, torch.Tensor] = {}
        self.rehearsed: int | None = None
        self._outside = outside
        self._own_forward = [block.__dict__.get("forward") for block in self.blocks]
        self._calls: dict[int, Call] = {}
        self._is_behind = False  # whether the last block has returned in the current forward pass

    def leave_out(self, names: Collection[str]) -> None:
        """Remove blocks that the model does not call with these data. Later calls of them are refused."""
        if not names:
            return
        kept = [index for index, name in enumerate(self.names) if name not in names]
        self.skipped.update({name: block for name, block in zip(self.names, self.blocks, strict=True) if name in names})
        self.names, self.blocks = [self.names[i] for i in kept], [self.blocks[i] for i in kept]
        self.devices, self._own_forward = [self.devices[i] for i in kept], [self._own_forward[i] for i in kept]
        self.outputs.clear()
        self.reference.clear()

    # ---- the model's own forward pass, with stand-ins for the blocks

    def prepare(self, call: Call, options: Mapping[str, Any]) -> BlockCalls:
        """Run the model's forward pass up to its last block, whose stand-in ends it.

        Raises:
            ValueError: naming the block, if it is called out of order, or its arguments are not those of a chain.
        """

        def stand_in(made: BlockCalls, index: int, leaves: list[Any], spec: Any, hidden: int) -> Any:
            dependent = made.find_dependent(leaves, hidden) if index else None
            if dependent is not None:
                raise self.refuse_dependent(index, dependent)
            if index + 1 == len(self.blocks):
                raise _Stop
            return self.wrap(index, nan_like(leaves[hidden]))

        self._calls[call.number] = call
        made = self.run(call, options, stand_in)
        found = made.find_nan()
        if found is not None:
            raise self.refuse_dependent(*found)
        if len(made.arguments) < len(self.blocks):
            missing = self.names[len(made.arguments)]
            raise refuse_chain(self.model, f"does not call its block {missing!r} in batch {call.number}")
        return made

    def finish(self, batch: int, arguments: Arguments, options: Mapping[str, Any]) -> None:
        """Run the model's forward pass; the last block's stand-in returns the hidden states after all blocks."""
        last = arguments.hidden(batch, self.devices[-1])

        def stand_in(made: BlockCalls, index: int, leaves: list[Any], spec: Any, hidden: int) -> Any:
            return self.wrap(index, last if index + 1 == len(self.blocks) else nan_like(last))

        self.run(self._calls[batch], options, stand_in, lambda name, x: None)

    def run(
        self,
        call: Call,
        options: Mapping[str, Any],
        stand_in: StandIn,
        target: Callable[[str, torch.Tensor], None] | None = None,
        needed: int | None = None,
        *,
        to_head: bool = False,
    ) -> BlockCalls:
        """One forward pass of the model.

        Args:
            call: the batch.
            options: more arguments of the model.
            stand_in: replaces the blocks.
            target: called with the name and input of every target behind the blocks.
            needed: ends the pass behind so many blocks, if all targets outside of blocks were called by then; None: runs on.
            to_head: ends the pass where the output head is called.
        """
        made, ahead = BlockCalls(), set[str]()
        self._is_behind = False

        def replaced(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                leaves, spec, hidden = self._record(made, index, args, kwargs)
                output = made.returns(stand_in(made, index, leaves, spec, hidden))
                self._is_behind = index + 1 == len(self.blocks)
                in_turn = made.indices == list(range(index + 1))  # if not, those that were skipped may yet be called
                if needed is not None and index + 1 >= needed and in_turn and ahead >= self._outside.keys():
                    made.stopped = True
                    raise _Stop
                return output

            return forward

        def refusing(name: str) -> Callable[..., Any]:
            def forward(*_: Any, **__: Any) -> Any:
                raise refuse_chain(self.model, f"calls its block {name!r} in batch {call.number}, but not in the first batch")

            return forward

        def hook(name: str) -> Callable[..., None]:
            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if not self._is_behind:
                    ahead.add(name)
                elif name in ahead:
                    raise refuse_chain(self.model, f"calls {name!r} both ahead of its blocks and behind them")
                elif target is not None:
                    target(name, args[0] if args else next(iter(kwargs.values())))

            return before

        def stop(*_: Any) -> None:
            raise _Stop

        with contextlib.ExitStack() as stack:
            head = output_head(self.model) if to_head else None
            if head is not None:
                stack.callback(head.register_forward_pre_hook(stop).remove)
            for name, module in self._outside.items():
                stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
            stack.enter_context(_replacing(self.blocks, [replaced(index) for index in range(len(self.blocks))]))
            stack.enter_context(_replacing(list(self.skipped.values()), list(map(refusing, self.skipped))))
            stack.enter_context(contextlib.suppress(_Stop))
            stack.enter_context(naming_batch(self.model, call))
            self.model(*call.args, **{**options, **call.kwargs})
        return made

    def _record(self, made: BlockCalls, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any, int]:
        """Record a call; returns the leaves of its arguments, their structure, and the index of the hidden states."""
        name = self.names[index]
        last = made.indices[-1] if made.indices else -1
        if index <= last or (index > last + 1 and not self.may_skip):
            what = "more than once" if index in made.indices else "out of order"
            raise refuse_chain(self.model, f"calls its block {name!r} {what}")
        leaves, spec = pytree.tree_flatten((args, kwargs))
        hidden = made.find_returned(leaves) if made.indices else _guess_hidden(leaves, kwargs)
        if hidden is None:
            raise refuse_chain(
                self.model,
                f"does not hand {name!r} the hidden states that {self.names[last]!r} returned"
                if made.indices
                else f"hands {name!r} nothing that could be hidden states",
            )
        made.arguments.append((leaves, spec))
        made.hidden.append(hidden)
        made.indices.append(index)
        return leaves, spec, hidden

    # ---- one block

    def advance(self, index: int, batch: int, arguments: Arguments, *, following: int | None = None) -> None:
        """Call one block with the arguments of one batch, and keep its hidden states; those of the following batch are fetched."""
        device = self.devices[index]
        args, kwargs, before = arguments.take(batch, index, device)
        if following is not None:
            arguments.fetch(following, index, device)
        given = pytree.tree_leaves((args, kwargs))
        unchanged = versions(given)
        output = self.blocks[index](*args, **kwargs)
        leaves, spec = pytree.tree_flatten(output)
        if spec != self._output(index).spec:
            raise refuse_chain(self.model, f"has a block {self.names[index]!r} that returns something else than in the first batch")
        if versions(given) != unchanged:
            raise self.refuse_writing(index)
        after: torch.Tensor = leaves[0]
        self.check_shape(index, before, after)
        expected = self.reference.get(index) if batch == self.rehearsed else None
        if expected is not None and not is_close(projection(after), expected, after.dtype):
            raise refuse_chain(
                self.model,
                f"has a block {self.names[index]!r} that returned something else in the model's own forward pass than with the "
                "same arguments by itself: it uses more than its arguments",
            )
        arguments.put(batch, after)

    @contextlib.contextmanager
    def own_forward(self, index: int) -> Iterator[None]:
        """Context manager: restores one block's own `forward` in a pass with stand-ins."""
        with _replacing([self.blocks[index]], [self._own_forward[index]]):
            yield

    def _output(self, index: int) -> Output:
        return self.outputs.get(index, self.outputs[0])

    def wrap(self, index: int, hidden: torch.Tensor) -> Any:
        """What a block would return with these hidden states."""
        others, spec = self._output(index)
        return pytree.tree_unflatten([hidden, *others], spec)

    def check_shape(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Raise `ValueError`, naming the block, if it changes the shape or the dtype of the hidden states."""
        if after.shape != before.shape or after.dtype != before.dtype:
            raise refuse_chain(
                self.model,
                f"has a block {self.names[index]!r} that turns {before.dtype} {tuple(before.shape)} into {after.dtype} "
                f"{tuple(after.shape)}",
            )

    def refuse_dependent(self, index: int, number: int) -> ValueError:
        """The error for a block with an argument, beside the hidden states, that depends on them."""
        return refuse_chain(
            self.model,
            f"hands {self.names[index]!r} more than what {self.names[index - 1]!r} returned (argument {number} depends on hidden "
            "states too)"
            if index
            else f"hands {self.names[index]!r} something else when it runs again on the same batch (argument {number})",
        )

    def refuse_writing(self, index: int) -> ValueError:
        """The error for a block that writes to its arguments."""
        return refuse_chain(
            self.model, f"has a block {self.names[index]!r} that changes what it is given (in place, or a cache that it fills)"
        )


@contextlib.contextmanager
def _replacing(modules: list[nn.Module], forwards: list[Any]) -> Iterator[None]:
    """Context manager: replaces the `forward` of some modules; None for the class's. Restores instance attributes afterwards."""
    own = [module.__dict__.get("forward") for module in modules]
    _set_forward(modules, forwards)
    try:
        yield
    finally:
        _set_forward(modules, own)


def _set_forward(modules: list[nn.Module], forwards: list[Any]) -> None:
    for module, forward in zip(modules, forwards, strict=True):
        if forward is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = forward


def _guess_hidden(leaves: list[Any], kwargs: Mapping[str, Any]) -> int | None:
    named = kwargs.get("hidden_states")
    if isinstance(named, torch.Tensor):
        return next(i for i, leaf in enumerate(leaves) if leaf is named)
    floating = (i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1)
    return next(floating, None)
