"""The optimizer inside of what accelerate wraps around it."""

from __future__ import annotations

from typing import Any

import torch

from nullspace.errors import InputError


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The `torch.optim.Optimizer` that takes the steps.

    Raises:
        ValueError: if there is none that hooks can be registered on; for DeepSpeed's, which step parts of parameters.
    """
    seen = optimizer
    while type(seen).__module__.startswith("accelerate") and hasattr(seen, "optimizer"):
        seen = seen.optimizer
    if type(seen).__module__.startswith("deepspeed") or not isinstance(seen, torch.optim.Optimizer):
        raise InputError(
            f"{type(seen).__name__} takes no hooks: give this to the Trainer as a callback, or call it after each step"
        )
    return seen
