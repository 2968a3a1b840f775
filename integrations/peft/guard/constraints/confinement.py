"""`Confinement`: a constraint on an adapter in training, as a callback, a hook and a context manager."""

from __future__ import annotations

import warnings
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from peft import PeftModel
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from nullspace.errors import AdapterWarning, PrecisionWarning
from nullspace.integrations.peft.guard.adapted import Adapted
from nullspace.integrations.peft.guard.constraints.held import Held
from nullspace.integrations.peft.guard.optimizers import innermost
from nullspace.model.sharded import reshard_model


class Confinement(TrainerCallback):
    """A constraint on an adapter in training, as `confine` and `oplora` return it.

    Attributes:
        allowed: layer → `Allowed(directions, d_in, leak)` of A: k, d_in, and the joint leak of the k directions. Layers whose A is
            not held are left out.
        allowed_outputs: layer → the same of B, with d_out in the place of d_in. Empty for `confine`.
    """

    def __init__(self, peft_model: PeftModel, held: list[Held], *, gradients: bool = False) -> None:
        self._model, self._held, self._gradients = peft_model, held, gradients
        self._handles: list[Any] = []
        self._watched: list[Any] = []
        self.allowed, self.allowed_outputs = (
            MappingProxyType({each.name: part.allowed for part in held if part.factor == factor for each in part.layers})
            for factor in ("lora_A", "lora_B")
        )
        for part in held:
            part.begin()

    def project(self) -> None:
        """Take back what the steps since the last call have changed elsewhere.

        Collective under DeepSpeed's ZeRO, and under FSDP2 where B is held.
        """
        self._reshard()
        for part in self._held:
            part.project()

    def rebase(self) -> None:
        """Take A and B as they are now for the reference, after loading a checkpoint. A Trainer that resumes does this by itself.

        A run that was confined by the same directions before continues in them: it has left its start in no other direction.
        """
        self._reshard()
        for part in self._held:
            part.rebase()

    def attach(self, optimizer: Any) -> Confinement:
        """Project after every step of an optimizer, as long as `detach` is not called.

        Raises:
            ValueError: for one that is no `torch.optim.Optimizer` and wraps none: call `project` after its step.
        """
        self._handles.append(innermost(optimizer).register_step_post_hook(lambda *_: self.project()))
        self._watch()
        return self

    def detach(self) -> None:
        """Remove the hooks of `attach` and of the `with` statement."""
        self._unwatch()
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Confinement:
        if not self._handles:
            self._handles.append(register_optimizer_step_post_hook(self._after_any))
            self._watch()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def _after_any(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) in stepped for part in self._held for parameter in part.parameters):
            self.project()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """transformers' Trainer: a checkpoint may have been loaded, and the model may have been sharded."""
        self.rebase()
        self._watch()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """transformers' Trainer: after every step."""
        self.project()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """transformers' Trainer: gradients of another training are left alone."""
        if not self._handles:
            self._unwatch()

    def _watch(self) -> None:
        """Project the gradients of the parameters as they are now: FSDP2 and others replace them."""
        self._unwatch()
        if self._gradients:
            self._reshard()
            self._watched = [handle for part in self._held for handle in part.watch()]

    def _unwatch(self) -> None:
        while self._watched:
            self._watched.pop().remove()

    def _reshard(self) -> None:
        if torch.distributed.is_initialized():
            reshard_model(self._model)


def trained_in(layers: tuple[Adapted, ...], factor: str) -> list[Adapted]:
    """The layers whose A or B trains.

    Warns:
        UserWarning: of the caller's caller, if it does not train in some or all layers, or if it is in 16 bits.
    """
    trained = [each for each in layers if not each.freezes(factor)]
    frozen = [each.name for each in layers if each.freezes(factor)]
    letter = factor[-1]
    if frozen:
        rest = f"{len(trained)} of {len(layers)} layers are confined" if trained else "there is nothing to confine"
        by = " (freeze_a)" if letter == "A" else ""
        warnings.warn(
            f"{letter} does not train{by} in {len(frozen)} layers, {frozen[0]!r} the first: {rest}", AdapterWarning, stacklevel=3
        )
    if any(each.factor(factor).dtype in (torch.float16, torch.bfloat16) for each in trained):
        warnings.warn(
            f"{letter} is in {trained[0].factor(factor).dtype}, and what rounding adds to it reads all directions: keep the "
            "adapter in float32 (get_peft_model does so unless autocast_adapter_dtype=False) and the rest in 16 bits",
            PrecisionWarning,
            stacklevel=3,
        )
    return trained
