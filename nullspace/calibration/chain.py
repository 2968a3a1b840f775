"""The blocks of a model, called by hand one at a time, and the checks that this is what the model's own forward pass does.

Blocks are a chain if each is called once, in order, with the hidden states that the one before it returned, and if nothing else
that they are given depends on hidden states. `Chain.rehearse` finds out on the first batch, before any sum is given out:

1. The model's own forward pass runs. Each block gets copies of its arguments, twice: it must leave them as they are, and return
   the same again. What it returns is known from then on.
2. The same batch runs with stand-ins for the blocks, which return NaN. Whatever else depends on hidden states then differs.

When the blocks are called by hand, the first batch must come out as in the first run. In every later batch, the order of the calls
is checked, that the tensor object which one stand-in returned is what the next one is given, and that nothing else holds NaN.
"""

from __future__ import annotations

import contextlib
import copy
import enum
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nullspace.calibration.hidden_states import Arguments
from nullspace.model.batches import Call, naming_batch
from nullspace.model.blocks import refuse_chain
from nullspace.model.sharded import class_of, is_model_sharded
from nullspace.model.sharded_tensors import version_of
from nullspace.model.weights import Loaded, execution_device, is_loaded

# Values that a call cannot change.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type, enum.Enum, torch.dtype, torch.device, torch.Size)


class Handed:
    """What one forward pass of the model gives its blocks.

    Attributes:
        blocks: for every block called so far, the leaves of `(args, kwargs)`, and their structure.
        hidden: for each of them, which leaf is the hidden states.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[list[Any], Any]] = []
        self.hidden: list[int] = []
        self._returned: Any = None  # the hidden states that the last block returned
        self._version: int | None = None
        self._others: list[Any] = []  # whatever else blocks have returned

    def returns(self, output: Any) -> Any:
        """Keep what a block returns, to know it again; returns it."""
        self._returned, *others = pytree.tree_leaves(output)
        self._version = version_of(self._returned)
        given = {id(leaf) for leaves, _ in self.blocks for leaf in leaves}
        self._others += [leaf for leaf in others if not isinstance(leaf, _PLAIN) and id(leaf) not in given]
        return output

    def find_returned(self, leaves: list[Any]) -> int | None:
        """Which leaf is the hidden states that the block before returned: the same object, not written to since."""
        place = next((i for i, leaf in enumerate(leaves) if leaf is self._returned), None)
        return None if place is None or version_of(self._returned) != self._version else place

    def find_other(self, leaves: list[Any], place: int) -> int | None:
        """Which other leaf depends on hidden states, if one does: another output of a block, or a tensor that holds NaN."""
        first = {id(leaf) for leaf in self.blocks[0][0]}  # given before there were any hidden states
        for number, leaf in enumerate(leaves):
            if number == place or id(leaf) in first:
                continue
            if any(leaf is other for other in self._others) or (_is_inexact(leaf) and bool(leaf.isnan().any())):
                return number
        return None

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


class _Returned(NamedTuple):
    """What a block returns: hidden states, its first leaf, and maybe others."""

    others: list[Any]
    """Stand-ins for them: NaN, or integers that the block did not return."""
    spec: Any


class _Arrived(BaseException):
    """The model's forward has come as far as it need. Not an `Exception`: nobody is to catch it on the way."""


class Chain:
    """The blocks of a model, called by hand or stood in for.

    Args:
        model: any. Its weights outside of the blocks must be at hand when it is run.
        blocks: `nullspace.blocks.find_blocks`.
        outside: the targets outside of the blocks.
        device: where the blocks compute; by default where their weights are, or where accelerate would bring them.
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, nn.Module], outside: Mapping[str, nn.Module], device: torch.device | None
    ) -> None:
        self._model = model
        self.names = list(blocks)
        self.blocks = list(blocks.values())
        self._outside = outside
        self._devices = [device or execution_device(block) or torch.device("cpu") for block in self.blocks]
        self._own = [block.__dict__.get("forward") for block in self.blocks]
        self._returned: dict[int, _Returned] = {}
        self._likeness: dict[int, torch.Tensor] = {}  # of what blocks returned for the batch that was rehearsed
        self._first: int | None = None  # that batch
        self._calls: dict[int, Call] = {}
        self._is_behind = False  # whether the last block has returned, in the forward pass under way

    def device_of(self, index: int) -> torch.device:
        return self._devices[index]

    # ---- whether it is a chain

    def rehearse(self, call: Call, options: Mapping[str, Any], first: Loaded, needed: int) -> None:
        """Run one batch through the model twice, to learn what blocks return and to check that they can be called by hand.

        Blocks whose weights are on the disk are represented by the first one of their class; of a model whose weights are spread
        over ranks, all are by the first one.

        Args:
            call: the batch.
            options: more arguments of the model.
            first: the weights of the first block.
            needed: how many blocks are to be called by hand, if all targets outside of blocks are called ahead of them.

        Raises:
            ValueError: naming the block that cannot be called by hand.
        """
        kept: list[tuple[list[Any], Any, int]] = []
        inputs: list[tuple[str, torch.Tensor]] = []  # of the targets behind the blocks
        copies: dict[tuple[int, int | None], Any] = {}
        called, outer = self._representatives(), _autocast(self._devices)
        whole = True  # whether no block has been represented so far
        last: Any = None

        def real(handed: Handed, index: int, leaves: list[Any], spec: Any, place: int) -> Any:
            nonlocal whole, last
            kept.append(
                ([None if n == place and index else self._copy(leaf, copies) for n, leaf in enumerate(leaves)], spec, place)
            )
            if called[index] == index:
                output = self._try(index, leaves, spec, place, outer, first)
                if whole:
                    self._likeness[index] = _likeness(pytree.tree_leaves(output)[0])
            else:
                whole = False
                self._returned[index] = self._returned[called[index]]
                output = self._wrap(index, leaves[place].clone())
            last = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(leaves[place].device), output)
            return last

        def stand_in(handed: Handed, index: int, leaves: list[Any], spec: Any, place: int) -> Any:
            if index >= len(kept):
                raise self._refuse_more(index, place)
            before, spec_before, place_before = kept[index]
            other = handed.find_other(leaves, place) if index else None
            if spec != spec_before or place != place_before:
                other = place
            for number, (leaf, known) in enumerate(zip(leaves, before, strict=spec == spec_before)):
                if other is None and not (number == place and index) and not _same(leaf, known):
                    other = number
            if other is not None:
                raise self._refuse_more(index, other)
            return last if index + 1 == len(self.blocks) else self._wrap(index, _poison(leaves[place]))

        def listen(name: str, x: torch.Tensor) -> None:
            inputs.append((name, _likeness(x)))

        def compare(name: str, x: torch.Tensor) -> None:
            known = inputs.pop(0) if inputs else ("", x)
            if known[0] != name or not _is_like(_likeness(x), known[1], x.dtype):
                raise refuse_chain(self._model, f"gives {name!r}, behind its blocks, more than what {self.names[-1]!r} returned")

        for block, target in ((real, listen), (stand_in, compare)):
            with self._same_random_numbers():
                self._run(call, options, block, target, needed)
        self._first = call.number

    def _representatives(self) -> list[int]:
        """For every block, the one that is called in its place."""
        if is_model_sharded(self._model):
            return [0] * len(self.blocks)
        first: dict[type, int] = {}
        return [
            index if is_loaded(block) and index else first.setdefault(class_of(block), index)
            for index, block in enumerate(self.blocks)
        ]

    def _try(self, index: int, leaves: list[Any], spec: Any, place: int, outer: Any, first: Loaded) -> Any:
        """Call a block twice on copies, the second time as it is going to be called by hand; returns the first output."""
        name = self.names[index]
        weights = first if index == 0 else Loaded(self.blocks[index], self._devices[index], within=self._model)
        try:
            with weights, self._by_itself(index):
                output = self._call_on_copies(index, leaves, spec)
                try:
                    with outer():
                        second = self._call_on_copies(index, leaves, spec)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    raise refuse_chain(self._model, f"has a block {name!r} that cannot be called again: {error}") from error
        finally:
            if index:
                weights.close()
        hidden, *others = pytree.tree_leaves(output) or [None]
        if not isinstance(hidden, torch.Tensor):
            raise refuse_chain(self._model, f"has a block {name!r} that returns {type(output).__name__}, not hidden states")
        self._check_shape(index, leaves[place], hidden)
        again = pytree.tree_leaves(second)[0]
        if again.shape != hidden.shape or not _is_like(_likeness(again), _likeness(hidden), hidden.dtype):
            raise refuse_chain(
                self._model,
                f"has a block {name!r} that returns something else when it is called again with the same arguments: it keeps "
                "something from one call for the next, draws random numbers, or depends on where it is called (autocast)",
            )
        self._returned[index] = _Returned([_spoilt(leaf) for leaf in others], pytree.tree_structure(output))
        return output

    def _call_on_copies(self, index: int, leaves: list[Any], spec: Any) -> Any:
        copies: dict[tuple[int, int | None], Any] = {}
        given = [self._copy(leaf, copies, self._devices[index]) for leaf in leaves]
        before = _versions(given)
        args, kwargs = pytree.tree_unflatten(given, spec)
        output = self.blocks[index](*args, **kwargs)
        after, spec_after = pytree.tree_flatten((args, kwargs))
        same_objects = spec_after == spec and all(a is b for a, b in zip(after, given, strict=True))
        if not same_objects or _versions(given) != before or not all(map(_same, given, leaves)):
            raise self._refuse_writing(index)
        return output

    def _copy(self, leaf: Any, copies: dict[tuple[int, int | None], Any], device: torch.device | None = None) -> Any:
        """A copy of an argument; of one object the same copy, as long as nobody has written to it."""
        if isinstance(leaf, _PLAIN) or callable(leaf):
            return leaf
        key = (id(leaf), version_of(leaf) if isinstance(leaf, torch.Tensor) else None)
        if key not in copies:
            if isinstance(leaf, torch.Tensor):
                made = leaf.detach().clone()
                copies[key] = made if device is None else made.to(device)
            else:
                weights = {id(t): t for t in (*self._model.parameters(), *self._model.buffers())}
                try:
                    copies[key] = copy.deepcopy(leaf, memo=weights)
                except Exception:  # whatever an object's own way of copying raises
                    copies[key] = leaf
        return copies[key]

    @contextlib.contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        """What is drawn inside is drawn once more behind it."""
        with torch.random.fork_rng(devices=list({device.index or 0 for device in self._devices if device.type == "cuda"})):
            yield

    # ---- the model's own forward, with something in the place of the blocks

    def prepare(self, call: Call, options: Mapping[str, Any]) -> Handed:
        """Run the model's forward up to its last block, whose stand-in ends it.

        Raises:
            ValueError: naming the block that is not called in its turn, or not as a chain's block is.
        """

        def stand_in(handed: Handed, index: int, leaves: list[Any], spec: Any, place: int) -> Any:
            other = handed.find_other(leaves, place) if index else None
            if other is not None:
                raise self._refuse_more(index, other)
            if index + 1 == len(self.blocks):
                raise _Arrived
            return self._wrap(index, _poison(leaves[place]))

        self._calls[call.number] = call
        handed = self._run(call, options, stand_in)
        if len(handed.blocks) < len(self.blocks):
            missing = self.names[len(handed.blocks)]
            raise refuse_chain(self._model, f"does not call its block {missing!r} in batch {call.number}")
        return handed

    def finish(self, batch: int, arguments: Arguments, options: Mapping[str, Any]) -> None:
        """Run the model's forward with the last block's stand-in returning what the chain came to."""
        hidden = arguments.hidden(batch, self._devices[-1])

        def stand_in(handed: Handed, index: int, leaves: list[Any], spec: Any, place: int) -> Any:
            return self._wrap(index, hidden if index + 1 == len(self.blocks) else _poison(hidden))

        self._run(self._calls[batch], options, stand_in, lambda name, x: None)

    def _run(
        self,
        call: Call,
        options: Mapping[str, Any],
        stand_in: Callable[[Handed, int, list[Any], Any, int], Any],
        target: Callable[[str, torch.Tensor], None] | None = None,
        needed: int | None = None,
    ) -> Handed:
        """One forward pass of the model.

        Args:
            stand_in: called in the place of a block, with its number, arguments, and which of them is the hidden states.
            target: called for every target behind the blocks with its name and input.
            needed: the pass ends behind so many blocks, if all targets outside of them were called by then; None: it does not.
        """
        handed, ahead = Handed(), set[str]()
        self._is_behind = False

        def replaced(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                leaves, spec, place = self._catch(handed, index, args, kwargs)
                handed.blocks.append((leaves, spec))
                handed.hidden.append(place)
                output = handed.returns(stand_in(handed, index, leaves, spec, place))
                self._is_behind = index + 1 == len(self.blocks)
                if needed is not None and index + 1 >= needed and ahead >= self._outside.keys():
                    raise _Arrived
                return output

            return forward

        def hook(name: str) -> Callable[..., None]:
            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if not self._is_behind:
                    ahead.add(name)
                elif name in ahead:
                    raise refuse_chain(self._model, f"calls {name!r} both ahead of its blocks and behind them")
                elif target is not None:
                    target(name, args[0] if args else next(iter(kwargs.values())))

            return before

        with contextlib.ExitStack() as stack:
            for name, module in self._outside.items():
                stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
            stack.enter_context(_instead(self.blocks, [replaced(index) for index in range(len(self.blocks))]))
            stack.enter_context(contextlib.suppress(_Arrived))
            stack.enter_context(naming_batch(call))
            self._model(*call.args, **{**options, **call.kwargs})
        return handed

    def _catch(self, handed: Handed, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any, int]:
        """The leaves of a block's arguments, their structure, and which of them is the hidden states."""
        name = self.names[index]
        if index != len(handed.blocks):
            what = "more than once" if index < len(handed.blocks) else "out of order"
            raise refuse_chain(self._model, f"calls its block {name!r} {what}")
        leaves, spec = pytree.tree_flatten((args, kwargs))
        place = handed.find_returned(leaves) if index else _guess_hidden(leaves, kwargs)
        if place is None:
            raise refuse_chain(
                self._model,
                f"does not hand {name!r} the hidden states that {self.names[index - 1]!r} returned"
                if index
                else f"hands {name!r} nothing that could be hidden states",
            )
        return leaves, spec, place

    # ---- one block

    def advance(self, index: int, batch: int, arguments: Arguments) -> None:
        """One block, one batch: from its hidden states to the next one's."""
        device = self._devices[index]
        args, kwargs = arguments.take(batch, index, device)
        before = arguments.hidden(batch, device)
        given = pytree.tree_leaves((args, kwargs))
        versions = _versions(given)
        output = self.blocks[index](*args, **kwargs)
        leaves, spec = pytree.tree_flatten(output)
        if spec != self._structure(index).spec:
            raise refuse_chain(
                self._model, f"has a block {self.names[index]!r} that returns something else than in the first batch"
            )
        if _versions(given) != versions:
            raise self._refuse_writing(index)
        after: torch.Tensor = leaves[0]
        self._check_shape(index, before, after)
        known = self._likeness.get(index) if batch == self._first else None
        if known is not None and not _is_like(_likeness(after), known, after.dtype):
            raise refuse_chain(
                self._model,
                f"has a block {self.names[index]!r} that returned something else in the model's own forward pass than with the "
                "same arguments by itself: it uses more than its arguments",
            )
        arguments.put(batch, after)

    @contextlib.contextmanager
    def _by_itself(self, index: int) -> Iterator[None]:
        """Inside a forward pass with stand-ins, one block is itself."""
        with _instead([self.blocks[index]], [self._own[index]]):
            yield

    def _structure(self, index: int) -> _Returned:
        return self._returned.get(index, self._returned[0])

    def _wrap(self, index: int, hidden: torch.Tensor) -> Any:
        """What a block would return with these hidden states."""
        others, spec = self._structure(index)
        return pytree.tree_unflatten([hidden, *others], spec)

    def _check_shape(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if after.shape != before.shape or after.dtype != before.dtype:
            raise refuse_chain(
                self._model,
                f"has a block {self.names[index]!r} that turns {before.dtype} {tuple(before.shape)} into {after.dtype} "
                f"{tuple(after.shape)}",
            )

    def _refuse_more(self, index: int, number: int) -> ValueError:
        return refuse_chain(
            self._model,
            f"hands {self.names[index]!r} more than what {self.names[index - 1]!r} returned (argument {number} depends on hidden "
            "states too)"
            if index
            else f"hands {self.names[index]!r} something else when it runs again on the same batch (argument {number})",
        )

    def _refuse_writing(self, index: int) -> ValueError:
        return refuse_chain(
            self._model, f"has a block {self.names[index]!r} that changes what it is given (in place, or a cache that it fills)"
        )


@contextlib.contextmanager
def _instead(modules: list[nn.Module], forwards: list[Any]) -> Iterator[None]:
    """Exchange the `forward` of some modules; None for the class's. Own entries (accelerate sets one) are put back afterwards."""
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


def _autocast(devices: list[torch.device]) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes contexts in which autocast is as it is now."""
    kind = devices[0].type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def _is_inexact(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _poison(like: torch.Tensor) -> torch.Tensor:
    """NaN in the shape of a tensor, without its memory; a new object every time."""
    return like.new_full((1,), float("nan")).expand(like.shape)


def _spoilt(leaf: Any) -> Any:
    """In the place of what a block returned beside its hidden states: something else of its kind."""
    if _is_inexact(leaf):
        return _poison(leaf)
    return leaf.bitwise_not() if isinstance(leaf, torch.Tensor) else float("nan") if isinstance(leaf, float) else leaf


def _parts(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """The tensors and plain values inside an argument: of containers and other objects, such as a cache, all that they hold."""
    seen = set() if seen is None else seen
    if isinstance(value, (torch.Tensor, *_PLAIN)):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module) and not callable(value):
        seen.add(id(value))
        if isinstance(value, Mapping):
            inside: Any = [each for item in value.items() for each in item]
        else:
            inside = value if isinstance(value, (list, tuple, Set)) else vars(value).values() if hasattr(value, "__dict__") else ()
        yield len(inside)
        for each in inside:
            yield from _parts(each, seen)


def _versions(leaves: list[Any]) -> list[Any]:
    """What changes if somebody writes to arguments."""
    return [(id(p), version_of(p)) if isinstance(p, torch.Tensor) else p for leaf in leaves for p in _parts(leaf)]


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments hold the same, up to rounding; NaN is NaN."""
    first, second = list(_parts(a)), list(_parts(b))
    return len(first) == len(second) and all(map(_same_part, first, second))


def _same_part(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b or (a != a and b != b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    return torch.equal(a, b) or (_is_inexact(a) and _is_like(_likeness(a), _likeness(b), a.dtype))


def _likeness(x: torch.Tensor) -> torch.Tensor:
    """One number for every token of (…, d), from all of its entries: a random projection."""
    x = torch.view_as_real(x.detach()).flatten(-2) if x.is_complex() else x.detach()
    rows_nd = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    direction_d = torch.randn(rows_nd.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rows_nd.to(dtype) @ direction_d.to(rows_nd.device, dtype)


def _is_like(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether tokens differ by no more, on average, than rounding in a dtype may make them: relative to each of them."""
    if a.shape != b.shape:
        return False
    b = b.to(a.device)
    equal = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(equal, 0, (a - b).abs() / (a.abs() + b.abs())).nan_to_num(1)
    return apart.numel() == 0 or bool(apart.mean() <= torch.finfo(dtype).eps ** 0.5)


def _guess_hidden(leaves: list[Any], kwargs: Mapping[str, Any]) -> int | None:
    named = kwargs.get("hidden_states")
    if isinstance(named, torch.Tensor):
        return next(i for i, leaf in enumerate(leaves) if leaf is named)
    floating = (i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1)
    return next(floating, None)
