"""Optimizers and schedulers inside of what accelerate wraps around them."""

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
            f"{type(seen).__name__} takes no hooks that see whole parameters. Give a `Confinement` to the Trainer as a "
            "callback, or call its project() after each step; decay_to_start needs an optimizer of PyTorch"
        )
    return seen


def slow_down(optimizer: Any, scheduler: Any, by: float) -> None:
    """Multiply the learning rates by `by`: those of now, and those that the scheduler computes from its base rates."""
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr"):
            if isinstance(group.get(key), torch.Tensor):
                group[key].mul_(by)
            elif key in group:
                group[key] *= by
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * by for rate in scheduler.base_lrs]
