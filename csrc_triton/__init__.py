"""Kernels on plain tensors, each beside its twin in `naive.py`, the few lines of torch that say what it must compute.

Nothing here imports Triton before a kernel is asked for: a machine without it can import everything, and `unavailable` says what is
missing.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

_OPS = {"syrk_accumulate": "syrk", "syrk_accumulate_rows": "syrk", "stage_rows": "stage", "zero_rows": "stage"}
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
    return None


def __getattr__(name: str) -> Any:
    if name in _OPS:
        return getattr(importlib.import_module(f"{__name__}.{_OPS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
