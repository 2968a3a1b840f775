"""Precisions: which one a layer gets, and which sums implement it on a device."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping

import torch

import nullspace.csrc_triton as csrc_triton
from nullspace.errors import ResourceUseWarning
from nullspace.moments.sums import Sums
from nullspace.moments.sums_qr import QrSums
from nullspace.moments.sums_torch import TorchSums
from nullspace.moments.sums_triton import TritonSums

PRECISIONS = ("auto", "mixed", "fp64", "qr")


def precision_of(name: str, precision: str | Mapping[str, str]) -> str:
    """The precision of one layer: of a mapping the value of the first regular expression that matches its name, else `"auto"`."""
    if isinstance(precision, str):
        return precision
    return next((value for pattern, value in precision.items() if re.fullmatch(pattern, name)), "auto")


def new_sums(d_in: int, device: torch.device, precision: str) -> Sums:
    """Empty sums.

    Warns:
        UserWarning: once for each reason, if the kernels cannot run on a CUDA device; PyTorch's products are used.
    """
    if device.type == "cuda" and precision in ("auto", "mixed"):
        obstacle = csrc_triton.unavailable(device)
        if obstacle is None:
            return TritonSums(d_in, device)
        _warn_of_fallback(obstacle)
    if precision == "qr":
        return QrSums(d_in, device)
    return TorchSums(d_in, device, mixed=precision != "fp64", probe=precision == "auto" and device.type == "cpu")


@functools.cache
def _warn_of_fallback(obstacle: str) -> None:
    warnings.warn(
        f"{obstacle}: second moments are summed by PyTorch's matrix products, which is slower", ResourceUseWarning, stacklevel=4
    )
