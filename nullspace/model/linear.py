"""Linear layers, whatever library they are of: their weights and shapes."""

from __future__ import annotations

import torch
from torch import nn

from nullspace.model.sharded_tensors import shape_of


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes y = W x (+ b): `nn.Linear` or transformers' `Conv1D`, or a subclass of one."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' `Conv1D`, which stores its weight as (d_in, d_out)."""
    return is_of_class(module, "Conv1D", "transformers.pytorch_utils")


def is_of_class(module: nn.Module, name: str, defined_in: str) -> bool:
    """Whether a module is of a class of another library, which is not imported for the question."""
    return any(c.__name__ == name and c.__module__ == defined_in for c in type(module).__mro__)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, whatever the layout of its storage (quantised layers included)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    d_in, d_out = shape_of(weight_of(module))
    return d_out, d_in


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight as the layer stores it: (d_out, d_in), or (d_in, d_out) for `Conv1D`; packed if it is quantised."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that maps hidden states to the vocabulary or to classes, where the model says which one that is."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None and hasattr(model, "config") and "Classification" in type(model).__name__:
        # transformers' convention for classification heads, which are new and have nothing to preserve.
        head = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    return head
