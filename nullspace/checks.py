"""Checks of numbers and devices that a caller gives: errors name the argument, before any work."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Range(NamedTuple):
    """Which real numbers an argument takes, and how an error describes them."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("a positive number", lambda value: 0.0 < value < math.inf)
NOT_NEGATIVE = Range("a number ≥ 0", lambda value: 0.0 <= value < math.inf)
FRACTION = Range("between 0 and 1", lambda value: 0.0 <= value <= 1.0)


def check_integer(name: str, value: Any, *, least: int | None = 1) -> int:
    """`value` as an `int`.

    Raises:
        TypeError: if it is not an integer of Python or numpy. `True`, 4.0 and "4" are not.
        ValueError: if it is smaller than `least`, if there is one.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, not {value!r} ({type(value).__name__})")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return int(value)


def check_between(name: str, value: Any, most: int, where: str = "") -> int:
    """`value` as an `int` from 1 to `most`; `where` ends the message.

    Raises:
        TypeError: as `check_integer`.
        ValueError: if it is out of range.
    """
    value = check_integer(name, value, least=None)
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be between 1 and {most}, not {value}{where}")
    return value


def check_real(name: str, value: Any, allowed: Range = POSITIVE) -> float:
    """`value` as a `float`.

    Raises:
        TypeError: if it is no real number of Python or numpy. `True` and "4" are not.
        ValueError: if it is out of range; NaN always is.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r} ({type(value).__name__})")
    if not allowed.holds(float(value)):
        raise ValueError(f"{name} must be {allowed.words}, not {value}")
    return float(value)


def check_device(device: torch.device | str) -> torch.device:
    """A device that this machine has.

    Raises:
        ValueError: naming it, if PyTorch does not know it or cannot use it here.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {str(device)!r} cannot be used here: PyTorch knows no such name. Give 'cpu' or 'cuda'") from None
    try:
        if found.type == "meta":
            raise ValueError("it holds no values")
        torch.empty(0, device=found)
        if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
            raise ValueError(f"there are {torch.cuda.device_count()} CUDA devices")
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}. Give 'cpu', or a device of this machine") from None
    return found
