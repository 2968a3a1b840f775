"""Experts that are stored as one tensor: one stand-in layer for each expert's matrix.

transformers keeps the routed experts of a layer in one module with parameters of three axes: `gate_up_proj` (E, 2 · inter, d), or
`up_proj` (E, inter, d) where there is no gate, and `down_proj` (E, d, inter); the last two axes are swapped where the class is
transposed (GPT-OSS). `ExpertMatrix` presents one of the E matrices as a linear layer, named `….experts.gate_up_proj[17]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from nullspace.model.quantised import packed_experts
from nullspace.model.sharded_tensors import shape_of
from nullspace.model.wrappers import named_modules

FIRST = ("gate_up_proj", "up_proj")
"""Parameters that receive the hidden states of the tokens that are routed to an expert."""
LAST = "down_proj"
"""The parameter that receives the activation between."""

_SAME_FORM = ("Step3p7Experts",)
"""Classes that are not decorated, and that compute the same from the same arguments and parameters."""
_NAME = re.compile(r"(.+)\.(\w+)\[(\d+)\]")


class ExpertName(NamedTuple):
    """The parts of an expert matrix's name."""

    experts: str
    """Name of the module that holds all experts of a layer."""
    parameter: str
    """Name of its parameter."""
    number: int
    """Of the expert, from 0."""

    def __str__(self) -> str:
        return f"{self.experts}.{self.parameter}[{self.number}]"

    @property
    def stack(self) -> str:
        """Name of the parameter that holds this matrix for all experts."""
        return f"{self.experts}.{self.parameter}"


def expert_of(name: str) -> ExpertName | None:
    """The parts of an expert matrix's name; None for the name of another layer.

    Example:
        >>> expert_of("model.layers.3.mlp.experts.gate_up_proj[17]")
        ExpertName(experts='model.layers.3.mlp.experts', parameter='gate_up_proj', number=17)
    """
    match = _NAME.fullmatch(name)
    return None if match is None else ExpertName(match[1], match[2], int(match[3]))


class ExpertMatrix(nn.Module):
    """One expert's matrix of a module of fused experts, as a linear layer: y = W x.

    It holds no parameter: `weight` is a view of the experts' own. It is in no model's `named_modules`.

    Args:
        experts: the module that holds all experts of a layer.
        experts_name: its name in the model.
        parameter: the name of its parameter.
        index: of the expert.

    Attributes:
        in_features: d_in.
        out_features: d_out.
    """

    experts: nn.Module
    experts_name: str
    parameter: str
    index: int
    out_features: int
    in_features: int

    def __init__(self, experts: nn.Module, experts_name: str, parameter: str, index: int) -> None:
        super().__init__()
        _, *shape = shape_of(getattr(experts, parameter))
        out_features, in_features = reversed(shape) if is_transposed(experts) else shape
        # Not by attributes: `experts` is no submodule, and of thousands of matrices the assignments of `nn.Module` take seconds.
        vars(self).update(experts=experts, experts_name=experts_name, parameter=parameter, index=index)
        vars(self).update(out_features=out_features, in_features=in_features)

    @property
    def stack(self) -> torch.Tensor:
        """The parameter of all experts: (E, d_out, d_in), or (E, d_in, d_out) if the experts are transposed."""
        stack: torch.Tensor = getattr(self.experts, self.parameter)
        return stack

    @property
    def weight(self) -> torch.Tensor:
        """(d_out, d_in): a view of the experts' parameter."""
        return self.of_stack(self.stack)

    def of_stack(self, stack: torch.Tensor) -> torch.Tensor:
        """(d_out, d_in): this expert's matrix in a tensor of the parameter's layout."""
        matrix = stack[self.index]
        return matrix.mT if is_transposed(self.experts) else matrix

    def extra_repr(self) -> str:
        return f"{self.experts_name}.{self.parameter}[{self.index}], {self.out_features} × {self.in_features}"


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds routed experts in the form that transformers' `use_experts_implementation` gives them, unpacked."""
    ours = is_decorated(module) or type(module).__name__ in _SAME_FORM
    return ours and bool(stacks_of(module)) and not packed_experts(module)


def is_decorated(module: nn.Module) -> bool:
    """Whether transformers lets another function compute a module of experts (`use_experts_implementation`)."""
    return all(hasattr(module, mark) for mark in ("has_gate", "has_bias", "is_transposed", "num_experts", "config"))


def holds_experts(module: nn.Module) -> bool:
    """Whether a module seems to hold experts: parameters of three axes, or by the name of its class."""
    own = [parameter for parameter in module.parameters(recurse=False) if len(shape_of(parameter)) == 3]
    return len(own) > 1 or "Expert" in type(module).__name__


def is_transposed(experts: nn.Module) -> bool:
    """Whether the matrices of fused experts are stored as (d_in, d_out)."""
    return bool(getattr(experts, "is_transposed", False))


def stacks_of(experts: nn.Module) -> list[str]:
    """Names of the parameters with three axes that fused experts compute with, in the order of their use."""
    own = dict(experts.named_parameters(recurse=False))
    first = FIRST[0] if getattr(experts, "has_gate", True) else FIRST[1]
    names = [name for name in (first, LAST) if name in own and len(shape_of(own[name])) == 3]
    return names if len(names) == 2 else []


def matrices_of(experts: nn.Module, name: str) -> dict[str, ExpertMatrix]:
    """Name → matrix, of all experts of one module: first those that receive the hidden states."""
    matrices = {}
    for parameter in stacks_of(experts):
        for index in range(shape_of(getattr(experts, parameter))[0]):
            matrices[f"{name}.{parameter}[{index}]"] = ExpertMatrix(experts, name, parameter, index)
    return matrices


def expert_matrices(model: nn.Module) -> dict[str, ExpertMatrix]:
    """Name → matrix, of all fused experts of a model."""
    return {
        key: matrix
        for name, module in named_modules(model).items()
        if is_fused(module)
        for key, matrix in matrices_of(module, name).items()
    }


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's `named_modules`, and behind each module of fused experts its matrices. Repeated modules have all their names."""
    layers: dict[str, nn.Module] = {}
    known: dict[int, dict[str, ExpertMatrix]] = {}
    for name, module in named_modules(model).items():
        layers[name] = module
        if is_fused(module):
            own = known.setdefault(id(module), matrices_of(module, name))
            layers |= {f"{name}.{each.parameter}[{each.index}]": each for each in own.values()}
    return layers


def fused_of(layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Name → module of fused experts, of which `layers` has a matrix."""
    return {layer.experts_name: layer.experts for layer in layers if isinstance(layer, ExpertMatrix)}
