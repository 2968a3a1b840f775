"""What vLLM and SGLang do with the tensors of an adapter of experts, restated from their loaders (sources of November 2026).

vLLM: every name in front of `.lora_A` must end in the name of a module that takes adapters; names with `base_layer` in them are
not looked at. A class with `is_3d_moe_weight` takes the A and B of all experts of a layer at once, `….experts.base_layer` for gate
and up, `….experts` for down, and both of them. Other classes take a tensor for each expert; with `--enable-mixed-moe-lora-format`
they take the same as the former, and divide its rows for gate and up (interleaved in GPT-OSS). Tensors of modules that the server's
model does not have are dropped without a message.

SGLang: a tensor belongs to the first of the adapted modules whose name is part of its own; others are left out, with a warning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

PREFIX = "base_model.model."
PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class Served(NamedTuple):
    """How vLLM has a family."""

    experts: str
    """The module of a layer's experts, behind `model.layers.N.`."""
    together: bool
    """`is_3d_moe_weight`."""
    interleaved: bool = False


VLLM = {
    "qwen3_moe": Served("mlp.experts", False),
    "deepseek_v3": Served("mlp.experts", False),
    "mixtral": Served("block_sparse_moe.experts", False),
    "gpt_oss": Served("mlp.experts", True, True),
}


def changes_in_vllm(adapter: Path, family: str, *, mixed: bool) -> dict[str, torch.Tensor]:
    """`gate`, `up` and `down` of an expert in layer 1 → the changes of all experts that vLLM computes, (E, d_out, d_in).

    Raises:
        ValueError: where vLLM stops.
    """
    served, config = VLLM[family], json.loads((adapter / "adapter_config.json").read_text())
    tensors = {key.removeprefix(PREFIX): t.double() for key, t in load_file(adapter / "adapter_model.safetensors").items()}
    names = {key.rpartition(".lora_")[0] for key in tensors}
    linear = {name.rpartition(".")[2] for name in names if ".experts" not in name}
    for name in names:
        if "base_layer" not in name and ".experts" in name and name[name.index(".experts") + 1 :] not in {*linear, "experts"}:
            raise ValueError(f"unexpected module {name}")
    module = f"model.layers.1.{served.experts}"
    if module not in names:
        return {}
    if not (served.together or mixed):
        raise ValueError("a list of one tensor for each expert is expected")
    if f"{module}.base_layer" not in names:
        raise ValueError("gate_up_proj has no adapter")
    made = {}
    for part, name in (("gate_up", f"{module}.base_layer"), ("down", module)):
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        experts = len(a) // config["r"]
        a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts).permute(2, 0, 1)
        made[part] = config["lora_alpha"] / config["r"] * b @ a
    both = made.pop("gate_up")
    half = both.shape[1] // 2
    gate, up = (both[:, ::2], both[:, 1::2]) if served.interleaved else (both[:, :half], both[:, half:])
    return {**made, "gate": gate, "up": up}


def left_out_by_sglang(adapter: Path) -> set[str]:
    """Keys of tensors that SGLang leaves out."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    adapted = {PACKED.get(last, last) for last in (name.rpartition(".")[2] for name in config["target_modules"])}
    keys = set(load_file(adapter / "adapter_model.safetensors"))

    def renamed(key: str) -> str:
        for one, packed in PACKED.items():
            key = key.replace(f".{one}.", f".{packed}.")
        return key

    return {key for key in keys if not any(name in renamed(key) for name in adapted)}
