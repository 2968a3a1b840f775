"""What simulated devices must know of PyTorch's operations: which read, write, wait, or touch no memory, and which a CPU lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

aten = torch.ops.aten

# Operations that bring a number, or the size of their result, to the host.
READING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.unique_consecutive,
    aten.bincount, aten.equal, aten._linalg_check_errors, aten._linalg_svd, aten.nanmedian, aten.linalg_lstsq,
}  # fmt: skip
# Operations whose tensors may be on several devices.
MIXING = {aten._to_copy, aten.copy_, aten.set_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index, aten._unsafe_index_put}


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation; of one that a CPU does not have, by another."""
    if func is aten.histc.default and not args[0].is_floating_point():
        return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    if func in (aten.mm.dtype, aten.bmm.dtype):
        left, right, dtype = args
        return func.overloadpacket(left.to(dtype), right.to(dtype))
    return func(*args, **kwargs)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)


def mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """An operation's results with every tensor replaced."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(mapped(each, function) for each in value) if isinstance(value, (tuple, list)) else value


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """The identities of the tensors that an operation writes to."""
    result = set()
    for place, name in _writing(func):
        result |= {id(leaf) for leaf in tensors(args[place] if place < len(args) else kwargs.get(name))}
    return result


@functools.cache
def _writing(func: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(place, each.name) for place, each in arguments if each.alias_info is not None and each.alias_info.is_write]


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operation touches no memory."""
    returns = func._schema.returns
    own = (aten.detach, aten.lift_fresh, aten.alias, aten._unsafe_view, aten._reshape_alias)
    views = bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)
    return views or func.overloadpacket in own
