"""Comparing the arguments and results of block calls: equality up to rounding, detection of writes, and stand-in values."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import nn

from nullspace.model.sharded_tensors import version_of

# Types of values that a call cannot change.
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type, enum.Enum, torch.dtype, torch.device, torch.Size)


def is_inexact(value: Any) -> bool:
    """Whether this is a floating-point or complex tensor."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def nan_like(tensor: torch.Tensor) -> torch.Tensor:
    """NaN in the shape of a tensor, without its memory; a new object at every call."""
    return tensor.new_full((1,), float("nan")).expand(tensor.shape)


def altered(leaf: Any) -> Any:
    """A value of the same kind that the block did not return: NaN, or inverted bits."""
    if is_inexact(leaf):
        return nan_like(leaf)
    return leaf.bitwise_not() if isinstance(leaf, torch.Tensor) else float("nan") if isinstance(leaf, float) else leaf


def _content(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """The tensors and plain values in an argument, with the lengths of containers; looks into objects too, such as a cache."""
    seen = set() if seen is None else seen
    if isinstance(value, (torch.Tensor, *PLAIN)):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module) and not callable(value):
        seen.add(id(value))
        if isinstance(value, Mapping):
            inside: Any = [each for item in value.items() for each in item]
        else:
            inside = value if isinstance(value, (list, tuple, Set)) else vars(value).values() if hasattr(value, "__dict__") else ()
        yield len(inside)
        for each in inside:
            yield from _content(each, seen)


def versions(leaves: list[Any]) -> list[Any]:
    """A state of some arguments that differs after a write to them."""
    return [(id(p), version_of(p)) if isinstance(p, torch.Tensor) else p for leaf in leaves for p in _content(leaf)]


def same(a: Any, b: Any) -> bool:
    """Whether two arguments have equal content, up to rounding. NaN equals NaN."""
    first, second = list(_content(a)), list(_content(b))
    return len(first) == len(second) and all(map(_same_value, first, second))


def _same_value(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b or (a != a and b != b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    return torch.equal(a, b) or (is_inexact(a) and is_close(projection(a), projection(b), a.dtype))


def projection(x: torch.Tensor) -> torch.Tensor:
    """One number for every token of (…, d): the product with one random vector, the same for all tensors of this width."""
    x = torch.view_as_real(x.detach()).flatten(-2) if x.is_complex() else x.detach()
    rows_nd = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    direction_d = torch.randn(rows_nd.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rows_nd.to(dtype) @ direction_d.to(rows_nd.device, dtype)


def is_close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two projections of tensors of `dtype` agree: the mean of |a − b| / (|a| + |b|) is at most √eps."""
    if a.shape != b.shape:
        return False
    b = b.to(a.device)
    equal = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(equal, 0, (a - b).abs() / (a.abs() + b.abs())).nan_to_num(1)
    return apart.numel() == 0 or bool(apart.mean() <= torch.finfo(dtype).eps ** 0.5)
