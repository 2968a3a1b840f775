"""What values read from files have to look like: a table of fields for each kind of file, and one error that names the field."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

# Integers beyond this are none that JSON readers of other languages would give back, and no count of ours.
LARGEST = 2**53


class Field(NamedTuple):
    """One field of an object.

    Attributes:
        fits: whether a value is right.
        what: what it should be, for messages.
        required: whether it has to be there.
    """

    fits: Callable[[Any], bool]
    what: str
    required: bool = True


def whole(least: int = 0, most: int = LARGEST) -> Field:
    """An integer; True and False are none."""
    return Field(lambda v: type(v) is int and least <= v <= most, f"an integer between {least} and {most}")


def finite(least: float = -math.inf, most: float = math.inf) -> Field:
    """A finite number."""
    limits = "" if (least, most) == (-math.inf, math.inf) else f" between {least:g} and {most:g}"
    least, most = max(least, -sys.float_info.max), min(most, sys.float_info.max)
    return Field(lambda v: type(v) in (int, float) and least <= v <= most, f"a finite number{limits}")


def text() -> Field:
    """A string."""
    return Field(lambda v: isinstance(v, str), "a string")


def flag() -> Field:
    """True or False."""
    return Field(lambda v: isinstance(v, bool), "true or false")


def one_of(*values: str) -> Field:
    """One of some strings."""
    return Field(lambda v: isinstance(v, str) and v in values, f"one of {', '.join(map(repr, values))}")


def or_none(field: Field) -> Field:
    """The same, or null."""
    return Field(lambda v: v is None or field.fits(v), f"{field.what} or null", field.required)


def optional(field: Field) -> Field:
    """The same, or not there at all."""
    return field._replace(required=False)


def list_of(field: Field, *, least: int = 0, most: int | None = None, distinct: bool = False) -> Field:
    """A list of such values."""

    def fits(value: Any) -> bool:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            return False
        return all(map(field.fits, value)) and (not distinct or len(set(value)) == len(value))

    count = f"{least}" if least == most else f"at least {least}" if least else ""
    return Field(fits, " ".join(filter(None, ["a list of", count, "distinct" if distinct else "", f"values, each {field.what}"])))


def map_of(field: Field) -> Field:
    """An object whose values are such."""
    return Field(lambda v: isinstance(v, dict) and all(map(field.fits, v.values())), f"an object with values, each {field.what}")


def an_object() -> Field:
    """An object, whose fields are checked elsewhere."""
    return Field(lambda v: isinstance(v, dict), "an object")


def file_name() -> Field:
    """The name of a file in a directory: no path, so that it cannot lead elsewhere."""
    return Field(is_plain_name, "the plain name of a file")


def is_plain_name(value: Any) -> bool:
    """Whether this is a file's name without any folder, on any system."""
    return isinstance(value, str) and value not in ("", ".", "..") and not any(c in "/\\\0:" for c in value)


def check_fields(value: Any, fields: Mapping[str, Field], where: object) -> None:
    """Check an object that was read.

    Args:
        value: what was read.
        fields: name → what it should be. Others are let through.
        where: file, and place in it, for the message.

    Raises:
        ValueError: naming the place and the field.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} should be an object, not {shown(value)}")
    for name, field in fields.items():
        if name not in value:
            if field.required:
                raise ValueError(f"{where}: {name!r} is missing")
        elif not field.fits(value[name]):
            raise ValueError(f"{where}: {name!r} should be {field.what}, not {shown(value[name])}")


def check_tensor(
    tensors: Mapping[str, torch.Tensor], name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype], where: object
) -> torch.Tensor:
    """One tensor of a file: of this shape and one of these dtypes, and finite (unless it is on the meta device).

    Raises:
        ValueError: naming the place and the tensor.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"{where}: the tensor {name!r} is missing")
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{where}: the tensor {name!r} should be {tuple(shape)} {wanted}, not {tuple(tensor.shape)} {tensor.dtype}"
        )
    if not tensor.is_meta and tensor.numel() > 0 and not all(math.isfinite(float(end)) for end in tensor.aminmax()):
        raise ValueError(f"{where}: the tensor {name!r} holds NaN or Inf")
    return tensor


def shown(value: Any) -> str:
    """A value of any size and depth, in a few characters."""
    return reprlib.repr(value)
