"""How a model is quantised while it is loaded: bitsandbytes in 4 or 8 bits, or as its checkpoint says."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from nullspace.errors import InputError, MissingPackageError


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
    if load_in_4bit and load_in_8bit:
        raise InputError("load_in_4bit and load_in_8bit exclude each other: leave one out")
    asked = "load_in_4bit" if load_in_4bit else "load_in_8bit" if load_in_8bit else None
    known = _content(config)
    if asked is None:
        return {} if known is None else {"device_map": {"": device}}
    if known is not None:
        if not known.get(asked):
            raise InputError(f"{name} is quantised already ({_described(known)}): leave out {asked}")
        return {"device_map": {"": device}}
    if find_spec("bitsandbytes") is None:
        raise MissingPackageError(f"{asked} needs the package bitsandbytes: pip install bitsandbytes")
    if load_in_8bit:
        chosen = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = getattr(config, "dtype", None) if dtype == "auto" else dtype
        compute = getattr(torch, compute) if isinstance(compute, str) else compute or torch.float32
        chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": chosen, "device_map": {"": device}}


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
