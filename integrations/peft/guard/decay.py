"""`decay_to_start`: decoupled weight decay towards what an adapter started as, in place of zero."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from nullspace.checks import NOT_NEGATIVE, check_real
from nullspace.errors import AdapterWarning
from nullspace.integrations.peft.guard.adapted import Adapted, Initial, adapted_layers, start_of
from nullspace.integrations.peft.guard.local import rows_here
from nullspace.integrations.peft.guard.optimizers import innermost
from nullspace.model.sharded_tensors import is_dtensor, whole


def decay_to_start(
    peft_model: PeftModel, rate: float, optimizer: Any = None, *, adapter_name: str | None = None, initial: Initial = None
) -> StartDecay:
    """Before every step p ← p − lr · rate · (p − p₀) for A and B, with the learning rate of p's own group at that step.

    It is AdamW's weight decay with the start p₀ in the place of zero (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, line
    12), for any optimizer. If the base is a residual, W₀ − s·B₀A₀, decay towards zero pulls the model towards the residual, which
    is none; decay towards A₀ and B₀ pulls it towards W₀. The optimizer's own `weight_decay` must be 0 for A and B.

    Args:
        peft_model: with the adapter, after `confine`, which changes the A of a plain LoRA. If it is sharded by FSDP2, all ranks
            have to call this.
        rate: λ, at least 0.
        optimizer: to hook into, after `fully_shard`. Without it, give the result to a Trainer as a callback.
        adapter_name: of the adapter; by default the active one.
        initial: A₀ and B₀, as in `Gauge`; by default, of a residual base as there, and otherwise what A and B are now (a Trainer
            that resumes loads its checkpoint later).

    Returns:
        The `StartDecay`, a callback of transformers' Trainer.

    Raises:
        TypeError: if the model is no `PeftModel`, or the rate is no number.
        ValueError: for a negative rate; as `Gauge` for the adapter; for an optimizer that takes no hooks (DeepSpeed's).

    Warns:
        UserWarning: if the optimizer has a weight decay of its own for A or B.
    """
    rate = check_real("rate", rate, NOT_NEGATIVE)
    layers = adapted_layers(peft_model, adapter_name)
    start = start_of(peft_model, layers, initial)
    starts = {}
    for each in layers:
        factors = start.of(each) or (whole(each.a).detach().clone(), whole(each.b).detach().clone())
        starts[each] = tuple(factor.to(each.a.dtype) for factor in factors)
    decay = StartDecay(rate, starts)
    return decay if optimizer is None else decay.attach(optimizer)


class StartDecay(TrainerCallback):
    """Decay towards an adapter's start, as `decay_to_start` returns it."""

    def __init__(self, rate: float, starts: dict[Adapted, tuple[torch.Tensor, ...]]) -> None:
        self._rate, self._starts = rate, starts
        self._handles: list[Any] = []

    def attach(self, optimizer: Any) -> StartDecay:
        """Decay before every step of an optimizer, until `detach`.

        Raises:
            ValueError: for one that takes no hooks.
        """
        inner = innermost(optimizer)
        towards = {}
        for each, factors in self._starts.items():
            for parameter, factor in zip((each.a, each.b), factors, strict=True):
                towards[id(parameter)] = rows_here(parameter, factor.to(parameter.device))
        held = [group for group in inner.param_groups if any(id(parameter) in towards for parameter in group["params"])]
        own = {float(group.get("weight_decay") or 0) for group in held} - {0.0}
        if own:
            warnings.warn(
                f"the optimizer's own weight_decay={max(own):g} pulls A and B towards zero: set it to 0 for them",
                AdapterWarning,
                stacklevel=2,
            )

        @torch.no_grad()
        def decay(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in towards:
                        local = parameter.to_local() if is_dtensor(parameter) else parameter
                        local.lerp_(towards[id(parameter)], self._rate * float(group["lr"]))

        self._handles.append(inner.register_step_pre_hook(decay))
        return self

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        """transformers' Trainer: hook into its optimizer, which there is only now."""
        self.detach()
        self.attach(optimizer)
