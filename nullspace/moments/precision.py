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
from nullspace.moments.sums_grouped import GroupedTritonSums
from nullspace.moments.sums_qr import QrSums
from nullspace.moments.sums_torch import Probe, TorchSums
from nullspace.moments.sums_triton import Float64Sums, TritonSums

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
    if _has_kernels(device, precision):
        return TritonSums(d_in, device)
    return _plain_sums(d_in, device, precision, True)


def new_group(groups: int, d_in: int, device: torch.device, precision: str) -> GroupedTritonSums | list[Sums]:
    """Empty sums of several groups of similar tokens: on a CUDA device, for grouped launches; elsewhere one for each group.

    Warns:
        UserWarning: as `new_sums`.
    """
    if groups > 1 and _has_kernels(device, precision):
        return GroupedTritonSums(groups, d_in, device)
    if groups == 1:
        return [new_sums(d_in, device, precision)]
    probe = Probe()
    return [_plain_sums(d_in, device, precision, probe) for _ in range(groups)]


def _has_kernels(device: torch.device, precision: str) -> bool:
    if device.type != "cuda" or precision not in ("auto", "mixed"):
        return False
    obstacle = csrc_triton.unavailable(device)
    if obstacle is not None:
        _warn_of_fallback(obstacle)
    return obstacle is None


def _plain_sums(d_in: int, device: torch.device, precision: str, probe: bool | Probe) -> Sums:
    if precision == "qr":
        return QrSums(d_in, device)
    if precision == "fp64" and device.type == "cuda":
        return Float64Sums(d_in, device)
    is_probing = precision == "auto" and device.type == "cpu"
    return TorchSums(d_in, device, mixed=precision != "fp64", probe=probe if is_probing else False)


@functools.cache
def _warn_of_fallback(obstacle: str) -> None:
    warnings.warn(
        f"{obstacle}: second moments are summed by PyTorch's matrix products, which is slower", ResourceUseWarning, stacklevel=5
    )
