"""How a model is quantised while it is loaded: bitsandbytes in 4 or 8 bits, or as its checkpoint says."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, CompressedTensorsConfig

from nullspace.errors import InputError, MissingPackageError, ResourceUseWarning
from nullspace.model.experts import is_fused, stacks_of
from nullspace.model.linear import output_head
from nullspace.model.weights import set_stored_bytes


def method_of(config: Any) -> str | None:
    """The quantisation of a checkpoint ("bitsandbytes", "gptq", …), as its configuration says; None if there is none."""
    content = _content(config)
    return None if content is None else str(content.get("quant_method") or "bitsandbytes")


def loading_options(
    name: str | os.PathLike[str],
    config: Any,
    dtype: torch.dtype | str,
    device: torch.device,
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model that is, or is to be, quantised; empty for any other.

    A checkpoint of 4 or 8 bits stays as it was saved. Others get 4 bits as QLoRA (arXiv 2305.14314) has them, NF4 codes in blocks
    of 64, computed with in the model's dtype; or 8 bits, LLM.int8 (arXiv 2208.07339).

    Args:
        name: of the model, for messages.
        config: transformers' configuration of it.
        dtype: of the other weights; `"auto"` takes the configuration's.
        device: where the model is put. Quantised weights cannot all be moved afterwards.
        load_in_4bit, load_in_8bit: what was asked for.

    Raises:
        ValueError: if both are asked for, or the checkpoint is quantised otherwise.
        ImportError: if bitsandbytes is not installed.
    """
    asked = check_quantisable(name, config, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
    known = _content(config)
    if known is not None:
        options: dict[str, Any] = {"device_map": {"": device}}
        if known.get("quant_method") == "compressed-tensors":  # otherwise its layers have no weights before the first forward pass
            dequantised = "dequantize" in inspect.signature(CompressedTensorsConfig).parameters
            whole: dict[str, Any] = {"dequantize": True} if dequantised else {"run_compressed": False}
            own = CompressedTensorsConfig(**whole)
            options["quantization_config"] = own
        return options
    if asked is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise MissingPackageError(f"{asked} needs bitsandbytes: pip install 'nullspace-lora[quantised]'")
    if load_in_8bit:
        chosen = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = getattr(config, "dtype", None) if dtype == "auto" else dtype
        compute = getattr(torch, compute) if isinstance(compute, str) else compute or torch.float32
        chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": chosen, "device_map": {"": device}}


def check_quantisable(
    name: str | os.PathLike[str], config: Any, *, load_in_4bit: bool = False, load_in_8bit: bool = False
) -> str | None:
    """Which of the two is asked for; `ValueError` if both are, or the checkpoint is quantised otherwise."""
    if load_in_4bit and load_in_8bit:
        raise InputError("load_in_4bit and load_in_8bit exclude each other: leave one out")
    asked = "load_in_4bit" if load_in_4bit else "load_in_8bit" if load_in_8bit else None
    known = _content(config)
    if asked is not None and known is not None and not known.get(asked):
        raise InputError(f"{name} is quantised already ({_described(known)}): leave out {asked}")
    return asked


def set_planned_bytes(model: nn.Module, config: Any, *, load_in_4bit: bool = False, load_in_8bit: bool = False) -> None:
    """Let the weights of a model without weights count in a forecast with the bytes that they take when they are quantised.

    Of a quantised checkpoint whose number of bits is not known here, weights count as they are, in the model's dtype.
    """
    known = _content(config) or {}
    if load_in_4bit or load_in_8bit:
        known = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    if known.get("quant_method") == "mxfp4":
        stacks = [getattr(m, name) for m in model.modules() if is_fused(m) for name in stacks_of(m)]
        _set_bits(stacks, 4 + 8 / 32)  # a scale of 8 bits for 32 values
        return
    bits = 4 if known.get("load_in_4bit") else 8 if known.get("load_in_8bit") else known.get("bits", known.get("nbits"))
    bits = 8 if bits is None and str(known.get("quant_method")).endswith("fp8") else bits
    if not isinstance(bits, int):
        return
    group = 64 if known.get("load_in_4bit") else known.get("group_size") if bits < 8 else None
    scales = 32 / group if isinstance(group, int) and group > 0 else 0  # a scale and a zero of 16 bits each, or one of 32
    head = output_head(model)
    _set_bits([m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head], bits + scales)


def _set_bits(weights: Iterable[torch.Tensor], bits: float) -> None:
    for weight in weights:
        set_stored_bytes(weight, math.ceil(weight.numel() * bits / 8))


def warn_of_rest(name: str | os.PathLike[str], model: nn.Module, asked: str) -> None:
    """`UserWarning` if much of a model is not quantised: experts that are one tensor, which bitsandbytes leaves as they are."""
    stacks = [getattr(m, stack) for m in model.modules() if is_fused(m) for stack in stacks_of(m)]
    if stacks:
        size = sum(t.nbytes for t in stacks)
        warnings.warn(
            f"{asked}: the experts of {name} are one tensor a layer, which bitsandbytes does not quantise. They stay in "
            f"{stacks[0].dtype}, {size / 2**30:.1f} GiB",
            ResourceUseWarning,
            stacklevel=3,
        )


def _content(config: Any) -> dict[str, Any] | None:
    own = getattr(config, "quantization_config", None)
    own = getattr(config.get_text_config(), "quantization_config", None) if own is None else own
    if own is None or isinstance(own, dict):
        return own
    content: dict[str, Any] = own.to_dict()
    return content


def _described(content: dict[str, Any]) -> str:
    bits = "in 4 bits" if content.get("load_in_4bit") else "in 8 bits" if content.get("load_in_8bit") else ""
    return f"{content.get('quant_method') or 'bitsandbytes'} {bits}".strip()
