"""PEFT's adapter directories: written so that two runs write the same bytes, and read with checks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from nullspace import store

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_adapter(peft_model: PeftModel, adapter: str, directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    peft_model.save_pretrained(str(directory), selected_adapters=[adapter], save_embedding_layers=False, state_dict=state_dict)
    if adapter != "default":  # to which alone PEFT gives no folder of its own
        for file in (directory / adapter).iterdir():
            file.rename(directory / file.name)
        (directory / adapter).rmdir()
    # PEFT keeps names in sets, whose order changes from process to process; two runs are to write the same bytes.
    path = directory / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


class Adapter(NamedTuple):
    path: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def read_adapter(directory: Path) -> Adapter:
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {directory} is not a PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path} does not describe a LoRA adapter")
    return Adapter(directory, config, store.load_tensors(directory / ADAPTER_WEIGHTS))


def row_spaces(*adapters: str | os.PathLike[str] | PeftModel) -> dict[str, torch.Tensor]:
    """The A of adapters that were trained before, for `exclude=`: what a new one is not to read (O-LoRA, arXiv 2310.14152).

    Args:
        adapters: directories of PEFT's LoRA adapters, or models with one (all of its adapters).

    Returns:
        Name of the layer in the base model → (m, d_in) float32, the rows of all A of this layer, one below the other.

    Raises:
        FileNotFoundError: if an adapter's file is missing.
        ValueError: naming it, if it is damaged or no LoRA adapter.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for adapter in adapters:
        if isinstance(adapter, PeftModel):
            tensors = {k: v.detach() for k, v in adapter.get_base_model().state_dict().items() if ".lora_A." in k}
        else:
            tensors = {k: v for k, v in read_adapter(Path(adapter)).tensors.items() if ".lora_A." in k}
        for key, rows in tensors.items():
            name = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
            found.setdefault(name, []).append(rows.to("cpu", torch.float32))
    return {name: torch.cat(rows) for name, rows in found.items()}
