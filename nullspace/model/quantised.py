"""Linear layers of quantisation libraries: which classes they are, their shapes, and the values of their weights.

Some libraries put a tensor subclass into an `nn.Linear` (torchao, quanto, bitsandbytes), others a module of their own in its place
(GPTQ, AWQ, HQQ, EETQ, …), whose weight is packed in one or several tensors under names of their own. No library is imported here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nullspace.model.sharded_tensors import is_sharded

# Class → packages that define it. None is an `nn.Linear`.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "BaseQuantLinear": ("gptqmodel",),  # GPTQ and AWQ
    "BitLinear": ("transformers",),
    "EetqLinear": ("eetq", "transformers"),
    "FPQuantLinear": ("fp_quant",),
    "HQQLinear": ("hqq",),
    "HiggsLinear": ("transformers",),
    "NVFP4Linear": ("transformers",),
    "PatchedLinear": ("neural_compressor",),
    "QuantLinear": ("auto_gptq", "auto_round"),
    "QuantizedLinear": ("aqlm", "spqr_quant"),
    "SINQLinear": ("sinq",),
    "VQuantLinear": ("vptq",),
    "WQLinear_GEMM": ("awq",),
    "WQLinear_GEMV": ("awq",),
    "WQLinear_GEMVFast": ("awq",),
    "WQLinear_IPEX": ("awq",),
    "WQLinear_Marlin": ("awq",),
}
# Experts that are stored with several values in one byte: class → (E, d_out, d_in) of their matrices, by the parameter's name.
_EXPERTS: Mapping[str, Any] = {
    "Mxfp4GptOssExperts": lambda own: {
        "gate_up_proj": (own.num_experts, 2 * own.intermediate_size, own.hidden_size),
        "down_proj": (own.num_experts, own.hidden_size, own.intermediate_size),
    },
    "FP8Experts": lambda own: {
        "gate_up_proj" if own.has_gate else "up_proj": (own.num_experts, (1 + own.has_gate) * own.intermediate_dim, own.hidden_dim),
        "down_proj": (own.num_experts, own.hidden_dim, own.intermediate_dim),
    },
}
# Rows of the identity matrix that a layer is called with at once.
_ROWS = 1024


def is_quantised_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer of a quantisation library, and no `nn.Linear`."""
    return any(c.__module__.partition(".")[0] in LAYERS.get(c.__name__, ()) for c in type(module).__mro__)


def quantised_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a layer of `is_quantised_layer`."""
    own: Any = layer
    for d_in, d_out in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if isinstance(getattr(own, d_in, None), int):
            return getattr(own, d_out), getattr(own, d_in)
    d_in, d_out = own.weight.shape  # transformers' EetqLinear has no other record of them
    return d_out, d_in


def packed_experts(module: nn.Module) -> dict[str, int]:
    """Parameter → number of weights, of experts that are stored packed; empty for another module."""
    if not type(module).__module__.startswith("transformers."):
        return {}
    shapes = _EXPERTS.get(type(module).__name__)
    return {} if shapes is None else {name: math.prod(shape) for name, shape in shapes(module).items()}


def is_dequantisable(layer: nn.Module, weight: torch.Tensor) -> bool:
    """Whether `dequantised` gives the values of a linear layer's weight. The layer may be called with one token.

    Args:
        layer: any linear layer.
        weight: as it stores it.
    """
    if is_sharded(weight) or weight.device.type == "meta" or not (isinstance(layer, nn.Linear) or is_quantised_layer(layer)):
        return False
    if type(weight).__name__ in _BITSANDBYTES or _dequantizes(weight):
        return True
    return _is_packed(layer, weight) and _computing_dtype(layer, weight) is not None


@torch.no_grad()
def dequantised(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """(d_out, d_in): the weight that a layer of `is_dequantisable` computes with.

    A tensor subclass dequantises itself, and bitsandbytes' are dequantised by its rules. Other layers are called with the identity
    matrix, whose images are the columns of W: up to rounding in the dtype of the layer's output, whatever its format is. Where the
    layer quantises its inputs too, rows of one entry are exact.
    """
    read = _BITSANDBYTES.get(type(weight).__name__)
    if read is not None:
        return read(layer, weight)
    if _dequantizes(weight):
        values: torch.Tensor = weight.dequantize()
        return values.detach()
    dtype = _computing_dtype(layer, weight)
    assert dtype is not None
    d_in = layer_shape(layer)[1]
    columns = []
    for start in range(0, d_in, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, d_in), device=weight.device)
        x = torch.zeros(1, len(rows), d_in, dtype=dtype, device=weight.device)
        x[0, torch.arange(len(rows), device=weight.device), rows] = 1
        columns.append(_called(layer, x)[0].mT)
    return torch.cat(columns, dim=1)


def _four_bits(layer: nn.Module, weight: Any) -> torch.Tensor:
    values: torch.Tensor = sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)
    return values.detach()


def _eight_bits(layer: Any, weight: Any) -> torch.Tensor:
    """Codes times the largest entry of each row, which a forward pass moves from the weight to the layer."""
    moved = getattr(getattr(layer, "state", None), "SCB", None)
    scales: torch.Tensor = weight.SCB if moved is None else moved
    values: torch.Tensor = weight.data * (scales.view(-1, 1).to(weight.device) / 127)
    return values


# bitsandbytes' classes of weights.
_BITSANDBYTES = {"Params4bit": _four_bits, "Int8Params": _eight_bits}


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of an `nn.Linear` or a layer of `is_quantised_layer`."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else quantised_shape(layer)


def _dequantizes(weight: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass with a `dequantize` of its own."""
    return type(weight).dequantize is not torch.Tensor.dequantize


def is_compressed(layer: nn.Module) -> bool:
    """Whether a layer is one that compressed-tensors decompresses in the model's first forward pass, and that has no weight yet."""
    return not hasattr(layer, "weight") and getattr(getattr(layer, "quantization_status", None), "name", None) == "COMPRESSED"


def _is_packed(layer: nn.Module, weight: torch.Tensor) -> bool:
    """Whether a layer stores something else than the values of its weight."""
    if is_quantised_layer(layer):
        return True
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and weight.element_size() > 1
    return isinstance(layer, nn.Linear) and not (plain and weight.shape == (layer.out_features, layer.in_features))


def _called(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer returns, less its bias."""
    registered = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    without = {"bias": torch.zeros_like(registered["bias"])} if "bias" in registered else {}

    def call(inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.func.functional_call(layer, without, (inputs,))
        return output

    return call(x) - call(torch.zeros_like(x[:, :1]))


@torch.no_grad()
def _computing_dtype(layer: nn.Module, weight: torch.Tensor) -> torch.dtype | None:
    """The dtype of inputs with which a layer computes here; None if it does not."""
    d_out, d_in = layer_shape(layer)
    for dtype in _dtypes(layer):
        try:
            y = _called(layer, torch.ones(1, 1, d_in, dtype=dtype, device=weight.device))
        except Exception:  # of any type, from a kernel that this device or this dtype has not
            continue
        if isinstance(y, torch.Tensor) and y.shape == (1, 1, d_out) and y.is_floating_point() and bool(y.isfinite().all()):
            return dtype
    return None


def _dtypes(layer: nn.Module) -> Iterator[torch.dtype]:
    """Those of the layer's scales and bias first."""
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    tried = [t.dtype for t in own if t.is_floating_point() and t.element_size() > 1]
    yield from dict.fromkeys([*tried, torch.float32, torch.bfloat16, torch.float16])
