"""`inject_adapters` before training, and `save_init`, which writes what it made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from nullspace import store
from nullspace.integrations.peft.files import save_adapter
from nullspace.integrations.peft.layers import (
    check_layer,
    check_method,
    check_servable,
    freeze_layers,
    lora_layers,
    own_config,
    start_of,
)
from nullspace.sites import weight_of
from nullspace.spaces import NullSpace, NullSpaces


def inject_adapters(
    model: nn.Module,
    config: LoraConfig,
    spaces: NullSpaces,
    *,
    method: str = "lora-null",
    freeze_a: bool = False,
    sigma_scale: float = 1.0,
    adapter_name: str = "default",
) -> PeftModel:
    """Wrap a model in LoRA adapters that start in the null spaces of its own activations.

    With s the adapter's scaling (α/r, or α/√r with rsLoRA) and r its rank (`config.r`, `config.rank_pattern`):

    - `"lora-null"` (arXiv 2503.02659, eq. 8–11): s·BA = W₀ U Uᵀ (its best rank-r part if the basis has more than r columns), and
      the base weight becomes the residual W₀ − s·BA, taken from the factors as they are stored and rounded once. The model computes
      what it computed before. `freeze_a=True` is the paper's v2: A stays as it is, so every update s·(B − B₀)A stays in the
      null space, whatever training does.
    - `"b-zero"`: A = the r quietest directions, B = 0; the base weight is left alone.

    Args:
        model: the base model, on any device; it is changed in place, as `get_peft_model` does.
        config: PEFT's. `target_modules` may be None: then every layer that has a null space gets an adapter.
            `init_lora_weights` is ignored and saved as True, so that the adapter loads anywhere.
        spaces: of this very model, with bases of at least r columns.
        method: one of the above.
        freeze_a: train B alone. PEFT does not save this: call `freeze_a` again after loading an adapter to train it on.
        sigma_scale: see `nullspace.factors.lora_null`; only for `"lora-null"`.
        adapter_name: PEFT's name for the adapter.

    Returns:
        The `PeftModel`. Save it with `save_init`, before training, for the sake of its base: with `"lora-null"` the adapter
        belongs to the residual base, not to the original one.

    Raises:
        ValueError: naming the layer, for a target without a null space, spaces of another model, a rank that a basis does not
            have, or a base weight that cannot take the residual (quantised, sharded, offloaded, or tied to another layer). The
            model is then as it was.
        TypeError: if the config is not a `LoraConfig`, or the model already is a `PeftModel`.
    """
    check_method(method, sigma_scale)
    config = own_config(config, model, spaces)
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    try:
        layers = lora_layers(peft_model, adapter_name)
        for name, layer in layers.items():
            check_layer(name, layer, layer.get_base_layer(), adapter_name, spaces)
        check_servable(model, {name: layer.get_base_layer() for name, layer in layers.items()}, method)
    except Exception:
        peft_model.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        raise
    for name, layer in layers.items():
        _write_factors(layer, adapter_name, spaces[name], method, sigma_scale)
    if freeze_a:
        freeze_layers(layers, adapter_name)
    return peft_model


def freeze_a(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Train B alone from now on (LoRA-Null-v2), through `set_adapter` and whatever else PEFT does to `requires_grad`.

    PEFT saves the weights but not which of them were frozen: call this after `PeftModel.from_pretrained(..., is_trainable=True)`.

    Raises:
        ValueError: if the model has no LoRA layer with an adapter of that name.
    """
    layers = lora_layers(peft_model, adapter_name)
    if not layers:
        raise ValueError(f"the model has no LoRA adapter named {adapter_name!r}")
    freeze_layers(layers, adapter_name)


def save_init(
    out: str | os.PathLike[str],
    peft_model: PeftModel,
    spaces: NullSpaces,
    *,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what `inject_adapters` made, before it is trained: whole or not at all.

    `OUT/adapter` is a plain PEFT adapter, `OUT/base` the residual model as a plain transformers checkpoint, `OUT/spaces` the null
    spaces, `OUT/nullspace.json` the record. Where the base was left alone (`"b-zero"`) there is no `OUT/base`, and the adapter
    names the original model.

    Args:
        out: must not exist yet, or be empty.
        peft_model: fresh from `inject_adapters`; not changed.
        spaces: what it was made of.
        tokenizer: saved beside the base, if given.
        record: JSON-able facts to keep in `nullspace.json`: the model's name, the data, …
        overwrite: replace an earlier directory of ours.

    Raises:
        FileExistsError: if `out` is in the way.
        OSError: if it cannot be written; then nothing is left behind.
    """
    out = Path(out)
    base: Any = peft_model.get_base_model()
    adapter = peft_model.active_adapter
    residual = any(bool(weight_of(layer.lora_B[adapter]).any()) for layer in lora_layers(peft_model, adapter).values())
    config = peft_model.peft_config[adapter]
    with store.new_directory(out, overwrite=overwrite) as part:
        spaces.write(part / "spaces")
        original = config.base_model_name_or_path
        if residual:
            config.base_model_name_or_path = str(out / "base")
        try:
            save_adapter(peft_model, adapter, part / "adapter")
        finally:
            config.base_model_name_or_path = original
        if residual:
            weights = {
                name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items() if ".lora_" not in name
            }
            base.save_pretrained(part / "base", state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(part / "base")
        store.write_manifest(part, "init", {"model": original, **(record or {})})
    return out


@torch.no_grad()
def _write_factors(layer: Any, adapter: str, space: NullSpace, method: str, sigma_scale: float) -> None:
    stored = layer.get_base_layer().weight
    a, b, residual = start_of(layer, stored, adapter, space, method, sigma_scale)
    layer.lora_A[adapter].weight.copy_(a)
    layer.lora_B[adapter].weight.copy_(b)
    if residual is not None:
        stored.copy_(residual)
