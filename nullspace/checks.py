"""Checks of callers' arguments and of values from files. Errors name the argument or the field."""

from __future__ import annotations

import math
import numbers
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nullspace.errors import DamagedFileError, InputError, InputTypeError, MissingPackageError

if TYPE_CHECKING:
    import torch


def missing_package(what: str, extra: str, error: ImportError) -> MissingPackageError:
    """The error of an optional package that is not installed, or is too old.

    Args:
        what: needs the package.
        extra: of this distribution, that brings it: one of `project.optional-dependencies` in `pyproject.toml`.
        error: of the import.
    """
    if isinstance(error, MissingPackageError):
        return error
    return MissingPackageError(f"{what} needs more packages: pip install 'nullspace-lora[{extra}]' ({error})")


class Range(NamedTuple):
    """The real numbers that an argument takes, and their description in errors."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("a positive number", lambda value: 0.0 < value < math.inf)
NOT_NEGATIVE = Range("a number ≥ 0", lambda value: 0.0 <= value < math.inf)
FRACTION = Range("between 0 and 1", lambda value: 0.0 <= value <= 1.0)


def check_integer(name: str, value: Any, *, least: int | None = 1) -> int:
    """`value` as an `int`.

    Raises:
        TypeError: if it is not an integer of Python or numpy. `True`, 4.0 and "4" are not.
        ValueError: if it is smaller than `least` (None: no limit).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputTypeError(f"{name} must be an integer, not {value!r} ({type(value).__name__})")
    if least is not None and value < least:
        raise InputError(f"{name} must be at least {least}, not {value}")
    return int(value)


def check_between(name: str, value: Any, most: int, where: str = "") -> int:
    """`value` as an `int` from 1 to `most`; `where` is appended to the message.

    Raises:
        TypeError: as `check_integer`.
        ValueError: if it is out of range.
    """
    value = check_integer(name, value, least=None)
    if not 1 <= value <= most:
        raise InputError(f"{name} must be between 1 and {most}, not {value}{where}")
    return value


def check_real(name: str, value: Any, allowed: Range = POSITIVE) -> float:
    """`value` as a `float`.

    Raises:
        TypeError: if it is not a real number of Python or numpy. `True` and "4" are not.
        ValueError: if it is out of range or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputTypeError(f"{name} must be a number, not {value!r} ({type(value).__name__})")
    if not allowed.holds(float(value)):
        raise InputError(f"{name} must be {allowed.words}, not {value}")
    return float(value)


def check_one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise `ValueError`, naming the argument and the values that it takes, if `value` is not among them."""
    known = list(known)
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")


def check_device(device: torch.device | str) -> torch.device:
    """`device` as a `torch.device` that this machine has.

    Raises:
        ValueError: naming it, if PyTorch does not know it or cannot use it here, or if it has no float64.
    """
    import torch

    try:
        checked = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {str(device)!r} cannot be used here: PyTorch knows no such name. Give 'cpu' or 'cuda'") from None
    try:
        if checked.type == "meta":
            raise InputError("it holds no values")
        torch.empty(0, device=checked, dtype=torch.float64)  # of sums; Apple's GPUs have none
        if checked.type == "cuda" and checked.index is not None and checked.index >= torch.cuda.device_count():
            raise InputError(f"there are {torch.cuda.device_count()} CUDA devices")
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
        raise InputError(f"device {str(device)!r} cannot be used here: {reason}. Give 'cpu', or a device of this machine") from None
    return checked


# The largest integer that JSON readers with float64 numbers read exactly.
LARGEST = 2**53


class Field(NamedTuple):
    """One field of an object.

    Attributes:
        fits: whether a value is valid.
        what: description of valid values, for messages.
        required: whether the field must exist.
    """

    fits: Callable[[Any], bool]
    what: str
    required: bool = True


def whole(least: int = 0, most: int = LARGEST) -> Field:
    """An integer. True and False are not."""
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
    """`field`, or null."""
    return Field(lambda v: v is None or field.fits(v), f"{field.what} or null", field.required)


def optional(field: Field) -> Field:
    """`field`, which may be missing."""
    return field._replace(required=False)


def list_of(field: Field, *, least: int = 0, most: int | None = None, distinct: bool = False) -> Field:
    """A list of `least` to `most` values, each as `field`."""

    def fits(value: Any) -> bool:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            return False
        return all(map(field.fits, value)) and (not distinct or len(set(value)) == len(value))

    count = f"{least}" if least == most else f"at least {least}" if least else ""
    return Field(fits, " ".join(filter(None, ["a list of", count, "distinct" if distinct else "", f"values, each {field.what}"])))


def map_of(field: Field) -> Field:
    """An object with any keys, and values as `field`."""
    return Field(lambda v: isinstance(v, dict) and all(map(field.fits, v.values())), f"an object with values, each {field.what}")


def an_object() -> Field:
    """An object with any fields."""
    return Field(lambda v: isinstance(v, dict), "an object")


def file_name() -> Field:
    """The name of a file without a folder, so that it cannot point outside of its directory."""
    return Field(is_plain_name, "the plain name of a file")


def is_plain_name(value: Any) -> bool:
    """Whether this is a file name without a folder, on any operating system."""
    return isinstance(value, str) and value not in ("", ".", "..") and not any(c in "/\\\0:" for c in value)


def check_fields(value: Any, fields: Mapping[str, Field], where: object) -> None:
    """Check an object from a file.

    Args:
        value: the object.
        fields: name → field. Other fields are not checked.
        where: file, and position in it, for the message.

    Raises:
        ValueError: naming `where` and the field.
    """
    if not isinstance(value, Mapping):
        raise DamagedFileError(f"{where} should be an object, not {shown(value)}")
    for name, field in fields.items():
        if name not in value:
            if field.required:
                raise DamagedFileError(f"{where}: {name!r} is missing")
        elif not field.fits(value[name]):
            raise DamagedFileError(f"{where}: {name!r} should be {field.what}, not {shown(value[name])}")


def check_tensor(
    tensors: Mapping[str, torch.Tensor], name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype], where: object
) -> torch.Tensor:
    """One tensor of a file, checked: of this shape, one of these dtypes, and finite (unless it is on the meta device).

    Raises:
        ValueError: naming `where` and the tensor.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise DamagedFileError(f"{where}: the tensor {name!r} is missing")
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise DamagedFileError(
            f"{where}: the tensor {name!r} should be {tuple(shape)} {wanted}, not {tuple(tensor.shape)} {tensor.dtype}"
        )
    if not tensor.is_meta and tensor.numel() > 0 and not all(math.isfinite(float(end)) for end in tensor.aminmax()):
        raise DamagedFileError(f"{where}: the tensor {name!r} holds NaN or Inf")
    return tensor


def shown(value: Any) -> str:
    """A short text for a value of any size and depth."""
    return reprlib.repr(value)
