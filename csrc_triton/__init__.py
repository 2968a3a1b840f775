"""Triton kernels on plain tensors. Each has a twin in `naive.py`, a few lines of torch that define what it must compute.

Triton is imported when a kernel is first accessed: a machine without it can import this package, and `unavailable` returns what is
missing.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

_OPS = {
    "syrk_accumulate": "syrk",
    "syrk_accumulate_rows": "syrk",
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
    """Why the kernels cannot run on `device`, in a few words; None if they can."""
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
        return "Triton is not installed (pip install triton)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < TRITON_VERSION:
        return f"Triton {triton.__version__} is older than {TRITON_VERSION[0]}.{TRITON_VERSION[1]}"
    return _launch_failure(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)


@functools.cache
def _launch_failure(device: torch.device) -> str | None:
    """The error of launching two small kernels, None if they run: Triton may lack a C compiler, or not support the device."""
    ops = importlib.import_module(f"{__name__}.syrk"), importlib.import_module(f"{__name__}.stage")
    x = torch.zeros(1, 1, dtype=torch.bfloat16, device=device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        ops[0].syrk_accumulate_rows(torch.zeros(1, 1, dtype=torch.float64, device=device), x, rows, rows[0])
        ops[1].zero_rows(x, rows, rows[0])
    except Exception as error:
        return f"Triton cannot launch a kernel ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})"
    return None


def __getattr__(name: str) -> Any:
    if name in _OPS:
        return getattr(importlib.import_module(f"{__name__}.{_OPS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
