"""Triton kernels on plain tensors. Each has a twin in `naive.py`, a few lines of torch that define what it must compute.

Triton is imported when a kernel is first accessed: a machine without it can import this package, and `unavailable` returns what is
missing.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from nullspace.checks import missing_package

_OPS = {
    "syrk_accumulate": "syrk",
    "syrk_accumulate_rows": "selected",
    "syrk_accumulate_grouped": "grouped",
    "syrk_accumulate_rows_grouped": "grouped",
    "sum_rows_grouped": "grouped",
    "stage_rows": "stage",
    "zero_rows": "stage",
}
# The oldest Triton that compiles all of the kernels, and the oldest device whose tensor cores take bfloat16.
TRITON_VERSION = (3, 5)
CAPABILITY = (8, 0)

__all__ = [*_OPS, "unavailable"]


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, in a few words; None if they can.

    The first call for a device launches every kernel of a run once, on a few numbers, and compares what it computes: Triton may
    lack a C compiler, or not support the device, and a kernel that fails must not do so in the midst of a forward pass.
    """
    if device.type != "cuda":
        return f"{device.type} is not a CUDA device"
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {CAPABILITY[0]}.{CAPABILITY[1]}"
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install 'nullspace-lora[triton]')"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < TRITON_VERSION:
        return f"Triton {triton.__version__} is older than {TRITON_VERSION[0]}.{TRITON_VERSION[1]}"
    return _launch_failure(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)


@functools.cache
def _launch_failure(device: torch.device) -> str | None:
    """The first kernel of a run that fails on a device, and why; None if all run. Once for each device."""
    failure: str | None = importlib.import_module(f"{__name__}.probe").first_failure(device)
    return failure


def __getattr__(name: str) -> Any:
    if name in _OPS:
        try:
            return getattr(importlib.import_module(f"{__name__}.{_OPS[name]}"), name)
        except ImportError as error:
            raise missing_package(f"{__name__}.{name}", "triton", error) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
