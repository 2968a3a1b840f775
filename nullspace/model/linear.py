"""Linear layers of torch, transformers and quantisation libraries, experts' matrices too: weights, shapes, and whether they return
W x + b."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nullspace.model.experts import ExpertMatrix
from nullspace.model.quantised import is_quantised_layer, quantised_shape
from nullspace.model.sharded_tensors import is_sharded, shape_of


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes y = W x (+ b): `nn.Linear`, transformers' `Conv1D` or a subclass, a quantisation library's layer
    (`nullspace.model.quantised`), or one expert's matrix."""
    return isinstance(module, (nn.Linear, ExpertMatrix)) or is_conv1d(module) or is_quantised_layer(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' `Conv1D`, which stores its weight as (d_in, d_out)."""
    return is_of_class(module, "Conv1D", "transformers.pytorch_utils")


def is_of_class(module: nn.Module, name: str, defined_in: str) -> bool:
    """Whether a module is of a class of another library, which is not imported for the question."""
    return any(c.__name__ == name and c.__module__ == defined_in for c in type(module).__mro__)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, whatever the layout of its storage (quantised layers included)."""
    if isinstance(module, (nn.Linear, ExpertMatrix)):
        return module.out_features, module.in_features
    if is_quantised_layer(module):
        return quantised_shape(module)
    d_in, d_out = shape_of(weight_of(module))
    return d_out, d_in


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight as the layer stores it: (d_out, d_in), or (d_in, d_out) for `Conv1D`; packed if it is quantised.

    Of an expert's matrix, a new view of the experts' parameter, (d_out, d_in). Of a layer that packs its weight under another name,
    the largest of its tensors.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and not is_quantised_layer(module):
        return weight
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    assert own, f"{type(module).__name__} holds no tensor"
    return max(own, key=lambda t: t.nbytes)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that maps hidden states to the vocabulary or to classes, where the model says which one that is."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None and hasattr(model, "config") and "Classification" in type(model).__name__:
        # transformers' convention for classification heads, which are new and have nothing to preserve.
        head = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    return head


@torch.no_grad()
def unlike_linear(layer: nn.Module, x: Any, output: Any) -> str | None:
    """What is wrong with the output of a layer, if it is not W x + b; None if nothing is.

    The shape is looked at, and where the weight's values are at hand a few entries: of some rows, in some columns, computed in
    float64. They may differ by the rounding of the inputs' and the output's dtype.
    """
    kind, (d_out, d_in) = type(layer).__name__, weight_shape(layer)
    advice = "an adapter adds B A x to the output of W x + b"
    if not isinstance(output, torch.Tensor):
        return f"({kind}) returns {type(output).__name__}, not a tensor: {advice}"
    stored = weight_of(layer)
    if not isinstance(x, torch.Tensor) or is_sharded(stored):
        return None
    if output.shape != (*x.shape[:-1], d_out):
        return f"({kind}, {d_out} × {d_in}) turns {tuple(x.shape)} into {tuple(output.shape)}: {advice}"
    if type(stored) is not nn.Parameter or stored.dtype not in _EXACT or stored.device.type == "meta" or output.numel() == 0:
        return None
    weight = stored.T if is_conv1d(layer) else stored
    if weight.shape != (d_out, d_in) or not output.is_floating_point() or not x.is_floating_point():
        return None
    rows = _some(x.numel() // d_in, x.device)
    columns = _some(d_out, weight.device)
    x_nd, w_od = x.reshape(-1, d_in)[rows].double(), weight[columns].double()
    seen_no = output.reshape(-1, d_out)[rows][:, columns.to(output.device)].double()
    bias = getattr(layer, "bias", None)
    wanted_no = x_nd @ w_od.T.to(x_nd.device)
    spread = (x_nd.square() @ w_od.T.to(x_nd.device).square()).sum()
    if isinstance(bias, torch.Tensor):
        wanted_no = wanted_no + bias[columns].double().to(x_nd.device)
    eps = max(torch.finfo(t.dtype).eps for t in (x, stored, output))
    if x.is_cuda:
        eps = max(eps, torch.finfo(torch.float16).eps)  # TF32 has as many digits
    allowed = (4 * eps + SUMMATION) * (wanted_no.square().sum() + spread).sqrt()
    if bool((seen_no.to(wanted_no.device) - wanted_no).norm() > allowed):  # not if anything is NaN, which is refused elsewhere
        return f"({kind}) does not return W x + b: {advice}"
    return None


# What the summation over d_in may lose in any dtype, relative to the norm of the products.
SUMMATION = 1e-4

_EXACT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _some(count: int, device: torch.device) -> torch.Tensor:
    """Up to eight indices below `count`, spread evenly."""
    return torch.linspace(0, count - 1, min(count, 8), device=device).long()
