"""What an adapter's configuration records of its start: what of A and B is frozen, the base that it is for, a digest of A₀ and B₀.

PEFT drops the fields of a configuration that it does not know, with a warning. `auto_mapping` is a dictionary that it reads and
saves as it is; of its entries PEFT uses two of its own, where there is no task type. The entry `KEY` in it passes through plain
PEFT: load, train, save. Only without a task type does PEFT write the dictionary anew; `keep` then adds the entry when the
configuration is saved.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel

from nullspace.artifacts import residual
from nullspace.checks import check_fields, flag, map_of, optional, or_none, text
from nullspace.errors import AdapterWarning, InputError, OtherModelError
from nullspace.integrations.peft.layers import freeze_layers, frozen_of, lora_layers
from nullspace.integrations.peft.made_for import warn_of_base
from nullspace.integrations.peft.watch import watch
from nullspace.methods import OTHER
from nullspace.model.sharded import has_deepspeed_engine
from nullspace.model.wrappers import unwrap

FIELD, KEY = "auto_mapping", "nullspace"
_FIELDS = {
    "freeze_a": optional(flag()),
    "freeze_b": optional(flag()),
    "base": optional(map_of(text())),
    **{name: optional(or_none(text())) for name in ("model", "revision", "residual", "factors")},
}


class Adapter(NamedTuple):
    """An adapter's folder, as `files.read_adapter` reads it."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def recorded(config: PeftConfig | Mapping[str, Any], what: object = "the adapter's configuration") -> dict[str, Any]:
    """The record; empty if there is none.

    Its entries: `freeze_a`, `freeze_b` (absent if false); `model`, `revision` and `base` (name, and entries of weights, of the
    untouched base: `made_for`); `residual` (as in an init's manifest); `factors` (a digest). What an export has of them is true of
    its base.

    Args:
        config: in memory, or the content of a file.
        what: the file, for messages.

    Raises:
        ValueError: naming the file, if a field has a wrong value.
    """
    mapping = config.get(FIELD) if isinstance(config, Mapping) else getattr(config, FIELD, None)
    record = mapping.get(KEY) if isinstance(mapping, Mapping) else None
    if record is None:
        return {}
    check_fields(record, _FIELDS, f"{what}: {KEY} in {FIELD}")
    return dict(record)


def frozen_in(record: Mapping[str, Any]) -> str | None:
    """The factor that a record, or the manifest of an init, says is frozen, `"A"` or `"B"`."""
    return next((factor for factor in OTHER if record.get(f"freeze_{factor.lower()}")), None)


def frozen_entries(frozen: str | None) -> dict[str, bool]:
    """The same for a record or manifest."""
    return {"freeze_a": frozen == "A", **({"freeze_b": True} if frozen == "B" else {})}


def with_record(config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a configuration's file with a record in it."""
    return {**config, FIELD: {**(config.get(FIELD) or {}), KEY: dict(record)}}


def for_untouched(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a configuration's file for an adapter of the untouched base, which is not what was trained from the start."""
    record = recorded(config)
    kept = {name: record[name] for name in ("model", "revision", "base") if name in record}
    rest = {name: value for name, value in (config.get(FIELD) or {}).items() if name != KEY}
    return {**config, FIELD: {**rest, **({KEY: {**kept, "residual": "none"}} if kept.get("base") else {})} or None}


def keep(config: LoraConfig, record: Mapping[str, Any]) -> None:
    """Put a record into a configuration in memory. PEFT saves it from now on."""
    config.auto_mapping = {**(config.auto_mapping or {}), KEY: dict(record)}
    if config.task_type is None:
        config.save_pretrained = functools.partial(_save, config)  # type: ignore[method-assign]


def _save(config: LoraConfig, save_directory: str, **kwargs: Any) -> None:
    """In place of `LoraConfig.save_pretrained`, which replaces the dictionary."""
    if kwargs.get("auto_mapping_dict") is not None:
        kwargs["auto_mapping_dict"] = {**kwargs["auto_mapping_dict"], KEY: (config.auto_mapping or {}).get(KEY)}
    type(config).save_pretrained(config, save_directory, **kwargs)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of all A and B of an adapter's file."""
    digest = hashlib.sha256()
    for key in sorted(key for key in tensors if ".lora_A." in key or ".lora_B." in key):
        t = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_origin(now: Adapter, start: Adapter, *, stacklevel: int) -> None:
    """Compare the records of an adapter and of what it is said to have started from.

    Args:
        now: after training.
        start: before.
        stacklevel: of `warnings.warn`, counted from the caller.

    Raises:
        ValueError: naming both, if the records differ, or if the start no longer holds the factors that it was recorded with.

    Warns:
        UserWarning: if one of them has no record, so that shapes alone were compared. Not where they have the same A or the same B,
            which two starts do not share, and not where all products were zero; and if A or B was to be frozen and has changed.
    """
    mine, first = recorded(now.config, now.path), recorded(start.config, start.path)
    check_same(mine, first, now.path, start.path)
    if first.get("factors") and digest_of(start.tensors) != first["factors"]:
        raise OtherModelError(
            f"{start.path} no longer holds the factors that it started with (it was trained in place, or converted): give the "
            "folder as it was before training"
        )
    changed = {factor: _changed(now, start, f".lora_{factor}.") for factor in OTHER}
    frozen = frozen_in(mine)
    if frozen and changed[frozen]:
        kept = {"A": "rows", "B": "columns"}[frozen]
        warnings.warn(
            f"{now.path} is recorded as trained with {frozen} frozen, but {frozen} has changed in {changed[frozen]} layers: it was "
            f"trained on without freeze_{frozen.lower()} after loading, or filtered, and its update is no longer one of the {kept} "
            f"of its first {frozen}",
            AdapterWarning,
            stacklevel=stacklevel + 1,
        )
    products = any(
        bool(t.any()) and bool(start.tensors.get(key.replace(".lora_B.", ".lora_A."), t).any())
        for key, t in start.tensors.items()
        if key.endswith(".lora_B.weight")
    )
    missing = [str(each.path) for each, record in ((now, mine), (start, first)) if not record.get("factors")]
    if missing and all(changed.values()) and products:
        warnings.warn(
            f"no record of the first factors is in {' and '.join(missing)} (an earlier version wrote it, or PEFT saved it without "
            f"a task_type): that {now.path} was trained from {start.path} was checked by settings and shapes alone",
            AdapterWarning,
            stacklevel=stacklevel + 1,
        )


def _changed(now: Adapter, start: Adapter, part: str) -> int:
    """How many of the first factors whose names have this part are others now."""
    firsts = {key: t for key, t in start.tensors.items() if f"{part}weight" in key}
    return sum(not torch.equal(now.tensors[key].double(), first.double()) for key, first in firsts.items())


def check_same(mine: Mapping[str, Any], first: Mapping[str, Any], now: object, start: object) -> None:
    """Raise `ValueError`, naming both, for the records of two starts. What one of them lacks is not compared."""
    for name, what in (("model", "base model"), ("revision", "revision of the base"), ("factors", "digest of the first A and B")):
        if mine.get("factors") and first.get("factors") and mine.get(name) != first.get(name):
            raise OtherModelError(
                f"{now} and {start} do not belong together: the {what} at the start was {mine.get(name)} and {first.get(name)}"
            )


def freeze_a(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Train B alone from now on (LoRA-Null-v2). PEFT's `set_adapter` and similar functions do not undo it.

    PEFT saves the weights but not which of them were frozen: call this after `PeftModel.from_pretrained(..., is_trainable=True)`,
    before the optimizer is made. That A is frozen is recorded in the adapter's configuration from now on (`auto_mapping`), where
    `attach_subtracted`, `confine`, `oplora` and `ForgettingCallback` look for it and do this by themselves.

    Raises:
        ValueError: if the model has no LoRA layer with an adapter of that name, its B is frozen, or it is in a DeepSpeed engine
            that trains A.

    Warns:
        UserWarning: if the adapter was made for another base than this one.
    """
    _freeze(peft_model, adapter_name, "A")
    _warn_of_base(peft_model, adapter_name)


def freeze_b(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Train A alone from now on (MiCA). As `freeze_a`, with the factors in each other's place.

    PEFT does this by itself only for adapters of its own `init_lora_weights="mica"`.
    """
    _freeze(peft_model, adapter_name, "B")
    _warn_of_base(peft_model, adapter_name)


def _warn_of_base(peft_model: Any, adapter_name: str) -> None:
    model = unwrap(peft_model)
    warn_of_base(model, adapter_name, recorded(model.peft_config[adapter_name]), stacklevel=3)


def _freeze(peft_model: Any, adapter_name: str, factor: str) -> None:
    model = unwrap(peft_model)
    layers = lora_layers(model, adapter_name)
    if not layers:
        raise InputError(f"the model has no LoRA adapter named {adapter_name!r}")
    name = f"freeze_{factor.lower()}"
    if frozen_of(layers, adapter_name) == OTHER[factor]:
        raise InputError(f"{OTHER[factor]} of adapter {adapter_name!r} is frozen: with {name} nothing would train")
    weights = [getattr(layer, f"lora_{factor}")[adapter_name].weight for layer in layers.values()]
    if has_deepspeed_engine(peft_model) and any(weight.requires_grad for weight in weights):
        raise InputError(
            f"{factor} is a parameter of a DeepSpeed engine's optimizer already: call {name} before deepspeed.initialize"
        )
    freeze_layers(layers, adapter_name, factor)
    config: Any = model.peft_config[adapter_name]
    rest = {entry: value for entry, value in recorded(config).items() if not entry.startswith("freeze_")}
    keep(config, {**frozen_entries(factor), **rest})
    if residual.residual_mark(model.get_base_model()) is not None:
        watch(model, adapter_name, "base")


def freeze_recorded(peft_model: Any, adapter_names: Iterable[str]) -> None:
    """Freeze A or B of those of a model's adapters whose configuration records that."""
    model = unwrap(peft_model)
    for name in adapter_names if isinstance(model, PeftModel) else ():
        config = model.peft_config.get(name)
        frozen = frozen_in(recorded(config)) if isinstance(config, LoraConfig) else None
        if frozen and frozen_of(lora_layers(model, name), name) != frozen:
            _freeze(peft_model, name, frozen)
