"""`ForgettingCallback`: drift and KL of an adapter in training, in a Trainer's logs and in the adapter's card; and a budget."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from nullspace.artifacts.covariances import Covariances
from nullspace.checks import Range, check_integer, check_one_of, check_real
from nullspace.distributed import Job
from nullspace.errors import AdapterWarning, InputError
from nullspace.integrations.peft.folders.cards import code
from nullspace.integrations.peft.guard.adapted import Initial, Start, adapted_layers, start_of
from nullspace.integrations.peft.guard.gauge import Drift, Gauge
from nullspace.integrations.peft.guard.kl import KlToBase
from nullspace.integrations.peft.guard.optimizers import slow_down
from nullspace.integrations.peft.origin import freeze_recorded
from nullspace.integrations.peft.save import add_section
from nullspace.model.wrappers import unwrap

ACTIONS = ("stop", "slow", "warn")
# Heading of the section of the card.
HEADING = "## Drift from the base model"
_SLOWER = Range("between 0 and 1, without them", lambda value: 0.0 < value < 1.0)


class Reading(NamedTuple):
    """What `ForgettingCallback` has measured after a step."""

    step: int
    drift: Drift
    kl: float | None
    """KL(base ‖ model) in nats a token; None without texts."""


class ForgettingCallback(TrainerCallback):
    """Logs an adapter's drift and its KL to the base while transformers' Trainer (or TRL's) trains it, and keeps a budget.

    With every log of a training loss: `drift` (the median over layers of ‖ΔW X‖ / ‖W₀ X‖ on the inputs to be kept), `worst_drift`,
    and `kl_to_base` with texts. They are in `trainer.state.log_history` and in what is printed. `attach(trainer)`, in place of
    `callbacks=[…]`, puts the callback before the reporters (W&B, TensorBoard, …), so that these get them too.

    An A or B that the adapter's configuration records as frozen (`freeze_a`, `freeze_b`) is frozen again, when the Trainer is made
    or in `attach`.

    Every saved adapter's card (`README.md`) has the last reading in a section of its own, which is taken anew for a checkpoint.

    Args:
        covariances: second moments of the inputs to be kept, of this very model before fine-tuning.
        texts: a few, for the KL.
        tokenizer: for them; by default the Trainer's `processing_class`.
        drift_budget: limit of `drift`.
        kl_budget: limit of `kl_to_base`.
        on_budget: above a limit, `"stop"` the training after the log, `"slow"` it down: multiply the learning rates by `slow_by` at
            every log that is above the limit, or `"warn"`. All of them warn the first time.
        slow_by: between 0 and 1. The base rates of the scheduler are multiplied, so the schedule goes on from lower rates.
        adapter_name: of the adapter; by default the active one.
        initial: what the adapter started as, as in `Gauge`.
        text_tokens: tokens of each text, at most.

    Attributes:
        readings: all `Reading`s, in order.

    Several processes read the same adapter. If it is sharded, they read it together; what is decided is decided by the first one.

    Raises:
        TypeError, ValueError: for limits that are not positive numbers, an unknown `on_budget`, `kl_budget` without texts; when the
            training begins, as `Gauge`, and if the model is no `PeftModel`.
    """

    def __init__(
        self,
        covariances: Covariances,
        *,
        texts: Sequence[str] | None = None,
        tokenizer: Any = None,
        drift_budget: float | None = None,
        kl_budget: float | None = None,
        on_budget: str = "stop",
        slow_by: float = 0.5,
        adapter_name: str | None = None,
        initial: Initial = None,
        text_tokens: int = 256,
    ) -> None:
        check_one_of("on_budget", on_budget, ACTIONS)
        limits = {"drift_budget": drift_budget, "kl_budget": kl_budget}
        self._limits = {name: None if limit is None else check_real(name, limit) for name, limit in limits.items()}
        if kl_budget is not None and texts is None:
            raise InputError("kl_budget needs texts, on which the KL is measured")
        self._covariances, self._texts, self._tokenizer = covariances, texts, tokenizer
        self._action, self._slow_by = on_budget, check_real("slow_by", slow_by, _SLOWER)
        self._adapter, self._initial, self._length = adapter_name, initial, check_integer("text_tokens", text_tokens)
        self._model: PeftModel | None = None
        self._start: Start | None = None
        self._gauge: Gauge | None = None
        self._kl: KlToBase | None = None
        self._attached = self._warned = False
        self._section: dict[str, str] = {}
        self.readings: list[Reading] = []

    def attach(self, trainer: Any) -> ForgettingCallback:
        """Put this before the reporters of a Trainer. Call it before `train`, which may load a checkpoint."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        flow = [place for place, each in enumerate(callbacks) if isinstance(each, DefaultFlowCallback)]
        callbacks.insert(flow[-1] + 1 if flow else 0, self)  # behind what decides whether a step is logged or saved
        self._attached = True
        freeze_recorded(trainer.model, self._adapters_of(trainer.model))
        self._look_at(trainer.model)
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Freeze A before there is an optimizer, where the adapter's configuration records that."""
        freeze_recorded(model, self._adapters_of(model))

    def _adapters_of(self, model: Any) -> list[str]:
        return [self._adapter] if self._adapter is not None else list(getattr(unwrap(model), "active_adapters", []))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Prepare the gauge, and record the base's predictions."""
        start = self._look_at(model)
        assert self._model is not None
        self._gauge = Gauge(self._model, self._covariances, adapter_name=self._adapter, initial=start)
        if self._texts is not None:
            tokenizer = self._tokenizer if self._tokenizer is not None else processing_class
            if tokenizer is None:
                raise InputError("texts need a tokenizer: give tokenizer=, or processing_class= to the Trainer")
            layers = adapted_layers(self._model, self._adapter)
            self._kl = KlToBase(self._model, layers, start, self._texts, tokenizer, self._length)
        reporters = [name for name in args.report_to or () if name != "none"]
        if reporters and not self._attached and state.is_world_process_zero:
            warnings.warn(
                f"{', '.join(reporters)} will not get drift and KL: call attach(trainer) of this callback before train()",
                AdapterWarning,
                stacklevel=2,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read, if the step is to be saved."""
        if control.should_save:
            self._read(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read, if the epoch is to be saved."""
        if control.should_save:
            self._read(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read, for the card of the adapter that is saved in the end."""
        self._read(state)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Read, add to the log, and act if a limit is exceeded."""
        if logs is None or "loss" not in logs:  # of an evaluation, or of the whole run
            return
        reading = self._read(state)
        values = {"drift": reading.drift.median, "worst_drift": reading.drift.worst}
        if reading.kl is not None:
            values["kl_to_base"] = reading.kl
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
        exceeded = self._exceeded(reading)
        if not exceeded:
            return
        if self._action == "stop":
            control.should_training_stop = True
        elif self._action == "slow":
            slow_down(optimizer, lr_scheduler, self._slow_by)
        if not self._warned and state.is_world_process_zero:
            self._warned = True
            done = {
                "stop": "the training stops",
                "slow": f"the learning rates are multiplied by {self._slow_by:g}",
                "warn": "it goes on",
            }
            warnings.warn(f"after step {reading.step} {exceeded}: {done[self._action]}", AdapterWarning, stacklevel=2)

    def _look_at(self, model: Any) -> Start:
        """Take the model, and what its adapter started as, the first time that it is seen."""
        model = unwrap(model)
        if self._start is None or model is not self._model:
            self._start = start_of(model, adapted_layers(model, self._adapter), self._initial)
            self._model = model
            add_section(model, self._section)
        return self._start

    def _read(self, state: Any) -> Reading:
        """The reading of this step: that of the first process."""
        if self.readings and self.readings[-1].step == state.global_step:
            return self.readings[-1]
        assert self._gauge is not None
        reading = Reading(state.global_step, self._gauge(), None if self._kl is None else self._kl())
        if torch.distributed.is_initialized():
            reading = Job().exchange(reading)[0]
        self.readings.append(reading)
        self._section[HEADING] = self._described(reading)
        return reading

    def _exceeded(self, reading: Reading) -> str:
        """Which limits are exceeded, as text; empty if none."""
        values = {"drift_budget": ("drift", reading.drift.median), "kl_budget": ("kl_to_base", reading.kl)}
        over = []
        for name, limit in self._limits.items():
            what, value = values[name]
            if limit is not None and value is not None and not value <= limit:  # NaN counts
                over.append(f"{what} is {value:.3g}, above {name}={limit:g}")
        return " and ".join(over)

    def _described(self, reading: Reading) -> str:
        drift = reading.drift
        rows = {
            f"drift ‖ΔW X‖ / ‖W₀ X‖, median of {len(drift.layers)} layers": f"{drift.median:.3g}",
            "worst layer": f"{drift.worst:.3g} in {code(drift.worst_layer)}",
        }
        if reading.kl is not None and self._kl is not None:
            rows[f"KL to the base, nats a token ({self._kl.tokens} tokens)"] = f"{reading.kl:.3g}"
        table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
        return f"On inputs that are to be kept, after step {reading.step}:\n\n{table}"
