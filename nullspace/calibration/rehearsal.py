"""The check that a model's blocks are a chain (`nullspace.calibration.chain`), on the first batch, before any sum is yielded.

1. The model's own forward pass runs. Each block is called twice on copies of its arguments: it must leave them unchanged, and
   return the same both times. The structure of its output is recorded.
2. The same batch runs with stand-ins for the blocks, which return NaN. Other arguments that depend on hidden states then differ.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from nullspace.calibration.chain import BlockCalls, Chain, Output
from nullspace.calibration.comparison import PLAIN, altered, is_close, nan_like, projection, same, versions
from nullspace.model.batches import Call
from nullspace.model.blocks import refuse_chain
from nullspace.model.sharded import class_of, is_model_sharded
from nullspace.model.sharded_tensors import version_of
from nullspace.model.weights import Loaded, is_loaded

# (id, version) of an object → its copy.
Copies = dict[tuple[int, int | None], Any]


def rehearse(
    chain: Chain, call: Call, options: Mapping[str, Any], load: Callable[[int], Loaded], needed: Callable[[], int]
) -> None:
    """Run one batch through the model twice, to record what blocks return and to check that they are a chain.

    A block whose weights are on the disk is represented by the first one of its class; if the model's weights are sharded over
    ranks, the first block represents all.

    Args:
        chain: the blocks; gets `outputs`, `reference` and `rehearsed`, and leaves out blocks that this batch does not reach.
        call: the batch.
        options: more arguments of the model.
        load: the weights of a block, by its index in the chain.
        needed: how many blocks of the chain will be called, if all targets outside of blocks are called ahead of them.

    Raises:
        ValueError: naming the block, if the blocks are not a chain.
    """
    chain.may_skip = not is_model_sharded(chain.model)
    rehearsal, made = _first_pass(chain, call, options, load, needed)
    chain.may_skip = False
    reached = made.indices[-1] + 1 if made.stopped else len(chain.names)
    skipped = [name for index, name in enumerate(chain.names[:reached]) if index not in made.indices]
    if skipped:
        chain.leave_out(skipped)
        rehearsal, made = _first_pass(chain, call, options, load, needed)
    # Behind its last block a model may call the first one again, or another chain.
    on = made.stopped and len(made.indices) == len(chain.names)
    with _same_random_numbers(chain.devices):
        chain.run(call, options, rehearsal.stand_in, rehearsal.compare_target, None if on else needed(), to_head=on)
    chain.rehearsed = call.number


def _first_pass(
    chain: Chain, call: Call, options: Mapping[str, Any], load: Callable[[int], Loaded], needed: Callable[[], int]
) -> tuple[_Rehearsal, BlockCalls]:
    """The first pass, and its calls; `ValueError` if there are none."""
    rehearsal = _Rehearsal(chain, load(0))
    with _same_random_numbers(chain.devices):
        made = chain.run(call, options, rehearsal.real, rehearsal.record_target, needed())
    if not made.indices:
        raise refuse_chain(chain.model, f"calls none of its blocks {chain.names[0]!r} … {chain.names[-1]!r} in batch {call.number}")
    return rehearsal, made


class _Rehearsal:
    """The two passes of `rehearse`."""

    def __init__(self, chain: Chain, first: Loaded) -> None:
        self._chain, self._first = chain, first
        self._kept: list[
            tuple[list[Any], Any, int]
        ] = []  # copies of the blocks' arguments, their structure, index of hidden states
        self._inputs: list[tuple[str, torch.Tensor]] = []  # of the targets behind the blocks
        self._copies: Copies = {}
        self._representative = _representatives(chain)
        self._autocast = _autocast(chain.devices[0].type)
        self._all_real = True  # whether no block has been represented so far
        self._last: Any = None  # the last block's output

    # ---- the first pass

    def real(self, made: BlockCalls, index: int, leaves: list[Any], spec: Any, hidden: int) -> Any:
        """Call the block, or its representative's stand-in, and keep copies of its arguments."""
        chain = self._chain
        copies = [None if n == hidden and index else self._copy(leaf, self._copies) for n, leaf in enumerate(leaves)]
        self._kept.append((copies, spec, hidden))
        if self._representative[index] == index:
            output = self._call_twice(index, leaves, spec, hidden)
            if self._all_real:
                chain.reference[index] = projection(pytree.tree_leaves(output)[0])
        else:
            self._all_real = False
            chain.outputs[index] = chain.outputs[self._representative[index]]
            output = chain.wrap(index, leaves[hidden].clone())
        self._last = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(leaves[hidden].device), output)
        return self._last

    def record_target(self, name: str, x: torch.Tensor) -> None:
        """Record the input of a target behind the blocks."""
        self._inputs.append((name, projection(x)))

    def _call_twice(self, index: int, leaves: list[Any], spec: Any, hidden: int) -> Any:
        """Call a block twice on copies, the second time as outside of the model; returns the first output."""
        chain, name = self._chain, self._chain.names[index]
        weights = self._first if index == 0 else Loaded(chain.blocks[index], chain.devices[index], within=chain.model)
        try:
            with weights, chain.own_forward(index):
                output = self._call_on_copies(index, leaves, spec)
                try:
                    with self._autocast():
                        second = self._call_on_copies(index, leaves, spec)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    raise refuse_chain(chain.model, f"has a block {name!r} that cannot be called again: {error}") from error
        finally:
            if index:
                weights.close()
        returned, *others = pytree.tree_leaves(output) or [None]
        if not isinstance(returned, torch.Tensor):
            raise refuse_chain(chain.model, f"has a block {name!r} that returns {type(output).__name__}, not hidden states")
        chain.check_shape(index, leaves[hidden], returned)
        again = pytree.tree_leaves(second)[0]
        if again.shape != returned.shape or not is_close(projection(again), projection(returned), returned.dtype):
            raise refuse_chain(
                chain.model,
                f"has a block {name!r} that returns something else when it is called again with the same arguments: it keeps "
                "something from one call for the next, draws random numbers, or depends on where it is called (autocast)",
            )
        chain.outputs[index] = Output([altered(leaf) for leaf in others], pytree.tree_structure(output))
        return output

    def _call_on_copies(self, index: int, leaves: list[Any], spec: Any) -> Any:
        copies: Copies = {}
        given = [self._copy(leaf, copies, self._chain.devices[index]) for leaf in leaves]
        before = versions(given)
        args, kwargs = pytree.tree_unflatten(given, spec)
        output = self._chain.blocks[index](*args, **kwargs)
        after, spec_after = pytree.tree_flatten((args, kwargs))
        same_objects = spec_after == spec and all(a is b for a, b in zip(after, given, strict=True))
        if not same_objects or versions(given) != before or not all(map(same, given, leaves)):
            raise self._chain.refuse_writing(index)
        return output

    def _copy(self, leaf: Any, copies: Copies, device: torch.device | None = None) -> Any:
        """A copy of an argument. One object has one copy, until it is written to."""
        if isinstance(leaf, PLAIN) or callable(leaf):
            return leaf
        key = (id(leaf), version_of(leaf) if isinstance(leaf, torch.Tensor) else None)
        if key not in copies:
            if isinstance(leaf, torch.Tensor):
                made = leaf.detach().clone()
                copies[key] = made if device is None else made.to(device)
            else:
                model = self._chain.model
                weights = {id(t): t for t in (*model.parameters(), *model.buffers())}
                try:
                    copies[key] = copy.deepcopy(leaf, memo=weights)
                except Exception:  # an object's own copy method may raise anything
                    copies[key] = leaf
        return copies[key]

    # ---- the second pass

    def stand_in(self, made: BlockCalls, index: int, leaves: list[Any], spec: Any, hidden: int) -> Any:
        """Return NaN, after the arguments were compared with those of the first pass."""
        chain = self._chain
        if index >= len(self._kept):
            raise chain.refuse_dependent(index, hidden)
        before, spec_before, hidden_before = self._kept[index]
        dependent = made.find_dependent(leaves, hidden) if index else None
        nan = made.find_nan()
        if dependent is None and nan is not None:
            dependent = nan[1]
        if spec != spec_before or hidden != hidden_before:
            dependent = hidden
        for number, (leaf, kept) in enumerate(zip(leaves, before, strict=spec == spec_before)):
            if dependent is None and not (number == hidden and index) and not same(leaf, kept):
                dependent = number
        if dependent is not None:
            raise chain.refuse_dependent(index, dependent)
        return self._last if index + 1 == len(chain.blocks) else chain.wrap(index, nan_like(leaves[hidden]))

    def compare_target(self, name: str, x: torch.Tensor) -> None:
        """Raise `ValueError` if a target behind the blocks gets another input than in the first pass."""
        chain = self._chain
        expected = self._inputs.pop(0) if self._inputs else ("", x)
        if expected[0] != name or not is_close(projection(x), expected[1], x.dtype):
            raise refuse_chain(chain.model, f"gives {name!r}, behind its blocks, more than what {chain.names[-1]!r} returned")


def _representatives(chain: Chain) -> list[int]:
    """For every block, the index of the block that is called in its place."""
    if is_model_sharded(chain.model):
        return [0] * len(chain.blocks)
    first: dict[type, int] = {}
    return [
        index if is_loaded(block) and index else first.setdefault(class_of(block), index)
        for index, block in enumerate(chain.blocks)
    ]


@contextlib.contextmanager
def _same_random_numbers(devices: list[torch.device]) -> Iterator[None]:
    """Context manager: restores the states of random generators at the end."""
    with torch.random.fork_rng(devices=list({device.index or 0 for device in devices if device.type == "cuda"})):
        yield


def _autocast(kind: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A function that makes context managers with the autocast settings of now."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
